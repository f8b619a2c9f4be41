//! What holds for every store.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use muster_registrar::store::{
    Condition, Event, KeyRange, KeyValue, LIFETIME, MAX_KEY, MAX_TXN_BYTES, MAX_TXN_OPS, Revision, Store,
    StoreError, Txn, TxnOutcome, WatchBatch, WatchStream,
};

use crate::harness::Harness;

/// Nothing here depends on time; this only ends a test that hangs.
const PATIENCE: Duration = Duration::from_secs(60);

async fn commit(store: &dyn Store, txn: Txn) -> Revision {
    match store.txn(txn).await.unwrap() {
        TxnOutcome::Committed(revision) => revision,
        TxnOutcome::Conflict => panic!("unexpected conflict"),
    }
}

async fn put(store: &dyn Store, key: &str, value: &str) -> Revision {
    commit(store, Txn::new().put(key.to_owned(), value.to_owned())).await
}

async fn delete(store: &dyn Store, key: &str) -> Revision {
    commit(store, Txn::new().delete(key.to_owned())).await
}

async fn value(store: &dyn Store, key: &str) -> Option<String> {
    let kv = store.get(Bytes::from(key.to_owned())).await.unwrap()?;
    Some(String::from_utf8(kv.value.to_vec()).unwrap())
}

fn key(key: &str) -> Bytes {
    Bytes::from(key.to_owned())
}

fn keys(kvs: &[KeyValue]) -> Vec<&str> {
    kvs.iter().map(|kv| std::str::from_utf8(&kv.key).unwrap()).collect()
}

/// The next batch with events.
async fn next(watch: &mut WatchStream) -> Result<WatchBatch, StoreError> {
    loop {
        let batch = tokio::time::timeout(PATIENCE, watch.next()).await.expect("the watch hangs");
        match batch.expect("the watch has ended") {
            Ok(batch) if batch.events.is_empty() => {}
            other => return other,
        }
    }
}

/// `+key=value` or `-key` for each event.
fn told(batch: &WatchBatch) -> Vec<String> {
    let text = |bytes: &Bytes| String::from_utf8(bytes.to_vec()).unwrap();
    let tell = |event: &Event| match event {
        Event::Put(kv) => {
            assert_eq!(kv.mod_revision, batch.revision);
            format!("+{}={}", text(&kv.key), text(&kv.value))
        }
        Event::Delete { key } => format!("-{}", text(key)),
    };
    batch.events.iter().map(tell).collect()
}

pub(crate) async fn transactions_apply_all_or_nothing(mut harness: Harness) {
    let store = harness.open().await;
    let first = commit(&*store, Txn::new().put("a", "1").put("b", "2")).await;
    let a = store.get(key("a")).await.unwrap().unwrap();
    assert_eq!(a, KeyValue { key: key("a"), value: key("1"), create_revision: first, mod_revision: first });

    let second = commit(&*store, Txn::new().put("a", "3").delete("b").put("c", "")).await;
    let a = store.get(key("a")).await.unwrap().unwrap();
    assert_eq!((a.create_revision, a.mod_revision), (first, second));
    assert_eq!(value(&*store, "b").await, None);
    assert_eq!(value(&*store, "c").await.as_deref(), Some(""), "an empty value is a value");

    let refused = Txn::new().when(Condition::Exists(key("b"))).put("a", "4").delete("c");
    assert_eq!(store.txn(refused).await.unwrap(), TxnOutcome::Conflict);
    assert_eq!(value(&*store, "a").await.as_deref(), Some("3"));
    assert_eq!(store.revision().await.unwrap(), second);

    let again = put(&*store, "b", "5").await;
    let b = store.get(key("b")).await.unwrap().unwrap();
    assert_eq!((b.create_revision, b.mod_revision), (again, again), "created anew after the deletion");

    let store = harness.restart(store).await;
    assert_eq!(store.get(key("b")).await.unwrap(), Some(b));
    assert_eq!(store.revision().await.unwrap(), again);
}

