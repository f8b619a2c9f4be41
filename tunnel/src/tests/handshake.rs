//! Handshakes: first contact, loss, replay, cookies, both sides at once, candidate endpoints.

use std::time::Duration;

use proptest::prelude::*;

use super::network::Network;
use crate::{Dropped, Event, PeerConfig, PresharedKey, REKEY_ATTEMPT_TIME};

#[test]
fn first_packet_makes_a_session_and_arrives() {
    let mut network = Network::pair(1);
    network.send(0, 1, b"one");
    network.send(0, 1, b"two");
    network.run_millis(100);
    assert_eq!(network.take_payloads(1), [b"one", b"two"]);
    let up = |network: &Network, n: usize| {
        let endpoint = network.nodes[n].address;
        [Event::PeerUp { public_key: network.key(n), endpoint: endpoint.into() }]
    };
    assert_eq!(network.nodes[0].events, up(&network, 1));
    assert_eq!(network.nodes[1].events, up(&network, 0));
    network.assert_works();
    network.assert_one_session();
    assert_eq!((network.count(0, 1), network.count(1, 1)), (0, 0), "no further handshake in the last trace");
    assert!(network.nodes.iter().all(|node| node.dropped.is_empty()));
}

#[test]
fn connect_confirms_with_an_empty_message() {
    let mut network = Network::pair(2);
    let key = network.key(1);
    network.nodes[0].tunnel.connect(&key, network.now);
    network.collect(0);
    network.run_millis(100);
    assert_eq!(network.nodes[1].keepalives, 1);
    network.assert_works();
}

#[test]
fn lost_initiations_are_repeated_and_then_given_up() {
    let mut network = Network::pair(3);
    network.loss = 100;
    network.send(0, 1, b"lost");
    network.run_secs(60);
    let sent = network.count(0, 1);
    assert!((11..=13).contains(&sent), "{sent} in a minute");
    let mut initiations: Vec<_> = network.trace.iter().map(|(.., payload)| payload.clone()).collect();
    initiations.dedup();
    assert_eq!(initiations.len(), sent, "each is new");
    assert_eq!(network.nodes[0].events, []);
    network.run(REKEY_ATTEMPT_TIME - Duration::from_secs(50));
    assert_eq!(network.nodes[0].events, [Event::PeerDown(network.key(1))]);
    let peer = network.nodes[0].tunnel.peer(&network.key(1), network.now).unwrap();
    assert_eq!((peer.queued, peer.drops.get(Dropped::NoSession)), (0, 1));
    let sent = network.count(0, 1);
    network.run_secs(200);
    assert_eq!(network.count(0, 1), sent, "silence after that");
    network.loss = 0;
    network.assert_works();
    assert!(matches!(network.nodes[0].events.last(), Some(Event::PeerUp { .. })));
}

#[test]
fn old_initiations_are_refused() {
    let mut network = Network::pair(4);
    network.send(0, 1, b"x");
    network.run_millis(100);
    let (from, initiation) = (network.nodes[0].address, network.last(0, 1));
    assert_eq!(network.deliver(1, from, initiation.clone()), Err(Dropped::OldTimestamp));
    // Also after the peer was forgotten in between, whether it is known again or not.
    let key = network.key(0);
    assert!(network.nodes[1].tunnel.remove_peer(&key));
    assert_eq!(network.deliver(1, from, initiation.clone()), Err(Dropped::OldTimestamp));
    network.introduce(1, 0);
    assert_eq!(network.deliver(1, from, initiation), Err(Dropped::OldTimestamp));
}

#[test]
fn responses_are_not_accepted_twice_or_changed() {
    let mut network = Network::pair(5);
    network.send(0, 1, b"x");
    network.run_millis(15);
    let from = network.nodes[1].address;
    let response = network.last(1, 2);
    for at in 0..response.len() {
        let mut changed = response.clone();
        changed[at] ^= 0x80;
        // The last 16 octets are mac2, which counts under load only.
        if at < 76 {
            assert!(network.deliver(0, from, changed).is_err(), "octet {at}");
        }
    }
    network.run_millis(100);
    assert_eq!(network.take_payloads(1), [b"x"]);
    assert_eq!(network.deliver(0, from, response), Err(Dropped::UnknownIndex));
}

