//! Whether the store takes changes, and if not, why: for `/metrics` and `/readyz`.

use std::sync::{Mutex, PoisonError};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

/// What keeps the store from writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    Full,
    ReadOnly,
    Disk,
    Busy,
    Other,
}

impl Trouble {
    const ALL: [Self; 5] = [Self::Full, Self::ReadOnly, Self::Disk, Self::Busy, Self::Other];

    fn as_str(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::ReadOnly => "read_only",
            Self::Disk => "disk",
            Self::Busy => "busy",
            Self::Other => "other",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    reason: &'static str,
}

/// As of the last attempt to write.
#[derive(Debug)]
pub(super) struct Condition {
    trouble: Mutex<Option<(Trouble, String)>>,
    failures: Family<Labels, Counter>,
    writable: Gauge,
}

impl Default for Condition {
    fn default() -> Self {
        let condition =
            Self { trouble: Mutex::default(), failures: Family::default(), writable: Gauge::default() };
        condition.writable.set(1);
        for trouble in Trouble::ALL {
            drop(condition.failures.get_or_create(&Labels { reason: trouble.as_str() }));
        }
        condition
    }
}

impl Condition {
    /// A commit failed, as `message` tells. Returns whether that is new.
    pub(super) fn failed(&self, trouble: Trouble, message: String) -> bool {
        self.failures.get_or_create(&Labels { reason: trouble.as_str() }).inc();
        self.writable.set(0);
        let before = self.replace(Some((trouble, message)));
        before.is_none_or(|(before, _)| before != trouble)
    }

    /// A commit succeeded. Returns whether the one before had not.
    pub(super) fn good(&self) -> bool {
        self.writable.set(1);
        self.replace(None).is_some()
    }

    /// What is wrong, if anything is.
    pub(super) fn trouble(&self) -> Option<String> {
        let trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        trouble.as_ref().map(|(_, message)| message.clone())
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        let help = "Commits of the store that failed, by what kept it from writing";
        registry.register("store_failures", help, self.failures.clone());
        let help = "1 while the store takes changes, 0 since a commit failed";
        registry.register("store_writable", help, self.writable.clone());
    }

    fn replace(&self, trouble: Option<(Trouble, String)>) -> Option<(Trouble, String)> {
        std::mem::replace(&mut *self.trouble.lock().unwrap_or_else(PoisonError::into_inner), trouble)
    }
}
