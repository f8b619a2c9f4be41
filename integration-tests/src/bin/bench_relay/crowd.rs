//! Ten thousand devices on one director: the memory that they cost while they are idle, and the time in which all of
//! them are attached again after it has restarted.

use std::{net::SocketAddr, time::Duration};

use muster_common::time::Instant;
use muster_integration_tests::{
    Result,
    attachments::Crowd,
    failed,
    figures::{Figures, median},
    population::device_uid,
    run_on,
};

use crate::{
    director::Network,
    peers::{PORT, RELAY},
    turns::{Hosts, RELAY_CPU},
};

/// After which what was needed to attach has been given back.
const SETTLED: Duration = Duration::from_secs(3);

/// Measures with so many devices, which the registrar knows.
pub(crate) fn measure(
    hosts: &Hosts,
    network: &mut Network,
    devices: u32,
    rounds: u32,
    figures: &mut Figures,
) -> Result {
    let director = SocketAddr::new(RELAY.parse().map_err(|error| failed("an address", error))?, PORT);
    let credentials = (0..devices)
        .map(|number| network.issuer.device(device_uid(number)))
        .collect::<std::result::Result<Vec<_>, _>>()
        .map_err(|error| failed("certificates", error))?;
    let all = credentials.len();
    let runtime = hosts.sender.runtime()?;
    let mut crowd = run_on(&runtime, async move { Crowd::new(credentials, director).await })?;

    let (mut memory, mut attached, mut again) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        network.start(Some(RELAY_CPU))?;
        std::thread::sleep(SETTLED);
        let empty = resident(network)?;
        let (back, seconds) = attach(&runtime, crowd, all)?;
        crowd = back;
        attached.push(seconds);
        std::thread::sleep(SETTLED);
        memory.push((resident(network)? - empty) / f64::from(devices) / 1024.0);
        network.director.kill();
        network.start(Some(RELAY_CPU))?;
        let (back, seconds) = attach(&runtime, crowd, all)?;
        crowd = back;
        again.push(seconds);
        network.director.wait_attached(u64::from(devices))?;
        network.director.kill();
    }
    let figure = format!("{devices} devices");
    figures.report(&format!("{figure}, memory of each"), median(&mut memory), "KiB");
    figures.report(&format!("{figure}, attaching"), median(&mut attached), "s");
    figures.report(&format!("{figure}, attaching again after a restart"), median(&mut again), "s");
    Ok(())
}

/// Seconds until all are attached and have an answer to their hellos.
fn attach(runtime: &tokio::runtime::Runtime, mut crowd: Crowd, all: usize) -> Result<(Crowd, f64)> {
    let start = Instant::now();
    let crowd = run_on(runtime, async move {
        crowd.crash(0..all);
        crowd.attach(0..all).await?;
        Ok(crowd)
    })?;
    Ok((crowd, (Instant::now() - start).as_secs_f64()))
}

fn resident(network: &mut Network) -> Result<f64> {
    let ended = || failed("reading memory", "the director ended");
    network.director.process().ok_or_else(ended)?.resident()
}
