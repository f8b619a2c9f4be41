//! Join: turns a token into this director's certificate. The CA is pinned by its hash before anything is sent, and the
//! key is on disk before the registrar is asked, so that a lost answer can be asked for again.

use std::{sync::Arc, time::Duration};

use aws_lc_rs::digest;
use muster_common::{
    grpc::{self, ChannelError},
    identity::Party,
    name::{Label, NameError},
    time::Timestamp,
    tls::{Credentials, SpkiHash, TlsError, certificate_validity, pinned_client_config},
};
use muster_proto::enrollment::{
    EnrollRequest, EnrollResponse, enrollment_service_client::EnrollmentServiceClient,
};
use rcgen::{CertificateParams, DistinguishedName, PKCS_ECDSA_P256_SHA256};
use rustls::pki_types::CertificateDer;
use zeroize::{Zeroize, Zeroizing};

use crate::identity::{Identity, Journal, State, StateError, hex, pem};

/// How long the registrar may take to issue the certificate.
const ENROLL_TIMEOUT: Duration = Duration::from_secs(30);

/// What the operator gave.
pub struct Join {
    /// `HOST:PORT`.
    pub registrar: String,
    /// As `muster create token --director` printed it.
    pub token: String,
    /// Of the CA.
    pub ca_hash: SpkiHash,
    /// The director's name; empty for the first label of the host's.
    pub name: String,
}

/// Why the director has not joined. Nothing has changed on this host then.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// This host's state.
    #[error(transparent)]
    State(#[from] StateError),
    /// The name that was given.
    #[error("{0}\nremedy: give another with --name")]
    Name(NameError),
    /// The host's name.
    #[error("cannot use this host's name as the director's: {0}\nremedy: give a name with --name")]
    HostName(NameError),
    /// No connection, or one to somebody else.
    #[error("cannot join: {0}{remedy}", remedy = .0.remedy())]
    Connect(ChannelError),
    /// The registrar said no.
    #[error("registrar {registrar} refused the join: {reason}")]
    Refused {
        /// Its address.
        registrar: String,
        /// Its words.
        reason: String,
    },
    /// No answer came.
    #[error(
        "no answer from registrar {registrar}: {reason}\nremedy: run the same command again; it goes on where it stopped, and the token counts once"
    )]
    Lost {
        /// Its address.
        registrar: String,
        /// What was seen instead.
        reason: String,
    },
    /// The token is for devices.
    #[error(
        "the token let a device join, named {name}, not a director\nremedy: make a token for directors (muster create token --director), and delete the device (muster delete device {name})"
    )]
    Device {
        /// The name that the device got.
        name: String,
    },
    /// This host's clock is off.
    #[error(
        "the registrar issued a certificate that is valid from {not_before} to {not_after}, but it is {now} by this host's clock\nremedy: set the clock (timedatectl), and run the same command again"
    )]
    Clock {
        /// Beginning of the validity.
        not_before: Timestamp,
        /// Its end.
        not_after: Timestamp,
        /// The host's time.
        now: Timestamp,
    },
    /// The registrar's answer makes no sense.
    #[error(
        "cannot use what registrar {registrar} answered: {reason}\nremedy: look into the registrar's log; are registrar and director of the same version?"
    )]
    Answer {
        /// Its address.
        registrar: String,
        /// What is wrong.
        reason: String,
    },
    /// No key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// No TLS.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// Why a key could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot make a TLS key and a certificate request for it: {0}")]
