//! The reference model of a store, in memory: what every backend must behave like.
//!
//! [`Model`] is synchronous and deterministic, for simulation and comparison; [`MemoryStore`] is the model
//! behind the [`Store`] interface. Nothing of it survives the process.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream;
use tokio::sync::watch;

use super::{
    Announcement, Event, KeyRange, KeyValue, Op, RangeResult, Revision, Store, StoreError, Txn, TxnOutcome,
    WatchBatch, WatchStream,
};

/// How many revisions a watch takes from the log at once.
const CHUNK: usize = 256;

/// The state of a store and its history since the last compaction.
#[derive(Clone, Debug)]
pub struct Model {
    kvs: BTreeMap<Bytes, KeyValue>,
    /// One entry for each revision after `compacted`, without gaps.
    log: VecDeque<Vec<Change>>,
    revision: Revision,
    compacted: Revision,
}

/// A change, and what it replaced.
#[derive(Clone, Debug)]
struct Change {
    event: Event,
    previous: Option<KeyValue>,
}

/// Changes read from a history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changes {
    /// The revisions that changed the range.
    pub batches: Vec<WatchBatch>,
    /// They are complete up to this revision.
    pub through: Revision,
    /// Whether there are later ones.
    pub more: bool,
}

impl Default for Model {
    fn default() -> Self {
        Self { kvs: BTreeMap::new(), log: VecDeque::new(), revision: 1, compacted: 0 }
    }
}

impl Model {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// The revision of the latest change.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// Applies a transaction, as [`Store::txn`] does.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] if the transaction breaks the rules of [`Txn::check`].
    pub fn txn(&mut self, txn: &Txn) -> Result<TxnOutcome, StoreError> {
        txn.check()?;
        let holds = txn
            .conditions
            .iter()
            .all(|condition| condition.holds(self.kvs.get(condition.key()).map(|kv| kv.mod_revision)));
        if !holds {
            return Ok(TxnOutcome::Conflict);
        }
        let revision = self.revision + 1;
        let changes: Vec<Change> = txn.ops.iter().filter_map(|op| self.apply(op, revision)).collect();
        if !changes.is_empty() {
            self.log.push_back(changes);
            self.revision = revision;
        }
        Ok(TxnOutcome::Committed(self.revision))
    }

    fn apply(&mut self, op: &Op, revision: Revision) -> Option<Change> {
        match op {
            Op::Put { key, value } => {
                let previous = self.kvs.remove(key);
                let kv = KeyValue {
                    key: key.clone(),
                    value: value.clone(),
                    create_revision: previous.as_ref().map_or(revision, |kv| kv.create_revision),
                    mod_revision: revision,
                };
                self.kvs.insert(key.clone(), kv.clone());
                Some(Change { event: Event::Put(kv), previous })
            }
            Op::Delete { key } => {
                let previous = Some(self.kvs.remove(key)?);
                Some(Change { event: Event::Delete { key: key.clone() }, previous })
            }
        }
    }

    /// Reads a page, as [`Store::range`] does.
    ///
    /// # Errors
    /// As [`Store::range`].
    pub fn range(
        &self,
        range: &KeyRange,
        at: Option<Revision>,
        limit: usize,
    ) -> Result<RangeResult, StoreError> {
        let at = check_range(at, limit, self.revision, self.compacted)?;
        if range.is_empty() {
            return Ok(RangeResult { kvs: Vec::new(), revision: at, more: false, count: None });
        }
        let current = self.kvs.range::<Bytes, _>((Bound::Included(&range.start), upper(range)));
        if at == self.revision {
            let mut kvs: Vec<KeyValue> =
                current.map(|(_, kv)| kv.clone()).take(limit.saturating_add(1)).collect();
            let more = kvs.len() > limit;
            kvs.truncate(limit);
            return Ok(RangeResult { kvs, revision: at, more, count: None });
        }
        // Undo, newest first, what came after `at`.
        let mut state: BTreeMap<&Bytes, &KeyValue> = current.collect();
        let newer = usize::try_from(self.revision - at).unwrap_or(usize::MAX);
        for change in self.log.iter().rev().take(newer).flat_map(|changes| changes.iter().rev()) {
            let key = change.event.key();
            if range.contains(key) {
                match &change.previous {
                    Some(previous) => state.insert(key, previous),
                    None => state.remove(key),
                };
            }
        }
        let more = state.len() > limit;
        let kvs = state.into_values().take(limit).cloned().collect();
        Ok(RangeResult { kvs, revision: at, more, count: None })
    }

