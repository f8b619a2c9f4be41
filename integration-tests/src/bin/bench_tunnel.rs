//! `make bench-tunnel`: one TCP stream between two hosts through Muster's tunnel, beside the same through
//! wireguard-go and through no tunnel at all, in turn in the same namespaces. For orientation.
#![forbid(unsafe_code)]
#![allow(clippy::print_stderr, reason = "a report is what this program is for")]

use std::{process::ExitCode, time::Duration};

use muster_integration_tests::{
    Host, Lab, LabError, Process, Result,
    figures::{Figures, median},
    muster::{Agent, Registrar},
    process::wait_for,
};

/// Rounds in which each peer has one turn; medians are reported.
const ROUNDS: usize = 5;
/// Seconds of one turn.
const TURN: u32 = 4;

fn main() -> ExitCode {
    match bench() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-tunnel: {error}");
            ExitCode::FAILURE
        }
    }
}

fn bench() -> Result {
    let lab = Lab::new()?;
    let mut figures = Figures::new("tunnel");
    let switch = lab.switch("lan")?;
    let (registrar_host, left, right) = (lab.host("hq")?, lab.host("left")?, lab.host("right")?);
    switch.plug(&registrar_host, &["192.0.2.1/24"])?;
    switch.plug(&left, &["192.0.2.10/24"])?;
    switch.plug(&right, &["192.0.2.20/24"])?;
    let mut registrar = Registrar::init(&registrar_host, "net.example", "192.0.2.1", "")?;
    registrar.serve()?;
    let join = registrar.new_join_command(&["--reusable"])?;
    let mut agents = [Agent::new(&left, "")?, Agent::new(&right, "")?];
    for (agent, name) in agents.iter_mut().zip(["left", "right"]) {
        agent.join(&join, name)?;
        agent.run()?;
    }
    let muster = left.sh("dig +short right.net.example")?.trim().to_owned();
    let mut command = right.command("iperf3");
    command.arg("-s");
    let _server = right.spawn("iperf3", command)?;
    let mut ways = vec![("no tunnel", "192.0.2.20".to_owned()), ("muster", muster)];
    let other = if left.try_sh("command -v wireguard-go && command -v wg")?.status.success() {
        ways.push(("wireguard-go", "10.9.0.2".to_owned()));
        Some(wireguard_go(&left, &right)?)
    } else {
        figures.missing("one TCP stream, wireguard-go", "wireguard-go cannot be installed here");
        None
    };
    for (_, target) in &ways {
        wait_for("an answer through the tunnel", Duration::from_secs(20), || {
            left.sh(&format!("ping -c 1 -W 1 {target}")).map_err(|e| e.to_string())
        })?;
    }
    let mut speeds = vec![Vec::new(); ways.len()];
    for _ in 0..ROUNDS {
        for ((_, target), speeds) in ways.iter().zip(&mut speeds) {
            speeds.push(stream(&left, target)?);
        }
    }
    let mut medians = speeds.iter_mut().map(|speeds| median(speeds));
    let (bare, muster) = (medians.next().unwrap_or_default(), medians.next().unwrap_or_default());
    figures.report("one TCP stream, no tunnel", bare, "Mbit/s");
    match medians.next() {
        Some(peer) => {
            figures.report("one TCP stream, wireguard-go", peer, "Mbit/s");
            figures.compare("one TCP stream, muster", muster, "Mbit/s", "wireguard-go", peer);
        }
        None => figures.report("one TCP stream, muster", muster, "Mbit/s"),
    }
    drop(other);
    for agent in &mut agents {
        agent.stop()?;
    }
    registrar.stop()?;
    figures.write().map(drop)
}

/// Mbit/s of one TCP stream (cubic) from `host` to `target`, as its receiver counts them.
fn stream(host: &Host, target: &str) -> Result<f64> {
    let printed = host.sh(&format!("iperf3 -c {target} -t {TURN} -O 1 -C cubic -f m"))?;
    let line = printed.lines().find(|line| line.ends_with("receiver"));
    let value = line.and_then(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let unit = words.iter().position(|word| *word == "Mbits/sec")?;
        words.get(unit.checked_sub(1)?)?.parse().ok()
    });
    value.ok_or_else(|| LabError::Command { command: format!("iperf3 -c {target}"), reason: printed })
}

/// A tunnel of wireguard-go's between the two hosts, `10.9.0.1` and `10.9.0.2`, with Muster's MTU.
fn wireguard_go(left: &Host, right: &Host) -> Result<[Process; 2]> {
    let key = |host: &Host| -> Result<(String, String)> {
        let private = host.sh("wg genkey")?.trim().to_owned();
        let public = host.sh(&format!("echo {private} | wg pubkey"))?.trim().to_owned();
        Ok((private, public))
    };
    let (left_key, right_key) = (key(left)?, key(right)?);
    let start = |host: &Host, private: &str, own: &str, peer: &str, address: &str, endpoint: &str| {
        // Each host has its own interface names, and all of them one directory of sockets.
        let name = format!("wg{}", own.rsplit('.').next().unwrap_or_default());
        let mut command = host.command("wireguard-go");
        command.args(["-f", &name]);
        let process = host.spawn("wireguard-go", command)?;
        wait_for("wireguard-go", Duration::from_secs(10), || {
            host.sh(&format!("wg show {name}")).map_err(|e| e.to_string())
        })?;
        let file = host.directory().join("wg.key");
        host.sh(&format!(
            "umask 077; echo {private} > {file}; \
             wg set {name} private-key {file} listen-port 51820 peer {peer} endpoint {endpoint}:51820 \
             allowed-ips {address}/32; ip address add {own}/24 dev {name}; ip link set {name} mtu 1420 up",
            file = file.display()
        ))?;
        Ok(process)
    };
    Ok([
        start(left, &left_key.0, "10.9.0.1", &right_key.1, "10.9.0.2", "192.0.2.20")?,
        start(right, &right_key.0, "10.9.0.2", &left_key.1, "10.9.0.1", "192.0.2.10")?,
    ])
}
