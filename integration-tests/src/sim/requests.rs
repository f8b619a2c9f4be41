//! What is asked of a registrar that writes to the store, and the plan that each request comes to.

use std::{cell::OnceCell, net::SocketAddr, sync::Arc, time::Duration};

use muster_common::{time::Timestamp, tls::SpkiHash};
use muster_proto::{
    admin,
    registration::{Reachability, RegisterRequest},
    storage::Claim,
};
use muster_registrar::{
    registry::{
        Index,
        device::{Device, Outside},
        plan::{
            Outcome, Plan, device,
            enroll::{self, EnrollError, Enrolled, Enrollment},
            register::{self, DeviceError, Registration},
            token,
        },
    },
    token::JoinToken,
};
use uuid::Uuid;

/// Name of the one network.
pub(super) const NETWORK: &str = "net";
/// Its domain.
pub(super) const DOMAIN: &str = "net.example";

/// A request that changes the registry.
#[derive(Clone, Debug)]
pub(super) enum Request {
    /// A host joins.
    Enroll(Box<Enroll>),
    /// A device registers.
    Register { uid: Uuid, message: RegisterRequest, now: Timestamp, before: OnceCell<Arc<Device>> },
    /// A session tells new endpoints.
    Endpoints { uid: Uuid, endpoints: Vec<SocketAddr>, outside: Option<Outside> },
    /// A device gets its next certificate.
    Renew { uid: Uuid, expiry: Timestamp },
    /// A device leaves.
    Deregister { uid: Uuid, now: Timestamp },
    /// An operator creates a token.
    CreateToken { secret: JoinToken, reusable: bool, expires: Timestamp, uid: Uuid, now: Timestamp },
    /// An operator revokes a token.
    RevokeToken { name: String, now: Timestamp },
    /// A registrar counts a use.
    CountUse { name: String },
    /// An operator keeps a name and an address for a device.
    CreateDevice { name: String, ipv4: String, uid: Uuid, now: Timestamp },
    /// An operator labels a device.
    LabelDevice { name: String, value: u32 },
    /// An operator revokes a device.
    RevokeDevice { name: String },
    /// An operator deletes a device.
    DeleteDevice { name: String, now: Timestamp },
}

/// What `muster-agent join` sends, and what the registrar adds.
#[derive(Clone, Debug)]
pub(super) struct Enroll {
    pub(super) token: JoinToken,
    pub(super) key: SpkiHash,
    pub(super) name: String,
    pub(super) uid: Uuid,
    pub(super) lifetime: Duration,
    pub(super) now: Timestamp,
    pub(super) claim: Option<Claim>,
}

/// What came of a request.
#[derive(Clone, Debug)]
pub(super) enum Reply {
    Enrolled(Enrolled),
    Done,
}

/// Why a request was not carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The device is gone or revoked.
    Device(String),
    /// The token lets nobody in.
    Token(String),
    /// Another device has the name.
    NameTaken,
    /// Something else in the request.
    Other(String),
    /// The registrar cannot answer now.
    Unavailable(String),
}

impl From<DeviceError> for Refusal {
    fn from(error: DeviceError) -> Self {
        match error {
            DeviceError::Gone | DeviceError::Revoked => Self::Device(error.to_string()),
            DeviceError::KeyTaken | DeviceError::Allocation(_) => Self::Other(error.to_string()),
            DeviceError::Superseded => Self::Unavailable(error.to_string()),
        }
    }
}

