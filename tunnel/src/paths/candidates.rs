//! The endpoints at which a peer may be reached: those that were told, best first, and a few that it was heard from.

use std::{cmp::Reverse, time::Duration};

use muster_common::time::Instant;

use super::{LEARNED, LOST_FOR, PROBES_KEPT, STALE_AFTER, TRIGGERED_EVERY};
use crate::endpoint::{Endpoint, Links};

/// What is known of one endpoint.
#[derive(Clone, Debug)]
pub(super) struct Candidate {
    pub(super) endpoint: Endpoint,
    pub(super) is_told: bool,
    /// When something authentic last came from it, while it was not the current path.
    pub(super) heard: Option<Instant>,
    /// When a probe of it was last answered.
    pub(super) proven: Option<Instant>,
    /// When it was given up: nothing came, or the director has no such device.
    lost: Option<Instant>,
    /// Shortest of the round, or the last since.
    pub(super) round_trip: Option<Duration>,
    wants_probe: bool,
    /// Probes that were sent last, and when.
    sent: [Option<(u64, Instant)>; PROBES_KEPT],
    next: usize,
}

impl Candidate {
    fn new(endpoint: Endpoint, is_told: bool) -> Self {
        Self {
            endpoint,
            is_told,
            heard: None,
            proven: None,
            lost: None,
            round_trip: None,
            wants_probe: false,
            sent: [None; PROBES_KEPT],
            next: 0,
        }
    }

    /// Whether a probe was answered in the last `time`.
    pub(super) fn is_proven(&self, time: Duration, now: Instant) -> bool {
        self.proven.is_some_and(|at| now - at < time)
    }

    fn is_lost(&self, now: Instant) -> bool {
        self.lost.is_some_and(|lost| now - lost < LOST_FOR && self.heard.is_none_or(|heard| heard < lost))
    }

    fn sent_last(&self) -> Option<Instant> {
        self.sent.iter().flatten().map(|(_, at)| *at).max()
    }

    /// Takes the probe that `nonce` answers.
    pub(super) fn take_sent(&mut self, nonce: u64) -> Option<Instant> {
        let slot = self.sent.iter_mut().find(|slot| slot.is_some_and(|(sent, _)| sent == nonce))?;
        slot.take().map(|(_, at)| at)
    }
}

/// All endpoints of a peer. At most 16 addresses and 4 relays that were told, and [`LEARNED`] others.
#[derive(Clone, Debug, Default)]
pub(super) struct Candidates(Vec<Candidate>);

impl Candidates {
    pub(super) fn iter(&self) -> impl Iterator<Item = &Candidate> {
        self.0.iter()
    }

    pub(super) fn get(&self, endpoint: &Endpoint) -> Option<&Candidate> {
        self.0.iter().find(|candidate| candidate.endpoint == *endpoint)
    }

    pub(super) fn get_mut(&mut self, endpoint: &Endpoint) -> Option<&mut Candidate> {
        self.0.iter_mut().find(|candidate| candidate.endpoint == *endpoint)
    }

    pub(super) fn has_relays(&self) -> bool {
        self.0.iter().any(|candidate| candidate.endpoint.is_relay())
    }

    /// Replaces those that were told, of which it returns the new ones. Of the others it keeps those that are in use.
    pub(super) fn tell(
        &mut self,
        told: impl Iterator<Item = Endpoint>,
        current: Option<Endpoint>,
        now: Instant,
    ) -> Vec<Endpoint> {
        let mut former = std::mem::take(&mut self.0);
        let mut news = Vec::new();
        for endpoint in told {
            if self.get(&endpoint).is_some() {
                continue;
            }
            let known = former.iter().position(|candidate| candidate.endpoint == endpoint);
            let mut candidate =
                known.map_or_else(|| Candidate::new(endpoint, true), |index| former.swap_remove(index));
            if !candidate.is_told || known.is_none() {
                news.push(endpoint);
            }
            candidate.is_told = true;
            self.0.push(candidate);
        }
        let is_relayed = self.has_relays() || current.is_some_and(|endpoint| endpoint.is_relay());
        for mut candidate in former {
            let is_current = Some(candidate.endpoint) == current;
            if is_relayed && (is_current || !candidate.is_told || candidate.is_proven(STALE_AFTER, now)) {
                candidate.is_told = false;
                self.0.push(candidate);
            }
        }
        if is_relayed && let Some(current) = current {
            self.learn(current, Some(current));
        }
        self.trim(LEARNED, current);
        news
    }

    /// Adds an endpoint that the peer was heard from.
    pub(super) fn learn(&mut self, endpoint: Endpoint, current: Option<Endpoint>) {
        if self.get(&endpoint).is_none() {
            self.trim(LEARNED - 1, current);
            self.0.push(Candidate::new(endpoint, false));
        }
    }

