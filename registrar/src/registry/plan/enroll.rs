//! Enroll: a token becomes a device.

use std::{collections::BTreeMap, sync::Arc};

use muster_common::{
    name::{Label, NameError},
    time::Timestamp,
    tls::SpkiHash,
};
use muster_proto::storage::Claim;
use prost::Message as _;
use uuid::Uuid;

use super::{Outcome, Plan, change_device, when_open};
use crate::{
    registry::{
        device::{DEFAULT_NAMESPACE, Device},
        index::{Index, NetworkState},
        keys,
        token::Token,
    },
    store::{Condition, Txn},
    token::{Admission, JoinToken, TokenError, check},
};

/// A request to join.
#[derive(Debug)]
pub struct Enrollment<'a> {
    /// The token that was presented.
    pub token: &'a JoinToken,
    /// SHA-256 of the SPKI of the key that is to be certified.
    pub key: &'a SpkiHash,
    /// The name that the device asks for.
    pub name: &'a str,
    /// The uid of the device, if it becomes a new one: random, and the same each time that the request is planned.
    pub uid: Uuid,
    /// When the device's certificate is going to expire.
    pub certificate_expiry: Timestamp,
    /// The time.
    pub now: Timestamp,
    /// What the store has under the name, once [`EnrollError::NameTaken`] has asked for it.
    pub claim: Option<&'a Claim>,
}

/// A device that has joined.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Enrolled {
    /// Its network.
    pub network: Arc<str>,
    /// Its uid.
    pub uid: Uuid,
    /// The reusable token that it joined with, to be counted; `None` for others and for repetitions.
    pub counts_for: Option<Box<str>>,
}

/// Why a request to join was refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum EnrollError {
    /// The token lets nobody in.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The name is none.
    #[error("name: {0}")]
    Name(#[from] NameError),
    /// Another device has the name.
    #[error(
        "a device called {name:?} exists already; choose another name (muster-agent join --name NAME), or ask the \
         operator to delete that device"
    )]
    NameTaken {
        /// The network that the token is for.
        network: Arc<str>,
        /// The name.
        name: String,
    },
    /// An operator has reserved the name for a device in another namespace.
    #[error(
        "the name {name:?} is kept for a device in namespace {wanted:?}, and the token is for namespace {found:?}; \
         ask the operator for a token of that namespace, or choose another name"
    )]
    Namespace {
        /// The name.
        name: String,
        /// Namespace that the name is kept in.
        wanted: String,
        /// Namespace of the token.
        found: String,
    },
    /// The device has been revoked.
    #[error(
        "the device {0:?} has been revoked; ask the operator to delete it, then join again with a new token"
    )]
    Revoked(String),
    /// Nothing can be added to the network just now.
    #[error("the network {0:?} is being deleted or its pools are being changed; try again in a moment")]
    Locked(String),
}

/// Plans a request to join.
///
/// # Errors
/// See [`EnrollError`].
pub fn plan(index: &Index, request: &Enrollment<'_>) -> Result<Outcome<Enrolled>, EnrollError> {
    let (state, token, admission) = admit(index, request)?;
    let network = &state.network.name;
    let name = request.name.parse::<Label>().and_then(Label::for_device)?;
    let taken = || EnrollError::NameTaken { network: network.clone(), name: name.to_string() };
    let done = |uid| Ok(Outcome::Done(Enrolled { network: network.clone(), uid, counts_for: None }));
    let found = state.devices.by_name(name.as_str());

    if let Admission::Again { device_uid } = admission {
        let device = Uuid::try_parse(&device_uid).ok().and_then(|uid| state.devices.by_uid(uid));
        return match device {
            Some(device) if device.revoked => Err(EnrollError::Revoked(name.to_string())),
            Some(device) if *device.name == *name.as_str() => done(device.uid),
            _ => Err(TokenError::Used.into()),
        };
    }
    let device = match found {
        Some(device) if device.uid == request.uid => return done(device.uid),
        Some(device) if device.revoked => return Err(EnrollError::Revoked(name.to_string())),
        Some(device) if device.certificate_expiry.is_none() => Some(device),
        Some(device) => {
            let claim = request.claim.ok_or_else(taken)?;
            let repeated = claim.owner_uid == device.uid.to_string()
                && claim.key_hash == request.key.as_bytes().as_slice()
                && claim.token == *token.name;
            return if repeated { done(device.uid) } else { Err(taken()) };
        }
        None => None,
    };
    if index.lock_revision(network).is_some() {
        return Err(EnrollError::Locked(network.to_string()));
    }
    join(state, token, request, &name, device.map(|device| &**device)).map(Outcome::Write)
}

