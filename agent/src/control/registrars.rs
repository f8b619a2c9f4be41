//! Which registrar to use: each agent has its own random order, so that agents spread, and moves on to the next
//! when one fails.

use std::time::Duration;

use muster_common::time::Instant;
use rand::{RngExt, rngs::StdRng};

/// Registrars known at most.
pub(super) const MAX_REGISTRARS: usize = 16;
/// How long one that did not answer is not gone to because another one asks for that.
const SHUNNED: Duration = Duration::from_secs(600);

#[derive(Clone, Debug)]
pub(super) struct Registrars {
    order: Vec<String>,
    at: usize,
    /// The one that was last left because it did not answer, and when.
    silent: Option<(String, Instant)>,
}

impl Registrars {
    /// `known` in random order; `joined`, which the device joined through, last if `known` does not have it.
    pub(super) fn new(known: &[String], joined: &str, rng: &mut StdRng) -> Self {
        let mut order: Vec<String> = Vec::new();
        for address in known.iter().take(MAX_REGISTRARS) {
            if !order.contains(address) {
                order.push(address.clone());
            }
        }
        for n in (1..order.len()).rev() {
            order.swap(n, rng.random_range(0..=n));
        }
        if !joined.is_empty() && !order.iter().any(|address| address == joined) {
            order.push(joined.to_owned());
        }
        Self { order, at: 0, silent: None }
    }

    /// Takes over another list; goes on with the one in use if it is still there.
    pub(super) fn update(&mut self, known: &[String], joined: &str, rng: &mut StdRng) {
        let same = |address: &String| self.order.contains(address);
        let expected = known.len() + usize::from(!known.iter().any(|address| address == joined));
        if known.is_empty() || (known.iter().all(same) && expected == self.order.len()) {
            return;
        }
        let current = self.current().to_owned();
        let silent = self.silent.take();
        *self = Self { silent, ..Self::new(known, joined, rng) };
        self.at = self.order.iter().position(|address| *address == current).unwrap_or(0);
    }

    /// The one in use.
    pub(super) fn current(&self) -> &str {
        self.order.get(self.at).map_or("", String::as_str)
    }

    /// Moves on to the next.
    pub(super) fn advance(&mut self) {
        self.at = (self.at + 1) % self.order.len().max(1);
    }

    /// Moves on to the next, since the one in use does not answer.
    pub(super) fn leave_silent(&mut self, now: Instant) {
        self.silent = Some((self.current().to_owned(), now));
        self.advance();
    }

    /// Whether the registrar did not answer a while ago: others may not know that yet.
    pub(super) fn was_silent(&self, address: &str, now: Instant) -> bool {
        self.silent.as_ref().is_some_and(|(silent, at)| silent == address && now - *at < SHUNNED)
    }

    /// Moves on to one of `to`, or to the next if none of them is known.
    pub(super) fn go_to(&mut self, to: &[String], rng: &mut StdRng) {
        let others = || (0..self.order.len()).filter(|at| *at != self.at && to.contains(&self.order[*at]));
        match others().count() {
            0 => self.advance(),
            count => self.at = others().nth(rng.random_range(0..count)).unwrap_or(self.at),
        }
    }

    /// Whether there is another one than that in use.
    pub(super) fn has_other(&self) -> bool {
        self.order.len() > 1
    }

    /// Whether the next one would be the first again.
    pub(super) fn at_end(&self) -> bool {
        self.at + 1 >= self.order.len()
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn agents_spread_and_move_on() {
        let known: Vec<String> = (0..4).map(|n| format!("r{n}:1")).collect();
        let mut first = std::collections::BTreeSet::new();
        for seed in 0..50 {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut registrars = Registrars::new(&known, "r0:1", &mut rng);
            first.insert(registrars.current().to_owned());
            let mut seen = Vec::new();
            for _ in 0..4 {
                seen.push(registrars.current().to_owned());
                registrars.advance();
            }
            seen.sort();
            assert_eq!(seen, known);
        }
        assert_eq!(first.len(), 4);
    }

    #[test]
    fn agents_go_where_they_are_asked_to() {
        let known: Vec<String> = (0..4).map(|n| format!("r{n}:1")).collect();
        let mut rng = StdRng::seed_from_u64(3);
        let mut registrars = Registrars::new(&known, "r0:1", &mut rng);
        let mut went = std::collections::BTreeSet::new();
        for _ in 0..50 {
            let before = registrars.current().to_owned();
            registrars.go_to(&known[1..3], &mut rng);
            assert_ne!(registrars.current(), before);
            went.insert(registrars.current().to_owned());
        }
        assert_eq!(went.into_iter().collect::<Vec<_>>(), known[1..3]);
        let before = registrars.current().to_owned();
        registrars.go_to(&["unknown:1".into(), before.clone()], &mut rng);
        assert_ne!(registrars.current(), before);
    }

    #[test]
    fn an_update_keeps_the_one_in_use() {
        let mut rng = StdRng::seed_from_u64(1);
        let mut registrars = Registrars::new(&["a:1".into(), "b:1".into()], "join:1", &mut rng);
        let current = registrars.current().to_owned();
        let before = format!("{registrars:?}");
        registrars.update(&["b:1".into(), "a:1".into()], "join:1", &mut rng);
        assert_eq!(format!("{registrars:?}"), before);
        registrars.update(&["a:1".into(), "b:1".into(), "c:1".into()], "join:1", &mut rng);
        assert_eq!(registrars.current(), current);
        registrars.update(&["d:1".into()], "join:1", &mut rng);
        assert_eq!(registrars.current(), "d:1");
    }
}
