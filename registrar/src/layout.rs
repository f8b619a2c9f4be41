//! What a store says of itself under `meta/`: the layout that it has, and whether it is whole and in use.

use muster_proto::storage::{Format, Migrated, Restoring};
use prost::Message;

use crate::{registry::keys, store::KeyValue};

/// Version of the layout of the store.
pub const VERSION: u32 = 1;
/// There are fewer keys under `meta/` than this.
pub const KEYS_MAX: usize = 64;

/// What a store is.
#[derive(Clone, Debug, PartialEq)]
pub enum Layout {
    /// No deployment.
    None,
    /// A deployment.
    Whole(Format),
    /// A part of one, which is being put there.
    Restoring(Restoring),
    /// A deployment that is served from elsewhere.
    Migrated(Format, Migrated),
}

/// Why a store cannot be used. The texts go on from "the store at …".
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// What it says of itself cannot be read.
    #[error("is damaged ({0}); restore it from a backup")]
    Damaged(#[from] prost::DecodeError),
    /// It was made by another version.
    #[error(
        "has layout {0}, and this version of muster-registrar knows layout {VERSION}; install the version that \
         belongs to it"
    )]
    Version(u32),
}

/// What a new store for `trust_domain` says of itself, with an epoch of its own.
pub fn format(trust_domain: String) -> Format {
    Format { version: VERSION, trust_domain, epoch: rand::random_range(1..=u64::MAX) }
}

/// Makes sense of the keys under `meta/`.
///
/// # Errors
/// See [`LayoutError`].
pub fn read(meta: &[KeyValue]) -> Result<Layout, LayoutError> {
    if let Some(restoring) = find::<Restoring>(meta, &keys::restoring())? {
        return Ok(Layout::Restoring(restoring));
    }
    let Some(format) = find::<Format>(meta, &keys::format())? else { return Ok(Layout::None) };
    check_version(format.version)?;
    Ok(match find(meta, &keys::migrated())? {
        Some(migrated) => Layout::Migrated(format, migrated),
        None => Layout::Whole(format),
    })
}

/// Checks that this program knows the layout.
///
/// # Errors
/// [`LayoutError::Version`].
pub fn check_version(version: u32) -> Result<(), LayoutError> {
    if version == VERSION { Ok(()) } else { Err(LayoutError::Version(version)) }
}

fn find<M: Message + Default>(meta: &[KeyValue], key: &[u8]) -> Result<Option<M>, prost::DecodeError> {
    meta.iter().find(|kv| kv.key == key).map(|kv| M::decode(&*kv.value)).transpose()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[test]
    fn a_store_is_whole_unless_it_says_otherwise() {
        let kv = |key: Bytes, value: Vec<u8>| KeyValue {
            key,
            value: value.into(),
            create_revision: 2,
            mod_revision: 2,
        };
        let format = format("net.example".into());
        assert_ne!(format.epoch, super::format("net.example".into()).epoch);
        let whole = kv(keys::format(), format.encode_to_vec());
        let restoring = Restoring { source: "a backup".into(), ..Restoring::default() };
        let begun = kv(keys::restoring(), restoring.encode_to_vec());
        let migrated = Migrated { target: "etcd".into(), ..Migrated::default() };
        let left = kv(keys::migrated(), migrated.encode_to_vec());

        assert_eq!(read(&[]).unwrap(), Layout::None);
        assert_eq!(read(std::slice::from_ref(&whole)).unwrap(), Layout::Whole(format.clone()));
        assert_eq!(read(&[whole.clone(), begun.clone()]).unwrap(), Layout::Restoring(restoring.clone()));
        assert_eq!(read(&[begun]).unwrap(), Layout::Restoring(restoring));
        assert_eq!(read(&[whole, left]).unwrap(), Layout::Migrated(format, migrated));
        let newer = Format { version: VERSION + 1, ..Format::default() };
        let newer = read(&[kv(keys::format(), newer.encode_to_vec())]).unwrap_err();
        assert!(matches!(newer, LayoutError::Version(found) if found == VERSION + 1), "{newer}");
        let damaged = read(&[kv(keys::format(), vec![0xff])]).unwrap_err();
        assert!(matches!(damaged, LayoutError::Damaged(_)), "{damaged}");
    }
}
