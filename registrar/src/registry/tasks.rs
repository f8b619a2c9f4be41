//! What a registry does by itself: follows its store, counts the uses of tokens, and removes what is over. Each task
//! ends with the registry.

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
    time::Duration,
};

use futures_util::{FutureExt as _, StreamExt as _};
use muster_common::time::{Instant, Timestamp};

use super::{keys, plan, shell::Registry};
use crate::store::{Revision, StoreError, Txn, WatchStream};

/// Batches applied under one lock.
const GROUP: usize = 256;
/// Between attempts to reach a store that is away.
const RETRY: Duration = Duration::from_millis(500);
/// Between counts of tokens' uses.
const COUNT_INTERVAL: Duration = Duration::from_secs(1);
/// Between questions to the store what its latest revision is.
const CONFIRM_INTERVAL: Duration = Duration::from_secs(1);
/// Between searches for what can be forgotten.
const SWEEP_INTERVAL: Duration = Duration::from_secs(60);
/// Invitations that are looked at in a search.
const INVITATIONS: usize = 100;

/// Applies what the store tells, for as long as the registry lives.
pub(super) async fn follow(registry: Weak<Registry>, mut stream: WatchStream) {
    let mut batches = Vec::with_capacity(GROUP);
    loop {
        let mut failed = match stream.next().await {
            Some(Ok(batch)) => {
                batches.push(batch);
                None
            }
            Some(Err(error)) => Some(error),
            None => Some(StoreError::Unavailable("the watch ended".into())),
        };
        while failed.is_none()
            && batches.len() < GROUP
            && let Some(next) = stream.next().now_or_never()
        {
            match next {
                Some(Ok(batch)) => batches.push(batch),
                Some(Err(error)) => failed = Some(error),
                None => failed = Some(StoreError::Unavailable("the watch ended".into())),
            }
        }
        let Some(registry) = registry.upgrade() else { return };
        if !batches.is_empty() {
            registry.apply(&batches);
            batches.clear();
        }
        while let Some(error) = failed.take() {
            registry.metrics().watch_failures.inc();
            if matches!(error, StoreError::Closed) {
                tracing::warn!("the store was closed; the registry changes no more");
                return;
            }
            tracing::warn!(%error, "cannot follow the store; trying again");
            match registry.watch_again(&error).await {
                Ok(again) => stream = again,
                Err(error) => {
                    failed = Some(error);
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }
}

/// Asks the store again and again what it holds, and notices when it does not answer, or is followed too late.
pub(super) async fn confirm(registry: Weak<Registry>) {
    let asking = async {
        while let Some(registry) = registry.upgrade() {
            let asked = Instant::now();
            if registry.refresh().await.is_ok() {
                registry.freshness().confirm(asked);
            }
            drop(registry);
            tokio::time::sleep(CONFIRM_INTERVAL).await;
        }
    };
    let looking = async {
        while let Some(registry) = registry.upgrade() {
            registry.look_whether_stale(Instant::now());
            drop(registry);
            tokio::time::sleep(CONFIRM_INTERVAL).await;
        }
    };
    tokio::join!(asking, looking);
}

/// Writes the uses of tokens now and then: one write for many uses, so that those who join with one token at the
/// same time do not stand in each other's way.
pub(super) async fn count_uses(registry: Weak<Registry>) {
    loop {
        tokio::time::sleep(COUNT_INTERVAL).await;
        let Some(registry) = registry.upgrade() else { return };
        registry.flush_uses().await;
    }
}

/// Removes from the store what is over.
pub(super) async fn sweep(registry: Weak<Registry>) {
    let mut locks: BTreeMap<Arc<str>, Revision> = BTreeMap::new();
    loop {
        tokio::time::sleep(SWEEP_INTERVAL).await;
        let Some(registry) = registry.upgrade() else { return };
        let seen = registry.read().locks();
        // Locks of a registrar that died over a deletion; a living one has long finished.
        let mut done: Vec<Txn> = seen
            .iter()
            .filter(|(name, revision)| locks.get(*name) == Some(revision))
            .map(|(name, revision)| plan::network::unlock(name, *revision))
            .collect();
        locks = seen;
        finish_deletions(&registry).await;
        if let Err(error) = forget_invitations(&registry, Timestamp::now()).await {
            tracing::warn!(%error, "cannot forget invitations whose time is over; trying again later");
        }
        loop {
            for txn in done.drain(..) {
                if let Err(error) = registry.tidy(txn).await {
                    tracing::warn!(%error, "cannot remove from the store what is over; trying again later");
                    break;
                }
            }
            let Some(txn) = plan::sweep::addresses(&registry.read(), Timestamp::now()) else { break };
            match registry.tidy(txn).await {
                Ok(()) => {}
                Err(error) => {
                    tracing::warn!(%error, "cannot forget released addresses; trying again later");
                    break;
                }
            }
        }
    }
}

/// Removes invitations of registrars that nobody can use any more. They are not in the index, and few.
pub(super) async fn forget_invitations(registry: &Registry, now: Timestamp) -> Result<(), StoreError> {
    let page = registry.store().range(keys::invitations(), None, INVITATIONS).await?;
    match plan::sweep::invitations(&page.kvs, now) {
        Some(txn) => registry.tidy(txn).await,
        None => Ok(()),
    }
}

/// Finishes the deletion of namespaces that a registrar has begun, and perhaps died over.
pub(super) async fn finish_deletions(registry: &Registry) {
    let terminating = plan::namespace::terminating(&registry.read());
    for (network, name) in terminating {
        if let Err(error) = registry.empty_namespace(&network, &name).await {
            tracing::warn!(network, name, %error, "cannot finish the deletion of a namespace; trying again later");
        }
    }
}
