//! The host's resolv.conf on disk. However the agent ends, it is the old text or the new one, whole: by an exchange of
//! files, or, where the file is a mount of its own as in containers, by one write within a page. The host's own text
//! is on disk, in the backup, before anything is changed.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    net::IpAddr,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown},
    path::{Path, PathBuf},
};

use muster_common::file::{FileError, write_private};
use rustix::fs::{
    AtFlags, CWD, OFlags, RenameFlags, StatxAttributes, StatxFlags, XattrFlags, getxattr, renameat_with,
    setxattr, statx,
};

use super::resolv_conf::{self, Mark};

/// No resolv.conf is so large; what is, is none.
const SIZE_MAX: usize = 64 << 10;
/// What is written in place must fit into one page: the kernel copies a page whole, even for a process being killed.
const IN_PLACE_MAX: usize = 4096;
/// Beside the file, while it is replaced.
const TEMPORARY: &str = ".resolv.conf.muster";
/// SELinux' label of a file.
const LABEL: &str = "security.selinux";
/// Attempts to replace a file that another program is replacing, too.
const ATTEMPTS: usize = 5;

/// Why the file was not edited. It is as it was.
#[derive(Debug, thiserror::Error)]
pub enum EditError {
    /// There is none.
    #[error("there is no {0}; once there is, it will be edited")]
    Missing(PathBuf),
    /// It is written by systemd-resolved.
    #[error("{0} is a file of systemd-resolved's, which is not edited; set resolver.host = \"resolved\"")]
    Resolved(PathBuf),
    /// Too large.
    #[error("{0} is too large to be edited safely ({1} octets)")]
    Size(PathBuf, usize),
    /// Others are faster.
    #[error("other programs keep writing {0}")]
    Contended(PathBuf),
    /// The system says no.
    #[error(transparent)]
    File(#[from] FileError),
}

/// The file, and where its original is kept.
#[derive(Clone, Debug)]
pub struct ResolvConf {
    /// Usually `/etc/resolv.conf`; may be a link.
    pub path: PathBuf,
    /// Holds the host's own text while the file is edited.
    pub backup: PathBuf,
    /// Directory of systemd-resolved's files, usually `/run/systemd/resolve`.
    pub resolved: PathBuf,
}

impl ResolvConf {
    /// The file behind all links.
    pub fn target(&self) -> Result<PathBuf, EditError> {
        self.path.canonicalize().map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => EditError::Missing(self.path.clone()),
            _ => FileError::new("find", &self.path, source).into(),
        })
    }

    /// Whether the file is one of systemd-resolved's.
    pub fn is_of_resolved(&self) -> bool {
        let resolved = self.resolved.canonicalize().unwrap_or_else(|_| self.resolved.clone());
        // A link to a file that does not exist yet, as early at boot, says so itself.
        let target = self.target().ok().or_else(|| fs::read_link(&self.path).ok());
        target.is_some_and(|target| {
            target.starts_with(&resolved) || target.ends_with("systemd/resolve/stub-resolv.conf")
        })
    }

    /// What the file says.
    pub fn read(&self) -> Result<Vec<u8>, EditError> {
        read(&self.target()?)
    }

    /// The host's own text: what the file says without our edit.
    pub fn original(&self) -> Result<Vec<u8>, EditError> {
        Ok(self.original_of(&self.read()?))
    }

    fn original_of(&self, text: &[u8]) -> Vec<u8> {
        let backup = || read(&self.backup).ok().filter(|backup| resolv_conf::mark(backup) == Mark::None);
        match resolv_conf::mark(text) {
            Mark::Edited => resolv_conf::undo(text),
            Mark::Damaged => backup().unwrap_or_else(|| resolv_conf::salvage(text)),
            // Killed between the write in place of a shorter text and the cut at its end.
            Mark::None => match backup() {
                Some(backup) if padded(text, &backup) => backup,
                _ => text.to_vec(),
            },
        }
    }

    /// Keeps the host's own text in the backup, whether or not the file is to be edited.
    pub fn save(&self) -> Result<(), EditError> {
        self.keep(&self.original()?)
    }

    fn keep(&self, original: &[u8]) -> Result<(), EditError> {
        if read(&self.backup).is_ok_and(|backup| backup == original) {
            return Ok(());
        }
        Ok(write_private(&self.backup, original)?)
    }

    /// Makes `server` the only one in the file. Tells whether anything had to be changed.
    pub fn edit(&self, server: IpAddr) -> Result<bool, EditError> {
        if self.is_of_resolved() {
            return Err(EditError::Resolved(self.path.clone()));
        }
        let target = self.target()?;
        for _ in 0..ATTEMPTS {
            let old = read(&target)?;
            let original = self.original_of(&old);
            let new = resolv_conf::edit(&original, server);
            self.keep(&original)?;
            if new == old {
                return Ok(false);
            }
            if replace(&target, &old, &new)? {
                return Ok(true);
            }
        }
        Err(EditError::Contended(target))
    }

    /// Takes the edit out, if there is one, and removes the backup. Tells whether there was.
    pub fn restore(&self) -> Result<bool, EditError> {
        let target = match self.target() {
            Ok(target) => target,
            // Whoever removed the file, has removed our edit.
            Err(EditError::Missing(_)) => return self.forget().map(|()| false),
            Err(error) => return Err(error),
        };
        if !is_mount(&target) {
            // What an agent that was killed may have left.
            let _ = fs::remove_file(target.with_file_name(TEMPORARY));
        }
        for _ in 0..ATTEMPTS {
            let old = read(&target)?;
            let original = self.original_of(&old);
            if original == old {
                return self.forget().map(|()| false);
            }
            if replace(&target, &old, &original)? {
                return self.forget().map(|()| true);
            }
        }
        Err(EditError::Contended(target))
    }

    fn forget(&self) -> Result<(), EditError> {
        match fs::remove_file(&self.backup) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(FileError::new("remove", &self.backup, error).into())
            }
            _ => Ok(()),
        }
    }
}

