//! Whether to look once more before going to sleep. To wake a sleeping processor takes longer than to seal a packet, so
//! the data plane polls for a moment after it has run out of work, as long as experience says that work comes.

use std::time::Duration;

/// How long to poll. The answer to what was just sent over a fast network comes within this time.
pub(super) const LINGER: Duration = Duration::from_micros(40);
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
    /// Whether to poll before the sleep that is due.
    pub(super) fn is_worthwhile(&mut self) -> bool {
        if self.credit > 0 {
            return true;
        }
        self.sleeps = (self.sleeps + 1) % TRY_EVERY;
        self.sleeps == 0
    }

    /// Tells whether polling has found work.
    pub(super) fn learn(&mut self, found: bool) {
        self.credit =
            if found { (self.credit + 1).min(CREDIT_MAX) } else { self.credit.saturating_sub(COST) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of `sleeps` are preceded by polling, if every so manieth poll finds work.
    fn polls(linger: &mut Linger, sleeps: usize, found: impl Fn(usize) -> bool) -> usize {
        let mut polls = 0;
        for sleep in 0..sleeps {
            if linger.is_worthwhile() {
                polls += 1;
                linger.learn(found(sleep));
            }
        }
        polls
    }

    #[test]
    fn polls_while_it_pays() {
        let mut linger = Linger::default();
        assert_eq!(polls(&mut linger, 6_400, |_| false), 100, "in vain: one in 64");
        assert!(polls(&mut linger, 6_400, |_| true) >= 6_400 - 64, "soon always");
        assert!(polls(&mut linger, 6_400, |n| n % 4 != 0) > 5_000, "mostly");
        assert!(polls(&mut linger, 6_400, |n| n % 2 == 0) < 500, "half the time is too little");
        assert!(polls(&mut linger, 6_400, |_| false) <= 104);
    }
}
