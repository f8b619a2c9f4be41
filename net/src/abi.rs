//! Socket addresses and control messages as Linux lays them out in memory, written and read as plain octets, so that
//! it needs neither unsafe code nor an allocation.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

/// A `sockaddr_in` or `sockaddr_in6`.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(4))]
pub(super) struct Address {
    octets: [u8; Address::ROOM],
    len: u32,
}

impl Address {
    /// Octets of the larger of the two.
    pub(super) const ROOM: usize = size_of::<libc::sockaddr_in6>();
    /// What the kernel writes into.
    pub(super) const EMPTY: Self = Self { octets: [0; Self::ROOM], len: Self::ROOM as u32 };

    pub(super) fn new(address: SocketAddr) -> Self {
        let mut this = Self::EMPTY;
        let mut put = Writer { octets: &mut this.octets, len: 0 };
        let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        put.octets(&(family as libc::sa_family_t).to_ne_bytes());
        put.octets(&address.port().to_be_bytes());
        match address {
            SocketAddr::V4(v4) => {
                put.octets(&v4.ip().octets());
                put.octets(&[0; 8]);
            }
            SocketAddr::V6(v6) => {
                put.octets(&v6.flowinfo().to_ne_bytes());
                put.octets(&v6.ip().octets());
                put.octets(&v6.scope_id().to_ne_bytes());
            }
        }
        this.len = put.len as u32;
        this
    }

    /// The address that the kernel has written; nothing if it is of neither family or too short.
    pub(super) fn read(&self) -> Option<SocketAddr> {
        let octets = self.octets.get(..self.len as usize)?;
        let (family, rest) = octets.split_first_chunk()?;
        let (port, rest) = rest.split_first_chunk()?;
        let port = u16::from_be_bytes(*port);
        match libc::c_int::from(libc::sa_family_t::from_ne_bytes(*family)) {
            libc::AF_INET => {
                let (ip, _) = rest.split_first_chunk::<4>()?;
                Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::from(*ip)), port))
            }
            libc::AF_INET6 => {
                let (flowinfo, rest) = rest.split_first_chunk()?;
                let (ip, rest) = rest.split_first_chunk::<16>()?;
                let (scope_id, _) = rest.split_first_chunk()?;
                let (flowinfo, scope_id) = (u32::from_ne_bytes(*flowinfo), u32::from_ne_bytes(*scope_id));
                Some(SocketAddrV6::new(Ipv6Addr::from(*ip), port, flowinfo, scope_id).into())
            }
            _ => None,
        }
    }

    pub(super) fn as_ptr(&self) -> *const u8 {
        self.octets.as_ptr()
    }

    pub(super) fn as_mut_ptr(&mut self) -> *mut u8 {
        self.octets.as_mut_ptr()
    }

    pub(super) fn len(&self) -> u32 {
        self.len
    }

    pub(super) fn set_len(&mut self, len: u32) {
        self.len = len;
    }
}

/// Control messages of one datagram: each a `cmsghdr` (a `size_t` and two `int`s) and its data, padded to a `size_t`.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(8))]
pub(super) struct Control {
    octets: [u8; Control::ROOM],
    len: usize,
}

const WORD: usize = size_of::<usize>();
/// Octets of a `cmsghdr`, which no data needs more alignment than.
const HEADER: usize = WORD + 2 * size_of::<libc::c_int>();

impl Control {
    /// Enough for the two that are asked for (ECN and the length of segments), and one more.
    pub(super) const ROOM: usize = 72;
    /// No control messages.
    pub(super) const EMPTY: Self = Self { octets: [0; Self::ROOM], len: 0 };

    /// Appends a message. One that finds no room is left out: there is room for all that Muster sends.
    pub(super) fn push(&mut self, level: libc::c_int, kind: libc::c_int, data: &[u8]) {
        let end = self.len + (HEADER + data.len()).next_multiple_of(WORD);
        let Some(octets) = self.octets.get_mut(self.len..end) else { return };
        let mut put = Writer { octets, len: 0 };
        put.octets(&(HEADER + data.len()).to_ne_bytes());
        put.octets(&level.to_ne_bytes());
        put.octets(&kind.to_ne_bytes());
        put.octets(data);
        self.len = end;
    }

