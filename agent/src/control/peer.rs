//! A peer as the registrar describes it, checked: nothing of it reaches the data plane before.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use muster_proto::{
    admin::{Endpoint, TransportCipher},
    registration::Peer,
};

use super::{MAX_ENDPOINTS, settings::route};
use crate::datapath::{Cipher, PeerConfig, PublicKey};

/// Virtual addresses a peer may have: its own, and those of the hosts that it speaks for.
const MAX_ADDRESSES: usize = 512;
/// Subnets that a peer may carry; further ones are ignored.
const MAX_SUBNETS: usize = 64;
/// Room for reflexive endpoints among all endpoints of a peer.
const MAX_REFLEXIVE: usize = 4;
/// Longest uid and name, in octets.
const MAX_NAME: usize = 253;

/// A checked peer.
#[derive(Clone, Debug, PartialEq)]
pub struct PeerInfo {
    /// As it was received; kept for the disk.
    pub message: Peer,
    /// What the data plane needs.
    pub config: PeerConfig,
}

/// Why a description of a peer cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// Empty, or longer than a DNS name.
    #[error("the peer has no usable uid")]
    Uid,
    /// Not 32 octets, or all zero.
    #[error("the public key of peer {0} is not a Curve25519 key")]
    PublicKey(String),
    /// None, too many, or not addresses.
    #[error("the virtual addresses of peer {0} cannot be used")]
    Addresses(String),
    /// Policy does not let this pair talk.
    #[error("policy does not allow traffic with peer {0}")]
    NotAllowed(String),
}

impl PeerInfo {
    /// Checks `message`. `accepts_aes` says whether this device takes AES-256-GCM; then peers that do are sent it.
    pub(super) fn new(message: Peer, accepts_aes: bool) -> Result<Self, PeerError> {
        let uid = message.device_uid.clone();
        if uid.is_empty() || uid.len() > MAX_NAME || message.name.len() > MAX_NAME {
            return Err(PeerError::Uid);
        }
        if !message.policy.as_ref().is_some_and(|policy| policy.allowed) {
            return Err(PeerError::NotAllowed(uid));
        }
        let public_key: PublicKey = match message.public_key.as_slice().try_into() {
            Ok(key) if key != [0; 32] => key,
            _ => return Err(PeerError::PublicKey(uid)),
        };
        let addresses = message.virtual_addresses.iter().map(|a| a.parse::<IpAddr>());
        let virtual_addresses: Vec<IpAddr> =
            addresses.collect::<Result<_, _>>().map_err(|_| PeerError::Addresses(uid.clone()))?;
        if virtual_addresses.is_empty() || virtual_addresses.len() > MAX_ADDRESSES {
            return Err(PeerError::Addresses(uid));
        }
        // Both know it of each other from the registrar: there is nothing to negotiate on the wire.
        let both = accepts_aes && message.transport_ciphers().any(|c| c == TransportCipher::Aes256Gcm);
        let cipher = if both { Cipher::Aes256Gcm } else { Cipher::ChaCha20Poly1305 };
        // Directors have numbers here, which whoever holds the peer knows.
        let relays = Vec::new();
        let subnets = message.subnets.iter().take(MAX_SUBNETS).filter_map(|subnet| route(subnet).ok());
        let subnets: Vec<IpNet> = subnets.collect();
        let endpoints = endpoints(&message);
        let config =
            PeerConfig { public_key, virtual_addresses, subnets, endpoints, relays, keepalive: None, cipher };
        Ok(Self { message, config })
    }
}

impl PeerInfo {
    /// Is not reached in any of these subnets: what is sent there comes into the tunnel again.
    pub(super) fn avoid(&mut self, routes: &[IpNet]) {
        self.config.endpoints = endpoints(&self.message);
        self.config.endpoints.retain(|endpoint| !routes.iter().any(|route| route.contains(&endpoint.ip())));
    }

    /// Takes what is another peer's by now: virtual addresses, and subnets that are exactly those.
    pub(super) fn lose(&mut self, other: &Self) {
        let (addresses, subnets) = (&other.config.virtual_addresses, &other.config.subnets);
        self.config.virtual_addresses.retain(|address| !addresses.contains(address));
        self.config.subnets.retain(|subnet| !subnets.contains(subnet));
        // It is what is kept on disk.
        let is_lost = |address: &str| address.parse().is_ok_and(|address| addresses.contains(&address));
        self.message.virtual_addresses.retain(|address| !is_lost(address));
        let is_lost = |subnet: &str| route(subnet).is_ok_and(|subnet| subnets.contains(&subnet));
        self.message.subnets.retain(|subnet| !is_lost(subnet));
    }

    /// Carries no subnet with `address` in it any more.
    pub(super) fn lose_subnets_at(&mut self, address: IpAddr) {
        self.config.subnets.retain(|subnet| !subnet.contains(&address));
        self.message.subnets.retain(|subnet| !route(subnet).is_ok_and(|subnet| subnet.contains(&address)));
    }
}

/// Where a datagram reaches the peer, its private endpoints first.
fn endpoints(message: &Peer) -> Vec<SocketAddr> {
    let mut endpoints: Vec<SocketAddr> = Vec::new();
    let private = message.private_endpoints.iter().take(MAX_ENDPOINTS - MAX_REFLEXIVE);
    let reflexive = message.reflexive_endpoint.iter().chain(&message.reflexive_endpoints);
    for endpoint in private.chain(reflexive).filter_map(socket_address) {
        if !endpoints.contains(&endpoint) && endpoints.len() < MAX_ENDPOINTS {
            endpoints.push(endpoint);
        }
    }
    endpoints
}

/// An endpoint that a datagram can be sent to.
pub(super) fn socket_address(endpoint: &Endpoint) -> Option<SocketAddr> {
    let address: IpAddr = endpoint.address.parse().ok()?;
    let port = u16::try_from(endpoint.port).ok().filter(|port| *port != 0)?;
    let usable = !address.is_unspecified() && !address.is_multicast();
    usable.then_some(SocketAddr::new(address, port))
}

/// `address` as the API writes it.
pub(super) fn endpoint(address: &SocketAddr) -> Endpoint {
    Endpoint { address: address.ip().to_string(), port: address.port().into() }
}
