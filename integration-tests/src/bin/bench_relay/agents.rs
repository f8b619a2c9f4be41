//! Agents and directors as they are: how soon the first packet is answered, how soon the path is direct, how long a host
//! is away that roams, and what is lost when a director drains.

use std::{
    process::Stdio,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use muster_integration_tests::{
    Host, Lab, Result, Switch, failed,
    figures::{Figures, quantile},
    muster::{Agent, Director, JoinCommand, Registrar},
    nat::{Kind, Site},
    process::{Process, wait_for},
};
use muster_proto::agent::GetStatusResponse;
use rustix::process::Signal;

/// Hosts on the internet, each of which calls each other one for the first time.
const STRANGERS: u8 = 14;
/// Changes of address.
const ROAMS: u32 = 20;
/// Directors that are drained, one after the other.
const DRAINS: usize = 6;
/// Within which a change has shown its effect.
const SETTLED: Duration = Duration::from_secs(3);
const PATIENCE: Duration = Duration::from_secs(60);

struct Joined {
    host: Host,
    agent: Agent,
    address: String,
    _site: Site,
}

struct Internet<'a> {
    lab: &'a Lab,
    switch: Switch,
    join: JoinCommand,
    sites: u8,
    directors: Vec<Director>,
    /// Holds the process.
    _registrar: Registrar,
}

impl<'a> Internet<'a> {
    fn new(lab: &'a Lab) -> Result<Self> {
        let switch = lab.switch("world")?;
        let plugged = |name: &str, number: u8| -> Result<Host> {
            let host = lab.host(name)?;
            switch.plug(&host, &[&format!("198.51.100.{number}/24"), &format!("2001:db8::{number}/64")])?;
            Ok(host)
        };
        let mut registrar =
            Registrar::init(&plugged("hq", 200)?, "net.example", "198.51.100.200 2001:db8::200", "")?;
        registrar.serve()?;
        let director =
            |n: u8| Director::serve(&plugged(&format!("relay-{n}"), 200 + n)?, &registrar, "drain = 25");
        let directors = (1..=2).map(director).collect::<Result<_>>()?;
        let join = registrar.new_join_command(&["--reusable"])?;
        Ok(Self { lab, switch, join, sites: 0, directors, _registrar: registrar })
    }

    fn host(&mut self, name: &str, kind: Kind) -> Result<Joined> {
        self.sites += 1;
        let site = Site::new(self.lab, &self.switch, name, kind, self.sites)?;
        let host = site.host.clone();
        let mut agent = Agent::new(&host, "")?;
        agent.join(&self.join, name)?;
        agent.run()?;
        wait_for("the agent to be attached to two directors", PATIENCE, || {
            let status = agent.ask(&["status", "-o", "json"]).map_err(|error| error.to_string())?;
            let is_attached = |role: &str| status.replace(' ', "").contains(&format!("\"role\":\"{role}\""));
            if is_attached("home") && is_attached("second") { Ok(()) } else { Err(status) }
        })?;
        let address = host.sh(&format!("dig +short {name}.net.example"))?.trim().to_owned();
        Ok(Joined { host, agent, address, _site: site })
    }
}

/// Measures all of it.
pub(crate) fn measure(figures: &mut Figures) -> Result {
    let lab = Lab::new()?;
    let mut internet = Internet::new(&lab)?;
    relayed(&mut internet, figures)?;
    strangers(&mut internet, figures)?;
    roaming(&mut internet, figures)
}

/// Two that only directors connect: the round trip by way of one, and what is lost when one drains.
fn relayed(internet: &mut Internet<'_>, figures: &mut Figures) -> Result {
    let (a, b) = (internet.host("north", Kind::Symmetric)?, internet.host("south", Kind::Symmetric)?);
    let mut round_trips = pings(&a.host, &b.address, 200, "0.01")?;
    let round_trip = quantile(&mut round_trips, 0.5);
    figures.report("round trip through a director, p50", milliseconds(round_trip), "ms");

    let stream = Stream::start(&a.host, &b.address, "0.002")?;
    for round in 0..DRAINS {
        let number = round % internet.directors.len();
        std::thread::sleep(SETTLED);
        internet.directors[number].stop()?;
        std::thread::sleep(SETTLED);
        internet.directors[number].run()?;
        internet.directors[number].wait_attached(2)?;
    }
    std::thread::sleep(SETTLED);
    let (sent, times) = stream.end()?;
    let lost = sent.saturating_sub(times.len());
    figures.report(
        &format!("lost of {sent} pings while a director drained {DRAINS} times"),
        lost as f64,
        "pings",
    );
    Ok(())
}

