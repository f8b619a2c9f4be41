//! Against the kernel's WireGuard, in an emulated machine at the other end of the cable. `integration-tests/fetch-kernel.sh`
//! makes the machine, once; without it the tests say that they are skipped.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    path::PathBuf,
    process::{Child, Stdio},
    time::Duration,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use muster_agent::datapath::{Command, Event, PeerConfig};
use muster_common::time::Instant;

use crate::{
    device::{Device, public_key, virtual_addresses},
    namespace::have_root,
    stream::echoed,
};

const PRIVATE_KEY: [u8; 32] = [3; 32];
/// For an emulated machine on a busy one.
const PATIENCE: Duration = Duration::from_secs(60);

/// The machine, at 10.9.0.2 on `eth0` of a device's namespace. With WireGuard it is device number 3, port 51820.
struct Machine<'a> {
    device: &'a Device,
    emulator: Child,
}

impl Drop for Machine<'_> {
    fn drop(&mut self) {
        let _ = self.emulator.kill();
        let _ = self.emulator.wait();
    }
}

/// Whether there is such a machine and what emulates it. Says why not.
fn have_machine() -> Option<PathBuf> {
    let directory = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/tools/kernel"));
    let version = std::process::Command::new("qemu-system-x86_64").arg("--version").output();
    if !directory.join("initrd").exists() || version.is_err() {
        eprintln!(
            "skipped: needs qemu-system-x86_64, and what integration-tests/fetch-kernel.sh puts into target/tools/kernel"
        );
        return None;
    }
    Some(directory)
}

impl<'a> Machine<'a> {
    /// Boots it, with `device` as the peer of its WireGuard.
    fn boot(device: &'a Device, files: &std::path::Path) -> Self {
        let namespace = &device.namespace;
        namespace.ip("tuntap add eth0 mode tap");
        namespace.ip("addr add 10.9.0.1/24 dev eth0");
        namespace.ip("link set eth0 up");
        let emulator = namespace
            .command(
                "qemu-system-x86_64 -accel tcg -cpu max -m 256 -nodefaults -display none -no-reboot -serial stdio \
                 -netdev tap,id=cable,ifname=eth0,script=no,downscript=no \
                 -device virtio-net-pci,netdev=cable,romfile=",
            )
            .arg("-kernel")
            .arg(files.join("vmlinuz"))
            .arg("-initrd")
            .arg(files.join("initrd"))
            .args(["-append", "console=ttyS0 panic=-1 quiet"])
            .stdin(Stdio::null())
            .spawn()
            .expect("it is installed");
        let machine = Self { device, emulator };
        let begin = Instant::now();
        while machine.connect().is_err() {
            assert!(Instant::now() - begin < PATIENCE, "the machine does not come up");
            std::thread::sleep(Duration::from_millis(100));
        }
        machine.sh(&format!(
            "ip link add wg0 type wireguard
             echo {} >/tmp/key; echo {} >/tmp/other-key
             wg set wg0 private-key /tmp/key listen-port 51820 peer {} allowed-ips 100.64.0.1/32,fd00:1::1/128
             ip addr add 100.64.0.3/11 dev wg0
             ip -6 addr add fd00:1::3/48 dev wg0
             ip link set wg0 mtu 1420 up",
            STANDARD.encode(PRIVATE_KEY),
            STANDARD.encode([99; 32]),
            STANDARD.encode(device.public_key),
        ));
        machine
    }

    fn connect(&self) -> std::io::Result<TcpStream> {
        let address = "10.9.0.2:9".parse().expect("an address");
        self.device.namespace.enter(async || TcpStream::connect_timeout(&address, Duration::from_secs(1)))
    }

    /// Runs a shell script there, whose commands must succeed, and returns what it prints.
    fn sh(&self, script: &str) -> String {
        let mut stream = self.connect().expect("connect");
        stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
        let script = format!("exec 2>&1\nset -e\n{script}\necho succeeded\n");
        stream.write_all(script.as_bytes()).expect("sent");
        stream.shutdown(Shutdown::Write).expect("shut down");
        let mut output = String::new();
        stream.read_to_string(&mut output).expect("output");
        match output.strip_suffix("succeeded\n") {
            Some(output) => output.to_owned(),
            None => panic!("failed on the machine: {script}\n{output}"),
        }
    }

