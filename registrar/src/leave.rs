//! `muster-registrar leave`: this host is no registrar any more. What the deployment shares stays; what would be lost
//! with this host alone is not given up without `--force`.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    time::Duration,
};

use muster_common::{
    file::{self, FileError, LockError},
    identity::Party,
    time::Timestamp,
};
use muster_proto::storage::{StoredSuccession, SuccessionStep};
use prost::Message as _;
use uuid::Uuid;

use crate::{
    ca::{
        self, CaError,
        succession::{self, Here},
    },
    config::{Config, Etcd, StoreKind},
    join::{ETCD_DIRECTORY, etcd_file},
    own_certificate,
    registry::keys,
    serve::{self, ServeError},
    store::{KeyRange, LIFETIME, Store, StoreError, Txn, etcd::EtcdStore},
};

/// After this, what a registrar that was killed has announced is gone: for so long others are watched.
pub const SETTLED: Duration = LIFETIME.saturating_add(Duration::from_secs(3));

/// Why this host is still a registrar. Nothing was changed, unless a file could not be removed.
#[derive(Debug, thiserror::Error)]
pub enum LeaveError {
    /// There is nothing to leave.
    #[error("this host is no registrar: there is neither ca.key nor registrar.pem in {}", .0.display())]
    NotHere(PathBuf),
    /// All there is of the deployment is on this host.
    #[error(
        "the registry is in a sqlite store on this host, so that this is the deployment's one registrar; to move it to \
         an etcd, see `muster-registrar migrate`; to end the deployment, remove {}", .0.display()
    )]
    Sqlite(PathBuf),
    /// It runs.
    #[error("the registrar on this host runs ({0}); stop it first: systemctl disable --now muster-registrar")]
    Runs(LockError),
    /// Nobody else has the CA's key, as far as is known.
    #[error(
        "no other registrar of this deployment runs, so that this host may have the only copy of the CA's key; start \
         another one first, or leave all the same with --force"
    )]
    Last,
    /// The others do not know of a new root.
    #[error(
        "the others have not heard of the last step of the CA's rotation, which was taken here; run \
         `muster-registrar serve` for a minute first, or leave all the same with --force"
    )]
    Unshared,
    /// The store cannot be used.
    #[error(
        "{0}; try again later, or leave all the same with --force: agents are told of this registrar then"
    )]
    Deployment(#[from] Box<ServeError>),
    /// The store cannot be read or written.
    #[error(
        "cannot tell the store: {0}; try again later, or leave all the same with --force: agents are told of this \
         registrar then"
    )]
    Store(#[from] StoreError),
    /// The CA's files, or the certificate.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// A file cannot be removed.
    #[error(transparent)]
    File(#[from] FileError),
}

/// What was done.
#[derive(Clone, Debug)]
pub struct Report {
    data_dir: PathBuf,
    config: Option<PathBuf>,
    /// Why the store does not know.
    untold: Option<String>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "This host is no registrar any more; the deployment goes on at the others.\n")?;
        writeln!(f, "  removed      CA, certificate and access to etcd in {}", self.data_dir.display())?;
        if let Some(config) = &self.config {
            writeln!(f, "  config       is now {}", config.display())?;
        }
        match &self.untold {
            None => writeln!(f, "  store        agents are not told of this host any more"),
            Some(reason) => writeln!(f, "  store        could not be told: {reason}"),
        }
    }
}