    /// The messages, as level, type and data; ends at one that is malformed.
    pub(super) fn iter(&self) -> impl Iterator<Item = (libc::c_int, libc::c_int, &[u8])> {
        let mut rest = self.octets.get(..self.len).unwrap_or_default();
        std::iter::from_fn(move || {
            let (len, fields) = rest.split_first_chunk()?;
            let (level, fields) = fields.split_first_chunk()?;
            let (kind, _) = fields.split_first_chunk()?;
            let len = usize::from_ne_bytes(*len);
            let data = rest.get(HEADER..len)?;
            rest = rest.get(len.next_multiple_of(WORD)..).unwrap_or_default();
            Some((libc::c_int::from_ne_bytes(*level), libc::c_int::from_ne_bytes(*kind), data))
        })
    }

    pub(super) fn as_ptr(&self) -> *const u8 {
        self.octets.as_ptr()
    }

    pub(super) fn as_mut_ptr(&mut self) -> *mut u8 {
        self.octets.as_mut_ptr()
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn set_len(&mut self, len: usize) {
        self.len = len;
    }
}

/// The number in a control message: the kernel hands out an `int` or a single octet.
pub(super) fn number(data: &[u8]) -> Option<i32> {
    match data {
        [octet] => Some(i32::from(*octet)),
        _ => data.first_chunk().map(|octets| i32::from_ne_bytes(*octets)),
    }
}

struct Writer<'a> {
    octets: &'a mut [u8],
    len: usize,
}

impl Writer<'_> {
    fn octets(&mut self, octets: &[u8]) {
        let end = self.len + octets.len();
        if let Some(to) = self.octets.get_mut(self.len..end) {
            to.copy_from_slice(octets);
        }
        self.len = end;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use socket2::SockAddr;

    use super::*;

    #[test]
    fn addresses_are_laid_out_as_the_system_library_has_it() {
        let v6 = SocketAddrV6::new("fe80::1:2".parse().unwrap(), 51820, 7, 3);
        for address in ["192.0.2.1:51820".parse().unwrap(), "[2001:db8::1]:1".parse().unwrap(), v6.into()] {
            let ours = Address::new(address);
            let theirs = SockAddr::from(address);
            assert_eq!(ours.len(), theirs.len());
            assert_eq!(ours.read(), Some(address));
            assert_eq!(theirs.as_socket(), Some(address));
            let rustix = rustix::net::SocketAddrAny::from(address);
            assert_eq!(ours.len(), rustix.addr_len());
        }
    }

    #[test]
    fn what_is_no_address_is_none() {
        assert_eq!(Address::EMPTY.read(), None);
        let mut short = Address::new("[2001:db8::1]:1".parse().unwrap());
        short.set_len(27);
        assert_eq!(short.read(), None);
        short.set_len(1000);
        assert_eq!(short.read(), None);
    }

    #[test]
    fn control_messages_are_read_as_written_and_bounded() {
        let mut control = Control::EMPTY;
        control.push(1, 2, &[3]);
        control.push(4, 5, &[6, 7, 8, 9]);
        control.push(10, 11, &[]);
        let expected: Vec<(i32, i32, &[u8])> = vec![(1, 2, &[3]), (4, 5, &[6, 7, 8, 9]), (10, 11, &[])];
        assert_eq!(control.iter().collect::<Vec<_>>(), expected);
        control.push(12, 13, &[0; 64]);
        assert_eq!(control.iter().count(), 3);
        assert_eq!((number(&[3]), number(&5i32.to_ne_bytes()), number(&[1, 2])), (Some(3), Some(5), None));
    }

    proptest! {
        #[test]
        fn any_octets_can_be_read(octets: [u8; 32], len in 0usize..200, size in 0usize..64) {
            let mut control = Control::EMPTY;
            for (to, from) in control.octets.iter_mut().skip(8).zip(octets) {
                *to = from;
            }
            control.octets[..8].copy_from_slice(&size.to_ne_bytes());
            control.set_len(len);
            prop_assert!(control.iter().count() <= Control::ROOM / HEADER);
            let mut address = Address::EMPTY;
            address.octets.copy_from_slice(&octets[..28]);
            address.set_len(len as u32);
            let _ = address.read();
        }
    }
}
