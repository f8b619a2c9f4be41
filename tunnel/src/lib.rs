//! WireGuard as a state machine without I/O: the core of the data plane.
//!
//! [`Tunnel`] is one device. Its shell feeds it datagrams from UDP and packets from the TUN device together with the
//! time, and then drains what it has to say: datagrams to send, packets for the TUN device, events, the next timeout.
//! The core reads no clock and owns its (seeded) generator, so the same inputs give the same outputs, octet for octet.
//!
//! The protocol is the one of "WireGuard: Next Generation Kernel Network Tunnel" (Donenfeld, NDSS 2017; "the paper"
//! below), unchanged. What Muster adds around it stays on this side of the wire: peers on demand ([`Event`]), several
//! candidate endpoints for a peer, and one rule for handshakes that both sides start at once (see `peer::handshake`).
//! Only to peers that have relays does it say more: a header before messages that a director relays, and sealed probes
//! that find out at which address the peer is reached (see `paths`).
#![forbid(unsafe_code)]

mod cipher;
mod config;
mod cookie;
pub mod ecn;
mod endpoint;
mod event;
pub mod icmp;
mod key;
mod limits;
mod lookup;
mod message;
mod noise;
pub mod offload;
mod opening;
mod outgoing;
mod packet;
pub mod path_mtu;
mod paths;
mod peer;
mod rate;
mod replay;
mod sealing;
mod session;
mod sessions;
mod shared;
mod stats;
mod subnets;
mod tai64n;
mod timers;
mod tunnel;

pub use cipher::Cipher;
pub use config::{Config, PeerConfig};
pub use ecn::Ecn;
pub use endpoint::{DirectorId, DirectorLink, Endpoint, Handle, Hop};
pub use event::{Event, Fragmentation, Reason, Received, Sent, Transmit};
pub use key::{KeyError, PresharedKey, PrivateKey, PublicKey};
pub use limits::*;
pub use opening::Opening;
pub use outgoing::{Outgoing, RUN_DATAGRAMS, RUN_OCTETS, Run};
pub use paths::{PathSnapshot, Why};
pub use sealing::Sealing;
pub use stats::{Dropped, Drops, PeerSnapshot};
pub use tunnel::Tunnel;

#[cfg(test)]
mod tests;
