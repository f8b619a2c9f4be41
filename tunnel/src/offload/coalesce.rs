//! Joins packets of one flow into super-packets for the TUN device, as generic receive offload does in the kernel.
//! Payload stays where it is; only headers are rewritten. What cannot be joined passes untouched, at next to no cost.

use std::io::IoSlice;
use std::ops::Range;

use super::candidate::{Candidate, Class, Fixed, Flow};
use super::checksum::Sum;
use super::virtio::VirtioHeader;
use super::{PSH, TCP_CHECKSUM, TCP_FLAGS, UDP, UDP_CHECKSUM, V6_HEADER_LEN};

/// Most packets in one super-packet: what every kernel takes of UDP.
pub const MAX_PACKETS: usize = 64;
/// Most octets of a super-packet: what its header can say.
const MAX_LEN: usize = 65_535;
/// Flows that are watched at once. The packets of more still arrive, but in smaller super-packets.
const MAX_FLOWS: usize = 16;
/// IPv6 with the longest TCP header is longer than IPv4 without options is.
const MAX_HEADERS: usize = V6_HEADER_LEN + 60;

/// The header of a packet with nothing to segment or to complete.
const PLAIN: [u8; VirtioHeader::LEN] = [0; VirtioHeader::LEN];

/// Joins packets of one receive batch, which all lie in one buffer, into super-packets for the TUN device. Storage is
/// reused from batch to batch.
///
/// A packet joins the one before it of its flow if a super-packet of both would be split into exactly these two:
/// TCP with nothing but ACK and PSH set, next in sequence, all else of the headers equal; UDP of equal length, but for
/// a shorter last one; IPv4 without options and fragmentation, IPv6 without extension headers; and all checksums valid,
/// since the kernel will not look at them again. Order within a flow is kept; between flows, that of first packets.
#[derive(Debug)]
pub struct Coalescer {
    tcp: bool,
    udp: bool,
    packets: Vec<Packet>,
    groups: Vec<Group>,
    /// Groups that may still grow, at most [`MAX_FLOWS`], no two of one flow.
    open: Vec<Open>,
    /// The place in `open` that was hit last.
    recent: usize,
    /// The place in `open` to be taken next once all are in use.
    victim: usize,
}

#[derive(Clone, Debug)]
struct Packet {
    start: usize,
    end: usize,
    /// The next of the same group, unless this is its last.
    next: u32,
}

/// Packets that go out as one.
#[derive(Clone, Copy, Debug)]
struct Group {
    first: u32,
    last: u32,
    count: u32,
    /// Octets of the super-packet without a virtio header.
    len: u32,
    /// Octets of the headers of each packet, where the transport header starts among them, and octets of payload;
    /// all of them unset in a packet alone.
    headers: u16,
    transport: u16,
    size: u16,
    protocol: u8,
}

/// The end of a group that may still grow.
#[derive(Clone, Copy, Debug)]
struct Open {
    flow: Flow,
    fixed: Fixed,
    group: u32,
    /// Sequence number that the next TCP segment has; 0 of UDP.
    sequence: u32,
    /// IPv4 identification of the last packet, and its distance to that of the one before.
    identification: u16,
    step: Option<u16>,
    /// Whether the checksums of the first packet have been verified, which is left until there is a second.
    is_verified: bool,
}

impl Default for Coalescer {
    fn default() -> Self {
        Self::new()
    }
}

impl Coalescer {
    /// Joins nothing until [`Self::set_enabled`] says what.
    pub fn new() -> Self {
        Self {
            tcp: false,
            udp: false,
            packets: Vec::new(),
            groups: Vec::new(),
            open: Vec::with_capacity(MAX_FLOWS),
            recent: 0,
            victim: 0,
        }
    }

    /// Sets which super-packets the TUN device takes, from the next [`Self::push`] on.
    pub fn set_enabled(&mut self, tcp: bool, udp: bool) {
        (self.tcp, self.udp) = (tcp, udp);
        self.open.clear();
    }

    /// Whether nothing has been pushed since the last [`Self::drain`].
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// Adds the inner packet at `packet` of `buffer`, in the order of arrival. A range beyond the buffer is ignored.
    #[inline]
    pub fn push(&mut self, buffer: &[u8], packet: Range<usize>) {
        let Some(octets) = buffer.get(packet.clone()) else {
            debug_assert!(false, "packet at {packet:?} of {} octets", buffer.len());
            return;
        };
        match Class::of(octets, self.tcp, self.udp) {
            Class::Alone => {}
            Class::Unknown => self.open.clear(),
            Class::Last(flow) => self.close(&flow),
            Class::Joinable(candidate) => return self.push_candidate(buffer, packet, octets, &candidate),
        }
        self.add_group(packet, None);
    }

