//! `make bench-dns`: registrar and agent beside other DNS servers, with the same names, one server processor and one
//! client processor. Without arguments it makes the lab and reports; `echo`, `flood` … run inside it.
#![deny(unsafe_code)]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a report is what this program is for")]

mod changes;
mod dot;
mod servers;
mod sys;
mod udp;

use std::{process::ExitCode, time::Duration};

use muster_integration_tests::{
    Host, Lab, LabError, Process, Result,
    device::Error,
    figures::{Figures, median},
    muster::{Agent, Registrar},
    population,
    process::{check, wait_for},
};

/// Rounds of each measurement; medians are reported.
const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_secs(2);
const DOMAIN: &str = "net.example";
/// The processors of servers and of clients.
const SERVER_CPU: usize = 0;
const CLIENT_CPU: usize = 1;
const NAMES: u32 = 100_000;
const MANY: u32 = 1_000_000;
const SERVICES: u32 = 10_000;
/// The lab's hosts may ask for everything, as often as they like.
const OPEN: &str = "[dns]\nopen_to = [\"127.0.0.0/8\", \"192.0.2.0/24\"]\nresponses_per_second = 0\nworkers = 1\n\
                    connections_per_client = 5000\n[limits]\njoins_per_second = 1000000\njoins_burst = 1000000\n";
