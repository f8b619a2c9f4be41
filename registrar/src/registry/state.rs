//! A network with all that is in it, and its pools and DNS serials.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use muster_common::time::Timestamp;
use muster_proto::storage::StoredAddress;
use uuid::Uuid;

use super::{
    device::Device,
    devices::Devices,
    director::Directors,
    field,
    keys::Owner,
    network::Network,
    presence::Presence,
    readiness::Readiness,
    selection::Selection,
    services::{Effects, Services, View},
    site::Carrier,
    token::Token,
    virtual_services::VirtualServices,
};
use crate::{
    allocation::{Pool, PoolKind},
    store::Revision,
};

/// A network with all that is in it.
#[derive(Clone, Debug)]
pub struct NetworkState {
    /// The network itself.
    pub network: Arc<Network>,
    /// Its devices.
    pub devices: Devices,
    /// Its directors.
    pub directors: Directors,
    /// Its tokens, by name.
    pub tokens: BTreeMap<Box<str>, Arc<Token>>,
    /// Its namespaces, Services and EndpointSlices.
    pub services: Services,
    /// Which devices its Services select.
    pub(super) selection: Selection,
    /// What agents are told of Services that have virtual IPs.
    pub(super) virtual_services: VirtualServices,
    /// Where the sessions are of devices that are endpoints of Services; nothing is known of those that are not in it.
    pub presence: HashMap<Uuid, Presence>,
    /// What readiness probes have found out of devices.
    pub readiness: HashMap<Uuid, Readiness>,
    /// The subnets of sites that are carried, and by which device.
    pub carriers: BTreeMap<IpNet, Carrier>,
    /// Devices that carry something for hosts without an agent, or want or may.
    sites: BTreeSet<Uuid>,
    /// Unix time of the last change to a record that DNS serves; never goes back.
    pub serial: u32,
    /// The same of records of external addresses.
    pub external_serial: u32,
    /// The same of headless Services without external address, which the external zone can also serve.
    pub headless_serial: u32,
    /// Devices by namespace.
    devices_in: BTreeMap<Arc<str>, usize>,
    pools: BTreeMap<PoolKind, Pool>,
    /// Addresses that have been released, with the revision and the time of that.
    released: BTreeMap<(Owner, IpAddr), (Revision, Timestamp)>,
}

impl NetworkState {
    pub(super) fn new(network: Arc<Network>, now: Timestamp) -> Self {
        let mut state = Self {
            network,
            devices: Devices::default(),
            directors: Directors::default(),
            tokens: BTreeMap::new(),
            services: Services::default(),
            selection: Selection::default(),
            virtual_services: VirtualServices::default(),
            presence: HashMap::new(),
            readiness: HashMap::new(),
            carriers: BTreeMap::new(),
            sites: BTreeSet::new(),
            serial: unix(now),
            external_serial: unix(now),
            headless_serial: unix(now),
            devices_in: BTreeMap::new(),
            pools: BTreeMap::new(),
            released: BTreeMap::new(),
        };
        state.fill_pools();
        state
    }

    /// Makes the pools agree with the network; those that have not changed keep their reservations.
    pub(super) fn fill_pools(&mut self) {
        for kind in PoolKind::ALL {
            let Some(net) = self.network.pools.get(kind) else {
                self.pools.remove(&kind);
                continue;
            };
            if let Some(pool) = self.pools.get_mut(&kind).filter(|pool| pool.net() == net) {
                pool.set_quarantine(self.network.quarantine);
                continue;
            }
            // The network was checked, so that its pools can be made.
            let Ok(mut pool) = Pool::new(net, self.network.quarantine) else { continue };
            for ((owner, address), (_, at)) in &self.released {
                if pool_kind(*owner, *address) == kind {
                    pool.release(*address, *at);
                }
            }
            for address in self.devices.after("").flat_map(|device| device.addresses()) {
                if pool_kind(Owner::Device, address) == kind {
                    pool.confirm(address);
                }
            }
            for address in self.services.services.iter().flat_map(|service| service.cluster_ips()) {
                if pool_kind(Owner::Service, *address) == kind {
                    pool.confirm(*address);
                }
            }
            self.pools.insert(kind, pool);
        }
    }

    /// The pools that there are.
    pub fn pools(&self) -> impl Iterator<Item = (PoolKind, &Pool)> {
        self.pools.iter().map(|(kind, pool)| (*kind, pool))
    }

    /// The pool of a kind.
    pub fn pool(&mut self, kind: PoolKind) -> Option<&mut Pool> {
        self.pools.get_mut(&kind)
    }

    /// When `address` was released for the last time: a revision, and 0 if the store does not know of it.
    pub(crate) fn released_revision(&self, owner: Owner, address: IpAddr) -> Revision {
        self.released.get(&(owner, address)).map_or(0, |(revision, _)| *revision)
    }

    /// Every address that has been released, with the revision of that.
    pub(crate) fn released(&self) -> impl Iterator<Item = (Owner, IpAddr, Revision)> {
        self.released.iter().map(|((owner, address), (revision, _))| (*owner, *address, *revision))
    }

    /// The addresses whose quarantine is over at `now`, with the revision of their release.
    pub(crate) fn released_before(&self, now: Timestamp) -> impl Iterator<Item = (Owner, IpAddr, Revision)> {
        let quarantine = self.network.quarantine;
        let over = self.released.iter().filter(move |(_, (_, at))| *at + quarantine <= now);
        over.map(|((owner, address), (revision, _))| (*owner, *address, *revision))
    }

