//! Reading: a few connections that see one committed revision each time, beside the writer and never in its way.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use rusqlite::{Connection, Row, Rows};
use tokio::sync::Semaphore;

use super::file;
use crate::store::memory::{Changes, check_range};
use crate::store::{Event, KeyRange, KeyValue, RangeResult, Revision, StoreError, WatchBatch};

/// How many reads go on at once.
const CONNECTIONS: usize = 4;
/// How many changes, and how many bytes, a watch takes from the log at once.
const CHUNK: usize = 1024;
const CHUNK_BYTES: usize = 4 << 20;

/// The connections for reading.
#[derive(Debug)]
pub(super) struct Readers {
    path: PathBuf,
    idle: Mutex<Option<Vec<Connection>>>,
    permits: Arc<Semaphore>,
}

impl Readers {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, idle: Mutex::new(Some(Vec::new())), permits: Arc::new(Semaphore::new(CONNECTIONS)) }
    }

    /// Runs `read` on a connection, on a thread that may block.
    pub(super) async fn run<T: Send + 'static>(
        self: &Arc<Self>,
        read: impl FnOnce(&Reader<'_>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let permit = Arc::clone(&self.permits).acquire_owned().await.map_err(|_| StoreError::Closed)?;
        let readers = Arc::clone(self);
        let done = tokio::task::spawn_blocking(move || {
            let connection = match readers.with_idle(|idle| idle.pop()).ok_or(StoreError::Closed)? {
                Some(connection) => connection,
                None => file::open_reader(&readers.path)?,
            };
            let result = Reader::begin(&connection, &readers.path).and_then(|reader| read(&reader));
            readers.with_idle(|idle| idle.push(connection));
            drop(permit);
            result
        });
        done.await.unwrap_or(Err(StoreError::Closed))
    }

    /// Closes the connections; later reads fail.
    pub(super) fn close(&self) {
        self.permits.close();
        *self.idle.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn with_idle<T>(&self, change: impl FnOnce(&mut Vec<Connection>) -> T) -> Option<T> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).as_mut().map(change)
    }
}

/// A view of the database at its latest revision.
pub(super) struct Reader<'a> {
    connection: &'a Connection,
    path: &'a Path,
    /// Ends the view when dropped, unless it is part of a longer one.
    _snapshot: Option<rusqlite::Transaction<'a>>,
    revision: Revision,
    compacted: Revision,
}

impl<'a> Reader<'a> {
    fn begin(connection: &'a Connection, path: &'a Path) -> Result<Self, StoreError> {
        let snapshot =
            connection.unchecked_transaction().map_err(|error| file::failure("read", path, &error))?;
        Ok(Self { _snapshot: Some(snapshot), ..Self::within(connection, path)? })
    }

    /// A view within the connection's own transaction.
    pub(super) fn within(connection: &'a Connection, path: &'a Path) -> Result<Self, StoreError> {
        let (revision, compacted) =
            position(connection).map_err(|error| file::failure("read", path, &error))?;
        Ok(Self { connection, path, _snapshot: None, revision, compacted })
    }

    fn fail(&self, error: rusqlite::Error) -> StoreError {
        file::failure("read", self.path, &error)
    }

    /// See [`crate::store::Store::range`].
    pub(super) fn range(
        &self,
        range: &KeyRange,
        at: Option<Revision>,
        limit: usize,
    ) -> Result<RangeResult, StoreError> {
        let at = check_range(at, limit, self.revision, self.compacted)?;
        let wanted = limit.saturating_add(1);
        let mut kvs = self.unchanged_since(at, range, wanted).map_err(|error| self.fail(error))?;
        if at < self.revision {
            let replaced = self.replaced_since(at, range).map_err(|error| self.fail(error))?;
            kvs.extend(replaced);
            kvs.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        }
        let more = kvs.len() > limit;
        kvs.truncate(limit);
        Ok(RangeResult { kvs, revision: at, more, count: None })
    }

    /// The first keys that have not changed since revision `at`.
    fn unchanged_since(
        &self,
        at: Revision,
        range: &KeyRange,
        limit: usize,
    ) -> rusqlite::Result<Vec<KeyValue>> {
        let at = at.cast_signed();
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let start = &range.start[..];
        match &range.end {
            Some(end) => {
                let mut select = self.connection.prepare_cached(
                    "SELECT key, value, create_revision, mod_revision FROM kv
                     WHERE key >= ?1 AND key < ?2 AND mod_revision <= ?3 ORDER BY key LIMIT ?4",
                )?;
                key_values(select.query((start, &end[..], at, limit))?)
            }
            None => {
                let mut select = self.connection.prepare_cached(
                    "SELECT key, value, create_revision, mod_revision FROM kv
                     WHERE key >= ?1 AND mod_revision <= ?2 ORDER BY key LIMIT ?3",
                )?;
                key_values(select.query((start, at, limit))?)
            }
        }
    }

