//! A real etcd on loopback, and what is particular to it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use muster_registrar::store::etcd::{EtcdConfig, EtcdStore};
use muster_registrar::store::{Condition, Event, KeyRange, LIFETIME, Store, StoreError, Txn, TxnOutcome};
use tempfile::TempDir;

use crate::harness::skip;

/// One member with its own directory; killed when dropped, and when the test's thread ends in whatever way.
pub(crate) struct EtcdProcess {
    child: Child,
    directory: TempDir,
    client_port: u16,
    peer_port: u16,
    tls: Option<Tls>,
}

/// Files in PEM.
struct Tls {
    ca: PathBuf,
    cert: PathBuf,
    key: PathBuf,
}

impl EtcdProcess {
    /// `None` if etcd is not installed, which is then said.
    pub(crate) fn start() -> Option<Self> {
        Self::start_with(|_| None)
    }

    fn start_with(tls: impl FnOnce(&Path) -> Option<Tls>) -> Option<Self> {
        if Command::new("etcd").arg("--version").output().is_err() {
            skip("etcd is not installed (on Debian: apt-get install etcd-server)");
            return None;
        }
        let directory = TempDir::new().unwrap();
        let tls = tls(directory.path());
        // Held together, so that they differ.
        let ports = [(), ()].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [client_port, peer_port] = ports.each_ref().map(|port| port.local_addr().unwrap().port());
        drop(ports);
        let child = spawn(directory.path(), client_port, peer_port, tls.as_ref());
        let mut process = Self { child, directory, client_port, peer_port, tls };
        process.wait();
        Some(process)
    }

    pub(crate) fn config(&self) -> EtcdConfig {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        EtcdConfig {
            endpoints: vec![format!("{scheme}://127.0.0.1:{}", self.client_port)],
            prefix: "test/".into(),
            ca_file: self.tls.as_ref().map(|tls| tls.ca.clone()),
            cert_file: self.tls.as_ref().map(|tls| tls.cert.clone()),
            key_file: self.tls.as_ref().map(|tls| tls.key.clone()),
        }
    }

    pub(crate) fn connect(&self) -> EtcdStore {
        EtcdStore::open(&self.config()).unwrap()
    }

    /// Kills it as hard as can be, and starts it anew on what it kept.
    pub(crate) fn restart(&mut self) {
        self.kill();
        self.child = spawn(self.directory.path(), self.client_port, self.peer_port, self.tls.as_ref());
        self.wait();
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Stops it from doing anything, with its connections open.
    fn freeze(&self) {
        self.signal("-STOP");
    }

    fn thaw(&self) {
        self.signal("-CONT");
    }

    fn signal(&self, signal: &str) {
        let sent = Command::new("kill").args([signal, &self.child.id().to_string()]).status();
        assert!(sent.unwrap().success());
    }

    fn wait(&mut self) {
        for _ in 0..600 {
            if TcpStream::connect(("127.0.0.1", self.client_port)).is_ok() {
                return;
            }
            assert!(self.child.try_wait().unwrap().is_none(), "etcd ended:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("etcd does not listen:\n{}", self.log());
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }
}

impl Drop for EtcdProcess {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn spawn(directory: &Path, client_port: u16, peer_port: u16, tls: Option<&Tls>) -> Child {
    let scheme = if tls.is_some() { "https" } else { "http" };
    let client = format!("{scheme}://127.0.0.1:{client_port}");
    let peer = format!("http://127.0.0.1:{peer_port}");
    let log = File::options().create(true).append(true).open(directory.join("log")).unwrap();
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "etcd", "--name", "test", "--logger", "zap"])
        .arg("--data-dir")
        .arg(directory.join("data"))
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("test={peer}")])
        .stdout(log.try_clone().unwrap())
        .stderr(log);
    if let Some(tls) = tls {
        command.arg("--client-cert-auth");
        command.arg("--trusted-ca-file").arg(&tls.ca);
        command.arg("--cert-file").arg(&tls.cert).arg("--key-file").arg(&tls.key);
    }
    command.spawn().unwrap()
}