pub struct KeyError(#[from] rcgen::Error);

/// A new TLS key: PKCS#8, PEM.
pub(crate) fn new_key() -> Result<Zeroizing<String>, KeyError> {
    Ok(Zeroizing::new(rcgen::KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?.serialize_pem()))
}

/// A certificate request (PKCS#10, DER) for the key in `pem`. It asks for no name: the registrar knows who asks.
pub(crate) fn certificate_request(pem: &str) -> Result<Vec<u8>, KeyError> {
    let key = rcgen::KeyPair::from_pem(pem)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    Ok(params.serialize_request(&key)?.der().to_vec())
}

/// Joins, and returns the identity, which is on disk by then.
///
/// # Errors
/// See [`JoinError`].
pub async fn join(state: &State, join: &Join) -> Result<Identity, JoinError> {
    state.check_not_joined()?;
    let name = director_name(&join.name)?;
    let tls = Arc::new(pinned_client_config(join.ca_hash)?);
    let lock = state.lock()?;
    // Whoever had the lock before may have joined.
    state.check_not_joined()?;
    let channel = grpc::connect(&join.registrar, tls).await.map_err(JoinError::Connect)?;

    let journal = journal(state, join, &name)?;
    let request = EnrollRequest {
        token: join.token.clone(),
        certificate_request: certificate_request(&journal.tls_key)?,
        name: name.to_string(),
    };
    let mut client = EnrollmentServiceClient::new(channel);
    let call = client.enroll(request);
    let registrar = || join.registrar.clone();
    let answer = match tokio::time::timeout(ENROLL_TIMEOUT, Box::pin(call)).await {
        Ok(Ok(answer)) => answer.into_inner(),
        Ok(Err(status)) if grpc::is_definite(status.code()) => {
            state.remove_journal()?;
            return Err(JoinError::Refused { registrar: registrar(), reason: status.message().to_owned() });
        }
        Ok(Err(status)) => {
            return Err(JoinError::Lost { registrar: registrar(), reason: grpc::words(&status) });
        }
        Err(_) => {
            let reason = format!("nothing came within {} s", ENROLL_TIMEOUT.as_secs());
            return Err(JoinError::Lost { registrar: registrar(), reason });
        }
    };
    let identity = identity(join, &journal, answer)?;
    state.set_identity(&identity)?;
    state.remove_journal()?;
    drop(lock);
    Ok(identity)
}

/// `given`, or the first label of the host's name.
fn director_name(given: &str) -> Result<Label, JoinError> {
    if !given.is_empty() {
        return given.parse().map_err(JoinError::Name);
    }
    let uname = rustix::system::uname();
    let host = uname.nodename().to_string_lossy();
    host.split('.').next().unwrap_or_default().parse().map_err(JoinError::HostName)
}

/// The key of this join: that of an earlier attempt at the very same, or a new one, on disk.
fn journal(state: &State, join: &Join, name: &Label) -> Result<Journal, JoinError> {
    let mut context = digest::Context::new(&digest::SHA256);
    for part in [join.token.as_bytes(), b"\0", name.as_str().as_bytes(), b"\0", join.ca_hash.as_bytes()] {
        context.update(part);
    }
    let purpose = hex(context.finish().as_ref());
    if let Some(journal) = state.journal()
        && journal.purpose == purpose
    {
        return Ok(journal);
    }
    let journal = Journal { purpose, tls_key: new_key()?.to_string() };
    state.set_journal(&journal)?;
    Ok(journal)
}

/// What the registrar answered, checked.
fn identity(join: &Join, journal: &Journal, answer: EnrollResponse) -> Result<Identity, JoinError> {
    let wrong =
        |reason: &str| JoinError::Answer { registrar: join.registrar.clone(), reason: reason.to_owned() };
    if answer.director_uid.is_empty() && !answer.device_uid.is_empty() {
        return Err(JoinError::Device { name: answer.name });
    }
    let identity = Identity {
        network: answer.network,
        director_uid: answer.director_uid,
        name: answer.name,
        registrar: join.registrar.clone(),
        registrars: Vec::new(),
        certificate_chain: pem(&answer.certificate_chain),
        tls_key: journal.tls_key.clone(),
        roots: pem(&answer.roots),
    };
    let explain = |error: TlsError| wrong(&error.to_string());
    let mut pair = identity.key_pair().map_err(explain)?;
    let roots = identity.root_certificates().map_err(explain)?;
    // Also checks that the certificate is for our key.
    Credentials::new(&pair, &roots).map_err(explain)?;
    let pinned = |root: &CertificateDer<'_>| SpkiHash::of(root).is_ok_and(|hash| hash == join.ca_hash);
    if !roots.iter().any(pinned) {
        return Err(wrong("the CA whose hash was given is not among the roots to trust"));
    }
    match pair.identity().map_err(explain)?.party {
        Party::Director { network, uid }
            if network.as_str() == identity.network && uid.as_str() == identity.director_uid => {}
        other => return Err(wrong(&format!("the certificate is for {other}"))),
    }
    let own = pair.chain.swap_remove(0);
    let (not_before, not_after) = certificate_validity(&own).map_err(explain)?;
    let now = Timestamp::now();
    pair.key.zeroize();
    if now < not_before || now > not_after {
        return Err(JoinError::Clock { not_before, not_after, now });
    }
    Ok(identity)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(token: &str) -> Join {
        Join {
            registrar: "127.0.0.1:1".into(),
            token: token.into(),
            ca_hash: SpkiHash::of_spki(b"ca"),
            name: "relay".into(),
        }
    }

    #[test]
    fn names_are_checked_before_anything_is_sent() {
        for name in ["-bad-", "a.b", &"x".repeat(64)] {
            let error = director_name(name).unwrap_err().to_string();
            assert!(error.contains("not a valid name") && error.contains("--name"), "{error}");
        }
        assert_eq!(director_name("Relay-1").unwrap().as_str(), "relay-1");
    }

    #[test]
    fn requests_name_nobody() {
        let request = certificate_request(&new_key().unwrap()).unwrap();
        let parsed = rcgen::CertificateSigningRequestParams::from_der(&request.into()).unwrap();
        assert!(parsed.params.subject_alt_names.is_empty());
        assert_eq!(parsed.params.distinguished_name, DistinguishedName::new());
    }

    #[test]
    fn the_same_join_uses_the_same_key_again() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::new(directory.path());
        let name: Label = "relay".parse().unwrap();
        let first = journal(&state, &request("a"), &name).unwrap();
        assert_eq!(journal(&state, &request("a"), &name).unwrap().tls_key, first.tls_key);
        assert_ne!(journal(&state, &request("b"), &name).unwrap().tls_key, first.tls_key);
    }

    #[test]
    fn a_device_is_no_director() {
        let journal = Journal { purpose: String::new(), tls_key: String::new() };
        let answer =
            EnrollResponse { device_uid: "d-1".into(), name: "relay".into(), ..EnrollResponse::default() };
        let error = identity(&request("a"), &journal, answer).unwrap_err().to_string();
        assert!(error.contains("--director") && error.contains("delete device relay"), "{error}");
        let error = identity(&request("a"), &journal, EnrollResponse::default()).unwrap_err().to_string();
        assert!(error.contains("PEM") && error.contains("remedy"), "{error}");
    }

    #[tokio::test]
    async fn a_registrar_that_is_not_there_leaves_no_trace() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::new(&directory.path().join("director"));
        let error = join(&state, &request("t")).await.unwrap_err().to_string();
        assert!(
            error.contains("127.0.0.1:1") && error.contains("refused") && error.contains("remedy"),
            "{error}"
        );
        assert!(state.journal().is_none());
        state.check_not_joined().unwrap();
    }
}
