//! The lab (a sender, a relay, a receiver, with a cable between each two), the turns, and the figures made of them.

use std::{collections::BTreeMap, process::Command, time::Duration};

use muster_common::time::Instant;
use muster_integration_tests::{
    Host, Lab, LabError, Result,
    figures::{Figures, median},
    process::{check, wait_for},
};

use clap::ValueEnum as _;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::{
    Link, Options, Part, agents, crowd,
    director::Network,
    peers::{PORT, Peer, RECEIVER, RELAY, Relay, own},
    tcp,
};

/// The processor that relays have to themselves, and that of everything else.
pub(crate) const RELAY_CPU: usize = 0;
const OTHER_CPU: usize = 1;
/// Octets that are relayed in each datagram.
const PAYLOADS: [usize; 2] = [64, 1_400];
/// Ethernet, IPv4 and UDP headers.
const HEADERS: f64 = 14.0 + 20.0 + 8.0;
/// Devices that the registrar knows.
const DEVICES: u32 = 10_000;
/// Before a turn is measured.
pub(crate) const WARM_UP: Duration = Duration::from_millis(300);

/// The hosts of the lab.
pub(crate) struct Hosts {
    pub(crate) sender: Host,
    pub(crate) relay: Host,
    pub(crate) receiver: Host,
}

/// What a turn has shown.
#[derive(Clone, Copy)]
struct Sample {
    /// Datagrams that arrived, a second.
    rate: f64,
    /// Seconds of the relay's processor for a million of them.
    cost: f64,
}

/// Rates and costs by measure and peer.
type Samples = BTreeMap<String, BTreeMap<Peer, (Vec<f64>, Vec<f64>)>>;

/// Measures what is asked for.
pub(crate) fn bench(options: &Options) -> Result {
    let mut figures = Figures::new("relay");
    let wanted = |part| options.parts.is_empty() || options.parts.contains(&part);
    // Before everything has its processor.
    if wanted(Part::Agents) {
        agents::measure(&mut figures)?;
    }
    if options.parts == [Part::Agents] {
        return figures.write().map(drop);
    }
    let mut pin = Command::new("taskset");
    pin.args(["-a", "-c", "-p", &OTHER_CPU.to_string(), &std::process::id().to_string()]);
    check(pin)?;
    open_files()?;
    let lab = Lab::new()?;
    let hosts = Hosts::new(&lab)?;
    let mut hold = hosts.receiver.command(own()?);
    hold.args(["hold", RECEIVER]);
    let _hold = hosts.receiver.spawn("hold", hold)?;
    let mut network = Network::new(&hosts.relay, DEVICES)?;

    if wanted(Part::Udp) {
        relays(options, &hosts, &mut network, &mut figures)?;
    }
    hosts.set_link(Link::Veth)?;
    if wanted(Part::Tcp) {
        tcp::measure(&hosts, &mut network, options.rounds, options.seconds, &mut figures)?;
    }
    if wanted(Part::Devices) {
        crowd::measure(&hosts, &mut network, DEVICES, options.rounds, &mut figures)?;
    }
    figures.write().map(drop)
}

/// Every relay under load, with every kind of datagrams and link.
fn relays(options: &Options, hosts: &Hosts, network: &mut Network, figures: &mut Figures) -> Result {
    let mut samples = Samples::new();
    let wanted = |peer: &Peer| options.peers.is_empty() || options.peers.contains(peer);
    for link in [Link::Veth, Link::Cards] {
        if options.link.is_some_and(|only| only != link) {
            continue;
        }
        hosts.set_link(link)?;
        for payload in PAYLOADS {
            for runs in [false, true] {
                // One by one, it is the same whatever the link does with runs.
                if !runs && link == Link::Veth && options.link.is_none() {
                    continue;
                }
                let how = if runs { "sent in runs" } else { "sent one by one" };
                let measure = format!("{payload} B, {how}, {}", link.name());
                for _ in 0..options.rounds {
                    for peer in Peer::value_variants().iter().filter(|peer| wanted(peer)) {
                        match hosts.turn(network, *peer, payload, runs, options.seconds) {
                            Ok(sample) => samples.add(&measure, *peer, sample),
                            Err(error) => figures.missing(
                                &format!("{measure}, {}", peer.name()),
                                &error.to_string().replace(['\n', '\t'], " "),
                            ),
                        }
                    }
                }
            }
        }
    }
    samples.report(figures);
    Ok(())
}

/// Ten thousand connections are as many open files, here and in the director.
fn open_files() -> Result {
    let most = getrlimit(Resource::Nofile).maximum;
    let limit = Rlimit { current: most, maximum: most };
    setrlimit(Resource::Nofile, limit)
        .map_err(|error| LabError::Command { command: "setrlimit".into(), reason: error.to_string() })
}

impl Hosts {
    fn new(lab: &Lab) -> Result<Self> {
        let (sender, relay, receiver) = (lab.host("sender")?, lab.host("relay")?, lab.host("receiver")?);
        let cables =
            [("eth0", &sender, "192.0.2.1", RELAY), ("eth1", &receiver, "198.51.100.3", "198.51.100.2")];
        for (port, host, address, of_relay) in cables {
            let mut command = Command::new("ip");
            command.args(["-n", relay.namespace(), "link", "add", port, "type", "veth"]);
            command.args(["peer", "name", "eth0", "netns", host.namespace()]);
            check(command)?;
            relay.sh(&format!("ip address add {of_relay}/24 dev {port}; ip link set {port} up"))?;
            host.sh(&format!("ip address add {address}/24 dev eth0; ip link set eth0 up"))?;
        }
        Ok(Self { sender, relay, receiver })
    }