    fn push_candidate(&mut self, buffer: &[u8], packet: Range<usize>, octets: &[u8], candidate: &Candidate) {
        if let Some(place) = self.find(&candidate.flow) {
            match self.join(place, buffer, octets, candidate) {
                Joined::Yes { is_full } => {
                    self.append(place, packet, candidate);
                    if is_full || candidate.is_last {
                        self.open.swap_remove(place);
                    }
                    return;
                }
                Joined::No => {
                    self.open.swap_remove(place);
                }
                Joined::Corrupt => {
                    self.open.swap_remove(place);
                    self.add_group(packet, None);
                    return;
                }
            }
        }
        let group = self.add_group(packet, Some(candidate));
        if candidate.is_last {
            return;
        }
        let open = Open {
            flow: candidate.flow,
            fixed: candidate.fixed,
            group,
            sequence: candidate.next_sequence(),
            identification: candidate.identification,
            step: None,
            is_verified: false,
        };
        if self.open.len() < MAX_FLOWS {
            self.recent = self.open.len();
            self.open.push(open);
        } else {
            self.victim = (self.victim + 1) % MAX_FLOWS;
            self.recent = self.victim;
            self.open[self.victim] = open;
        }
    }

    /// Whether `candidate` continues the open group at `place`.
    #[inline]
    fn join(&mut self, place: usize, buffer: &[u8], octets: &[u8], candidate: &Candidate) -> Joined {
        let open = &mut self.open[place];
        let group = &self.groups[open.group as usize];
        let len = group.len as usize + usize::from(candidate.payload);
        let step = candidate.identification.wrapping_sub(open.identification);
        let fits = open.fixed == candidate.fixed
            && open.sequence == candidate.sequence
            && candidate.payload <= group.size
            && len <= MAX_LEN
            && match open.step {
                Some(before) => step == before,
                // Equal ones only if they mean nothing (RFC 6864 §4.1).
                None => step == 1 || step == 0 && candidate.is_atomic,
            };
        if !fits {
            return Joined::No;
        }
        let first = &self.packets[group.first as usize];
        let first = buffer.get(first.start..first.end).unwrap_or_default();
        let options = candidate.options();
        if first.get(options.clone()) != octets.get(options) {
            return Joined::No;
        }
        if !open.is_verified {
            if !candidate.is_intact(first) {
                return Joined::No;
            }
            open.is_verified = true;
        }
        if !candidate.is_intact(octets) {
            return Joined::Corrupt;
        }
        open.step = Some(step);
        open.identification = candidate.identification;
        open.sequence = candidate.next_sequence();
        let is_full = candidate.payload < group.size || group.count as usize + 1 == MAX_PACKETS;
        Joined::Yes { is_full }
    }

    #[inline]
    fn append(&mut self, place: usize, packet: Range<usize>, candidate: &Candidate) {
        let at = self.packets.len() as u32;
        let group = &mut self.groups[self.open[place].group as usize];
        self.packets[group.last as usize].next = at;
        group.last = at;
        group.count += 1;
        group.len += u32::from(candidate.payload);
        self.packets.push(Packet { start: packet.start, end: packet.end, next: at });
    }

    #[inline]
    fn add_group(&mut self, packet: Range<usize>, candidate: Option<&Candidate>) -> u32 {
        let at = self.packets.len() as u32;
        let mut group = Group {
            first: at,
            last: at,
            count: 1,
            len: packet.len() as u32,
            headers: 0,
            transport: 0,
            size: 0,
            protocol: 0,
        };
        if let Some(candidate) = candidate {
            group.headers = candidate.headers.into();
            group.transport = candidate.transport.into();
            group.size = candidate.payload;
            group.protocol = candidate.flow.protocol();
        }
        self.packets.push(Packet { start: packet.start, end: packet.end, next: at });
        self.groups.push(group);
        (self.groups.len() - 1) as u32
    }

    #[inline]
    fn find(&mut self, flow: &Flow) -> Option<usize> {
        if self.open.get(self.recent).is_some_and(|open| open.flow == *flow) {
            return Some(self.recent);
        }
        self.recent = self.open.iter().position(|open| open.flow == *flow)?;
        Some(self.recent)
    }

    #[inline]
    fn close(&mut self, flow: &Flow) {
        if let Some(place) = self.find(flow) {
            self.open.swap_remove(place);
        }
    }

    /// Hands out what has been pushed, in order, and forgets it. `buffer` is the one that it was pushed from.
    #[inline]
    pub fn drain<'b>(&mut self, buffer: &'b [u8], mut each: impl FnMut(Item<'_, 'b>)) {
        for group in &self.groups {
            let packets = Packets {
                is_udp: group.protocol == UDP,
                packets: &self.packets,
                buffer,
                next: group.first,
                left: group.count,
            };
            let Some(first) = packets.clone().next() else { continue };
            let len = group.len as usize;
            if group.count == 1 {
                let slices = [IoSlice::new(&PLAIN), IoSlice::new(first)];
                each(Item { slices: &slices, packets, len });
                continue;
            }
            let mut headers = [0; VirtioHeader::LEN + MAX_HEADERS];
            let last = packets.at(group.last).unwrap_or_default();
            let Some(headers) = group.write_headers(first, last, &mut headers) else { continue };
            let mut slices = [IoSlice::new(&[]); MAX_PACKETS + 1];
            slices[0] = IoSlice::new(headers);
            for (slice, packet) in slices[1..].iter_mut().zip(packets.clone()) {
                *slice = IoSlice::new(packet.get(group.headers.into()..).unwrap_or_default());
            }
            each(Item { slices: &slices[..=group.count as usize], packets, len });
        }
        self.packets.clear();
        self.groups.clear();
        self.open.clear();
    }
}

