//! Which device carries which subnet of a site, as one registrar decides for the devices that have their session with
//! it. Pure: the index, the sessions and the time go in, writes come out; the store takes each only if nobody was first.
//!
//! A carrier stays while nothing speaks against it. The registrar that had its session lets go of it [`PATIENCE`] after
//! the session has ended; unless another one has a session with it and says so within [`CONFIRM`], any registrar gives
//! the subnet to a device of its own then. So it is, too, when the registrar has ceased to run. Without anybody to take
//! over, the carrier is left, so that it goes on while no registrar runs at all.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use muster_common::time::Instant;
use uuid::Uuid;

use crate::registry::index::Index;
use crate::registry::site::Carrier;
use crate::registry::state::NetworkState;
use crate::session::{Presence, SILENT};
use crate::store::Revision;

/// For how long a carrier may be without a session before its registrar lets go of it.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// For how long the others may say that they have a session with it, before another device takes over.
pub const CONFIRM: Duration = Duration::from_secs(1);
/// For how long a registrar that has just started leaves alone the carriers whose sessions were with registrars that do
/// not run: they are about to come here.
pub const AFTER_START: Duration = Duration::from_secs(30);

/// A subnet of a network.
type Place = (Arc<str>, IpNet);

/// What is to be written: the carrier of a subnet, if it is still at the revision that was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Name of the network.
    pub network: Arc<str>,
    /// The subnet.
    pub subnet: IpNet,
    /// The revision of the carrier that was seen; 0 if there was none.
    pub revision: Revision,
    /// The new carrier, device and registrar; `None` deletes it.
    pub carrier: Option<(Uuid, Option<Uuid>)>,
    /// Why.
    pub reason: Reason,
}

/// Why a carrier changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Nobody carries the subnet yet.
    First,
    /// The carrier has come to this registrar.
    Came,
    /// The carrier does not exist any more, is revoked, or may not carry it, or does not offer it.
    MayNot,
    /// The carrier has been without a session for too long.
    Away,
    /// Nobody has a session with the carrier.
    Lost,
}

impl Reason {
    /// For logs.
    pub fn text(self) -> &'static str {
        match self {
            Self::First => "nobody carried it",
            Self::Came => "its session is here now",
            Self::MayNot => "the one before may not, or does not offer it",
            Self::Away => "its session has ended",
            Self::Lost => "the one before is away",
        }
    }
}

/// What one registrar remembers between its decisions.
#[derive(Debug)]
pub struct Decider {
    registrar: Uuid,
    started: Instant,
    /// Since when something speaks against a carrier.
    doubted: BTreeMap<Place, (Carrier, Instant)>,
    /// The session, here, of a subnet's carrier that the store knows of. What another registrar writes after that is of
    /// a later session.
    known: BTreeMap<Place, (Uuid, u64)>,
}

impl Decider {
    /// For the registrar with this uid, which has started at `now`.
    pub fn new(registrar: Uuid, now: Instant) -> Self {
        Self { registrar, started: now, doubted: BTreeMap::new(), known: BTreeMap::new() }
    }

    /// What has to be written, and when to ask again if nothing changes before.
    pub fn decide(
        &mut self,
        index: &Index,
        presence: &dyn Fn(Uuid) -> Option<Presence>,
        now: Instant,
    ) -> (Vec<Decision>, Option<Instant>) {
        let mut decisions = Vec::new();
        let mut next: Option<Instant> = None;
        let mut sooner = |at: Instant| next = Some(next.map_or(at, |next| next.min(at)));
        let mut places: Vec<Place> = Vec::new();
        for state in index.networks() {
            let candidates = candidates(state, presence);
            let mut subnets: Vec<IpNet> = candidates.keys().chain(state.carriers.keys()).copied().collect();
            subnets.sort_unstable();
            subnets.dedup();
            for subnet in subnets {
                let place = (state.network.name.clone(), subnet);
                let found = state.carriers.get(&subnet).copied();
                let candidate = candidates.get(&subnet).copied();
                let heard = found.and_then(|carrier| presence(carrier.device)?.heard);
                heard.into_iter().for_each(|heard| sooner(heard + SILENT));
                match self.judge(index, state, &place, found, candidate, presence, now) {
                    Verdict::Keep => drop(self.doubted.remove(&place)),
                    Verdict::Wait(until) => sooner(until),
                    Verdict::Write(carrier, reason) => decisions.push(Decision {
                        network: place.0.clone(),
                        subnet,
                        revision: found.map_or(0, |carrier| carrier.revision),
                        carrier,
                        reason,
                    }),
                }
                places.push(place);
            }
        }
        places.sort_unstable();
        self.doubted.retain(|place, _| places.binary_search(place).is_ok());
        self.known.retain(|place, _| places.binary_search(place).is_ok());
        (decisions, next)
    }

