//! Peers behind NATs that know each other's directors: everything arrives, and directly where that is possible.

use std::time::Duration;

use super::{
    internet::{Internet, Nat, handle, link},
    network::Network,
};
use crate::{
    DirectorId, Dropped, Endpoint, Event, PathSnapshot, PeerConfig, RELAY_ASSUMED_MTU, Why,
    offload::{SuperPacket, VirtioHeader},
};

fn config(network: &mut Network, of: usize) -> PeerConfig {
    let endpoints = network.internet.told(of);
    let relays = vec![(DirectorId(0), handle(of)), (DirectorId(1), handle(of))];
    PeerConfig { endpoints, relays, ..network.config(of) }
}

fn set_link(network: &mut Network, n: usize, director: usize, is_up: bool) {
    let link = is_up.then(|| link(n, director));
    network.nodes[n].tunnel.set_director(DirectorId(director as u16), link, network.now);
    network.collect(n);
}

/// Two nodes that are attached to both directors and know each other.
fn pair(nats: [Nat; 2]) -> Network {
    let mut network = Network::new(2, 5);
    network.internet = Internet::new(&[0, 1].map(|n: usize| (network.nodes[n].address, nats[n])));
    for n in 0..2 {
        set_link(&mut network, n, 0, true);
        set_link(&mut network, n, 1, true);
        let config = config(&mut network, 1 - n);
        network.nodes[n].tunnel.add_peer(config, network.now);
    }
    network
}

fn path(network: &Network, n: usize) -> PathSnapshot {
    network.nodes[n].tunnel.peer(&network.key(1 - n), network.now).unwrap().path.unwrap()
}

fn is_direct(network: &Network) -> [bool; 2] {
    [0, 1].map(|n| !path(network, n).endpoint.is_relay())
}

/// Both send something every 20 ms. Returns how many arrive at each.
fn talk(network: &mut Network, packets: usize) -> [usize; 2] {
    let before = [0, 1].map(|n: usize| network.nodes[n].inbox.len());
    for _ in 0..packets {
        network.send(0, 1, b"to one");
        network.send(1, 0, b"to zero");
        network.run_millis(20);
    }
    network.run_millis(100);
    [0, 1].map(|n: usize| network.nodes[n].inbox.len() - before[n])
}

const KINDS: [Nat; 6] =
    [Nat::Open, Nat::FullCone, Nat::AddressRestricted, Nat::PortRestricted, Nat::Symmetric, Nat::Blocked];

/// RFC 5128 §3.
fn is_direct_possible(nats: [Nat; 2]) -> bool {
    let has = |nat| nats.contains(&nat);
    let strict = has(Nat::Symmetric) && (has(Nat::PortRestricted) || nats == [Nat::Symmetric; 2]);
    !has(Nat::Blocked) && !strict
}

#[test]
fn every_pair_of_nats_works_from_the_first_packet_and_directly_where_possible() {
    for a in KINDS {
        for b in KINDS {
            let mut network = pair([a, b]);
            assert_eq!(talk(&mut network, 150), [150; 2], "{a:?} {b:?}");
            assert_eq!(is_direct(&network), [is_direct_possible([a, b]); 2], "{a:?} {b:?}");
            assert_eq!(talk(&mut network, 1_000), [1_000; 2], "{a:?} {b:?}");
        }
    }
}

#[test]
fn the_first_packet_goes_through_one_director() {
    let mut network = pair([Nat::Symmetric; 2]);
    network.send(0, 1, b"first");
    assert_eq!(network.trace.len(), 1, "no initiation goes elsewhere");
    // The handshake, and half a round trip, with 20 ms from one to the other through the director.
    network.run_millis(61);
    assert_eq!(network.take_payloads(1), [b"first"]);
    let relay = Endpoint::Relay { director: DirectorId(0), handle: handle(1) };
    let Event::PeerUp { endpoint, .. } = network.nodes[0].events[0] else {
        panic!("{:?}", network.nodes[0].events)
    };
    assert_eq!((endpoint, path(&network, 0).why), (relay, Why::Handshake));
    let peer = network.nodes[0].tunnel.peer(&network.key(1), network.now).unwrap();
    assert_eq!((peer.path_mtu, peer.endpoint), (RELAY_ASSUMED_MTU, None));
}

