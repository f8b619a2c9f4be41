//! The embedded default store: one SQLite file, for one registrar.
//!
//! All writes go through one thread, which commits whatever has queued up with a single fsync ([`writer`]);
//! reads and watches have connections of their own ([`read`], [`watch`]); [`snapshot`] reads from another process. [`file`]
//! opens, checks and locks; [`checkpoint`] copies the log into the database.

mod checkpoint;
mod condition;
mod file;
mod read;
mod snapshot;
mod watch;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use muster_common::telemetry::Metrics;
use prometheus_client::metrics::counter::Counter;
use tokio::sync::{broadcast, mpsc, oneshot};

pub use self::snapshot::SqliteSnapshot;

use self::condition::Condition;
use self::file::Lock;
use self::read::Readers;
use self::writer::{Group, Job, Writer};
use super::{
    Announcement, KeyRange, KeyValue, RangeResult, Revision, Store, StoreError, Txn, TxnOutcome, WatchStream,
    announcement,
};

/// How many requests wait for the writer before callers wait to queue.
const QUEUE: usize = 1024;
/// Between looks whether the writer is still there, and between attempts to announce.
const LOOK: Duration = Duration::from_millis(500);
/// How many committed groups a watch may be behind before it reads from the log instead.
const LIVE_GROUPS: usize = 64;

/// A store in one SQLite file. When dropped, it finishes what is queued and closes the file.
#[derive(Debug)]
pub struct SqliteStore {
    /// `None` only while being dropped.
    jobs: Option<mpsc::Sender<Job>>,
    writer: Option<JoinHandle<()>>,
    readers: Arc<Readers>,
    shared: Arc<Shared>,
    live: broadcast::WeakSender<Group>,
    /// Held until everything else is closed: keeps other processes away.
    _lock: Lock,
}

/// What the writer tells.
#[derive(Debug, Default)]
struct Shared {
    revision: AtomicU64,
    txns: Counter,
    commits: Counter,
    condition: Condition,
}

/// Counters since the store was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Transactions that changed something.
    pub txns: u64,
    /// Commits to disk, each with one fsync; at most one for each transaction.
    pub commits: u64,
}

impl SqliteStore {
    /// Creates an empty database at `path`, whose directory must exist, with mode 0600.
    ///
    /// # Errors
    /// [`StoreError::Exists`] if anything is at `path` already, which is then left alone.
    pub fn create(path: &Path) -> Result<(), StoreError> {
        file::create(path)
    }

    /// Opens the database at `path` and locks it.
    ///
    /// # Errors
    /// Says what is wrong if the file is missing, not Muster's, newer, damaged or in use. It is not changed then.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let path = file::resolve(&path.into())?;
        let (connection, lock) = file::open(&path)?;
        let shared = Arc::new(Shared::default());
        let live = broadcast::Sender::new(LIVE_GROUPS);
        let weak = live.downgrade();
        let writer = Writer::new(connection, path.clone(), Arc::clone(&shared), live)?;
        let (jobs, queue) = mpsc::channel(QUEUE);
        let writer = std::thread::Builder::new()
            .name("store-writer".into())
            .spawn(move || writer.run(queue))
            .map_err(|source| StoreError::Io { action: "start the writer of", path: path.clone(), source })?;
        Ok(Self {
            jobs: Some(jobs),
            writer: Some(writer),
            readers: Arc::new(Readers::new(path)),
            shared,
            live: weak,
            _lock: lock,
        })
    }

    /// The files that a database at `path` consists of; some of them come and go.
    pub fn files(path: &Path) -> [PathBuf; 4] {
        ["", "-wal", "-shm", ".lock"].map(|suffix| file::beside(path, suffix))
    }

    /// Counts of transactions and of commits to disk.
    pub fn stats(&self) -> Stats {
        Stats { txns: self.shared.txns.get(), commits: self.shared.commits.get() }
    }

    /// Has [`Stats`] told at `/metrics`.
    pub fn register_metrics(&self, metrics: &Metrics) {
        metrics.register(|registry| {
            let help = "Transactions that changed the store";
            registry.register("store_txns", help, self.shared.txns.clone());
            let help = "Commits of the store to disk, each with one fsync";
            registry.register("store_commits", help, self.shared.commits.clone());
            self.shared.condition.register(registry);
        });
    }

    /// Tells, whenever it is called, why the store takes no changes at present, if it does not.
    pub fn trouble(&self) -> impl Fn() -> Option<String> + Send + Sync + 'static {
        let shared = Arc::clone(&self.shared);
        move || shared.condition.trouble()
    }

    /// Completes if the store has closed itself because it cannot go on; the log tells why.
    pub fn failed(&self) -> impl Future<Output = ()> + Send + 'static {
        let jobs = self.jobs.as_ref().map(mpsc::Sender::downgrade);
        async move {
            // Held only while it is looked at: the writer ends when the last sender is gone.
            while let Some(jobs) = jobs.as_ref().and_then(mpsc::WeakSender::upgrade) {
                if jobs.is_closed() {
                    return;
                }
                drop(jobs);
                tokio::time::sleep(LOOK).await;
            }
        }
    }

    async fn send<T>(
        &self,
        job: Job,
        reply: oneshot::Receiver<Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let jobs = self.jobs.as_ref().ok_or(StoreError::Closed)?;
        jobs.send(job).await.map_err(|_| StoreError::Closed)?;
        // The writer answers everything that it takes, unless it dies.
        reply.await.unwrap_or_else(|_| Err(StoreError::Unknown("the store's writer has died".into())))
    }
}