/// Each calls each other one for the first time.
fn strangers(internet: &mut Internet<'_>, figures: &mut Figures) -> Result {
    let hosts = (0..STRANGERS)
        .map(|n| internet.host(&format!("host-{n}"), Kind::Open))
        .collect::<Result<Vec<_>>>()?;
    let (mut firsts, mut promotions) = (Vec::new(), Vec::new());
    for (n, a) in hosts.iter().enumerate() {
        for b in &hosts[n + 1..] {
            let called = now();
            firsts.extend(pings(&a.host, &b.address, 1, "1")?);
            let since = wait_for("a direct path", PATIENCE, || {
                direct_since(&a.agent, b.host.name()).map_err(|error| error.to_string())
            })?;
            promotions.push(since.saturating_sub(called));
        }
    }
    let pairs = firsts.len();
    for (q, name) in [(0.5, "p50"), (0.99, "p99")] {
        let figure = format!("first packet to a stranger and back, {pairs} pairs, {name}");
        figures.report(&figure, milliseconds(quantile(&mut firsts, q)), "ms");
        let figure = format!("from the first packet to a direct path, {pairs} pairs, {name}");
        figures.report(&figure, milliseconds(quantile(&mut promotions, q)), "ms");
    }
    Ok(())
}

/// A host changes its address again and again, while another one pings it a thousand times a second.
fn roaming(internet: &mut Internet<'_>, figures: &mut Figures) -> Result {
    let (rover, still) = (internet.host("rover", Kind::Open)?, internet.host("still", Kind::PortRestricted)?);
    pings(&still.host, &rover.address, 10, "0.1")?;
    wait_for("a direct path", PATIENCE, || {
        direct_since(&still.agent, "rover").map(drop).map_err(|error| error.to_string())
    })?;
    let stream = Stream::start(&still.host, &rover.address, "0.001")?;
    let mut moves = Vec::new();
    let mut old = format!("198.51.100.{}", internet.sites - 1);
    for round in 0..ROAMS {
        std::thread::sleep(SETTLED);
        let new = format!("198.51.100.{}", 150 + round % 2);
        moves.push(now());
        rover.host.sh(&format!(
            "ip addr del {old}/24 dev eth0; ip addr add {new}/24 dev eth0; ip route replace default via 198.51.100.254"
        ))?;
        old = new;
    }
    std::thread::sleep(SETTLED);
    let (_, times) = stream.end()?;
    let gap = |moved: &Duration| {
        let pairs = times.iter().zip(times.iter().skip(1));
        let around = pairs.filter(|(_, after)| (*moved..*moved + SETTLED).contains(*after));
        around.map(|(before, after)| after.saturating_sub(*before)).max().unwrap_or(SETTLED)
    };
    let mut gaps: Vec<Duration> = moves.iter().map(gap).collect();
    for (q, name) in [(0.5, "p50"), (0.99, "p99")] {
        let figure = format!("gap of a host that changes its address, {ROAMS} times, {name}");
        figures.report(&figure, milliseconds(quantile(&mut gaps, q)), "ms");
    }
    Ok(())
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// Civil time, as the agent's status has it.
#[expect(clippy::disallowed_methods, reason = "what is measured is told in civil time")]
fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Since when the path to a peer is direct.
fn direct_since(agent: &Agent, peer: &str) -> Result<Duration> {
    let text = agent.ask(&["status", "-o", "json"])?;
    let status: GetStatusResponse =
        serde_json::from_str(&text).map_err(|error| failed("a status", &error))?;
    let found = status.peers.into_iter().find(|found| found.name == peer && found.path == "direct");
    let since = found.and_then(|found| found.path_since).ok_or_else(|| failed("a direct path", &text))?;
    let seconds = Duration::from_secs(u64::try_from(since.seconds).unwrap_or_default());
    Ok(seconds + Duration::from_nanos(u64::try_from(since.nanos).unwrap_or_default()))
}

/// Round trips of pings that were answered.
fn pings(host: &Host, address: &str, count: u32, interval: &str) -> Result<Vec<Duration>> {
    let output = host.sh(&format!("ping -n -c {count} -i {interval} -W 10 {address}"))?;
    let time = |line: &str| line.split_once("time=")?.1.split(' ').next()?.parse::<f64>().ok();
    Ok(output.lines().filter_map(time).map(|ms| Duration::from_secs_f64(ms / 1000.0)).collect())
}

/// Pings without a pause.
struct Stream(Process);

impl Stream {
    fn start(host: &Host, address: &str, interval: &str) -> Result<Self> {
        let mut ping = host.command("ping");
        ping.args(["-D", "-n", "-i", interval, address]).stdin(Stdio::null());
        Ok(Self(host.spawn("stream", ping)?))
    }

    /// How many were sent, and when answers came.
    fn end(mut self) -> Result<(usize, Vec<Duration>)> {
        self.0.signal(Signal::INT)?;
        self.0.wait(PATIENCE)?;
        let log = self.0.log();
        let summary = log.lines().find(|line| line.contains("packets transmitted")).unwrap_or_default();
        let sent = summary.split(' ').next().and_then(|sent| sent.parse::<usize>().ok());
        let sent = sent.ok_or_else(|| failed("a summary of pings", &log))?;
        let time = |line: &str| line.strip_prefix('[')?.split_once(']')?.0.parse::<f64>().ok();
        let answers = log.lines().filter(|line| line.contains("bytes from"));
        // The last one may still be on its way.
        let times: Vec<Duration> = answers.filter_map(time).map(Duration::from_secs_f64).collect();
        Ok((sent.min(times.len().max(sent - 1)), times))
    }
}
