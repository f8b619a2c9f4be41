//! The shell: loading, following, committing, and what happens when the store forgets or times out.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU32, Ordering},
};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt as _;

use super::*;
use crate::{
    registry::{CommitError, Registry},
    store::{Announcement, RangeResult, Revision, Store, StoreError, Txn, WatchStream},
};

/// A store that loses the answers to some transactions.
struct Lossy {
    inner: MemoryStore,
    /// Answers to lose after they were committed, and before.
    lose: AtomicU32,
    refuse: AtomicU32,
    /// Ends the watches that are open.
    cut: tokio_util::sync::CancellationToken,
    /// Whether no new watch can be opened.
    away: AtomicBool,
}

impl Lossy {
    fn new(inner: MemoryStore) -> Arc<Self> {
        Arc::new(Self {
            inner,
            lose: 0.into(),
            refuse: 0.into(),
            cut: Default::default(),
            away: false.into(),
        })
    }
}

fn count_down(counter: &AtomicU32) -> bool {
    counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok()
}

#[async_trait]
impl Store for Lossy {
    async fn range(
        &self,
        range: KeyRange,
        at: Option<Revision>,
        n: usize,
    ) -> Result<RangeResult, StoreError> {
        self.inner.range(range, at, n).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        if count_down(&self.refuse) {
            return Err(StoreError::Unknown("lost before".into()));
        }
        let outcome = self.inner.txn(txn).await;
        if count_down(&self.lose) { Err(StoreError::Unknown("lost after".into())) } else { outcome }
    }

    async fn watch(&self, range: KeyRange, from: Revision) -> Result<WatchStream, StoreError> {
        if self.away.load(Ordering::Relaxed) {
            return Err(StoreError::Unavailable("away".into()));
        }
        let stream = self.inner.watch(range, from).await?;
        if self.cut.is_cancelled() {
            return Ok(stream);
        }
        Ok(Box::pin(stream.take_until(self.cut.clone().cancelled_owned())))
    }

    async fn compact(&self, up_to: Revision) -> Result<(), StoreError> {
        self.inner.compact(up_to).await
    }

    async fn revision(&self) -> Result<Revision, StoreError> {
        self.inner.revision().await
    }

    async fn announce(&self, key: Bytes) -> Result<Announcement, StoreError> {
        self.inner.announce(key).await
    }
}

async fn create(registry: &Registry, name: &str) -> Result<Uuid, CommitError<AdminError>> {
    let uid = uuid::Builder::from_random_bytes(rand::random()).into_uuid();
    let wanted = device(name, "");
    let now = Timestamp::from_epoch(Duration::from_secs(1_800_000_000));
    registry.commit(|index, _| plan::device::create(index, &wanted, uid, now)).await
}

#[tokio::test]
async fn what_is_committed_is_read_at_once_by_all() {
    let world = World::with_network(1, "10.0.0.0/24");
    let store: Arc<dyn Store> = Arc::new(world.store.clone());
    let (one, two) = (Registry::load(store.clone()).await.unwrap(), Registry::load(store).await.unwrap());
    let mut uids = Vec::new();
    for n in 0..50 {
        let registry = if n % 2 == 0 { &one } else { &two };
        let uid = create(registry, &format!("d{n}")).await.unwrap();
        assert!(registry.read().device("n", uid).is_some());
        assert!(matches!(
            create(registry, &format!("d{n}")).await,
            Err(CommitError::Refused(AdminError::Exists { .. }))
        ));
        uids.push(uid);
    }
    let revision = one.store().revision().await.unwrap();
    two.reached(revision).await.unwrap();
    assert!(uids.iter().all(|uid| two.read().device("n", *uid).is_some()));
}

