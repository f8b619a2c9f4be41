//! `make bench-agent`: what an agent needs at rest, and how soon it and its packets are there.
//! Real agents in network namespaces, in a small network and in a large one.
#![forbid(unsafe_code)]
#![allow(clippy::print_stderr, reason = "a report is what this program is for")]

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Command, ExitCode, Stdio},
    sync::mpsc,
    time::Duration,
};

use muster_common::time::Instant;
use muster_integration_tests::{
    Host, Lab, LabError, Result,
    figures::{Figures, median},
    muster::{Agent, Registrar},
    population,
    process::wait_for,
};

const DOMAIN: &str = "net.example";
const LIMITS: &str = "[limits]\njoins_per_second = 1000000\njoins_burst = 1000000\n";
/// Agents in each network: medians are of these.
const AGENTS: usize = 5;
/// Peers that are met for the first time, in each of two ways.
const PEERS: usize = 7;
/// Starts of each agent.
const STARTS: usize = 3;
/// How long agents are watched while nothing happens.
const IDLE: Duration = Duration::from_secs(60);
/// After a start, until an agent is at rest.
const SETTLE: Duration = Duration::from_secs(10);
/// Where an agent answers DNS on its host.
const RESOLVER: &str = "169.254.20.10";
/// Pings of a peer after the first: what an established peer takes.
const ESTABLISHED: usize = 10;

