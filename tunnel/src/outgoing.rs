//! The batch that packets are sealed into: one buffer, datagrams back to back, so that a run of equal ones to one
//! destination can go out in a single segmented send.

use std::{net::SocketAddr, ops::Range};

/// A sealed datagram in a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram<'a> {
    /// Where it goes.
    pub destination: SocketAddr,
    /// Its octets.
    pub payload: &'a [u8],
}

/// Sealed datagrams in the order in which they must leave. Made once and reused: clearing keeps the memory.
#[derive(Debug, Default)]
pub struct Outgoing {
    buffer: Vec<u8>,
    datagrams: Vec<(SocketAddr, Range<usize>)>,
}

impl Outgoing {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Forgets all datagrams.
    pub fn clear(&mut self) {
        self.buffer.clear();
        self.datagrams.clear();
    }

    /// Number of datagrams.
    pub fn len(&self) -> usize {
        self.datagrams.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.datagrams.is_empty()
    }

    /// All octets of all datagrams, back to back.
    pub fn octets(&self) -> &[u8] {
        &self.buffer
    }

    /// The datagrams in order; neighbours are adjacent in [`Self::octets`].
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Datagram<'_>> {
        self.datagrams.iter().map(|(destination, range)| Datagram {
            destination: *destination,
            payload: self.buffer.get(range.clone()).unwrap_or_default(),
        })
    }

    /// Appends what `write` appends to the buffer as one datagram; nothing if it fails.
    pub(crate) fn append<E>(
        &mut self,
        destination: SocketAddr,
        write: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
    ) -> Result<usize, E> {
        let start = self.buffer.len();
        if let Err(error) = write(&mut self.buffer) {
            self.buffer.truncate(start);
            return Err(error);
        }
        self.datagrams.push((destination, start..self.buffer.len()));
        Ok(self.buffer.len() - start)
    }
}
