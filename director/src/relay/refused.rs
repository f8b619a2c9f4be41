//! The devices that the registrar does not want, for as long as a certificate of theirs may be valid. A bounded
//! set: who falls out of it is refused again as soon as the registrar hears that it has attached.

use std::{collections::VecDeque, time::Duration};

use muster_common::time::Instant;
use rustc_hash::FxHashMap;
use uuid::Uuid;

/// How long a device is refused.
pub(super) const PERIOD: Duration = Duration::from_secs(30 * 24 * 60 * 60);
/// Most devices that are remembered.
pub(super) const MOST: usize = 65_536;

#[derive(Debug, Default)]
pub(super) struct Refused {
    until: FxHashMap<Uuid, Instant>,
    /// In the order in which they came, which is the one in which they go.
    order: VecDeque<(Instant, Uuid)>,
}

impl Refused {
    pub(super) fn contains(&self, device: &Uuid, now: Instant) -> bool {
        self.until.get(device).is_some_and(|until| now < *until)
    }

    pub(super) fn insert(&mut self, device: Uuid, now: Instant) {
        while let Some((until, _)) = self.order.front()
            && (self.order.len() >= MOST || *until <= now)
        {
            let Some((until, oldest)) = self.order.pop_front() else { break };
            // Unless it has come again since.
            if self.until.get(&oldest) == Some(&until) {
                self.until.remove(&oldest);
            }
        }
        self.until.insert(device, now + PERIOD);
        self.order.push_back((now + PERIOD, device));
    }

    pub(super) fn clear(&mut self) {
        self.until.clear();
        self.order.clear();
    }

    pub(super) fn len(&self) -> usize {
        self.until.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Instant {
        Instant::from_boot(Duration::from_secs(seconds))
    }

    #[test]
    fn lasts_for_its_time() {
        let mut refused = Refused::default();
        let device = Uuid::from_u128(1);
        refused.insert(device, at(5));
        assert!(refused.contains(&device, at(4) + PERIOD));
        assert!(!refused.contains(&device, at(5) + PERIOD));
        refused.insert(device, at(10));
        refused.insert(Uuid::from_u128(2), at(6) + PERIOD);
        assert!(refused.contains(&device, at(6) + PERIOD), "what was said last holds");
        assert_eq!(refused.order.len(), 2, "and what is over is forgotten");
    }

    #[test]
    fn is_bounded() {
        let mut refused = Refused::default();
        for n in 0..MOST as u128 + 10 {
            refused.insert(Uuid::from_u128(n), at(1));
        }
        for _ in 0..10 {
            refused.insert(Uuid::from_u128(20), at(1));
        }
        assert!(refused.len() <= MOST && refused.order.len() <= MOST);
        assert!(!refused.contains(&Uuid::from_u128(0), at(1)), "the oldest goes");
        assert!(refused.contains(&Uuid::from_u128(20), at(1)), "but not one that was named again");
        assert!(refused.contains(&Uuid::from_u128(MOST as u128), at(1)));
    }
}
