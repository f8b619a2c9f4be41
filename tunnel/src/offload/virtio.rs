//! The header in front of each packet of a TUN device with `IFF_VNET_HDR`.

/// `struct virtio_net_hdr` (virtio 1.2, 5.1.6): 10 octets, little endian.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VirtioHeader {
    /// [`Self::NEEDS_CSUM`], [`Self::DATA_VALID`].
    pub flags: u8,
    /// One of the `GSO_` constants, TCP's perhaps with [`Self::GSO_ECN`].
    pub gso_type: u8,
    /// Octets of all headers: a hint, never to be trusted.
    pub hdr_len: u16,
    /// Octets of payload in each segment but the last.
    pub gso_size: u16,
    /// Where the checksummed part starts, which ends with the packet.
    pub csum_start: u16,
    /// Where in that part the checksum goes.
    pub csum_offset: u16,
}

impl VirtioHeader {
    /// Octets of the header.
    pub const LEN: usize = 10;

    /// Flag: the checksum field holds only the sum of the pseudo-header; the rest is to be added.
    pub const NEEDS_CSUM: u8 = 1;
    /// Flag: the checksum has been verified.
    pub const DATA_VALID: u8 = 2;

    /// A single packet.
    pub const GSO_NONE: u8 = 0;
    /// TCP over IPv4.
    pub const GSO_TCPV4: u8 = 1;
    /// TCP over IPv6.
    pub const GSO_TCPV6: u8 = 4;
    /// UDP datagrams over IPv4 or IPv6.
    pub const GSO_UDP_L4: u8 = 5;
    /// Bit beside TCP's types: the first segment carries CWR.
    pub const GSO_ECN: u8 = 0x80;

    /// Reads the header at the start of `octets`; nothing if they are fewer than [`Self::LEN`].
    pub fn parse(octets: &[u8]) -> Option<Self> {
        let o = octets.first_chunk::<{ Self::LEN }>()?;
        let u16_at = |at: usize| u16::from_le_bytes([o[at], o[at + 1]]);
        Some(Self {
            flags: o[0],
            gso_type: o[1],
            hdr_len: u16_at(2),
            gso_size: u16_at(4),
            csum_start: u16_at(6),
            csum_offset: u16_at(8),
        })
    }

    /// The header as it is written.
    pub fn octets(&self) -> [u8; Self::LEN] {
        let [hdr_len, gso_size] = [self.hdr_len, self.gso_size].map(u16::to_le_bytes);
        let [start, offset] = [self.csum_start, self.csum_offset].map(u16::to_le_bytes);
        [
            self.flags,
            self.gso_type,
            hdr_len[0],
            hdr_len[1],
            gso_size[0],
            gso_size[1],
            start[0],
            start[1],
            offset[0],
            offset[1],
        ]
    }
}
