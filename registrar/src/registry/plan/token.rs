//! What operators do with join tokens.

use std::time::Duration;

use muster_common::{name::Label, time::Timestamp};
use muster_proto::{admin, storage::StoredToken};
use prost::Message as _;
use uuid::Uuid;

use super::{AdminError, Outcome, Plan, check_version, find, masked, new_meta, short, when_open};
use crate::{
    registry::{
        device::DEFAULT_NAMESPACE,
        field::{self, FieldError},
        index::Index,
        keys,
        token::{Joiner, Token},
    },
    store::{Condition, Revision, Txn},
    token::{DEFAULT_TTL, JoinToken},
};

const KIND: &str = "token";
const MUTABLE: [&str; 4] = ["metadata.labels", "metadata.annotations", "spec.revoked", "spec.expires_at"];
/// Tokens that nobody could want to live longer.
const TTL_MAX: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Plans the creation of a token whose secret is `secret`.
///
/// # Errors
/// See [`AdminError`].
pub fn create(
    index: &Index,
    request: &admin::Token,
    secret: &JoinToken,
    uid: Uuid,
    now: Timestamp,
) -> Result<Outcome<Box<str>>, AdminError> {
    let meta = request.metadata.clone().unwrap_or_default();
    let mut spec = request.spec.clone().unwrap_or_default();
    field::metadata(&meta)?;
    let state = find(index, &meta.network)?;
    let name = secret.id().as_str();
    match spec.expires_at.as_ref().map(field::timestamp) {
        None => spec.expires_at = Some(field::to_timestamp(now + DEFAULT_TTL)),
        Some(at) => check_expiry(at, now)?,
    }
    match Joiner::of(&spec)? {
        Joiner::Device => {
            spec.party.clear();
            if spec.device_namespace.is_empty() {
                DEFAULT_NAMESPACE.clone_into(&mut spec.device_namespace);
            }
            spec.device_namespace =
                field::parse::<Label>("spec.device_namespace", &spec.device_namespace)?.to_string();
            field::labels("spec.device_labels", &spec.device_labels)?;
        }
        Joiner::Director => {
            let of_devices = [
                ("spec.device_namespace", spec.device_namespace.is_empty()),
                ("spec.device_labels", spec.device_labels.is_empty()),
            ];
            if let Some((path, _)) = of_devices.into_iter().find(|(_, empty)| !empty) {
                let reason = "is for devices, and the token is for directors; leave it empty";
                return Err(FieldError::new(path, reason).into());
            }
        }
    }
    let uid_text = uid.to_string();
    if let Some(found) = state.tokens.get(name) {
        let ours = found.stored.token.as_ref().and_then(|token| token.metadata.as_ref());
        if ours.is_some_and(|meta| meta.uid == uid_text) {
            return Ok(Outcome::Done(name.into()));
        }
        return Err(AdminError::Exists { kind: KIND, name: name.to_owned() });
    }
    let network = &state.network.name;
    if index.lock_revision(network).is_some() {
        return Err(AdminError::Locked(network.to_string()));
    }
    let mut meta = new_meta(meta, uid, now);
    (meta.name, meta.namespace) = (name.to_owned(), String::new());
    let stored = StoredToken {
        token: Some(admin::Token {
            metadata: Some(meta),
            spec: Some(spec),
            status: Some(admin::TokenStatus::default()),
        }),
        secret_hash: secret.secret_hash().to_vec(),
        ..StoredToken::default()
    };
    let key = keys::token(network, name);
    let txn =
        when_open(Txn::new(), network).when(Condition::Absent(key.clone())).put(key, stored.encode_to_vec());
    Ok(Outcome::Write(Plan::new(txn, name.into())))
}

fn check_expiry(at: Timestamp, now: Timestamp) -> Result<(), FieldError> {
    let path = "spec.expires_at";
    if at <= now {
        return Err(FieldError::new(
            path,
            format!("{at} is in the past: it is {now} here; choose a later time"),
        ));
    }
    if at > now + TTL_MAX {
        return Err(FieldError::new(
            path,
            format!("{at} is more than ten years away; choose an earlier time"),
        ));
    }
    Ok(())
}