fn main() -> ExitCode {
    let parts: Vec<String> = std::env::args().skip(1).collect();
    match bench(&parts) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-agent: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Measures the named parts; all of them if none is named.
fn bench(parts: &[String]) -> Result {
    let lab = Lab::new()?;
    let mut figures = Figures::new("agent");
    let wanted = |name: &str| parts.is_empty() || parts.iter().any(|part| part == name);
    if wanted("first-packet") {
        first_packet(&lab, &mut figures)?;
    }
    if wanted("idle") {
        idle(&lab, &mut figures)?;
    }
    figures.write().map(drop)
}

/// A registrar and some agents, all on one switch.
struct Site {
    registrar: Registrar,
    agents: Vec<Agent>,
}

impl Site {
    /// A network with `devices` devices beside its `agents` agents, which have joined and do not run yet.
    fn new(lab: &Lab, name: &str, devices: u32, agents: usize) -> Result<Self> {
        let switch = lab.switch(name)?;
        let host = lab.host(&format!("{name}-hq"))?;
        switch.plug(&host, &["192.0.2.1/24"])?;
        let mut registrar = Registrar::init(&host, DOMAIN, "192.0.2.1", LIMITS)?;
        let database = registrar.data().join("registry.db");
        let runtime = tokio::runtime::Runtime::new()
            .map_err(|source| LabError::File { path: "runtime".into(), source })?;
        runtime.block_on(population::fill(&database, 0..devices)).map_err(|error| LabError::Command {
            command: "filling the registrar's store".into(),
            reason: error.to_string(),
        })?;
        registrar.serve()?;
        let mut site = Self { registrar, agents: Vec::new() };
        let join = site.registrar.new_join_command(&["--reusable"])?;
        for number in 0..agents {
            let host = lab.host(&format!("{name}-a{number}"))?;
            switch.plug(&host, &[&format!("192.0.2.{}/24", 10 + number)])?;
            let agent = Agent::new(&host, "")?;
            agent.join(&join, &format!("a{number}"))?;
            site.agents.push(agent);
        }
        Ok(site)
    }
}

/// Start, memory and processor time of agents, in a network of 10 devices and in one of 100,000.
fn idle(lab: &Lab, figures: &mut Figures) -> Result {
    const SMALL: &str = "10 devices";
    let mut sites = [
        (SMALL, Site::new(lab, "small", 10 - u32::try_from(AGENTS).unwrap_or(0), AGENTS)?),
        ("100,000 devices", Site::new(lab, "large", 100_000 - u32::try_from(AGENTS).unwrap_or(0), AGENTS)?),
    ];
    let mut starts: Vec<Vec<f64>> = Vec::new();
    for (_, site) in &mut sites {
        let mut times = Vec::new();
        for agent in &mut site.agents {
            // The first start makes the state on disk.
            agent.run()?;
            for _ in 0..STARTS {
                agent.stop()?;
                times.push(start(agent)?.as_secs_f64() * 1e3);
            }
        }
        starts.push(times);
    }
    std::thread::sleep(SETTLE);
    let before = usage(&mut sites)?;
    std::thread::sleep(IDLE);
    let after = usage(&mut sites)?;
    let mut small: Option<[f64; 3]> = None;
    for (number, (name, _)) in sites.iter().enumerate() {
        let of = |list: &[Vec<Usage>], pick: fn(&Usage) -> f64| -> Vec<f64> {
            list.get(number).into_iter().flatten().map(pick).collect()
        };
        let memory = median(&mut of(&after, |u| u.memory));
        let (then, now) = (of(&before, |u| u.seconds), of(&after, |u| u.seconds));
        let mut percent: Vec<f64> =
            then.iter().zip(&now).map(|(then, now)| (now - then) / IDLE.as_secs_f64() * 100.0).collect();
        let values = [
            starts.get_mut(number).map_or(0.0, |times| median(times)),
            memory / (1024.0 * 1024.0),
            median(&mut percent),
        ];
        let what = [
            ("from start to address bound (warm)", "ms"),
            ("idle memory", "MiB"),
            ("idle processor time, of one core", "%"),
        ];
        for (position, (figure, unit)) in what.into_iter().enumerate() {
            let figure = format!("agent {figure}, {name}");
            let value = values.get(position).copied().unwrap_or_default();
            match small.and_then(|small| small.get(position).copied()) {
                None => figures.report(&figure, value, unit),
                Some(other) => figures.compare(&figure, value, unit, SMALL, other),
            }
        }
        small.get_or_insert(values);
    }
    for (_, site) in &mut sites {
        site.agents.clear();
        site.registrar.stop()?;
    }
    Ok(())
}

#[derive(Clone, Copy)]
struct Usage {
    memory: f64,
    seconds: f64,
}

fn usage(sites: &mut [(&str, Site)]) -> Result<Vec<Vec<Usage>>> {
    let of = |agent: &mut Agent| -> Result<Usage> {
        let process = agent.process().ok_or_else(|| LabError::Command {
            command: "muster-agent run".into(),
            reason: "it does not run".into(),
        })?;
        Ok(Usage { memory: process.resident()?, seconds: process.processor_time()?.as_secs_f64() })
    };
    sites.iter_mut().map(|(_, site)| site.agents.iter_mut().map(of).collect()).collect()
}

/// Starts an agent; returns the time until its interface has an address, as the kernel tells it.
fn start(agent: &mut Agent) -> Result<Duration> {
    let addresses = Addresses::watch(agent.host())?;
    let started = Instant::now();
    agent.start()?;
    let bound = addresses.next(Duration::from_secs(20))?;
    agent.wait_ready()?;
    Ok(bound - started)
}

/// `ip monitor address` on a host.
struct Addresses {
    monitor: Child,
    bound: mpsc::Receiver<Instant>,
}

impl Addresses {
    fn watch(host: &Host) -> Result<Self> {
        let failed = |reason: String| LabError::Command { command: "ip monitor address".into(), reason };
        let mut monitor = Command::new("ip")
            .args(["-o", "-n", host.namespace(), "monitor", "address"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| failed(error.to_string()))?;
        let output = monitor.stdout.take().ok_or_else(|| failed("it has no output".into()))?;
        let (sender, bound) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(std::result::Result::ok) {
                let now = Instant::now();
                let unrelated = line.contains("Deleted") || line.contains(RESOLVER);
                if line.contains("muster0") && line.contains("inet ") && !unrelated {
                    let _ = sender.send(now);
                }
            }
        });
        // It tells nothing when it has begun to listen; its netlink socket shows it.
        let socket = format!("/proc/{}/net/netlink", monitor.id());
        wait_for("ip monitor to listen", Duration::from_secs(5), || {
            let text = std::fs::read_to_string(&socket).map_err(|e| e.to_string())?;
            text.contains(&format!(" {} ", monitor.id())).then_some(()).ok_or(text)
        })?;
        Ok(Self { monitor, bound })
    }

    fn next(&self, limit: Duration) -> Result<Instant> {
        self.bound.recv_timeout(limit).map_err(|_| LabError::Timeout {
            what: "the address on muster0".into(),
            seconds: limit.as_secs(),
            last: "none".into(),
        })
    }
}

