//! Writes state to disk on a thread of its own, in order, so that the run loop never waits for a disk.

use std::{
    sync::mpsc::{Sender, channel},
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
}

/// The thread. Dropping it waits until everything is on disk.
#[derive(Debug)]
pub struct Writer {
    writes: Option<Sender<Write>>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    /// Starts the thread.
    pub fn start(state: State) -> std::io::Result<Self> {
        let (writes, queue) = channel();
        let thread = std::thread::Builder::new().name("state".into()).spawn(move || {
            for write in queue {
                if let Err(error) = perform(&state, write) {
                    // What is in memory still holds; it is lost only if the host restarts before the next write.
                    tracing::warn!(%error, "cannot keep state on disk");
                }
            }
        })?;
        Ok(Self { writes: Some(writes), thread: Some(thread) })
    }

    /// Queues `write`. The callers bound how often they do.
    pub fn write(&self, write: Write) {
        if let Some(writes) = &self.writes {
            let _ = writes.send(write);
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.writes = None;
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
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_on_disk_when_it_is_dropped() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::new(directory.path());
        let writer = Writer::start(state.clone()).unwrap();
        for revision in 0..20 {
            writer.write(Write::Peers(Peers { revision, peers: vec![] }));
        }
        writer.write(Write::Names(b"n".to_vec()));
        drop(writer);
        assert_eq!(state.peers().revision, 19);
        assert_eq!(state.names().unwrap(), b"n");
    }
}
