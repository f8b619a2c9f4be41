//! Paths of various MTUs between two tunnels: what arrives, in which sizes, and who is told what.

use std::time::Duration;

use super::{
    network::Network,
    packets::{ip, udp},
};
use crate::{
    Dropped,
    offload::{Sum, SuperPacket, VirtioHeader},
};

const SOURCES: [&str; 2] = ["100.64.0.1", "fd00::1"];
const DESTINATIONS: [&str; 2] = ["100.64.0.2", "fd00::2"];

/// Two tunnels that know each other and each other's addresses of both families, on a path that takes `outer_mtu`.
fn pair(mtus: [usize; 2], outer_mtu: usize, tells: bool) -> Network {
    let mut network = Network::with_mtus(&mtus, 7, 0, |_| false);
    for n in 0..2 {
        let mut config = network.config(1 - n);
        config.virtual_addresses.push(format!("fd00::{}", 2 - n).parse().unwrap());
        network.nodes[n].tunnel.add_peer(config, network.now);
    }
    network.send(0, 1, b"first");
    network.run_secs(1);
    (network.mtu, network.tells) = (outer_mtu, tells);
    network.take_payloads(1);
    network
}

fn path_mtu(network: &Network, n: usize) -> u16 {
    network.nodes[n].tunnel.peer(&network.key(1 - n), network.now).unwrap().path_mtu
}

/// A packet of `len` octets that nobody on its way may fragment.
fn whole(family: usize, len: usize) -> Vec<u8> {
    let header = [28, 48][family];
    let mut packet = udp(SOURCES[family], DESTINATIONS[family], &vec![9; len - header]);
    if family == 0 {
        packet[6] |= 0x40;
    }
    packet
}

/// Packets of 600 octets, ten a second.
fn talk(network: &mut Network, family: usize, seconds: usize) {
    let packet = whole(family, 600);
    for _ in 0..10 * seconds {
        network.send_packet(0, &packet);
        network.run_millis(100);
    }
    network.nodes[1].inbox.clear();
}

#[test]
fn a_wide_path_is_found_and_used() {
    for family in 0..2 {
        let mut network = pair([8920; 2], 9000, false);
        assert_eq!(path_mtu(&network, 0), 1420);
        talk(&mut network, family, 2);
        assert_eq!(path_mtu(&network, 0), 8920);
        assert_eq!(path_mtu(&network, 1), 1420, "the other has sent nothing but answers");
        let packet = whole(family, 8920);
        network.send_packet(0, &packet);
        network.run_millis(100);
        assert_eq!(network.nodes[1].inbox, [packet]);
        assert!(network.nodes[0].inbox.is_empty(), "answers to probes are for nobody else");
    }
}

#[test]
fn a_narrow_path_that_tells_nothing_is_found_out() {
    // 1,400 less 60, and what the peer's interface takes.
    for (mtus, outer, found) in [([1420; 2], 1400, 1340), ([8920; 2], 1500, 1440), ([8920, 1420], 9000, 1420)]
    {
        for family in 0..2 {
            let mut network = pair(mtus, outer, false);
            talk(&mut network, family, 40);
            let current = path_mtu(&network, 0);
            assert!(current <= found && current + 8 >= found, "{current} of {found}");
            assert_eq!(network.fragmented, 0, "the way back is as wide as the way there");
            network.send_packet(0, &whole(family, current.into()));
            network.run_millis(100);
            assert_eq!(network.nodes[1].inbox.len(), 1);
        }
    }
}

#[test]
fn a_path_that_tells_is_believed_at_once() {
    for family in 0..2 {
        let mut network = pair([1420; 2], 1400, true);
        network.send_packet(0, &whole(family, 1420));
        assert_eq!(path_mtu(&network, 0), 1340);
        network.run_millis(100);
        assert_eq!(network.nodes[1].inbox.len(), 1, "this host has fragmented it");
    }
}

#[test]
fn padding_stays_within_the_path() {
    let mut network = pair([1420; 2], 1395, true);
    network.send_packet(0, &whole(0, 1420));
    assert_eq!(path_mtu(&network, 0), 1335);
    network.run_secs(1);
    for len in 1300..=1335 {
        network.trace.clear();
        network.send_packet(0, &whole(0, len));
        let sealed = network.last(0, 4).len() - 32;
        assert_eq!(sealed, len.next_multiple_of(16).min(1335), "{len}");
    }
    assert_eq!(network.fragmented, 1, "the first one");
}

