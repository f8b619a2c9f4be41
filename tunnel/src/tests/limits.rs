//! Bounds and bad input: nothing grows, nothing panics, one bad packet ends no batch.

use std::net::{IpAddr, SocketAddr};

use proptest::prelude::*;

use super::{network::Network, packets::udp};
use crate::{ADDRESS_LOOKUPS, Dropped, Ecn, Outgoing, PEER_QUEUE, PeerConfig, PublicKey, Received, Sent};

#[test]
fn the_queue_of_a_peer_keeps_the_newest() {
    let mut network = Network::pair(1);
    for n in 0..PEER_QUEUE as u32 + 10 {
        network.send(0, 1, &n.to_be_bytes());
    }
    let key = network.key(1);
    let peer = network.nodes[0].tunnel.peer(&key, network.now).unwrap();
    assert_eq!((peer.queued, peer.drops.get(Dropped::QueueFull)), (PEER_QUEUE, 10));
    network.run_millis(100);
    let payloads = network.take_payloads(1);
    assert!(payloads.iter().zip(10u32..).all(|(payload, n)| *payload == n.to_be_bytes()));
    assert_eq!(payloads.len(), PEER_QUEUE);
}

#[test]
fn lookups_are_bounded() {
    let mut network = Network::new(1, 2);
    for n in 0..5_000u32 {
        let destination = IpAddr::V4((0x6440_0000 + 256 + n).into()).to_string();
        network.send_packet(0, &udp("100.64.0.1", &destination, &[0; 1000]));
    }
    assert_eq!(network.nodes[0].events.len(), ADDRESS_LOOKUPS);
    assert_eq!(network.nodes[0].tunnel.drops().get(Dropped::QueueFull) as usize, 5_000 - ADDRESS_LOOKUPS);
}

#[test]
fn peers_come_and_go_without_a_trace() {
    let mut network = Network::pair(3);
    network.assert_works();
    let sizes = network.nodes[0].tunnel.sizes();
    for round in 0..1_000u32 {
        let mut octets = [0; 32];
        octets[..4].copy_from_slice(&round.to_be_bytes());
        let config = PeerConfig {
            virtual_addresses: vec![IpAddr::V4((0x6450_0000 + round).into())],
            endpoints: vec!["203.0.113.1:1".parse().unwrap()],
            ..PeerConfig::new(PublicKey::from_bytes(octets))
        };
        let key = config.public_key;
        network.nodes[0].tunnel.add_peer(config, network.now);
        network.nodes[0].tunnel.connect(&key, network.now);
        network.collect(0);
        assert!(network.nodes[0].tunnel.remove_peer(&key));
    }
    assert_eq!(network.nodes[0].tunnel.sizes()[..3], sizes[..3]);
    assert_eq!(network.nodes[0].tunnel.sizes()[3], sizes[3] + 1, "places are used again");
    network.assert_works();
}

#[test]
fn batches_survive_bad_members() {
    let mut network = Network::pair(4);
    network.assert_works();
    let (a, b) = (network.nodes[0].virtual_address.clone(), network.nodes[1].virtual_address.clone());
    let good = [udp(&a, &b, b"1"), udp(&a, &b, b"2")];
    let packets: [&[u8]; 5] = [&good[0], b"junk", &good[1], &[], &[0x45; 3]];
    let mut out = Outgoing::new();
    let now = network.now;
    let node = &mut network.nodes[0];
    let sent = packets.map(|packet| node.tunnel.handle_packet(packet, now, &mut out));
    assert_eq!(sent.iter().filter(|sent| **sent == Ok(Sent::Sealed)).count(), 2);
    assert_eq!((out.len(), out.octets(), out.runs().len()), (2, 2 * (32 + 32), 1));
    let source = network.nodes[0].address;
    let mut datagrams: Vec<Vec<u8>> =
        out.runs().flat_map(|run| run.datagrams().map(<[u8]>::to_vec).collect::<Vec<_>>()).collect();
    datagrams.insert(1, vec![4; 100]);
    datagrams.insert(0, vec![]);
    let mut results = Vec::new();
    for datagram in &mut datagrams {
        let received = network.nodes[1].tunnel.handle_datagram(source, Ecn::NotEct, datagram, now);
        results.push(received.map(|received| match received {
            Received::Packet { packet, .. } => packet.to_vec(),
            other => panic!("{other:?}"),
        }));
    }
    let [one, two] = good;
    assert_eq!(results, [Err(Dropped::Malformed), Ok(one), Err(Dropped::Malformed), Ok(two)]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    /// Arbitrary datagrams, and real ones with arbitrary changes, never panic, never pass, and leave nothing behind.
    #[test]
    fn any_datagram(
        kind in 0u8..6,
        mut octets in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..200),
            prop::collection::vec(any::<u8>(), 148..=148),
            prop::collection::vec(any::<u8>(), 92..=92),
            prop::collection::vec(any::<u8>(), 64..=64),
        ],
        real in 0u8..3, at in 0usize..2_000, flip in 1u8..,
    ) {
        let mut network = Network::pair(5);
        network.send(0, 1, b"x");
        network.run_millis(100);
        let sizes = network.nodes[1].tunnel.sizes();
        let source: SocketAddr = "203.0.113.1:1".parse().unwrap();
        for (to, from) in octets.iter_mut().zip([kind, 0, 0, 0]) {
            *to = from;
        }
        prop_assert!(network.deliver(1, source, octets).is_err());
        let mut changed = if real == 0 { network.last(0, 1) } else { network.last(0, 4) };
        let at = at % changed.len();
        changed[at] ^= flip;
        prop_assert!(network.deliver(1, source, changed).is_err());
        prop_assert_eq!(network.nodes[1].tunnel.sizes(), sizes);
        network.take_payloads(1);
        network.assert_works();
    }

    /// Arbitrary packets from the TUN device never panic.
    #[test]
    fn any_packet(first in any::<u8>(), mut octets in prop::collection::vec(any::<u8>(), 0..100)) {
        let mut network = Network::new(1, 6);
        if let Some(octet) = octets.first_mut() {
            *octet = first;
        }
        network.send_packet(0, &octets);
        network.run_secs(60);
        prop_assert_eq!(network.nodes[0].tunnel.poll_timeout(), None);
    }
}