pub(crate) async fn conditions_judge_the_state_before(mut harness: Harness) {
    let store = harness.open().await;
    let one = put(&*store, "a", "1").await;
    let two = put(&*store, "a", "2").await;
    let cases = [
        (Condition::Absent(key("a")), false),
        (Condition::Absent(key("x")), true),
        (Condition::Exists(key("a")), true),
        (Condition::Exists(key("x")), false),
        (Condition::ModRevision(key("a"), one), false),
        (Condition::ModRevision(key("a"), two), true),
        (Condition::ModRevision(key("a"), two + 1), false),
        (Condition::ModRevision(key("a"), 0), false),
        (Condition::ModRevision(key("x"), 0), true),
        (Condition::ModRevision(key("x"), two), false),
    ];
    for (condition, holds) in &cases {
        let outcome = store.txn(Txn::new().when(condition.clone())).await.unwrap();
        assert_eq!(outcome == TxnOutcome::Committed(two), *holds, "{condition:?}");
    }
    // One that fails is enough.
    let both = Txn::new().when(cases[1].0.clone()).when(cases[0].0.clone()).put("a", "3");
    assert_eq!(store.txn(both).await.unwrap(), TxnOutcome::Conflict);
    // Conditions see nothing of the transaction's own changes.
    commit(&*store, Txn::new().when(Condition::Absent(key("new"))).put("new", "1")).await;
    commit(&*store, Txn::new().when(Condition::Exists(key("new"))).delete("new")).await;
}

pub(crate) async fn invalid_transactions_are_refused(mut harness: Harness) {
    let store = harness.open().await;
    let before = store.revision().await.unwrap();
    let many = |count: usize| (0..count).fold(Txn::new(), |txn, at| txn.put(format!("k{at}"), "v"));
    let invalid = [
        Txn::new().put("a", "1").put("a", "2"),
        Txn::new().put("a", "1").delete("a"),
        Txn::new().put("", "1"),
        Txn::new().delete(vec![b'k'; MAX_KEY + 1]),
        Txn::new().when(Condition::Absent(Bytes::new())),
        Txn::new().put("a", vec![0; MAX_TXN_BYTES]),
        many(MAX_TXN_OPS + 1),
    ];
    for txn in invalid {
        assert!(matches!(store.txn(txn).await, Err(StoreError::Invalid(_))));
    }
    assert_eq!(store.revision().await.unwrap(), before);
    commit(&*store, many(MAX_TXN_OPS)).await;
    commit(&*store, Txn::new().put(vec![b'k'; MAX_KEY], "v")).await;
}

pub(crate) async fn revisions_count_up_by_one_for_each_change(mut harness: Harness) {
    let store = harness.open().await;
    assert_eq!(store.revision().await.unwrap(), 1, "an empty store");
    for expected in 2..6 {
        assert_eq!(put(&*store, "a", "same").await, expected);
    }
    // What changes nothing has no revision of its own.
    assert_eq!(delete(&*store, "absent").await, 5);
    assert_eq!(commit(&*store, Txn::new()).await, 5);
    let store = harness.restart(store).await;
    assert_eq!(store.revision().await.unwrap(), 5);
    assert_eq!(delete(&*store, "a").await, 6);
    let store = harness.restart(store).await;
    assert_eq!(put(&*store, "b", "").await, 7);
}

pub(crate) async fn ranges_end_where_they_should(mut harness: Harness) {
    let store = harness.open().await;
    for name in ["a", "a/", "a/1", "a/2", "a0", "b", "b/1"] {
        put(&*store, name, name).await;
    }
    commit(&*store, Txn::new().put(vec![0xff], "f").put(vec![0xff, 0xff], "ff").put(vec![0], "0")).await;
    let all = async |range: KeyRange| store.range_all(range).await.unwrap().0;
    assert_eq!(keys(&all(KeyRange::prefix("a/")).await), ["a/", "a/1", "a/2"]);
    assert_eq!(keys(&all(KeyRange::key("a")).await), ["a"]);
    assert_eq!(keys(&all(KeyRange { start: key("a/2"), end: Some(key("b/")) }).await), ["a/2", "a0", "b"]);
    assert_eq!(all(KeyRange::prefix(vec![0xff])).await.len(), 2);
    assert_eq!(all(KeyRange::prefix(vec![0xff, 0xff])).await.len(), 1);
    assert_eq!(all(KeyRange::all()).await.len(), 10);
    assert_eq!(all(KeyRange::prefix("")).await.len(), 10);
    assert_eq!(all(KeyRange::prefix("c")).await, []);
    assert_eq!(all(KeyRange { start: key("b"), end: Some(key("a")) }).await, []);
    assert_eq!(all(KeyRange { start: key("b"), end: Some(key("b")) }).await, []);
    assert_eq!(keys(&all(KeyRange::prefix("a").after(b"a/1")).await), ["a/2", "a0"]);

    let page = store.range(KeyRange::prefix("a"), None, 5).await.unwrap();
    assert_eq!((page.kvs.len(), page.more), (5, false));
    let page = store.range(KeyRange::prefix("a"), None, 4).await.unwrap();
    assert_eq!((page.kvs.len(), page.more), (4, true));
    let zero = store.range(KeyRange::all(), None, 0).await;
    assert!(matches!(zero, Err(StoreError::Invalid(_))));
}

