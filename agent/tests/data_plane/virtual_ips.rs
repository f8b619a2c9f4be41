//! Virtual IPs in the kernel: connections to them, from the host that has them, to servers that say who they are.

#![allow(clippy::unwrap_used, reason = "what tests do, in functions that they share")]

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::Arc,
    time::Duration,
};

use muster_agent::{
    state::State,
    virtual_ips::{Started, VirtualIps, table::Place},
    writer::Writer,
};
use muster_common::{digest, telemetry::Metrics};
use muster_proto::registration::{
    VirtualEndpoint, VirtualEndpoints, VirtualPort, VirtualService, VirtualServicesChanged,
};
use prost::Message as _;
use tokio::time::sleep;

use super::namespace::{Namespace, connect as connect_hosts, have_root};

const TABLE: &str = "list table inet muster_muster0_services";
const PORT: u16 = 80;
const TARGET: u16 = 8080;

/// The virtual IP of a family.
fn vip(is_ipv4: bool) -> IpAddr {
    if is_ipv4 { [100, 96, 0, 10].into() } else { "fd00:1::a".parse().unwrap() }
}

/// The address of an endpoint.
fn endpoint(is_ipv4: bool, n: u8) -> IpAddr {
    if is_ipv4 { [100, 64, 0, 10 + n].into() } else { format!("fd00::{n:x}").parse().unwrap() }
}

/// A namespace with the interface `muster0`, and addresses for seven endpoints of each family.
fn host() -> Namespace {
    let host = Namespace::new();
    host.ip("link add muster0 type veth peer name peer0");
    host.ip("link set peer0 up");
    host.ip("addr add 100.64.0.1/11 dev muster0");
    host.ip("addr add fd00::ff/64 dev muster0 nodad");
    host.ip("link set muster0 up");
    host.ip("route add 100.96.0.0/12 dev muster0 src 100.64.0.1");
    host.ip("-6 route add fd00:1::/64 dev muster0 src fd00::ff");
    for n in 1..=7 {
        host.ip(&format!("addr add {}/32 dev lo", endpoint(true, n)));
        host.ip(&format!("addr add {}/128 dev lo nodad", endpoint(false, n)));
    }
    host
}

/// Servers at all endpoints, over TCP and UDP, each of which says its own address; they end with the process.
fn serve() {
    for n in 1..=7 {
        for is_ipv4 in [true, false] {
            let address = SocketAddr::new(endpoint(is_ipv4, n), TARGET);
            let listener = TcpListener::bind(address).unwrap();
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    let Ok(mut stream) = stream else { return };
                    std::thread::spawn(move || {
                        let mut octet = [0];
                        while stream.write_all(format!("{address}\n").as_bytes()).is_ok() {
                            if !matches!(stream.read(&mut octet), Ok(1)) {
                                return;
                            }
                        }
                    });
                }
            });
            let socket = UdpSocket::bind(address).unwrap();
            std::thread::spawn(move || {
                let mut octets = [0; 100];
                while let Ok((_, from)) = socket.recv_from(&mut octets) {
                    let _ = socket.send_to(address.to_string().as_bytes(), from);
                }
            });
        }
    }
}

/// What the registrar would tell, and the agent that takes it.
struct World {
    services: BTreeMap<String, VirtualService>,
    endpoints: BTreeMap<String, VirtualEndpoints>,
    revision: u64,
    directory: tempfile::TempDir,
    writer: Arc<Writer>,
    started: Started,
}

