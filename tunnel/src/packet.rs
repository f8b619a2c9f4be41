//! Inner packets: as much of IPv4 (RFC 791) and IPv6 (RFC 8200) headers as routing by address needs. Lengths are
//! checked before anything is believed.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::limits::PADDING;

/// What is known of a packet with a valid header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    /// Length of the whole packet by its own account; at most that of the octets it was read from.
    pub(crate) total_len: usize,
}

impl Header {
    /// Reads the header at the start of `octets`, which may be longer than the packet (padding).
    pub(crate) fn parse(octets: &[u8]) -> Option<Self> {
        let u16_at = |at: usize| octets.get(at..at + 2).map(|b| usize::from(b[0]) << 8 | usize::from(b[1]));
        let header = match octets.first()? >> 4 {
            4 => {
                let header_len = usize::from(octets[0] & 0xf) * 4;
                let total_len = u16_at(2)?;
                if header_len < 20 || total_len < header_len {
                    return None;
                }
                Self {
                    source: Ipv4Addr::from(*octets.get(12..)?.first_chunk::<4>()?).into(),
                    destination: Ipv4Addr::from(*octets.get(16..)?.first_chunk::<4>()?).into(),
                    total_len,
                }
            }
            6 => Self {
                source: Ipv6Addr::from(*octets.get(8..)?.first_chunk::<16>()?).into(),
                destination: Ipv6Addr::from(*octets.get(24..)?.first_chunk::<16>()?).into(),
                total_len: 40 + u16_at(4)?,
            },
            _ => return None,
        };
        (header.total_len <= octets.len()).then_some(header)
    }
}

/// Whether a destination can be one device: neither multicast, broadcast, link-local, loopback nor unspecified.
pub(crate) fn is_to_one_device(ip: IpAddr) -> bool {
    let link_local = match ip {
        IpAddr::V4(ip) => ip.is_broadcast() || ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    !(ip.is_multicast() || ip.is_unspecified() || ip.is_loopback() || link_local)
}

/// Length after padding: the next multiple of 16, but not beyond the path's MTU (the paper, §5.4.6).
pub(crate) fn padded_len(len: usize, mtu: usize) -> usize {
    len.next_multiple_of(PADDING).min(mtu).max(len)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn padding_stays_within_the_mtu() {
        assert_eq!(padded_len(0, 1420), 0);
        assert_eq!(padded_len(1, 1420), 16);
        assert_eq!(padded_len(64, 1420), 64);
        assert_eq!(padded_len(1409, 1420), 1420);
        assert_eq!(padded_len(1420, 1420), 1420);
        assert_eq!(padded_len(1500, 1420), 1500);
    }

    #[test]
    fn lengths_are_checked() {
        let mut v4 = [0; 24];
        v4[0] = 0x45;
        v4[3] = 24;
        v4[16..20].copy_from_slice(&[10, 0, 0, 1]);
        assert_eq!(Header::parse(&v4).unwrap().destination, IpAddr::from([10, 0, 0, 1]));
        for (at, value) in [(0, 0x44), (0, 0x55), (3, 19), (3, 25), (2, 1)] {
            let mut bad = v4;
            bad[at] = value;
            assert_eq!(Header::parse(&bad), None, "octet {at} = {value}");
        }
        let mut v6 = [0; 48];
        v6[0] = 0x60;
        v6[5] = 8;
        assert_eq!(Header::parse(&v6).unwrap().total_len, 48);
        assert_eq!(Header::parse(&v6[..47]), None);
        v6[5] = 9;
        assert_eq!(Header::parse(&v6), None);
    }

    proptest! {
        #[test]
        fn any_octets(first in any::<u8>(), mut octets in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = Header::parse(&octets);
            if let Some(octet) = octets.first_mut() {
                *octet = first;
            }
            if let Some(header) = Header::parse(&octets) {
                prop_assert!(header.total_len <= octets.len() && header.total_len >= 20);
            }
        }
    }
}