pub(crate) async fn pages_show_one_revision(mut harness: Harness) {
    let store = harness.open().await;
    for at in 0..25 {
        put(&*store, &format!("k/{at:02}"), "old").await;
    }
    delete(&*store, "k/03").await;
    put(&*store, "k/03", "again").await;
    put(&*store, "other", "x").await;
    let range = KeyRange::prefix("k/");
    let (expected, revision) = store.range_all(range.clone()).await.unwrap();
    assert_eq!(expected.len(), 25);

    let mut seen = Vec::new();
    let mut rest = range.clone();
    loop {
        let page = store.range(rest.clone(), Some(revision), 4).await.unwrap();
        assert_eq!(page.revision, revision);
        seen.extend(page.kvs);
        if !page.more {
            break;
        }
        // Between two pages keys change, go, and come: also before and after where the reader is.
        let at = seen.len();
        put(&*store, &format!("k/{:02}", at + 2), "new").await;
        delete(&*store, &format!("k/{:02}", at + 1)).await;
        put(&*store, &format!("k/{:02}", at + 1), "anew").await;
        delete(&*store, &format!("k/{:02}", at - 1)).await;
        put(&*store, &format!("k/{at:02}+"), "new").await;
        rest = range.after(&seen[at - 1].key);
    }
    assert_eq!(seen, expected);
    let store = harness.restart(store).await;
    let page = store.range(range.clone(), Some(revision), 100).await.unwrap();
    assert_eq!((page.kvs, page.revision, page.more), (expected, revision, false));

    let now = store.revision().await.unwrap();
    let future = store.range(range, Some(now + 1), 1).await;
    assert!(matches!(future, Err(StoreError::Invalid(_))), "{future:?}");

    let big = (0..1500).map(|at| format!("big/{at:04}")).collect::<Vec<_>>();
    for names in big.chunks(100) {
        commit(&*store, names.iter().fold(Txn::new(), |txn, name| txn.put(name.clone(), "v"))).await;
    }
    let (kvs, _) = store.range_all(KeyRange::prefix("big/")).await.unwrap();
    assert_eq!(keys(&kvs), big);
}

pub(crate) async fn a_watch_tells_the_past_and_the_future(mut harness: Harness) {
    let store = harness.open().await;
    let first = put(&*store, "w/a", "1").await;
    put(&*store, "elsewhere", "1").await;
    commit(&*store, Txn::new().put("w/c", "2").put("x", "2").put("w/b", "2").delete("w/a")).await;
    let mut past = store.watch(KeyRange::prefix("w/"), 1).await.unwrap();
    let mut later = store.watch(KeyRange::prefix("w/"), first + 1).await.unwrap();
    let mut all = store.watch(KeyRange::all(), first).await.unwrap();

    let batch = next(&mut past).await.unwrap();
    assert_eq!((batch.revision, told(&batch)), (first, vec!["+w/a=1".into()]));
    for watch in [&mut past, &mut later] {
        let batch = next(watch).await.unwrap();
        assert_eq!(batch.revision, first + 2);
        assert_eq!(
            told(&batch),
            ["+w/c=2", "+w/b=2", "-w/a"],
            "one revision, one batch, the order of the operations"
        );
    }
    assert_eq!(told(&next(&mut all).await.unwrap()), ["+w/a=1"]);
    assert_eq!(told(&next(&mut all).await.unwrap()), ["+elsewhere=1"]);
    assert_eq!(told(&next(&mut all).await.unwrap()), ["+w/c=2", "+x=2", "+w/b=2", "-w/a"]);

    put(&*store, "v", "outside").await;
    delete(&*store, "w/absent").await;
    let revision = delete(&*store, "w/b").await;
    for watch in [&mut past, &mut later] {
        let batch = next(watch).await.unwrap();
        assert_eq!((batch.revision, told(&batch)), (revision, vec!["-w/b".into()]));
    }
    // What a watch tells of a key is what a read tells of it.
    put(&*store, "w/c", "3").await;
    let batch = next(&mut past).await.unwrap();
    let Event::Put(kv) = &batch.events[0] else { panic!("{batch:?}") };
    assert_eq!(Some(kv), store.get(key("w/c")).await.unwrap().as_ref());
}