/// Makes the host with `config`, read from `path`, no registrar. Done again after it was cut off, it goes on.
///
/// # Errors
/// See [`LeaveError`]; with `force`, only if files are in use or cannot be removed.
pub async fn leave(path: &Path, config: &Config, force: bool, now: Timestamp) -> Result<Report, LeaveError> {
    let data_dir = &config.data_dir;
    let certificate = data_dir.join(own_certificate::FILE);
    if !certificate.exists() && !data_dir.join("ca.key").exists() {
        return Err(LeaveError::NotHere(data_dir.clone()));
    }
    if config.store.kind == StoreKind::Sqlite {
        return Err(LeaveError::Sqlite(data_dir.clone()));
    }
    let lock = file::lock(data_dir).map_err(LeaveError::Runs)?;
    let told = async {
        let store = EtcdStore::open(&config.etcd())?;
        serve::read_format(&store, &config.place(config.store.kind)).await.map_err(Box::new)?;
        if !force {
            check_others(&store, data_dir, SETTLED).await?;
        }
        if certificate.exists() {
            forget(&store, uid(&certificate)?).await?;
        }
        Ok::<_, LeaveError>(())
    };
    let untold = match Box::pin(told).await {
        Ok(()) => None,
        Err(error) if force => Some(error.to_string()),
        Err(error) => return Err(error),
    };

    // The key first; the certificate, which says what the store is to forget, after all the others.
    ca::remove_all(data_dir)?;
    let etcd = data_dir.join(ETCD_DIRECTORY);
    for (key, _) in Etcd::default().files_mut() {
        file::remove(&etcd.join(etcd_file(key)))?;
    }
    // What else is in it is not the registrar's, and stays.
    let _not_empty_or_not_there = fs::remove_dir(&etcd);
    file::remove(&certificate)?;
    let config = set_aside(path, now)?;
    drop(lock);
    file::remove(&data_dir.join("lock"))?;
    Ok(Report { data_dir: data_dir.clone(), config, untold })
}

/// Refuses if something would be lost with this host.
async fn check_others(store: &dyn Store, data_dir: &Path, settled: Duration) -> Result<(), LeaveError> {
    if data_dir.join("ca.key").exists() {
        let here = Here::load(data_dir)?;
        for (old, next) in succession::list(data_dir)? {
            let kv = store.get(keys::succession(old.as_bytes())).await?;
            let known = kv.and_then(|kv| StoredSuccession::decode(kv.value).ok());
            let known = known.map_or(SuccessionStep::Unspecified, |known| known.step());
            if here.step(old, next.new_root()) > known {
                return Err(LeaveError::Unshared);
            }
        }
    }
    // What runs now and still does when whatever was killed, such as this host's own, has been forgotten.
    let running = async || -> Result<Vec<_>, StoreError> {
        let all = store.range_all(KeyRange::prefix("registrars/")).await?.0;
        Ok(all.into_iter().map(|kv| kv.key).collect())
    };
    let before = running().await?;
    if !before.is_empty() {
        tokio::time::sleep(settled).await;
        let after = running().await?;
        if before.iter().any(|key| after.contains(key)) {
            return Ok(());
        }
    }
    Err(LeaveError::Last)
}

/// Has the store forget what it keeps of the registrar with this certificate.
async fn forget(store: &dyn Store, uid: Option<Uuid>) -> Result<(), StoreError> {
    let Some(uid) = uid else { return Ok(()) };
    store.txn(Txn::new().delete(keys::registrar_record(uid))).await.map(drop)
}

/// The registrar's uid.
fn uid(certificate: &Path) -> Result<Option<Uuid>, CaError> {
    let identity = own_certificate::load(certificate)?.identity()?;
    Ok(match identity.party {
        Party::Registrar { uid } => Uuid::try_parse(uid.as_str()).ok(),
        _ => None,
    })
}

