//! Paths that take more or less than Ethernet's 1,500 octets, with and without routers that tell.

use std::{net::SocketAddr, time::Duration};

use muster_agent::datapath::{Command, Snapshot};

use crate::{
    device::Device,
    namespace::{Namespace, connect, have_root},
    stream::both_ways,
};

const PATIENCE: Duration = Duration::from_secs(30);

/// The only peer's path MTU.
fn path_mtu(device: &Device) -> u16 {
    device.snapshot().peers.values().next().expect("a peer").path_mtu
}

/// Until `is_so`.
fn wait(what: &str, mut is_so: impl FnMut() -> bool) {
    let pause = Duration::from_millis(100);
    let attempts = PATIENCE.as_millis() / pause.as_millis();
    for _ in 0..attempts {
        if is_so() {
            return;
        }
        std::thread::sleep(pause);
    }
    panic!("waited in vain for {what}");
}

/// TCP in both directions over both families of the tunnel's inside.
fn streams(a: &Device, b: &Device, len: u64) {
    for address in ["100.64.0.2:7000", "[fd00:1::2]:7000"] {
        let address: SocketAddr = address.parse().expect("an address");
        both_ways(&a.namespace, &b.namespace, address, &|sent| sent >= len);
    }
}

/// Pings of `len` octets inside, whole.
fn ping(from: &Device, number: u8, len: usize) {
    from.namespace.run(&format!("ping -n -c 2 -i 0.2 -W 5 -M do -s {} 100.64.0.{number}", len - 28));
    from.namespace.run(&format!("ping -n -c 2 -i 0.2 -W 5 -M do -s {} fd00:1::{number}", len - 48));
}

/// Octets of the average datagram that was sent between two moments.
fn average(before: &Snapshot, after: &Snapshot) -> u64 {
    let packets = after.udp_sent.packets - before.udp_sent.packets;
    (after.udp_sent.bytes - before.udp_sent.bytes) / packets.max(1)
}

#[test]
fn a_wide_path_is_found_and_used() {
    if !have_root() {
        return;
    }
    let (a, b) = (Device::with_mtu(1, 8920), Device::with_mtu(2, 8920));
    connect(&a.namespace, &b.namespace);
    for device in [&a, &b] {
        device.namespace.ip("link set eth0 mtu 9000");
    }
    a.send(Command::AddPeer(b.as_peer(vec![b.endpoint(2)])));
    b.send(Command::AddPeer(a.as_peer(vec![])));
    // What TCP sends before the path is known is cut to fit, and TCP never learns of it.
    wait("the width of the path", || {
        streams(&a, &b, 4 << 20);
        path_mtu(&a) == 8920 && path_mtu(&b) == 8920
    });
    ping(&a, 2, 8920);
    let before = a.snapshot();
    streams(&a, &b, 32 << 20);
    let average = average(&before, &a.snapshot());
    assert!(average > 4_000, "datagrams of {average} octets, acknowledgements included");
}

/// Two routers between two devices, on whose link nothing larger than `mtu` passes.
struct Routed {
    a: Device,
    b: Device,
    _routers: [Namespace; 2],
}

