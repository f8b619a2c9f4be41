//! Probes as inner packets: echo requests and their replies (RFC 792, RFC 4443 §4).

use std::net::IpAddr;

use super::SMALLEST_PROBE;
use crate::{
    icmp::{ICMP, ICMPV6, checksum},
    packet::Header,
};

/// An inner echo request to send: see [`probe_packet`]. Its datagram must have DF set (IPv4) or not be fragmented
/// (IPv6), and the packet must not be padded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Octets of the whole inner packet.
    pub size: u16,
    /// Identifier in the ICMP header; random.
    pub identifier: u16,
    /// Sequence number in the ICMP header.
    pub sequence: u16,
    /// First octets of the payload; random.
    pub nonce: u64,
}

/// Whether a packet to the peer makes probing worth while: it is longer than [`SMALLEST_PROBE`] and not an echo reply,
/// which may be this host's answer to the peer's own probe.
#[inline]
pub fn is_data(packet: &[u8]) -> bool {
    packet.len() > usize::from(SMALLEST_PROBE) && !may_be_echo_reply(packet)
}

/// Whether a packet is an echo reply or a fragment that may belong to one.
pub(crate) fn may_be_echo_reply(packet: &[u8]) -> bool {
    let octet = |at: usize| packet.get(at).copied().unwrap_or_default();
    match octet(0) >> 4 {
        4 if octet(9) == ICMP => {
            let is_later_fragment = octet(6) & 0x1f != 0 || octet(7) != 0;
            is_later_fragment || octet(usize::from(octet(0) & 0xf) * 4) == 0
        }
        6 if octet(6) == ICMPV6 => octet(40) == 129,
        // A fragment header (RFC 8200 §4.5).
        6 if octet(6) == 44 => octet(40) == ICMPV6,
        _ => false,
    }
}

/// An echo reply, as far as it is of use.
pub(super) struct EchoReply {
    identifier: u16,
    sequence: u16,
    nonce: u64,
    /// Length of the packet, unless it is a fragment.
    pub(super) whole_len: Option<usize>,
}

impl EchoReply {
    pub(super) fn parse(packet: &[u8]) -> Option<Self> {
        if !may_be_echo_reply(packet) {
            return None;
        }
        let header = Header::parse(packet)?;
        let (message, is_whole) = match packet {
            [first, _, _, _, _, _, high, low, ..] if first >> 4 == 4 => {
                let fragment = u16::from_be_bytes([*high, *low]) & 0x3fff;
                if fragment & 0x1fff != 0 {
                    return None;
                }
                (packet.get(usize::from(first & 0xf) * 4..)?, fragment == 0)
            }
            [_, _, _, _, _, _, 44, ..] => (packet.get(48..)?, false),
            _ => (packet.get(40..)?, true),
        };
        let [0 | 129, 0, _, _, id0, id1, seq0, seq1, nonce @ ..] = message else { return None };
        Some(Self {
            identifier: u16::from_be_bytes([*id0, *id1]),
            sequence: u16::from_be_bytes([*seq0, *seq1]),
            nonce: u64::from_be_bytes(*nonce.first_chunk()?),
            whole_len: is_whole.then_some(header.total_len),
        })
    }

    pub(super) fn answers(&self, probe: &Probe) -> bool {
        (self.identifier, self.sequence, self.nonce) == (probe.identifier, probe.sequence, probe.nonce)
    }
}

