//! The TLS key of a party (ECDSA P-256), made on its host and never leaving it, and the request to certify it.

use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256};
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
///
/// # Errors
/// See [`KeyError`].
pub fn new_tls_key() -> Result<Zeroizing<String>, KeyError> {
    Ok(Zeroizing::new(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?.serialize_pem()))
}

/// A certificate request (PKCS#10, DER) for the key in `pem`. It asks for no name: the registrar knows who asks.
///
/// # Errors
/// `pem` is not such a key.
pub fn certificate_request(pem: &str) -> Result<Vec<u8>, KeyError> {
    let key = KeyPair::from_pem(pem)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    Ok(params.serialize_request(&key)?.der().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_name_nobody() {
        let request = certificate_request(&new_tls_key().unwrap()).unwrap();
        let parsed = rcgen::CertificateSigningRequestParams::from_der(&request.into()).unwrap();
        assert!(parsed.params.subject_alt_names.is_empty());
        assert_eq!(parsed.params.distinguished_name, DistinguishedName::new());
        assert!(certificate_request("nonsense").is_err());
    }
}
