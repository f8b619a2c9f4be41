//! What can go wrong with a store, and what to do about it.

use std::io;
use std::path::PathBuf;

use muster_common::file::remedy;

use super::Revision;

/// A failed request to a store. Except for [`StoreError::Unknown`] and [`StoreError::Disk`], the store is as it was
/// before.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The store cannot be reached or is busy. Nothing was changed; trying again later is right.
    #[error("the store cannot be reached: {0}")]
    Unavailable(String),
    /// The transaction may or may not have been committed: read again to find out.
    #[error("it is unknown whether the store committed the transaction: {0}")]
    Unknown(String),
    /// The history asked for has been compacted.
    #[error("the store's history begins at revision {oldest}; what came before is compacted")]
    Compacted {
        /// The oldest revision from which a watch can start.
        oldest: Revision,
    },
    /// The request breaks the rules of the interface: a mistake in the caller.
    #[error("invalid request to the store: {0}")]
    Invalid(String),
    /// There is no room left.
    #[error("the store {place} is full; free or add space: {reason}")]
    Full {
        /// Which store: a file or an endpoint.
        place: String,
        /// What it said.
        reason: String,
    },
    /// The file system takes no writes.
    #[error(
        "the file system of the store {place} is read-only, and nothing can be changed: look for its errors in the \
         kernel's log (dmesg), repair it, and mount it read-write"
    )]
    ReadOnly {
        /// The file.
        place: String,
    },
    /// The disk failed. The change was not made; only if the registrar is killed before the disk works again may it
    /// be there afterwards.
    #[error(
        "the disk failed while the store {place} was written ({reason}), and whether the change was made shows when it \
         works again: look for errors of the disk in the kernel's log (dmesg)"
    )]
    Disk {
        /// The file.
        place: String,
        /// What the system said.
        reason: String,
    },
    /// There is no database at this path.
    #[error("there is no database {path}; create it with `muster-registrar init`")]
    Missing {
        /// The database.
        path: PathBuf,
    },
    /// Something is already at the path where a database was to be created.
    #[error("{path} exists already and was left as it is; choose another path or move it away")]
    Exists {
        /// What exists.
        path: PathBuf,
    },
    /// The file is not a database of Muster's.
    #[error("{path} is not a Muster database ({reason}); nothing was changed: set the right path")]
    Foreign {
        /// The file.
        path: PathBuf,
        /// How that shows.
        reason: String,
    },
    /// The database was written by a newer version of Muster.
    #[error(
        "the database {path} has format {found}, but this version of Muster knows formats up to {supported}; \
         nothing was changed: install the newer version"
    )]
    NewerFormat {
        /// The database.
        path: PathBuf,
        /// Its format.
        found: i64,
        /// The newest format that is understood.
        supported: i64,
    },
    /// The database is damaged.
    #[error("the database {path} is damaged ({reason}); nothing was changed: restore it from a backup")]
    Corrupt {
        /// The database.
        path: PathBuf,
        /// How that shows.
        reason: String,
    },
    /// Another process has the database open.
    #[error("the database {path} is in use by another process; stop that one, or use etcd to share a store")]
    Locked {
        /// The database.
        path: PathBuf,
    },
    /// The operating system refused something.
    #[error("cannot {action} {path}: {source}{}", remedy(source))]
    Io {
        /// What was attempted, as a verb.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The database engine refused something.
    #[error("cannot {action} {path}: {reason}")]
    Database {
        /// What was attempted, as a verb.
        action: &'static str,
        /// The database.
        path: PathBuf,
        /// Why it failed.
        reason: String,
    },
    /// The store has been closed, or has closed itself because it could not go on; the log tells why.
    #[error("the store is closed; see the log for the reason")]
    Closed,
    /// The store's settings cannot be used.
    #[error("cannot use the store's setting {setting}: {reason}")]
    Config {
        /// Which setting.
        setting: &'static str,
        /// Why not.
        reason: String,
    },
}

impl StoreError {
    /// Whether the same request can succeed later without anybody doing something.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Unavailable(_))
    }
}
