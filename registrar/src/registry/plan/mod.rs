//! What to write: pure functions from the index and a request to a transaction, or to a refusal. The conditions of
//! each transaction make it safe against every other one, whichever registrar plans it: what the index did not show
//! yet makes the store refuse the transaction, and the request is planned again.
//!
//! - A device, or director, changes only at the revision that was seen. So whoever changes or deletes it knows its name, key and
//!   addresses.
//! - A name, a key or an address is taken by creating its key, which two cannot do.
//! - Nothing is added to a namespace that has changed since it was seen: it may be on its way out.
//! - Nothing is added to a network that is locked; it is locked while it is deleted or its pools are changed.

pub mod device;
pub mod director;
pub mod enroll;
pub mod namespace;
pub mod network;
pub mod presence;
pub mod readiness;
pub mod register;
pub mod registrar;
pub mod service;
pub mod site;
pub mod slice;
pub mod sweep;
pub mod token;

use std::{net::IpAddr, sync::Arc};

use bytes::Bytes;
use muster_common::time::Timestamp;
use muster_proto::{
    admin::ObjectMeta,
    storage::{Claim, StoredAddress},
};
use prost::Message as _;
use uuid::Uuid;

pub(super) use super::field::short;
use super::{
    device::{DEFAULT_NAMESPACE, Device},
    field::{self, FieldError},
    index::{Index, NetworkState, pool_kind},
    keys::{self, Owner},
    service::Service,
    slice::Slice,
};
use crate::{
    allocation::{AllocationError, Reservation},
    store::{Condition, Revision, Txn},
};

/// What a request comes to.
#[derive(Debug)]
pub enum Outcome<R> {
    /// Nothing has to be written.
    Done(R),
    /// This has to be written first.
    Write(Plan<R>),
}

/// A transaction with what belongs to it.
#[derive(Debug)]
pub struct Plan<R> {
    /// What to write.
    pub txn: Txn,
    /// To be given up with [`Index::cancel`] unless the transaction is committed.
    pub reservations: Vec<Held>,
    /// The answer once it is committed and applied.
    pub reply: R,
}

/// An address that is reserved for a plan.
#[derive(Debug)]
pub struct Held {
    network: Arc<str>,
    owner: Owner,
    reservation: Reservation,
}

impl<R> Plan<R> {
    fn new(txn: Txn, reply: R) -> Self {
        Self { txn, reservations: Vec::new(), reply }
    }
}

impl Index {
    /// Gives up a reservation whose plan has failed.
    pub fn cancel(&mut self, held: &Held) {
        if let Some(state) = self.network_mut(&held.network) {
            state.cancel(held);
        }
    }
}

impl NetworkState {
    fn cancel(&mut self, held: &Held) {
        if let Some(pool) = self.pool(pool_kind(held.owner, held.reservation.address())) {
            pool.cancel(held.reservation);
        }
    }
}

