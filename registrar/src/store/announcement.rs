//! A key that is there for as long as a process runs, by which other processes know that it does.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;

use super::KeyRange;

/// For how long an announcement outlives its process, at least; stores look for those that are over now and then.
pub const LIFETIME: Duration = Duration::from_secs(5);

/// Ends when it is dropped.
#[must_use = "an announcement ends when it is dropped"]
pub struct Announcement(Option<Box<dyn FnOnce() + Send + Sync>>);

impl Announcement {
    /// One that `end` ends.
    pub(super) fn new(end: impl FnOnce() + Send + Sync + 'static) -> Self {
        Self(Some(Box::new(end)))
    }
}

impl Drop for Announcement {
    fn drop(&mut self) {
        if let Some(end) = self.0.take() {
            end();
        }
    }
}

impl fmt::Debug for Announcement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Announcement").finish_non_exhaustive()
    }
}

/// Where `key` and what is announced beside it are.
pub(super) fn directory(key: &Bytes) -> KeyRange {
    let end = key.iter().rposition(|byte| *byte == b'/').map_or(0, |slash| slash + 1);
    KeyRange::prefix(key.slice(..end))
}
