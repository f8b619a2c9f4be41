//! Sessions with AES-256-GCM: between those that take it, and what becomes of them where one does not.

use std::time::Duration;

use proptest::prelude::*;

use super::network::Network;
use crate::{
    AES_REJECT_AFTER_MESSAGES, AES_REKEY_AFTER_MESSAGES, Cipher, Dropped, Event,
    cookie::{CookieJar, Guard},
};

/// Two tunnels that are told to begin with AES-256-GCM, of which some take it.
fn pair(seed: u64, takes_aes: [bool; 2]) -> Network {
    let mut network = Network::with_aes(2, seed, 0, |n| takes_aes[usize::from(n)]);
    network.told = Cipher::Aes256Gcm;
    network.introduce(0, 1);
    network.introduce(1, 0);
    network
}

/// What both sides' sessions are sealed with.
fn ciphers(network: &Network) -> [Option<Cipher>; 2] {
    let cipher = |n: usize| network.nodes[n].tunnel.peer(&network.key(1 - n), network.now).unwrap().cipher;
    [cipher(0), cipher(1)]
}

const AES: [Option<Cipher>; 2] = [Some(Cipher::Aes256Gcm); 2];
const PLAIN: [Option<Cipher>; 2] = [Some(Cipher::ChaCha20Poly1305); 2];

#[test]
fn both_take_it() {
    let mut network = pair(1, [true, true]);
    network.assert_works();
    assert_eq!(ciphers(&network), AES);
    network.assert_one_session();
    // Renewed with loss on the way, and still.
    network.loss = 10;
    for _ in 0..400 {
        network.send(0, 1, b"x");
        network.send(1, 0, b"y");
        network.run_secs(1);
    }
    network.loss = 0;
    network.assert_works();
    assert_eq!(ciphers(&network), AES);
}

#[test]
fn both_start_at_once() {
    let mut network = pair(2, [true, true]);
    for n in 0..2 {
        network.send(n, 1 - n, &[n as u8]);
    }
    network.run_millis(500);
    assert_eq!((network.take_payloads(0), network.take_payloads(1)), (vec![vec![1]], vec![vec![0]]));
    network.assert_one_session();
    assert_eq!(ciphers(&network), AES);
}

#[test]
fn a_peer_without_it_is_silent_to_it_and_reached_all_the_same() {
    for (seed, takes_aes) in [(3, [true, false]), (4, [false, true])] {
        let mut network = pair(seed, takes_aes);
        let from = usize::from(takes_aes[1]);
        network.send(from, 1 - from, b"first");
        network.run_secs(9);
        assert_eq!(network.count(1 - from, 2) + network.count(1 - from, 3), 0, "no word to a stranger");
        assert!(network.nodes[1 - from].dropped.iter().all(|reason| *reason == Dropped::InvalidMac));
        network.run_secs(4);
        assert_eq!(network.take_payloads(1 - from), [b"first"]);
        assert_eq!(ciphers(&network), PLAIN);
        network.assert_works();
        // The side without it begins plainly, and is answered at once.
        let mut network = pair(seed, takes_aes);
        network.send(1 - from, from, b"first");
        network.run_millis(200);
        assert_eq!((network.take_payloads(from), ciphers(&network)), (vec![b"first".to_vec()], PLAIN));
    }
}

#[test]
fn a_peer_that_is_told_later_changes_over_with_the_next_handshake() {
    let mut network = Network::with_aes(2, 5, 0, |_| true);
    network.introduce(0, 1);
    network.introduce(1, 0);
    network.assert_works();
    assert_eq!(ciphers(&network), PLAIN);
    network.told = Cipher::Aes256Gcm;
    network.introduce(0, 1);
    network.introduce(1, 0);
    network.assert_works();
    assert_eq!(ciphers(&network), PLAIN, "the session goes on");
    for _ in 0..130 {
        network.send(0, 1, b"x");
        network.run(Duration::from_secs(1));
    }
    assert_eq!(ciphers(&network), AES);
}

#[test]
fn cookies_work_for_it() {
    let mut network = Network::with_aes(2, 6, 1, |_| true);
    network.told = Cipher::Aes256Gcm;
    network.introduce(0, 1);
    network.introduce(1, 0);
    // Old initiations of the other side's put the first one under load.
    network.send(1, 0, b"x");
    let initiation = network.last(1, 1);
    let from = network.nodes[1].address;
    for _ in 0..5 {
        let _ = network.deliver(0, from, initiation.clone());
    }
    network.run_secs(20);
    assert!(network.count(0, 3) > 0, "a cookie was demanded");
    network.assert_works();
    assert_eq!(ciphers(&network), AES);
}

/// What the initiations that node 0 sent to node 1 were for.
fn initiations(network: &Network) -> Vec<Cipher> {
    let guard = Guard::new(&network.key(1), 0, true, network.now);
    let (from, to) = (network.nodes[0].address, network.nodes[1].address);
    let sent = network.trace.iter().filter(|(_, f, t, payload)| (*f, *t, payload[0]) == (from, to, 1));
    sent.map(|(.., payload)| guard.verify_mac1(payload).unwrap()).collect()
}

#[test]
fn an_outage_brings_it_down_to_the_common_cipher_and_the_next_renewal_back() {
    let mut network = pair(7, [true, true]);
    network.loss = 100;
    network.send(0, 1, b"first");
    network.run_secs(32);
    let (aes, plain) = (Cipher::Aes256Gcm, Cipher::ChaCha20Poly1305);
    assert_eq!(initiations(&network), [aes, aes, plain, aes, plain, aes, plain]);
    network.loss = 0;
    // The next is for AES; it is lost, too, and the one after it arrives.
    network.black_holes = vec![network.nodes[1].address];
    network.run_secs(7);
    network.black_holes.clear();
    network.run_secs(6);
    assert_eq!((network.take_payloads(1), ciphers(&network)), (vec![b"first".to_vec()], PLAIN));
    network.trace.clear();
    for _ in 0..130 {
        network.send(0, 1, b"x");
        network.run_secs(1);
    }
    assert_eq!((initiations(&network), ciphers(&network)), (vec![aes], AES));
}

