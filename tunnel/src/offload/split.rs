//! Splits a super-packet of the TUN device into packets for the wire: TCP segmentation offload, UDP segmentation
//! offload, and the single packet whose checksum was left to the device.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::checksum::Sum;
use super::virtio::VirtioHeader;
use super::{
    CWR, FIN, PSH, RST, SYN, TCP, TCP_CHECKSUM, TCP_FLAGS, TCP_HEADER_LEN, UDP, UDP_CHECKSUM, UDP_HEADER_LEN,
    URG, V4_HEADER_LEN, V6_HEADER_LEN,
};

/// Why a packet of the TUN device cannot be sent on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OffloadError {
    /// Flags of the virtio header whose meaning nobody agreed on.
    #[error("virtio header has unknown flags {0:#04x}")]
    Flags(u8),
    /// A type of super-packet that the device was not told to use, or one that does not fit the packet.
    #[error("virtio header has segmentation type {0:#04x}, which is unknown or not the packet's")]
    Type(u8),
    /// A segment size of zero.
    #[error("virtio header asks for segments of 0 octets")]
    SegmentSize,
    /// The header of the packet, or a length in it, is no IPv4 or IPv6 header's.
    #[error("packet from the TUN device has no valid IP header")]
    Ip,
    /// The header of the packet's transport protocol is cut off or malformed.
    #[error("packet from the TUN device has no valid TCP or UDP header")]
    Transport,
    /// A fragment has neither segments nor a checksum of its own.
    #[error("virtio header asks to segment or to checksum a fragment")]
    Fragment,
    /// The place of the checksum is not in the packet, or not where the packet's protocol has it.
    #[error("virtio header puts the checksum at {start} + {offset}, where the packet has none")]
    Checksum {
        /// `csum_start`
        start: u16,
        /// `csum_offset`
        offset: u16,
    },
}

/// A packet, or super-packet of many segments, read from the TUN device, its header checked.
#[derive(Clone, Copy, Debug)]
pub struct SuperPacket<'a> {
    packet: &'a [u8],
    segments: usize,
    work: Work,
}

/// What is left to do before the packet can go out.
#[derive(Clone, Copy, Debug)]
enum Work {
    Nothing,
    /// Sum what is at `start` and behind, and put the checksum `at`.
    Checksum {
        start: usize,
        at: usize,
    },
    Split(Split),
}

#[derive(Clone, Copy, Debug)]
struct Split {
    /// Where the transport header starts.
    transport: usize,
    /// Octets of all headers.
    headers: usize,
    /// Octets of payload in each segment but the last.
    size: usize,
    /// Sum of the IPv4 header without what differs from segment to segment.
    ip_sum: Sum,
    /// Sum of pseudo-header and transport header without what differs from segment to segment.
    sum: Sum,
    protocol: Protocol,
}

#[derive(Clone, Copy, Debug)]
enum Protocol {
    Tcp { sequence: u32, flags: u8, urgent: u16 },
    Udp,
}

impl<'a> SuperPacket<'a> {
    /// Checks `packet`, which was read behind `header`. Nothing is believed that can be computed: neither the length
    /// of the headers nor the sum of the pseudo-header.
    ///
    /// Octets behind the end of a plain packet are cut off.
    ///
    /// # Errors
    /// If header and packet do not fit each other or are not valid.
    #[inline]
    pub fn parse(header: VirtioHeader, packet: &'a [u8]) -> Result<Self, OffloadError> {
        if header.flags & !(VirtioHeader::NEEDS_CSUM | VirtioHeader::DATA_VALID) != 0 {
            return Err(OffloadError::Flags(header.flags));
        }
        let len = total_len(packet).ok_or(OffloadError::Ip)?;
        let needs_checksum = header.flags & VirtioHeader::NEEDS_CSUM != 0;
        if header.gso_type == VirtioHeader::GSO_NONE && !needs_checksum {
            return Ok(Self { packet: &packet[..len], segments: 1, work: Work::Nothing });
        }
        if len != packet.len() {
            return Err(OffloadError::Ip);
        }
        if header.gso_type == VirtioHeader::GSO_NONE {
            return Ok(Self { packet, segments: 1, work: checksum_work(header, packet)? });
        }
        let split = Split::parse(header, packet)?;
        let segments = (packet.len() - split.headers).div_ceil(split.size).max(1);
        Ok(Self { packet, segments, work: Work::Split(split) })
    }

