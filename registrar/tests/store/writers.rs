//! Writers that write while etcd is hurt, and what must be true of their watch afterwards.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use muster_registrar::store::etcd::EtcdStore;
use muster_registrar::store::{KeyRange, Revision, Store, StoreError, Txn, TxnOutcome, WatchStream};
use tokio::task::JoinHandle;

/// How long a watch may take to tell something, and the last write to succeed.
const PATIENCE: Duration = Duration::from_secs(60);

/// Eight of them, each with keys of its own under `w/`.
pub(crate) struct Writers {
    store: Arc<EtcdStore>,
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicUsize>,
    tasks: Vec<JoinHandle<Vec<(Revision, String)>>>,
}

impl Writers {
    pub(crate) fn start(store: &Arc<EtcdStore>) -> Self {
        let (stop, acknowledged) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let tasks = (0..8).map(|writer| {
            tokio::spawn(write(writer, Arc::clone(store), Arc::clone(&stop), Arc::clone(&acknowledged)))
        });
        Self { store: Arc::clone(store), tasks: tasks.collect(), stop, acknowledged }
    }

    /// Waits until some more have been acknowledged.
    pub(crate) async fn go_on(&self) {
        let enough = self.acknowledged.load(Ordering::Relaxed) + 50;
        let progress = async {
            while self.acknowledged.load(Ordering::Relaxed) < enough {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, progress).await.expect("nothing is written any more");
    }

    /// Stops them, and checks that what was acknowledged is there and that `watch`, of `w/` from the beginning,
    /// tells of all that is there, exactly once and in order.
    pub(crate) async fn finish(self, mut watch: WatchStream) {
        self.stop.store(true, Ordering::Relaxed);
        let mut acknowledged = BTreeMap::new();
        for task in self.tasks {
            acknowledged.extend(task.await.unwrap());
        }
        let last = last(&self.store).await;
        let mut told = BTreeMap::new();
        let mut previous = 0;
        while previous < last {
            let batch = tokio::time::timeout(PATIENCE, watch.next()).await.expect("the watch hangs");
            let batch = batch.unwrap().unwrap();
            assert!(batch.revision > previous, "{} after {previous}", batch.revision);
            previous = batch.revision;
            for event in batch.events {
                told.insert(previous, String::from_utf8(event.key().to_vec()).unwrap());
            }
        }
        let (kvs, _) = self.store.range_all(KeyRange::prefix("w/")).await.unwrap();
        assert!(kvs.iter().all(|kv| told.get(&kv.mod_revision).is_some_and(|key| key.as_bytes() == kv.key)));
        assert_eq!(kvs.len(), told.len(), "a key was written twice");
        for (revision, key) in acknowledged {
            assert_eq!(told.get(&revision), Some(&key));
        }
    }
}

async fn write(
    writer: usize,
    store: Arc<EtcdStore>,
    stop: Arc<AtomicBool>,
    count: Arc<AtomicUsize>,
) -> Vec<(Revision, String)> {
    let mut acknowledged = Vec::new();
    let mut at = 0;
    while !stop.load(Ordering::Relaxed) {
        let key = format!("w/{writer}/{at}");
        match store.txn(Txn::new().put(key.clone(), "v")).await {
            Ok(TxnOutcome::Committed(revision)) => {
                acknowledged.push((revision, key));
                count.fetch_add(1, Ordering::Relaxed);
            }
            Err(StoreError::Unknown(_)) => {}
            Err(StoreError::Unavailable(_)) => tokio::time::sleep(Duration::from_millis(20)).await,
            other => panic!("{other:?}"),
        }
        at += 1;
    }
    acknowledged
}

/// Writes a key after all others. Each attempt writes one of its own, so that none is written twice.
async fn last(store: &EtcdStore) -> Revision {
    let attempts = async {
        for attempt in 0.. {
            match store.txn(Txn::new().put(format!("w/last/{attempt}"), "")).await {
                Ok(TxnOutcome::Committed(revision)) => return revision,
                Ok(TxnOutcome::Conflict) | Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
        unreachable!()
    };
    tokio::time::timeout(PATIENCE, attempts).await.expect("nothing can be written any more")
}
