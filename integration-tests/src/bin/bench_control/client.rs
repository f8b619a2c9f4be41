//! The callers of `bench-control`, as a process of their own on the registrar's host. Each prints its figures.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use muster_common::time::Instant;
use muster_integration_tests::{
    device::{Device, Error, register_request},
    figures::quantile,
    muster::JoinCommand,
};
use muster_proto::registration::{
    LookupRequest, lookup_request::By, registration_service_client::RegistrationServiceClient,
};
use muster_registrar::store::{
    Store, Txn, TxnOutcome,
    etcd::{EtcdConfig, EtcdStore},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinHandle,
};
use tonic::transport::Channel;

use crate::{CALLERS, ROUND, ROUNDS};

/// Where the registrar's metrics are.
const METRICS: &str = "127.0.0.1:7580";

type Client = RegistrationServiceClient<Channel>;

/// Runs the callers `what` with these arguments, which end with those of the join command.
pub(crate) fn run(what: &str, rest: &[&str]) -> Result<(), Error> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    match (what, rest) {
        ("register", [devices, join @ ..]) => {
            runtime.block_on(register(devices.parse()?, &join_of(join), false))
        }
        ("register-and-put", [devices, join @ ..]) => {
            runtime.block_on(register(devices.parse()?, &join_of(join), true))
        }
        ("join", join) => runtime.block_on(join_many(&join_of(join))),
        ("lookup", [callers, devices, join @ ..]) => {
            runtime.block_on(look_up(callers.parse()?, devices.parse()?, &join_of(join)))
        }
        _ => Err("unknown callers".into()),
    }
}

fn join_of(arguments: &[&str]) -> JoinCommand {
    JoinCommand(arguments.iter().map(|a| (*a).to_owned()).collect())
}

/// Registrations of devices that have a certificate and come to `devices` others, each with another endpoint than
/// before, so that each is a durable write. A line a round: seconds, registrations, transactions and commits of the
/// store, puts.
async fn register(devices: u64, join: &JoinCommand, put: bool) -> Result<(), Error> {
    for round in 0..ROUNDS as u64 {
        // Other devices in each round, since a device may not write as often as this for long.
        let mut clients = Vec::new();
        let first = (devices << 16) + round * CALLERS;
        for key in first + 1..=first + CALLERS {
            let mut client = Device::join(join, &format!("caller{key}")).await?.connect().await?;
            // Has the device take its key and addresses, and warms the connection.
            client.register(register_request(key, 0)).await?;
            clients.push((key, client));
        }
        let before = Counters::read().await?;
        let start = Instant::now();
        let count = register_for(ROUND, clients).await?;
        let seconds = (Instant::now() - start).as_secs_f64();
        let after = Counters::read().await?;
        let put_rate = if put { put_for(ROUND).await? / ROUND.as_secs_f64() } else { 0.0 };
        println!(
            "{seconds} {count} {} {} {put_rate}",
            after.commits - before.commits,
            after.store_commits - before.store_commits,
        );
    }
    Ok(())
}

async fn register_for(time: Duration, clients: Vec<(u64, Client)>) -> Result<u64, Error> {
    let end = Instant::now() + time;
    let mut tasks = Vec::new();
    for (key, mut client) in clients {
        tasks.push(tokio::spawn(async move {
            let mut done = 0_u32;
            while Instant::now() < end {
                done += 1;
                client.register(register_request(key, done)).await?;
            }
            Ok(done.into())
        }));
    }
    sum(tasks).await
}

/// Puts of about the size of a device to the bare etcd, 64 clients with a connection each.
async fn put_for(time: Duration) -> Result<f64, Error> {
    let mut clients = Vec::new();
    for _ in 0..CALLERS {
        let client = EtcdStore::open(&EtcdConfig { prefix: "bench/".into(), ..EtcdConfig::default() })?;
        // Connects.
        client.revision().await?;
        clients.push(client);
    }
    let end = Instant::now() + time;
    let mut tasks = Vec::new();
    for (number, client) in clients.into_iter().enumerate() {
        tasks.push(tokio::spawn(async move {
            let mut done = 0_u64;
            while Instant::now() < end {
                let put = Txn::new().put(format!("{number}/{}", done % 1000), vec![7_u8; 200]);
                let outcome = client.txn(put).await.map_err(|e| tonic::Status::unknown(e.to_string()))?;
                if let TxnOutcome::Committed(_) = outcome {
                    done += 1;
                }
            }
            Ok(done)
        }));
    }
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    sum(tasks).await.map(|count| count as f64)
}

