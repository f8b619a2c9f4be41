//! The cache's answers for names of the network, as octets that survive a restart without a registrar: a header,
//! the domain, the answers, and a SHA-256 of all that, so that a damaged file is never believed.

use std::{sync::Arc, time::Duration};

use aws_lc_rs::{constant_time, digest};
use hickory_proto::rr::{Name, RecordType};
use muster_common::{
    name::Domain,
    time::{Instant, Timestamp},
};

use super::{
    cache::{Cache, Saved},
    key::Key,
    stored::Stored,
};

/// Marks the format and its version.
const MAGIC: &[u8; 8] = b"MUSTRDN1";
/// Octets of the digest at the end.
const DIGEST: usize = 32;
/// Marks an answer with checking disabled, and an outdated one.
const CHECKING_DISABLED: u8 = 1;
const OUTDATED: u8 = 2;
/// Largest snapshot, in octets.
const SNAPSHOT_MAX: usize = 4 << 20;

/// Why a snapshot was not taken up. The resolver works on without it.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SnapshotError {
    /// Not a snapshot, or a damaged one.
    #[error("cannot take up the saved names: {0}; delete the file, names will be asked for again")]
    Damaged(&'static str),
    /// Of another network.
    #[error("cannot take up the saved names: they are of the network {found}, not {expected}")]
    OtherNetwork {
        /// The domain in the snapshot.
        found: String,
        /// The domain of this agent.
        expected: Domain,
    },
}

/// Saves what `cache` holds of the network `domain`, the most recently used first, as far as there is room.
pub(super) fn save(cache: &Cache, domain: &Domain, now: Instant, clock: Timestamp) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    field(&mut out, domain.as_str().as_bytes());
    for (key, Saved { stored, stale_until, outdated }) in cache.network_entries() {
        let name = key.name().to_ascii();
        let size = 16 + name.len() + stored.wire().len();
        if out.len() + size + DIGEST > SNAPSHOT_MAX {
            break;
        }
        let until = (clock + (stale_until - now)).unix_seconds();
        out.extend_from_slice(&until.to_be_bytes());
        out.extend_from_slice(&u16::from(key.record_type()).to_be_bytes());
        let flag = |set, flag| if set { flag } else { 0 };
        let flags = flag(key.checking_disabled(), CHECKING_DISABLED) | flag(outdated, OUTDATED);
        out.extend_from_slice(&[u8::from(key.dnssec_ok()), flags]);
        field(&mut out, name.as_bytes());
        field(&mut out, stored.wire());
    }
    let sum = digest::digest(&digest::SHA256, &out);
    out.extend_from_slice(sum.as_ref());
    out
}

/// Puts what `snapshot` holds into `cache`, all of it stale, and tells how many answers that were. On an error
/// nothing has been put there.
pub(super) fn restore(
    snapshot: &[u8],
    cache: &mut Cache,
    domain: &Domain,
    now: Instant,
    clock: Timestamp,
) -> Result<usize, SnapshotError> {
    let damaged = SnapshotError::Damaged;
    if snapshot.len() > SNAPSHOT_MAX {
        return Err(damaged("they are larger than any that is ever saved"));
    }
    let (content, sum) = snapshot.split_last_chunk::<DIGEST>().ok_or(damaged("they are cut short"))?;
    let expected = digest::digest(&digest::SHA256, content);
    if constant_time::verify_slices_are_equal(expected.as_ref(), sum).is_err() {
        return Err(damaged("their checksum does not match"));
    }
    let mut reader = Reader(content);
    if reader.take(MAGIC.len()) != Some(MAGIC) {
        return Err(damaged("they are in a format of another version"));
    }
    let found =
        reader.field().and_then(|f| std::str::from_utf8(f).ok()).ok_or(damaged("there is no domain"))?;
    if found != domain.as_str() {
        return Err(SnapshotError::OtherNetwork { found: found.to_owned(), expected: domain.clone() });
    }
    let mut entries = Vec::new();
    while !reader.0.is_empty() {
        let (key, outdated, wire, until) = reader.entry().ok_or(damaged("an answer is cut short"))?;
        let stored = Stored::restore(wire.into()).map_err(|_| damaged("an answer cannot be read"))?;
        let left = Timestamp::from_epoch(Duration::from_secs(until)).saturating_duration_since(clock);
        // The clock may have been set since; no answer is held longer than it might have been.
        let left = left.min(cache.network_stale());
        if !left.is_zero() {
            entries.push((key, Saved { stored: Arc::new(stored), stale_until: now + left, outdated }));
        }
    }
    let restored = entries.len();
    // The most recently used last, as the cache has them.
    for (key, saved) in entries.into_iter().rev() {
        cache.restore(key, saved, now);
    }
    Ok(restored)
}

/// Octets behind their length.
fn field(out: &mut Vec<u8>, octets: &[u8]) {
    let length = u16::try_from(octets.len()).unwrap_or(0);
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(octets.get(..usize::from(length)).unwrap_or_default());
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, octets: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(octets)?;
        self.0 = rest;
        Some(taken)
    }

    fn field(&mut self) -> Option<&'a [u8]> {
        let (length, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        self.take(usize::from(u16::from_be_bytes(*length)))
    }

    fn entry(&mut self) -> Option<(Key, bool, &'a [u8], u64)> {
        let (until, rest) = self.0.split_first_chunk()?;
        let ([high, low, dnssec_ok, flags], rest) = rest.split_first_chunk()?;
        self.0 = rest;
        let name = std::str::from_utf8(self.field()?).ok()?;
        let name = Name::from_ascii(name).ok()?;
        let record_type = RecordType::from(u16::from_be_bytes([*high, *low]));
        let key = Key::new(&name, record_type, *dnssec_ok != 0, flags & CHECKING_DISABLED != 0);
        Some((key, flags & OUTDATED != 0, self.field()?, u64::from_be_bytes(*until)))
    }
}
