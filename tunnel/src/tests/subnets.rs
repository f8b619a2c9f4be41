//! Subnets behind peers: packets to and from addresses that are no peer's own.

use ipnet::IpNet;

use super::{network::Network, packets::udp};
use crate::{Dropped, Event, PeerConfig};

const INSIDE: &str = "192.168.7.9";

/// Tells node 0 of another, with subnets behind it.
fn introduce(network: &mut Network, of: usize, subnets: &[&str]) {
    let subnets: Vec<IpNet> = subnets.iter().map(|subnet| subnet.parse().unwrap()).collect();
    let config = PeerConfig { subnets, ..network.config(of) };
    network.nodes[0].tunnel.add_peer(config, network.now);
    network.collect(0);
    network.introduce(of, 0);
}

fn send(network: &mut Network, to: &str, payload: &[u8]) {
    network.send_packet(0, &udp("100.64.0.1", to, payload));
}

#[test]
fn packets_go_to_the_longest_prefix_and_addresses_go_first() {
    let mut network = Network::new(4, 1);
    introduce(&mut network, 1, &["192.168.0.0/16", "100.64.0.0/24"]);
    introduce(&mut network, 2, &["192.168.7.0/24"]);
    introduce(&mut network, 3, &[]);
    send(&mut network, INSIDE, b"near");
    send(&mut network, "192.168.8.1", b"far");
    network.send(0, 3, b"own");
    network.run_secs(1);
    assert_eq!(network.take_payloads(2), [b"near"]);
    assert_eq!(network.take_payloads(1), [b"far"]);
    assert_eq!(network.take_payloads(3), [b"own"]);
    assert_eq!(network.nodes[0].events.iter().filter(|e| matches!(e, Event::LookupAddress(_))).count(), 0);
}

#[test]
fn only_who_carries_a_subnet_may_send_from_it() {
    let mut network = Network::new(3, 2);
    introduce(&mut network, 1, &["192.168.7.0/24"]);
    introduce(&mut network, 2, &["192.168.0.0/16"]);
    network.send(0, 1, b"x");
    network.send(0, 2, b"x");
    network.run_secs(1);
    network.send_packet(1, &udp(INSIDE, "100.64.0.1", b"from inside"));
    network.run_secs(1);
    assert_eq!(network.take_payloads(0), [b"from inside"]);
    let wrong = [(1, "192.168.8.1"), (2, INSIDE), (2, "100.64.0.2"), (1, "10.0.0.1")];
    for (from, source) in wrong {
        network.send_packet(from, &udp(source, "100.64.0.1", b"forged"));
    }
    network.run_secs(1);
    assert_eq!(network.take_payloads(0), Vec::<Vec<u8>>::new());
    assert_eq!(network.nodes[0].dropped, [Dropped::WrongSource; 4]);
}

#[test]
fn a_subnet_moves_without_the_loss_of_a_session_or_of_what_waits() {
    let mut network = Network::new(3, 3);
    introduce(&mut network, 1, &["192.168.7.0/24", "10.0.0.0/8"]);
    network.send(0, 1, b"own");
    network.run_secs(1);
    assert_eq!(network.take_payloads(1), [b"own"]);
    let handshakes = network.count(0, 1);
    // The first packet to the new one waits for its session.
    introduce(&mut network, 2, &["192.168.7.0/24"]);
    send(&mut network, INSIDE, b"moved");
    send(&mut network, "10.1.1.1", b"stayed");
    network.run_secs(1);
    assert_eq!(network.take_payloads(2), [b"moved"]);
    assert_eq!(network.take_payloads(1), [b"stayed"]);
    assert_eq!(network.count(0, 1), handshakes + 1, "the other's handshake alone");

    // The one that carries it does not answer, and packets wait for it: they move along.
    let silent = network.nodes[2].address;
    network.black_holes.push(silent);
    let (first, second) = (network.key(1), network.key(2));
    network.nodes[0].tunnel.remove_peer(&second);
    introduce(&mut network, 2, &["192.168.7.0/24"]);
    send(&mut network, INSIDE, b"waits");
    network.run_millis(100);
    introduce(&mut network, 1, &["192.168.7.0/24"]);
    network.run_millis(100);
    assert_eq!(network.take_payloads(1), [b"waits"]);
    assert_eq!(network.nodes[0].tunnel.peer_at(&INSIDE.parse().unwrap()), Some(first));

    network.nodes[0].tunnel.remove_peer(&first);
    assert_eq!(network.nodes[0].tunnel.peer_at(&INSIDE.parse().unwrap()), None);
    assert_eq!(network.nodes[0].tunnel.peer_at(&"10.1.1.1".parse().unwrap()), None);
}

#[test]
fn packets_wait_for_whoever_carries_their_subnet() {
    let mut network = Network::new(2, 4);
    send(&mut network, INSIDE, b"one");
    send(&mut network, "192.168.7.200", b"two");
    send(&mut network, "192.168.8.1", b"three");
    let lookups = network.nodes[0].events.clone();
    let asked = [INSIDE, "192.168.7.200", "192.168.8.1"].map(|a| Event::LookupAddress(a.parse().unwrap()));
    assert_eq!(lookups, asked);
    introduce(&mut network, 1, &["192.168.7.0/24"]);
    network.run_secs(1);
    assert_eq!(network.take_payloads(1), [b"one".to_vec(), b"two".to_vec()]);
    // An update that lists it no more takes it away.
    introduce(&mut network, 1, &[]);
    assert_eq!(network.nodes[0].tunnel.peer_at(&INSIDE.parse().unwrap()), None);
}
