//! What an invitation hands over: the CA's files, the configuration, and the files with which etcd is reached, as one
//! message that only the token opens.

use std::collections::BTreeSet;

use muster_proto::storage::InvitationBundle;
use prost::Message as _;
use zeroize::Zeroizing;

use super::InvitationToken;
use crate::{
    ca,
    seal::{self, SealError},
};

/// Version of a bundle's contents.
pub const VERSION: u32 = 1;
/// The most octets in a bundle, well below what the store takes in a transaction.
pub const OCTETS_MAX: usize = 512 * 1024;
/// What etcd's files may be called: the keys of `[store.etcd]`.
const ETCD_NAMES: [&str; 4] = ["ca_file", "cert_file", "key_file", "password_file"];

/// Why there is no bundle.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BundleError {
    /// The token does not open it.
    #[error("cannot open what the invitation holds: {0}; make another: muster-registrar invite")]
    Seal(#[from] SealError),
    /// It opens, but makes no sense.
    #[error(
        "cannot use what the invitation holds: {0}; make another (muster-registrar invite), with the same version of \
         muster-registrar on both hosts"
    )]
    Contents(String),
    /// There is too much to hand over.
    #[error(
        "the CA's files and those of etcd have {0} octets, and an invitation holds at most {OCTETS_MAX}; name smaller \
         files in [store.etcd]"
    )]
    TooLarge(usize),
}

/// Seals a bundle for the holder of `token`.
///
/// # Errors
/// [`BundleError::TooLarge`], or [`BundleError::Contents`] if it could not be used.
pub fn seal(bundle: &InvitationBundle, token: &InvitationToken) -> Result<Vec<u8>, BundleError> {
    check(bundle)?;
    let plain = Zeroizing::new(bundle.encode_to_vec());
    if plain.len() > OCTETS_MAX {
        return Err(BundleError::TooLarge(plain.len()));
    }
    Ok(seal::seal(&*token.bundle_key()?, token.id().as_str().as_bytes(), &plain)?)
}

/// Opens a bundle, and checks that what is in it can be used.
///
/// # Errors
/// [`BundleError::Seal`] if it is not for the holder of `token`, or damaged.
pub fn open(sealed: &[u8], token: &InvitationToken) -> Result<InvitationBundle, BundleError> {
    let plain = seal::open(&*token.bundle_key()?, token.id().as_str().as_bytes(), sealed)?;
    let bundle =
        InvitationBundle::decode(&plain[..]).map_err(|error| BundleError::Contents(error.to_string()))?;
    check(&bundle)?;
    Ok(bundle)
}

/// Files get no other names than the ones that they have on every registrar: nothing else is ever written over.
fn check(bundle: &InvitationBundle) -> Result<(), BundleError> {
    let wrong = |reason: String| Err(BundleError::Contents(reason));
    if bundle.version != VERSION {
        return wrong(format!("it has version {}, and this is version {VERSION}", bundle.version));
    }
    let ca = bundle.ca_files.iter().map(|file| (&file.name, ca::is_file_name(&file.name)));
    let etcd = bundle.etcd_files.iter().map(|file| (&file.name, ETCD_NAMES.contains(&&*file.name)));
    let mut seen = BTreeSet::new();
    for (name, known) in ca.chain(etcd) {
        if !known || !seen.insert(name) {
            return wrong(format!(
                "it has a file {name:?} that is not one of a registrar's, or has it twice"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use muster_proto::storage::BundleFile;
    use proptest::prelude::*;
    use rand::{SeedableRng, rngs::StdRng};

    use super::*;

    fn token(seed: u64) -> InvitationToken {
        InvitationToken::generate(&mut StdRng::seed_from_u64(seed))
    }

    fn bundle(names: &[&str]) -> InvitationBundle {
        let file = |name: &&str| BundleFile { name: (*name).to_owned(), contents: b"contents".to_vec() };
        InvitationBundle {
            version: VERSION,
            trust_domain: "net.example".into(),
            config: "[store]\nkind = \"etcd\"\n".into(),
            ca_files: names.iter().map(file).collect(),
            etcd_files: vec![BundleFile { name: "key_file".into(), contents: b"etcd".to_vec() }],
        }
    }

    #[test]
    fn only_the_token_opens_a_bundle() {
        let made = bundle(&["ca.key", "ca.crt", "roots/0123456789abcdef.crt"]);
        let sealed = seal(&made, &token(1)).unwrap();
        assert_eq!(open(&sealed, &token(1)).unwrap(), made);
        assert_eq!(open(&sealed, &token(2)), Err(BundleError::Seal(SealError)));
        assert!(!sealed.windows(8).any(|window| window == b"contents"));
    }

    #[test]
    fn no_file_gets_a_name_that_it_must_not_have() {
        for name in
            ["", "../ca.key", "/etc/passwd", "roots/../x.crt", "roots/.crt", "roots/a/b.crt", "registrar.pem"]
        {
            assert!(matches!(seal(&bundle(&[name]), &token(1)), Err(BundleError::Contents(_))), "{name}");
            let plain = bundle(&[name]).encode_to_vec();
            let key = token(1).bundle_key().unwrap();
            let sealed = seal::seal(&key, token(1).id().as_str().as_bytes(), &plain).unwrap();
            assert!(matches!(open(&sealed, &token(1)), Err(BundleError::Contents(_))), "{name}");
        }
        assert!(seal(&bundle(&["ca.key", "ca.key"]), &token(1)).is_err());
        let newer = InvitationBundle { version: VERSION + 1, ..bundle(&["ca.key"]) };
        assert!(seal(&newer, &token(1)).unwrap_err().to_string().contains("version 2"));
    }

    #[test]
    fn what_the_store_could_not_take_is_not_sealed() {
        let mut large = bundle(&["ca.key"]);
        large.etcd_files[0].contents = vec![0; OCTETS_MAX];
        assert!(matches!(seal(&large, &token(1)), Err(BundleError::TooLarge(_))));
    }

    proptest! {
        #[test]
        fn a_bundle_that_was_cut_or_changed_does_not_open(at in any::<prop::sample::Index>(), bit in 0_u8..8) {
            let sealed = seal(&bundle(&["ca.key", "ca.crt"]), &token(1)).unwrap();
            let at = at.index(sealed.len());
            prop_assert!(open(&sealed[..at], &token(1)).is_err());
            let mut flipped = sealed;
            flipped[at] ^= 1 << bit;
            prop_assert!(open(&flipped, &token(1)).is_err());
        }

        #[test]
        fn any_contents_are_bundles_or_fail(plain in proptest::collection::vec(any::<u8>(), 0..200)) {
            let key = token(1).bundle_key().unwrap();
            let sealed = seal::seal(&key, token(1).id().as_str().as_bytes(), &plain).unwrap();
            let _ = open(&sealed, &token(1));
        }
    }
}
