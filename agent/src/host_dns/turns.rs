//! Two programs that both want to write one file must not fight for ever: after some turns within a minute we wait.

use std::{collections::VecDeque, time::Duration};

use muster_common::time::Instant;

/// Turns within [`PERIOD`] before we wait.
const TURNS_MAX: usize = 10;
/// Also how long we wait.
const PERIOD: Duration = Duration::from_secs(60);

/// The turns of late.
#[derive(Default)]
pub(super) struct Turns(VecDeque<Instant>);

impl Turns {
    /// Takes one. Tells whether it was the last for now.
    pub(super) fn taken(&mut self, now: Instant) -> bool {
        self.0.push_back(now);
        if self.0.len() > TURNS_MAX {
            self.0.pop_front();
        }
        !self.wait(now).is_zero()
    }

    /// How long to wait before the next: zero unless there were too many.
    pub(super) fn wait(&self, now: Instant) -> Duration {
        match (self.0.front(), self.0.back()) {
            (Some(first), Some(last)) if self.0.len() == TURNS_MAX && *last - *first < PERIOD => {
                PERIOD.saturating_sub(now - *last)
            }
            _ => Duration::ZERO,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fight_is_given_up_for_a_minute_and_ordinary_changes_are_not() {
        let at = |seconds| Instant::from_boot(Duration::from_secs(seconds));
        let mut turns = Turns::default();
        for turn in 0..9 {
            assert!(!turns.taken(at(turn)));
        }
        assert!(turns.taken(at(9)));
        assert_eq!(turns.wait(at(10)), Duration::from_secs(59));
        assert_eq!(turns.wait(at(69)), Duration::ZERO);
        // Still a fight: the one turn a minute later is followed by others.
        assert!(!turns.taken(at(70)));
        let mut slow = Turns::default();
        assert!((0..100).all(|turn| !slow.taken(at(turn * 10))));
    }
}
