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
    tls::{Credentials, KeyPair, SpkiHash, TlsError, certificate_validity},
};
use muster_proto::storage::StoredRoot;
use prost::Message as _;
use rustls::pki_types::CertificateDer;
use uuid::Uuid;

use super::succession::Successions;
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
    /// This registrar has the key of a root that the deployment has gone on without.
    #[error(
        "the other registrars have gone on without the CA's root {root}, whose key is in {} ({source}): it must not \
         issue certificates any more. Run `muster-registrar leave` here, `muster-registrar invite` on the host of \
         another registrar, and what that prints here", directory.display()
    )]
    Retired {
        /// The root.
        root: SpkiHash,
        /// The data directory.
        directory: PathBuf,
        /// Why it cannot follow.
        source: Box<CaError>,
    },
}

/// Keeps CA, roots and the registrar's own certificate up to date.
pub(super) struct Trust {
    ca: Arc<SharedCa>,
    store: Arc<dyn Store>,
    successions: Successions,
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
        let successions = Successions::new(config.data_dir.clone(), store.clone());
        // First of all: a registrar that has missed a rotation issues nothing by the old root.
        match successions.share(now).await {
            // What cannot be used is of a step that can wait.
            Err(TrustError::Ca(CaError::Succession(error))) => {
                tracing::error!(%error, "cannot follow a rotation of the CA; trying again");
            }
            other => other?,
        }
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
        let mut trust =
            Self { ca, store, successions, credentials, own, path, lifetime, trust_domain, expiry };
        trust.refresh_own(now).await?;
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
    ///
    /// # Errors
    /// After [`TrustError::Retired`], this registrar must not go on.
    pub(super) async fn refresh(&mut self, now: Timestamp) -> Result<(), TrustError> {
        let shared = match self.successions.share(now).await {
            Err(error @ TrustError::Retired { .. }) => return Err(error),
            // What does not depend on it goes on.
            other => other,
        };
        self.refresh_own(now).await.and(shared)
    }

    async fn refresh_own(&mut self, now: Timestamp) -> Result<(), TrustError> {
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
#[path = "trust_tests.rs"]
mod tests;
