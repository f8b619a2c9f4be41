//! Hands the next root from the registrar on which a rotation is prepared to all others, through a store that must not
//! learn its key: that is sealed under a key which only the present root's key yields, and every registrar has that.

use std::path::Path;

use muster_common::{
    file::{self, DocumentError, Format},
    tls::SpkiHash,
};
use muster_proto::storage::{StoredSuccession, SuccessionStep as Step};
use prost::Message as _;
use rcgen::{KeyPair, PublicKeyData};
use rustls::pki_types::CertificateDer;
use zeroize::Zeroizing;

use super::{
    Ca, CaError, Files, read_key,
    rotation::{self, Phase},
};
use crate::seal::{self, SealError};

const PURPOSE: &str = "muster ca succession v1";
const DOCUMENT: Format = Format { program: "muster-registrar", prefix: "# ", version: 1 };
const KIND: &str = "succession";

/// Why a root cannot be taken over.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SuccessionError {
    /// It was sealed under another root's key, or is damaged.
    #[error("what the store has of its key cannot be used: {0}")]
    Seal(#[from] SealError),
    /// It opens, but makes no sense.
    #[error("what the store has of it cannot be used: {0}")]
    Contents(String),
    /// The old root has been retired for too long.
    #[error("its key is no longer in the store, since the old root has been retired for some time")]
    Forgotten,
    /// Two registrars have replaced the same root.
    #[error(
        "another rotation of the same root was begun on another registrar at the same time, and the deployment \
         follows that one; `leave` needs --force here"
    )]
    Other,
}

/// A root that takes the place of another, as the store and the registrars' files have it.
#[derive(Clone, Debug, PartialEq)]
pub struct Succession {
    new: SpkiHash,
    certificate: CertificateDer<'static>,
    cross: CertificateDer<'static>,
    sealed_key: Vec<u8>,
}

impl Succession {
    /// Seals `key`, that of the next root `certificate`, for those who have `old_key`. `cross` is the next root's key
    /// as signed by the old root.
    ///
    /// # Errors
    /// As [`seal::seal`].
    pub(super) fn seal(
        old_key: &KeyPair,
        key: &KeyPair,
        certificate: &CertificateDer<'static>,
        cross: &CertificateDer<'static>,
    ) -> Result<Self, CaError> {
        let new = SpkiHash::of_spki(&key.subject_public_key_info());
        let (certificate, cross) = (certificate.clone(), cross.clone());
        let mut made = Self { new, certificate, cross, sealed_key: Vec::new() };
        let plain = Zeroizing::new(key.serialize_der());
        let sealed = made.key_for(old_key).and_then(|key| seal::seal(&key, &made.context(), &plain));
        made.sealed_key = sealed.map_err(SuccessionError::from)?;
        Ok(made)
    }

    /// The next root's key, for who has `old_key`.
    ///
    /// # Errors
    /// If it was sealed under another root's key, or for other certificates.
    pub(super) fn open(&self, old_key: &KeyPair) -> Result<KeyPair, SuccessionError> {
        if self.sealed_key.is_empty() {
            return Err(SuccessionError::Forgotten);
        }
        let plain = seal::open(&*self.key_for(old_key)?, &self.context(), &self.sealed_key)?;
        let contents = |reason: &dyn std::fmt::Display| SuccessionError::Contents(reason.to_string());
        let key = KeyPair::try_from(&plain[..]).map_err(|error| contents(&error))?;
        let hash = SpkiHash::of_spki(&key.subject_public_key_info());
        let cross = SpkiHash::of(&self.cross).map_err(|error| contents(&error))?;
        if hash != self.new || cross != self.new {
            return Err(contents(&"key and certificates do not belong together"));
        }
        Ok(key)
    }

    /// As the store has it, at a step.
    pub fn stored(&self, step: Step) -> StoredSuccession {
        StoredSuccession {
            certificate: self.certificate.to_vec(),
            cross: self.cross.to_vec(),
            sealed_key: self.sealed_key.clone(),
            step: step.into(),
            retired_at: None,
        }
    }

    /// From the store.
    ///
    /// # Errors
    /// [`SuccessionError::Contents`] if the root is none.
    pub fn from_stored(stored: &StoredSuccession) -> Result<Self, SuccessionError> {
        let certificate = CertificateDer::from(stored.certificate.clone());
        let new = SpkiHash::of(&certificate).map_err(|error| SuccessionError::Contents(error.to_string()))?;
        let (cross, sealed_key) = (stored.cross.clone().into(), stored.sealed_key.clone());
        Ok(Self { new, certificate, cross, sealed_key })
    }

    /// Hash of the new root.
    pub fn new_root(&self) -> SpkiHash {
        self.new
    }

    pub(super) fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    pub(super) fn cross(&self) -> &CertificateDer<'static> {
        &self.cross
    }

    fn key_for(&self, old_key: &KeyPair) -> Result<Zeroizing<[u8; 32]>, SealError> {
        let secret = Zeroizing::new(old_key.serialize_der());
        let old = SpkiHash::of_spki(&old_key.subject_public_key_info());
        seal::derive(&secret, PURPOSE, &[old.as_bytes(), self.new.as_bytes()])
    }

    /// The certificates that come with the key cannot be exchanged for others.
    fn context(&self) -> Vec<u8> {
        let length = u32::try_from(self.certificate.len()).unwrap_or(u32::MAX);
        [&length.to_be_bytes()[..], &self.certificate, &self.cross].concat()
    }
}

