//! The CA's files as a whole: read for a backup, and put into a directory that has none.

use std::path::{Path, PathBuf};

use muster_common::file::{self, FileError};

use super::{Ca, CaError, CaFile, files::read_unlocked, read_all};

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

/// Reads all files of the CA in `directory`, as they are between two steps of a rotation; the key that issues is last.
///
/// # Errors
/// As [`Ca::load`] and [`read_all`]: what could not be used after a restore is not worth a backup.
pub fn read(directory: &Path) -> Result<Vec<CaFile>, CaError> {
    // First, so that nothing is made where there is no CA.
    Ca::load(directory)?;
    read_all(directory)
}

/// Checks that `directory` holds nothing of a CA, or a part of `files` and nothing else.
///
/// # Errors
/// See [`CopyError`].
pub fn check(directory: &Path, files: &[CaFile]) -> Result<(), CopyError> {
    match read_unlocked(directory)?.into_iter().find(|found| !files.contains(found)) {
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

#[cfg(test)]
mod tests {
    use muster_common::time::Timestamp;

    use super::*;
    use crate::ca::{is_file_name, rotation};

    #[test]
    fn a_ca_in_mid_rotation_is_the_same_elsewhere() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let now = Timestamp::now();
        Ca::create(from.path(), "muster.test", now).unwrap();
        rotation::prepare(from.path(), "muster.test", now).unwrap();
        let files = read(from.path()).unwrap();
        let names: Vec<&str> = files.iter().map(|file| &*file.name).collect();
        assert!(names.iter().all(|name| is_file_name(name)), "{names:?}");
        assert!(names.contains(&"next.key") && names.iter().any(|name| name.starts_with("successions/")));
        assert!(names.last() == Some(&"ca.key"), "{names:?}");

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
}
