//! What a packet is to the coalescer: the flow that it belongs to, and whether it may be joined with others of it.

use std::ops::Range;

use super::checksum::Sum;
use super::{
    ACK, PSH, TCP, TCP_CHECKSUM, TCP_FLAGS, TCP_HEADER_LEN, UDP, UDP_CHECKSUM, UDP_HEADER_LEN, V4_HEADER_LEN,
    V6_HEADER_LEN,
};

/// RFC 791 §3.1: "don't fragment", and what makes a fragment.
const DONT_FRAGMENT: u16 = 0x4000;
const FRAGMENT: u16 = 0x3fff;

/// What to do with a packet.
pub(super) enum Class {
    /// Let it pass: no flow has an order with it.
    Alone,
    /// Let it pass behind all that came before: it may belong to any flow.
    Unknown,
    /// Let it pass behind what came before of its flow.
    Last(Flow),
    /// Join it, if it fits.
    Joinable(Candidate),
}

/// Protocol, addresses and ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Flow {
    ports: [u8; 4],
    protocol: u8,
    /// IPv4's are in the first 8 octets.
    addresses: [u64; 4],
}

impl Flow {
    #[inline]
    pub(super) fn protocol(&self) -> u8 {
        self.protocol
    }
}

/// All of the headers that must not differ between packets to be joined, but for TCP's options.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fixed {
    /// IPv4: type of service, fragmentation, time to live. IPv6: version, traffic class, flow label, hop limit.
    ip: u64,
    /// Acknowledgment, data offset, flags but PSH, window.
    tcp: u64,
    urgent: [u8; 2],
    is_v6: bool,
}

/// A packet that may be joined with others.
pub(super) struct Candidate {
    pub(super) flow: Flow,
    pub(super) fixed: Fixed,
    /// Where the transport header starts.
    pub(super) transport: u8,
    /// Octets of all headers.
    pub(super) headers: u8,
    /// Octets behind the headers, at least 1.
    pub(super) payload: u16,
    /// TCP's sequence number; 0 of UDP.
    pub(super) sequence: u32,
    /// IPv4's; 0 of IPv6.
    pub(super) identification: u16,
    /// Whether the identification means nothing (RFC 6864 §4.1).
    pub(super) is_atomic: bool,
    /// Whether none may follow: PSH is set.
    pub(super) is_last: bool,
}

/// An IP header as far as the transport header.
struct Network {
    addresses: [u64; 4],
    fixed: u64,
    transport: usize,
    protocol: u8,
    identification: u16,
    is_atomic: bool,
    /// Whether nothing about this header is against joining.
    is_plain: bool,
}

impl Class {
    /// Of `packet`, while super-packets of TCP and of UDP are wanted or not.
    #[inline]
    pub(super) fn of(packet: &[u8], tcp: bool, udp: bool) -> Self {
        let is_wanted = |protocol| protocol == TCP && tcp || protocol == UDP && udp;
        let network = match packet.first() {
            Some(octet) if octet >> 4 == 4 => {
                let Some(header) = packet.first_chunk::<V4_HEADER_LEN>() else { return Self::Alone };
                if !is_wanted(header[9]) {
                    return Self::Alone;
                }
                Network::v4(header, packet.len())
            }
            Some(octet) if octet >> 4 == 6 => {
                let Some(header) = packet.first_chunk::<V6_HEADER_LEN>() else { return Self::Alone };
                match header[6] {
                    protocol @ (TCP | UDP) if !is_wanted(protocol) => return Self::Alone,
                    TCP | UDP => Network::v6(header, packet.len()),
                    // Hop-by-hop, routing, fragment, authentication, destination, mobility (RFC 8200 §4).
                    0 | 43 | 44 | 51 | 60 | 135 => None,
                    _ => return Self::Alone,
                }
            }
            _ => return Self::Alone,
        };
        match network {
            Some(network) => Self::of_transport(&network, packet),
            None => Self::Unknown,
        }
    }

