//! Seals what only the holder of another secret may read: AES-256-GCM under a key that HKDF-SHA256 derives from that
//! secret, for one purpose. Pure, but for the random nonce.

use aws_lc_rs::{
    aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    error::Unspecified,
    hkdf::{HKDF_SHA256, Salt},
};
use zeroize::Zeroizing;

/// The first octet of whatever is sealed: the version of this format.
const VERSION: u8 = 1;

/// What was to be opened was sealed under another key or for another purpose, or is damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it does not open: it was sealed with another secret, or is damaged")]
pub struct SealError;

impl From<Unspecified> for SealError {
    fn from(_: Unspecified) -> Self {
        Self
    }
}

/// 32 octets that only holders of `secret` know, for `purpose` and what it is about.
///
/// # Errors
/// None in practice: the primitive is total for 32 octets.
pub fn derive(secret: &[u8], purpose: &str, about: &[&[u8]]) -> Result<Zeroizing<[u8; 32]>, SealError> {
    let key = Salt::new(HKDF_SHA256, purpose.as_bytes()).extract(secret);
    let mut derived = Zeroizing::new([0; 32]);
    key.expand(about, HKDF_SHA256)?.fill(&mut derived[..])?;
    Ok(derived)
}

/// Seals `plain` under `key`; it opens only together with the same `context`, which is not kept in it.
///
/// # Errors
/// None in practice: only more than 64 GiB cannot be sealed.
pub fn seal(key: &[u8; 32], context: &[u8], plain: &[u8]) -> Result<Vec<u8>, SealError> {
    let nonce: [u8; NONCE_LEN] = rand::random();
    let mut body = plain.to_vec();
    cipher(key)?.seal_in_place_append_tag(
        Nonce::assume_unique_for_key(nonce),
        Aad::from(context),
        &mut body,
    )?;
    let mut sealed = Vec::with_capacity(1 + NONCE_LEN + body.len());
    sealed.push(VERSION);
    sealed.extend_from_slice(&nonce);
    sealed.extend_from_slice(&body);
    Ok(sealed)
}

/// Opens what [`seal`] has made.
///
/// # Errors
/// [`SealError`], whatever is wrong with it.
pub fn open(key: &[u8; 32], context: &[u8], sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, SealError> {
    let Some((&VERSION, rest)) = sealed.split_first() else { return Err(SealError) };
    let (nonce, body) = rest.split_at_checked(NONCE_LEN).ok_or(SealError)?;
    let mut plain = Zeroizing::new(body.to_vec());
    let nonce = Nonce::try_assume_unique_for_key(nonce)?;
    let length = cipher(key)?.open_in_place(nonce, Aad::from(context), &mut plain)?.len();
    plain.truncate(length);
    Ok(plain)
}

fn cipher(key: &[u8; 32]) -> Result<LessSafeKey, SealError> {
    Ok(LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key)?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn each_purpose_has_a_key_of_its_own() {
        let all = [
            derive(b"secret", "one", &[b"a"]).unwrap(),
            derive(b"secret", "two", &[b"a"]).unwrap(),
            derive(b"secret", "one", &[b"b"]).unwrap(),
            derive(b"other", "one", &[b"a"]).unwrap(),
        ];
        for (n, key) in all.iter().enumerate() {
            assert!(!all[..n].contains(key));
        }
        assert_eq!(all[0], derive(b"secret", "one", &[b"a"]).unwrap());
        // RFC 5869's HKDF-SHA256: extract with the purpose as salt, expand with what it is about.
        assert_eq!(
            derive(b"secret", "one", &[b"a", b"b"]).unwrap(),
            derive(b"secret", "one", &[b"ab"]).unwrap()
        );
    }

    #[test]
    fn the_same_sealed_twice_looks_different() {
        assert_ne!(seal(&[1; 32], b"c", b"plain").unwrap(), seal(&[1; 32], b"c", b"plain").unwrap());
    }

    proptest! {
        #[test]
        fn what_is_sealed_opens_whole_and_unchanged_or_not_at_all(
            plain in proptest::collection::vec(any::<u8>(), 0..200), at in any::<prop::sample::Index>(), bit in 0_u8..8,
        ) {
            let sealed = seal(&[1; 32], b"context", &plain).unwrap();
            prop_assert_eq!(&**open(&[1; 32], b"context", &sealed).unwrap(), &plain[..]);
            prop_assert!(open(&[2; 32], b"context", &sealed).is_err());
            prop_assert!(open(&[1; 32], b"another", &sealed).is_err());
            let mut flipped = sealed.clone();
            flipped[at.index(sealed.len())] ^= 1 << bit;
            prop_assert!(open(&[1; 32], b"context", &flipped).is_err());
            prop_assert!(open(&[1; 32], b"context", &sealed[..at.index(sealed.len())]).is_err());
        }

        #[test]
        fn any_octets_open_or_fail(octets in proptest::collection::vec(any::<u8>(), 0..80)) {
            prop_assert!(open(&[1; 32], b"", &octets).is_err());
        }
    }
}
