//! The database file: who may open it, what is refused, and what a full disk does.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use bytes::Bytes;
use muster_registrar::store::sqlite::SqliteStore;
use muster_registrar::store::{KeyRange, KeyValue, Store, StoreError, Txn, TxnOutcome};
use rusqlite::Connection;
use tempfile::TempDir;

fn fresh() -> (TempDir, PathBuf) {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("store.db");
    SqliteStore::create(&path).unwrap();
    (directory, path)
}

/// A database with something in it, closed.
async fn filled() -> (TempDir, PathBuf) {
    let (directory, path) = fresh();
    let store = SqliteStore::open(&path).unwrap();
    for at in 0..200 {
        store.txn(Txn::new().put(format!("key/{at}"), vec![b'v'; 400])).await.unwrap();
    }
    drop(store);
    (directory, path)
}

/// Opening fails, names the file, and changes nothing.
fn refused(path: &Path) -> StoreError {
    let before = fs::read(path).unwrap();
    let mode = fs::metadata(path).unwrap().permissions().mode();
    let error = SqliteStore::open(path).unwrap_err();
    assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    assert_eq!(fs::read(path).unwrap(), before);
    assert_eq!(fs::metadata(path).unwrap().permissions().mode(), mode);
    error
}

#[test]
fn a_database_is_private_and_nothing_else_is_left_beside_it() {
    let (directory, path) = fresh();
    let store = SqliteStore::open(&path).unwrap();
    for entry in fs::read_dir(directory.path()).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{entry:?}");
    }
    drop(store);
    let mut left: Vec<_> =
        fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["store.db", "store.db.lock"]);
    // Also if it was not private before.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    drop(SqliteStore::open(&path).unwrap());
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
}

#[tokio::test]
async fn creating_twice_refuses_and_keeps_what_is_there() {
    let (_directory, path) = filled().await;
    let before = fs::read(&path).unwrap();
    assert!(matches!(SqliteStore::create(&path), Err(StoreError::Exists { .. })));
    assert_eq!(fs::read(&path).unwrap(), before);
}

#[test]
fn what_an_interrupted_creation_left_is_no_obstacle() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("store.db");
    fs::write(directory.path().join("store.db.new"), "half").unwrap();
    fs::write(directory.path().join("store.db.new-journal"), "half").unwrap();
    SqliteStore::create(&path).unwrap();
    drop(SqliteStore::open(&path).unwrap());
}

#[test]
fn a_missing_database_is_not_created() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("store.db");
    assert!(matches!(SqliteStore::open(&path), Err(StoreError::Missing { .. })));
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn two_do_not_share_a_database() {
    let (_directory, path) = fresh();
    let first = SqliteStore::open(&path).unwrap();
    let error = SqliteStore::open(&path).unwrap_err();
    assert!(matches!(error, StoreError::Locked { .. }), "{error}");
    drop(first);
    drop(SqliteStore::open(&path).unwrap());
}

#[test]
fn foreign_files_are_refused() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("store.db");
    let text: &[u8] = b"# registrar.toml\nlisten = 7500\n";
    fs::write(&path, text).unwrap();
    assert!(matches!(refused(&path), StoreError::Foreign { .. }));
    fs::write(&path, text.repeat(100)).unwrap();
    assert!(matches!(refused(&path), StoreError::Foreign { .. }));

    let other = directory.path().join("other.db");
    let connection = Connection::open(&other).unwrap();
    connection.execute_batch("CREATE TABLE kv (key, value); PRAGMA application_id = 1").unwrap();
    drop(connection);
    assert!(matches!(refused(&other), StoreError::Foreign { .. }));

    let error = SqliteStore::open(directory.path()).unwrap_err();
    assert!(matches!(error, StoreError::Foreign { .. }), "{error}");
    assert!(!directory.path().join("store.db.lock").exists());
}

#[tokio::test]
async fn a_newer_format_is_refused() {
    let (_directory, path) = filled().await;
    let connection = Connection::open(&path).unwrap();
    connection.execute_batch("PRAGMA user_version = 2").unwrap();
    drop(connection);
    let error = refused(&path);
    assert!(matches!(error, StoreError::NewerFormat { found: 2, supported: 1, .. }), "{error}");
}

#[tokio::test]
async fn a_truncated_database_is_refused() {
    let (_directory, path) = filled().await;
    let whole = fs::read(&path).unwrap();
    for length in [whole.len() - 1, whole.len() / 2, 4096, 1000, 100, 99, 20, 5, 0] {
        fs::write(&path, &whole[..length]).unwrap();
        assert!(matches!(refused(&path), StoreError::Corrupt { .. }), "{length} bytes");
    }
    fs::write(&path, &whole).unwrap();
    drop(SqliteStore::open(&path).unwrap());
}

#[tokio::test]
async fn a_database_without_its_tables_is_refused() {
    for damage in ["DROP TABLE log", "DELETE FROM state", "UPDATE state SET revision = 3"] {
        let (_directory, path) = filled().await;
        Connection::open(&path).unwrap().execute_batch(damage).unwrap();
        assert!(matches!(refused(&path), StoreError::Corrupt { .. }), "{damage}");
    }
}

