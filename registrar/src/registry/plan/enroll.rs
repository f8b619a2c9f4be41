//! Enroll: a token becomes a device or a director.

use std::{collections::BTreeMap, sync::Arc};

use muster_common::{
    name::{Label, NameError},
    time::Timestamp,
    tls::SpkiHash,
};
use muster_proto::{admin::TokenSpec, storage::Claim};
use prost::Message as _;
use uuid::Uuid;

use super::{Outcome, Plan, change_device, director, when_open};
use crate::{
    registry::{
        device::{DEFAULT_NAMESPACE, Device},
        director::Director,
        index::{Index, NetworkState},
        keys,
        token::{Joiner, Token},
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
    /// The name that the device or director asks for.
    pub name: &'a str,
    /// The uid, if it becomes a new one: random, and the same each time that the request is planned.
    pub uid: Uuid,
    /// When the certificate is going to expire.
    pub certificate_expiry: Timestamp,
    /// The time.
    pub now: Timestamp,
    /// What the store has under the name, once [`EnrollError::NameTaken`] has asked for it.
    pub claim: Option<&'a Claim>,
}

/// A device or director that has joined.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Enrolled {
    /// What it is.
    pub joiner: Joiner,
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
    /// Another device, or director, has the name.
    #[error(
        "a {} called {name:?} exists already; choose another name (muster-{} join --name NAME), or ask the operator \
         to delete that {}", .joiner.as_str(), program(*.joiner), .joiner.as_str()
    )]
    NameTaken {
        /// Who asks for it.
        joiner: Joiner,
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
    /// The device, or director, has been revoked.
    #[error(
        "the {} {name:?} has been revoked; ask the operator to delete it, then join again with a new token",
        .joiner.as_str()
    )]
    Revoked {
        /// What it is.
        joiner: Joiner,
        /// Its name.
        name: String,
    },
    /// Nothing can be added to the network just now.
    #[error("the network {0:?} is being deleted or its pools are being changed; try again in a moment")]
    Locked(String),
}

fn program(joiner: Joiner) -> &'static str {
    match joiner {
        Joiner::Device => "agent",
        Joiner::Director => "director",
    }
}

/// Plans a request to join.
///
/// # Errors
/// See [`EnrollError`].
pub fn plan(index: &Index, request: &Enrollment<'_>) -> Result<Outcome<Enrolled>, EnrollError> {
    let (state, token, admission) = admit(index, request)?;
    let (network, joiner) = (&state.network.name, token.joiner);
    let name = request.name.parse::<Label>()?;
    // Names of devices are names in DNS.
    let name = if joiner == Joiner::Device { name.for_device()? } else { name };
    let revoked = || EnrollError::Revoked { joiner, name: name.to_string() };
    let taken = || EnrollError::NameTaken { joiner, network: network.clone(), name: name.to_string() };
    let done = |uid| Ok(Outcome::Done(Enrolled { joiner, network: network.clone(), uid, counts_for: None }));

    if let Admission::Again { device_uid } = admission {
        let owner = Uuid::try_parse(&device_uid).ok().and_then(|uid| Owner::by_uid(state, joiner, uid));
        return match owner {
            Some(owner) if owner.revoked => Err(revoked()),
            Some(owner) if *owner.name == *name.as_str() => done(owner.uid),
            _ => Err(TokenError::Used.into()),
        };
    }
    match Owner::by_name(state, joiner, name.as_str()) {
        Some(owner) if owner.uid == request.uid => return done(owner.uid),
        Some(owner) if owner.revoked => return Err(revoked()),
        Some(owner) if owner.has_joined => {
            let claim = request.claim.ok_or_else(taken)?;
            let repeated = claim.owner_uid == owner.uid.to_string()
                && claim.key_hash == request.key.as_bytes().as_slice()
                && claim.token == *token.name;
            return if repeated { done(owner.uid) } else { Err(taken()) };
        }
        _ => {}
    }
    if index.lock_revision(network).is_some() {
        return Err(EnrollError::Locked(network.to_string()));
    }
    join(state, token, request, &name).map(Outcome::Write)
}

/// Who has a name among those that a token lets in.
struct Owner<'a> {
    uid: Uuid,
    name: &'a str,
    revoked: bool,
    has_joined: bool,
}

impl<'a> Owner<'a> {
    fn by_uid(state: &'a NetworkState, joiner: Joiner, uid: Uuid) -> Option<Self> {
        match joiner {
            Joiner::Device => state.devices.by_uid(uid).map(|device| device.into()),
            Joiner::Director => state.directors.by_uid(uid).map(|director| director.into()),
        }
    }