#[tokio::test]
async fn an_unknown_outcome_is_looked_up() {
    let world = World::with_network(1, "10.0.0.0/24");
    let store = Lossy::new(world.store.clone());
    let registry = Registry::load(store.clone()).await.unwrap();
    store.lose.store(1, Ordering::Relaxed);
    let uid = create(&registry, "a").await.unwrap();
    assert!(registry.read().device("n", uid).is_some());
    store.refuse.store(2, Ordering::Relaxed);
    let uid = create(&registry, "b").await.unwrap();
    assert!(registry.read().device("n", uid).is_some());
    // A deletion whose answer is lost is a deletion.
    store.lose.store(1, Ordering::Relaxed);
    let now = world.now;
    registry.commit(|index, _| plan::device::delete(index, "n", "a", 0, now)).await.unwrap();
    assert_eq!(registry.read().device_count(), 1);
}

#[tokio::test]
async fn concurrent_creations_of_one_name_have_one_winner() {
    let world = World::with_network(1, "10.0.0.0/24");
    let store: Arc<dyn Store> = Arc::new(world.store.clone());
    let registries = [Registry::load(store.clone()).await.unwrap(), Registry::load(store).await.unwrap()];
    let tasks: Vec<_> = (0..20)
        .map(|n| {
            let registry = registries[n % 2].clone();
            tokio::spawn(async move { create(&registry, "same").await.is_ok() })
        })
        .collect();
    let mut winners = 0;
    for task in tasks {
        winners += u32::from(task.await.unwrap());
    }
    assert_eq!(winners, 1);
}

/// Cuts the watch, changes things meanwhile, and returns what the registry has told of it in the end.
async fn told_after_a_break(compact: bool) -> Vec<(String, bool, bool)> {
    let mut world = World::with_network(1, "10.0.0.0/24");
    for name in ["kept", "gone", "same"] {
        world.create_device(name, "").unwrap();
    }
    let store = Lossy::new(world.store.clone());
    let registry = Registry::load(store.clone()).await.unwrap();
    let before = registry.read().revision();
    store.away.store(true, Ordering::Relaxed);
    store.cut.cancel();
    while registry.metrics().watch_failures.get() == 0 {
        tokio::task::yield_now().await;
    }
    world.delete_device(0, "gone").unwrap();
    world.revoke(0, "kept", true).unwrap();
    world.create_device("new", "").unwrap();
    let revision = world.store.model().revision();
    if compact {
        world.store.compact_sync(revision).unwrap();
    }
    store.away.store(false, Ordering::Relaxed);
    let mut revisions = registry.revisions();
    revisions.wait_for(|shown| *shown >= revision).await.unwrap();
    let mut told = Vec::new();
    for applied in registry.changes_after(before, 100).unwrap() {
        for change in &applied.changes {
            let crate::registry::Change::Device { old, new } = change else { panic!("{change:?}") };
            let name = old.as_ref().or(new.as_ref()).unwrap().name.to_string();
            told.push((name, old.is_some(), new.is_some()));
        }
    }
    told.sort_unstable();
    // It goes on from there.
    create(&registry, "later").await.unwrap();
    assert_eq!(registry.read().device_count(), 4);
    told
}

#[tokio::test]
async fn a_registry_that_was_away_misses_nothing() {
    let expected = [("gone", true, false), ("kept", true, true), ("new", false, true)]
        .map(|(name, old, new)| (name.to_owned(), old, new));
    assert_eq!(told_after_a_break(false).await, expected);
    assert_eq!(told_after_a_break(true).await, expected, "over a compaction");
}

#[tokio::test]
async fn uses_of_tokens_are_counted_together() {
    let mut world = World::with_network(1, "10.0.0.0/24");
    world.reusable_token();
    let registry = Registry::load(Arc::new(world.store.clone())).await.unwrap();
    let before = world.store.model().revision();
    (0..100).for_each(|_| registry.count_use("n".into(), "reusable".into()));
    registry.count_use("n".into(), "deleted".into());
    registry.flush_uses().await;
    let index = registry.read();
    assert_eq!(index.network("n").unwrap().tokens["reusable"].uses(), 100);
    assert_eq!(index.revision(), before + 1);
}