#[test]
fn preshared_keys_must_agree() {
    let mut network = Network::pair(6);
    let psk = Some(PresharedKey::from_bytes([9; 32]));
    let config = PeerConfig { preshared_key: psk.clone(), ..network.config(1) };
    network.nodes[0].tunnel.add_peer(config, network.now);
    network.send(0, 1, b"x");
    network.run_secs(1);
    assert_eq!(network.nodes[0].dropped, [Dropped::NotAuthentic]);
    let config = PeerConfig { preshared_key: psk, ..network.config(0) };
    network.nodes[1].tunnel.add_peer(config, network.now);
    network.run_secs(6);
    assert_eq!(network.take_payloads(1), [b"x"]);
}

#[test]
fn under_load_a_cookie_is_demanded_and_then_honoured() {
    // One handshake a second is load.
    let mut network = Network::with_rate(3, 7, 1);
    for n in 0..2 {
        network.introduce(n, 2);
        network.introduce(2, n);
    }
    network.send(0, 2, b"zero");
    network.send(1, 2, b"one");
    network.run_millis(500);
    assert_eq!(network.take_payloads(2), [b"zero"]);
    assert_eq!(network.nodes[2].dropped, [Dropped::CookieDemanded]);
    assert_eq!(network.count(2, 3), 1);
    // The load lasts.
    for n in 0..55u64 {
        network.run_millis(100);
        let mut junk = network.last(1, 1);
        junk[132..].fill(n as u8);
        let from = "203.0.113.1:5".parse().unwrap();
        assert!(network.deliver(2, from, junk).is_err());
    }
    network.run_millis(200);
    assert_ne!(network.last(1, 1)[132..], [0; 16], "mac2 is there");
    assert_eq!(network.take_payloads(2), [b"one"]);
}

#[test]
fn both_at_once_end_in_one_session() {
    let mut network = Network::pair(8);
    network.send(0, 1, b"a");
    network.send(1, 0, b"b");
    network.run_secs(1);
    assert_eq!(network.take_payloads(0), [b"b"]);
    assert_eq!(network.take_payloads(1), [b"a"]);
    network.assert_one_session();
    // The first node has the lower key: the session is the one it started.
    let key = network.key(1);
    assert!(network.nodes[0].tunnel.peer_mut(&key).sessions().current().unwrap().is_initiator);
    network.assert_works();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever the offset, delay, order and loss: packets arrive and both sides end up in one session.
    #[test]
    fn about_at_once_too(
        seed in 0u64..1_000_000, offset in 0u64..60, jitter in 0u64..40, loss in prop_oneof![Just(0u32), 0u32..40],
        first in 0usize..2,
    ) {
        let mut network = Network::pair(seed);
        network.jitter = Duration::from_millis(jitter);
        network.loss = loss;
        network.send(first, 1 - first, b"a");
        network.run_millis(offset);
        network.send(1 - first, first, b"b");
        network.run_secs(30);
        network.loss = 0;
        network.jitter = Duration::ZERO;
        // If even 30 s were not enough for a handshake to get through, the next try does it. What is then left of the
        // race is over once each side has sent something.
        network.run_secs(10);
        network.assert_works();
        network.assert_one_session();
    }
}

/// A session that the peer started before our newest initiation is older than what that one makes: it must not come back
/// when both sides then change over at the same moment.
#[test]
fn an_earlier_session_of_the_peer_does_not_cross_a_later_one_of_ours() {
    let mut network = Network::pair(13);
    network.loss = 100;
    network.send(1, 0, b"b");
    network.loss = 0;
    network.send(0, 1, b"a");
    network.run_millis(15);
    // Node 0 finishes its handshake, but nothing that it sends through the session arrives.
    network.loss = 100;
    network.run_millis(50);
    network.loss = 0;
    while network.count(1, 1) < 2 {
        network.run_millis(1);
    }
    network.run_millis(15);
    // Nor what node 1 sends through its own.
    network.loss = 100;
    network.run_millis(50);
    network.loss = 0;
    network.assert_works();
    network.assert_one_session();
}

#[test]
fn an_initiation_that_was_overtaken_by_a_whole_handshake_is_not_answered() {
    let mut network = Network::pair(14);
    network.delay = Duration::from_millis(300);
    network.send(1, 0, b"b");
    network.delay = Duration::from_millis(10);
    network.send(0, 1, b"a");
    network.run_millis(200);
    let sent = network.count(0, 4);
    network.run_millis(200);
    assert_eq!(network.nodes[0].dropped, [Dropped::Simultaneous]);
    assert_eq!((network.count(0, 2), network.count(0, 4)), (0, sent + 1), "an empty message instead");
    assert_eq!(network.take_payloads(0), [b"b"]);
    network.assert_one_session();
}