/// Why an operator's request was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AdminError {
    /// A field of the request cannot be used.
    #[error(transparent)]
    Field(#[from] FieldError),
    /// A registrar is not forgotten while it runs.
    #[error("registrar {0:?} runs; stop it first, then delete it: muster delete registrar {0}")]
    Runs(String),
    /// The object does not exist.
    #[error("{kind} {name:?} does not exist; list what does with: muster get {kind}s")]
    NotFound {
        /// What kind of object.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// The name is taken.
    #[error(
        "{kind} {name:?} exists already; choose another name, or delete it first: muster delete {kind} {name}"
    )]
    Exists {
        /// What kind of object.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// The object has changed since it was read.
    #[error(
        "{kind} {name:?} is at revision {found}, not {wanted}: it has changed since it was read; read it again and \
         repeat the change"
    )]
    Changed {
        /// What kind of object.
        kind: &'static str,
        /// Its name.
        name: String,
        /// The revision in the request.
        wanted: Revision,
        /// The object's revision.
        found: Revision,
    },
    /// A network still has devices.
    #[error("network {name:?} has {devices} devices; delete them first: muster delete device NAME")]
    NotEmpty {
        /// The network.
        name: String,
        /// How many devices it has.
        devices: usize,
    },
    /// A network is being deleted, or its pools are being changed.
    #[error("network {0:?} is being deleted or its pools are being changed; try again in a moment")]
    Locked(String),
    /// A namespace is named that does not exist.
    #[error(
        "metadata.namespace: namespace {0:?} does not exist; create it first: muster create namespace {0}"
    )]
    NoNamespace(String),
    /// A namespace is being deleted.
    #[error("namespace {0:?} is being deleted; wait until it is gone, or use another")]
    Terminating(String),
    /// A namespace still has devices.
    #[error("namespace {name:?} has {devices} devices; delete them first: muster delete device NAME")]
    NamespaceInUse {
        /// The namespace.
        name: String,
        /// How many devices are in it.
        devices: usize,
    },
    /// The default namespace is to be deleted.
    #[error("namespace \"default\" cannot be deleted: every network has it; delete what is in it instead")]
    DefaultNamespace,
    /// An EndpointSlice that nobody can change.
    #[error(
        "endpointslice {slice:?} has the devices that service {service:?} selects; change its spec.selector, or the labels \
         of devices: muster label device NAME KEY=VALUE"
    )]
    Selected {
        /// The slice.
        slice: String,
        /// The Service.
        service: String,
    },
    /// A chosen address cannot be had.
    #[error("{path}: {error}")]
    Address {
        /// Path of the field.
        path: &'static str,
        /// Why.
        error: AllocationError,
    },
}

/// Finds a network.
pub(super) fn find<'a>(index: &'a Index, network: &str) -> Result<&'a NetworkState, AdminError> {
    index.network(network).ok_or_else(|| AdminError::NotFound { kind: "network", name: short(network) })
}

/// Checks that an object still has the revision that a request names; 0 names none.
pub(super) fn check_version(
    kind: &'static str,
    name: &str,
    wanted: Revision,
    found: Revision,
) -> Result<(), AdminError> {
    if wanted == 0 || wanted == found {
        return Ok(());
    }
    Err(AdminError::Changed { kind, name: name.to_owned(), wanted, found })
}

/// The fields that an update changes: those of `allowed` that the mask names, all of them if it names none.
pub(super) fn masked<'a>(
    mask: Option<&pbjson_types::FieldMask>,
    allowed: &[&'a str],
) -> Result<Vec<&'a str>, FieldError> {
    let paths = mask.map_or(&[][..], |mask| &mask.paths);
    if paths.is_empty() {
        return Ok(allowed.to_vec());
    }
    let known = |path: &String| {
        let found = allowed.iter().find(|allowed| **allowed == path);
        found.copied().ok_or_else(|| {
            let reason = format!("{:?} cannot be changed; what can is {}", short(path), allowed.join(", "));
            FieldError::new("update_mask", reason)
        })
    };
    paths.iter().map(known).collect()
}

/// Refuses a change to a field that never changes; an empty text means that the request leaves it alone.
pub(super) fn immutable(path: &str, wanted: &str, found: &str) -> Result<(), FieldError> {
    if wanted.is_empty() || wanted == found {
        return Ok(());
    }
    Err(FieldError::new(
        path,
        format!("cannot be changed: it is {found:?}; delete the object and create it anew"),
    ))
}

/// The conditions under which something may be added to a network.
pub(super) fn when_open(txn: Txn, network: &str) -> Txn {
    txn.when(Condition::Exists(keys::network(network))).when(Condition::Absent(keys::network_lock(network)))
}

/// The metadata of a new object.
pub(super) fn new_meta(meta: ObjectMeta, uid: Uuid, now: Timestamp) -> ObjectMeta {
    ObjectMeta {
        uid: uid.to_string(),
        creation_timestamp: Some(field::to_timestamp(now)),
        resource_version: 0,
        ..meta
    }
}

/// The claim of `owner`.
pub(super) fn claim(owner: Uuid) -> Vec<u8> {
    Claim { owner_uid: owner.to_string(), ..Claim::default() }.encode_to_vec()
}

