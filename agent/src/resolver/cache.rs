//! The cache: responses by question, bounded in octets, least recently used out first. Time is passed in.
//!
//! Every question stands for itself. In particular an NXDOMAIN says nothing of names below it, nor of other types
//! at the same name (RFC 8020 does not hold for names of Kubernetes' kind).

use std::{hash::RandomState, sync::Arc, time::Duration};

use hashlink::LruCache;
use hickory_proto::rr::{Name, RecordType};
use muster_common::time::Instant;
use muster_dns::message::Request;

use super::stored::{Age, Stored};

/// After a failure, a stale answer is given for so long before the servers are tried again (RFC 8767, 5).
const RETRY_PAUSE: Duration = Duration::from_secs(5);
/// Octets that a place in the cache takes beside key and response.
const OVERHEAD: usize = 64;

/// What a cached response answers.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Key {
    /// In lower case.
    pub(super) name: Name,
    pub(super) record_type: RecordType,
    /// DO and CD change what a resolver answers.
    pub(super) dnssec_ok: bool,
    pub(super) checking_disabled: bool,
}

impl Key {
    pub(super) fn of(request: &Request) -> Self {
        Self {
            name: request.question.name.to_lowercase(),
            record_type: request.record_type(),
            dnssec_ok: request.edns.as_ref().is_some_and(|edns| edns.flags().dnssec_ok),
            checking_disabled: request.metadata.checking_disabled,
        }
    }

    fn size(&self) -> usize {
        size_of::<Self>() + self.name.len()
    }
}

/// What the cache has learnt of the network's names since it was saved.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub enum Unsaved {
    /// Nothing.
    #[default]
    Nothing,
    /// Answers to questions that it had an answer to before.
    Refreshed,
    /// Answers to other questions.
    New,
}

/// Whom a response came from.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Origin {
    /// A registrar: names of the network.
    Network,
    /// The servers that the host has: all other names.
    Upstream,
}

/// Bounds of the cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CacheLimits {
    /// Octets, all in all.
    pub octets: usize,
    /// How long a positive answer holds at most.
    pub positive_ttl: Duration,
    /// How long a negative answer holds at most.
    pub negative_ttl: Duration,
    /// For how long after its expiry an answer of a registrar is given while no registrar answers: as long as the
    /// device's certificate may be valid, since tunnels and names must not die with the registrars.
    pub network_stale: Duration,
    /// The same for answers of the host's servers, and for negative answers.
    pub upstream_stale: Duration,
}

impl Default for CacheLimits {
    fn default() -> Self {
        const DAY: u64 = 86_400;
        Self {
            octets: 8 << 20,
            positive_ttl: Duration::from_secs(DAY),
            negative_ttl: Duration::from_secs(3600),
            network_stale: Duration::from_secs(30 * DAY),
            upstream_stale: Duration::from_secs(DAY),
        }
    }
}

#[derive(Debug)]
struct Entry {
    stored: Arc<Stored>,
    origin: Origin,
    since: Instant,
    expires: Instant,
    stale_until: Instant,
    /// Not before this the servers are asked again, because they have just failed.
    retry_at: Instant,
    /// Whether the entry was of use since it came.
    used: bool,
}

/// What the cache has for a question.
#[derive(Clone, Debug)]
pub(super) struct Hit {
    pub(super) stored: Arc<Stored>,
    pub(super) age: Age,
    pub(super) origin: Origin,
    /// Whether the servers should be asked: the answer is stale, or in use and soon to be.
    pub(super) refresh: bool,
}

/// The cache.
#[derive(Debug)]
pub(super) struct Cache {
    limits: CacheLimits,
    // Keyed hashing: what is looked up here, anybody on the host chooses.
    entries: LruCache<Key, Entry, RandomState>,
    octets: usize,
    unsaved: Unsaved,
}

impl Cache {
    pub(super) fn new(limits: CacheLimits) -> Self {
        Self {
            limits,
            entries: LruCache::with_hasher(usize::MAX, RandomState::new()),
            octets: 0,
            unsaved: Unsaved::Nothing,
        }
    }

    /// Number of responses.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Octets in use.
    pub(super) fn octets(&self) -> usize {
        self.octets
    }

    /// The longest time to live that a record may have here, in seconds.
    pub(super) fn ttl_max(&self) -> u32 {
        u32::try_from(self.limits.positive_ttl.as_secs()).unwrap_or(u32::MAX)
    }

