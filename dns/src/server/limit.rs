//! Response-rate limiting: how many UDP responses a source prefix gets, so that forged queries neither flood
//! whom they name nor keep the server busy. A table of fixed size without locks, which all threads share; no clock
//! of its own.

use std::{
    hash::{BuildHasher, RandomState},
    net::IpAddr,
    sync::atomic::{AtomicU64, Ordering},
};

use muster_common::time::Instant;

/// Buckets in the table, a power of two.
const BUCKETS: usize = 1 << 16;
/// Prefixes that share a place in the table.
const WAYS: usize = 4;
/// Of the queries over the limit, every so-many-th on average is told to come again over TCP. Forged sources get
/// little from it, honest ones get their answer.
const SLIP: u64 = 2;
/// Bits of a bucket that hold its time; the others hold its tag.
const TIME_BITS: u32 = 44;
const TIME_MASK: u64 = (1 << TIME_BITS) - 1;
/// Units of time per second.
const UNITS: u64 = 16_000_000;

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

/// The limiter's table. When more prefixes are active than it holds, the one that has used least gives way.
///
/// A bucket is one word: a tag, which is a hash of the prefix and not 0, and the time at which the prefix would have
/// used up nothing (the theoretical arrival time of the generic cell rate algorithm). The time wraps around after
/// twelve days; one further ahead than a bucket can get is in the past.
pub struct Limiter {
    /// Between two responses in the long run, in units of time.
    interval: u64,
    /// How far ahead of the present a bucket may get.
    ahead: u64,
    keys: (u64, u64),
    buckets: Box<[AtomicU64]>,
}

