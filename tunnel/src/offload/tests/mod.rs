//! Tests of super-packets, by what they are about; and packets for them, built field by field as a sender without
//! any offloads would, with checksums by a plain implementation.

mod checksum;
mod coalesce;
mod identity;
mod split;

use proptest::prelude::*;

use super::*;

/// RFC 1071 §4.1, word by word.
pub(super) fn plain_sum(octets: &[u8]) -> u16 {
    let mut sum = 0u32;
    for word in octets.chunks(2) {
        sum += u32::from(word[0]) << 8 | word.get(1).map_or(0, |octet| u32::from(*octet));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Headers of a packet, field by field.
#[derive(Clone, Debug)]
pub(super) struct Shape {
    pub(super) v6: bool,
    pub(super) tcp: bool,
    pub(super) port: u16,
    pub(super) tos: u8,
    pub(super) ttl: u8,
    pub(super) label: u32,
    /// IPv4: flags and fragment offset.
    pub(super) fragment: u16,
    pub(super) identification: u16,
    pub(super) sequence: u32,
    pub(super) ack: u32,
    pub(super) flags: u8,
    pub(super) window: u16,
    pub(super) urgent: u16,
    pub(super) options: Vec<u8>,
    pub(super) ip_options: Vec<u8>,
    /// IPv6 extension headers: kind, and all octets behind the next header's kind.
    pub(super) extensions: Vec<(u8, Vec<u8>)>,
    /// Host part of the addresses, and that of the destination in the pseudo-header.
    pub(super) hosts: (u8, u8, u8),
}

pub(super) const DF: u16 = 0x4000;

/// No-operations and a timestamp (RFC 7323 §3.2).
pub(super) fn timestamps(value: u32) -> Vec<u8> {
    let mut options = vec![1, 1, 8, 10];
    options.extend(value.to_be_bytes());
    options.extend([0, 0, 0, 9]);
    options
}

impl Shape {
    pub(super) fn new(v6: bool, tcp: bool) -> Self {
        Self {
            v6,
            tcp,
            port: 4000,
            tos: 0,
            ttl: 64,
            label: 0x1_2345,
            fragment: DF,
            identification: 0xfffe,
            sequence: 0xffff_f000,
            ack: 77,
            flags: ACK,
            window: 500,
            urgent: 0,
            options: if tcp { timestamps(1) } else { Vec::new() },
            ip_options: Vec::new(),
            extensions: Vec::new(),
            hosts: (1, 2, 2),
        }
    }

    pub(super) fn protocol(&self) -> u8 {
        if self.tcp { TCP } else { UDP }
    }

    fn address(&self, host: u8) -> Vec<u8> {
        if self.v6 {
            let mut address = vec![0xfd; 15];
            address.push(host);
            address
        } else {
            vec![10, 99, 0, host]
        }
    }

    fn pseudo_header(&self, len: usize) -> Vec<u8> {
        let mut octets = self.address(self.hosts.0);
        octets.extend(self.address(self.hosts.2));
        if self.v6 {
            octets.extend((len as u32).to_be_bytes());
            octets.extend([0, 0, 0, self.protocol()]);
        } else {
            octets.extend([0, self.protocol()]);
            octets.extend((len as u16).to_be_bytes());
        }
        octets
    }

    /// Octets before the transport header.
    pub(super) fn transport_at(&self) -> usize {
        if self.v6 {
            40 + self.extensions.iter().map(|(_, octets)| octets.len() + 1).sum::<usize>()
        } else {
            20 + self.ip_options.len()
        }
    }

    pub(super) fn checksum_at(&self) -> usize {
        if self.tcp { 16 } else { 6 }
    }

    pub(super) fn headers_len(&self) -> usize {
        self.transport_at() + if self.tcp { 20 + self.options.len() } else { 8 }
    }

    fn segment(&self, payload: &[u8]) -> Vec<u8> {
        let mut segment = self.port.to_be_bytes().to_vec();
        segment.extend(80u16.to_be_bytes());
        if self.tcp {
            segment.extend(self.sequence.to_be_bytes());
            segment.extend(self.ack.to_be_bytes());
            segment.extend([(20 + self.options.len()) as u8 / 4 * 16, self.flags]);
            segment.extend(self.window.to_be_bytes());
            segment.extend([0, 0]);
            segment.extend(self.urgent.to_be_bytes());
            segment.extend(&self.options);
        } else {
            segment.extend((8 + payload.len() as u16).to_be_bytes());
            segment.extend([0, 0]);
        }
        segment.extend(payload);
        segment
    }

    fn ip(&self, segment: &[u8]) -> Vec<u8> {
        let mut packet = Vec::new();
        if self.v6 {
            packet.extend((6 << 28 | u32::from(self.tos) << 20 | self.label).to_be_bytes());
            packet.extend(((self.transport_at() - 40 + segment.len()) as u16).to_be_bytes());
            packet.extend([self.extensions.first().map_or(self.protocol(), |e| e.0), self.ttl]);
            packet.extend(self.address(self.hosts.0));
            packet.extend(self.address(self.hosts.1));
            for (index, (_, octets)) in self.extensions.iter().enumerate() {
                packet.push(self.extensions.get(index + 1).map_or(self.protocol(), |e| e.0));
                packet.extend(octets);
            }
        } else {
            packet.extend([0x45 + (self.ip_options.len() / 4) as u8, self.tos]);
            packet.extend(((self.transport_at() + segment.len()) as u16).to_be_bytes());
            packet.extend(self.identification.to_be_bytes());
            packet.extend(self.fragment.to_be_bytes());
            packet.extend([self.ttl, self.protocol(), 0, 0]);
            packet.extend(self.address(self.hosts.0));
            packet.extend(self.address(self.hosts.1));
            packet.extend(&self.ip_options);
            let sum = !plain_sum(&packet);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        packet.extend(segment);
        packet
    }

    /// The packet with all checksums.
    pub(super) fn packet(&self, payload: &[u8]) -> Vec<u8> {
        let mut segment = self.segment(payload);
        let mut summed = self.pseudo_header(segment.len());
        summed.extend(&segment);
        let mut sum = !plain_sum(&summed);
        if sum == 0 && !self.tcp {
            sum = 0xffff;
        }
        segment[self.checksum_at()..][..2].copy_from_slice(&sum.to_be_bytes());
        self.ip(&segment)
    }

    /// The packet with its checksum left to the device.
    pub(super) fn unfinished(&self, payload: &[u8]) -> Vec<u8> {
        let mut segment = self.segment(payload);
        let sum = plain_sum(&self.pseudo_header(segment.len()));
        segment[self.checksum_at()..][..2].copy_from_slice(&sum.to_be_bytes());
        self.ip(&segment)
    }

    /// The virtio header of [`Self::unfinished`] that is to be split.
    pub(super) fn header(&self, size: u16) -> VirtioHeader {
        VirtioHeader {
            flags: VirtioHeader::NEEDS_CSUM,
            gso_type: match (self.tcp, self.v6) {
                (false, _) => VirtioHeader::GSO_UDP_L4,
                (true, false) => VirtioHeader::GSO_TCPV4,
                (true, true) => VirtioHeader::GSO_TCPV6,
            },
            hdr_len: self.headers_len() as u16,
            gso_size: size,
            csum_start: self.transport_at() as u16,
            csum_offset: self.checksum_at() as u16,
        }
    }

    /// What a sender without offloads sends instead of the super-packet.
    pub(super) fn naive_split(&self, payload: &[u8], size: usize) -> Vec<Vec<u8>> {
        if payload.is_empty() {
            return vec![self.packet(&[])];
        }
        let last = (payload.len() - 1) / size;
        let segment = |(index, chunk): (usize, &[u8])| {
            let mut shape = self.clone();
            shape.identification = self.identification.wrapping_add(index as u16);
            shape.sequence = self.sequence.wrapping_add((index * size) as u32);
            if index != last {
                shape.flags &= !(FIN | PSH);
            }
            if index != 0 {
                shape.flags &= !CWR;
            }
            if self.flags & URG != 0 {
                let end = usize::from(self.urgent);
                if index != 0 && end <= index * size {
                    (shape.urgent, shape.flags) = (0, shape.flags & !URG);
                } else {
                    shape.urgent = (end - index * size) as u16;
                }
            }
            shape.packet(chunk)
        };
        payload.chunks(size).enumerate().map(segment).collect()
    }
}

/// All segments that `packet` is split into.
pub(super) fn split(header: VirtioHeader, packet: &[u8]) -> Result<Vec<Vec<u8>>, OffloadError> {
    let parsed = SuperPacket::parse(header, packet)?;
    let write = |index| {
        // What was there before must not matter.
        let mut out = vec![0xa5; parsed.segment_len(index)];
        parsed.write_segment(index, &mut out);
        out
    };
    Ok((0..parsed.segments()).map(write).collect())
}

/// Octets that differ from place to place.
pub(super) fn payload(len: usize, seed: u32) -> Vec<u8> {
    (0..len as u32).map(|at| (at.wrapping_add(seed).wrapping_mul(2_654_435_761) >> 15) as u8).collect()
}

prop_compose! {
    pub(super) fn any_shape()(
        (v6, tcp) in any::<(bool, bool)>(),
        (port, tos, ttl, label) in (any::<u16>(), any::<u8>(), any::<u8>(), 0u32..1 << 20),
        (identification, fragment) in (any::<u16>(), prop_oneof![Just(0), Just(DF)]),
        (sequence, ack, window, urgent) in (any::<u32>(), any::<u32>(), any::<u16>(), any::<u16>()),
        flags in any::<u8>(),
        options in prop::collection::vec(any::<u8>(), 0..=10),
        ip_options in 0usize..=10,
        extensions in prop::collection::vec((prop_oneof![Just(0u8), Just(60), Just(135)], 0usize..4), 0..4),
        hosts in any::<(u8, u8)>(),
    ) -> Shape {
        let extension = |(kind, words): (u8, usize)| {
            let mut octets = vec![words as u8];
            octets.extend(payload(words * 8 + 6, 3));
            (kind, octets)
        };
        Shape {
            v6, tcp, port, tos, ttl, label, fragment, identification, sequence, ack, window, urgent,
            flags: flags & !(SYN | RST),
            options: options.iter().flat_map(|octet| [*octet; 4]).collect(),
            ip_options: vec![1; ip_options * 4],
            extensions: extensions.into_iter().map(extension).collect(),
            hosts: (hosts.0, hosts.1, hosts.1),
        }
    }
}
