//! From an operator's call to the kernel of a host, and to a thousand other agents, with real processes and sessions.

use std::{net::Ipv4Addr, os::fd::OwnedFd, time::Duration};

use muster_agent::nftables::Socket;
use muster_common::time::Instant;
use muster_integration_tests::{
    Host, Lab, Result,
    device::{Error, operator},
    expect, failed,
    figures::{Figures, median, quantile},
    muster::{Agent, Registrar},
    population, run_on,
    swarm::Swarm,
};
use muster_proto::admin::{
    EndpointSlice, ObjectMeta, UpdateEndpointSliceRequest,
    endpoint_slice_service_client::EndpointSliceServiceClient,
};
use tokio::io::unix::AsyncFd;
use tonic::transport::Channel;

/// One in four of them is headless, and has no virtual IP: 10,000 have one.
const SERVICES: u32 = 13_334;
const ENDPOINTS: u32 = 10;
const AGENTS: usize = 1000;
const CHANGES: u32 = 300;
const STARTS: usize = 5;
const PAUSE: Duration = Duration::from_millis(20);
const PATIENCE: Duration = Duration::from_secs(60);
const MEBI: f64 = 1024.0 * 1024.0;
const LIMITS: &str = "[limits]\njoins_per_second = 1000000\njoins_burst = 1000000\n";

/// How long it took until a change was where it belongs.
#[derive(Default)]
struct Times {
    call: Vec<Duration>,
    kernel: Vec<Duration>,
    swarm: Vec<Duration>,
}

pub(super) fn measure(lab: &Lab, figures: &mut Figures) -> Result {
    let switch = lab.switch("agents")?;
    let (hq, host) = (lab.host("agents-hq")?, lab.host("agents-a")?);
    switch.plug(&hq, &["192.0.2.1/24"])?;
    switch.plug(&host, &["192.0.2.2/24"])?;
    let mut registrar = Registrar::init(&hq, "net.example", "192.0.2.1", LIMITS)?;
    registrar.serve()?;
    let join = registrar.new_join_command(&["--reusable"])?;
    let mut agent = Agent::new(&host, "")?;
    agent.join(&join, "a")?;
    agent.run()?;
    // Long enough that what a start needs has been given back.
    std::thread::sleep(Duration::from_secs(5));
    let without = resident(&mut agent)?;
    agent.stop()?;
    registrar.stop()?;
    registrar.fill_services(0..SERVICES, ENDPOINTS)?;
    registrar.serve()?;
    let socket = watch(&host)?;
    agent.run()?;
    let runtime = hq.runtime()?;
    let (credential, token) = (registrar.credential(), join);
    let (table, mut swarm, slices) = run_on(&runtime, async move {
        let mut table = Table::new(socket)?;
        table.changed().await?;
        let mut swarm = Swarm::start(&token, AGENTS);
        swarm.all_told(1).await?;
        let slices = EndpointSliceServiceClient::new(operator(&credential).await?);
        Ok((table, swarm, slices))
    })?;
    let with = resident(&mut agent)?;
    let before = processor_time(&mut agent)?;
    let mut times = run_on(&runtime, async move {
        let times = change(&mut swarm, table, slices).await;
        drop(swarm);
        times
    })?;
    let cpu = processor_time(&mut agent)?.saturating_sub(before);
    let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
    let what = format!("one of {} endpoints changes, {AGENTS} agents", 10_000 * ENDPOINTS);
    for (name, times) in [
        ("until the registrar answers", &mut times.call),
        ("from the call to a host's kernel", &mut times.kernel),
        ("from the call to the last agent", &mut times.swarm),
    ] {
        for q in [0.5, 0.99] {
            let figure = format!("agents: {what}, {name}, p{}", q * 100.0);
            figures.report(&figure, milliseconds(quantile(times, q)), "ms");
        }
    }
    let each = milliseconds(cpu) / f64::from(CHANGES);
    figures.report("agents: processor time of a change, all of the agent", each, "ms");
    figures.report("agents: memory of an agent without Services", without / MEBI, "MiB");
    figures.report("agents: memory of an agent with 10,000 Services of 10 endpoints", with / MEBI, "MiB");
    // Long enough that what it knows is on disk.
    std::thread::sleep(Duration::from_secs(5));
    registrar.kill();
    let mut starts = Vec::new();
    for _ in 0..STARTS {
        agent.stop()?;
        let socket = watch(&host)?;
        let began = Instant::now();
        agent.start()?;
        let table = run_on(&runtime, async move { Table::new(socket)?.changed().await })?;
        starts.push(milliseconds(table - began));
        let list = "nft list map inet muster_muster0_services services4 | grep -o goto | wc -l";
        let written = host.sh(list)?;
        expect(written.trim() == "10000", "10,000 virtual IPs at once", &written)?;
    }
    let figure = "agents: from an agent's start, without a registrar, to the virtual IPs of 10,000 Services";
    figures.report(figure, median(&mut starts), "ms");
    agent.stop()
}

