use muster_common::tls::SpkiHash;
use muster_proto::storage::{StoredSuccession, SuccessionStep};

use super::{super::succession::RETENTION, *};
use crate::{
    ca::{
        Ca,
        rotation::{self, Phase},
    },
    store::memory::MemoryStore,
};

async fn hashes(store: &dyn Store) -> Vec<SpkiHash> {
    let (all, _) = store.range_all(KeyRange::prefix("roots/")).await.unwrap();
    let root = |value| StoredRoot::decode(value).unwrap().certificate;
    all.into_iter().map(|kv| SpkiHash::of(&root(kv.value).into()).unwrap()).collect()
}

#[tokio::test]
async fn a_rotation_reaches_the_store_the_roots_and_the_own_certificate() {
    let dir = tempfile::tempdir().unwrap();
    let (path, now) = (dir.path(), Timestamp::now());
    let old = Ca::create(path, "muster.test", now).unwrap().hash();
    let config = Config { data_dir: path.to_owned(), ..Config::default() };
    let store = MemoryStore::new();
    let mut trust = Trust::open(&config, Arc::new(store.clone()), "muster.test", now).await.unwrap();
    let roots = trust.ca().roots();
    assert_eq!(hashes(&store).await, [old]);

    let new = rotation::prepare(path, "muster.test", now).unwrap();
    trust.refresh(now).await.unwrap();
    assert_eq!(hashes(&store).await, [old, new]);
    assert_eq!(roots.borrow().len(), 2);
    assert_eq!(trust.own.chain.len(), 4 - 1);

    rotation::activate(path).unwrap();
    trust.refresh(now).await.unwrap();
    assert_eq!(trust.ca().current().hash(), new);
    // Itself, the new root signed by the old one, both roots.
    assert_eq!(trust.own.chain.len(), 4);

    // Another registrar, whose files nobody has touched yet, trusts both by the store.
    rotation::retire(path, Duration::ZERO, now, true).unwrap();
    trust.refresh(now).await.unwrap();
    assert_eq!(hashes(&store).await, [new]);
    assert_eq!(roots.borrow().len(), 1);
}

#[tokio::test]
async fn roots_of_another_registrar_are_trusted() {
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let now = Timestamp::now();
    let ours_ca = Ca::create(ours.path(), "muster.test", now).unwrap();
    for name in ["ca.key", "ca.crt"] {
        std::fs::copy(ours.path().join(name), theirs.path().join(name)).unwrap();
    }
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let config = |dir: &tempfile::TempDir| Config { data_dir: dir.path().into(), ..Config::default() };
    let mut ours_trust = Trust::open(&config(&ours), store.clone(), "muster.test", now).await.unwrap();
    let mut theirs_trust = Trust::open(&config(&theirs), store.clone(), "muster.test", now).await.unwrap();
    assert_ne!(ours_trust.own.identity().unwrap(), theirs_trust.own.identity().unwrap());
    rotation::prepare(ours.path(), "muster.test", now).unwrap();
    ours_trust.refresh(now).await.unwrap();
    theirs_trust.refresh(now).await.unwrap();
    let roots = theirs_trust.ca().roots().borrow().clone();
    assert_eq!(roots.len(), 2);
    assert_eq!(roots[0], ours_ca.roots()[0]);

    let error = Trust::open(&config(&ours), store, "other.test", now).await.err().unwrap().to_string();
    assert!(error.contains("other.test") && error.contains("different deployments"), "{error}");
}

/// Registrars with one store, each with its own directory.
struct Deployment {
    store: Arc<dyn Store>,
    directories: Vec<tempfile::TempDir>,
}

impl Deployment {
    fn of(registrars: usize, now: Timestamp) -> Self {
        let directories: Vec<_> = (0..registrars).map(|_| tempfile::tempdir().unwrap()).collect();
        Ca::create(directories[0].path(), "muster.test", now).unwrap();
        for other in &directories[1..] {
            for name in ["ca.key", "ca.crt"] {
                std::fs::copy(directories[0].path().join(name), other.path().join(name)).unwrap();
            }
        }
        Self { store: Arc::new(MemoryStore::new()), directories }
    }

    /// Two of them, which run.
    async fn pair(now: Timestamp) -> (Self, Trust, Trust) {
        let deployment = Self::of(2, now);
        let [first, second] = [0, 1].map(|registrar| deployment.start(registrar, now));
        let (first, second) = (first.await.unwrap(), second.await.unwrap());
        (deployment, first, second)
    }

