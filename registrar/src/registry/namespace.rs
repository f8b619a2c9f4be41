//! A namespace as the index holds it.

use std::sync::Arc;

use muster_common::name::Label;
use muster_proto::admin;
use prost::Message as _;

use super::field::{self, FieldError};
use crate::store::Revision;

/// The phase of a namespace that is being deleted.
pub const TERMINATING: &str = "Terminating";
const ACTIVE: &str = "Active";

/// A namespace of a network. A value is never changed: a change makes a new one.
#[derive(Clone, Debug, PartialEq)]
pub struct Namespace {
    /// Name of its network.
    pub network: Arc<str>,
    /// Its name.
    pub name: Label,
    /// Whether it is being deleted: its names are gone already, and nothing can be added to it.
    pub terminating: bool,
    /// The message, as it is stored.
    pub stored: admin::Namespace,
    /// Revision of its last change.
    pub revision: Revision,
}

impl Namespace {
    /// Its uid.
    pub fn uid(&self) -> &str {
        self.stored.metadata.as_ref().map_or("", |meta| &meta.uid)
    }

    /// As the admin API shows it.
    pub fn to_proto(&self) -> admin::Namespace {
        let mut namespace = self.stored.clone();
        namespace.metadata.get_or_insert_default().resource_version = self.revision;
        namespace
    }

    /// As it is stored.
    pub fn encode(&self) -> Vec<u8> {
        self.stored.encode_to_vec()
    }

    /// Reads a stored namespace.
    ///
    /// # Errors
    /// The field that cannot be used.
    pub fn decode(value: &[u8], network: &Arc<str>, revision: Revision) -> Result<Self, FieldError> {
        let stored = admin::Namespace::decode(value).map_err(|error| FieldError::new("namespace", error))?;
        Self::check(stored, network, revision)
    }

    /// Checks a namespace as an operator sends it, or as it was stored.
    ///
    /// # Errors
    /// The first field that cannot be used.
    pub fn check(
        mut stored: admin::Namespace,
        network: &Arc<str>,
        revision: Revision,
    ) -> Result<Self, FieldError> {
        let meta = stored.metadata.get_or_insert_default();
        field::metadata(meta)?;
        let name: Label = field::parse("metadata.name", &meta.name)?;
        name.as_str().clone_into(&mut meta.name);
        meta.namespace.clear();
        meta.network = network.to_string();
        meta.resource_version = 0;
        let status = stored.status.get_or_insert_default();
        let terminating = status.phase == TERMINATING;
        status.phase = if terminating { TERMINATING } else { ACTIVE }.to_owned();
        Ok(Self { network: network.clone(), name, terminating, stored, revision })
    }
}
