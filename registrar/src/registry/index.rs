//! The registry in memory: everything that is served is read from here. It is fed with the store's contents once,
//! then with every change in order, and is a pure function of them. Values that do not decode are told, skipped and
//! left in the store.

use std::{
    collections::{BTreeMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use bytes::Bytes;
use muster_common::time::Timestamp;
use muster_proto::storage::{Format, StoredAddress};
use prost::Message as _;
use uuid::Uuid;

use super::{
    device::Device,
    devices::Devices,
    field::{self, FieldError},
    keys::{self, Key, Owner},
    network::Network,
    token::Token,
};
use crate::{
    allocation::{Pool, PoolKind},
    store::{Event, KeyValue, Revision, WatchBatch},
};

/// The most texts whose memory is shared; enough for namespaces and agent versions of any sane network.
const INTERNED_MAX: usize = 4096;

/// What became of an object at a revision: created (no `old`), changed, or deleted (no `new`).
#[derive(Clone, Debug)]
pub enum Change {
    /// A network.
    Network {
        /// As it was.
        old: Option<Arc<Network>>,
        /// As it is.
        new: Option<Arc<Network>>,
    },
    /// A device.
    Device {
        /// As it was.
        old: Option<Arc<Device>>,
        /// As it is.
        new: Option<Arc<Device>>,
    },
    /// A token.
    Token {
        /// As it was.
        old: Option<Arc<Token>>,
        /// As it is.
        new: Option<Arc<Token>>,
    },
}

/// A value that was skipped.
#[derive(Clone, Debug)]
pub struct BadValue {
    /// Where it is.
    pub key: Bytes,
    /// Why it cannot be used.
    pub reason: String,
}

/// What a batch of the store's changes has changed in the index.
#[derive(Clone, Debug, Default)]
pub struct Applied {
    /// The index shows this revision now.
    pub revision: Revision,
    /// The changes, in order.
    pub changes: Vec<Change>,
    /// What was skipped.
    pub bad: Vec<BadValue>,
}

/// A network with all that is in it.
#[derive(Clone, Debug)]
pub struct NetworkState {
    /// The network itself.
    pub network: Arc<Network>,
    /// Its devices.
    pub devices: Devices,
    /// Its tokens, by name.
    pub tokens: BTreeMap<Box<str>, Arc<Token>>,
    /// Unix time of the last change to a record that DNS serves; never goes back.
    pub serial: u32,
    pools: BTreeMap<PoolKind, Pool>,
    /// Addresses that have been released, with the revision and the time of that.
    released: BTreeMap<(Owner, IpAddr), (Revision, Timestamp)>,
}

/// The registry in memory.
#[derive(Clone, Debug, Default)]
pub struct Index {
    revision: Revision,
    networks: BTreeMap<Arc<str>, NetworkState>,
    domains: BTreeMap<Box<str>, Arc<str>>,
    /// Networks to which nothing can be added, with the revision of their lock.
    locks: BTreeMap<Arc<str>, Revision>,
    /// Revision of `meta/networks`; 0 if it does not exist.
    networks_revision: Revision,
    format: Option<Format>,
    interned: HashSet<Arc<str>>,
}

impl NetworkState {
    fn new(network: Arc<Network>, now: Timestamp) -> Self {
        let mut state = Self {
            network,
            devices: Devices::default(),
            tokens: BTreeMap::new(),
            serial: unix(now),
            pools: BTreeMap::new(),
            released: BTreeMap::new(),
        };
        state.fill_pools();
        state
    }

    /// Makes the pools agree with the network; those that have not changed keep their reservations.
    fn fill_pools(&mut self) {
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

    fn set_address(&mut self, owner: Owner, address: IpAddr, stored: &StoredAddress, revision: Revision) {
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

    fn forget_address(&mut self, owner: Owner, address: IpAddr) {
        self.released.remove(&(owner, address));
        if let Some(pool) = self.pools.get_mut(&pool_kind(owner, address)) {
            pool.forget(address);
        }
    }

    fn touch(&mut self, now: Timestamp) {
        self.serial = self.serial.max(unix(now));
    }
}

impl Index {
    /// An empty index.
    pub fn new() -> Self {
        Self::default()
    }

    /// The revision that the index shows.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// A network with all that is in it.
    pub fn network(&self, name: &str) -> Option<&NetworkState> {
        self.networks.get(name)
    }

    pub(crate) fn network_mut(&mut self, name: &str) -> Option<&mut NetworkState> {
        self.networks.get_mut(name)
    }

    /// All networks, in the order of their names.
    pub fn networks(&self) -> impl Iterator<Item = &NetworkState> {
        self.networks.values()
    }

    /// The network whose domain is `domain`.
    pub fn network_by_domain(&self, domain: &str) -> Option<&NetworkState> {
        self.networks.get(self.domains.get(domain)?)
    }

    /// A device, by network and uid.
    pub fn device(&self, network: &str, uid: Uuid) -> Option<&Arc<Device>> {
        self.networks.get(network)?.devices.by_uid(uid)
    }

    /// What the store says of itself; `None` before `muster-registrar init`.
    pub fn format(&self) -> Option<&Format> {
        self.format.as_ref()
    }

    /// The number of devices in all networks.
    pub fn device_count(&self) -> usize {
        self.networks.values().map(|state| state.devices.len()).sum()
    }

    pub(crate) fn lock_revision(&self, network: &str) -> Option<Revision> {
        self.locks.get(network).copied()
    }

    /// The networks to which nothing can be added, with the revision of their lock.
    pub(crate) fn locks(&self) -> BTreeMap<Arc<str>, Revision> {
        self.locks.clone()
    }

    pub(crate) fn networks_revision(&self) -> Revision {
        self.networks_revision
    }

    /// Takes in a part of the store's contents; all parts show one revision, and come in the order of
    /// [`keys::loaded`].
    pub fn load(&mut self, kvs: &[KeyValue], now: Timestamp) -> Vec<BadValue> {
        let bad =
            |kv: &KeyValue, error: FieldError| BadValue { key: kv.key.clone(), reason: error.to_string() };
        kvs.iter().filter_map(|kv| self.put(kv, now, &mut Vec::new()).err().map(|e| bad(kv, e))).collect()
    }

    /// Says that everything has been taken in, as of `revision`.
    pub fn loaded(&mut self, revision: Revision) {
        self.revision = revision;
    }

    /// Applies the store's changes of one revision.
    pub fn apply(&mut self, batch: &WatchBatch, now: Timestamp) -> Applied {
        let mut applied = Applied { revision: batch.revision, ..Applied::default() };
        for event in &batch.events {
            let done = match event {
                Event::Put(kv) => self.put(kv, now, &mut applied.changes),
                Event::Delete { key } => {
                    self.delete(key, now, &mut applied.changes);
                    Ok(())
                }
            };
            if let Err(error) = done {
                applied.bad.push(BadValue { key: event.key().clone(), reason: error.to_string() });
            }
        }
        self.revision = self.revision.max(batch.revision);
        applied
    }

    fn put(&mut self, kv: &KeyValue, now: Timestamp, changes: &mut Vec<Change>) -> Result<(), FieldError> {
        let key = keys::parse(&kv.key).ok_or_else(|| FieldError::new("key", "is none of Muster's"))?;
        let decode = |error: prost::DecodeError| FieldError::new("value", error);
        let orphan = || FieldError::new("key", "belongs to a network that does not exist");
        match key {
            Key::Format => self.format = Some(Format::decode(&*kv.value).map_err(decode)?),
            Key::Networks => self.networks_revision = kv.mod_revision,
            Key::NetworkLock(name) => {
                self.locks.insert(name.into(), kv.mod_revision);
            }
            Key::Network(name) => {
                let network = Arc::new(Network::decode(&kv.value, kv.mod_revision)?);
                if *network.name != *name {
                    return Err(FieldError::new("metadata.name", "is not the name in the key"));
                }
                changes.push(self.put_network(network, now));
            }
            Key::Device { network, uid } => {
                let state = self.networks.get_mut(network).ok_or_else(orphan)?;
                let interned = &mut self.interned;
                let mut intern = |text: &str| intern(interned, text);
                let device =
                    Device::decode(&kv.value, &state.network.name, uid, kv.mod_revision, &mut intern)?;
                let new = Arc::new(device);
                let old = state.devices.insert(&new);
                if old.as_ref().is_none_or(|old| is_served_differently(old, &new)) {
                    state.touch(now);
                }
                changes.push(Change::Device { old, new: Some(new) });
            }
            Key::Address { network, owner, address } => {
                let state = self.networks.get_mut(network).ok_or_else(orphan)?;
                let stored = StoredAddress::decode(&*kv.value).map_err(decode)?;
                state.set_address(owner, address, &stored, kv.mod_revision);
            }
            Key::Token { network, name } => {
                let state = self.networks.get_mut(network).ok_or_else(orphan)?;
                let new = Arc::new(Token::decode(&kv.value, &state.network.name, kv.mod_revision)?);
                if *new.name != *name {
                    return Err(FieldError::new("metadata.name", "is not the name in the key"));
                }
                let old = state.tokens.insert(name.into(), new.clone());
                changes.push(Change::Token { old, new: Some(new) });
            }
            Key::DeviceName { .. } | Key::DeviceKey { .. } | Key::Root(_) => {}
        }
        Ok(())
    }

    fn put_network(&mut self, network: Arc<Network>, now: Timestamp) -> Change {
        let new = Some(network.clone());
        let (name, domain) = (network.name.clone(), network.domain.as_str().into());
        let old = match self.networks.get_mut(&name) {
            Some(state) => {
                let old = std::mem::replace(&mut state.network, network);
                state.fill_pools();
                state.touch(now);
                self.domains.remove(old.domain.as_str());
                Some(old)
            }
            None => {
                self.networks.insert(name.clone(), NetworkState::new(network, now));
                None
            }
        };
        self.domains.insert(domain, name);
        Change::Network { old, new }
    }

    fn delete(&mut self, key: &[u8], now: Timestamp, changes: &mut Vec<Change>) {
        match keys::parse(key) {
            Some(Key::Format) => self.format = None,
            Some(Key::Networks) => self.networks_revision = 0,
            Some(Key::NetworkLock(name)) => {
                self.locks.remove(name);
            }
            Some(Key::Network(name)) => {
                let Some(state) = self.networks.remove(name) else { return };
                self.domains.remove(state.network.domain.as_str());
                let gone = |device: &Arc<Device>| Change::Device { old: Some(device.clone()), new: None };
                changes.extend(state.devices.after("").map(gone));
                changes.extend(
                    state.tokens.into_values().map(|token| Change::Token { old: Some(token), new: None }),
                );
                changes.push(Change::Network { old: Some(state.network), new: None });
            }
            Some(Key::Device { network, uid }) => {
                let Some(state) = self.networks.get_mut(network) else { return };
                if let Some(old) = state.devices.remove(uid) {
                    state.touch(now);
                    changes.push(Change::Device { old: Some(old), new: None });
                }
            }
            Some(Key::Address { network, owner, address }) => {
                if let Some(state) = self.networks.get_mut(network) {
                    state.forget_address(owner, address);
                }
            }
            Some(Key::Token { network, name }) => {
                let Some(state) = self.networks.get_mut(network) else { return };
                if let Some(old) = state.tokens.remove(name) {
                    changes.push(Change::Token { old: Some(old), new: None });
                }
            }
            Some(Key::DeviceName { .. } | Key::DeviceKey { .. } | Key::Root(_)) | None => {}
        }
    }

    /// What has to change for this index to become `newer`: for an index that was loaded anew because the store
    /// had forgotten the changes between.
    pub fn changes_to(&self, newer: &Self) -> Vec<Change> {
        let mut changes = Vec::new();
        let mut names: Vec<&Arc<str>> = self.networks.keys().chain(newer.networks.keys()).collect();
        names.sort_unstable();
        names.dedup();
        for name in names {
            let (old, new) = (self.networks.get(name), newer.networks.get(name));
            let (old_network, new_network) = (old.map(|s| &s.network), new.map(|s| &s.network));
            if old_network.map(|n| n.revision) != new_network.map(|n| n.revision) {
                changes.push(Change::Network { old: old_network.cloned(), new: new_network.cloned() });
            }
            for device in old.iter().flat_map(|state| state.devices.after("")) {
                let now = new.and_then(|state| state.devices.by_uid(device.uid));
                if now.is_none_or(|now| now.revision != device.revision) {
                    changes.push(Change::Device { old: Some(device.clone()), new: now.cloned() });
                }
            }
            for device in new.iter().flat_map(|state| state.devices.after("")) {
                if old.is_none_or(|state| state.devices.by_uid(device.uid).is_none()) {
                    changes.push(Change::Device { old: None, new: Some(device.clone()) });
                }
            }
            for token in old.iter().flat_map(|state| state.tokens.values()) {
                let now = new.and_then(|state| state.tokens.get(&token.name));
                if now.is_none_or(|now| now.revision != token.revision) {
                    changes.push(Change::Token { old: Some(token.clone()), new: now.cloned() });
                }
            }
            for token in new.iter().flat_map(|state| state.tokens.values()) {
                if old.is_none_or(|state| !state.tokens.contains_key(&token.name)) {
                    changes.push(Change::Token { old: None, new: Some(token.clone()) });
                }
            }
        }
        changes
    }

    /// Goes on with the DNS serials of `older`, which must not go back.
    pub fn continue_serials(&mut self, older: &Self) {
        for (name, state) in &mut self.networks {
            if let Some(old) = older.networks.get(name) {
                state.serial = state.serial.max(old.serial);
            }
        }
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

fn is_served_differently(old: &Device, new: &Device) -> bool {
    (&old.name, old.ipv4, old.ipv6, old.is_reachable(), &old.endpoints)
        != (&new.name, new.ipv4, new.ipv6, new.is_reachable(), &new.endpoints)
}

fn intern(interned: &mut HashSet<Arc<str>>, text: &str) -> Arc<str> {
    if let Some(found) = interned.get(text) {
        return found.clone();
    }
    let new: Arc<str> = text.into();
    if interned.len() < INTERNED_MAX {
        interned.insert(new.clone());
    }
    new
}

fn unix(now: Timestamp) -> u32 {
    now.unix_seconds().try_into().unwrap_or(u32::MAX)
}
