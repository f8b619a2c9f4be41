//! The simulated network between hosts, registrars and directors: delay, loss, duplicates, reordering (by delays that differ)
//! and partitions. What is between two parties is the same in both directions.

use std::{collections::BTreeSet, time::Duration};

use rand::{RngExt as _, rngs::StdRng};

/// Longest delay of anything that arrives.
pub(super) const MAX_DELAY: Duration = Duration::from_secs(1);

/// A party of the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Node {
    Host(usize),
    Registrar(usize),
    Director(usize),
}

/// The state of the network.
#[derive(Debug, Default)]
pub(super) struct Links {
    cut: BTreeSet<(Node, Node)>,
    /// Share of datagrams that are lost.
    pub(super) loss: f64,
    /// Share of datagrams that arrive twice.
    pub(super) duplicates: f64,
    /// Share of calls whose answer is lost, since the connection breaks.
    pub(super) broken: f64,
    /// Share of introductions that never leave their registrar.
    pub(super) mute: f64,
}

impl Links {
    /// Parts `a` and `b`; `false` if they are parted already.
    pub(super) fn part(&mut self, a: Node, b: Node) -> bool {
        self.cut.insert((a.min(b), a.max(b)))
    }

    /// Joins `a` and `b` again.
    pub(super) fn join(&mut self, a: Node, b: Node) {
        self.cut.remove(&(a.min(b), a.max(b)));
    }

    /// Heals everything.
    pub(super) fn heal(&mut self) {
        *self = Self::default();
    }

    /// Whether something can pass.
    pub(super) fn is_open(&self, a: Node, b: Node) -> bool {
        !self.cut.contains(&(a.min(b), a.max(b)))
    }

    /// How long something takes on its way.
    pub(super) fn delay(&self, rng: &mut StdRng) -> Duration {
        let most = match rng.random_range(0..100_u32) {
            0..2 => MAX_DELAY,
            2..12 => Duration::from_millis(200),
            _ => Duration::from_millis(40),
        };
        Duration::from_micros(rng.random_range(500..=most.as_micros() as u64))
    }
}
