//! Whether to look once more before going to sleep, and for how long. To wake a sleeping processor takes longer than to
//! seal a packet, so the data plane polls for a moment after it has run out of work, as long as experience says that
//! work comes.

use std::time::Duration;

/// How long to poll. Packets of a flow 50 µs apart would keep a processor busy with polling for longer.
const SOON: Duration = Duration::from_micros(40);
/// Polls in vain that are forgiven after as many that were not: twice as many must find work as do not.
const CREDIT_MAX: u8 = 8;
const COST: u8 = 2;
/// Without credit, one sleep in so many is preceded by polling, to find out whether times have changed.
const TRY_EVERY: u8 = 64;

/// What experience says.
#[derive(Debug, Default)]
pub(super) struct Linger {
    credit: u8,
    sleeps: u8,
}

impl Linger {
    /// How long to poll before the sleep that is due; zero for not at all.
    pub(super) fn limit(&mut self) -> Duration {
        if self.credit > 0 {
            return SOON;
        }
        self.sleeps = (self.sleeps + 1) % TRY_EVERY;
        if self.sleeps == 0 { SOON } else { Duration::ZERO }
    }

    /// Tells whether polling has found anything, and after how long. What comes later than expected has come while
    /// somebody else had the processor: then it is better to sleep, and be woken.
    pub(super) fn learn(&mut self, waited: Duration, found: bool) {
        let pays = found && waited <= SOON;
        self.credit = if pays { (self.credit + 1).min(CREDIT_MAX) } else { self.credit.saturating_sub(COST) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How long a thread polls, in µs a sleep on average, if work comes after so many µs.
    fn polls(linger: &mut Linger, after: u64) -> u64 {
        const SLEEPS: u64 = 6_400;
        let after = Duration::from_micros(after);
        let mut polled = Duration::ZERO;
        for _ in 0..SLEEPS {
            let limit = linger.limit();
            if limit.is_zero() {
                continue;
            }
            let found = after <= limit;
            let waited = if found { after } else { limit + Duration::from_micros(1) };
            polled += waited;
            linger.learn(waited, found);
        }
        u64::try_from(polled.as_micros()).unwrap() / SLEEPS
    }

    #[test]
    fn waits_for_what_comes_soon() {
        let mut linger = Linger::default();
        assert!(polls(&mut linger, 20) >= 19, "always");
        assert!(polls(&mut linger, 5_000) <= 1, "in vain: seldom");
        assert!((9..=10).contains(&polls(&mut linger, 10)));
    }

    #[test]
    fn does_not_spin_while_a_flow_has_a_packet_every_50_microseconds() {
        assert!(polls(&mut Linger::default(), 50) <= 1);
    }

    #[test]
    fn does_not_poll_where_others_want_the_processor() {
        let mut linger = Linger::default();
        polls(&mut linger, 20);
        let mut polls = 0;
        for _ in 0..640 {
            if !linger.limit().is_zero() {
                polls += 1;
                linger.learn(Duration::from_millis(3), true);
            }
        }
        assert!(
            polls <= 4 + 640 / u64::from(TRY_EVERY),
            "{polls}: until credit is spent, and then one in 64"
        );
    }

    #[test]
    fn half_the_time_is_too_little() {
        let mut linger = Linger::default();
        let mut polls = 0;
        for sleep in 0..6_400 {
            if !linger.limit().is_zero() {
                polls += 1;
                linger.learn(SOON, sleep % 2 == 0);
            }
        }
        assert!(polls < 400, "{polls}");
    }
}
