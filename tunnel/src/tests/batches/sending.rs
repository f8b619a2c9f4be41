//! Packets that are begun in one order and sealed in another.

use proptest::prelude::*;

use super::*;
use crate::REJECT_AFTER_MESSAGES;

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Packets of many segments are begun in one order and sealed in another, with others in between.
    #[test]
    fn any_order_of_sealing(
        seed in 0u64..1_000,
        packets in prop::collection::vec((1usize..9_000, 100u16..1_393), 1..12)
            .prop_flat_map(|packets| (Just(packets.clone()), Just((0..packets.len()).collect::<Vec<_>>()).prop_shuffle())),
    ) {
        let (packets, order) = packets;
        let mut network = pair(seed);
        let before = network.peer(0);
        let packets: Vec<_> = packets
            .iter()
            .enumerate()
            .map(|(n, (len, size))| super_packet(&vec![n as u8; *len], *size))
            .collect();
        let packets: Vec<_> =
            packets.iter().map(|(header, packet)| SuperPacket::parse(*header, packet).unwrap()).collect();
        let (mut begun, mut between) = (Vec::new(), Vec::new());
        for whole in &packets {
            begun.push(network.begin_send(0, whole).unwrap());
            between.push(network.sealed(0, &packet(b"between")));
        }
        let mut all = between.clone();
        for index in order {
            let mut out = Outgoing::new();
            begun[index].take().unwrap().seal(&packets[index], &mut out).unwrap();
            let sealed = datagrams(&out);
            prop_assert_eq!(sealed.len(), packets[index].segments());
            let used = counters(&sealed);
            prop_assert!(used.windows(2).all(|pair| pair[0] + 1 == pair[1]));
            prop_assert_eq!(used.last().unwrap() + 1, counter(&between[index]), "in the order of beginning");
            all.extend(sealed);
        }
        let used: BTreeSet<u64> = counters(&all).into_iter().collect();
        prop_assert_eq!(used.len(), all.len(), "each counter once");
        prop_assert_eq!(used.last().unwrap() - used.first().unwrap() + 1, all.len() as u64, "and none is left out");
        let after = network.peer(0);
        prop_assert_eq!(after.sent_packets - before.sent_packets, all.len() as u64);
        let octets: usize = all.iter().map(Vec::len).sum();
        prop_assert_eq!(after.sent_bytes - before.sent_bytes, octets as u64);
        let mut expected: Vec<_> = packets.iter().flat_map(|p| (0..p.segments()).map(|n| p.segment(n))).collect();
        expected.extend(between.iter().map(|_| packet(b"between")));
        let mut arrived = Vec::new();
        for datagram in all {
            let opening = network.begin_receive(1, &datagram).unwrap();
            arrived.push(network.finish(1, opening, datagram).unwrap());
        }
        arrived.sort();
        expected.sort();
        prop_assert_eq!(arrived, expected);
    }
}

#[test]
fn a_sealing_serves_its_packet_alone() {
    let mut network = pair(20);
    let (header, octets) = super_packet(&[7; 3_000], 1_000);
    let whole = SuperPacket::parse(header, &octets).unwrap();
    let (longer_header, longer) = super_packet(&[7; 4_000], 1_000);
    let longer = SuperPacket::parse(longer_header, &longer).unwrap();
    let mut out = Outgoing::new();
    let sealing = network.begin_send(0, &whole).unwrap().unwrap();
    assert_eq!(sealing.seal(&longer, &mut out), Err(Dropped::SealFailed));
    assert!(out.is_empty());
    let sealing = network.begin_send(0, &whole).unwrap().unwrap();
    sealing.seal(&whole, &mut out).unwrap();
    assert_eq!(out.len(), 3);
}

