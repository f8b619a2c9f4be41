//! Data planes joined by a cable: the whole way of a packet from one host's programs to the other's.

use std::{net::IpAddr, num::NonZeroUsize, process::Stdio, time::Duration};

use muster_agent::{
    datapath::{Command, Event, Path, Stopped},
    ping::{Outcome, Pinger},
};

use crate::{
    device::{Device, virtual_addresses},
    namespace::{connect, have_root},
};

/// Two devices at the ends of a cable. The second one answers; whether it knows the first is up to the test.
fn pair() -> (Device, Device) {
    let (a, b) = (Device::new(1), Device::new(2));
    connect(&a.namespace, &b.namespace);
    (a, b)
}

fn introduce(a: &Device, b: &Device) {
    a.send(Command::AddPeer(b.as_peer(vec![b.endpoint(2)])));
    b.send(Command::AddPeer(a.as_peer(vec![])));
}

#[test]
fn two_devices_reach_each_other_over_both_families() {
    if !have_root() {
        return;
    }
    let (mut a, mut b) = pair();
    introduce(&a, &b);
    a.namespace.run("ping -n -c 3 -i 0.2 -W 5 100.64.0.2");
    assert_eq!(a.event(), Event::PeerUp { public_key: b.public_key, endpoint: b.endpoint(2).into() });
    assert_eq!(b.event(), Event::PeerUp { public_key: a.public_key, endpoint: a.endpoint(1).into() });
    b.namespace.run("ping -n -c 3 -i 0.2 -W 5 fd00:1::1");
    // The largest packet that the interface takes, whole.
    a.namespace.run("ping -n -c 2 -i 0.2 -W 5 -M do -s 1392 100.64.0.2");

    let snapshot = a.snapshot();
    let peer = &snapshot.peers[&b.public_key];
    assert_eq!((peer.endpoint, peer.path), (Some(b.endpoint(2)), Path::Direct));
    assert_eq!(peer.virtual_addresses, virtual_addresses(2));
    assert!(peer.last_handshake.is_some() && peer.received_bytes > 0 && peer.sent_bytes > 0, "{peer:?}");
    assert!(snapshot.tun_received.packets >= 8 && snapshot.tun_sent.packets >= 8, "{snapshot:?}");
    assert!(snapshot.udp_sent.bytes > snapshot.tun_received.bytes, "{snapshot:?}");
    assert!(peer.received_packets >= 8 && peer.sent_packets >= 8 && peer.queued == 0, "{peer:?}");
    for counter in [snapshot.tun_received, snapshot.tun_sent, snapshot.udp_received, snapshot.udp_sent] {
        assert!(counter.calls > 0 && counter.calls <= counter.packets, "{snapshot:?}");
    }
}