    /// The changes of `range` from revision `from` on, looking at no more than `limit` revisions.
    ///
    /// # Errors
    /// [`StoreError::Compacted`] if `from` is older than the history.
    pub fn changes(&self, range: &KeyRange, from: Revision, limit: usize) -> Result<Changes, StoreError> {
        if from <= self.compacted {
            return Err(StoreError::Compacted { oldest: self.compacted + 1 });
        }
        // The log's first entry is the one after the later of the compaction and the empty store's revision.
        let first = self.revision + 1 - self.log.len() as Revision;
        let skip = usize::try_from(from.saturating_sub(first)).unwrap_or(usize::MAX);
        let mut through = from.max(first) - 1;
        let mut batches = Vec::new();
        for changes in self.log.iter().skip(skip).take(limit) {
            through += 1;
            let events: Vec<Event> = changes
                .iter()
                .map(|change| &change.event)
                .filter(|event| range.contains(event.key()))
                .cloned()
                .collect();
            if !events.is_empty() {
                batches.push(WatchBatch { revision: through, events });
            }
        }
        let through = through.min(self.revision);
        Ok(Changes { batches, through, more: through < self.revision })
    }

    /// Forgets history, as [`Store::compact`] does.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] if `up_to` is in the future.
    pub fn compact(&mut self, up_to: Revision) -> Result<(), StoreError> {
        check_compact(up_to, self.revision)?;
        self.compacted = self.compacted.max(up_to);
        let keep = usize::try_from(self.revision - self.compacted).unwrap_or(usize::MAX);
        let forget = self.log.len().saturating_sub(keep);
        self.log.drain(..forget);
        Ok(())
    }
}

fn upper(range: &KeyRange) -> Bound<&Bytes> {
    range.end.as_ref().map_or(Bound::Unbounded, Bound::Excluded)
}

/// Checks a read's revision and limit; returns the revision to read at.
pub(super) fn check_range(
    at: Option<Revision>,
    limit: usize,
    revision: Revision,
    compacted: Revision,
) -> Result<Revision, StoreError> {
    let at = at.unwrap_or(revision);
    if limit == 0 {
        return Err(StoreError::Invalid("a range was asked for with the limit 0".into()));
    }
    if at > revision {
        return Err(StoreError::Invalid(format!(
            "revision {at} is in the future: the store is at {revision}"
        )));
    }
    if at < compacted {
        return Err(StoreError::Compacted { oldest: compacted + 1 });
    }
    Ok(at)
}

/// Checks the revision of a compaction.
pub(super) fn check_compact(up_to: Revision, revision: Revision) -> Result<(), StoreError> {
    if up_to > revision {
        return Err(StoreError::Invalid(format!(
            "cannot compact up to revision {up_to}: the store is at {revision}"
        )));
    }
    Ok(())
}

