//! Measuring how far away a director is: from the answers to hellos and, until there are any, from the call that attached.

use std::{collections::VecDeque, time::Duration};

use super::Way;

/// Measurements that the distance is the median of.
const SAMPLES: usize = 5;
/// What TCP costs: a director that is reached so counts as so much farther away.
const STREAM_PENALTY: Duration = Duration::from_millis(20);

/// What has been measured lately.
#[derive(Debug, Default)]
pub(super) struct Distance {
    samples: VecDeque<Duration>,
    attached: Option<Duration>,
}

impl Distance {
    /// The call that attached took so long.
    pub(super) const fn attached(&mut self, round_trip: Duration) {
        self.attached = Some(round_trip);
    }

    /// A hello was answered after so long.
    pub(super) fn measured(&mut self, round_trip: Duration) {
        if self.samples.len() >= SAMPLES {
            self.samples.pop_front();
        }
        self.samples.push_back(round_trip);
    }

    /// What was measured is not so any more.
    pub(super) fn forget(&mut self) {
        *self = Self::default();
    }

    /// Whether a hello has been answered.
    pub(super) fn is_measured(&self) -> bool {
        !self.samples.is_empty()
    }

    /// The median of the last measurements.
    pub(super) fn median(&self) -> Option<Duration> {
        let mut sorted: Vec<Duration> = self.samples.iter().copied().collect();
        sorted.sort();
        sorted.get(sorted.len() / 2).copied().or(self.attached)
    }

    /// What a director that is reached by `way` counts as; as far away as can be if nothing has been measured.
    pub(super) fn by(&self, way: Option<Way>) -> Duration {
        let penalty = if way == Some(Way::Tcp) { STREAM_PENALTY } else { Duration::ZERO };
        self.median().map_or(Duration::MAX, |median| median + penalty)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_slow_answer_moves_nobody_and_tcp_counts_as_farther() {
        let millis = Duration::from_millis;
        let mut distance = Distance::default();
        assert_eq!((distance.median(), distance.by(None)), (None, Duration::MAX));
        distance.attached(millis(50));
        assert_eq!((distance.is_measured(), distance.by(Some(Way::Tcp))), (false, millis(70)));
        for sample in [900, 10, 11, 12, 500, 13] {
            distance.measured(millis(sample));
        }
        assert_eq!((distance.is_measured(), distance.median()), (true, Some(millis(12))), "of the last five");
        distance.forget();
        assert_eq!(distance.median(), None);
    }
}