    /// How long a registrar's answer is kept beyond its expiry, at most.
    pub(super) fn network_stale(&self) -> Duration {
        self.limits.network_stale
    }

    /// Looks `key` up.
    pub(super) fn lookup(&mut self, key: &Key, now: Instant) -> Option<Hit> {
        let entry = self.entries.get_mut(key)?;
        if now >= entry.stale_until && now >= entry.expires {
            self.remove(key);
            return None;
        }
        let (stored, origin) = (Arc::clone(&entry.stored), entry.origin);
        if now >= entry.expires {
            let refresh = now >= entry.retry_at;
            return Some(Hit { stored, age: Age::Stale, origin, refresh });
        }
        let lifetime = entry.expires - entry.since;
        // Refreshed in the last tenth of its life, if it was of use before; at most one request a second.
        let refresh = entry.used && entry.expires - now <= lifetime / 10 && now >= entry.retry_at;
        if refresh {
            entry.retry_at = now + Duration::from_secs(1);
        }
        entry.used = true;
        let seconds = u32::try_from((now - entry.since).as_secs()).unwrap_or(u32::MAX);
        Some(Hit { stored, age: Age::Fresh(seconds), origin, refresh })
    }

    /// Keeps a response, in place of an older one. What says nothing of how long it holds is not kept.
    pub(super) fn insert(&mut self, key: Key, stored: Arc<Stored>, origin: Origin, now: Instant) {
        let Some(ttl) = stored.ttl else { return };
        let limit = if stored.negative { self.limits.negative_ttl } else { self.limits.positive_ttl };
        let expires = now + Duration::from_secs(ttl.into()).min(limit);
        let stale = match origin {
            Origin::Network if !stored.negative => self.limits.network_stale,
            _ => self.limits.upstream_stale,
        };
        if origin == Origin::Network {
            let new = !stored.negative && !self.entries.contains_key(&key);
            self.unsaved = self.unsaved.max(if new { Unsaved::New } else { Unsaved::Refreshed });
        }
        self.put(key, stored, origin, (now, expires, expires + stale));
    }

    /// Keeps a response that was taken from a snapshot: stale from the start, and of use until `stale_until`.
    pub(super) fn restore(&mut self, key: Key, stored: Arc<Stored>, now: Instant, stale_until: Instant) {
        self.put(key, stored, Origin::Network, (now, now, stale_until));
    }

    fn put(
        &mut self,
        key: Key,
        stored: Arc<Stored>,
        origin: Origin,
        (since, expires, stale_until): (Instant, Instant, Instant),
    ) {
        self.remove(&key);
        self.octets += key.size() + stored.size() + OVERHEAD;
        let entry = Entry { stored, origin, since, expires, stale_until, retry_at: since, used: false };
        self.entries.insert(key, entry);
        while self.octets > self.limits.octets {
            match self.entries.remove_lru() {
                Some((key, entry)) => self.octets -= key.size() + entry.stored.size() + OVERHEAD,
                None => break,
            }
        }
    }

    /// Notes that no server had an answer, so that stale ones are given at once for a while.
    pub(super) fn failed(&mut self, key: &Key, now: Instant) {
        if let Some(entry) = self.entries.peek_mut(key) {
            entry.retry_at = now + RETRY_PAUSE;
        }
    }

    /// Forgets everything at `name` and below.
    pub(super) fn invalidate(&mut self, name: &Name) {
        let octets = &mut self.octets;
        self.entries.retain(|key, entry| {
            let keep = !name.zone_of(&key.name);
            if !keep {
                *octets -= key.size() + entry.stored.size() + OVERHEAD;
            }
            keep
        });
    }

    /// What there is to save.
    pub(super) fn unsaved(&self) -> Unsaved {
        self.unsaved
    }

    /// Everything is being saved.
    pub(super) fn saved(&mut self) {
        self.unsaved = Unsaved::Nothing;
    }

    /// Registrars' responses with the time until which each is of use, most recently used first.
    pub(super) fn network_entries(&self) -> impl Iterator<Item = (&Key, &Arc<Stored>, Instant)> {
        let ours = self.entries.iter().rev().filter(|(_, entry)| entry.origin == Origin::Network);
        ours.map(|(key, entry)| (key, &entry.stored, entry.stale_until))
    }

    fn remove(&mut self, key: &Key) {
        if let Some((key, entry)) = self.entries.remove_entry(key) {
            self.octets -= key.size() + entry.stored.size() + OVERHEAD;
        }
    }
}

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;