    fn path(&self, registrar: usize) -> &std::path::Path {
        self.directories[registrar].path()
    }

    async fn start(&self, registrar: usize, now: Timestamp) -> Result<Trust, TrustError> {
        let config = Config { data_dir: self.path(registrar).into(), ..Config::default() };
        Trust::open(&config, self.store.clone(), "muster.test", now).await
    }

    fn phase(&self, registrar: usize) -> Phase {
        rotation::phase(self.path(registrar)).unwrap()
    }

    async fn succession(&self, old: SpkiHash) -> StoredSuccession {
        let kv = self.store.get(keys::succession(old.as_bytes())).await.unwrap().unwrap();
        StoredSuccession::decode(kv.value).unwrap()
    }
}

#[tokio::test]
async fn steps_taken_on_one_registrar_are_taken_by_all() {
    let now = Timestamp::now();
    let (deployment, mut first, mut second) = Deployment::pair(now).await;
    let old = first.ca().current().hash();

    let new = rotation::prepare(deployment.path(0), "muster.test", now).unwrap();
    first.refresh(now).await.unwrap();
    second.refresh(now).await.unwrap();
    assert_eq!(deployment.phase(1), Phase::Prepared { next: new });
    assert_eq!(second.ca().roots().borrow().len(), 2);

    // The next step may be taken on any of them.
    rotation::activate(deployment.path(1)).unwrap();
    second.refresh(now).await.unwrap();
    first.refresh(now).await.unwrap();
    for trust in [&first, &second] {
        assert_eq!(trust.ca().current().hash(), new);
        assert_eq!(trust.own.chain.len(), 4);
    }

    rotation::retire(deployment.path(0), Duration::ZERO, now, true).unwrap();
    // Whoever looks in between puts the old root back, and takes it away again.
    second.refresh(now).await.unwrap();
    first.refresh(now).await.unwrap();
    second.refresh(now).await.unwrap();
    for trust in [&mut first, &mut second] {
        trust.refresh(now).await.unwrap();
        assert_eq!(trust.ca().roots().borrow().len(), 1);
        assert_eq!(trust.ca().current().hash(), new);
    }
    assert_eq!(deployment.store.range_all(KeyRange::prefix("roots/")).await.unwrap().0.len(), 1);
    assert_eq!((deployment.phase(0), deployment.phase(1)), (Phase::Settled, Phase::Settled));

    // The store never had the key, and forgets it sealed as well; that the root was retired is known for good.
    let stored = deployment.succession(old).await;
    assert!(!stored.sealed_key.is_empty());
    first.refresh(now + RETENTION).await.unwrap();
    let stored = deployment.succession(old).await;
    assert!(stored.sealed_key.is_empty() && stored.step() == SuccessionStep::Retired);
    let left: Vec<_> = std::fs::read_dir(deployment.path(0).join("successions")).unwrap().collect();
    assert_eq!(left.len(), 1, "the lock: {left:?}");
}

#[tokio::test]
async fn a_registrar_that_was_away_follows_several_rotations_or_refuses() {
    let now = Timestamp::now();
    let deployment = Deployment::of(3, now);
    let mut first = deployment.start(0, now).await.unwrap();
    drop(deployment.start(1, now).await.unwrap());
    let old = first.ca().current().hash();
    for _ in 0..2 {
        rotation::prepare(deployment.path(0), "muster.test", now).unwrap();
        rotation::activate(deployment.path(0)).unwrap();
        rotation::retire(deployment.path(0), Duration::ZERO, now, true).unwrap();
        first.refresh(now).await.unwrap();
    }
    let back = deployment.start(1, now).await.unwrap();
    assert_eq!(back.ca().current().hash(), first.ca().current().hash());
    assert_eq!(back.ca().roots().borrow().len(), 1);

    first.refresh(now + RETENTION).await.unwrap();
    let error = deployment.start(2, now + RETENTION).await.err().unwrap();
    assert!(matches!(error, TrustError::Retired { root, .. } if root == old));
    let said = error.to_string();
    assert!(said.contains("muster-registrar invite") && said.contains("leave"), "{said}");
    // It has issued nothing, not even to itself, and put nothing back.
    assert!(!deployment.path(2).join(own_certificate::FILE).exists());
    assert_eq!(deployment.store.range_all(KeyRange::prefix("roots/")).await.unwrap().0.len(), 1);
}

