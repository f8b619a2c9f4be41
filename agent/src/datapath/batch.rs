//! A batch of received packets or datagrams: slots of one buffer that is made once and used again and again.

use std::io;

/// Most packets in a batch. It is also what one source may take of the event loop's time before the others' turn.
pub(crate) const BATCH: usize = 64;

/// Up to [`BATCH`] packets, each with what is known of it beside its octets (`A`), such as its source. Small packets
/// touch only the beginnings of the slots, and the rest of the buffer takes no memory.
pub(crate) struct Batch<A> {
    slot: usize,
    buffer: Vec<u8>,
    entries: Vec<(A, usize)>,
}

impl<A: Copy> Batch<A> {
    /// A batch of packets of at most `slot` octets.
    pub(crate) fn new(slot: usize) -> Self {
        Self { slot, buffer: vec![0; BATCH * slot], entries: Vec::with_capacity(BATCH) }
    }

    /// Replaces the batch's contents by what `receive` yields, until it has no more (`WouldBlock`), fails, or the
    /// batch is full. What came before a failure is kept.
    pub(crate) fn fill(
        &mut self,
        mut receive: impl FnMut(&mut [u8]) -> io::Result<(usize, A)>,
    ) -> io::Result<()> {
        self.entries.clear();
        for slot in self.buffer.chunks_exact_mut(self.slot) {
            match retry(|| receive(slot)) {
                Ok((length, about)) => self.entries.push((about, length.min(self.slot))),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// The packets in the order in which they came.
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (A, &mut [u8])> {
        self.entries.iter().zip(self.buffer.chunks_exact_mut(self.slot)).map(|((about, length), slot)| {
            let length = (*length).min(slot.len());
            (*about, &mut slot[..length])
        })
    }
}

/// Repeats a system call that a signal has interrupted.
fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contents(batch: &mut Batch<usize>) -> Vec<(usize, Vec<u8>)> {
        batch.iter_mut().map(|(about, packet)| (about, packet.to_vec())).collect()
    }

    #[test]
    fn takes_what_there_is_and_forgets_it_the_next_time() {
        let mut batch = Batch::new(2048);
        let mut waiting = vec![b"three".to_vec(), b"two".to_vec(), b"one".to_vec()];
        let mut receive = |slot: &mut [u8]| {
            let packet = waiting.pop().ok_or(io::ErrorKind::WouldBlock)?;
            slot[..packet.len()].copy_from_slice(&packet);
            Ok((packet.len(), waiting.len()))
        };
        batch.fill(&mut receive).expect("no failure");
        assert_eq!(
            contents(&mut batch),
            [(2, b"one".to_vec()), (1, b"two".to_vec()), (0, b"three".to_vec())]
        );
        batch.fill(&mut receive).expect("nothing is no failure");
        assert_eq!(contents(&mut batch), []);
    }

    #[test]
    fn is_bounded_and_keeps_what_came_before_a_failure() {
        let mut batch = Batch::new(2048);
        batch.fill(|_| Ok((0, 0))).expect("no failure");
        assert_eq!(batch.iter_mut().count(), BATCH);

        let mut calls = 0;
        let result = batch.fill(|_| {
            calls += 1;
            match calls {
                1 => Err(io::ErrorKind::Interrupted.into()),
                2 | 3 => Ok((1, calls)),
                _ => Err(io::Error::from_raw_os_error(libc::ENOBUFS)),
            }
        });
        assert_eq!(result.expect_err("fails").raw_os_error(), Some(libc::ENOBUFS));
        assert_eq!(contents(&mut batch).iter().map(|(about, _)| *about).collect::<Vec<_>>(), [2, 3]);
    }
}
