//! The latest changes, for those who follow them: each follower has a place in one shared history, so that a slow
//! one costs nothing, and is told when it has fallen too far behind.

use std::{collections::VecDeque, sync::Arc};

use super::index::Applied;
use crate::store::Revision;

/// How many changes are kept.
const CHANGES_MAX: usize = 16 * 1024;

/// The follower's revision is no longer, or not yet, in the history.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "changes are kept from revision {oldest} on, and revision {asked} is before that; list again, and watch from there"
)]
pub struct TooOld {
    /// The revision that was asked for.
    pub asked: Revision,
    /// The oldest that can be followed from.
    pub oldest: Revision,
}

/// The latest changes, in order.
#[derive(Debug)]
pub struct History {
    entries: VecDeque<Arc<Applied>>,
    changes: usize,
    /// All changes after this revision are here.
    oldest: Revision,
}

impl History {
    /// A history that begins after `revision`.
    pub fn new(revision: Revision) -> Self {
        Self { entries: VecDeque::new(), changes: 0, oldest: revision }
    }

    /// Adds what has been applied.
    pub fn push(&mut self, applied: Arc<Applied>) {
        if applied.changes.is_empty() {
            return;
        }
        self.changes += applied.changes.len();
        self.entries.push_back(applied);
        while self.changes > CHANGES_MAX
            && let Some(forgotten) = self.entries.pop_front()
        {
            self.changes -= forgotten.changes.len();
            self.oldest = forgotten.revision;
        }
    }

    /// At most `limit` entries after `revision`.
    ///
    /// # Errors
    /// [`TooOld`] if some of them have been forgotten.
    pub fn after(&self, revision: Revision, limit: usize) -> Result<Vec<Arc<Applied>>, TooOld> {
        if revision < self.oldest {
            return Err(TooOld { asked: revision, oldest: self.oldest });
        }
        let start = self.entries.partition_point(|entry| entry.revision <= revision);
        Ok(self.entries.range(start..).take(limit).cloned().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::index::Change;

    #[test]
    fn what_is_forgotten_is_told() {
        let mut history = History::new(10);
        for revision in 11..=20 {
            let changes = vec![Change::Device { old: None, new: None }; CHANGES_MAX / 4];
            history.push(Arc::new(Applied { revision, changes, ..Applied::default() }));
        }
        assert_eq!(history.after(15, 9).unwrap_err(), TooOld { asked: 15, oldest: 16 });
        let revisions = |from, limit| -> Vec<Revision> {
            history.after(from, limit).unwrap().iter().map(|applied| applied.revision).collect()
        };
        assert_eq!(revisions(16, 9), [17, 18, 19, 20]);
        assert_eq!(revisions(17, 2), [18, 19]);
        assert!(revisions(20, 9).is_empty());
    }
}
