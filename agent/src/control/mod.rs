//! The agent's control core: what to ask of the registrar and when, which peers to hold, what to tell the data
//! plane. A deterministic state machine without I/O, clock or randomness of its own: inputs go in through
//! `handle_*`, [`Action`]s come out of [`Control::poll_action`]; the same seed and inputs give the same actions.

mod backoff;
mod connection;
mod directors;
mod health;
mod holding;
mod lookups;
mod machine;
mod peer;
mod peers;
#[cfg(test)]
mod properties;
mod reachability;
mod registrars;
mod renewal;
mod services;
mod settings;
mod silence;
#[cfg(test)]
mod tests;
mod view;
mod virtual_services;

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use muster_common::time::Timestamp;
use muster_proto::registration::{
    DeviceConfig, EndpointProbe, Peer, RegisterRequest, SessionHello, SessionRequest, VirtualServicesChanged,
    WatchVirtualServices,
};
use muster_tunnel::DirectorId;

pub use directors::{DirectorEvent, DirectorTarget, DirectorView, Role, Way};
pub use lookups::LookupBy;
pub use machine::Control;
pub use peer::{PeerError, PeerInfo};
pub use settings::{Offer, Proxied, Settings, SettingsError, pools};

use crate::{
    datapath::{Command, PublicKey},
    resolver::HeldService,
};

/// Peers held at most; beyond it the one that was used longest ago goes.
pub const MAX_PEERS: usize = 4096;
/// Services that the registrar is told of at most: those whose names are held, or were a short while ago.
pub const MAX_SERVICES: usize = 4096;
/// Lookups wanted at most, under way or waiting.
pub const MAX_LOOKUPS: usize = 256;
/// Lookups under way at most.
pub const MAX_LOOKUPS_IN_FLIGHT: usize = 32;
/// For how long a lookup is tried, the registrar being away or not, before its packets are answered with "unreachable".
pub const LOOKUP_PATIENCE: Duration = Duration::from_secs(5);
/// Private endpoints announced at most.
pub const MAX_ENDPOINTS: usize = 16;

/// What the core begins with: what is on disk, and who we are.
#[derive(Clone, Debug, Default)]
pub struct Start {
    /// This device.
    pub device_uid: String,
    /// This device's WireGuard public key.
    pub public_key: PublicKey,
    /// Told to the registrar.
    pub agent_version: String,
    /// Whether this device's tunnel takes AES-256-GCM: told to the registrar, and used with peers that take it, too.
    pub accepts_aes: bool,
    /// The registrar that the device joined through, `HOST:PORT`.
    pub registrar: String,
    /// What this host offers to the network.
    pub offer: Offer,
    /// The last configuration received.
    pub config: Option<DeviceConfig>,
    /// The peers held.
    pub peers: Vec<Peer>,
    /// Epoch of the registrar's store that `revision` and the revisions of `peers` are of.
    pub epoch: u64,
    /// Revision up to which `peers` are right.
    pub revision: u64,
    /// Where this device's tunnel is reached on its own networks, best first.
    pub private_endpoints: Vec<SocketAddr>,
    /// Up to where the Services that have virtual IPs are known; `None` if this host does without.
    pub virtual_services: Option<WatchVirtualServices>,
}

/// What the shell is to do. Results come back through `handle_*` with the attempt or id of the action.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Connect to `registrar` and call Register.
    Register {
        /// Names this attempt; results of older ones are ignored.
        attempt: u64,
        /// `HOST:PORT`.
        registrar: String,
        /// What to ask.
        request: RegisterRequest,
    },
    /// Open the session stream on the connection of this attempt, `hello` first.
    OpenSession {
        /// Of the Register before.
        attempt: u64,
        /// First message.
        hello: SessionHello,
    },
    /// Send a message on the open session.
    Send(SessionRequest),
    /// Close connection and session of this attempt, whatever their state; calls under way on them are void.
    Disconnect {
        /// Of the Register before.
        attempt: u64,
    },
    /// Call Lookup.
    Lookup {
        /// Names this lookup.
        id: u64,
        /// What is known of the peer.
        by: LookupBy,
    },
    /// Call Renew with a new key.
    Renew,
    /// Attach to a director, in place of the attachment that there may be.
    Attach {
        /// Which director.
        id: DirectorId,
        /// Names this attempt; results of older ones are ignored.
        attempt: u64,
        /// Where it is.
        target: Box<DirectorTarget>,
    },
    /// Give up the attachment to a director, and its stream.
    Detach(DirectorId),
    /// Carry frames to and from a director over TCP, until [`Action::CloseStream`].
    OpenStream {
        /// Which director.
        id: DirectorId,
        /// Of the [`Action::Attach`] before.
        attempt: u64,
        /// Where it is.
        target: Box<DirectorTarget>,
    },
    /// Frames to a director need not go over TCP any more.
    CloseStream(DirectorId),
    /// Program interface and resolver with these settings.
    Configure(Box<Settings>),
    /// Tell the data plane.
    Datapath(Command),
    /// Forget what is cached of this device's name: it has changed.
    ForgetName(String),
    /// Forget what is cached of the names of these Services: they have changed.
    ForgetServices(Vec<HeldService>),
    /// Probe these endpoints, and no others.
    Probe(Vec<EndpointProbe>),
    /// Take in what has changed of the Services that have virtual IPs.
    VirtualServices(Box<VirtualServicesChanged>),
    /// Trust these roots (DER) from now on.
    ReplaceRoots(Vec<Vec<u8>>),
    /// Write to disk.
    Persist(Persist),
}

/// What to write to disk; the shell reads it from [`Control::config`] or [`Control::held_peers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Persist {
    /// The device configuration.
    Config,
    /// The held peers and the revision.
    Peers,
}

/// Why a call to the registrar failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// It cannot be reached, or cannot answer now. Worth another try.
    Unavailable(String),
    /// It refuses this device: revoked, or deleted.
    Refused(String),
}

/// What a lookup found.
#[derive(Clone, Debug, PartialEq)]
pub enum LookupResult {
    /// The peer.
    Found(Box<Peer>),
    /// No such device, or none that this one may see.
    NotFound,
    /// No answer.
    Unavailable,
}

/// Validity of the device's certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// Back-dated for clock skew.
    pub not_before: Timestamp,
    /// After it, no registrar accepts the certificate.
    pub not_after: Timestamp,
}

/// How it stands with the registrar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegistrarStatus {
    /// The registrar in use, or tried last.
    pub address: String,
    /// Whether a session is open.
    pub connected: bool,
    /// Since when that is so.
    pub since: muster_common::time::Instant,
    /// Why the last attempt failed; empty while connected.
    pub last_error: String,
    /// Whether the registrar refuses this device.
    pub refused: bool,
}

/// Whether `address` belongs to the virtual network.
fn is_routed(routes: &[ipnet::IpNet], address: IpAddr) -> bool {
    routes.iter().any(|route| route.contains(&address))
}
