//! A process that is killed in the midst of writing: what it had acknowledged is there, and nothing is torn.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::sync::Arc;

use futures_util::StreamExt;
use muster_registrar::store::sqlite::SqliteStore;
use muster_registrar::store::{Event, KeyRange, Store, Txn, TxnOutcome};
use tempfile::TempDir;

use crate::harness::{Killed, again};

/// Tells the test binary, started again, that it is the one to be killed.
const DATABASE: &str = "MUSTER_TEST_CRASH_DATABASE";
const WRITERS: usize = 32;

/// Not a test of its own: the process that gets killed. Prints what is acknowledged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_until_killed() {
    let Some(path) = std::env::var_os(DATABASE) else { return };
    let store = Arc::new(SqliteStore::open(Path::new(&path)).unwrap());
    let start = store.revision().await.unwrap();
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                for at in 0.. {
                    let (a, b) = (format!("a/{start}/{writer}/{at}"), format!("b/{start}/{writer}/{at}"));
                    let txn = Txn::new().put(a, format!("{writer}")).put(b, vec![b'v'; 300]);
                    let TxnOutcome::Committed(revision) = store.txn(txn).await.unwrap() else { return };
                    // One write, so that no line is torn by the others'.
                    let line = format!("ack {start}/{writer}/{at} {revision}\n");
                    std::io::stdout().lock().write_all(line.as_bytes()).unwrap();
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
}

#[tokio::test]
async fn what_was_acknowledged_before_a_kill_is_there() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("store.db");
    SqliteStore::create(&path).unwrap();
    let mut acknowledged: BTreeMap<u64, String> = BTreeMap::new();
    let mut last = 1;
    for round in 0..4 {
        let mut child = Killed(again("sqlite_crash::writes_until_killed", DATABASE, &path).spawn().unwrap());
        let mut lines = BufReader::new(child.0.stdout.take().unwrap()).lines();
        let mut seen = 0;
        for line in lines.by_ref() {
            let line = line.unwrap();
            seen += usize::from(note(&line, &mut acknowledged));
            if seen == 300 * (round + 1) {
                break;
            }
        }
        child.0.kill().unwrap();
        // What it could still print was acknowledged as well; the last line may be torn.
        for line in lines.map_while(Result::ok) {
            note(&line, &mut acknowledged);
        }
        assert_eq!(child.0.wait().unwrap().signal(), Some(9), "it ended before it was killed");
        last = verify(&path, &acknowledged, last).await;
    }
    assert!(acknowledged.len() >= 3000);
}

/// Takes down `ack NAME REVISION`; whether it was one.
fn note(line: &str, acknowledged: &mut BTreeMap<u64, String>) -> bool {
    let mut words = line.split_whitespace();
    let (Some("ack"), Some(name), Some(Ok(revision)), None) =
        (words.next(), words.next(), words.next().map(str::parse), words.next())
    else {
        return false;
    };
    assert!(acknowledged.insert(revision, name.into()).is_none(), "revision {revision} was given twice");
    true
}

/// Checks the database; returns its revision.
async fn verify(path: &Path, acknowledged: &BTreeMap<u64, String>, before: u64) -> u64 {
    let store = SqliteStore::open(path).unwrap();
    let revision = store.revision().await.unwrap();
    assert!(revision > before);
    assert!(acknowledged.last_key_value().is_some_and(|(last, _)| *last <= revision));

    let (kvs, at) = store.range_all(KeyRange::all()).await.unwrap();
    assert_eq!(at, revision);
    let state: BTreeMap<_, _> = kvs.into_iter().map(|kv| (kv.key.clone(), kv)).collect();
    for (revision, name) in acknowledged {
        for key in [format!("a/{name}"), format!("b/{name}")] {
            let kv =
                state.get(key.as_bytes()).unwrap_or_else(|| panic!("{key} was acknowledged but is gone"));
            assert_eq!(kv.mod_revision, *revision, "{key}");
        }
    }
    // No revision is missing, each holds its whole transaction, and the log makes the state.
    let mut watch = store.watch(KeyRange::all(), 2).await.unwrap();
    let mut replayed = BTreeSet::new();
    for expected in 2..=revision {
        let batch = watch.next().await.unwrap().unwrap();
        assert_eq!(batch.revision, expected);
        assert_eq!(batch.events.len(), 2);
        for event in batch.events {
            match event {
                Event::Put(kv) => assert!(replayed.insert(kv.key)),
                Event::Delete { key } => assert!(replayed.remove(&key)),
            }
        }
    }
    assert!(state.keys().eq(&replayed));
    // It counts on from where it was.
    let next = store.txn(Txn::new().put("a/after", "").put("b/after", "")).await.unwrap();
    assert_eq!(next, TxnOutcome::Committed(revision + 1));
    store.txn(Txn::new().delete("a/after").delete("b/after")).await.unwrap();
    revision + 2
}
