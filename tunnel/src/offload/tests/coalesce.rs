//! What is joined and what is not, one rule at a time, and the super-packets' headers.

use super::*;

/// An item that was drained: what is written to the device, and which of the pushed packets it was made of.
#[derive(Clone, Debug)]
pub(super) struct Drained {
    pub(super) header: VirtioHeader,
    pub(super) octets: Vec<u8>,
    pub(super) packets: Vec<usize>,
}

/// Pushes all packets out of one buffer and drains.
pub(super) fn coalesce_with(coalescer: &mut Coalescer, packets: &[Vec<u8>]) -> Vec<Drained> {
    let mut buffer = Vec::new();
    let mut ranges = Vec::new();
    for packet in packets {
        buffer.extend([0xee; 16]);
        ranges.push(buffer.len()..buffer.len() + packet.len());
        buffer.extend(packet);
    }
    for range in &ranges {
        coalescer.push(&buffer, range.clone());
    }
    let mut items = Vec::new();
    coalescer.drain(&buffer, |item| {
        let written: Vec<u8> = item.slices().iter().flat_map(|slice| slice.to_vec()).collect();
        let index = |packet: &[u8]| {
            let at = packet.as_ptr() as usize - buffer.as_ptr() as usize;
            ranges.binary_search_by_key(&(at, at + packet.len()), |range| (range.start, range.end)).unwrap()
        };
        let packets: Vec<_> = item.packets().map(index).collect();
        assert_eq!(item.count(), packets.len());
        assert_eq!(item.len(), written.len() - VirtioHeader::LEN);
        items.push(Drained {
            header: VirtioHeader::parse(&written).unwrap(),
            octets: written[VirtioHeader::LEN..].to_vec(),
            packets,
        });
    });
    assert!(coalescer.is_empty());
    items
}

pub(super) fn coalesce(packets: &[Vec<u8>]) -> Vec<Drained> {
    let mut coalescer = Coalescer::new();
    coalescer.set_enabled(true, true);
    coalesce_with(&mut coalescer, packets)
}

/// Which packets were joined with which.
fn groups(packets: &[Vec<u8>]) -> Vec<Vec<usize>> {
    coalesce(packets).into_iter().map(|item| item.packets).collect()
}

fn kinds() -> [Shape; 4] {
    [(false, false), (false, true), (true, false), (true, true)].map(|(v6, tcp)| Shape::new(v6, tcp))
}

/// Packets of payloads of these lengths, one after the other.
fn stream(shape: &Shape, lengths: &[usize]) -> Vec<Vec<u8>> {
    let mut shape = shape.clone();
    let mut packets = Vec::new();
    for len in lengths {
        packets.push(shape.packet(&payload(*len, shape.sequence)));
        shape.sequence = shape.sequence.wrapping_add(*len as u32);
        shape.identification = shape.identification.wrapping_add(1);
    }
    packets
}

/// Virtio 1.2, 5.1.6.2: what the kernel is told, and that it needs no more to be right.
#[test]
fn headers_of_a_super_packet() {
    for shape in kinds() {
        let packets = stream(&shape, &[1000, 1000, 1000, 333]);
        let items = coalesce(&packets);
        let [item] = &items[..] else { panic!("{items:?}") };
        assert_eq!(item.packets, [0, 1, 2, 3]);
        assert_eq!(item.header, shape.header(1000));
        let whole: Vec<u8> =
            packets.iter().flat_map(|packet| packet[shape.headers_len()..].to_vec()).collect();
        assert_eq!(item.octets, shape.unfinished(&whole));
        assert_eq!(split(item.header, &item.octets).unwrap(), packets);
    }
}

#[test]
fn a_packet_alone_passes_untouched() {
    for shape in kinds() {
        let packets = stream(&shape, &[1000]);
        let items = coalesce(&packets);
        assert_eq!((items.len(), items[0].header), (1, VirtioHeader::default()));
        assert_eq!(items[0].octets, packets[0]);
    }
}

