//! Puts a deployment's keys into an empty store, in order and in transactions of the size that stores allow. Each one
//! also notes how far it goes, under `meta/restoring`: killed at any moment, the same can go on from there.

use std::sync::Arc;

use bytes::Bytes;
use muster_proto::storage::Restoring;
use prost::Message as _;

use super::{TransferError, format::Summary, progress::Progress, source::Source};
use crate::{
    layout::{self, Layout},
    registry::keys,
    store::{
        Condition, KeyRange, MAX_KEY, MAX_TXN_BYTES, MAX_TXN_OPS, Op, Revision, Store, StoreError, Txn,
        TxnOutcome,
    },
};

/// The most bytes that keys and values of one transaction may have: the mark, with a key and a text in it, comes to them.
const BYTES_MAX: usize = MAX_TXN_BYTES - MAX_KEY - 4096;
/// The longest text that a mark holds, in bytes.
const SOURCE_MAX: usize = 1024;

/// A store that is being filled.
pub(super) struct Loading<'a> {
    store: &'a Arc<dyn Store>,
    place: &'a str,
    summary: Summary,
    mark: Restoring,
    /// The revision of the mark, by which nobody else can fill the store at the same time.
    revision: Revision,
    batch: Txn,
    bytes: usize,
    done: u64,
}

impl<'a> Loading<'a> {
    /// Begins to fill `store`, which must be empty, with what comes to `summary`, or goes on with it.
    pub(super) async fn begin(
        store: &'a Arc<dyn Store>,
        place: &'a str,
        summary: Summary,
        mut source: String,
    ) -> Result<Self, TransferError> {
        let reading = Source::Store(store.clone());
        source.truncate(source.floor_char_boundary(SOURCE_MAX));
        let fail = TransferError::store("write to", place);
        let (mark, revision) = match reading.layout(place).await?.0 {
            Layout::Restoring(mark) if mark.digest == summary.digest => {
                let Some(kv) = store.get(keys::restoring()).await.map_err(&fail)? else {
                    return Err(TransferError::Contended(place.to_owned()));
                };
                let damaged = |error: prost::DecodeError| TransferError::layout(place)(error.into());
                (Restoring::decode(&*kv.value).map_err(damaged)?, kv.mod_revision)
            }
            Layout::Restoring(mark) => {
                return Err(TransferError::Other { place: place.to_owned(), contents: mark.source });
            }
            Layout::Whole(_) | Layout::Migrated(..) => {
                return Err(TransferError::NotEmpty(place.to_owned()));
            }
            Layout::None => {
                if !store.range(KeyRange::all(), None, 1).await.map_err(&fail)?.kvs.is_empty() {
                    return Err(TransferError::NotEmpty(place.to_owned()));
                }
                let mark = Restoring { digest: summary.digest.to_vec(), source, through: Vec::new() };
                let txn = Txn::new()
                    .when(Condition::Absent(keys::restoring()))
                    .when(Condition::Absent(keys::format()))
                    .put(keys::restoring(), mark.encode_to_vec());
                match store.txn(txn).await.map_err(&fail)? {
                    TxnOutcome::Committed(revision) => (mark, revision),
                    TxnOutcome::Conflict => return Err(TransferError::Contended(place.to_owned())),
                }
            }
        };
        Ok(Self { store, place, summary, mark, revision, batch: Txn::new(), bytes: 0, done: 0 })
    }

    /// Puts the next key, unless it is there already.
    pub(super) async fn put(
        &mut self,
        key: Bytes,
        value: Bytes,
        progress: &mut Progress,
    ) -> Result<(), TransferError> {
        self.done += 1;
        if key[..] <= self.mark.through[..] {
            return Ok(());
        }
        let size = key.len() + value.len();
        // One operation is the mark's.
        if self.batch.ops.len() + 1 == MAX_TXN_OPS || self.bytes + size > BYTES_MAX {
            self.flush().await?;
            progress.tell("written", self.done, Some(self.summary.keys));
        }
        self.bytes += size;
        self.batch.ops.push(Op::Put { key, value });
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), TransferError> {
        let batch = std::mem::take(&mut self.batch);
        let Some(last) = batch.ops.last() else { return Ok(()) };
        let mut mark = self.mark.clone();
        mark.through = last.key().to_vec();
        let batch = batch.when(Condition::ModRevision(keys::restoring(), self.revision));
        // A value as large as a transaction can be leaves no room for the mark, and is put again if need be.
        let has_mark = self.bytes <= BYTES_MAX;
        let txn = if has_mark { batch.put(keys::restoring(), mark.encode_to_vec()) } else { batch };
        self.bytes = 0;
        match self.store.txn(txn).await.map_err(TransferError::store("write to", self.place))? {
            TxnOutcome::Committed(revision) if has_mark => (self.mark, self.revision) = (mark, revision),
            TxnOutcome::Committed(_) => {}
            TxnOutcome::Conflict => return Err(TransferError::Contended(self.place.to_owned())),
        }
        Ok(())
    }

    /// Writes what is left, reads all that is in the store, and compares it with what it was to be.
    pub(super) async fn verify(&mut self, progress: &mut Progress) -> Result<(), TransferError> {
        self.flush().await?;
        let found = Source::Store(self.store.clone()).summary(self.place, "compared", progress).await?;
        if found == self.summary { Ok(()) } else { Err(TransferError::NotAsWritten(self.place.to_owned())) }
    }

    /// Has the store be complete, as one for `trust_domain`.
    pub(super) async fn complete(self, trust_domain: String) -> Result<(), TransferError> {
        let txn = Txn::new()
            .when(Condition::ModRevision(keys::restoring(), self.revision))
            .when(Condition::Absent(keys::format()))
            .delete(keys::restoring())
            .put(keys::format(), layout::format(trust_domain).encode_to_vec());
        let fail = TransferError::store("complete", self.place);
        match self.store.txn(txn).await {
            Ok(TxnOutcome::Committed(_)) => Ok(()),
            Ok(TxnOutcome::Conflict) => Err(TransferError::Contended(self.place.to_owned())),
            // Whoever tried again would find a store that is not empty.
            Err(StoreError::Unknown(reason)) => match self.store.get(keys::restoring()).await {
                Ok(None) => Ok(()),
                _ => Err(fail(StoreError::Unknown(reason))),
            },
            Err(error) => Err(fail(error)),
        }
    }
}
