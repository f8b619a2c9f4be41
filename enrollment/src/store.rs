//! A party's state directory: one process at a time, one file a kind, mode 0600, replaced as a whole, with a checksum.
//! The identity is indispensable; of other files, a damaged one is set aside and reported.

use std::{
    fs, io,
    marker::PhantomData,
    path::{Path, PathBuf},
};

use muster_common::{
    file::{self, DocumentError, FileError, Lock, LockError},
    time::Timestamp,
};
use serde::{Serialize, de::DeserializeOwned};
use zeroize::Zeroizing;

use crate::{Encoding, Identity as _, Journal, Party};

/// Names of the files.
const IDENTITY: &str = "identity";
const JOURNAL: &str = "joining";

/// Why state cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The system refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// There is no identity.
    #[error(
        "{who} has not joined a network: there is no identity in {}\nremedy: run the join command that `{create_token}` prints on the operator's machine",
        directory.display()
    )]
    NotJoined {
        /// Who has not.
        who: &'static str,
        /// The state directory.
        directory: PathBuf,
        /// The command that makes a token.
        create_token: &'static str,
    },
    /// There is an identity already.
    #[error("{who} has already joined network {network} as {name}; nothing was changed\nremedy: {remedy}")]
    AlreadyJoined {
        /// Who has.
        who: &'static str,
        /// Name of the network.
        network: String,
        /// The party's name.
        name: String,
        /// What to do.
        remedy: String,
    },
    /// The identity cannot be used.
    #[error(
        "cannot use the {kind}'s identity in {}: {reason}\nremedy: restore the file from a backup, or move it away and join again with a new token", path.display()
    )]
    Identity {
        /// Whose it is.
        kind: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Another process holds the state directory.
    #[error(
        "another muster-{program}{} uses the state directory {}\nremedy: stop it first (systemctl stop muster-{program}), or configure another state_dir", file::owner(pid), directory.display()
    )]
    InUse {
        /// The program.
        program: &'static str,
        /// The state directory.
        directory: PathBuf,
        /// Its process, as far as it is known.
        pid: String,
    },
}

/// The state directory of a party.
pub struct Store<P> {
    directory: PathBuf,
    party: PhantomData<fn() -> P>,
}

impl<P> Clone for Store<P> {
    fn clone(&self) -> Self {
        Self { directory: self.directory.clone(), party: PhantomData }
    }
}

impl<P> std::fmt::Debug for Store<P> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Store({})", self.directory.display())
    }
}