    pub(super) fn set_address(
        &mut self,
        owner: Owner,
        address: IpAddr,
        stored: &StoredAddress,
        revision: Revision,
    ) {
        let pool = self.pools.get_mut(&pool_kind(owner, address));
        match &stored.released_at {
            Some(at) => {
                let at = field::timestamp(at);
                self.released.insert((owner, address), (revision, at));
                if let Some(pool) = pool {
                    pool.release(address, at);
                }
            }
            None => {
                self.released.remove(&(owner, address));
                if let Some(pool) = pool {
                    pool.confirm(address);
                }
            }
        }
    }

    pub(super) fn forget_address(&mut self, owner: Owner, address: IpAddr) {
        self.released.remove(&(owner, address));
        if let Some(pool) = self.pools.get_mut(&pool_kind(owner, address)) {
            pool.forget(address);
        }
    }

    pub(super) fn touch(&mut self, now: Timestamp) {
        self.serial = self.serial.max(unix(now));
    }

    /// Moves the serials of all zones.
    pub(super) fn touch_all(&mut self, now: Timestamp) {
        self.touch(now);
        self.external_serial = self.external_serial.max(unix(now));
    }

    /// Moves the serials for a change of the network itself.
    pub(super) fn network_changed(&mut self, old: &Network, now: Timestamp) {
        let new = self.network.clone();
        let apex = |network: &Network| (network.external_domain.clone(), network.record_ttl, network.pools);
        if apex(old) != apex(&new)
            || (&old.domain, &old.public_addresses, &old.directors)
                != (&new.domain, &new.public_addresses, &new.directors)
        {
            self.touch(now);
        }
        if apex(old) != apex(&new) {
            self.touch_all(now);
        }
    }

    /// Moves the serials for a change of Services.
    pub(super) fn services_changed(&mut self, effects: &Effects, now: Timestamp) {
        for (serial, moves) in [
            (&mut self.serial, effects.zone),
            (&mut self.external_serial, effects.external),
            (&mut self.headless_serial, effects.headless),
        ] {
            if moves {
                *serial = (*serial).max(unix(now));
            }
        }
    }

    /// Goes on with the serials of `older`, which must not go back.
    pub(super) fn continue_serials(&mut self, older: &Self) {
        self.serial = self.serial.max(older.serial);
        self.external_serial = self.external_serial.max(older.external_serial);
        self.headless_serial = self.headless_serial.max(older.headless_serial);
    }

    /// Puts a device in the place of the one with the same uid.
    pub(super) fn put_device(&mut self, device: &Arc<Device>) -> Option<Arc<Device>> {
        let old = self.devices.insert(device);
        *self.devices_in.entry(device.namespace.clone()).or_default() += 1;
        self.left(old.as_deref());
        if device.site.as_ref().is_some_and(|site| site.proxied_by.is_none()) {
            self.sites.insert(device.uid);
        }
        old
    }

    /// Removes a device.
    pub(super) fn remove_device(&mut self, uid: Uuid) -> Option<Arc<Device>> {
        let old = self.devices.remove(uid);
        self.left(old.as_deref());
        old
    }

    fn left(&mut self, device: Option<&Device>) {
        let Some(device) = device else { return };
        self.sites.remove(&device.uid);
        if let Some(count) = self.devices_in.get_mut(&device.namespace) {
            *count -= 1;
            if *count == 0 {
                self.devices_in.remove(&device.namespace);
            }
        }
    }

    /// The devices that carry something for hosts without an agent, or want or may, by uid.
    pub fn sites(&self) -> impl Iterator<Item = &Arc<Device>> {
        self.sites.iter().filter_map(|uid| self.devices.by_uid(*uid))
    }

    /// How many devices are in a namespace.
    pub fn devices_in(&self, namespace: &str) -> usize {
        self.devices_in.get(namespace).copied().unwrap_or_default()
    }

    /// Whether `namespace` (in lower case) exists, and is not being deleted.
    pub fn has_namespace(&self, namespace: &str) -> bool {
        self.services.has_namespace(namespace)
    }

    /// The namespaces that there are, `default` among them, and that are not being deleted.
    pub fn namespaces(&self) -> impl Iterator<Item = &str> {
        self.services.namespaces()
    }

    /// What DNS answers for the Service called `name` in `namespace` (both in lower case): with its slices, and only
    /// while its namespace exists.
    pub fn service(&self, namespace: &str, name: &str) -> Option<&Arc<View>> {
        self.services.view(namespace, name)
    }

    /// The Services that have `address` as ClusterIP, endpoint or external address, by namespace and name.
    pub fn services_at(&self, address: IpAddr) -> impl Iterator<Item = &Arc<View>> {
        self.services.views_at(address)
    }

    /// All Services, as DNS answers for them, by namespace and name.
    pub fn services(&self) -> impl Iterator<Item = &Arc<View>> {
        self.services.views()
    }
}

/// The pool that an address of `owner`'s comes from.
pub(crate) fn pool_kind(owner: Owner, address: IpAddr) -> PoolKind {
    match (owner, address) {
        (Owner::Device, IpAddr::V4(_)) => PoolKind::DeviceV4,
        (Owner::Device, IpAddr::V6(_)) => PoolKind::DeviceV6,
        (Owner::Service, IpAddr::V4(_)) => PoolKind::ServiceV4,
        (Owner::Service, IpAddr::V6(_)) => PoolKind::ServiceV6,
    }
}

fn unix(now: Timestamp) -> u32 {
    now.unix_seconds().try_into().unwrap_or(u32::MAX)
}
