//! A key that is there for as long as a process runs, by which other processes know that it does.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use tokio::task::JoinHandle;

use super::KeyRange;

/// For how long an announcement outlives its process, at least; stores look for those that are over now and then.
pub const LIFETIME: Duration = Duration::from_secs(5);

/// Ends when it is dropped.
#[must_use = "an announcement ends when it is dropped"]
pub struct Announcement {
    end: Option<Box<dyn FnOnce() + Send + Sync>>,
    /// What then still has to be done.
    ending: Option<JoinHandle<()>>,
}

impl Announcement {
    /// One that `end` ends.
    pub(super) fn new(end: impl FnOnce() + Send + Sync + 'static) -> Self {
        Self { end: Some(Box::new(end)), ending: None }
    }

    /// The same, and `ending` finishes after that.
    pub(super) fn and_then(mut self, ending: JoinHandle<()>) -> Self {
        Self { ending: Some(ending), end: self.end.take() }
    }

    /// Ends it, and waits until the store has been told, or does not answer.
    pub async fn end(mut self) {
        let ending = self.ending.take();
        drop(self);
        if let Some(ending) = ending {
            // If it has panicked, the announcement expires.
            let _ = ending.await;
        }
    }
}

impl Drop for Announcement {
    fn drop(&mut self) {
        if let Some(end) = self.end.take() {
            end();
        }
    }
}

impl fmt::Debug for Announcement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Announcement").finish_non_exhaustive()
    }
}

/// Where `key` and what is announced beside it are.
pub(super) fn directory(key: &Bytes) -> KeyRange {
    let end = key.iter().rposition(|byte| *byte == b'/').map_or(0, |slash| slash + 1);
    KeyRange::prefix(key.slice(..end))
}
