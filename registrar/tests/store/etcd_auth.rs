//! etcd with authentication enabled: users, passwords, tokens that are forgotten, and rights that are missing.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use muster_registrar::store::etcd::{EtcdConfig, EtcdStore};
use muster_registrar::store::{
    Condition, Event, KeyRange, LIFETIME, Store, StoreError, Txn, TxnOutcome, WatchStream,
};
use tempfile::TempDir;

use crate::cluster::{Cluster, ready};
use crate::member::{EtcdProcess, certificates};
use crate::writers::Writers;

/// What makes a member forget its tokens when it is restarted: it has them anew from its log otherwise.
const FORGETFUL: &[&str] = &["--snapshot-count", "5"];
const PATIENCE: Duration = Duration::from_secs(60);
const AUTHENTICATIONS: &str = "grpc_server_started_total{grpc_method=\"Authenticate\",\
                               grpc_service=\"etcdserverpb.Auth\",grpc_type=\"unary\"}";

/// Makes users with the password `secret`: `registrar` may do everything under `test/`, `reader` may read there, and
/// `nobody` may do nothing.
fn enable(etcd: &EtcdProcess) {
    let user = |name: &str, role: &str| {
        etcd.api("auth/user/add", &format!(r#"{{"name":"{name}","password":"secret"}}"#));
        etcd.api("auth/role/add", &format!(r#"{{"name":"{role}"}}"#));
        etcd.api("auth/user/grant", &format!(r#"{{"user":"{name}","role":"{role}"}}"#));
    };
    user("root", "root");
    user("nobody", "none");
    for (name, permission) in [("registrar", "READWRITE"), ("reader", "READ")] {
        user(name, name);
        // From "test/" to "test0".
        let range = r#""key":"dGVzdC8=","range_end":"dGVzdDA=""#;
        let perm = format!(r#"{{"permType":"{permission}",{range}}}"#);
        etcd.api("auth/role/grant", &format!(r#"{{"name":"{name}","perm":{perm}}}"#));
    }
    etcd.api("auth/enable", "{}");
}

fn password_file(directory: &Path, password: &str) -> PathBuf {
    let path = directory.join("password");
    fs::write(&path, format!("{password}\n")).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    path
}

fn as_user(config: EtcdConfig, name: &str, directory: &TempDir) -> EtcdConfig {
    let password_file = Some(password_file(directory.path(), "secret"));
    EtcdConfig { username: Some(name.into()), password_file, ..config }
}

fn open(config: &EtcdConfig) -> EtcdStore {
    EtcdStore::open(config).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_is_known_again_after_etcd_has_forgotten_its_tokens() {
    let Some(mut etcd) = EtcdProcess::start_as(FORGETFUL) else { return };
    enable(&etcd);
    let directory = TempDir::new().unwrap();
    etcd.restart_with(certificates(directory.path()));
    let store = open(&as_user(etcd.config(), "registrar", &directory));
    ready(&store).await;
    let from = store.revision().await.unwrap() + 1;
    let watch = tokio::spawn(told(store.watch(KeyRange::all(), from).await.unwrap(), "-r/a"));
    let announcement = store.announce(Bytes::from_static(b"r/a")).await.unwrap();
    for key in ["a", "b"] {
        forget(&mut etcd, &store).await;
        let write = Txn::new().when(Condition::Absent(key.into())).put(key, "");
        assert!(matches!(store.txn(write).await, Ok(TxnOutcome::Committed(_))));
    }
    tokio::time::sleep(LIFETIME * 2).await;
    assert!(store.get(Bytes::from_static(b"r/a")).await.unwrap().is_some());
    announcement.end().await;
    let mut told = watch.await.unwrap();
    told.retain(|event| event != "+ready");
    assert_eq!(told, ["+r/a", "+a", "+b", "-r/a"]);
}

/// Restarts it after so many writes that tokens of before are forgotten.
async fn forget(etcd: &mut EtcdProcess, store: &EtcdStore) {
    for _ in 0..10 {
        ready(store).await;
    }
    etcd.restart();
    ready(store).await;
}

/// All that is told up to `last`.
async fn told(mut watch: WatchStream, last: &str) -> Vec<String> {
    let mut told = Vec::<String>::new();
    while told.last().is_none_or(|told| told != last) {
        let batch = tokio::time::timeout(PATIENCE, watch.next()).await.expect("the watch hangs");
        for event in batch.unwrap().unwrap().events {
            let sign = if matches!(event, Event::Put(_)) { '+' } else { '-' };
            told.push(format!("{sign}{}", String::from_utf8(event.key().to_vec()).unwrap()));
        }
    }
    told
}

/// A token that has not been used for a second has expired.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_that_has_expired_is_replaced() {
    let Some(etcd) = EtcdProcess::start_as(&["--auth-token-ttl", "1"]) else { return };
    enable(&etcd);
    let directory = TempDir::new().unwrap();
    let store = open(&as_user(etcd.config(), "registrar", &directory));
    let watch = tokio::spawn(told(store.watch(KeyRange::all(), 1).await.unwrap(), "+c"));
    for (key, times) in [("a", 2.0), ("b", 3.0), ("c", 4.0)] {
        tokio::time::sleep(Duration::from_secs(4)).await;
        let write = Txn::new().when(Condition::Absent(key.into())).put(key, "");
        assert!(matches!(store.txn(write).await, Ok(TxnOutcome::Committed(_))));
        assert_eq!(etcd.metric(AUTHENTICATIONS), times);
    }
    assert_eq!(watch.await.unwrap(), ["+a", "+b", "+c"]);
    // Whatever comes first.
    tokio::time::sleep(Duration::from_secs(4)).await;
    drop(store.watch(KeyRange::all(), 1).await.unwrap());
    tokio::time::sleep(Duration::from_secs(4)).await;
    store.announce(Bytes::from_static(b"r/a")).await.unwrap().end().await;
    assert_eq!(etcd.metric(AUTHENTICATIONS), 6.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_who_need_a_token_ask_for_it_once() {
    let Some(mut etcd) = EtcdProcess::start_as(FORGETFUL) else { return };
    enable(&etcd);
    let directory = TempDir::new().unwrap();
    let store = Arc::new(open(&as_user(etcd.config(), "registrar", &directory)));
    for _ in 0..10 {
        ready(&store).await;
    }
    assert_eq!(etcd.metric(AUTHENTICATIONS), 1.0);
    etcd.restart();
    let writers: Vec<_> = (0..64)
        .map(|n| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                loop {
                    let key = format!("k{n}");
                    let once = Txn::new().when(Condition::Absent(key.clone().into())).put(key, "");
                    match store.txn(once).await {
                        Ok(outcome) => return outcome,
                        Err(StoreError::Unavailable(_)) => {}
                        Err(other) => panic!("{other:?}"),
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            })
        })
        .collect();
    for writer in writers {
        assert!(matches!(writer.await.unwrap(), TxnOutcome::Committed(_)));
    }
    assert_eq!(etcd.metric(AUTHENTICATIONS), 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_password_is_not_tried_again_and_again() {
    let Some(etcd) = EtcdProcess::start() else { return };
    enable(&etcd);
    let directory = TempDir::new().unwrap();
    let config = as_user(etcd.config(), "registrar", &directory);
    password_file(directory.path(), "not-secret");
    let store = open(&config);
    for _ in 0..20 {
        let error = store.txn(Txn::new().put("a", "1")).await.unwrap_err();
        assert!(matches!(error, StoreError::Config { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("\"registrar\"") && text.contains("etcd.password_file"), "{text}");
        assert!(text.contains(config.password_file.as_ref().unwrap().to_str().unwrap()), "{text}");
        assert!(!text.contains("not-secret"), "{text}");
    }
    assert!(store.watch(KeyRange::all(), 1).await.is_err());
    assert!(store.announce(Bytes::from_static(b"r/a")).await.is_err());
    // More than one only if this took longer than a pause.
    assert!(etcd.metric(AUTHENTICATIONS) <= 3.0);
    // The right one is found without a restart.
    password_file(directory.path(), "secret");
    ready(&store).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn missing_rights_are_named() {
    let Some(etcd) = EtcdProcess::start() else { return };
    enable(&etcd);
    let directory = TempDir::new().unwrap();
    let denied = |error: StoreError, name: &str, prefix: &str| {
        assert!(matches!(error, StoreError::Config { setting: "etcd.username", .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains(&format!("{name:?}")) && text.contains(&format!("{prefix:?}")), "{text}");
        assert!(text.contains("readwrite"), "{text}");
    };
    let write = || Txn::new().put("a", "1");
    let reader = open(&as_user(etcd.config(), "reader", &directory));
    reader.revision().await.unwrap();
    drop(reader.watch(KeyRange::all(), 1).await.unwrap());
    denied(reader.txn(write()).await.unwrap_err(), "reader", "test/");
    denied(reader.announce(Bytes::from_static(b"r/a")).await.unwrap_err(), "reader", "test/");

    let nobody = open(&as_user(etcd.config(), "nobody", &directory));
    denied(nobody.revision().await.unwrap_err(), "nobody", "test/");
    denied(nobody.txn(write()).await.unwrap_err(), "nobody", "test/");
    denied(nobody.watch(KeyRange::all(), 1).await.err().unwrap(), "nobody", "test/");

    let elsewhere = EtcdConfig { prefix: "other/".into(), ..etcd.config() };
    let elsewhere = open(&as_user(elsewhere, "registrar", &directory));
    denied(elsewhere.txn(write()).await.unwrap_err(), "registrar", "other/");
    denied(elsewhere.watch(KeyRange::all(), 1).await.err().unwrap(), "registrar", "other/");

    let error = open(&etcd.config()).txn(write()).await.unwrap_err();
    assert!(error.to_string().contains("etcd.username"), "{error}");
    let registrar = open(&as_user(etcd.config(), "registrar", &directory));
    assert!(registrar.get(Bytes::from_static(b"a")).await.unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_names_the_user() {
    let Some(mut etcd) = EtcdProcess::start() else { return };
    enable(&etcd);
    let directory = TempDir::new().unwrap();
    etcd.restart_with(certificates(directory.path()));
    let store = open(&etcd.config());
    ready(&store).await;
    let mut watch = store.watch(KeyRange::prefix("ready"), 1).await.unwrap();
    assert!(!watch.next().await.unwrap().unwrap().events.is_empty());
    let elsewhere = open(&EtcdConfig { prefix: "other/".into(), ..etcd.config() });
    let error = elsewhere.revision().await.unwrap_err().to_string();
    assert!(error.contains("etcd.cert_file") && error.contains("other/"), "{error}");
}

/// Authentication is enabled while registrars that have a user run.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn authentication_may_be_enabled_later() {
    let Some(etcd) = EtcdProcess::start() else { return };
    let directory = TempDir::new().unwrap();
    let store = open(&as_user(etcd.config(), "registrar", &directory));
    ready(&store).await;
    enable(&etcd);
    let write = Txn::new().when(Condition::Absent("a".into())).put("a", "");
    assert!(matches!(store.txn(write).await, Ok(TxnOutcome::Committed(_))));
    store.revision().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_when_members_forget_their_tokens() {
    let Some(mut cluster) = Cluster::start_as(FORGETFUL).await else { return };
    enable(&cluster.0[0]);
    let directory = TempDir::new().unwrap();
    let store = Arc::new(open(&as_user(cluster.config(0), "registrar", &directory)));
    ready(&store).await;
    let watch = store.watch(KeyRange::prefix("w/"), 1).await.unwrap();
    let writers = Writers::start(&store);
    for member in 0..3 {
        writers.go_on().await;
        cluster.0[member].restart();
        ready(&open(&as_user(cluster.0[member].config(), "registrar", &directory))).await;
    }
    writers.go_on().await;
    writers.finish(watch).await;
}