#[test]
fn an_address_is_found_within_two_round_trips() {
    let mut network = pair([Nat::PortRestricted; 2]);
    network.send(0, 1, b"first");
    network.run_millis(250);
    assert_eq!(is_direct(&network), [true; 2]);
    assert_eq!(path(&network, 0).why, Why::Probe);
    assert_eq!(path(&network, 0).round_trip, Some(Duration::from_millis(20)));
}

#[test]
fn super_packets_stay_runs_and_narrower() {
    let mut network = pair([Nat::Symmetric; 2]);
    network.send(0, 1, b"first");
    network.run_secs(1);
    network.take_payloads(1);
    let tcp = [0x10, 1, 0x20, 2, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x18, 1, 0, 0, 0, 0, 0];
    let payload = vec![7; 30_000];
    let packet = super::packets::ip("100.64.0.1", "100.64.0.2", 6, &[&tcp[..], &payload].concat());
    let header = VirtioHeader {
        flags: VirtioHeader::NEEDS_CSUM,
        gso_type: VirtioHeader::GSO_TCPV4,
        gso_size: 1_380,
        csum_start: 20,
        csum_offset: 16,
        ..VirtioHeader::default()
    };
    let packet = SuperPacket::parse(header, &packet).unwrap();
    let mut out = crate::Outgoing::new();
    network.nodes[0].tunnel.handle_super_packet(&packet, network.now, &mut out).unwrap();
    assert_eq!(out.runs().len(), 1);
    let run = out.runs().next().unwrap();
    assert_eq!(run.hop, link(0, 0).hop);
    assert_eq!(run.datagram_len, 16 + 32 + usize::from(RELAY_ASSUMED_MTU));
    let datagrams: Vec<_> = run.datagrams().map(<[u8]>::to_vec).collect();
    let (from, to) = (network.nodes[0].address, run.hop.udp().unwrap());
    for datagram in datagrams {
        network.post(from, to, datagram);
    }
    network.run_millis(100);
    let arrived: usize = network.nodes[1].inbox.iter().map(|segment| segment.len() - 40).sum();
    assert_eq!(arrived, 30_000);
}

#[test]
fn a_nat_that_is_rebound_costs_little() {
    for nats in [[Nat::Open, Nat::PortRestricted], [Nat::AddressRestricted; 2], [Nat::PortRestricted; 2]] {
        for n in 0..2 {
            let mut network = pair(nats);
            talk(&mut network, 100);
            assert_eq!(is_direct(&network), [true; 2]);
            network.internet.rebind(n);
            let arrived = talk(&mut network, 500);
            // Two seconds of silence and a check, 145 packets, at the most.
            assert!(arrived.iter().all(|arrived| *arrived >= 350), "{nats:?} {n} {arrived:?}");
            assert_eq!(talk(&mut network, 200), [200; 2]);
        }
    }
}

#[test]
fn a_path_that_dies_is_left_for_a_director_and_taken_again() {
    let mut network = pair([Nat::FullCone; 2]);
    talk(&mut network, 100);
    assert_eq!(is_direct(&network), [true; 2]);
    network.black_holes = (0..2).flat_map(|n| network.internet.told(n)).collect();
    talk(&mut network, 150);
    assert_eq!(is_direct(&network), [false; 2]);
    assert_eq!(path(&network, 0).why, Why::Silence);
    assert_eq!(talk(&mut network, 100), [100; 2]);
    network.black_holes.clear();
    talk(&mut network, 4_000);
    assert_eq!(is_direct(&network), [true; 2]);
}

