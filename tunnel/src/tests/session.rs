//! Life of a session: data, renewal, expiry, keepalives, roaming, suspend, determinism.

use std::time::Duration;

use proptest::prelude::*;

use super::{network::Network, packets::udp};
use crate::{
    Dropped, Event, IDLE_AFTER, PeerConfig, REJECT_AFTER_MESSAGES, REKEY_AFTER_MESSAGES, Reason,
    ZERO_KEYS_AFTER, replay::WINDOW,
};

#[test]
fn padding_is_put_on_and_taken_off() {
    let mut network = Network::pair(1);
    network.assert_works();
    for len in [0, 1, 3, 4, 100, 1392 - 16, 1392 - 3, 1392] {
        network.trace.clear();
        network.send(0, 1, &vec![7; len]);
        let sealed = network.last(0, 4).len() - 32;
        assert_eq!(sealed, (28 + len).next_multiple_of(16).min(1420), "payload of {len}");
        network.run_millis(20);
        assert_eq!(network.take_payloads(1), [vec![7; len]]);
    }
}

#[test]
fn ipv6_passes() {
    let mut network = Network::pair(2);
    for n in 0..2 {
        let mut config = network.config(1 - n);
        config.virtual_addresses.push(format!("fd00::{}", 2 - n).parse().unwrap());
        network.nodes[n].tunnel.add_peer(config, network.now);
    }
    let packet = udp("fd00::1", "fd00::2", b"six");
    network.send_packet(0, &packet);
    network.run_millis(100);
    assert_eq!(network.nodes[1].inbox, [packet]);
}

#[test]
fn sessions_are_renewed_without_loss() {
    let mut network = Network::pair(3);
    network.jitter = Duration::from_millis(30);
    let mut sent = 0u32;
    // Both directions, ten packets a second, ten minutes.
    for _ in 0..6_000 {
        for n in 0..2 {
            network.send(n, 1 - n, &sent.to_be_bytes());
        }
        sent += 1;
        network.run_millis(100);
    }
    network.run_secs(1);
    for n in 0..2 {
        let mut payloads = network.take_payloads(n);
        payloads.sort();
        assert_eq!(payloads.len(), sent as usize, "all of them, once");
        assert!(payloads.iter().zip(0..sent).all(|(payload, n)| *payload == n.to_be_bytes()));
    }
    let handshakes = network.count(0, 1) + network.count(1, 1);
    assert!((5..=7).contains(&handshakes), "{handshakes} handshakes in ten minutes");
    assert!(network.nodes.iter().all(|n| n.tunnel.sizes()[0] <= 4), "old indices are released");
}

#[test]
fn the_initiator_renews_in_time_even_if_it_only_receives() {
    let mut network = Network::pair(4);
    network.send(0, 1, b"x");
    network.run_secs(1);
    network.take_payloads(1);
    for _ in 0..400 {
        network.send(1, 0, b"y");
        network.run_secs(1);
    }
    assert_eq!(network.take_payloads(0).len(), 400);
    assert_eq!(network.count(1, 1), 0, "it was always the first initiator");
    assert_eq!(network.count(0, 1), 4, "at 0, about 120 (its own keepalives), 240 and 360 s");
}

#[test]
fn sessions_expire_and_keys_are_wiped() {
    let mut network = Network::pair(5);
    network.assert_works();
    let (from, key) = (network.nodes[0].address, network.key(1));
    network.run_secs(100);
    let handshakes = network.count(0, 1) + network.count(1, 1);
    network.loss = 100;
    network.send(0, 1, b"late");
    let late = network.last(0, 4);
    network.run_secs(70);
    assert!(network.nodes[0].tunnel.peer(&key, network.now).unwrap().has_session);
    network.run_secs(10);
    assert!(!network.nodes[0].tunnel.peer(&key, network.now).unwrap().has_session);
    assert_eq!(network.deliver(1, from, late.clone()), Err(Dropped::SessionExpired));
    network.run(ZERO_KEYS_AFTER);
    assert!(network.nodes.iter().all(|node| node.tunnel.sizes()[0] == 0), "no index, no key");
    assert_eq!(network.deliver(1, from, late), Err(Dropped::UnknownIndex));
    network.loss = 0;
    network.assert_works();
    assert!(network.count(0, 1) + network.count(1, 1) > handshakes);
}

