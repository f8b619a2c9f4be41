//! Who this device is: its identity, and the keys of a join under way.

use std::fmt;

use base64::{Engine, prelude::BASE64_STANDARD};
use muster_common::tls::{KeyPair, TlsError, certificates_from_pem};
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// Who this device is, with its secrets.
#[derive(Clone, Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// Name of the network.
    pub network: String,
    /// The network's domain.
    pub domain: String,
    /// Assigned by the registrar.
    pub device_uid: String,
    /// The device's name.
    pub name: String,
    /// The device's namespace.
    pub namespace: String,
    /// `HOST:PORT` of the registrar that the device joined through.
    pub registrar: String,
    /// PEM, the device's own certificate first.
    pub certificate_chain: String,
    /// PEM, PKCS#8.
    pub tls_key: String,
    /// PEM.
    pub roots: String,
    /// Base64 of the Curve25519 private key.
    pub wireguard_key: String,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({}/{})", self.network, self.device_uid)
    }
}

impl Identity {
    /// Certificate and TLS key.
    pub fn key_pair(&self) -> Result<KeyPair, TlsError> {
        let pem = Zeroizing::new(format!("{}{}", self.certificate_chain, self.tls_key));
        KeyPair::from_pem("the device's certificate and key", pem.as_bytes())
    }

    /// The roots to trust.
    pub fn root_certificates(&self) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        certificates_from_pem("the roots", self.roots.as_bytes())
    }

    /// The WireGuard private key; `None` if it is damaged.
    pub fn wireguard_private_key(&self) -> Option<Zeroizing<[u8; 32]>> {
        let bytes = Zeroizing::new(BASE64_STANDARD.decode(&self.wireguard_key).ok()?);
        bytes.as_slice().try_into().ok().map(Zeroizing::new)
    }

    /// Replaces the certificate and its key.
    pub fn set_key_pair(&mut self, chain: &[Vec<u8>], tls_key: &str) {
        self.tls_key.zeroize();
        self.certificate_chain = pem(chain);
        tls_key.clone_into(&mut self.tls_key);
    }
}

/// DER certificates as PEM.
pub fn pem(certificates: &[Vec<u8>]) -> String {
    let mut text = String::new();
    for certificate in certificates {
        text.push_str("-----BEGIN CERTIFICATE-----\n");
        for line in BASE64_STANDARD.encode(certificate).as_bytes().chunks(64) {
            text.push_str(&String::from_utf8_lossy(line));
            text.push('\n');
        }
        text.push_str("-----END CERTIFICATE-----\n");
    }
    text
}

/// The keys of a join under way, written before the registrar is asked: if the answer gets lost, the same keys are
/// used again, and the token counts once.
#[derive(Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
#[serde(deny_unknown_fields)]
pub struct Journal {
    /// Hexadecimal SHA-256 of token and name: the keys serve this join alone.
    pub purpose: String,
    /// PEM, PKCS#8.
    pub tls_key: String,
    /// Base64 of the Curve25519 private key.
    pub wireguard_key: String,
}
