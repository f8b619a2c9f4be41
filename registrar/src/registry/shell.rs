//! The registry's shell: loads the index from the store, keeps it in step with a watch, and commits plans. The lock
//! around the index is held for single look-ups and plans only.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::Duration,
};

use muster_common::time::{Instant, Timestamp};
use tokio::{
    sync::{oneshot, watch},
    task::AbortHandle,
};

use super::{
    freshness::{Freshness, Turn},
    history::{History, TooOld},
    index::{Applied, BadValue, Index},
    keys,
    metrics::RegistryMetrics,
    plan::{self, AdminError, Held, Outcome},
    tasks,
};
use crate::store::{
    KeyRange, Op, Paging, Revision, Store, StoreError, Txn, TxnOutcome, WatchBatch, WatchStream,
};

/// How often a request is planned before it is given up.
const ATTEMPTS: u32 = 32;
/// How long a request waits for the index to show what was written.
const APPLY: Duration = Duration::from_secs(10);
/// How long one waits for the index to show what others have written.
const CATCH_UP: Duration = Duration::from_secs(1);
/// For so long one waits before one writes something oneself, to be told of that.
const SOON: Duration = Duration::from_millis(250);
/// Keys read at a time when the index is loaded, some 15 MB of them.
const PAGE: usize = 50_000;

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum CommitError<E> {
    /// It is refused.
    #[error("{0}")]
    Refused(E),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Other requests were always faster.
    #[error("too many others change the same things at the same time; try again")]
    Contended,
    /// The index does not show the store's present state.
    #[error("the registrar has not yet caught up with its store; try again")]
    Behind,
}

/// Called with every change, after the index shows it.
type Observer = Box<dyn Fn(&Applied) + Send + Sync>;

/// Uses by network and token.
type Uses = BTreeMap<(Arc<str>, Box<str>), u64>;

/// The registry of a deployment, shared by all that serve it.
pub struct Registry {
    store: Arc<dyn Store>,
    index: RwLock<Index>,
    history: Mutex<History>,
    progress: Mutex<Progress>,
    revision: watch::Sender<Revision>,
    observers: RwLock<Vec<Observer>>,
    freshness: Freshness,
    /// Held by whoever writes a pulse.
    pulse: tokio::sync::Mutex<()>,
    /// Uses of reusable tokens that are not written yet.
    uses: Mutex<Uses>,
    metrics: RegistryMetrics,
    tasks: Mutex<Vec<AbortHandle>>,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").field("revision", &*self.revision.borrow()).finish_non_exhaustive()
    }
}

/// Who waits for which revision.
#[derive(Debug)]
struct Progress {
    revision: Revision,
    waiting: BTreeMap<Revision, Vec<oneshot::Sender<()>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Registry {
    /// Loads the registry from `store`, and follows the store from there on until the last `Arc` is dropped.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub async fn load(store: Arc<dyn Store>) -> Result<Arc<Self>, StoreError> {
        let (index, bad) = load_index(&*store).await?;
        let revision = index.revision();
        let stream = store.watch(KeyRange::all(), revision + 1).await?;
        let registry = Arc::new(Self {
            store,
            history: Mutex::new(History::new(revision)),
            progress: Mutex::new(Progress { revision, waiting: BTreeMap::new() }),
            revision: watch::Sender::new(revision),
            index: RwLock::new(index),
            observers: RwLock::default(),
            freshness: Freshness::new(Instant::now()),
            pulse: tokio::sync::Mutex::default(),
            uses: Mutex::new(BTreeMap::new()),
            metrics: RegistryMetrics::default(),
            tasks: Mutex::new(Vec::new()),
        });
        registry.report(&bad);
        registry.update_gauges();
        let tasks = [
            tokio::spawn(tasks::follow(Arc::downgrade(&registry), stream)).abort_handle(),
            tokio::spawn(tasks::confirm(Arc::downgrade(&registry))).abort_handle(),
            tokio::spawn(tasks::count_uses(Arc::downgrade(&registry))).abort_handle(),
            tokio::spawn(tasks::sweep(Arc::downgrade(&registry))).abort_handle(),
        ];
        lock(&registry.tasks).extend(tasks);
        tracing::info!(revision, devices = registry.read().device_count(), "registry loaded");
        Ok(registry)
    }

