//! Sessions with AES-256-GCM: between those that take it, and what becomes of them where one does not.

use std::time::Duration;

use super::network::Network;
use crate::{Cipher, Dropped};

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
