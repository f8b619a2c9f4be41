//! The cache: responses by question, bounded in octets, least recently used out first. Time is passed in. What is told
//! to have changed stays, outdated, as what has expired does: an old answer is better than none (RFC 8767).
//!
//! Every question stands for itself. In particular an NXDOMAIN says nothing of names below it, nor of other types
//! at the same name (RFC 8020 does not hold for names of Kubernetes' kind).

use std::{hash::RandomState, net::IpAddr, sync::Arc, time::Duration};

use hashlink::LruCache;
use hickory_proto::rr::Name;
use muster_common::{name::Domain, time::Instant};

use super::{
    held::Held,
    key::{Key, is_below, wire_name},
    stored::{Age, Stored},
};

/// After a failure, a stale answer is given for so long before the servers are tried again (RFC 8767, 5).
const RETRY_PAUSE: Duration = Duration::from_secs(5);
/// The same for an outdated answer, whose successor is known to exist: as short as may be (RFC 9520, 3.2).
const OUTDATED_RETRY_PAUSE: Duration = Duration::from_secs(1);
/// How long a server's failure is remembered where there is no older answer (CoreDNS' `cache`: `servfail 5s`; RFC 9520).
const FAILURE: Duration = Duration::from_secs(5);
/// Failures that are remembered, and octets of the largest.
const FAILURES_MAX: usize = 1024;
const FAILURE_OCTETS: usize = 600;
/// How often the data plane hears of the addresses in one answer.
const ANNOUNCED: Duration = Duration::from_secs(1);
/// Octets that a place in the cache takes beside key, entry and response: links, the index, and what the allocator adds.
const OVERHEAD: usize = 80;

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

/// Which answers are fetched anew before they expire: those in use, as CoreDNS' `cache` tells them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Prefetch {
    /// Those that were asked for so often; 0: none.
    pub amount: u32,
    /// Without a pause of this length.
    pub pause: Duration,
    /// When so many percent of their lifetime are left.
    pub percentage: u8,
}

impl Default for Prefetch {
    fn default() -> Self {
        Self { amount: 2, pause: Duration::from_secs(60), percentage: 10 }
    }
}

/// Bounds of the cache. Longest lifetimes are CoreDNS'. Its shortest, 5 s, is not ours: what a server says to hold for
/// no time is not kept any longer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CacheLimits {
    /// Octets, all in all.
    pub octets: usize,
    /// How long a positive answer holds at most.
    pub positive_ttl: Duration,
    /// How long a negative answer holds at most.
    pub negative_ttl: Duration,
    /// How long either holds at least.
    pub least_ttl: Duration,
    /// Which answers are fetched anew before they expire.
    pub prefetch: Prefetch,
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
            octets: 16 << 20,
            positive_ttl: Duration::from_secs(3600),
            negative_ttl: Duration::from_secs(1800),
            least_ttl: Duration::ZERO,
            prefetch: Prefetch::default(),
            network_stale: Duration::from_secs(30 * DAY),
            upstream_stale: Duration::from_secs(DAY),
        }
    }
}

/// Milliseconds since boot: half as large as an [`Instant`].
type Millis = u64;

fn millis(at: Instant) -> Millis {
    span(at.since_boot())
}