#[test]
fn what_ends_a_super_packet() {
    for shape in kinds() {
        assert_eq!(groups(&stream(&shape, &[100, 99, 100, 100])), [vec![0, 1], vec![2, 3]], "a shorter one");
        assert_eq!(groups(&stream(&shape, &[100, 101, 101])), [vec![0], vec![1, 2]], "a longer one");
        let all = stream(&shape, &[10; 130]);
        let by_number: Vec<_> = groups(&all).iter().map(Vec::len).collect();
        assert_eq!(by_number, [64, 64, 2], "64 packets");
        // As many octets as the header can say: 65,535.
        let size = 1441 - shape.headers_len();
        let items = coalesce(&stream(&shape, &vec![size; 60]));
        let fits = (65_535 - shape.headers_len()) / size;
        assert_eq!(items.iter().map(|item| item.packets.len()).collect::<Vec<_>>(), [fits, 60 - fits]);
        assert!(items[0].octets.len() + size > 65_535 && items[0].octets.len() <= 65_535);
    }
    let exact = |shape: &Shape| stream(shape, &[21_000, 21_000, 23_535 - shape.headers_len()]);
    for shape in kinds() {
        assert_eq!(groups(&exact(&shape)).len(), 2, "longer last one");
        let lens = [22_000, 22_000, 21_535 - shape.headers_len()];
        assert_eq!(coalesce(&stream(&shape, &lens))[0].octets.len(), 65_535);
        let lens = [22_000, 22_000, 21_536 - shape.headers_len()];
        assert_eq!(groups(&stream(&shape, &lens)), [vec![0, 1], vec![2]]);
    }
}

#[test]
fn push_ends_a_super_packet_and_is_kept() {
    for v6 in [false, true] {
        let shape = Shape::new(v6, true);
        let mut packets = stream(&shape, &[100; 5]);
        let mut pushed = shape.clone();
        pushed.sequence = shape.sequence.wrapping_add(200);
        pushed.identification = shape.identification.wrapping_add(2);
        pushed.flags = ACK | PSH;
        packets[2] = pushed.packet(&payload(100, 8));
        let items = coalesce(&packets);
        assert_eq!(
            items.iter().map(|item| item.packets.clone()).collect::<Vec<_>>(),
            [vec![0, 1, 2], vec![3, 4]]
        );
        assert_eq!(items[0].octets[shape.transport_at() + 13], ACK | PSH);
        assert_eq!(split(items[0].header, &items[0].octets).unwrap(), packets[..3]);
        // Nothing joins a first one that has it.
        let packets = [packets[2].clone(), packets[3].clone(), packets[4].clone()];
        assert_eq!(groups(&packets), [vec![0], vec![1, 2]]);
    }
}

