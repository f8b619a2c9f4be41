//! Data planes that reach each other only through a director: its relay and sockets are real, its sessions are made by
//! hand, without certificates and without a registrar.

use std::{
    net::{IpAddr, SocketAddr},
    num::NonZeroUsize,
    time::Duration,
};

use muster_agent::{
    datapath::{Command, Event, Path, PeerConfig},
    directors::flow::{Attachment, FlowEvent},
    udp::UdpSockets,
};
use muster_common::{frame::Handle, telemetry};
use muster_director::{
    relay::Limits,
    running::{Running, Settings},
};
use muster_tunnel::DirectorId;
use tokio::runtime::Runtime;
use uuid::Uuid;

use crate::{
    device::{Device, virtual_addresses},
    namespace::{Namespace, have_root},
    stream::both_ways,
};

/// What devices call their directors.
const ID: DirectorId = DirectorId(0);
/// How long a hello may stay away until it is noticed in a test.
const HELLO_INTERVAL: Duration = Duration::from_secs(1);

/// A director in a namespace of its own, between the devices' networks, which it does not join.
struct Director {
    namespace: Namespace,
    port: u16,
    metrics: telemetry::Metrics,
    running: Option<Running>,
    runtime: Runtime,
}

impl Director {
    /// Joins the devices to the director, each by a cable: device number n is 10.9.n.2 and fd09:n::2.
    fn between(devices: [&Device; 2]) -> Self {
        let namespace = Namespace::new();
        for (number, device) in (1..).zip(devices) {
            let port = format!("eth{number}");
            let of_device = device.namespace.name();
            namespace.ip(&format!("link add {port} type veth peer name eth0 netns {of_device}"));
            for (namespace, port, host) in [(&namespace, port.as_str(), 1), (&device.namespace, "eth0", 2)] {
                namespace.ip(&format!("addr add 10.9.{number}.{host}/24 dev {port}"));
                namespace.ip(&format!("addr add fd09:{number}::{host}/64 dev {port} nodad"));
                namespace.ip(&format!("link set {port} up"));
            }
        }
        let runtime = Runtime::new().expect("runtime");
        let mut this = Self {
            namespace,
            port: 0,
            metrics: telemetry::Metrics::with_prefix("director"),
            running: None,
            runtime,
        };
        this.start();
        this
    }

    /// Starts it, if it runs already anew: then it knows nobody.
    fn start(&mut self) {
        self.running = None;
        self.metrics = telemetry::Metrics::with_prefix("director");
        let port = self.port;
        let sockets = self.namespace.enter(async || UdpSockets::bind_many(port, NonZeroUsize::MIN));
        let sockets = sockets.expect("bind");
        self.port = sockets[0].port();
        let settings = Settings {
            sockets,
            limits: Limits::default(),
            network: "net".parse().expect("a label"),
            endpoints: vec![],
            hello_interval: HELLO_INTERVAL,
        };
        let _inside = self.runtime.enter();
        self.running = Some(Running::start(settings, &self.metrics).expect("start"));
    }

    fn running(&self) -> &Running {
        self.running.as_ref().expect("running")
    }

    /// Has a device attach that reaches the director at `address`, and returns how it is called there.
    fn attach(&self, device: &Device, number: u8, address: &str) -> Handle {
        let uid = Uuid::from_bytes([number; 16]);
        let from: IpAddr = format!("10.9.{number}.2").parse().expect("an address");
        let attached = self.running().attach(uid, from).expect("attached");
        let attachment = Attachment {
            endpoints: vec![SocketAddr::new(address.parse().expect("an address"), self.port)],
            session: attached.session,
            key: attached.key,
            hello_interval: HELLO_INTERVAL,
        };
        device.send(Command::SetDirector { id: ID, attachment: Some(attachment) });
        attached.handle
    }

    /// A figure of the director's metrics.
    fn metric(&self, line: &str) -> f64 {
        let text = self.metrics.encode();
        let found = text.lines().find_map(|other| other.strip_prefix(line)?.trim().parse().ok());
        found.unwrap_or_else(|| panic!("no {line} in {text}"))
    }
}

impl Drop for Director {
    fn drop(&mut self) {
        let _inside = self.runtime.enter();
        self.running = None;
    }
}

/// A device as one that can be reached through the director alone.
fn relayed(device: &Device, handle: Handle) -> PeerConfig {
    PeerConfig { relays: vec![(ID, handle)], ..device.as_peer(vec![]) }
}

/// The next event of a flow that `is_it`.
fn flow_event(device: &mut Device, is_it: impl Fn(&FlowEvent) -> bool) -> FlowEvent {
    loop {
        if let Event::Director(event) = device.event()
            && is_it(&event)
        {
            return event;
        }
    }
}

fn is_bound(event: &FlowEvent) -> bool {
    matches!(event, FlowEvent::Bound { .. })
}

/// Two devices that know each other through a director, to which both have attached.
fn site() -> (Device, Device, Director) {
    let (mut a, mut b) = (Device::new(1), Device::new(2));
    let director = Director::between([&a, &b]);
    let of_a = director.attach(&a, 1, "10.9.1.1");
    let of_b = director.attach(&b, 2, "10.9.2.1");
    for (device, number) in [(&mut a, 1), (&mut b, 2)] {
        let FlowEvent::Bound { id, reflexive, draining, .. } = flow_event(device, is_bound) else {
            panic!("bound")
        };
        let outside: IpAddr = format!("10.9.{number}.2").parse().expect("an address");
        assert_eq!((id, reflexive, draining), (ID, SocketAddr::new(outside, device.port), false));
    }
    a.send(Command::AddPeer(relayed(&b, of_b)));
    b.send(Command::AddPeer(relayed(&a, of_a)));
    (a, b, director)
}

