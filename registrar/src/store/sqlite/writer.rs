//! Writing: one thread takes whatever transactions wait, applies them in order, each at a revision of its own,
//! and commits them together with one fsync before any of them is acknowledged.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use muster_common::time::Instant;
use rusqlite::{Connection, OptionalExtension};
use tokio::sync::{broadcast, mpsc, oneshot};

use super::checkpoint::Checkpoints;
use super::{Shared, checkpoint, file, read};
use crate::store::memory::check_compact;
use crate::store::{Event, KeyValue, Op, Revision, StoreError, Txn, TxnOutcome, WatchBatch};

/// The most transactions, and about the most bytes, in one commit.
const GROUP: usize = 512;
const GROUP_BYTES: usize = 4 << 20;
/// How many entries of the log a commit removes after a compaction; the rest waits for the next.
const TRIM: i64 = 2048;
/// While the disk fails: between attempts to write without being asked, and between looks for something to do.
const RETRY: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(20);

/// The revisions of one commit, for those who watch.
pub(super) type Group = Arc<[WatchBatch]>;

type Reply<T> = oneshot::Sender<Result<T, StoreError>>;

/// What the writer is asked to do.
#[derive(Debug)]
pub(super) enum Job {
    /// See [`crate::store::Store::txn`]; checked already.
    Txn { txn: Txn, reply: Reply<TxnOutcome> },
    /// See [`crate::store::Store::compact`].
    Compact { up_to: Revision, reply: Reply<()> },
}

impl Job {
    fn size(&self) -> usize {
        match self {
            Self::Txn { txn, .. } => txn.size(),
            Self::Compact { .. } => 0,
        }
    }

    fn fail(self, error: StoreError) {
        // Whoever no longer waits for the answer does not need it.
        match self {
            Self::Txn { reply, .. } => drop(reply.send(Err(error))),
            Self::Compact { reply, .. } => drop(reply.send(Err(error))),
        }
    }
}

/// What became of a job, once committed.
enum Done {
    Txn(TxnOutcome),
    Compact(Result<(), StoreError>),
}

/// Where the store stands.
#[derive(Clone, Copy)]
struct Position {
    revision: Revision,
    compacted: Revision,
}

pub(super) struct Writer {
    connection: Connection,
    checkpoints: Checkpoints,
    path: PathBuf,
    shared: Arc<Shared>,
    live: broadcast::Sender<Group>,
    position: Position,
    /// Whether the log still has entries that are compacted away.
    trimming: bool,
    /// Since the last commit failed: when to try by oneself.
    retry: Option<Instant>,
}

impl Writer {
    pub(super) fn new(
        mut connection: Connection,
        path: PathBuf,
        shared: Arc<Shared>,
        live: broadcast::Sender<Group>,
    ) -> Result<Self, StoreError> {
        let fail = |error| file::failure("read", &path, &error);
        let (revision, compacted) = read::position(&connection).map_err(fail)?;
        let checkpoints = Checkpoints::new(&mut connection).map_err(fail)?;
        shared.revision.store(revision, Ordering::Release);
        let position = Position { revision, compacted };
        Ok(Self {
            connection,
            checkpoints,
            path,
            shared,
            live,
            position,
            trimming: compacted > 0,
            retry: None,
        })
    }

    /// Works until all senders of `queue` are gone. A disk that fails is tried again and again.
    pub(super) fn run(mut self, mut queue: mpsc::Receiver<Job>) {
        loop {
            let first = match queue.try_recv() {
                Ok(job) => Some(job),
                Err(mpsc::error::TryRecvError::Disconnected) => return,
                Err(mpsc::error::TryRecvError::Empty) if self.trimming || self.is_due() => None,
                Err(mpsc::error::TryRecvError::Empty) if self.retry.is_some() => {
                    std::thread::sleep(POLL);
                    continue;
                }
                Err(mpsc::error::TryRecvError::Empty) => match queue.blocking_recv() {
                    Some(job) => Some(job),
                    None => return,
                },
            };
            let mut bytes = first.as_ref().map_or(0, Job::size);
            let mut jobs: Vec<Job> = first.into_iter().collect();
            while !jobs.is_empty() && jobs.len() < GROUP && bytes < GROUP_BYTES {
                let Ok(job) = queue.try_recv() else { break };
                bytes += job.size();
                jobs.push(job);
            }
            if !self.commit(jobs) {
                break;
            }
        }
        queue.close();
        while let Some(job) = queue.blocking_recv() {
            job.fail(StoreError::Closed);
        }
    }

