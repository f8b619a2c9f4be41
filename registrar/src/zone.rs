//! What DNS answers from: the registry, as [`muster_dns::directory::Directory`]. Every answer about a device goes
//! through the same policy as a look-up.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, RwLock},
};

use ipnet::IpNet;
use muster_common::{name::Label, telemetry::Readiness};
use muster_dns::directory::{Device, Directory, Service, Viewer, Zone};
use std::sync::PoisonError;
use uuid::Uuid;

use crate::{
    registry::{
        self, Registry,
        index::{Index, NetworkState},
    },
    store::Revision,
};

/// What a zone was made from, apart from its serials.
type Basis = (Revision, Arc<[IpAddr]>);
type Made = BTreeMap<Arc<str>, (Basis, Arc<Zone>)>;

/// The zones of all networks.
#[derive(Debug)]
pub struct Zones {
    registry: Arc<Registry>,
    readiness: Readiness,
    /// Addresses that this registrar answers DNS on.
    name_servers: Vec<IpAddr>,
    /// Whether external zones have headless Services.
    external_headless: bool,
    /// Zones as they were last made, by network.
    made: RwLock<Made>,
}

impl Zones {
    /// The zones of `registry`, answered at `name_servers` and by all other registrars. Until `readiness` says so, nothing
    /// is denied.
    pub fn new(registry: Arc<Registry>, readiness: Readiness, name_servers: Vec<IpAddr>) -> Self {
        Self { registry, readiness, name_servers, external_headless: false, made: RwLock::default() }
    }

    /// The same, and `headless` says whether external zones have headless Services: then these move the serial.
    #[must_use]
    pub fn with_external_headless(self, headless: bool) -> Self {
        Self { external_headless: headless, ..self }
    }

    /// Whether `viewer` sees no network at all: a stranger, or a device that was deleted or revoked while its
    /// certificate is valid still.
    pub fn is_outsider(&self, viewer: &Viewer) -> bool {
        match viewer {
            Viewer::Stranger => true,
            Viewer::Open => false,
            Viewer::Member { network, .. } => {
                let index = self.registry.read();
                !index.network(network.as_str()).is_some_and(|state| is_inside(state, viewer))
            }
        }
    }

    fn external_serial(&self, state: &NetworkState) -> u32 {
        let headless = if self.external_headless { state.headless_serial } else { 0 };
        state.external_serial.max(headless)
    }

    /// The zone of a network, made anew only when it has changed.
    fn zone_of(&self, index: &Index, state: &NetworkState) -> Arc<Zone> {
        let (network, others) = (&state.network, index.registrars().name_servers());
        let current = |((revision, servers), zone): &&(Basis, Arc<Zone>)| {
            let serials = (zone.serial, zone.external_serial);
            *revision == network.revision
                && servers == others
                && serials == (state.serial, self.external_serial(state))
        };
        let made = self.made.read().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, zone)) = made.get(&network.name).filter(current) {
            return zone.clone();
        }
        drop(made);
        let mut name_server_addresses = self.name_servers.clone();
        name_server_addresses.extend(others.iter().filter(|other| !self.name_servers.contains(other)));
        let zone = Arc::new(Zone {
            domain: network.domain.clone(),
            network: network.label.clone(),
            ttl: network.record_ttl.as_secs().try_into().unwrap_or(u32::MAX),
            serial: state.serial,
            public_addresses: network.public_addresses.clone(),
            name_server_addresses,
            pools: network.pools.iter().map(|(_, net)| net).collect(),
            external_domain: network.external_domain.clone(),
            external_serial: self.external_serial(state),
        });
        let mut made = self.made.write().unwrap_or_else(PoisonError::into_inner);
        made.insert(network.name.clone(), ((network.revision, others.clone()), zone.clone()));
        zone
    }

    /// Looks into the network of `zone`, as long as it is the one that the zone was made from.
    fn look<R>(&self, zone: &Zone, look: impl FnOnce(&NetworkState) -> Option<R>) -> Option<R> {
        let index = self.registry.read();
        let state = index.network(zone.network.as_str())?;
        if state.network.domain == zone.domain { look(state) } else { None }
    }
}

impl Directory for Zones {
    fn is_loaded(&self) -> bool {
        self.readiness.get()
    }

    fn zone(&self, name: &str) -> Option<Arc<Zone>> {
        let index = self.registry.read();
        let mut domain = name;
        loop {
            let found = index.network_by_domain(domain).or_else(|| index.network_by_external_domain(domain));
            if let Some(state) = found {
                return Some(self.zone_of(&index, state));
            }
            (_, domain) = domain.split_once('.')?;
        }
    }

