//! Mutual TLS 1.3 between Muster's parties: certificates and roots that can be replaced while everything runs,
//! and peers known by their SPIFFE IDs, never by host names or addresses (design §3).

mod pin;
mod resume;
mod verify;

use std::{sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use rustls::{
    CertificateError, ClientConfig, RootCertStore, ServerConfig, SignatureScheme,
    client::{ResolvesClientCert, Resumption},
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject},
    server::{ClientHello, NoServerSessionStorage, ResolvesServerCert},
    sign::CertifiedKey,
    version::TLS13,
};
use x509_parser::{certificate::X509Certificate, extensions::GeneralName, prelude::FromDer};

use crate::{
    identity::{Party, SpiffeId},
    time::Timestamp,
};
pub use pin::{SpkiHash, pinned_client_config};
pub use resume::ResumingServer;

/// Which registrars, operators, devices or directors a connection may be with.
pub type Accept = Arc<dyn Fn(&Party) -> bool + Send + Sync>;

/// ALPN of gRPC.
pub const ALPN_H2: &[u8] = b"h2";
/// ALPN of DNS over TLS (RFC 7858).
pub const ALPN_DOT: &[u8] = b"dot";

/// Why credentials cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Not PEM, or nothing in it.
    #[error("cannot read {what} as PEM: {reason}; restore the file from a backup, or join again")]
    Pem {
        /// Which file or part.
        what: String,
        /// What is wrong.
        reason: String,
    },
    /// Not an X.509 certificate with one SPIFFE ID.
    #[error("cannot read the certificate: {0}")]
    Certificate(String),
    /// rustls refused key, certificate or roots.
    #[error("cannot use the credentials: {0}")]
    Rustls(#[from] rustls::Error),
    /// rustls cannot build a verifier from these roots.
    #[error("cannot use the roots: {0}")]
    Roots(String),
}

/// The one crypto provider, aws-lc-rs.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

/// A certificate chain with its private key.
#[derive(Debug)]
pub struct KeyPair {
    /// The party's own certificate first.
    pub chain: Vec<CertificateDer<'static>>,
    /// PKCS#8.
    pub key: PrivateKeyDer<'static>,
}

impl KeyPair {
    /// From PEM: certificates, own first, and one private key, in any order.
    pub fn from_pem(what: &str, pem: &[u8]) -> Result<Self, TlsError> {
        let error = |reason: String| TlsError::Pem { what: what.to_owned(), reason };
        Ok(Self {
            chain: certificates_from_pem(what, pem)?,
            key: PrivateKeyDer::from_pem_slice(pem).map_err(|e| error(e.to_string()))?,
        })
    }

    /// The identity in the party's own certificate.
    pub fn identity(&self) -> Result<SpiffeId, TlsError> {
        let own = self.chain.first().ok_or_else(|| TlsError::Certificate("the chain is empty".into()))?;
        certificate_identity(own)
    }
}

/// The certificates in `pem`; an error if there is none.
pub fn certificates_from_pem(what: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let error = |reason: String| TlsError::Pem { what: what.to_owned(), reason };
    let chain: Vec<_> =
        CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(|e| error(e.to_string()))?;
    if chain.is_empty() { Err(error("there is no certificate in it".into())) } else { Ok(chain) }
}

/// `certificates` as PEM, in their order.
pub fn certificates_to_pem(certificates: &[CertificateDer<'_>]) -> String {
    let blocks: Vec<_> =
        certificates.iter().map(|certificate| pem::Pem::new("CERTIFICATE", certificate.to_vec())).collect();
    pem::encode_many_config(&blocks, pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF))
}

/// The one SPIFFE ID in the URI subject alternative names of `certificate` (X.509-SVID, 2).
pub fn certificate_identity(certificate: &CertificateDer<'_>) -> Result<SpiffeId, TlsError> {
    let bad = |reason: &str| TlsError::Certificate(reason.to_owned());
    let (_, parsed) =
        X509Certificate::from_der(certificate).map_err(|e| TlsError::Certificate(e.to_string()))?;
    let names = parsed
        .subject_alternative_name()
        .map_err(|e| TlsError::Certificate(e.to_string()))?
        .ok_or_else(|| bad("it has no subject alternative name"))?;
    let mut uris = names.value.general_names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    match (uris.next(), uris.next()) {
        (Some(uri), None) => uri.parse().map_err(|e| TlsError::Certificate(format!("{e}"))),
        _ => Err(bad("it must have exactly one URI as subject alternative name")),
    }
}