    /// Its WireGuard, as the device knows it.
    fn as_peer(&self) -> PeerConfig {
        PeerConfig {
            public_key: public_key(PRIVATE_KEY),
            virtual_addresses: virtual_addresses(3),
            subnets: vec![],
            ..self.device.as_peer(vec!["10.9.0.2:51820".parse().expect("an address")])
        }
    }

    /// The device is where it is, so that the machine may start.
    fn knows_where(&self, device_host: u8) {
        self.sh(&format!(
            "wg set wg0 peer {} endpoint {}",
            STANDARD.encode(self.device.public_key),
            self.device.endpoint(device_host)
        ));
    }

    /// One field of `wg show`, for its only peer.
    fn show(&self, field: &str) -> String {
        let line = self.sh(&format!("wg show wg0 {field}"));
        line.split_once('\t').expect("key and value").1.trim().to_owned()
    }

    /// Waits until its WireGuard says `wanted`.
    fn wait_for(&self, field: &str, wanted: impl Fn(&str) -> bool) {
        let begin = Instant::now();
        loop {
            let shown = self.show(field);
            if wanted(&shown) {
                return;
            }
            assert!(Instant::now() - begin < PATIENCE, "{field} stays {shown}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// How often a counter of the device's namespace, made with `nft`, has counted.
fn counted(device: &Device, name: &str) -> u64 {
    let text = device.namespace.run(&format!("nft list counter inet test {name}"));
    let mut words = text.split_whitespace().skip_while(|word| *word != "packets");
    words.nth(1).expect("a number").parse().expect("a number")
}

/// Answers that come through the tunnel marked as having met congestion, of three.
fn marked_of_three(device: &Device, rule: &str) -> u64 {
    let rules = format!(
        "table inet test {{
            counter marked {{ }}
            chain out {{
                type route hook output priority -150
                oifname eth0 {rule}
            }}
            chain in {{
                type filter hook prerouting priority -300
                iifname eth0 {rule}
            }}
            chain through {{
                type filter hook input priority 0
                iifname muster0 icmp type echo-reply ip ecn ce counter name marked
            }}
        }}"
    );
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), rules).expect("written");
    device.namespace.run(&format!("nft -f {}", file.path().display()));
    device.namespace.run("ping -n -c 3 -i 0.2 -W 10 -Q 2 100.64.0.3");
    let marked = counted(device, "marked");
    device.namespace.run("nft delete table inet test");
    marked
}

