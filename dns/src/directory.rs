//! What the engine asks of whoever knows the network: zones, devices, and who may see what. The registrar
//! implements [`Directory`] over its index; every call is one look into memory and must not block.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;
use muster_common::name::{Domain, Label};

/// Who asks, as far as it matters for what they may see.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Viewer {
    /// Anybody: sees the apex of each zone and nothing else.
    Stranger,
    /// Somebody in a source range that the operator has opened, or an operator: sees every network.
    Open,
    /// A device, known by its certificate: sees what policy lets it see of its own network.
    Member {
        /// Name of the device's network.
        network: Label,
        /// The device's uid.
        uid: Label,
    },
}

/// A network's zone: its domain, with what the apex answers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Zone {
    /// The network's domain.
    pub domain: Domain,
    /// Name of the network.
    pub network: Label,
    /// Time to live of records, 0 to 3,600 seconds.
    pub ttl: u32,
    /// SOA serial: Unix time of the last change to a served record, never going back.
    pub serial: u32,
    /// What A and AAAA of the apex answer.
    pub public_addresses: Vec<IpAddr>,
    /// Addresses of `ns.dns.<domain>`: those that the registrars answer DNS on.
    pub name_server_addresses: Vec<IpAddr>,
    /// The pools that virtual addresses and ClusterIPs come from. The network's reverse zones are cut from
    /// them at octets (IPv4) and nibbles (IPv6).
    pub pools: Vec<IpNet>,
}

/// What the records of one device are made from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Device {
    /// The device's name.
    pub name: Label,
    /// The virtual addresses, at most one per family.
    pub virtual_addresses: Vec<IpAddr>,
    /// The private addresses, best first.
    pub private_addresses: Vec<IpAddr>,
    /// Addresses and port of the home director, best first.
    pub director: Vec<SocketAddr>,
}

/// What the engine answers from. Pairs that policy hides from each other must look as if they did not exist:
/// `device` and `device_at` return `None` for them.
pub trait Directory: Send + Sync {
    /// Whether the directory holds everything by now. Until then, what it does not find is answered with
    /// SERVFAIL and not denied.
    fn is_loaded(&self) -> bool;

    /// The zone with the longest domain at or above `name`, which is in lower case and has no trailing dot.
    fn zone(&self, name: &str) -> Option<Arc<Zone>>;

    /// The zone that has a pool which holds all of `prefix`, among the networks that `viewer` may see.
    /// Never called for [`Viewer::Stranger`].
    fn reverse_zone(&self, viewer: &Viewer, prefix: IpNet) -> Option<Arc<Zone>>;

    /// The device called `label` (in lower case) in `zone`, if `viewer` may see it. A device sees itself.
    /// Only called when `viewer` may see the zone's network.
    fn device(&self, zone: &Zone, viewer: &Viewer, label: &str) -> Option<Device>;

    /// The name of the device with virtual address `address` in `zone`, if `viewer` may see it.
    /// Only called when `viewer` may see the zone's network.
    fn device_at(&self, zone: &Zone, viewer: &Viewer, address: IpAddr) -> Option<Label>;
}

impl<D: Directory + ?Sized> Directory for Arc<D> {
    fn is_loaded(&self) -> bool {
        (**self).is_loaded()
    }

    fn zone(&self, name: &str) -> Option<Arc<Zone>> {
        (**self).zone(name)
    }

    fn reverse_zone(&self, viewer: &Viewer, prefix: IpNet) -> Option<Arc<Zone>> {
        (**self).reverse_zone(viewer, prefix)
    }

    fn device(&self, zone: &Zone, viewer: &Viewer, label: &str) -> Option<Device> {
        (**self).device(zone, viewer, label)
    }

    fn device_at(&self, zone: &Zone, viewer: &Viewer, address: IpAddr) -> Option<Label> {
        (**self).device_at(zone, viewer, address)
    }
}