    /// The source address.
    #[inline]
    pub fn source(&self) -> IpAddr {
        self.address(12, 8)
    }

    /// The destination address.
    #[inline]
    pub fn destination(&self) -> IpAddr {
        self.address(16, 24)
    }

    #[inline]
    fn address(&self, v4_at: usize, v6_at: usize) -> IpAddr {
        if is_v6(self.packet) {
            let address = self.packet.get(v6_at..).and_then(|a| a.first_chunk::<16>());
            address.map_or(Ipv6Addr::UNSPECIFIED, |a| Ipv6Addr::from(*a)).into()
        } else {
            let address = self.packet.get(v4_at..).and_then(|a| a.first_chunk::<4>());
            address.map_or(Ipv4Addr::UNSPECIFIED, |a| Ipv4Addr::from(*a)).into()
        }
    }

    /// The two ECN bits (RFC 3168 §5), of all segments.
    #[inline]
    pub fn ecn(&self) -> u8 {
        if is_v6(self.packet) { self.packet[1] >> 4 & 3 } else { self.packet[1] & 3 }
    }

    /// The packet as it came, with the headers that all segments share.
    #[inline]
    pub fn octets(&self) -> &'a [u8] {
        self.packet
    }

    /// Number of segments, at least 1. Small segments can be more than a thousand.
    #[inline]
    pub fn segments(&self) -> usize {
        self.segments
    }

    /// Octets of the whole packet that segment `index` becomes; all but the last are equal.
    #[inline]
    pub fn segment_len(&self, index: usize) -> usize {
        match &self.work {
            Work::Nothing | Work::Checksum { .. } => self.packet.len(),
            Work::Split(split) => {
                let before = split.headers + index * split.size;
                split.headers + self.packet.len().saturating_sub(before).min(split.size)
            }
        }
    }

    /// The whole packet, if it is a single one with nothing to complete.
    #[inline]
    pub fn plain(&self) -> Option<&'a [u8]> {
        matches!(self.work, Work::Nothing).then_some(self.packet)
    }

    /// Writes segment `index` with all its headers and checksums.
    ///
    /// # Panics
    /// If `out` is not [`Self::segment_len`] long, or there is no such segment.
    #[inline]
    pub fn write_segment(&self, index: usize, out: &mut [u8]) {
        match &self.work {
            Work::Nothing => out.copy_from_slice(self.packet),
            Work::Checksum { start, at } => {
                out[..*start].copy_from_slice(&self.packet[..*start]);
                let sum = Sum::ZERO.copy(&self.packet[*start..], &mut out[*start..]);
                out[*at..*at + 2].copy_from_slice(&sum.nonzero_checksum());
            }
            Work::Split(split) => {
                split.write(self.packet, index, index + 1 == self.segments, out);
            }
        }
    }
}

impl SuperPacket<'_> {
    /// The same in segments that are no longer than `mtu`: of TCP that leaves its segmentation or checksum to this
    /// device, how long they are is this device's business. Nothing for all else, and for segments that are signed
    /// (RFC 2385, 5925).
    #[cold]
    pub(crate) fn narrowed(&self, mtu: usize) -> Option<Self> {
        let split = match self.work {
            Work::Split(split) => split,
            Work::Checksum { start, at } => {
                let gso_type =
                    if is_v6(self.packet) { VirtioHeader::GSO_TCPV6 } else { VirtioHeader::GSO_TCPV4 };
                let header = VirtioHeader {
                    flags: VirtioHeader::NEEDS_CSUM,
                    gso_type,
                    gso_size: u16::try_from(mtu).ok()?,
                    csum_start: u16::try_from(start).ok()?,
                    csum_offset: u16::try_from(at - start).ok()?,
                    ..VirtioHeader::default()
                };
                Split::parse(header, self.packet).ok()?
            }
            Work::Nothing => return None,
        };
        let size = mtu.checked_sub(split.headers).filter(|size| *size > 0)?;
        let Protocol::Tcp { flags, .. } = split.protocol else { return None };
        let options = self.packet.get(split.transport + TCP_HEADER_LEN..split.headers)?;
        if flags & (SYN | RST) != 0 || is_signed(options) {
            return None;
        }
        let segments = (self.packet.len() - split.headers).div_ceil(size).max(1);
        Some(Self { packet: self.packet, segments, work: Work::Split(Split { size, ..split }) })
    }

    /// Segment `index` by itself, to be kept.
    pub(crate) fn segment(&self, index: usize) -> Vec<u8> {
        let mut segment = vec![0; self.segment_len(index)];
        self.write_segment(index, &mut segment);
        segment
    }
}