/// Appends the echo request of `probe` to `out`, with DF for IPv4: from a virtual address of this device to one of the
/// peer's, of the same family; nothing if they are not.
pub fn probe_packet(probe: &Probe, source: IpAddr, destination: IpAddr, out: &mut Vec<u8>) {
    let mut header = Vec::with_capacity(40);
    let (kind, pseudo_header) = match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            header.extend([0x45, 0]);
            header.extend(probe.size.to_be_bytes());
            header.extend([0, 0, 0x40, 0, 64, ICMP, 0, 0]);
            header.extend(source.octets());
            header.extend(destination.octets());
            let sum = checksum(&[&header]);
            header[10..12].copy_from_slice(&sum.to_be_bytes());
            (8, Vec::new())
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let len = probe.size.saturating_sub(40);
            header.extend([0x60, 0, 0, 0]);
            header.extend(len.to_be_bytes());
            header.extend([ICMPV6, 64]);
            header.extend(source.octets());
            header.extend(destination.octets());
            let pseudo_header = [&header[8..], &u32::from(len).to_be_bytes(), &[0, 0, 0, ICMPV6]].concat();
            (128, pseudo_header)
        }
        _ => return,
    };
    let start = out.len();
    let message = start + header.len();
    out.append(&mut header);
    out.extend([kind, 0, 0, 0]);
    out.extend(probe.identifier.to_be_bytes());
    out.extend(probe.sequence.to_be_bytes());
    out.extend(probe.nonce.to_be_bytes());
    out.resize(start + usize::from(probe.size), 0);
    let sum = checksum(&[&pseudo_header, out.get(message..).unwrap_or_default()]);
    if let Some(field) = out.get_mut(message + 2..message + 4) {
        field.copy_from_slice(&sum.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::{
        packets::{icmp_echo, ip, udp},
        path_mtu::reply,
    };

    #[test]
    fn packets_are_well_formed() {
        let probe = Probe { size: 1401, identifier: 0x1234, sequence: 7, nonce: 0x0102_0304_0506_0708 };
        let mut packet = vec![0xff; 3];
        probe_packet(&probe, "10.0.0.1".parse().unwrap(), "10.0.0.9".parse().unwrap(), &mut packet);
        let packet = &packet[3..];
        assert_eq!(packet.len(), 1401);
        assert_eq!((checksum(&[&packet[..20]]), checksum(&[&packet[20..]])), (0, 0));
        assert_eq!((packet[0], packet[6], packet[9], packet[20]), (0x45, 0x40, 1, 8));
        assert_eq!(packet[24..36], [0x12, 0x34, 0, 7, 1, 2, 3, 4, 5, 6, 7, 8]);

        let mut packet = Vec::new();
        probe_packet(&probe, "fd00::1".parse().unwrap(), "fd00::9".parse().unwrap(), &mut packet);
        assert_eq!((packet.len(), packet[40]), (1401, 128));
        assert_eq!(checksum(&[&packet[8..40], &packet[4..6], &[0, 58], &packet[40..]]), 0);
        assert_eq!(packet[44..56], [0x12, 0x34, 0, 7, 1, 2, 3, 4, 5, 6, 7, 8]);

        packet.clear();
        probe_packet(&probe, "fd00::1".parse().unwrap(), "10.0.0.9".parse().unwrap(), &mut packet);
        assert!(packet.is_empty());
    }

    #[test]
    fn answers_to_probes_are_no_data() {
        let large = [7; 1400];
        for (source, destination) in [("10.0.0.1", "10.0.0.9"), ("fd00::1", "fd00::9")] {
            assert!(is_data(&udp(source, destination, &large)));
            assert!(!is_data(&udp(source, destination, &large[..400])), "small");
            let mut packet = Vec::new();
            let probe = Probe { size: 1400, identifier: 1, sequence: 1, nonce: 1 };
            probe_packet(&probe, source.parse().unwrap(), destination.parse().unwrap(), &mut packet);
            assert!(is_data(&packet), "someone pings");
            let mut answer = reply(&packet);
            assert!(!is_data(&answer));
            if source.contains('.') {
                (answer[7], answer[20]) = (100, 99);
                assert!(!is_data(&answer), "a later fragment of one");
            }
        }
        let mut fragment = vec![58, 0, 0, 8, 0, 0, 0, 1];
        fragment.extend(large);
        assert!(!is_data(&ip("fd00::1", "fd00::9", 44, &fragment)));
        assert!(!is_data(&icmp_echo("10.0.0.1", "10.0.0.9", 1, 1)) && !is_data(&[]));
    }
}
