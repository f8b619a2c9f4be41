//! Reads a backup from octets as they come, and believes nothing of what they say: lengths are bounded before anything
//! is kept, and the end is told only if all that came before is as it was written.

use bytes::{Buf as _, Bytes, BytesMut};
use muster_proto::storage::BackupHeader;
use prost::Message as _;

use super::{
    BODY_MAX, FILES_MAX, FormatError, Hasher, Item, Kind, MAGIC, SMALL_MAX, TRAILER, Tally, VERSION, ca_file,
};
use crate::{
    ca,
    store::{MAX_KEY, MAX_TXN_BYTES},
};

/// Kind and length.
const HEAD: usize = 5;

/// Reads a backup: [`feed`](Self::feed) it, and take what it makes of that.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: BytesMut,
    /// Of all that has been read.
    hasher: Hasher,
    tally: Tally,
    /// The kind of the last frame; `None` before the header.
    last: Option<Kind>,
    has_magic: bool,
    last_key: Bytes,
    files: usize,
}

impl Decoder {
    /// Adds what comes next in the file.
    pub fn feed(&mut self, octets: &[u8]) {
        self.buffer.extend_from_slice(octets);
    }

    /// The next item; `None` if more has to be fed for it, or, after the end, if nothing follows.
    ///
    /// # Errors
    /// See [`FormatError`].
    pub fn item(&mut self) -> Result<Option<Item>, FormatError> {
        if !self.has_magic {
            let known = self.buffer.len().min(MAGIC.len());
            if self.buffer[..known] != MAGIC[..known] {
                return Err(FormatError::Foreign);
            }
            if self.buffer.len() < MAGIC.len() + 4 {
                return Ok(None);
            }
            let mut head = self.take(MAGIC.len() + 4);
            head.advance(MAGIC.len());
            match head.get_u32() {
                VERSION => self.has_magic = true,
                newer if newer > VERSION => return Err(FormatError::Newer(newer)),
                _ => return Err(FormatError::Damaged("its version is 0")),
            }
        }
        if self.last == Some(Kind::Trailer) {
            let rest = self.buffer.is_empty();
            return if rest { Ok(None) } else { Err(FormatError::Damaged("something follows its end")) };
        }
        let Some(mut head) = self.buffer.get(..HEAD) else { return Ok(None) };
        let (kind, length) = (self.check_kind(head.get_u8())?, head.get_u32() as usize);
        let allowed = match kind {
            Kind::Header | Kind::CaFile => length <= SMALL_MAX,
            Kind::Key => length <= BODY_MAX,
            Kind::Trailer => length == TRAILER,
        };
        if !allowed {
            return Err(FormatError::Damaged("a length is out of bounds"));
        }
        if self.buffer.len() < HEAD + length {
            return Ok(None);
        }
        self.last = Some(kind);
        if kind == Kind::Trailer {
            return self.end().map(Some);
        }
        let body = self.take(HEAD + length).slice(HEAD..);
        match kind {
            Kind::Header => BackupHeader::decode(body)
                .map(|header| Some(Item::Header(header)))
                .map_err(|_| FormatError::Damaged("its header cannot be read")),
            Kind::CaFile => self.file(body).map(Some),
            Kind::Key | Kind::Trailer => self.key(body).map(Some),
        }
    }

    /// Says that the file has ended.
    ///
    /// # Errors
    /// [`FormatError::Truncated`] if the backup has not.
    pub fn finish(&self) -> Result<(), FormatError> {
        match self.last {
            Some(Kind::Trailer) => Ok(()),
            None if !self.has_magic && self.buffer.is_empty() => Err(FormatError::Foreign),
            _ => Err(FormatError::Truncated),
        }
    }

    /// The header comes once and first, then files, then keys.
    fn check_kind(&self, kind: u8) -> Result<Kind, FormatError> {
        let kind = match kind {
            1 => Kind::Header,
            2 => Kind::CaFile,
            3 => Kind::Key,
            4 => Kind::Trailer,
            _ => return Err(FormatError::Damaged("a part of it is of no known kind")),
        };
        let fits = match self.last {
            None => kind == Kind::Header,
            Some(last) => kind != Kind::Header && kind >= last,
        };
        if fits { Ok(kind) } else { Err(FormatError::Damaged("its parts are out of order")) }
    }

    fn file(&mut self, body: Bytes) -> Result<Item, FormatError> {
        let (name, contents) = split(&body)?;
        self.files += 1;
        let name = std::str::from_utf8(&name).ok().filter(|name| ca::is_file_name(name));
        let name = name.ok_or(FormatError::Damaged("a file in it is none of a CA's"))?;
        if self.files > FILES_MAX {
            return Err(FormatError::Damaged("it has too many files of a CA"));
        }
        Ok(Item::CaFile(ca_file(name, &contents)))
    }

    fn key(&mut self, body: Bytes) -> Result<Item, FormatError> {
        let (key, value) = split(&body)?;
        if key.len() > MAX_KEY || value.len() > MAX_TXN_BYTES {
            return Err(FormatError::Damaged("a key or value is too large"));
        }
        if key <= self.last_key {
            return Err(FormatError::Damaged("its keys are out of order"));
        }
        self.tally.add(&key, &value);
        self.last_key = key.clone();
        Ok(Item::Key { key, value })
    }

    fn end(&mut self) -> Result<Item, FormatError> {
        let mut count = self.take(HEAD + 8).slice(HEAD..);
        let tally = std::mem::take(&mut self.tally);
        let digest = std::mem::take(&mut self.hasher).finish();
        if self.buffer.split_to(TRAILER - 8) != digest[..] {
            return Err(FormatError::Damaged("its checksum does not fit its contents"));
        }
        if count.get_u64() != tally.keys() {
            return Err(FormatError::Damaged("it has not as many keys as it says"));
        }
        Ok(Item::End(tally.summary()))
    }

    /// Takes as much from the buffer, which holds it, into the digest.
    fn take(&mut self, length: usize) -> Bytes {
        let taken = self.buffer.split_to(length).freeze();
        self.hasher.update(&taken);
        taken
    }
}

/// A name or key, and what belongs to it.
fn split(body: &Bytes) -> Result<(Bytes, Bytes), FormatError> {
    let wrong = FormatError::Damaged("a length is out of bounds");
    let Some(mut length) = body.get(..2) else { return Err(wrong) };
    let end = 2 + usize::from(length.get_u16());
    if end > body.len() { Err(wrong) } else { Ok((body.slice(2..end), body.slice(end..))) }
}
