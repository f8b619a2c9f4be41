//! The streams to directors, for where UDP does not pass: each a queue of batches of frames on their way out. A full queue
//! loses what does not fit, as a socket does.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use muster_common::frame::{self, BATCH};
use muster_tunnel::DirectorId;
use tokio::sync::mpsc;

use super::counters::{Counters, Loss};

/// Where a stream takes batches of frames from (see [`frame::frames`]); the other end of the channel sends them.
#[derive(Clone, Debug)]
pub struct FrameSender(pub mpsc::Sender<Bytes>);

impl PartialEq for FrameSender {
    fn eq(&self, other: &Self) -> bool {
        self.0.same_channel(&other.0)
    }
}

impl Eq for FrameSender {}

/// Those that are open, for all threads. Locked only where there is something for one of them.
#[derive(Debug, Default)]
pub(super) struct Streams(Mutex<BTreeMap<DirectorId, FrameSender>>);

impl Streams {
    /// Replaces a director's stream.
    pub(super) fn set(&self, id: DirectorId, stream: Option<FrameSender>) {
        match stream {
            Some(stream) => self.lock().insert(id, stream),
            None => self.lock().remove(&id),
        };
    }

    /// Sends frames in their order, those to one director in as few batches as they fit into.
    pub(super) fn send<'a>(&self, frames: impl Iterator<Item = (DirectorId, &'a [u8])>, counters: &Counters) {
        let mut pending: Option<(DirectorId, Vec<u8>, u64)> = None;
        let mut lost = 0;
        let send = |(id, batch, count): (DirectorId, Vec<u8>, u64)| {
            let streams = self.lock();
            let is_sent = streams.get(&id).is_some_and(|stream| stream.0.try_send(batch.into()).is_ok());
            if is_sent { 0 } else { count }
        };
        for (id, octets) in frames {
            if let Some((of, batch, count)) = &mut pending
                && *of == id
                && frame::push_frame(batch, octets)
            {
                *count += 1;
                continue;
            }
            lost += pending.take().map_or(0, send);
            let mut batch = Vec::with_capacity((octets.len() + 2).clamp(2_048, BATCH));
            if frame::push_frame(&mut batch, octets) {
                pending = Some((id, batch, 1));
            } else {
                lost += 1;
            }
        }
        lost += pending.map_or(0, send);
        counters.lose_many(Loss::StreamFull, lost);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<DirectorId, FrameSender>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::Snapshot;

    #[test]
    fn frames_go_in_batches_to_their_directors_and_are_lost_when_it_is_full() {
        let streams = Streams::default();
        let counters = Counters::default();
        let (a, mut of_a) = mpsc::channel(2);
        let (b, mut of_b) = mpsc::channel(1);
        streams.set(DirectorId(1), Some(FrameSender(a)));
        streams.set(DirectorId(2), Some(FrameSender(b)));
        let large = [3; 1_452];
        let to = |id, octets: &'static [u8]| (DirectorId(id), octets);
        let sent = [to(1, b"one"), to(1, b"two"), to(2, b"three"), to(1, b"four"), to(3, b"nobody")];
        streams.send(sent.into_iter(), &counters);
        let batches = |batches: &mut mpsc::Receiver<Bytes>| {
            std::iter::from_fn(|| batches.try_recv().ok())
                .map(|batch| frame::frames(&batch).map(<[u8]>::to_vec).collect::<Vec<_>>())
                .collect::<Vec<_>>()
        };
        assert_eq!(batches(&mut of_a), [vec![b"one".to_vec(), b"two".to_vec()], vec![b"four".to_vec()]]);
        assert_eq!(batches(&mut of_b), [[b"three"]]);
        // 45 of them fit into a batch, and only one batch into the queue.
        streams.send(std::iter::repeat_n((DirectorId(2), large.as_slice()), 100), &counters);
        assert_eq!(batches(&mut of_b).into_iter().map(|batch| batch.len()).collect::<Vec<_>>(), [45]);
        streams.set(DirectorId(2), None);
        streams.send([to(2, b"closed")].into_iter(), &counters);
        let mut snapshot = Snapshot::default();
        counters.add_to(&mut snapshot);
        assert_eq!(snapshot.drops.get("stream_full"), Some(&(1 + 55 + 1)));
    }
}