/// Tries until the disk takes it, for as long as the store is there.
async fn announce_later(jobs: Option<mpsc::WeakSender<Job>>, txn: Txn) {
    loop {
        tokio::time::sleep(LOOK).await;
        let Some(jobs) = jobs.as_ref().and_then(mpsc::WeakSender::upgrade) else { return };
        let (reply, answer) = oneshot::channel();
        if jobs.send(Job::Txn { txn: txn.clone(), reply }).await.is_err() {
            return;
        }
        drop(jobs);
        if matches!(answer.await, Ok(Ok(_))) {
            return;
        }
    }
}

impl Drop for SqliteStore {
    fn drop(&mut self) {
        self.readers.close();
        self.jobs = None;
        if let Some(writer) = self.writer.take() {
            // A writer that panicked has said so already.
            drop(writer.join());
        }
    }
}

#[async_trait]
impl Store for SqliteStore {
    async fn range(
        &self,
        range: KeyRange,
        at: Option<Revision>,
        limit: usize,
    ) -> Result<RangeResult, StoreError> {
        self.readers.run(move |reader| reader.range(&range, at, limit)).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        txn.check()?;
        let (reply, answer) = oneshot::channel();
        self.send(Job::Txn { txn, reply }, answer).await
    }

    async fn watch(&self, range: KeyRange, from: Revision) -> Result<WatchStream, StoreError> {
        // Listening before reading, so that nothing falls between the two.
        let live = self.live.upgrade().ok_or(StoreError::Closed)?.subscribe();
        self.readers.run(move |reader| reader.check_watch(from)).await?;
        Ok(watch::stream(Arc::clone(&self.readers), live, range, from))
    }

    async fn compact(&self, up_to: Revision) -> Result<(), StoreError> {
        let (reply, answer) = oneshot::channel();
        self.send(Job::Compact { up_to, reply }, answer).await
    }

    async fn revision(&self) -> Result<Revision, StoreError> {
        Ok(self.shared.revision.load(Ordering::Acquire))
    }

    async fn announce(&self, key: Bytes) -> Result<Announcement, StoreError> {
        let (left_behind, _) = self.range_all(announcement::directory(&key)).await?;
        let left_behind = left_behind.into_iter().map(|kv| kv.key).filter(|left| *left != key);
        let txn = left_behind.fold(Txn::new().put(key.clone(), ""), Txn::delete);
        match self.txn(txn.clone()).await {
            // Nobody else is there to know. A revision after the last that watchers were told would have them read all anew.
            Ok(_) => Ok(Announcement::new(|| ())),
            // What needs no write can be served meanwhile.
            Err(StoreError::Full { .. } | StoreError::ReadOnly { .. } | StoreError::Disk { .. }) => {
                let later =
                    tokio::spawn(announce_later(self.jobs.as_ref().map(mpsc::Sender::downgrade), txn));
                Ok(Announcement::new(move || later.abort()))
            }
            Err(error) => Err(error),
        }
    }

    /// One snapshot shows all of the range: no paging needed.
    async fn range_all(&self, range: KeyRange) -> Result<(Vec<KeyValue>, Revision), StoreError> {
        let all = self.range(range, None, usize::MAX).await?;
        Ok((all.kvs, all.revision))
    }
}
