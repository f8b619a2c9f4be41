//! `make bench-control`: how fast the control plane is and what it needs, with real processes over mutual TLS.
//! Without arguments it makes the lab, starts the servers and reports; `client …` is the callers, run inside.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a report is what this program is for")]

mod agents;
mod calls;
mod client;
mod failover;
mod population;

use std::{process::ExitCode, time::Duration};

use muster_integration_tests::{
    Host, Lab, LabError, Result,
    device::Error,
    figures::Figures,
    muster::{JoinCommand, Registrar},
    process::check,
};

/// Callers at a time, each with a connection of its own.
const CALLERS: u64 = 64;
/// Rounds of each measurement; medians are reported.
const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_secs(4);
const DOMAIN: &str = "net.example";
/// All callers come from one address, which may not join so many devices, nor have so many handshakes at a time,
/// otherwise.
const LIMITS: &str =
    "[limits]\njoins_per_second = 1000000\njoins_burst = 1000000\nstrangers_per_address = 16384\n";
const MEBI: f64 = 1024.0 * 1024.0;

/// A part of the benchmark, with hosts to itself.
type Part = fn(&Lab, &mut Figures) -> Result;

/// All parts, by name.
const PARTS: [(&str, Part); 6] = [
    ("sqlite", calls::sqlite),
    ("etcd", calls::etcd),
    ("population", population::sqlite),
    ("population-etcd", population::etcd),
    ("agents", agents::measure),
    ("failover", failover::measure),
];

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
    let is_known = |part: &str| PARTS.iter().any(|(name, _)| *name == part);
    if let Some(unknown) = parts.iter().find(|part| !is_known(part)) {
        let names = PARTS.map(|(name, _)| name).join(", ");
        return Err(LabError::Command {
            command: format!("bench-control {unknown}"),
            reason: format!("there is no such part; name some of {names}, or none for all"),
        });
    }
    let lab = Lab::new()?;
    let mut figures = Figures::new("control");
    for (name, measure) in PARTS {
        if parts.is_empty() || parts.contains(&name) {
            measure(&lab, &mut figures)?;
        }
    }
    figures.write().map(drop)
}

fn resident(registrar: &mut Registrar) -> Result<f64> {
    registrar.process().map_or(Ok(0.0), |process| process.resident())
}

/// The registrar's processor time so far, in seconds.
fn cost(registrar: &mut Registrar) -> Result<f64> {
    registrar.process().map_or(Ok(0.0), |process| process.processor_time().map(|time| time.as_secs_f64()))
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
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
