//! A deployment as a whole, from store to store: [`backup`] into a file, [`restore`] from one, [`migrate`] without one
//! between. What is put into a store is marked as incomplete until all of it has been read again and found right.

pub mod archive;
pub mod backup;
pub mod format;
mod loading;
pub mod migrate;
pub mod progress;
pub mod restore;
mod source;
mod target;

use std::path::PathBuf;

use muster_common::file::{FileError, LockError};

use self::format::FormatError;
use crate::{
    ca::{CaError, copy::CopyError},
    config::StoreKind,
    layout::LayoutError,
    store::StoreError,
};

/// Why a deployment was not carried over.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// A store cannot be opened, read or written.
    #[error("cannot {action} {place}: {source}")]
    Store {
        /// What was attempted, as a verb.
        action: &'static str,
        /// The store.
        place: String,
        /// Why it failed.
        source: StoreError,
    },
    /// A store's layout is not known here.
    #[error("the store at {place} {source}; nothing was changed")]
    Layout {
        /// The store.
        place: String,
        /// What is wrong and what to do.
        source: LayoutError,
    },
    /// The store to read from has no deployment.
    #[error("the store at {0} holds no Muster deployment; set the right store in the configuration")]
    Nothing(String),
    /// The store to read from is itself not whole.
    #[error(
        "the store at {place} is incomplete: putting {contents} into it has not been finished. Finish that first, with the \
         same command as before"
    )]
    Incomplete {
        /// The store.
        place: String,
        /// What is being put into it.
        contents: String,
    },
    /// The store to write to is not empty.
    #[error(
        "the store at {0} is not empty; nothing was changed. Only an empty one is written to: move the database away, or \
         remove what is under the prefix in etcd, or configure another path or prefix"
    )]
    NotEmpty(String),
    /// The store to write to has been begun with something else.
    #[error(
        "the store at {place} is being filled with {contents}, which is something else; nothing was changed. Go on with \
         that, or empty the store: move the database away, or remove what is under the prefix in etcd"
    )]
    Other {
        /// The store.
        place: String,
        /// What it is being filled with.
        contents: String,
    },
    /// A registrar runs where is restored to.
    #[error(
        "a registrar may be running in {}: {source}; stop it first (systemctl stop muster-registrar); nothing was \
         changed", .directory.display()
    )]
    Runs {
        /// Its data directory.
        directory: PathBuf,
        /// What says so.
        source: LockError,
    },
    /// Somebody else writes to the store.
    #[error("something else writes to {0} at the same time; stop it, and run the same command again")]
    Contended(String),
    /// What was read again is not what was written.
    #[error("{0} does not hold what was written to it; empty it and try again, and check its disk")]
    NotAsWritten(String),
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// There is a file already.
    #[error("{} exists already and was left as it is; choose another name, or replace it with --force", .0.display())]
    Exists(PathBuf),
    /// A file is not a backup that can be used.
    #[error("cannot use the backup {}: {source}; nothing was changed", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        source: FormatError,
    },
    /// A backup's layout is not known here.
    #[error("the backup {} {source}; nothing was changed", path.display())]
    BackupLayout {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        source: LayoutError,
    },
    /// A backup was changed while it was read.
    #[error("the backup {} changed while it was read; run the same command again", .0.display())]
    Changed(PathBuf),
    /// The CA cannot be read.
    #[error("{0}; to leave the CA out of the backup: --without-ca")]
    Ca(#[from] CaError),
    /// The CA cannot be put into the data directory.
    #[error(transparent)]
    Copy(#[from] CopyError),
    /// Source and target of a migration are the same.
    #[error("--from and --to are both {0}; a migration is from sqlite to etcd, or from etcd to sqlite")]
    Same(StoreKind),
    /// Registrars run on the source of a migration.
    #[error(
        "{running} registrar(s) run on the store at {place}; nothing was changed. Stop them, wait 10 seconds and try again, or \
         go on regardless with --force"
    )]
    Running {
        /// How many.
        running: usize,
        /// The store.
        place: String,
    },
    /// The source changed during a migration.
    #[error(
        "the store at {place} changed during the migration, and {target} is not complete. Stop all registrars, empty \
         {target}, and start again"
    )]
    SourceChanged {
        /// The store.
        place: String,
        /// The store that was to take its place.
        target: String,
    },
    /// The source has been migrated already.
    #[error(
        "the store at {place} has been migrated to {target} already; nothing was changed. To use it again: \
         `muster-registrar migrate --from {kind} --undo`"
    )]
    Migrated {
        /// The store.
        place: String,
        /// What has taken its place.
        target: String,
        /// The kind of the store.
        kind: StoreKind,
    },
    /// There is nothing to undo.
    #[error("the store at {0} has not been migrated; nothing was changed")]
    NotMigrated(String),
}

impl TransferError {
    /// What a failed attempt to `action` the store at `place` is.
    fn store(action: &'static str, place: &str) -> impl Fn(StoreError) -> Self {
        move |source| Self::Store { action, place: place.to_owned(), source }
    }

    fn layout(place: &str) -> impl Fn(LayoutError) -> Self {
        move |source| Self::Layout { place: place.to_owned(), source }
    }

    /// Whether the store forgot, while it was read, the revision that was read.
    fn is_compacted(&self) -> bool {
        matches!(self, Self::Store { source: StoreError::Compacted { .. }, .. })
    }
}
