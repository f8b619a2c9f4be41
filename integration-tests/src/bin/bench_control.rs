//! `make bench-control`: what the control plane costs and how fast it is, real processes over mutual TLS.
//! Without arguments it makes the lab, starts the servers and reports; `load …` is the client, run inside.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a report is what this program is for")]

use std::{
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use muster_common::time::Instant;
use muster_integration_tests::{
    Host, Lab, LabError, Process, Result,
    device::{self, Device, register_request},
    figures::{Figures, median, quantile},
    muster::{JoinCommand, Registrar},
    process::wait_for,
};
use muster_proto::registration::{LookupRequest, lookup_request::By};
use muster_registrar::store::{
    Store, Txn,
    etcd::{EtcdConfig, EtcdStore},
};

const CALLERS: usize = 64;
/// Rounds of each measurement; medians are reported.
const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_secs(4);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match arguments.as_slice() {
        [] => bench().map_err(device::Error::from),
        ["load", what, rest @ ..] => load(what, rest),
        _ => Err("usage: bench-control [load register|join|lookup|put ARGUMENTS]".into()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-control: {error}");
            ExitCode::FAILURE
        }
    }
}

fn bench() -> Result {
    let lab = Lab::new()?;
    let mut figures = Figures::new("control");
    registrations(&lab, &mut figures)?;
    registrations_on_etcd(&lab, &mut figures)?;
    figures.write().map(drop)
}

/// Register and Enroll on sqlite, and what the disk does for them.
fn registrations(lab: &Lab, figures: &mut Figures) -> Result {
    let host = lab.host("sqlite")?;
    let mut registrar = Registrar::init(&host, "net.example", "127.0.0.1", "")?;
    registrar.serve()?;
    let join = registrar.new_join_command(&["--reusable"])?;
    let mut rates = Vec::new();
    let mut per_sync = Vec::new();
    for round in 0..ROUNDS {
        let before = syncs(&host)?;
        let done = run_load(&host, &["register", &round.to_string()], &join)?;
        let syncs = syncs(&host)? - before;
        rates.push(done / ROUND.as_secs_f64());
        per_sync.push(done / syncs.max(1.0));
    }
    let rate = median(&mut rates);
    figures.report("durable registrations, sqlite, 64 callers", rate, "calls/s");
    figures.report("registrations per fsync, sqlite", median(&mut per_sync), "calls");
    let mut joins = Vec::new();
    for round in 0..3 {
        joins.push(run_load(&host, &["join", &format!("j{round}-")], &join)? / ROUND.as_secs_f64());
    }
    figures.compare("full joins, sqlite, 64 callers", median(&mut joins), "joins/s", "registrations", rate);
    registrar.stop()
}

/// Register on etcd, beside bare puts to the same etcd.
fn registrations_on_etcd(lab: &Lab, figures: &mut Figures) -> Result {
    const FIGURE: &str = "durable registrations, etcd, 64 callers";
    let host = lab.host("etcd")?;
    if host.try_sh("command -v etcd")?.stdout.is_empty() {
        figures.missing(FIGURE, "etcd cannot be installed here");
        return Ok(());
    }
    let _etcd = start_etcd(&host)?;
    let store = "[store]\nkind = \"etcd\"\n[store.etcd]\nendpoints = [\"http://127.0.0.1:2379\"]\n";
    let mut registrar = Registrar::init(&host, "net.example", "127.0.0.1", store)?;
    registrar.serve()?;
    let join = registrar.new_join_command(&["--reusable"])?;
    let (mut rates, mut puts) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        rates.push(run_load(&host, &["register", &round.to_string()], &join)? / ROUND.as_secs_f64());
        puts.push(run_load(&host, &["put"], &join)? / ROUND.as_secs_f64());
    }
    figures.compare(FIGURE, median(&mut rates), "calls/s", "bare etcd puts, 64 clients", median(&mut puts));
    registrar.stop()
}

fn start_etcd(host: &Host) -> Result<Process> {
    let mut command = host.command("etcd");
    command.arg("--data-dir").arg(host.directory().join("etcd-data")).args(["--log-level", "error"]);
    let process = host.spawn("etcd", command)?;
    wait_for("etcd", Duration::from_secs(20), || {
        host.sh("curl -sf http://127.0.0.1:2379/health").map_err(|e| e.to_string())
    })?;
    Ok(process)
}

/// Commits of the registrar's sqlite store so far: each is one fsync of its log.
fn syncs(host: &Host) -> Result<f64> {
    let metrics = host.sh("curl -sf http://127.0.0.1:7580/metrics")?;
    let line = metrics.lines().find(|l| l.starts_with("muster_registrar_store_commits_total"));
    let value = line.and_then(|l| l.split_whitespace().next_back()).and_then(|v| v.parse().ok());
    value
        .ok_or_else(|| LabError::Command { command: "reading store commits".into(), reason: metrics.clone() })
}

