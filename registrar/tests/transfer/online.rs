//! A backup beside a writer shows exactly one revision.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use muster_registrar::config::StoreKind::{self, Etcd as InEtcd, Sqlite};
use muster_registrar::store::{Store, Txn, TxnOutcome};
use muster_registrar::transfer::format::{Decoder, Item};

use crate::site::{Etcd, Site};

/// Keys that each transaction sets all at once, spread over all pages.
const SET: usize = 60;

/// Sets all of them to the same number, again and again; returns the revisions of that.
async fn write(store: Arc<dyn Store>, stop: Arc<AtomicBool>) -> BTreeMap<u64, u64> {
    let mut written = BTreeMap::new();
    let mut number = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        let txn = (0..SET).fold(Txn::new(), |txn, key| {
            txn.put(format!("devices/filler/{:06}+", key * 50), number.to_string())
        });
        // One that comes and goes, so that it also shows whether keys are missed.
        let name = Bytes::from_static(b"devices/now-and-then");
        let txn = if number.is_multiple_of(2) { txn.put(name, "") } else { txn.delete(name) };
        match store.txn(txn).await.unwrap() {
            TxnOutcome::Committed(revision) => written.insert(revision, number),
            TxnOutcome::Conflict => panic!("there are no conditions"),
        };
    }
    written
}

fn read(file: &std::path::Path) -> BTreeMap<Bytes, Bytes> {
    let mut decoder = Decoder::default();
    decoder.feed(&std::fs::read(file).unwrap());
    let mut all = BTreeMap::new();
    while let Some(item) = decoder.item().unwrap() {
        if let Item::Key { key, value } = item {
            all.insert(key, value);
        }
    }
    decoder.finish().unwrap();
    all
}

async fn backups_while_written(site: &Site, kind: StoreKind) {
    site.init().await;
    site.fill(3000).await;
    let stop = Arc::new(AtomicBool::new(false));
    let store = site.open(kind);
    let writer = tokio::spawn(write(store.clone(), stop.clone()));
    let mut made = Vec::new();
    for number in 0..5 {
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        let name = format!("backup-{number}");
        made.push((site.backup(&name).await.unwrap().header.revision, read(&site.path(&name))));
    }
    // The command does the same from another process, which leaves the store's own locks alone.
    let output = site.run(&["backup", "--output", site.path("other").to_str().unwrap(), "-o", "json"]);
    assert!(output.status.success(), "{output:?}");
    let told: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    made.push((told["revision"].as_u64().unwrap(), read(&site.path("other"))));
    stop.store(true, Ordering::Relaxed);
    let written = writer.await.unwrap();
    drop(store);

    let mut seen = std::collections::BTreeSet::new();
    for (revision, contents) in made {
        // Whose revisions are not all the writer's, with etcd: what counts is the last one before.
        let number = written.range(..=revision).next_back().map(|(_, number)| *number).unwrap();
        let values: Vec<&Bytes> =
            contents.iter().filter(|(key, _)| key.ends_with(b"+")).map(|(_, value)| value).collect();
        assert_eq!(values.len(), SET);
        assert!(
            values.iter().all(|value| ***value == *number.to_string().as_bytes()),
            "{revision}: {number}"
        );
        let is_there = contents.contains_key(&b"devices/now-and-then"[..]);
        assert_eq!(is_there, number.is_multiple_of(2));
        seen.insert(number);
    }
    assert!(seen.len() > 3, "the writer hardly wrote: {seen:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_beside_a_writer_shows_one_revision_of_sqlite() {
    let site = Site::sqlite();
    backups_while_written(&site, Sqlite).await;
    // Nothing is left of the snapshots, and the store is as sound as before.
    site.open(Sqlite);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_beside_a_writer_shows_one_revision_of_etcd() {
    let Some(etcd) = Etcd::start() else { return };
    backups_while_written(&Site::new(InEtcd, &etcd), InEtcd).await;
}
