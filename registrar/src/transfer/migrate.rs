//! Puts what is in one of the two configured stores into the other, and marks the first so that it is not served by
//! accident beside the second.

use std::sync::Arc;

use muster_common::time::Timestamp;
use muster_proto::storage::Migrated;
use prost::Message as _;

use super::{
    TransferError,
    format::Summary,
    loading::Loading,
    progress::Progress,
    source::{Source, whole},
    target::Target,
};
use crate::{
    config::{Config, StoreKind},
    layout::Layout,
    registry::{field, keys},
    store::{Condition, Store, Txn, TxnOutcome},
};

/// The most registrars that are counted.
const REGISTRARS_MAX: usize = 1000;

/// What is wanted.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The store to read.
    pub from: StoreKind,
    /// The store to write, which must be empty.
    pub to: StoreKind,
    /// Whether to go on although registrars are said to run.
    pub force: bool,
}

/// Copies one configured store into the other, or goes on with that. Returns what was copied.
///
/// # Errors
/// See [`TransferError`]. At no time could registrars serve both.
pub async fn migrate(
    config: &Config,
    options: Options,
    now: Timestamp,
    progress: &mut Progress,
) -> Result<Summary, TransferError> {
    let Options { from, to, force } = options;
    if from == to {
        return Err(TransferError::Same(from));
    }
    let origin = Target::open(config, from)?;
    let source = Source::Store(origin.store.clone());
    let (format, migrated) = whole(source.layout(&origin.place).await?.0, &origin.place)?;
    // SQLite's lock has told that nobody runs.
    let check = from == StoreKind::Etcd && !force;
    if check {
        check_running(&origin).await?;
    }
    let summary = source.summary(&origin.place, "read", progress).await?;

    if let Some(migrated) = &migrated {
        check_resumable(config, to, from, &origin, migrated).await?;
    }
    let target = Target::open_or_create(config, to)?;
    let text = format!("the store {} (migrate --from {from} --to {to})", origin.place);
    let mut loading = Loading::begin(&target.store, &target.place, summary, text).await?;
    // Each page as it is now: that nothing has changed is found at the end.
    let mut pages = source.pages(None);
    while let Some(page) = pages.next().await.map_err(TransferError::store("read", &origin.place))? {
        for kv in page {
            loading.put(kv.key, kv.value, progress).await?;
        }
    }
    // What does not come to what was read first shows here, whichever of the two has changed.
    let verified = loading.verify(progress).await;
    if matches!(verified, Err(TransferError::NotAsWritten(_))) {
        check_unchanged(&source, &origin, &target, summary, progress).await?;
    }
    verified?;

    // From here on no registrar starts on the source, and one that has just started is seen.
    if migrated.is_none() {
        mark(&origin, &target.place, now).await?;
    }
    let unchanged = async {
        if check {
            check_running(&origin).await?;
        }
        check_unchanged(&source, &origin, &target, summary, progress).await
    };
    if let Err(error) = unchanged.await {
        unmark(&origin).await?;
        return Err(error);
    }
    loading.complete(format.trust_domain).await?;
    Ok(summary)
}

/// Has a store that was migrated be served again.
///
/// # Errors
/// [`TransferError::NotMigrated`], or if the store cannot be opened or written.
pub async fn undo(config: &Config, from: StoreKind) -> Result<(), TransferError> {
    let origin = Target::open(config, from)?;
    let source = Source::Store(origin.store.clone());
    let (_, migrated) = whole(source.layout(&origin.place).await?.0, &origin.place)?;
    if migrated.is_none() {
        return Err(TransferError::NotMigrated(origin.place));
    }
    unmark(&origin).await
}

async fn check_running(origin: &Target) -> Result<(), TransferError> {
    let running = origin.store.range(keys::registrars(), None, REGISTRARS_MAX).await;
    match running.map_err(TransferError::store("read", &origin.place))?.kvs.len() {
        0 => Ok(()),
        running => Err(TransferError::Running { running, place: origin.place.clone() }),
    }
}

/// A source that is marked already is gone on with only if the target is not complete: the migration was cut off
/// between these two.
async fn check_resumable(
    config: &Config,
    to: StoreKind,
    from: StoreKind,
    origin: &Target,
    migrated: &Migrated,
) -> Result<(), TransferError> {
    let other: Option<Arc<dyn Store>> = Target::open(config, to).ok().map(|target| target.store);
    if let Some(store) = other {
        let layout = Source::Store(store).layout(&config.place(to)).await;
        if matches!(layout, Ok((Layout::Restoring(_), _))) {
            return Ok(());
        }
    }
    Err(TransferError::Migrated { place: origin.place.clone(), target: migrated.target.clone(), kind: from })
}

async fn check_unchanged(
    source: &Source,
    origin: &Target,
    target: &Target,
    summary: Summary,
    progress: &mut Progress,
) -> Result<(), TransferError> {
    if source.summary(&origin.place, "read again", progress).await? == summary {
        return Ok(());
    }
    Err(TransferError::SourceChanged { place: origin.place.clone(), target: target.place.clone() })
}

async fn mark(origin: &Target, target: &str, now: Timestamp) -> Result<(), TransferError> {
    let mark = Migrated { target: target.to_owned(), migrated_at: Some(field::to_timestamp(now)) };
    let txn = Txn::new().when(Condition::Exists(keys::format())).put(keys::migrated(), mark.encode_to_vec());
    match origin.store.txn(txn).await.map_err(TransferError::store("mark", &origin.place))? {
        TxnOutcome::Committed(_) => Ok(()),
        TxnOutcome::Conflict => Err(TransferError::Contended(origin.place.clone())),
    }
}

async fn unmark(origin: &Target) -> Result<(), TransferError> {
    let unmarked = origin.store.txn(Txn::new().delete(keys::migrated())).await;
    unmarked.map(drop).map_err(TransferError::store("unmark", &origin.place))
}
