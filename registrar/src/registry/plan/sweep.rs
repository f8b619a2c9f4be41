//! Forgets addresses whose quarantine is over, so that the store does not grow with every device that ever was.

use muster_common::time::Timestamp;

use crate::{
    registry::{index::Index, keys},
    store::{Condition, MAX_TXN_OPS, Txn},
};

/// The next transaction that forgets addresses; `None` if there is nothing to forget.
pub fn addresses(index: &Index, now: Timestamp) -> Option<Txn> {
    let over = index.networks().flat_map(|state| {
        state
            .released_before(now)
            .map(|(owner, address, revision)| (keys::address(&state.network.name, owner, address), revision))
    });
    let txn = over.take(MAX_TXN_OPS).fold(Txn::new(), |txn, (key, revision)| {
        txn.when(Condition::ModRevision(key.clone(), revision)).delete(key)
    });
    (!txn.ops.is_empty()).then_some(txn)
}
