//! Runs of datagrams, as long as the tunnel's core yields single ones.

use std::net::SocketAddr;

use muster_tunnel::ecn::Ecn;

/// Datagrams to one destination, all but the last of equal length and the last not longer: at most 64, and at most
/// 65,507 octets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run<'a> {
    /// Where they go.
    pub destination: SocketAddr,
    /// What their IP headers say of congestion.
    pub ecn: Ecn,
    /// Octets of each but the last.
    pub datagram_len: usize,
    /// Their octets, back to back.
    pub octets: &'a [u8],
}

impl<'a> Run<'a> {
    /// The datagrams, in order.
    pub fn datagrams(&self) -> impl ExactSizeIterator<Item = &'a [u8]> + use<'a> {
        self.octets.chunks(self.datagram_len.max(1))
    }
}
