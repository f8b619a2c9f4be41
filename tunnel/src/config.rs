//! Settings of a tunnel and of a peer.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use ipnet::IpNet;

use crate::{
    cipher::Cipher,
    endpoint::{DirectorId, Handle},
    key::{PresharedKey, PrivateKey, PublicKey},
};

/// What a tunnel is made of.
#[derive(Clone, Debug)]
pub struct Config {
    /// This device's private key.
    pub private_key: PrivateKey,
    /// Seed of everything random: session indices, ephemeral keys, cookies, jitter. 32 octets from the system's
    /// generator, new for every tunnel; a secret.
    pub seed: [u8; 32],
    /// MTU of the TUN device, in octets.
    pub mtu: usize,
    /// Initiations a second beyond which cookies are demanded; 0 stands for [`crate::HANDSHAKE_RATE`].
    pub handshake_rate: u32,
    /// Whether handshakes for AES-256-GCM are taken, and begun with peers that are configured so. Only worthwhile where
    /// the processor has instructions for it.
    pub accepts_aes: bool,
}

/// Everything the tunnel needs to know of one peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerConfig {
    /// Its public key.
    pub public_key: PublicKey,
    /// A key that both sides mix in, if any.
    pub preshared_key: Option<PresharedKey>,
    /// The addresses that it may send from and is sent to.
    pub virtual_addresses: Vec<IpAddr>,
    /// What it carries beside: networks behind it. Of two peers with overlapping ones the longer prefix counts, and
    /// addresses of peers count before all.
    pub subnets: Vec<IpNet>,
    /// Where it may be reached, best first; may be empty if it will call. Initiations go to all; the first that
    /// answers becomes the endpoint.
    pub endpoints: Vec<SocketAddr>,
    /// Directors through which it may be reached, its home first, and what it is called there. Without any it is treated
    /// as any WireGuard peer is: nothing is probed, and it is where its last datagram came from.
    pub relays: Vec<(DirectorId, Handle)>,
    /// Send something at least this often; `None` for no such need.
    pub persistent_keepalive: Option<Duration>,
    /// What the sessions that this side begins are sealed with. A peer that does not answer to [`Cipher::Aes256Gcm`] is
    /// tried with WireGuard's own in turn.
    pub cipher: Cipher,
}

impl PeerConfig {
    /// A peer of which only the key is known.
    pub fn new(public_key: PublicKey) -> Self {
        Self {
            public_key,
            preshared_key: None,
            virtual_addresses: Vec::new(),
            subnets: Vec::new(),
            endpoints: Vec::new(),
            relays: Vec::new(),
            persistent_keepalive: None,
            cipher: Cipher::default(),
        }
    }
}
