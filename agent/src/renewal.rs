//! Renewal: the next certificate, with a new key, for a device that has one.

use muster_common::{
    grpc,
    identity::Party,
    time::Timestamp,
    tls::{Credentials, KeyPair, TlsError, certificate_validity, certificates_from_pem},
};
use muster_enrollment::{Identity as _, KeyError, certificate_request, new_tls_key, pem};
use muster_proto::registration::{RenewRequest, registration_service_client::RegistrationServiceClient};
use tonic::transport::Channel;
use zeroize::Zeroizing;

use crate::{control::Validity, state::Identity};

/// Why a certificate could not be renewed.
#[derive(Debug, thiserror::Error)]
pub enum RenewalError {
    /// No key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The registrar did not answer, or said no.
    #[error("{0}")]
    Call(String),
    /// What it answered cannot be used.
    #[error("cannot use the new certificate: {0}")]
    Tls(#[from] TlsError),
    /// It is for somebody else.
    #[error("cannot use the new certificate: it is for {0}")]
    Party(Party),
    /// It is not valid at this host's time.
    #[error(
        "cannot use the new certificate: it is valid from {0} to {1}, but it is {2} by this host's clock"
    )]
    Clock(Timestamp, Timestamp, Timestamp),
}

/// A new certificate, checked.
#[derive(Debug)]
pub struct Renewed {
    chain: Vec<Vec<u8>>,
    roots: Vec<Vec<u8>>,
    tls_key: Zeroizing<String>,
}

/// Asks for the next certificate of `device_uid`.
pub async fn renew(channel: Channel, device_uid: &str) -> Result<Renewed, RenewalError> {
    let tls_key = new_tls_key()?;
    let request = RenewRequest { certificate_request: certificate_request(&tls_key)? };
    let answer = RegistrationServiceClient::new(channel)
        .renew(request)
        .await
        .map_err(|status| RenewalError::Call(grpc::words(&status)))?
        .into_inner();
    let renewed = Renewed { chain: answer.certificate_chain, roots: answer.roots, tls_key };
    let (pair, validity) = renewed.checked()?;
    match pair.identity()?.party {
        Party::Device { uid, .. } if uid.as_str() == device_uid => {}
        other => return Err(RenewalError::Party(other)),
    }
    let now = Timestamp::now();
    if now < validity.not_before || now > validity.not_after {
        return Err(RenewalError::Clock(validity.not_before, validity.not_after, now));
    }
    Ok(renewed)
}

impl Renewed {
    /// `identity` with the new certificate, key and roots.
    pub fn apply(&self, identity: &Identity) -> Identity {
        let mut identity = identity.clone();
        identity.set_key_pair(&self.chain, &self.tls_key);
        if !self.roots.is_empty() {
            identity.roots = pem(&self.roots);
        }
        identity
    }

    /// Key pair and validity; an error if key, certificate and roots do not belong together.
    fn checked(&self) -> Result<(KeyPair, Validity), RenewalError> {
        let text = Zeroizing::new(format!("{}{}", pem(&self.chain), self.tls_key.as_str()));
        let pair = KeyPair::from_pem("the new certificate", text.as_bytes())?;
        let validity = validity(&pair)?;
        let roots = if self.roots.is_empty() { &self.chain } else { &self.roots };
        Credentials::new(&pair, &certificates_from_pem("the roots", pem(roots).as_bytes())?)?;
        Ok((pair, validity))
    }
}

/// The validity of a device's certificate.
pub fn validity(pair: &KeyPair) -> Result<Validity, TlsError> {
    let own = pair.chain.first().ok_or_else(|| TlsError::Certificate("the chain is empty".into()))?;
    let (not_before, not_after) = certificate_validity(own)?;
    Ok(Validity { not_before, not_after })
}