    #[expect(clippy::too_many_arguments, reason = "all that bears on one subnet")]
    fn judge(
        &mut self,
        index: &Index,
        state: &NetworkState,
        place: &Place,
        found: Option<Carrier>,
        candidate: Option<Uuid>,
        presence: &dyn Fn(Uuid) -> Option<Presence>,
        now: Instant,
    ) -> Verdict {
        let own = candidate.map(|device| (device, Some(self.registrar)));
        let Some(carrier) = found else {
            return own.map_or(Verdict::Keep, |own| Verdict::Write(Some(own), Reason::First));
        };
        if !may_carry(state, carrier.device, place.1) {
            return Verdict::Write(own, Reason::MayNot);
        }
        if let Some(Presence { session, .. }) = presence(carrier.device) {
            let here = (carrier.device, session);
            if carrier.registrar == Some(self.registrar) {
                self.known.insert(place.clone(), here);
                return Verdict::Keep;
            }
            let elsewhere =
                carrier.registrar.is_some_and(|other| index.registrars().running().contains(&other));
            if elsewhere && self.known.get(place) == Some(&here) {
                return Verdict::Keep;
            }
            return Verdict::Write(Some((carrier.device, Some(self.registrar))), Reason::Came);
        }
        let (patience, earliest) = match carrier.registrar {
            Some(registrar) if registrar == self.registrar => (PATIENCE, now),
            Some(other) if index.registrars().running().contains(&other) => return Verdict::Keep,
            // Of a registrar that does not run any more: perhaps of this one's life before.
            Some(_) => (PATIENCE, self.started + AFTER_START),
            None => (CONFIRM, now),
        };
        let since = match self.doubted.get(place) {
            Some((doubted, since)) if *doubted == carrier => *since,
            _ => now,
        };
        self.doubted.insert(place.clone(), (carrier, since));
        let until = earliest.max(since + patience);
        if now < until {
            return Verdict::Wait(until);
        }
        if carrier.registrar == Some(self.registrar) {
            return Verdict::Write(Some((carrier.device, None)), Reason::Away);
        }
        own.map_or(Verdict::Keep, |own| Verdict::Write(Some(own), Reason::Lost))
    }

    /// The store has taken the decision. (What it has not taken, somebody else has decided.)
    pub fn written(&mut self, decision: &Decision, presence: &dyn Fn(Uuid) -> Option<Presence>) {
        let place = (decision.network.clone(), decision.subnet);
        if let Some((device, Some(_))) = decision.carrier
            && let Some(Presence { session, .. }) = presence(device)
        {
            self.known.insert(place, (device, session));
        }
    }
}

/// What becomes of one subnet.
enum Verdict {
    /// All is well, or nothing can be done about it.
    Keep,
    /// It may have to change, but not before this moment.
    Wait(Instant),
    /// It changes.
    Write(Option<(Uuid, Option<Uuid>)>, Reason),
}

/// The device, for each subnet, that would carry it: the lowest uid of those that may and have their session here.
fn candidates(state: &NetworkState, presence: &dyn Fn(Uuid) -> Option<Presence>) -> BTreeMap<IpNet, Uuid> {
    let mut candidates = BTreeMap::new();
    // By uid, so that the first one stays.
    for device in state.sites().filter(|device| device.is_reachable() && presence(device.uid).is_some()) {
        for subnet in device.may_carry() {
            candidates.entry(subnet).or_insert(device.uid);
        }
    }
    candidates
}

fn may_carry(state: &NetworkState, device: Uuid, subnet: IpNet) -> bool {
    let device = state.devices.by_uid(device).filter(|device| device.is_reachable());
    device.is_some_and(|device| device.may_carry().any(|other| other == subnet))
}
