//! Virtual IPs in the kernel: connections to them, from the host that has them, to servers that say who they are.

#![allow(clippy::unwrap_used, reason = "what tests do, in functions that they share")]

mod others;
mod sctp;
mod world;

use std::{
    collections::BTreeSet,
    io::{ErrorKind, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::Duration,
};

use muster_agent::{
    state::State,
    virtual_ips::{VirtualIps, table::Place},
};
use muster_proto::registration::{VirtualService, VirtualServicesChanged};
use tokio::time::sleep;

use self::world::*;
use super::namespace::{Namespace, connect as connect_hosts, have_root};

#[test]
fn connections_go_to_all_endpoints_and_to_no_other() {
    on_host(async |_| {
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
    on_host(async |host| {
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
    on_host(async |_| {
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
    on_host(async |_| {
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
    on_host(async |_host| {
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
fn virtual_ips_come_back_from_disk_and_a_table_that_was_left_is_no_hindrance() {
    on_host(async |host| {
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
    on_host(async |_| {
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