    /// The index, to look something up. Not to be held for longer than that.
    pub fn read(&self) -> RwLockReadGuard<'_, Index> {
        self.index.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Index> {
        self.index.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The store.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// The registry's metrics, to be registered.
    pub fn metrics(&self) -> &RegistryMetrics {
        &self.metrics
    }

    /// Whether the store answers.
    pub fn freshness(&self) -> &Freshness {
        &self.freshness
    }

    pub(super) fn look_whether_stale(&self, now: Instant) {
        let age = self.freshness.age(now);
        self.metrics.store_age.set(age.as_secs().try_into().unwrap_or(i64::MAX));
        match self.freshness.look(now) {
            Turn::Same => {}
            Turn::Stale(age) => tracing::warn!(
                seconds = age.as_secs(),
                "the store does not answer: what was read from it is served on, marked as stale, and nothing can be written"
            ),
            Turn::Fresh => tracing::info!("the store answers again"),
        }
    }

    /// Follows the revision that the index shows.
    pub fn revisions(&self) -> watch::Receiver<Revision> {
        self.revision.subscribe()
    }

    /// The revision up to which everything has been told to all who follow the registry.
    pub fn published(&self) -> Revision {
        lock(&self.progress).revision
    }

    /// The latest changes after `revision`, at most `limit` revisions of them.
    ///
    /// # Errors
    /// [`TooOld`] if some of them have been forgotten.
    pub fn changes_after(&self, revision: Revision, limit: usize) -> Result<Vec<Arc<Applied>>, TooOld> {
        lock(&self.history).after(revision, limit)
    }

    /// Has `observer` called with every change from now on, before anybody is told that it was made. It must be quick.
    pub fn observe(&self, observer: impl Fn(&Applied) + Send + Sync + 'static) {
        self.observers.write().unwrap_or_else(PoisonError::into_inner).push(Box::new(observer));
    }

    /// Counts that a reusable token was used; written soon.
    pub fn count_use(&self, network: Arc<str>, token: Box<str>) {
        *lock(&self.uses).entry((network, token)).or_default() += 1;
    }

    /// Catches up with the store: what anybody was told before this call is shown by the index after it.
    ///
    /// # Errors
    /// If the store cannot be reached, or is not caught up with in time.
    pub async fn refresh(&self) -> Result<(), StoreError> {
        let revision = self.store.revision().await?;
        if self.applied(revision, SOON).await.is_ok() {
            return Ok(());
        }
        // On an etcd that others write to, too, the revision may be theirs, of which the index is told nothing before the
        // next one of ours. One writes for all who wait.
        let _one = self.pulse.lock().await;
        if self.published() >= revision {
            return Ok(());
        }
        let txn = Txn::new().put(keys::pulse(), "");
        let TxnOutcome::Committed(ours) = self.store.txn(txn).await? else { return Ok(()) };
        self.reached(ours).await.map_err(|Behind| {
            StoreError::Unavailable("the registrar has not yet caught up with it; try again".into())
        })
    }

    /// Writes what `plan` comes to, and waits until the index shows it. `plan` is called again, with a higher number
    /// of the attempt, each time that the store knows better, and once more before it may refuse or leave all as it
    /// is: what it has not seen may be what another registrar has just acknowledged.
    ///
    /// # Errors
    /// See [`CommitError`].
    pub async fn commit<R, E>(
        &self,
        mut plan: impl FnMut(&mut Index, u32) -> Result<Outcome<R>, E>,
    ) -> Result<R, CommitError<E>> {
        let mut fresh = false;
        for attempt in 0..ATTEMPTS {
            let outcome = plan(&mut self.write(), attempt);
            let plan = match outcome {
                Ok(Outcome::Write(plan)) => plan,
                Ok(Outcome::Done(reply)) if fresh => return Ok(reply),
                Err(refusal) if fresh => return Err(CommitError::Refused(refusal)),
                Ok(Outcome::Done(_)) | Err(_) => {
                    self.refresh().await?;
                    fresh = true;
                    continue;
                }
            };
            // Also when this future is dropped half-way.
            let mut held = Reserved { registry: self, held: plan.reservations };
            let witness = plan.txn.ops.first().cloned();
            let mut lost = None;
            match self.store.txn(plan.txn).await {
                Ok(TxnOutcome::Committed(revision)) => {
                    self.metrics.commits.inc();
                    self.applied(revision, APPLY).await.map_err(|Behind| CommitError::Behind)?;
                    // What was written has taken the reservations' place.
                    held.held.clear();
                    return Ok(plan.reply);
                }
                Ok(TxnOutcome::Conflict) => {}
                Err(StoreError::Unknown(reason)) => {
                    tracing::warn!(%reason, "reading again whether a transaction was committed");
                    match self.happened(witness.as_ref()).await {
                        Ok(true) => return Ok(plan.reply),
                        Ok(false) => lost = Some(reason),
                        Err(_) => return Err(StoreError::Unknown(reason).into()),
                    }
                }
                Err(error) => return Err(error.into()),
            }
            self.metrics.conflicts.inc();
            // What cannot be found out remains unknown: "unavailable" would say that nothing was done.
            let refreshed = self.refresh().await;
            refreshed.map_err(|error| lost.map_or(error, StoreError::Unknown))?;
        }
        Err(CommitError::Contended)
    }

    /// Whether `plan` has nothing to write at what is known: for what has to go on while the store does not answer.
    pub fn is_done<R, E>(&self, plan: impl FnOnce(&mut Index, u32) -> Result<Outcome<R>, E>) -> bool {
        self.try_out(plan).is_ok_and(|(_, is_done)| is_done)
    }

    /// What `plan` comes to at the store's present state, without writing it.
    ///
    /// # Errors
    /// See [`CommitError`].
    pub async fn validate<R, E>(
        &self,
        plan: impl FnOnce(&mut Index, u32) -> Result<Outcome<R>, E>,
    ) -> Result<R, CommitError<E>> {
        self.refresh().await?;
        self.try_out(plan).map(|(reply, _)| reply).map_err(CommitError::Refused)
    }

    /// What `plan` comes to at what is known, without writing it, and whether there is nothing to write.
    fn try_out<R, E>(
        &self,
        plan: impl FnOnce(&mut Index, u32) -> Result<Outcome<R>, E>,
    ) -> Result<(R, bool), E> {
        let mut index = self.write();
        Ok(match plan(&mut index, 0)? {
            Outcome::Done(reply) => (reply, true),
            Outcome::Write(plan) => {
                plan.reservations.iter().for_each(|held| index.cancel(held));
                (plan.reply, false)
            }
        })
    }

    /// Finishes the deletion of a namespace that has begun.
    ///
    /// # Errors
    /// See [`CommitError`].
    pub async fn empty_namespace(&self, network: &str, name: &str) -> Result<(), CommitError<AdminError>> {
        let now = Timestamp::now();
        while !self.commit(|index, _| plan::namespace::empty(index, network, name, now)).await? {}
        Ok(())
    }

    /// Whether the transaction that begins with `witness` is in the store. If it comes later, its conditions do not
    /// hold any more once the request, planned again, has been written.
    async fn happened(&self, witness: Option<&Op>) -> Result<bool, StoreError> {
        let Some(witness) = witness else { return Ok(true) };
        let page = self.store.range(KeyRange::key(witness.key().clone()), None, 1).await?;
        let found = page.kvs.first();
        let happened = match witness {
            Op::Put { value, .. } => found.is_some_and(|kv| kv.value == *value),
            Op::Delete { .. } => found.is_none(),
        };
        if happened {
            // A timeout does no harm: what was asked for is done.
            let _ = self.reached(found.map_or(page.revision, |kv| kv.mod_revision)).await;
        }
        Ok(happened)
    }

    /// Waits until the index shows `revision`.
    ///
    /// # Errors
    /// [`Behind`] if that takes longer than a second.
    pub async fn reached(&self, revision: Revision) -> Result<(), Behind> {
        self.applied(revision, CATCH_UP).await
    }

    async fn applied(&self, revision: Revision, within: Duration) -> Result<(), Behind> {
        let waiting = {
            let mut progress = lock(&self.progress);
            if progress.revision >= revision {
                return Ok(());
            }
            let (sender, receiver) = oneshot::channel();
            progress.waiting.entry(revision).or_default().push(sender);
            receiver
        };
        match tokio::time::timeout(within, waiting).await {
            Ok(Ok(())) => Ok(()),
            _ => Err(Behind),
        }
    }

    /// Applies batches, then tells all who wait for them.
    pub(super) fn apply(&self, batches: &[WatchBatch]) {
        let now = Timestamp::now();
        let applied: Vec<Arc<Applied>> = {
            let mut index = self.write();
            batches.iter().map(|batch| Arc::new(index.apply(batch, now))).collect()
        };
        self.publish(&applied);
    }

    fn publish(&self, applied: &[Arc<Applied>]) {
        {
            let mut history = lock(&self.history);
            applied.iter().for_each(|applied| history.push(applied.clone()));
        }
        for applied in applied {
            self.report(&applied.bad);
            if !applied.changes.is_empty() {
                let observers = self.observers.read().unwrap_or_else(PoisonError::into_inner);
                observers.iter().for_each(|observer| observer(applied));
            }
        }
        let Some(revision) = applied.last().map(|applied| applied.revision) else { return };
        let ready = {
            let mut progress = lock(&self.progress);
            progress.revision = progress.revision.max(revision);
            let next = progress.revision + 1;
            let later = progress.waiting.split_off(&next);
            std::mem::replace(&mut progress.waiting, later)
        };
        for waiting in ready.into_values().flatten() {
            // Whoever does not wait any more has been answered otherwise.
            let _ = waiting.send(());
        }
        self.revision.send_replace(revision);
        self.update_gauges();
    }

    fn report(&self, bad: &[BadValue]) {
        for value in bad {
            self.metrics.bad_values.inc();
            let key = String::from_utf8_lossy(&value.key);
            tracing::error!(%key, reason = value.reason, "a value in the store cannot be used and was skipped");
        }
    }

    fn update_gauges(&self) {
        let (devices, revision) = {
            let index = self.read();
            (index.device_count(), index.revision())
        };
        self.metrics.devices.set(devices.try_into().unwrap_or(i64::MAX));
        self.metrics.revision.set(revision.try_into().unwrap_or(i64::MAX));
    }

    /// Loads everything anew, and tells the difference.
    async fn resync(&self) -> Result<WatchStream, StoreError> {
        let (mut index, bad) = load_index(&*self.store).await?;
        let revision = index.revision();
        let stream = self.store.watch(KeyRange::all(), revision + 1).await?;
        let virtual_services = index.networks().map(|state| state.network.name.clone()).collect();
        let (changes, services, older) = {
            let mut current = self.write();
            let (changes, services) = (current.changes_to(&index), current.services_changed_to(&index));
            index.continue_from(&current);
            (changes, services, std::mem::replace(&mut *current, index))
        };
        // It takes a while to drop, and others wait for the lock.
        drop(older);
        tracing::warn!(revision, changes = changes.len(), "the registry was loaded anew");
        self.publish(&[Arc::new(Applied { revision, changes, services, virtual_services, bad })]);
        Ok(stream)
    }

    /// Follows the store again after the watch has failed.
    pub(super) async fn watch_again(&self, error: &StoreError) -> Result<WatchStream, StoreError> {
        let revision = self.read().revision();
        // A store that was put back to an earlier state would never tell of its changes otherwise.
        if matches!(error, StoreError::Compacted { .. }) || self.store.revision().await? < revision {
            return self.resync().await;
        }
        match self.store.watch(KeyRange::all(), revision + 1).await {
            Err(StoreError::Compacted { .. }) => self.resync().await,
            other => other,
        }
    }

    /// Writes the uses of tokens that have been counted.
    pub async fn flush_uses(&self) {
        let uses = std::mem::take(&mut *lock(&self.uses));
        for ((network, token), count) in uses {
            let written = self.commit(|index, _| plan::token::count(index, &network, &token, count)).await;
            match written {
                Ok(_) | Err(CommitError::Refused(AdminError::NotFound { .. })) => {}
                Err(error) => {
                    tracing::warn!(%network, %token, %error, "cannot count the uses of a token; trying again");
                    *lock(&self.uses).entry((network, token)).or_default() += count;
                }
            }
        }
    }

    /// Writes a transaction that makes room; others may have been faster.
    pub(super) async fn tidy(&self, txn: Txn) -> Result<(), StoreError> {
        match self.store.txn(txn).await? {
            TxnOutcome::Committed(revision) => drop(self.reached(revision).await),
            TxnOutcome::Conflict => drop(self.reached(self.store.revision().await?).await),
        }
        Ok(())
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        lock(&self.tasks).iter().for_each(AbortHandle::abort);
    }
}

/// The index does not show the revision yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Behind;

/// Reservations that are given up when this is dropped.
struct Reserved<'a> {
    registry: &'a Registry,
    held: Vec<Held>,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        if !self.held.is_empty() {
            let mut index = self.registry.write();
            self.held.iter().for_each(|held| index.cancel(held));
        }
    }
}

/// Reads all of the store at one revision, page by page.
async fn load_index(store: &dyn Store) -> Result<(Index, Vec<BadValue>), StoreError> {
    'again: loop {
        let (mut index, mut bad, now) = (Index::new(), Vec::new(), Timestamp::now());
        let mut at = None;
        for range in keys::loaded() {
            let mut paging = Paging::new(range, at);
            while let Some((rest, revision)) = paging.next() {
                let page = match store.range(rest, revision, PAGE).await {
                    Err(StoreError::Compacted { .. }) => continue 'again,
                    page => page?,
                };
                at = Some(page.revision);
                bad.extend(index.load(&page.kvs, now));
                paging.took(&page);
            }
        }
        index.loaded(at.unwrap_or_default());
        return Ok((index, bad));
    }
}