impl Request {
    /// What to write.
    pub(super) fn plan(&self, index: &mut Index, attempt: u32) -> Result<Outcome<Reply>, Refusal> {
        let other = |error: &dyn std::fmt::Display| Refusal::Other(error.to_string());
        match self {
            Self::Enroll(enroll) => {
                let enrollment = Enrollment {
                    token: &enroll.token,
                    key: &enroll.key,
                    name: &enroll.name,
                    uid: enroll.uid,
                    certificate_expiry: enroll.now + enroll.lifetime,
                    now: enroll.now,
                    claim: enroll.claim.as_ref(),
                };
                let outcome = enroll::plan(index, &enrollment).map_err(|error| match error {
                    EnrollError::Token(error) => Refusal::Token(error.to_string()),
                    EnrollError::NameTaken { .. } => Refusal::NameTaken,
                    error => other(&error),
                })?;
                Ok(map(outcome, Reply::Enrolled))
            }
            Self::Register { uid, message, now, before } => {
                let endpoints: Vec<SocketAddr> =
                    message.private_endpoints.iter().filter_map(address).collect();
                let key =
                    message.public_key.as_slice().try_into().map_err(|_| Refusal::Other("key".into()))?;
                let outside = message.reachability.as_ref().map(outside);
                let first = before.get().cloned();
                if let Some(device) = index.device(NETWORK, *uid) {
                    before.get_or_init(|| device.clone());
                }
                let registration = Registration {
                    before: first.as_deref(),
                    key,
                    endpoints: &endpoints,
                    outside: outside.as_ref(),
                    hosts: &[],
                    subnets: &[],
                    aes_256_gcm: message.transport_ciphers().any(|c| c == admin::TransportCipher::Aes256Gcm),
                    agent_version: &message.agent_version,
                    attempt,
                    now: *now,
                };
                Ok(map(register::register(index, NETWORK, *uid, &registration)?, |()| Reply::Done))
            }
            Self::Endpoints { uid, endpoints, outside } => {
                let outcome = register::endpoints(index, NETWORK, *uid, endpoints, outside.as_ref())?;
                Ok(map(outcome, |()| Reply::Done))
            }
            Self::Renew { uid, expiry } => {
                Ok(map(register::renew(index, NETWORK, *uid, *expiry)?, |()| Reply::Done))
            }
            Self::Deregister { uid, now } => {
                Ok(map(register::deregister(index, NETWORK, *uid, *now)?, |()| Reply::Done))
            }
            Self::CreateToken { secret, reusable, expires, uid, now } => {
                let wanted = admin::Token {
                    metadata: Some(meta("")),
                    spec: Some(admin::TokenSpec {
                        reusable: *reusable,
                        expires_at: Some(timestamp(*expires)),
                        ..Default::default()
                    }),
                    status: None,
                };
                let outcome = token::create(index, &wanted, secret, *uid, *now).map_err(|e| other(&e))?;
                Ok(map(outcome, |_| Reply::Done))
            }
            Self::RevokeToken { name, now } => {
                let spec = admin::TokenSpec { revoked: true, ..Default::default() };
                let wanted = admin::Token { metadata: Some(meta(name)), spec: Some(spec), status: None };
                let outcome = token::update(index, &wanted, Some(&mask("spec.revoked")), *now);
                Ok(map(outcome.map_err(|e| other(&e))?, |_| Reply::Done))
            }
            Self::CountUse { name } => {
                Ok(map(token::count(index, NETWORK, name, 1).map_err(|e| other(&e))?, |_| Reply::Done))
            }
            Self::CreateDevice { name, ipv4, uid, now } => {
                let spec = admin::DeviceSpec { virtual_ipv4: ipv4.clone(), ..Default::default() };
                let wanted = admin::Device { metadata: Some(meta(name)), spec: Some(spec), status: None };
                Ok(map(device::create(index, &wanted, *uid, *now).map_err(|e| other(&e))?, |_| Reply::Done))
            }
            Self::LabelDevice { name, value } => {
                let mut meta = meta(name);
                meta.labels.insert("n".into(), value.to_string());
                let wanted = admin::Device { metadata: Some(meta), spec: None, status: None };
                let outcome = device::update(index, &wanted, Some(&mask("metadata.labels")));
                Ok(map(outcome.map_err(|e| other(&e))?, |_| Reply::Done))
            }
            Self::RevokeDevice { name } => {
                let spec = admin::DeviceSpec { revoked: true, ..Default::default() };
                let wanted = admin::Device { metadata: Some(meta(name)), spec: Some(spec), status: None };
                let outcome = device::update(index, &wanted, Some(&mask("spec.revoked")));
                Ok(map(outcome.map_err(|e| other(&e))?, |_| Reply::Done))
            }
            Self::DeleteDevice { name, now } => {
                let outcome = device::delete(index, NETWORK, name, 0, *now).map_err(|e| other(&e))?;
                Ok(map(outcome, |()| Reply::Done))
            }
        }
    }

    /// In a word or two, for the trace.
    pub(super) fn describe(&self) -> String {
        let short = |uid: &Uuid| uid.to_string()[..8].to_owned();
        match self {
            Self::Enroll(enroll) => format!("enroll {} as {}", enroll.name, short(&enroll.uid)),
            Self::Register { uid, message, .. } => {
                let RegisterRequest { private_endpoints, transport_ciphers, .. } = message;
                format!("register {} {private_endpoints:?} {transport_ciphers:?}", short(uid))
            }
            Self::Endpoints { uid, endpoints, outside } => {
                format!("endpoints {} {endpoints:?} {outside:?}", short(uid))
            }
            Self::Renew { uid, expiry } => format!("renew {} until {expiry}", short(uid)),
            Self::Deregister { uid, .. } => format!("deregister {}", short(uid)),
            Self::CreateToken { secret, reusable, .. } => format!("create token {} {reusable}", secret.id()),
            Self::RevokeToken { name, .. } => format!("revoke token {name}"),
            Self::CountUse { name } => format!("count a use of {name}"),
            Self::CreateDevice { name, ipv4, .. } => format!("create device {name} {ipv4}"),
            Self::LabelDevice { name, value } => format!("label device {name} n={value}"),
            Self::RevokeDevice { name } => format!("revoke device {name}"),
            Self::DeleteDevice { name, .. } => format!("delete device {name}"),
        }
    }
}

fn map<A, B>(outcome: Outcome<A>, reply: impl FnOnce(A) -> B) -> Outcome<B> {
    match outcome {
        Outcome::Done(done) => Outcome::Done(reply(done)),
        Outcome::Write(plan) => {
            Outcome::Write(Plan { txn: plan.txn, reservations: plan.reservations, reply: reply(plan.reply) })
        }
    }
}

fn meta(name: &str) -> admin::ObjectMeta {
    admin::ObjectMeta { name: name.into(), network: NETWORK.into(), ..Default::default() }
}

fn mask(path: &str) -> pbjson_types::FieldMask {
    pbjson_types::FieldMask { paths: vec![path.into()] }
}

fn timestamp(at: Timestamp) -> pbjson_types::Timestamp {
    pbjson_types::Timestamp { seconds: i64::try_from(at.unix_seconds()).unwrap_or(i64::MAX), nanos: 0 }
}

/// An endpoint of the API as an address.
pub(super) fn address(endpoint: &admin::Endpoint) -> Option<SocketAddr> {
    Some(SocketAddr::new(endpoint.address.parse().ok()?, u16::try_from(endpoint.port).ok()?))
}

/// How a device is reached from outside, as it tells it.
pub(super) fn outside(told: &Reachability) -> Outside {
    Outside {
        reflexive: told.reflexive_endpoints.iter().filter_map(address).collect(),
        home: told.home_director_uid.parse().ok(),
        second: told.second_director_uid.parse().ok(),
    }
}
