//! What can be seen of the core from outside: configuration, peers, and how it stands with the registrar.

use std::net::SocketAddr;

use muster_proto::registration::{DeviceConfig, Peer};

use super::{Control, DirectorView, Offer, PeerInfo, RegistrarStatus, Settings, connection::Link};
use crate::datapath::PublicKey;

impl Control {
    /// The configuration in use, as it was received.
    pub fn config(&self) -> Option<&DeviceConfig> {
        self.config.as_ref()
    }

    /// What this host offers to the network.
    pub fn site_offer(&self) -> &Offer {
        &self.start.offer
    }

    /// The settings in use.
    pub fn settings(&self) -> Option<&Settings> {
        self.settings.as_ref()
    }

    /// The peers held, as the registrar described them, after the epoch of its store and the revision up to which that is
    /// right.
    pub fn held_peers(&self) -> (u64, u64, Vec<Peer>) {
        (self.epoch, self.revision, self.peers.messages())
    }

    /// The peers held.
    pub fn peers(&self) -> impl Iterator<Item = &PeerInfo> {
        self.peers.iter()
    }

    /// This device's WireGuard public key.
    pub const fn public_key(&self) -> PublicKey {
        self.start.public_key
    }

    /// The private endpoints that are announced.
    pub fn private_endpoints(&self) -> &[SocketAddr] {
        &self.endpoints
    }

    /// The directors known, home and second first.
    pub fn directors(&self) -> Vec<DirectorView<'_>> {
        self.directors.views()
    }

    /// What has gone wrong with directors so far: all kinds, by the name that metrics use, and how often.
    pub fn director_troubles(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.directors.troubles()
    }

    /// How often the home director has become another, the first not counted.
    pub const fn home_changes(&self) -> u64 {
        self.directors.home_changes()
    }

    /// (lookups wanted, of these under way)
    pub fn lookups(&self) -> (usize, usize) {
        self.lookups.len()
    }

    /// How it stands with the registrar.
    pub fn registrar(&self) -> RegistrarStatus {
        RegistrarStatus {
            address: self.registrars.current().to_owned(),
            connected: self.is_connected(),
            since: self.changed_at,
            last_error: self.last_error.clone(),
            refused: self.is_refused(),
        }
    }

    /// Whether the registrar refuses this device.
    pub const fn is_refused(&self) -> bool {
        self.refusals > 1
    }

    /// Whether a session is open.
    pub const fn is_connected(&self) -> bool {
        matches!(self.link, Link::Open { .. })
    }
}
