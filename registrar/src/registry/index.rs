//! The registry in memory: everything that is served is read from here. It is fed with the store's contents once,
//! then with every change in order, and is a pure function of them. Values that do not decode are told, skipped and
//! left in the store.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
};

use muster_common::time::Timestamp;
use muster_proto::storage::{self, Format, StoredAddress};
use prost::Message as _;
use uuid::Uuid;

use super::{
    device::{DEFAULT_NAMESPACE, Device},
    director::{self, Director},
    field::FieldError,
    keys::{self, Key},
    named::{self, Keyed as _},
    namespace::Namespace,
    network::Network,
    presence::Presence,
    readiness::Readiness,
    registrar::{self, Registrar, Registrars},
    service::Service,
    services::Services,
    site::Carrier,
    slice::Slice,
    token::Token,
};
use crate::store::{Event, KeyValue, Revision, WatchBatch};

pub(crate) use super::state::pool_kind;
pub use super::{
    change::{Applied, BadValue, Change, ServiceName},
    state::NetworkState,
};

/// The most texts whose memory is shared; enough for namespaces and agent versions of any sane network.
const INTERNED_MAX: usize = 4096;

/// The registry in memory.
#[derive(Clone, Debug, Default)]
pub struct Index {
    revision: Revision,
    networks: BTreeMap<Arc<str>, NetworkState>,
    domains: BTreeMap<Box<str>, Arc<str>>,
    external_domains: BTreeMap<Box<str>, Arc<str>>,
    /// Networks to which nothing can be added, with the revision of their lock.
    locks: BTreeMap<Arc<str>, Revision>,
    /// Revision of `meta/networks`; 0 if it does not exist.
    networks_revision: Revision,
    format: Option<Format>,
    registrars: Registrars,
    interned: HashSet<Arc<str>>,
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

    /// The network whose external domain is `domain`.
    pub fn network_by_external_domain(&self, domain: &str) -> Option<&NetworkState> {
        self.networks.get(self.external_domains.get(domain)?)
    }

    /// A device, by network and uid.
    pub fn device(&self, network: &str, uid: Uuid) -> Option<&Arc<Device>> {
        self.networks.get(network)?.devices.by_uid(uid)
    }

    /// A director, by network and uid.
    pub fn director(&self, network: &str, uid: Uuid) -> Option<&Arc<Director>> {
        self.networks.get(network)?.directors.by_uid(uid)
    }

    /// What the store says of itself; `None` before `muster-registrar init`.
    pub fn format(&self) -> Option<&Format> {
        self.format.as_ref()
    }

    /// The registrars.
    pub fn registrars(&self) -> &Registrars {
        &self.registrars
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
        kvs.iter()
            .filter_map(|kv| {
                let mut applied = Applied { revision: kv.mod_revision, ..Applied::default() };
                self.put(kv, now, &mut applied).err().map(|error| bad(kv, error))
            })
            .collect()
    }

    /// Says that everything has been taken in, as of `revision`.
    pub fn loaded(&mut self, revision: Revision) {
        self.revision = revision;
        self.networks.values_mut().for_each(|state| state.note_virtual_services(revision));
    }

    /// Applies the store's changes of one revision.
    pub fn apply(&mut self, batch: &WatchBatch, now: Timestamp) -> Applied {
        let mut applied = Applied { revision: batch.revision, ..Applied::default() };
        for event in &batch.events {
            let done = match event {
                Event::Put(kv) => self.put(kv, now, &mut applied),
                Event::Delete { key } => {
                    self.delete(key, now, &mut applied);
                    Ok(())
                }
            };
            if let Err(error) = done {
                applied.bad.push(BadValue { key: event.key().clone(), reason: error.to_string() });
            }
        }
        self.revision = self.revision.max(batch.revision);
        let told =
            applied.changes.iter().filter_map(|change| self.note_virtual_change(change, batch.revision));
        applied.virtual_services = told.collect();
        applied
    }