#[test]
fn who_was_just_called_does_not_call_back() {
    let mut network = Network::new(2, 15);
    network.introduce(0, 1);
    network.send(0, 1, b"a");
    network.send(1, 0, b"b");
    network.run_secs(1);
    // It has a packet and an initiation, both waiting for this.
    network.introduce(1, 0);
    network.run_millis(100);
    assert_eq!(
        (network.take_payloads(0), network.take_payloads(1)),
        (vec![b"b".to_vec()], vec![b"a".to_vec()])
    );
    assert_eq!((network.count(0, 1), network.count(1, 1)), (1, 0));
}

#[test]
fn a_peer_may_not_start_handshakes_in_quick_succession() {
    let mut network = Network::pair(16);
    let key = network.key(1);
    for _ in 0..3 {
        network.nodes[0].tunnel.remove_peer(&key);
        network.introduce(0, 1);
        network.nodes[0].tunnel.connect(&key, network.now);
        network.collect(0);
    }
    network.run_millis(15);
    assert_eq!(network.nodes[1].dropped, [Dropped::RateLimited; 2]);
    assert_eq!(network.count(1, 2), 1);
}

#[test]
fn candidates_are_all_tried_and_the_one_that_answers_is_used() {
    let mut network = Network::pair(9);
    let right = network.nodes[1].address;
    let wrong = ["198.51.100.1:1", "198.51.100.2:2", "0.0.0.0:3", "224.0.0.1:4", "198.51.100.3:0"];
    let mut endpoints: Vec<_> = wrong.iter().map(|at| at.parse().unwrap()).collect();
    endpoints.push(right);
    let config = PeerConfig { endpoints, ..network.config(1) };
    let key = network.key(1);
    network.nodes[0].tunnel.remove_peer(&key);
    network.nodes[0].tunnel.add_peer(config, network.now);
    network.send(0, 1, b"x");
    assert_eq!(network.count(0, 1), 3, "not to unusable ones");
    network.run_millis(100);
    assert_eq!(network.take_payloads(1), [b"x"]);
    assert_eq!(network.nodes[0].tunnel.peer(&key, network.now).unwrap().endpoint, Some(right));
    let before = network.trace.len();
    network.assert_works();
    assert!(
        network
            .trace
            .iter()
            .skip(before)
            .all(|(_, _, to, _)| *to == right || *to == network.nodes[0].address)
    );
}

#[test]
fn new_candidates_of_a_live_peer_are_tried_at_once() {
    let mut network = Network::pair(10);
    network.assert_works();
    network.run_secs(6);
    // The peer has moved without sending anything.
    let moved = "192.0.2.77:7".parse().unwrap();
    network.nodes[1].address = moved;
    let config = network.config(1);
    assert!(network.nodes[0].tunnel.update_peer(config, network.now));
    network.collect(0);
    network.run_millis(100);
    let (key, now) = (network.key(1), network.now);
    assert_eq!(network.nodes[0].tunnel.peer(&key, now).unwrap().endpoint, Some(moved));
    assert_eq!(
        network.nodes[0].events.last(),
        Some(&Event::EndpointChanged { public_key: key, endpoint: moved.into() })
    );
    network.assert_works();
    let stranger = PeerConfig::new(network.key(0));
    assert!(!network.nodes[0].tunnel.update_peer(stranger, now), "not held");
}

#[test]
fn candidates_that_come_during_a_handshake_get_it_too() {
    let mut network = Network::pair(11);
    let (key, now) = (network.key(1), network.now);
    network.nodes[0].tunnel.remove_peer(&key);
    let config = PeerConfig { endpoints: vec![], ..network.config(1) };
    network.nodes[0].tunnel.add_peer(config, now);
    network.send(0, 1, b"x");
    network.run_secs(2);
    assert_eq!(network.trace.len(), 0, "nowhere to send to");
    network.introduce(0, 1);
    network.run_millis(100);
    assert_eq!(network.take_payloads(1), [b"x"]);
}

#[test]
fn a_peer_with_a_new_key_takes_the_old_ones_place() {
    let mut network = Network::new(3, 12);
    network.introduce(0, 1);
    network.introduce(2, 0);
    network.black_holes = vec![network.nodes[1].address];
    network.send(0, 1, b"waits for node 1");
    network.run_secs(1);
    // Node 2 comes in its place, at the same virtual address.
    let old = network.key(1);
    network.nodes[2].virtual_address = network.nodes[1].virtual_address.clone();
    network.introduce(0, 2);
    network.run_millis(100);
    network.send(0, 2, b"another");
    network.run_millis(100);
    assert_eq!(network.take_payloads(2), [&b"waits for node 1"[..], b"another"]);
    assert!(network.nodes[0].tunnel.peer(&old, network.now).is_none());
}
