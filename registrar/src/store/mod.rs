//! Where the registrar keeps what must survive: ordered keys under one global revision, shaped like etcd.
//!
//! [`Store`] is the interface; [`memory`] is its reference model, [`sqlite`] the embedded default and [`etcd`]
//! what several registrars share. All behave alike: one conformance suite runs against each of them.

pub mod etcd;
pub mod memory;
pub mod sqlite;

mod announcement;
mod error;
mod paging;
mod types;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::BoxStream;

pub use announcement::{Announcement, LIFETIME};
pub use error::StoreError;
pub use paging::Paging;
pub use types::{
    Condition, Event, KeyRange, KeyValue, MAX_KEY, MAX_TXN_BYTES, MAX_TXN_OPS, Op, RangeResult, Revision,
    Txn, TxnOutcome, WatchBatch,
};

/// The changes of a range, in order. After an error the stream ends; watch again from the revision after the
/// last batch received, or, after [`StoreError::Compacted`], read the range anew.
pub type WatchStream = BoxStream<'static, Result<WatchBatch, StoreError>>;

/// Ordered keys with a global revision, transactions and watches.
///
/// An empty store is at revision 1. Each transaction that changes something gets the next revision of its own
/// (on etcd, whose other users also count, a higher one).
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Reads at most `limit` (1 or more) keys of `range` in key order, as they were at revision `at`, or are now.
    ///
    /// To page, repeat with [`KeyRange::after`] the last key and `at` the first answer's revision.
    ///
    /// # Errors
    /// [`StoreError::Compacted`] if `at` is older than what is kept, [`StoreError::Invalid`] if it is in the future.
    async fn range(
        &self,
        range: KeyRange,
        at: Option<Revision>,
        limit: usize,
    ) -> Result<RangeResult, StoreError>;

    /// Applies all operations at one revision if all conditions hold, else none. What is reported as committed
    /// is durable.
    ///
    /// A transaction that changes nothing (no operations, or deletions of absent keys only) commits at the
    /// current revision and is seen by no watch.
    ///
    /// # Errors
    /// [`StoreError::Unknown`] if it may or may not have been committed; all other errors mean that it was not.
    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError>;

    /// Follows the changes of `range` from revision `from` on (included), past and future, each exactly once.
    ///
    /// # Errors
    /// [`StoreError::Compacted`], here or later in the stream, if changes from `from` on have been forgotten.
    async fn watch(&self, range: KeyRange, from: Revision) -> Result<WatchStream, StoreError>;

    /// Forgets the history up to and including revision `up_to`: the state at `up_to` can still be read, and
    /// watches can start from `up_to + 1`. Already compacted revisions are fine.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] if `up_to` is in the future.
    async fn compact(&self, up_to: Revision) -> Result<(), StoreError>;

    /// The revision of the latest change.
    async fn revision(&self) -> Result<Revision, StoreError>;

    /// Sets `key`, to nothing, for as long as this process runs and reaches the store: until the announcement is
    /// dropped, or about [`LIFETIME`] after the process has died or was cut off. What is cut off for longer is
    /// announced again once the store is back.
    ///
    /// Announcements have a directory (up to the key's last `/`) to themselves. In a store that one process has to
    /// itself there is one a directory: it stays until the next process replaces it.
    ///
    /// # Errors
    /// As [`Store::txn`].
    async fn announce(&self, key: Bytes) -> Result<Announcement, StoreError>;

    /// Reads one key.
    ///
    /// # Errors
    /// As [`Store::range`].
    async fn get(&self, key: Bytes) -> Result<Option<KeyValue>, StoreError> {
        Ok(self.range(KeyRange::key(key), None, 1).await?.kvs.pop())
    }

    /// Reads all of `range`, page by page, at one revision, which it returns: watch from the revision after it.
    ///
    /// # Errors
    /// As [`Store::range`]; [`StoreError::Compacted`] if a compaction overtook the reading: start again.
    async fn range_all(&self, range: KeyRange) -> Result<(Vec<KeyValue>, Revision), StoreError> {
        const PAGE: usize = 1000;
        let (mut paging, mut kvs, mut revision) = (Paging::new(range, None), Vec::new(), 0);
        while let Some((range, at)) = paging.next() {
            let page = self.range(range, at, PAGE).await?;
            paging.took(&page);
            revision = page.revision;
            kvs.extend(page.kvs);
        }
        Ok((kvs, revision))
    }
}
