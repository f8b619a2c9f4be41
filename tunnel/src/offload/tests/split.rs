//! Splitting against the packets that a sender without offloads builds, and whatever is not to be believed.

use super::*;

/// Octets of the L4 part with its pseudo-header, which sum to 0xffff if the checksum is right.
fn sums_up(packet: &[u8], transport: usize, protocol: u8) -> bool {
    let v6 = packet[0] >> 4 == 6;
    let mut summed = packet[if v6 { 8..40 } else { 12..20 }].to_vec();
    summed.extend(((packet.len() - transport) as u32).to_be_bytes());
    summed.extend([0, protocol]);
    summed.extend(&packet[transport..]);
    plain_sum(&summed) == 0xffff
}

proptest! {
    #[test]
    fn as_the_naive_splitter(
        shape in any_shape(),
        len in prop_oneof![8 => 0usize..3000, 1 => 59_000usize..61_000],
        size in prop_oneof![1u16..50, 500u16..1500, Just(1448), Just(8868), any::<u16>()],
        hdr_len in any::<u16>(),
        (has_sum, is_valid) in any::<(bool, bool)>(),
    ) {
        let size = size.max(1).max((len / 2000) as u16);
        let octets = payload(len, size.into());
        let mut header = VirtioHeader { hdr_len, ..shape.header(size) };
        if !has_sum {
            // Neither the place nor the sum of the pseudo-header is needed.
            (header.flags, header.csum_start, header.csum_offset) = (0, hdr_len, hdr_len);
        }
        if is_valid {
            header.flags |= VirtioHeader::DATA_VALID;
        }
        if shape.tcp && hdr_len % 2 == 1 {
            header.gso_type |= VirtioHeader::GSO_ECN;
        }
        let packet = shape.unfinished(&octets);
        let parsed = SuperPacket::parse(header, &packet).unwrap();
        prop_assert_eq!(parsed.plain(), None);
        prop_assert_eq!(parsed.ecn(), shape.tos & 3);
        let naive = shape.naive_split(&octets, size.into());
        prop_assert_eq!(parsed.segments(), naive.len());
        for (index, (segment, naive)) in split(header, &packet).unwrap().iter().zip(&naive).enumerate() {
            prop_assert!(segment == naive, "segment {index}:\n{segment:02x?}\n{naive:02x?}");
            prop_assert!(sums_up(segment, shape.transport_at(), shape.protocol()));
        }
    }

    #[test]
    fn a_checksum_alone_is_completed(shape in any_shape(), len in 0usize..2000) {
        let packet = shape.unfinished(&payload(len, 5));
        let header = VirtioHeader { gso_type: VirtioHeader::GSO_NONE, ..shape.header(0) };
        let parsed = SuperPacket::parse(header, &packet).unwrap();
        prop_assert_eq!((parsed.segments(), parsed.segment_len(0), parsed.plain()), (1, packet.len(), None));
        let mut expected = shape.packet(&payload(len, 5));
        let at = shape.transport_at() + shape.checksum_at();
        if expected[at..at + 2] == [0, 0] {
            // Zero would say "none" in UDP; of the two zeros the kernel takes this one for all protocols.
            expected[at..at + 2].fill(0xff);
        }
        prop_assert_eq!(split(header, &packet).unwrap(), [expected]);
    }

    #[test]
    fn whatever_the_device_says(
        shape in any_shape(),
        len in 0usize..300,
        header in (0u8..8, prop_oneof![Just(0u8), Just(1), Just(4), Just(5), Just(0x81), any::<u8>()]),
        sizes in (any::<u16>(), 0u16..400, 0u16..120, 0u16..40),
        is_sound in any::<bool>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut packet = shape.unfinished(&payload(len, 5));
        for (at, value) in changes {
            let at = at.index(packet.len().min(100));
            packet[at] = value;
        }
        if let Some(cut) = cut {
            packet.truncate(cut.index(packet.len() + 1));
        }
        let mut header = VirtioHeader {
            flags: header.0,
            gso_type: header.1,
            hdr_len: sizes.0,
            gso_size: sizes.1,
            csum_start: sizes.2,
            csum_offset: sizes.3,
        };
        if is_sound {
            header = VirtioHeader { gso_size: sizes.1, ..shape.header(0) };
        }
        check_any(header, &packet)?;
    }

    #[test]
    fn any_octets(
        header in any::<[u8; 10]>(),
        first in prop_oneof![Just(0x45u8), Just(0x46), Just(0x4f), Just(0x60), any::<u8>()],
        mut packet in prop::collection::vec(any::<u8>(), 0..200),
        has_length in any::<bool>(),
    ) {
        if let Some(octet) = packet.first_mut() {
            *octet = first;
        }
        let len = packet.len() as u16;
        if has_length && len >= 40 {
            let (at, len) = if first >> 4 == 6 { (4, len - 40) } else { (2, len) };
            packet[at..at + 2].copy_from_slice(&len.to_be_bytes());
        }
        check_any(VirtioHeader::parse(&header).unwrap(), &packet)?;
        for gso_type in [0, 1, 4, 5] {
            check_any(VirtioHeader { flags: 0, gso_type, gso_size: 9, ..Default::default() }, &packet)?;
        }
    }
}