/// The validity of `certificate`, as (not before, not after).
pub fn certificate_validity(certificate: &CertificateDer<'_>) -> Result<(Timestamp, Timestamp), TlsError> {
    let (_, parsed) =
        X509Certificate::from_der(certificate).map_err(|e| TlsError::Certificate(e.to_string()))?;
    let time = |t: x509_parser::time::ASN1Time| {
        Timestamp::from_epoch(Duration::from_secs(t.timestamp().try_into().unwrap_or(0)))
    };
    Ok((time(parsed.validity().not_before), time(parsed.validity().not_after)))
}

/// A party's certificate, key and roots, shared by all its connections. What is replaced here holds for every
/// new handshake at once, on clients and servers alike; open connections go on.
#[derive(Debug)]
pub struct Credentials {
    provider: Arc<CryptoProvider>,
    key: ArcSwap<CertifiedKey>,
    roots: ArcSwap<RootCertStore>,
    trust_domain: String,
}

impl Credentials {
    /// Credentials from a key pair, whose certificate tells the trust domain, and the roots to trust.
    pub fn new(pair: &KeyPair, roots: &[CertificateDer<'_>]) -> Result<Arc<Self>, TlsError> {
        let provider = provider();
        let trust_domain = pair.identity()?.trust_domain;
        Ok(Arc::new(Self {
            key: ArcSwap::from_pointee(certified_key(&provider, pair)?),
            roots: ArcSwap::from_pointee(root_store(roots)?),
            provider,
            trust_domain,
        }))
    }

    /// Uses another certificate and key from now on.
    pub fn replace_key(&self, pair: &KeyPair) -> Result<(), TlsError> {
        self.key.store(Arc::new(certified_key(&self.provider, pair)?));
        Ok(())
    }

    /// Trusts these roots, and no others, from now on.
    pub fn replace_roots(&self, roots: &[CertificateDer<'_>]) -> Result<(), TlsError> {
        self.roots.store(Arc::new(root_store(roots)?));
        Ok(())
    }

    /// The trust domain of the deployment.
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// For connections to parties that `accept` accepts. The name that the caller gives rustls is not looked at.
    /// Sessions are not resumed: a server shows its certificate on every connection.
    pub fn client_config(
        self: &Arc<Self>,
        accept: impl Fn(&Party) -> bool + Send + Sync + 'static,
        alpn: &[u8],
    ) -> Result<ClientConfig, TlsError> {
        let verifier = verify::Verifier::new(Arc::clone(self), accept);
        let mut config = ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(Arc::new(Resolver(Arc::clone(self))));
        config.alpn_protocols = vec![alpn.to_vec()];
        config.enable_sni = false;
        config.resumption = Resumption::disabled();
        Ok(config)
    }

    /// For connections from clients. A client may come without a certificate, and is a stranger then; one that
    /// has a certificate which does not verify is refused. Sessions are not resumed: a resumed one would bring along
    /// a certificate that was checked hours ago, against roots that may have been retired since.
    pub fn server_config(self: &Arc<Self>, alpn: &[u8]) -> Result<ServerConfig, TlsError> {
        let verifier = verify::Verifier::new(Arc::clone(self), |_| true);
        let mut config = ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_cert_resolver(Arc::new(Resolver(Arc::clone(self))));
        config.alpn_protocols = vec![alpn.to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(config)
    }
}

/// Why a TLS handshake failed, in plain words, with what to do where that is known.
pub fn explain(error: &std::io::Error) -> String {
    let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) else {
        return error.to_string();
    };
    let rustls::Error::InvalidCertificate(reason) = tls else { return tls.to_string() };
    let time = |t: &UnixTime| Timestamp::from_epoch(Duration::from_secs(t.as_secs()));
    match reason {
        CertificateError::Other(other) => other.0.to_string(),
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "the other side's certificate is not from a CA that we trust; if the CA has been replaced, join again"
                .into()
        }
        CertificateError::NotValidYetContext { time: now, not_before } => format!(
            "the other side's certificate is valid from {}, and it is {} by this host's clock; set the clock (timedatectl)",
            time(not_before),
            time(now)
        ),
        CertificateError::ExpiredContext { time: now, not_after } => format!(
            "the other side's certificate expired at {}, and it is {} by this host's clock; set the clock (timedatectl), or have the certificate renewed",
            time(not_after),
            time(now)
        ),
        other => other.to_string(),
    }
}

fn certified_key(provider: &CryptoProvider, pair: &KeyPair) -> Result<CertifiedKey, TlsError> {
    Ok(CertifiedKey::from_der(pair.chain.clone(), pair.key.clone_key(), provider)?)
}

fn root_store(roots: &[CertificateDer<'_>]) -> Result<RootCertStore, TlsError> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root.clone().into_owned())?;
    }
    if store.is_empty() { Err(TlsError::Roots("there is none".into())) } else { Ok(store) }
}

#[derive(Debug)]
struct Resolver(Arc<Credentials>);

impl ResolvesClientCert for Resolver {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.key.load_full())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.key.load_full())
    }
}
