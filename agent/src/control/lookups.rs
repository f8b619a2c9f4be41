//! Lookups wanted and under way: each thing is looked up once at a time, in order, within bounds; every lookup that
//! the data plane waits for is answered by its deadline.

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use muster_common::time::Instant;

use super::{LOOKUP_PATIENCE, MAX_LOOKUPS, MAX_LOOKUPS_IN_FLIGHT};
use crate::datapath::PublicKey;

/// Before a lookup that got no answer is tried again.
const RETRY: Duration = Duration::from_millis(500);

/// What is known of the peer that is looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LookupBy {
    /// A virtual address.
    Address(IpAddr),
    /// A WireGuard public key.
    PublicKey(PublicKey),
}

#[derive(Debug)]
struct Lookup {
    by: LookupBy,
    /// Whether the data plane waits for an answer.
    awaited: bool,
    deadline: Instant,
    /// Not to be sent before.
    not_before: Instant,
    sent: Option<Sent>,
}

/// How a lookup was sent.
#[derive(Clone, Copy, Debug)]
struct Sent {
    id: u64,
    at: Instant,
    /// How many peers had been removed by then.
    removals: u64,
}

/// A lookup that has been answered.
#[derive(Debug)]
pub(super) struct Answered {
    pub(super) by: LookupBy,
    pub(super) awaited: bool,
    /// How many peers had been removed when it was sent.
    pub(super) removals: u64,
    pub(super) sent_at: Instant,
}

#[derive(Debug, Default)]
pub(super) struct Lookups {
    /// In the order in which they were wanted.
    lookups: BTreeMap<u64, Lookup>,
    by: BTreeMap<LookupBy, u64>,
    in_flight: BTreeMap<u64, u64>,
    next: u64,
}

impl Lookups {
    /// Wants a lookup. False if there is no room for it.
    pub(super) fn want(&mut self, by: LookupBy, awaited: bool, now: Instant) -> bool {
        if let Some(lookup) = self.by.get(&by).and_then(|n| self.lookups.get_mut(n)) {
            if awaited && !lookup.awaited {
                lookup.deadline = now + LOOKUP_PATIENCE;
            }
            lookup.awaited |= awaited;
            return true;
        }
        // What only might be needed leaves half of the room to what is.
        let room = if awaited { MAX_LOOKUPS } else { MAX_LOOKUPS / 2 };
        if self.lookups.len() >= room {
            return false;
        }
        let lookup = Lookup { by, awaited, deadline: now + LOOKUP_PATIENCE, not_before: now, sent: None };
        self.by.insert(by, self.next);
        self.lookups.insert(self.next, lookup);
        self.next += 1;
        true
    }

    /// The next lookup to send, with its id.
    pub(super) fn send(&mut self, removals: u64, now: Instant) -> Option<(u64, LookupBy)> {
        if self.in_flight.len() >= MAX_LOOKUPS_IN_FLIGHT {
            return None;
        }
        let ready = |l: &Lookup| l.sent.is_none() && l.not_before <= now;
        let (n, lookup) = self.lookups.iter_mut().find(|(_, lookup)| ready(lookup))?;
        let id = self.next;
        self.next += 1;
        lookup.sent = Some(Sent { id, at: now, removals });
        self.in_flight.insert(id, *n);
        Some((id, lookup.by))
    }

    /// Ends the lookup that was sent with `id`; `None` if it has ended before.
    pub(super) fn finish(&mut self, id: u64) -> Option<Answered> {
        let n = self.in_flight.remove(&id)?;
        let lookup = self.lookups.remove(&n)?;
        self.by.remove(&lookup.by);
        let Sent { at: sent_at, removals, .. } = lookup.sent?;
        Some(Answered { by: lookup.by, awaited: lookup.awaited, removals, sent_at })
    }

    /// The lookup that was sent with `id` got no answer: again, a little later.
    pub(super) fn retry(&mut self, id: u64, now: Instant) {
        if let Some(lookup) = self.in_flight.remove(&id).and_then(|n| self.lookups.get_mut(&n)) {
            lookup.sent = None;
            lookup.not_before = now + RETRY;
        }
    }

    /// The connection is gone, and what was sent on it void.
    pub(super) fn disconnected(&mut self) {
        self.in_flight.clear();
        for lookup in self.lookups.values_mut() {
            lookup.sent = None;
        }
    }

    /// Forgets lookups whose time is over; returns those that are awaited.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<LookupBy> {
        let over: Vec<u64> =
            self.lookups.iter().filter(|(_, l)| l.deadline <= now).map(|(n, _)| *n).collect();
        let lookups = over.into_iter().filter_map(|n| self.lookups.remove(&n));
        let mut awaited = Vec::new();
        for lookup in lookups {
            self.by.remove(&lookup.by);
            if let Some(Sent { id, .. }) = lookup.sent {
                self.in_flight.remove(&id);
            }
            if lookup.awaited {
                awaited.push(lookup.by);
            }
        }
        awaited
    }

    /// Forgets all; returns those that are awaited.
    pub(super) fn clear(&mut self) -> Vec<LookupBy> {
        self.by.clear();
        self.in_flight.clear();
        std::mem::take(&mut self.lookups).into_values().filter(|l| l.awaited).map(|l| l.by).collect()
    }

    /// The number of removals at which the oldest lookup under way was sent.
    pub(super) fn oldest_removals(&self) -> Option<u64> {
        self.lookups.values().filter_map(|l| l.sent.map(|sent| sent.removals)).min()
    }

    /// When the oldest lookup under way was sent.
    pub(super) fn oldest_sent(&self) -> Option<Instant> {
        self.lookups.values().filter_map(|l| l.sent.map(|sent| sent.at)).min()
    }

    /// When something is to be done: a deadline, or, being connected, a retry.
    pub(super) fn timeout(&self, connected: bool) -> Option<Instant> {
        let full = self.in_flight.len() >= MAX_LOOKUPS_IN_FLIGHT;
        let due = |l: &Lookup| {
            let retry = connected && !full && l.sent.is_none();
            if retry { l.deadline.min(l.not_before) } else { l.deadline }
        };
        self.lookups.values().map(due).min()
    }

    /// (wanted, of these under way)
    pub(super) fn len(&self) -> (usize, usize) {
        (self.lookups.len(), self.in_flight.len())
    }
}