#[test]
fn tcp_and_udp_streams_go_through_in_both_directions() {
    if !have_root() {
        return;
    }
    let (a, b) = pair();
    introduce(&a, &b);
    a.namespace.run("ping -n -c 1 -W 5 100.64.0.2");
    let mut server =
        b.namespace.command("iperf3 -s").stdout(Stdio::null()).spawn().expect("iperf3 is installed");
    for _ in 0..100 {
        if b.namespace.run("ss -Hltn sport = :5201").contains("5201") {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let results: Vec<_> = ["", "-R", "-u -b 20M", "-6"]
        .into_iter()
        .map(|options| {
            let target = if options == "-6" { "fd00:1::2" } else { "100.64.0.2" };
            let line = format!("iperf3 -c {target} -n 4M {options}");
            (line.clone(), a.namespace.command(&line).output().expect("runs"))
        })
        .collect();
    let _ = server.kill();
    let _ = server.wait();
    for (line, output) in results {
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "`{line}`: {text}{}", String::from_utf8_lossy(&output.stderr));
        if let Some(rate) = text.lines().rfind(|l| l.contains("receiver")) {
            eprintln!("{line}:{}", rate.split("sec").nth(1).unwrap_or(rate));
        }
    }
}

#[test]
fn the_first_packet_waits_for_the_lookup_and_arrives() {
    if !have_root() {
        return;
    }
    let (mut a, mut b) = pair();
    let ping =
        a.namespace.command("ping -n -c 1 -W 10 100.64.0.2").stdout(Stdio::piped()).spawn().expect("ping");
    assert_eq!(a.event(), Event::LookupAddress(virtual_addresses(2)[0]));
    a.send(Command::AddPeer(b.as_peer(vec![b.endpoint(2)])));
    assert_eq!(b.event(), Event::LookupKey(a.public_key));
    b.send(Command::AddPeer(a.as_peer(vec![])));
    let output = ping.wait_with_output().expect("ping ends");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn an_address_that_no_device_has_is_asked_for_once_and_then_unreachable() {
    if !have_root() {
        return;
    }
    let mut device = Device::new(1);
    for target in ["100.64.0.77", "fd00:1::77"] {
        let target: IpAddr = target.parse().expect("an address");
        let mut ping = device
            .namespace
            .command(&format!("ping -n -c 3 -i 0.2 -W 5 {target}"))
            .stdout(Stdio::piped())
            .spawn()
            .expect("ping");
        assert_eq!(device.event(), Event::LookupAddress(target));
        device.send(Command::NoSuchDevice(target));
        let status = ping.wait().expect("ping ends");
        let mut text = String::new();
        std::io::Read::read_to_string(&mut ping.stdout.take().expect("piped"), &mut text).expect("text");
        assert!(!status.success() && text.to_lowercase().contains("unreachable"), "{text}");
        assert!(text.contains("+3 errors"), "{text}");
        assert_eq!(device.waiting_events(), [], "asked for again");

        let outcome = device.namespace.enter(async || {
            Pinger::new(target).expect("socket").ping(9, Duration::from_secs(5)).await.expect("sent")
        });
        assert_eq!(outcome, Outcome::Unreachable);
    }
}

#[test]
fn a_removed_peer_is_not_reached_any_more_and_an_updated_one_moves() {
    if !have_root() {
        return;
    }
    let (mut a, b) = pair();
    introduce(&a, &b);
    a.namespace.run("ping -n -c 1 -W 5 100.64.0.2");
    assert!(matches!(a.event(), Event::PeerUp { .. }));

    let mut moved = b.as_peer(vec![b.endpoint(2)]);
    moved.virtual_addresses = vec!["100.64.0.200".parse().expect("an address")];
    b.namespace.ip("addr add 100.64.0.200/32 dev muster0");
    b.send(Command::SetLocalAddresses(moved.virtual_addresses.clone()));
    a.send(Command::UpdatePeer(moved));
    a.namespace.run("ping -n -c 1 -W 5 100.64.0.200");

    a.send(Command::RemovePeer(b.public_key));
    assert!(a.snapshot().peers.is_empty());
    assert!(!a.namespace.command("ping -n -c 1 -W 1 100.64.0.200").output().expect("ping").status.success());
    assert_eq!(a.event(), Event::LookupAddress("100.64.0.200".parse().expect("an address")));
}

#[test]
fn an_endpoint_inside_the_network_is_ignored() {
    if !have_root() {
        return;
    }
    let (a, b) = pair();
    a.send(Command::AddPeer(b.as_peer(vec!["100.64.0.9:1".parse().expect("an address"), b.endpoint(2)])));
    b.send(Command::AddPeer(a.as_peer(vec![])));
    a.namespace.run("ping -n -c 1 -W 5 100.64.0.2");
    assert_eq!(a.snapshot().peers[&b.public_key].endpoint, Some(b.endpoint(2)));
}

#[test]
fn a_path_that_is_narrower_than_the_tunnel_loses_nothing_for_good() {
    if !have_root() {
        return;
    }
    let (a, b) = pair();
    introduce(&a, &b);
    for device in [&a, &b] {
        device.namespace.ip("link set eth0 mtu 1300");
    }
    a.namespace.run("ping -n -c 2 -i 0.2 -W 5 -M do -s 1392 100.64.0.2");
}

#[test]
fn a_device_that_moves_is_followed() {
    if !have_root() {
        return;
    }
    let (a, mut b) = pair();
    introduce(&a, &b);
    a.namespace.run("ping -n -c 1 -W 5 100.64.0.2");
    assert!(matches!(b.event(), Event::PeerUp { .. }));
    a.namespace.ip("addr add 10.9.0.3/24 dev eth0");
    a.namespace.ip("addr del 10.9.0.1/24 dev eth0");
    a.namespace.ip("addr add 10.9.0.3/24 dev eth0");
    a.namespace.run("ping -n -c 1 -W 5 100.64.0.2");
    assert_eq!(
        b.event(),
        Event::EndpointChanged { public_key: a.public_key, endpoint: a.endpoint(3).into() }
    );
}

#[test]
fn a_control_side_that_does_not_listen_holds_nothing_up() {
    if !have_root() {
        return;
    }
    let (a, b) = pair();
    introduce(&a, &b);
    a.namespace.enter(async || {
        let socket = std::net::UdpSocket::bind("100.64.0.1:0").expect("bind");
        for number in 0..6000u32 {
            let address = std::net::Ipv4Addr::from(u32::from_be_bytes([100, 70, 0, 0]) + number);
            // The device's queue may be full for a moment.
            let _ = socket.send_to(b"anybody?", (address, 9));
        }
    });
    a.namespace.run("ping -n -c 2 -i 0.2 -W 5 100.64.0.2");
    let snapshot = a.snapshot();
    assert!(snapshot.drops["queue_full"] > 0, "{:?}", snapshot.drops);
}

#[test]
fn packets_that_are_not_the_devices_own_do_not_leave() {
    if !have_root() {
        return;
    }
    let (mut a, b) = pair();
    introduce(&a, &b);
    a.namespace.run("ping -n -c 1 -W 5 100.64.0.2");
    assert!(matches!(a.event(), Event::PeerUp { .. }));
    let ping = a.namespace.command("ping -n -c 1 -W 1 -I 10.9.0.1 100.64.0.200").output().expect("ping");
    assert!(!ping.status.success());
    assert_eq!(a.waiting_events(), [], "a lookup for somebody else's packet");
    assert!(a.snapshot().drops["foreign_source"] > 0);
}

#[test]
fn nothing_runs_while_nothing_happens() {
    if !have_root() {
        return;
    }
    let threads = NonZeroUsize::new(4).expect("some");
    let (a, b) = (Device::with_threads(1, threads), Device::with_threads(2, threads));
    connect(&a.namespace, &b.namespace);
    introduce(&a, &b);
    a.namespace.run("ping -n -c 1 -W 5 100.64.0.2");
    let before = a.sleeps();
    std::thread::sleep(Duration::from_secs(2));
    let after = a.sleeps();
    let sums = [&before, &after].map(|sleeps| sleeps.iter().sum::<u64>());
    assert!(sums[1] - sums[0] <= 2, "woken up in two idle seconds: {before:?} {after:?}");
}

#[test]
fn a_deleted_interface_is_the_last_event_and_a_stopped_data_plane_leaves_none() {
    if !have_root() {
        return;
    }
    let mut device = Device::new(1);
    device.namespace.ip("link del muster0");
    let Event::Failed(reason) = device.event() else { panic!("expected a failure") };
    assert!(reason.contains("TUN device"), "{reason}");

    let mut device = Device::new(2);
    device.stop();
    assert!(!device.namespace.ip("link").contains("muster0"));
    let handle = device.handle.clone();
    let result = device.namespace.enter(async || handle.send(Command::UnknownKey([0; 32])).await);
    assert_eq!(result, Err(Stopped));
}

#[test]
fn junk_from_strangers_is_counted_and_changes_nothing() {
    if !have_root() {
        return;
    }
    let (a, b) = pair();
    introduce(&a, &b);
    a.namespace.run("ping -n -c 1 -W 5 100.64.0.2");
    let target = b.endpoint(2);
    a.namespace.enter(async || {
        let socket = std::net::UdpSocket::bind("10.9.0.1:0").expect("bind");
        let mut junk: Vec<u8> = (0..=255).cycle().take(60_000).collect();
        for length in [0, 1, 4, 31, 32, 63, 64, 92, 148, 1500, 60_000] {
            for kind in 0..=5 {
                if let Some(first) = junk.first_mut() {
                    *first = kind;
                }
                socket.send_to(&junk[..length], target).expect("send");
            }
        }
    });
    a.namespace.run("ping -n -c 1 -W 5 100.64.0.2");
    let snapshot = b.snapshot();
    let dropped: u64 = snapshot.drops.values().sum();
    assert!(dropped >= 60, "{:?}", snapshot.drops);
    assert_eq!(snapshot.peers.len(), 1);
}
