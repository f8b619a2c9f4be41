//! Files that hold secrets or state: mode 0600, replaced as a whole, on disk before the call returns. What root makes in
//! the directory of another user, such as a service's, belongs to that user, who could not read it otherwise. That user
//! may put symbolic links there: none is followed, so that nothing else is written or given away.

mod document;
mod lock;

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, fchown, lchown},
    path::{Path, PathBuf},
};

pub use document::{DocumentError, Format, hex};
pub use lock::{Lock, LockError, lock, lock_existing, owner};

/// Why a file could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}: {source}{}", path.display(), remedy(source))]
pub struct FileError {
    action: &'static str,
    path: PathBuf,
    /// What the system said.
    pub source: io::Error,
}

impl FileError {
    /// Wraps what the system said of `path` while doing `action` (an infinitive, such as "open").
    pub fn new(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self { action, path: path.to_owned(), source }
    }
}

/// What to do about `error`, to be appended to a message; empty where there is nothing particular.
pub fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "; run as the user that owns it, or as root",
        io::ErrorKind::NotFound => "; check the path",
        io::ErrorKind::StorageFull => "; free some disk space",
        io::ErrorKind::QuotaExceeded => "; raise the quota, or free some disk space",
        io::ErrorKind::ReadOnlyFilesystem => "; mount the file system read-write",
        _ => match error.raw_os_error().map(rustix::io::Errno::from_raw_os_error) {
            Some(rustix::io::Errno::IO) => "; look for errors of the disk in the kernel's log (dmesg)",
            Some(rustix::io::Errno::LOOP) => "; a symbolic link is in its place: remove it",
            _ => "",
        },
    }
}

/// Writes `contents` to `path` with mode 0600, atomically: readers see the old file or the new one, also after
/// a crash. Its directory is created, with mode 0700, if it is missing.
pub fn write_private(path: &Path, contents: &[u8]) -> Result<(), FileError> {
    let directory = parent(path);
    create_private_dir(directory)?;
    let temporary = path.with_extension(format!("tmp-{}", std::process::id()));
    let write = || {
        // What a killed process has left, or somebody has put there, is not written to.
        remove(&temporary).map_err(|error| error.source)?;
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        give(&file, directory)?;
        file.write_all(contents)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        File::open(directory)?.sync_all()
    };
    write().map_err(|source| {
        let _ = fs::remove_file(&temporary);
        FileError::new("write", path, source)
    })
}

/// Creates `path` with mode 0600 and `contents`, on disk on return; an error if it exists.
pub fn create_private(path: &Path, contents: &[u8]) -> Result<(), FileError> {
    let directory = parent(path);
    create_private_dir(directory)?;
    let write = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        give(&file, directory)?;
        file.write_all(contents)?;
        file.sync_all()?;
        File::open(directory)?.sync_all()
    };
    write().map_err(|source| FileError::new("create", path, source))
}

/// Gives `path`, which another library has made, to the owner of its directory, as the functions above do; of a
/// symbolic link, the link alone.
pub fn adopt(path: &Path) -> Result<(), FileError> {
    let give = || match other_owner(parent(path))? {
        Some((uid, gid)) => lchown(path, Some(uid), Some(gid)),
        None => Ok(()),
    };
    give().map_err(|source| FileError::new("change the owner of", path, source))
}

/// Reads the whole of `path`.
pub fn read(path: &Path) -> Result<Vec<u8>, FileError> {
    fs::read(path).map_err(|source| FileError::new("read", path, source))
}

/// Removes `path`, if it is there.
pub fn remove(path: &Path) -> Result<(), FileError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(FileError::new("remove", path, error)),
        _ => Ok(()),
    }
}

/// Creates `path` and what is missing above it; new directories get mode 0700.
pub fn create_private_dir(path: &Path) -> Result<(), FileError> {
    let missing: Vec<_> = path.ancestors().take_while(|p| !p.as_os_str().is_empty() && !p.exists()).collect();
    let create = || {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        for directory in missing.iter().rev() {
            if let Some((uid, gid)) = other_owner(parent(directory))? {
                lchown(directory, Some(uid), Some(gid))?;
            }
        }
        Ok(())
    };
    create().map_err(|source| FileError::new("create directory", path, source))
}

/// Gives `file`, which is in `directory`, to its owner.
fn give(file: &File, directory: &Path) -> io::Result<()> {
    match other_owner(directory)? {
        Some((uid, gid)) => fchown(file, Some(uid), Some(gid)),
        None => Ok(()),
    }
}

/// User and group that own `directory`, if this process is root and they are not.
fn other_owner(directory: &Path) -> io::Result<Option<(u32, u32)>> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let owner = fs::metadata(directory)?;
    Ok((owner.uid() != 0).then(|| (owner.uid(), owner.gid())))
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use super::*;

    #[test]
    fn private_files_are_replaced_whole_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/state");
        write_private(&path, b"one").unwrap();
        write_private(&path, b"two").unwrap();
        assert_eq!(read(&path).unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(path.parent().unwrap()).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    #[expect(clippy::print_stderr, reason = "a test that is skipped says why")]
    fn what_root_makes_belongs_to_the_owner_of_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        if let Err(error) = chown(dir.path(), Some(1), Some(1)) {
            eprintln!("skipped: needs a root that can give files away ({error})");
            return;
        }
        let path = dir.path().join("new/state");
        write_private(&path, b"one").unwrap();
        create_private(&dir.path().join("key"), b"one").unwrap();
        for made in [path.as_path(), parent(&path), &dir.path().join("key")] {
            let owner = fs::metadata(made).unwrap();
            assert_eq!((owner.uid(), owner.gid()), (1, 1), "{}", made.display());
        }
    }

    #[test]
    fn symbolic_links_are_not_followed() {
        let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let target = elsewhere.path().join("secret");
        fs::write(&target, "theirs").unwrap();
        // Who is not root has nothing to give away; the contents are looked at all the same.
        let _ = chown(dir.path(), Some(1), Some(1));
        let before = fs::metadata(&target).unwrap();
        let path = dir.path().join("state");
        symlink(&target, path.with_extension(format!("tmp-{}", std::process::id()))).unwrap();
        write_private(&path, b"ours").unwrap();
        assert_eq!(read(&path).unwrap(), b"ours");
        assert!(!path.is_symlink());

        symlink(&target, dir.path().join("lock")).unwrap();
        let error = lock(dir.path()).unwrap_err().to_string();
        assert!(error.contains("symbolic link"), "{error}");
        adopt(&dir.path().join("lock")).unwrap();

        let after = fs::metadata(&target).unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"theirs");
        assert_eq!((after.uid(), after.gid(), after.mode()), (before.uid(), before.gid(), before.mode()));
    }

    #[test]
    fn created_files_never_replace() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        create_private(&path, b"one").unwrap();
        assert!(create_private(&path, b"two").unwrap_err().to_string().contains("cannot create"));
        assert_eq!(read(&path).unwrap(), b"one");
    }
}