    /// Commits `jobs` and answers them. Returns whether the writer can go on.
    fn commit(&mut self, jobs: Vec<Job>) -> bool {
        let before = self.position;
        let mut batches = Vec::with_capacity(jobs.len());
        let error = match self.write(&jobs, &mut batches) {
            Ok(done) => {
                self.announce(batches);
                for (job, done) in jobs.into_iter().zip(done) {
                    match (job, done) {
                        (Job::Txn { reply, .. }, Done::Txn(outcome)) => drop(reply.send(Ok(outcome))),
                        (Job::Compact { reply, .. }, Done::Compact(result)) => drop(reply.send(result)),
                        (job, _) => job.fail(StoreError::Closed),
                    }
                }
                return self.checkpoint();
            }
            Err(error) => error,
        };
        self.position = before;
        // Do not try again at once, on and on, what nobody asked for.
        (self.trimming, self.retry) = (false, Some(Instant::now() + RETRY));
        // An error ends the transaction by itself in some cases; then there is nothing left to roll back.
        let rolled_back =
            self.connection.is_autocommit() || self.connection.execute_batch("ROLLBACK").is_ok();
        let trouble = file::diagnose(&self.path, &error);
        let told = file::explain(trouble, "write", &self.path, &error).to_string();
        if self.shared.condition.failed(trouble, told.clone()) {
            tracing::error!(error = told, "the store takes no changes; trying again");
        }
        for job in jobs {
            job.fail(file::explain(trouble, "write", &self.path, &error));
        }
        if !rolled_back {
            tracing::error!(path = %self.path.display(), "what was begun cannot be taken back: the store is closed");
        }
        rolled_back
    }

    /// Keeps the log short. Returns whether the writer can go on.
    fn checkpoint(&mut self) -> bool {
        let Err(error) = self.checkpoints.keep_up(&self.connection) else { return true };
        let told = file::failure("write", &self.path, &error).to_string();
        if !checkpoint::is_fsync(&error) {
            tracing::warn!(
                error = told,
                "cannot copy the log into the database, and so it grows; trying again"
            );
            return true;
        }
        checkpoint::abandon(&self.connection, &self.path);
        self.shared.condition.failed(file::diagnose(&self.path, &error), told.clone());
        tracing::error!(
            error = told,
            "the database must be opened anew: the store is closed; its log holds all"
        );
        false
    }

    /// Whether it is time to find out by oneself if the disk works again.
    fn is_due(&self) -> bool {
        self.retry.is_some_and(|at| at <= Instant::now())
    }

    /// Applies and commits, without telling anyone yet.
    ///
    /// When a commit fails half-way, also in fsync, one can go on: SQLite counts what was written to its log only once
    /// it is on disk, the next commit overwrites it from the same place, and reads do not see it. Only who opens the
    /// file before that, after a crash, may find it there: see [`StoreError::Disk`]. For checkpoints see [`checkpoint`].
    fn write(&mut self, jobs: &[Job], batches: &mut Vec<WatchBatch>) -> rusqlite::Result<Vec<Done>> {
        let before = self.position;
        let done = self.apply_all(jobs, batches)?;
        let trimmed = self.trim()?;
        let unchanged = self.position.revision == before.revision
            && self.position.compacted == before.compacted
            && trimmed == 0;
        if unchanged && !self.is_due() {
            self.connection.execute_batch("COMMIT")?;
            return Ok(done);
        }
        if unchanged {
            // Something must change for the disk to be written.
            self.execute("UPDATE state SET compacted = -1")?;
        }
        self.save_position()?;
        self.execute("COMMIT")?;
        self.shared.commits.inc();
        self.retry = None;
        if self.shared.condition.good() {
            tracing::info!(path = %self.path.display(), "the store takes changes again");
        }
        Ok(done)
    }

    fn announce(&self, batches: Vec<WatchBatch>) {
        self.shared.revision.store(self.position.revision, Ordering::Release);
        self.shared.txns.inc_by(batches.len() as u64);
        if !batches.is_empty() {
            // No receivers is fine: nobody watches.
            drop(self.live.send(batches.into()));
        }
    }

    fn execute(&self, sql: &str) -> rusqlite::Result<usize> {
        self.connection.prepare_cached(sql)?.execute(())
    }