#[test]
fn packets_pass_through_a_director() {
    if !have_root() {
        return;
    }
    let (a, b, director) = site();
    a.namespace.run("ping -n -c 3 -i 0.2 -W 5 100.64.0.2");
    b.namespace.run("ping -n -c 3 -i 0.2 -W 5 fd00:1::1");
    // What is too large for the path is told of, and fragmented where it may be.
    a.namespace.run("ping -n -c 2 -i 0.2 -W 5 -M dont -s 1392 100.64.0.2");
    for (device, peer) in [(&a, &b), (&b, &a)] {
        let snapshot = device.snapshot();
        let peer = &snapshot.peers[&peer.public_key];
        assert_eq!((peer.path, peer.director, peer.endpoint), (Path::Relay, Some(ID), None), "{peer:?}");
        assert!(peer.path_since.is_some() && peer.path_reason == Some("handshake"), "{peer:?}");
        assert_eq!(snapshot.drops["invalid_frame"], 0);
    }
    let passed_on = director.running().counters();
    assert!(passed_on.attached == 2 && passed_on.frames >= 16, "{passed_on:?}");
}

#[test]
fn runs_stay_runs_all_the_way() {
    if !have_root() {
        return;
    }
    let (a, b, director) = site();
    a.namespace.run("ping -n -c 1 -W 5 100.64.0.2");
    let before = (a.snapshot().udp_sent, b.snapshot().udp_received);
    for (n, port) in [(0, 5000), (1, 5001)] {
        let address = (virtual_addresses(2)[n], port).into();
        // Every octet is checked.
        both_ways(&a.namespace, &b.namespace, address, &|sent| sent >= 32 << 20);
    }
    let (sent, received) = (a.snapshot().udp_sent, b.snapshot().udp_received);
    let (packets, calls) = (sent.packets - before.0.packets, sent.calls - before.0.calls);
    assert!(packets > 40_000 && packets > 4 * calls, "{packets} frames left in {calls} calls");
    let (packets, calls) = (received.packets - before.1.packets, received.calls - before.1.calls);
    assert!(packets > 4 * calls, "{packets} frames came in {calls} calls");
    let of = |metric: &str, direction: &str| {
        director.metric(&format!("director_{metric}_total{{transport=\"udp\",direction=\"{direction}\"}}"))
    };
    for direction in ["received", "sent"] {
        let (frames, calls) = (of("frames", direction), of("calls", direction));
        assert!(frames > 80_000.0 && frames > 4.0 * calls, "{frames} frames {direction} in {calls} calls");
    }
}

#[test]
fn a_director_that_restarts_is_attached_to_again() {
    if !have_root() {
        return;
    }
    let (mut a, mut b, mut director) = site();
    a.namespace.run("ping -n -c 1 -W 5 100.64.0.2");
    director.start();
    // It does not know the sessions, and says so to whoever sends.
    for device in [&mut a, &mut b] {
        flow_event(device, |event| *event == FlowEvent::Dead(ID));
    }
    director.attach(&a, 1, "10.9.1.1");
    director.attach(&b, 2, "10.9.2.1");
    for device in [&mut a, &mut b] {
        flow_event(device, is_bound);
    }
    // In the same session of the tunnel.
    a.namespace.run("ping -n -c 3 -i 0.2 -W 5 100.64.0.2");
    let snapshot = a.snapshot();
    assert_eq!(snapshot.peers[&b.public_key].path, Path::Relay);
}

#[test]
fn a_device_that_moves_is_followed() {
    if !have_root() {
        return;
    }
    let (mut a, b, director) = site();
    a.namespace.run("ping -n -c 1 -W 5 100.64.0.2");
    // To an address that the director has never seen, and must hear from twice before it sends there.
    a.namespace.ip("addr del 10.9.1.2/24 dev eth0");
    a.namespace.ip("addr add 10.9.1.3/24 dev eth0");
    a.roam();
    let moved = SocketAddr::new("10.9.1.3".parse().expect("an address"), a.port);
    flow_event(&mut a, |event| matches!(event, FlowEvent::Bound { reflexive, .. } if *reflexive == moved));
    b.namespace.run("ping -n -c 3 -i 0.2 -W 5 100.64.0.1");
    drop(director);
}

#[test]
fn a_director_that_is_gone_is_told_of() {
    if !have_root() {
        return;
    }
    let (mut a, _b, mut director) = site();
    {
        let _inside = director.runtime.enter();
        director.running = None;
    }
    flow_event(&mut a, |event| *event == FlowEvent::Unanswered(ID));
    director.start();
    director.attach(&a, 1, "10.9.1.1");
    flow_event(&mut a, is_bound);
    a.send(Command::SetDirector { id: ID, attachment: None });
    // Nothing more is sent to it.
    let hellos = || director.metric("director_hellos_total");
    a.snapshot();
    let before = hellos();
    std::thread::sleep(HELLO_INTERVAL * 3);
    assert!(hellos() == before, "hellos after the end");
}
