//! The store that is written to: made if it is a file that is not there, and given to whom the registrar runs as.

use std::{path::Path, sync::Arc};

use muster_common::file;

use super::{TransferError, source};
use crate::{
    config::{Config, StoreKind},
    store::{Store, sqlite::SqliteStore},
};

/// A store that is open for writing. Closed with [`Target::close`], or by dropping it after a failure.
pub(super) struct Target<'a> {
    pub(super) store: Arc<dyn Store>,
    pub(super) place: String,
    config: &'a Config,
    kind: StoreKind,
}

impl<'a> Target<'a> {
    /// Opens the configured store of a kind, which need not be there yet.
    pub(super) fn open_or_create(config: &'a Config, kind: StoreKind) -> Result<Self, TransferError> {
        let path = config.sqlite_path();
        if kind == StoreKind::Sqlite && path.symlink_metadata().is_err() {
            if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
                file::create_private_dir(parent)?;
            }
            let place = config.place(kind);
            SqliteStore::create(&path).map_err(TransferError::store("create", &place))?;
            adopt(&path)?;
        }
        Self::open(config, kind)
    }

    /// Opens the configured store of a kind.
    pub(super) fn open(config: &'a Config, kind: StoreKind) -> Result<Self, TransferError> {
        let place = config.place(kind);
        let store = source::open(config, kind).map_err(TransferError::store("open", &place))?;
        Ok(Self { store, place, config, kind })
    }

    /// Closes it.
    pub(super) fn close(self) -> Result<(), TransferError> {
        drop(self.store);
        if self.kind == StoreKind::Sqlite { adopt(&self.config.sqlite_path()) } else { Ok(()) }
    }
}

/// Has the database belong to the owner of its directory: a command that root runs would otherwise leave files that
/// the registrar cannot open.
fn adopt(path: &Path) -> Result<(), TransferError> {
    for file in SqliteStore::files(path).iter().filter(|file| file.exists()) {
        file::adopt(file)?;
    }
    Ok(())
}
