//! How many small durable transactions a second the stores take from concurrent callers.
//!
//! `cargo run --release -p muster-registrar --example store_bench -- [CALLERS] [SECONDS] [ETCD_URL]`
//!
//! Prints one tab-separated line a figure: figure, value, unit. Each transaction is a registration's worth: one
//! condition, and two keys of about 300 bytes.

#![expect(clippy::print_stdout, reason = "it is what a benchmark is for")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use muster_common::time::Instant;
use muster_registrar::store::etcd::{EtcdConfig, EtcdStore};
use muster_registrar::store::sqlite::SqliteStore;
use muster_registrar::store::{Condition, KeyRange, Store, Txn, TxnOutcome};

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let callers: usize = arguments.next().map_or(Ok(64), |text| text.parse()).context("CALLERS")?;
    let seconds: u64 = arguments.next().map_or(Ok(5), |text| text.parse()).context("SECONDS")?;
    let etcd = arguments.next();
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(bench(callers, Duration::from_secs(seconds), etcd))
}

async fn bench(callers: usize, time: Duration, etcd: Option<String>) -> anyhow::Result<()> {
    // Beside the build, not in /tmp, which may be in memory.
    let directory = tempfile::TempDir::new_in(std::env::current_exe()?.parent().context("no directory")?)?;
    let path = directory.path().join("store.db");
    SqliteStore::create(&path)?;
    let store = Arc::new(SqliteStore::open(&path)?);
    for round in 0..3 {
        let before = store.stats();
        let rate = load(Arc::clone(&store) as Arc<dyn Store>, callers, time, round).await?;
        let after = store.stats();
        let (txns, commits) = (after.txns - before.txns, after.commits - before.commits);
        println!("sqlite, {callers} callers\t{rate:.0}\ttxns/s");
        println!("sqlite, {callers} callers\t{:.4}\tfsyncs/txn", commits as f64 / txns as f64);
    }
    let start = Instant::now();
    let (kvs, _) = store.range_all(KeyRange::all()).await?;
    let took = Instant::now().saturating_duration_since(start).as_secs_f64();
    println!("sqlite, reading all {} keys\t{:.0}\tkeys/s", kvs.len(), kvs.len() as f64 / took);
    drop(store);

    let Some(url) = etcd else {
        println!("etcd\tmissing\tgive its URL as the third argument");
        return Ok(());
    };
    let store = EtcdStore::open(&EtcdConfig { endpoints: vec![url], ..EtcdConfig::default() })?;
    let rate = load(Arc::new(store), callers, time, 0).await?;
    println!("etcd, {callers} callers\t{rate:.0}\ttxns/s");
    Ok(())
}

/// Transactions per second.
async fn load(store: Arc<dyn Store>, callers: usize, time: Duration, round: usize) -> anyhow::Result<f64> {
    let stop = Arc::new(AtomicBool::new(false));
    let start = Instant::now();
    let writers: Vec<_> = (0..callers)
        .map(|caller| {
            let (store, stop) = (Arc::clone(&store), Arc::clone(&stop));
            tokio::spawn(async move {
                let mut done = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    let key = format!("device/{round}/{caller}/{done}");
                    let txn = Txn::new()
                        .when(Condition::Absent(key.clone().into()))
                        .put(key, vec![b'v'; 300])
                        .put(format!("address/{round}/{caller}/{done}"), vec![b'v'; 40]);
                    anyhow::ensure!(matches!(store.txn(txn).await?, TxnOutcome::Committed(_)));
                    done += 1;
                }
                Ok(done)
            })
        })
        .collect();
    tokio::time::sleep(time).await;
    stop.store(true, Ordering::Relaxed);
    let mut done = 0;
    for writer in writers {
        done += writer.await??;
    }
    Ok(done as f64 / Instant::now().saturating_duration_since(start).as_secs_f64())
}
