//! The store that is written to: made if it is a file that is not there, and given to whom the registrar runs as.

use std::{path::Path, sync::Arc};

use muster_common::file;

use super::{TransferError, source};
use crate::{
    config::{Config, StoreKind},
    store::{Store, sqlite::SqliteStore},
};

/// A store that is open for writing.
pub(super) struct Target {
    pub(super) store: Arc<dyn Store>,
    pub(super) place: String,
}

impl Target {
    /// Opens the configured store of a kind, which need not be there yet.
    pub(super) fn open_or_create(config: &Config, kind: StoreKind) -> Result<Self, TransferError> {
        let path = config.sqlite_path();
        if kind == StoreKind::Sqlite && path.symlink_metadata().is_err() {
            if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
                file::create_private_dir(parent)?;
            }
            SqliteStore::create(&path).map_err(TransferError::store("create", &config.place(kind)))?;
        }
        Self::open(config, kind)
    }

    /// Opens the configured store of a kind.
    pub(super) fn open(config: &Config, kind: StoreKind) -> Result<Self, TransferError> {
        let place = config.place(kind);
        let store = source::open(config, kind).map_err(TransferError::store("open", &place))?;
        if kind == StoreKind::Sqlite {
            adopt(&config.sqlite_path())?;
        }
        Ok(Self { store, place })
    }
}

/// Has the database belong to the owner of its directory: a command that root runs would otherwise leave files that
/// the registrar cannot open. What SQLite makes later goes to the owner of what is there.
fn adopt(path: &Path) -> Result<(), TransferError> {
    for file in SqliteStore::files(path).iter().filter(|file| file.exists()) {
        file::adopt(file)?;
    }
    Ok(())
}
