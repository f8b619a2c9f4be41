//! Counters: what was dropped and why, and the state of a peer at one moment.

use std::net::{IpAddr, SocketAddr};

use muster_common::time::Instant;

use crate::{cipher::Cipher, key::PublicKey, paths::PathSnapshot};

macro_rules! dropped {
    ($($(#[$doc:meta])* $name:ident = $label:literal, $message:literal;)*) => {
        /// Why a datagram or packet was dropped. None of these ends a batch or needs an answer.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
        pub enum Dropped {
            $($(#[$doc])* #[error($message)] $name,)*
        }

        impl Dropped {
            /// All reasons.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The reason in `snake_case`, for a metric's label.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $label,)* }
            }
        }
    };
}

dropped! {
    /// No WireGuard message.
    Malformed = "malformed", "the datagram is no WireGuard message";
    /// `mac1` is wrong: the sender does not know our key.
    InvalidMac = "invalid_mac", "the handshake's mac1 is wrong: its sender does not know this device's key";
    /// Under load: a cookie was sent instead of an answer.
    CookieDemanded = "cookie_demanded", "under load; a cookie was sent instead of an answer";
    /// Too many handshakes from this source or peer.
    RateLimited = "rate_limited", "too many handshakes from this source or peer";
    /// The index in the message belongs to no session or handshake.
    UnknownIndex = "unknown_index", "no session or handshake has the index in the message";
    /// The message does not open with the keys of its session or handshake.
    NotAuthentic = "not_authentic", "the message does not open with the keys it claims";
    /// The initiation is not newer than the last one.
    OldTimestamp = "old_timestamp", "the initiation is not newer than the last one of this peer";
    /// The peer's initiation crossed ours, and ours was completed.
    Simultaneous = "simultaneous", "the peer's initiation crossed ours, which has won";
    /// The initiation comes from a key that is unknown, and was said to be so lately, or too many wait.
    UnknownKey = "unknown_key", "the initiation comes from a key that is no peer";
    /// The message was seen before, or is too old to tell.
    Replayed = "replayed", "the message was seen before, or is too old to tell";
    /// The session is too old or has sent too much.
    SessionExpired = "session_expired", "the session is too old or has sent too much";
    /// The packet is neither IPv4 nor IPv6, or its lengths are wrong.
    InvalidPacket = "invalid_packet", "the packet is neither valid IPv4 nor IPv6";
    /// The packet is longer than the path to the peer takes. Its sender is told.
    TooBig = "too_big", "the packet is longer than the path to the peer takes";
    /// The peer used a source address that is not its own.
    WrongSource = "wrong_source", "the peer used a source address that is not its own";
    /// The destination is no address of a single device.
    NoRoute = "no_route", "the destination is multicast, broadcast, link-local or otherwise no single device";
    /// No device has the destination's address.
    Unreachable = "unreachable", "no device has the destination's address";
    /// A router has marked the datagram for congestion, and the packet in it does not know of such marks (RFC 6040).
    Congestion = "congestion", "marked for congestion on the way, which the packet in it cannot carry";
    /// The director on the way to the peer is not reached.
    NoDirector = "no_director", "the director on the way to the peer is not reached";
    /// A queue is full.
    QueueFull = "queue_full", "a queue is full";
    /// The peer did not answer the handshake.
    NoSession = "no_session", "the peer did not answer the handshake";
    /// The cipher failed.
    SealFailed = "seal_failed", "the cipher failed to seal the packet";
}

/// Numbers of drops by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drops([u64; Dropped::ALL.len()]);

impl Drops {
    pub(crate) fn count(&mut self, reason: Dropped) {
        self.add(reason, 1);
    }

    pub(crate) fn add(&mut self, reason: Dropped, number: usize) {
        if let Some(count) = self.0.get_mut(reason as usize) {
            *count += number as u64;
        }
    }

    /// How many were dropped for `reason`.
    pub fn get(&self, reason: Dropped) -> u64 {
        self.0.get(reason as usize).copied().unwrap_or(0)
    }

    /// All reasons with their numbers.
    pub fn iter(&self) -> impl Iterator<Item = (Dropped, u64)> {
        Dropped::ALL.iter().map(|reason| (*reason, self.get(*reason)))
    }
}

/// One peer at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerSnapshot {
    /// Its key.
    pub public_key: PublicKey,
    /// Its virtual addresses.
    pub virtual_addresses: Vec<IpAddr>,
    /// The address at which it is reached, if it was heard of and is not reached through a director.
    pub endpoint: Option<SocketAddr>,
    /// The way to it, if it was heard of.
    pub path: Option<PathSnapshot>,
    /// When the last handshake was completed.
    pub last_handshake: Option<Instant>,
    /// When the last packet with data was exchanged, in either direction.
    pub last_data: Option<Instant>,
    /// Octets of authentic datagrams received, without headers of frames.
    pub received_bytes: u64,
    /// Authentic datagrams received.
    pub received_packets: u64,
    /// Octets of datagrams sent, handshakes included and headers of frames not.
    pub sent_bytes: u64,
    /// Datagrams sent, handshakes included.
    pub sent_packets: u64,
    /// The largest packet that is sent to the peer in one piece, in octets.
    pub path_mtu: u16,
    /// Packets that wait for a session.
    pub queued: usize,
    /// Whether packets can be sent at once.
    pub has_session: bool,
    /// What the session in use is sealed with, if there is one.
    pub cipher: Option<Cipher>,
    /// What was dropped of what came from or went to the peer.
    pub drops: Drops,
}