/// Plans a change of labels, annotations, expiry, or whether the token is revoked.
///
/// # Errors
/// See [`AdminError`].
pub fn update(
    index: &Index,
    request: &admin::Token,
    mask: Option<&pbjson_types::FieldMask>,
    now: Timestamp,
) -> Result<Outcome<Box<str>>, AdminError> {
    let meta = request.metadata.clone().unwrap_or_default();
    let spec = request.spec.clone().unwrap_or_default();
    let old = get(index, &meta.network, &meta.name)?;
    let paths = masked(mask, &MUTABLE)?;
    field::metadata(&meta)?;
    let found = old.spec().cloned().unwrap_or_default();
    if mask.is_none_or(|mask| mask.paths.is_empty()) {
        let same_namespace =
            spec.device_namespace.is_empty() || spec.device_namespace == found.device_namespace;
        let same_labels = spec.device_labels.is_empty() || spec.device_labels == found.device_labels;
        for (path, same) in [
            ("spec.reusable", spec.reusable == found.reusable),
            ("spec.party", spec.party.is_empty() || Joiner::of(&spec)? == old.joiner),
            ("spec.device_namespace", same_namespace),
            ("spec.device_labels", same_labels),
        ] {
            if !same {
                return Err(FieldError::new(path, "cannot be changed; create another token").into());
            }
        }
    }
    check_version(KIND, &meta.name, meta.resource_version, old.revision)?;
    let mut stored = old.stored.clone();
    let token = stored.token.get_or_insert_default();
    for path in paths {
        let new_spec = token.spec.get_or_insert_default();
        match path {
            "metadata.labels" => token.metadata.get_or_insert_default().labels.clone_from(&meta.labels),
            "metadata.annotations" => {
                token.metadata.get_or_insert_default().annotations.clone_from(&meta.annotations);
            }
            "spec.revoked" => new_spec.revoked = spec.revoked,
            _ => {
                if let Some(at) = &spec.expires_at
                    && spec.expires_at != found.expires_at
                {
                    check_expiry(field::timestamp(at), now)?;
                    new_spec.expires_at = Some(field::to_timestamp(field::timestamp(at)));
                }
            }
        }
    }
    Ok(write(old, &stored))
}

/// Plans the deletion of a token. Devices that have joined with it stay.
///
/// # Errors
/// See [`AdminError`].
pub fn delete(
    index: &Index,
    network: &str,
    name: &str,
    version: Revision,
) -> Result<Outcome<()>, AdminError> {
    let token = get(index, network, name)?;
    check_version(KIND, name, version, token.revision)?;
    let key = keys::token(&token.network, &token.name);
    let txn = Txn::new().when(Condition::ModRevision(key.clone(), token.revision)).delete(key);
    Ok(Outcome::Write(Plan::new(txn, ())))
}

/// Plans that a reusable token has been used `uses` times more.
///
/// # Errors
/// [`AdminError::NotFound`].
pub fn count(index: &Index, network: &str, name: &str, uses: u64) -> Result<Outcome<Box<str>>, AdminError> {
    let old = get(index, network, name)?;
    let mut stored = old.stored.clone();
    let status = stored.token.get_or_insert_default().status.get_or_insert_default();
    status.uses = status.uses.saturating_add(uses);
    Ok(write(old, &stored))
}

fn write(old: &Token, new: &StoredToken) -> Outcome<Box<str>> {
    if *new == old.stored {
        return Outcome::Done(old.name.clone());
    }
    let key = keys::token(&old.network, &old.name);
    let condition = Condition::ModRevision(key.clone(), old.revision);
    Outcome::Write(Plan::new(Txn::new().when(condition).put(key, new.encode_to_vec()), old.name.clone()))
}

/// Finds a token by name.
///
/// # Errors
/// [`AdminError::NotFound`].
pub fn get<'a>(index: &'a Index, network: &str, name: &str) -> Result<&'a Token, AdminError> {
    let found = find(index, network)?.tokens.get(&*name.to_ascii_lowercase());
    found.map(|token| &**token).ok_or_else(|| AdminError::NotFound { kind: KIND, name: short(name) })
}
