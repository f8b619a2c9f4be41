//! Rate limits by source, which is an address or a device, in bounded memory: a token bucket for each that has asked
//! lately.

use std::{collections::HashMap, hash::Hash, time::Duration};

use muster_common::time::Instant;

/// Sources that are remembered at a time, twice over.
const SOURCES: usize = 8192;

/// How often a source may do something.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    /// In the long run, a second.
    pub per_second: f64,
    /// At once, after a pause.
    pub burst: f64,
}

/// Token buckets by source. Two generations: when the younger one is full it becomes the older one, and the sources
/// of the older one that have not asked again are forgotten. None of this costs more than a look-up.
#[derive(Debug)]
pub struct RateLimit<K> {
    rate: Rate,
    young: HashMap<K, Bucket>,
    old: HashMap<K, Bucket>,
}

#[derive(Clone, Copy, Debug)]
struct Bucket {
    tokens: f64,
    at: Instant,
}

impl<K: Copy + Eq + Hash> RateLimit<K> {
    /// No source has asked yet.
    pub fn new(rate: Rate) -> Self {
        Self { rate, young: HashMap::new(), old: HashMap::new() }
    }

    /// Whether `source` may go on, without counting.
    pub fn may(&mut self, source: K, now: Instant) -> bool {
        self.bucket(source, now).tokens >= 1.0
    }

    /// Counts one; says whether `source` may go on.
    pub fn take(&mut self, source: K, now: Instant) -> bool {
        let bucket = self.bucket(source, now);
        let may = bucket.tokens >= 1.0;
        if may {
            bucket.tokens -= 1.0;
        }
        may
    }

    fn bucket(&mut self, source: K, now: Instant) -> &mut Bucket {
        let rate = self.rate;
        if !self.young.contains_key(&source) && self.young.len() >= SOURCES {
            self.old = std::mem::take(&mut self.young);
        }
        let old = &self.old;
        let fresh = || old.get(&source).copied().unwrap_or(Bucket { tokens: rate.burst, at: now });
        let bucket = self.young.entry(source).or_insert_with(fresh);
        let passed: Duration = now - bucket.at;
        bucket.tokens = (bucket.tokens + passed.as_secs_f64() * rate.per_second).min(rate.burst);
        bucket.at = now;
        bucket
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(milliseconds: u64) -> Instant {
        Instant::from_boot(Duration::from_millis(milliseconds))
    }

    #[test]
    fn a_source_may_burst_and_then_keep_its_rate() {
        let mut limit = RateLimit::new(Rate { per_second: 2.0, burst: 3.0 });
        let (a, b) = ("a", "b");
        assert_eq!((0..5).filter(|_| limit.take(a, at(0))).count(), 3);
        assert!(limit.may(b, at(0)) && limit.take(b, at(0)));
        assert!(!limit.may(a, at(499)));
        assert!(limit.take(a, at(500)) && !limit.take(a, at(500)));
    }

    #[test]
    fn memory_is_bounded() {
        let mut limit = RateLimit::new(Rate { per_second: 1.0, burst: 1.0 });
        for n in 0..100_000_u32 {
            limit.take(n, at(0));
        }
        assert!(limit.young.len() <= SOURCES && limit.old.len() <= SOURCES);
        assert!(!limit.take(99_999, at(0)));
    }
}
