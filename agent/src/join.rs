//! Join: turns a token into this device's certificate. The CA is pinned by its hash before anything is sent, keys are
//! made here, and they are on disk before the registrar is asked, so that a lost answer can be asked for again.

use std::{sync::Arc, time::Duration};

use aws_lc_rs::digest;
use base64::{Engine, prelude::BASE64_STANDARD};
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
use rustls::pki_types::CertificateDer;
use zeroize::Zeroize;

use crate::{
    keys::{self, KeyError},
    state::{Identity, Journal, State, StateError, hex, pem},
};

/// How long the registrar may take to issue the certificate.
const ENROLL_TIMEOUT: Duration = Duration::from_secs(30);

/// What the operator gave.
pub struct Join {
    /// `HOST:PORT`.
    pub registrar: String,
    /// As `muster create token` printed it.
    pub token: String,
    /// Of the CA.
    pub ca_hash: SpkiHash,
    /// The device's name; empty for the first label of the host's.
    pub name: String,
}

/// Why the host has not joined. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// This host's state.
    #[error(transparent)]
    State(#[from] StateError),
    /// The name that was given.
    #[error("{0}\nremedy: give another with --name")]
    Name(NameError),
    /// The host's name.
    #[error("cannot use this host's name as the device's: {0}\nremedy: give a name with --name")]
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
        "cannot use what registrar {registrar} answered: {reason}\nremedy: look into the registrar's log; are registrar and agent of the same version?"
    )]
    Answer {
        /// Its address.
        registrar: String,
        /// What is wrong.
        reason: String,
    },
    /// No keys.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// No TLS.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// Joins, and returns the identity, which is on disk by then.
pub async fn join(state: &State, join: &Join) -> Result<Identity, JoinError> {
    state.check_not_joined()?;
    let name = device_name(&join.name)?;
    let tls = Arc::new(pinned_client_config(join.ca_hash)?);
    let lock = state.lock()?;
    // Whoever had the lock before may have joined.
    state.check_not_joined()?;
    let channel = grpc::connect(&join.registrar, tls).await.map_err(JoinError::Connect)?;

    let journal = journal(state, join, &name)?;
    let request = EnrollRequest {
        token: join.token.clone(),
        certificate_request: keys::certificate_request(&journal.tls_key)?,
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
fn device_name(given: &str) -> Result<Label, JoinError> {
    if !given.is_empty() {
        return given.parse::<Label>().and_then(Label::for_device).map_err(JoinError::Name);
    }
    let uname = rustix::system::uname();
    let host = uname.nodename().to_string_lossy();
    let label = host.split('.').next().unwrap_or_default();
    label.parse::<Label>().and_then(Label::for_device).map_err(JoinError::HostName)
}

/// The keys of this join: those of an earlier attempt at the very same, or new ones, on disk.
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
    let journal = Journal {
        purpose,
        tls_key: keys::new_tls_key()?.to_string(),
        wireguard_key: BASE64_STANDARD.encode(keys::new_wireguard_key()?.as_ref()),
    };
    state.set_journal(&journal)?;
    Ok(journal)
}

/// What the registrar answered, checked.
fn identity(join: &Join, journal: &Journal, answer: EnrollResponse) -> Result<Identity, JoinError> {
    let wrong =
        |reason: &str| JoinError::Answer { registrar: join.registrar.clone(), reason: reason.to_owned() };
    let identity = Identity {
        network: answer.network,
        domain: answer.domain,
        device_uid: answer.device_uid,
        name: answer.name,
        namespace: answer.namespace,
        registrar: join.registrar.clone(),
        certificate_chain: pem(&answer.certificate_chain),
        tls_key: journal.tls_key.clone(),
        roots: pem(&answer.roots),
        wireguard_key: journal.wireguard_key.clone(),
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
        Party::Device { network, uid }
            if network.as_str() == identity.network && uid.as_str() == identity.device_uid => {}
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

    #[test]
    fn names_are_checked_before_anything_is_sent() {
        for (name, part) in [("svc", "reserved"), ("-bad-", "not a valid name"), ("a.b", "not a valid name")]
        {
            let error = device_name(name).unwrap_err().to_string();
            assert!(error.contains(part) && error.contains("--name"), "{error}");
        }
        assert_eq!(device_name("Web-1").unwrap().as_str(), "web-1");
    }

    #[test]
    fn the_same_join_uses_the_same_keys_again() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::new(directory.path());
        let join = |token: &str| Join {
            registrar: "r:1".into(),
            token: token.into(),
            ca_hash: SpkiHash::of_spki(b"ca"),
            name: String::new(),
        };
        let name: Label = "web".parse().unwrap();
        let first = journal(&state, &join("a"), &name).unwrap();
        let again = journal(&state, &join("a"), &name).unwrap();
        assert_eq!((&first.tls_key, &first.wireguard_key), (&again.tls_key, &again.wireguard_key));
        assert_ne!(journal(&state, &join("b"), &name).unwrap().tls_key, first.tls_key);
        let other: Label = "web2".parse().unwrap();
        assert_ne!(journal(&state, &join("b"), &other).unwrap().wireguard_key, first.wireguard_key);
    }

    #[tokio::test]
    async fn a_registrar_that_is_not_there_leaves_no_trace() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::new(&directory.path().join("agent"));
        let request = Join {
            registrar: "127.0.0.1:1".into(),
            token: "t".into(),
            ca_hash: SpkiHash::of_spki(b"ca"),
            name: "web".into(),
        };
        let error = join(&state, &request).await.unwrap_err().to_string();
        assert!(
            error.contains("127.0.0.1:1") && error.contains("refused") && error.contains("remedy"),
            "{error}"
        );
        assert!(state.journal().is_none());
        state.check_not_joined().unwrap();
    }
}