/// The work on a single packet whose checksum was left to the device.
fn checksum_work(header: VirtioHeader, packet: &[u8]) -> Result<Work, OffloadError> {
    let error = OffloadError::Checksum { start: header.csum_start, offset: header.csum_offset };
    let start = usize::from(header.csum_start);
    let at = start + usize::from(header.csum_offset);
    let transport = Transport::find(packet).ok_or(OffloadError::Ip)?;
    if transport.is_fragment {
        return Err(OffloadError::Fragment);
    }
    let fits = match transport.protocol {
        TCP => start == transport.start && usize::from(header.csum_offset) == TCP_CHECKSUM,
        UDP => start == transport.start && usize::from(header.csum_offset) == UDP_CHECKSUM,
        _ => start >= transport.start,
    };
    if !fits || at + 2 > packet.len() {
        return Err(error);
    }
    Ok(Work::Checksum { start, at })
}

impl Split {
    fn parse(header: VirtioHeader, packet: &[u8]) -> Result<Self, OffloadError> {
        let (v6, protocol) = match header.gso_type & !VirtioHeader::GSO_ECN {
            VirtioHeader::GSO_TCPV4 => (false, TCP),
            VirtioHeader::GSO_TCPV6 => (true, TCP),
            VirtioHeader::GSO_UDP_L4 if header.gso_type == VirtioHeader::GSO_UDP_L4 => (is_v6(packet), UDP),
            _ => return Err(OffloadError::Type(header.gso_type)),
        };
        if header.gso_size == 0 {
            return Err(OffloadError::SegmentSize);
        }
        let found = Transport::find(packet).ok_or(OffloadError::Ip)?;
        if v6 != is_v6(packet) || found.protocol != protocol {
            return Err(OffloadError::Type(header.gso_type));
        }
        if found.is_fragment {
            return Err(OffloadError::Fragment);
        }
        let transport = found.start;
        let segment = packet.get(transport..).ok_or(OffloadError::Transport)?;
        let len = if protocol == TCP {
            let len = segment.get(12).map_or(0, |octet| usize::from(octet >> 4) * 4);
            if len < TCP_HEADER_LEN || len > segment.len() {
                return Err(OffloadError::Transport);
            }
            len
        } else {
            if segment.len() < UDP_HEADER_LEN {
                return Err(OffloadError::Transport);
            }
            UDP_HEADER_LEN
        };
        let checksum_at = if protocol == TCP { TCP_CHECKSUM } else { UDP_CHECKSUM };
        let needs_checksum = header.flags & VirtioHeader::NEEDS_CSUM != 0;
        if needs_checksum
            && (usize::from(header.csum_start), usize::from(header.csum_offset)) != (transport, checksum_at)
        {
            return Err(OffloadError::Checksum { start: header.csum_start, offset: header.csum_offset });
        }
        let size = usize::from(header.gso_size);
        let payload = segment.len() - len;

        let pseudo = if !found.is_routed {
            let addresses = if v6 { &packet[8..V6_HEADER_LEN] } else { &packet[12..V4_HEADER_LEN] };
            Sum::of(addresses).u16(protocol.into())
        } else if needs_checksum {
            // The pseudo-header has the final destination (RFC 8200 §8.1), which only the routing header knows:
            // whoever summed it did so with the length of the whole.
            Sum::of(&segment[checksum_at..checksum_at + 2]).u16(!(segment.len() as u16))
        } else {
            return Err(OffloadError::Ip);
        };
        let ip_sum = if v6 {
            Sum::ZERO
        } else {
            Sum::of(&packet[..2]).octets(&packet[6..10]).octets(&packet[12..transport])
        };
        let (sum, protocol) = if protocol == TCP {
            let flags = segment[TCP_FLAGS];
            if flags & (SYN | RST) != 0 && payload > size {
                return Err(OffloadError::Transport);
            }
            let sum = pseudo
                .octets(&segment[..4])
                .octets(&segment[8..12])
                .u16(u16::from(segment[12]) << 8)
                .octets(&segment[14..16])
                .octets(&segment[TCP_HEADER_LEN..len]);
            let sequence = u32::from_be_bytes([segment[4], segment[5], segment[6], segment[7]]);
            let urgent = u16::from_be_bytes([segment[18], segment[19]]);
            (sum, Protocol::Tcp { sequence, flags, urgent })
        } else {
            (pseudo.octets(&segment[..4]), Protocol::Udp)
        };
        Ok(Self { transport, headers: transport + len, size, ip_sum, sum, protocol })
    }