/// Checks a token before anything that costs more: whether its secret is right and it is in force. It may turn out
/// later that it was used with another key.
///
/// # Errors
/// All of [`TokenError`] but [`TokenError::Used`].
pub fn check_token(index: &Index, token: &JoinToken, now: Timestamp) -> Result<(), TokenError> {
    let nobody = SpkiHash::of_spki(&[]);
    for state in index.networks() {
        let Some(stored) = state.tokens.get(token.id().as_str()) else { continue };
        match check(Some(&stored.stored), token, now, &nobody) {
            Ok(_) | Err(TokenError::Used) => return Ok(()),
            Err(TokenError::Unknown) => {}
            Err(error) => return Err(error),
        }
    }
    Err(TokenError::Unknown)
}

/// Finds the token and decides on it. Tokens of different networks can have the same id; the secret tells them apart.
fn admit<'a>(
    index: &'a Index,
    request: &Enrollment<'_>,
) -> Result<(&'a NetworkState, &'a Token, Admission), TokenError> {
    for state in index.networks() {
        let Some(token) = state.tokens.get(request.token.id().as_str()) else { continue };
        match check(Some(&token.stored), request.token, request.now, request.key) {
            Ok(admission) => return Ok((state, token, admission)),
            Err(TokenError::Unknown) => {}
            Err(error) => return Err(error),
        }
    }
    Err(TokenError::Unknown)
}

/// The transaction by which a new device, or one that an operator has prepared, joins.
fn join(
    state: &NetworkState,
    token: &Token,
    request: &Enrollment<'_>,
    name: &Label,
    prepared: Option<&Device>,
) -> Result<Plan<Enrolled>, EnrollError> {
    let network = &state.network.name;
    let spec = token.spec().cloned().unwrap_or_default();
    let namespace = if spec.device_namespace.is_empty() { DEFAULT_NAMESPACE } else { &spec.device_namespace };
    let name_key = keys::device_name(network, name.as_str());
    let (txn, uid) = match prepared {
        Some(old) if *old.namespace != *namespace => {
            return Err(EnrollError::Namespace {
                name: name.to_string(),
                wanted: old.namespace.to_string(),
                found: namespace.to_owned(),
            });
        }
        Some(old) => {
            let mut device = old.clone();
            let meta = device.meta.take().unwrap_or_default();
            let mut labels = meta.labels;
            labels.extend(spec.device_labels);
            device.set_meta(labels, meta.annotations);
            device.certificate_expiry = Some(request.certificate_expiry);
            (change_device(old, &device), old.uid)
        }
        None => {
            let mut device = new_device(state, request.uid, name, namespace, request.now);
            device.set_meta(spec.device_labels, BTreeMap::new());
            device.certificate_expiry = Some(request.certificate_expiry);
            let key = keys::device(network, device.uid);
            let txn = when_open(Txn::new(), network)
                .when(Condition::Absent(key.clone()))
                .when(Condition::Absent(name_key.clone()))
                .put(key, device.encode());
            (txn, device.uid)
        }
    };
    let claim = Claim {
        owner_uid: uid.to_string(),
        key_hash: request.key.as_bytes().to_vec(),
        token: token.name.to_string(),
    };
    let token_key = keys::token(network, &token.name);
    let mut txn = txn
        .when(Condition::ModRevision(token_key.clone(), token.revision))
        .put(name_key, claim.encode_to_vec());
    if !spec.reusable {
        let mut stored = token.stored.clone();
        stored.used_by_key_hash = request.key.as_bytes().to_vec();
        stored.used_by_device_uid = uid.to_string();
        stored.token.get_or_insert_default().status.get_or_insert_default().uses = 1;
        txn = txn.put(token_key, stored.encode_to_vec());
    }
    let counts_for = spec.reusable.then(|| token.name.clone());
    Ok(Plan::new(txn, Enrolled { network: network.clone(), uid, counts_for }))
}

/// A device without anything but a name.
pub(super) fn new_device(
    state: &NetworkState,
    uid: Uuid,
    name: &Label,
    namespace: &str,
    now: Timestamp,
) -> Device {
    Device {
        uid,
        network: state.network.name.clone(),
        name: name.as_str().into(),
        namespace: namespace.into(),
        meta: None,
        ipv4: None,
        ipv6: None,
        chosen_ipv4: false,
        chosen_ipv6: false,
        revoked: false,
        key: None,
        endpoints: Box::default(),
        reflexive: None,
        aes_256_gcm: false,
        agent_version: "".into(),
        created: now,
        certificate_expiry: None,
        revision: 0,
    }
}
