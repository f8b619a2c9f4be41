//! Three members of etcd, one of which is cut off from the others while its clients still reach it: the store never gives
//! a stale answer, its watch goes on elsewhere, and nothing is missing or told twice.
#![allow(
    clippy::expect_used,
    clippy::print_stderr,
    reason = "a test fails by panicking, and says what it measures"
)]

use std::time::Duration;

use bytes::Bytes;
use muster_integration_tests::{
    Host, Lab, Result, expect, failed, is_missing,
    process::{Process, wait_for},
    run_on, scenario,
};
use muster_registrar::store::{
    KeyRange, Revision, Store as _, StoreError, Txn, TxnOutcome, WatchStream,
    etcd::{EtcdConfig, EtcdStore},
};
use tokio::time::{Instant, timeout};
use tokio_stream::StreamExt as _;

/// What tasks on a host end with.
type Outcome<T = ()> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

const MEMBERS: [&str; 3] = ["198.51.100.1", "198.51.100.2", "198.51.100.3"];
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a request may take, whatever happens: 5 s, and some for a busy machine.
const BOUND: Duration = Duration::from_secs(8);
const WRITES: usize = 20;

#[test]
fn a_member_that_is_cut_off_from_the_others_is_left() {
    scenario("etcd partition", |lab| {
        let registrar = lab.host("registrar")?;
        if is_missing(&registrar, "etcd", "etcd-server")? {
            return Ok(());
        }
        run(lab, &registrar)
    });
}

fn run(lab: &Lab, registrar: &Host) -> Result {
    let switch = lab.switch("core")?;
    switch.plug(registrar, &["198.51.100.11/24"])?;
    let mut members = Vec::new();
    for (n, address) in MEMBERS.into_iter().enumerate() {
        let host = lab.host(&format!("e{n}"))?;
        switch.plug(&host, &[&format!("{address}/24")])?;
        let process = start(&host, n)?;
        members.push((host, process));
    }
    wait_for("etcd", PATIENCE, || leader(registrar).ok_or_else(|| "no leader yet".into()))?;
    let runtime = registrar.runtime()?;
    for round in ["leader", "follower"] {
        let leads = wait_for("a leader", PATIENCE, || leader(registrar).ok_or_else(|| "none".into()))?;
        let apart = if round == "leader" { leads } else { (leads + 1) % MEMBERS.len() };
        let (before, watch) = run_on(&runtime, watch(apart))?;
        members[apart].0.sh(&cut(apart))?;
        let tested = run_on(&runtime, while_apart(round, apart, before, watch));
        members[apart].0.sh("nft delete table inet apart")?;
        tested?;
        run_on(&runtime, together(round, apart))?;
    }
    Ok(())
}

fn start(host: &Host, n: usize) -> Result<Process> {
    let url = |n: usize, port: u16| format!("http://{}:{port}", MEMBERS[n]);
    let all: Vec<_> = (0..MEMBERS.len()).map(|n| format!("e{n}={}", url(n, 2380))).collect();
    let mut command = host.command("etcd");
    command.args(["--name", &format!("e{n}"), "--log-level", "error", "--initial-cluster", &all.join(",")]);
    command.arg("--data-dir").arg(host.directory().join("etcd"));
    command.args(["--listen-client-urls", &url(n, 2379), "--advertise-client-urls", &url(n, 2379)]);
    command.args(["--listen-peer-urls", &url(n, 2380), "--initial-advertise-peer-urls", &url(n, 2380)]);
    host.spawn("etcd", command)
}

/// The member that leads.
fn leader(registrar: &Host) -> Option<usize> {
    (0..MEMBERS.len()).find(|n| {
        let ask =
            format!("curl -s -m 2 http://{}:2379/metrics | grep '^etcd_server_is_leader 1'", MEMBERS[*n]);
        registrar.sh(&ask).is_ok()
    })
}

/// What has a member, in its namespace, exchange nothing with the others.
fn cut(apart: usize) -> String {
    let others: Vec<_> = MEMBERS.into_iter().filter(|member| *member != MEMBERS[apart]).collect();
    let others = others.join(", ");
    format!(
        "nft 'table inet apart {{ \
         chain in {{ type filter hook input priority 0; ip saddr {{ {others} }} drop; }}; \
         chain out {{ type filter hook output priority 0; ip daddr {{ {others} }} drop; }}; }}'"
    )
}

