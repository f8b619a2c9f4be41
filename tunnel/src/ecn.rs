//! Explicit Congestion Notification through the tunnel (RFC 6040): the field is copied to the outer header on the way
//! in, and what routers marked in the outer header is merged into the inner one on the way out.

pub use muster_common::datagram::Ecn;

/// The field of the outer header for an inner packet with `inner`: normal mode, RFC 6040 §4.1.
#[inline]
pub const fn outer(inner: Ecn) -> Ecn {
    inner
}

/// The field with which an inner packet leaves the tunnel; `None` if it must be dropped: it tells of congestion to a
/// transport that would not understand. The table of RFC 6040 §4.2.
#[inline]
pub const fn inner(outer: Ecn, inner: Ecn) -> Option<Ecn> {
    match (inner, outer) {
        (Ecn::NotEct, Ecn::Ce) => None,
        (Ecn::Ect0 | Ecn::Ect1, Ecn::Ce) => Some(Ecn::Ce),
        (Ecn::Ect0, Ecn::Ect1) => Some(Ecn::Ect1),
        (inner, _) => Some(inner),
    }
}

/// Merges the outer header's field into `packet`, an inner IP packet; `false` if it must be dropped. Without ECN on
/// the outer header, which is the common case, it costs one comparison.
#[inline]
pub fn decapsulate(outer: Ecn, packet: &mut [u8]) -> bool {
    if outer == Ecn::NotEct {
        return true;
    }
    let arrived = of(packet);
    match inner(outer, arrived) {
        Some(leaves) if leaves != arrived => {
            set(packet, leaves);
            true
        }
        Some(_) => true,
        None => false,
    }
}

/// The field of an IP packet; [`Ecn::NotEct`] for anything else.
#[inline]
pub fn of(packet: &[u8]) -> Ecn {
    match packet {
        [first, second, ..] if first >> 4 == 4 => Ecn::from_bits(*second),
        [first, second, ..] if first >> 4 == 6 => Ecn::from_bits(*second >> 4),
        _ => Ecn::NotEct,
    }
}

/// Sets the field of an IP packet in place, and corrects the checksum of an IPv4 header by the difference (RFC 1624,
/// equation 3), so that a wrong one stays wrong. Does nothing to anything else.
pub fn set(packet: &mut [u8], ecn: Ecn) {
    match packet {
        [first, second, _, _, _, _, _, _, _, _, high, low, ..] if *first >> 4 == 4 => {
            let old = u16::from_be_bytes([*first, *second]);
            *second = *second & !3 | ecn.bits();
            let new = u16::from_be_bytes([*first, *second]);
            let mut sum = u32::from(!u16::from_be_bytes([*high, *low])) + u32::from(!old) + u32::from(new);
            sum = (sum & 0xffff) + (sum >> 16);
            sum = (sum & 0xffff) + (sum >> 16);
            [*high, *low] = (!(sum as u16)).to_be_bytes();
        }
        [first, second, ..] if *first >> 4 == 6 => *second = *second & !0x30 | ecn.bits() << 4,
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Ecn::*, *};
    use crate::{icmp::checksum, tests::packets::udp};

    const ALL: [Ecn; 4] = [NotEct, Ect0, Ect1, Ce];

    #[test]
    fn decapsulation_is_the_table_of_rfc_6040() {
        // Figure 4: a row for each inner field, a column for each outer one, both in the order of `ALL`.
        let table = [
            [Some(NotEct), Some(NotEct), Some(NotEct), None],
            [Some(Ect0), Some(Ect0), Some(Ect1), Some(Ce)],
            [Some(Ect1), Some(Ect1), Some(Ect1), Some(Ce)],
            [Some(Ce), Some(Ce), Some(Ce), Some(Ce)],
        ];
        for (arrived, row) in ALL.into_iter().zip(table) {
            assert_eq!(ALL.map(|outer| inner(outer, arrived)), row, "inner {arrived:?}");
            assert_eq!(outer(arrived), arrived);
            assert_eq!(Ecn::from_bits(0xfc | arrived.bits()), arrived);
        }
    }

    #[test]
    fn packets_are_marked_or_dropped() {
        for (source, destination) in [("10.0.0.1", "10.0.0.9"), ("fd00::1", "fd00::9")] {
            let mut packet = udp(source, destination, b"hello");
            let before = packet.clone();
            assert!(!decapsulate(Ce, &mut packet) && packet == before);
            assert!(decapsulate(Ect1, &mut packet) && packet == before);
            set(&mut packet, Ect0);
            assert!(decapsulate(NotEct, &mut packet) && of(&packet) == Ect0);
            assert!(decapsulate(Ect1, &mut packet) && of(&packet) == Ect1);
            assert!(decapsulate(Ce, &mut packet) && of(&packet) == Ce);
            assert!(decapsulate(Ect0, &mut packet) && of(&packet) == Ce);
        }
    }

    proptest! {
        #[test]
        fn ipv4_checksum_stays_right(mut header in any::<[u8; 20]>(), ecn in 0u8..4) {
            header[0] = 0x45;
            header[10..12].fill(0);
            let sum = checksum(&[&header]);
            header[10..12].copy_from_slice(&sum.to_be_bytes());
            let before = header;
            set(&mut header, Ecn::from_bits(ecn));
            prop_assert_eq!(of(&header).bits(), ecn);
            let updated = std::mem::take(&mut header[10]) as u16 * 256 + std::mem::take(&mut header[11]) as u16;
            prop_assert_eq!(updated, checksum(&[&header]));
            prop_assert_eq!((header[1] & !3, &header[2..10]), (before[1] & !3, &before[2..10]));
            prop_assert_eq!(&header[12..], &before[12..]);
        }

        #[test]
        fn ipv6_keeps_all_else(mut header in any::<[u8; 40]>(), ecn in 0u8..4) {
            header[0] = 0x60 | header[0] & 0xf;
            let mut before = header;
            set(&mut header, Ecn::from_bits(ecn));
            prop_assert_eq!(of(&header).bits(), ecn);
            before[1] = before[1] & !0x30 | ecn << 4;
            prop_assert_eq!(header, before);
        }

        #[test]
        fn any_octets(mut octets in prop::collection::vec(any::<u8>(), 0..48), outer in 0u8..4) {
            let len = octets.len();
            let is_ip = matches!(octets.first().map(|first| first >> 4), Some(4 | 6));
            let before = octets.clone();
            decapsulate(Ecn::from_bits(outer), &mut octets);
            prop_assert!(octets.len() == len && (is_ip || octets == before));
        }
    }
}
