//! Response-rate limiting: how many UDP responses a source prefix gets, so that forged queries neither flood
//! whom they name nor keep the server busy. A table of fixed size; no clock of its own.

use std::{
    hash::{BuildHasher, RandomState},
    net::IpAddr,
};

use muster_common::time::Instant;

/// Buckets in the table, a power of two.
const BUCKETS: usize = 1 << 16;
/// Prefixes that share a place in the table.
const WAYS: usize = 4;
/// Of the queries over the limit, every so-many-th is told to come again over TCP. Forged sources get little
/// from it, honest ones get their answer.
const SLIP: u32 = 2;

/// How many UDP responses per second each source prefix (IPv4 /24, IPv6 /56) gets.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Rate {
    /// In the long run, per second; at least 1.
    pub per_second: u32,
    /// At once, after a pause; at least 1.
    pub burst: u32,
}

impl Default for Rate {
    fn default() -> Self {
        Self { per_second: 200, burst: 400 }
    }
}

/// What to do with a query.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Answer it.
    Answer,
    /// Send an empty response with TC, so that the client comes again over TCP.
    Slip,
    /// Ignore it.
    Drop,
}

#[derive(Clone, Copy)]
struct Bucket {
    /// Hash of the prefix; 0 in an unused bucket.
    key: u64,
    /// Tokens left, in thousandths of a response.
    tokens: u64,
    /// When `tokens` was right, in milliseconds since boot.
    at: u64,
    /// Queries over the limit since the last one within it.
    over: u32,
}

/// The limiter's table, a token bucket per prefix. When more prefixes are active than it holds, the one that has
/// used least gives way.
pub struct Limiter {
    rate: Rate,
    hasher: RandomState,
    buckets: Box<[Bucket]>,
}

impl Limiter {
    /// An empty table.
    pub fn new(rate: Rate) -> Self {
        let rate = Rate { per_second: rate.per_second.max(1), burst: rate.burst.max(1) };
        let empty = Bucket { key: 0, tokens: 0, at: 0, over: 0 };
        Self { rate, hasher: RandomState::new(), buckets: vec![empty; BUCKETS].into_boxed_slice() }
    }

    /// Decides on a query from `source`, and counts it.
    pub fn check(&mut self, source: IpAddr, now: Instant) -> Verdict {
        let now = u64::try_from(now.since_boot().as_millis()).unwrap_or(u64::MAX);
        // Keyed, so that nobody can choose sources that share a bucket with somebody else's.
        let key = self.hasher.hash_one(prefix(source)).max(1);
        let full = u64::from(self.rate.burst) * 1000;
        let per_second = u64::from(self.rate.per_second);
        let refilled = |bucket: &Bucket| {
            let earned = now.saturating_sub(bucket.at).saturating_mul(per_second);
            bucket.tokens.saturating_add(earned).min(full)
        };
        let place = usize::try_from(key % (BUCKETS / WAYS) as u64).unwrap_or(0) * WAYS;
        let Some(ways) = self.buckets.get_mut(place..place + WAYS) else { return Verdict::Answer };
        let bucket = match ways.iter().position(|bucket| bucket.key == key) {
            Some(i) => ways.get_mut(i),
            None => ways.iter_mut().max_by_key(|b| if b.key == 0 { u64::MAX } else { refilled(b) }),
        };
        let Some(bucket) = bucket else { return Verdict::Answer };
        if bucket.key == key {
            bucket.tokens = refilled(bucket);
        } else {
            *bucket = Bucket { key, tokens: full, at: now, over: 0 };
        }
        bucket.at = now;
        if bucket.tokens >= 1000 {
            bucket.tokens -= 1000;
            bucket.over = 0;
            return Verdict::Answer;
        }
        bucket.over = bucket.over.wrapping_add(1);
        if bucket.over.is_multiple_of(SLIP) { Verdict::Slip } else { Verdict::Drop }
    }
}

fn prefix(address: IpAddr) -> u64 {
    match address {
        IpAddr::V4(v4) => u64::from(u32::from(v4) >> 8),
        IpAddr::V6(v6) => u64::try_from(u128::from(v6) >> 72).unwrap_or(0) | 1 << 63,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn at(milliseconds: u64) -> Instant {
        Instant::from_boot(Duration::from_millis(milliseconds))
    }

    #[test]
    fn a_burst_passes_then_the_rate_holds() {
        let mut limiter = Limiter::new(Rate { per_second: 10, burst: 5 });
        let source = "192.0.2.1".parse().unwrap();
        let mut verdicts = |time, n| (0..n).map(|_| limiter.check(source, at(time))).collect::<Vec<_>>();
        assert_eq!(verdicts(1000, 5), [Verdict::Answer; 5]);
        assert_eq!(verdicts(1000, 4), [Verdict::Drop, Verdict::Slip, Verdict::Drop, Verdict::Slip]);
        assert_eq!(verdicts(1100, 2), [Verdict::Answer, Verdict::Drop]);
        assert_eq!(verdicts(9000, 6)[..5], [Verdict::Answer; 5]);
    }

    #[test]
    fn prefixes_are_told_apart() {
        let mut limiter = Limiter::new(Rate { per_second: 1, burst: 1 });
        let mut check = |a: &str| limiter.check(a.parse().unwrap(), at(1));
        assert_eq!(check("192.0.2.1"), Verdict::Answer);
        assert_eq!(check("192.0.2.200"), Verdict::Drop);
        assert_eq!(check("192.0.3.1"), Verdict::Answer);
        assert_eq!(check("2001:db8:0:1::1"), Verdict::Answer);
        assert_eq!(check("2001:db8:0:2::1"), Verdict::Drop);
        assert_eq!(check("2001:db8:0:100::1"), Verdict::Answer);
    }

    proptest! {
        /// However many other sources there are, none gets more than burst and rate allow, or the table is full.
        #[test]
        fn nobody_exceeds_the_rate(steps in proptest::collection::vec((0_u8..20, 0_u64..200), 1..400)) {
            let rate = Rate { per_second: 20, burst: 7 };
            let mut limiter = Limiter::new(rate);
            let (mut now, mut answered) = (0, [0_u64; 20]);
            for (source, step) in steps {
                now += step;
                if limiter.check(IpAddr::from([10, 0, source, 1]), at(now)) == Verdict::Answer {
                    answered[usize::from(source)] += 1;
                    let allowed = u64::from(rate.burst) + now * u64::from(rate.per_second) / 1000;
                    prop_assert!(answered[usize::from(source)] <= allowed);
                }
            }
        }
    }
}