/// What a registrar's files say of roots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Here {
    /// The one that issues.
    pub issuing: SpkiHash,
    prepared: Option<SpkiHash>,
    trusted: Vec<SpkiHash>,
    retired: Vec<SpkiHash>,
}

impl Here {
    /// Reads the files in `directory`.
    ///
    /// # Errors
    /// As [`Ca::load`].
    pub fn load(directory: &Path) -> Result<Self, CaError> {
        let prepared = match rotation::phase(directory)? {
            Phase::Prepared { next } => Some(next),
            Phase::Settled | Phase::Activated { .. } => None,
        };
        let ca = Ca::load(directory)?;
        let hashes = |all: &[CertificateDer<'_>]| all.iter().map(SpkiHash::of).collect::<Result<Vec<_>, _>>();
        Ok(Self {
            issuing: ca.hash(),
            prepared,
            trusted: hashes(ca.roots())?,
            retired: hashes(ca.retired())?,
        })
    }

    /// How far the files are on the way from the root `old` to `new`.
    pub fn step(&self, old: SpkiHash, new: SpkiHash) -> Step {
        let known = self.trusted.contains(&new) || self.retired.contains(&new);
        if !known {
            Step::Unspecified
        } else if self.issuing == old {
            if self.prepared == Some(new) { Step::Prepared } else { Step::Unspecified }
        } else if self.retired.contains(&old) {
            Step::Retired
        } else if self.trusted.contains(&old) {
            Step::Activated
        } else {
            // The files have come without the old root: they say nothing of it.
            Step::Unspecified
        }
    }
}

/// Takes the steps on the way from the root `old` that others have taken and the files in `directory` have not, up to
/// `step`, each as [`rotation`] does; says whether any was left to take.
///
/// # Errors
/// If the next root's key cannot be had. Whatever was done by then is whole.
pub fn follow(directory: &Path, old: SpkiHash, next: &Succession, step: Step) -> Result<bool, CaError> {
    let files = Files::new(directory);
    let _lock = files.lock()?;
    let before = Here::load(directory)?;
    if before.issuing == old {
        if before.step(old, next.new) < Step::Prepared {
            let key = next.open(&read_key(&files.key())?)?;
            rotation::take_over(&files, next, &key)?;
        }
        if step >= Step::Activated {
            rotation::issue_by_next(&files)?;
        }
    }
    if step >= Step::Retired && Here::load(directory)?.step(old, next.new) == Step::Activated {
        rotation::distrust(&files, &[old])?;
    }
    Ok(Here::load(directory)? != before)
}

/// The successions that the files in `directory` have, by the old root.
///
/// # Errors
/// If one cannot be read. A damaged one is removed: it is of use to nobody.
pub fn list(directory: &Path) -> Result<Vec<(SpkiHash, Succession)>, CaError> {
    let successions = Files::new(directory).successions();
    let entries = match std::fs::read_dir(&successions) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(file::FileError::new("read directory", &successions, error).into()),
    };
    let mut all = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| file::FileError::new("read directory", &successions, error))?.path();
        if path.extension().is_none_or(|extension| extension != "sealed") {
            continue;
        }
        match DOCUMENT.read(&path, KIND) {
            Ok(Some(body)) => all.extend(decode(&body)),
            Ok(None) => {}
            Err(DocumentError::File(error)) => return Err(error.into()),
            Err(DocumentError::Damaged(reason)) => {
                tracing::warn!(path = %path.display(), reason, "removing what cannot be used");
                file::remove(&path)?;
            }
        }
    }
    all.sort_by_key(|(old, _)| *old.as_bytes());
    Ok(all)
}

/// Removes what the other registrars need no more, or have from the store.
///
/// # Errors
/// If it cannot be removed.
pub fn forget(directory: &Path, old: SpkiHash) -> Result<(), CaError> {
    Ok(file::remove(&Files::new(directory).succession(old))?)
}

/// Writes what the other registrars need to follow; the hash of the old root comes first.
pub(super) fn write(files: &Files<'_>, next: &Succession) -> Result<(), CaError> {
    let old = SpkiHash::of_spki(&read_key(&files.key())?.subject_public_key_info());
    let body = [&old.as_bytes()[..], &next.stored(Step::Unspecified).encode_to_vec()].concat();
    Ok(DOCUMENT.write(&files.succession(old), KIND, &body)?)
}

fn decode(body: &[u8]) -> Option<(SpkiHash, Succession)> {
    let (old, rest) = body.split_first_chunk::<32>()?;
    let stored = StoredSuccession::decode(rest).ok()?;
    Some((SpkiHash::from(*old), Succession::from_stored(&stored).ok()?))
}

#[cfg(test)]
#[path = "succession_tests.rs"]
mod tests;