pub(crate) async fn a_watch_from_the_future_waits_for_it(mut harness: Harness) {
    let store = harness.open().await;
    let now = put(&*store, "a", "1").await;
    let mut watch = store.watch(KeyRange::all(), now + 3).await.unwrap();
    for at in 2..5 {
        put(&*store, "a", &at.to_string()).await;
    }
    let batch = next(&mut watch).await.unwrap();
    assert_eq!((batch.revision, told(&batch)), (now + 3, vec!["+a=4".into()]));
}

pub(crate) async fn a_watch_goes_on_across_a_restart(mut harness: Harness) {
    let store = harness.open().await;
    let mut watch = store.watch(KeyRange::prefix("k"), 1).await.unwrap();
    put(&*store, "k1", "1").await;
    let last = next(&mut watch).await.unwrap();
    put(&*store, "k2", "2").await;
    drop(watch);
    let store = harness.restart(store).await;
    let mut watch = store.watch(KeyRange::prefix("k"), last.revision + 1).await.unwrap();
    delete(&*store, "k1").await;
    assert_eq!(told(&next(&mut watch).await.unwrap()), ["+k2=2"]);
    assert_eq!(told(&next(&mut watch).await.unwrap()), ["-k1"]);
    let mut anew = store.watch(KeyRange::prefix("k"), 1).await.unwrap();
    assert_eq!(told(&next(&mut anew).await.unwrap()), ["+k1=1"]);
}

pub(crate) async fn compaction_forgets_history_and_nothing_else(mut harness: Harness) {
    let store = harness.open().await;
    put(&*store, "a", "1").await;
    put(&*store, "b", "1").await;
    let before = put(&*store, "a", "2").await;
    let gone = delete(&*store, "b").await;
    let after = put(&*store, "c", "1").await;
    // This watch has nothing of before the compaction to tell any more.
    let mut running = store.watch(KeyRange::all(), after).await.unwrap();
    assert_eq!(told(&next(&mut running).await.unwrap()), ["+c=1"]);

    assert!(matches!(store.compact(after + 1).await, Err(StoreError::Invalid(_))));
    store.compact(gone).await.unwrap();
    store.compact(gone).await.unwrap();
    store.compact(1).await.unwrap();
    let newest = put(&*store, "c", "2").await;
    assert_eq!(told(&next(&mut running).await.unwrap()), ["+c=2"]);
    drop(running);

    let mut store = store;
    for _ in 0..2 {
        // The state at the compaction can be read, and its future watched; nothing earlier.
        let page = store.range(KeyRange::all(), Some(gone), 10).await.unwrap();
        assert_eq!(keys(&page.kvs), ["a"]);
        let early = store.range(KeyRange::all(), Some(before), 10).await;
        assert!(matches!(early, Err(StoreError::Compacted { .. })), "{early:?}");
        let mut watch = store.watch(KeyRange::all(), gone + 1).await.unwrap();
        assert_eq!(told(&next(&mut watch).await.unwrap()), ["+c=1"]);
        for from in [1, before, gone] {
            // Some stores only find out on the way.
            let error = match store.watch(KeyRange::all(), from).await {
                Ok(mut watch) => next(&mut watch).await.unwrap_err(),
                Err(error) => error,
            };
            assert!(
                matches!(error, StoreError::Compacted { oldest } if oldest == gone + 1),
                "a watch from {from} after a compaction at {gone}: {error:?}"
            );
        }
        drop(watch);
        store = harness.restart(store).await;
    }
    assert_eq!(value(&*store, "a").await.as_deref(), Some("2"));
    assert_eq!(store.revision().await.unwrap(), newest);
    store.compact(newest).await.unwrap();
    let mut watch = store.watch(KeyRange::all(), newest + 1).await.unwrap();
    put(&*store, "d", "1").await;
    assert_eq!(told(&next(&mut watch).await.unwrap()), ["+d=1"]);
}