impl World {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let state = State::new(directory.path());
        let writer = Arc::new(Writer::start(state).unwrap());
        let started = start(None, &writer);
        Self {
            services: BTreeMap::new(),
            endpoints: BTreeMap::new(),
            revision: 1,
            directory,
            writer,
            started,
        }
    }

    fn digest(&self) -> u64 {
        let services = self.services.values().map(|service| service.encode_to_vec());
        let all = services.chain(self.endpoints.values().map(|slice| slice.encode_to_vec()));
        all.fold(0, |sum, message| sum.wrapping_add(digest::of_message(&message)))
    }

    /// A Service of one family and one port with these endpoints, as it is from now on.
    async fn put(
        &mut self,
        name: &str,
        is_ipv4: bool,
        endpoints: &[u8],
        change: impl FnOnce(&mut VirtualService),
    ) {
        let port = |number: u16, protocol: &str| VirtualPort {
            name: protocol.to_lowercase(),
            protocol: protocol.into(),
            port: number.into(),
        };
        let ports = |number| vec![port(number, "TCP"), port(number, "UDP")];
        let mut service = VirtualService {
            namespace: "default".into(),
            name: name.into(),
            addresses: vec![vip(is_ipv4).to_string()],
            ports: ports(PORT),
            ..VirtualService::default()
        };
        change(&mut service);
        let slice = VirtualEndpoints {
            namespace: "default".into(),
            name: format!("{name}-1"),
            service: name.into(),
            endpoints: endpoints
                .iter()
                .map(|n| VirtualEndpoint {
                    address: endpoint(is_ipv4, *n).to_string(),
                    zone: format!("z{n}"),
                    is_ready: true,
                    is_serving: true,
                })
                .collect(),
            ports: ports(TARGET),
        };
        let is_snapshot = self.revision == 1;
        self.revision += 1;
        self.services.insert(name.into(), service.clone());
        self.endpoints.insert(name.into(), slice.clone());
        self.tell(VirtualServicesChanged {
            is_snapshot,
            services: vec![service],
            endpoints: vec![slice],
            ..VirtualServicesChanged::default()
        })
        .await;
    }

    async fn tell(&self, message: VirtualServicesChanged) {
        let (revision, digest) = (self.revision, self.digest());
        self.started.virtual_ips.take(VirtualServicesChanged { revision, digest, ..message });
        sleep(Duration::from_millis(150)).await;
    }
}

fn start(stored: Option<&[u8]>, writer: &Arc<Writer>) -> Started {
    let metrics = Metrics::with_prefix("test");
    let started = VirtualIps::start("muster0", stored, Arc::clone(writer), &metrics).unwrap();
    let own = ["100.64.0.1", "fd00::ff"].map(|address| address.parse().unwrap());
    started.virtual_ips.move_to(Place { own: own.into(), ..Place::default() });
    std::thread::sleep(Duration::from_millis(200));
    started
}

/// Connects to the virtual IP; returns who answers.
fn connect(is_ipv4: bool) -> std::io::Result<(TcpStream, IpAddr)> {
    let address = SocketAddr::new(vip(is_ipv4), PORT);
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    let answer = line(&mut stream)?;
    Ok((stream, answer))
}

fn line(stream: &mut TcpStream) -> std::io::Result<IpAddr> {
    let (mut text, mut octet) = (String::new(), [0]);
    while stream.read(&mut octet)? == 1 && octet != *b"\n" {
        text.push(char::from(octet[0]));
    }
    Ok(text.parse::<SocketAddr>().map_err(|_| ErrorKind::InvalidData)?.ip())
}

fn answers(is_ipv4: bool, count: usize) -> BTreeSet<IpAddr> {
    (0..count).map(|_| connect(is_ipv4).unwrap().1).collect()
}

#[test]
fn connections_go_to_all_endpoints_and_to_no_other() {
    if !have_root() {
        return;
    }
    let host = host();
    host.enter(async || {
        serve();
        let mut world = World::new();
        for is_ipv4 in [true, false] {
            let name = if is_ipv4 { "web4" } else { "web6" };
            world.put(name, is_ipv4, &[1, 2, 3, 4, 5, 6, 7], |_| {}).await;
            let all: BTreeSet<IpAddr> = (1..=7).map(|n| endpoint(is_ipv4, n)).collect();
            assert_eq!(answers(is_ipv4, 200), all);
        }
    });
}

/// Whether the server at the other end of a stream is still there, and the same.
fn is_served(stream: &mut TcpStream, by: IpAddr) -> bool {
    stream.write_all(b"x").is_ok() && line(stream).is_ok_and(|answer| answer == by)
}