    #[inline]
    fn write(&self, packet: &[u8], index: usize, is_last: bool, out: &mut [u8]) {
        let offset = index * self.size;
        let start = self.headers + offset;
        let payload = &packet[start..packet.len().min(start + self.size)];
        let total_len = self.headers + payload.len();
        let (headers, out_payload) = out.split_at_mut(self.headers);
        headers.copy_from_slice(&packet[..self.headers]);
        let (ip, transport) = headers.split_at_mut(self.transport);
        if ip[0] >> 4 == 6 {
            ip[4..6].copy_from_slice(&((total_len - V6_HEADER_LEN) as u16).to_be_bytes());
        } else {
            let identification = u16::from_be_bytes([ip[4], ip[5]]).wrapping_add(index as u16);
            ip[2..4].copy_from_slice(&(total_len as u16).to_be_bytes());
            ip[4..6].copy_from_slice(&identification.to_be_bytes());
            let sum = self.ip_sum.u16(total_len as u16).u16(identification);
            ip[10..12].copy_from_slice(&sum.checksum());
        }
        let len = (total_len - self.transport) as u16;
        let sum = self.sum.u16(len).copy(payload, out_payload);
        match self.protocol {
            Protocol::Tcp { sequence, flags, urgent } => {
                let sequence = sequence.wrapping_add(offset as u32);
                let (flags, urgent) = segment_flags(flags, urgent, offset, is_last);
                transport[4..8].copy_from_slice(&sequence.to_be_bytes());
                transport[TCP_FLAGS] = flags;
                transport[18..20].copy_from_slice(&urgent.to_be_bytes());
                let sum = sum.u32(sequence).u16(flags.into()).u16(urgent);
                transport[TCP_CHECKSUM..TCP_CHECKSUM + 2].copy_from_slice(&sum.checksum());
            }
            Protocol::Udp => {
                transport[4..6].copy_from_slice(&len.to_be_bytes());
                // The length is summed twice, in the pseudo-header and in the header (RFC 768).
                let sum = sum.u16(len);
                transport[UDP_CHECKSUM..UDP_CHECKSUM + 2].copy_from_slice(&sum.nonzero_checksum());
            }
        }
    }
}

/// Flags and urgent pointer of the segment at `offset` of the payload.
#[inline]
fn segment_flags(mut flags: u8, mut urgent: u16, offset: usize, is_last: bool) -> (u8, u16) {
    if !is_last {
        flags &= !(FIN | PSH);
    }
    if offset != 0 {
        flags &= !CWR;
    }
    if offset != 0 && flags & URG != 0 {
        // The pointer counts from the segment's own sequence number (RFC 9293 §3.1).
        urgent = usize::from(urgent).saturating_sub(offset) as u16;
        if urgent == 0 {
            flags &= !URG;
        }
    }
    (flags, urgent)
}

#[inline]
fn is_v6(packet: &[u8]) -> bool {
    packet.first().is_some_and(|octet| octet >> 4 == 6)
}

