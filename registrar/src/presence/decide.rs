//! Where the sessions of endpoints are, as one registrar decides of devices whose sessions begin and end with it. Pure: what
//! the store says, the session and the time go in, what to write comes out; the store takes it only if nobody was first.
//!
//! A registrar writes itself down when a device comes to it, and that the device is away once its session has been over for
//! [`PATIENCE`]. For a registrar that has ceased to run, any other one does so. While none runs, nothing is written, and
//! all stay what they were.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use muster_common::time::Instant;
use uuid::Uuid;

use crate::{registry::presence::Presence, store::Revision};

/// For how long an endpoint may be without a session before it is away: agents find another registrar within this.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// For how long a registrar that has just started waits for the devices of registrars that do not run: they are about to
/// come here, at the end of their longest pause.
pub const AFTER_START: Duration = Duration::from_secs(60);

/// A device, by its network and uid.
pub type Place = (Arc<str>, Uuid);

/// What becomes of one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// All is as it should be, or it is not for this registrar to say.
    Keep,
    /// It may have to be written, but not before this moment.
    Wait(Instant),
    /// To be written, if the store still has what was seen: the registrar that has the session.
    Write(Revision, Option<Uuid>),
}

/// What one registrar remembers.
#[derive(Debug)]
pub struct Decider {
    registrar: Uuid,
    started: Instant,
    /// Since when a device has been without a session, and what the store said then.
    doubted: BTreeMap<Place, (Presence, Instant)>,
    /// The session, here, that the store knows of. What another registrar writes after that is of a later one.
    known: BTreeMap<Place, u64>,
}

impl Decider {
    /// For the registrar with this uid, which has started at `now`.
    pub fn new(registrar: Uuid, now: Instant) -> Self {
        Self { registrar, started: now, doubted: BTreeMap::new(), known: BTreeMap::new() }
    }

    /// What becomes of a device, of which the store says `found`; `session` is the one that it has here; `runs` says
    /// whether a registrar runs.
    pub fn judge(
        &mut self,
        place: &Place,
        found: Option<Presence>,
        session: Option<u64>,
        runs: impl Fn(Uuid) -> bool,
        now: Instant,
    ) -> Verdict {
        let own = Some(self.registrar);
        let verdict = match (found, session) {
            (None, None) => Verdict::Keep,
            (None, Some(_)) => Verdict::Write(0, own),
            (Some(found), Some(session)) if found.registrar == own => {
                self.known.insert(place.clone(), session);
                Verdict::Keep
            }
            (Some(found), Some(session)) => {
                let is_elsewhere = found.registrar.is_some_and(runs);
                match is_elsewhere && self.known.get(place) == Some(&session) {
                    true => Verdict::Keep,
                    false => Verdict::Write(found.revision, own),
                }
            }
            (Some(found), None) => self.miss(place, found, runs, now),
        };
        if !matches!(verdict, Verdict::Wait(_)) {
            self.doubted.remove(place);
        }
        if session.is_none() {
            self.known.remove(place);
        }
        verdict
    }

    /// A device that has no session here.
    fn miss(&mut self, place: &Place, found: Presence, runs: impl Fn(Uuid) -> bool, now: Instant) -> Verdict {
        let Some(registrar) = found.registrar else { return Verdict::Keep };
        if registrar != self.registrar && runs(registrar) {
            return Verdict::Keep;
        }
        let since = match self.doubted.get(place) {
            Some((doubted, since)) if *doubted == found => *since,
            _ => now,
        };
        self.doubted.insert(place.clone(), (found, since));
        let earliest = if registrar == self.registrar { now } else { self.started + AFTER_START };
        let until = (since + PATIENCE).max(earliest);
        if now < until { Verdict::Wait(until) } else { Verdict::Write(found.revision, None) }
    }

    /// The store has taken that the device has its session here.
    pub fn came(&mut self, place: &Place, session: u64) {
        self.known.insert(place.clone(), session);
    }

    #[cfg(test)]
    pub(super) fn remembers(&self) -> usize {
        self.doubted.len() + self.known.len()
    }
}