#[test]
fn who_does_not_take_it_does_not_begin_with_it() {
    let mut network = pair(8, [false, true]);
    network.loss = 100;
    network.send(0, 1, b"x");
    network.run_secs(32);
    assert!(initiations(&network).iter().all(|cipher| *cipher == Cipher::default()));
}

#[test]
fn roaming() {
    let mut network = pair(9, [true, true]);
    network.assert_works();
    let session = network.current_index(1, 0);
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
    assert_eq!((network.current_index(1, 0), ciphers(&network)), (session, AES), "the same session");
}

#[test]
fn its_counters_force_renewal_and_end() {
    let mut network = pair(10, [true, true]);
    network.assert_works();
    let key = network.key(1);
    let set = |network: &mut Network, counter| {
        network.nodes[0].tunnel.peer_mut(&key).sessions().current().unwrap().set_send_counter(counter)
    };
    network.run_secs(10);
    let before = network.current_index(0, 1);
    set(&mut network, AES_REKEY_AFTER_MESSAGES);
    network.assert_works();
    assert_ne!(network.current_index(0, 1), before, "renewed");
    network.run_secs(10);
    set(&mut network, AES_REJECT_AFTER_MESSAGES);
    network.trace.clear();
    network.send(0, 1, b"waits");
    assert_eq!(network.count(0, 4), 0, "not with this key");
    network.run_millis(100);
    assert_eq!((network.take_payloads(1), ciphers(&network)), (vec![b"waits".to_vec()], AES));
}

/// Whoever captures an initiation can give it the `mac1` of the other kind, for which the public key is enough.
#[test]
fn captured_initiations_do_not_serve_as_the_other_kind() {
    for (seed, told) in [(11, Cipher::Aes256Gcm), (12, Cipher::ChaCha20Poly1305)] {
        for takes_aes in [false, true] {
            let mut network = Network::with_aes(2, seed, 0, |n| n == 0 || takes_aes);
            network.told = told;
            network.introduce(0, 1);
            network.introduce(1, 0);
            network.loss = 100;
            network.send(0, 1, b"x");
            let (from, captured) = (network.nodes[0].address, network.last(0, 1));
            let other = match told {
                Cipher::Aes256Gcm => Cipher::ChaCha20Poly1305,
                Cipher::ChaCha20Poly1305 => Cipher::Aes256Gcm,
            };
            let mut relabelled = captured.clone();
            CookieJar::new(&network.key(1)).put_macs(&mut relabelled, other, network.now);
            assert_ne!(relabelled, captured);
            let is_taken = |cipher| takes_aes || cipher == Cipher::ChaCha20Poly1305;
            let refused = if is_taken(other) { Dropped::NotAuthentic } else { Dropped::InvalidMac };
            assert_eq!(network.deliver(1, from, relabelled), Err(refused));
            let expected = if is_taken(told) { Ok(()) } else { Err(Dropped::InvalidMac) };
            let before = network.trace.len();
            assert_eq!(before, 1, "no answer to the relabelled one");
            assert_eq!(network.deliver(1, from, captured), expected);
            assert_eq!(network.trace.len() - before, usize::from(is_taken(told)), "an answer or silence");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Each side begins with another cipher, at about the same time: they end in one session of one cipher. Where what
    /// confirms a session is lost, each side may send in another one until the next renewal, as with one cipher.
    #[test]
    fn different_ones_at_about_the_same_time(
        seed in 0u64..1_000_000, offset in 0u64..60, jitter in 0u64..40, loss in prop_oneof![Just(0u32), 0u32..40],
        first in 0usize..2, with_aes in 0usize..2,
    ) {
        let mut network = Network::with_aes(2, seed, 0, |_| true);
        for n in 0..2 {
            network.told = if n == with_aes { Cipher::Aes256Gcm } else { Cipher::default() };
            network.introduce(n, 1 - n);
        }
        network.jitter = Duration::from_millis(jitter);
        network.loss = loss;
        network.send(first, 1 - first, b"a");
        network.run_millis(offset);
        network.send(1 - first, first, b"b");
        network.run_secs(30);
        (network.loss, network.jitter) = (0, Duration::ZERO);
        network.run_secs(10);
        network.assert_works();
        if loss > 0 {
            for _ in 0..14 {
                network.send(0, 1, b"x");
                network.send(1, 0, b"y");
                network.run_secs(10);
            }
            network.assert_works();
        }
        network.assert_one_session();
        let [one, other] = ciphers(&network);
        prop_assert!(one == other && one.is_some());
    }
}

/// The same at the very same moment: the session is the one that the lower key began.
#[test]
fn different_ones_at_once() {
    for (seed, with_aes, expected) in [(13, 0, AES), (14, 1, PLAIN)] {
        let mut network = Network::with_aes(2, seed, 0, |_| true);
        for n in 0..2 {
            network.told = if n == with_aes { Cipher::Aes256Gcm } else { Cipher::default() };
            network.introduce(n, 1 - n);
        }
        network.send(0, 1, b"a");
        network.send(1, 0, b"b");
        network.run_secs(1);
        assert_eq!(
            (network.take_payloads(0), network.take_payloads(1)),
            (vec![b"b".to_vec()], vec![b"a".to_vec()])
        );
        network.assert_one_session();
        assert_eq!(ciphers(&network), expected);
    }
}
