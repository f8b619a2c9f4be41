//! When an endpoint is ready, and when not any more: kubelet's rule, of results in a row.

/// Results of the checks of one endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Streak {
    success_threshold: u32,
    failure_threshold: u32,
    /// The last result, and how often it has come in a row.
    last: Option<(bool, u32)>,
    ready: Option<bool>,
}

impl Streak {
    /// Nothing is known before the first threshold is reached. 0 counts as 1.
    pub fn new(success_threshold: u32, failure_threshold: u32) -> Self {
        Self {
            success_threshold: success_threshold.max(1),
            failure_threshold: failure_threshold.max(1),
            last: None,
            ready: None,
        }
    }

    /// A check has succeeded, or failed. Returns whether the endpoint is ready, if that is news.
    pub fn add(&mut self, success: bool) -> Option<bool> {
        let count = match self.last {
            Some((last, count)) if last == success => count.saturating_add(1),
            _ => 1,
        };
        self.last = Some((success, count));
        let threshold = if success { self.success_threshold } else { self.failure_threshold };
        if count < threshold || self.ready == Some(success) {
            return None;
        }
        self.ready = Some(success);
        self.ready
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_are_of_results_in_a_row() {
        let mut streak = Streak::new(2, 3);
        let news: Vec<Option<bool>> =
            [true, false, true, true, true, false, false, true, false, false, false, true, true]
                .into_iter()
                .map(|success| streak.add(success))
                .collect();
        let at: Vec<(usize, bool)> =
            news.iter().enumerate().filter_map(|(i, news)| Some((i, (*news)?))).collect();
        assert_eq!(at, [(3, true), (10, false), (12, true)]);
        assert_eq!(Streak::new(0, 0).add(false), Some(false));
    }
}