#[tokio::test]
async fn damaged_pages_are_noticed_when_read() {
    let (_directory, path) = filled().await;
    let mut bytes = fs::read(&path).unwrap();
    // All pages but the first, which says where everything is.
    bytes[4096..].fill(0xa5);
    fs::write(&path, bytes).unwrap();
    let error = match SqliteStore::open(&path) {
        Ok(store) => store.range_all(KeyRange::all()).await.unwrap_err(),
        Err(error) => error,
    };
    assert!(matches!(error, StoreError::Corrupt { .. }), "{error}");
}

#[test]
fn a_directory_that_cannot_be_written_is_named() {
    // Not even root can make files there.
    for directory in ["/sys", "/proc/self", "/nonexistent"] {
        let path = Path::new(directory).join("store.db");
        let error = SqliteStore::create(&path).unwrap_err();
        assert!(matches!(error, StoreError::Io { .. }), "{error}");
        assert!(error.to_string().contains(directory), "{error}");
    }
    let (_directory, path) = fresh();
    let below = path.join("store.db");
    assert!(matches!(SqliteStore::create(&below), Err(StoreError::Io { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn waiting_transactions_share_a_commit() {
    let (_directory, path) = fresh();
    let store = Arc::new(SqliteStore::open(&path).unwrap());
    let writers: Vec<_> = (0..64)
        .map(|writer| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                for at in 0..20 {
                    let txn = Txn::new().put(format!("{writer}"), format!("{at}"));
                    assert!(matches!(store.txn(txn).await.unwrap(), TxnOutcome::Committed(_)));
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    let stats = store.stats();
    assert_eq!(stats.txns, 64 * 20);
    assert!(stats.commits < stats.txns / 4, "{stats:?}");
}

#[tokio::test]
async fn a_compacted_log_is_trimmed() {
    let (_directory, path) = filled().await;
    let store = SqliteStore::open(&path).unwrap();
    let revision = store.revision().await.unwrap();
    store.compact(revision - 1).await.unwrap();
    drop(store);
    let count = |path: &Path| -> i64 {
        let connection = Connection::open(path).unwrap();
        connection.query_row("SELECT count(*) FROM log", (), |row| row.get(0)).unwrap()
    };
    assert_eq!(count(&path), 1);
}

/// A small file system of its own, unmounted at the end.
struct SmallDisk(TempDir);

impl SmallDisk {
    /// `None` without root, which is then said.
    fn mount() -> Option<Self> {
        let directory = TempDir::new().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=512k", "tmpfs"])
            .arg(directory.path())
            .status()
            .is_ok_and(|status| status.success());
        if mounted {
            return Some(Self(directory));
        }
        crate::harness::skip("cannot mount a small file system, which needs root");
        None
    }

    fn grow(&self) {
        let grown = Command::new("mount").args(["-o", "remount,size=8m"]).arg(self.0.path()).status();
        assert!(grown.unwrap().success());
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        Command::new("umount").arg("-l").arg(self.0.path()).status().unwrap();
    }
}

#[tokio::test]
async fn a_full_disk_refuses_and_keeps_what_was_acknowledged() {
    let Some(disk) = SmallDisk::mount() else { return };
    let path = disk.0.path().join("store.db");
    SqliteStore::create(&path).unwrap();
    let mut store = SqliteStore::open(&path).unwrap();
    let mut acknowledged = Vec::new();
    let put = |at: usize| Txn::new().put(format!("key/{at:04}"), vec![b'v'; 2000]);
    let error = loop {
        let at = acknowledged.len();
        assert!(at < 1000, "the disk does not fill up");
        match store.txn(put(at)).await {
            Ok(_) => acknowledged.push(format!("key/{at:04}")),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, StoreError::Full { .. }), "{error}");
    assert!(acknowledged.len() > 10);
    let keys = async |store: &SqliteStore| -> Vec<Bytes> {
        store.range_all(KeyRange::all()).await.unwrap().0.into_iter().map(|kv| kv.key).collect()
    };
    assert_eq!(keys(&store).await, acknowledged);
    let revision = store.revision().await.unwrap();
    assert_eq!(revision, acknowledged.len() as u64 + 1);

    // With room again, it goes on by itself, and after a restart.
    disk.grow();
    for _ in 0..2 {
        let at = acknowledged.len();
        store.txn(put(at)).await.unwrap();
        acknowledged.push(format!("key/{at:04}"));
        drop(store);
        store = SqliteStore::open(&path).unwrap();
        assert_eq!(keys(&store).await, acknowledged);
        assert_eq!(store.revision().await.unwrap(), acknowledged.len() as u64 + 1);
    }
}

/// What a process that was killed has announced is gone once another one announces something.
#[tokio::test]
async fn announcements_of_the_dead_are_replaced() {
    let (_directory, path) = fresh();
    let store = SqliteStore::open(&path).unwrap();
    store.txn(Txn::new().put("q/x", "").put("r", "")).await.unwrap();
    std::mem::forget(store.announce("r/a".into()).await.unwrap());
    drop(store);
    let store = SqliteStore::open(&path).unwrap();
    let announcement = store.announce("r/b".into()).await.unwrap();
    let keys = |kvs: Vec<KeyValue>| kvs.into_iter().map(|kv| kv.key).collect::<Vec<_>>();
    assert_eq!(keys(store.range_all(KeyRange::all()).await.unwrap().0), ["q/x", "r", "r/b"]);
    let revision = store.revision().await.unwrap();
    announcement.end().await;
    drop(store);
    let store = SqliteStore::open(&path).unwrap();
    assert_eq!(store.revision().await.unwrap(), revision, "who was told everything misses nothing");
}
