//! The Services that have virtual IPs and their endpoints, as the registrar has told.

use std::collections::{BTreeMap, BTreeSet};

use muster_common::digest;
use muster_proto::registration::{
    VirtualEndpoints, VirtualService, VirtualServicesChanged, WatchVirtualServices,
};

/// A namespace and a name.
pub type Key = (String, String);

/// All that the registrar has told.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Known {
    services: BTreeMap<Key, VirtualService>,
    /// By Service, then by their own names.
    endpoints: BTreeMap<Key, BTreeMap<String, VirtualEndpoints>>,
    /// The Service of each slice.
    service_of: BTreeMap<Key, String>,
    revision: u64,
    digest: u64,
}

/// What was told does not fit together with what was told before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the registrar's digest of all Services is {told:016x}, and that of those received is {found:016x}")]
pub struct Mismatch {
    told: u64,
    found: u64,
}

impl Known {
    /// Up to where everything is known.
    pub fn watch(&self) -> WatchVirtualServices {
        WatchVirtualServices { revision: self.revision, digest: self.digest }
    }

    /// Takes in what has changed; returns the Services of which that is true, or that have other endpoints now. All of the
    /// messages that belong together are in one.
    ///
    /// # Errors
    /// If something is missing after that: everything has to be asked for anew.
    pub fn take(&mut self, changed: VirtualServicesChanged) -> Result<BTreeSet<Key>, Mismatch> {
        let mut services = BTreeSet::new();
        if changed.is_snapshot {
            services.extend(self.services.keys().chain(self.endpoints.keys()).cloned());
            *self = Self::default();
        }
        for key in changed.removed_services.iter().filter_map(|name| key(name)) {
            self.forget_service(&key);
            services.insert(key);
        }
        for key in changed.removed_endpoints.iter().filter_map(|name| key(name)) {
            services.extend(self.forget_endpoints(&key));
        }
        for service in changed.services {
            let key = (service.namespace.clone(), service.name.clone());
            self.forget_service(&key);
            self.digest = self.digest.wrapping_add(digest_of(&service));
            self.services.insert(key.clone(), service);
            services.insert(key);
        }
        for endpoints in changed.endpoints {
            let key = (endpoints.namespace.clone(), endpoints.name.clone());
            services.extend(self.forget_endpoints(&key));
            self.digest = self.digest.wrapping_add(digest_of(&endpoints));
            let service = (endpoints.namespace.clone(), endpoints.service.clone());
            self.service_of.insert(key, endpoints.service.clone());
            let slices = self.endpoints.entry(service.clone()).or_default();
            slices.insert(endpoints.name.clone(), endpoints);
            services.insert(service);
        }
        if changed.digest != self.digest {
            return Err(Mismatch { told: changed.digest, found: self.digest });
        }
        self.revision = changed.revision;
        Ok(services)
    }

    fn forget_service(&mut self, key: &Key) {
        if let Some(old) = self.services.remove(key) {
            self.digest = self.digest.wrapping_sub(digest_of(&old));
        }
    }

    /// Forgets a slice; returns its Service.
    fn forget_endpoints(&mut self, key: &Key) -> Option<Key> {
        let service = (key.0.clone(), self.service_of.remove(key)?);
        let slices = self.endpoints.get_mut(&service)?;
        if let Some(old) = slices.remove(&key.1) {
            self.digest = self.digest.wrapping_sub(digest_of(&old));
        }
        if slices.is_empty() {
            self.endpoints.remove(&service);
        }
        Some(service)
    }

    /// The keys of all Services.
    pub fn keys(&self) -> impl Iterator<Item = &Key> {
        self.services.keys()
    }

    /// A Service.
    pub fn service(&self, key: &Key) -> Option<&VirtualService> {
        self.services.get(key)
    }

    /// The endpoints of a Service.
    pub fn endpoints(&self, key: &Key) -> impl Iterator<Item = &VirtualEndpoints> {
        self.endpoints.get(key).into_iter().flat_map(BTreeMap::values)
    }

    /// Everything, as the registrar would tell it.
    pub fn snapshot(&self) -> VirtualServicesChanged {
        VirtualServicesChanged {
            is_snapshot: true,
            services: self.services.values().cloned().collect(),
            endpoints: self.endpoints.values().flat_map(BTreeMap::values).cloned().collect(),
            removed_services: Vec::new(),
            removed_endpoints: Vec::new(),
            revision: self.revision,
            digest: self.digest,
        }
    }
}

fn digest_of(message: &impl prost::Message) -> u64 {
    digest::of_message(&message.encode_to_vec())
}

fn key(name: &str) -> Option<Key> {
    let (namespace, name) = name.split_once('/')?;
    Some((namespace.to_owned(), name.to_owned()))
}
