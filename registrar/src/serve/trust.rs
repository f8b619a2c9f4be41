//! Keeps what this registrar trusts, and what it proves itself with, up to date: the CA's files, the roots that the
//! registrars of a deployment share through the store, and the registrar's own certificate.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use muster_common::{
    identity::Party,
    time::Timestamp,
    tls::{Credentials, KeyPair, TlsError, certificate_validity},
};
use muster_proto::storage::StoredRoot;
use prost::Message as _;
use rustls::pki_types::CertificateDer;
use uuid::Uuid;

use crate::{
    ca::{CaError, SharedCa},
    config::Config,
    own_certificate,
    registry::keys::{self, Key},
    store::{Condition, KeyRange, Store, StoreError, Txn},
};

/// The most roots that are looked at.
const ROOTS_MAX: usize = 64;

/// Why something is not up to date. What was before holds on.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// The CA's files, or the registrar's certificate.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// The credentials.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The roots in the store.
    #[error("cannot read or write the roots in the store: {0}")]
    Store(#[from] StoreError),
    /// The registrar's certificate is somebody else's.
    #[error("{} is the certificate of {found}, not of a registrar; move it away: the registrar makes another", path.display())]
    NotOurs {
        /// Where it is.
        path: PathBuf,
        /// Whose it is.
        found: String,
    },
    /// CA and store do not belong together.
    #[error(
        "{} is of the trust domain {found:?}, but the store is of {expected:?}: data directory and store are of \
         different deployments; set the right ones", path.display()
    )]
    Domain {
        /// The registrar's certificate.
        path: PathBuf,
        /// Its trust domain.
        found: String,
        /// That of the store.
        expected: String,
    },
}

/// Keeps CA, roots and the registrar's own certificate up to date.
pub(super) struct Trust {
    ca: Arc<SharedCa>,
    store: Arc<dyn Store>,
    credentials: Arc<Credentials>,
    own: KeyPair,
    path: PathBuf,
    lifetime: Duration,
    trust_domain: String,
    /// When the own certificate expires, in Unix time.
    expiry: Arc<AtomicI64>,
}

impl Trust {
    /// Brings everything up to date for the first time.
    pub(super) async fn open(
        config: &Config,
        store: Arc<dyn Store>,
        trust_domain: &str,
        now: Timestamp,
    ) -> Result<Self, TrustError> {
        let ca = Arc::new(SharedCa::open(&config.data_dir)?);
        let path = config.data_dir.join(own_certificate::FILE);
        let lifetime = config.certificates.registrar_lifetime.get();
        let own = if path.exists() {
            own_certificate::load(&path)?
        } else {
            // Another registrar of the deployment, which was given the CA's files alone.
            own_certificate::issue(&path, &ca.current(), trust_domain, None, lifetime, now)?
        };
        let found = own.identity()?.trust_domain;
        if found != trust_domain {
            return Err(TrustError::Domain { path, found, expected: trust_domain.to_owned() });
        }
        let credentials = Credentials::new(&own, &ca.roots().borrow().clone())?;
        let trust_domain = trust_domain.to_owned();
        let expiry = Arc::default();
        let mut trust = Self { ca, store, credentials, own, path, lifetime, trust_domain, expiry };
        trust.refresh(now).await?;
        Ok(trust)
    }

    pub(super) fn ca(&self) -> &Arc<SharedCa> {
        &self.ca
    }

    pub(super) fn credentials(&self) -> &Arc<Credentials> {
        &self.credentials
    }

    /// The uid in the own certificate.
    pub(super) fn own_uid(&self) -> Result<Uuid, TrustError> {
        let identity = self.own.identity()?;
        let uid = match &identity.party {
            Party::Registrar { uid } => Uuid::try_parse(uid.as_str()).ok(),
            _ => None,
        };
        uid.ok_or_else(|| TrustError::NotOurs { path: self.path.clone(), found: identity.party.to_string() })
    }

    /// When the own certificate expires, in Unix time, now and later.
    pub(super) fn expiry(&self) -> Arc<AtomicI64> {
        self.expiry.clone()
    }

    /// Brings everything up to date.
    pub(super) async fn refresh(&mut self, now: Timestamp) -> Result<(), TrustError> {
        if self.ca.reload()? {
            tracing::info!(ca = %self.ca.current().hash(), "the CA has changed");
        }
        let stored = self.share_roots().await?;
        if self.ca.trust(&stored) {
            tracing::info!(roots = self.ca.roots().borrow().len(), "the roots to trust have changed");
        }
        // Every time: it costs little, and a failure before does not matter any more.
        self.credentials.replace_roots(&self.ca.roots().borrow().clone())?;

        let ca = self.ca.current();
        if own_certificate::is_due(&self.own, &ca, now)? {
            let (domain, old) = (&self.trust_domain, Some(&self.own));
            self.own = own_certificate::issue(&self.path, &ca, domain, old, self.lifetime, now)?;
            self.credentials.replace_key(&self.own)?;
            tracing::info!("renewed the registrar's own certificate");
        }
        if let Some(own) = self.own.chain.first() {
            let (_, to) = certificate_validity(own)?;
            self.expiry.store(i64::try_from(to.unix_seconds()).unwrap_or(i64::MAX), Ordering::Relaxed);
        }
        Ok(())
    }

