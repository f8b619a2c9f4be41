//! The database file: creating it whole or not at all, and opening only what is sound, ours and unused.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OpenFlags};

use super::checkpoint;
use super::condition::Trouble;
use crate::store::StoreError;

/// Marks the file as Muster's ("Must"), as the SQLite file format provides for.
const APPLICATION_ID: i32 = 0x4d75_7374;
/// The version of the tables below.
const FORMAT: i32 = 1;
/// How long to wait for a tool that has the database open, such as a backup.
const BUSY: Duration = Duration::from_secs(5);

/// `log.id` is `revision << 8 | position`: a transaction has at most 128 changes.
const SCHEMA: &str = "
    CREATE TABLE kv (
        key BLOB PRIMARY KEY,
        value BLOB NOT NULL,
        create_revision INTEGER NOT NULL,
        mod_revision INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE log (
        id INTEGER PRIMARY KEY,
        key BLOB NOT NULL,
        value BLOB,
        create_revision INTEGER NOT NULL,
        previous_value BLOB,
        previous_create_revision INTEGER,
        previous_mod_revision INTEGER
    );
    CREATE TABLE state (
        id INTEGER PRIMARY KEY CHECK (id = 0),
        revision INTEGER NOT NULL,
        compacted INTEGER NOT NULL
    );
    INSERT INTO state VALUES (0, 1, 0);
";

/// Creates an empty database.
pub(super) fn create(path: &Path) -> Result<(), StoreError> {
    if path.symlink_metadata().is_ok() {
        return Err(StoreError::Exists { path: path.into() });
    }
    let _lock = lock(path)?;
    // Made under another name and then linked, so that a crash leaves no half-made database.
    let new = beside(path, ".new");
    remove_leftovers(&new)?;
    let result = build(&new).and_then(|()| match fs::hard_link(&new, path) {
        Ok(()) => sync_directory(path),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            Err(StoreError::Exists { path: path.into() })
        }
        Err(source) => Err(StoreError::Io { action: "create", path: path.into(), source }),
    });
    let cleaned = remove_leftovers(&new);
    result.and(cleaned)
}

fn build(path: &Path) -> Result<(), StoreError> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(|source| StoreError::Io { action: "create", path: path.into(), source })?;
    let fail = |error| failure("create", path, &error);
    let mut connection = Connection::open(path).map_err(fail)?;
    connection.pragma_update(None, "synchronous", "FULL").map_err(fail)?;
    let schema = connection.transaction().map_err(fail)?;
    schema.pragma_update(None, "application_id", APPLICATION_ID).map_err(fail)?;
    schema.pragma_update(None, "user_version", FORMAT).map_err(fail)?;
    schema.execute_batch(SCHEMA).map_err(fail)?;
    schema.commit().map_err(fail)?;
    set_wal(&connection, path)?;
    connection.close().map_err(|(_, error)| failure("create", path, &error))
}

fn remove_leftovers(path: &Path) -> Result<(), StoreError> {
    for suffix in ["", "-journal", "-wal", "-shm"] {
        let path = beside(path, suffix);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(StoreError::Io { action: "remove", path, source });
            }
            _ => {}
        }
    }
    Ok(())
}

fn sync_directory(path: &Path) -> Result<(), StoreError> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(|source| StoreError::Io {
        action: "sync",
        path: directory.into(),
        source,
    })
}

/// The path without symbolic links: SQLite keeps its log beside the file that a link points to.
pub(super) fn resolve(path: &Path) -> Result<PathBuf, StoreError> {
    fs::canonicalize(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => StoreError::Missing { path: path.into() },
        _ => StoreError::Io { action: "open", path: path.into(), source },
    })
}