#[test]
fn connections_outlive_their_endpoint_and_new_ones_go_elsewhere() {
    if !have_root() {
        return;
    }
    let host = host();
    host.enter(async || {
        serve();
        let mut world = World::new();
        world.put("web", true, &[1, 2, 3], |_| {}).await;
        let mut held: Vec<(TcpStream, IpAddr)> = (0..30).map(|_| connect(true).unwrap()).collect();
        world.put("web", true, &[2, 3, 4], |_| {}).await;
        assert_eq!(answers(true, 100), [2, 3, 4].map(|n| endpoint(true, n)).into());
        for (stream, by) in &mut held {
            assert!(is_served(stream, *by), "{by}");
        }
        assert!(held.iter().any(|(_, by)| *by == endpoint(true, 1)));
        // Without endpoints: refused at once, and then served again.
        world.put("web", true, &[], |_| {}).await;
        assert_eq!(connect(true).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        let udp = UdpSocket::bind("0.0.0.0:0").unwrap();
        udp.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        udp.connect((vip(true), PORT)).unwrap();
        // As the kernel says of what its own host may not send.
        assert_eq!(udp.send(b"x").unwrap_err().kind(), ErrorKind::PermissionDenied);
        world.put("web", true, &[5], |_| {}).await;
        assert_eq!(answers(true, 10), [endpoint(true, 5)].into());
        for (stream, by) in &mut held {
            assert!(is_served(stream, *by), "{by}");
        }
        // A Service that is gone leaves nothing.
        world.services.clear();
        world.endpoints.clear();
        world.revision += 1;
        let names = vec!["default/web".to_owned()];
        let slices = vec!["default/web-1".to_owned()];
        let message = VirtualServicesChanged {
            removed_services: names,
            removed_endpoints: slices,
            ..VirtualServicesChanged::default()
        };
        world.tell(message).await;
        let table = host.run(&format!("nft {TABLE}"));
        assert!(!table.contains("elements"), "{table}");
    });
}

#[test]
fn clients_stay_with_their_endpoint_while_it_is_there() {
    if !have_root() {
        return;
    }
    let host = host();
    host.enter(async || {
        serve();
        for is_ipv4 in [true, false] {
            let mut world = World::new();
            let sticky = |service: &mut VirtualService| service.affinity_seconds = 2;
            world.put("web", is_ipv4, &[1, 2, 3, 4], sticky).await;
            let first = answers(is_ipv4, 30);
            assert_eq!(first.len(), 1, "{first:?}");
            let mut first = first.into_iter().next().unwrap();
            // Each time that its endpoint goes, the client gets another, and stays with that.
            for _ in 0..3 {
                let gone = (1..=4).find(|n| endpoint(is_ipv4, *n) == first).unwrap();
                let left: Vec<u8> = (1..=4).filter(|n| *n != gone).collect();
                world.put("web", is_ipv4, &left, sticky).await;
                let second = answers(is_ipv4, 30);
                assert!(second.len() == 1 && !second.contains(&first), "{first} then {second:?}");
                // Others that go do not matter.
                let second = second.into_iter().next().unwrap();
                let other = left.iter().find(|n| endpoint(is_ipv4, **n) != second).unwrap();
                let left: Vec<u8> = (1..=4).filter(|n| n != other).collect();
                world.put("web", is_ipv4, &left, sticky).await;
                assert_eq!(answers(is_ipv4, 20), [second].into());
                world.put("web", is_ipv4, &[1, 2, 3, 4], sticky).await;
                assert_eq!(answers(is_ipv4, 20), [second].into());
                first = second;
            }
            // Each connection makes it last anew; and it ends.
            for _ in 0..4 {
                sleep(Duration::from_millis(1200)).await;
                assert_eq!(answers(is_ipv4, 1), [first].into());
            }
            let mut seen = BTreeSet::new();
            for _ in 0..5 {
                sleep(Duration::from_millis(2300)).await;
                seen.extend(answers(is_ipv4, 1));
            }
            assert!(seen.len() > 1, "{seen:?}");
            drop(world);
        }
    });
}

#[test]
fn datagrams_of_one_socket_stay_together_until_their_endpoint_is_gone() {
    if !have_root() {
        return;
    }
    let host = host();
    host.enter(async || {
        serve();
        let mut world = World::new();
        for is_ipv4 in [true, false] {
            let name = if is_ipv4 { "a" } else { "b" };
            world.put(name, is_ipv4, &[1, 2], |_| {}).await;
            let socket = UdpSocket::bind(if is_ipv4 { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
            socket.connect((vip(is_ipv4), PORT)).unwrap();
            let ask = || -> IpAddr {
                let mut octets = [0; 100];
                socket.send(b"x").unwrap();
                let length = socket.recv(&mut octets).unwrap();
                std::str::from_utf8(&octets[..length]).unwrap().parse::<SocketAddr>().unwrap().ip()
            };
            let first = ask();
            assert!((0..20).all(|_| ask() == first));
            let left = if first == endpoint(is_ipv4, 1) { 2 } else { 1 };
            world.put(name, is_ipv4, &[left, 3], |_| {}).await;
            let second = ask();
            assert_ne!(second, first);
            // Of an endpoint that stays, nothing is forgotten.
            let place = if second == endpoint(is_ipv4, 3) { 3 } else { left };
            world.put(name, is_ipv4, &[place, 4, 5, 6], |_| {}).await;
            assert!((0..20).all(|_| ask() == second));
        }
    });
}

#[test]
fn what_is_local_stays_on_the_host_and_zones_come_first() {
    if !have_root() {
        return;
    }
    let host = host();
    host.enter(async || {
        serve();
        let mut world = World::new();
        let mut own: BTreeSet<IpAddr> = ["100.64.0.1".parse().unwrap()].into();
        own.insert(endpoint(true, 2));
        let place = Place { own, zone: "z3".into(), ..Place::default() };
        world.started.virtual_ips.move_to(place);
        // Each endpoint is in a zone of its own.
        for (local, host, zone, expected) in [
            (true, false, false, &[2][..]),
            (false, true, false, &[2]),
            (false, false, true, &[3]),
            (false, false, false, &[1, 2, 3]),
        ] {
            let change = |service: &mut VirtualService| {
                (service.is_local, service.prefers_host, service.prefers_zone) = (local, host, zone);
            };
            world.put("web", true, &[1, 2, 3], change).await;
            let expected: BTreeSet<IpAddr> = expected.iter().map(|n| endpoint(true, *n)).collect();
            assert_eq!(answers(true, 40), expected);
        }
        // What is only preferred gives way: to the zone, and then to any.
        world.put("web", true, &[1, 3], |service| service.prefers_host = true).await;
        assert_eq!(answers(true, 20), [endpoint(true, 3)].into());
        world.put("web", true, &[1, 4], |service| service.prefers_host = true).await;
        assert_eq!(answers(true, 40), [endpoint(true, 1), endpoint(true, 4)].into());
        // Others are not asked instead.
        world.put("web", true, &[1, 3], |service| service.is_local = true).await;
        let error = connect(true).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock), "{error}");
    });
}

#[test]
fn what_others_do_to_the_table_is_undone_and_what_is_theirs_stays() {
    if !have_root() {
        return;
    }
    let host = host();
    host.enter(async || {
        serve();
        let mut world = World::new();
        world.put("web", true, &[1, 2], |_| {}).await;
        let before = host.run(&format!("nft {TABLE}"));
        for line in [
            "nft flush ruleset",
            "nft delete table inet muster_muster0_services",
            "nft flush chain inet muster_muster0_services output",
            "nft flush map inet muster_muster0_services endpoints4",
        ] {
            host.run(line);
            host.run("nft add table ip other");
            host.run("nft add chain ip other input");
            sleep(Duration::from_millis(1500)).await;
            assert_eq!(host.run(&format!("nft {TABLE}")), before, "{line}");
            assert_eq!(answers(true, 30).len(), 2, "{line}");
        }
        // Changes go on from there.
        world.put("web", true, &[3], |_| {}).await;
        assert_eq!(answers(true, 10), [endpoint(true, 3)].into());
        let World { started, .. } = world;
        started.virtual_ips.stop().await;
        let left = host.run("nft list tables");
        assert!(left.contains("table ip other") && !left.contains("muster"), "{left}");
    });
}

#[test]
fn virtual_ips_come_back_from_disk_and_a_table_that_was_left_is_no_hindrance() {
    if !have_root() {
        return;
    }
    let host = host();
    host.enter(async || {
        serve();
        let mut world = World::new();
        world.put("web", true, &[1, 2], |_| {}).await;
        let (revision, digest) = (world.revision, world.digest());
        sleep(Duration::from_millis(2500)).await;
        let World { directory, writer, started, .. } = world;
        // Killed: what it had in the kernel stays there.
        std::mem::forget(started.virtual_ips);
        let stored = State::new(directory.path()).virtual_services().unwrap();
        let started = start(Some(&stored), &writer);
        assert_eq!((started.known.revision, started.known.digest), (revision, digest));
        assert_eq!(answers(true, 30).len(), 2);
        drop(started);
        // What is no such thing is as nothing.
        let started = start(Some(b"nonsense"), &writer);
        assert_eq!(started.known.revision, 0);
        drop(started);
        VirtualIps::sweep("muster0").unwrap();
        assert!(!host.run("nft list tables").contains("muster"));
    });
}

#[test]
fn a_registrar_that_has_something_else_is_asked_for_everything() {
    if !have_root() {
        return;
    }
    let host = host();
    host.enter(async || {
        serve();
        let mut world = World::new();
        world.put("web", true, &[1], |_| {}).await;
        let wrong = VirtualServicesChanged { revision: 9, digest: 1, ..VirtualServicesChanged::default() };
        world.started.virtual_ips.take(wrong);
        world.started.lost.changed().await.unwrap();
        // What there was goes on until then.
        assert_eq!(answers(true, 5), [endpoint(true, 1)].into());
        world.services.clear();
        world.endpoints.clear();
        world.revision = 1;
        world.put("other", true, &[2], |_| {}).await;
        assert_eq!(answers(true, 5), [endpoint(true, 2)].into());
    });
}

#[test]
fn a_host_that_this_one_speaks_for_is_reached_on_its_lan() {
    if !have_root() {
        return;
    }
    let (host, lan) = (host(), Namespace::new());
    connect_hosts(&host, &lan);
    // Its server takes the caller for somebody on its LAN, and has no way to anybody else.
    lan.enter(async || {
        let listener = TcpListener::bind(("10.9.0.2", TARGET)).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                let caller = stream.peer_addr().unwrap();
                let _ = stream.write_all(format!("{caller}\n").as_bytes());
            }
        });
    });
    host.enter(async || {
        let mut world = World::new();
        let place = Place {
            own: ["100.64.0.1".parse().unwrap()].into(),
            hosts: [(endpoint(true, 9), "10.9.0.2".parse().unwrap())].into(),
            zone: String::new(),
        };
        world.started.virtual_ips.move_to(place);
        world.put("web", true, &[9], |service| service.is_local = true).await;
        assert_eq!(connect(true).unwrap().1, "10.9.0.1".parse::<IpAddr>().unwrap());
    });
}

