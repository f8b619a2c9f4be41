//! What goes with a UDP datagram beside its octets.

/// The two bits of Explicit Congestion Notification in an IPv4 or IPv6 header (RFC 3168 §5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Ecn {
    /// The transport does not know ECN.
    #[default]
    NotEct = 0,
    /// ECN-capable transport, codepoint 1 (L4S, RFC 9331).
    Ect1 = 1,
    /// ECN-capable transport, codepoint 0.
    Ect0 = 2,
    /// Congestion was experienced.
    Ce = 3,
}

impl Ecn {
    /// From the low two bits of `bits`, such as those of a whole traffic class (`IP_TOS`, `IPV6_TCLASS`).
    pub const fn from_bits(bits: u8) -> Self {
        match bits & 3 {
            0 => Self::NotEct,
            1 => Self::Ect1,
            2 => Self::Ect0,
            _ => Self::Ce,
        }
    }

    /// The two bits.
    pub const fn bits(self) -> u8 {
        self as u8
    }
}

/// What may become of a datagram that is larger than its path takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fragmentation {
    /// This host sends it in fragments if it knows that the path takes less. Nobody else fragments it.
    #[default]
    Known,
    /// It gets lost, or is refused: it probes the path.
    Never,
    /// Anyone fragments it. Over IPv6 no router does, so there it is as [`Self::Known`].
    Anyone,
}