#[test]
fn senders_are_told_what_is_too_big_but_not_too_often() {
    for family in 0..2 {
        let mut network = pair([1420; 2], 1400, true);
        network.send_packet(0, &whole(family, 1420));
        network.run_secs(1);
        for _ in 0..100 {
            network.send_packet(0, &whole(family, 1341));
        }
        let told = std::mem::take(&mut network.nodes[0].inbox);
        assert_eq!(told.len(), 8);
        let error = &told[0];
        let (at, kind) = [(20, [3, 4]), (40, [2, 0])][family];
        assert_eq!(error[at..at + 2], kind);
        assert_eq!(error[at + 4..at + 8], 1340u32.to_be_bytes());
        assert_eq!(network.nodes[0].dropped, [Dropped::TooBig; 100]);
        let key = network.key(1);
        let peer = network.nodes[0].tunnel.peer(&key, network.now).unwrap();
        assert_eq!(peer.drops.get(Dropped::TooBig), 100);
        assert_eq!(network.nodes[0].tunnel.drops().get(Dropped::TooBig), 100);
        network.run_secs(1);
        network.send_packet(0, &whole(family, 1341));
        assert_eq!(network.nodes[0].inbox.len(), 1, "a second later, again");
    }
}

#[test]
fn what_may_be_fragmented_arrives_in_fragments() {
    let mut network = pair([1420; 2], 1400, false);
    talk(&mut network, 0, 10);
    assert!(path_mtu(&network, 0) <= 1340);
    let (too_big, packet) = (network.too_big, udp(SOURCES[0], DESTINATIONS[0], &[5; 1392]));
    network.send_packet(0, &packet);
    network.run_millis(100);
    assert_eq!(network.nodes[1].inbox, [packet]);
    assert_eq!((network.fragmented, network.too_big), (1, too_big));
}

#[test]
fn a_path_narrower_than_ipv6_allows_works_in_fragments() {
    for tells in [false, true] {
        for family in 0..2 {
            let mut network = pair([1280; 2], 1300, tells);
            talk(&mut network, family, 20);
            assert_eq!(path_mtu(&network, 0), 1280);
            let (too_big, packet) = (network.too_big, whole(family, 1280));
            network.send_packet(0, &packet);
            network.run_secs(1);
            assert_eq!(network.nodes[1].inbox, [packet]);
            assert_eq!(network.too_big, too_big);
        }
    }
}

#[test]
fn segments_that_are_too_big_are_counted_each() {
    let mut network = pair([1420; 2], 1400, true);
    network.send_packet(0, &whole(0, 1420));
    network.run_secs(1);
    let packet = ip(SOURCES[0], DESTINATIONS[0], 17, &[0; 8 + 3 * 1392]);
    let mut packet = packet;
    packet[6] |= 0x40;
    packet[24..26].copy_from_slice(&(8 + 3 * 1392u16).to_be_bytes());
    let header = VirtioHeader {
        flags: VirtioHeader::NEEDS_CSUM,
        gso_type: VirtioHeader::GSO_UDP_L4,
        gso_size: 1392,
        csum_start: 20,
        csum_offset: 6,
        ..VirtioHeader::default()
    };
    let packet = SuperPacket::parse(header, &packet).unwrap();
    let mut out = crate::Outgoing::new();
    let tunnel = &mut network.nodes[0].tunnel;
    assert_eq!(tunnel.handle_super_packet(&packet, network.now, &mut out), Err(Dropped::TooBig));
    assert_eq!((tunnel.drops().get(Dropped::TooBig), out.len()), (3, 0));
}

