//! Writes state to disk on a thread of its own, so that the run loop never waits for a disk, and a slow disk never fills
//! the memory.

use std::{
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread::JoinHandle,
};

use muster_proto::registration::DeviceConfig;

use crate::state::{Peers, State, StateError};

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
        let slot = match write {
            Write::Config(_) => &mut self.config,
            Write::Peers(_) => &mut self.peers,
            Write::Names(_) => &mut self.names,
            Write::VirtualServices(_) => &mut self.virtual_services,
        };
        *slot = Some(write);
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
}

/// The thread. Dropping it waits until everything is on disk.
#[derive(Debug)]
pub struct Writer {
    queue: Arc<Queue>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    /// Starts the thread.
    pub fn start(state: State) -> std::io::Result<Self> {
        let queue = Arc::<Queue>::default();
        let ours = Arc::clone(&queue);
        let thread = std::thread::Builder::new().name("state".into()).spawn(move || {
            while let Some(write) = ours.next() {
                if let Err(error) = perform(&state, write) {
                    // What is in memory still holds; it is lost only if the host restarts before the next write.
                    tracing::warn!(%error, "cannot keep state on disk");
                }
            }
        })?;
        Ok(Self { queue, thread: Some(thread) })
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

fn perform(state: &State, write: Write) -> Result<(), StateError> {
    match write {
        Write::Config(config) => state.set_config(&config),
        Write::Peers(peers) => state.set_peers(&peers),
        Write::Names(names) => state.set_names(&names),
        Write::VirtualServices(services) => state.set_virtual_services(&services),
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