/// Each header field that splitting copies from the first packet.
#[test]
fn any_difference_keeps_packets_apart() {
    type Change = (&'static str, fn(&mut Shape));
    let common: [Change; 3] =
        [("port", |s| s.port += 1), ("type of service", |s| s.tos ^= 3), ("time to live", |s| s.ttl -= 1)];
    let v4: [Change; 6] = [
        ("identification repeated and then not", |s| s.identification = s.identification.wrapping_add(7)),
        ("may be fragmented", |s| s.fragment = 0),
        ("reserved bit", |s| s.fragment |= 0x8000),
        ("first fragment", |s| s.fragment = 0x2000),
        ("later fragment", |s| s.fragment = 9),
        ("options", |s| s.ip_options = vec![1; 4]),
    ];
    let v6: [Change; 2] =
        [("flow label", |s| s.label += 1), ("extension header", |s| s.extensions = vec![(60, vec![0; 7])])];
    let tcp: [Change; 13] = [
        ("sequence ahead", |s| s.sequence = s.sequence.wrapping_add(1)),
        ("sequence behind", |s| s.sequence = s.sequence.wrapping_sub(1)),
        ("acknowledgment", |s| s.ack += 1),
        ("window", |s| s.window += 1),
        ("urgent pointer", |s| s.urgent += 1),
        ("timestamps", |s| s.options = timestamps(2)),
        ("other options", |s| s.options = vec![1; 12]),
        ("more options", |s| s.options.extend([1; 4])),
        ("no options", |s| s.options.clear()),
        ("FIN", |s| s.flags |= FIN),
        ("URG", |s| s.flags |= URG),
        ("ECE", |s| s.flags |= 0x40),
        ("CWR", |s| s.flags |= CWR),
    ];
    for shape in kinds() {
        let own = if shape.v6 { &v6[..] } else { &v4[..] };
        let transport = if shape.tcp { &tcp[..] } else { &[] };
        for (name, change) in common.iter().chain(own).chain(transport) {
            let mut second = shape.clone();
            second.sequence = second.sequence.wrapping_add(100);
            second.identification = second.identification.wrapping_add(1);
            assert_eq!(groups(&[shape.packet(&[7; 100]), second.packet(&[7; 100])]), [[0, 1]]);
            change(&mut second);
            let packets = [shape.packet(&[7; 100]), second.packet(&[7; 100])];
            assert_eq!(groups(&packets), [[0], [1]], "{name}");
        }
    }
}

#[test]
fn flags_and_bits_that_are_never_joined() {
    for flags in (0..=255u8).filter(|flags| flags & !PSH != ACK) {
        let mut shape = Shape::new(false, true);
        shape.flags = flags;
        assert_eq!(groups(&stream(&shape, &[100, 100])), [[0], [1]], "flags {flags:#04x}");
    }
    for reserved in 1..16 {
        let mut packets = stream(&Shape::new(true, true), &[100, 100]);
        for packet in &mut packets {
            packet[52] |= reserved;
            // RFC 1624: what is added to the header is taken from the checksum.
            let sum = plain_sum(&[packet[56], packet[57], !reserved, 0xff]);
            packet[56..58].copy_from_slice(&sum.to_be_bytes());
        }
        assert_eq!(groups(&packets), [[0], [1]], "reserved bits {reserved}");
    }
}

/// RFC 6864 §4.1: only of packets that are not to be fragmented does the identification mean nothing.
#[test]
fn identification_of_ipv4() {
    for tcp in [false, true] {
        let with = |fragment, identifications: [u16; 3]| {
            let mut shape = Shape::new(false, tcp);
            let packets = identifications.map(|identification| {
                (shape.fragment, shape.identification) = (fragment, identification);
                let packet = shape.packet(&[7; 100]);
                shape.sequence = shape.sequence.wrapping_add(100);
                packet
            });
            groups(&packets)
        };
        assert_eq!(with(DF, [7, 7, 7]), [[0, 1, 2]]);
        assert_eq!(with(0, [7, 7, 7]), [[0], [1], [2]]);
        for fragment in [0, DF] {
            assert_eq!(with(fragment, [0xffff, 0, 1]), [[0, 1, 2]]);
            assert_eq!(with(fragment, [7, 8, 8]), [vec![0, 1], vec![2]]);
            assert_eq!(with(fragment, [7, 9, 10]), [vec![0], vec![1, 2]]);
            assert_eq!(with(fragment, [7, 6, 5]), [[0], [1], [2]]);
        }
        assert_eq!(with(DF, [7, 7, 8]), [vec![0, 1], vec![2]]);
    }
}

#[test]
fn packets_with_wrong_checksums_pass_alone() {
    for shape in kinds() {
        let good = stream(&shape, &[101; 5]);
        for at in [shape.transport_at() + shape.checksum_at(), good[0].len() - 1, shape.headers_len(), 10] {
            if shape.v6 && at == 10 {
                continue;
            }
            for (bad, expected) in [
                (0, [vec![0], vec![1, 2, 3, 4]]),
                (3, [vec![0, 1, 2], vec![3]]),
                (4, [vec![0, 1, 2, 3], vec![4]]),
            ] {
                let mut packets = good.clone();
                packets[bad][at] ^= 1;
                let items = coalesce(&packets);
                let groups: Vec<_> = items.iter().map(|item| item.packets.clone()).collect();
                assert_eq!(groups[..2], expected, "octet {at} of packet {bad}");
                let alone = items.iter().find(|item| item.packets == [bad]).unwrap();
                assert_eq!((alone.header, &alone.octets), (VirtioHeader::default(), &packets[bad]));
            }
        }
    }
    // RFC 768: no checksum at all.
    let mut packets = stream(&Shape::new(false, false), &[100; 2]);
    packets.iter_mut().for_each(|packet| packet[26..28].fill(0));
    assert_eq!(groups(&packets), [[0], [1]]);
}

/// Both zeros of one's complement are valid, but splitting would write the usual one.
#[test]
fn the_unusual_zero_is_not_joined() {
    let mut shape = Shape::new(false, true);
    let mut octets = payload(100, 1);
    let sum = |octets: &[u8]| u16::from_be_bytes(shape.packet(octets)[36..38].try_into().unwrap());
    octets[..2].fill(0);
    let missing = sum(&octets);
    octets[..2].copy_from_slice(&missing.to_be_bytes());
    let mut packet = shape.packet(&octets);
    assert_eq!(packet[36..38], [0, 0]);
    shape.sequence = shape.sequence.wrapping_add(100);
    shape.identification = shape.identification.wrapping_add(1);
    let next = shape.packet(&octets);
    assert_eq!(groups(&[packet.clone(), next.clone()]), [[0, 1]]);
    packet[36..38].fill(0xff);
    assert_eq!(groups(&[packet, next]), [[0], [1]]);
    // The same of the IPv4 header, by an identification that makes up for the rest.
    for tcp in [false, true] {
        let mut shape = Shape::new(false, tcp);
        shape.identification = 0;
        let packet = shape.packet(&[7; 100]);
        shape.identification = u16::from_be_bytes([packet[10], packet[11]]);
        let mut packets = stream(&shape, &[100; 2]);
        assert_eq!((&packets[0][10..12], groups(&packets).len()), (&[0, 0][..], 1));
        packets[0][10..12].fill(0xff);
        assert_eq!(groups(&packets), [[0], [1]]);
    }
}

#[test]
fn odd_headers_are_not_joined_even_if_all_alike() {
    for tcp in [false, true] {
        let mut shape = Shape::new(false, tcp);
        shape.ip_options = vec![0; 4];
        assert_eq!(groups(&stream(&shape, &[100; 2])), [[0], [1]]);
        let mut shape = Shape::new(false, tcp);
        shape.fragment = 0x8000 | DF;
        assert_eq!(groups(&stream(&shape, &[100; 2])), [[0], [1]]);
        let mut shape = Shape::new(true, tcp);
        shape.extensions = vec![(60, vec![0; 7])];
        assert_eq!(groups(&stream(&shape, &[100; 2])), [[0], [1]]);
    }
    // A UDP length that is shorter than the packet, with a sum that fits the packet.
    let mut packets = stream(&Shape::new(true, false), &[100; 2]);
    for packet in &mut packets {
        packet[45] -= 8;
        let sum = plain_sum(&[packet[46], packet[47], 0, 8]);
        packet[46..48].copy_from_slice(&sum.to_be_bytes());
    }
    assert_eq!(groups(&packets), [[0], [1]]);
}

#[test]
fn nothing_without_payload_is_joined() {
    for shape in kinds() {
        assert_eq!(groups(&stream(&shape, &[0, 0, 0])), [[0], [1], [2]]);
    }
}

#[test]
fn nothing_overtakes_within_a_flow() {
    for shape in kinds() {
        let mut packets = stream(&shape, &[100; 4]);
        packets.insert(2, stream(&shape, &[0]).remove(0));
        assert_eq!(groups(&packets), [vec![0, 1], vec![2], vec![3, 4]], "without payload");
        // Of a fragment or a packet with extension headers nobody knows the flow.
        let mut other = shape.clone();
        (other.hosts, other.fragment, other.extensions) = ((7, 8, 8), 9, vec![(60, vec![0; 7])]);
        packets[2] = other.packet(&[1; 100]);
        assert_eq!(groups(&packets), [vec![0, 1], vec![2], vec![3, 4]]);
        // Another flow's, and other protocols', have no order with it.
        (other.fragment, other.extensions) = (DF, Vec::new());
        packets[2] = other.packet(&[]);
        assert_eq!(groups(&packets), [vec![0, 1, 3, 4], vec![2]]);
        packets[2] = other.packet(&[1; 50]);
        packets[2][if shape.v6 { 6 } else { 9 }] = 58;
        assert_eq!(groups(&packets), [vec![0, 1, 3, 4], vec![2]]);
    }
}

#[test]
fn flows_side_by_side() {
    for shape in kinds() {
        let streams: Vec<_> = (0..16)
            .map(|port| {
                let mut shape = shape.clone();
                shape.port = 1000 + port;
                stream(&shape, &[100; 8])
            })
            .collect();
        let packets: Vec<_> = (0..8).flat_map(|at| streams.iter().map(move |s| s[at].clone())).collect();
        let groups = groups(&packets);
        assert_eq!(groups.len(), 16);
        assert_eq!(groups[3], [3, 19, 35, 51, 67, 83, 99, 115]);
    }
}

#[test]
fn only_what_is_enabled_is_joined() {
    let mut coalescer = Coalescer::new();
    for (tcp, udp) in [(false, false), (true, false), (false, true), (true, true)] {
        for shape in kinds() {
            coalescer.set_enabled(tcp, udp);
            let items = coalesce_with(&mut coalescer, &stream(&shape, &[100; 3]));
            let is_enabled = if shape.tcp { tcp } else { udp };
            assert_eq!(items.len(), if is_enabled { 1 } else { 3 });
        }
    }
}

#[test]
fn nothing_is_left_from_batch_to_batch() {
    let mut coalescer = Coalescer::new();
    coalescer.set_enabled(true, true);
    for shape in kinds() {
        let packets = stream(&shape, &[100; 6]);
        for batch in packets.chunks(3) {
            let items = coalesce_with(&mut coalescer, batch);
            assert_eq!(items.len(), 1);
            assert_eq!(items[0].packets, [0, 1, 2]);
        }
    }
}
