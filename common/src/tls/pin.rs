//! The first connection of a party that has no roots yet: it knows the CA by the hash of its public key alone,
//! as `kubeadm join --discovery-token-ca-cert-hash` does, and sends nothing before that hash has matched.

use std::{fmt, str::FromStr, sync::Arc};

use aws_lc_rs::{constant_time, digest};
use rustls::{
    ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::CryptoProvider,
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::ParsedCertificate,
    version::TLS13,
};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use super::{
    ALPN_H2, TlsError, certificate_identity,
    verify::{other, refuse_tls12, schemes, signature},
};
use crate::identity::Party;

/// SHA-256 of a certificate's SubjectPublicKeyInfo, written `sha256:` and 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SpkiHash([u8; 32]);

impl SpkiHash {
    /// The hash of `certificate`'s public key.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, TlsError> {
        let (_, parsed) =
            X509Certificate::from_der(certificate).map_err(|e| TlsError::Certificate(e.to_string()))?;
        Ok(Self::of_spki(parsed.public_key().raw))
    }

    /// The hash of a DER SubjectPublicKeyInfo.
    pub fn of_spki(spki: &[u8]) -> Self {
        let mut hash = [0; 32];
        hash.copy_from_slice(digest::digest(&digest::SHA256, spki).as_ref());
        Self(hash)
    }

    /// The 32 octets of the hash.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for SpkiHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SpkiHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<[u8; 32]> for SpkiHash {
    fn from(hash: [u8; 32]) -> Self {
        Self(hash)
    }
}

/// Why a text is not a hash of a CA.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{0:?} is not a CA hash: expected sha256: and 64 hexadecimal digits, as `muster-registrar init` printed it"
)]
pub struct SpkiHashError(String);

impl FromStr for SpkiHash {
    type Err = SpkiHashError;

    fn from_str(text: &str) -> Result<Self, SpkiHashError> {
        let parse = || {
            let digits = text.strip_prefix("sha256:")?.as_bytes();
            let mut hash = [0; 32];
            if digits.len() != 64 {
                return None;
            }
            for (byte, pair) in hash.iter_mut().zip(digits.chunks_exact(2)) {
                let digit = |d: u8| char::from(d).to_digit(16);
                *byte = u8::try_from(digit(pair[0])? * 16 + digit(pair[1])?).ok()?;
            }
            Some(Self(hash))
        };
        parse().ok_or_else(|| SpkiHashError(text.chars().take(100).collect()))
    }
}

/// For a connection to a registrar whose CA has the public key `pin`: among the certificates that the registrar
/// presents there must be a CA with that key, and the registrar's own must verify against it.
pub fn pinned_client_config(pin: SpkiHash) -> Result<ClientConfig, TlsError> {
    let provider = super::provider();
    let mut config = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Pinned { pin, provider }))
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    config.enable_sni = false;
    Ok(config)
}

#[derive(Debug)]
struct Pinned {
    pin: SpkiHash,
    provider: Arc<CryptoProvider>,
}

/// The registrar presented no CA with the pinned key.
#[derive(Debug, thiserror::Error)]
#[error(
    "the CA hash does not match: none of the registrar's CA certificates has the public key {0}; check --ca-hash and --registrar against what `muster-registrar init` or `muster create token` printed: if they are right, somebody is intercepting the connection"
)]
struct WrongCa(SpkiHash);

#[derive(Debug, thiserror::Error)]
#[error("the server is not a registrar, but {0}")]
struct NotARegistrar(String);

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let mut roots = RootCertStore::empty();
        for certificate in intermediates {
            let hash = SpkiHash::of(certificate).map_err(other)?;
            if constant_time::verify_slices_are_equal(hash.as_bytes(), self.pin.as_bytes()).is_ok() {
                roots.add(certificate.clone().into_owned())?;
            }
        }
        if roots.is_empty() {
            return Err(other(WrongCa(self.pin)));
        }
        let algorithms = self.provider.signature_verification_algorithms.all;
        let parsed = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(&parsed, &roots, intermediates, now, algorithms)?;
        let identity = certificate_identity(end_entity).map_err(other)?;
        match identity.party {
            Party::Registrar { .. } => Ok(ServerCertVerified::assertion()),
            _ => Err(other(NotARegistrar(identity.to_string()))),
        }
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        refuse_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        signature(&self.provider, message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        schemes(&self.provider)
    }
}