/// A CA, and one certificate for both sides.
fn certificates(directory: &Path) -> Tls {
    let mut ca = rcgen::CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let ca_cert = ca.self_signed(&ca_key).unwrap();
    let mut leaf = rcgen::CertificateParams::new(vec!["127.0.0.1".into()]).unwrap();
    leaf.extended_key_usages =
        vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth, rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    let key = rcgen::KeyPair::generate().unwrap();
    let cert = leaf.signed_by(&key, &rcgen::Issuer::from_params(&ca, &ca_key)).unwrap();
    let write = |name: &str, pem: String| {
        let path = directory.join(name);
        fs::write(&path, pem).unwrap();
        path
    };
    Tls {
        ca: write("ca.pem", ca_cert.pem()),
        cert: write("cert.pem", cert.pem()),
        key: write("key.pem", key.serialize_pem()),
    }
}

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
    let cases = [
        ("etcd.endpoints", EtcdConfig { endpoints: vec![], ..good() }),
        ("etcd.endpoints", EtcdConfig { endpoints: vec!["127.0.0.1:2379".into()], ..good() }),
        ("etcd.endpoints", EtcdConfig { endpoints: vec!["https://127.0.0.1:2379".into()], ..good() }),
        ("etcd.endpoints", EtcdConfig { endpoints: vec!["http://".into()], ..good() }),
        ("etcd.prefix", EtcdConfig { prefix: String::new(), ..good() }),
        ("/nonexistent", EtcdConfig { ca_file: Some("/nonexistent".into()), ..good() }),
        ("etcd.ca_file", EtcdConfig { cert_file: Some("/nonexistent".into()), ..good() }),
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
    let mut watch = store.watch(KeyRange::prefix("w/"), 1).await.unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..8)
        .map(|writer| {
            let (store, stop) = (Arc::clone(&store), Arc::clone(&stop));
            tokio::spawn(async move {
                let mut acknowledged = Vec::new();
                let mut at = 0;
                while !stop.load(Ordering::Relaxed) {
                    let key = format!("w/{writer}/{at}");
                    match store.txn(Txn::new().put(key.clone(), "v")).await {
                        Ok(TxnOutcome::Committed(revision)) => acknowledged.push((revision, key)),
                        Err(StoreError::Unknown(_)) => {}
                        Err(StoreError::Unavailable(_)) => {
                            tokio::time::sleep(Duration::from_millis(20)).await
                        }
                        other => panic!("{other:?}"),
                    }
                    at += 1;
                }
                acknowledged
            })
        })
        .collect();
    for _ in 0..2 {
        tokio::time::sleep(Duration::from_millis(300)).await;
        etcd.restart();
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    stop.store(true, Ordering::Relaxed);
    let mut acknowledged = BTreeMap::new();
    for writer in writers {
        acknowledged.extend(writer.await.unwrap());
    }
    let last = loop {
        match store.txn(Txn::new().put("w/last", "")).await {
            Ok(TxnOutcome::Committed(revision)) => break revision,
            Ok(TxnOutcome::Conflict) | Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    };
    let mut told = BTreeMap::new();
    let mut previous = 0;
    while previous < last {
        let batch = watch.next().await.unwrap().unwrap();
        assert!(batch.revision > previous, "{} after {previous}", batch.revision);
        previous = batch.revision;
        for event in batch.events {
            told.insert(previous, String::from_utf8(event.key().to_vec()).unwrap());
        }
    }
    let (kvs, _) = store.range_all(KeyRange::prefix("w/")).await.unwrap();
    assert!(kvs.iter().all(|kv| told.get(&kv.mod_revision).is_some_and(|key| key.as_bytes() == kv.key)));
    for (revision, key) in acknowledged {
        assert_eq!(told.get(&revision), Some(&key));
    }
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
