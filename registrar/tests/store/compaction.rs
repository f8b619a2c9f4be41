//! History that etcd forgets while a registrar is cut off from it: that shows, and the registry tells the difference.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::StreamExt;
use muster_common::time::Timestamp;
use muster_proto::admin;
use muster_registrar::registry::{Change, Registry, plan};
use muster_registrar::store::etcd::{EtcdConfig, EtcdStore};
use muster_registrar::store::{
    KeyRange, Revision, Store, StoreError, Txn, TxnOutcome, WatchBatch, WatchStream,
};

use crate::member::EtcdProcess;
use crate::relay::Relay;

/// Longer than a watch takes to notice that it is cut off.
const LOST: Duration = Duration::from_secs(7);
const PATIENCE: Duration = Duration::from_secs(60);

/// A relay in front of etcd, and a store behind it.
async fn far(etcd: &EtcdProcess) -> (Relay, EtcdStore) {
    let relay = Relay::to(etcd.port()).await;
    let config = EtcdConfig { endpoints: vec![relay.url()], ..etcd.config() };
    (relay, EtcdStore::open(&config).unwrap())
}

async fn put(store: &EtcdStore, key: &'static str) -> Revision {
    match store.txn(Txn::new().put(key, "")).await.unwrap() {
        TxnOutcome::Committed(revision) => revision,
        TxnOutcome::Conflict => panic!("unexpected conflict"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_says_that_history_is_missing_exactly_if_it_is() {
    let Some(etcd) = EtcdProcess::start() else { return };
    let near = etcd.connect();
    let (relay, store) = far(&etcd).await;
    let mut watch = store.watch(KeyRange::all(), near.revision().await.unwrap() + 1).await.unwrap();
    let first = put(&near, "a").await;
    assert_eq!(watch.next().await.unwrap().unwrap().revision, first);

    // What it was told is forgotten.
    relay.cut();
    let next = tokio::spawn(next(watch));
    tokio::time::sleep(LOST).await;
    let second = put(&near, "b").await;
    near.compact(first).await.unwrap();
    relay.mend();
    let (told, watch) = next.await.unwrap();
    assert_eq!(told.unwrap().unwrap().revision, second);

    // What it was not told is forgotten.
    relay.cut();
    let next = tokio::spawn(self::next(watch));
    tokio::time::sleep(LOST).await;
    put(&near, "c").await;
    let last = put(&near, "d").await;
    near.compact(last).await.unwrap();
    relay.mend();
    let (told, mut watch) = next.await.unwrap();
    assert!(matches!(told, Some(Err(StoreError::Compacted { oldest })) if oldest == last + 1), "{told:?}");
    assert!(watch.next().await.is_none());
}

/// Follows a watch until it tells something.
async fn next(mut watch: WatchStream) -> (Option<Result<WatchBatch, StoreError>>, WatchStream) {
    let next = tokio::time::timeout(PATIENCE, watch.next()).await.expect("the watch hangs");
    (next, watch)
}

fn uid() -> uuid::Uuid {
    uuid::Builder::from_random_bytes(rand::random()).into_uuid()
}

fn device(name: &str) -> admin::Device {
    let metadata = admin::ObjectMeta { network: "n".into(), name: name.into(), ..Default::default() };
    admin::Device { metadata: Some(metadata), spec: Some(admin::DeviceSpec::default()), status: None }
}

async fn create(registry: &Registry, name: &str) {
    let (wanted, uid, now) = (device(name), uid(), Timestamp::now());
    registry.commit(|index, _| plan::device::create(index, &wanted, uid, now)).await.unwrap();
}

/// Names of the devices that a change is about: `+` those that come, `-` those that go, `=` those that change.
fn names(change: &Change) -> Option<String> {
    let Change::Device { old, new } = change else { return None };
    let sign = match (old, new) {
        (None, _) => '+',
        (_, None) => '-',
        _ => '=',
    };
    new.as_ref().or(old.as_ref()).map(|device| format!("{sign}{}", device.name))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_tells_what_changed_while_history_was_forgotten() {
    let Some(etcd) = EtcdProcess::start() else { return };
    let near = Registry::load(Arc::new(etcd.connect())).await.unwrap();
    let metadata = admin::ObjectMeta { name: "n".into(), ..Default::default() };
    let spec = admin::NetworkSpec { domain: "n.example".into(), ..Default::default() };
    let network = admin::Network { metadata: Some(metadata), spec: Some(spec), status: None };
    let (uid, now) = (uid(), Timestamp::now());
    near.commit(|index, _| plan::network::create(index, &network, uid, [1, 2, 3, 4, 5], now)).await.unwrap();
    for name in ["stays", "goes", "changes"] {
        create(&near, name).await;
    }

    let (relay, store) = far(&etcd).await;
    let far = Registry::load(Arc::new(store)).await.unwrap();
    assert_eq!(far.read().device_count(), 3);
    let told = Arc::new(Mutex::new(Vec::new()));
    let telling = Arc::clone(&told);
    far.observe(move |applied| telling.lock().unwrap().extend(applied.changes.iter().filter_map(names)));

    relay.cut();
    tokio::time::sleep(LOST).await;
    create(&near, "comes").await;
    near.commit(|index, _| plan::device::delete(index, "n", "goes", 0, now)).await.unwrap();
    let mut changed = device("changes");
    changed.spec.as_mut().unwrap().revoked = true;
    let mask = pbjson_types::FieldMask { paths: vec!["spec.revoked".into()] };
    near.commit(|index, _| plan::device::update(index, &changed, Some(&mask))).await.unwrap();
    let last = near.store().revision().await.unwrap();
    near.store().compact(last).await.unwrap();
    relay.mend();
    let mut revisions = far.revisions();
    let caught_up = revisions.wait_for(|revision| *revision >= last);
    tokio::time::timeout(PATIENCE, caught_up).await.expect("it does not catch up").unwrap();
    let all: BTreeSet<_> = std::mem::take(&mut *told.lock().unwrap()).into_iter().collect();
    assert_eq!(all, ["+comes", "-goes", "=changes"].map(String::from).into());
    assert_eq!(far.read().device_count(), 3);

    // And it goes on from there, in both directions.
    create(&far, "later").await;
    create(&near, "last").await;
    let last = near.store().revision().await.unwrap();
    far.reached(last).await.unwrap();
    assert_eq!(*told.lock().unwrap(), ["+later", "+last"]);
}