/// Keeps the configuration, but where nothing reads it: this host may join again.
fn set_aside(path: &Path, now: Timestamp) -> Result<Option<PathBuf>, FileError> {
    if path.symlink_metadata().is_err() {
        return Ok(None);
    }
    let mut aside = path.as_os_str().to_owned();
    aside.push(format!(".left-{}", now.unix_seconds()));
    let aside = PathBuf::from(aside);
    fs::rename(path, &aside).map_err(|error| FileError::new("rename", path, error))?;
    Ok(Some(aside))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ca::{Ca, rotation},
        store::{LIFETIME, memory::MemoryStore},
    };

    /// The directory of a registrar.
    fn registrar() -> (tempfile::TempDir, Config, Uuid) {
        let dir = tempfile::tempdir().unwrap();
        let data_dir = dir.path().join("data");
        let now = Timestamp::now();
        let ca = Ca::create(&data_dir, "net.example", now).unwrap();
        let path = data_dir.join(own_certificate::FILE);
        own_certificate::issue(&path, &ca, "net.example", None, LIFETIME, now).unwrap();
        let uid = uid(&path).unwrap().unwrap();
        let mut config = Config { data_dir, ..Config::default() };
        config.store.kind = StoreKind::Etcd;
        config.store.etcd.endpoints = vec!["http://127.0.0.1:1".into()];
        (dir, config, uid)
    }

    #[tokio::test]
    async fn the_last_one_stays() {
        let (_dir, config, _) = registrar();
        let store = MemoryStore::new();
        let check = || check_others(&store, &config.data_dir, Duration::from_millis(50));
        assert!(matches!(check().await, Err(LeaveError::Last)));
        let other = store.announce(keys::registrar(Uuid::from_u128(1))).await.unwrap();
        check().await.unwrap();
        // One that has been killed, and is forgotten meanwhile.
        let (checked, ()) = tokio::join!(check(), async {
            tokio::time::sleep(Duration::from_millis(10)).await;
            drop(other);
        });
        assert!(matches!(checked, Err(LeaveError::Last)));
    }

    #[tokio::test]
    async fn a_root_that_the_others_do_not_know_stays() {
        let (_dir, config, _) = registrar();
        let store = MemoryStore::new();
        let _other = store.announce(keys::registrar(Uuid::from_u128(1))).await.unwrap();
        rotation::prepare(&config.data_dir, "net.example", Timestamp::now()).unwrap();
        let check = || check_others(&store, &config.data_dir, Duration::from_millis(50));
        assert!(matches!(check().await, Err(LeaveError::Unshared)));
        let (old, next) = succession::list(&config.data_dir).unwrap().remove(0);
        let stored = next.stored(SuccessionStep::Prepared).encode_to_vec();
        store.txn(Txn::new().put(keys::succession(old.as_bytes()), stored)).await.unwrap();
        check().await.unwrap();
    }

    #[tokio::test]
    async fn the_store_forgets_this_one_alone() {
        let (_dir, _, uid) = registrar();
        let store = MemoryStore::new();
        let other = Uuid::from_u128(1);
        let both = Txn::new().put(keys::registrar_record(uid), "a").put(keys::registrar_record(other), "b");
        store.txn(both).await.unwrap();
        forget(&store, Some(uid)).await.unwrap();
        forget(&store, None).await.unwrap();
        let left = store.range_all(KeyRange::all()).await.unwrap().0;
        assert_eq!(left.len(), 1);
        assert_eq!(left[0].key, keys::registrar_record(other));
    }

    #[tokio::test]
    async fn without_the_store_only_force_leaves_and_what_is_not_ours_stays() {
        let (dir, config, _) = registrar();
        let path = dir.path().join("registrar.toml");
        fs::write(&path, "drain = \"1s\"\n").unwrap();
        fs::create_dir(config.data_dir.join(ETCD_DIRECTORY)).unwrap();
        fs::write(config.data_dir.join("etcd/key.pem"), "secret").unwrap();
        fs::write(config.data_dir.join("notes"), "kept").unwrap();
        let now = Timestamp::now();
        assert!(leave(&path, &config, false, now).await.unwrap_err().to_string().contains("--force"));
        assert!(config.data_dir.join("ca.key").exists() && path.exists());

        let runs = file::lock(&config.data_dir).unwrap();
        let error = leave(&path, &config, true, now).await.unwrap_err().to_string();
        assert!(error.contains("runs") && error.contains("systemctl"), "{error}");
        drop(runs);
        let report = leave(&path, &config, true, now).await.unwrap().to_string();
        assert!(report.contains("could not be told"), "{report}");
        let left: Vec<_> =
            fs::read_dir(&config.data_dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["notes"]);
        assert!(!path.exists());
        assert!(matches!(leave(&path, &config, true, now).await, Err(LeaveError::NotHere(_))));
    }

    #[tokio::test]
    async fn the_registrar_with_the_registry_on_its_host_does_not_leave() {
        let (dir, mut config, _) = registrar();
        config.store.kind = StoreKind::Sqlite;
        let error = leave(dir.path(), &config, true, Timestamp::now()).await.unwrap_err();
        assert!(matches!(error, LeaveError::Sqlite(_)));
        assert!(config.data_dir.join("ca.key").exists());
    }
}