impl Limiter {
    /// An empty table.
    pub fn new(rate: Rate) -> Self {
        let interval = UNITS.div_ceil(rate.per_second.max(1).into());
        let burst = u64::from(rate.burst.max(1)).min((TIME_MASK >> 1) / interval);
        let random = RandomState::new();
        Self {
            interval,
            ahead: burst * interval,
            keys: (random.hash_one(1), random.hash_one(2) | 1),
            buckets: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Decides on a query from `source`, and counts it. `salt` differs between queries that come at the same time.
    pub fn check(&self, source: IpAddr, salt: u32, now: Instant) -> Verdict {
        let now = units(now);
        let key = self.hash(prefix(source));
        let (place, tag) = (key as usize % (BUCKETS / WAYS) * WAYS, (key >> TIME_BITS).max(1));
        let Some(ways) = self.buckets.get(place..place + WAYS) else { return Verdict::Answer };
        loop {
            let mut chosen = None;
            for way in ways {
                let bucket = way.load(Ordering::Relaxed);
                let used = self.used(bucket, now);
                if bucket >> TIME_BITS == tag {
                    chosen = Some((way, bucket, used, 0));
                    break;
                }
                // One that is not used counts as less than one that has used up nothing.
                let rank = if bucket == 0 { 0 } else { used + 1 };
                if chosen.is_none_or(|(_, _, _, least)| rank < least) {
                    chosen = Some((way, bucket, 0, rank));
                }
            }
            let Some((way, bucket, used, _)) = chosen else { return Verdict::Answer };
            if used + self.interval > self.ahead {
                // By the time as well, so that a client that repeats its query comes to be told.
                let slip = self.hash(key ^ u64::from(salt) ^ now << 32).is_multiple_of(SLIP);
                return if slip { Verdict::Slip } else { Verdict::Drop };
            }
            let counted = tag << TIME_BITS | (now + used + self.interval) & TIME_MASK;
            if way.compare_exchange_weak(bucket, counted, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
                return Verdict::Answer;
            }
        }
    }

    /// How far `bucket` is ahead of `now`.
    fn used(&self, bucket: u64, now: u64) -> u64 {
        let ahead = bucket.wrapping_sub(now) & TIME_MASK;
        if ahead > self.ahead { 0 } else { ahead }
    }

    /// Keyed, so that nobody can choose sources that share a bucket with somebody else's.
    fn hash(&self, value: u64) -> u64 {
        let fold = |a: u64, b: u64| {
            let product = u128::from(a) * u128::from(b);
            product as u64 ^ (product >> 64) as u64
        };
        fold(fold(value ^ self.keys.0, self.keys.1) ^ self.keys.0.rotate_left(32), 0x9e37_79b9_7f4a_7c15)
    }
}

/// `now` in units of time, not wrapped.
fn units(now: Instant) -> u64 {
    let boot = now.since_boot();
    boot.as_secs()
        .wrapping_mul(UNITS)
        .wrapping_add(u64::from(boot.subsec_nanos()) * (UNITS / 1_000_000) / 1000)
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
        let limiter = Limiter::new(Rate { per_second: 10, burst: 5 });
        let source = "192.0.2.1".parse().unwrap();
        let verdicts = |time, n| (0..n).map(|id| limiter.check(source, id, at(time))).collect::<Vec<_>>();
        assert_eq!(verdicts(1000, 5), [Verdict::Answer; 5]);
        // Half of the rest is told to come again, on average.
        let over = verdicts(1000, 1000);
        let slipped = over.iter().filter(|verdict| **verdict == Verdict::Slip).count();
        assert!((400..600).contains(&slipped) && !over.contains(&Verdict::Answer), "{slipped}");
        let next = verdicts(1100, 2);
        assert!(next[0] == Verdict::Answer && next[1] != Verdict::Answer, "{next:?}");
        assert_eq!(verdicts(9000, 6)[..5], [Verdict::Answer; 5]);
    }

    #[test]
    fn prefixes_are_told_apart() {
        let limiter = Limiter::new(Rate { per_second: 1, burst: 1 });
        let answered = |a: &str| limiter.check(a.parse().unwrap(), 7, at(1)) == Verdict::Answer;
        assert!(answered("192.0.2.1"));
        assert!(!answered("192.0.2.200"));
        assert!(answered("192.0.3.1"));
        assert!(answered("2001:db8:0:1::1"));
        assert!(!answered("2001:db8:0:2::1"));
        assert!(answered("2001:db8:0:100::1"));
    }

    #[test]
    fn a_repeated_query_comes_to_be_told() {
        let limiter = Limiter::new(Rate { per_second: 1, burst: 1 });
        let source = "192.0.2.1".parse().unwrap();
        limiter.check(source, 7, at(0));
        assert!((0..64).any(|time| limiter.check(source, 7, at(time)) == Verdict::Slip));
    }

    #[test]
    fn time_may_wrap_around() {
        let limiter = Limiter::new(Rate { per_second: 10, burst: 5 });
        let source = "192.0.2.1".parse().unwrap();
        let wrap = (TIME_MASK + 1) / (UNITS / 1000);
        for time in [0, wrap - 100, wrap + 86_400_000, wrap * 3 / 2, 2 * wrap - 1, 40 * wrap + 3_600_000] {
            let answered =
                (0..9).filter(|id| limiter.check(source, *id, at(time)) == Verdict::Answer).count();
            assert_eq!(answered, 5, "{time}");
        }
    }

    #[test]
    fn a_full_table_forgets_who_has_used_least() {
        let limiter = Limiter::new(Rate { per_second: 1, burst: 100 });
        let greedy = "192.0.2.1".parse().unwrap();
        for id in 0..100 {
            assert_eq!(limiter.check(greedy, id, at(0)), Verdict::Answer);
        }
        for prefix in 0..500_000_u32 {
            limiter.check(IpAddr::from((prefix << 8).to_be_bytes()), 1, at(0));
        }
        assert_ne!(limiter.check(greedy, 1, at(0)), Verdict::Answer);
    }

    #[test]
    fn threads_share_one_limit() {
        let limiter = Limiter::new(Rate { per_second: 1, burst: 1000 });
        let source = "192.0.2.1".parse().unwrap();
        let thread = || (0..500).filter(|id| limiter.check(source, *id, at(5)) == Verdict::Answer).count();
        let answered: usize = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(thread)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(answered, 1000);
    }

    proptest! {
        /// However many other sources there are, none gets more than burst and rate allow, or the table is full.
        #[test]
        fn nobody_exceeds_the_rate(steps in proptest::collection::vec((0_u8..20, 0_u64..200), 1..400)) {
            let rate = Rate { per_second: 20, burst: 7 };
            let limiter = Limiter::new(rate);
            let (mut now, mut answered) = (0, [0_u64; 20]);
            for (source, step) in steps {
                now += step;
                if limiter.check(IpAddr::from([10, 0, source, 1]), 1, at(now)) == Verdict::Answer {
                    answered[usize::from(source)] += 1;
                    let allowed = u64::from(rate.burst) + now * u64::from(rate.per_second) / 1000;
                    prop_assert!(answered[usize::from(source)] <= allowed);
                }
            }
        }
    }
}