pub(crate) async fn concurrent_writers_are_watched_exactly_once_in_order(mut harness: Harness) {
    const WRITERS: usize = 16;
    // More commits than a live watch may fall behind by.
    const EACH: usize = 120;
    let store = harness.open().await;
    let mut early = store.watch(KeyRange::prefix("w/"), 1).await.unwrap();
    // Up to date, and then not asked until all is written: it must neither lose anything nor hold the writers up.
    let mut slow = store.watch(KeyRange::prefix("w/"), 1).await.unwrap();
    put(&*store, "w/first", "").await;
    for watch in [&mut early, &mut slow] {
        assert_eq!(told(&next(watch).await.unwrap()), ["+w/first="]);
    }
    let watching = tokio::spawn(async move {
        let mut batches = Vec::new();
        while batches.len() < WRITERS * EACH {
            batches.push(next(&mut early).await.unwrap());
        }
        batches
    });
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                let mut written = BTreeMap::new();
                for at in 0..EACH {
                    let name = format!("w/{writer}");
                    let revision = put(&*store, &name, &at.to_string()).await;
                    written.insert(revision, vec![format!("+{name}={at}")]);
                }
                written
            })
        })
        .collect();
    let mut written = BTreeMap::new();
    for writer in writers {
        for (revision, events) in writer.await.unwrap() {
            assert!(written.insert(revision, events).is_none(), "two transactions share revision {revision}");
        }
    }
    let mut late = store.watch(KeyRange::prefix("w/"), 1).await.unwrap();
    assert_eq!(told(&next(&mut late).await.unwrap()), ["+w/first="]);
    let mut seen = vec![watching.await.unwrap()];
    for watch in [&mut slow, &mut late] {
        let mut batches = Vec::new();
        while batches.len() < WRITERS * EACH {
            batches.push(next(watch).await.unwrap());
        }
        seen.push(batches);
    }
    for batches in seen {
        let batches: Vec<_> = batches.iter().map(|batch| (batch.revision, told(batch))).collect();
        assert_eq!(batches, written.clone().into_iter().collect::<Vec<_>>());
    }
}

pub(crate) async fn one_of_many_conditional_writers_wins(mut harness: Harness) {
    let store = harness.open().await;
    let mut revision = 0;
    for _ in 0..20 {
        let writers: Vec<_> = (0..16)
            .map(|writer| {
                let store = Arc::clone(&store);
                let txn =
                    Txn::new().when(Condition::ModRevision(key("k"), revision)).put("k", writer.to_string());
                tokio::spawn(async move { (writer, store.txn(txn).await.unwrap()) })
            })
            .collect();
        let mut winners = Vec::new();
        for writer in writers {
            if let (writer, TxnOutcome::Committed(at)) = writer.await.unwrap() {
                winners.push((writer, at));
            }
        }
        let [(winner, at)] = winners[..] else { panic!("not one winner: {winners:?}") };
        assert_eq!(value(&*store, "k").await, Some(winner.to_string()));
        revision = at;
    }
}

pub(crate) async fn large_values_pass_through_everything(mut harness: Harness) {
    const COUNT: usize = 12;
    let store = harness.open().await;
    let value = Bytes::from(vec![7; MAX_TXN_BYTES - 100]);
    for at in 0..COUNT {
        commit(&*store, Txn::new().put(format!("large/{at:02}"), value.clone())).await;
    }
    let (kvs, _) = store.range_all(KeyRange::prefix("large/")).await.unwrap();
    assert_eq!(kvs.len(), COUNT);
    assert!(kvs.iter().all(|kv| kv.value == value));
    let mut watch = store.watch(KeyRange::all(), 1).await.unwrap();
    let mut seen = BTreeSet::new();
    while seen.len() < COUNT {
        let batch = next(&mut watch).await.unwrap();
        let Event::Put(kv) = &batch.events[0] else { panic!("not a put") };
        assert_eq!(kv.value, value);
        assert!(seen.insert(kv.key.clone()));
    }
}

pub(crate) async fn an_announcement_lasts_as_long_as_it_is_held(mut harness: Harness) {
    let store = harness.open().await;
    let mut watch = store.watch(KeyRange::prefix("r/"), store.revision().await.unwrap() + 1).await.unwrap();
    let announcement = store.announce(key("r/a")).await.unwrap();
    assert_eq!(told(&next(&mut watch).await.unwrap()), ["+r/a="]);
    tokio::time::sleep(LIFETIME + Duration::from_secs(3)).await;
    assert_eq!(value(&*store, "r/a").await.as_deref(), Some(""));
    announcement.end().await;
    if !harness.is_shared() {
        assert_eq!(value(&*store, "r/a").await.as_deref(), Some(""), "the next one replaces it");
        return;
    }
    assert_eq!(told(&next(&mut watch).await.unwrap()), ["-r/a"]);
    // Dropped, which nothing waits for; and a second one meanwhile.
    drop(store.announce(key("r/b")).await.unwrap());
    assert_eq!(told(&next(&mut watch).await.unwrap()), ["+r/b="]);
    assert_eq!(told(&next(&mut watch).await.unwrap()), ["-r/b"]);
}