#[test]
fn tcp_that_leaves_it_to_the_device_is_cut_to_fit() {
    for family in 0..2 {
        let mut network = pair([8920; 2], 1400, true);
        network.send_packet(0, &whole(family, 1420));
        network.run_secs(1);
        network.nodes[1].inbox.clear();
        let payload: Vec<u8> = (0..20_000u32).map(|n| (n ^ (n >> 8)) as u8).collect();
        let ip_len = [20, 40][family];
        let plain = [0x10, 1, 0x20, 2, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x18, 1, 0, 0, 0, 0, 0];
        let signed = [&plain[..], &[19, 18], &[7; 16], &[1, 1]].concat();
        for (tcp, len, gso_size) in [(&plain[..], 20_000, 8880), (&plain, 5_000, 0), (&signed, 5_000, 0)] {
            let mut tcp = tcp.to_vec();
            tcp[12] = (tcp.len() * 4) as u8;
            let mut packet = ip(SOURCES[family], DESTINATIONS[family], 6, &[&tcp, &payload[..len]].concat());
            if family == 0 {
                packet[6] |= 0x40;
            }
            let header = VirtioHeader {
                flags: VirtioHeader::NEEDS_CSUM,
                gso_type: if gso_size == 0 { 0 } else { [1, 4][family] },
                gso_size,
                csum_start: ip_len,
                csum_offset: 16,
                ..VirtioHeader::default()
            };
            let packet = SuperPacket::parse(header, &packet).unwrap();
            let mut out = crate::Outgoing::new();
            let result = network.nodes[0].tunnel.handle_super_packet(&packet, network.now, &mut out);
            if tcp.len() > 20 {
                assert_eq!(result, Err(Dropped::TooBig), "a signature holds for one segment");
                continue;
            }
            result.unwrap();
            for run in out.runs() {
                for datagram in run.datagrams() {
                    assert!(datagram.len() <= 1340 + 32);
                    let from = network.nodes[0].address;
                    network.deliver(1, from, datagram.to_vec()).unwrap();
                }
            }
            let mut arrived: Vec<u8> = Vec::new();
            for segment in network.nodes[1].inbox.drain(..) {
                let at = usize::from(ip_len);
                let addresses = &segment[[12, 8][family]..at];
                let length = (segment.len() - at) as u16;
                let sum = Sum::of(addresses).u16(6).u16(length).octets(&segment[at..]);
                assert_eq!(sum.checksum(), [0, 0]);
                let sequence = u32::from_be_bytes(*segment[at + 4..].first_chunk().unwrap());
                assert_eq!(sequence as usize, 1 + arrived.len());
                arrived.extend(&segment[at + 20..]);
            }
            assert!(arrived == payload[..len]);
        }
        assert_eq!(network.too_big, 0);
    }
}

#[test]
fn packets_that_wait_are_held_against_the_path_too() {
    let mut network = Network::pair(3);
    (network.mtu, network.tells) = (1400, true);
    for len in [1420, 1341, 600] {
        network.send_packet(0, &whole(0, len));
    }
    assert!(network.nodes[0].dropped.is_empty());
    network.run_secs(1);
    // All of them were sent at once, before anything was known.
    assert_eq!(network.nodes[1].inbox.len(), 3);
    assert_eq!(path_mtu(&network, 0), 1340);
    let key = network.key(1);
    network.nodes[0].tunnel.remove_peer(&key);
    network.introduce(0, 1);
    assert_eq!(path_mtu(&network, 0), 1420);
}

#[test]
fn a_peer_that_moves_has_another_path() {
    let mut network = pair([8920; 2], 9000, false);
    talk(&mut network, 0, 2);
    assert_eq!(path_mtu(&network, 0), 8920);
    network.nodes[1].address = "192.0.2.77:51820".parse().unwrap();
    network.send(1, 0, b"I am here");
    network.mtu = 1500;
    network.run_millis(100);
    assert_eq!(path_mtu(&network, 0), 1420);
    talk(&mut network, 0, 40);
    assert!((1432..=1440).contains(&path_mtu(&network, 0)));
    let now = network.now;
    network.nodes[0].tunnel.paths_changed(now);
    assert_eq!(path_mtu(&network, 0), 1420);
}

#[test]
fn a_path_that_becomes_narrow_is_noticed() {
    let mut network = pair([1420; 2], 1500, false);
    talk(&mut network, 0, 5);
    network.mtu = 1400;
    talk(&mut network, 0, 60);
    assert!((1332..=1340).contains(&path_mtu(&network, 0)), "{}", path_mtu(&network, 0));
}

#[test]
fn nothing_is_probed_without_data() {
    let mut network = pair([8920; 2], 9000, false);
    talk(&mut network, 0, 5);
    network.run(Duration::from_secs(20));
    network.trace.clear();
    for _ in 0..600 {
        network.send(0, 1, b"small");
        network.run_secs(1);
    }
    let largest = network.trace.iter().map(|(.., payload)| payload.len()).max();
    assert!(largest < Some(512), "{largest:?}");
    assert_eq!(network.nodes[0].dropped, []);
}