#[test]
fn a_director_that_goes_is_left_for_the_other() {
    // One that says so.
    let mut network = pair([Nat::Symmetric; 2]);
    talk(&mut network, 50);
    network.internet.directors = [false, true];
    set_link(&mut network, 0, 0, false);
    set_link(&mut network, 1, 0, false);
    assert_eq!(talk(&mut network, 200), [200; 2]);
    assert_eq!(path(&network, 0).why, Why::DirectorLost);
    // One that does not.
    let mut network = pair([Nat::Symmetric; 2]);
    talk(&mut network, 50);
    network.internet.directors = [false, true];
    talk(&mut network, 200);
    assert_eq!(talk(&mut network, 200), [200; 2]);
    // Both, while there is a direct path.
    let mut network = pair([Nat::PortRestricted; 2]);
    talk(&mut network, 50);
    network.internet.directors = [false; 2];
    (0..2).for_each(|n| set_link(&mut network, n, 0, false));
    (0..2).for_each(|n| set_link(&mut network, n, 1, false));
    assert_eq!(talk(&mut network, 10_000), [10_000; 2]);
}

#[test]
fn what_waits_leaves_when_the_first_director_is_reached() {
    let mut network = pair([Nat::Symmetric; 2]);
    for n in 0..2 {
        set_link(&mut network, n, 0, false);
        set_link(&mut network, n, 1, false);
    }
    network.send(0, 1, b"early");
    network.run_millis(500);
    assert!(network.take_payloads(1).is_empty());
    set_link(&mut network, 1, 1, true);
    set_link(&mut network, 0, 1, true);
    network.run_millis(100);
    assert_eq!(network.take_payloads(1), [b"early"]);
}

#[test]
fn a_device_that_is_not_at_one_director_is_tried_at_the_other_at_once() {
    let mut network = pair([Nat::Symmetric; 2]);
    network.internet.directors = [false, true];
    network.send(0, 1, b"first");
    let now = network.now;
    network.nodes[0].tunnel.unreachable_through(DirectorId(0), handle(1), now);
    network.collect(0);
    network.run_millis(100);
    assert_eq!(network.take_payloads(1), [b"first"]);
}

/// Every initiation that is sent through them has the same answer.
#[test]
fn directors_that_do_not_have_a_device_are_asked_once_a_try() {
    let mut network = pair([Nat::Symmetric; 2]);
    network.internet.directors = [false, false];
    network.send(0, 1, b"first");
    network.trace.clear();
    for _ in 0..20 {
        for director in 0..2 {
            let now = network.now;
            network.nodes[0].tunnel.unreachable_through(DirectorId(director), handle(1), now);
            network.collect(0);
        }
        network.run_millis(20);
    }
    assert!(network.trace.len() <= 6, "{} datagrams", network.trace.len());
}

#[test]
fn a_host_that_was_suspended_for_an_hour_sends_through_a_director_first() {
    let mut network = pair([Nat::PortRestricted; 2]);
    talk(&mut network, 100);
    assert_eq!(is_direct(&network), [true; 2]);
    network.suspend(Duration::from_secs(3_600));
    network.internet.rebind(0);
    network.internet.rebind(1);
    network.send(0, 1, b"awake");
    network.run_millis(100);
    assert!(network.nodes[1].inbox.iter().any(|packet| packet.ends_with(b"awake")));
    talk(&mut network, 200);
    assert_eq!(talk(&mut network, 100), [100; 2]);
}

#[test]
fn peers_that_are_idle_are_left_alone() {
    let mut network = pair([Nat::PortRestricted; 2]);
    talk(&mut network, 100);
    network.run_secs(400);
    network.trace.clear();
    network.run_secs(3_600);
    assert!(network.trace.is_empty(), "{:?}", network.trace.iter().map(|t| t.0).collect::<Vec<_>>());
    assert!(network.nodes[0].events.iter().any(|event| matches!(event, Event::PeerIdle(_))));
}

#[test]
fn a_peer_that_knows_of_no_directors_answers_probes_and_sends_none() {
    let mut network = pair([Nat::Open; 2]);
    // One knows nothing of directors, as another implementation would not.
    let config = PeerConfig { relays: vec![], ..config(&mut network, 1) };
    network.nodes[0].tunnel.add_peer(config, network.now);
    assert_eq!(talk(&mut network, 100), [100; 2]);
    assert_eq!(is_direct(&network), [true; 2]);
    assert!(path(&network, 1).round_trip.is_some(), "its probes were answered");
    for node in &network.nodes {
        assert!(!node.dropped.contains(&Dropped::InvalidPacket), "{:?}", node.dropped);
    }
}