impl<P: Party> Store<P> {
    /// The state in `directory`, which need not exist.
    pub fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned(), party: PhantomData }
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Takes the directory for this process; creates it if it is missing.
    ///
    /// # Errors
    /// Another process has it, or the system refuses.
    pub fn lock(&self) -> Result<Lock, StateError> {
        file::lock(&self.directory).map_err(|error| match error {
            LockError::File(error) => error.into(),
            LockError::Held(pid) => {
                let directory = self.directory.clone();
                StateError::InUse { program: P::WORDS.program, directory, pid }
            }
        })
    }

    /// Who the party is.
    ///
    /// # Errors
    /// It has not joined, or the identity is damaged.
    pub fn identity(&self) -> Result<P::Identity, StateError> {
        match self.read(IDENTITY) {
            Ok(Some(identity)) => Ok(identity),
            Ok(None) => Err(StateError::NotJoined {
                who: P::WORDS.who,
                directory: self.directory.clone(),
                create_token: P::WORDS.create_token,
            }),
            Err(DocumentError::File(error)) => Err(error.into()),
            Err(DocumentError::Damaged(reason)) => {
                Err(StateError::Identity { kind: P::WORDS.kind, path: self.path(IDENTITY), reason })
            }
        }
    }

    /// Fails if there is an identity, or one that cannot be read.
    ///
    /// # Errors
    /// Which of these.
    pub fn check_not_joined(&self) -> Result<(), StateError> {
        match self.identity() {
            Ok(identity) => {
                let own = identity.certified();
                Err(StateError::AlreadyJoined {
                    who: P::WORDS.who,
                    network: own.network.to_owned(),
                    name: own.name.to_owned(),
                    remedy: P::joined_already(own.name, &self.path(IDENTITY)),
                })
            }
            Err(StateError::NotJoined { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Stores the identity.
    ///
    /// # Errors
    /// The system refuses; the identity is as it was then.
    pub fn set_identity(&self, identity: &P::Identity) -> Result<(), StateError> {
        self.write(IDENTITY, identity)
    }

    /// The join under way, if there is one. One that cannot be read is none: new keys are made.
    pub fn journal(&self) -> Option<Journal> {
        self.read_or_set_aside(JOURNAL)
    }

    /// Stores the keys of a join under way.
    ///
    /// # Errors
    /// The system refuses.
    pub fn set_journal(&self, journal: &Journal) -> Result<(), StateError> {
        self.write(JOURNAL, journal)
    }

    /// Forgets the join under way.
    ///
    /// # Errors
    /// The system refuses.
    pub fn remove_journal(&self) -> Result<(), StateError> {
        self.remove(JOURNAL)
    }

    /// Stores a document of this `kind`, which is also its file's name.
    ///
    /// # Errors
    /// The system refuses; what was there is as it was then.
    pub fn write<T: Serialize>(&self, kind: &str, value: &T) -> Result<(), StateError> {
        let path = self.path(kind);
        let body = match P::ENCODING {
            Encoding::Json => serde_json::to_vec_pretty(value).map_err(io::Error::other),
            Encoding::Toml => toml::to_string_pretty(value).map(String::into_bytes).map_err(io::Error::other),
        };
        let body = Zeroizing::new(body.map_err(|error| FileError::new("encode", &path, error))?);
        Ok(P::FORMAT.write(&path, kind, &body)?)
    }

    /// A document that the party can do without: one that is damaged is set aside.
    pub fn read_or_set_aside<T: DeserializeOwned>(&self, kind: &str) -> Option<T> {
        let path = self.path(kind);
        match self.read(kind) {
            Ok(value) => value,
            Err(DocumentError::File(error)) => {
                tracing::warn!(%error, "going on without this file");
                None
            }
            Err(DocumentError::Damaged(reason)) => {
                let aside = path.with_extension(format!("corrupt-{}", Timestamp::now().unix_seconds()));
                let renamed = fs::rename(&path, &aside);
                tracing::warn!(
                    path = %path.display(), %reason, set_aside = %aside.display(),
                    error = renamed.err().map(tracing::field::display),
                    "a state file cannot be used: set it aside and go on without it"
                );
                None
            }
        }
    }

    /// Removes a document, if it is there.
    ///
    /// # Errors
    /// The system refuses.
    pub fn remove(&self, kind: &str) -> Result<(), StateError> {
        Ok(file::remove(&self.path(kind))?)
    }

    /// Removes identity, journal, the documents of these `kinds`, and all that had been set aside.
    ///
    /// # Errors
    /// The system refuses.
    pub fn remove_all(&self, kinds: &[&str]) -> Result<(), StateError> {
        for kind in [IDENTITY, JOURNAL].iter().chain(kinds) {
            self.remove(kind)?;
        }
        let error = |source| FileError::new("list", &self.directory, source);
        let entries = match fs::read_dir(&self.directory) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.map_err(error)?,
        };
        for entry in entries {
            let entry = entry.map_err(error)?;
            if entry.file_name().to_string_lossy().contains(".corrupt-") {
                file::remove(&entry.path())?;
            }
        }
        Ok(())
    }

    fn path(&self, kind: &str) -> PathBuf {
        self.directory.join(kind)
    }

    fn read<T: DeserializeOwned>(&self, kind: &str) -> Result<Option<T>, DocumentError> {
        let Some(body) = P::FORMAT.read(&self.path(kind), kind)? else { return Ok(None) };
        let value = match P::ENCODING {
            Encoding::Json => serde_json::from_slice(&body).map_err(|error| error.to_string()),
            // The whole error would quote the file, and that may hold a key.
            Encoding::Toml => std::str::from_utf8(&body)
                .map_err(|error| error.to_string())
                .and_then(|text| toml::from_str(text).map_err(|error| error.message().to_owned())),
        };
        value.map(Some).map_err(DocumentError::Damaged)
    }
}
