//! Three members of etcd, some of which die, freeze or are cut off: how soon others take over, and that nothing is lost.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use muster_registrar::store::etcd::{EtcdConfig, EtcdStore};
use muster_registrar::store::{Event, KeyRange, LIFETIME, Store, StoreError, Txn, TxnOutcome, WatchStream};
use tokio::time::Instant;

use crate::member::EtcdProcess;
use crate::relay::Relay;
use crate::writers::Writers;

/// How long a cluster may take to be as it was, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a request may take, whatever happens: 5 s, and some for a busy machine.
const BOUND: Duration = Duration::from_secs(8);

/// All of its members.
pub(crate) struct Cluster(pub(crate) Vec<EtcdProcess>);

impl Cluster {
    pub(crate) async fn start() -> Option<Self> {
        Self::start_as(&[]).await
    }

    /// With more options.
    pub(crate) async fn start_as(options: &'static [&'static str]) -> Option<Self> {
        let cluster = Self(EtcdProcess::start_cluster(3, options)?);
        ready(&cluster.connect(0)).await;
        Some(cluster)
    }

    /// Uses the members from `first` on.
    fn connect(&self, first: usize) -> EtcdStore {
        EtcdStore::open(&self.config(first)).unwrap()
    }

    pub(crate) fn config(&self, first: usize) -> EtcdConfig {
        let endpoints = (0..self.0.len()).map(|n| self.0[(first + n) % self.0.len()].url()).collect();
        EtcdConfig { endpoints, ..self.0[0].config() }
    }

    async fn leader(&self) -> usize {
        let begin = Instant::now();
        loop {
            if let Some(leader) = self.0.iter().position(EtcdProcess::leads) {
                return leader;
            }
            assert!(begin.elapsed() < PATIENCE, "there is no leader");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// Waits until something can be written.
pub(crate) async fn ready(store: &EtcdStore) {
    let begin = Instant::now();
    while let Err(error) = store.txn(Txn::new().put("ready", "")).await {
        assert!(begin.elapsed() < PATIENCE, "{error}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Says how long something took, which must be less than `bound`.
fn took(what: &str, since: Instant, bound: Duration) {
    let took = since.elapsed();
    eprintln!("measured: {what}: {:.2} s", took.as_secs_f64());
    assert!(took < bound, "{what}: {took:?}");
}

/// Waits for a batch that has `key`.
async fn told(watch: &mut WatchStream, key: &str) {
    let batches = async {
        loop {
            let batch = watch.next().await.unwrap().unwrap();
            if batch.events.iter().any(|event| event.key() == key.as_bytes()) {
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, batches).await.unwrap_or_else(|_| panic!("{key} is not told"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_member_is_soon_left() {
    let Some(cluster) = Cluster::start().await else { return };
    for round in ["leader", "follower"] {
        let leader = cluster.leader().await;
        let used = if round == "leader" { leader } else { (leader + 1) % 3 };
        let store = cluster.connect(used);
        let mut watch = store.watch(KeyRange::all(), store.revision().await.unwrap() + 1).await.unwrap();
        // One without a watch, which notices by itself.
        let (reader, writer) = (cluster.connect(used), cluster.connect(used));
        reader.revision().await.unwrap();
        writer.revision().await.unwrap();
        let key = format!("told/{round}");
        // Longer than a member is taken to be there without asking.
        tokio::time::sleep(Duration::from_millis(2500)).await;
        cluster.0[used].freeze();
        let frozen = Instant::now();
        let read = async {
            reader.revision().await.unwrap();
            took(&format!("read, frozen {round}"), frozen, Duration::from_secs(5));
        };
        let written = async {
            let outcome = writer.txn(Txn::new().put(key.clone(), "")).await.unwrap();
            assert!(matches!(outcome, TxnOutcome::Committed(_)));
            took(&format!("write, frozen {round}"), frozen, BOUND);
        };
        let watched = async {
            told(&mut watch, &key).await;
            took(&format!("watch, frozen {round}"), frozen, Duration::from_secs(8));
        };
        tokio::join!(read, written, watched);
        cluster.0[used].thaw();
    }
}

/// A member that is cut off from the registrar alone, in the way of a network: nothing comes back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_cannot_be_reached_is_left_and_found_again() {
    let Some(cluster) = Cluster::start().await else { return };
    let relay = Relay::to(cluster.0[0].port()).await;
    let mut config = cluster.config(0);
    config.endpoints[0] = relay.url();
    let store = EtcdStore::open(&config).unwrap();
    let mut watch = store.watch(KeyRange::all(), store.revision().await.unwrap() + 1).await.unwrap();
    relay.cut();
    let cut = Instant::now();
    let direct = cluster.connect(1);
    direct.txn(Txn::new().put("a", "")).await.unwrap();
    let watched = async {
        told(&mut watch, "a").await;
        took("watch, member cut off", cut, Duration::from_secs(8));
    };
    let read = async {
        store.revision().await.unwrap();
        took("read, member cut off", cut, Duration::from_secs(5));
    };
    tokio::join!(watched, read);
    // The others die: what is left is behind the relay.
    relay.mend();
    ready(&EtcdStore::open(&EtcdConfig { endpoints: vec![relay.url()], ..cluster.config(0) }).unwrap()).await;
    cluster.0[1].freeze();
    tokio::time::sleep(Duration::from_secs(3)).await;
    ready(&store).await;
    cluster.connect(2).txn(Txn::new().put("b", "")).await.unwrap();
    told(&mut watch, "b").await;
}

/// What follows a write whose answer is lost in the freeze: it is unknown, in bounded time, and never made twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_that_a_member_may_have_is_not_made_again() {
    let Some(cluster) = Cluster::start().await else { return };
    let follower = (cluster.leader().await + 1) % 3;
    let store = cluster.connect(follower);
    store.txn(Txn::new().put("a", "1")).await.unwrap();
    cluster.0[follower].freeze();
    let begin = Instant::now();
    let error = store.txn(Txn::new().put("a", "2")).await.unwrap_err();
    took("write just after the freeze, unknown", begin, BOUND);
    assert!(matches!(error, StoreError::Unknown(_)), "{error:?}");
    assert!(error.to_string().contains(&cluster.0[follower].url()), "{error}");
    // The next ones go elsewhere.
    let begin = Instant::now();
    let now = store.get(Bytes::from_static(b"a")).await.unwrap().unwrap();
    assert_eq!(&now.value[..], b"1");
    store.txn(Txn::new().put("a", "3")).await.unwrap();
    assert!(begin.elapsed() < Duration::from_secs(4), "{:?}", begin.elapsed());
    cluster.0[follower].thaw();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_when_members_die_one_after_another() {
    let Some(mut cluster) = Cluster::start().await else { return };
    let store = Arc::new(cluster.connect(0));
    let watch = store.watch(KeyRange::prefix("w/"), 1).await.unwrap();
    let writers = Writers::start(&store);
    for member in 0..3 {
        writers.go_on().await;
        cluster.0[member].kill();
        writers.go_on().await;
        cluster.0[member].revive();
        ready(&cluster.0[member].connect()).await;
    }
    writers.finish(watch).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_when_leaders_freeze() {
    let Some(cluster) = Cluster::start().await else { return };
    let store = Arc::new(cluster.connect(0));
    let watch = store.watch(KeyRange::prefix("w/"), 1).await.unwrap();
    let writers = Writers::start(&store);
    for _ in 0..2 {
        writers.go_on().await;
        let leader = cluster.leader().await;
        cluster.0[leader].freeze();
        let frozen = Instant::now();
        writers.go_on().await;
        took("50 writes by 8 writers, leader frozen", frozen, PATIENCE);
        cluster.0[leader].thaw();
        ready(&cluster.0[leader].connect()).await;
    }
    writers.finish(watch).await;
}

/// A member that only its clients reach gives no stale answers, ends watches, and says clearly what is the matter.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_quorum_everything_fails_clearly_until_it_is_back() {
    let Some(cluster) = Cluster::start().await else { return };
    // The leader is the one that is left in the first round, and one of the others in the second.
    for round in ["leader", "follower"] {
        let leader = cluster.leader().await;
        let left = if round == "leader" { leader } else { (leader + 1) % 3 };
        let others = [(left + 1) % 3, (left + 2) % 3];
        let store = cluster.connect(left);
        let mut watch =
            store.watch(KeyRange::prefix("k/"), store.revision().await.unwrap() + 1).await.unwrap();
        others.iter().for_each(|other| cluster.0[*other].freeze());
        let begin = Instant::now();
        let first = store.txn(Txn::new().put("k/first", round)).await.unwrap_err();
        took(&format!("first write without a quorum ({round} left)"), begin, BOUND);
        assert!(matches!(first, StoreError::Unknown(_) | StoreError::Unavailable(_)), "{first:?}");
        let begin = Instant::now();
        let error = store.txn(Txn::new().put("k/second", round)).await.unwrap_err();
        took(&format!("write without a quorum ({round} left)"), begin, BOUND);
        assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("has no leader") && text.contains(&cluster.0[left].url()), "{text}");
        for _ in 0..2 {
            let begin = Instant::now();
            let error = store.get(Bytes::from_static(b"ready")).await.unwrap_err();
            took(&format!("read without a quorum ({round} left)"), begin, BOUND);
            assert!(error.to_string().contains("has no leader"), "{error}");
        }
        let begin = Instant::now();
        assert!(store.watch(KeyRange::all(), 1).await.is_err());
        assert!(begin.elapsed() < BOUND, "{:?}", begin.elapsed());
        others.iter().for_each(|other| cluster.0[*other].thaw());
        let begin = Instant::now();
        ready(&store).await;
        took("write after the thaw", begin, PATIENCE);
        let key = format!("k/last/{round}");
        store.txn(Txn::new().put(key.clone(), "")).await.unwrap();
        told(&mut watch, &key).await;
        // The second write was certainly not done.
        let second = store.get(Bytes::from_static(b"k/second")).await.unwrap();
        assert!(second.is_none(), "{second:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn announcements_outlive_leaders() {
    let Some(mut cluster) = Cluster::start().await else { return };
    let store = cluster.connect(0);
    let other = cluster.connect(1);
    let from = store.revision().await.unwrap() + 1;
    let announcement = store.announce(Bytes::from_static(b"r/a")).await.unwrap();
    let mut watch = other.watch(KeyRange::prefix("r/"), from).await.unwrap();
    for kill in [false, true] {
        let leader = cluster.leader().await;
        if kill {
            cluster.0[leader].kill();
        } else {
            cluster.0[leader].freeze();
        }
        tokio::time::sleep(LIFETIME * 2).await;
        if kill {
            cluster.0[leader].revive();
        } else {
            cluster.0[leader].thaw();
        }
        ready(&cluster.0[leader].connect()).await;
    }
    announcement.end().await;
    ready(&other).await;
    let mut events = Vec::new();
    while events.last() != Some(&false) {
        let batch = tokio::time::timeout(PATIENCE, watch.next()).await.expect("its end is not told");
        let told = batch.unwrap().unwrap().events;
        events.extend(told.iter().map(|event| matches!(event, Event::Put(_))));
    }
    assert_eq!(events, [true, false], "it was there all the time");
}