/// Rules in the manner of Docker, through iptables-nft.
const DOCKER: &str = r#"
table ip nat {
    chain DOCKER { iifname "docker0" counter return; }
    chain PREROUTING { type nat hook prerouting priority -100; policy accept;
        fib daddr type local counter jump DOCKER; }
    chain OUTPUT { type nat hook output priority -100; policy accept;
        ip daddr != 127.0.0.0/8 fib daddr type local counter jump DOCKER; }
    chain POSTROUTING { type nat hook postrouting priority 100; policy accept;
        oifname != "docker0" ip saddr 172.17.0.0/16 counter masquerade; }
}
table ip filter {
    chain DOCKER-USER { counter return; }
    chain FORWARD { type filter hook forward priority 0; policy drop;
        counter jump DOCKER-USER;
        oifname "docker0" ct state related,established counter accept;
        iifname "docker0" oifname != "docker0" counter accept; }
}
"#;

/// Rules in the manner of firewalld.
const FIREWALLD: &str = r#"
table inet firewalld {
    chain nat_PREROUTING { type nat hook prerouting priority dstnat + 10; policy accept; }
    chain nat_POSTROUTING { type nat hook postrouting priority srcnat + 10; policy accept; }
    chain filter_INPUT { type filter hook input priority filter + 10; policy accept;
        ct state { established, related } accept
        ct status dnat accept
        iifname "lo" accept
        ct state invalid drop
        reject with icmpx admin-prohibited; }
    chain filter_OUTPUT { type filter hook output priority filter + 10; policy accept;
        ct state { established, related } accept
        oifname "lo" accept; }
}
"#;

