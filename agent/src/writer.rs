//! Writes state to disk on a thread of its own, so that the run loop never waits for a disk, and a slow disk never fills
//! the memory. What the disk does not take, as one that is full, is tried again until it does.

use std::{
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use muster_common::{telemetry::Metrics as Registries, time::Instant};
use muster_proto::registration::DeviceConfig;

use prometheus_client::metrics::{counter::Counter, gauge::Gauge};

use crate::state::{Peers, State, StateError};

/// Between attempts to write what the disk has not taken.
const RETRY: Duration = Duration::from_secs(5);

/// What to write.
#[derive(Debug)]
pub enum Write {
    /// What the registrar decided.
    Config(Box<DeviceConfig>),
    /// The peers held.
    Peers(Peers),
    /// The resolver's cache.
    Names(Vec<u8>),
    /// The Services that have virtual IPs, in the registrar's own encoding.
    VirtualServices(Vec<u8>),
}

/// What waits for the disk: of each kind only the newest, however long the disk takes.
#[derive(Debug, Default)]
struct Waiting {
    config: Option<Write>,
    peers: Option<Write>,
    names: Option<Write>,
    virtual_services: Option<Write>,
    closed: bool,
}

impl Waiting {
    fn put(&mut self, write: Write) {
        let slot = self.slot(&write);
        *slot = Some(write);
    }

    /// Has `write` wait again, unless there is a newer one.
    fn put_back(&mut self, write: Write) {
        let slot = self.slot(&write);
        slot.get_or_insert(write);
    }

    fn slot(&mut self, write: &Write) -> &mut Option<Write> {
        match write {
            Write::Config(_) => &mut self.config,
            Write::Peers(_) => &mut self.peers,
            Write::Names(_) => &mut self.names,
            Write::VirtualServices(_) => &mut self.virtual_services,
        }
    }

    fn take(&mut self) -> Option<Write> {
        let slots = [&mut self.config, &mut self.peers, &mut self.names, &mut self.virtual_services];
        slots.into_iter().find_map(Option::take)
    }
}

#[derive(Debug, Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

impl Queue {
    fn change(&self, change: impl FnOnce(&mut Waiting)) {
        change(&mut self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_one();
    }

    /// Whether nothing waits, and whether nothing more comes.
    fn state(&self) -> (bool, bool) {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let Waiting { config, peers, names, virtual_services, closed } = &*waiting;
        ([config, peers, names, virtual_services].into_iter().all(Option::is_none), *closed)
    }

    /// Waits for the next; `None` when all is done and nothing more comes.
    fn next(&self) -> Option<Write> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match waiting.take() {
                None if !waiting.closed => {
                    waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
                }
                next => return next,
            }
        }
    }

    /// Waits until it is time to try again, or the end.
    fn pause(&self) {
        let until = Instant::now() + RETRY;
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if waiting.closed || left.is_zero() {
                return;
            }
            let woken = self.changed.wait_timeout(waiting, left);
            waiting = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Whether what is to be kept is on disk.
#[derive(Debug, Default)]
struct Condition {
    trouble: Mutex<Option<String>>,
    failures: Counter,
    unsaved: Gauge,
}

impl Condition {
    fn failed(&self, error: &StateError) {
        self.failures.inc();
        self.unsaved.set(1);
        if self.replace(Some(error.to_string())).is_none() {
            // What is in memory still holds; it is lost only if the host restarts before it can be written.
            tracing::warn!(%error, "cannot keep state on disk; trying again");
        }
    }

    fn good(&self) {
        self.unsaved.set(0);
        if self.replace(None).is_some() {
            tracing::info!("state is kept on disk again");
        }
    }

    fn replace(&self, trouble: Option<String>) -> Option<String> {
        std::mem::replace(&mut *self.trouble.lock().unwrap_or_else(PoisonError::into_inner), trouble)
    }
}

/// The thread. Dropping it waits until everything is on disk.
#[derive(Debug)]
pub struct Writer {
    queue: Arc<Queue>,
    condition: Arc<Condition>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    /// Starts the thread.
    pub fn start(state: State) -> std::io::Result<Self> {
        let queue = Arc::<Queue>::default();
        let condition = Arc::<Condition>::default();
        let (ours, told) = (Arc::clone(&queue), Arc::clone(&condition));
        let thread = std::thread::Builder::new().name("state".into()).spawn(move || {
            // What has failed since the last pause: only when nothing has is all on disk.
            let mut failed = Vec::new();
            while let Some(write) = ours.next() {
                if let Err(error) = perform(&state, &write) {
                    told.failed(&error);
                    failed.push(write);
                }
                let (empty, closed) = ours.state();
                if empty && failed.is_empty() {
                    told.good();
                } else if empty && !closed {
                    ours.pause();
                    ours.change(|waiting| failed.drain(..).for_each(|write| waiting.put_back(write)));
                }
            }
        })?;
        Ok(Self { queue, condition, thread: Some(thread) })
    }

    /// Has its failures told at `/metrics`.
    pub fn register_metrics(&self, registries: &Registries) {
        registries.register(|registry| {
            let help = "Times that state could not be written to disk";
            registry.register("state_failures", help, self.condition.failures.clone());
            let help = "1 while there is state that the disk does not take";
            registry.register("state_unsaved", help, self.condition.unsaved.clone());
        });
    }

    /// Tells, whenever it is called, why state is not kept on disk at present, if it is not.
    pub fn trouble(&self) -> impl Fn() -> Option<String> + Send + Sync + 'static {
        let condition = Arc::clone(&self.condition);
        move || condition.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Queues `write`, in place of an older one of its kind that still waits.
    pub fn write(&self, write: Write) {
        self.queue.change(|waiting| waiting.put(write));
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.queue.change(|waiting| waiting.closed = true);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that writes state has panicked");
        }
    }
}

fn perform(state: &State, write: &Write) -> Result<(), StateError> {
    match write {
        Write::Config(config) => state.set_config(config),
        Write::Peers(peers) => state.set_peers(peers),
        Write::Names(names) => state.set_names(names),
        Write::VirtualServices(services) => state.set_virtual_services(services),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_newest_of_a_kind_waits() {
        let mut waiting = Waiting::default();
        for revision in 0..1000 {
            waiting.put(Write::Names(vec![0]));
            waiting.put(Write::Peers(Peers { revision, ..Peers::default() }));
        }
        assert!(matches!(waiting.take(), Some(Write::Peers(Peers { revision: 999, .. }))));
        assert!(matches!(waiting.take(), Some(Write::Names(_))));
        assert!(waiting.take().is_none());
    }

    #[test]
    fn what_the_disk_does_not_take_is_written_later_and_the_newest_of_it() {
        let directory = tempfile::tempdir().unwrap();
        // A file in the place of the directory: nothing can be written, also by root.
        let path = directory.path().join("state");
        std::fs::write(&path, "").unwrap();
        let state = State::new(&path);
        let writer = Writer::start(state.clone()).unwrap();
        let until = |condition: &dyn Fn() -> bool| {
            let end = Instant::now() + 4 * RETRY;
            while !condition() {
                assert!(Instant::now() < end, "it takes too long");
                std::thread::sleep(Duration::from_millis(20));
            }
        };
        let trouble = writer.trouble();
        writer.write(Write::Names(b"n".to_vec()));
        until(&|| trouble().is_some_and(|why| why.contains("state")));
        for revision in 0..3 {
            writer.write(Write::Peers(Peers { revision, ..Peers::default() }));
        }
        std::fs::remove_file(&path).unwrap();
        until(&|| trouble().is_none());
        assert_eq!((state.peers().revision, state.names().unwrap()), (2, b"n".to_vec()));
        // At the end it does not wait for a disk.
        std::fs::remove_dir_all(&path).unwrap();
        std::fs::write(&path, "").unwrap();
        writer.write(Write::Names(b"m".to_vec()));
        until(&|| trouble().is_some());
        let begun = Instant::now();
        drop(writer);
        assert!(Instant::now() - begun < RETRY);
    }

    #[test]
    fn everything_is_on_disk_when_it_is_dropped() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::new(directory.path());
        let writer = Writer::start(state.clone()).unwrap();
        for revision in 0..20 {
            writer.write(Write::Peers(Peers { revision, ..Peers::default() }));
        }
        writer.write(Write::Names(b"n".to_vec()));
        drop(writer);
        assert_eq!(state.peers().revision, 19);
        assert_eq!(state.names().unwrap(), b"n");
    }
}