    #[inline]
    fn of_transport(network: &Network, packet: &[u8]) -> Self {
        let Some(segment) = packet.get(network.transport..) else { return Self::Unknown };
        let Some(ports) = segment.first_chunk::<4>() else { return Self::Unknown };
        let flow = Flow { ports: *ports, protocol: network.protocol, addresses: network.addresses };
        let mut candidate = Candidate {
            flow,
            fixed: Fixed {
                ip: network.fixed,
                tcp: 0,
                urgent: [0; 2],
                is_v6: network.transport == V6_HEADER_LEN,
            },
            transport: network.transport as u8,
            headers: 0,
            payload: 0,
            sequence: 0,
            identification: network.identification,
            is_atomic: network.is_atomic,
            is_last: false,
        };
        let header_len = if network.protocol == TCP {
            let Some(tcp) = segment.first_chunk::<TCP_HEADER_LEN>() else { return Self::Unknown };
            // Neither reserved bits nor the fourth of ECN's (RFC 9293 §3.1).
            let is_joinable = tcp[12] & 0xf == 0 && tcp[TCP_FLAGS] & !PSH == ACK;
            if !is_joinable {
                return Self::Last(flow);
            }
            candidate.sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
            candidate.fixed.tcp = u64::from_be_bytes([
                tcp[8],
                tcp[9],
                tcp[10],
                tcp[11],
                tcp[12],
                tcp[TCP_FLAGS] & !PSH,
                tcp[14],
                tcp[15],
            ]);
            candidate.fixed.urgent = [tcp[18], tcp[19]];
            candidate.is_last = tcp[TCP_FLAGS] & PSH != 0;
            usize::from(tcp[12] >> 4) * 4
        } else {
            let Some(udp) = segment.first_chunk::<UDP_HEADER_LEN>() else { return Self::Unknown };
            let len = usize::from(u16::from_be_bytes([udp[4], udp[5]]));
            if len != segment.len() || [udp[6], udp[7]] == [0, 0] {
                return Self::Last(flow);
            }
            UDP_HEADER_LEN
        };
        let is_joinable = network.is_plain && header_len < segment.len();
        if !is_joinable || network.protocol == TCP && header_len < TCP_HEADER_LEN {
            return Self::Last(flow);
        }
        candidate.headers = (network.transport + header_len) as u8;
        candidate.payload = (segment.len() - header_len) as u16;
        Self::Joinable(candidate)
    }
}

impl Network {
    /// Nothing if the ports are not to be found behind `header` of a packet of `len` octets.
    #[inline]
    fn v4(header: &[u8; V4_HEADER_LEN], len: usize) -> Option<Self> {
        let u16_at = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
        let fragmentation = u16_at(6);
        let transport = usize::from(header[0] & 0xf) * 4;
        if fragmentation & FRAGMENT != 0 || transport < V4_HEADER_LEN || usize::from(u16_at(2)) != len {
            return None;
        }
        let addresses = u64::from_ne_bytes(*header.last_chunk::<8>()?);
        let [fragments, _] = fragmentation.to_be_bytes();
        Some(Self {
            addresses: [addresses, 0, 0, 0],
            fixed: u64::from_be_bytes([0, 0, 0, 0, 0, header[1], fragments, header[8]]),
            transport,
            protocol: header[9],
            identification: u16_at(4),
            is_atomic: fragmentation == DONT_FRAGMENT,
            is_plain: transport == V4_HEADER_LEN && fragmentation & !DONT_FRAGMENT == 0,
        })
    }

    #[inline]
    fn v6(header: &[u8; V6_HEADER_LEN], len: usize) -> Option<Self> {
        if usize::from(u16::from_be_bytes([header[4], header[5]])) + V6_HEADER_LEN != len {
            return None;
        }
        let (words, _) = header.as_chunks::<8>();
        let [_, addresses @ ..] = words else { return None };
        let mut all = [0; 4];
        for (to, address) in all.iter_mut().zip(addresses) {
            *to = u64::from_ne_bytes(*address);
        }
        Some(Self {
            addresses: all,
            fixed: u64::from_be_bytes([0, 0, 0, header[0], header[1], header[2], header[3], header[7]]),
            transport: V6_HEADER_LEN,
            protocol: header[6],
            identification: 0,
            is_atomic: true,
            is_plain: true,
        })
    }
}

impl Candidate {
    /// The sequence number of what may follow; 0 of UDP.
    #[inline]
    pub(super) fn next_sequence(&self) -> u32 {
        if self.flow.protocol == TCP { self.sequence.wrapping_add(self.payload.into()) } else { 0 }
    }

    /// Where TCP's options are in the packet.
    #[inline]
    pub(super) fn options(&self) -> Range<usize> {
        let fixed_len = if self.flow.protocol == TCP { TCP_HEADER_LEN } else { UDP_HEADER_LEN };
        usize::from(self.transport) + fixed_len..self.headers.into()
    }

    /// Whether the checksums of `packet`, which is this one or has its shape, are valid, and what splitting would
    /// write: of the two zeros of one's complement only the usual one.
    #[inline]
    pub(super) fn is_intact(&self, packet: &[u8]) -> bool {
        let Some((ip, segment)) = packet.split_at_checked(self.transport.into()) else { return false };
        let addresses = if self.fixed.is_v6 {
            &ip[8..]
        } else {
            if !Sum::of(ip).is_valid() || ip[10..12] == [0xff, 0xff] {
                return false;
            }
            &ip[12..]
        };
        let is_usual = match self.flow.protocol {
            TCP => segment[TCP_CHECKSUM..TCP_CHECKSUM + 2] != [0xff, 0xff],
            _ => segment[UDP_CHECKSUM..UDP_CHECKSUM + 2] != [0, 0],
        };
        let pseudo = Sum::of(addresses).u16(self.flow.protocol.into()).u16(segment.len() as u16);
        is_usual && pseudo.octets(segment).is_valid()
    }
}
