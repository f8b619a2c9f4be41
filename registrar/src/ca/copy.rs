//! The CA's files as a whole: read for a backup, and put into a directory that has none.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use muster_common::file::{self, FileError};
use zeroize::Zeroizing;

use super::{Ca, CaError, Files};

/// How often the files are read until they hold still.
const ATTEMPTS: usize = 5;

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

/// Why files cannot be put into a directory.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The directory cannot be read.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// It has a CA already, and another one.
    #[error(
        "{} is not what the backup holds; nothing was changed. Move the CA's files in that directory away, or leave \
         the backup's out: --without-ca", .0.display()
    )]
    Other(PathBuf),
}

/// Whether a file of the CA can have this name: nothing else is read from a backup.
pub fn is_name(name: &str) -> bool {
    if ["ca.crt", "cross.crt", "next.key", "ca.key"].contains(&name) {
        return true;
    }
    let inner = name.strip_prefix("roots/").or_else(|| name.strip_prefix("retired/"));
    inner.and_then(|inner| inner.strip_suffix(".crt")).is_some_and(|stem| {
        let allowed = |octet: u8| octet.is_ascii_alphanumeric() || octet == b'-' || octet == b'_';
        !stem.is_empty() && stem.len() <= 128 && stem.bytes().all(allowed)
    })
}

/// Reads all files of the CA in `directory`, as they are between two steps of a rotation; the key that issues is last.
///
/// # Errors
/// As [`Ca::load`]: what could not be used after a restore is not worth a backup.
pub fn read(directory: &Path) -> Result<Vec<CaFile>, CaError> {
    let mut files = read_once(directory)?;
    for _ in 0..ATTEMPTS {
        let again = read_once(directory)?;
        if again == files {
            break;
        }
        files = again;
    }
    Ca::load(directory)?;
    Ok(files)
}

/// Checks that `directory` holds nothing of a CA, or a part of `files` and nothing else.
///
/// # Errors
/// See [`CopyError`].
pub fn check(directory: &Path, files: &[CaFile]) -> Result<(), CopyError> {
    match read_once(directory)?.into_iter().find(|found| !files.contains(found)) {
        Some(other) => Err(CopyError::Other(directory.join(other.name))),
        None => Ok(()),
    }
}

/// Writes those of `files` that are missing in `directory`, with mode 0600.
///
/// # Errors
/// If one cannot be written; all can be done again.
pub fn write(directory: &Path, files: &[CaFile]) -> Result<(), FileError> {
    for CaFile { name, contents } in files {
        let path = directory.join(name);
        if path.symlink_metadata().is_err() {
            file::write_private(&path, contents)?;
        }
    }
    Ok(())
}

fn read_once(directory: &Path) -> Result<Vec<CaFile>, CaError> {
    let files = Files::new(directory);
    let mut paths = vec![files.certificate(), files.cross()];
    for directory in ["roots", "retired"] {
        paths.extend(files.list(directory)?);
    }
    paths.extend([files.next_key(), files.key()]);
    let mut read = Vec::new();
    for path in paths {
        let name = path.strip_prefix(directory).ok().and_then(Path::to_str).filter(|name| is_name(name));
        let Some(name) = name else { continue };
        match file::read(&path) {
            Ok(contents) => {
                read.push(CaFile { name: name.to_owned(), contents: Zeroizing::new(contents) });
            }
            Err(error) if error.source.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(read)
}

#[cfg(test)]
mod tests {
    use muster_common::time::Timestamp;

    use super::*;
    use crate::ca::rotation;

    #[test]
    fn a_ca_in_mid_rotation_is_the_same_elsewhere() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let now = Timestamp::now();
        Ca::create(from.path(), "muster.test", now).unwrap();
        rotation::prepare(from.path(), "muster.test", now).unwrap();
        let files = read(from.path()).unwrap();
        let names: Vec<&str> = files.iter().map(|file| &*file.name).collect();
        assert!(names.iter().all(|name| is_name(name)), "{names:?}");
        assert!(names.contains(&"next.key") && names.last() == Some(&"ca.key"), "{names:?}");

        check(to.path(), &files).unwrap();
        write(to.path(), &files[..2]).unwrap();
        // A part is completed; what is complete is left as it is.
        for _ in 0..2 {
            check(to.path(), &files).unwrap();
            write(to.path(), &files).unwrap();
            assert_eq!(read(to.path()).unwrap(), files);
        }
        rotation::activate(to.path()).unwrap();
        let error = check(to.path(), &files).unwrap_err();
        assert!(error.to_string().contains("--without-ca"), "{error}");
    }

    #[test]
    fn only_a_ca_s_files_have_their_names() {
        for name in
            ["", "ca.pem", "roots/.crt", "roots/a/b.crt", "roots/../x.crt", "/ca.key", "registrar.pem"]
        {
            assert!(!is_name(name), "{name}");
        }
        assert!(is_name("retired/0a.crt"));
    }
}
