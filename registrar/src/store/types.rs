//! Keys, ranges, transactions and changes: what all stores speak.

use std::collections::BTreeSet;

use bytes::Bytes;

use super::StoreError;

/// The version of the whole store after a transaction: 1 when empty, counted up by each change. 0 means none.
pub type Revision = u64;

/// The most conditions, and the most operations, in one transaction (etcd's own default limit).
pub const MAX_TXN_OPS: usize = 128;

/// The most bytes in all keys and values of one transaction (below etcd's default limit of 1.5 MiB a request).
pub const MAX_TXN_BYTES: usize = 1 << 20;

/// The longest key, in bytes.
pub const MAX_KEY: usize = 1024;

/// A key with its present value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyValue {
    /// The key.
    pub key: Bytes,
    /// The value.
    pub value: Bytes,
    /// The revision at which the key came into being (again, if it had been deleted).
    pub create_revision: Revision,
    /// The revision of its last change.
    pub mod_revision: Revision,
}

/// Keys from `start` (included) to `end` (excluded; `None`: no end), in byte order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRange {
    /// The first key.
    pub start: Bytes,
    /// The first key that no longer belongs to the range.
    pub end: Option<Bytes>,
}

impl KeyRange {
    /// All keys.
    pub fn all() -> Self {
        Self { start: Bytes::new(), end: None }
    }

    /// One key.
    pub fn key(key: impl Into<Bytes>) -> Self {
        let start = key.into();
        let end = Some(successor(&start));
        Self { start, end }
    }

    /// All keys that begin with `prefix`.
    pub fn prefix(prefix: impl Into<Bytes>) -> Self {
        let start = prefix.into();
        let end = prefix_end(&start);
        Self { start, end }
    }

    /// The rest of this range after `key`.
    #[must_use]
    pub fn after(&self, key: &[u8]) -> Self {
        Self { start: successor(key), end: self.end.clone() }
    }

    /// Whether `key` lies in the range.
    pub fn contains(&self, key: &[u8]) -> bool {
        key >= &self.start[..] && self.end.as_ref().is_none_or(|end| key < &end[..])
    }

    /// Whether no key can lie in the range.
    pub fn is_empty(&self) -> bool {
        self.end.as_ref().is_some_and(|end| *end <= self.start)
    }
}

/// The next key in byte order.
pub(super) fn successor(key: &[u8]) -> Bytes {
    let mut next = Vec::with_capacity(key.len() + 1);
    next.extend_from_slice(key);
    next.push(0);
    next.into()
}

/// The first key after all that begin with `prefix`; `None` if there is none.
fn prefix_end(prefix: &[u8]) -> Option<Bytes> {
    let last = prefix.iter().rposition(|byte| *byte != 0xff)?;
    let mut end = prefix[..=last].to_vec();
    end[last] += 1;
    Some(end.into())
}

/// What must hold for a transaction to be applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// The key does not exist.
    Absent(Bytes),
    /// The key exists.
    Exists(Bytes),
    /// The key's last change was at this revision; 0 is the same as [`Condition::Absent`].
    ModRevision(Bytes, Revision),
}

impl Condition {
    /// The key that the condition is about.
    pub fn key(&self) -> &Bytes {
        match self {
            Self::Absent(key) | Self::Exists(key) | Self::ModRevision(key, _) => key,
        }
    }

    /// Whether the condition holds for a key last changed at `mod_revision` (`None`: absent).
    pub fn holds(&self, mod_revision: Option<Revision>) -> bool {
        match self {
            Self::Absent(_) => mod_revision.is_none(),
            Self::Exists(_) => mod_revision.is_some(),
            Self::ModRevision(_, wanted) => mod_revision.unwrap_or(0) == *wanted,
        }
    }
}

/// One change of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Sets a key.
    Put {
        /// The key.
        key: Bytes,
        /// Its new value.
        value: Bytes,
    },
    /// Removes a key, if it exists.
    Delete {
        /// The key.
        key: Bytes,
    },
}

