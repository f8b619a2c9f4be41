//! The tunnel against wireguard-go, another implementation of the same protocol: handshakes from both sides, data,
//! padding, keepalives, renewal, roaming, cookies. Needs root, for a network namespace and wireguard-go's TUN device.
#![expect(clippy::expect_used, clippy::panic, clippy::print_stderr, reason = "a test, helpers included")]

mod lab;

use std::time::Duration;

use lab::{Lab, OURS, THEIRS, can_run, echo, socket};
use muster_tunnel::{KEEPALIVE_TIMEOUT, REKEY_AFTER_TIME, REKEY_TIMEOUT};

/// A lab in which we know wireguard-go's endpoint, or skip.
fn lab() -> Option<Lab> {
    can_run().then(|| {
        let mut lab = Lab::new(0, None);
        let endpoint = lab.their_endpoint();
        lab.add_peer(&[endpoint], None);
        lab
    })
}

#[test]
fn we_start() {
    let Some(mut lab) = lab() else { return };
    // Every remainder of the padding, and the longest packet.
    for len in (0..16).chain([1000, 1392]) {
        lab.assert_echo(len as u16, &vec![0x5a; len]);
    }
    assert_eq!(lab.datagrams.iter().filter(|(kind, _)| *kind == 2).count(), 1, "one handshake");
    assert!(lab.datagrams.iter().all(|(kind, _)| *kind != 1));
    assert_ne!(lab.show("latest-handshakes"), ["0"]);
    // And the other way through the same session.
    let ping = lab.ping(5);
    assert!(lab.wait_for_child(ping));
    assert_eq!(lab.dropped, []);
}

#[test]
fn we_start_with_a_preshared_key() {
    if !can_run() {
        return;
    }
    let psk = Some([0x42; 32]);
    let mut lab = Lab::new(0, psk);
    let endpoint = lab.their_endpoint();
    lab.add_peer(&[endpoint], psk);
    lab.assert_echo(1, b"secret");
}

#[test]
fn they_start() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new(0, None);
    // We know the peer, but not where it is.
    lab.add_peer(&[], None);
    lab.tell_our_endpoint();
    let ping = lab.ping(10);
    assert!(lab.wait_for_child(ping));
    assert_eq!(lab.datagrams[0].0, 1, "their initiation came first");
    assert_eq!(lab.packets[0].len(), 28 + 33, "the padding is gone");
    assert!(lab.sent.iter().all(|datagram| datagram[0] != 1), "we started none");
    lab.assert_echo(1, b"back through their session");
}

#[test]
fn they_start_and_are_not_known_yet() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new(0, None);
    lab.tell_our_endpoint();
    let ping = lab.ping(10);
    let their_key = lab.their_key;
    let mut event = None;
    lab.wait_for("a lookup", |lab| {
        event = event.take().or(lab.tunnel.poll_event());
        event.is_some()
    });
    assert_eq!(event, Some(muster_tunnel::Event::LookupKey(their_key)));
    assert_eq!(lab.sent.len(), 0, "silence to strangers");
    lab.add_peer(&[], None);
    assert!(lab.wait_for_child(ping));
}

#[test]
fn both_start_at_once() {
    let Some(mut lab) = lab() else { return };
    lab.tell_our_endpoint();
    for round in 0..5 {
        // A ping and an initiation of ours, with nothing in between; an old session does not matter, as wireguard-go
        // forgets it when its peer is made anew.
        let ping = lab.ping(15);
        let request = echo(OURS, THEIRS, 8, round, b"at once");
        lab.send(&request);
        assert!(lab.wait_for_child(ping), "round {round}");
        lab.assert_echo(100 + round, b"and after");
        let (our_key, their_key) = (lab.tunnel.public_key(), lab.their_key);
        lab.wg(&format!("peer {our_key} remove"), "");
        lab.wg(&format!("peer {our_key} allowed-ips {OURS}/32"), "");
        lab.tell_our_endpoint();
        assert!(lab.tunnel.remove_peer(&their_key));
        let endpoint = lab.their_endpoint();
        lab.add_peer(&[endpoint], None);
    }
}

#[test]
fn keepalives() {
    let Some(mut lab) = lab() else { return };
    lab.assert_echo(1, b"");
    // Theirs: every second from now on, empty.
    lab.wg(&format!("peer {} persistent-keepalive 1", lab.tunnel.public_key()), "");
    lab.wait_for("two of their keepalives", |lab| lab.keepalives >= 2);
    assert!(lab.datagrams.contains(&(4, 32)));
    lab.wg(&format!("peer {} persistent-keepalive 0", lab.tunnel.public_key()), "");
    // Ours: for data that we have nothing to answer to, after ten seconds of our clock.
    lab.answers = false;
    lab.packets.clear();
    let ping = lab.ping(1);
    lab.wait_for("their echo request", |lab| !lab.packets.is_empty());
    assert!(!lab.wait_for_child(ping));
    let (received, sent) = (lab.they_received(), lab.sent.len());
    lab.skip(KEEPALIVE_TIMEOUT);
    assert_eq!(lab.sent[sent..].iter().map(Vec::len).collect::<Vec<_>>(), [32]);
    lab.wait_for("our keepalive", |lab| lab.they_received() == received + 32);
}

