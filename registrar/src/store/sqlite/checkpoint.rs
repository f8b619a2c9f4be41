//! Copies the write-ahead log into the database, and says when that may not go on: after a failed fsync the kernel takes
//! pages for written that are not, while SQLite does not copy again what an earlier checkpoint copied without an fsync,
//! as one does that a reader keeps from the end of the log. Only who opens the file anew copies all of the log again.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::wal::CheckpointMode;
use rusqlite::{Connection, ErrorCode, MAIN_DB, OpenFlags, ffi};

use super::file;
use crate::store::StoreError;

/// How long the log may get, in pages (32 MiB): the longer, the fewer of the stalls that a checkpoint is.
const LENGTH: u32 = 8192;
/// How much longer before it is tried again, if the log could not be copied whole and begun anew.
const STEP: u32 = 1024;
/// What the file of the lock holds from a failed checkpoint until all of the log is copied.
const MARK: &[u8] = b"copy the log whole";

/// When the writer makes checkpoints.
pub(super) struct Checkpoints {
    /// The length of the log in pages, as of the last commit.
    length: Arc<AtomicU32>,
    /// How long it was when it was copied last.
    copied: u32,
}

impl Checkpoints {
    /// From now on SQLite makes none by itself.
    pub(super) fn new(connection: &mut Connection) -> rusqlite::Result<Self> {
        let length = Arc::new(AtomicU32::new(0));
        let told = Arc::clone(&length);
        connection.wal_hook(Some(move |_: &mut _, pages| {
            told.store(u32::try_from(pages).unwrap_or(0), Ordering::Relaxed);
            Ok(())
        }))?;
        Ok(Self { length, copied: 0 })
    }

    /// To be called after each commit: copies what readers allow if the log has become long.
    ///
    /// # Errors
    /// If the disk did not take it. What is committed is safe in the log; but if [`is_fsync`], [`abandon`] the database and
    /// open it anew.
    pub(super) fn keep_up(&mut self, connection: &Connection) -> rusqlite::Result<()> {
        let length = self.length.load(Ordering::Relaxed);
        if length < self.copied {
            self.copied = 0;
        }
        if length < LENGTH.max(self.copied + STEP) {
            return Ok(());
        }
        self.copied = length;
        match connection.wal_checkpoint_v2(Some(MAIN_DB), CheckpointMode::PASSIVE) {
            Err(error) if error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy) => Ok(()),
            copied => copied.map(drop),
        }
    }
}

/// Whether it was an fsync that failed: nobody knows any more what is on disk. A disk that is full, in contrast, is full
/// and nothing else.
pub(super) fn is_fsync(error: &rusqlite::Error) -> bool {
    error.sqlite_error().is_some_and(|error| error.extended_code == ffi::SQLITE_IOERR_FSYNC)
}

/// Has whoever opens the database at `path` next copy all of the log, also if a backup keeps SQLite's notes until then of
/// what is copied; and has `connection` not do so when it is closed.
pub(super) fn abandon(connection: &Connection, path: &Path) {
    let kept = connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true);
    let marked = write_mark(&lock_path(path), MARK);
    if kept.is_err() || marked.is_err() {
        tracing::error!(?kept, ?marked, path = %path.display(), "cannot note that the log must be copied anew");
    }
}

/// Copies all of the log into the database at `path` if a checkpoint has failed. Nobody else may use it meanwhile.
pub(super) fn make_good(path: &Path) -> Result<(), StoreError> {
    let lock_path = lock_path(path);
    let fail = |action, source| StoreError::Io { action, path: lock_path.clone(), source };
    if !std::fs::read(&lock_path).map_err(|source| fail("read", source))?.starts_with(MARK) {
        return Ok(());
    }
    copy_whole(path).map_err(|error| match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => StoreError::Unavailable(format!(
            "{}: after a failed fsync all of its log must be copied, but another program, perhaps a backup, is \
             reading it: wait for that one, or stop it",
            path.display()
        )),
        _ => file::failure("write", path, &error),
    })?;
    write_mark(&lock_path, b"").map_err(|source| fail("write", source))?;
    tracing::info!(path = %path.display(), "the last fsync had failed: all of the log was copied anew");
    Ok(())
}

/// With the database for itself alone SQLite shares no notes with anybody, and so begins at the beginning of the log.
fn copy_whole(path: &Path) -> rusqlite::Result<()> {
    let access = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, access)?;
    connection.busy_timeout(Duration::ZERO)?;
    connection.pragma_update(None, "locking_mode", "EXCLUSIVE")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.wal_checkpoint_v2(Some(MAIN_DB), CheckpointMode::TRUNCATE)?;
    connection.close().map_err(|(_, error)| error)
}

fn write_mark(path: &Path, mark: &[u8]) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    file.write_all_at(mark, 0)?;
    file.set_len(mark.len() as u64)?;
    file.sync_all()
}

fn lock_path(path: &Path) -> PathBuf {
    file::beside(path, ".lock")
}