/// No panic; and sizes that add up, of whatever is accepted.
fn check_any(header: VirtioHeader, packet: &[u8]) -> Result<(), TestCaseError> {
    let Ok(parsed) = SuperPacket::parse(header, packet) else { return Ok(()) };
    let _ = (parsed.source(), parsed.destination(), parsed.ecn());
    let segments = split(header, packet).unwrap();
    prop_assert!(!segments.is_empty());
    prop_assert_eq!(segments.len(), parsed.segments());
    let sum = segments.iter().map(Vec::len).sum::<usize>();
    let (last, before) = segments.split_last().unwrap();
    if let Some(first) = before.first() {
        let headers = first.len() - usize::from(header.gso_size);
        prop_assert_eq!(sum, packet.len() + before.len() * headers);
        prop_assert!(before.iter().all(|segment| segment.len() == first.len()));
        prop_assert!(last.len() > headers && last.len() <= first.len());
    } else if let Some(plain) = parsed.plain() {
        prop_assert!(packet.starts_with(plain));
    } else {
        prop_assert_eq!(sum, packet.len());
    }
    Ok(())
}

#[test]
fn a_plain_packet_is_handed_on_as_it_is() {
    for (v6, tcp) in [(false, false), (false, true), (true, false), (true, true)] {
        let packet = Shape::new(v6, tcp).packet(b"hello");
        for flags in [0, VirtioHeader::DATA_VALID] {
            let header = VirtioHeader { flags, gso_size: 7, csum_start: 9, ..Default::default() };
            let parsed = SuperPacket::parse(header, &packet).unwrap();
            assert_eq!((parsed.plain(), parsed.segments()), (Some(&packet[..]), 1));
            assert_eq!(split(header, &packet).unwrap(), std::slice::from_ref(&packet));
            let mut longer = packet.clone();
            longer.extend([0; 7]);
            assert_eq!(SuperPacket::parse(header, &longer).unwrap().plain(), Some(&packet[..]));
            assert!(SuperPacket::parse(header, &packet[..packet.len() - 1]).is_err());
        }
        let parsed = SuperPacket::parse(VirtioHeader::default(), &packet).unwrap();
        let prefix = if v6 { "fdfd:fdfd:fdfd:fdfd:fdfd:fdfd:fdfd:fd0" } else { "10.99.0." };
        assert_eq!(parsed.source(), format!("{prefix}1").parse::<std::net::IpAddr>().unwrap());
        assert_eq!(parsed.destination(), format!("{prefix}2").parse::<std::net::IpAddr>().unwrap());
    }
}

#[test]
fn fragments_pass_but_have_nothing_to_complete() {
    let mut first = Shape::new(false, false);
    first.fragment = 0x2000;
    let mut later = first.clone();
    later.fragment = 0x00b9;
    let mut v6 = Shape::new(true, false);
    v6.extensions = vec![(44, vec![0, 0, 1, 0, 0, 0, 9])];
    for shape in [first, later, v6] {
        let packet = shape.packet(&payload(1000, 1));
        assert_eq!(SuperPacket::parse(VirtioHeader::default(), &packet).unwrap().plain(), Some(&packet[..]));
        for header in [shape.header(500), VirtioHeader { gso_type: 0, ..shape.header(0) }] {
            assert_eq!(split(header, &packet), Err(OffloadError::Fragment));
        }
    }
    // An "atomic" fragment (RFC 6946) is a whole packet.
    let mut atomic = Shape::new(true, false);
    atomic.extensions = vec![(44, vec![0, 0, 0, 0, 0, 0, 9])];
    let octets = payload(1000, 1);
    assert_eq!(
        split(atomic.header(600), &atomic.unfinished(&octets)).unwrap(),
        atomic.naive_split(&octets, 600)
    );
}

/// RFC 9293 §3.1, RFC 3168 §6.1.2.
#[test]
fn flags_of_the_segments() {
    let mut shape = Shape::new(false, true);
    shape.flags = ACK | FIN | PSH | CWR | URG | 0x40;
    shape.urgent = 150;
    let segments = split(shape.header(100), &shape.unfinished(&payload(350, 1))).unwrap();
    let of = |segment: &Vec<u8>| (segment[33], u16::from_be_bytes([segment[38], segment[39]]));
    assert_eq!(
        segments.iter().map(of).collect::<Vec<_>>(),
        [(ACK | CWR | URG | 0x40, 150), (ACK | URG | 0x40, 50), (ACK | 0x40, 0), (ACK | FIN | PSH | 0x40, 0)]
    );
    for flag in [SYN, RST] {
        shape.flags = ACK | flag;
        assert_eq!(
            split(shape.header(100), &shape.unfinished(&payload(101, 1))),
            Err(OffloadError::Transport)
        );
        assert!(split(shape.header(100), &shape.unfinished(&payload(100, 1))).is_ok());
    }
}

