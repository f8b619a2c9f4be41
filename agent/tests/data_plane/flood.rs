//! A flood of handshakes, beside which those who are connected notice nothing.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use muster_agent::datapath::Command;
use muster_common::time::{Instant, Timestamp};
use muster_tunnel::{Config, HANDSHAKE_RATE, KEY_LOOKUP_RATE, PrivateKey, PublicKey, Tunnel};

use crate::{
    device::Device,
    namespace::{connect, have_root},
    stream::{both_ways, stack_counter},
};

/// An initiation from a stranger that knows the public key of `device`, and so is well-formed.
fn initiation(stranger: u8, device: &Device) -> Vec<u8> {
    let now = Instant::now();
    let config = Config {
        private_key: PrivateKey::from_bytes([stranger; 32]),
        seed: [stranger; 32],
        mtu: 1420,
        handshake_rate: 0,
        accepts_aes: true,
    };
    let mut tunnel = Tunnel::new(config, now, Timestamp::now());
    let public_key = PublicKey::from_bytes(device.public_key);
    let mut peer = muster_tunnel::PeerConfig::new(public_key);
    peer.endpoints.push(device.endpoint(2));
    tunnel.add_peer(peer, now);
    tunnel.connect(&public_key, now);
    tunnel.poll_transmit().expect("an initiation").payload
}

/// Sends initiations to `target` until `stop`, from ever other addresses in 10.77.0.0/16: one after the other of
/// `valid`, one in four of them damaged. Counts them.
fn flood(target: SocketAddr, valid: &[Vec<u8>], stop: &AtomicBool, count: &AtomicU64) {
    let begin = Instant::now();
    while !stop.load(Ordering::Acquire) {
        let number = count.load(Ordering::Acquire);
        let source = SocketAddr::from(([10, 77, (number >> 6) as u8, (number >> 14) as u8], 0));
        let socket = UdpSocket::bind(source).expect("bind");
        for message in valid {
            let number = count.fetch_add(1, Ordering::AcqRel);
            let mut message = message.clone();
            if number % 4 == 3 {
                message[116 + number as usize % 16] ^= 1;
            }
            let _ = socket.send_to(&message, target);
        }
        // Ten thousand a second, fifty times what is handled without cookies.
        let due = Duration::from_micros(100) * count.load(Ordering::Acquire) as u32;
        std::thread::sleep(due.saturating_sub(Instant::now() - begin));
    }
}

/// Ends a flood when it is dropped.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

#[test]
fn of_handshakes_leaves_sessions_alone_and_lets_known_peers_in() {
    if !have_root() {
        return;
    }
    let (a, mut b) = (Device::new(1), Device::new(2));
    connect(&a.namespace, &b.namespace);
    a.send(Command::AddPeer(b.as_peer(vec![b.endpoint(2)])));
    b.send(Command::AddPeer(a.as_peer(vec![])));
    // Whoever answers these addresses is the flood's sockets: all of them are at home here.
    a.namespace.ip("route add local 10.77.0.0/16 dev lo");
    b.namespace.ip("route add 10.77.0.0/16 via 10.9.0.1");
    a.namespace.run("ping -n -c 1 -W 5 100.64.0.2");

    let valid: Vec<_> = (100..164).map(|stranger| initiation(stranger, &b)).collect();
    let (stop, count) = (AtomicBool::new(false), AtomicU64::new(0));
    let target = b.endpoint(2);
    let overflowed = || stack_counter(&b.namespace, "Udp", "RcvbufErrors");
    let begin = Instant::now();
    let elapsed = std::thread::scope(|scope| {
        // Also if something below fails, or the scope would wait for the flood's end for ever.
        let _stop = Stop(&stop);
        scope.spawn(|| a.namespace.enter(async || flood(target, &valid, &stop, &count)));
        let first = a.snapshot().peers[&b.public_key].last_handshake;
        while b.snapshot().drops["cookie_demanded"] < 1_000 {
            assert!(
                Instant::now() - begin < Duration::from_secs(20),
                "not under load: {:?}",
                b.snapshot().drops
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        // Sessions go on.
        let pings = a.namespace.run("ping -n -q -c 200 -i 0.01 -W 5 100.64.0.2");
        // The socket overflows only where the host has no time for the data plane, as with other tests beside this one.
        assert!(pings.contains(", 0% packet loss") || overflowed() > 0, "{pings}");
        let address = "100.64.0.2:5000".parse().expect("an address");
        both_ways(&a.namespace, &b.namespace, address, &|sent| sent >= 16 << 20);
        // A new one begins: with a cookie, at the second try.
        a.roam();
        while a.snapshot().peers[&b.public_key].last_handshake == first {
            assert!(
                Instant::now() - begin < Duration::from_secs(60),
                "no handshake: {:?}",
                b.snapshot().drops
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        Instant::now() - begin
    });
    a.namespace.run("ping -n -c 1 -W 5 100.64.0.2");

    let (snapshot, sent) = (b.snapshot(), count.load(Ordering::Acquire));
    let dropped = |reason| snapshot.drops[reason];
    eprintln!("{sent} initiations in {elapsed:?}, {} overflowed: {:?}", overflowed(), snapshot.drops);
    // The damaged cost one hash; the others a cookie, but for as many as are allowed.
    let seconds = elapsed.as_secs() + 1;
    let answered = sent - dropped("invalid_mac") - dropped("cookie_demanded");
    let allowed = u64::from(HANDSHAKE_RATE) * (seconds + 1);
    assert!(answered <= allowed + overflowed(), "{answered} of {sent} were worked on; {:?}", snapshot.drops);
    assert!(dropped("invalid_mac") > sent / 5, "{:?}", snapshot.drops);
    assert!(dropped("cookie_demanded") > sent / 2, "{:?}", snapshot.drops);
    let lookups = b.waiting_events();
    assert!(lookups.len() as u64 <= u64::from(KEY_LOOKUP_RATE) * (seconds + 1), "{} lookups", lookups.len());
    assert_eq!(dropped("replayed") + dropped("not_authentic"), 0);
}
