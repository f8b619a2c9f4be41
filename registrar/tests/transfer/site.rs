//! A registrar's directory and configuration, an etcd of its own, and what is in the stores.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use muster_common::config;
use muster_common::time::Timestamp;
use muster_proto::storage::Format;
use muster_registrar::config::{Config, StoreKind};
use muster_registrar::init;
use muster_registrar::registry::keys;
use muster_registrar::store::etcd::EtcdStore;
use muster_registrar::store::sqlite::{SqliteSnapshot, SqliteStore};
use muster_registrar::store::{KeyRange, Store, Txn, TxnOutcome};
use muster_registrar::transfer::{TransferError, archive, backup, migrate, progress::Progress, restore};
use prost::Message as _;
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_muster-registrar");

/// One member with its own directory; killed when dropped.
pub(crate) struct Etcd {
    child: Child,
    _directory: TempDir,
    port: u16,
}

impl Etcd {
    /// `None` if there is no etcd here, which is then said; where all tests must run (`MUSTER_REQUIRE_ROOT=1`), fails.
    pub(crate) fn start() -> Option<Self> {
        let directory = TempDir::new().unwrap();
        let [port, peer] = free_ports();
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        let log = File::create(directory.path().join("log")).unwrap();
        let child = Command::new("etcd")
            .arg("--data-dir")
            .arg(directory.path().join("data"))
            // The tests look at contents, not at what a power failure leaves.
            .arg("--unsafe-no-fsync")
            .args(["--listen-client-urls", &url(port), "--advertise-client-urls", &url(port)])
            .args(["--listen-peer-urls", &url(peer), "--initial-advertise-peer-urls", &url(peer)])
            .args(["--initial-cluster", &format!("default={}", url(peer))])
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn();
        let child = match child {
            Ok(child) => child,
            Err(error) => {
                let why = format!("etcd is not installed ({error})");
                assert!(std::env::var_os("MUSTER_REQUIRE_ROOT").is_none_or(|value| value != "1"), "{why}");
                eprintln!("skipped: {why}");
                return None;
            }
        };
        let mut etcd = Self { child, _directory: directory, port };
        for _ in 0..600 {
            if TcpStream::connect(("127.0.0.1", port)).is_ok() {
                return Some(etcd);
            }
            assert!(etcd.child.try_wait().unwrap().is_none(), "etcd ended");
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("etcd does not listen");
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn free_ports<const N: usize>() -> [u16; N] {
    let listeners = [(); N].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    listeners.each_ref().map(|listener| listener.local_addr().unwrap().port())
}

/// A registrar's directory.
pub(crate) struct Site {
    pub(crate) directory: TempDir,
    kind: StoreKind,
    etcd: u16,
    prefix: String,
    ports: [u16; 4],
}

impl Site {
    /// With its store of a kind; in `etcd` under a prefix of its own.
    pub(crate) fn new(kind: StoreKind, etcd: &Etcd) -> Self {
        Self::with_port(kind, etcd.port)
    }

    pub(crate) fn sqlite() -> Self {
        Self::with_port(StoreKind::Sqlite, 1)
    }

    fn with_port(kind: StoreKind, etcd: u16) -> Self {
        let directory = TempDir::new().unwrap();
        let prefix = format!("{}/", directory.path().file_name().unwrap().to_str().unwrap());
        let site = Self { directory, kind, etcd, prefix, ports: free_ports() };
        site.select(kind);
        site
    }

    /// Sets `store.kind`.
    pub(crate) fn select(&self, kind: StoreKind) {
        let [grpc, dns, dot, http] = self.ports;
        let text = format!(
            "data_dir = \"{}\"\n[listen]\ngrpc = \"127.0.0.1:{grpc}\"\ndns = \"127.0.0.1:{dns}\"\n\
             dot = \"127.0.0.1:{dot}\"\nhttp = \"127.0.0.1:{http}\"\n[store]\nkind = \"{kind}\"\n\
             [store.etcd]\nendpoints = [\"http://127.0.0.1:{}\"]\nprefix = \"{}\"\n",
            self.path("data").display(),
            self.etcd,
            self.prefix
        );
        fs::write(self.path("registrar.toml"), text).unwrap();
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn config(&self) -> Config {
        config::load(Some(&self.path("registrar.toml"))).unwrap()
    }

    pub(crate) fn place(&self) -> String {
        self.config().place(self.kind)
    }

    /// Makes a deployment.
    pub(crate) async fn init(&self) {
        init::init(self.options(), Timestamp::now()).await.unwrap();
    }

    pub(crate) fn options(&self) -> init::Options {
        init::Options {
            config: self.path("registrar.toml"),
            domain: "net.example".parse().unwrap(),
            public_addresses: vec![IpAddr::from([127, 0, 0, 1])],
            network: "default".parse().unwrap(),
            credential: self.path("operator.toml"),
        }
    }

    /// Opens the store for writing.
    pub(crate) fn open(&self, kind: StoreKind) -> Arc<dyn Store> {
        match kind {
            StoreKind::Sqlite => Arc::new(SqliteStore::open(self.config().sqlite_path()).unwrap()),
            StoreKind::Etcd => Arc::new(EtcdStore::open(&self.config().etcd()).unwrap()),
        }
    }

    /// Puts so many keys with values of different sizes into the store, and one of a running registrar.
    pub(crate) async fn fill(&self, count: usize) {
        let store = self.open(self.kind);
        for start in (0..count).step_by(100) {
            let txn = (start..(start + 100).min(count)).fold(Txn::new(), |txn, number| {
                txn.put(format!("devices/filler/{number:06}"), vec![b'x'; number * 7 % 400])
            });
            assert!(matches!(store.txn(txn).await, Ok(TxnOutcome::Committed(_))));
        }
        // The largest that a store takes, nearly, and none of Muster's.
        let large = Txn::new().put("large", vec![1; (1 << 20) - 100]).put("other/\u{e9}", "");
        store.txn(large).await.unwrap();
        let registrar = keys::registrar(uuid::Uuid::from_u128(7));
        store.txn(Txn::new().put(registrar, "")).await.unwrap();
    }

    /// Takes away what only looks like a running registrar.
    pub(crate) async fn stop(&self, kind: StoreKind) {
        let registrar = keys::registrar(uuid::Uuid::from_u128(7));
        self.open(kind).txn(Txn::new().delete(registrar)).await.unwrap();
    }

    pub(crate) async fn backup(&self, name: &str) -> Result<archive::Contents, TransferError> {
        let options = backup::Options { output: self.path(name), overwrite: false, with_ca: true };
        backup::backup(&self.config(), &options, Timestamp::now(), &mut Progress::silent()).await
    }

    pub(crate) async fn restore(&self, file: &Path) -> Result<archive::Contents, TransferError> {
        restore::restore(&self.config(), file, true, &mut Progress::silent()).await
    }

    pub(crate) async fn migrate(&self, from: StoreKind, to: StoreKind) -> Result<u64, TransferError> {
        let options = migrate::Options { from, to, force: false };
        let summary =
            migrate::migrate(&self.config(), options, Timestamp::now(), &mut Progress::silent()).await?;
        Ok(summary.keys)
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.args(arguments).arg("--config").arg(self.path("registrar.toml"));
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// What the command says on its failure.
    pub(crate) fn fails(&self, arguments: &[&str]) -> String {
        let mut child = Killed(
            self.command(arguments)
                .stdout(Stdio::null())
                .stderr(File::create(self.path("stderr")).unwrap())
                .spawn()
                .unwrap(),
        );
        for _ in 0..600 {
            if let Some(status) = child.0.try_wait().unwrap() {
                assert_eq!(status.code(), Some(1), "{arguments:?}");
                return fs::read_to_string(self.path("stderr")).unwrap();
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("{arguments:?} goes on: {}", fs::read_to_string(self.path("stderr")).unwrap());
    }
}

/// A process that is killed at the end, whatever happens.
pub(crate) struct Killed(pub(crate) Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// All of a store's keys and values.
pub(crate) type State = BTreeMap<Bytes, Bytes>;

/// What is in a store and goes with a deployment, with the format but for its epoch.
pub(crate) async fn state(site: &Site, kind: StoreKind) -> State {
    let mut state = everything(site, kind).await;
    state.retain(|key, _| keys::is_portable(key) || *key == keys::format());
    if let Some(value) = state.get_mut(&keys::format()) {
        let format = Format { epoch: 0, ..Format::decode(&**value).unwrap() };
        *value = format.encode_to_vec().into();
    }
    state
}

/// The epoch of a store.
pub(crate) async fn epoch(site: &Site, kind: StoreKind) -> u64 {
    Format::decode(&*everything(site, kind).await[&keys::format()]).unwrap().epoch
}

/// All that is in a store, whoever has it open.
pub(crate) async fn everything(site: &Site, kind: StoreKind) -> State {
    let kvs = match kind {
        StoreKind::Sqlite => {
            let snapshot = SqliteSnapshot::open(&site.config().sqlite_path()).await.unwrap();
            snapshot.range(KeyRange::all(), usize::MAX).await.unwrap().kvs
        }
        StoreKind::Etcd => site.open(kind).range_all(KeyRange::all()).await.unwrap().0,
    };
    kvs.into_iter().map(|kv| (kv.key, kv.value)).collect()
}