    fn set_link(&self, link: Link) -> Result {
        let features = match link {
            Link::Veth => "tso on gso on tx-udp-segmentation on gro off",
            Link::Cards => "tso off gso off tx-udp-segmentation off gro on",
        };
        for (host, ports) in [(&self.sender, "eth0"), (&self.relay, "eth0 eth1"), (&self.receiver, "eth0")] {
            host.sh(&format!(
                "PATH=$PATH:/usr/sbin:/sbin; for port in {ports}; do ethtool -K $port {features}; done"
            ))?;
        }
        Ok(())
    }

    /// One relay under load.
    fn turn(
        &self,
        network: &mut Network,
        peer: Peer,
        payload: usize,
        runs: bool,
        seconds: u32,
    ) -> Result<Sample> {
        let mut relay = Relay::start(peer, self, network, RELAY_CPU)?;
        let mut load = self.sender.command("taskset");
        load.args(["-c", &OTHER_CPU.to_string()]).arg(own()?).arg("load");
        load.arg(peer.kind().to_possible_value().map_or_else(String::new, |kind| kind.get_name().to_owned()));
        load.args([&format!("{RELAY}:{PORT}"), RECEIVER, &payload.to_string()]);
        load.args(runs.then_some("--segments")).args(relay.load());
        let mut load = self.sender.spawn("load", load)?;
        let before = self.arrived(peer, payload)?;
        wait_for("datagrams to arrive", Duration::from_secs(10), || {
            if !load.is_running() {
                return Err(format!("the load ended: {}", load.log()));
            }
            let arrived = self.arrived(peer, payload).map_err(|error| error.to_string())? - before;
            if arrived > 1_000.0 { Ok(()) } else { Err(format!("{arrived} have arrived")) }
        })?;
        std::thread::sleep(WARM_UP);
        let (start, arrived, used) = (Instant::now(), self.arrived(peer, payload)?, relay.processor_time()?);
        std::thread::sleep(Duration::from_secs(u64::from(seconds)));
        let arrived = self.arrived(peer, payload)? - arrived;
        let (time, used) = (Instant::now() - start, relay.processor_time()? - used);
        if arrived < 1.0 || !load.is_running() {
            let reason = format!("{arrived} datagrams arrived; {}", load.log());
            return Err(LabError::Command { command: "load".into(), reason });
        }
        Ok(Sample { rate: arrived / time.as_secs_f64(), cost: used.as_secs_f64() / arrived * 1e6 })
    }

    /// Datagrams of the relay that have come to the receiver's interface so far. A run counts there as one packet, with
    /// one set of headers; all of its datagrams have the same length.
    fn arrived(&self, peer: Peer, payload: usize) -> Result<f64> {
        let statistics = "/sys/class/net/eth0/statistics";
        let text = self.receiver.sh(&format!("cat {statistics}/rx_packets {statistics}/rx_bytes"))?;
        let mut numbers = text.split_whitespace().filter_map(|number| number.parse::<f64>().ok());
        let (Some(packets), Some(octets)) = (numbers.next(), numbers.next()) else {
            return Err(LabError::Command { command: "reading counters".into(), reason: text });
        };
        #[expect(clippy::cast_precision_loss, reason = "at most 1,500")]
        let len = (payload + peer.header()) as f64;
        Ok((octets - packets * HEADERS) / len)
    }
}

trait Report {
    fn add(&mut self, measure: &str, peer: Peer, sample: Sample);
    fn report(self, figures: &mut Figures);
}

impl Report for Samples {
    fn add(&mut self, measure: &str, peer: Peer, Sample { rate, cost }: Sample) {
        eprintln!("{measure}, {}: {:.0} k/s, {cost:.3} s per million", peer.name(), rate / 1e3);
        let (rates, costs) = self.entry(measure.to_owned()).or_default().entry(peer).or_default();
        rates.push(rate / 1e3);
        costs.push(cost);
    }

    fn report(self, figures: &mut Figures) {
        for (measure, peers) in self {
            let medians: BTreeMap<Peer, (f64, f64)> = peers
                .into_iter()
                .map(|(peer, (mut rates, mut costs))| (peer, (median(&mut rates), median(&mut costs))))
                .collect();
            for (peer, (rate, cost)) in &medians {
                let figure = format!("{measure}, {}", peer.name());
                figures.report(&figure, *rate, "k/s");
                figures.report(&format!("{figure}, processor time"), *cost, "s per million");
            }
            let Some(&(rate, cost)) = medians.get(&Peer::Director) else { continue };
            for (other, &(others, its)) in medians.iter().filter(|(peer, _)| **peer != Peer::Director) {
                let figure = format!("{measure}, director");
                figures.compare(&figure, rate, "k/s", other.name(), others);
                figures.compare(
                    &format!("{figure}, processor time"),
                    cost,
                    "s per million",
                    other.name(),
                    its,
                );
            }
        }
    }
}