enum Joined {
    /// `is_full`: no further packet may follow.
    Yes { is_full: bool },
    /// The packet may be the first of a new group.
    No,
    /// The packet's own checksum is wrong.
    Corrupt,
}

impl Group {
    /// Writes virtio, IP and transport header of the super-packet, and returns them.
    fn write_headers<'h>(&self, first: &[u8], last: &[u8], out: &'h mut [u8]) -> Option<&'h [u8]> {
        let (headers, transport) = (usize::from(self.headers), usize::from(self.transport));
        let out = out.get_mut(..VirtioHeader::LEN + headers)?;
        let (virtio, packet) = out.split_at_mut(VirtioHeader::LEN);
        packet.copy_from_slice(first.get(..headers)?);
        let (ip, segment) = packet.split_at_mut_checked(transport)?;
        let len = self.len as usize - transport;
        let is_v6 = transport == V6_HEADER_LEN;
        let addresses = if is_v6 {
            ip[4..6].copy_from_slice(&(len as u16).to_be_bytes());
            &ip[8..]
        } else {
            ip[2..4].copy_from_slice(&(self.len as u16).to_be_bytes());
            ip[10..12].fill(0);
            let sum = Sum::of(ip);
            ip[10..12].copy_from_slice(&sum.checksum());
            &ip[12..]
        };
        // Only the pseudo-header for now: whoever needs the rest adds it.
        let sum = Sum::of(addresses).u16(self.protocol.into()).u16(len as u16).folded();
        let (gso_type, checksum_at) = match (self.protocol, is_v6) {
            (UDP, _) => (VirtioHeader::GSO_UDP_L4, UDP_CHECKSUM),
            (_, false) => (VirtioHeader::GSO_TCPV4, TCP_CHECKSUM),
            (_, true) => (VirtioHeader::GSO_TCPV6, TCP_CHECKSUM),
        };
        if self.protocol == UDP {
            segment[4..6].copy_from_slice(&(len as u16).to_be_bytes());
        } else {
            segment[TCP_FLAGS] |= last.get(transport + TCP_FLAGS)? & PSH;
        }
        segment[checksum_at..checksum_at + 2].copy_from_slice(&sum);
        let header = VirtioHeader {
            flags: VirtioHeader::NEEDS_CSUM,
            gso_type,
            hdr_len: self.headers,
            gso_size: self.size,
            csum_start: self.transport,
            csum_offset: checksum_at as u16,
        };
        virtio.copy_from_slice(&header.octets());
        Some(out)
    }
}

/// One packet or super-packet for the TUN device.
#[derive(Clone, Debug)]
pub struct Item<'i, 'b> {
    slices: &'i [IoSlice<'i>],
    packets: Packets<'i, 'b>,
    len: usize,
}

impl<'i, 'b> Item<'i, 'b> {
    /// What to write to the device, in one call: the virtio header comes first.
    #[inline]
    pub fn slices(&self) -> &'i [IoSlice<'i>] {
        self.slices
    }

    /// The packets it was made of, untouched and without virtio headers, to be written one by one if the kernel
    /// refuses the whole.
    #[inline]
    pub fn packets(&self) -> impl Iterator<Item = &'b [u8]> + use<'i, 'b> {
        self.packets.clone()
    }

    /// Octets without the virtio header.
    #[inline]
    #[expect(clippy::len_without_is_empty, reason = "nothing is ever empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it is a super-packet of UDP, and not of TCP.
    pub fn is_udp(&self) -> bool {
        self.packets.is_udp
    }

    /// Number of packets, at least 1 and at most [`MAX_PACKETS`].
    #[inline]
    pub fn count(&self) -> usize {
        self.packets.left as usize
    }
}

#[derive(Clone, Debug)]
struct Packets<'i, 'b> {
    is_udp: bool,
    packets: &'i [Packet],
    buffer: &'b [u8],
    next: u32,
    left: u32,
}

impl<'b> Packets<'_, 'b> {
    #[inline]
    fn at(&self, index: u32) -> Option<&'b [u8]> {
        let packet = self.packets.get(index as usize)?;
        self.buffer.get(packet.start..packet.end)
    }
}

impl<'b> Iterator for Packets<'_, 'b> {
    type Item = &'b [u8];

    #[inline]
    fn next(&mut self) -> Option<&'b [u8]> {
        self.left = self.left.checked_sub(1)?;
        let packet = self.at(self.next)?;
        self.next = self.packets.get(self.next as usize)?.next;
        Some(packet)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left as usize, Some(self.left as usize))
    }
}
