//! Peers on demand: unknown addresses and unknown keys.

use std::time::Duration;

use super::network::Network;
use crate::{Dropped, Event, LOOKUP_TIMEOUT, NEGATIVE_LIFE, PeerConfig};

#[test]
fn a_packet_for_an_unknown_address_waits_for_its_peer() {
    let mut network = Network::new(2, 1);
    network.send(0, 1, b"one");
    network.send(0, 1, b"two");
    let address = network.nodes[1].virtual_address.parse().unwrap();
    assert_eq!(network.nodes[0].events, [Event::LookupAddress(address)], "asked once");
    network.introduce(1, 0);
    network.introduce(0, 1);
    network.run_millis(100);
    assert_eq!(network.take_payloads(1), [b"one", b"two"]);
}

#[test]
fn no_such_device_is_unreachable_for_a_while() {
    let mut network = Network::new(2, 2);
    network.send(0, 1, b"one");
    network.send(0, 1, b"two");
    let address = network.nodes[1].virtual_address.parse().unwrap();
    network.nodes[0].tunnel.no_such_device(address, network.now);
    network.collect(0);
    assert_eq!(network.nodes[0].inbox.len(), 2, "an error each");
    assert_eq!(network.nodes[0].inbox[0][20..22], [3, 1]);
    network.send(0, 1, b"three");
    assert_eq!(network.nodes[0].dropped, [Dropped::Unreachable]);
    assert_eq!(network.nodes[0].inbox.len(), 3);
    assert_eq!(network.nodes[0].events.len(), 1, "not asked again");
    network.run(NEGATIVE_LIFE);
    network.send(0, 1, b"four");
    assert_eq!(network.nodes[0].events.len(), 2, "asked again");
}

#[test]
fn a_lookup_without_an_answer_ends() {
    let mut network = Network::new(2, 3);
    network.send(0, 1, b"one");
    network.run(LOOKUP_TIMEOUT + Duration::from_secs(1));
    assert_eq!(network.nodes[0].inbox.len(), 1, "unreachable");
    assert_eq!(network.nodes[0].tunnel.poll_timeout(), None);
    network.send(0, 1, b"two");
    assert_eq!(network.nodes[0].events.len(), 2);
}

#[test]
fn no_lookup_for_what_is_no_device() {
    let mut network = Network::new(1, 4);
    for destination in ["224.0.0.251", "255.255.255.255", "169.254.1.1", "127.0.0.1", "0.0.0.0"] {
        network.send_packet(0, &super::packets::udp("100.64.0.1", destination, b"x"));
    }
    for destination in ["ff02::2", "fe80::1", "::1", "::"] {
        network.send_packet(0, &super::packets::udp("fd00::1", destination, b"x"));
    }
    assert_eq!(network.nodes[0].dropped, [Dropped::NoRoute; 9]);
    assert_eq!(network.nodes[0].events, []);
    network.send_packet(0, b"");
    network.send_packet(0, &[0x45; 19]);
    assert_eq!(network.nodes[0].dropped[9..], [Dropped::InvalidPacket; 2]);
}

#[test]
fn an_unknown_key_is_looked_up_and_its_handshake_goes_on() {
    let mut network = Network::new(2, 5);
    network.introduce(0, 1);
    network.send(0, 1, b"x");
    network.run_secs(7);
    assert_eq!(network.count(0, 1), 2, "tried twice");
    assert_eq!(network.nodes[1].events, [Event::LookupKey(network.key(0))], "asked once");
    assert_eq!(network.count(1, 2), 0, "silence to strangers");
    network.introduce(1, 0);
    network.run_millis(100);
    assert_eq!(network.take_payloads(1), [b"x"]);
    assert_eq!(network.count(0, 1), 2, "the waiting one was answered");
}

#[test]
fn an_unknown_key_may_stay_unknown() {
    let mut network = Network::new(2, 6);
    network.introduce(0, 1);
    network.send(0, 1, b"x");
    network.run_secs(1);
    let key = network.key(0);
    network.nodes[1].tunnel.unknown_key(key, network.now);
    network.run_secs(4);
    network.nodes[1].tunnel.unknown_key(key, network.now);
    network.run_secs(3);
    assert_eq!(network.nodes[1].dropped, [Dropped::UnknownKey]);
    assert_eq!((network.nodes[1].events.len(), network.count(1, 2)), (1, 0));
}

#[test]
fn both_introduced_at_once() {
    let mut network = Network::new(2, 7);
    network.send(0, 1, b"a");
    network.send(1, 0, b"b");
    network.introduce(0, 1);
    network.introduce(1, 0);
    network.run_secs(1);
    assert_eq!(
        (network.take_payloads(0), network.take_payloads(1)),
        (vec![b"b".to_vec()], vec![b"a".to_vec()])
    );
    network.assert_one_session();
}

#[test]
fn own_key_is_no_peer() {
    let mut network = Network::new(1, 8);
    network.introduce(0, 0);
    let key = network.key(0);
    network.nodes[0].tunnel.add_peer(PeerConfig::new(key), network.now);
    assert!(network.nodes[0].tunnel.peer(&key, network.now).is_none());
}