    /// What the keys that have changed since revision `at` were then, without those that did not exist.
    fn replaced_since(&self, at: Revision, range: &KeyRange) -> rusqlite::Result<Vec<KeyValue>> {
        let mut select = self.connection.prepare_cached(
            "SELECT key, previous_value, previous_create_revision, previous_mod_revision FROM log
             WHERE id >= ?1 ORDER BY id",
        )?;
        let mut rows = select.query((log_id(at + 1, 0),))?;
        let mut earliest: BTreeMap<Bytes, Option<KeyValue>> = BTreeMap::new();
        while let Some(row) = rows.next()? {
            let key = row.get_ref(0)?.as_blob()?;
            if !range.contains(key) || earliest.contains_key(key) {
                continue;
            }
            let existed = row.get_ref(1)?.as_blob_or_null()?.is_some();
            let previous = if existed { Some(key_value(row)?) } else { None };
            earliest.insert(Bytes::copy_from_slice(key), previous);
        }
        Ok(earliest.into_values().flatten().collect())
    }

    /// Whether a watch can start from revision `from`.
    pub(super) fn check_watch(&self, from: Revision) -> Result<(), StoreError> {
        if from <= self.compacted {
            return Err(StoreError::Compacted { oldest: self.compacted + 1 });
        }
        Ok(())
    }

    /// The next changes of `range` from revision `from` on: whole revisions, and not too many.
    pub(super) fn changes(&self, range: &KeyRange, from: Revision) -> Result<Changes, StoreError> {
        self.check_watch(from)?;
        self.read_log(range, from).map_err(|error| self.fail(error))
    }

    fn read_log(&self, range: &KeyRange, from: Revision) -> rusqlite::Result<Changes> {
        let mut select = self
            .connection
            .prepare_cached("SELECT id, key, value, create_revision FROM log WHERE id >= ?1 ORDER BY id")?;
        let mut rows = select.query((log_id(from, 0),))?;
        let mut batches: Vec<WatchBatch> = Vec::new();
        let (mut revision, mut count, mut bytes) = (0, 0, 0);
        while let Some(row) = rows.next()? {
            let next = row.get::<_, i64>(0)?.cast_unsigned() >> 8;
            if next != revision && (count >= CHUNK || bytes >= CHUNK_BYTES) {
                return Ok(Changes { batches, through: revision, more: true });
            }
            revision = next;
            count += 1;
            let key = row.get_ref(1)?.as_blob()?;
            if !range.contains(key) {
                continue;
            }
            let key = Bytes::copy_from_slice(key);
            let event = match row.get_ref(2)?.as_blob_or_null()? {
                Some(value) => {
                    bytes += value.len();
                    let value = Bytes::copy_from_slice(value);
                    let create_revision = row.get::<_, i64>(3)?.cast_unsigned();
                    Event::Put(KeyValue { key, value, create_revision, mod_revision: revision })
                }
                None => Event::Delete { key },
            };
            match batches.last_mut() {
                Some(last) if last.revision == revision => last.events.push(event),
                _ => batches.push(WatchBatch { revision, events: vec![event] }),
            }
        }
        Ok(Changes { batches, through: self.revision, more: false })
    }
}

/// The current revision and the latest compacted one.
pub(super) fn position(connection: &Connection) -> rusqlite::Result<(Revision, Revision)> {
    connection.prepare_cached("SELECT revision, compacted FROM state")?.query_row((), |row| {
        Ok((row.get::<_, i64>(0)?.cast_unsigned(), row.get::<_, i64>(1)?.cast_unsigned()))
    })
}

/// The log's key for a change of a revision.
pub(super) fn log_id(revision: Revision, position: usize) -> i64 {
    (revision << 8 | position as u64).min(i64::MAX.cast_unsigned()).cast_signed()
}

fn key_values(mut rows: Rows<'_>) -> rusqlite::Result<Vec<KeyValue>> {
    let mut kvs = Vec::new();
    while let Some(row) = rows.next()? {
        kvs.push(key_value(row)?);
    }
    Ok(kvs)
}

/// From the columns key, value, create revision, mod revision.
fn key_value(row: &Row<'_>) -> rusqlite::Result<KeyValue> {
    Ok(KeyValue {
        key: Bytes::copy_from_slice(row.get_ref(0)?.as_blob()?),
        value: Bytes::copy_from_slice(row.get_ref(1)?.as_blob()?),
        create_revision: row.get::<_, i64>(2)?.cast_unsigned(),
        mod_revision: row.get::<_, i64>(3)?.cast_unsigned(),
    })
}
