//! A join token as the index holds it.

use std::sync::Arc;

use muster_common::{name::Label, time::Timestamp};
use muster_proto::{admin, storage::StoredToken};
use prost::Message as _;

use super::field::{self, FieldError};
use crate::store::Revision;

/// Whom a token lets in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Joiner {
    /// Devices.
    Device,
    /// Directors.
    Director,
}

impl Joiner {
    /// `device`, `director`: as operators write it, and in the store.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Director => "director",
        }
    }

    /// As it is in `spec`, where nothing means devices.
    ///
    /// # Errors
    /// If it is neither of the two.
    pub(super) fn of(spec: &admin::TokenSpec) -> Result<Self, FieldError> {
        match &*spec.party {
            "" | "device" => Ok(Self::Device),
            "director" => Ok(Self::Director),
            other => {
                let reason = format!("{:?} is neither \"device\" nor \"director\"", field::short(other));
                Err(FieldError::new("spec.party", reason))
            }
        }
    }
}

/// A join token. A value is never changed: a change makes a new one.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Name of its network.
    pub network: Arc<str>,
    /// Its name.
    pub name: Box<str>,
    /// Whom it lets in.
    pub joiner: Joiner,
    /// The message, as it is stored.
    pub stored: StoredToken,
    /// Revision of its last change.
    pub revision: Revision,
}

impl Token {
    /// What is wanted of it.
    pub fn spec(&self) -> Option<&admin::TokenSpec> {
        self.stored.token.as_ref()?.spec.as_ref()
    }

    /// How often it has been used.
    pub fn uses(&self) -> u64 {
        self.stored.token.as_ref().and_then(|token| token.status.as_ref()).map_or(0, |status| status.uses)
    }

    /// As the admin API shows it.
    pub fn to_proto(&self, now: Timestamp) -> admin::Token {
        let mut token = self.stored.token.clone().unwrap_or_default();
        token.metadata.get_or_insert_default().resource_version = self.revision;
        let spec = token.spec.clone().unwrap_or_default();
        let expired = spec.expires_at.as_ref().is_some_and(|at| field::timestamp(at) <= now);
        let used = !spec.reusable && !self.stored.used_by_device_uid.is_empty();
        let phase = match () {
            () if spec.revoked => "Revoked",
            () if used => "Used",
            () if expired => "Expired",
            () => "Active",
        };
        token.status.get_or_insert_default().phase = phase.to_owned();
        token
    }

    /// Reads a stored token.
    ///
    /// # Errors
    /// The field that cannot be used.
    pub fn decode(value: &[u8], network: &Arc<str>, revision: Revision) -> Result<Self, FieldError> {
        let stored = StoredToken::decode(value).map_err(|error| FieldError::new("token", error))?;
        let meta = stored.token.as_ref().and_then(|token| token.metadata.as_ref());
        let name: Label = field::parse("metadata.name", meta.map_or("", |meta| &meta.name))?;
        if stored.secret_hash.len() != 32 {
            return Err(FieldError::new("secret_hash", "is not a SHA-256 hash"));
        }
        let spec = stored.token.as_ref().and_then(|token| token.spec.as_ref());
        let joiner = spec.map_or(Ok(Joiner::Device), Joiner::of)?;
        Ok(Self { network: network.clone(), name: name.as_str().into(), joiner, stored, revision })
    }
}