/// RFC 8200 §8.1, RFC 1122 §4.2.3.8: the pseudo-header has the final destination.
#[test]
fn source_routes() {
    let mut v6 = Shape::new(true, true);
    let mut routing = vec![2, 4, 1, 0, 0, 0, 0];
    routing.extend([0xfd; 15]);
    routing.push(9);
    v6.extensions = vec![(43, routing)];
    let mut v4 = Shape::new(false, true);
    v4.ip_options = vec![1, 131, 7, 4, 10, 99, 0, 9];
    for mut shape in [v6, v4] {
        shape.hosts = (1, 2, 9);
        let octets = payload(1001, 1);
        let packet = shape.unfinished(&octets);
        assert_eq!(split(shape.header(400), &packet).unwrap(), shape.naive_split(&octets, 400));
        let header = VirtioHeader { flags: 0, ..shape.header(400) };
        assert_eq!(split(header, &packet), Err(OffloadError::Ip), "the sum is needed");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let tcp = Shape::new(false, true);
    let packet = tcp.unfinished(&payload(1000, 1));
    let good = tcp.header(400);
    let refused = |header: VirtioHeader, packet: &[u8]| split(header, packet).unwrap_err();
    for gso_type in [2, 3, 4, 5, 6, 0x80, 0x85, 0x83, 0xff] {
        let error = refused(VirtioHeader { gso_type, ..good }, &packet);
        assert_eq!(error, OffloadError::Type(gso_type));
    }
    for flags in [4, 5, 8, 0x80] {
        assert_eq!(refused(VirtioHeader { flags, ..good }, &packet), OffloadError::Flags(flags));
    }
    assert_eq!(refused(VirtioHeader { gso_size: 0, ..good }, &packet), OffloadError::SegmentSize);
    for (start, offset) in [(0, 16), (19, 16), (21, 16), (20, 6), (20, 17), (1051, 1), (65_535, 65_535)] {
        for gso_type in [VirtioHeader::GSO_NONE, good.gso_type] {
            let header = VirtioHeader { csum_start: start, csum_offset: offset, gso_type, ..good };
            assert_eq!(refused(header, &packet), OffloadError::Checksum { start, offset });
        }
    }
    // Data offset: shorter than a header, longer than the packet.
    let mut bad = packet.clone();
    bad[32] = 0x40;
    assert_eq!(refused(good, &bad), OffloadError::Transport);
    let mut short = tcp.unfinished(&[]);
    short[32] = 0xf0;
    assert_eq!(refused(good, &short), OffloadError::Transport);
    // Lengths that are not the packet's, and headers that are none.
    for (at, value) in [(3, 0xff), (3, 0), (2, 0xff), (0, 0x44), (0, 0x55), (0, 0x05)] {
        let mut bad = packet.clone();
        bad[at] = value;
        assert_eq!(refused(good, &bad), OffloadError::Ip, "octet {at} = {value}");
    }
    assert_eq!(refused(good, &[]), OffloadError::Ip);
    // A jumbogram, and an extension header that ends beyond the packet.
    let mut jumbo = Shape::new(true, true);
    jumbo.extensions = vec![(0, vec![0, 0xc2, 4, 0, 1, 0, 0])];
    let mut packet = jumbo.unfinished(&payload(1000, 1));
    packet[4..6].fill(0);
    assert_eq!(refused(VirtioHeader::default(), &packet), OffloadError::Ip);
    let mut beyond = jumbo.unfinished(&payload(1000, 1));
    beyond[41] = 200;
    assert_eq!(refused(jumbo.header(400), &beyond), OffloadError::Ip);
}

/// A protocol that is neither TCP nor UDP, with a checksum that the device is to complete: ICMPv6.
#[test]
fn other_protocols_with_a_checksum() {
    let mut packet = Shape::new(true, false).packet(&payload(101, 1));
    packet[6] = 58;
    packet[42..44].fill(0);
    let mut pseudo = packet[8..40].to_vec();
    pseudo.extend([0, 0, 0, 109, 0, 0, 0, 58]);
    let partial = plain_sum(&pseudo).to_be_bytes();
    packet[42..44].copy_from_slice(&partial);
    let header = VirtioHeader { flags: 1, csum_start: 40, csum_offset: 2, ..Default::default() };
    let segment = split(header, &packet).unwrap().remove(0);
    assert!(sums_up(&segment, 40, 58));
    let header = VirtioHeader { csum_offset: 109, ..header };
    assert!(split(header, &packet).is_err(), "beyond the packet");
}