impl Op {
    /// The key that the operation changes.
    pub fn key(&self) -> &Bytes {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }
}

/// Changes that are applied together, at one revision, if all conditions hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Txn {
    /// All must hold, judged before any operation.
    pub conditions: Vec<Condition>,
    /// The changes, each key at most once.
    pub ops: Vec<Op>,
}

impl Txn {
    /// A transaction without conditions or changes.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a condition.
    #[must_use]
    pub fn when(mut self, condition: Condition) -> Self {
        self.conditions.push(condition);
        self
    }

    /// Adds a change that sets `key`.
    #[must_use]
    pub fn put(mut self, key: impl Into<Bytes>, value: impl Into<Bytes>) -> Self {
        self.ops.push(Op::Put { key: key.into(), value: value.into() });
        self
    }

    /// Adds a change that removes `key`.
    #[must_use]
    pub fn delete(mut self, key: impl Into<Bytes>) -> Self {
        self.ops.push(Op::Delete { key: key.into() });
        self
    }

    /// The bytes of all keys and values.
    pub fn size(&self) -> usize {
        let conditions: usize = self.conditions.iter().map(|condition| condition.key().len()).sum();
        let ops: usize = self
            .ops
            .iter()
            .map(|op| match op {
                Op::Put { key, value } => key.len() + value.len(),
                Op::Delete { key } => key.len(),
            })
            .sum();
        conditions + ops
    }

    /// Checks what every store demands of a transaction.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] if it is too large, has an empty or too long key, or changes a key twice.
    pub fn check(&self) -> Result<(), StoreError> {
        let invalid = |reason: String| Err(StoreError::Invalid(reason));
        if self.conditions.len() > MAX_TXN_OPS || self.ops.len() > MAX_TXN_OPS {
            return invalid(format!(
                "a transaction has {} conditions and {} changes; at most {MAX_TXN_OPS} of each are allowed",
                self.conditions.len(),
                self.ops.len()
            ));
        }
        if self.size() > MAX_TXN_BYTES {
            return invalid(format!(
                "a transaction holds {} bytes; at most {MAX_TXN_BYTES} are allowed",
                self.size()
            ));
        }
        let mut changed = BTreeSet::new();
        let keys = self.conditions.iter().map(Condition::key).chain(self.ops.iter().map(Op::key));
        for key in keys {
            if key.is_empty() || key.len() > MAX_KEY {
                return invalid(format!("a key has {} bytes; 1 to {MAX_KEY} are allowed", key.len()));
            }
        }
        for op in &self.ops {
            if !changed.insert(op.key()) {
                return invalid(format!("a transaction changes the key {:?} twice", op.key()));
            }
        }
        Ok(())
    }
}

/// What became of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TxnOutcome {
    /// Applied, durably, at this revision.
    Committed(Revision),
    /// A condition did not hold; nothing was changed.
    Conflict,
}

/// A page of a range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RangeResult {
    /// The keys, in order.
    pub kvs: Vec<KeyValue>,
    /// The revision that the page shows.
    pub revision: Revision,
    /// Whether the range has more keys than the limit let through.
    pub more: bool,
    /// How many keys the range has, if they were all counted for the page; see [`Paging`](super::Paging).
    pub count: Option<usize>,
}

/// A change of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The key was set; `mod_revision` is the revision of the change.
    Put(KeyValue),
    /// The key was removed.
    Delete {
        /// The key.
        key: Bytes,
    },
}

impl Event {
    /// The key that changed.
    pub fn key(&self) -> &Bytes {
        match self {
            Self::Put(kv) => &kv.key,
            Self::Delete { key } => key,
        }
    }
}

/// All changes of one revision in the watched range, in the order of the transaction's operations.
///
/// A batch without events marks progress: the watch has now told everything up to and including `revision`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchBatch {
    /// The revision of the changes.
    pub revision: Revision,
    /// The changes; empty in a mark of progress.
    pub events: Vec<Event>,
}
