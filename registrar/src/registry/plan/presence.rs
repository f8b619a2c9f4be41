//! Where the sessions of endpoints are, many in one transaction.

use std::{convert::Infallible, sync::Arc};

use uuid::Uuid;

use super::{Outcome, Plan};
use crate::{
    registry::{index::Index, keys, presence::Presence},
    store::{Condition, MAX_TXN_OPS, Revision, Txn},
};

/// The most devices in one transaction: each has two conditions.
pub const BATCH: usize = MAX_TXN_OPS / 2;

/// What is to be written of one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Move {
    /// Name of its network.
    pub network: Arc<str>,
    /// Its uid.
    pub device: Uuid,
    /// The revision of its presence that was seen; 0 if there was none.
    pub revision: Revision,
    /// The registrar that has its session; `None` if it is away.
    pub registrar: Option<Uuid>,
}

/// Plans those of `moves` that nobody has overtaken; at most [`BATCH`]. The reply is how many are written.
///
/// # Errors
/// None.
pub fn write(index: &Index, moves: &[Move]) -> Result<Outcome<usize>, Infallible> {
    let is_due = |wanted: &&Move| {
        let state =
            index.network(&wanted.network).filter(|state| state.devices.by_uid(wanted.device).is_some());
        let found = state.map(|state| state.presence.get(&wanted.device).map_or(0, |found| found.revision));
        found == Some(wanted.revision)
    };
    let due: Vec<&Move> = moves.iter().filter(is_due).take(BATCH).collect();
    if due.is_empty() {
        return Ok(Outcome::Done(0));
    }
    let txn = due.iter().fold(Txn::new(), |txn, wanted| {
        let key = keys::presence(&wanted.network, wanted.device);
        txn.when(Condition::ModRevision(key.clone(), wanted.revision))
            .when(Condition::Exists(keys::device(&wanted.network, wanted.device)))
            .put(key, Presence::encode(wanted.registrar))
    });
    let count = due.len();
    Ok(Outcome::Write(Plan::new(txn, count)))
}