    /// Of the endpoints that were not told, the oldest goes, unproven ones first.
    fn trim(&mut self, most: usize, current: Option<Endpoint>) {
        while self.0.iter().filter(|candidate| !candidate.is_told).count() > most {
            let learned =
                self.0.iter().enumerate().filter(|(_, c)| !c.is_told && Some(c.endpoint) != current);
            let oldest = learned.min_by_key(|(_, candidate)| (candidate.proven, candidate.heard));
            let Some((index, _)) = oldest else { return };
            self.0.remove(index);
        }
    }

    /// A new round measures all addresses, and the current path.
    pub(super) fn forget_round_trips(&mut self) {
        self.0.iter_mut().for_each(|candidate| candidate.round_trip = None);
    }

    /// All that a round asks.
    pub(super) fn want_probes(&mut self, current: Option<Endpoint>) {
        for candidate in &mut self.0 {
            candidate.wants_probe |= !candidate.endpoint.is_relay() || Some(candidate.endpoint) == current;
        }
    }

    pub(super) fn want_probe(&mut self, endpoint: &Endpoint) {
        if let Some(candidate) = self.get_mut(endpoint) {
            candidate.wants_probe = true;
        }
    }

    /// The peer was heard from an endpoint of which it is not known whether it is reached there.
    pub(super) fn want_proof(&mut self, endpoint: &Endpoint, now: Instant) {
        if let Some(candidate) = self.get_mut(endpoint)
            && !candidate.is_proven(super::FRESH_FOR, now)
            && candidate.sent_last().is_none_or(|at| now - at >= TRIGGERED_EVERY)
        {
            candidate.wants_probe = true;
        }
    }

    pub(super) fn next_probe(
        &mut self,
        links: &Links,
        now: Instant,
        nonce: impl FnOnce() -> u64,
    ) -> Option<(Endpoint, u64)> {
        let wanted = |candidate: &mut Candidate| {
            std::mem::take(&mut candidate.wants_probe) && links.reach(&candidate.endpoint)
        };
        let candidate = self.0.iter_mut().find_map(|candidate| wanted(candidate).then_some(candidate))?;
        let nonce = nonce();
        if let Some(slot) = candidate.sent.get_mut(candidate.next % PROBES_KEPT) {
            *slot = Some((nonce, now));
        }
        candidate.next = candidate.next.wrapping_add(1);
        Some((candidate.endpoint, nonce))
    }

    pub(super) fn forget_probes(&mut self) {
        self.0.iter_mut().for_each(|candidate| candidate.wants_probe = false);
    }

    pub(super) fn set_lost(&mut self, endpoint: &Endpoint, lost: Option<Instant>) {
        if let Some(candidate) = self.get_mut(endpoint) {
            candidate.lost = lost;
        }
    }

    /// Whether `endpoint` was lost at this time or after it.
    pub(super) fn is_lost_since(&self, endpoint: &Endpoint, since: Instant) -> bool {
        self.get(endpoint).is_some_and(|candidate| candidate.lost.is_some_and(|lost| lost >= since))
    }

    pub(super) fn set_found(&mut self, is_found: impl Fn(&Endpoint) -> bool) {
        self.0.iter_mut().filter(|c| is_found(&c.endpoint)).for_each(|candidate| candidate.lost = None);
    }

    /// The relay to use instead of `other`: one that stays before one that drains, then the one that the peer was last
    /// heard from, then in the order in which they were told.
    pub(super) fn relay(&self, other: Option<Endpoint>, links: &Links, now: Instant) -> Option<Endpoint> {
        let usable = self.0.iter().filter(|candidate| {
            candidate.endpoint.is_relay()
                && Some(candidate.endpoint) != other
                && links.reach(&candidate.endpoint)
                && !candidate.is_lost(now)
        });
        let best = usable.min_by_key(|candidate| {
            let heard = candidate.heard.filter(|at| now - *at < STALE_AFTER);
            (!links.is_steady(&candidate.endpoint), Reverse(heard), !candidate.is_told)
        });
        best.map(|candidate| candidate.endpoint)
    }

    /// The address other than `other` that was proven in the last `time` and has the shortest round trip.
    pub(super) fn direct(&self, other: Option<Endpoint>, time: Duration, now: Instant) -> Option<&Candidate> {
        self.0
            .iter()
            .filter(|c| !c.endpoint.is_relay() && Some(c.endpoint) != other && c.is_proven(time, now))
            .min_by_key(|candidate| candidate.round_trip.unwrap_or(Duration::MAX))
    }

    /// The address other than `other` with the shortest round trip of those that the current round has measured.
    pub(super) fn fastest(&self, other: Option<Endpoint>) -> Option<(Duration, Endpoint)> {
        self.0
            .iter()
            .filter(|c| !c.endpoint.is_relay() && Some(c.endpoint) != other)
            .filter_map(|candidate| Some((candidate.round_trip?, candidate.endpoint)))
            .min()
    }
}
