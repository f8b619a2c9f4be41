//! Replacing the root while everything runs, in three steps:
//!
//! 1. [`prepare`] makes the next root and has everybody trust it, while the old one goes on issuing;
//! 2. [`activate`] lets the next root issue. Whoever missed the first step is not locked out: until the end, chains
//!    include the next root's key as signed by the old root;
//! 3. [`retire`] ends the trust in the old root, once certificates by it have expired or been renewed.
//!
//! Each step is one atomic change of a file that counts, and may be repeated after a crash. The other registrars of the
//! deployment follow by what [`super::succession`] hands them.

use std::{fs, path::Path, time::Duration};

use muster_common::{
    file::{self, FileError},
    time::Timestamp,
    tls::{SpkiHash, certificate_validity, certificates_to_pem},
};
use rcgen::{CertificateParams, DistinguishedName, Issuer, KeyPair, PublicKeyData};
use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroizing;

use super::{
    BACKDATE, Ca, CaError, Files, new_root, read_certificate, read_key, root_params,
    succession::{self, Succession},
};

/// Why a step was refused. Nothing was changed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RotationError {
    /// Another rotation is under way.
    #[error(
        "a rotation of the CA is under way; go on with it (muster-registrar ca status tells the next step)"
    )]
    UnderWay,
    /// There is no next root.
    #[error("there is no next root to activate; begin with: muster-registrar ca rotate prepare")]
    NotPrepared,
    /// There is no old root.
    #[error("there is no old root to retire; see: muster-registrar ca status")]
    NothingToRetire,
    /// Devices may still depend on the old root.
    #[error(
        "certificates by the old root may be in use until {until}, and their holders would be cut off; wait, or \
         add --force if they are to join again"
    )]
    TooEarly {
        /// When all of them will have expired or been renewed.
        until: Timestamp,
    },
}

/// How far a rotation is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// There is one root.
    Settled,
    /// The next root is trusted but does not issue yet.
    Prepared {
        /// Hash of the next root.
        next: SpkiHash,
    },
    /// The new root issues; old ones are still trusted.
    Activated {
        /// When the new root began to issue.
        since: Timestamp,
        /// Hashes of the old roots.
        old: Vec<SpkiHash>,
    },
}

/// How far the rotation of the CA in `directory` is.
///
/// # Errors
/// As [`Ca::load`].
pub fn phase(directory: &Path) -> Result<Phase, CaError> {
    let files = Files::new(directory);
    let ca = Ca::load(directory)?;
    // The key that issues has been left there by an activation that was cut off.
    if let Some(next) = waiting(&files)?
        && next != ca.hash()
    {
        return Ok(Phase::Prepared { next });
    }
    let old = ca.roots()[1..].iter().map(SpkiHash::of).collect::<Result<Vec<_>, _>>()?;
    if old.is_empty() {
        return Ok(Phase::Settled);
    }
    let since = if files.cross().exists() {
        modified(&files.key())?
    } else {
        // Roots that somebody has put there by hand.
        certificate_validity(&ca.roots()[0])?.0
    };
    Ok(Phase::Activated { since, old })
}

/// The root whose key waits.
fn waiting(files: &Files<'_>) -> Result<Option<SpkiHash>, CaError> {
    if !files.next_key().exists() {
        return Ok(None);
    }
    let next = SpkiHash::of_spki(&read_key(&files.next_key())?.subject_public_key_info());
    // Else the preparation was cut off before it counted.
    Ok(files.root(next).exists().then_some(next))
}

/// Makes the next root, which everybody is to trust from now on. Returns its hash.
///
/// # Errors
/// [`RotationError::UnderWay`] unless there is exactly one root.
pub fn prepare(directory: &Path, trust_domain: &str, now: Timestamp) -> Result<SpkiHash, CaError> {
    let files = Files::new(directory);
    let _lock = files.lock()?;
    if phase(directory)? != Phase::Settled {
        return Err(RotationError::UnderWay.into());
    }
    let (key, certificate) = new_root(trust_domain, now)?;
    let hash = SpkiHash::of_spki(&key.subject_public_key_info());

    // The same name and key, signed by the root of today.
    let old_key = read_key(&files.key())?;
    let old_root = Ca::load(directory)?.roots()[0].clone();
    let old_end = certificate_validity(&old_root)?.1;
    let issuer = Issuer::from_ca_cert_der(&old_root, &old_key)?;
    let mut params: CertificateParams = root_params(now.saturating_sub(BACKDATE), old_end)?;
    params.distinguished_name = subject(&certificate.der().clone())?;
    let cross = params.signed_by(&key, &issuer)?;

    let next = Succession::seal(&old_key, &key, certificate.der(), cross.der())?;
    take_over(&files, &next, &key)?;
    Ok(hash)
}

/// Puts the next root, with its key, where it waits. What had been prepared before is dropped.
pub(super) fn take_over(files: &Files<'_>, next: &Succession, key: &KeyPair) -> Result<(), CaError> {
    if let Phase::Prepared { next: other } = phase(files.directory())?
        && other != next.new_root()
    {
        remove(&files.root(other))?;
    }
    let pem = |certificate: &CertificateDer<'_>| certificates_to_pem(std::slice::from_ref(certificate));
    succession::write(files, next)?;
    write(&files.cross(), pem(next.cross()).as_bytes())?;
    write(&files.next_key(), Zeroizing::new(key.serialize_pem()).as_bytes())?;
    // The step is done when this file is there; before, the others mean nothing.
    write(&files.root(next.new_root()), pem(next.certificate()).as_bytes())?;
    Ok(())
}

