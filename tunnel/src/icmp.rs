//! ICMP errors: "unreachable" for addresses that no device has, "too big" for packets that the path does not take (RFC
//! 792, 1191, 4443 §3.1 and §3.2). They seem to come from the packet's destination: Linux drops what arrives from one
//! of its own addresses, and this one is sure to be routed into the TUN device.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::offload::Sum;
use crate::packet::{Header, is_to_one_device};

pub(crate) const ICMP: u8 = 1;
pub(crate) const ICMPV6: u8 = 58;
/// Longest error, so that it fits every path: RFC 1812 §4.3.2.3 and RFC 4443 §2.4(c). No path has to take larger
/// packets than these, so no smaller ones are called too big.
const MAX_V4: usize = 576;
const MAX_V6: usize = 1280;

/// Type and code in the family of the packet, and the four octets after the checksum.
struct Message {
    v4: [u8; 2],
    v6: [u8; 2],
    rest: u32,
}

/// What is to become of a packet that is larger than the path takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TooBig {
    /// Its sender expects it to arrive: send it all the same, and let the outer datagram be fragmented.
    SendInFragments,
    /// Drop it, and give this packet to the TUN device.
    Error(Vec<u8>),
    /// Drop it: it is owed no error.
    Drop,
}

/// "Host unreachable" or "address unreachable" for `packet`, or nothing where none is due.
pub(crate) fn unreachable(packet: &[u8]) -> Option<Vec<u8>> {
    error(packet, &Message { v4: [3, 1], v6: [1, 3], rest: 0 })
}

/// What to do with `packet`, which is larger than `mtu`, the inner size that the path takes in one datagram.
///
/// IPv4 packets with DF and IPv6 packets get an error with the MTU, unless it is of no use because they are no longer
/// than what every path takes, 576 or 1,280 octets. Those, and IPv4 packets without DF, are sent in fragments.
pub fn too_big(packet: &[u8], mtu: u16) -> TooBig {
    let Some(header) = Header::parse(packet) else { return TooBig::Drop };
    let is_v4 = header.source.is_ipv4();
    let mtu = mtu.max(if is_v4 { MAX_V4 } else { MAX_V6 } as u16);
    if may_be_fragmented(packet) || header.total_len <= usize::from(mtu) {
        return TooBig::SendInFragments;
    }
    error(packet, &Message { v4: [3, 4], v6: [2, 0], rest: mtu.into() }).map_or(TooBig::Drop, TooBig::Error)
}

/// Whether a packet is IPv4 without DF: routers may fragment it.
pub(crate) fn may_be_fragmented(packet: &[u8]) -> bool {
    matches!(packet, [first, _, _, _, _, _, flags, ..] if first >> 4 == 4 && flags & 0x40 == 0)
}

/// An error for `packet`, or nothing where RFC 1122 §3.2.2 or RFC 4443 §2.4(e) forbid one: for ICMP errors, for
/// fragments other than the first, and where the source is no single host.
fn error(packet: &[u8], message: &Message) -> Option<Vec<u8>> {
    let header = Header::parse(packet)?;
    let packet = packet.get(..header.total_len)?;
    if header.source.is_unspecified() || header.source.is_multicast() || !is_to_one_device(header.destination)
    {
        return None;
    }
    match (header.source, header.destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => error_v4(packet, source, destination, message),
        (IpAddr::V6(source), IpAddr::V6(destination)) => error_v6(packet, source, destination, message),
        _ => None,
    }
}

fn error_v4(packet: &[u8], source: Ipv4Addr, destination: Ipv4Addr, message: &Message) -> Option<Vec<u8>> {
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
    error.extend(message.v4);
    error.extend([0, 0]);
    error.extend(message.rest.to_be_bytes());
    error.extend(quoted);
    let sum = checksum(&[&error[20..]]);
    error[22..24].copy_from_slice(&sum.to_be_bytes());
    Some(error)
}

fn error_v6(packet: &[u8], source: Ipv6Addr, destination: Ipv6Addr, message: &Message) -> Option<Vec<u8>> {
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
    error.extend(message.v6);
    error.extend([0, 0]);
    error.extend(message.rest.to_be_bytes());
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
pub(crate) fn checksum(parts: &[&[u8]]) -> u16 {
    u16::from_be_bytes(parts.iter().fold(Sum::ZERO, |sum, part| sum.octets(part)).checksum())
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

    #[test]
    fn too_big_tells_the_mtu() {
        let mut packet = udp("10.0.0.1", "10.0.0.9", &[7; 1400]);
        assert_eq!(too_big(&packet, 1300), TooBig::SendInFragments, "without DF");
        packet[6] = 0x40;
        let TooBig::Error(error) = too_big(&packet, 1300) else { panic!("no error") };
        assert_eq!((error.len(), checksum(&[&error[..20]]), checksum(&[&error[20..]])), (MAX_V4, 0, 0));
        assert_eq!((&error[20..22], &error[24..28]), (&[3, 4][..], &1300u32.to_be_bytes()[..]));
        assert_eq!(error[28..], packet[..MAX_V4 - 28]);
        assert_eq!(Header::parse(&error).unwrap().destination, "10.0.0.1".parse::<IpAddr>().unwrap());
        let TooBig::Error(error) = too_big(&packet, 200) else { panic!("no error") };
        assert_eq!(error[24..28], 576u32.to_be_bytes(), "never below");
        packet[7] = 1;
        assert_eq!(too_big(&packet, 1300), TooBig::Drop, "a later fragment");
        let mut small = udp("10.0.0.1", "10.0.0.9", &[7; 500]);
        small[6] = 0x40;
        assert_eq!(too_big(&small, 200), TooBig::SendInFragments, "every path must take it");

        let packet = udp("fd00::1", "fd00::9", &[7; 1400]);
        let TooBig::Error(error) = too_big(&packet, 1300) else { panic!("no error") };
        assert_eq!(error.len(), MAX_V6);
        assert_eq!(checksum(&[&error[8..40], &error[4..6], &[0, ICMPV6], &error[40..]]), 0);
        assert_eq!((&error[40..42], &error[44..48]), (&[2, 0][..], &1300u32.to_be_bytes()[..]));
        assert_eq!(error[48..], packet[..MAX_V6 - 48]);
        let TooBig::Error(error) = too_big(&packet, 1200) else { panic!("no error") };
        assert_eq!(error[44..48], 1280u32.to_be_bytes(), "never below");
        let small = udp("fd00::1", "fd00::9", &[7; 1280 - 48]);
        assert_eq!(too_big(&small, 1200), TooBig::SendInFragments, "every path must take it");
        assert_eq!(too_big(&udp("fd00::1", "ff02::9", &[7; 1400]), 1300), TooBig::Drop);
        assert_eq!(too_big(&[], 1300), TooBig::Drop);
    }
}
