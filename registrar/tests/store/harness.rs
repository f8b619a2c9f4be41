//! A store of each kind that can be opened, and opened again as after a restart.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use muster_registrar::store::Store;
use muster_registrar::store::memory::MemoryStore;
use muster_registrar::store::sqlite::SqliteStore;
use tempfile::TempDir;

use crate::member::EtcdProcess;

/// Where a store keeps what survives a restart.
pub(crate) enum Harness {
    Memory(MemoryStore),
    Sqlite(TempDir),
    Etcd(EtcdProcess),
}

impl Harness {
    pub(crate) fn memory() -> Self {
        Self::Memory(MemoryStore::new())
    }

    pub(crate) fn sqlite() -> Self {
        let directory = TempDir::new().unwrap();
        SqliteStore::create(&directory.path().join("store.db")).unwrap();
        Self::Sqlite(directory)
    }

    /// `None` if there is no etcd here, which is then said.
    pub(crate) fn etcd() -> Option<Self> {
        EtcdProcess::start().map(Self::Etcd)
    }

    /// Whether several processes can have it open at the same time.
    pub(crate) fn is_shared(&self) -> bool {
        !matches!(self, Self::Sqlite(_))
    }

    pub(crate) async fn open(&mut self) -> Arc<dyn Store> {
        match self {
            Self::Memory(store) => Arc::new(store.clone()),
            Self::Sqlite(directory) => {
                Arc::new(SqliteStore::open(directory.path().join("store.db")).unwrap())
            }
            Self::Etcd(process) => Arc::new(process.connect()),
        }
    }

    /// Closes `store`, which must be the last reference, and opens what it kept.
    pub(crate) async fn restart(&mut self, store: Arc<dyn Store>) -> Arc<dyn Store> {
        assert_eq!(Arc::strong_count(&store), 1);
        drop(store);
        match self {
            Self::Memory(store) => *store = MemoryStore::from_model(store.model()),
            Self::Sqlite(_) => {}
            Self::Etcd(process) => process.restart(),
        }
        self.open().await
    }
}

/// This test binary, to be started again to run the function `test` alone, which finds `path` in the variable `name`.
pub(crate) fn again(test: &str, name: &str, path: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).env(name, path).stdout(Stdio::piped());
    command
}

/// Kills the process also if the test fails.
pub(crate) struct Killed(pub(crate) Child);

impl Drop for Killed {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Says why a test does not run; where all must run (`MUSTER_REQUIRE_ROOT=1`), fails instead.
pub(crate) fn skip(why: &str) {
    assert!(std::env::var_os("MUSTER_REQUIRE_ROOT").is_none_or(|value| value != "1"), "{why}");
    eprintln!("skipped: {why}");
}
