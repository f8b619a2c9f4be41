//! The table of encoded answers, in step with the registry: what changes is noted by whoever changes it, and encoded
//! anew on a thread of its own. A network is answered from the table once all of it is there; until then, and for
//! whatever is not in it, the engine answers.

mod publisher;

use std::{
    collections::BTreeSet,
    io, mem,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

use arc_swap::ArcSwap;
use muster_common::{telemetry::Metrics as Telemetry, time::Instant};
use muster_dns::{
    engine::{Engine, Outcome},
    fast::{Asker, Snapshot, Table},
    message::Transport,
};
use prometheus_client::metrics::{gauge::Gauge, histogram::Histogram};
use uuid::Uuid;

use self::publisher::Publisher;
use crate::{
    registry::{Applied, Change, Registry, change::ServiceName, director::is_told_differently},
    zone::Zones,
};

/// What has to be encoded anew, in the order in which it is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Dirty {
    /// The network itself: all of it.
    Network(Arc<str>),
    /// Whether a device is a member of a network.
    Member { network: Arc<str>, uid: Uuid },
    /// A Service's names.
    Service(ServiceName),
    /// A namespace's name.
    Namespace { network: Arc<str>, name: Box<str> },
    /// A device's name.
    Device { network: Arc<str>, name: Box<str> },
}

/// What has been noted and not yet taken up. Bounded by what there is in the registry.
#[derive(Debug, Default)]
struct Noted {
    dirty: BTreeSet<Dirty>,
    /// When the first of them was noted.
    since: Option<Instant>,
    /// Nobody asks any more.
    closed: bool,
}

#[derive(Debug, Default)]
struct Notes {
    noted: Mutex<Noted>,
    wake: Condvar,
}

impl Notes {
    fn lock(&self) -> MutexGuard<'_, Noted> {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, applied: &Applied, now: Instant) {
        let mut noted = self.lock();
        for change in &applied.changes {
            note(&mut noted.dirty, change);
        }
        noted.dirty.extend(applied.services.iter().cloned().map(Dirty::Service));
        if !noted.dirty.is_empty() {
            noted.since.get_or_insert(now);
            self.wake.notify_one();
        }
    }

    /// What has been noted since; waits for it if `wait`. `None` once closed.
    fn take(&self, wait: bool) -> Option<(BTreeSet<Dirty>, Option<Instant>)> {
        let mut noted = self.lock();
        while wait && noted.dirty.is_empty() && !noted.closed {
            noted = self.wake.wait(noted).unwrap_or_else(PoisonError::into_inner);
        }
        (!noted.closed).then(|| (mem::take(&mut noted.dirty), noted.since.take()))
    }
}

fn note(dirty: &mut BTreeSet<Dirty>, change: &Change) {
    match change {
        Change::Network { old, new } => {
            dirty.extend(new.as_ref().or(old.as_ref()).map(|network| Dirty::Network(network.name.clone())));
        }
        Change::Device { old, new } => {
            for device in [old, new].into_iter().flatten() {
                let network = device.network.clone();
                dirty.insert(Dirty::Device { network, name: device.name.clone() });
                dirty.insert(Dirty::Member { network: device.network.clone(), uid: device.uid });
                // What is answered for those that it speaks for depends on it.
                let hosts = device.site.iter().flat_map(|site| &site.hosts);
                dirty.extend(
                    hosts.map(|host| Dirty::Device {
                        network: device.network.clone(),
                        name: host.name.clone(),
                    }),
                );
            }
        }
        Change::Director { old, new } => {
            let same = matches!((old, new), (Some(old), Some(new)) if !is_told_differently(old, new));
            if !same {
                // Any device's name may tell of it.
                let director = new.as_ref().or(old.as_ref());
                dirty.extend(director.map(|director| Dirty::Network(director.network.clone())));
            }
        }
        Change::Namespace { old, new } => {
            dirty.extend(new.as_ref().or(old.as_ref()).map(|namespace| Dirty::Namespace {
                network: namespace.network.clone(),
                name: namespace.name.as_str().into(),
            }));
        }
        // What DNS answers differently for them is told beside the changes.
        Change::Service { .. } | Change::EndpointSlice { .. } | Change::Token { .. } => {}
        Change::Carrier { .. }
        | Change::Presence { .. }
        | Change::Registrar { .. }
        | Change::RegistrarRecord { .. } => {}
    }
}

/// What the table tells of itself.
#[derive(Clone, Debug)]
struct Gauges {
    names: Gauge,
    octets: Gauge,
    /// Seconds from a change of the registry to the table that shows it.
    duration: Histogram,
}

impl Default for Gauges {
    fn default() -> Self {
        let buckets = [0.0001, 0.000_25, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 1.0, 10.0];
        Self { names: Gauge::default(), octets: Gauge::default(), duration: Histogram::new(buckets) }
    }
}

impl Gauges {
    fn register(&self, metrics: &Telemetry) {
        metrics.register(|registry| {
            let help = "Names whose answers are kept encoded";
            registry.register("dns_encoded_names", help, self.names.clone());
            let help = "Memory that encoded answers take, in octets";
            registry.register("dns_encoded_bytes", help, self.octets.clone());
            let help = "Time from a change in the registry until DNS answers it, in seconds";
            registry.register("kubernetes_dns_programming_duration_seconds", help, self.duration.clone());
        });
    }
}

/// The newest table, for everybody who answers queries. The thread that keeps it up ends when this is dropped.
pub(super) struct Published {
    current: Arc<ArcSwap<Snapshot>>,
    notes: Arc<Notes>,
}

impl Published {
    /// Begins to encode what `registry` holds, as `engine` answers it.
    ///
    /// # Errors
    /// The system has no thread to spare.
    pub(super) fn start(
        registry: &Arc<Registry>,
        engine: Arc<Engine<Zones>>,
        metrics: &Telemetry,
    ) -> io::Result<Self> {
        let (published, mut publisher) = Self::new(registry, engine);
        publisher.gauges.register(metrics);
        std::thread::Builder::new().name("dns-encode".into()).spawn(move || while publisher.run(true) {})?;
        Ok(published)
    }

    fn new(registry: &Arc<Registry>, engine: Arc<Engine<Zones>>) -> (Self, Publisher) {
        let notes = Arc::new(Notes::default());
        // Noted from here on, and all that is there already by the publisher: nothing falls between.
        let observer = Arc::downgrade(&notes);
        registry.observe(move |applied| {
            if let Some(notes) = observer.upgrade() {
                notes.note(applied, Instant::now());
            }
        });
        let current = Arc::new(ArcSwap::new(Table::new().publish()));
        let publisher = Publisher::new(registry.clone(), engine, notes.clone(), current.clone());
        (Self { current, notes }, publisher)
    }

    /// Gets ready for `queries`.
    pub(super) fn expect<'a>(&self, queries: impl Iterator<Item = &'a [u8]>) {
        self.current.load().warm(queries);
    }

    /// Answers `query` if the answer is encoded; `None`: ask the engine.
    pub(super) fn answer(
        &self,
        query: &[u8],
        asker: Asker,
        transport: Transport,
        out: &mut Vec<u8>,
    ) -> Option<Outcome> {
        self.current.load().answer(query, asker, transport, out)
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        self.notes.lock().closed = true;
        self.notes.wake.notify_all();
    }
}

#[cfg(test)]
mod tests;