/// A store that uses these members, in this order.
fn store(members: &[usize]) -> EtcdStore {
    let endpoints = members.iter().map(|n| format!("http://{}:2379", MEMBERS[*n])).collect();
    EtcdStore::open(&EtcdConfig { endpoints, ..EtcdConfig::default() }).expect("the settings are good")
}

fn others(apart: usize) -> [usize; 2] {
    [(apart + 1) % MEMBERS.len(), (apart + 2) % MEMBERS.len()]
}

/// A watch at the member that is going to be alone.
async fn watch(apart: usize) -> Outcome<(Revision, WatchStream)> {
    let [next, last] = others(apart);
    let store = store(&[apart, next, last]);
    let revision = store.revision().await?;
    Ok((revision, store.watch(KeyRange::prefix("k"), revision + 1).await?))
}

async fn while_apart(round: &'static str, apart: usize, before: Revision, mut watch: WatchStream) -> Outcome {
    let begin = Instant::now();
    let [next, last] = others(apart);
    let writer = store(&[next, last]);
    let follow = tokio::spawn(async move {
        let mut told = Vec::new();
        let mut previous = before;
        while told.len() < WRITES {
            let Ok(Some(Ok(batch))) = timeout(PATIENCE, watch.next()).await else { break };
            let in_order = batch.revision > previous;
            previous = batch.revision;
            told.extend(batch.events.iter().map(|_| (batch.revision, in_order)));
            if told.len() == batch.events.len() && !told.is_empty() {
                eprintln!("measured: first told by the watch: {:.2} s", begin.elapsed().as_secs_f64());
            }
        }
        told
    });
    store(&[apart, next, last]).revision().await?;
    eprintln!("measured: read, {round} just cut off: {:.2} s", begin.elapsed().as_secs_f64());
    // What is asked of a member just then may be lost on its way to the old leader.
    while let Err(error) = writer.txn(Txn::new().put("ready", "")).await {
        expect(begin.elapsed() < PATIENCE, "the others choose a leader", &error.to_string())?;
    }
    let mut written = Vec::new();
    for n in 0..WRITES {
        let value = format!("{round}/{n}");
        while written.len() == n {
            // Each has another value, and so may be made again: it is counted by its revision.
            match writer.txn(Txn::new().put("k", value.clone())).await {
                Ok(TxnOutcome::Committed(revision)) => written.push(revision),
                Ok(TxnOutcome::Conflict) => {}
                Err(StoreError::Unavailable(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let asked = Instant::now();
        let read = store(&[apart, next, last]).get(Bytes::from_static(b"k")).await?;
        let read = read.map(|kv| String::from_utf8_lossy(&kv.value).into_owned());
        expect(
            read.as_deref() == Some(&value),
            "what is read is what was written last",
            &format!("{read:?}"),
        )?;
        if n < 2 {
            eprintln!("measured: read, {round} cut off: {:.2} s", asked.elapsed().as_secs_f64());
        }
        expect(asked.elapsed() < Duration::from_secs(5), "soon", &format!("{:?}", asked.elapsed()))?;
    }
    let asked = Instant::now();
    let alone = store(&[apart]);
    let error = alone.get(Bytes::from_static(b"k")).await.map(|found| format!("{found:?}"));
    let error = error.unwrap_or_else(|error| error.to_string());
    expect(error.contains("has no leader"), "the one that is alone answers nothing", &error)?;
    let error = alone.txn(Txn::new().put("k", "alone")).await.map_err(|error| error.to_string());
    let refused = error.as_ref().is_err_and(|error| error.contains("has no leader"));
    expect(refused, "and writes nothing", &format!("{error:?}"))?;
    expect(asked.elapsed() < BOUND * 2, "in bounded time", &format!("{:?}", asked.elapsed()))?;

    let told = follow.await.map_err(|error| failed("the watch", error))?;
    let all: Vec<_> = written.into_iter().map(|revision| (revision, true)).collect();
    expect(told == all, "each revision is told once, in order", &format!("{told:?}, not {all:?}"))?;
    Ok(())
}

/// After the cut is mended, the member that was alone knows what the others do.
async fn together(round: &'static str, apart: usize) -> Outcome {
    let begin = Instant::now();
    loop {
        match store(&[apart]).get(Bytes::from_static(b"k")).await {
            Ok(found) => {
                let value = found.map(|kv| String::from_utf8_lossy(&kv.value).into_owned());
                let last = format!("{round}/{}", WRITES - 1);
                expect(value.as_deref() == Some(&last), "it has the last value", &format!("{value:?}"))?;
                return Ok(());
            }
            Err(error) if begin.elapsed() > PATIENCE => return Err(error.into()),
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}