/// Runs this program as the client on `host`; returns the number that it prints.
fn run_load(host: &Host, arguments: &[&str], join: &JoinCommand) -> Result<f64> {
    let own =
        std::env::current_exe().map_err(|source| LabError::File { path: "this program".into(), source })?;
    let mut command = host.command(own);
    command.arg("load").args(arguments).args(&join.0);
    let printed = muster_integration_tests::process::check(command)?;
    printed.trim().parse().map_err(|_| LabError::Command { command: "load".into(), reason: printed.clone() })
}

fn load(what: &str, rest: &[&str]) -> Result<(), device::Error> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let count = match (what, rest) {
        ("register", [round, join @ ..]) => {
            runtime.block_on(load_register(round.parse()?, &join_of(join)))?
        }
        ("join", [prefix, join @ ..]) => runtime.block_on(load_join(prefix, &join_of(join)))?,
        ("lookup", [names, join @ ..]) => {
            return runtime.block_on(load_lookup(names.parse()?, &join_of(join)));
        }
        ("put", _) => runtime.block_on(load_put())?,
        _ => return Err("unknown load".into()),
    };
    println!("{count}");
    Ok(())
}

fn join_of(arguments: &[&str]) -> JoinCommand {
    JoinCommand(arguments.iter().map(|a| (*a).to_owned()).collect())
}

/// Registrations of 64 devices, each with other endpoints than before, so that each is a durable write.
async fn load_register(round: usize, join: &JoinCommand) -> Result<u64, device::Error> {
    let mut clients = Vec::new();
    for caller in 0..CALLERS {
        let device = Device::join(join, &format!("r{round}-{caller}")).await?;
        clients.push(device.connect().await?);
    }
    let end = Instant::now() + ROUND;
    let mut tasks = Vec::new();
    for (caller, mut client) in clients.into_iter().enumerate() {
        tasks.push(tokio::spawn(async move {
            let key = (round * CALLERS + caller + 1) as u64;
            let mut done = 0_u64;
            while Instant::now() < end {
                let address = u32::try_from(done % 200_000).unwrap_or(0) + 1;
                client.register(register_request(key, address)).await?;
                done += 1;
            }
            Ok::<_, tonic::Status>(done)
        }));
    }
    sum(tasks).await
}

/// Joins of new devices, each with a fresh key and a certificate issued.
async fn load_join(prefix: &str, join: &JoinCommand) -> Result<u64, device::Error> {
    let end = Instant::now() + ROUND;
    let number = Arc::new(AtomicU64::new(0));
    let mut tasks = Vec::new();
    for _ in 0..CALLERS {
        let (number, join, prefix) = (Arc::clone(&number), join.clone(), prefix.to_owned());
        tasks.push(tokio::spawn(async move {
            let mut done = 0_u64;
            while Instant::now() < end {
                let name = format!("{prefix}{}", number.fetch_add(1, Ordering::Relaxed));
                Device::join(&join, &name).await.map_err(|e| tonic::Status::unknown(e.to_string()))?;
                done += 1;
            }
            Ok::<_, tonic::Status>(done)
        }));
    }
    sum(tasks).await
}

/// Lookups by name, one after another, of devices `d0` to `d<names - 1>`; prints p50 and p99 in microseconds.
async fn load_lookup(names: usize, join: &JoinCommand) -> Result<(), device::Error> {
    let device = Device::join(join, "looker").await?;
    let mut client = device.connect().await?;
    client.register(register_request(u64::MAX, 1)).await?;
    let mut samples = Vec::new();
    let end = Instant::now() + ROUND;
    let mut next = 0_usize;
    while Instant::now() < end {
        next = (next + 7919) % names;
        let start = Instant::now();
        client.lookup(LookupRequest { by: Some(By::Name(format!("d{next}"))) }).await?;
        samples.push(Instant::now() - start);
    }
    let micros = |d: Duration| d.as_secs_f64() * 1e6;
    println!("{:.0} {:.0}", micros(quantile(&mut samples, 0.5)), micros(quantile(&mut samples, 0.99)));
    Ok(())
}

/// Puts of 200 octets to the bare etcd, 64 clients.
async fn load_put() -> Result<u64, device::Error> {
    let mut clients = Vec::new();
    for _ in 0..CALLERS {
        clients.push(EtcdStore::open(&EtcdConfig { prefix: "bench/".into(), ..EtcdConfig::default() })?);
    }
    let end = Instant::now() + ROUND;
    let mut tasks = Vec::new();
    for (number, client) in clients.into_iter().enumerate() {
        tasks.push(tokio::spawn(async move {
            let mut done = 0_u64;
            while Instant::now() < end {
                let put = Txn::new().put(format!("{number}/{}", done % 1000), vec![7_u8; 200]);
                client.txn(put).await.map_err(|e| tonic::Status::unknown(e.to_string()))?;
                done += 1;
            }
            Ok::<_, tonic::Status>(done)
        }));
    }
    sum(tasks).await
}

async fn sum(tasks: Vec<tokio::task::JoinHandle<Result<u64, tonic::Status>>>) -> Result<u64, device::Error> {
    let mut total = 0;
    for task in tasks {
        total += task.await??;
    }
    Ok(total)
}
