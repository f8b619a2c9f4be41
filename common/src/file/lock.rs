//! A directory for one process at a time: a locked file in it, with the process's number for others to read.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use rustix::fs::{FlockOperation, OFlags, flock};

use super::{FileError, create_private_dir, give};

/// Keeps other processes away from a directory until it is dropped.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "the lock lasts as long as the file is open")] File);

/// Why a directory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// The system refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// Another process has it.
    #[error("another process{} has it", owner(.0))]
    Held(String),
}

/// ` (process 123)`, or nothing if the process is not known: what [`LockError::Held`] says, for sentences.
pub fn owner(pid: &str) -> String {
    if pid.is_empty() { String::new() } else { format!(" (process {pid})") }
}

/// As [`lock`], but a `directory` that is missing is not made: what should be in it is missing as well.
///
/// # Errors
/// As [`lock`].
pub fn lock_existing(directory: &Path) -> Result<Option<Lock>, LockError> {
    directory.exists().then(|| lock(directory)).transpose()
}

/// Takes `directory` for this process; creates it if it is missing.
///
/// # Errors
/// Another process has it, or the system refuses.
pub fn lock(directory: &Path) -> Result<Lock, LockError> {
    create_private_dir(directory)?;
    let path = directory.join("lock");
    let error = |source: io::Error| FileError::new("lock", &path, source);
    let open =
        |options: &mut OpenOptions| options.custom_flags(OFlags::NOFOLLOW.bits().cast_signed()).open(&path);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let mut lock = match open(&mut options) {
        Ok(lock) => {
            // Root, who joins, may come before the service's own user.
            give(&lock, directory).map_err(error)?;
            lock
        }
        // What is there can be used also if nothing can be written.
        Err(refused) if refused.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            open(OpenOptions::new().read(true)).map_err(|_| error(refused))?
        }
        Err(refused) => return Err(error(refused).into()),
    };
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut pid = String::new();
            let _ = Read::take(&lock, 20).read_to_string(&mut pid);
            return Err(LockError::Held(pid.trim().to_owned()));
        }
        Err(errno) => return Err(error(errno.into()).into()),
    }
    // Without its number the lock is as good: a full disk must not keep a process from starting.
    let _ = lock.set_len(0).and_then(|()| writeln!(lock, "{}", std::process::id()));
    Ok(Lock(lock))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path().join("new");
        let held = lock(&directory).unwrap();
        let error = lock(&directory).unwrap_err().to_string();
        assert!(error.contains(&format!("(process {})", std::process::id())), "{error}");
        drop(held);
        lock(&directory).unwrap();
    }
}
