//! `muster-registrar invite`: puts what a further registrar needs into the store, sealed for the holder of the token
//! that it prints.

use std::{fmt, io, time::Duration};

use muster_common::{config, file, file::FileError, time::Timestamp};
use muster_proto::storage::{BundleFile, InvitationBundle, StoredInvitation};
use prost::Message as _;
use serde::Serialize;

use crate::{
    ca::{self, Ca, CaError},
    config::{Advertise, Config, StoreKind},
    init,
    invitation::{
        self, InvitationToken,
        bundle::{self, BundleError, VERSION},
    },
    registry::keys,
    seal::SealError,
    serve::{self, ServeError},
    store::{Condition, KeyRange, Store, StoreError, Txn, TxnOutcome, etcd::EtcdStore},
};

/// For how long an invitation is good unless its maker says so, and at most.
pub const TTL: (Duration, Duration) = (Duration::from_secs(60 * 60), Duration::from_secs(24 * 60 * 60));

/// Why nobody was invited. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum InviteError {
    /// There can be only one registrar.
    #[error(
        "the registry is in a sqlite store, which is for one registrar; move it to an etcd first: \
         muster-registrar migrate"
    )]
    Sqlite,
    /// It would be good for too long, or not at all.
    #[error("cannot invite for this long (--ttl): use at least 1m and at most 24h")]
    Ttl,
    /// The host's address is not known.
    #[error(
        "cannot find out this host's address ({0}); set advertise.registrars in the configuration to where other hosts \
         reach this registrar"
    )]
    Address(io::Error),
    /// A file that is to be handed over.
    #[error(transparent)]
    File(#[from] FileError),
    /// The CA's files.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// They cannot be put together.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// Nothing can be derived from the token.
    #[error("cannot make a token: {0}")]
    Seal(#[from] SealError),
    /// The store cannot be used.
    #[error(transparent)]
    Deployment(#[from] Box<ServeError>),
    /// The store cannot be written.
    #[error("cannot write the invitation to the store: {0}")]
    Store(#[from] StoreError),
    /// The same id by chance.
    #[error("there is another invitation with the same id; run the command again")]
    Taken,
}

/// Who was invited, and until when.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Invitation {
    /// The whole command that the new host runs.
    pub join_command: String,
    /// When it is over, RFC 3339.
    pub expires_at: String,
    /// What may be in the way.
    pub notes: Vec<String>,
}

impl fmt::Display for Invitation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "To add a registrar, run this on its host, as root, until {}:\n", self.expires_at)?;
        writeln!(f, "  {}\n", self.join_command)?;
        writeln!(
            f,
            "It works on one host, and hands over the CA's key: whoever has it is the network. Keep it private."
        )?;
        self.notes.iter().try_for_each(|note| writeln!(f, "Note: {note}"))
    }
}

/// Invites a further registrar to the deployment of the one that `config` is of.
///
/// # Errors
/// See [`InviteError`].
pub async fn invite(config: &Config, ttl: Duration, now: Timestamp) -> Result<Invitation, InviteError> {
    if config.store.kind == StoreKind::Sqlite {
        return Err(InviteError::Sqlite);
    }
    if ttl < Duration::from_secs(60) || ttl > TTL.1 {
        return Err(InviteError::Ttl);
    }
    let store = EtcdStore::open(&config.etcd())?;
    invite_through(&store, config, ttl, now).await
}

async fn invite_through(
    store: &dyn Store,
    config: &Config,
    ttl: Duration,
    now: Timestamp,
) -> Result<Invitation, InviteError> {
    let mut advertised = config.clone();
    if advertised.advertise.registrars.is_empty() {
        init::advertise(&mut advertised, &[init::default_address().map_err(InviteError::Address)?]);
    }
    let registrar = advertised.advertise.registrars.first().map_or("", String::as_str);
    let format = serve::read_format(store, &config.place(config.store.kind)).await.map_err(Box::new)?;
    let (bundle, ca) = pack(config, format.trust_domain)?;

    let token = InvitationToken::generate(&mut rand::rng());
    let expires_at = now + ttl;
    let seconds = i64::try_from(expires_at.unix_seconds()).unwrap_or(i64::MAX);
    let stored = StoredInvitation {
        sealed_bundle: bundle::seal(&bundle, &token)?,
        proof_hash: invitation::hash(&token.proof()?[..]).to_vec(),
        expires_at: Some(pbjson_types::Timestamp { seconds, nanos: 0 }),
        nonce_hash: Vec::new(),
    };
    let key = keys::invitation(token.id().as_str());
    let txn = Txn::new().when(Condition::Absent(key.clone())).put(key, stored.encode_to_vec());
    if store.txn(txn).await? == TxnOutcome::Conflict {
        return Err(InviteError::Taken);
    }
    Ok(Invitation {
        join_command: format!(
            "muster-registrar join --registrar {registrar} --token {token} --ca-hash {}",
            ca.hash()
        ),
        expires_at: expires_at.to_string(),
        notes: notes(store, config).await?,
    })
}

