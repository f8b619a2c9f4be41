//! Killed in the middle, with a real signal to a real process: nobody serves what is half there, and the same command
//! finishes it.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use muster_proto::storage::{Migrated, Restoring};
use muster_registrar::config::StoreKind::{self, Etcd as InEtcd, Sqlite};
use muster_registrar::registry::keys;
use muster_registrar::store::Txn;
use muster_registrar::store::sqlite::SqliteSnapshot;
use prost::Message as _;

use crate::site::{Etcd, Killed, Site, everything, state};

/// Enough that it takes a while, in hundreds of transactions.
const KEYS: usize = 30_000;

/// How far the store has been filled, if that has begun and is not over.
async fn filled(site: &Site, kind: StoreKind) -> Option<Vec<u8>> {
    let found = match kind {
        StoreKind::Sqlite => {
            let snapshot = SqliteSnapshot::open(&site.config().sqlite_path()).await.ok()?;
            snapshot.range(keys::meta(), 10).await.ok()?.kvs
        }
        StoreKind::Etcd => site.open(kind).range(keys::meta(), None, 10).await.ok()?.kvs,
    };
    let mark = found.into_iter().find(|kv| kv.key == keys::restoring())?;
    Some(Restoring::decode(&*mark.value).unwrap().through).filter(|through| !through.is_empty())
}

/// Starts the command and kills it once it has written something; returns how far it had come.
async fn kill(site: &Site, kind: StoreKind, after: &[u8], arguments: &[&str]) -> Vec<u8> {
    let mut child =
        Killed(site.command(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    for _ in 0..3000 {
        if filled(site, kind).await.is_some_and(|through| through[..] > *after) {
            child.0.kill().unwrap();
            assert!(!child.0.wait().unwrap().success());
            let left = filled(site, kind).await;
            assert!(left.is_some(), "it was finished before it was killed");
            return left.unwrap();
        }
        assert!(child.0.try_wait().unwrap().is_none(), "it ended before it was killed");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("it writes nothing");
}

async fn restore_killed(site: &Site, kind: StoreKind, backup: &Path, other: &Path) {
    let arguments = ["restore", backup.to_str().unwrap()];
    let first = kill(site, kind, b"", &arguments).await;
    let second = kill(site, kind, &first, &arguments).await;
    assert!(first < second, "it does not begin anew");
    let before = everything(site, kind).await;
    assert!(!before.contains_key(&keys::format()));
    let error = site.fails(&["serve"]);
    assert!(error.contains("is incomplete") && error.contains("restore"), "{error}");
    let error = site.fails(&["restore", "--without-ca", other.to_str().unwrap()]);
    assert!(error.contains("something else; nothing was changed"), "{error}");
    assert!(everything(site, kind).await == before);
    site.restore(backup).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_goes_on_after_it_was_killed() {
    let Some(etcd) = Etcd::start() else { return };
    let origin = Site::sqlite();
    origin.init().await;
    origin.backup("small").await.unwrap();
    origin.fill(KEYS).await;
    origin.backup("backup").await.unwrap();
    let expected = state(&origin, Sqlite).await;
    for kind in [Sqlite, InEtcd] {
        let site = Site::new(kind, &etcd);
        restore_killed(&site, kind, &origin.path("backup"), &origin.path("small")).await;
        assert!(state(&site, kind).await == expected);
        assert!(!everything(&site, kind).await.contains_key(&keys::restoring()));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_goes_on_after_it_was_killed() {
    let Some(etcd) = Etcd::start() else { return };
    for (from, to) in [(Sqlite, InEtcd), (InEtcd, Sqlite)] {
        let site = Site::new(from, &etcd);
        site.init().await;
        site.fill(KEYS).await;
        site.stop(from).await;
        let expected = state(&site, from).await;
        let (from_name, to_name) = (from.to_string(), to.to_string());
        kill(&site, to, b"", &["migrate", "--from", &from_name, "--to", &to_name]).await;
        assert!(state(&site, from).await == expected);
        assert!(!everything(&site, from).await.contains_key(&keys::migrated()));
        site.select(to);
        let error = site.fails(&["serve"]);
        assert!(error.contains("is incomplete") && error.contains("migrate"), "{error}");

        // As if it had been cut off between its last two steps: neither is served then.
        let mark = Migrated { target: "the other".into(), migrated_at: None };
        site.open(from).txn(Txn::new().put(keys::migrated(), mark.encode_to_vec())).await.unwrap();
        site.migrate(from, to).await.unwrap();
        assert!(state(&site, to).await == expected);
        assert!(state(&site, from).await == expected);
        assert!(everything(&site, from).await.contains_key(&keys::migrated()));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_changed_meanwhile_is_noticed() {
    let Some(etcd) = Etcd::start() else { return };
    let site = Site::new(Sqlite, &etcd);
    site.init().await;
    site.fill(KEYS).await;
    kill(&site, InEtcd, b"", &["migrate", "--from", "sqlite", "--to", "etcd"]).await;
    site.open(Sqlite).txn(Txn::new().put("devices/filler/new", "")).await.unwrap();
    let error = site.migrate(Sqlite, InEtcd).await.unwrap_err().to_string();
    assert!(error.contains("which is something else"), "{error}");
    assert!(!everything(&site, Sqlite).await.contains_key(&keys::migrated()));
}
