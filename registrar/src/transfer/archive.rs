//! Backups as files on disk: read piece by piece, written under another name until they are whole.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use muster_common::{
    file::{self, FileError},
    time::Timestamp,
};
use muster_proto::storage::BackupHeader;
use rustix::{
    fs::{CWD, RenameFlags, renameat_with},
    io::Errno,
};

use super::{
    TransferError,
    format::{Decoder, FormatError, Item, Summary},
    progress::Progress,
};
use crate::{ca::CaFile, registry::field};

/// How much is read, and written, at a time, in octets.
const PIECE: usize = 256 * 1024;

/// What a backup holds, apart from the keys themselves.
#[derive(Debug)]
pub struct Contents {
    /// Of what, and of when, it is.
    pub header: BackupHeader,
    /// The CA's files; none if they were left out.
    pub ca: Vec<CaFile>,
    /// The keys.
    pub summary: Summary,
}

/// When a backup was taken.
pub fn taken_at(header: &BackupHeader) -> Option<Timestamp> {
    header.taken_at.as_ref().map(field::timestamp)
}

/// A backup that is being read.
pub(super) struct Reader<'a> {
    path: &'a Path,
    file: File,
    decoder: Decoder,
    piece: Vec<u8>,
}

impl<'a> Reader<'a> {
    pub(super) fn open(path: &'a Path) -> Result<Self, TransferError> {
        let file = File::open(path).map_err(|source| FileError::new("open", path, source))?;
        Ok(Self { path, file, decoder: Decoder::default(), piece: vec![0; PIECE] })
    }

    /// The next item; `None` after the end, which comes if all was right.
    pub(super) fn next(&mut self) -> Result<Option<Item>, TransferError> {
        let path = self.path;
        let wrong = |source| TransferError::Format { path: path.to_owned(), source };
        loop {
            if let Some(item) = self.decoder.item().map_err(wrong)? {
                return Ok(Some(item));
            }
            match self.file.read(&mut self.piece) {
                Ok(0) => return self.decoder.finish().map_err(wrong).map(|()| None),
                Ok(length) => self.decoder.feed(&self.piece[..length]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(FileError::new("read", path, source).into()),
            }
        }
    }
}

/// Reads a backup to its end, and says what is in it.
///
/// # Errors
/// If it cannot be read, or is not as it was written.
pub fn verify(path: &Path, progress: &mut Progress) -> Result<Contents, TransferError> {
    let mut reader = Reader::open(path)?;
    let (mut header, mut ca, mut summary, mut keys) = (None, Vec::new(), None, 0);
    while let Some(item) = reader.next()? {
        match item {
            Item::Header(found) => header = Some(found),
            Item::CaFile(file) => ca.push(file),
            Item::Key { .. } => {
                keys += 1;
                progress.tell("verified", keys, None);
            }
            Item::End(found) => summary = Some(found),
        }
    }
    // The decoder lets nothing end without both.
    let (Some(header), Some(summary)) = (header, summary) else {
        return Err(TransferError::Format { path: path.to_owned(), source: FormatError::Truncated });
    };
    Ok(Contents { header, ca, summary })
}

/// A file, of mode 0600, that is not there under its name before it is whole. Dropped before that, it is removed.
pub(super) struct Writer<'a> {
    path: &'a Path,
    /// The other name.
    unfinished: PathBuf,
    file: File,
}

impl<'a> Writer<'a> {
    pub(super) fn create(path: &'a Path) -> Result<Self, TransferError> {
        let mut unfinished = path.as_os_str().to_owned();
        unfinished.push(format!(".unfinished-{}", std::process::id()));
        let unfinished = PathBuf::from(unfinished);
        // One that was killed and had the same process id, which in a container is usual, has left it.
        file::remove(&unfinished)?;
        let create = || OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unfinished);
        let file = create().map_err(|source| FileError::new("create", &unfinished, source))?;
        let writer = Self { path, unfinished, file };
        file::adopt(&writer.unfinished)?;
        Ok(writer)
    }

    /// Writes what is in `buffer`, if it is enough to be worth it, and empties it.
    pub(super) fn write(&mut self, buffer: &mut Vec<u8>) -> Result<(), FileError> {
        if buffer.len() < PIECE { Ok(()) } else { self.write_all(buffer) }
    }

    /// Writes what is in `buffer` and has all of it be on disk.
    pub(super) fn flush(&mut self, buffer: &mut Vec<u8>) -> Result<(), FileError> {
        self.write_all(buffer)?;
        self.file.sync_all().map_err(|source| FileError::new("sync", &self.unfinished, source))
    }

    fn write_all(&mut self, buffer: &mut Vec<u8>) -> Result<(), FileError> {
        let written = self.file.write_all(buffer);
        buffer.clear();
        written.map_err(|source| FileError::new("write", &self.unfinished, source))
    }

    /// Where it is meanwhile.
    pub(super) fn unfinished(&self) -> &Path {
        &self.unfinished
    }

    /// Gives it its name, in place of a file of that name only if `overwrite`.
    pub(super) fn finish(self, overwrite: bool) -> Result<(), TransferError> {
        let flags = if overwrite { RenameFlags::empty() } else { RenameFlags::NOREPLACE };
        let renamed = match renameat_with(CWD, &self.unfinished, CWD, self.path, flags) {
            // Not every file system can do it in one step.
            Err(Errno::INVAL) if self.path.symlink_metadata().is_ok() => Err(Errno::EXIST),
            Err(Errno::INVAL) => renameat_with(CWD, &self.unfinished, CWD, self.path, RenameFlags::empty()),
            renamed => renamed,
        };
        match renamed {
            Ok(()) => {}
            Err(Errno::EXIST) => return Err(TransferError::Exists(self.path.to_owned())),
            Err(error) => return Err(FileError::new("create", self.path, error.into()).into()),
        }
        let directory = self.path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let directory = directory.unwrap_or(Path::new("."));
        let synced = File::open(directory).and_then(|directory| directory.sync_all());
        Ok(synced.map_err(|source| FileError::new("sync", directory, source))?)
    }
}

impl Drop for Writer<'_> {
    fn drop(&mut self) {
        // Once it has its name, there is nothing left to remove.
        let _ = fs::remove_file(&self.unfinished);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_one_left_is_not_in_the_way() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("backup");
        let left = dir.path().join(format!("backup.unfinished-{}", std::process::id()));
        fs::write(&left, "an old key").unwrap();
        let mut writer = Writer::create(&path).unwrap();
        writer.flush(&mut b"new".to_vec()).unwrap();
        writer.finish(false).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert!(!left.exists());
    }
}
