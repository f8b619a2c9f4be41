//! What is read from: a store, or a snapshot of one that a registrar has open, page by page.

use std::sync::Arc;

use muster_proto::storage::{Format, Migrated};

use super::{
    TransferError,
    format::{Summary, Tally},
    progress::Progress,
};
use crate::{
    config::{Config, StoreKind},
    layout::{self, Layout},
    registry::keys,
    store::{
        KeyRange, KeyValue, Paging, RangeResult, Revision, Store, StoreError,
        etcd::EtcdStore,
        sqlite::{SqliteSnapshot, SqliteStore},
    },
};

/// How many keys are read at a time.
const PAGE: usize = 8192;
/// How often reading begins anew when the store's history is compacted meanwhile.
pub(super) const ATTEMPTS: u32 = 5;

/// What is read from.
pub(super) enum Source {
    Snapshot(SqliteSnapshot),
    Store(Arc<dyn Store>),
}

impl Source {
    /// The configured store of a kind, which registrars may be serving meanwhile.
    pub(super) async fn open_shared(config: &Config, kind: StoreKind) -> Result<Self, StoreError> {
        Ok(match kind {
            StoreKind::Sqlite => Self::Snapshot(SqliteSnapshot::open(&config.sqlite_path()).await?),
            StoreKind::Etcd => Self::Store(Arc::new(EtcdStore::open(&config.etcd())?)),
        })
    }

    pub(super) async fn range(
        &self,
        range: KeyRange,
        at: Option<Revision>,
        limit: usize,
    ) -> Result<RangeResult, StoreError> {
        match self {
            // It has one revision only.
            Self::Snapshot(snapshot) => snapshot.range(range, limit).await,
            Self::Store(store) => store.range(range, at, limit).await,
        }
    }

    /// All keys that go with a deployment, at revision `at`, or each page as it is when it is read.
    pub(super) fn pages(&self, at: Option<Revision>) -> Pages<'_> {
        Pages { source: self, paging: Paging::new(KeyRange::all(), at), one_revision: at.is_some() }
    }

    /// What the keys that go with a deployment come to, at one revision.
    pub(super) async fn summary(
        &self,
        place: &str,
        what: &str,
        progress: &mut Progress,
    ) -> Result<Summary, TransferError> {
        let mut attempt = 1;
        loop {
            match self.summary_once(what, progress).await {
                Err(StoreError::Compacted { .. }) if attempt < ATTEMPTS => attempt += 1,
                result => return result.map_err(TransferError::store("read", place)),
            }
        }
    }

    async fn summary_once(&self, what: &str, progress: &mut Progress) -> Result<Summary, StoreError> {
        let at = self.range(keys::meta(), None, 1).await?.revision;
        let (mut tally, mut pages) = (Tally::default(), self.pages(Some(at)));
        while let Some(page) = pages.next().await? {
            page.iter().for_each(|kv| tally.add(&kv.key, &kv.value));
            progress.tell(what, tally.keys(), None);
        }
        Ok(tally.summary())
    }

    /// What the store says of itself, and the revision of that.
    pub(super) async fn layout(&self, place: &str) -> Result<(Layout, Revision), TransferError> {
        let meta = self.range(keys::meta(), None, layout::KEYS_MAX).await;
        let meta = meta.map_err(TransferError::store("read", place))?;
        Ok((layout::read(&meta.kvs).map_err(TransferError::layout(place))?, meta.revision))
    }
}

/// A deployment's format, and whether another store has taken this one's place.
///
/// # Errors
/// If `layout`, that of the store at `place`, is not that of a whole deployment.
pub(super) fn whole(layout: Layout, place: &str) -> Result<(Format, Option<Migrated>), TransferError> {
    match layout {
        Layout::Whole(format) => Ok((format, None)),
        Layout::Migrated(format, migrated) => Ok((format, Some(migrated))),
        Layout::None => Err(TransferError::Nothing(place.to_owned())),
        Layout::Restoring(restoring) => {
            Err(TransferError::Incomplete { place: place.to_owned(), contents: restoring.source })
        }
    }
}

/// Keys in order, a page at a time.
pub(super) struct Pages<'a> {
    source: &'a Source,
    paging: Paging,
    /// Whether all pages are of one revision.
    one_revision: bool,
}

impl Pages<'_> {
    /// The next page, which may be empty; `None` at the end.
    pub(super) async fn next(&mut self) -> Result<Option<Vec<KeyValue>>, StoreError> {
        let Some((range, at)) = self.paging.next() else { return Ok(None) };
        let mut page = self.source.range(range, at.filter(|_| self.one_revision), PAGE).await?;
        self.paging.took(&page);
        page.kvs.retain(|kv| keys::is_portable(&kv.key));
        Ok(Some(page.kvs))
    }
}

/// Opens the configured store of a kind for writing: no registrar has it open, if it is sqlite.
pub(super) fn open(config: &Config, kind: StoreKind) -> Result<Arc<dyn Store>, StoreError> {
    Ok(match kind {
        StoreKind::Sqlite => Arc::new(SqliteStore::open(config.sqlite_path())?),
        StoreKind::Etcd => Arc::new(EtcdStore::open(&config.etcd())?),
    })
}
