//! Keys: public, private (clamped, wiped when dropped) and preshared (wiped when dropped).
//! Secrets are compared in constant time and never printed.

use std::{fmt, str::FromStr};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

/// Length of every key, in octets.
pub(crate) const KEY_LEN: usize = 32;

/// Why octets or text are no key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// The text is not base64.
    #[error("a WireGuard key is 44 characters of base64, as `wg genkey` prints it; this is not base64")]
    Base64,
    /// The length is wrong.
    #[error("a WireGuard key is 32 octets; this has {0}")]
    Length(usize),
}

/// A Curve25519 public key: who a peer is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey([u8; KEY_LEN]);

impl PublicKey {
    /// The key with these octets. Any 32 octets are a key.
    pub const fn from_bytes(bytes: [u8; KEY_LEN]) -> Self {
        Self(bytes)
    }

    /// Its octets.
    pub const fn as_bytes(&self) -> &[u8; KEY_LEN] {
        &self.0
    }
}

impl TryFrom<&[u8]> for PublicKey {
    type Error = KeyError;
    fn try_from(bytes: &[u8]) -> Result<Self, KeyError> {
        bytes.try_into().map(Self).map_err(|_| KeyError::Length(bytes.len()))
    }
}

impl FromStr for PublicKey {
    type Err = KeyError;
    fn from_str(text: &str) -> Result<Self, KeyError> {
        Self::try_from(STANDARD.decode(text.trim()).map_err(|_| KeyError::Base64)?.as_slice())
    }
}

impl fmt::Display for PublicKey {
    /// Base64, as `wg` prints it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

/// A Curve25519 private key.
#[derive(Clone)]
pub struct PrivateKey(Zeroizing<[u8; KEY_LEN]>);

impl PrivateKey {
    /// The key with these octets, clamped (RFC 7748 §5), as `wg genkey` does.
    pub fn from_bytes(mut bytes: [u8; KEY_LEN]) -> Self {
        bytes[0] &= 0b1111_1000;
        bytes[31] = (bytes[31] & 0b0111_1111) | 0b0100_0000;
        Self(Zeroizing::new(bytes))
    }

    /// Its octets: a secret.
    pub fn as_bytes(&self) -> &[u8; KEY_LEN] {
        &self.0
    }

    /// The public key that belongs to it.
    pub fn public_key(&self) -> PublicKey {
        PublicKey(x25519_dalek::PublicKey::from(&x25519_dalek::StaticSecret::from(*self.0)).to_bytes())
    }
}

impl PartialEq for PrivateKey {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&*other.0).into()
    }
}

impl Eq for PrivateKey {}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(…)")
    }
}

/// A symmetric key that both peers mix in. The default, all zeros, stands for none.
#[derive(Clone, Default)]
pub struct PresharedKey(Zeroizing<[u8; KEY_LEN]>);

impl PresharedKey {
    /// The key with these octets.
    pub fn from_bytes(bytes: [u8; KEY_LEN]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// Its octets: a secret.
    pub fn as_bytes(&self) -> &[u8; KEY_LEN] {
        &self.0
    }
}

impl PartialEq for PresharedKey {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&*other.0).into()
    }
}

impl Eq for PresharedKey {}

impl fmt::Debug for PresharedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PresharedKey(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn public_key_as_wg_pubkey_computes_it() {
        let octets = STANDARD.decode("AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eH0A=").unwrap();
        let private = PrivateKey::from_bytes(octets.try_into().unwrap());
        assert_eq!(private.as_bytes()[0], 0, "clamped");
        assert_eq!(private.public_key().to_string(), "1ldxNLbC5RXmefgWV91J53juhIGutuD6gZZMZ5R1gCg=");
    }

    #[test]
    fn text_forms() {
        let key = PublicKey::from_bytes([7; 32]);
        assert_eq!(key.to_string().parse(), Ok(key));
        assert_eq!("AAAA".parse::<PublicKey>(), Err(KeyError::Length(3)));
        assert_eq!("?".parse::<PublicKey>(), Err(KeyError::Base64));
        let secret = PrivateKey::from_bytes([9; 32]);
        assert!(!format!("{secret:?}{:?}", PresharedKey::from_bytes([9; 32])).contains('9'));
        assert_eq!(secret, PrivateKey::from_bytes([9; 32]));
        assert_ne!(secret, PrivateKey::from_bytes([16; 32]));
    }
}