/// TCP is cut to what the path took when it was begun, whatever is found out before it is sealed.
#[test]
fn a_path_changes_between_beginning_and_sealing() {
    let tcp = [0x10, 1, 0x20, 2, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x18, 1, 0, 0, 0, 0, 0];
    let octets = ip("100.64.0.1", "100.64.0.2", 6, &[&tcp[..], &[7; 5_000]].concat());
    for (gso_type, gso_size) in [(VirtioHeader::GSO_TCPV4, 1_380), (VirtioHeader::GSO_NONE, 0)] {
        let header = VirtioHeader {
            flags: VirtioHeader::NEEDS_CSUM,
            gso_type,
            gso_size,
            csum_start: 20,
            csum_offset: 16,
            ..VirtioHeader::default()
        };
        let whole = SuperPacket::parse(header, &octets).unwrap();
        let mut network = pair(21);
        let (now, to) = (network.now, network.nodes[1].address);
        let wide = network.begin_send(0, &whole).unwrap().unwrap();
        network.nodes[0].tunnel.path_too_big(to, 1_400, 1_452, now);
        let before = network.peer(0).sent_bytes;
        let narrow = network.begin_send(0, &whole).unwrap().unwrap();
        let counted = network.peer(0).sent_bytes - before;
        network.nodes[0].tunnel.paths_changed(now);
        for (sealing, mtu) in [(wide, 1_420), (narrow, 1_340)] {
            let mut out = Outgoing::new();
            sealing.seal(&whole, &mut out).unwrap();
            let sealed = datagrams(&out);
            assert_eq!(sealed.iter().map(Vec::len).max(), Some(mtu + 32));
            assert_eq!(sealed.len(), 5_000usize.div_ceil(mtu - 40));
            assert!(mtu == 1_420 || out.octets() as u64 == counted);
            let mut payload: Vec<u8> = Vec::new();
            for datagram in sealed {
                let opening = network.begin_receive(1, &datagram).unwrap();
                payload.extend(&network.finish(1, opening, datagram).unwrap()[40..]);
            }
            assert!(payload == [7; 5_000]);
        }
    }
}

#[test]
fn what_finds_no_counters_waits_for_a_session() {
    let mut network = pair(22);
    network.loss = 0;
    network.run_secs(6);
    network.trace.clear();
    let key = network.key(1);
    let session = network.nodes[0].tunnel.peer_mut(&key).sessions().current().unwrap();
    session.set_send_counter(REJECT_AFTER_MESSAGES - 7);
    let (header, octets) = super_packet(&[7; 4_000], 1_000);
    let whole = SuperPacket::parse(header, &octets).unwrap();
    let sealing = network.begin_send(0, &whole).unwrap().unwrap();
    assert!(network.begin_send(0, &whole).unwrap().is_none(), "three are not enough for four");
    network.collect(0);
    assert_eq!((network.peer(0).queued, network.count(0, 1)), (4, 1));
    let last = [0; 3].map(|_| network.sealed(0, &packet(b"last")));
    network.send(0, 1, b"waits, too");
    assert_eq!(network.peer(0).queued, 5);
    // It seals with what it was given, when the session has no more.
    let mut out = Outgoing::new();
    sealing.seal(&whole, &mut out).unwrap();
    let sealed = [datagrams(&out), last.to_vec()].concat();
    assert_eq!(counters(&sealed), (REJECT_AFTER_MESSAGES - 7..REJECT_AFTER_MESSAGES).collect::<Vec<_>>());
    for datagram in sealed {
        let opening = network.begin_receive(1, &datagram).unwrap();
        network.finish(1, opening, datagram).unwrap();
    }
    assert_eq!(network.count(0, 4), 0);
    network.run_millis(100);
    let mut expected: Vec<_> = (0..4).map(|n| whole.segment(n)).collect();
    expected.push(packet(b"waits, too"));
    assert_eq!(network.nodes[1].inbox, expected, "in order, with the new session");
    assert!(network.nodes[0].tunnel.drops().iter().all(|(_, number)| number == 0));
}