#[test]
fn everything_between_us_and_the_kernels_wireguard() {
    let Some(files) = have_root().then(have_machine).flatten() else { return };
    let mut device = Device::new(1);
    // The machine borrows the device for its namespace; events are looked at in the end.
    let machine = Machine::boot(&device, &files);
    let peer = machine.as_peer();

    // We start; both families, both ways, every remainder of the padding, the longest packet.
    device.send(Command::AddPeer(peer.clone()));
    device.namespace.run("ping -n -c 3 -i 0.2 -W 10 100.64.0.3");
    machine.sh("ping -c 2 -W 10 100.64.0.1; ping -c 2 -W 10 fd00:1::1");
    for size in (0..16).chain([1391, 1392]) {
        device.namespace.run(&format!("ping -n -c 1 -W 10 -M do -s {size} 100.64.0.3"));
    }
    machine.sh("ping -c 1 -W 10 -s 1392 100.64.0.1");

    // Streams, byte for byte, of super-packets on our side and the kernel's; the session is renewed meanwhile.
    let first = machine.show("latest-handshakes");
    for server in ["100.64.0.3:7", "[fd00:1::3]:7"] {
        let server = server.parse().expect("an address");
        echoed(&device.namespace, server, &|sent| {
            device.roam();
            sent >= 4 << 20
        });
    }
    machine.wait_for("latest-handshakes", |latest| {
        // At most one in five seconds is allowed.
        device.roam();
        latest != first
    });

    // They start anew: their sessions are stale, and ours cannot be used for what they send.
    let received = machine.show("latest-handshakes");
    std::thread::sleep(Duration::from_secs(1));
    machine.sh("wg set wg0 private-key /tmp/other-key; wg set wg0 private-key /tmp/key");
    machine.sh("ping -c 3 -W 10 100.64.0.1");
    assert_ne!(machine.show("latest-handshakes"), received);

    // Marks of congestion, on their way to the kernel and from it.
    assert_eq!(marked_of_three(&device, "counter"), 0);
    let to_them = "udp dport 51820 ip ecn ect0 ip ecn set ce";
    assert_eq!(marked_of_three(&device, to_them), 3, "ours are marked outside, theirs arrive so");
    let from_them = "udp sport 51820 ip ecn ect0 ip ecn set ce";
    assert_eq!(marked_of_three(&device, from_them), 3, "what is marked outside arrives so");

    // Keepalives: theirs, and ours.
    let heard = || device.snapshot().peers[&peer.public_key].received_packets;
    let us = STANDARD.encode(device.public_key);
    let before = heard();
    machine.sh(&format!("wg set wg0 peer {us} persistent-keepalive 1"));
    let begin = Instant::now();
    while heard() < before + 3 {
        assert!(Instant::now() - begin < PATIENCE, "no keepalives");
        std::thread::sleep(Duration::from_millis(100));
    }
    machine.sh(&format!("wg set wg0 peer {us} persistent-keepalive 0"));
    let received = |shown: &str| -> u64 {
        shown.split_whitespace().next().expect("received").parse().expect("a number")
    };
    let before = received(&machine.show("transfer"));
    device.send(Command::UpdatePeer(PeerConfig { keepalive: Some(Duration::from_secs(1)), ..peer.clone() }));
    machine.wait_for("transfer", |shown| received(shown) >= before + 2 * 32);
    device.send(Command::UpdatePeer(peer.clone()));

    // We move, and they follow; they move, and we follow.
    device.namespace.ip("addr add 10.9.0.3/24 dev eth0");
    device.namespace.ip("addr del 10.9.0.1/24 dev eth0");
    device.namespace.ip("addr replace 10.9.0.3/24 dev eth0");
    device.namespace.run("ping -n -c 2 -i 0.2 -W 10 100.64.0.3");
    assert_eq!(machine.show("endpoints"), device.endpoint(3).to_string());
    machine.sh("wg set wg0 listen-port 51999; ping -c 2 -W 10 100.64.0.1");
    let moved = "10.9.0.2:51999".parse().expect("an address");
    assert_eq!(device.snapshot().peers[&peer.public_key].endpoint, Some(moved));

    // All of it anew, started by them; we do not know where they are.
    device.send(Command::RemovePeer(peer.public_key));
    device.send(Command::AddPeer(PeerConfig { endpoints: vec![], ..peer.clone() }));
    machine.sh(&format!("wg set wg0 peer {us} remove"));
    machine.sh(&format!("wg set wg0 peer {us} allowed-ips 100.64.0.1/32,fd00:1::1/128"));
    machine.knows_where(3);
    machine.sh("ping -c 2 -W 10 fd00:1::1");
    device.namespace.run("ping -n -c 2 -i 0.2 -W 10 100.64.0.3");

    let snapshot = device.snapshot();
    for reason in ["not_authentic", "replayed", "malformed", "invalid_mac", "wrong_source", "invalid_packet"]
    {
        assert_eq!(snapshot.drops[reason], 0, "{:?}", snapshot.drops);
    }
    drop(machine);
    let up =
        |event: &Event| matches!(event, Event::PeerUp { public_key, .. } if *public_key == peer.public_key);
    assert_eq!(device.waiting_events().iter().filter(|event| up(event)).count(), 2);
}