    fn by_name(state: &'a NetworkState, joiner: Joiner, name: &str) -> Option<Self> {
        match joiner {
            Joiner::Device => state.devices.by_name(name).map(|device| device.into()),
            Joiner::Director => state.directors.by_name(name).map(|director| director.into()),
        }
    }
}

impl<'a> From<&'a Arc<Device>> for Owner<'a> {
    fn from(device: &'a Arc<Device>) -> Self {
        // A host without an agent keeps its name: whoever joined with it would be taken for the host.
        let has_joined = device.certificate_expiry.is_some() || device.proxied_by().is_some();
        Self { uid: device.uid, name: &device.name, revoked: device.revoked, has_joined }
    }
}

impl<'a> From<&'a Arc<Director>> for Owner<'a> {
    fn from(director: &'a Arc<Director>) -> Self {
        let (name, revoked) = (&*director.name, director.is_revoked());
        Self { uid: director.uid, name, revoked, has_joined: true }
    }
}

/// Checks a token before anything that costs more: whether its secret is right and it is in force, and if so, whom it
/// lets in. It may turn out later that it was used with another key.
///
/// # Errors
/// All of [`TokenError`] but [`TokenError::Used`].
pub fn check_token(index: &Index, token: &JoinToken, now: Timestamp) -> Result<Joiner, TokenError> {
    let nobody = SpkiHash::of_spki(&[]);
    for state in index.networks() {
        let Some(stored) = state.tokens.get(token.id().as_str()) else { continue };
        match check(Some(&stored.stored), token, now, &nobody) {
            Ok(_) | Err(TokenError::Used) => return Ok(stored.joiner),
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

/// The transaction by which a new device or director joins, or a device that an operator has prepared.
fn join(
    state: &NetworkState,
    token: &Token,
    request: &Enrollment<'_>,
    name: &Label,
) -> Result<Plan<Enrolled>, EnrollError> {
    let network = &state.network.name;
    let spec = token.spec().cloned().unwrap_or_default();
    let (txn, uid, name_key) = match token.joiner {
        Joiner::Device => {
            let (txn, uid) = join_device(state, spec.clone(), request, name)?;
            (txn, uid, keys::device_name(network, name.as_str()))
        }
        Joiner::Director => {
            let (expiry, now) = (request.certificate_expiry, request.now);
            let txn = director::join(state, request.uid, name, expiry, now);
            (txn, request.uid, keys::director_name(network, name.as_str()))
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
    let (joiner, network) = (token.joiner, network.clone());
    Ok(Plan::new(txn, Enrolled { joiner, network, uid, counts_for }))
}

/// The part of it that makes the device, or changes the one that was prepared.
fn join_device(
    state: &NetworkState,
    spec: TokenSpec,
    request: &Enrollment<'_>,
    name: &Label,
) -> Result<(Txn, Uuid), EnrollError> {
    let network = &state.network.name;
    let namespace = if spec.device_namespace.is_empty() { DEFAULT_NAMESPACE } else { &spec.device_namespace };
    match state.devices.by_name(name.as_str()) {
        Some(old) if *old.namespace != *namespace => Err(EnrollError::Namespace {
            name: name.to_string(),
            wanted: old.namespace.to_string(),
            found: namespace.to_owned(),
        }),
        Some(old) => {
            let mut device = (**old).clone();
            let meta = device.meta.take().unwrap_or_default();
            let mut labels = meta.labels;
            labels.extend(spec.device_labels);
            device.set_meta(labels, meta.annotations);
            device.certificate_expiry = Some(request.certificate_expiry);
            Ok((change_device(old, &device), old.uid))
        }
        None => {
            let mut device = new_device(state, request.uid, name.as_str(), namespace, request.now);
            device.set_meta(spec.device_labels, BTreeMap::new());
            device.certificate_expiry = Some(request.certificate_expiry);
            let key = keys::device(network, device.uid);
            let txn = when_open(Txn::new(), network)
                .when(Condition::Absent(key.clone()))
                .when(Condition::Absent(keys::device_name(network, name.as_str())))
                .put(key, device.encode());
            Ok((txn, device.uid))
        }
    }
}

/// A device without anything but a name.
pub(super) fn new_device(
    state: &NetworkState,
    uid: Uuid,
    name: &str,
    namespace: &str,
    now: Timestamp,
) -> Device {
    Device {
        uid,
        network: state.network.name.clone(),
        name: name.into(),
        namespace: namespace.into(),
        meta: None,
        ipv4: None,
        ipv6: None,
        chosen_ipv4: false,
        chosen_ipv6: false,
        revoked: false,
        key: None,
        endpoints: Box::default(),
        outside: None,
        site: None,
        aes_256_gcm: false,
        agent_version: "".into(),
        created: now,
        certificate_expiry: None,
        revision: 0,
    }
}
