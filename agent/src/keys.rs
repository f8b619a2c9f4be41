//! The device's keys, made on this host and never leaving it: a Curve25519 key for WireGuard, beside the one for TLS
//! that every party has.

use aws_lc_rs::rand;
use muster_enrollment::KeyError;
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

/// A new WireGuard private key.
pub fn new_wireguard_key() -> Result<Zeroizing<[u8; 32]>, KeyError> {
    let mut key = Zeroizing::new([0; 32]);
    rand::fill(key.as_mut()).map_err(|_| KeyError::Random)?;
    Ok(key)
}

/// The public key of a WireGuard private key.
pub fn wireguard_public_key(private: &[u8; 32]) -> [u8; 32] {
    PublicKey::from(&StaticSecret::from(*private)).to_bytes()
}

/// Octets from the system's generator, to seed what is random in the cores.
pub fn seed<const N: usize>() -> Result<[u8; N], KeyError> {
    let mut seed = [0; N];
    rand::fill(&mut seed).map_err(|_| KeyError::Random)?;
    Ok(seed)
}

#[cfg(test)]
mod tests {
    use base64::{Engine, prelude::BASE64_STANDARD};

    use super::*;

    #[test]
    fn public_keys_are_those_of_wireguard() {
        // From RFC 7748, 6.1.
        let private = BASE64_STANDARD.decode("dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=").unwrap();
        let public = BASE64_STANDARD.decode("hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=").unwrap();
        assert_eq!(wireguard_public_key(&private.try_into().unwrap()).to_vec(), public);
        assert_ne!(new_wireguard_key().unwrap(), new_wireguard_key().unwrap());
    }
}
