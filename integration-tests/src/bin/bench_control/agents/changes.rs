//! What changes cost: those that concern nobody, and one that a thousand agents have to be told of.

use std::{net::Ipv4Addr, time::Duration};

use muster_common::time::Instant;
use muster_integration_tests::{
    Host, Result,
    device::{Device, Error, register_request},
    failed,
    figures::{Figures, quantile},
    run_on,
};
use tokio::task::JoinSet;

use super::{AGENTS, Crowd, Idle, REST};
use crate::milliseconds;

#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
pub(super) const COUNT: f64 = AGENTS as f64;
/// Devices that change while nobody holds them, and how often each does.
const STRANGERS: u64 = 50;
const CHANGES: u32 = 40;
/// Between two changes of one device.
const PAUSE: Duration = Duration::from_secs(1);
/// Agents that hold the device that changes, and how often it does.
const HOLDERS: usize = 1000;
const TOLD: u8 = 30;

/// Octets that have come to all agents so far, as the kernel counts them on their connections to 127.0.0.1.
pub(super) fn received(host: &Host) -> Result<f64> {
    let sockets = host.sh("ss -tniHO dst 127.0.0.1:7500")?;
    let octets = |line: &str| {
        let counter = line.split_whitespace().find_map(|word| word.strip_prefix("bytes_received:"));
        counter.map_or(Ok(0.0), str::parse::<f64>)
    };
    let octets: std::result::Result<Vec<f64>, _> = sockets.lines().map(octets).collect();
    octets.map(|octets| octets.iter().sum()).map_err(|error| failed("reading the output of ss", error))
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
pub(super) fn count(number: u64) -> f64 {
    number as f64
}

/// Devices change that no agent holds. What comes to the agents beyond what comes at rest is what it costs them.
pub(super) fn unrelated(crowd: Crowd, idle: Idle, figures: &mut Figures) -> Result<Crowd> {
    // By another address of the registrar's, so that these are not among the agents' connections.
    let join = crowd.registrar.new_join_command(&["--reusable"])?.with("registrar", "127.0.0.2:7500");
    let devices = run_on(&crowd.runtime, async move {
        let mut devices = Vec::new();
        for number in 0..STRANGERS {
            let mut client = Device::join(&join, &format!("stranger{number}")).await?.connect().await?;
            client.register(register_request(number + 1, 0)).await?;
            devices.push((number, client));
        }
        Ok(devices)
    })?;
    let (octets, messages) = (received(&crowd.host)?, crowd.swarm.messages());
    let began = Instant::now();
    run_on(&crowd.runtime, async move {
        let mut tasks = JoinSet::new();
        for (number, mut client) in devices {
            tasks.spawn(async move {
                for change in 1..=CHANGES {
                    client.register(register_request(number + 1, change)).await?;
                    tokio::time::sleep(PAUSE).await;
                }
                Ok::<_, Error>(())
            });
        }
        while let Some(done) = tasks.join_next().await {
            done??;
        }
        Ok(())
    })?;
    // The same span as at rest, so that as many keepalives are in it.
    std::thread::sleep(REST.saturating_sub(Instant::now() - began));
    let more = received(&crowd.host)? - octets - idle;
    let changes = count(STRANGERS) * f64::from(CHANGES);
    let messages = count(crowd.swarm.messages() - messages);
    let figure = |what: &str| format!("agents: {what}, {changes} changes of devices that nobody holds");
    figures.report(&figure("messages to all agents"), messages, "messages");
    figures.report(
        &figure("octets to each agent for each, beyond those at rest"),
        more / changes / COUNT,
        "octets",
    );
    Ok(crowd)
}

/// A device moves, and all that hold it are told.
pub(super) fn held(crowd: Crowd, figures: &mut Figures) -> Result<Crowd> {
    let (crowd, mut times) = crowd.with(|mut swarm| async move {
        let mut holders = swarm.members().to_vec();
        let device = holders.pop().ok_or("there is no agent")?;
        holders.truncate(HOLDERS);
        let address = device.address().await?;
        let mut reaching = JoinSet::new();
        for holder in holders {
            reaching.spawn(async move { holder.reach(address).await });
        }
        while let Some(reached) = reaching.join_next().await {
            reached??;
        }
        let mut times = Vec::new();
        for change in 1..=TOLD {
            // The agent itself tells changes at most once a second.
            tokio::time::sleep(PAUSE + PAUSE / 10).await;
            let began = Instant::now();
            let endpoint = device.also_at(Ipv4Addr::new(192, 0, 2, change).into());
            times.extend(swarm.told_of(endpoint, HOLDERS).await?.into_iter().map(|at| at - began));
        }
        Ok((swarm, times))
    })?;
    let figure =
        |q: &str| format!("agents: from a device's move until it is known to each of {HOLDERS} holders, {q}");
    figures.report(&figure("p50"), milliseconds(quantile(&mut times, 0.5)), "ms");
    let slow = milliseconds(quantile(&mut times, 0.99));
    figures.compare(&figure("p99"), slow, "ms", "goal of 100", 100.0);
    figures.report(&figure("slowest"), milliseconds(quantile(&mut times, 1.0)), "ms");
    Ok(crowd)
}