#[test]
fn renewal_after_two_minutes() {
    let Some(mut lab) = lab() else { return };
    lab.assert_echo(1, b"old session");
    let first = lab.tunnel.peer(&lab.their_key, lab.now()).and_then(|peer| peer.last_handshake);
    lab.skip(REKEY_AFTER_TIME);
    // Goes out through the old session, and starts a new one.
    lab.assert_echo(2, b"still the old session");
    lab.wait_for("a new session", |lab| {
        lab.tunnel.peer(&lab.their_key, lab.now()).and_then(|peer| peer.last_handshake) != first
    });
    for sequence in 3..6 {
        lab.assert_echo(sequence, b"new session");
    }
    assert_eq!(lab.sent.iter().filter(|datagram| datagram[0] == 1).count(), 2);
    // wireguard-go takes them all, and its answers come through the new one.
    let ping = lab.ping(5);
    assert!(lab.wait_for_child(ping));
    assert_eq!(lab.dropped, []);
}

#[test]
fn after_an_hour_of_suspend() {
    let Some(mut lab) = lab() else { return };
    lab.assert_echo(1, b"before");
    lab.skip(Duration::from_secs(3_600));
    lab.assert_echo(2, b"after");
    assert_eq!(lab.sent.iter().filter(|datagram| datagram[0] == 1).count(), 2);
}

#[test]
fn roaming() {
    let Some(mut lab) = lab() else { return };
    lab.assert_echo(1, b"first port");
    let old = lab.socket.local_addr().unwrap();
    lab.socket = socket();
    let new = lab.socket.local_addr().unwrap();
    assert_ne!(old, new);
    lab.assert_echo(2, b"second port");
    assert_eq!(lab.show("endpoints"), [new.to_string()]);
    // They move, too: to another port, from which they ping us.
    lab.wg("listen-port 51999", "");
    let ping = lab.ping(5);
    assert!(lab.wait_for_child(ping));
    let endpoint = lab.tunnel.peer(&lab.their_key, lab.now()).and_then(|peer| peer.endpoint);
    assert_eq!(endpoint.map(|at| at.port()), Some(51_999));
    lab.assert_echo(3, b"to their second port");
    assert_eq!(lab.sent.iter().filter(|datagram| datagram[0] == 1).count(), 1, "one session all along");
}

/// wireguard-go under load sends us a cookie, and our next initiation carries it.
#[test]
fn they_are_under_load() {
    let Some(mut lab) = lab() else { return };
    lab.assert_echo(1, b"calm");
    let initiation = lab.sent.iter().find(|datagram| datagram[0] == 1).unwrap().clone();
    // More of them than it can work off; it is old, but only after the expensive part does wireguard-go see that.
    let their_endpoint = lab.their_endpoint();
    let flood = |_: &mut Lab| {
        let stranger = socket();
        for _ in 0..3_000 {
            let _ = stranger.send_to(&initiation, their_endpoint);
        }
    };
    let is_reply = |datagram: &(u8, usize)| *datagram == (3, 64);
    lab.wait_for("a cookie", |lab| {
        flood(lab);
        // The session is too old now, so this starts a handshake, or repeats it.
        lab.skip(Duration::from_secs(181));
        lab.send(&echo(OURS, THEIRS, 8, 2, b""));
        for _ in 0..3 {
            lab.step();
        }
        lab.datagrams.iter().any(is_reply)
    });
    flood(&mut lab);
    let sent = lab.sent.len();
    lab.skip(REKEY_TIMEOUT + Duration::from_secs(1));
    let with_cookie = lab.sent[sent..].iter().find(|datagram| datagram[0] == 1).expect("the next try");
    assert_ne!(with_cookie[132..148], [0; 16], "mac2 is there");
    lab.wait_for("a session", |lab| {
        lab.tunnel.peer(&lab.their_key, lab.now()).is_some_and(|peer| peer.has_session)
    });
}

/// We are under load: wireguard-go takes our cookie and comes back with it.
#[test]
fn we_are_under_load() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new(1, None);
    lab.add_peer(&[], None);
    lab.tell_our_endpoint();
    let first = lab.ping(10);
    assert!(lab.wait_for_child(first));
    // Forgotten, so that their next packet needs a handshake, and nothing of the bucket is left.
    let our_key = lab.tunnel.public_key();
    lab.wg(&format!("peer {our_key} remove"), "");
    lab.wg(&format!("peer {our_key} allowed-ips {OURS}/32"), "");
    lab.tell_our_endpoint();
    let second = lab.ping(15);
    let is_initiation = |datagram: &&(u8, usize)| datagram.0 == 1;
    lab.wait_for("their initiation", |lab| lab.datagrams.iter().filter(is_initiation).count() == 2);
    let replies = |lab: &Lab| lab.sent.iter().filter(|datagram| datagram[0] == 3).count();
    assert_eq!(replies(&lab), 1, "they got a cookie");
    // Stay under load until they try again, five seconds later.
    let junk = {
        let mut lab_of_stranger = muster_tunnel::Tunnel::new(
            muster_tunnel::Config {
                private_key: muster_tunnel::PrivateKey::from_bytes([1; 32]),
                seed: [1; 32],
                mtu: 1420,
                handshake_rate: 0,
                accepts_aes: true,
            },
            lab.now(),
            Default::default(),
        );
        let config = muster_tunnel::PeerConfig {
            endpoints: vec![lab.socket.local_addr().unwrap()],
            ..muster_tunnel::PeerConfig::new(our_key)
        };
        lab_of_stranger.add_peer(config, lab.now());
        lab_of_stranger.connect(&our_key, lab.now());
        lab_of_stranger.poll_transmit().unwrap().payload
    };
    let stranger = socket();
    let ours = lab.socket.local_addr().unwrap();
    let mut count = 0;
    lab.wait_for("their second try", |lab| {
        count += 1;
        if count % 10 == 0 {
            stranger.send_to(&junk, ours).unwrap();
        }
        lab.sent.iter().filter(|datagram| datagram[0] == 2).count() == 2
    });
    assert!(replies(&lab) > 10, "it was load all the time");
    assert!(lab.wait_for_child(second));
}
