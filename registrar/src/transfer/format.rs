//! The file that a backup is: a header, the CA's files, the store's keys in order, and a trailer by which truncation and
//! any changed bit are noticed. It knows nothing of stores. [`Encoder`] and [`Decoder`] work on octets in memory.
//!
//! ```text
//! file    = "MUSTERBK" version:u32 frame*             numbers are big-endian
//! frame   = kind:u8 length:u32 body                   in the order of the kinds
//!   1  header    storage.BackupHeader
//!   2  CA file   length of the name:u16 name contents
//!   3  key       length of the key:u16 key value      keys ascending
//!   4  trailer   number of keys:u64 SHA-256 of all that comes before it
//! ```

mod decode;

use aws_lc_rs::digest::{Context, SHA256, SHA256_OUTPUT_LEN};
use bytes::Bytes;
use muster_proto::storage::BackupHeader;
use prost::Message as _;
use zeroize::Zeroizing;

pub use self::decode::Decoder;
use crate::{
    ca::CaFile,
    store::{MAX_KEY, MAX_TXN_BYTES},
};

const MAGIC: &[u8; 8] = b"MUSTERBK";
/// Version of the file's format.
pub const VERSION: u32 = 1;
/// The most that a header, and one of the CA's files, may have, in octets.
const SMALL_MAX: usize = 64 * 1024;
/// The most that a frame may have, in octets.
const BODY_MAX: usize = 2 + MAX_KEY + MAX_TXN_BYTES;
/// The most files of the CA.
const FILES_MAX: usize = 256;
/// The number of keys, and the digest.
const TRAILER: usize = 8 + SHA256_OUTPUT_LEN;

/// What a frame holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Header = 1,
    CaFile = 2,
    Key = 3,
    Trailer = 4,
}

/// Why a file is not a backup that can be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// It is something else.
    #[error("it is not a backup of a Muster registrar")]
    Foreign,
    /// A newer version has written it.
    #[error("it has format {0}, and this version knows formats up to {VERSION}; install the newer version")]
    Newer(u32),
    /// Its end is missing.
    #[error("its end is missing; use another copy of it")]
    Truncated,
    /// It is not what was written.
    #[error("it is damaged ({0}); use another copy of it")]
    Damaged(&'static str),
}

/// How many keys there are, and SHA-256 over them and their values: the same for the same contents of a store,
/// whichever store that is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// The number of keys.
    pub keys: u64,
    /// The digest.
    pub digest: [u8; SHA256_OUTPUT_LEN],
}

/// SHA-256 of what it is fed.
struct Hasher(Context);

impl Default for Hasher {
    fn default() -> Self {
        Self(Context::new(&SHA256))
    }
}

impl std::fmt::Debug for Hasher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hasher").finish_non_exhaustive()
    }
}

impl Hasher {
    fn update(&mut self, octets: &[u8]) {
        self.0.update(octets);
    }

    fn finish(self) -> [u8; SHA256_OUTPUT_LEN] {
        let mut digest = [0; SHA256_OUTPUT_LEN];
        digest.copy_from_slice(self.0.finish().as_ref());
        digest
    }
}

/// Counts and digests keys, which must come in order.
#[derive(Debug, Default)]
pub struct Tally {
    keys: u64,
    hasher: Hasher,
}

impl Tally {
    /// Adds a key.
    pub fn add(&mut self, key: &[u8], value: &[u8]) {
        self.keys += 1;
        for part in [key, value] {
            self.hasher.update(&(part.len() as u64).to_be_bytes());
            self.hasher.update(part);
        }
    }

    /// How many there have been.
    pub fn keys(&self) -> u64 {
        self.keys
    }

    /// What they come to.
    pub fn summary(self) -> Summary {
        Summary { keys: self.keys, digest: self.hasher.finish() }
    }
}

/// What a backup holds, in the order in which it does.
#[derive(Debug, PartialEq)]
pub enum Item {
    /// Of what, and of when, it is.
    Header(BackupHeader),
    /// A file of the CA.
    CaFile(CaFile),
    /// A key of the store.
    Key {
        /// The key.
        key: Bytes,
        /// Its value.
        value: Bytes,
    },
    /// The end: all that came before is as it was written.
    End(Summary),
}

/// Writes a backup: each call appends to a buffer, which whoever calls empties.
#[derive(Debug)]
pub struct Encoder {
    /// Of the whole file.
    hasher: Hasher,
    tally: Tally,
}

impl Encoder {
    /// Begins a backup.
    pub fn new(header: &BackupHeader, out: &mut Vec<u8>) -> Self {
        let mut encoder = Self { hasher: Hasher::default(), tally: Tally::default() };
        encoder.write(&[MAGIC, &VERSION.to_be_bytes()], out);
        encoder.frame(Kind::Header, &[&header.encode_to_vec()], out);
        encoder
    }

    /// Adds a file of the CA.
    ///
    /// # Errors
    /// [`FormatError::Damaged`] if it is larger than any such file.
    pub fn ca_file(&mut self, file: &CaFile, out: &mut Vec<u8>) -> Result<(), FormatError> {
        if file.name.len() + file.contents.len() > SMALL_MAX - 2 {
            return Err(FormatError::Damaged("a file of the CA is too large"));
        }
        self.named(Kind::CaFile, file.name.as_bytes(), &file.contents, out);
        Ok(())
    }

    /// Adds a key, which must come after the last one, with its value.
    ///
    /// # Errors
    /// [`FormatError::Damaged`] if they are larger than any store's.
    pub fn key(&mut self, key: &[u8], value: &[u8], out: &mut Vec<u8>) -> Result<(), FormatError> {
        if key.len() > MAX_KEY || value.len() > MAX_TXN_BYTES {
            return Err(FormatError::Damaged("a key or value is too large"));
        }
        self.tally.add(key, value);
        self.named(Kind::Key, key, value, out);
        Ok(())
    }

    /// Ends the backup.
    pub fn end(mut self, out: &mut Vec<u8>) -> Summary {
        let head = [&[Kind::Trailer as u8][..], &(TRAILER as u32).to_be_bytes()].concat();
        self.write(&[&head, &self.tally.keys().to_be_bytes()], out);
        out.extend_from_slice(&self.hasher.finish());
        self.tally.summary()
    }

    fn named(&mut self, kind: Kind, name: &[u8], contents: &[u8], out: &mut Vec<u8>) {
        // Names and keys have been checked to be short.
        let length = u16::try_from(name.len()).unwrap_or(u16::MAX);
        self.frame(kind, &[&length.to_be_bytes(), name, contents], out);
    }

    fn frame(&mut self, kind: Kind, body: &[&[u8]], out: &mut Vec<u8>) {
        let length = body.iter().map(|part| part.len()).sum::<usize>();
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        self.write(&[&[kind as u8], &length.to_be_bytes()], out);
        self.write(body, out);
    }

    fn write(&mut self, parts: &[&[u8]], out: &mut Vec<u8>) {
        for part in parts {
            self.hasher.update(part);
            out.extend_from_slice(part);
        }
    }
}

fn ca_file(name: &str, contents: &[u8]) -> CaFile {
    CaFile { name: name.to_owned(), contents: Zeroizing::new(contents.to_vec()) }
}

#[cfg(test)]
mod tests;
