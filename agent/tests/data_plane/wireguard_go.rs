//! Against wireguard-go: each side starts, under load and with sessions renewed in the middle of it.

use std::{
    process::{Child, Stdio},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use muster_agent::datapath::{Command, Event, PeerConfig, Snapshot};
use muster_common::time::Instant;

use crate::{
    device::{Device, public_key, virtual_addresses},
    namespace::{Namespace, connect, have_root},
    stream::{both_ways, small_datagrams, stack_counter},
};

const PRIVATE_KEY: [u8; 32] = [3; 32];

/// wireguard-go as device number 3 at 10.9.0.2:51820.
struct WireGuardGo {
    namespace: Namespace,
    interface: String,
    process: Child,
}

impl Drop for WireGuardGo {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl WireGuardGo {
    /// With `device` as its peer, at the other end of the cable.
    fn new(device: &Device) -> Self {
        let namespace = Namespace::new();
        // Its control socket lives in the file system, which the namespaces share.
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let interface = format!("wg{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let process = namespace
            .command(&format!("wireguard-go -f {interface}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("wireguard-go is installed");
        let this = Self { namespace, interface, process };
        connect(&device.namespace, &this.namespace);
        for _ in 0..200 {
            let shown = this.namespace.command(&format!("wg show {}", this.interface)).output().expect("wg");
            if shown.status.success() {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        this.set_private_key(PRIVATE_KEY);
        this.wg(&format!(
            "listen-port 51820 peer {} allowed-ips 100.64.0.1/32,fd00:1::1/128",
            STANDARD.encode(device.public_key),
        ));
        for address in ["100.64.0.3/11", "fd00:1::3/48"] {
            this.namespace.ip(&format!("addr add {address} dev {}", this.interface));
        }
        this.namespace.ip(&format!("link set {} mtu 1420 up", this.interface));
        this
    }

    fn wg(&self, settings: &str) {
        self.namespace.run(&format!("wg set {} {settings}", self.interface));
    }

    fn set_private_key(&self, key: [u8; 32]) {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), STANDARD.encode(key)).expect("written");
        self.wg(&format!("private-key {}", file.path().display()));
    }

    /// Makes it renew all sessions: with another private key they are stale, and with the old one back, its next
    /// packet starts a handshake.
    fn renew(&self) {
        self.set_private_key([99; 32]);
        self.set_private_key(PRIVATE_KEY);
    }

    /// It, as `device` knows it.
    fn as_peer(&self, device: &Device) -> PeerConfig {
        PeerConfig {
            public_key: public_key(PRIVATE_KEY),
            virtual_addresses: virtual_addresses(3),
            subnets: vec![],
            ..device.as_peer(vec!["10.9.0.2:51820".parse().expect("an address")])
        }
    }
}

/// When the only peer's last handshake was.
fn last_handshake(snapshot: &Snapshot) -> Option<Instant> {
    snapshot.peers.values().next().expect("a peer").last_handshake
}

/// Reasons for which anything was dropped, with the numbers.
fn dropped(snapshot: &Snapshot) -> Vec<(&'static str, u64)> {
    snapshot
        .drops
        .iter()
        .map(|(reason, number)| (*reason, *number))
        .filter(|(_, number)| *number > 0)
        .collect()
}

/// Both directions at once, until at least 64 MiB have gone each way and two handshakes happened meanwhile, each
/// asked for with `renew`.
fn transfer_with_renewals(device: &Device, other: &WireGuardGo, renew: impl Fn() + Sync) {
    let renewed = AtomicU64::new(0);
    let begin = Instant::now();
    std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut last = last_handshake(&device.snapshot());
            while renewed.load(Ordering::Acquire) < 2 {
                assert!(Instant::now() - begin < Duration::from_secs(60), "sessions are not renewed");
                std::thread::sleep(Duration::from_millis(300));
                renew();
                for _ in 0..100 {
                    std::thread::sleep(Duration::from_millis(100));
                    let latest = last_handshake(&device.snapshot());
                    if latest != last {
                        last = latest;
                        renewed.fetch_add(1, Ordering::Release);
                        break;
                    }
                }
            }
        });
        let enough = |sent| sent >= 64 << 20 && (renewed.load(Ordering::Acquire) >= 2 || watch.is_finished());
        let address = "100.64.0.3:5000".parse().expect("an address");
        both_ways(&device.namespace, &other.namespace, address, &enough);
    });
    let octets = device.snapshot().peers.values().map(|peer| peer.sent_bytes).sum::<u64>();
    eprintln!("{} MiB sealed in {:?}", octets >> 20, (Instant::now() - begin));
}

#[test]
fn is_reached_and_reaches_us() {
    if !have_root() {
        return;
    }
    let mut device = Device::new(1);
    let other = WireGuardGo::new(&device);
    let mut peer = other.as_peer(&device);
    device.send(Command::AddPeer(peer.clone()));
    device.namespace.run("ping -n -c 3 -i 0.2 -W 5 100.64.0.3");
    assert!(matches!(device.event(), Event::PeerUp { .. }));
    other.namespace.run("ping -n -c 3 -i 0.2 -W 5 fd00:1::1");

    // Now they start, from where they heard us last.
    device.send(Command::RemovePeer(peer.public_key));
    peer.endpoints.clear();
    device.send(Command::AddPeer(peer));
    let us = STANDARD.encode(device.public_key);
    other.wg(&format!("peer {us} remove"));
    other.wg(&format!("peer {us} allowed-ips 100.64.0.1/32,fd00:1::1/128 endpoint {}", device.endpoint(1)));
    other.namespace.run("ping -n -c 3 -i 0.2 -W 5 -s 1392 100.64.0.1");
}

#[test]
fn streams_survive_renewals_that_we_start_without_loss() {
    if !have_root() {
        return;
    }
    let device = Device::new(1);
    let other = WireGuardGo::new(&device);
    device.send(Command::AddPeer(other.as_peer(&device)));
    device.namespace.run("ping -n -c 1 -W 5 100.64.0.3");
    transfer_with_renewals(&device, &other, || device.roam());

    assert_eq!(dropped(&device.snapshot()), []);
    let of = |protocol, name| [&device.namespace, &other.namespace].map(|n| stack_counter(n, protocol, name));
    let (resent, overflowed) = (of("Tcp", "RetransSegs"), of("Udp", "RcvbufErrors"));
    eprintln!("sent again: {resent:?} segments; buffers overflowed: {overflowed:?}");
    // What we got, we delivered: neither our socket nor our TUN device lost any.
    assert_eq!(overflowed[0], 0);
}

#[test]
fn streams_survive_renewals_that_they_start() {
    if !have_root() {
        return;
    }
    let device = Device::new(1);
    let other = WireGuardGo::new(&device);
    device.send(Command::AddPeer(PeerConfig { endpoints: vec![], ..other.as_peer(&device) }));
    other.wg(&format!("peer {} endpoint {}", STANDARD.encode(device.public_key), device.endpoint(1)));
    other.namespace.run("ping -n -c 1 -W 5 100.64.0.1");
    transfer_with_renewals(&device, &other, || other.renew());
}

#[test]
fn small_packets_keep_their_order_in_a_flood() {
    if !have_root() {
        return;
    }
    let device = Device::new(1);
    let other = WireGuardGo::new(&device);
    device.send(Command::AddPeer(other.as_peer(&device)));
    device.namespace.run("ping -n -c 1 -W 5 100.64.0.3");
    let (ours, theirs) = (&device.namespace, &other.namespace);
    for (from, to, address) in [
        (ours, theirs, "100.64.0.3:6000"),
        (theirs, ours, "100.64.0.1:6000"),
        (ours, theirs, "[fd00:1::3]:6000"),
        (theirs, ours, "[fd00:1::1]:6000"),
    ] {
        let received = small_datagrams(from, to, address.parse().expect("an address"), 100_000);
        eprintln!("{received} of 100000 at {address}");
        assert!(received > 1_000, "{received} of 100000 at {address}");
        ours.run("ping -n -c 1 -W 5 100.64.0.3");
    }
    let snapshot = device.snapshot();
    assert_eq!(snapshot.drops["replayed"] + snapshot.drops["not_authentic"], 0, "{:?}", dropped(&snapshot));
}

#[test]
fn its_path_is_probed_and_its_host_answers() {
    if !have_root() {
        return;
    }
    let device = Device::with_mtu(1, 8920);
    let other = WireGuardGo::new(&device);
    device.namespace.ip("link set eth0 mtu 9000");
    other.namespace.ip("link set eth0 mtu 9000");
    other.namespace.ip(&format!("link set {} mtu 8920", other.interface));
    device.send(Command::AddPeer(other.as_peer(&device)));
    let path_mtu = || device.snapshot().peers.values().next().expect("a peer").path_mtu;
    for _ in 0..100 {
        device.namespace.run("ping -n -c 1 -W 5 -s 1000 100.64.0.3");
        if path_mtu() == 8920 {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(path_mtu(), 8920);
    device.namespace.run("ping -n -c 1 -W 5 -M do -s 8892 100.64.0.3");
    device.namespace.run("ping -n -c 1 -W 5 -M do -s 8872 fd00:1::3");
    assert_eq!(dropped(&device.snapshot()), []);
}
