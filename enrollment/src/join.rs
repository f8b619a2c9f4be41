//! Join: turns a token into a party's certificate. The CA is pinned by its hash before anything is sent, keys are made
//! here, and they are on disk before the registrar is asked, so that a lost answer can be asked for again.

use std::{sync::Arc, time::Duration};

use aws_lc_rs::digest;
use muster_common::{
    file::hex,
    grpc::{self, ChannelError},
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
    Identity as _, Journal, Party,
    keys::{self, KeyError},
    store::{StateError, Store},
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
    /// The party's name; empty for the first label of the host's.
    pub name: String,
}

/// Why the party has not joined. Nothing has changed on this host then.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// This host's state.
    #[error(transparent)]
    State(#[from] StateError),
    /// The name that was given.
    #[error("{0}\nremedy: give another with --name")]
    Name(NameError),
    /// The host's name.
    #[error("cannot use this host's name as the {kind}'s: {reason}\nremedy: give a name with --name")]
    HostName {
        /// What joins.
        kind: &'static str,
        /// Why not.
        reason: NameError,
    },
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
    /// The token was for another kind, and the registrar too old to notice.
    #[error(
        "the token let a {other} join, named {name}, not a {kind}\nremedy: make a token for {kind}s ({create_token}), and delete the {other} (muster delete {other} {name})"
    )]
    Kind {
        /// What was to join.
        kind: &'static str,
        /// What has joined.
        other: &'static str,
        /// The name that it got.
        name: String,
        /// The command that makes the right token.
        create_token: &'static str,
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
        "cannot use what registrar {registrar} answered: {reason}\nremedy: look into the registrar's log; are registrar and {program} of the same version?"
    )]
    Answer {
        /// Its address.
        registrar: String,
        /// What is wrong.
        reason: String,
        /// What joins.
        program: &'static str,
    },
    /// No keys.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// No TLS.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// Joins, and returns the identity, which is on disk by then.