#[tokio::test]
async fn of_two_rotations_begun_at_once_one_goes_on() {
    let now = Timestamp::now();
    let (deployment, mut first, mut second) = Deployment::pair(now).await;
    let won = rotation::prepare(deployment.path(0), "muster.test", now).unwrap();
    rotation::prepare(deployment.path(1), "muster.test", now).unwrap();
    first.refresh(now).await.unwrap();
    second.refresh(now).await.unwrap();
    assert_eq!(deployment.phase(1), Phase::Prepared { next: won });
    assert_eq!(second.ca().roots().borrow().len(), 2);
    assert_eq!(deployment.store.range_all(KeyRange::prefix("roots/")).await.unwrap().0.len(), 2);
}

#[tokio::test]
async fn of_two_rotations_that_went_on_at_once_one_stops_with_its_registrar() {
    let now = Timestamp::now();
    let (deployment, mut first, mut second) = Deployment::pair(now).await;
    let old = first.ca().current().hash();
    let won = rotation::prepare(deployment.path(0), "muster.test", now).unwrap();
    let lost = rotation::prepare(deployment.path(1), "muster.test", now).unwrap();
    rotation::activate(deployment.path(1)).unwrap();
    first.refresh(now).await.unwrap();
    // Also when the old root is retired, and when this one starts again.
    for step in [SuccessionStep::Prepared, SuccessionStep::Retired] {
        let error = second.refresh(now).await.unwrap_err();
        assert!(matches!(error, TrustError::Retired { root, .. } if root == lost), "{error}");
        let said = error.to_string();
        assert!(said.contains("leave") && said.contains("--force"), "{said}");
        assert_eq!(deployment.succession(old).await.step(), step);
        assert!(deployment.start(1, now).await.is_err());
        if step == SuccessionStep::Prepared {
            rotation::activate(deployment.path(0)).unwrap();
            rotation::retire(deployment.path(0), Duration::ZERO, now, true).unwrap();
            first.refresh(now).await.unwrap();
        }
    }
    first.refresh(now).await.unwrap();
    assert_eq!(first.ca().current().hash(), won);
    assert_eq!(hashes(&*deployment.store).await, [won]);
}

#[tokio::test]
async fn what_passes_ends_no_registrar() {
    let now = Timestamp::now();
    let (deployment, mut first, mut second) = Deployment::pair(now).await;
    rotation::prepare(deployment.path(0), "muster.test", now).unwrap();
    rotation::activate(deployment.path(0)).unwrap();
    rotation::retire(deployment.path(0), Duration::ZERO, now, true).unwrap();
    first.refresh(now).await.unwrap();
    let busy = muster_common::file::lock(&deployment.path(1).join("successions")).unwrap();
    let error = second.refresh(now).await.unwrap_err();
    assert!(matches!(error, TrustError::Ca(CaError::Busy { .. })), "{error}");
    drop(busy);
    second.refresh(now).await.unwrap();
    assert_eq!(second.ca().current().hash(), first.ca().current().hash());
}

#[tokio::test]
async fn a_damaged_record_keeps_no_registrar_from_starting_unless_it_is_of_a_retired_root() {
    let now = Timestamp::now();
    let deployment = Deployment::of(2, now);
    let old = deployment.start(0, now).await.unwrap().ca().current().hash();
    rotation::prepare(deployment.path(0), "muster.test", now).unwrap();
    drop(deployment.start(0, now).await.unwrap());
    let mut damaged = deployment.succession(old).await;
    *damaged.sealed_key.last_mut().unwrap() ^= 1;
    for step in [SuccessionStep::Prepared, SuccessionStep::Activated, SuccessionStep::Retired] {
        damaged.set_step(step);
        let txn = Txn::new().put(keys::succession(old.as_bytes()), damaged.encode_to_vec());
        deployment.store.txn(txn).await.unwrap();
        let started = deployment.start(1, now).await;
        if step == SuccessionStep::Retired {
            assert!(matches!(started.err(), Some(TrustError::Retired { .. })));
        } else {
            let mut trust = started.unwrap();
            assert_eq!(trust.ca().current().hash(), old);
            assert!(matches!(trust.refresh(now).await, Err(TrustError::Ca(CaError::Succession(_)))));
        }
    }
}