fn span(duration: Duration) -> Millis {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[derive(Debug)]
struct Entry {
    stored: Arc<Stored>,
    since: Millis,
    expires: Millis,
    stale_until: Millis,
    /// Not before this the servers are asked again, because they have just failed.
    retry_at: Millis,
    last_used: Millis,
    /// Not before this the data plane hears of the addresses again.
    announce_at: Millis,
    /// How often the entry was of use without a pause, and any before it.
    uses: u32,
    origin: Origin,
    /// Whether the entry counts for a Service.
    held: bool,
    /// Whether the name has changed since: the answer is stale, whatever its time to live says.
    outdated: bool,
}

impl Entry {
    /// The name has changed: the servers are asked at the next occasion, even if they have failed just before.
    fn outdate(&mut self) {
        self.outdated = true;
        self.retry_at = 0;
    }
}

fn size(key: &Key, entry: &Entry) -> usize {
    size_of::<Key>() + key.len() + size_of::<Entry>() + entry.stored.size() + OVERHEAD
}

/// What the cache has for a question.
#[derive(Clone, Debug)]
pub(super) struct Hit {
    pub(super) stored: Arc<Stored>,
    pub(super) age: Age,
    pub(super) origin: Origin,
    /// Whether the servers should be asked: the answer is stale, or in use and soon to be.
    pub(super) refresh: bool,
    /// Whether the data plane should hear of the addresses in the answer.
    pub(super) announce: bool,
}

/// What is saved of a registrar's response.
#[derive(Clone, Debug)]
pub(super) struct Saved {
    pub(super) stored: Arc<Stored>,
    /// How long it is of use.
    pub(super) stale_until: Instant,
    /// Whether the name has changed since.
    pub(super) outdated: bool,
}

/// The cache.
#[derive(Debug)]
pub(super) struct Cache {
    limits: CacheLimits,
    // Keyed hashing: what is looked up here, anybody on the host chooses.
    entries: LruCache<Key, Entry, RandomState>,
    failures: LruCache<Key, (Arc<Stored>, Origin, Millis), RandomState>,
    octets: usize,
    negatives: usize,
    evictions: u64,
    unsaved: Unsaved,
    held: Held,
}

impl Cache {
    pub(super) fn new(limits: CacheLimits) -> Self {
        Self {
            limits,
            entries: LruCache::with_hasher(usize::MAX, RandomState::new()),
            failures: LruCache::with_hasher(FAILURES_MAX, RandomState::new()),
            octets: 0,
            negatives: 0,
            evictions: 0,
            unsaved: Unsaved::Nothing,
            held: Held::new(""),
        }
    }

    /// Keeps account of the Services in `domain` that have answers here.
    pub(super) fn holding(mut self, domain: &Domain) -> Self {
        self.held = Held::new(domain.as_str());
        self
    }

    /// The Services that have answers here.
    pub(super) fn held(&self) -> &Held {
        &self.held
    }

    /// Number of responses.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Number of responses that say that there is nothing.
    pub(super) fn negatives(&self) -> usize {
        self.negatives
    }

    /// Responses that have had to give way to others, so far.
    pub(super) fn evictions(&self) -> u64 {
        self.evictions
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

    /// Looks up the octets of a [`Key`].
    pub(super) fn lookup(&mut self, key: &[u8], now: Instant) -> Option<Hit> {
        let now = millis(now);
        let prefetch = self.limits.prefetch;
        let Some(entry) = self.entries.get_mut(key) else { return self.failure(key, now) };
        if now >= entry.stale_until && now >= entry.expires {
            if let Some((key, entry)) = self.entries.remove_entry(key) {
                self.account_removal(&key, &entry);
            }
            return None;
        }
        let (stored, origin) = (Arc::clone(&entry.stored), entry.origin);
        let announce = origin == Origin::Network && now >= entry.announce_at;
        if announce {
            entry.announce_at = now + span(ANNOUNCED);
        }
        let paused = now.saturating_sub(entry.last_used) >= span(prefetch.pause);
        entry.uses = if paused { 1 } else { entry.uses.saturating_add(1) };
        entry.last_used = now;
        if entry.outdated || now >= entry.expires {
            let age = if entry.outdated { Age::Outdated } else { Age::Stale };
            let refresh = now >= entry.retry_at;
            return Some(Hit { stored, age, origin, refresh, announce });
        }
        let lifetime = entry.expires - entry.since;
        let popular = prefetch.amount > 0 && entry.uses >= prefetch.amount;
        let soon = (entry.expires - now) * 100 <= lifetime * u64::from(prefetch.percentage);
        // At most one request a second.
        let refresh = popular && soon && now >= entry.retry_at;
        if refresh {
            entry.retry_at = now + 1000;
        }
        let seconds = u32::try_from(now.saturating_sub(entry.since) / 1000).unwrap_or(u32::MAX);
        Some(Hit { stored, age: Age::Fresh(seconds), origin, refresh, announce })
    }

    fn failure(&mut self, key: &[u8], now: Millis) -> Option<Hit> {
        if self.failures.is_empty() {
            return None;
        }
        let (stored, origin, until) = self.failures.peek(key)?;
        if now >= *until {
            self.failures.remove(key);
            return None;
        }
        let (stored, origin) = (Arc::clone(stored), *origin);
        Some(Hit { stored, age: Age::Fresh(0), origin, refresh: false, announce: false })
    }

    /// Keeps a response, in place of an older one. One that says nothing of how long it holds is not kept, but an older
    /// one it disproves all the same: that must not come back as a stale answer.
    pub(super) fn insert(&mut self, key: Key, stored: Arc<Stored>, origin: Origin, now: Instant) {
        let Some(ttl) = stored.ttl else {
            if stored.is_answer()
                && let Some((key, old)) = self.entries.remove_entry(&*key)
            {
                self.account_removal(&key, &old);
            }
            return;
        };
        let limit = if stored.negative { self.limits.negative_ttl } else { self.limits.positive_ttl };
        let expires = now + Duration::from_secs(ttl.into()).max(self.limits.least_ttl).min(limit);
        let stale = match origin {
            Origin::Network if !stored.negative => self.limits.network_stale,
            _ => self.limits.upstream_stale,
        };
        if origin == Origin::Network {
            // What takes the place of an outdated answer is new: that must not be what a restart finds.
            let new = match self.entries.peek(&*key) {
                Some(old) => old.outdated && !(old.stored.negative && stored.negative),
                None => !stored.negative,
            };
            self.unsaved = self.unsaved.max(if new { Unsaved::New } else { Unsaved::Refreshed });
        }
        self.put(key, stored, origin, (now, expires, expires + stale));
    }

    /// Keeps a response that was under way while its name changed, unless there is one from after the change.
    pub(super) fn insert_outdated(&mut self, key: Key, stored: Arc<Stored>, origin: Origin, now: Instant) {
        let superseded = self.entries.peek(&*key).is_some_and(|entry| !entry.outdated);
        if superseded || stored.ttl.is_none() {
            return;
        }
        self.insert(key.clone(), stored, origin, now);
        if let Some(entry) = self.entries.peek_mut(&*key) {
            entry.outdate();
        }
    }

    /// Keeps a response that was taken from a snapshot: stale from the start, and of use until `stale_until`.
    pub(super) fn restore(&mut self, key: Key, saved: Saved, now: Instant) {
        self.put(key.clone(), saved.stored, Origin::Network, (now, now, saved.stale_until));
        if saved.outdated
            && let Some(entry) = self.entries.peek_mut(&*key)
        {
            entry.outdate();
        }
    }

    fn put(
        &mut self,
        key: Key,
        stored: Arc<Stored>,
        origin: Origin,
        (since, expires, stale_until): (Instant, Instant, Instant),
    ) {
        // First the new one, so that a Service with one answer is held all the time.
        let held = origin == Origin::Network && self.held.add(key.wire_name());
        let (mut uses, mut last_used) = (0, 0);
        if let Some((key, old)) = self.entries.remove_entry(&*key) {
            (uses, last_used) = (old.uses, old.last_used);
            self.account_removal(&key, &old);
        }
        self.failures.remove(&*key);
        let entry = Entry {
            since: millis(since),
            expires: millis(expires),
            stale_until: millis(stale_until),
            retry_at: millis(since),
            last_used,
            announce_at: 0,
            uses,
            origin,
            held,
            outdated: false,
            stored,
        };
        self.octets += size(&key, &entry);
        self.negatives += usize::from(entry.stored.negative);
        self.entries.insert(key, entry);
        while self.octets > self.limits.octets {
            let Some((key, entry)) = self.entries.remove_lru() else { break };
            self.evictions += 1;
            self.account_removal(&key, &entry);
        }
    }

    fn account_removal(&mut self, key: &Key, entry: &Entry) {
        self.octets -= size(key, entry);
        self.negatives -= usize::from(entry.stored.negative);
        if entry.held {
            self.held.remove(key.wire_name());
        }
    }

    /// Notes that no server had an answer, so that stale ones are given at once for a while.
    pub(super) fn failed(&mut self, key: &[u8], now: Instant) {
        if let Some(entry) = self.entries.peek_mut(key) {
            let pause = if entry.outdated { OUTDATED_RETRY_PAUSE } else { RETRY_PAUSE };
            entry.retry_at = millis(now + pause);
        }
    }

    /// Remembers for a moment that a server has answered with a failure, unless there is an older answer.
    pub(super) fn keep_failure(&mut self, key: Key, stored: Arc<Stored>, origin: Origin, now: Instant) {
        if stored.size() <= FAILURE_OCTETS && !self.entries.contains_key(&*key) {
            self.failures.insert(key, (stored, origin, millis(now + FAILURE)));
        }
    }

    /// Everything at and below `zone`, which is on the wire and in lower case, and the reverse names of the addresses
    /// there have changed. What says that there is nothing stays, too: a client that goes through a search list goes on
    /// after a stale NXDOMAIN, but not after a failure.
    pub(super) fn outdate_with_reverse(&mut self, zone: &[u8]) {
        let addresses = self.outdate(|key| is_below(key.wire_name(), zone));
        if !addresses.is_empty() {
            let mut reverse: Vec<Vec<u8>> =
                addresses.into_iter().map(|address| wire_name(&Name::from(address))).collect();
            reverse.sort_unstable();
            self.outdate(|key| reverse.binary_search_by(|name| (**name).cmp(key.wire_name())).is_ok());
        }
    }

    /// Returns the addresses in what is outdated. Failures are forgotten.
    fn outdate(&mut self, changed: impl Fn(&Key) -> bool) -> Vec<IpAddr> {
        self.failures.retain(|key, _| !changed(key));
        let mut addresses = Vec::new();
        for (_, entry) in self.entries.iter_mut().filter(|(key, _)| changed(key)) {
            entry.outdate();
            addresses.extend(entry.stored.addresses());
        }
        addresses
    }

    /// What there is to save.
    pub(super) fn unsaved(&self) -> Unsaved {
        self.unsaved
    }

    /// Everything is being saved.
    pub(super) fn saved(&mut self) {
        self.unsaved = Unsaved::Nothing;
    }

    /// Registrars' responses, most recently used first.
    pub(super) fn network_entries(&self) -> impl Iterator<Item = (&Key, Saved)> {
        let ours = self.entries.iter().rev().filter(|(_, entry)| entry.origin == Origin::Network);
        ours.map(|(key, entry)| {
            let saved = Saved {
                stored: Arc::clone(&entry.stored),
                stale_until: Instant::from_boot(Duration::from_millis(entry.stale_until)),
                outdated: entry.outdated,
            };
            (key, saved)
        })
    }
}

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;
