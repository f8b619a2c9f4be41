//! "Destination unreachable" for packets to addresses that no device has (RFC 792, RFC 4443 §3.1).
//!
//! It seems to come from the unreachable address itself: Linux drops packets that arrive with one of its own
//! addresses as source, and this one is sure to be routed into the TUN device.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::packet::Header;

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
/// Longest error, so that it fits every path: RFC 1812 §4.3.2.3 and RFC 4443 §2.4(c).
const MAX_V4: usize = 576;
const MAX_V6: usize = 1280;

/// The error for `packet`, or nothing where RFC 1122 §3.2.2 or RFC 4443 §2.4(e) forbid one: for ICMP errors, for
/// fragments other than the first, and where the source is no single host.
pub(crate) fn unreachable(packet: &[u8]) -> Option<Vec<u8>> {
    let header = Header::parse(packet)?;
    let packet = packet.get(..header.total_len)?;
    if header.source.is_unspecified() || header.source.is_multicast() || !header.is_to_one_device() {
        return None;
    }
    match (header.source, header.destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => unreachable_v4(packet, source, destination),
        (IpAddr::V6(source), IpAddr::V6(destination)) => unreachable_v6(packet, source, destination),
        _ => None,
    }
}

fn unreachable_v4(packet: &[u8], source: Ipv4Addr, destination: Ipv4Addr) -> Option<Vec<u8>> {
    let header_len = usize::from(packet[0] & 0xf) * 4;
    let is_later_fragment = u16::from_be_bytes([packet[6], packet[7]]) & 0x1fff != 0;
    // Echo and echo reply get errors, everything else of ICMP is treated as an error.
    let is_error = packet[9] == ICMP && !matches!(packet.get(header_len), Some(0 | 8));
    if is_later_fragment || is_error {
        return None;
    }
    let quoted = &packet[..packet.len().min(MAX_V4 - 28)];
    let total_len = 28 + quoted.len();
    let mut error = Vec::with_capacity(total_len);
    error.extend([0x45, 0xc0]);
    error.extend((total_len as u16).to_be_bytes());
    error.extend([0, 0, 0, 0, 64, ICMP, 0, 0]);
    error.extend(destination.octets());
    error.extend(source.octets());
    let sum = checksum(&[&error]);
    error[10..12].copy_from_slice(&sum.to_be_bytes());
    // Type 3, code 1: host unreachable.
    error.extend([3, 1, 0, 0, 0, 0, 0, 0]);
    error.extend(quoted);
    let sum = checksum(&[&error[20..]]);
    error[22..24].copy_from_slice(&sum.to_be_bytes());
    Some(error)
}

fn unreachable_v6(packet: &[u8], source: Ipv6Addr, destination: Ipv6Addr) -> Option<Vec<u8>> {
    // Extension headers are not walked: a packet that hides an ICMPv6 error behind one gets an answer at most once.
    let is_error = packet[6] == ICMPV6 && packet.get(40).is_none_or(|kind| kind & 0x80 == 0);
    if is_error {
        return None;
    }
    let quoted = &packet[..packet.len().min(MAX_V6 - 48)];
    let len = (8 + quoted.len()) as u16;
    let mut error = Vec::with_capacity(48 + quoted.len());
    error.extend([0x60, 0, 0, 0]);
    error.extend(len.to_be_bytes());
    error.extend([ICMPV6, 64]);
    error.extend(destination.octets());
    error.extend(source.octets());
    // Type 1, code 3: address unreachable.
    error.extend([1, 3, 0, 0, 0, 0, 0, 0]);
    error.extend(quoted);
    let sum = checksum(&[
        &error[8..40],
        &u32::from(len).to_be_bytes(),
        &u32::from(ICMPV6).to_be_bytes(),
        &error[40..],
    ]);
    error[42..44].copy_from_slice(&sum.to_be_bytes());
    Some(error)
}

/// The Internet checksum (RFC 1071) over parts, all but the last of even length.
fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u32;
    for part in parts {
        for word in part.chunks(2) {
            sum += u32::from(word[0]) << 8 | word.get(1).map_or(0, |b| u32::from(*b));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::packets::{icmp_echo, udp};

    #[test]
    fn errors_quote_the_packet_and_sum_to_zero() {
        let packet = udp("10.0.0.1", "10.0.0.9", b"hello");
        let error = unreachable(&packet).unwrap();
        let header = Header::parse(&error).unwrap();
        assert_eq!((header.source, header.total_len), ("10.0.0.9".parse().unwrap(), error.len()));
        assert_eq!((checksum(&[&error[..20]]), checksum(&[&error[20..]])), (0, 0));
        assert_eq!((error[20], error[21], &error[28..]), (3, 1, &packet[..]));
        assert_eq!(unreachable(&error), None, "no error for an error");

        let packet = udp("fd00::1", "fd00::9", &[7; 1400]);
        let error = unreachable(&packet).unwrap();
        assert_eq!(error.len(), MAX_V6);
        assert_eq!(checksum(&[&error[8..40], &error[4..6], &[0, ICMPV6], &error[40..]]), 0);
        assert_eq!((error[40], error[41]), (1, 3));
        assert_eq!(unreachable(&error), None);
        assert!(unreachable(&icmp_echo("10.0.0.1", "10.0.0.9", 1, 1)).is_some(), "ping gets an answer");
    }

    #[test]
    fn no_error_where_none_is_due() {
        assert_eq!(unreachable(&udp("10.0.0.1", "224.0.0.1", b"")), None);
        assert_eq!(unreachable(&udp("0.0.0.0", "10.0.0.9", b"")), None);
        let mut fragment = udp("10.0.0.1", "10.0.0.9", b"hello");
        fragment[7] = 1;
        assert_eq!(unreachable(&fragment), None);
        assert_eq!(unreachable(&[]), None);
    }
}