/// Connections over TLS, and how many queries are under way on all of them; at least one on each.
const TLS: [(&str, &str); 4] = [("1", "16"), ("1", "1"), ("8", "16"), ("1000", "16")];
const REGISTRAR: &str = "127.0.0.1:53";
const REGISTRAR_TLS: &str = "127.0.0.1:853";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let number = |text: &str| text.parse::<u32>().map_err(Error::from);
    let outcome = match arguments.as_slice() {
        ["echo", address] => udp::echo(address),
        ["flood", address, names] => number(names).and_then(|names| udp::flood(address, names)),
        ["paced", address, names] => number(names).and_then(|names| udp::paced(address, names)),
        ["warm", address, names] => number(names).and_then(|names| udp::warm(address, names)),
        ["tls", address, names, connections, window] => {
            number(names).and_then(|names| dot::flood(address, names, connections.parse()?, window.parse()?))
        }
        ["changes", credential, join @ ..] => changes::run(credential, join),
        parts => bench(parts).map_err(Error::from),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-dns: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A query for the A record of `d<name>`, without EDNS.
fn query(id: u16, name: u32, out: &mut Vec<u8>) {
    out.clear();
    out.extend_from_slice(&id.to_be_bytes());
    out.extend_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    // By hand: the client must not be what is measured.
    let digits = name.checked_ilog10().unwrap_or(0) + 1;
    out.push(u8::try_from(digits + 1).unwrap_or(0));
    out.push(b'd');
    for place in (0..digits).rev() {
        out.push(b'0' + u8::try_from(name / 10_u32.pow(place) % 10).unwrap_or(0));
    }
    for part in DOMAIN.split('.') {
        out.push(u8::try_from(part.len()).unwrap_or(0));
        out.extend_from_slice(part.as_bytes());
    }
    out.extend_from_slice(&[0, 0, 1, 0, 1]);
}

/// A part of the benchmark, with a lab to itself.
type Part = fn(&Lab, &mut Figures) -> Result;

/// Measures the named parts; all of them if none is named.
fn bench(parts: &[&str]) -> Result {
    let lab = Lab::new()?;
    let mut figures = Figures::new("dns");
    let all: [(&str, Part); 3] = [("servers", compare), ("million", million), ("resolver", resolver)];
    for (name, measure) in all {
        if parts.is_empty() || parts.contains(&name) {
            measure(&lab, &mut figures)?;
        }
    }
    figures.write().map(drop)
}

/// What a server did under load: median of the rounds.
#[derive(Clone, Copy)]
struct Load {
    /// Answers a second.
    rate: f64,
    /// Seconds of processor for a million answers.
    cost: f64,
}

/// Runs the load `arguments` against `process`.
fn load(host: &Host, process: &Process, arguments: &[&str]) -> Result<Load> {
    let before = process.processor_time()?;
    let rounds: Vec<[f64; 3]> = client(host, arguments)?;
    let spent = (process.processor_time()? - before).as_secs_f64();
    let mut rates: Vec<f64> = rounds.iter().map(|[answers, seconds, _]| answers / seconds).collect();
    let rate = median(&mut rates);
    // The warm-up of one second is not in the rounds: it is taken to be as fast.
    let answers: f64 = rounds.iter().map(|[answers, ..]| answers).sum::<f64>() + rate;
    let lost: f64 = rounds.iter().map(|[.., lost]| lost).sum();
    if lost * 100.0 > answers {
        eprintln!("bench-dns: {arguments:?} lost {lost} of {answers} queries");
    }
    Ok(Load { rate, cost: spent / answers * 1e6 })
}

/// Runs this program as a client on `host`; returns the numbers that it prints, line by line.
fn client<const N: usize>(host: &Host, arguments: &[&str]) -> Result<Vec<[f64; N]>> {
    let mut command = host.command("taskset");
    command.args(["-c", &CLIENT_CPU.to_string()]).arg(own()?).args(arguments);
    let printed = check(command)?;
    let numbers = |line: &str| -> Option<[f64; N]> {
        let numbers: Vec<f64> = line.split_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
        numbers.try_into().ok()
    };
    printed
        .lines()
        .map(numbers)
        .collect::<Option<_>>()
        .ok_or_else(|| LabError::Command { command: arguments.join(" "), reason: printed.clone() })
}

fn own() -> Result<std::path::PathBuf> {
    std::env::current_exe().map_err(|source| LabError::File { path: "this program".into(), source })
}

fn start_echo(host: &Host) -> Result<Process> {
    let mut command = host.command("taskset");
    command.args(["-c", &SERVER_CPU.to_string()]).arg(own()?).args(["echo", "127.0.0.1:5300"]);
    let echo = host.spawn("echo", command)?;
    wait_for("the echo to listen", Duration::from_secs(10), || {
        host.sh("ss -Huln 'sport = :5300' | grep -q .").map(drop).map_err(|e| e.to_string())
    })?;
    Ok(echo)
}

fn pin(host: &Host, process: &Process) -> Result {
    host.sh(&format!("taskset -a -c -p {SERVER_CPU} {}", process.id())).map(drop)
}

/// Waits until `dig` gets the last of `names` from `address`.
fn wait_for_names(host: &Host, address: &str, names: u32) -> Result {
    let (ip, port) = address.rsplit_once(':').unwrap_or((address, "53"));
    let line =
        format!("dig +short +tries=1 +time=1 -p {port} @{ip} d{}.{DOMAIN} A | grep -q '^1'", names - 1);
    wait_for("a DNS server to answer", Duration::from_secs(60), || {
        host.sh(&line).map(drop).map_err(|e| e.to_string())
    })
}

/// Serves, pinned, and waits until the last of `names` is answered from what has been encoded before.
fn serve(host: &Host, registrar: &mut Registrar, names: u32) -> Result {
    registrar.serve()?;
    wait_for_names(host, REGISTRAR, names)?;
    let encoded =
        "curl -sf http://127.0.0.1:7580/metrics | sed -n 's/^muster_registrar_dns_encoded_names //p'";
    wait_for("all names to be encoded", Duration::from_secs(120), || {
        let count = host.sh(encoded).map_err(|e| e.to_string())?;
        if count.trim().parse::<u32>().is_ok_and(|count| count >= names) { Ok(()) } else { Err(count) }
    })?;
    if let Some(process) = registrar.process() {
        pin(host, process)?;
    }
    std::thread::sleep(Duration::from_secs(2));
    Ok(())
}

fn of_registrar(host: &Host, registrar: &mut Registrar, arguments: &[&str]) -> Result<Load> {
    match registrar.process() {
        Some(process) => load(host, process, arguments),
        None => Err(LabError::Command { command: "registrar".into(), reason: "is not running".into() }),
    }
}

/// The registrar beside other servers, over UDP and TLS, in turn.
fn compare(lab: &Lab, figures: &mut Figures) -> Result {
    let host = lab.host("servers")?;
    let names = NAMES.to_string();
    let echo = start_echo(&host)?;
    let bare = load(&host, &echo, &["flood", "127.0.0.1:5300", &names])?;
    drop(echo);
    figures.report("bare echo, UDP", bare.rate, "queries/s");
    figures.report("bare echo, UDP, processor time", bare.cost, "s per million");

    let mut registrar = Registrar::init(&host, DOMAIN, "127.0.0.1", OPEN)?;
    registrar.fill(0..NAMES)?;
    serve(&host, &mut registrar, NAMES)?;
    let udp = of_registrar(&host, &mut registrar, &["flood", REGISTRAR, &names])?;
    figures.compare("registrar, UDP, 100,000 names", udp.rate, "queries/s", "bare echo", bare.rate);
    figures.compare(
        "registrar, UDP, 100,000 names, processor time",
        udp.cost,
        "s per million",
        "bare echo",
        bare.cost,
    );
    let mut tls = Vec::new();
    for (connections, window) in TLS {
        let arguments = ["tls", REGISTRAR_TLS, &names, connections, window];
        let load = of_registrar(&host, &mut registrar, &arguments)?;
        let figure = format!("registrar, TLS, {connections} connections, {window} queries at a time");
        figures.report(&figure, load.rate, "queries/s");
        figures.report(&format!("{figure}, processor time"), load.cost, "s per million");
        tls.push((connections, window, load));
    }
    registrar.stop()?;

    for server in servers::start(&host, NAMES)? {
        wait_for_names(&host, &server.udp, NAMES)?;
        let other = load(&host, &server.process, &["flood", &server.udp, &names])?;
        figures.compare(
            &format!("registrar, UDP, 100,000 names, against {}", server.name),
            udp.rate,
            "queries/s",
            &format!("{} at {:.0}", server.name, other.rate),
            other.rate,
        );
        figures.compare(
            &format!("registrar, UDP, processor time, against {}", server.name),
            udp.cost,
            "s per million",
            &format!("{} at {:.1}", server.name, other.cost),
            other.cost,
        );
        let Some(address) = &server.tls else { continue };
        for (connections, window, ours) in &tls {
            let figure = format!(
                "registrar, TLS, {connections} connections, {window} queries at a time, against {}",
                server.name
            );
            let other = match load(&host, &server.process, &["tls", address, &names, connections, window]) {
                Ok(other) => other,
                Err(error) => {
                    figures.missing(&figure, error.to_string().lines().last().unwrap_or_default());
                    continue;
                }
            };
            figures.compare(
                &figure,
                ours.rate,
                "queries/s",
                &format!("{} at {:.0} and {:.1} s per million", server.name, other.rate, other.cost),
                other.rate,
            );
        }
    }
    Ok(())
}

/// A million names against a hundred thousand, and how soon a change is seen among them.
fn million(lab: &Lab, figures: &mut Figures) -> Result {
    let host = lab.host("million")?;
    let mut registrar = Registrar::init(&host, DOMAIN, "127.0.0.1", OPEN)?;
    registrar.fill(0..NAMES)?;
    serve(&host, &mut registrar, NAMES)?;
    let few = of_registrar(&host, &mut registrar, &["flood", REGISTRAR, &NAMES.to_string()])?;
    registrar.stop()?;
    registrar.fill(NAMES..MANY)?;
    serve(&host, &mut registrar, MANY)?;
    let many = of_registrar(&host, &mut registrar, &["flood", REGISTRAR, &MANY.to_string()])?;
    figures.compare("registrar, UDP, 1,000,000 names", many.rate, "queries/s", "100,000 names", few.rate);
    figures.compare(
        "registrar, UDP, 1,000,000 names, processor time",
        many.cost,
        "s per million",
        "100,000 names",
        few.cost,
    );
    if let Some(process) = registrar.process() {
        figures.report("registrar's memory, 1,000,000 names", process.resident()? / 1024.0 / 1024.0, "MiB");
    }
    registrar.stop()?;
    changes(&host, &mut registrar, figures)
}

/// How soon a change is seen among a million devices, which the store has, and ten thousand Services.
fn changes(host: &Host, registrar: &mut Registrar, figures: &mut Figures) -> Result {
    registrar.fill_services(0..SERVICES, population::ENDPOINTS)?;
    serve(host, registrar, MANY)?;
    let join = registrar.new_join_command(&["--reusable"])?;
    let credential = registrar.credential().display().to_string();
    let arguments = ["changes", &credential].into_iter().chain(join.0.iter().map(String::as_str));
    let kinds: Vec<[f64; 5]> = client(host, &arguments.collect::<Vec<_>>())?;
    let names = ["device's endpoint", "headless Service's endpoints", "new Service"];
    let values = [
        "p50 from request",
        "p99 from request",
        "longest",
        "p50 from acknowledgement",
        "p99 from acknowledgement",
    ];
    for (name, times) in names.into_iter().zip(kinds) {
        for (value, time) in values.into_iter().zip(times) {
            let figure = format!("{name} to visible answer, 1,000,000 devices and 10,000 Services, {value}");
            figures.report(&figure, time, "ms");
        }
    }
    registrar.stop()
}

/// The agent's resolver: cache hits, how long each takes, and what a hundred thousand entries need.
fn resolver(lab: &Lab, figures: &mut Figures) -> Result {
    const RESOLVER: &str = "169.254.20.10:53";
    const HELD: &str = "1000";
    let switch = lab.switch("resolver")?;
    let (hq, host) = (lab.host("resolver-hq")?, lab.host("resolver-a")?);
    switch.plug(&hq, &["192.0.2.1/24"])?;
    switch.plug(&host, &["192.0.2.10/24"])?;
    let mut registrar = Registrar::init(&hq, DOMAIN, "192.0.2.1", OPEN)?;
    registrar.fill(0..NAMES)?;
    // Names that stay in the cache while they are asked for.
    registrar.serve()?;
    let join = registrar.new_join_command(&[])?;
    let mut agent = Agent::new(&host, "[resolver]\ncache_octets = 268435456\n")?;
    agent.join(&join, "bench")?;
    agent.run()?;
    let echo = start_echo(&host)?;
    let bare = load(&host, &echo, &["flood", "127.0.0.1:5300", HELD])?;
    let bare_times: Vec<[f64; 2]> = client(&host, &["paced", "127.0.0.1:5300", HELD])?;
    drop(echo);
    let running = |agent: &mut Agent| -> Result<Load> {
        let process = agent
            .process()
            .ok_or_else(|| LabError::Command { command: "agent".into(), reason: "is not running".into() })?;
        pin(&host, process)?;
        load(&host, process, &["flood", RESOLVER, HELD])
    };
    client::<0>(&host, &["warm", RESOLVER, HELD])?;
    let hits = running(&mut agent)?;
    figures.compare("resolver, cache hits", hits.rate, "queries/s", "bare echo", bare.rate);
    figures.compare(
        "resolver, cache hits, processor time",
        hits.cost,
        "s per million",
        "bare echo",
        bare.cost,
    );
    let times: Vec<[f64; 2]> = client(&host, &["paced", RESOLVER, HELD])?;
    let p50 = |rounds: &[[f64; 2]]| median(&mut rounds.iter().map(|[p50, _]| *p50).collect::<Vec<_>>());
    let (ours, bare) = (p50(&times), p50(&bare_times));
    figures.compare("resolver, cache hits, p50 at 10,000 queries/s", ours, "µs", "bare echo", bare);
    let before = agent.process().map_or(Ok(0.0), |process| process.resident())?;
    client::<0>(&host, &["warm", RESOLVER, &NAMES.to_string()])?;
    let after = agent.process().map_or(Ok(0.0), |process| process.resident())?;
    figures.report("resolver, memory for 100,000 entries", (after - before) / 1024.0 / 1024.0, "MiB");
    agent.stop()?;
    registrar.stop()
}