    /// Puts the CA's roots into the store, takes its retired ones away, and returns what is there.
    async fn share_roots(&self) -> Result<Vec<CertificateDer<'static>>, TrustError> {
        let ca = self.ca.current();
        let page = self.store.range(KeyRange::prefix("roots/"), None, ROOTS_MAX).await?;
        let mut txn = Txn::new();
        let (mut stored, mut last) = (Vec::new(), 0);
        for kv in page.kvs {
            let Some(Key::Root(number)) = keys::parse(&kv.key) else { continue };
            last = last.max(number);
            let Ok(root) = StoredRoot::decode(kv.value) else { continue };
            let root = CertificateDer::from(root.certificate);
            if ca.retired().contains(&root) {
                txn = txn.when(Condition::ModRevision(kv.key.clone(), kv.mod_revision)).delete(kv.key);
            } else {
                stored.push(root);
            }
        }
        for root in ca.roots() {
            if !stored.contains(root) {
                last += 1;
                let value = StoredRoot { certificate: root.to_vec() }.encode_to_vec();
                txn = txn.when(Condition::Absent(keys::root(last))).put(keys::root(last), value);
            }
        }
        if !txn.ops.is_empty() {
            // After a conflict, another registrar was faster: the next time will do.
            self.store.txn(txn).await?;
        }
        Ok(stored)
    }
}

#[cfg(test)]
mod tests {
    use muster_common::tls::SpkiHash;

    use super::*;
    use crate::{
        ca::{Ca, rotation},
        store::memory::MemoryStore,
    };

    async fn hashes(store: &MemoryStore) -> Vec<SpkiHash> {
        let (all, _) = store.range_all(KeyRange::prefix("roots/")).await.unwrap();
        let root = |value| StoredRoot::decode(value).unwrap().certificate;
        all.into_iter().map(|kv| SpkiHash::of(&root(kv.value).into()).unwrap()).collect()
    }

    #[tokio::test]
    async fn a_rotation_reaches_the_store_the_roots_and_the_own_certificate() {
        let dir = tempfile::tempdir().unwrap();
        let (path, now) = (dir.path(), Timestamp::now());
        let old = Ca::create(path, "muster.test", now).unwrap().hash();
        let config = Config { data_dir: path.to_owned(), ..Config::default() };
        let store = MemoryStore::new();
        let mut trust = Trust::open(&config, Arc::new(store.clone()), "muster.test", now).await.unwrap();
        let roots = trust.ca().roots();
        assert_eq!(hashes(&store).await, [old]);

        let new = rotation::prepare(path, "muster.test", now).unwrap();
        trust.refresh(now).await.unwrap();
        assert_eq!(hashes(&store).await, [old, new]);
        assert_eq!(roots.borrow().len(), 2);
        assert_eq!(trust.own.chain.len(), 4 - 1);

        rotation::activate(path).unwrap();
        trust.refresh(now).await.unwrap();
        assert_eq!(trust.ca().current().hash(), new);
        // Itself, the new root signed by the old one, both roots.
        assert_eq!(trust.own.chain.len(), 4);

        // Another registrar, whose files nobody has touched yet, trusts both by the store.
        rotation::retire(path, Duration::ZERO, now, true).unwrap();
        trust.refresh(now).await.unwrap();
        assert_eq!(hashes(&store).await, [new]);
        assert_eq!(roots.borrow().len(), 1);
    }

    #[tokio::test]
    async fn roots_of_another_registrar_are_trusted() {
        let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let now = Timestamp::now();
        let ours_ca = Ca::create(ours.path(), "muster.test", now).unwrap();
        for name in ["ca.key", "ca.crt"] {
            std::fs::copy(ours.path().join(name), theirs.path().join(name)).unwrap();
        }
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let config = |dir: &tempfile::TempDir| Config { data_dir: dir.path().into(), ..Config::default() };
        let mut ours_trust = Trust::open(&config(&ours), store.clone(), "muster.test", now).await.unwrap();
        let mut theirs_trust =
            Trust::open(&config(&theirs), store.clone(), "muster.test", now).await.unwrap();
        assert_ne!(ours_trust.own.identity().unwrap(), theirs_trust.own.identity().unwrap());
        rotation::prepare(ours.path(), "muster.test", now).unwrap();
        ours_trust.refresh(now).await.unwrap();
        theirs_trust.refresh(now).await.unwrap();
        let roots = theirs_trust.ca().roots().borrow().clone();
        assert_eq!(roots.len(), 2);
        assert_eq!(roots[0], ours_ca.roots()[0]);

        let error = Trust::open(&config(&ours), store, "other.test", now).await.err().unwrap().to_string();
        assert!(error.contains("other.test") && error.contains("different deployments"), "{error}");
    }
}