    fn apply_all(&mut self, jobs: &[Job], batches: &mut Vec<WatchBatch>) -> rusqlite::Result<Vec<Done>> {
        self.execute("BEGIN IMMEDIATE")?;
        jobs.iter()
            .map(|job| match job {
                Job::Txn { txn, .. } => self.apply(txn, batches).map(Done::Txn),
                Job::Compact { up_to, .. } => {
                    let result = check_compact(*up_to, self.position.revision);
                    if result.is_ok() && *up_to > self.position.compacted {
                        self.position.compacted = *up_to;
                        self.trimming = true;
                    }
                    Ok(Done::Compact(result))
                }
            })
            .collect()
    }

    fn apply(&mut self, txn: &Txn, batches: &mut Vec<WatchBatch>) -> rusqlite::Result<TxnOutcome> {
        for condition in &txn.conditions {
            let mod_revision = self
                .connection
                .prepare_cached("SELECT mod_revision FROM kv WHERE key = ?1")?
                .query_row((&condition.key()[..],), |row| row.get::<_, i64>(0))
                .optional()?;
            if !condition.holds(mod_revision.map(i64::cast_unsigned)) {
                return Ok(TxnOutcome::Conflict);
            }
        }
        let revision = self.position.revision + 1;
        let mut events = Vec::with_capacity(txn.ops.len());
        for op in &txn.ops {
            if let Some(event) = self.change(op, revision, events.len())? {
                events.push(event);
            }
        }
        if !events.is_empty() {
            self.position.revision = revision;
            batches.push(WatchBatch { revision, events });
        }
        Ok(TxnOutcome::Committed(self.position.revision))
    }

    fn change(&self, op: &Op, revision: Revision, position: usize) -> rusqlite::Result<Option<Event>> {
        let previous = self.current(op.key())?;
        let event = match op {
            Op::Put { key, value } => {
                let create_revision = previous.as_ref().map_or(revision, |kv| kv.create_revision);
                self.connection
                    .prepare_cached(
                        "INSERT INTO kv VALUES (?1, ?2, ?3, ?4)
                         ON CONFLICT (key) DO UPDATE SET value = ?2, mod_revision = ?4",
                    )?
                    .execute((&key[..], &value[..], create_revision.cast_signed(), revision.cast_signed()))?;
                Event::Put(KeyValue {
                    key: key.clone(),
                    value: value.clone(),
                    create_revision,
                    mod_revision: revision,
                })
            }
            Op::Delete { .. } if previous.is_none() => return Ok(None),
            Op::Delete { key } => {
                self.connection.prepare_cached("DELETE FROM kv WHERE key = ?1")?.execute((&key[..],))?;
                Event::Delete { key: key.clone() }
            }
        };
        let (value, create_revision) = match &event {
            Event::Put(kv) => (Some(&kv.value[..]), kv.create_revision),
            Event::Delete { .. } => (None, 0),
        };
        self.connection.prepare_cached("INSERT INTO log VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)")?.execute((
            read::log_id(revision, position),
            &event.key()[..],
            value,
            create_revision.cast_signed(),
            previous.as_ref().map(|kv| &kv.value[..]),
            previous.as_ref().map(|kv| kv.create_revision.cast_signed()),
            previous.as_ref().map(|kv| kv.mod_revision.cast_signed()),
        ))?;
        Ok(Some(event))
    }

    fn current(&self, key: &Bytes) -> rusqlite::Result<Option<KeyValue>> {
        self.connection
            .prepare_cached("SELECT value, create_revision, mod_revision FROM kv WHERE key = ?1")?
            .query_row((&key[..],), |row| {
                Ok(KeyValue {
                    key: key.clone(),
                    value: Bytes::copy_from_slice(row.get_ref(0)?.as_blob()?),
                    create_revision: row.get::<_, i64>(1)?.cast_unsigned(),
                    mod_revision: row.get::<_, i64>(2)?.cast_unsigned(),
                })
            })
            .optional()
    }

    /// Removes some of the compacted log; returns how many entries.
    fn trim(&mut self) -> rusqlite::Result<usize> {
        if !self.trimming {
            return Ok(0);
        }
        let removed = self
            .connection
            .prepare_cached(
                "DELETE FROM log WHERE id IN (SELECT id FROM log WHERE id < ?1 ORDER BY id LIMIT ?2)",
            )?
            .execute((read::log_id(self.position.compacted + 1, 0), TRIM))?;
        self.trimming = removed > 0;
        Ok(removed)
    }

    fn save_position(&self) -> rusqlite::Result<usize> {
        self.connection
            .prepare_cached("UPDATE state SET revision = ?1, compacted = ?2")?
            .execute((self.position.revision.cast_signed(), self.position.compacted.cast_signed()))
    }
}
