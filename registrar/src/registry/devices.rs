//! The devices of one network, found by uid, name, key and virtual address in constant time, and in the order of
//! their names. Each table holds pointers alone, and compares through them.

use std::{
    borrow::Borrow,
    cmp::Ordering,
    collections::{BTreeSet, HashSet},
    hash::{Hash, Hasher},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::Bound,
    sync::Arc,
};

use uuid::Uuid;

use super::device::{Device, PublicKey};

/// A device under one of its properties.
macro_rules! by {
    ($name:ident, $key:ty, |$device:ident| $property:expr) => {
        #[derive(Clone, Debug)]
        struct $name(Arc<Device>);

        impl Borrow<$key> for $name {
            fn borrow(&self) -> &$key {
                let $device = &self.0;
                $property
            }
        }

        impl Hash for $name {
            fn hash<H: Hasher>(&self, state: &mut H) {
                Borrow::<$key>::borrow(self).hash(state);
            }
        }

        impl PartialEq for $name {
            fn eq(&self, other: &Self) -> bool {
                Borrow::<$key>::borrow(self) == Borrow::<$key>::borrow(other)
            }
        }

        impl Eq for $name {}
    };
}

// Devices without the property are never in the table, so that what stands in for it is never compared.
by!(ByUid, Uuid, |device| &device.uid);
by!(ByName, str, |device| &device.name);
by!(ByKey, PublicKey, |device| device.key.as_ref().unwrap_or(&[0; 32]));
by!(ByIpv4, Ipv4Addr, |device| device.ipv4.as_ref().unwrap_or(&Ipv4Addr::UNSPECIFIED));
by!(ByIpv6, Ipv6Addr, |device| device.ipv6.as_ref().unwrap_or(&Ipv6Addr::UNSPECIFIED));

impl PartialOrd for ByName {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for ByName {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.name.cmp(&other.0.name)
    }
}

/// All devices of a network.
#[derive(Clone, Debug, Default)]
pub struct Devices {
    by_uid: HashSet<ByUid>,
    by_name: HashSet<ByName>,
    by_key: HashSet<ByKey>,
    by_ipv4: HashSet<ByIpv4>,
    by_ipv6: HashSet<ByIpv6>,
    ordered: BTreeSet<ByName>,
}

impl Devices {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.by_uid.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.by_uid.is_empty()
    }

    /// The device with this uid.
    pub fn by_uid(&self, uid: Uuid) -> Option<&Arc<Device>> {
        self.by_uid.get(&uid).map(|found| &found.0)
    }

    /// The device with this name, in lower case.
    pub fn by_name(&self, name: &str) -> Option<&Arc<Device>> {
        self.by_name.get(name).map(|found| &found.0)
    }

    /// The device with this WireGuard key.
    pub fn by_key(&self, key: &PublicKey) -> Option<&Arc<Device>> {
        self.by_key.get(key).map(|found| &found.0)
    }

    /// The device with this virtual address.
    pub fn by_address(&self, address: IpAddr) -> Option<&Arc<Device>> {
        match address {
            IpAddr::V4(v4) => self.by_ipv4.get(&v4).map(|found| &found.0),
            IpAddr::V6(v6) => self.by_ipv6.get(&v6).map(|found| &found.0),
        }
    }

    /// The devices whose names come after `name`, in the order of names.
    pub fn after<'a>(&'a self, name: &str) -> impl Iterator<Item = &'a Arc<Device>> + use<'a> {
        self.ordered.range::<str, _>((Bound::Excluded(name), Bound::Unbounded)).map(|found| &found.0)
    }

    /// Adds `device` in the place of the one with the same uid, which is returned.
    pub(crate) fn insert(&mut self, device: &Arc<Device>) -> Option<Arc<Device>> {
        let old = self.remove(device.uid);
        self.by_uid.insert(ByUid(device.clone()));
        self.by_name.replace(ByName(device.clone()));
        self.ordered.replace(ByName(device.clone()));
        if device.key.is_some() {
            self.by_key.replace(ByKey(device.clone()));
        }
        if device.ipv4.is_some() {
            self.by_ipv4.replace(ByIpv4(device.clone()));
        }
        if device.ipv6.is_some() {
            self.by_ipv6.replace(ByIpv6(device.clone()));
        }
        old
    }

    /// Removes the device with this uid.
    pub(crate) fn remove(&mut self, uid: Uuid) -> Option<Arc<Device>> {
        let old = self.by_uid.take(&uid)?.0;
        // Another device can have taken over a property only in a store that was changed by hand: leave it there.
        let same = |found: Option<&Arc<Device>>| found.is_some_and(|found| Arc::ptr_eq(found, &old));
        if same(self.by_name(&old.name)) {
            self.by_name.remove(&*old.name);
            self.ordered.remove(&*old.name);
        }
        if let Some(key) = old.key.as_ref()
            && same(self.by_key(key))
        {
            self.by_key.remove(key);
        }
        if let Some(ipv4) = old.ipv4.as_ref()
            && same(self.by_address((*ipv4).into()))
        {
            self.by_ipv4.remove(ipv4);
        }
        if let Some(ipv6) = old.ipv6.as_ref()
            && same(self.by_address((*ipv6).into()))
        {
            self.by_ipv6.remove(ipv6);
        }
        Some(old)
    }
}
