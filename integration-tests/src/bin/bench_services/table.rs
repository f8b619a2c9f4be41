//! The table in the kernel: 10,000 Services with 100,000 endpoints, written whole, and changed one endpoint at a time.

use std::{collections::BTreeSet, io, net::Ipv4Addr, time::Duration};

use muster_agent::{
    nftables::Socket,
    virtual_ips::{
        known::Known,
        ruleset::Ruleset,
        table::{Place, Table},
    },
};
use muster_common::{digest, time::Instant};
use muster_integration_tests::{
    Lab, LabError, Result,
    figures::{Figures, median, quantile},
};
use muster_proto::registration::{
    VirtualEndpoint, VirtualEndpoints, VirtualPort, VirtualService, VirtualServicesChanged,
};
use prost::Message as _;
use rustix::time::{ClockId, clock_gettime};

const SERVICES: u32 = 10_000;
const ENDPOINTS: u32 = 10;
const CHANGES: usize = 1000;
const LOADS: usize = 5;

fn port(number: u32) -> VirtualPort {
    VirtualPort { name: String::new(), protocol: "TCP".into(), port: number }
}

/// The Service of a number.
pub(crate) fn service(number: u32) -> VirtualService {
    VirtualService {
        namespace: "default".into(),
        name: format!("s{number}"),
        addresses: vec![Ipv4Addr::from(0x6460_0000 + number).to_string()],
        ports: vec![port(80)],
        ..VirtualService::default()
    }
}

/// Its endpoints; the first one has another address in each `version`.
pub(crate) fn endpoints(number: u32, version: u32) -> VirtualEndpoints {
    let endpoint = |n: u32| VirtualEndpoint {
        address: match n {
            0 => Ipv4Addr::from(0x6450_0000 + version),
            n => Ipv4Addr::from(0x6440_0000 + number * ENDPOINTS + n),
        }
        .to_string(),
        is_ready: true,
        is_serving: true,
        ..VirtualEndpoint::default()
    };
    VirtualEndpoints {
        namespace: "default".into(),
        name: format!("s{number}-1"),
        service: format!("s{number}"),
        endpoints: (0..ENDPOINTS).map(endpoint).collect(),
        ports: vec![port(8080)],
    }
}

/// All Services up to `count`.
pub(crate) fn snapshot(count: u32) -> VirtualServicesChanged {
    let services: Vec<_> = (0..count).map(service).collect();
    let endpoints: Vec<_> = (0..count).map(|number| endpoints(number, number)).collect();
    sealed(VirtualServicesChanged {
        is_snapshot: true,
        services,
        endpoints,
        revision: 1,
        ..VirtualServicesChanged::default()
    })
}

/// With the digest of all that is in it.
pub(crate) fn sealed(mut snapshot: VirtualServicesChanged) -> VirtualServicesChanged {
    let services = snapshot.services.iter().map(|message| message.encode_to_vec());
    let endpoints = snapshot.endpoints.iter().map(|message| message.encode_to_vec());
    snapshot.digest = digest::of_all(services.chain(endpoints));
    snapshot
}

/// Processor time that this thread has taken.
fn processor_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// What was measured in the namespace.
struct Measured {
    loads: Vec<f64>,
    changes: Vec<Duration>,
    change_cpu: Duration,
}

pub(super) fn measure(lab: &Lab, figures: &mut Figures) -> Result {
    let host = lab.host("table")?;
    let mut measured = host.enter(|| work().map_err(io::Error::other)).map_err(|error| {
        LabError::Command { command: "keeping a table of virtual IPs".into(), reason: error.to_string() }
    })?;
    let what = format!("{SERVICES} Services with {} endpoints", SERVICES * ENDPOINTS);
    figures.report(
        &format!("table: {what}, from what the registrar says to the kernel"),
        median(&mut measured.loads),
        "s",
    );
    let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
    for q in [0.5, 0.99] {
        let figure = format!("table: one endpoint of them changes, p{}", q * 100.0);
        figures.report(&figure, milliseconds(quantile(&mut measured.changes, q)), "ms");
    }
    let each = milliseconds(measured.change_cpu) / CHANGES as f64;
    figures.report("table: processor time of a change", each, "ms");
    Ok(())
}

fn work() -> Result<Measured, Box<dyn std::error::Error + Send + Sync>> {
    let mut socket = Socket::new("muster_muster0_services")?;
    let place = Place::default();
    let mut measured = Measured { loads: Vec::new(), changes: Vec::new(), change_cpu: Duration::ZERO };
    let (mut known, mut table, mut ruleset) = (Known::default(), Table::default(), Ruleset::new("muster0"));
    let mut digest = 0;
    for _ in 0..LOADS {
        let snapshot = snapshot(SERVICES);
        digest = snapshot.digest;
        let began = Instant::now();
        (known, table) = (Known::default(), Table::default());
        let services = known.take(snapshot)?;
        table.update(&known, &place, &services);
        socket.commit("write", ruleset.load(&table, &place))?;
        measured.loads.push((Instant::now() - began).as_secs_f64());
    }
    let cpu = processor_time();
    for n in 0..CHANGES {
        let number = u32::try_from(n * 7)? % SERVICES;
        let (old, new) = (endpoints(number, number), endpoints(number, SERVICES + u32::try_from(n)?));
        let of = |message: &VirtualEndpoints| digest::of_message(&message.encode_to_vec());
        digest = digest.wrapping_sub(of(&old)).wrapping_add(of(&new));
        let message = VirtualServicesChanged {
            endpoints: vec![new],
            revision: 2 + u64::try_from(n)?,
            digest,
            ..VirtualServicesChanged::default()
        };
        let began = Instant::now();
        let services: BTreeSet<_> = known.take(message)?;
        let changes = table.update(&known, &place, &services);
        socket.commit("change", ruleset.change(&changes))?;
        measured.changes.push(Instant::now() - began);
    }
    measured.change_cpu = processor_time().saturating_sub(cpu);
    Ok(measured)
}