/// Opens an existing database for the writer; also returns the lock, to be held as long as it is open.
pub(super) fn open(path: &Path) -> Result<(Connection, Lock), StoreError> {
    check_header(path)?;
    let lock = lock(path)?;
    settle_log(path)?;
    checkpoint::make_good(path)?;
    let connection = connect(path, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    check_tables(&connection, path)?;
    restrict_mode(path)?;
    set_wal(&connection, path)?;
    let fail = |error| failure("open", path, &error);
    connection.pragma_update(None, "synchronous", "FULL").map_err(fail)?;
    connection.pragma_update(None, "wal_autocheckpoint", 0).map_err(fail)?;
    connection.pragma_update(None, "journal_size_limit", 64 << 20).map_err(fail)?;
    Ok((connection, lock))
}

/// Opens one more connection, which can only read.
pub(super) fn open_reader(path: &Path) -> Result<Connection, StoreError> {
    connect(path, OpenFlags::SQLITE_OPEN_READ_ONLY)
}

/// Opens a connection that can only read, beside whoever has the database open, and begins a transaction that shows
/// one revision for as long as the connection is open. Nothing but SQLite touches the file: see [`Lock`].
pub(super) fn open_snapshot(path: &Path) -> Result<Connection, StoreError> {
    let foreign = |reason: &str| StoreError::Foreign { path: path.into(), reason: reason.into() };
    let fail = |error: rusqlite::Error| match error.sqlite_error_code() {
        Some(ErrorCode::NotADatabase) => foreign("it is not an SQLite database"),
        _ => failure("read", path, &error),
    };
    let connection = open_reader(path)?;
    connection.pragma_update(None, "query_only", true).map_err(fail)?;
    connection.execute_batch("BEGIN").map_err(fail)?;
    let application: i32 =
        connection.pragma_query_value(None, "application_id", |row| row.get(0)).map_err(fail)?;
    if application != APPLICATION_ID {
        return Err(foreign("it is an SQLite database of another program"));
    }
    check_tables(&connection, path)?;
    Ok(connection)
}

fn connect(path: &Path, access: OpenFlags) -> Result<Connection, StoreError> {
    let fail = |error| failure("open", path, &error);
    let connection =
        Connection::open_with_flags(path, access | OpenFlags::SQLITE_OPEN_NO_MUTEX).map_err(fail)?;
    connection.busy_timeout(BUSY).map_err(fail)?;
    connection.pragma_update(None, "cache_size", -32768).map_err(fail)?;
    connection.pragma_update(None, "trusted_schema", false).map_err(fail)?;
    connection.pragma_update(None, "cell_size_check", true).map_err(fail)?;
    connection.set_prepared_statement_cache_capacity(32);
    Ok(connection)
}

/// Writes what an unclean end has left of the log once more, as it is, and has it on disk, before SQLite reads it. After a
/// failed fsync the kernel takes pages for written that are not: they read as if they were, and a later fsync does not mind
/// them. What is committed after them would then be lost with them when the power fails.
fn settle_log(path: &Path) -> Result<(), StoreError> {
    let log_path = beside(path, "-wal");
    let settle = || {
        let log = OpenOptions::new().read(true).write(true).open(&log_path)?;
        let mut chunk = vec![0; 1 << 20];
        let mut at = 0;
        loop {
            let read = log.read_at(&mut chunk, at)?;
            let Some(content) = chunk.get(..read).filter(|content| !content.is_empty()) else { break };
            log.write_all_at(content, at)?;
            at += read as u64;
        }
        if at > 0 { log.sync_all() } else { Ok(()) }
    };
    match settle() {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(StoreError::Io { action: "write anew", path: log_path, source })
        }
        _ => Ok(()),
    }
}

fn set_wal(connection: &Connection, path: &Path) -> Result<(), StoreError> {
    let mode: String = connection
        .pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get(0))
        .map_err(|error| failure("open", path, &error))?;
    if mode == "wal" {
        return Ok(());
    }
    Err(StoreError::Database {
        action: "keep a write-ahead log for",
        path: path.into(),
        reason: "the file system cannot share memory between its users: move the database to a local disk"
            .into(),
    })
}

/// Looks at the first 100 bytes (SQLite file format, section 1.3), before SQLite itself may touch the file.
fn check_header(path: &Path) -> Result<(), StoreError> {
    let io = |source| StoreError::Io { action: "open", path: path.into(), source };
    let foreign = |reason: &str| Err(StoreError::Foreign { path: path.into(), reason: reason.into() });
    let corrupt = |reason: String| Err(StoreError::Corrupt { path: path.into(), reason });

    let metadata = fs::metadata(path).map_err(io)?;
    if !metadata.is_file() {
        return foreign("it is not a regular file");
    }
    let mut header = Vec::with_capacity(100);
    File::open(path).map_err(io)?.take(100).read_to_end(&mut header).map_err(io)?;
    let magic = b"SQLite format 3\0";
    if header.is_empty() {
        return corrupt("the file is empty".into());
    }
    let known = header.len().min(magic.len());
    if header[..known] != magic[..known] {
        return foreign("it is not an SQLite database");
    }
    let Ok(header) = <[u8; 100]>::try_from(header) else {
        return corrupt(format!("only {} bytes are left of it", metadata.len()));
    };
    let number = |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    if number(68) != APPLICATION_ID.cast_unsigned() {
        return foreign("it is an SQLite database of another program");
    }
    check_format(path, number(60).into())?;
    // While there is a write-ahead log, the header may rightly promise pages that are still in it.
    let has_wal = fs::metadata(beside(path, "-wal")).is_ok_and(|wal| wal.len() > 0);
    let page_size = match u64::from(number(16) >> 16) {
        1 => 65536,
        size => size,
    };
    let expected = page_size * u64::from(number(28));
    if !has_wal && number(24) == number(92) && metadata.len() < expected {
        return corrupt(format!("only {} of {expected} bytes are left of it", metadata.len()));
    }
    Ok(())
}

fn check_format(path: &Path, found: i64) -> Result<(), StoreError> {
    let supported = i64::from(FORMAT);
    if found > supported {
        return Err(StoreError::NewerFormat { path: path.into(), found, supported });
    }
    if found < 1 {
        return Err(StoreError::Corrupt { path: path.into(), reason: format!("its format is {found}") });
    }
    Ok(())
}