/// Lets the next root issue.
///
/// # Errors
/// [`RotationError::NotPrepared`].
pub fn activate(directory: &Path) -> Result<SpkiHash, CaError> {
    let files = Files::new(directory);
    let _lock = files.lock()?;
    issue_by_next(&files)
}

/// As [`activate`], of files that nobody else changes meanwhile. Puts them in order if this was cut off before.
pub(super) fn issue_by_next(files: &Files<'_>) -> Result<SpkiHash, CaError> {
    let Some(next) = waiting(files)? else {
        return Err(RotationError::NotPrepared.into());
    };
    let next_root = read_certificate(&files.root(next))?;
    let old_root = read_certificate(&files.certificate())?;
    copy(&files.certificate(), &files.root(SpkiHash::of(&old_root)?))?;
    // The file's time tells since when the new root issues.
    let key = Zeroizing::new(file::read(&files.next_key())?);
    write(&files.key(), &key)?;
    // From here on the new root issues; the rest only puts the files in order.
    remove(&files.next_key())?;
    write(&files.certificate(), certificates_to_pem(&[next_root]).as_bytes())?;
    remove(&files.root(next))?;
    Ok(next)
}

/// Ends the trust in the old roots. `lifetime` is that of the longest-lived certificates that they have issued.
///
/// # Errors
/// [`RotationError::NothingToRetire`], or [`RotationError::TooEarly`] unless `force`.
pub fn retire(directory: &Path, lifetime: Duration, now: Timestamp, force: bool) -> Result<(), CaError> {
    let files = Files::new(directory);
    let _lock = files.lock()?;
    let Phase::Activated { since, old } = phase(directory)? else {
        return Err(RotationError::NothingToRetire.into());
    };
    let until = since + lifetime;
    if now < until && !force {
        return Err(RotationError::TooEarly { until }.into());
    }
    distrust(&files, &old)
}

/// Ends the trust in these roots, in files that nobody else changes meanwhile.
pub(super) fn distrust(files: &Files<'_>, old: &[SpkiHash]) -> Result<(), CaError> {
    // The next rotation may have begun: what an old root has not signed is not of this one.
    if files.cross().exists() {
        let cross = read_certificate(&files.cross())?;
        let signed = |hash: &SpkiHash| Ok::<_, CaError>(names(&read_certificate(&files.root(*hash))?)?.0);
        let signers = old.iter().map(signed).collect::<Result<Vec<_>, _>>()?;
        if signers.contains(&names(&cross)?.1) {
            remove(&files.cross())?;
        }
    }
    for hash in old.iter().copied() {
        // Kept, so that a registrar that was not running takes it back from the store as well.
        copy(&files.root(hash), &files.retired(hash))?;
        remove(&files.root(hash))?;
    }
    Ok(())
}

/// The names, as they are encoded, of whom a certificate is for and of who has signed it.
fn names(certificate: &CertificateDer<'_>) -> Result<(Vec<u8>, Vec<u8>), CaError> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(damaged)?;
    Ok((parsed.subject().as_raw().to_vec(), parsed.issuer().as_raw().to_vec()))
}

fn damaged<E>(_: E) -> rcgen::Error {
    rcgen::Error::CouldNotParseCertificate
}

fn subject(certificate: &CertificateDer<'_>) -> Result<DistinguishedName, CaError> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(damaged)?;
    let mut name = DistinguishedName::new();
    for common_name in parsed.subject().iter_common_name() {
        let text = common_name.as_str().map_err(damaged)?;
        name.push(rcgen::DnType::CommonName, text);
    }
    Ok(name)
}

fn copy(from: &Path, to: &Path) -> Result<(), FileError> {
    write(to, &file::read(from)?)
}

fn write(path: &Path, contents: &[u8]) -> Result<(), FileError> {
    #[cfg(test)]
    cut::check(path)?;
    file::write_private(path, contents)
}

fn remove(path: &Path) -> Result<(), FileError> {
    #[cfg(test)]
    cut::check(path)?;
    file::remove(path)
}

fn modified(path: &Path) -> Result<Timestamp, FileError> {
    let time = fs::metadata(path)
        .and_then(|metadata| metadata.modified())
        .map_err(|error| FileError::new("read", path, error))?;
    Ok(Timestamp::from_epoch(time.duration_since(std::time::UNIX_EPOCH).unwrap_or_default()))
}

/// Cuts a step off, as a kill would, between any two changes of files.
#[cfg(test)]
pub(super) mod cut {
    use std::{cell::Cell, io};

    use super::{FileError, Path};

    thread_local! {
        /// How many changes are left, if they are counted.
        static LEFT: Cell<Option<usize>> = const { Cell::new(None) };
    }

    /// Does `step`, but for all that comes after this many changes.
    pub(in crate::ca) fn after<T>(changes: usize, step: impl FnOnce() -> T) -> T {
        LEFT.set(Some(changes));
        let result = step();
        LEFT.set(None);
        result
    }

    pub(super) fn check(path: &Path) -> Result<(), FileError> {
        let Some(left) = LEFT.get() else { return Ok(()) };
        let rest =
            left.checked_sub(1).ok_or_else(|| FileError::new("change", path, io::Error::other("cut off")))?;
        LEFT.set(Some(rest));
        Ok(())
    }
}
