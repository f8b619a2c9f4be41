//! What is particular to etcd, with a single member.

use std::fs::{self, Permissions};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use muster_registrar::store::etcd::{EtcdConfig, EtcdStore};
use muster_registrar::store::{Condition, Event, KeyRange, LIFETIME, Store, StoreError, Txn, TxnOutcome};
use tempfile::TempDir;
use tokio::time::Instant;

use crate::member::{EtcdProcess, certificates};
use crate::relay::Relay;
use crate::writers::Writers;

fn nobody_listens() -> String {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    format!("http://127.0.0.1:{port}")
}

#[tokio::test]
async fn an_unreachable_etcd_has_certainly_done_nothing() {
    let config = EtcdConfig { endpoints: vec![nobody_listens(), nobody_listens()], ..EtcdConfig::default() };
    let store = EtcdStore::open(&config).unwrap();
    let unavailable = |error: StoreError| {
        assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
        assert!(error.is_retryable());
    };
    unavailable(store.txn(Txn::new().put("a", "1")).await.unwrap_err());
    unavailable(store.revision().await.unwrap_err());
    unavailable(store.compact(1).await.unwrap_err());
    unavailable(store.watch(KeyRange::all(), 1).await.err().unwrap());
}

#[tokio::test]
async fn a_transaction_without_an_answer_is_unknown() {
    let Some(mut etcd) = EtcdProcess::start() else { return };
    let store = etcd.connect();
    store.txn(Txn::new().put("a", "1")).await.unwrap();
    etcd.freeze();
    let asked = tokio::spawn(async move { store.txn(Txn::new().put("a", "2")).await });
    // Let it be sent. Were it not sent yet, the answer would be another, and the test would fail.
    tokio::time::sleep(Duration::from_millis(300)).await;
    etcd.kill();
    let error = asked.await.unwrap().unwrap_err();
    assert!(matches!(error, StoreError::Unknown(_)), "{error:?}");
    assert!(!error.is_retryable());
}

/// Of thousands of writes that wait, few are under way when the network fails: of the others it is known that they were
/// not made.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn few_of_many_writes_are_in_doubt_at_once() {
    let Some(etcd) = EtcdProcess::start() else { return };
    let relay = Relay::to(etcd.port()).await;
    let config = EtcdConfig { endpoints: vec![relay.url()], ..etcd.config() };
    let store = Arc::new(EtcdStore::open(&config).unwrap());
    store.txn(Txn::new().put("before", "")).await.unwrap();
    relay.cut();
    let begin = Instant::now();
    let writes: Vec<_> = (0..3000)
        .map(|at| {
            let store = Arc::clone(&store);
            tokio::spawn(async move { store.txn(Txn::new().put(format!("w/{at}"), "")).await })
        })
        .collect();
    let (mut unknown, mut unavailable) = (0, 0);
    for write in writes {
        match write.await.unwrap() {
            Err(StoreError::Unknown(_)) => unknown += 1,
            Err(StoreError::Unavailable(_)) => unavailable += 1,
            other => panic!("{other:?}"),
        }
    }
    // A permit that one gives back another gets, as long as that one waits for it.
    assert!(
        (1..=1024).contains(&unknown) && unavailable >= 1900,
        "{unknown} unknown, {unavailable} unavailable"
    );
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
    relay.mend();
    let again = async { while store.txn(Txn::new().put("after", "")).await.is_err() {} };
    tokio::time::timeout(Duration::from_secs(30), again).await.expect("nothing can be written any more");
}

#[tokio::test]
async fn a_dead_member_is_passed_over() {
    let Some(etcd) = EtcdProcess::start() else { return };
    let mut config = etcd.config();
    config.endpoints.insert(0, nobody_listens());
    let store = EtcdStore::open(&config).unwrap();
    assert!(matches!(store.txn(Txn::new().put("a", "1")).await, Ok(TxnOutcome::Committed(_))));
    let store = EtcdStore::open(&config).unwrap();
    assert!(store.get(Bytes::from_static(b"a")).await.unwrap().is_some());
}

#[tokio::test]
async fn prefixes_do_not_see_each_other() {
    let Some(etcd) = EtcdProcess::start() else { return };
    let store = etcd.connect();
    let stores = ["test", "test/other/", "tesu"]
        .map(|prefix| EtcdStore::open(&EtcdConfig { prefix: prefix.into(), ..etcd.config() }).unwrap());
    let revision = store.revision().await.unwrap();
    let mut watch = store.watch(KeyRange::prefix("k"), revision + 1).await.unwrap();
    for other in &stores {
        other.txn(Txn::new().put("k", "theirs")).await.unwrap();
    }
    let ours = Txn::new().when(Condition::Absent("k".into())).put("k", "ours");
    assert!(matches!(store.txn(ours).await, Ok(TxnOutcome::Committed(_))));
    let (kvs, _) = store.range_all(KeyRange::prefix("k")).await.unwrap();
    assert_eq!(kvs.len(), 1);
    assert_eq!((&kvs[0].key[..], &kvs[0].value[..]), (&b"k"[..], &b"ours"[..]));
    assert_eq!(watch.next().await.unwrap().unwrap().events, [Event::Put(kvs[0].clone())]);
}