impl Drop for Addresses {
    fn drop(&mut self) {
        let _ = self.monitor.kill();
        let _ = self.monitor.wait();
    }
}

/// What the first packet to a peer that was never met before takes longer than one to an established peer: sent to
/// its address, and sent right after its name was resolved for the first time.
fn first_packet(lab: &Lab, figures: &mut Figures) -> Result {
    const USUAL: &str = "round trip to an established peer";
    let mut site = Site::new(lab, "first", 0, 2 + 2 * PEERS)?;
    for agent in &mut site.agents {
        agent.run()?;
    }
    let Some((here, others)) = site.agents.split_first() else { return Ok(()) };
    let addresses: Vec<String> = others.iter().map(address).collect::<Result<_>>()?;
    let Some((any, fresh)) = addresses.split_first() else { return Ok(()) };
    // Brings in what the first packet to any peer at all needs, such as the code from disk.
    ping(here.host(), any)?;
    let (by_address, by_name) = fresh.split_at(PEERS);
    let (mut usual, mut extra, mut extra_named) = (Vec::new(), Vec::new(), Vec::new());
    for address in by_address {
        let (first, established) = ping(here.host(), address)?;
        usual.push(established);
        extra.push(first - established);
    }
    for (number, address) in (2 + PEERS..).zip(by_name) {
        let answer = here.host().sh(&format!("dig +short a{number}.{DOMAIN}"))?;
        if answer.trim() != address {
            return Err(LabError::Command { command: format!("dig a{number}.{DOMAIN}"), reason: answer });
        }
        let (first, established) = ping(here.host(), address)?;
        extra_named.push(first - established);
    }
    let usual = median(&mut usual);
    figures.report(USUAL, usual, "ms");
    let worst = extra.iter().copied().fold(0.0, f64::max);
    figures.compare("first packet to a peer never met, extra time", median(&mut extra), "ms", USUAL, usual);
    figures.compare("the same, worst of all", worst, "ms", USUAL, usual);
    let named = median(&mut extra_named);
    figures.compare("the same, after its name was resolved", named, "ms", USUAL, usual);
    for agent in &mut site.agents {
        agent.stop()?;
    }
    site.registrar.stop()
}

/// An agent's virtual IPv4 address.
fn address(agent: &Agent) -> Result<String> {
    let printed = agent.host().sh("ip -4 -o address show dev muster0")?;
    // The resolver's own address may be on the interface as well.
    let line = printed.lines().find(|line| !line.contains(RESOLVER));
    let address = line.and_then(|line| line.split_whitespace().skip_while(|word| *word != "inet").nth(1));
    address.and_then(|text| Some(text.split_once('/')?.0.to_owned())).ok_or_else(|| LabError::Command {
        command: "ip address show dev muster0".into(),
        reason: printed.clone(),
    })
}

/// Pings some times; returns the first round trip, and the median of the others, in milliseconds.
fn ping(from: &Host, address: &str) -> Result<(f64, f64)> {
    let printed = from.sh(&format!("ping -n -c {} -i 0.2 -W 5 {address}", ESTABLISHED + 1))?;
    let times =
        printed.lines().filter_map(|line| line.split_once("time=")?.1.split_once(' ')?.0.parse().ok());
    let mut times: Vec<f64> = times.collect();
    if times.len() != ESTABLISHED + 1 {
        return Err(LabError::Command { command: format!("ping {address}"), reason: printed });
    }
    let first = times.remove(0);
    Ok((first, median(&mut times)))
}
