//! The device's keys, made on this host and never leaving it: an ECDSA P-256 key for TLS, a Curve25519 key for
//! WireGuard.

use aws_lc_rs::rand;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256};
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

/// Why keys could not be made.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The generator or the encoder failed.
    #[error("cannot make a TLS key and a certificate request for it: {0}")]
    Tls(#[from] rcgen::Error),
    /// The system's generator failed.
    #[error("cannot make a key: the system's random number generator failed")]
    Random,
}

/// A new TLS key: PKCS#8, PEM.
pub fn new_tls_key() -> Result<Zeroizing<String>, KeyError> {
    Ok(Zeroizing::new(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?.serialize_pem()))
}

/// A certificate request (PKCS#10, DER) for the key in `pem`. It asks for no name: the registrar knows who asks.
pub fn certificate_request(pem: &str) -> Result<Vec<u8>, KeyError> {
    let key = KeyPair::from_pem(pem)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    Ok(params.serialize_request(&key)?.der().to_vec())
}

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
    fn requests_name_nobody() {
        let key = new_tls_key().unwrap();
        let request = certificate_request(&key).unwrap();
        let parsed = rcgen::CertificateSigningRequestParams::from_der(&request.into()).unwrap();
        assert!(parsed.params.subject_alt_names.is_empty());
        assert_eq!(parsed.params.distinguished_name, DistinguishedName::new());
    }

    #[test]
    fn public_keys_are_those_of_wireguard() {
        // From RFC 7748, 6.1.
        let private = BASE64_STANDARD.decode("dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=").unwrap();
        let public = BASE64_STANDARD.decode("hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=").unwrap();
        assert_eq!(wireguard_public_key(&private.try_into().unwrap()).to_vec(), public);
        assert_ne!(new_wireguard_key().unwrap(), new_wireguard_key().unwrap());
    }
}
