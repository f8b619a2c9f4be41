//! Forgets addresses whose quarantine is over and invitations whose time is, so that the store does not grow with all
//! that ever was.

use muster_common::time::Timestamp;
use muster_proto::storage::StoredInvitation;
use prost::Message as _;

use crate::{
    invitation,
    registry::{index::Index, keys},
    store::{Condition, KeyValue, MAX_TXN_OPS, Txn},
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

/// The transaction that forgets those of `invitations`, as the store has them, that nobody can use any more; `None` if
/// there is none.
pub fn invitations(invitations: &[KeyValue], now: Timestamp) -> Option<Txn> {
    let over = invitations.iter().filter(|kv| {
        StoredInvitation::decode(&*kv.value).map_or(true, |stored| invitation::is_over(&stored, now))
    });
    let txn = over.take(MAX_TXN_OPS).fold(Txn::new(), |txn, kv| {
        txn.when(Condition::ModRevision(kv.key.clone(), kv.mod_revision)).delete(kv.key.clone())
    });
    (!txn.ops.is_empty()).then_some(txn)
}
