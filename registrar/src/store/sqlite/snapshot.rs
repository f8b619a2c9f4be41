//! One revision of a database, read beside the registrar that has it open: without its lock, and without any means to
//! change the file. The write-ahead log keeps what is read; it grows until the snapshot is dropped.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rusqlite::Connection;

use super::file;
use super::read::Reader;
use crate::store::{KeyRange, RangeResult, StoreError};

/// The state of a database at the moment that it was opened.
#[derive(Debug)]
pub struct SqliteSnapshot(Arc<Snapshot>);

#[derive(Debug)]
struct Snapshot {
    path: PathBuf,
    /// With a transaction that lasts as long as the connection.
    connection: Mutex<Connection>,
}

impl SqliteSnapshot {
    /// Takes a snapshot of the database at `path`, whoever else has it open.
    ///
    /// # Errors
    /// Says what is wrong if the file is missing, not Muster's, newer or damaged.
    pub async fn open(path: &Path) -> Result<Self, StoreError> {
        let path = path.to_owned();
        blocking(move || {
            let path = file::resolve(&path)?;
            let connection = file::open_snapshot(&path)?;
            Ok(Self(Arc::new(Snapshot { path, connection: Mutex::new(connection) })))
        })
        .await
    }

    /// Reads at most `limit` (1 or more) keys of `range` in key order.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub async fn range(&self, range: KeyRange, limit: usize) -> Result<RangeResult, StoreError> {
        let snapshot = self.0.clone();
        blocking(move || {
            let connection = snapshot.connection.lock().unwrap_or_else(PoisonError::into_inner);
            Reader::within(&connection, &snapshot.path)?.range(&range, None, limit)
        })
        .await
    }
}

/// Runs `read` on a thread that may block.
async fn blocking<T: Send + 'static>(
    read: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    tokio::task::spawn_blocking(read).await.unwrap_or(Err(StoreError::Closed))
}
