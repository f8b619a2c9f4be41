//! Where the CA's files are, and what each of them may be called.

use std::path::{Path, PathBuf};

use muster_common::{
    file::{self, FileError, Lock},
    tls::{SpkiHash, certificates_from_pem},
};
use rcgen::KeyPair;
use rustls::pki_types::CertificateDer;
use zeroize::Zeroizing;

use super::CaError;

/// The files that are not in a directory of their own.
const SINGLE: [&str; 4] = ["ca.key", "ca.crt", "cross.crt", "next.key"];
/// The directories of certificates.
const DIRECTORIES: [&str; 2] = ["roots", "retired"];
/// The directory of what other registrars need to follow.
const SUCCESSIONS: &str = "successions";

/// Whether `name` is that of a file which every registrar of a deployment has, relative to the data directory.
pub fn is_file_name(name: &str) -> bool {
    match name.split_once('/') {
        None => SINGLE.contains(&name),
        Some((directory, file)) => {
            let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
            DIRECTORIES.contains(&directory)
                && file.strip_suffix(".crt").is_some_and(|stem| !stem.is_empty() && !stem.starts_with('.'))
                && file.bytes().all(allowed)
        }
    }
}

/// A file's name, relative to the data directory, and what is in it.
pub type NamedFile = (String, Zeroizing<Vec<u8>>);

/// The files that every registrar of a deployment has. They are all of one moment.
///
/// # Errors
/// If one cannot be read, or a rotation is being changed right now.
pub fn read_all(directory: &Path) -> Result<Vec<NamedFile>, CaError> {
    let files = Files::new(directory);
    let _lock = files.lock()?;
    let mut all = Vec::new();
    for name in SINGLE {
        let path = directory.join(name);
        if path.exists() {
            all.push((name.to_owned(), file::read(&path)?.into()));
        }
    }
    for part in DIRECTORIES {
        for path in files.list(part)? {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            all.push((format!("{part}/{name}"), file::read(&path)?.into()));
        }
    }
    Ok(all)
}

/// Removes the CA's files, its key first.
///
/// # Errors
/// If one cannot be removed; to do it again does no harm.
pub fn remove_all(directory: &Path) -> Result<(), CaError> {
    for name in SINGLE {
        file::remove(&directory.join(name))?;
    }
    for part in [DIRECTORIES[0], DIRECTORIES[1], SUCCESSIONS] {
        let path = directory.join(part);
        match std::fs::remove_dir_all(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(FileError::new("remove", &path, error).into());
            }
            _ => {}
        }
    }
    Ok(())
}

/// Where the files are.
pub(super) struct Files<'a>(&'a Path);

impl<'a> Files<'a> {
    pub(super) fn new(directory: &'a Path) -> Self {
        Self(directory)
    }

    pub(super) fn directory(&self) -> &'a Path {
        self.0
    }

    pub(super) fn key(&self) -> PathBuf {
        self.0.join("ca.key")
    }

    pub(super) fn certificate(&self) -> PathBuf {
        self.0.join("ca.crt")
    }

    pub(super) fn cross(&self) -> PathBuf {
        self.0.join("cross.crt")
    }

    pub(super) fn next_key(&self) -> PathBuf {
        self.0.join("next.key")
    }

    pub(super) fn root(&self, hash: SpkiHash) -> PathBuf {
        let digits: String = hash.as_bytes().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        self.0.join("roots").join(format!("{digits}.crt"))
    }

    pub(super) fn succession(&self, old: SpkiHash) -> PathBuf {
        self.successions().join(self.root(old).with_extension("sealed").file_name().unwrap_or_default())
    }

    pub(super) fn successions(&self) -> PathBuf {
        self.0.join(SUCCESSIONS)
    }

    /// Keeps other processes from changing the files until it is dropped.
    pub(super) fn lock(&self) -> Result<Lock, CaError> {
        file::lock(&self.successions())
            .map_err(|source| CaError::Busy { directory: self.0.to_owned(), source })
    }

    pub(super) fn retired(&self, hash: SpkiHash) -> PathBuf {
        self.0.join("retired").join(self.root(hash).file_name().unwrap_or_default())
    }

    /// The certificates in a directory, in order.
    pub(super) fn list(&self, directory: &str) -> Result<Vec<PathBuf>, FileError> {
        let directory = self.0.join(directory);
        let entries = match std::fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(FileError::new("read directory", &directory, error)),
        };
        let mut paths = Vec::new();
        for entry in entries {
            let path = entry.map_err(|error| FileError::new("read directory", &directory, error))?.path();
            if path.extension().is_some_and(|extension| extension == "crt") {
                paths.push(path);
            }
        }
        paths.sort_unstable();
        Ok(paths)
    }

    pub(super) fn exists(&self) -> bool {
        [self.key(), self.certificate()].iter().any(|path| path.symlink_metadata().is_ok())
    }
}

pub(super) fn read_key(path: &Path) -> Result<KeyPair, CaError> {
    let damaged = |reason: String| CaError::Damaged { path: path.to_owned(), reason };
    let pem = Zeroizing::new(file::read(path)?);
    let pem = std::str::from_utf8(&pem).map_err(|e| damaged(e.to_string()))?;
    KeyPair::from_pem(pem).map_err(|e| damaged(e.to_string()))
}

pub(super) fn read_certificate(path: &Path) -> Result<CertificateDer<'static>, CaError> {
    let damaged = |reason: String| CaError::Damaged { path: path.to_owned(), reason };
    let what = path.display().to_string();
    let mut all =
        certificates_from_pem(&what, &file::read(path)?).map_err(|error| damaged(error.to_string()))?;
    match (all.pop(), all.is_empty()) {
        (Some(one), true) => Ok(one),
        _ => Err(damaged("it must hold one certificate".into())),
    }
}

#[cfg(test)]
mod tests {
    use muster_common::time::Timestamp;

    use super::*;
    use crate::ca::{Ca, rotation};

    #[test]
    fn all_files_of_a_rotation_are_handed_over_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        Ca::create(path, "muster.test", Timestamp::now()).unwrap();
        rotation::prepare(path, "muster.test", Timestamp::now()).unwrap();
        std::fs::write(path.join("registry.db"), "kept").unwrap();
        let names: Vec<String> = read_all(path).unwrap().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names[..4], ["ca.key", "ca.crt", "cross.crt", "next.key"]);
        assert!(names.len() == 5 && names[4].starts_with("roots/"), "{names:?}");
        assert!(names.iter().all(|name| is_file_name(name)), "{names:?}");
        remove_all(path).unwrap();
        remove_all(path).unwrap();
        let left: Vec<_> = std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["registry.db"]);
    }
}
