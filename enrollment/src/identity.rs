//! Who a party is: what identities of all kinds have in common, and the keys of a join under way.

use muster_common::tls::{KeyPair, TlsError, certificates_from_pem, certificates_to_pem};
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// What every identity has, by reference.
#[derive(Clone, Copy)]
pub struct Certified<'a> {
    /// Name of the network.
    pub network: &'a str,
    /// Assigned by the registrar.
    pub uid: &'a str,
    /// The party's name.
    pub name: &'a str,
    /// PEM, the party's own certificate first.
    pub certificate_chain: &'a str,
    /// PEM, PKCS#8.
    pub tls_key: &'a str,
    /// PEM.
    pub roots: &'a str,
}

/// Who a party is, with its secrets.
pub trait Identity: Serialize + DeserializeOwned {
    /// What all kinds have.
    fn certified(&self) -> Certified<'_>;

    /// Where certificate chain and TLS key are, to be replaced.
    fn certificate(&mut self) -> (&mut String, &mut String);

    /// Certificate and TLS key.
    ///
    /// # Errors
    /// They are not PEM.
    fn key_pair(&self) -> Result<KeyPair, TlsError> {
        let Certified { certificate_chain, tls_key, .. } = self.certified();
        let pem = Zeroizing::new(format!("{certificate_chain}{tls_key}"));
        KeyPair::from_pem("the identity's certificate and key", pem.as_bytes())
    }

    /// The roots to trust.
    ///
    /// # Errors
    /// They are not PEM.
    fn root_certificates(&self) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        certificates_from_pem("the roots", self.certified().roots.as_bytes())
    }

    /// Replaces the certificate and its key.
    fn set_key_pair(&mut self, chain: &[Vec<u8>], new_key: &str) {
        let (certificate_chain, tls_key) = self.certificate();
        tls_key.zeroize();
        *certificate_chain = pem(chain);
        new_key.clone_into(tls_key);
    }
}

/// DER certificates as PEM.
pub fn pem(certificates: &[Vec<u8>]) -> String {
    let certificates: Vec<_> =
        certificates.iter().map(|certificate| CertificateDer::from(certificate.as_slice())).collect();
    certificates_to_pem(&certificates)
}

/// The keys of a join under way, written before the registrar is asked: if the answer gets lost, the same keys are
/// used again, and the token counts once.
#[derive(Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
#[serde(deny_unknown_fields)]
pub struct Journal {
    /// Hexadecimal SHA-256 of token, name and CA hash: the keys serve this join alone.
    pub purpose: String,
    /// PEM, PKCS#8.
    pub tls_key: String,
    /// Of devices: Base64 of the Curve25519 private key.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub wireguard_key: String,
}
