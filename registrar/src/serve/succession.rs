//! Has the registrars of a deployment take the steps of a rotation together: what the files of this one say goes to the
//! store, and what the store says of others' steps goes to the files.

use std::{path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use muster_common::{time::Timestamp, tls::SpkiHash};
use muster_proto::storage::{StoredSuccession, SuccessionStep as Step};
use prost::Message as _;

use super::trust::TrustError;
use crate::{
    ca::{
        CaError,
        succession::{self, Here, Succession, SuccessionError},
    },
    registry::keys::{self, Key},
    store::{Condition, Revision, Store, Txn, TxnOutcome},
    token::timestamp,
};

/// The most successions that are looked at; each is a whole rotation.
const SUCCESSIONS_MAX: usize = 1000;
/// How long a new root's key stays in the store, sealed, after the old root was retired.
pub(super) const RETENTION: Duration = Duration::from_secs(24 * 60 * 60);

/// Takes steps of rotations together with the other registrars.
pub(super) struct Successions {
    directory: PathBuf,
    store: Arc<dyn Store>,
}

/// A succession in the store.
struct Record {
    key: Bytes,
    revision: Revision,
    old: SpkiHash,
    stored: StoredSuccession,
}

impl Successions {
    pub(super) fn new(directory: PathBuf, store: Arc<dyn Store>) -> Self {
        Self { directory, store }
    }

    /// Brings files and store to the same step.
    ///
    /// # Errors
    /// [`TrustError::Retired`] if this registrar must not issue any more.
    pub(super) async fn share(&self, now: Timestamp) -> Result<(), TrustError> {
        let mut records = self.records().await?;
        if self.publish(&records, now).await? {
            records = self.records().await?;
        }
        self.follow(&records)
    }

    async fn records(&self) -> Result<Vec<Record>, TrustError> {
        let page = self.store.range(keys::successions(), None, SUCCESSIONS_MAX).await?;
        let record = |kv: crate::store::KeyValue| {
            let Some(Key::Succession(old)) = keys::parse(&kv.key) else { return None };
            let stored = StoredSuccession::decode(kv.value).ok()?;
            Some(Record { key: kv.key, revision: kv.mod_revision, old: old.into(), stored })
        };
        Ok(page.kvs.into_iter().filter_map(record).collect())
    }

    /// Tells the store of steps that were taken here, and has it forget keys that nobody needs; says whether it was told
    /// anything.
    async fn publish(&self, records: &[Record], now: Timestamp) -> Result<bool, TrustError> {
        let here = Here::load(&self.directory)?;
        let mut changes = Vec::new();
        for (old, next) in succession::list(&self.directory)? {
            let step = here.step(old, next.new_root());
            let known = records.iter().find(|record| record.old == old);
            match known {
                // Begun at once on two registrars. Before its root issues, this one gives way and follows.
                Some(record) if record.leads_elsewhere(next.new_root()) && step >= Step::Activated => {
                    return Err(self.retired(here.issuing, SuccessionError::Other));
                }
                Some(record) if record.leads_elsewhere(next.new_root()) => {}
                None if step > Step::Unspecified => {
                    let key = keys::succession(old.as_bytes());
                    let value = at_step(next.stored(step), now).encode_to_vec();
                    changes.push(Txn::new().when(Condition::Absent(key.clone())).put(key, value));
                }
                // Everybody has it from the store.
                Some(record) if record.stored.step() == Step::Retired => {
                    succession::forget(&self.directory, old)?;
                }
                _ => {}
            }
        }
        for Record { key, revision, old, stored } in records {
            let Ok(next) = Succession::from_stored(stored) else { continue };
            let step = here.step(*old, next.new_root());
            let mut new = stored.clone();
            if step > stored.step() {
                new.set_step(step);
                new = at_step(new, now);
            }
            if new.retired_at.as_ref().is_some_and(|at| timestamp(at) + RETENTION <= now) {
                new.sealed_key.clear();
            }
            if new != *stored {
                let condition = Condition::ModRevision(key.clone(), *revision);
                changes.push(Txn::new().when(condition).put(key.clone(), new.encode_to_vec()));
            }
        }
        let told = !changes.is_empty();
        for txn in changes {
            // After a conflict, another registrar was faster: what it has written is read next.
            if self.store.txn(txn).await? == TxnOutcome::Conflict {
                tracing::debug!("another registrar has told of a step of the CA's rotation at the same time");
            }
        }
        Ok(told)
    }

    /// Takes the steps that others have taken. One leads to the next if this registrar has missed several rotations.
    fn follow(&self, records: &[Record]) -> Result<(), TrustError> {
        for _ in 0..=records.len() {
            let here = Here::load(&self.directory)?;
            let (mut moved, mut unusable) = (false, None);
            for Record { old, stored, .. } in records {
                let step = stored.step();
                let followed = Succession::from_stored(stored).map_err(CaError::from).and_then(|next| {
                    if here.step(*old, next.new_root()) >= step {
                        return Ok(false);
                    }
                    succession::follow(&self.directory, *old, &next, step)
                });
                match followed {
                    Ok(false) => {}
                    Ok(true) => {
                        tracing::info!(root = %old, step = step.as_str_name(), "followed a rotation of the CA");
                        moved = true;
                        break;
                    }
                    Err(CaError::Succession(source)) if *old == here.issuing && step == Step::Retired => {
                        return Err(self.retired(*old, source));
                    }
                    // It must not hide another one, by which this registrar has to stop.
                    Err(CaError::Succession(error)) => unusable = Some(error),
                    Err(error) => return Err(error.into()),
                }
            }
            if !moved {
                return unusable.map_or(Ok(()), |error| Err(CaError::from(error).into()));
            }
        }
        Ok(())
    }

    fn retired(&self, root: SpkiHash, source: SuccessionError) -> TrustError {
        TrustError::Retired { root, directory: self.directory.clone(), source: Box::new(source.into()) }
    }
}

impl Record {
    /// Whether its new root is another one.
    fn leads_elsewhere(&self, new: SpkiHash) -> bool {
        Succession::from_stored(&self.stored).is_ok_and(|next| next.new_root() != new)
    }
}

/// With the time of the last step.
fn at_step(mut stored: StoredSuccession, now: Timestamp) -> StoredSuccession {
    if stored.step() == Step::Retired {
        let seconds = i64::try_from(now.unix_seconds()).unwrap_or(i64::MAX);
        stored.retired_at = Some(pbjson_types::Timestamp { seconds, nanos: 0 });
    }
    stored
}
