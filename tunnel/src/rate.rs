//! Token buckets, in whole tokens and exact time.

use std::time::Duration;

use muster_common::time::Instant;

/// Lets `rate` things a second pass, and `burst` at once.
#[derive(Clone, Debug)]
pub(crate) struct TokenBucket {
    interval: Duration,
    burst: u32,
    tokens: u32,
    /// When the tokens were counted; what is left of an interval after it is carried on.
    counted: Instant,
}

impl TokenBucket {
    /// A full bucket.
    pub(crate) fn new(rate: u32, burst: u32, now: Instant) -> Self {
        Self { interval: Duration::from_secs(1) / rate.max(1), burst, tokens: burst, counted: now }
    }

    /// Takes a token, if there is one.
    pub(crate) fn take(&mut self, now: Instant) -> bool {
        self.refill(now);
        let taken = self.tokens > 0;
        self.tokens -= u32::from(taken);
        taken
    }

    /// Whether nothing was taken for so long that forgetting the bucket changes nothing.
    pub(crate) fn is_full(&mut self, now: Instant) -> bool {
        self.refill(now);
        self.tokens == self.burst
    }

    fn refill(&mut self, now: Instant) {
        let elapsed = now - self.counted;
        let new = elapsed.as_nanos() / self.interval.as_nanos().max(1);
        if new >= u128::from(self.burst - self.tokens) {
            (self.tokens, self.counted) = (self.burst, now.max(self.counted));
        } else if let Ok(new) = u32::try_from(new) {
            self.tokens += new;
            self.counted += self.interval * new;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_and_burst() {
        let start = Instant::from_boot(Duration::from_secs(9));
        let mut bucket = TokenBucket::new(10, 3, start);
        assert_eq!((0..5).filter(|_| bucket.take(start)).count(), 3);
        let later = start + Duration::from_millis(150);
        assert!(bucket.take(later) && !bucket.take(later));
        assert!(bucket.take(start + Duration::from_millis(200)), "the half interval was carried on");
        assert!(!bucket.is_full(later) && bucket.is_full(later + Duration::from_secs(3600)));
    }
}