/// What the new host needs, and the CA that is in it.
fn pack(config: &Config, trust_domain: String) -> Result<(InvitationBundle, Ca), InviteError> {
    let ca = Ca::load(&config.data_dir)?;
    let file = |name: String, contents: &[u8]| BundleFile { name, contents: contents.to_vec() };
    let ca_files =
        ca::read_all(&config.data_dir)?.into_iter().map(|found| file(found.name, &found.contents)).collect();

    // What is this host's alone stays here.
    let mut theirs = Config { advertise: Advertise::default(), ..config.clone() };
    theirs.data_dir = Config::default().data_dir;
    let mut etcd_files = Vec::new();
    for (name, path) in theirs.store.etcd.files_mut() {
        if !path.as_os_str().is_empty() {
            etcd_files.push(file(name.to_owned(), &file::read(path)?));
            path.clear();
        }
    }
    let config = config::print_changed(&theirs);
    Ok((InvitationBundle { version: VERSION, trust_domain, config, ca_files, etcd_files }, ca))
}

async fn notes(store: &dyn Store, config: &Config) -> Result<Vec<String>, StoreError> {
    let mut notes = Vec::new();
    let endpoints = &config.store.etcd.endpoints;
    if endpoints.iter().all(|url| ["127.", "localhost", "[::1]"].iter().any(|host| url.contains(host))) {
        notes.push(format!(
            "etcd is reached at {} here, so the new host needs a member of this etcd of its own, at the same address",
            endpoints.join(", ")
        ));
    }
    if store.range(KeyRange::prefix("registrars/"), None, 1).await?.kvs.is_empty() {
        notes.push("no registrar runs now; start this one before: muster-registrar serve".to_owned());
    }
    Ok(notes)
}

#[cfg(test)]
mod tests {
    use muster_proto::storage::Format;

    use super::*;
    use crate::{layout, store::memory::MemoryStore};

    #[tokio::test]
    async fn what_is_in_the_store_opens_with_the_token_alone() {
        let dir = tempfile::tempdir().unwrap();
        let now = Timestamp::now();
        let ca = Ca::create(dir.path(), "net.example", now).unwrap();
        let pem = dir.path().join("etcd.pem");
        std::fs::write(&pem, "certificate of etcd").unwrap();
        let mut config = Config { data_dir: dir.path().to_owned(), ..Config::default() };
        config.advertise.registrars = vec!["192.0.2.7:7500".into()];
        config.store.kind = StoreKind::Etcd;
        config.store.etcd.ca_file = pem;
        let store = MemoryStore::new();
        let error = invite_through(&store, &config, TTL.0, now).await.unwrap_err().to_string();
        assert!(error.contains("no Muster deployment"), "{error}");
        let format =
            Format { version: layout::VERSION, trust_domain: "net.example".into(), ..Format::default() };
        store.txn(Txn::new().put(keys::format(), format.encode_to_vec())).await.unwrap();

        let invited = invite_through(&store, &config, TTL.0, now).await.unwrap();
        let words: Vec<&str> = invited.join_command.split(' ').collect();
        assert_eq!(words[..4], ["muster-registrar", "join", "--registrar", "192.0.2.7:7500"]);
        assert_eq!(words[6..], ["--ca-hash", &ca.hash().to_string()]);
        assert!(invited.notes[0].contains("127.0.0.1") && invited.notes[1].contains("serve"), "{invited}");
        let token: InvitationToken = words[5].parse().unwrap();
        let kv = store.get(keys::invitation(token.id().as_str())).await.unwrap().unwrap();
        let stored = StoredInvitation::decode(kv.value.clone()).unwrap();
        let secret = words[5].split_once('.').unwrap().1;
        for leaked in [secret.as_bytes(), b"certificate of etcd", &token.proof().unwrap()[..]] {
            assert!(!kv.value.windows(leaked.len()).any(|window| window == leaked));
        }
        let opened = bundle::open(&stored.sealed_bundle, &token).unwrap();
        assert_eq!((opened.ca_files.len(), opened.etcd_files.len()), (2, 1));
        assert_eq!(opened.config, "[store]\nkind = \"etcd\"\n");
    }

    #[tokio::test]
    async fn only_what_can_have_several_registrars_invites() {
        let mut config = Config::default();
        let error = invite(&config, TTL.0, Timestamp::now()).await.unwrap_err().to_string();
        assert!(error.contains("muster-registrar migrate"), "{error}");
        config.store.kind = StoreKind::Etcd;
        for ttl in [Duration::ZERO, TTL.1 + Duration::from_secs(1)] {
            assert!(matches!(invite(&config, ttl, Timestamp::now()).await, Err(InviteError::Ttl)));
        }
    }
}