/// Joins of new devices, each with a connection, key and certificate of its own. A line a round: seconds, joins.
async fn join_many(join: &JoinCommand) -> Result<(), Error> {
    for round in 0..ROUNDS {
        let start = Instant::now();
        let end = start + ROUND;
        let number = Arc::new(AtomicU64::new(0));
        let mut tasks = Vec::new();
        for _ in 0..CALLERS {
            let (number, join) = (Arc::clone(&number), join.clone());
            tasks.push(tokio::spawn(async move {
                let mut done = 0_u64;
                while Instant::now() < end {
                    let name = format!("r{round}-{}", number.fetch_add(1, Ordering::Relaxed));
                    let joined = Device::join(&join, &name).await;
                    joined.map_err(|e| tonic::Status::unknown(e.to_string()))?;
                    done += 1;
                }
                Ok(done)
            }));
        }
        let count = sum(tasks).await?;
        println!("{} {count}", (Instant::now() - start).as_secs_f64());
    }
    Ok(())
}

/// Lookups by name of devices `d0` to `d<devices - 1>`, from so many callers with a connection each, one after another
/// on each. A line a round: lookups a second, and their median and 99th percentile in microseconds.
async fn look_up(callers: usize, devices: usize, join: &JoinCommand) -> Result<(), Error> {
    let mut clients = Vec::new();
    for caller in 0..callers {
        let name = format!("looker-{devices}-{callers}-{caller}");
        let mut client = Device::join(join, &name).await?.connect().await?;
        client.register(register_request(u64::MAX - (devices * 1000 + callers + caller) as u64, 1)).await?;
        clients.push(client);
    }
    for round in 0..ROUNDS {
        let start = Instant::now();
        let end = start + ROUND / 2;
        let mut tasks = Vec::new();
        for (caller, mut client) in clients.iter().cloned().enumerate() {
            tasks.push(tokio::spawn(async move {
                let mut next = (caller * devices / callers + round) % devices;
                let mut samples = Vec::new();
                while Instant::now() < end {
                    next = (next + 7919) % devices;
                    let start = Instant::now();
                    client.lookup(LookupRequest { by: Some(By::Name(format!("d{next}"))) }).await?;
                    samples.push(Instant::now() - start);
                }
                Ok::<_, tonic::Status>(samples)
            }));
        }
        let mut samples = Vec::new();
        for task in tasks {
            samples.append(&mut task.await??);
        }
        let seconds = (Instant::now() - start).as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        let rate = samples.len() as f64 / seconds;
        let micros = |d: Duration| d.as_secs_f64() * 1e6;
        let (p50, p99) = (quantile(&mut samples, 0.5), quantile(&mut samples, 0.99));
        println!("{rate} {} {}", micros(p50), micros(p99));
    }
    Ok(())
}

async fn sum(tasks: Vec<JoinHandle<Result<u64, tonic::Status>>>) -> Result<u64, Error> {
    let mut total = 0;
    for task in tasks {
        total += task.await??;
    }
    Ok(total)
}

/// What the registrar counts.
struct Counters {
    /// Transactions that it has committed.
    commits: u64,
    /// Commits of its sqlite store to disk; 0 on etcd.
    store_commits: u64,
}

impl Counters {
    async fn read() -> Result<Self, Error> {
        let mut stream = TcpStream::connect(METRICS).await?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: registrar\r\nConnection: close\r\n\r\n").await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        let value = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|value| value.trim().parse().ok())
        };
        let commits =
            value("muster_registrar_commits_total").ok_or("the registrar does not tell its commits")?;
        Ok(Self { commits, store_commits: value("muster_registrar_store_commits_total").unwrap_or(0) })
    }
}
