//! What changes in the index, as it is told to those who follow.

use std::{collections::BTreeSet, sync::Arc};

use bytes::Bytes;
use ipnet::IpNet;
use muster_common::time::Timestamp;
use uuid::Uuid;

use super::{
    device::Device, director::Director, namespace::Namespace, network::Network, presence::Presence,
    registrar::Registrar, service::Service, services::Effects, site::Carrier, slice::Slice,
    state::NetworkState, token::Token,
};
use crate::store::Revision;

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
    /// A director.
    Director {
        /// As it was.
        old: Option<Arc<Director>>,
        /// As it is.
        new: Option<Arc<Director>>,
    },
    /// A token.
    Token {
        /// As it was.
        old: Option<Arc<Token>>,
        /// As it is.
        new: Option<Arc<Token>>,
    },
    /// A namespace.
    Namespace {
        /// As it was.
        old: Option<Arc<Namespace>>,
        /// As it is.
        new: Option<Arc<Namespace>>,
    },
    /// A Service.
    Service {
        /// As it was.
        old: Option<Arc<Service>>,
        /// As it is.
        new: Option<Arc<Service>>,
    },
    /// An EndpointSlice.
    EndpointSlice {
        /// As it was.
        old: Option<Arc<Slice>>,
        /// As it is.
        new: Option<Arc<Slice>>,
    },
    /// Which device carries a subnet.
    Carrier {
        /// Name of the network.
        network: Arc<str>,
        /// The subnet.
        subnet: IpNet,
        /// As it was.
        old: Option<Carrier>,
        /// As it is.
        new: Option<Carrier>,
    },
    /// Where the session of a device is that is an endpoint of Services.
    Presence {
        /// Name of the network.
        network: Arc<str>,
        /// Uid of the device.
        device: Uuid,
        /// As it was.
        old: Option<Presence>,
        /// As it is.
        new: Option<Presence>,
    },
    /// A registrar that has begun or ceased to run.
    Registrar {
        /// Its uid.
        uid: Uuid,
        /// Whether it runs.
        runs: bool,
    },
    /// What is known of a registrar, or whether it runs.
    RegistrarRecord {
        /// As it was.
        old: Option<Arc<Registrar>>,
        /// As it is.
        new: Option<Arc<Registrar>>,
    },
}

/// The name of a Service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ServiceName {
    /// Name of its network.
    pub network: Arc<str>,
    /// Its namespace and name, as [`named::key`] makes them into one text.
    pub key: Box<str>,
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
    /// The Services that DNS answers for differently now: they, their slices or their namespaces have changed, come or
    /// gone.
    pub services: Vec<ServiceName>,
    /// The networks of which agents have to be told that Services with virtual IPs have changed.
    pub virtual_services: BTreeSet<Arc<str>>,
    /// What was skipped.
    pub bad: Vec<BadValue>,
}

impl Applied {
    /// Makes a change to the Services of a network, and notes what comes of it.
    pub(super) fn at(
        &mut self,
        state: &mut NetworkState,
        now: Timestamp,
        change: impl FnOnce(&mut NetworkState, &mut Effects) -> Change,
    ) {
        let mut effects = Effects::default();
        self.changes.push(change(state, &mut effects));
        self.note(state, effects, now);
    }

    /// Notes what has come of changes to the Services of a network.
    pub(super) fn note(&mut self, state: &mut NetworkState, effects: Effects, now: Timestamp) {
        state.services_changed(&effects, now);
        let network = &state.network.name;
        let names = effects.services.into_iter().map(|key| ServiceName { network: network.clone(), key });
        self.services.extend(names);
    }

    pub(super) fn remove_service(&mut self, state: &mut NetworkState, key: &str, now: Timestamp) {
        if state.services.services.by_key(key).is_some() {
            self.at(state, now, |state, effects| Change::Service {
                old: state.services.remove_service(key, effects),
                new: None,
            });
            state.select_anew(key, self, now);
        }
    }

    pub(super) fn remove_slice(&mut self, state: &mut NetworkState, key: &str, now: Timestamp) {
        if state.services.slices.by_key(key).is_some() {
            self.at(state, now, |state, effects| Change::EndpointSlice {
                old: state.services.remove_slice(key, effects),
                new: None,
            });
        }
    }
}