/// What the header alone cannot tell: the format as SQLite sees it, and that state and log agree.
fn check_tables(connection: &Connection, path: &Path) -> Result<(), StoreError> {
    let fail = |error| failure("read", path, &error);
    check_format(path, connection.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(fail)?)?;
    let tables: i64 = connection
        .query_row(
            "SELECT count(*) FROM sqlite_schema WHERE type = 'table' AND name IN ('kv', 'log', 'state')",
            (),
            |row| row.get(0),
        )
        .map_err(fail)?;
    let corrupt = |reason: &str| Err(StoreError::Corrupt { path: path.into(), reason: reason.into() });
    if tables != 3 {
        return corrupt("tables are missing");
    }
    let sound: Option<bool> = connection
        .query_row(
            "SELECT revision >= 1 AND compacted BETWEEN 0 AND revision
                AND revision >= (SELECT coalesce(max(id) >> 8, 0) FROM log) FROM state",
            (),
            |row| row.get(0),
        )
        .map(Some)
        .or_else(|error| if error == rusqlite::Error::QueryReturnedNoRows { Ok(None) } else { Err(error) })
        .map_err(fail)?;
    if sound != Some(true) {
        return corrupt("its revision does not fit its log");
    }
    Ok(())
}

/// Keeps other processes away from a database. It lies in a file of its own: closing any descriptor of the
/// database itself would end SQLite's own locks (POSIX).
#[derive(Debug)]
pub(super) struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing alone does not do: a child process that is just being started may have the descriptor still.
        drop(self.0.unlock());
    }
}

fn lock(path: &Path) -> Result<Lock, StoreError> {
    let lock_path = beside(path, ".lock");
    let fail = |action, source| StoreError::Io { action, path: lock_path.clone(), source };
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&lock_path)
        .map_err(|source| fail("create", source))?;
    match file.try_lock() {
        Ok(()) => Ok(Lock(file)),
        Err(TryLockError::WouldBlock) => Err(StoreError::Locked { path: path.into() }),
        Err(TryLockError::Error(source)) => Err(fail("lock", source)),
    }
}

/// The store holds hashes of tokens and names of everything: nobody else may read it.
fn restrict_mode(path: &Path) -> Result<(), StoreError> {
    let io = |source| StoreError::Io { action: "restrict access to", path: path.into(), source };
    if fs::metadata(path).map_err(io)?.permissions().mode() & 0o077 != 0 {
        fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(io)?;
    }
    Ok(())
}

pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name: OsString = path.into();
    name.push(suffix);
    name.into()
}

/// Says what an error of SQLite's means.
pub(super) fn failure(action: &'static str, path: &Path, error: &rusqlite::Error) -> StoreError {
    explain(diagnose(path, error), action, path, error)
}

/// What is the matter with the disk. SQLite does not tell why the system refused something, so that is asked anew.
pub(super) fn diagnose(path: &Path, error: &rusqlite::Error) -> Trouble {
    match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => Trouble::Full,
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Trouble::Busy,
        // Also if for lack of room: nobody knows what is on disk.
        Some(ErrorCode::SystemIoFailure) if checkpoint::is_fsync(error) => Trouble::Disk,
        Some(ErrorCode::SystemIoFailure | ErrorCode::CannotOpen | ErrorCode::ReadOnly) => {
            match try_write(path).map_err(|error| error.kind()) {
                Ok(()) => Trouble::Disk,
                Err(io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => Trouble::Full,
                Err(io::ErrorKind::ReadOnlyFilesystem) => Trouble::ReadOnly,
                Err(_) => Trouble::Disk,
            }
        }
        _ => Trouble::Other,
    }
}

/// Writes a little at the end of the file of the lock, which is empty or holds a mark of [`checkpoint`]'s.
fn try_write(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(beside(path, ".lock"))?;
    let length = file.metadata()?.len();
    file.write_all_at(b"x", length)?;
    file.sync_all()?;
    file.set_len(length)
}

/// Says what it means that `trouble` kept `action` from being done.
pub(super) fn explain(
    trouble: Trouble,
    action: &'static str,
    path: &Path,
    error: &rusqlite::Error,
) -> StoreError {
    let (place, reason) = (path.display().to_string(), error.to_string());
    match (trouble, error.sqlite_error_code()) {
        (Trouble::Full, _) => StoreError::Full { place, reason },
        (Trouble::ReadOnly, _) => StoreError::ReadOnly { place },
        (Trouble::Disk, _) if action == "write" => StoreError::Disk { place, reason },
        (Trouble::Busy, _) => {
            StoreError::Unavailable(format!("{place} is in use by another program: {reason}"))
        }
        (_, Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase)) => {
            StoreError::Corrupt { path: path.into(), reason }
        }
        _ => StoreError::Database { action, path: path.into(), reason },
    }
}
