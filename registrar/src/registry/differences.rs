//! What is different between two indexes: for one that was loaded anew because the store had forgotten the changes
//! between.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use uuid::Uuid;

use super::{
    change::{Change, ServiceName},
    index::Index,
    named,
    namespace::Namespace,
    services::Services,
    slice::Slice,
    state::NetworkState,
};

impl Index {
    /// What has to change for this index to become `newer`: for an index that was loaded anew because the store
    /// had forgotten the changes between.
    pub fn changes_to(&self, newer: &Self) -> Vec<Change> {
        let mut changes = Vec::new();
        let mut names: Vec<&Arc<str>> =
            self.networks().chain(newer.networks()).map(|state| &state.network.name).collect();
        names.sort_unstable();
        names.dedup();
        for name in names {
            let (old, new) = (self.network(name), newer.network(name));
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
            services_changes(
                old.map(|state| &state.services),
                new.map(|state| &state.services),
                &mut changes,
            );
            for director in old.iter().flat_map(|state| state.directors.iter()) {
                let now = new.and_then(|state| state.directors.by_uid(director.uid));
                if now.is_none_or(|now| now.revision != director.revision) {
                    changes.push(Change::Director { old: Some(director.clone()), new: now.cloned() });
                }
            }
            for director in new.iter().flat_map(|state| state.directors.iter()) {
                if old.is_none_or(|state| state.directors.by_uid(director.uid).is_none()) {
                    changes.push(Change::Director { old: None, new: Some(director.clone()) });
                }
            }
            let none = BTreeMap::new();
            let (carried, now) =
                (old.map_or(&none, |state| &state.carriers), new.map_or(&none, |state| &state.carriers));
            for subnet in carried.keys().chain(now.keys()).collect::<BTreeSet<_>>() {
                let (old, new) = (carried.get(subnet).copied(), now.get(subnet).copied());
                if old != new {
                    changes.push(Change::Carrier { network: name.clone(), subnet: *subnet, old, new });
                }
            }
            presence_changes(name, old, new, &mut changes);
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
        let (old, new) = (self.registrars(), newer.registrars());
        let different = old.running().symmetric_difference(new.running());
        changes
            .extend(different.map(|uid| Change::Registrar { uid: *uid, runs: new.running().contains(uid) }));
        for registrar in old.iter() {
            let now = new.by_uid(registrar.uid);
            let same = now.is_some_and(|now| {
                (now.revision, new.runs(now)) == (registrar.revision, old.runs(registrar))
            });
            if !same {
                changes.push(Change::RegistrarRecord { old: Some(registrar.clone()), new: now.cloned() });
            }
        }
        for registrar in new.iter().filter(|registrar| old.by_uid(registrar.uid).is_none()) {
            changes.push(Change::RegistrarRecord { old: None, new: Some(registrar.clone()) });
        }
        changes
    }

    /// The Services that DNS answers for differently by `newer`.
    pub fn services_changed_to(&self, newer: &Self) -> Vec<ServiceName> {
        let names: BTreeSet<&Arc<str>> =
            self.networks().chain(newer.networks()).map(|state| &state.network.name).collect();
        let none = Services::default();
        let mut changed = Vec::new();
        for name in names {
            let old = self.network(name).map_or(&none, |state| &state.services);
            let new = newer.network(name).map_or(&none, |state| &state.services);
            let keys = old.differences(new).into_iter();
            changed.extend(keys.map(|key| ServiceName { network: name.clone(), key }));
        }
        changed
    }
}

/// Devices whose sessions are elsewhere in `new`, or away.
fn presence_changes(
    network: &Arc<str>,
    old: Option<&NetworkState>,
    new: Option<&NetworkState>,
    changes: &mut Vec<Change>,
) {
    let both = [old, new].into_iter().flatten();
    let devices: BTreeSet<Uuid> = both.flat_map(|state| state.presence.keys().copied()).collect();
    for device in devices {
        let of = |state: Option<&NetworkState>| state.and_then(|state| state.presence.get(&device).copied());
        let (old, new) = (of(old), of(new));
        if old != new {
            changes.push(Change::Presence { network: network.clone(), device, old, new });
        }
    }
}

/// What has to change for `old` to become `new`: where the revisions differ.
fn services_changes(old: Option<&Services>, new: Option<&Services>, changes: &mut Vec<Change>) {
    let none = Services::default();
    let (old, new) = (old.unwrap_or(&none), new.unwrap_or(&none));
    let revision = |object: Option<&Arc<Namespace>>| object.map(|object| object.revision);
    let names: BTreeSet<&Box<str>> = old.namespaces.keys().chain(new.namespaces.keys()).collect();
    for name in names {
        let (old, new) = (old.namespaces.get(name), new.namespaces.get(name));
        if revision(old) != revision(new) {
            changes.push(Change::Namespace { old: old.cloned(), new: new.cloned() });
        }
    }
    named::differences(
        &old.services,
        &new.services,
        |was, is| was.revision == is.revision,
        |old, new| {
            changes.push(Change::Service { old, new });
        },
    );
    named::differences(&old.slices, &new.slices, Slice::is_unchanged, |old, new| {
        changes.push(Change::EndpointSlice { old, new });
    });
}
