//! Whether the registry is known to show what the store holds. A store that does not answer leaves what is served as it
//! was, and that is then said to be stale. It also spares a store that is away the questions of all who wait for it.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use muster_common::time::Instant;

/// What has not been confirmed for so long is stale.
pub const STALE_AFTER: Duration = Duration::from_secs(5);

/// When the store last confirmed what the registry shows.
#[derive(Debug)]
pub struct Freshness {
    confirmed: Mutex<Instant>,
    /// Whether that is too long ago, as of the last look.
    stale: AtomicBool,
}

/// What a look at it has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// As it was.
    Same,
    /// It has just become stale; confirmed for the last time so long ago.
    Stale(Duration),
    /// It is fresh again.
    Fresh,
}

impl Freshness {
    /// Confirmed as of `now`.
    pub fn new(now: Instant) -> Self {
        Self { confirmed: Mutex::new(now), stale: AtomicBool::new(false) }
    }

    /// The registry shows all that the store held at `asked`.
    pub fn confirm(&self, asked: Instant) {
        let mut confirmed = self.lock();
        *confirmed = (*confirmed).max(asked);
    }

    /// For how long nothing has been confirmed.
    pub fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(*self.lock())
    }

    /// Judges anew; to be called about every second.
    pub fn look(&self, now: Instant) -> Turn {
        let age = self.age(now);
        let stale = age >= STALE_AFTER;
        match (self.stale.swap(stale, Ordering::Relaxed), stale) {
            (false, true) => Turn::Stale(age),
            (true, false) => Turn::Fresh,
            _ => Turn::Same,
        }
    }

    /// Whether it was stale at the last look. Costs nothing.
    pub fn is_stale(&self) -> bool {
        self.stale.load(Ordering::Relaxed)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Instant> {
        self.confirmed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_turns_once_each_way() {
        let start = Instant::now();
        let second = Duration::from_secs(1);
        let freshness = Freshness::new(start);
        assert_eq!(freshness.look(start + 4 * second), Turn::Same);
        assert_eq!(freshness.look(start + 6 * second), Turn::Stale(6 * second));
        assert!(freshness.is_stale());
        assert_eq!(freshness.look(start + 7 * second), Turn::Same);
        freshness.confirm(start + 5 * second);
        assert_eq!(freshness.look(start + 8 * second), Turn::Fresh);
        // An answer that comes late confirms nothing newer than when it was asked for.
        freshness.confirm(start);
        assert_eq!(freshness.age(start + 8 * second), 3 * second);
        assert!(!freshness.is_stale());
    }
}