/// What hears of changes to the agent's table on its host.
fn watch(host: &Host) -> Result<Socket> {
    host.enter(|| Socket::new("muster_muster0_services").map_err(std::io::Error::other))
}

fn resident(agent: &mut Agent) -> Result<f64> {
    agent.process().ok_or_else(|| failed("muster-agent run", "it does not run"))?.resident()
}

fn processor_time(agent: &mut Agent) -> Result<Duration> {
    agent.process().ok_or_else(|| failed("muster-agent run", "it does not run"))?.processor_time()
}

/// The agent's table of virtual IPs, as the kernel tells of it to others.
struct Table {
    socket: Socket,
    events: AsyncFd<OwnedFd>,
}

impl Table {
    fn new(socket: Socket) -> std::io::Result<Self> {
        #[expect(
            deprecated,
            reason = "the descriptor is owned, and closed after its registration; the successor is unsafe"
        )]
        let events = AsyncFd::new(socket.changes().try_clone_to_owned()?)?;
        Ok(Self { socket, events })
    }

    /// Waits until something in the table has changed.
    async fn changed(&mut self) -> Result<Instant, Error> {
        let wait = async {
            loop {
                let mut guard = self.events.readable().await?;
                guard.clear_ready();
                if self.socket.is_disturbed()? {
                    return Ok(Instant::now());
                }
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.map_err(|_| "the table does not change")?
    }
}

/// Changes one endpoint after another.
async fn change(
    swarm: &mut Swarm,
    mut table: Table,
    mut slices: EndpointSliceServiceClient<Channel>,
) -> Result<Times, Error> {
    let mut times = Times::default();
    for number in 0..CHANGES {
        tokio::time::sleep(PAUSE).await;
        let request = other_endpoint(number);
        // What has changed so far is not of this call.
        table.socket.is_disturbed()?;
        let began = Instant::now();
        let update = async {
            let response = slices.update_endpoint_slice(request).await?.into_inner();
            Ok::<_, Error>((response, Instant::now()))
        };
        let (answer, kernel) = tokio::join!(update, table.changed());
        let (answer, answered) = answer?;
        let slice = answer.endpoint_slice.and_then(|slice| slice.metadata).ok_or("no slice in the answer")?;
        times.call.push(answered - began);
        times.kernel.push(kernel? - began);
        times.swarm.push(swarm.all_told(slice.resource_version).await? - began);
    }
    Ok(times)
}

/// Another address for the first endpoint of a Service.
fn other_endpoint(number: u32) -> UpdateEndpointSliceRequest {
    // All over the Services that have virtual IPs, each once.
    let mut virtual_ips = (0..SERVICES).filter(|service| !population::is_headless(*service));
    let service = virtual_ips.nth(number as usize * 33).unwrap_or(1);
    let address = |endpoint: u32| match endpoint {
        0 => Ipv4Addr::from(0x0AF0_0000 + number),
        _ => Ipv4Addr::from(0x0AE0_0000 + number * ENDPOINTS + endpoint),
    };
    let metadata = ObjectMeta {
        name: format!("s{service}"),
        namespace: "default".into(),
        network: "default".into(),
        ..ObjectMeta::default()
    };
    let slice = EndpointSlice {
        metadata: Some(metadata),
        address_type: "IPv4".into(),
        endpoints: population::service_endpoints((0..ENDPOINTS).map(address)),
        ports: Vec::new(),
    };
    UpdateEndpointSliceRequest {
        endpoint_slice: Some(slice),
        update_mask: Some(pbjson_types::FieldMask { paths: vec!["endpoints".into()] }),
        validate_only: false,
    }
}
