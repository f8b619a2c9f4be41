//! Where the CA's files are, and what each of them may be called.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use muster_common::{
    file::{self, FileError, Lock},
    tls::{SpkiHash, certificates_from_pem},
};
use rcgen::KeyPair;
use rustls::pki_types::CertificateDer;
use zeroize::Zeroizing;

use super::CaError;

/// The directory of what other registrars need to follow.
const SUCCESSIONS: &str = "successions";
/// The files in the order in which they are written, so that none counts before what it needs; a directory stands for
/// all in it.
const ORDER: [&str; 7] = ["ca.crt", "cross.crt", "roots", "retired", SUCCESSIONS, "next.key", "ca.key"];

/// Whether `name` is that of a file which every registrar of a deployment has, relative to the data directory.
pub fn is_file_name(name: &str) -> bool {
    match name.split_once('/') {
        None => ORDER.contains(&name) && extension(name).is_none(),
        Some((directory, file)) => {
            let stem =
                extension(directory).and_then(|extension| file.strip_suffix(extension)?.strip_suffix('.'));
            stem.is_some_and(|stem| {
                let allowed = |octet: u8| octet.is_ascii_alphanumeric() || b"-_.".contains(&octet);
                let hash = stem.len() == 16 && stem.bytes().all(|octet| octet.is_ascii_hexdigit());
                (1..=128).contains(&stem.len())
                    && !stem.starts_with('.')
                    && stem.bytes().all(allowed)
                    && (directory != SUCCESSIONS || hash)
            })
        }
    }
}

/// What the names of the files in a directory end with.
fn extension(directory: &str) -> Option<&'static str> {
    match directory {
        "roots" | "retired" => Some("crt"),
        SUCCESSIONS => Some("sealed"),
        _ => None,
    }
}

/// A file of the CA.
#[derive(PartialEq, Eq)]
pub struct CaFile {
    /// Relative to the CA's directory, such as `ca.key` or `roots/0123456789abcdef.crt`.
    pub name: String,
    /// What it holds, which may be a key.
    pub contents: Zeroizing<Vec<u8>>,
}

impl fmt::Debug for CaFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CaFile").field("name", &self.name).finish_non_exhaustive()
    }
}

/// The files that every registrar of a deployment has, the key that issues last. They are all of one moment.
///
/// # Errors
/// If one cannot be read or has a name that it must not have, or a rotation is being changed right now.
pub fn read_all(directory: &Path) -> Result<Vec<CaFile>, CaError> {
    let _lock = Files::new(directory).lock()?;
    read_unlocked(directory)
}

/// As [`read_all`], where nobody changes the files.
pub(super) fn read_unlocked(directory: &Path) -> Result<Vec<CaFile>, CaError> {
    let files = Files::new(directory);
    let mut all = Vec::new();
    for part in ORDER {
        let paths = if extension(part).is_some() { files.list(part)? } else { vec![directory.join(part)] };
        for path in paths {
            let name =
                path.strip_prefix(directory).ok().and_then(Path::to_str).filter(|name| is_file_name(name));
            let Some(name) = name else { return Err(CaError::Name(path)) };
            match file::read(&path) {
                Ok(contents) => all.push(CaFile { name: name.to_owned(), contents: contents.into() }),
                Err(error) if error.source.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(all)
}

/// Removes the CA's files, its key first, and what killed commands have left of them and of the registrar's certificate.
///
/// # Errors
/// If one cannot be removed; to do it again does no harm.
pub fn remove_all(directory: &Path) -> Result<(), CaError> {
    for part in ORDER.into_iter().rev() {
        let path = directory.join(part);
        if extension(part).is_none() {
            file::remove(&path)?;
            continue;
        }
        match std::fs::remove_dir_all(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(FileError::new("remove", &path, error).into());
            }
            _ => {}
        }
    }
    let error = |error| FileError::new("read directory", directory, error);
    for entry in std::fs::read_dir(directory).map_err(error)? {
        let path = entry.map_err(error)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if ["ca.tmp-", "cross.tmp-", "next.tmp-", "registrar.tmp-"].iter().any(|part| name.starts_with(part))
        {
            file::remove(&path)?;
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

    /// The files of the CA in a directory, in order.
    pub(super) fn list(&self, directory: &str) -> Result<Vec<PathBuf>, FileError> {
        let wanted = extension(directory);
        let directory = self.0.join(directory);
        let entries = match std::fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(FileError::new("read directory", &directory, error)),
        };
        let mut paths = Vec::new();
        for entry in entries {
            let path = entry.map_err(|error| FileError::new("read directory", &directory, error))?.path();
            if path.extension().and_then(|found| found.to_str()) == wanted {
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
        std::fs::write(path.join("roots/my.root.crt"), std::fs::read(path.join("ca.crt")).unwrap()).unwrap();
        for name in ["registry.db", "ca.tmp-1", "next.tmp-23", "registrar.tmp-4", "other.tmp-5"] {
            std::fs::write(path.join(name), "secret").unwrap();
        }
        let names: Vec<String> = read_all(path).unwrap().into_iter().map(|file| file.name).collect();
        assert_eq!(names[..2], ["ca.crt", "cross.crt"]);
        assert!(names[2].starts_with("roots/") && names[3] == "roots/my.root.crt", "{names:?}");
        assert!(names[4].starts_with("successions/") && names[4].ends_with(".sealed"), "{names:?}");
        assert_eq!(names[5..], ["next.key", "ca.key"]);
        assert!(names.iter().all(|name| is_file_name(name)), "{names:?}");
        remove_all(path).unwrap();
        remove_all(path).unwrap();
        let mut left: Vec<_> =
            std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort_unstable();
        assert_eq!(left, ["other.tmp-5", "registry.db"]);
    }

    #[test]
    fn what_could_not_be_restored_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        Ca::create(dir.path(), "muster.test", Timestamp::now()).unwrap();
        std::fs::create_dir(dir.path().join("retired")).unwrap();
        std::fs::copy(dir.path().join("ca.crt"), dir.path().join("retired/old root.crt")).unwrap();
        let error = read_all(dir.path()).unwrap_err().to_string();
        assert!(error.contains("old root.crt") && error.contains("rename"), "{error}");
    }

    #[test]
    fn only_a_ca_s_files_have_their_names() {
        let long = format!("roots/{}.crt", "a".repeat(129));
        for name in [
            "",
            "ca.pem",
            "roots",
            "successions",
            "roots/.crt",
            "roots/.x.crt",
            "roots/a/b.crt",
            "roots/../x.crt",
            "roots/crt",
            "/ca.key",
            "registrar.pem",
            "successions/lock",
            "successions/my.sealed",
            "successions/0123456789abcdef.crt",
            &long,
        ] {
            assert!(!is_file_name(name), "{name}");
        }
        for name in ["ca.key", "retired/0a.crt", "roots/my.root.crt", "successions/0123456789abcdef.sealed"] {
            assert!(is_file_name(name), "{name}");
        }
    }
}
