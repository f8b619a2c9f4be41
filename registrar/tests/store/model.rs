//! Random histories: sqlite does what the model does, also when opened again in between.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt;
use muster_registrar::store::memory::Model;
use muster_registrar::store::sqlite::SqliteStore;
use muster_registrar::store::{Condition, KeyRange, Op, Revision, Store, StoreError, Txn, WatchBatch};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    Txn(Txn),
    /// Read `range`, as many revisions back, with this limit.
    Range(KeyRange, Revision, usize),
    /// Take the history of `range`, from as many revisions back.
    Watch(KeyRange, Revision),
    /// Compact up to as many revisions back.
    Compact(Revision),
    Reopen,
}

fn any_key() -> impl Strategy<Value = Bytes> {
    prop::sample::select(vec!["a", "a/1", "a/2", "b", "b/1", "c"])
        .prop_map(|key| Bytes::from_static(key.as_bytes()))
}

fn any_range() -> impl Strategy<Value = KeyRange> {
    prop_oneof![
        Just(KeyRange::all()),
        any_key().prop_map(KeyRange::key),
        any_key().prop_map(KeyRange::prefix),
        (any_key(), any_key()).prop_map(|(start, end)| KeyRange { start, end: Some(end) }),
    ]
}

fn any_txn() -> impl Strategy<Value = Txn> {
    let condition = prop_oneof![
        any_key().prop_map(Condition::Absent),
        any_key().prop_map(Condition::Exists),
        (any_key(), 0..12u64).prop_map(|(key, revision)| Condition::ModRevision(key, revision)),
    ];
    let op = prop_oneof![
        3 => (any_key(), "[a-z]{0,3}").prop_map(|(key, value)| Op::Put { key, value: value.into() }),
        1 => any_key().prop_map(|key| Op::Delete { key }),
    ];
    (prop::collection::vec(condition, 0..2), prop::collection::vec(op, 0..4))
        .prop_map(|(conditions, ops)| Txn { conditions, ops })
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => any_txn().prop_map(Step::Txn),
        4 => (any_range(), 0..8u64, 0..5usize).prop_map(|(range, back, limit)| Step::Range(range, back, limit)),
        2 => (any_range(), 0..8u64).prop_map(|(range, back)| Step::Watch(range, back)),
        1 => (0..6u64).prop_map(Step::Compact),
        1 => Just(Step::Reopen),
    ]
}

/// Everything that a watch tells up to `through`.
async fn history(
    store: &dyn Store,
    range: KeyRange,
    from: Revision,
    through: Revision,
) -> Result<Vec<WatchBatch>, StoreError> {
    let mut watch = store.watch(range, from).await?;
    let mut batches = Vec::new();
    if from > through {
        return Ok(batches);
    }
    while let Some(batch) = watch.next().await {
        let batch = batch?;
        let done = batch.revision >= through;
        if !batch.events.is_empty() {
            batches.push(batch);
        }
        if done {
            break;
        }
    }
    Ok(batches)
}

/// Results as text: errors do not compare.
fn shown<T: std::fmt::Debug>(result: Result<T, StoreError>) -> String {
    format!("{result:?}")
}

async fn agree(steps: Vec<Step>) -> Result<(), TestCaseError> {
    let directory = tempfile::TempDir::new().unwrap();
    let path = directory.path().join("store.db");
    SqliteStore::create(&path).unwrap();
    let mut store = Arc::new(SqliteStore::open(&path).unwrap());
    let mut model = Model::new();
    for step in steps {
        let now = model.revision();
        match step {
            Step::Txn(txn) => prop_assert_eq!(shown(store.txn(txn.clone()).await), shown(model.txn(&txn))),
            Step::Range(range, back, limit) => {
                let at = (back > 0).then(|| (now + 1).saturating_sub(back - 1));
                let expected = model.range(&range, at, limit);
                prop_assert_eq!(shown(store.range(range, at, limit).await), shown(expected));
            }
            Step::Watch(range, back) => {
                let from = (now + 1).saturating_sub(back);
                let expected = model.changes(&range, from, usize::MAX).map(|changes| changes.batches);
                prop_assert_eq!(shown(history(&*store, range, from, now).await), shown(expected));
            }
            Step::Compact(back) => {
                let up_to = (now + 1).saturating_sub(back);
                prop_assert_eq!(shown(store.compact(up_to).await), shown(model.compact(up_to)));
            }
            Step::Reopen => {
                drop(store);
                store = Arc::new(SqliteStore::open(&path).unwrap());
            }
        }
        prop_assert_eq!(store.revision().await.unwrap(), model.revision());
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn sqlite_agrees_with_the_model(steps in prop::collection::vec(any_step(), 1..40)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(agree(steps))?;
    }
}