    fn reverse_zone(&self, viewer: &Viewer, prefix: IpNet) -> Option<Arc<Zone>> {
        let index = self.registry.read();
        let has = |state: &&NetworkState| {
            is_inside(state, viewer) && state.network.pools.iter().any(|(_, net)| net.contains(&prefix))
        };
        let state = match viewer {
            Viewer::Member { network, .. } => index.network(network.as_str()).filter(has),
            Viewer::Open | Viewer::Stranger => index.networks().find(has),
        }?;
        Some(self.zone_of(&index, state))
    }

    fn zones(&self, viewer: &Viewer) -> Vec<Arc<Zone>> {
        let index = self.registry.read();
        let seen = index.networks().filter(|state| is_inside(state, viewer));
        seen.map(|state| self.zone_of(&index, state)).collect()
    }

    fn device(&self, zone: &Zone, viewer: &Viewer, label: &str) -> Option<Device> {
        self.look(zone, |state| {
            let found = visible(state, viewer, state.devices.by_name(label)?)?;
            let lan_address = state.proxy_of(found).map(|(_, lan_address)| lan_address);
            let mut private_addresses: Vec<IpAddr> = Vec::with_capacity(found.endpoints.len());
            for address in lan_address.into_iter().chain(found.endpoints.iter().map(SocketAddr::ip)) {
                if !private_addresses.contains(&address) {
                    private_addresses.push(address);
                }
            }
            Some(Device {
                name: found.name.parse().ok()?,
                virtual_addresses: found.addresses().collect(),
                private_addresses,
                director: state.director_addresses(found),
            })
        })
    }

    fn device_at(&self, zone: &Zone, viewer: &Viewer, address: IpAddr) -> Option<Label> {
        self.look(zone, |state| visible(state, viewer, state.devices.by_address(address)?)?.name.parse().ok())
    }

    fn namespace(&self, zone: &Zone, namespace: &str) -> bool {
        self.look(zone, |state| state.has_namespace(namespace).then_some(())).is_some()
    }

    fn service(&self, zone: &Zone, viewer: &Viewer, namespace: &str, name: &str) -> Option<Arc<Service>> {
        self.look(zone, |state| state.service(namespace, name).filter(|_| is_inside(state, viewer)).cloned())
    }

    fn services_at(&self, zone: &Zone, viewer: &Viewer, address: IpAddr) -> Vec<Arc<Service>> {
        let found = |state: &NetworkState| {
            is_inside(state, viewer).then(|| state.services_at(address).cloned().collect())
        };
        self.look(zone, found).unwrap_or_default()
    }

    fn services(&self, zone: &Zone, viewer: &Viewer) -> Vec<Arc<Service>> {
        let found =
            |state: &NetworkState| is_inside(state, viewer).then(|| state.services().cloned().collect());
        self.look(zone, found).unwrap_or_default()
    }

    fn namespace_of(&self, zone: &Zone, address: IpAddr) -> Option<Label> {
        self.look(zone, |state| {
            let device = state.devices.by_address(address).filter(|device| state.is_reachable(device))?;
            device.namespace.parse().ok()
        })
    }

    fn member(&self, zone: &Zone, viewer: &Viewer) -> Option<(Label, Label)> {
        self.look(zone, |state| {
            let device = member_of(state, viewer)?;
            Some((device.name.parse().ok()?, device.namespace.parse().ok()?))
        })
    }
}

/// The device of a network that `viewer` is, unless it was revoked.
fn member_of<'a>(state: &'a NetworkState, viewer: &Viewer) -> Option<&'a registry::Device> {
    let Viewer::Member { network, uid } = viewer else { return None };
    let device = state.devices.by_uid(Uuid::try_parse(uid.as_str()).ok()?)?;
    (*network == state.network.label && !device.revoked).then_some(device)
}

/// Whether `viewer` sees the Services of a network: all its devices do.
fn is_inside(state: &NetworkState, viewer: &Viewer) -> bool {
    match viewer {
        Viewer::Stranger => false,
        Viewer::Open => true,
        Viewer::Member { .. } => member_of(state, viewer).is_some(),
    }
}

/// `device`, if `viewer` may see it.
fn visible<'a>(
    state: &NetworkState,
    viewer: &Viewer,
    device: &'a registry::Device,
) -> Option<&'a registry::Device> {
    let may = match viewer {
        Viewer::Stranger => false,
        Viewer::Open => state.is_reachable(device),
        Viewer::Member { .. } => state.sees(member_of(state, viewer)?, device),
    };
    may.then_some(device)
}

#[cfg(test)]
mod tests;