#[test]
fn counters_force_renewal_and_end() {
    let mut network = Network::pair(6);
    network.assert_works();
    network.run_secs(10);
    let key = network.key(1);
    let before = network.current_index(0, 1);
    network.nodes[0]
        .tunnel
        .peer_mut(&key)
        .sessions()
        .current()
        .unwrap()
        .set_send_counter(REKEY_AFTER_MESSAGES);
    network.assert_works();
    let after = network.current_index(0, 1);
    assert_ne!(before, after, "renewed");
    network.run_secs(10);
    let session = |network: &mut Network, counter| {
        network.nodes[0].tunnel.peer_mut(&key).sessions().current().unwrap().set_send_counter(counter)
    };
    session(&mut network, REJECT_AFTER_MESSAGES);
    network.trace.clear();
    network.send(0, 1, b"waits");
    assert_eq!(network.count(0, 4), 0, "not with this key");
    network.run_millis(100);
    assert_eq!(network.take_payloads(1), [b"waits"]);
}

#[test]
fn replayed_data_is_refused() {
    let mut network = Network::pair(7);
    network.assert_works();
    let (from, data) = (network.nodes[0].address, network.last(0, 4));
    assert_eq!(network.deliver(1, from, data), Err(Dropped::Replayed));
    let key = network.key(0);
    assert_eq!(network.nodes[1].tunnel.peer(&key, network.now).unwrap().drops.get(Dropped::Replayed), 1);
}

#[test]
fn data_that_was_overtaken_is_taken_once_while_it_is_in_the_window() {
    let mut network = Network::pair(70);
    network.assert_works();
    network.loss = 100;
    network.trace.clear();
    let number = WINDOW as u32 + 2;
    for n in 0..number {
        network.send(0, 1, &n.to_be_bytes());
    }
    let from = network.nodes[0].address;
    let datagrams: Vec<_> = network.trace.drain(..).map(|(_, _, _, datagram)| datagram).collect();
    assert_eq!(datagrams.len(), number as usize);
    // The last one first; then the first two are too old, and the third is just not.
    let results: Vec<_> =
        datagrams.iter().rev().map(|datagram| network.deliver(1, from, datagram.clone())).collect();
    let (in_window, too_old) = results.split_at(WINDOW as usize);
    assert!(in_window.iter().all(Result::is_ok));
    assert_eq!(too_old, [Err(Dropped::Replayed); 2]);
    let payloads = network.take_payloads(1);
    assert!(payloads.iter().zip((2..number).rev()).all(|(payload, n)| *payload == n.to_be_bytes()));
    assert_eq!(payloads.len(), WINDOW as usize);
    // All of them again.
    for datagram in datagrams {
        assert_eq!(network.deliver(1, from, datagram), Err(Dropped::Replayed));
    }
    assert!(network.take_payloads(1).is_empty());
}

#[test]
fn only_its_own_addresses_as_source() {
    let mut network = Network::pair(8);
    network.assert_works();
    let destination = network.nodes[1].virtual_address.clone();
    network.send_packet(0, &udp("100.64.0.99", &destination, b"forged"));
    network.run_millis(100);
    assert_eq!(network.nodes[1].dropped, [Dropped::WrongSource]);
    assert!(network.nodes[1].inbox.is_empty());
}

#[test]
fn roaming() {
    let mut network = Network::pair(9);
    network.assert_works();
    let moved = "198.51.100.9:999".parse().unwrap();
    network.nodes[0].address = moved;
    network.send(0, 1, b"from elsewhere");
    network.run_millis(100);
    let public_key = network.key(0);
    assert_eq!(
        network.nodes[1].events.last(),
        Some(&Event::EndpointChanged { public_key, endpoint: moved.into() })
    );
    network.assert_works();
    // What is not authentic moves nothing.
    let mut forged = network.last(0, 4);
    forged[20] ^= 1;
    forged[8] = 200;
    let elsewhere = "198.51.100.66:6".parse().unwrap();
    assert_eq!(network.deliver(1, elsewhere, forged), Err(Dropped::NotAuthentic));
    network.assert_works();
}

#[test]
fn keepalive_answers_data() {
    let mut network = Network::pair(10);
    network.assert_works();
    network.run_secs(20);
    network.nodes.iter_mut().for_each(|node| node.keepalives = 0);
    network.trace.clear();
    network.send(0, 1, b"x");
    network.run_secs(9);
    assert_eq!(network.nodes[0].keepalives, 0);
    network.run_secs(2);
    assert_eq!(network.nodes[0].keepalives, 1);
    network.run_secs(60);
    assert_eq!((network.nodes[0].keepalives, network.nodes[1].keepalives), (1, 0), "no answer to an answer");
    assert_eq!(network.trace.len(), 2);
}