/// Adds to `txn` that nothing has happened to a namespace that something is to be added to.
pub(super) fn when_namespace(txn: Txn, state: &NetworkState, namespace: &str) -> Result<Txn, AdminError> {
    let found = state.services.namespaces.get(namespace);
    if !state.has_namespace(namespace) {
        let name = namespace.to_owned();
        return Err(if found.is_some() {
            AdminError::Terminating(name)
        } else {
            AdminError::NoNamespace(name)
        });
    }
    let key = keys::namespace(&state.network.name, namespace);
    Ok(txn.when(Condition::ModRevision(key, found.map_or(0, |namespace| namespace.revision))))
}

/// The namespace that a request names; none means `default`.
pub(super) fn namespace_of(text: &str) -> String {
    if text.is_empty() { DEFAULT_NAMESPACE.to_owned() } else { text.to_ascii_lowercase() }
}

/// Changes labels or annotations, as `path` says.
pub(super) fn set_meta(new: &mut ObjectMeta, wanted: &ObjectMeta, path: &str) {
    match path {
        "metadata.labels" => new.labels.clone_from(&wanted.labels),
        "metadata.annotations" => new.annotations.clone_from(&wanted.annotations),
        _ => {}
    }
}

/// Adds to `txn` that the reserved `address` belongs to `uid` from now on.
pub(super) fn take_address(state: &NetworkState, txn: Txn, owner: Owner, uid: Uuid, address: IpAddr) -> Txn {
    let key = keys::address(&state.network.name, owner, address);
    let stored = StoredAddress { owner_uid: uid.to_string(), released_at: None };
    let seen = state.released_revision(owner, address);
    txn.when(Condition::ModRevision(key.clone(), seen)).put(key, stored.encode_to_vec())
}

/// Adds to `txn` that the quarantine of `address` begins.
pub(super) fn release_address(
    txn: Txn,
    network: &str,
    owner: Owner,
    uid: &str,
    address: IpAddr,
    now: Timestamp,
) -> Txn {
    let stored = StoredAddress { owner_uid: uid.to_owned(), released_at: Some(field::to_timestamp(now)) };
    txn.put(keys::address(network, owner, address), stored.encode_to_vec())
}

/// Adds to `txn` that a Service is removed, and the quarantine of its ClusterIPs begins.
pub(super) fn remove_service(txn: Txn, service: &Service, now: Timestamp) -> Txn {
    let key = keys::service(&service.network, service.namespace.as_str(), service.name.as_str());
    let txn = txn.when(Condition::ModRevision(key.clone(), service.revision)).delete(key);
    service.cluster_ips().iter().fold(txn, |txn, address| {
        release_address(txn, &service.network, Owner::Service, service.uid(), *address, now)
    })
}

/// Adds to `txn` that an EndpointSlice is removed.
pub(super) fn remove_slice(txn: Txn, slice: &Slice) -> Txn {
    let key = keys::endpoint_slice(&slice.network, slice.namespace.as_str(), &slice.name);
    txn.when(Condition::ModRevision(key.clone(), slice.revision)).delete(key)
}

/// The transaction that removes a device, and begins the quarantine of its addresses.
pub(super) fn remove_device(device: &Device, now: Timestamp) -> Txn {
    let key = keys::device(&device.network, device.uid);
    let mut txn = Txn::new()
        .when(Condition::ModRevision(key.clone(), device.revision))
        .delete(key)
        .delete(keys::device_name(&device.network, &device.name))
        .delete(keys::presence(&device.network, device.uid))
        .delete(keys::readiness(&device.network, device.uid));
    if let Some(key) = &device.key {
        txn = txn.delete(keys::device_key(&device.network, key));
    }
    let uid = device.uid.to_string();
    device
        .addresses()
        .fold(txn, |txn, address| release_address(txn, &device.network, Owner::Device, &uid, address, now))
}

/// The transaction that changes a device that was seen as `old`.
pub(super) fn change_device(old: &Device, new: &Device) -> Txn {
    with_device(Txn::new(), old, new)
}

/// Adds to `txn` that a device that was seen as `old` changes.
pub(super) fn with_device(txn: Txn, old: &Device, new: &Device) -> Txn {
    let key: Bytes = keys::device(&old.network, old.uid);
    txn.when(Condition::ModRevision(key.clone(), old.revision)).put(key, new.encode())
}
