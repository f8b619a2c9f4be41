//! Events in the order of virtual time; those of one moment in the order in which they were added.

use std::{collections::BTreeMap, time::Duration};

#[derive(Debug)]
pub(super) struct Queue<E> {
    events: BTreeMap<(Duration, u64), E>,
    next: u64,
}

impl<E> Queue<E> {
    pub(super) fn new() -> Self {
        Self { events: BTreeMap::new(), next: 0 }
    }

    /// Adds an event.
    pub(super) fn push(&mut self, at: Duration, event: E) {
        self.events.insert((at, self.next), event);
        self.next += 1;
    }

    /// Takes the first event that is not after `end`.
    pub(super) fn pop(&mut self, end: Duration) -> Option<(Duration, E)> {
        let first = self.events.first_entry().filter(|entry| entry.key().0 <= end)?;
        let ((at, _), event) = first.remove_entry();
        Some((at, event))
    }
}
