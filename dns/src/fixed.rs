//! A directory whose content does not change while it is served: for tests, simulations and load generators.

use std::{net::IpAddr, sync::Arc};

use ipnet::IpNet;
use muster_common::name::Label;

use crate::directory::{Device, Directory, Viewer, Zone};

/// Zones with their devices, searched one after another.
#[derive(Clone, Debug, Default)]
pub struct FixedDirectory {
    /// The zones, each with its devices.
    pub zones: Vec<(Arc<Zone>, Vec<Device>)>,
    /// Pairs of a viewer's uid and the name of a device that policy hides from it.
    pub hidden: Vec<(Label, Label)>,
    /// Whether the directory is still being filled.
    pub loading: bool,
}

impl FixedDirectory {
    fn visible(&self, viewer: &Viewer, device: &Device) -> bool {
        let Viewer::Member { uid, .. } = viewer else { return true };
        !self.hidden.iter().any(|(viewer, name)| viewer == uid && *name == device.name)
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
        let above = self.zones.iter().filter(|(zone, _)| zone.domain.relative(name).is_some());
        above.max_by_key(|(zone, _)| zone.domain.as_str().len()).map(|(zone, _)| Arc::clone(zone))
    }

    fn reverse_zone(&self, viewer: &Viewer, prefix: IpNet) -> Option<Arc<Zone>> {
        let mut zones = self.zones.iter().map(|(zone, _)| zone).filter(|zone| match viewer {
            Viewer::Stranger => false,
            Viewer::Open => true,
            Viewer::Member { network, .. } => *network == zone.network,
        });
        zones.find(|zone| zone.pools.iter().any(|pool| pool.contains(&prefix))).cloned()
    }

    fn device(&self, zone: &Zone, viewer: &Viewer, label: &str) -> Option<Device> {
        self.devices(zone).find(|d| d.name.as_str() == label && self.visible(viewer, d)).cloned()
    }

    fn device_at(&self, zone: &Zone, viewer: &Viewer, address: IpAddr) -> Option<Label> {
        let found = self.devices(zone).find(|d| d.virtual_addresses.contains(&address));
        found.filter(|d| self.visible(viewer, d)).map(|d| d.name.clone())
    }
}