///
/// # Errors
/// See [`JoinError`].
pub async fn join<P: Party>(store: &Store<P>, join: &Join) -> Result<P::Identity, JoinError> {
    store.check_not_joined()?;
    let name = name::<P>(&join.name)?;
    let tls = Arc::new(pinned_client_config(join.ca_hash)?);
    let lock = store.lock()?;
    // Whoever had the lock before may have joined.
    store.check_not_joined()?;
    let channel = grpc::connect(&join.registrar, tls).await.map_err(JoinError::Connect)?;

    let journal = journal(store, join, &name)?;
    let request = EnrollRequest {
        token: join.token.clone(),
        certificate_request: keys::certificate_request(&journal.tls_key)?,
        name: name.to_string(),
        party: P::WORDS.kind.to_owned(),
    };
    let mut client = EnrollmentServiceClient::new(channel);
    let call = client.enroll(request);
    let registrar = || join.registrar.clone();
    let answer = match tokio::time::timeout(ENROLL_TIMEOUT, Box::pin(call)).await {
        Ok(Ok(answer)) => answer.into_inner(),
        Ok(Err(status)) if grpc::is_definite(status.code()) => {
            store.remove_journal()?;
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
    let identity = identity::<P>(join, &journal, answer)?;
    store.set_identity(&identity)?;
    store.remove_journal()?;
    drop(lock);
    Ok(identity)
}

/// `given`, or the first label of the host's name.
fn name<P: Party>(given: &str) -> Result<Label, JoinError> {
    let label = |text: &str| text.parse::<Label>().and_then(P::check_name);
    if !given.is_empty() {
        return label(given).map_err(JoinError::Name);
    }
    let uname = rustix::system::uname();
    let host = uname.nodename().to_string_lossy();
    label(host.split('.').next().unwrap_or_default())
        .map_err(|reason| JoinError::HostName { kind: P::WORDS.kind, reason })
}

/// The keys of this join: those of an earlier attempt at the very same, or new ones, on disk.
fn journal<P: Party>(store: &Store<P>, join: &Join, name: &Label) -> Result<Journal, JoinError> {
    let mut context = digest::Context::new(&digest::SHA256);
    for part in [join.token.as_bytes(), b"\0", name.as_str().as_bytes(), b"\0", join.ca_hash.as_bytes()] {
        context.update(part);
    }
    let purpose = hex(context.finish().as_ref());
    if let Some(journal) = store.journal()
        && journal.purpose == purpose
    {
        return Ok(journal);
    }
    let tls_key = keys::new_tls_key()?.to_string();
    let journal = Journal { purpose, tls_key, wireguard_key: P::new_further_keys()? };
    store.set_journal(&journal)?;
    Ok(journal)
}

/// What the registrar answered, checked.
fn identity<P: Party>(
    join: &Join,
    journal: &Journal,
    answer: EnrollResponse,
) -> Result<P::Identity, JoinError> {
    let words = P::WORDS;
    let wrong = |reason: &str| JoinError::Answer {
        registrar: join.registrar.clone(),
        reason: reason.to_owned(),
        program: words.program,
    };
    let (name, someone) =
        (answer.name.clone(), !answer.device_uid.is_empty() || !answer.director_uid.is_empty());
    let identity = P::identity(&join.registrar, journal, answer);
    let own = identity.certified();
    if own.uid.is_empty() && someone {
        let (kind, other, create_token) = (words.kind, words.other, words.create_token);
        return Err(JoinError::Kind { kind, other, name, create_token });
    }
    let explain = |error: TlsError| wrong(&error.to_string());
    let mut pair = identity.key_pair().map_err(explain)?;
    let roots = identity.root_certificates().map_err(explain)?;
    // Also checks that the certificate is for our key.
    Credentials::new(&pair, &roots).map_err(explain)?;
    let pinned = |root: &CertificateDer<'_>| SpkiHash::of(root).is_ok_and(|hash| hash == join.ca_hash);
    if !roots.iter().any(pinned) {
        return Err(wrong("the CA whose hash was given is not among the roots to trust"));
    }
    let party = pair.identity().map_err(explain)?.party;
    if P::of_certificate(&party) != Some((own.network, own.uid)) {
        return Err(wrong(&format!("the certificate is for {party}")));
    }
    let certificate = pair.chain.swap_remove(0);
    let (not_before, not_after) = certificate_validity(&certificate).map_err(explain)?;
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
    use crate::tests::Relay;

    fn request(token: &str) -> Join {
        Join {
            registrar: "127.0.0.1:1".into(),
            token: token.into(),
            ca_hash: SpkiHash::of_spki(b"ca"),
            name: "relay".into(),
        }
    }

    #[test]
    fn names_are_checked_by_kind() {
        for given in ["-bad-", "a.b", &"x".repeat(64), "svc"] {
            let error = name::<Relay>(given).unwrap_err().to_string();
            assert!(error.contains("remedy: give another with --name"), "{error}");
        }
        assert_eq!(name::<Relay>("Relay-1").unwrap().as_str(), "relay-1");
    }

    #[test]
    fn the_same_join_uses_the_same_keys_again() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::<Relay>::new(directory.path());
        let name: Label = "relay".parse().unwrap();
        let keys = |journal: &Journal| (journal.tls_key.clone(), journal.wireguard_key.clone());
        let first = keys(&journal(&store, &request("a"), &name).unwrap());
        assert_eq!(keys(&journal(&store, &request("a"), &name).unwrap()), first);
        assert_ne!(keys(&journal(&store, &request("b"), &name).unwrap()).0, first.0);
        let other: Label = "relay2".parse().unwrap();
        assert_ne!(keys(&journal(&store, &request("a"), &other).unwrap()).0, first.0);
    }

    #[test]
    fn answers_are_checked() {
        let journal =
            Journal { purpose: String::new(), tls_key: String::new(), wireguard_key: String::new() };
        let answer =
            EnrollResponse { device_uid: "d-1".into(), name: "relay".into(), ..EnrollResponse::default() };
        let error = identity::<Relay>(&request("a"), &journal, answer).err().unwrap().to_string();
        assert!(
            error.contains("create token --director") && error.contains("delete device relay"),
            "{error}"
        );
        let error =
            identity::<Relay>(&request("a"), &journal, EnrollResponse::default()).err().unwrap().to_string();
        assert!(
            error.contains("PEM") && error.contains("registrar and director of the same version"),
            "{error}"
        );
    }

    #[tokio::test]
    async fn a_registrar_that_is_not_there_leaves_no_trace() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::<Relay>::new(&directory.path().join("director"));
        let error = join(&store, &request("t")).await.err().unwrap().to_string();
        assert!(
            error.contains("127.0.0.1:1") && error.contains("refused") && error.contains("remedy"),
            "{error}"
        );
        assert!(store.journal().is_none());
        store.check_not_joined().unwrap();
    }
}
