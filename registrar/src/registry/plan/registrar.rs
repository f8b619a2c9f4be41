//! What a registrar writes of itself, and what operators do with registrars.

use std::sync::Arc;

use muster_common::time::Timestamp;
use muster_proto::admin::{self, ObjectMeta};
use uuid::Uuid;

use super::{AdminError, Outcome, Plan, check_version};
use crate::{
    registry::{
        field::{self, FieldError},
        index::Index,
        keys,
        registrar::Registrar,
        view::Advertised,
    },
    store::{Condition, Revision, Txn},
};

const KIND: &str = "registrar";

/// What a registrar says of itself.
#[derive(Clone, Debug)]
pub struct Own<'a> {
    /// As in its certificate.
    pub uid: Uuid,
    /// What it announces itself by.
    pub run: Uuid,
    /// Name of its host.
    pub host: &'a str,
    /// Where it is reached.
    pub advertised: &'a Advertised,
    /// Its version.
    pub version: &'a str,
    /// Open sessions of devices.
    pub sessions: u64,
}

/// Plans that a registrar that runs says so; what does not change is not written.
///
/// # Errors
/// If an address cannot be told.
pub fn tell(index: &Index, own: &Own<'_>, now: Timestamp) -> Result<Outcome<()>, FieldError> {
    let old = index.registrars().by_uid(own.uid);
    let mut stored = old.map(|old| old.stored.clone()).unwrap_or_default();
    let uid = own.uid.to_string();
    stored.metadata.get_or_insert_with(|| ObjectMeta {
        // Hosts of containers may all be called the same.
        name: format!("{}-{}", own.host.to_ascii_lowercase(), uid.get(..4).unwrap_or_default()),
        uid,
        creation_timestamp: Some(field::to_timestamp(now)),
        ..ObjectMeta::default()
    });
    let status = stored.status.get_or_insert_default();
    status.addresses.clone_from(&own.advertised.registrars);
    status.dns_servers.clone_from(&own.advertised.dns_servers);
    own.version.clone_into(&mut status.version);
    status.run_uid = own.run.to_string();
    status.sessions = own.sessions;
    let new = Registrar::check(stored, own.uid, old.map_or(0, |old| old.revision))?;
    if old.is_some_and(|old| **old == new) {
        return Ok(Outcome::Done(()));
    }
    let key = keys::registrar_record(own.uid);
    let txn = Txn::new().when(Condition::ModRevision(key.clone(), new.revision)).put(key, new.encode());
    Ok(Outcome::Write(Plan::new(txn, ())))
}

/// The registrar with a name or uid.
///
/// # Errors
/// [`AdminError::NotFound`].
pub fn get<'a>(index: &'a Index, name: &str) -> Result<&'a Arc<Registrar>, AdminError> {
    let found = index.registrars().find(name);
    found.ok_or_else(|| AdminError::NotFound { kind: KIND, name: name.chars().take(80).collect() })
}

/// Plans that a registrar that does not run is forgotten.
///
/// # Errors
/// See [`AdminError`].
pub fn delete(index: &Index, name: &str, version: Revision) -> Result<Outcome<()>, AdminError> {
    let old = get(index, name)?;
    check_version(KIND, &old.name, version, old.revision)?;
    if index.registrars().runs(old) {
        return Err(AdminError::Runs(old.name.to_string()));
    }
    let key = keys::registrar_record(old.uid);
    let txn = Txn::new().when(Condition::ModRevision(key.clone(), old.revision)).delete(key);
    Ok(Outcome::Write(Plan::new(txn, ())))
}

/// The registrar as operators see it.
pub fn show(index: &Index, registrar: &Registrar) -> admin::Registrar {
    registrar.to_proto(index.registrars().runs(registrar))
}