/// Rules in the manner of ufw, with what a host has to allow that it wants to be reached.
const UFW: &str = r#"
table ip ufw-filter {
    chain ufw-before-input { iifname "lo" counter accept;
        ct state related,established counter accept;
        ct state invalid counter drop; }
    chain ufw-user-input { tcp dport 8080 counter accept; }
    chain INPUT { type filter hook input priority 0; policy drop;
        counter jump ufw-before-input;
        counter jump ufw-user-input; }
    chain OUTPUT { type filter hook output priority 0; policy drop;
        oifname "lo" counter accept;
        ct state new,related,established counter accept; }
}
"#;

/// Rules in the manner of kube-proxy, whose Services have other addresses.
const KUBE_PROXY: &str = r#"
table ip kube-proxy {
    map service-ips { type ipv4_addr . inet_proto . inet_service : verdict;
        elements = { 10.96.0.10 . tcp . 80 : goto service-web }; }
    map no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict; }
    set cluster-ips { type ipv4_addr; elements = { 10.96.0.10 }; }
    chain mark-for-masquerade { meta mark set meta mark or 0x4000; }
    chain service-web { numgen random mod 1 vmap { 0 : goto endpoint-web }; }
    chain endpoint-web { meta l4proto tcp dnat to 10.244.0.9:8080; }
    chain services { ip daddr . meta l4proto . th dport vmap @service-ips; }
    chain nat-prerouting { type nat hook prerouting priority dstnat; policy accept; jump services; }
    chain nat-output { type nat hook output priority -100; policy accept; jump services; }
    chain nat-postrouting { type nat hook postrouting priority srcnat; policy accept;
        meta mark & 0x4000 != 0x4000 return
        meta mark set meta mark ^ 0x4000
        masquerade fully-random; }
    chain filter-output { type filter hook output priority -110; policy accept;
        ct state new ip daddr . meta l4proto . th dport vmap @no-endpoint-services
        ip daddr @cluster-ips counter; }
}
"#;