/// Whether `text` is `backup` and empty lines.
fn padded(text: &[u8], backup: &[u8]) -> bool {
    text.strip_prefix(backup).is_some_and(|rest| !rest.is_empty() && rest.iter().all(|byte| *byte == b'\n'))
}

fn read(path: &Path) -> Result<Vec<u8>, EditError> {
    let read = || {
        let mut text = Vec::new();
        let file = File::open(path)?;
        file.take(SIZE_MAX as u64 + 1).read_to_end(&mut text)?;
        Ok(text)
    };
    let text: Vec<u8> = read().map_err(|source| FileError::new("read", path, source))?;
    if text.len() > SIZE_MAX { Err(EditError::Size(path.to_owned(), text.len())) } else { Ok(text) }
}

/// Replaces `old` by `new`; `false` if the file said something else meanwhile, which it then says still.
fn replace(path: &Path, old: &[u8], new: &[u8]) -> Result<bool, EditError> {
    let failed = |source| EditError::from(FileError::new("edit", path, source));
    if !is_mount(path) {
        match exchange(path, old, new) {
            Ok(replaced) => return Ok(replaced),
            // A directory that cannot be written may hold a file that can.
            Err(error) => {
                tracing::debug!(%error, path = %path.display(), "cannot replace the file: writing into it")
            }
        }
    }
    let length = old.len().max(new.len());
    if length > IN_PLACE_MAX {
        return Err(EditError::Size(path.to_owned(), length));
    }
    if read(path)? != old {
        return Ok(false);
    }
    let write = || {
        let file = OpenOptions::new().write(true).custom_flags(no_follow()).open(path)?;
        // Not cut to nothing first: after a kill it is one text or the other. (Who reads in the very moment of the
        // copy may see the head of one and the tail of the other.) Empty lines at the end, until they are cut off,
        // mean nothing, and the next start cuts them off.
        let mut padded = new.to_vec();
        padded.resize(length, b'\n');
        file.write_all_at(&padded, 0)?;
        file.set_len(new.len() as u64)?;
        file.sync_data()
    };
    write().map(|()| true).map_err(failed)
}

/// Whether the file is a mount of its own, which nothing can be renamed onto.
fn is_mount(path: &Path) -> bool {
    statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS).is_ok_and(|found| {
        found.stx_attributes_mask.contains(StatxAttributes::MOUNT_ROOT)
            && found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)
    })
}

fn no_follow() -> i32 {
    OFlags::NOFOLLOW.bits().cast_signed()
}

/// Puts a new file in the place of the one at `path`, with its mode, owner and label.
fn exchange(path: &Path, old: &[u8], new: &[u8]) -> io::Result<bool> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    let temporary = directory.join(TEMPORARY);
    let result = prepare(path, &temporary, new).and_then(|()| {
        if fs::read(path)? != old {
            return Ok(false);
        }
        match renameat_with(CWD, &temporary, CWD, path, RenameFlags::EXCHANGE) {
            Ok(()) => {}
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
                fs::rename(&temporary, path)?;
                File::open(directory)?.sync_all()?;
                return Ok(true);
            }
            Err(error) => return Err(error.into()),
        }
        // What another program has put there in this very moment goes back.
        if fs::read(&temporary)? != old {
            fs::rename(&temporary, path)?;
            return Ok(false);
        }
        File::open(directory)?.sync_all()?;
        Ok(true)
    });
    let _ = fs::remove_file(&temporary);
    result
}

fn prepare(path: &Path, temporary: &Path, new: &[u8]) -> io::Result<()> {
    let model = fs::metadata(path)?;
    // What an agent that was killed has left.
    let _ = fs::remove_file(temporary);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(temporary)?;
    file.write_all(new)?;
    let made = file.metadata()?;
    if (made.uid(), made.gid()) != (model.uid(), model.gid()) {
        fchown(&file, Some(model.uid()), Some(model.gid()))?;
    }
    file.set_permissions(fs::Permissions::from_mode(model.mode() & 0o7777))?;
    let mut label = [0; 256];
    if let Ok(length) = getxattr(path, LABEL, &mut label)
        && let Some(label) = label.get(..length)
    {
        // A policy that minds will say so.
        let _ = setxattr(temporary, LABEL, label, XattrFlags::empty());
    }
    file.sync_all()
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
