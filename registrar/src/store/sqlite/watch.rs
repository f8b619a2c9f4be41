//! Watching: what the log has, then what the writer announces; back to the log for whoever is too slow.

use std::collections::VecDeque;
use std::sync::Arc;

use futures_util::stream;
use tokio::sync::broadcast::{self, error::RecvError};

use super::read::Readers;
use super::writer::Group;
use crate::store::memory::Changes;
use crate::store::{KeyRange, Revision, StoreError, WatchBatch, WatchStream};

struct Watch {
    readers: Arc<Readers>,
    live: broadcast::Receiver<Group>,
    range: KeyRange,
    /// The next revision to tell about.
    next: Revision,
    ready: VecDeque<WatchBatch>,
    /// Whether the log may have revisions that `live` will not bring.
    behind: bool,
}

/// Starts a watch; `live` must be older than the caller's check that `from` is not compacted.
pub(super) fn stream(
    readers: Arc<Readers>,
    live: broadcast::Receiver<Group>,
    range: KeyRange,
    from: Revision,
) -> WatchStream {
    let watch = Watch { readers, live, range, next: from, ready: VecDeque::new(), behind: true };
    Box::pin(stream::unfold(Some(watch), |watch| async {
        let mut watch = watch?;
        match watch.next().await {
            Ok(batch) => Some((Ok(batch), Some(watch))),
            Err(error) => Some((Err(error), None)),
        }
    }))
}

impl Watch {
    async fn next(&mut self) -> Result<WatchBatch, StoreError> {
        loop {
            if let Some(batch) = self.ready.pop_front() {
                return Ok(batch);
            }
            if self.behind {
                self.read_log().await?;
                continue;
            }
            match self.live.recv().await {
                Ok(group) => self.take(&group),
                Err(RecvError::Lagged(_)) => self.behind = true,
                Err(RecvError::Closed) => return Err(StoreError::Closed),
            }
        }
    }

    async fn read_log(&mut self) -> Result<(), StoreError> {
        let (range, from) = (self.range.clone(), self.next);
        let Changes { batches, through, more } =
            self.readers.run(move |reader| reader.changes(&range, from)).await?;
        self.ready.extend(batches);
        self.advance(through);
        self.behind = more;
        Ok(())
    }

    fn take(&mut self, group: &[WatchBatch]) {
        for batch in group.iter().filter(|batch| batch.revision >= self.next) {
            let events: Vec<_> =
                batch.events.iter().filter(|event| self.range.contains(event.key())).cloned().collect();
            if !events.is_empty() {
                self.ready.push_back(WatchBatch { revision: batch.revision, events });
            }
        }
        if let Some(last) = group.last() {
            self.advance(last.revision);
        }
    }

    /// Notes that everything up to `through` is in `ready`.
    fn advance(&mut self, through: Revision) {
        if through < self.next {
            return;
        }
        self.next = through + 1;
        if self.ready.back().is_none_or(|last| last.revision < through) {
            self.ready.push_back(WatchBatch { revision: through, events: Vec::new() });
        }
    }
}