#[test]
fn the_tables_of_others_are_no_hindrance_and_stay_as_they_are() {
    if !have_root() {
        return;
    }
    for is_first in [true, false] {
        let host = host();
        host.enter(async || {
            serve();
            let load = || {
                let rules = [DOCKER, FIREWALLD, UFW, KUBE_PROXY].concat();
                let file = tempfile::NamedTempFile::new().unwrap();
                std::fs::write(file.path(), rules).unwrap();
                host.run(&format!("nft -f {}", file.path().display()));
            };
            let tables = ["ip nat", "ip filter", "inet firewalld", "ip ufw-filter", "ip kube-proxy"];
            // Without counters, which go on.
            let listed = || tables.map(|table| host.run(&format!("nft -s list table {table}")));
            if is_first {
                load();
            }
            let mut world = World::new();
            world.put("web", true, &[1, 2, 3], |_| {}).await;
            if !is_first {
                load();
            }
            let before = listed();
            assert_eq!(answers(true, 60).len(), 3);
            world.put("web", true, &[], |_| {}).await;
            assert_eq!(connect(true).unwrap_err().kind(), ErrorKind::ConnectionRefused);
            world.put("web", true, &[4], |_| {}).await;
            assert_eq!(answers(true, 10), [endpoint(true, 4)].into());
            world.started.virtual_ips.stop().await;
            assert_eq!(listed(), before);
        });
    }
}

#[test]
fn a_large_table_is_written_once_although_others_are_busy() {
    const SERVICES: u32 = 3000;
    if !have_root() {
        return;
    }
    let host = host();
    host.enter(async || {
        let mut world = World::new();
        world.put("web", true, &[1], |_| {}).await;
        let (service, slice) = (world.services["web"].clone(), world.endpoints["web"].clone());
        for n in 0..SERVICES {
            let name = format!("s{n}");
            let address = std::net::Ipv4Addr::from(0x6461_0000 + n).to_string();
            let service = VirtualService { name: name.clone(), addresses: vec![address], ..service.clone() };
            let endpoint = |n: u8| VirtualEndpoint {
                address: endpoint(true, n).to_string(),
                ..slice.endpoints[0].clone()
            };
            let slice = VirtualEndpoints {
                name: name.clone(),
                service: name.clone(),
                endpoints: (1..=7).map(endpoint).collect(),
                ..slice.clone()
            };
            world.services.insert(name.clone(), service);
            world.endpoints.insert(name, slice);
        }
        let (services, endpoints) = (world.services.values(), world.endpoints.values());
        let all = VirtualServicesChanged {
            is_snapshot: true,
            services: services.cloned().collect(),
            endpoints: endpoints.cloned().collect(),
            ..VirtualServicesChanged::default()
        };
        world.tell(all).await;
        // Without optimisation, this takes a while.
        let counts = || {
            let view = world.started.virtual_ips.view();
            (view.frontends, view.endpoints)
        };
        for _ in 0..100 {
            if counts() != (2, 2) {
                break;
            }
            sleep(Duration::from_millis(200)).await;
        }
        assert_eq!(counts(), (2 + 6000, 2 + 42_000));
        // A table that is made anew has another handle.
        let handle = || {
            let tables = host.run("nft -a list tables");
            tables.lines().find(|line| line.contains("muster_muster0_services")).unwrap().to_owned()
        };
        let before = handle();
        let elements: Vec<String> = (0..5000).map(|n| format!("10.{}.{}.1", n / 250, n % 250)).collect();
        let file = tempfile::NamedTempFile::new().unwrap();
        let set = format!(
            "table ip other {{ set s {{ type ipv4_addr; elements = {{ {} }}; }}; }}",
            elements.join(", ")
        );
        std::fs::write(file.path(), set).unwrap();
        for _ in 0..3 {
            host.run(&format!("nft -f {}", file.path().display()));
            host.run("nft delete table ip other");
        }
        sleep(Duration::from_millis(2500)).await;
        assert_eq!(handle(), before);
    });
}