/// Length of the packet by its own account, if its header is valid and all of it is there.
#[inline]
fn total_len(packet: &[u8]) -> Option<usize> {
    let header = packet.first_chunk::<V4_HEADER_LEN>()?;
    let len = match header[0] >> 4 {
        4 => {
            let len = usize::from(u16::from_be_bytes([header[2], header[3]]));
            let header_len = usize::from(header[0] & 0xf) * 4;
            (header_len >= V4_HEADER_LEN && len >= header_len).then_some(len)?
        }
        6 => {
            let len = usize::from(u16::from_be_bytes([header[4], header[5]]));
            // A jumbogram (RFC 2675 §3) has its length in an option and is too long for anything here.
            let is_jumbo = len == 0 && header[6] == HOP_BY_HOP && packet.len() > V6_HEADER_LEN;
            (!is_jumbo).then_some(V6_HEADER_LEN + len)?
        }
        _ => return None,
    };
    (len <= packet.len()).then_some(len)
}

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;
const MOBILITY: u8 = 135;

/// Where the transport header of a packet is.
struct Transport {
    start: usize,
    protocol: u8,
    is_fragment: bool,
    /// Whether the packet still has to visit others before its final destination.
    is_routed: bool,
}

impl Transport {
    /// In a packet whose length has been checked; nothing if a header is cut off.
    fn find(packet: &[u8]) -> Option<Self> {
        if is_v6(packet) {
            return Self::find_v6(packet);
        }
        let header = packet.first_chunk::<V4_HEADER_LEN>()?;
        let is_fragment = u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0;
        let start = usize::from(header[0] & 0xf) * 4;
        let is_routed = packet.get(V4_HEADER_LEN..start).is_some_and(has_source_route);
        Some(Self { start, protocol: header[9], is_fragment, is_routed })
    }

    /// Walks the extension headers (RFC 8200 §4). Each takes 8 octets at least, so a walk ends.
    fn find_v6(packet: &[u8]) -> Option<Self> {
        let mut found =
            Self { start: V6_HEADER_LEN, protocol: *packet.get(6)?, is_fragment: false, is_routed: false };
        loop {
            let extension = packet.get(found.start..)?;
            let len = match found.protocol {
                HOP_BY_HOP | DESTINATION | MOBILITY => usize::from(*extension.get(1)?) * 8 + 8,
                ROUTING => {
                    found.is_routed |= *extension.get(3)? != 0;
                    usize::from(*extension.get(1)?) * 8 + 8
                }
                FRAGMENT => {
                    // An "atomic" fragment (RFC 6946) is the whole packet.
                    let offset = extension.get(2..4)?;
                    found.is_fragment |= u16::from_be_bytes([offset[0], offset[1]]) & 0xfff9 != 0;
                    8
                }
                AUTHENTICATION => usize::from(*extension.get(1)?) * 4 + 8,
                _ => return Some(found),
            };
            found.protocol = *extension.first()?;
            found.start += len;
        }
    }
}

/// Whether one of the options of an IPv4 header is a source route (RFC 791 §3.1), loose or strict.
fn has_source_route(options: &[u8]) -> bool {
    const LOOSE: u8 = 131;
    const STRICT: u8 = 137;
    has_option(options, [LOOSE, STRICT])
}

/// Whether one of the options of a TCP header is a signature of the segment.
fn is_signed(options: &[u8]) -> bool {
    const MD5: u8 = 19;
    const AUTHENTICATION: u8 = 29;
    has_option(options, [MD5, AUTHENTICATION])
}

/// Whether one of `kinds` is among the options of an IPv4 or TCP header, which begin alike.
fn has_option(mut options: &[u8], kinds: [u8; 2]) -> bool {
    const END: u8 = 0;
    const NO_OPERATION: u8 = 1;
    while let [kind, rest @ ..] = options {
        options = match *kind {
            END => return false,
            NO_OPERATION => rest,
            kind if kinds.contains(&kind) => return true,
            _ => match rest.first() {
                Some(len @ 2..) => options.get(usize::from(*len)..).unwrap_or_default(),
                _ => return false,
            },
        };
    }
    false
}
