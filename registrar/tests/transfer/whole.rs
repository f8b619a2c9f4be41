//! What is carried over is the same afterwards, key by key, and can be served.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use muster_registrar::config::StoreKind::{Etcd as InEtcd, Sqlite};
use muster_registrar::registry::keys;

use crate::site::{Etcd, Site, epoch, everything, state};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn backups_of_either_store_are_restored_into_either() {
    let Some(etcd) = Etcd::start() else { return };
    for from in [Sqlite, InEtcd] {
        let origin = Site::new(from, &etcd);
        origin.init().await;
        origin.fill(2500).await;
        let expected = state(&origin, from).await;
        let written = origin.backup("backup").await.unwrap();
        assert_eq!(written.summary.keys, expected.len() as u64 - 1, "the format is in the header");
        let mode = fs::metadata(origin.path("backup")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let names: Vec<&str> = written.ca.iter().map(|file| &*file.name).collect();
        assert_eq!(names, ["ca.crt", "ca.key"]);

        for to in [Sqlite, InEtcd] {
            let site = Site::new(to, &etcd);
            let read = site.restore(&origin.path("backup")).await.unwrap();
            assert_eq!(read.summary, written.summary);
            assert!(state(&site, to).await == expected);
            // Agents that come back are not to resume from revisions of the other store.
            assert_ne!(epoch(&site, to).await, epoch(&origin, from).await);
            let registrar = keys::registrar(uuid::Uuid::from_u128(7));
            let all = everything(&site, to).await;
            assert!(!all.contains_key(&registrar) && !all.contains_key(&keys::restoring()));
            for name in ["ca.key", "ca.crt"] {
                let [was, is] = [&origin, &site].map(|site| fs::read(site.path("data").join(name)).unwrap());
                assert!(was == is);
            }
            // What is restored makes the same backup.
            assert_eq!(site.backup("again").await.unwrap().summary, written.summary);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_and_the_way_back_change_nothing() {
    let Some(etcd) = Etcd::start() else { return };
    let site = Site::new(Sqlite, &etcd);
    site.init().await;
    site.fill(2500).await;
    let expected = state(&site, Sqlite).await;

    let keys = site.migrate(Sqlite, InEtcd).await.unwrap();
    assert_eq!(keys, expected.len() as u64 - 1);
    assert!(state(&site, InEtcd).await == expected);
    assert_ne!(epoch(&site, InEtcd).await, epoch(&site, Sqlite).await);
    // The source is as it was, but for the mark.
    assert!(state(&site, Sqlite).await == expected);
    let error = site.fails(&["serve"]);
    assert!(error.contains("has been migrated to etcd") && error.contains("--undo"), "{error}");
    let error = site.migrate(Sqlite, InEtcd).await.unwrap_err().to_string();
    assert!(error.contains("already") && error.contains("nothing was changed"), "{error}");

    site.select(InEtcd);
    let error = site.migrate(InEtcd, Sqlite).await.unwrap_err().to_string();
    assert!(error.contains("registry.db is not empty; nothing was changed"), "{error}");
    for file in ["registry.db", "registry.db-wal", "registry.db-shm"] {
        let _ = fs::remove_file(site.path("data").join(file));
    }
    site.migrate(InEtcd, Sqlite).await.unwrap();
    assert!(state(&site, Sqlite).await == expected);
    let error = site.fails(&["serve"]);
    assert!(error.contains("has been migrated to") && error.contains("registry.db"), "{error}");

    // It can be undone, once.
    assert!(site.run(&["migrate", "--from", "etcd", "--undo"]).status.success());
    assert!(state(&site, InEtcd).await == expected);
    assert!(!everything(&site, InEtcd).await.contains_key(&keys::migrated()));
    let error = site.fails(&["migrate", "--from", "etcd", "--undo"]);
    assert!(error.contains("has not been migrated"), "{error}");
}
