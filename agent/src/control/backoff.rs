//! Exponential back-off with jitter, so that agents whose registrar is away neither spin nor come back all at once.

use std::time::Duration;

use rand::{RngExt, rngs::StdRng};

#[derive(Clone, Debug)]
pub(super) struct Backoff {
    base: Duration,
    limit: Duration,
    failures: u32,
}

impl Backoff {
    /// Delays between `base`, doubling with each failure, and `limit`.
    pub(super) const fn new(base: Duration, limit: Duration) -> Self {
        Self { base, limit, failures: 0 }
    }

    /// The time to wait after one more failure: between half of the delay and all of it.
    pub(super) fn fail(&mut self, rng: &mut StdRng) -> Duration {
        let delay = self.base.saturating_mul(1 << self.failures.min(16)).min(self.limit);
        self.failures = self.failures.saturating_add(1);
        delay.mul_f64(rng.random_range(0.5..=1.0))
    }

    /// Whether there has been a failure since the last reset.
    pub(super) const fn has_failed(&self) -> bool {
        self.failures > 0
    }

    /// Begins again with the base delay.
    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn delays_grow_to_the_limit_and_never_vanish() {
        let mut rng = StdRng::seed_from_u64(1);
        let (base, limit) = (Duration::from_millis(500), Duration::from_secs(30));
        let mut backoff = Backoff::new(base, limit);
        for n in 0..100 {
            let delay = backoff.fail(&mut rng);
            let full = base.saturating_mul(1 << n.min(16)).min(limit);
            assert!(delay >= full / 2 && delay <= full, "{n}: {delay:?}");
        }
        backoff.reset();
        assert!(backoff.fail(&mut rng) <= base);
    }
}
