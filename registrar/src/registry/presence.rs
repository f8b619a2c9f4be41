//! Whether a device that is an endpoint of Services is there, as the store has it.

use muster_proto::storage;
use prost::Message as _;
use uuid::Uuid;

use super::{device::uid_of, field::FieldError};
use crate::store::Revision;

/// Where the session of a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Presence {
    /// Uid of the running registrar that has its session; `None` while the device is away.
    pub registrar: Option<Uuid>,
    /// Revision of the last change.
    pub revision: Revision,
}

impl Presence {
    pub(crate) fn decode(value: &[u8], revision: Revision) -> Result<Self, FieldError> {
        let stored = storage::Presence::decode(value).map_err(|error| FieldError::new("presence", error))?;
        Ok(Self { registrar: uid_of("registrar_uid", &stored.registrar_uid, "registrar")?, revision })
    }

    /// As it is stored: the registrar that has the session.
    pub fn encode(registrar: Option<Uuid>) -> Vec<u8> {
        let registrar_uid = registrar.map(|uid| uid.to_string()).unwrap_or_default();
        storage::Presence { registrar_uid }.encode_to_vec()
    }
}