#[test]
fn silence_after_data_brings_a_new_handshake() {
    let mut network = Network::pair(11);
    network.assert_works();
    network.run_secs(20);
    network.black_holes = vec![network.nodes[1].address];
    network.trace.clear();
    network.send(0, 1, b"x");
    network.run_secs(14);
    assert_eq!(network.count(0, 1), 0);
    network.run_secs(2);
    assert_eq!(network.count(0, 1), 1);
    network.black_holes.clear();
    network.run_secs(6);
    network.assert_works();
}

#[test]
fn persistent_keepalive() {
    let mut network = Network::pair(12);
    let config = PeerConfig { persistent_keepalive: Some(Duration::from_secs(25)), ..network.config(1) };
    network.nodes[0].tunnel.add_peer(config.clone(), network.now);
    network.run_secs(3_600);
    // The first brings the session up; then one every 25 s, and one for each new session (144 + 30).
    let received = network.nodes[1].keepalives;
    assert!((165..=175).contains(&received), "{received} in an hour");
    let key = network.key(1);
    assert!(network.nodes[0].tunnel.peer(&key, network.now).unwrap().has_session);
    // Not for good: an update ends it.
    network.nodes[0].tunnel.add_peer(PeerConfig { persistent_keepalive: None, ..config }, network.now);
    network.trace.clear();
    network.run_secs(600);
    assert_eq!(network.trace.len(), 0);
}

#[test]
fn idle_peers_are_reported_once_and_cost_nothing() {
    let mut network = Network::pair(13);
    network.assert_works();
    network.nodes[0].events.clear();
    network.run(IDLE_AFTER + Duration::from_secs(1));
    let key = network.key(1);
    assert_eq!(network.nodes[0].events, [Event::PeerIdle(key)]);
    network.run_secs(3_600);
    assert_eq!(network.nodes[0].events.len(), 1);
    assert_eq!(network.nodes[0].tunnel.poll_timeout(), None, "nothing to wake for");
    network.assert_works();
    network.run(IDLE_AFTER + Duration::from_secs(1));
    assert_eq!(network.nodes[0].events.last(), Some(&Event::PeerIdle(key)));
    assert!(network.nodes[0].tunnel.remove_peer(&key));
    assert_eq!(network.nodes[0].tunnel.sizes()[..3], [0, 0, 0]);
}

#[test]
fn timeouts_say_why() {
    let mut network = Network::pair(14);
    let reason = |network: &Network| network.nodes[0].tunnel.poll_timeout().map(|(_, reason)| reason);
    assert_eq!(reason(&network), Some(Reason::Idle));
    network.send(0, 1, b"x");
    assert_eq!(reason(&network), Some(Reason::Handshake));
}

#[test]
fn suspend_for_an_hour() {
    let mut network = Network::pair(15);
    network.assert_works();
    network.send(0, 1, b"lost with the network");
    network.suspend(Duration::from_secs(3_600));
    network.send(0, 1, b"first");
    network.run_millis(100);
    assert_eq!(network.take_payloads(1), [b"first"]);
    network.assert_works();
    network.assert_one_session();
}

#[test]
fn same_seed_same_trace() {
    let trace = |seed| {
        let mut network = Network::pair(seed);
        (network.loss, network.jitter) = (10, Duration::from_millis(20));
        for round in 0..300u32 {
            network.send((round % 2) as usize, ((round + 1) % 2) as usize, &round.to_be_bytes());
            network.run_secs(1);
        }
        network.trace
    };
    let (a, b) = (trace(16), trace(16));
    assert!(a.len() > 300 && a == b);
    assert_ne!(a, trace(17));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Over a bad network nothing arrives twice or changed, and when it is good again everything works at once or after
    /// one retry.
    #[test]
    fn bad_networks(seed in 0u64..1_000_000, loss in 0u32..60, jitter in 0u64..400, steps in 50u32..300) {
        let mut network = Network::pair(seed);
        (network.loss, network.jitter) = (loss, Duration::from_millis(jitter));
        for round in 0..steps {
            let from = (round as usize * 7 / 3) % 2;
            network.send(from, 1 - from, &round.to_be_bytes());
            network.run_millis(u64::from(round * 37 % 4_000));
        }
        (network.loss, network.jitter) = (0, Duration::ZERO);
        network.run_secs(20);
        for n in 0..2 {
            let mut payloads = network.take_payloads(n);
            let all = payloads.len();
            payloads.sort();
            payloads.dedup();
            prop_assert_eq!(payloads.len(), all);
            prop_assert!(payloads.iter().all(|p| u32::from_be_bytes(*p.first_chunk().unwrap()) < steps));
        }
        network.assert_works();
        network.assert_one_session();
    }
}
