//! Which devices the selectors of Services select, found from either side: the Services of a device that has changed, and
//! the devices of a Service. A pure function of the devices and Services of one network.

use std::collections::{BTreeSet, HashMap};

use muster_common::labels::Selector;
use uuid::Uuid;

use super::{device::Device, devices::Devices};

/// The Services of one network that have a selector, and the devices that have labels.
#[derive(Clone, Debug, Default)]
pub(super) struct Selection {
    /// Devices, by namespace and label, as [`pair`] makes them into one text.
    labelled: HashMap<Box<str>, BTreeSet<Uuid>>,
    /// Keys of the Services that select devices with a label, by namespace and label.
    wanting: HashMap<Box<str>, BTreeSet<Box<str>>>,
    /// Keys of the Services that name no label that a device must have, by namespace.
    open: HashMap<Box<str>, BTreeSet<Box<str>>>,
    services: HashMap<Box<str>, Selecting>,
    /// Keys of the Services that select a device.
    of_device: HashMap<Uuid, BTreeSet<Box<str>>>,
}

/// A Service that has a selector.
#[derive(Clone, Debug)]
struct Selecting {
    namespace: Box<str>,
    selector: Selector,
    devices: BTreeSet<Uuid>,
}

/// Namespace and label as one text: neither has a character below the separator.
fn pair(namespace: &str, key: &str, value: &str) -> Box<str> {
    format!("{namespace}\0{key}\0{value}").into()
}

impl Selecting {
    /// The labels of which a device that is selected has one; `None` if the selector names none.
    fn pairs(&self) -> Option<Vec<Box<str>>> {
        let (key, values) = self.selector.one_of()?;
        Some(values.iter().map(|value| pair(&self.namespace, key, value)).collect())
    }
}

impl Selection {
    /// The devices that a Service selects, by uid; `None` if it has no selector.
    pub(super) fn devices(&self, service: &str) -> Option<&BTreeSet<Uuid>> {
        self.services.get(service).map(|selecting| &selecting.devices)
    }

    /// A Service in `namespace` has the selector `selector` now, or none.
    pub(super) fn set_selector(
        &mut self,
        service: &str,
        namespace: &str,
        selector: Option<Selector>,
        all: &Devices,
    ) {
        if self.services.get(service).map(|selecting| &selecting.selector) == selector.as_ref() {
            return;
        }
        if let Some(old) = self.services.remove(service) {
            for uid in &old.devices {
                remove_from(&mut self.of_device, uid, service);
            }
            match old.pairs() {
                Some(pairs) => {
                    pairs.iter().for_each(|pair| remove_from(&mut self.wanting, &**pair, service));
                }
                None => remove_from(&mut self.open, namespace, service),
            }
        }
        let Some(selector) = selector else { return };
        let mut new = Selecting { namespace: namespace.into(), selector, devices: BTreeSet::new() };
        let is_selected =
            |device: &Device| *device.namespace == *namespace && new.selector.matches(device.labels());
        match new.pairs() {
            Some(pairs) => {
                let candidates = pairs.iter().filter_map(|pair| self.labelled.get(pair)).flatten();
                let devices = candidates.filter_map(|uid| all.by_uid(*uid));
                new.devices = devices.filter(|device| is_selected(device)).map(|device| device.uid).collect();
                for pair in pairs {
                    self.wanting.entry(pair).or_default().insert(service.into());
                }
            }
            None => {
                let devices = all.after("").filter(|device| is_selected(device));
                new.devices = devices.map(|device| device.uid).collect();
                self.open.entry(namespace.into()).or_default().insert(service.into());
            }
        }
        for uid in &new.devices {
            self.of_device.entry(*uid).or_default().insert(service.into());
        }
        self.services.insert(service.into(), new);
    }

    /// Whether any Service selects a device.
    pub(super) fn selects(&self, device: Uuid) -> bool {
        self.of_device.contains_key(&device)
    }

    /// Keys of the Services that select a device.
    pub(super) fn services_of(&self, device: Uuid) -> BTreeSet<Box<str>> {
        self.of_device.get(&device).cloned().unwrap_or_default()
    }

    /// A device has come, gone or changed. Returns the keys of the Services that selected it, or do now.
    pub(super) fn device_changed(
        &mut self,
        old: Option<&Device>,
        new: Option<&Device>,
    ) -> BTreeSet<Box<str>> {
        let Some(uid) = new.or(old).map(|device| device.uid) else { return BTreeSet::new() };
        let is_placed_anew = old.map(place) != new.map(place);
        if is_placed_anew {
            for pair in old.iter().flat_map(|old| pairs(old)) {
                remove_from(&mut self.labelled, &*pair, &uid);
            }
            for pair in new.iter().flat_map(|new| pairs(new)) {
                self.labelled.entry(pair).or_default().insert(uid);
            }
        }
        let mut services = self.services_of(uid);
        if !is_placed_anew {
            return services;
        }
        if let Some(new) = new {
            let wanting = pairs(new).filter_map(|pair| self.wanting.get(&pair)).flatten();
            let open = self.open.get(&*new.namespace).into_iter().flatten();
            services.extend(wanting.chain(open).cloned());
        }
        services.retain(|service| self.select(service, uid, new));
        services
    }

    /// Notes whether a Service selects a device; returns whether it did or does.
    fn select(&mut self, service: &str, uid: Uuid, device: Option<&Device>) -> bool {
        let Some(selecting) = self.services.get_mut(service) else { return false };
        let is_selected = device.is_some_and(|device| {
            *device.namespace == *selecting.namespace && selecting.selector.matches(device.labels())
        });
        if is_selected {
            selecting.devices.insert(uid);
            self.of_device.entry(uid).or_default().insert(service.into());
            return true;
        }
        let was_selected = selecting.devices.remove(&uid);
        remove_from(&mut self.of_device, &uid, service);
        was_selected
    }
}

/// What decides which Services select a device.
fn place(device: &Device) -> impl PartialEq + '_ {
    (&device.namespace, device.labels())
}

/// The labels of a device, each with its namespace.
fn pairs(device: &Device) -> impl Iterator<Item = Box<str>> {
    device.labels().iter().map(|(key, value)| pair(&device.namespace, key, value))
}

/// Removes one of the values under a key, and the key with the last of them.
fn remove_from<K, Q, V, R>(map: &mut HashMap<K, BTreeSet<V>>, key: &Q, value: &R)
where
    K: std::borrow::Borrow<Q> + Eq + std::hash::Hash,
    Q: Eq + std::hash::Hash + ?Sized,
    V: std::borrow::Borrow<R> + Ord,
    R: Ord + ?Sized,
{
    if let Some(values) = map.get_mut(key) {
        values.remove(value);
        if values.is_empty() {
            map.remove(key);
        }
    }
}
