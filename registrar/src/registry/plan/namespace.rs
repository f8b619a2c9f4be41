//! What operators do with namespaces. Deleting one takes several transactions: its phase is set first, which takes its
//! names away at once and lets nothing be added to it; whoever finds it so can finish.

use muster_common::time::Timestamp;
use muster_proto::admin;
use uuid::Uuid;

use super::{
    AdminError, Outcome, Plan, check_version, find, immutable, masked, new_meta, remove_service,
    remove_slice, set_meta, short, when_open,
};
use crate::{
    registry::{
        device::DEFAULT_NAMESPACE,
        index::{Index, NetworkState},
        keys,
        namespace::{Namespace, TERMINATING},
    },
    store::{Condition, MAX_TXN_OPS, Revision, Txn},
};

const KIND: &str = "namespace";
const MUTABLE: [&str; 2] = ["metadata.labels", "metadata.annotations"];
/// The most changes that the removal of one object is made of.
const OPS_EACH: usize = 3;

/// The namespace that a network begins with.
pub(super) fn initial(uid: Uuid, now: Timestamp) -> admin::Namespace {
    let meta = admin::ObjectMeta { name: DEFAULT_NAMESPACE.to_owned(), ..admin::ObjectMeta::default() };
    admin::Namespace { metadata: Some(new_meta(meta, uid, now)), status: None }
}

/// Plans the creation of a namespace. The reply is what it is going to be.
///
/// # Errors
/// See [`AdminError`].
pub fn create(
    index: &Index,
    request: &admin::Namespace,
    uid: Uuid,
    now: Timestamp,
) -> Result<Outcome<admin::Namespace>, AdminError> {
    let meta = new_meta(request.metadata.clone().unwrap_or_default(), uid, now);
    let state = find(index, &meta.network)?;
    let network = &state.network.name;
    let wanted = admin::Namespace { metadata: Some(meta), status: None };
    let namespace = Namespace::check(wanted, network, 0)?;
    let name = namespace.name.as_str();
    if let Some(found) = state.services.namespaces.get(name) {
        return match found.uid() == namespace.uid() {
            true => Ok(Outcome::Done(found.to_proto())),
            false if found.terminating => Err(AdminError::Terminating(name.to_owned())),
            false => Err(AdminError::Exists { kind: KIND, name: name.to_owned() }),
        };
    }
    if index.lock_revision(network).is_some() {
        return Err(AdminError::Locked(network.to_string()));
    }
    let key = keys::namespace(network, name);
    let txn =
        when_open(Txn::new(), network).when(Condition::Absent(key.clone())).put(key, namespace.encode());
    Ok(Outcome::Write(Plan::new(txn, namespace.to_proto())))
}

/// Plans a change of labels or annotations.
///
/// # Errors
/// See [`AdminError`].
pub fn update(
    index: &Index,
    request: &admin::Namespace,
    mask: Option<&pbjson_types::FieldMask>,
) -> Result<Outcome<admin::Namespace>, AdminError> {
    let meta = request.metadata.clone().unwrap_or_default();
    let old = get(index, &meta.network, &meta.name)?;
    let paths = masked(mask, &MUTABLE)?;
    immutable("metadata.uid", &meta.uid, old.uid())?;
    check_version(KIND, old.name.as_str(), meta.resource_version, old.revision)?;
    let mut stored = old.stored.clone();
    for path in paths {
        set_meta(stored.metadata.get_or_insert_default(), &meta, path);
    }
    let new = Namespace::check(stored, &old.network, old.revision)?;
    if new == *old {
        return Ok(Outcome::Done(old.to_proto()));
    }
    Ok(Outcome::Write(Plan::new(change(old, &new), new.to_proto())))
}

fn change(old: &Namespace, new: &Namespace) -> Txn {
    let key = keys::namespace(&old.network, old.name.as_str());
    Txn::new().when(Condition::ModRevision(key.clone(), old.revision)).put(key, new.encode())
}

/// Plans that a namespace without devices is going to be deleted; [`empty`] does it.
///
/// # Errors
/// See [`AdminError`].
pub fn terminate(
    index: &Index,
    network: &str,
    name: &str,
    version: Revision,
) -> Result<Outcome<()>, AdminError> {
    if name.eq_ignore_ascii_case(DEFAULT_NAMESPACE) {
        find(index, network)?;
        return Err(AdminError::DefaultNamespace);
    }
    let old = get(index, network, name)?;
    if old.terminating {
        return Ok(Outcome::Done(()));
    }
    check_version(KIND, old.name.as_str(), version, old.revision)?;
    let devices = find(index, network)?.devices_in(old.name.as_str());
    if devices > 0 {
        return Err(AdminError::NamespaceInUse { name: old.name.to_string(), devices });
    }
    let mut stored = old.stored.clone();
    TERMINATING.clone_into(&mut stored.status.get_or_insert_default().phase);
    let new = Namespace { terminating: true, stored, ..old.clone() };
    Ok(Outcome::Write(Plan::new(change(old, &new), ())))
}

/// Plans the next transaction of the deletion of a namespace that [`terminate`] has begun. The reply is whether it was
/// the last one.
///
/// # Errors
/// None at present.
pub fn empty(index: &Index, network: &str, name: &str, now: Timestamp) -> Result<Outcome<bool>, AdminError> {
    let found = index.network(network).and_then(|state| Some((state, state.services.namespaces.get(name)?)));
    let Some((state, namespace)) = found.filter(|(_, namespace)| namespace.terminating) else {
        return Ok(Outcome::Done(true));
    };
    let rest = contents(state, name, now);
    if !rest.ops.is_empty() {
        return Ok(Outcome::Write(Plan::new(rest, false)));
    }
    let key = keys::namespace(network, name);
    let txn = Txn::new().when(Condition::ModRevision(key.clone(), namespace.revision)).delete(key);
    Ok(Outcome::Write(Plan::new(txn, true)))
}

/// Removes as much of what is in a namespace as fits into a transaction.
fn contents(state: &NetworkState, name: &str, now: Timestamp) -> Txn {
    let services = state.services.services.within(name, "").take(MAX_TXN_OPS / OPS_EACH);
    let mut txn = services.fold(Txn::new(), |txn, service| remove_service(txn, service, now));
    let room = MAX_TXN_OPS - txn.ops.len();
    let stored = state.services.slices.within(name, "").filter(|slice| slice.selected.is_none());
    for slice in stored.take(room) {
        txn = remove_slice(txn, slice);
    }
    txn
}

/// The namespaces whose deletion has begun, by network and name.
pub fn terminating(index: &Index) -> Vec<(String, String)> {
    let of = |state: &NetworkState| -> Vec<(String, String)> {
        let all = state.services.namespaces.values().filter(|namespace| namespace.terminating);
        all.map(|namespace| (namespace.network.to_string(), namespace.name.to_string())).collect()
    };
    index.networks().flat_map(of).collect()
}

/// Finds a namespace.
///
/// # Errors
/// [`AdminError::NotFound`].
pub fn get<'a>(index: &'a Index, network: &str, name: &str) -> Result<&'a Namespace, AdminError> {
    let found = find(index, network)?.services.namespaces.get(&*name.to_ascii_lowercase());
    found.map(|namespace| &**namespace).ok_or_else(|| AdminError::NotFound { kind: KIND, name: short(name) })
}
