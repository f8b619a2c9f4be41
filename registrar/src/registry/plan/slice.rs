//! What operators do with EndpointSlices.

use muster_common::time::Timestamp;
use muster_proto::admin;
use uuid::Uuid;

use super::{
    AdminError, Outcome, Plan, check_version, find, immutable, masked, namespace_of, new_meta, remove_slice,
    set_meta, short, when_namespace, when_open,
};
use crate::{
    registry::{field::FieldError, index::Index, keys, selected, slice::Slice},
    store::{Condition, Revision, Txn},
};

const KIND: &str = "endpointslice";
const MUTABLE: [&str; 4] = ["metadata.labels", "metadata.annotations", "endpoints", "ports"];

/// Plans the creation of an EndpointSlice; its Service may come later. The reply is what it is going to be.
///
/// # Errors
/// See [`AdminError`].
pub fn create(
    index: &Index,
    request: &admin::EndpointSlice,
    uid: Uuid,
    now: Timestamp,
) -> Result<Outcome<admin::EndpointSlice>, AdminError> {
    let meta = new_meta(request.metadata.clone().unwrap_or_default(), uid, now);
    let state = find(index, &meta.network)?;
    let network = &state.network.name;
    let slice = Slice::check(admin::EndpointSlice { metadata: Some(meta), ..request.clone() }, network, 0)?;
    if slice.name.ends_with(selected::SUFFIX) {
        let reason = format!(
            "ends with {:?}, as the slices of devices that a Service selects do; choose another",
            selected::SUFFIX
        );
        return Err(FieldError::new("metadata.name", reason).into());
    }
    if let Some(found) = state.services.slices.get(slice.namespace.as_str(), &slice.name) {
        if found.uid() == slice.uid() {
            return Ok(Outcome::Done(found.to_proto()));
        }
        return Err(AdminError::Exists { kind: KIND, name: slice.name.to_string() });
    }
    if index.lock_revision(network).is_some() {
        return Err(AdminError::Locked(network.to_string()));
    }
    let txn = when_namespace(when_open(Txn::new(), network), state, slice.namespace.as_str())?;
    let key = keys::endpoint_slice(network, slice.namespace.as_str(), &slice.name);
    let txn = txn.when(Condition::Absent(key.clone())).put(key, slice.encode());
    Ok(Outcome::Write(Plan::new(txn, slice.to_proto())))
}

/// Plans a change of endpoints, ports, labels or annotations.
///
/// # Errors
/// See [`AdminError`].
pub fn update(
    index: &Index,
    request: &admin::EndpointSlice,
    mask: Option<&pbjson_types::FieldMask>,
) -> Result<Outcome<admin::EndpointSlice>, AdminError> {
    let meta = request.metadata.clone().unwrap_or_default();
    let old = made_by_hand(get(index, &meta.network, &meta.namespace, &meta.name)?)?;
    let paths = masked(mask, &MUTABLE)?;
    immutable("metadata.uid", &meta.uid, old.uid())?;
    immutable("addressType", &request.address_type, &old.stored.address_type)?;
    check_version(KIND, &old.name, meta.resource_version, old.revision)?;
    let mut stored = old.stored.clone();
    for path in paths {
        match path {
            "endpoints" => stored.endpoints.clone_from(&request.endpoints),
            "ports" => stored.ports.clone_from(&request.ports),
            path => set_meta(stored.metadata.get_or_insert_default(), &meta, path),
        }
    }
    let new = Slice::check(stored, &old.network, old.revision)?;
    if new == *old {
        return Ok(Outcome::Done(old.to_proto()));
    }
    let key = keys::endpoint_slice(&old.network, old.namespace.as_str(), &old.name);
    let txn = Txn::new().when(Condition::ModRevision(key.clone(), old.revision)).put(key, new.encode());
    Ok(Outcome::Write(Plan::new(txn, new.to_proto())))
}

/// Plans the deletion of an EndpointSlice.
///
/// # Errors
/// See [`AdminError`].
pub fn delete(
    index: &Index,
    network: &str,
    namespace: &str,
    name: &str,
    version: Revision,
) -> Result<Outcome<()>, AdminError> {
    let old = made_by_hand(get(index, network, namespace, name)?)?;
    check_version(KIND, &old.name, version, old.revision)?;
    Ok(Outcome::Write(Plan::new(remove_slice(Txn::new(), old), ())))
}

/// Refuses slices that nobody can change.
fn made_by_hand(slice: &Slice) -> Result<&Slice, AdminError> {
    match &slice.service {
        Some(service) if slice.selected.is_some() => {
            Err(AdminError::Selected { slice: slice.name.to_string(), service: service.to_string() })
        }
        _ => Ok(slice),
    }
}

/// Finds an EndpointSlice; no namespace means `default`.
///
/// # Errors
/// [`AdminError::NotFound`].
pub fn get<'a>(
    index: &'a Index,
    network: &str,
    namespace: &str,
    name: &str,
) -> Result<&'a Slice, AdminError> {
    let slices = &find(index, network)?.services.slices;
    let found = slices.get(&namespace_of(namespace), &name.to_ascii_lowercase());
    found.map(|slice| &**slice).ok_or_else(|| AdminError::NotFound { kind: KIND, name: short(name) })
}
