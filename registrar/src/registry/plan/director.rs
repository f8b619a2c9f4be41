//! What directors ask for themselves: to join, Register, Renew; and what operators do with them.

use std::{net::SocketAddr, sync::Arc};

use muster_common::{name::Label, time::Timestamp};
use muster_proto::admin;
use uuid::Uuid;

use super::{
    AdminError, Outcome, Plan, check_version, find as find_network, immutable, masked, set_meta, short,
    when_open,
};
use crate::{
    registry::{
        director::Director,
        field::{self, FieldError},
        index::{Index, NetworkState},
        keys,
    },
    store::{Condition, Revision, Txn},
};

const KIND: &str = "director";
const MUTABLE: [&str; 4] = ["metadata.labels", "metadata.annotations", "spec.revoked", "spec.drained"];

/// What a director tells when it registers.
#[derive(Debug)]
pub struct Registration<'a> {
    /// As the director's operator named it.
    pub region: &'a str,
    /// Where it is reached, best first.
    pub endpoints: &'a [SocketAddr],
    /// Further TCP ports.
    pub tcp_ports: &'a [u32],
    /// Its version.
    pub version: &'a str,
}

/// Why a director's request was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DirectorError {
    /// There is no such director any more.
    #[error(
        "this director is no longer registered: it was deleted; join again with a new token: muster-director join"
    )]
    Gone,
    /// An operator has revoked the director.
    #[error("this director has been revoked; ask the operator of the network")]
    Revoked,
    /// What it tells of itself cannot be used.
    #[error(transparent)]
    Field(#[from] FieldError),
}

/// The director that a certificate names, unless it is gone or revoked.
///
/// # Errors
/// [`DirectorError::Gone`] and [`DirectorError::Revoked`].
pub fn find<'a>(index: &'a Index, network: &str, uid: Uuid) -> Result<&'a Arc<Director>, DirectorError> {
    match index.director(network, uid) {
        None => Err(DirectorError::Gone),
        Some(director) if director.is_revoked() => Err(DirectorError::Revoked),
        Some(director) => Ok(director),
    }
}

/// The transaction by which a new director comes into being, its name aside.
pub(super) fn join(
    state: &NetworkState,
    uid: Uuid,
    name: &Label,
    certificate_expiry: Timestamp,
    now: Timestamp,
) -> Txn {
    let network = &state.network.name;
    let mut director = Director::new(network, uid, name, now);
    let status = director.stored.status.get_or_insert_default();
    status.certificate_expiry = Some(field::to_timestamp(certificate_expiry));
    let (key, name_key) = (keys::director(network, uid), keys::director_name(network, name.as_str()));
    when_open(Txn::new(), network)
        .when(Condition::Absent(key.clone()))
        .when(Condition::Absent(name_key))
        .put(key, director.encode())
}

/// Plans Register. A registration that changes nothing writes nothing.
///
/// # Errors
/// See [`DirectorError`].
pub fn register(
    index: &Index,
    network: &str,
    uid: Uuid,
    request: &Registration<'_>,
) -> Result<Outcome<()>, DirectorError> {
    let old = find(index, network, uid)?;
    if request.endpoints.is_empty() {
        let reason = "is empty; name at least one address that agents reach the director at";
        return Err(FieldError::new("endpoints", reason).into());
    }
    let mut stored = old.stored.clone();
    let status = stored.status.get_or_insert_default();
    request.region.clone_into(&mut status.region);
    status.endpoints = request.endpoints.iter().map(field::to_endpoint).collect();
    request.tcp_ports.clone_into(&mut status.tcp_ports);
    request.version.clone_into(&mut status.version);
    // One that registers has just come, whatever it said before it went.
    status.phase.clear();
    let new = Director::check(stored, &old.network, uid, old.revision)?;
    Ok(write(old, &new, ()))
}

/// Plans that a director has its next certificate, which expires at `expiry`.
///
/// # Errors
/// [`DirectorError::Gone`] and [`DirectorError::Revoked`].
pub fn renew(
    index: &Index,
    network: &str,
    uid: Uuid,
    expiry: Timestamp,
) -> Result<Outcome<()>, DirectorError> {
    let old = find(index, network, uid)?;
    let mut new = (**old).clone();
    new.stored.status.get_or_insert_default().certificate_expiry = Some(field::to_timestamp(expiry));
    Ok(write(old, &new, ()))
}

/// Plans that a director says whether devices should leave it.
///
/// # Errors
/// [`DirectorError::Gone`] and [`DirectorError::Revoked`].
pub fn leave(index: &Index, network: &str, uid: Uuid, leaving: bool) -> Result<Outcome<()>, DirectorError> {
    let old = find(index, network, uid)?;
    let mut new = (**old).clone();
    new.set_leaving(leaving);
    Ok(write(old, &new, ()))
}

/// Plans a change of labels, annotations, or whether the director is revoked or drained.
///
/// # Errors
/// See [`AdminError`].
pub fn update(
    index: &Index,
    request: &admin::Director,
    mask: Option<&pbjson_types::FieldMask>,
) -> Result<Outcome<Uuid>, AdminError> {
    let meta = request.metadata.clone().unwrap_or_default();
    let wanted = request.spec.unwrap_or_default();
    let old = get(index, &meta.network, &meta.name)?;
    let paths = masked(mask, &MUTABLE)?;
    immutable("metadata.uid", &meta.uid, &old.uid.to_string())?;
    check_version(KIND, &old.name, meta.resource_version, old.revision)?;
    let mut stored = old.stored.clone();
    for path in paths {
        let spec = stored.spec.get_or_insert_default();
        match path {
            "spec.revoked" => spec.revoked = wanted.revoked,
            "spec.drained" => spec.drained = wanted.drained,
            path => set_meta(stored.metadata.get_or_insert_default(), &meta, path),
        }
    }
    let new = Director::check(stored, &old.network, old.uid, old.revision)?;
    Ok(write(old, &new, old.uid))
}

/// Plans the deletion of a director: its name is free again. The network is written once more as it is, so that
/// devices that come back later find out by its revision.
///
/// # Errors
/// See [`AdminError`].
pub fn delete(
    index: &Index,
    network: &str,
    name: &str,
    version: Revision,
) -> Result<Outcome<()>, AdminError> {
    let director = get(index, network, name)?;
    check_version(KIND, &director.name, version, director.revision)?;
    let network = &find_network(index, network)?.network;
    let (key, network_key) = (keys::director(&network.name, director.uid), keys::network(&network.name));
    let txn = Txn::new()
        .when(Condition::ModRevision(key.clone(), director.revision))
        .when(Condition::ModRevision(network_key.clone(), network.revision))
        .delete(key)
        .delete(keys::director_name(&network.name, &director.name))
        .put(network_key, network.encode());
    Ok(Outcome::Write(Plan::new(txn, ())))
}

fn write<R>(old: &Director, new: &Director, reply: R) -> Outcome<R> {
    if new == old {
        return Outcome::Done(reply);
    }
    let key = keys::director(&old.network, old.uid);
    let txn = Txn::new().when(Condition::ModRevision(key.clone(), old.revision)).put(key, new.encode());
    Outcome::Write(Plan::new(txn, reply))
}

/// Finds a director by name.
///
/// # Errors
/// [`AdminError::NotFound`].
pub fn get<'a>(index: &'a Index, network: &str, name: &str) -> Result<&'a Director, AdminError> {
    let found = find_network(index, network)?.directors.by_name(&name.to_ascii_lowercase());
    found.map(|director| &**director).ok_or_else(|| AdminError::NotFound { kind: KIND, name: short(name) })
}
