//! What the core tells its shell.

use std::net::IpAddr;

pub use muster_common::datagram::Fragmentation;

use crate::{
    endpoint::{Endpoint, Hop},
    key::PublicKey,
};

/// Something the control side should know or answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A packet waits for an address that no peer has. Once per lookup, not per packet; to be answered with
    /// `add_peer` or `no_such_device`.
    LookupAddress(IpAddr),
    /// An initiation came from a key that is no peer. To be answered with `add_peer` or `unknown_key`.
    LookupKey(PublicKey),
    /// The peer has its first session, or one again after `PeerDown`.
    PeerUp {
        /// Its key.
        public_key: PublicKey,
        /// Where it is reached.
        endpoint: Endpoint,
    },
    /// The peer did not answer a handshake for `REKEY_ATTEMPT_TIME`. The next packet to it tries again.
    PeerDown(PublicKey),
    /// No data was exchanged with the peer for `IDLE_AFTER`: it may be removed. Once, until there is data again.
    PeerIdle(PublicKey),
    /// The peer is reached elsewhere than before.
    EndpointChanged {
        /// Its key.
        public_key: PublicKey,
        /// Where it is reached now.
        endpoint: Endpoint,
    },
}

/// Why the core wants to be woken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// An initiation is due, for the first time or again.
    Handshake,
    /// Data was sent and nothing came back: a new handshake is due.
    NoAnswer,
    /// An empty message is due because data was received and nothing sent.
    Keepalive,
    /// An empty message is due because the peer is configured so.
    PersistentKeepalive,
    /// Keys are old enough to be wiped.
    WipeKeys,
    /// A probe of the path's MTU is due, or lost.
    PathMtu,
    /// Paths are to be probed, or one is to be left.
    Path,
    /// A peer may have become idle.
    Idle,
    /// A lookup or a negative answer expires.
    Lookup,
}

/// A datagram to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transmit {
    /// Where it leaves.
    pub hop: Hop,
    /// What may become of it on the way.
    pub fragmentation: Fragmentation,
    /// Its octets, with the header of the frame if it goes to a director.
    pub payload: Vec<u8>,
}

/// What a datagram was.
#[derive(Debug, PartialEq, Eq)]
pub enum Received<'a> {
    /// A packet for the TUN device, opened in place, without padding. Its source address is the peer's own.
    Packet {
        /// Who sent it.
        from: PublicKey,
        /// The inner packet.
        packet: &'a [u8],
    },
    /// An empty message.
    Keepalive,
    /// The answer to a probe of the path, which was this device's own, or a peer's probe, which has been answered.
    Probe,
    /// A handshake message or cookie that was used, or an initiation that waits for a lookup of its key.
    Handshake,
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// Sealed; it is in the batch.
    Sealed,
    /// It waits for a session, or for a lookup.
    Queued,
}
