//! Which queue of the TUN device the packets of a flow are written to. The kernel lets the host's packets of a flow come
//! from the queue that the flow's others were last written to, so this spreads flows over threads, also those of one
//! peer, and keeps each on one thread and thereby in order.

use std::hash::Hasher as _;

use rustc_hash::FxHasher;

const TCP: u8 = 6;
const UDP: u8 = 17;

/// A number below `queues`, the same for all packets of a flow, and for the flow's other direction.
pub(super) fn queue_of(packet: &[u8], queues: usize) -> usize {
    if queues <= 1 { 0 } else { (flow_hash(packet) % queues as u64) as usize }
}

/// Of addresses, protocol and ports; without ports for fragments, of which only the first has them, and for whatever
/// else does not have them in the usual place.
fn flow_hash(packet: &[u8]) -> u64 {
    let parts = match packet.first().map(|octet| octet >> 4) {
        Some(4) => v4_parts(packet),
        Some(6) => v6_parts(packet),
        _ => None,
    };
    let Some((addresses, protocol, ports)) = parts else { return 0 };
    let mut hasher = FxHasher::default();
    // Sums are the same in both directions.
    hasher.write_u64(addresses);
    hasher.write_u64(u64::from(protocol) << 32 | u64::from(ports));
    let hash = hasher.finish();
    hash ^ (hash >> 32)
}

type Parts = (u64, u8, u32);

fn v4_parts(packet: &[u8]) -> Option<Parts> {
    let header = packet.first_chunk::<20>()?;
    let number = |at: usize| header.get(at..at + 4).map_or(0, number);
    let is_fragment = u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0;
    let transport = packet.get(usize::from(header[0] & 0xf) * 4..);
    Some((number(12) + number(16), header[9], ports(header[9], transport.filter(|_| !is_fragment))))
}

fn v6_parts(packet: &[u8]) -> Option<Parts> {
    let (header, transport) = packet.split_first_chunk::<40>()?;
    let addresses = header[8..].chunks_exact(4).map(number).sum();
    Some((addresses, header[6], ports(header[6], Some(transport))))
}

fn ports(protocol: u8, transport: Option<&[u8]>) -> u32 {
    match transport.and_then(|transport| transport.first_chunk::<4>()) {
        Some([a, b, c, d]) if matches!(protocol, TCP | UDP) => {
            u32::from(u16::from_be_bytes([*a, *b])) + u32::from(u16::from_be_bytes([*c, *d]))
        }
        _ => 0,
    }
}

fn number(octets: &[u8]) -> u64 {
    octets.iter().fold(0, |number, octet| number << 8 | u64::from(*octet))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests of packets that they have made")]
mod tests {
    use std::net::IpAddr;

    use super::*;

    fn packet(source: &str, destination: &str, protocol: u8, ports: [u16; 2]) -> Vec<u8> {
        let mut packet = vec![0; 60];
        let start = match (source.parse().unwrap(), destination.parse().unwrap()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                (packet[0], packet[9]) = (0x45, protocol);
                packet[12..16].copy_from_slice(&source.octets());
                packet[16..20].copy_from_slice(&destination.octets());
                20
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                (packet[0], packet[6]) = (0x60, protocol);
                packet[8..24].copy_from_slice(&source.octets());
                packet[24..40].copy_from_slice(&destination.octets());
                40
            }
            _ => unreachable!("one family"),
        };
        packet[start..start + 2].copy_from_slice(&ports[0].to_be_bytes());
        packet[start + 2..start + 4].copy_from_slice(&ports[1].to_be_bytes());
        packet
    }

    const PAIRS: [[&str; 2]; 2] = [["100.64.0.1", "100.64.0.2"], ["fd00:1::1", "fd00:1::2"]];

    #[test]
    fn both_directions_have_one_queue() {
        for [a, b] in PAIRS {
            for protocol in [1, TCP, UDP, 132] {
                for port in 0..200 {
                    let there = packet(a, b, protocol, [40_000 + port, 443]);
                    let back = packet(b, a, protocol, [443, 40_000 + port]);
                    assert_eq!(queue_of(&there, 7), queue_of(&back, 7));
                }
            }
        }
    }

    #[test]
    fn flows_of_one_peer_are_spread() {
        for [a, b] in PAIRS {
            for queues in [2, 3, 8] {
                let mut counts = vec![0; queues];
                for port in 0..1000 {
                    counts[queue_of(&packet(a, b, TCP, [40_000 + port, 443]), queues)] += 1;
                }
                let fair = 1000 / queues;
                assert!(counts.iter().all(|count| (fair / 2..fair * 2).contains(count)), "{counts:?}");
            }
        }
    }

    #[test]
    fn fragments_of_a_packet_have_one_queue() {
        let mut first = packet(PAIRS[0][0], PAIRS[0][1], UDP, [1, 2]);
        first[6] = 0x20;
        let mut second = packet(PAIRS[0][0], PAIRS[0][1], UDP, [0x4242, 0x1717]);
        second[7] = 185;
        assert_eq!(queue_of(&first, 8), queue_of(&second, 8));
    }

    #[test]
    fn anything_has_a_queue() {
        for len in 0..60 {
            for first in [0, 0x45, 0x4f, 0x60, 0xff] {
                let mut packet = vec![0x11; len];
                if let Some(octet) = packet.first_mut() {
                    *octet = first;
                }
                assert!(queue_of(&packet, 3) < 3);
            }
        }
    }
}
