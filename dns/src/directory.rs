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
    /// Domain of the external zone of the network (specification 12), if it has one.
    pub external_domain: Option<Domain>,
    /// External zone's SOA serial: moves only when an external record does.
    pub external_serial: u32,
}

/// What stands behind a Service's own name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ServiceKind {
    /// Its cluster IPs, at most one per family.
    ClusterIp(Vec<IpAddr>),
    /// Its ready endpoints.
    Headless,
    /// Another name, as it was written.
    ExternalName(String),
}

/// The protocol of a port, as in `_tcp`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// A port of a Service or of its endpoints.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Port {
    /// The name in lower case; empty for an unnamed port.
    pub name: String,
    /// The protocol.
    pub protocol: Protocol,
    /// 1 to 65,535.
    pub number: u16,
}

/// One address of an endpoint that counts (specification 4): those that are not ready are left out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endpoint {
    /// The endpoint's hostname, in lower case, if it has one.
    pub hostname: Option<Label>,
    /// Name of the device that the endpoint refers to, if it does.
    pub device: Option<Label>,
    /// The address.
    pub address: IpAddr,
    /// The ports of the slice that the endpoint is in; shared by all endpoints of it.
    pub ports: Arc<[Port]>,
}

/// Where a Service is reached from outside (specification 12).
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ExternalAddress {
    /// An external IP, or a load balancer's address.
    Ip(IpAddr),
    /// A load balancer's host name.
    Host(String),
}

/// What the records of one Service are made from: its slices are merged.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Service {
    /// The Service's name.
    pub name: Label,
    /// The namespace it is in.
    pub namespace: Label,
    /// What its own name answers.
    pub kind: ServiceKind,
    /// The Service's ports.
    pub ports: Vec<Port>,
    /// Its ready endpoints, in the order of slices' names and of each slice.
    pub endpoints: Vec<Endpoint>,
    /// Its external addresses.
    pub external: Vec<ExternalAddress>,
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

    /// The zone with the longest domain or external domain at or above `name`, which is in lower case and has no
    /// trailing dot.
    fn zone(&self, name: &str) -> Option<Arc<Zone>>;

    /// The zone that has a pool which holds all of `prefix`, among the networks that `viewer` may see.
    /// Never called for [`Viewer::Stranger`].
    fn reverse_zone(&self, viewer: &Viewer, prefix: IpNet) -> Option<Arc<Zone>>;

    /// The zones that `viewer` may see more of than the apex, in a fixed order: reverse zones beside those of the
    /// pools (specification 7) point into them. Never called for [`Viewer::Stranger`].
    fn zones(&self, viewer: &Viewer) -> Vec<Arc<Zone>> {
        let _ = viewer;
        Vec::new()
    }

    /// The device called `label` (in lower case) in `zone`, if `viewer` may see it. A device sees itself.
    /// Only called when `viewer` may see the zone's network.
    fn device(&self, zone: &Zone, viewer: &Viewer, label: &str) -> Option<Device>;

    /// The name of the device with virtual address `address` in `zone`, if `viewer` may see it.
    /// Only called when `viewer` may see the zone's network.
    fn device_at(&self, zone: &Zone, viewer: &Viewer, address: IpAddr) -> Option<Label>;

    /// Whether `namespace` (in lower case) exists in `zone`.
    fn namespace(&self, zone: &Zone, namespace: &str) -> bool {
        let _ = (zone, namespace);
        false
    }

    /// The Service called `name` in `namespace` (both in lower case), if `viewer` may see it.
    fn service(&self, zone: &Zone, viewer: &Viewer, namespace: &str, name: &str) -> Option<Arc<Service>> {
        let _ = (zone, viewer, namespace, name);
        None
    }

    /// The Services that have `address` as a cluster IP, an endpoint's, or an external one, by namespace and name.
    fn services_at(&self, zone: &Zone, viewer: &Viewer, address: IpAddr) -> Vec<Arc<Service>> {
        let _ = (zone, viewer, address);
        Vec::new()
    }

    /// All Services that `viewer` may see, by namespace and name: for zone transfer.
    fn services(&self, zone: &Zone, viewer: &Viewer) -> Vec<Arc<Service>> {
        let _ = (zone, viewer);
        Vec::new()
    }

    /// The namespace of the live device that has `address` as its virtual address (specification 6, 15).
    fn namespace_of(&self, zone: &Zone, address: IpAddr) -> Option<Label> {
        let _ = (zone, address);
        None
    }

    /// Name and namespace of the device that `viewer` is, from whatever address it asks.
    fn member(&self, zone: &Zone, viewer: &Viewer) -> Option<(Label, Label)> {
        let _ = (zone, viewer);
        None
    }
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

    fn zones(&self, viewer: &Viewer) -> Vec<Arc<Zone>> {
        (**self).zones(viewer)
    }

    fn device(&self, zone: &Zone, viewer: &Viewer, label: &str) -> Option<Device> {
        (**self).device(zone, viewer, label)
    }

    fn device_at(&self, zone: &Zone, viewer: &Viewer, address: IpAddr) -> Option<Label> {
        (**self).device_at(zone, viewer, address)
    }

    fn namespace(&self, zone: &Zone, namespace: &str) -> bool {
        (**self).namespace(zone, namespace)
    }

    fn service(&self, zone: &Zone, viewer: &Viewer, namespace: &str, name: &str) -> Option<Arc<Service>> {
        (**self).service(zone, viewer, namespace, name)
    }

    fn services_at(&self, zone: &Zone, viewer: &Viewer, address: IpAddr) -> Vec<Arc<Service>> {
        (**self).services_at(zone, viewer, address)
    }

    fn services(&self, zone: &Zone, viewer: &Viewer) -> Vec<Arc<Service>> {
        (**self).services(zone, viewer)
    }

    fn namespace_of(&self, zone: &Zone, address: IpAddr) -> Option<Label> {
        (**self).namespace_of(zone, address)
    }

    fn member(&self, zone: &Zone, viewer: &Viewer) -> Option<(Label, Label)> {
        (**self).member(zone, viewer)
    }
}