/// A [`Model`] shared by its clones.
#[derive(Clone, Debug)]
pub struct MemoryStore(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    model: Mutex<Model>,
    revision: watch::Sender<Revision>,
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::from_model(Model::new())
    }
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// A store that goes on from `model`.
    pub fn from_model(model: Model) -> Self {
        let revision = watch::Sender::new(model.revision());
        Self(Arc::new(Shared { model: Mutex::new(model), revision }))
    }

    /// A copy of the present state and history.
    pub fn model(&self) -> Model {
        self.lock().clone()
    }

    /// [`Store::txn`], at once.
    ///
    /// # Errors
    /// As [`Model::txn`].
    pub fn apply_txn(&self, txn: &Txn) -> Result<TxnOutcome, StoreError> {
        let mut model = self.lock();
        let outcome = model.txn(txn)?;
        self.0
            .revision
            .send_if_modified(|revision| std::mem::replace(revision, model.revision()) != *revision);
        Ok(outcome)
    }

    /// [`Store::range`], at once.
    ///
    /// # Errors
    /// As [`Model::range`].
    pub fn range_sync(
        &self,
        range: &KeyRange,
        at: Option<Revision>,
        limit: usize,
    ) -> Result<RangeResult, StoreError> {
        self.lock().range(range, at, limit)
    }

    /// The changes of `range` from revision `from` on: what a watch would yield, at once.
    ///
    /// # Errors
    /// As [`Model::changes`].
    pub fn changes_sync(&self, range: &KeyRange, from: Revision) -> Result<Changes, StoreError> {
        self.lock().changes(range, from, usize::MAX)
    }

    /// [`Store::compact`], at once.
    ///
    /// # Errors
    /// As [`Model::compact`].
    pub fn compact_sync(&self, up_to: Revision) -> Result<(), StoreError> {
        self.lock().compact(up_to)
    }

    fn lock(&self) -> MutexGuard<'_, Model> {
        self.0.model.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where a watch stands.
struct Watch {
    store: MemoryStore,
    range: KeyRange,
    next: Revision,
    ready: VecDeque<WatchBatch>,
    revision: watch::Receiver<Revision>,
}

impl Watch {
    async fn next(&mut self) -> Result<WatchBatch, StoreError> {
        loop {
            if let Some(batch) = self.ready.pop_front() {
                return Ok(batch);
            }
            self.revision.borrow_and_update();
            let Changes { batches, through, .. } =
                self.store.lock().changes(&self.range, self.next, CHUNK)?;
            self.ready.extend(batches);
            if through >= self.next {
                self.next = through + 1;
                if self.ready.back().is_none_or(|last| last.revision < through) {
                    self.ready.push_back(WatchBatch { revision: through, events: Vec::new() });
                }
            } else {
                self.revision.changed().await.map_err(|_| StoreError::Closed)?;
            }
        }
    }
}

#[async_trait]
impl Store for MemoryStore {
    async fn range(
        &self,
        range: KeyRange,
        at: Option<Revision>,
        limit: usize,
    ) -> Result<RangeResult, StoreError> {
        self.range_sync(&range, at, limit)
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        self.apply_txn(&txn)
    }

    async fn watch(&self, range: KeyRange, from: Revision) -> Result<WatchStream, StoreError> {
        self.lock().changes(&range, from, 0)?;
        let revision = self.0.revision.subscribe();
        let watch = Watch { store: self.clone(), range, next: from, ready: VecDeque::new(), revision };
        Ok(Box::pin(stream::unfold(Some(watch), |watch| async {
            let mut watch = watch?;
            match watch.next().await {
                Ok(batch) => Some((Ok(batch), Some(watch))),
                Err(error) => Some((Err(error), None)),
            }
        })))
    }

    async fn compact(&self, up_to: Revision) -> Result<(), StoreError> {
        self.compact_sync(up_to)
    }

    async fn revision(&self) -> Result<Revision, StoreError> {
        Ok(self.lock().revision())
    }

    async fn announce(&self, key: Bytes) -> Result<Announcement, StoreError> {
        self.apply_txn(&Txn::new().put(key.clone(), ""))?;
        let store = self.clone();
        Ok(Announcement::new(move || {
            // Deleting one key breaks no rule of a transaction.
            let _ = store.apply_txn(&Txn::new().delete(key));
        }))
    }
}
