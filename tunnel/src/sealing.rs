//! Packets on their way out, between the tunnel's bookkeeping and the socket.

use crate::{
    cipher::TransportKey, ecn::Ecn, endpoint::Route, event::Fragmentation, limits::OVERHEAD,
    message::DataHeader, offload::SuperPacket, outgoing::Outgoing, packet::padded_len, stats::Dropped,
};

/// How the segments of one packet are sealed: key, counters and route, apart from the tunnel, so that this takes
/// no lock. The tunnel has counted them as sent; one that is let go of without sealing was lost on the way.
#[must_use = "the tunnel takes the packet for sent"]
pub struct Sealing {
    pub(crate) key: TransportKey,
    /// The peer's index of the session.
    pub(crate) receiver: u32,
    /// Counter of the first segment; the others' follow.
    pub(crate) first_counter: u64,
    pub(crate) segments: usize,
    pub(crate) route: Route,
    pub(crate) marks: (Ecn, Fragmentation),
    /// Padding makes segments no longer than this.
    pub(crate) pad_to: usize,
    /// TCP is cut into segments of this size at most: see [`SuperPacket::narrowed`].
    pub(crate) narrowed_to: Option<usize>,
}

impl Sealing {
    /// Octets of all messages that `packet` becomes, which is cut already.
    pub(crate) fn octets(&self, packet: &SuperPacket<'_>) -> usize {
        let message = |index| padded_len(packet.segment_len(index), self.pad_to) + OVERHEAD;
        let last = self.segments - 1;
        last * message(0) + message(last)
    }

    /// Seals the segments of `packet`, the one that this was made for, into `out`. Once: no counter may serve twice, not
    /// even for what seems to be the same packet.
    ///
    /// # Errors
    /// [`Dropped::SealFailed`] if the cipher fails, and for another packet. What was sealed before the failure stays in
    /// `out`.
    pub fn seal(self, packet: &SuperPacket<'_>, out: &mut Outgoing) -> Result<(), Dropped> {
        let narrowed = self.narrowed_to.and_then(|mtu| packet.narrowed(mtu));
        let packet = narrowed.as_ref().unwrap_or(packet);
        if packet.segments() != self.segments {
            return Err(Dropped::SealFailed);
        }
        for (index, counter) in (0..self.segments).zip(self.first_counter..) {
            let len = packet.segment_len(index);
            let padded = padded_len(len, self.pad_to);
            out.append(&self.route, self.marks, padded + OVERHEAD, |slot| {
                self.key.seal(DataHeader { receiver: self.receiver, counter }, slot, |inner| {
                    let (inner, padding) = inner.split_at_mut(len);
                    packet.write_segment(index, inner);
                    padding.fill(0);
                })
            })?;
        }
        Ok(())
    }
}