#[tokio::test]
async fn tls_works_and_checks_both_sides() {
    let Some(etcd) = EtcdProcess::start_with(|directory| Some(certificates(directory))) else { return };
    let store = etcd.connect();
    assert!(matches!(store.txn(Txn::new().put("a", "1")).await, Ok(TxnOutcome::Committed(_))));

    let elsewhere = TempDir::new().unwrap();
    let other = certificates(elsewhere.path());
    let untrusted = EtcdConfig { ca_file: Some(other.ca), ..etcd.config() };
    let error = EtcdStore::open(&untrusted).unwrap().revision().await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
    assert!(error.to_string().contains("certificate"), "{error}");

    let anonymous = EtcdConfig { cert_file: None, key_file: None, ..etcd.config() };
    assert!(EtcdStore::open(&anonymous).unwrap().revision().await.is_err());
}

#[tokio::test]
async fn unusable_settings_are_named() {
    let good = EtcdConfig::default;
    let directory = TempDir::new().unwrap();
    let file = |name: &str, text: &str, mode| {
        let path = directory.path().join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        path
    };
    let (open_to_all, empty) = (file("open", "secret", 0o640), file("empty", "\n", 0o600));
    let with_password = |path: PathBuf| {
        let (username, password_file) = (Some("a".into()), Some(path));
        EtcdConfig { username, password_file, ..good() }
    };
    let cases = [
        ("etcd.endpoints", EtcdConfig { endpoints: vec![], ..good() }),
        ("etcd.endpoints", EtcdConfig { endpoints: vec!["127.0.0.1:2379".into()], ..good() }),
        ("etcd.endpoints", EtcdConfig { endpoints: vec!["https://127.0.0.1:2379".into()], ..good() }),
        ("etcd.endpoints", EtcdConfig { endpoints: vec!["http://".into()], ..good() }),
        ("etcd.prefix", EtcdConfig { prefix: String::new(), ..good() }),
        ("/nonexistent", EtcdConfig { ca_file: Some("/nonexistent".into()), ..good() }),
        ("etcd.ca_file", EtcdConfig { cert_file: Some("/nonexistent".into()), ..good() }),
        ("etcd.password_file", EtcdConfig { username: Some("a".into()), ..good() }),
        ("etcd.username", EtcdConfig { password_file: Some("/nonexistent".into()), ..good() }),
        ("/nonexistent", with_password("/nonexistent".into())),
        ("chmod 600", with_password(open_to_all)),
        ("no password", with_password(empty)),
    ];
    for (named, config) in cases {
        let error = EtcdStore::open(&config).unwrap_err();
        assert!(error.to_string().contains(named), "{error}");
    }
}

/// etcd is killed and started again while writers write: a running watch tells everything that was acknowledged,
/// exactly once and in order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_has_no_gap_when_etcd_is_killed() {
    let Some(mut etcd) = EtcdProcess::start() else { return };
    let store = Arc::new(etcd.connect());
    let watch = store.watch(KeyRange::prefix("w/"), 1).await.unwrap();
    let writers = Writers::start(&store);
    for _ in 0..2 {
        tokio::time::sleep(Duration::from_millis(300)).await;
        etcd.restart();
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    writers.finish(watch).await;
}

/// Waits until a key is there, or is not.
async fn until(store: &EtcdStore, key: &'static str, there: bool) {
    for _ in 0..300 {
        let found = store.get(Bytes::from_static(key.as_bytes())).await;
        if found.is_ok_and(|found| found.is_some() == there) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("{key} is there: {}", !there);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_dead_process_has_announced_goes() {
    let Some(etcd) = EtcdProcess::start() else { return };
    let config = etcd.config();
    // A runtime is what such a process is: with it, everything ends that keeps the announcement alive.
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let store = EtcdStore::open(&config).unwrap();
            std::mem::forget(store.announce(Bytes::from_static(b"r/a")).await.unwrap());
        });
        runtime.shutdown_background();
    })
    .join()
    .unwrap();
    let store = etcd.connect();
    assert!(store.get(Bytes::from_static(b"r/a")).await.unwrap().is_some(), "it has a while to live");
    until(&store, "r/a", false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_cut_off_is_announced_again() {
    let Some(etcd) = EtcdProcess::start() else { return };
    let store = etcd.connect();
    let revision = store.revision().await.unwrap();
    let announcement = store.announce(Bytes::from_static(b"r/a")).await.unwrap();
    let mut watch = etcd.connect().watch(KeyRange::prefix("r/"), revision + 1).await.unwrap();
    etcd.freeze();
    tokio::time::sleep(LIFETIME + Duration::from_secs(3)).await;
    etcd.thaw();
    let mut told = Vec::new();
    while told.len() < 3 {
        let batch = tokio::time::timeout(Duration::from_secs(30), watch.next()).await;
        let events = batch.expect("it is not announced again").unwrap().unwrap().events;
        told.extend(events.iter().map(|event| matches!(event, Event::Put(_))));
    }
    assert_eq!(told, [true, false, true]);
    announcement.end().await;
    until(&store, "r/a", false).await;
}
