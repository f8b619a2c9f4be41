//! Frames of a stream, which come many at a time: those to one place are moved together, so that they leave as runs.

use std::ops::Range;

use muster_common::{datagram::Ecn, time::Instant};

use super::{Dropped, Forward, Relay, To, Verdict, Verdicts};

/// Most datagrams and octets in a run that leaves whole.
const RUN_DATAGRAMS: usize = 64;
const RUN_OCTETS: usize = 65_472;

impl Relay {
    /// Says what becomes of a batch, (u16 length, frame)*, that came by the stream of `session`. Frames to pass on have
    /// their headers overwritten and are moved to the beginning of `batch`, back to back. Verdicts are added to `out`.
    pub fn forward_batch(&self, session: u32, batch: &mut [u8], now: Instant, out: &mut Verdicts) {
        let first = out.forwards.len();
        let (mut read, mut write) = (0, 0);
        while let Some(range) = next_frame(batch, read) {
            read = range.end;
            let Some(frame) = batch.get_mut(range.clone()) else { break };
            match self.forward_frame(session, frame, now) {
                Verdict::Forward(to) => {
                    let moved = write..write + range.len();
                    write = moved.end;
                    batch.copy_within(range, moved.start);
                    append(out, first, to, moved);
                }
                Verdict::Drop(reason, notice) => {
                    out.drops.add(reason, 1);
                    out.told.extend(notice);
                }
            }
        }
        if read < batch.len() {
            out.drops.add(Dropped::Malformed, 1);
        }
    }
}

/// Where the frame is whose length is at `at`; `None` at the end, or if it is longer than what follows.
fn next_frame(batch: &[u8], at: usize) -> Option<Range<usize>> {
    let (length, rest) = batch.get(at..)?.split_first_chunk()?;
    let length = usize::from(u16::from_be_bytes(*length));
    (length <= rest.len()).then_some(at + 2..at + 2 + length)
}

/// Adds a frame to the last run since `first`, or begins another.
fn append(out: &mut Verdicts, first: usize, to: To, frame: Range<usize>) {
    if let Some(last) = out.forwards.get_mut(first..).and_then(<[Forward]>::last_mut) {
        let len = last.range.len();
        let is_whole = len.is_multiple_of(last.datagram_len) && frame.len() <= last.datagram_len;
        let has_room = len / last.datagram_len < RUN_DATAGRAMS && len + frame.len() <= RUN_OCTETS;
        if last.to == to && is_whole && has_room {
            last.range.end = frame.end;
            return;
        }
    }
    out.forwards.push(Forward { to, ecn: Ecn::NotEct, datagram_len: frame.len(), range: frame });
}
