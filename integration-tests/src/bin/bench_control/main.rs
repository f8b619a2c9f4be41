//! `make bench-control`: how fast the control plane is and what it needs, with real processes over mutual TLS.
//! Without arguments it makes the lab, starts the servers and reports; `client …` is the callers, run inside.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a report is what this program is for")]

mod client;

use std::{process::ExitCode, time::Duration};

use muster_common::time::Instant;
use muster_integration_tests::{
    Host, Lab, LabError, Process, Result,
    device::Error,
    figures::{Figures, median},
    muster::{JoinCommand, Registrar},
    process::{check, wait_for},
};

/// Callers at a time, each with a connection of its own.
const CALLERS: u64 = 64;
/// Rounds of each measurement; medians are reported.
const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_secs(4);
const DOMAIN: &str = "net.example";
/// All callers come from one address, which may not join so many devices otherwise.
const LIMITS: &str = "[limits]\njoins_per_second = 1000000\njoins_burst = 1000000\n";

/// A part of the benchmark, with a lab to itself.
type Part = fn(&Lab, &mut Figures) -> Result;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match arguments.as_slice() {
        ["client", what, rest @ ..] => client::run(what, rest),
        parts => bench(parts).map_err(Error::from),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-control: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Measures the named parts; all of them if none is named.
fn bench(parts: &[&str]) -> Result {
    let lab = Lab::new()?;
    let mut figures = Figures::new("control");
    let all: [(&str, Part); 3] = [("sqlite", sqlite), ("etcd", etcd), ("population", populations)];
    for (name, measure) in all {
        if parts.is_empty() || parts.contains(&name) {
            measure(&lab, &mut figures)?;
        }
    }
    figures.write().map(drop)
}

/// Register and Enroll on sqlite, and what the disk does for them.
fn sqlite(lab: &Lab, figures: &mut Figures) -> Result {
    let host = lab.host("sqlite")?;
    let mut registrar = Registrar::init(&host, DOMAIN, "127.0.0.1", LIMITS)?;
    registrar.serve()?;
    let join = registrar.new_join_command(&["--reusable"])?;
    let (mut rates, mut per_sync) = (Vec::new(), Vec::new());
    let before = cost(&mut registrar)?;
    let mut total = 0.0;
    for [seconds, count, commits, store_commits, _] in callers(&host, &["register"], &join)? {
        every_one_durable(count, commits)?;
        rates.push(count / seconds);
        per_sync.push(count / store_commits);
        total += count;
    }
    let microseconds = (cost(&mut registrar)? - before) / total * 1e6;
    let rate = median(&mut rates);
    figures.report("durable registrations on sqlite, 64 callers", rate, "calls/s");
    figures.report("registrations per fsync, sqlite", median(&mut per_sync), "calls");
    figures.report("registrar's processor time per registration, sqlite", microseconds, "µs");
    let joins = callers(&host, &["join"], &join)?;
    let mut joins: Vec<f64> = joins.into_iter().map(|[seconds, count]| count / seconds).collect();
    let joins = median(&mut joins);
    figures.compare("full joins on sqlite, 64 callers", joins, "joins/s", "registrations", rate);
    registrar.stop()
}

/// Register on etcd, beside bare puts to the same etcd, in turn.
fn etcd(lab: &Lab, figures: &mut Figures) -> Result {
    const FIGURE: &str = "durable registrations on etcd, 64 callers";
    let host = lab.host("etcd")?;
    if host.try_sh("command -v etcd")?.stdout.is_empty() {
        figures.missing(FIGURE, "etcd cannot be installed here");
        return Ok(());
    }
    let _etcd = start_etcd(&host)?;
    let store = "[store]\nkind = \"etcd\"\n[store.etcd]\nendpoints = [\"http://127.0.0.1:2379\"]\n";
    let mut registrar = Registrar::init(&host, DOMAIN, "127.0.0.1", &format!("{LIMITS}{store}"))?;
    registrar.serve()?;
    let join = registrar.new_join_command(&["--reusable"])?;
    let (mut rates, mut puts) = (Vec::new(), Vec::new());
    for [seconds, count, commits, _, put_rate] in callers(&host, &["register-and-put"], &join)? {
        every_one_durable(count, commits)?;
        rates.push(count / seconds);
        puts.push(put_rate);
    }
    let puts = median(&mut puts);
    figures.report("puts to bare etcd, 64 clients", puts, "puts/s");
    figures.compare(FIGURE, median(&mut rates), "calls/s", "puts to bare etcd", puts);
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

/// Start, memory and lookups of a registrar with many devices.
fn populations(lab: &Lab, figures: &mut Figures) -> Result {
    let host = lab.host("many")?;
    let mut registrar = Registrar::init(&host, DOMAIN, "127.0.0.1", LIMITS)?;
    let (_, empty) = start(&mut registrar)?;
    figures.report("registrar's memory without devices", empty / MEBI, "MiB");
    let mut filled = 0;
    for (devices, words) in [(100_000, "100,000"), (1_000_000, "1,000,000")] {
        registrar.stop()?;
        registrar.fill(filled..devices)?;
        filled = devices;
        let (seconds, _) = start(&mut registrar)?;
        let join = registrar.new_join_command(&["--reusable"])?;
        let (mut median_times, mut slow_times) = (Vec::new(), Vec::new());
        for [p50, p99] in callers(&host, &["lookup", &devices.to_string()], &join)? {
            median_times.push(p50);
            slow_times.push(p99);
        }
        let resident = resident(&mut registrar)?;
        let figure = |what: &str| format!("{what}, {words} devices");
        figures.report(&figure("from start to serving"), seconds, "s");
        figures.report(&figure("registrar's memory"), resident / MEBI, "MiB");
        let per_device = (resident - empty) / f64::from(devices);
        figures.report(&figure("registrar's memory per device"), per_device, "octets");
        figures.report(&figure("lookup p50"), median(&mut median_times), "µs");
        figures.report(&figure("lookup p99"), median(&mut slow_times), "µs");
    }
    registrar.stop()
}

const MEBI: f64 = 1024.0 * 1024.0;

/// Starts the registrar; returns the seconds until it is ready, and its memory then.
fn start(registrar: &mut Registrar) -> Result<(f64, f64)> {
    let started = Instant::now();
    registrar.serve()?;
    Ok(((Instant::now() - started).as_secs_f64(), resident(registrar)?))
}

fn resident(registrar: &mut Registrar) -> Result<f64> {
    registrar.process().map_or(Ok(0.0), |process| process.resident())
}

/// The registrar's processor time so far, in seconds.
fn cost(registrar: &mut Registrar) -> Result<f64> {
    registrar.process().map_or(Ok(0.0), |process| process.processor_time().map(|time| time.as_secs_f64()))
}

/// What has been answered must have been written, each by a transaction of its own.
fn every_one_durable(answered: f64, committed: f64) -> Result {
    if committed >= answered {
        return Ok(());
    }
    Err(LabError::Command {
        command: "counting registrations".into(),
        reason: format!("{answered} were answered, and only {committed} transactions committed"),
    })
}

/// Runs this program as the callers on `host`; returns the numbers that it prints, line by line.
fn callers<const N: usize>(host: &Host, arguments: &[&str], join: &JoinCommand) -> Result<Vec<[f64; N]>> {
    let own =
        std::env::current_exe().map_err(|source| LabError::File { path: "this program".into(), source })?;
    let mut command = host.command(own);
    command.arg("client").args(arguments).args(&join.0);
    let printed = check(command)?;
    let numbers = |line: &str| -> Option<[f64; N]> {
        let numbers: Vec<f64> = line.split_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
        numbers.try_into().ok()
    };
    printed.lines().map(numbers).collect::<Option<_>>().ok_or_else(|| LabError::Command {
        command: format!("client {}", arguments.join(" ")),
        reason: printed.clone(),
    })
}