    fn put(&mut self, kv: &KeyValue, now: Timestamp, applied: &mut Applied) -> Result<(), FieldError> {
        let changes = &mut applied.changes;
        let key = keys::parse(&kv.key).ok_or_else(|| FieldError::new("key", "is none of Muster's"))?;
        let decode = |error: prost::DecodeError| FieldError::new("value", error);
        let orphan = || FieldError::new("key", "belongs to a network that does not exist");
        let misplaced = || FieldError::new("metadata", "namespace and name are not those in the key");
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
                let old = state.put_device(&new);
                if old.as_ref().is_none_or(|old| is_served_differently(old, &new)) {
                    state.touch(now);
                }
                changes.push(Change::Device { old: old.clone(), new: Some(new.clone()) });
                state.select_device(old.as_deref(), Some(&new), applied, now);
            }
            Key::Address { network, owner, address } => {
                let state = self.networks.get_mut(network).ok_or_else(orphan)?;
                let stored = StoredAddress::decode(&*kv.value).map_err(decode)?;
                state.set_address(owner, address, &stored, kv.mod_revision);
            }
            Key::Director { network, uid } => {
                let state = self.networks.get_mut(network).ok_or_else(orphan)?;
                let new = Arc::new(Director::decode(&kv.value, &state.network.name, uid, kv.mod_revision)?);
                let old = state.directors.insert(&new);
                if old.as_ref().is_none_or(|old| director::is_told_differently(old, &new)) {
                    state.touch(now);
                }
                changes.push(Change::Director { old, new: Some(new) });
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
            Key::Namespace { network, name } => {
                let state = self.networks.get_mut(network).ok_or_else(orphan)?;
                let new = Arc::new(Namespace::decode(&kv.value, &state.network.name, kv.mod_revision)?);
                if new.name.as_str() != name {
                    return Err(misplaced());
                }
                applied.at(state, now, |state, effects| {
                    let old = state.services.put_namespace(new.clone(), effects);
                    Change::Namespace { old, new: Some(new) }
                });
            }
            Key::Service { network, namespace, name } => {
                let state = self.networks.get_mut(network).ok_or_else(orphan)?;
                check_namespace(state, namespace)?;
                let new = Arc::new(Service::decode(&kv.value, &state.network.name, kv.mod_revision)?);
                if *new.key() != *named::key(namespace, name) {
                    return Err(misplaced());
                }
                applied.at(state, now, |state, effects| {
                    let old = state.services.put_service(new.clone(), effects);
                    Change::Service { old, new: Some(new) }
                });
                state.select_anew(&named::key(namespace, name), applied, now);
            }
            Key::EndpointSlice { network, namespace, name } => {
                let state = self.networks.get_mut(network).ok_or_else(orphan)?;
                check_namespace(state, namespace)?;
                let new = Arc::new(Slice::decode(&kv.value, &state.network.name, kv.mod_revision)?);
                if *new.key() != *named::key(namespace, name) {
                    return Err(misplaced());
                }
                applied.at(state, now, |state, effects| {
                    let old = state.services.put_slice(new.clone(), effects);
                    Change::EndpointSlice { old, new: Some(new) }
                });
            }
            Key::Carrier { network, subnet } => {
                let state = self.networks.get_mut(network).ok_or_else(orphan)?;
                let stored = storage::Carrier::decode(&*kv.value).map_err(decode)?;
                let new = Carrier::read(&stored, kv.mod_revision)?;
                let old = state.carriers.insert(subnet, new);
                changes.push(Change::Carrier { network: network.into(), subnet, old, new: Some(new) });
            }
            Key::Presence { network, uid } => {
                let state = self.networks.get_mut(network).ok_or_else(orphan)?;
                let new = Presence::decode(&kv.value, kv.mod_revision)?;
                let old = state.presence.insert(uid, new);
                changes.push(Change::Presence {
                    network: state.network.name.clone(),
                    device: uid,
                    old,
                    new: Some(new),
                });
                state.select_presence(uid, applied, now);
            }
            Key::Readiness { network, uid } => {
                let state = self.networks.get_mut(network).ok_or_else(orphan)?;
                let new = Readiness::decode(&kv.value, kv.mod_revision)?;
                state.readiness.insert(uid, new);
                state.select_ready(uid, applied, now);
            }
            Key::Registrar(uid) => {
                if self.registrars.running.insert(uid) {
                    changes.push(Change::Registrar { uid, runs: true });
                    changes.extend(self.registrars.by_run(uid).map(as_it_was));
                }
            }
            Key::RegistrarRecord(uid) => {
                let new = Arc::new(Registrar::decode(&kv.value, uid, kv.mod_revision)?);
                let old = self.registrars.insert(&new);
                if registrar::is_told_differently(old.as_deref(), Some(&new)) {
                    self.name_servers_changed(now);
                }
                changes.push(Change::RegistrarRecord { old, new: Some(new) });
            }
            // They guard transactions, or say something of the store itself.
            Key::DeviceName { .. }
            | Key::DeviceKey { .. }
            | Key::DirectorName { .. }
            | Key::Root(_)
            | Key::Restoring
            | Key::Pulse
            | Key::Migrated
            | Key::Succession(_)
            | Key::Invitation(_) => {}
        }
        Ok(())
    }

    fn put_network(&mut self, network: Arc<Network>, now: Timestamp) -> Change {
        let new = Some(network.clone());
        let (name, domain) = (network.name.clone(), network.domain.as_str().into());
        let external: Option<Box<str>> =
            network.external_domain.as_ref().map(|domain| domain.as_str().into());
        let old = match self.networks.get_mut(&name) {
            Some(state) => {
                let old = std::mem::replace(&mut state.network, network);
                state.fill_pools();
                state.network_changed(&old, now);
                self.domains.remove(old.domain.as_str());
                if let Some(domain) = &old.external_domain {
                    self.external_domains.remove(domain.as_str());
                }
                Some(old)
            }
            None => {
                self.networks.insert(name.clone(), NetworkState::new(network, now));
                None
            }
        };
        if let Some(external) = external {
            self.external_domains.insert(external, name.clone());
        }
        self.domains.insert(domain, name);
        Change::Network { old, new }
    }

    fn delete(&mut self, key: &[u8], now: Timestamp, applied: &mut Applied) {
        let changes = &mut applied.changes;
        match keys::parse(key) {
            Some(Key::Format) => self.format = None,
            Some(Key::Networks) => self.networks_revision = 0,
            Some(Key::NetworkLock(name)) => {
                self.locks.remove(name);
            }
            Some(Key::Network(name)) => {
                let Some(state) = self.networks.remove(name) else { return };
                self.domains.remove(state.network.domain.as_str());
                if let Some(domain) = &state.network.external_domain {
                    self.external_domains.remove(domain.as_str());
                }
                let network = &state.network.name;
                let names = state.services.differences(&Services::default()).into_iter();
                applied.services.extend(names.map(|key| ServiceName { network: network.clone(), key }));
                changes.extend(
                    state
                        .services
                        .slices
                        .iter()
                        .map(|old| Change::EndpointSlice { old: Some(old.clone()), new: None }),
                );
                changes.extend(
                    state
                        .services
                        .services
                        .iter()
                        .map(|old| Change::Service { old: Some(old.clone()), new: None }),
                );
                changes.extend(
                    state
                        .services
                        .namespaces
                        .values()
                        .map(|old| Change::Namespace { old: Some(old.clone()), new: None }),
                );
                let gone = |device: &Arc<Device>| Change::Device { old: Some(device.clone()), new: None };
                changes.extend(state.devices.after("").map(gone));
                let gone = |old: &Arc<Director>| Change::Director { old: Some(old.clone()), new: None };
                changes.extend(state.directors.iter().map(gone));
                changes.extend(
                    state.tokens.into_values().map(|token| Change::Token { old: Some(token), new: None }),
                );
                changes.push(Change::Network { old: Some(state.network), new: None });
            }
            Some(Key::Device { network, uid }) => {
                let Some(state) = self.networks.get_mut(network) else { return };
                if let Some(old) = state.remove_device(uid) {
                    state.touch(now);
                    changes.push(Change::Device { old: Some(old.clone()), new: None });
                    state.select_device(Some(&old), None, applied, now);
                }
            }
            Some(Key::Director { network, uid }) => {
                let Some(state) = self.networks.get_mut(network) else { return };
                if let Some(old) = state.directors.remove(uid) {
                    state.touch(now);
                    changes.push(Change::Director { old: Some(old), new: None });
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
            Some(Key::Namespace { network, name }) => {
                let Some(state) = self.networks.get_mut(network) else { return };
                if name != DEFAULT_NAMESPACE {
                    // What is in it goes first, unless somebody has changed the store by hand.
                    let slices: Vec<_> = state.services.slices.within(name, "").cloned().collect();
                    for slice in slices {
                        applied.remove_slice(state, slice.key(), now);
                    }
                    let services: Vec<_> = state.services.services.within(name, "").cloned().collect();
                    for service in services {
                        applied.remove_service(state, service.key(), now);
                    }
                }
                if state.services.namespaces.contains_key(name) {
                    applied.at(state, now, |state, effects| Change::Namespace {
                        old: state.services.remove_namespace(name, effects),
                        new: None,
                    });
                }
            }
            Some(Key::Service { network, namespace, name }) => {
                let Some(state) = self.networks.get_mut(network) else { return };
                applied.remove_service(state, &named::key(namespace, name), now);
            }
            Some(Key::EndpointSlice { network, namespace, name }) => {
                let Some(state) = self.networks.get_mut(network) else { return };
                applied.remove_slice(state, &named::key(namespace, name), now);
            }
            Some(Key::Carrier { network, subnet }) => {
                let Some(state) = self.networks.get_mut(network) else { return };
                if let Some(old) = state.carriers.remove(&subnet) {
                    changes.push(Change::Carrier {
                        network: network.into(),
                        subnet,
                        old: Some(old),
                        new: None,
                    });
                }
            }
            Some(Key::Presence { network, uid }) => {
                let Some(state) = self.networks.get_mut(network) else { return };
                if let Some(old) = state.presence.remove(&uid) {
                    let network = state.network.name.clone();
                    changes.push(Change::Presence { network, device: uid, old: Some(old), new: None });
                    state.select_presence(uid, applied, now);
                }
            }
            Some(Key::Readiness { network, uid }) => {
                let Some(state) = self.networks.get_mut(network) else { return };
                if state.readiness.remove(&uid).is_some() {
                    state.select_ready(uid, applied, now);
                }
            }
            Some(Key::Registrar(uid)) => {
                if self.registrars.running.remove(&uid) {
                    changes.push(Change::Registrar { uid, runs: false });
                    changes.extend(self.registrars.by_run(uid).map(as_it_was));
                }
            }
            Some(Key::RegistrarRecord(uid)) => {
                if let Some(old) = self.registrars.remove(uid) {
                    self.name_servers_changed(now);
                    changes.push(Change::RegistrarRecord { old: Some(old), new: None });
                }
            }
            Some(
                Key::DeviceName { .. }
                | Key::DeviceKey { .. }
                | Key::DirectorName { .. }
                | Key::Root(_)
                | Key::Restoring
                | Key::Pulse
                | Key::Migrated
                | Key::Succession(_)
                | Key::Invitation(_),
            )
            | None => {}
        }
    }

    /// Every zone has them.
    fn name_servers_changed(&mut self, now: Timestamp) {
        self.networks.values_mut().for_each(|state| state.touch_all(now));
    }

    /// Goes on after `older`, which this index takes the place of: what has been told to others must not go back.
    pub fn continue_from(&mut self, older: &Self) {
        for (name, state) in &mut self.networks {
            if let Some(old) = older.networks.get(name) {
                state.continue_serials(old);
                state.continue_virtual_services(old);
            }
        }
    }
}

/// A registrar that has begun or ceased to run.
fn as_it_was(registrar: &Arc<Registrar>) -> Change {
    Change::RegistrarRecord { old: Some(registrar.clone()), new: Some(registrar.clone()) }
}

/// Checks that there is a namespace for what is in it.
fn check_namespace(state: &NetworkState, namespace: &str) -> Result<(), FieldError> {
    if state.services.namespaces.contains_key(namespace) || namespace == DEFAULT_NAMESPACE {
        return Ok(());
    }
    Err(FieldError::new("key", "belongs to a namespace that does not exist"))
}

fn is_served_differently(old: &Device, new: &Device) -> bool {
    fn served(device: &Device) -> impl PartialEq + '_ {
        let revoked = device.revoked;
        (
            (&device.name, device.ipv4, device.ipv6, device.is_reachable(), revoked),
            (&device.endpoints, device.home(), &device.site),
        )
    }
    served(old) != served(new)
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
