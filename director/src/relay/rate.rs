//! Rates as the generic cell rate algorithm keeps them (ITU-T I.371, GCRA): one number says when what has been taken so
//! far will have been earned. A number can be shared by threads; where two meet, a little more may pass.

use std::sync::atomic::{AtomicU64, Ordering};

use muster_common::time::Instant;

const NANOS: u64 = 1_000_000_000;

/// How much may pass in which time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rate {
    /// Units a second; 0: any.
    per_second: u64,
    /// How far ahead of the time one may be, in nanoseconds.
    ahead: u64,
}

impl Rate {
    /// `per_second` units, and `burst` units at once; 0 units a second is no limit.
    pub(super) fn new(per_second: u64, burst: u64) -> Self {
        let ahead = u128::from(burst) * u128::from(NANOS) / u128::from(per_second.max(1));
        Self { per_second, ahead: ahead.try_into().unwrap_or(u64::MAX) }
    }

    /// Whether `units` may pass, in which case they are taken from `spent`.
    pub(super) fn admits(&self, units: u64, spent: &AtomicU64, now: Instant) -> bool {
        if self.per_second == 0 {
            return true;
        }
        let now = u64::try_from(now.since_boot().as_nanos()).unwrap_or(u64::MAX);
        let begin = spent.load(Ordering::Relaxed).max(now);
        let end = begin.saturating_add(units.saturating_mul(NANOS) / self.per_second);
        let is_admitted = end - now <= self.ahead;
        if is_admitted {
            spent.store(end, Ordering::Relaxed);
        }
        is_admitted
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn at(millis: u64) -> Instant {
        Instant::from_boot(Duration::from_millis(millis))
    }

    #[test]
    fn a_burst_passes_at_once_and_then_the_rate() {
        let (rate, spent) = (Rate::new(1_000, 500), AtomicU64::new(0));
        let passed = (0..20).filter(|_| rate.admits(100, &spent, at(10_000))).count();
        assert_eq!(passed, 5);
        assert!(!rate.admits(100, &spent, at(10_099)));
        assert!(rate.admits(100, &spent, at(10_100)));
        assert!(!rate.admits(100, &spent, at(10_100)));
        assert!(!rate.admits(501, &spent, at(60_000)), "more than the burst never passes");
        assert!(rate.admits(500, &spent, at(60_000)));
    }

    #[test]
    fn no_rate_is_no_limit() {
        let (rate, spent) = (Rate::new(0, 0), AtomicU64::new(0));
        assert!((0..100).all(|_| rate.admits(u64::MAX, &spent, at(1))));
    }

    proptest! {
        #[test]
        fn never_more_than_burst_and_rate(
            tries in proptest::collection::vec((0_u64..50, 1_u64..2_000), 1..200)
        ) {
            let (rate, spent) = (Rate::new(10_000, 5_000), AtomicU64::new(0));
            let (mut millis, mut passed) = (1_000, 0);
            for (pause, units) in tries {
                millis += pause;
                if rate.admits(units, &spent, at(millis)) {
                    passed += units;
                }
                // Fractions of a nanosecond are in the sender's favour.
                prop_assert!(passed <= 5_000 + (millis - 1_000) * 10 + 1);
            }
        }
    }
}