impl Routed {
    fn new(device_mtu: u32, mtu: u32, tells: bool, is_v6: bool) -> Self {
        let (a, b) = (Device::with_mtu(1, device_mtu), Device::with_mtu(2, device_mtu));
        let routers = [Namespace::new(), Namespace::new()];
        connect(&routers[0], &routers[1]);
        for (number, (device, router)) in [&a, &b].into_iter().zip(&routers).enumerate() {
            let net = number + 1;
            router.ip(&format!("link set eth0 mtu {mtu}"));
            router.ip(&format!("link add host type veth peer name eth0 netns {}", device.namespace.name()));
            router.ip(&format!("addr add 10.10.{net}.254/24 dev host"));
            router.ip(&format!("addr add fd10:{net}::254/64 dev host nodad"));
            router.ip("link set host up");
            router.run("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
            let other = 3 - net;
            router.ip(&format!("route add 10.10.{other}.0/24 via 10.9.0.{other}"));
            router.ip(&format!("-6 route add fd10:{other}::/64 via fd09::{other}"));
            if !tells {
                router.run("nft add table inet silent");
                router.run("nft add chain inet silent output { type filter hook output priority 0 ; }");
                router.run("nft add rule inet silent output icmp type destination-unreachable drop");
                router.run("nft add rule inet silent output icmpv6 type packet-too-big drop");
            }
            let host = &device.namespace;
            host.ip(&format!("addr add 10.10.{net}.1/24 dev eth0"));
            host.ip(&format!("addr add fd10:{net}::1/64 dev eth0 nodad"));
            host.ip("link set eth0 up");
            host.ip(&format!("route add default via 10.10.{net}.254"));
            host.ip(&format!("-6 route add default via fd10:{net}::254"));
        }
        let ip = if is_v6 { "[fd10:2::1]" } else { "10.10.2.1" };
        let endpoint = format!("{ip}:{}", b.port).parse().expect("an address");
        a.send(Command::AddPeer(b.as_peer(vec![endpoint])));
        b.send(Command::AddPeer(a.as_peer(vec![])));
        Self { a, b, _routers: routers }
    }
}

#[test]
fn a_path_that_drops_silently_is_found_out() {
    if !have_root() {
        return;
    }
    for (is_v6, most) in [(false, 1340), (true, 1320)] {
        let Routed { a, b, _routers } = Routed::new(1420, 1400, false, is_v6);
        // The first one gets through all the same: the kernel does not set DF in runs over IPv4, and over IPv6 it waits
        // until it is known what the path takes.
        wait("the width of the path", || {
            streams(&a, &b, 1 << 20);
            [&a, &b].into_iter().all(|device| path_mtu(device) == most)
        });
        ping(&a, 2, most.into());
    }
}

#[test]
fn a_path_that_tells_is_believed() {
    if !have_root() {
        return;
    }
    for (is_v6, most) in [(false, 1340), (true, 1320)] {
        let Routed { a, b, _routers } = Routed::new(1420, 1400, true, is_v6);
        streams(&a, &b, 4 << 20);
        assert_eq!((path_mtu(&a), path_mtu(&b)), (most, most));
        let told =
            a.namespace.command("ping -n -c 2 -i 0.2 -W 2 -M do -s 1392 100.64.0.2").output().expect("ping");
        let text =
            String::from_utf8_lossy(&told.stdout).into_owned() + &String::from_utf8_lossy(&told.stderr);
        assert!(!told.status.success() && text.contains("mtu"), "{text}");
        // In fragments, it arrives.
        a.namespace.run("ping -n -c 2 -i 0.2 -W 5 -M dont -s 1392 100.64.0.2");
    }
}

#[test]
fn a_path_of_1280_octets_works_in_fragments() {
    if !have_root() {
        return;
    }
    for (is_v6, tells) in [(false, false), (false, true), (true, false), (true, true)] {
        let Routed { a, b, _routers } = Routed::new(1280, 1280, tells, is_v6);
        streams(&a, &b, 2 << 20);
        if is_v6 && !tells {
            // Only this host could fragment what is larger than 1,200, and the kernel does not know that it has to.
            a.namespace.run("ping -n -c 2 -i 0.2 -W 5 -M do -s 1172 100.64.0.2");
            continue;
        }
        // Which lone packets do not survive until the path is known to be so narrow.
        for (device, number) in [(&a, 2), (&b, 1)] {
            let arrives = |address: &str, len: u16| {
                let line = format!("ping -n -c 1 -W 1 -M do -s {len} {address}{number}");
                device.namespace.command(&line).output().expect("ping").status.success()
            };
            wait("whole packets", || arrives("100.64.0.", 1252) && arrives("fd00:1::", 1232));
        }
        ping(&a, 2, 1280);
        assert_eq!((path_mtu(&a), path_mtu(&b)), (1280, 1280));
    }
}
