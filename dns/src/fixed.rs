//! A directory whose content does not change while it is served: for tests, simulations and load generators.

use std::{net::IpAddr, sync::Arc};

use ipnet::IpNet;
use muster_common::name::Label;

use crate::directory::{Device, Directory, ExternalAddress, Service, ServiceKind, Viewer, Zone};

/// Zones with their devices, searched one after another.
#[derive(Clone, Debug, Default)]
pub struct FixedDirectory {
    /// The zones, each with its devices.
    pub zones: Vec<(Arc<Zone>, Vec<Device>)>,
    /// Names of networks, each with a namespace that exists in it.
    pub namespaces: Vec<(Label, Label)>,
    /// Names of networks, each with a Service, sorted by network, namespace and name.
    pub services: Vec<(Label, Arc<Service>)>,
    /// Names of networks, each with a device's virtual address and the device's namespace.
    pub device_namespaces: Vec<(Label, IpAddr, Label)>,
    /// Pairs of a viewer's uid and the name of a device or Service that policy hides from it.
    pub hidden: Vec<(Label, Label)>,
    /// Whether the directory is still being filled.
    pub loading: bool,
}

impl FixedDirectory {
    fn visible(&self, viewer: &Viewer, name: &Label) -> bool {
        let Viewer::Member { uid, .. } = viewer else { return true };
        !self.hidden.iter().any(|(viewer, hidden)| viewer == uid && hidden == name)
    }

    fn services_of(&self, zone: &Zone, viewer: &Viewer) -> impl Iterator<Item = &Arc<Service>> {
        let services = self.services.iter().filter(|(network, _)| *network == zone.network);
        services.map(|(_, service)| service).filter(|service| self.visible(viewer, &service.name))
    }

    fn devices(&self, zone: &Zone) -> impl Iterator<Item = &Device> {
        self.zones.iter().filter(|(z, _)| z.network == zone.network).flat_map(|(_, devices)| devices)
    }
}

impl Directory for FixedDirectory {
    fn is_loaded(&self) -> bool {
        !self.loading
    }

    fn zone(&self, name: &str) -> Option<Arc<Zone>> {
        let longest = |zone: &Zone| {
            let domains = [Some(&zone.domain), zone.external_domain.as_ref()];
            let above = domains.into_iter().flatten().filter(|domain| domain.relative(name).is_some());
            above.map(|domain| domain.as_str().len()).max()
        };
        let above = self.zones.iter().filter_map(|(zone, _)| Some((longest(zone)?, zone)));
        above.max_by_key(|(length, _)| *length).map(|(_, zone)| Arc::clone(zone))
    }

    fn reverse_zone(&self, viewer: &Viewer, prefix: IpNet) -> Option<Arc<Zone>> {
        let holds = |zone: &Arc<Zone>| zone.pools.iter().any(|pool| pool.contains(&prefix));
        self.zones(viewer).into_iter().find(holds)
    }

    fn zones(&self, viewer: &Viewer) -> Vec<Arc<Zone>> {
        let zones = self.zones.iter().map(|(zone, _)| zone).filter(|zone| match viewer {
            Viewer::Stranger => false,
            Viewer::Open => true,
            Viewer::Member { network, .. } => *network == zone.network,
        });
        zones.cloned().collect()
    }

    fn device(&self, zone: &Zone, viewer: &Viewer, label: &str) -> Option<Device> {
        self.devices(zone).find(|d| d.name.as_str() == label && self.visible(viewer, &d.name)).cloned()
    }

    fn device_at(&self, zone: &Zone, viewer: &Viewer, address: IpAddr) -> Option<Label> {
        let found = self.devices(zone).find(|d| d.virtual_addresses.contains(&address));
        found.filter(|d| self.visible(viewer, &d.name)).map(|d| d.name.clone())
    }

    fn namespace(&self, zone: &Zone, namespace: &str) -> bool {
        self.namespaces.iter().any(|(n, name)| *n == zone.network && name.as_str() == namespace)
    }

    fn service(&self, zone: &Zone, viewer: &Viewer, namespace: &str, name: &str) -> Option<Arc<Service>> {
        let mut services = self.services_of(zone, viewer);
        services.find(|s| s.namespace.as_str() == namespace && s.name.as_str() == name).cloned()
    }

    fn services_at(&self, zone: &Zone, viewer: &Viewer, address: IpAddr) -> Vec<Arc<Service>> {
        let at = |service: &&Arc<Service>| {
            matches!(&service.kind, ServiceKind::ClusterIp(addresses) if addresses.contains(&address))
                || service.endpoints.iter().any(|endpoint| endpoint.address == address)
                || service.external.contains(&ExternalAddress::Ip(address))
        };
        self.services_of(zone, viewer).filter(at).cloned().collect()
    }

    fn services(&self, zone: &Zone, viewer: &Viewer) -> Vec<Arc<Service>> {
        self.services_of(zone, viewer).cloned().collect()
    }

    fn namespace_of(&self, zone: &Zone, address: IpAddr) -> Option<Label> {
        let mut devices = self.device_namespaces.iter();
        devices.find(|(n, a, _)| *n == zone.network && *a == address).map(|(_, _, label)| label.clone())
    }
}
