//! What cannot be done is refused with a reason, and changes nothing.

use std::fs;

use muster_proto::storage::{BackupHeader, Restoring};
use muster_registrar::config::StoreKind::{Etcd as InEtcd, Sqlite};
use muster_registrar::init;
use muster_registrar::registry::keys;
use muster_registrar::store::Txn;
use muster_registrar::transfer::format::Encoder;
use prost::Message as _;

use crate::site::{Etcd, Site, everything};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_backup_changes_nothing() {
    let origin = Site::sqlite();
    origin.init().await;
    origin.fill(300).await;
    origin.backup("backup").await.unwrap();
    let whole = fs::read(origin.path("backup")).unwrap();
    let site = Site::sqlite();
    let file = site.path("damaged");
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    for contents in [&whole[..whole.len() - 1], &whole[..100], &flipped, b"", b"something else"] {
        fs::write(&file, contents).unwrap();
        for arguments in [["restore", file.to_str().unwrap()], ["backup", "--verify"]] {
            let mut arguments = arguments.to_vec();
            if arguments[0] == "backup" {
                arguments.push(file.to_str().unwrap());
            }
            let error = site.fails(&arguments);
            assert!(error.contains("damaged: ") && error.contains("nothing was changed"), "{error}");
        }
        assert!(!site.path("data").exists());
    }
    // A header that a newer version has written.
    let mut out = Vec::new();
    let header = BackupHeader { layout_version: 2, ..BackupHeader::default() };
    Encoder::new(&header, &mut out).end(&mut out);
    fs::write(&file, out).unwrap();
    let error = site.restore(&file).await.unwrap_err().to_string();
    assert!(error.contains("layout 2") && error.contains("nothing was changed"), "{error}");
    assert!(!site.path("data").exists());

    let read = site.run(&["backup", "--verify", origin.path("backup").to_str().unwrap()]);
    let read = String::from_utf8(read.stdout).unwrap();
    assert!(read.contains("is whole") && read.contains("net.example"), "{read}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_never_replaces_a_file_unasked() {
    let site = Site::sqlite();
    site.init().await;
    fs::write(site.path("backup"), "precious").unwrap();
    let error = site.backup("backup").await.unwrap_err().to_string();
    assert!(error.contains("--force"), "{error}");
    assert_eq!(fs::read(site.path("backup")).unwrap(), b"precious");
    let path = site.path("backup");
    let output = site.run(&["backup", "--force", "--without-ca", "--output", path.to_str().unwrap()]);
    assert!(output.status.success(), "{output:?}");
    assert!(String::from_utf8(output.stdout).unwrap().contains("left out"));

    // Without a CA to put into it, it says so.
    fs::rename(site.path("data/ca.key"), site.path("elsewhere")).unwrap();
    let error = site.backup("other").await.unwrap_err().to_string();
    assert!(error.contains("ca.key") && error.contains("--without-ca"), "{error}");
    assert!(!site.path("other").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_is_not_empty_is_left_alone() {
    let Some(etcd) = Etcd::start() else { return };
    let origin = Site::sqlite();
    origin.init().await;
    origin.backup("backup").await.unwrap();
    let backup = origin.path("backup");
    for kind in [Sqlite, InEtcd] {
        let site = Site::new(kind, &etcd);
        site.init().await;
        let before = everything(&site, kind).await;
        // Its CA is another.
        let error = site.restore(&backup).await.unwrap_err().to_string();
        assert!(error.contains("ca.crt is not what the backup holds"), "{error}");
        let error = site.fails(&["restore", backup.to_str().unwrap(), "--without-ca"]);
        assert!(
            error.contains(&site.place()) && error.contains("is not empty; nothing was changed"),
            "{error}"
        );
        assert!(everything(&site, kind).await == before);
    }
    // One key of anybody's is enough.
    let site = Site::new(InEtcd, &etcd);
    site.open(InEtcd).txn(Txn::new().put("somebody's", "")).await.unwrap();
    let error = site.restore(&backup).await.unwrap_err().to_string();
    assert!(error.contains("is not empty"), "{error}");
    assert!(!site.path("data").exists());
    assert_eq!(everything(&site, InEtcd).await.len(), 1);
    // Nor are files changed under a registrar that runs.
    let site = Site::new(InEtcd, &etcd);
    std::fs::create_dir(site.path("data")).unwrap();
    let runs = muster_common::file::lock(&site.path("data")).unwrap();
    let error = site.restore(&backup).await.unwrap_err().to_string();
    assert!(error.contains("a registrar may be running in") && error.contains("stop it first"), "{error}");
    assert!(!site.path("data/ca.crt").exists());
    drop(runs);
    site.restore(&backup).await.unwrap();
    // A database that a registrar has open is not one's own.
    let site = Site::sqlite();
    site.init().await;
    let _open = site.open(Sqlite);
    let error = site.fails(&["restore", backup.to_str().unwrap(), "--without-ca"]);
    assert!(error.contains("in use by another process"), "{error}");
    let error = site.fails(&["migrate", "--from", "sqlite", "--to", "etcd"]);
    assert!(error.contains("in use by another process"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_is_not_whole_is_neither_served_nor_copied_nor_initialised() {
    let Some(etcd) = Etcd::start() else { return };
    let site = Site::new(InEtcd, &etcd);
    let restoring = Restoring { source: "the backup of yesterday".into(), ..Restoring::default() };
    let txn = Txn::new().put(keys::restoring(), restoring.encode_to_vec()).put("devices/a", "");
    site.open(InEtcd).txn(txn).await.unwrap();
    let before = everything(&site, InEtcd).await;
    let error = site.fails(&["serve"]);
    assert!(error.contains("incomplete") && error.contains("the backup of yesterday"), "{error}");
    for arguments in [
        &["backup", "--without-ca", "--output", site.path("backup").to_str().unwrap()][..],
        &["migrate", "--from", "etcd", "--to", "sqlite"],
    ] {
        let error = site.fails(arguments);
        assert!(error.contains("incomplete") && error.contains("the backup of yesterday"), "{error}");
    }
    let refused = init::init(site.options(), muster_common::time::Timestamp::now()).await.unwrap_err();
    assert!(matches!(refused, init::InitError::StoreInUse(_)), "{refused}");
    let origin = Site::sqlite();
    origin.init().await;
    origin.backup("backup").await.unwrap();
    let error = site.restore(&origin.path("backup")).await.unwrap_err().to_string();
    assert!(error.contains("the backup of yesterday") && error.contains("nothing was changed"), "{error}");
    assert!(everything(&site, InEtcd).await == before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_needs_a_source_that_rests() {
    let Some(etcd) = Etcd::start() else { return };
    let site = Site::new(InEtcd, &etcd);
    let error = site.migrate(InEtcd, Sqlite).await.unwrap_err().to_string();
    assert!(error.contains("holds no Muster deployment"), "{error}");
    let error = site.migrate(InEtcd, InEtcd).await.unwrap_err().to_string();
    assert!(error.contains("both etcd"), "{error}");
    site.init().await;
    site.fill(10).await;
    let error = site.migrate(InEtcd, Sqlite).await.unwrap_err().to_string();
    assert!(error.contains("1 registrar(s) run") && error.contains("--force"), "{error}");
    assert!(!site.path("data/registry.db").exists());
    let output = site.run(&["migrate", "--from", "etcd", "--to", "sqlite", "--force"]);
    assert!(output.status.success(), "{output:?}");
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(printed.contains("kind = \"sqlite\"") && printed.contains("--undo"), "{printed}");
}
