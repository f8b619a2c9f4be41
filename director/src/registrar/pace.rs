//! When to try again, with whom, and when the certificate is due for renewal. With jitter throughout, so that
//! directors neither spin nor come all at once.

use std::time::Duration;

use muster_common::time::Timestamp;
use rand::{RngExt, rngs::StdRng};

/// Registrars known at most.
const REGISTRARS_MAX: usize = 16;
/// Renewal is due at this share of a certificate's life, plus or minus the second.
const RENEWAL: (f64, f64) = (2.0 / 3.0, 0.1);

/// Delays that double with each failure.
#[derive(Clone, Debug)]
pub(super) struct Backoff {
    base: Duration,
    limit: Duration,
    failures: u32,
}

impl Backoff {
    /// Delays between `base` and `limit`.
    pub(super) const fn new(base: Duration, limit: Duration) -> Self {
        Self { base, limit, failures: 0 }
    }

    /// The time to wait after one more failure: between half of the delay and all of it.
    pub(super) fn fail(&mut self, rng: &mut StdRng) -> Duration {
        let delay = self.base.saturating_mul(1 << self.failures.min(16)).min(self.limit);
        self.failures = self.failures.saturating_add(1);
        delay.mul_f64(rng.random_range(0.5..=1.0))
    }

    /// Begins again with the base delay.
    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }
}

/// The registrars, in the order in which they are tried.
#[derive(Clone, Debug)]
pub(super) struct Registrars {
    order: Vec<String>,
    at: usize,
}

impl Registrars {
    /// `told`, beginning with any of them; `joined`, which the director joined through, last if `told` does not have it.
    pub(super) fn new(told: &[String], joined: &str, rng: &mut StdRng) -> Self {
        let mut order: Vec<String> = Vec::new();
        for address in told.iter().take(REGISTRARS_MAX) {
            if !order.contains(address) {
                order.push(address.clone());
            }
        }
        let at = if order.is_empty() { 0 } else { rng.random_range(0..order.len()) };
        if !joined.is_empty() && !order.iter().any(|address| address == joined) {
            order.push(joined.to_owned());
        }
        Self { order, at }
    }

    /// Takes over another list; goes on with the one in use if it is still there.
    pub(super) fn update(&mut self, told: &[String], joined: &str, rng: &mut StdRng) {
        let current = self.current().to_owned();
        let updated = Self::new(told, joined, rng);
        let at = updated.order.iter().position(|address| *address == current).unwrap_or(updated.at);
        *self = Self { at, ..updated };
    }

    /// The one in use.
    pub(super) fn current(&self) -> &str {
        self.order.get(self.at).map_or("", String::as_str)
    }

    /// Moves on to the next.
    pub(super) fn advance(&mut self) {
        self.at = (self.at + 1) % self.order.len().max(1);
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.order.len()
    }
}

/// When a certificate that is valid from `begin` to `end` is to be renewed.
pub(super) fn renewal_due(begin: Timestamp, end: Timestamp, rng: &mut StdRng) -> Timestamp {
    let (share, jitter) = RENEWAL;
    begin + end.saturating_duration_since(begin).mul_f64(share + rng.random_range(-jitter..=jitter))
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

    #[test]
    fn directors_spread_over_registrars_and_try_all() {
        let told: Vec<String> = (0..4).map(|n| format!("r{n}:1")).collect();
        let mut first = std::collections::BTreeSet::new();
        for seed in 0..50 {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut registrars = Registrars::new(&told, "joined:1", &mut rng);
            first.insert(registrars.current().to_owned());
            let mut seen = std::collections::BTreeSet::new();
            for _ in 0..registrars.len() {
                seen.insert(registrars.current().to_owned());
                registrars.advance();
            }
            assert_eq!(seen.len(), 5, "the one joined through is tried as well");
        }
        assert_eq!(first.len(), 4);
        let mut rng = StdRng::seed_from_u64(1);
        assert_eq!(Registrars::new(&[], "joined:1", &mut rng).current(), "joined:1");
    }

    #[test]
    fn an_update_keeps_the_one_in_use() {
        let mut rng = StdRng::seed_from_u64(1);
        let mut registrars = Registrars::new(&["a:1".into(), "b:1".into()], "a:1", &mut rng);
        let current = registrars.current().to_owned();
        registrars.update(&["c:1".into(), "b:1".into(), "a:1".into()], "a:1", &mut rng);
        assert_eq!(registrars.current(), current);
        registrars.update(&["d:1".into()], "d:1", &mut rng);
        assert_eq!((registrars.current(), registrars.len()), ("d:1", 1));
    }

    #[test]
    fn renewal_is_due_around_two_thirds() {
        let civil = |seconds| Timestamp::from_epoch(Duration::from_secs(seconds));
        let mut due = std::collections::BTreeSet::new();
        for seed in 0..50 {
            due.insert(renewal_due(civil(1_000), civil(4_000), &mut StdRng::seed_from_u64(seed)));
        }
        assert!(due.iter().all(|at| *at >= civil(2_700) && *at <= civil(3_300)), "{due:?}");
        assert!(due.len() > 40);
    }
}
