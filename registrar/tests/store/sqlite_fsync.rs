//! A disk that fails when the log is copied into the database, and drops what it was given, as kernels do: what was
//! acknowledged is there when the database is opened anew, also if a backup reads it at that moment.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Lines, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command, Stdio};
use std::time::Duration;

use muster_common::time::Instant;
use muster_registrar::store::sqlite::{SqliteSnapshot, SqliteStore};
use muster_registrar::store::{KeyRange, Store, StoreError, Txn};
use tempfile::TempDir;

use crate::harness::{Killed, again, skip};

/// Tells the test binary, started again, that it is the one whose disk fails.
const DATABASE: &str = "MUSTER_TEST_FSYNC_DATABASE";
const SIZE: usize = 512 << 10;
/// After so many changes of that size the log is copied, at the latest.
const LOG: usize = 40;
const PATIENCE: Duration = Duration::from_secs(30);

/// Not a test of its own: a process that writes as many values as each line of its input says, and tells which were
/// acknowledged, until the store has closed itself. Its end is that of its input.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_as_told() {
    let Some(path) = std::env::var_os(DATABASE) else { return };
    let store = SqliteStore::open(Path::new(&path)).unwrap();
    // So that there is a connection for reading, too.
    store.range_all(KeyRange::all()).await.unwrap();
    tell("open");
    let mut written = 0;
    for line in std::io::stdin().lines() {
        for _ in 0..line.unwrap().parse::<usize>().unwrap() {
            written += 1;
            match store.txn(Txn::new().put(format!("key/{written}"), vec![b'v'; SIZE])).await {
                Ok(_) => tell(&format!("ack key/{written}")),
                Err(StoreError::Closed) => break,
                Err(error) => panic!("{error}"),
            }
        }
        tell("done");
    }
}

fn tell(line: &str) {
    std::io::stdout().lock().write_all(format!("{line}\n").as_bytes()).unwrap();
}

/// Does something with two files. The database is not read by this process itself: to close it would end SQLite's locks.
fn with(program: &str, one: &Path, other: &Path) -> bool {
    Command::new(program).args([one, other]).stdout(Stdio::null()).status().unwrap().success()
}

struct Writer {
    process: Killed,
    told: Lines<BufReader<ChildStdout>>,
    acknowledged: BTreeSet<String>,
    path: PathBuf,
}

impl Writer {
    fn start(path: &Path) -> Self {
        SqliteStore::create(path).unwrap();
        let mut process = again("sqlite_fsync::writes_as_told", DATABASE, path);
        let mut process = Killed(process.stdin(Stdio::piped()).spawn().unwrap());
        let told = BufReader::new(process.0.stdout.take().unwrap()).lines();
        let mut writer = Self { process, told, acknowledged: BTreeSet::new(), path: path.into() };
        writer.hear("open");
        writer
    }

    fn hear(&mut self, end: &str) {
        for line in self.told.by_ref() {
            let line = line.unwrap();
            if line.ends_with(end) {
                return;
            }
            if let Some(key) = line.strip_prefix("ack ") {
                self.acknowledged.insert(key.into());
            }
        }
        panic!("it ended");
    }

    /// Returns how many were acknowledged.
    fn write(&mut self, count: usize) -> usize {
        let before = self.acknowledged.len();
        writeln!(self.process.0.stdin.as_mut().unwrap(), "{count}").unwrap();
        self.hear("done");
        self.acknowledged.len() - before
    }

    fn end(mut self) -> BTreeSet<String> {
        drop(self.process.0.stdin.take());
        assert!(self.process.0.wait().unwrap().success());
        self.acknowledged
    }
}

/// Has every fsync of the database, not of its log, fail for as long as strace runs.
fn fail_fsync(writer: &Writer) -> Killed {
    let process = writer.process.0.id();
    let child = Command::new("strace")
        .args(["-f", "-q", "-o", "/dev/null", "-P"])
        .arg(&writer.path)
        .args(["-e", "trace=fsync,fdatasync", "-e", "inject=fsync,fdatasync:error=EIO"])
        .args(["-p", &process.to_string()])
        .spawn();
    let strace = Killed(child.unwrap());
    let is_traced = |task: fs::DirEntry| {
        let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
        status.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"))
    };
    let start = Instant::now();
    while !fs::read_dir(format!("/proc/{process}/task")).unwrap().all(|task| is_traced(task.unwrap())) {
        assert!(Instant::now() - start < PATIENCE, "strace does not trace the process");
        std::thread::sleep(Duration::from_millis(20));
    }
    strace
}

/// Fails the fsync that completes a checkpoint of which another did a part before, and undoes what both wrote.
/// A backup may have begun before the database is opened anew.
async fn fail(backs_up: bool) {
    if Command::new("strace").arg("-V").stdout(Stdio::null()).status().is_err() {
        return skip("strace is not installed");
    }
    let directory = TempDir::new().unwrap();
    let (path, before) = (directory.path().join("store.db"), directory.path().join("before"));
    let mut writer = Writer::start(&path);
    writer.write(8);
    let snapshot = SqliteSnapshot::open(&path).await.unwrap();
    assert!(with("cp", &path, &before));
    assert_eq!(writer.write(LOG), LOG);
    assert!(!with("cmp", &path, &before), "there was no checkpoint of the part before the snapshot");
    drop(snapshot);

    let strace = fail_fsync(&writer);
    assert!(writer.write(LOG) < LOG, "the writer went on after an fsync had failed");
    drop(strace);
    let snapshot = if backs_up { Some(SqliteSnapshot::open(&path).await.unwrap()) } else { None };
    assert!(with("cp", &before, &path));
    let acknowledged = writer.end();

    if let Some(snapshot) = snapshot {
        let error = SqliteStore::open(&path).unwrap_err();
        assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
        assert!(error.to_string().contains("a backup"), "{error}");
        drop(snapshot);
    }
    // Twice: to open it must not undo what opening it did.
    for _ in 0..2 {
        let store = SqliteStore::open(&path).unwrap();
        let (kvs, _) = store.range_all(KeyRange::all()).await.unwrap();
        let kept: BTreeSet<_> = kvs.iter().map(|kv| String::from_utf8(kv.key.to_vec()).unwrap()).collect();
        assert!(kept.is_superset(&acknowledged), "lost: {:?}", acknowledged.difference(&kept));
        assert!(kvs.iter().all(|kv| kv.value.len() == SIZE && kv.value.iter().all(|octet| *octet == b'v')));
    }
    let connection = rusqlite::Connection::open(&path).unwrap();
    let sound: String = connection.query_row("PRAGMA integrity_check", (), |row| row.get(0)).unwrap();
    assert_eq!(sound, "ok");
}

#[tokio::test]
async fn a_checkpoint_that_fails_in_fsync_loses_nothing() {
    fail(false).await;
}

#[tokio::test]
async fn a_checkpoint_that_fails_in_fsync_loses_nothing_although_a_backup_is_made() {
    fail(true).await;
}
