//! A thread's side of the TUN device: a batch of packets and super-packets in, and those that a batch of datagrams is
//! joined to out.

use std::{io, ops::Range, sync::Arc};

use muster_tunnel::offload::{Coalescer, Item, SuperPacket, VirtioHeader};

use super::{
    counters::Loss,
    lane::{self, Lane},
    steering::queue_of,
};
use crate::tun::{Offloads, SUPER_PACKET_MAX, Tun};

/// Octets after which a batch is sealed and sent: more would push each other out of the processor's cache.
const BATCH_OCTETS: usize = 128 << 10;
/// Packets after which it is.
const BATCH_PACKETS: usize = 64;

/// The buffers between a lane and the TUN device.
pub(super) struct TunPort {
    /// All lanes, to whose queues packets are written.
    lanes: Vec<Arc<Lane>>,
    buffer: Vec<u8>,
    /// Where in the buffer the packets of the batch are, virtio headers included.
    batch: Vec<Range<usize>>,
    coalescer: Coalescer,
    /// What the coalescer goes by.
    offloads: Offloads,
}

impl TunPort {
    pub(super) fn new(lanes: Vec<Arc<Lane>>) -> Self {
        Self {
            lanes,
            buffer: vec![0; BATCH_OCTETS + SUPER_PACKET_MAX],
            batch: Vec::with_capacity(BATCH_PACKETS),
            coalescer: Coalescer::new(),
            offloads: Offloads::default(),
        }
    }

    /// Reads what waits in the lane's queue, as far as a batch takes it. [`Self::batch`] has it then, also if this is
    /// an error, which ends the batch.
    pub(super) fn receive(&mut self, lane: &Lane) -> io::Result<()> {
        self.batch.clear();
        let mut end = 0;
        while self.batch.len() < BATCH_PACKETS && end < BATCH_OCTETS {
            let room = self.buffer.get_mut(end..).unwrap_or_default();
            let len = match lane.tun.recv_super(room) {
                Ok(len) => len,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            };
            self.batch.push(end..end + len);
            end += len;
        }
        Ok(())
    }

    /// The packets of the batch, those that are none included.
    pub(super) fn batch(&self) -> impl ExactSizeIterator<Item = Option<SuperPacket<'_>>> {
        self.batch.iter().map(|range| {
            let octets = self.buffer.get(range.clone())?;
            let (header, packet) = octets.split_first_chunk::<{ VirtioHeader::LEN }>()?;
            let header = VirtioHeader::parse(header).unwrap_or_default();
            SuperPacket::parse(header, packet).ok()
        })
    }

    /// Takes a packet that is to be handed to the host's network stack, at `packet` of `octets`.
    pub(super) fn push(&mut self, octets: &[u8], packet: Range<usize>) {
        self.coalescer.push(octets, packet);
    }

    /// Gets ready for a batch of packets to push.
    pub(super) fn begin(&mut self, lane: &Lane) {
        // Another thread may have found out that the kernel refuses some.
        let offloads = lane.tun.offloads();
        if offloads != self.offloads {
            self.offloads = offloads;
            self.coalescer.set_enabled(offloads.tso, offloads.uso);
        }
    }

    /// Hands what has been pushed to the host's network stack, as few super-packets.
    pub(super) fn send_pushed(&mut self, octets: &[u8], lane: &Lane) {
        let (lanes, counters, mut refused) = (&self.lanes, &lane.counters, None);
        self.coalescer.drain(octets, |item| {
            let first = item.packets().next().unwrap_or_default();
            let tun = lanes.get(queue_of(first, lanes.len())).map_or(&lane.tun, |lane| &lane.tun);
            match tun.send_super(item.slices()) {
                Ok(()) => counters.tun_sent.add(item.count(), item.len()),
                Err(e) if item.count() > 1 => {
                    refused = Some((item.is_udp(), e));
                    send_singly(tun, &item, lane);
                }
                Err(_) => counters.lose(Loss::TunSend),
            }
        });
        if let Some((is_udp, error)) = refused.filter(|(_, e)| e.raw_os_error() == Some(libc::EINVAL)) {
            self.downgrade(lane, is_udp, &error);
        }
    }

    /// The kernel does not take such super-packets after all: do not make them any more.
    fn downgrade(&mut self, lane: &Lane, is_udp: bool, error: &io::Error) {
        let mut offloads = lane.tun.offloads();
        if is_udp {
            offloads.uso = false;
        } else {
            offloads = Offloads { tso: false, uso: false, ..offloads };
        }
        tracing::info!(%error, ?offloads, "the kernel refuses super-packets on the TUN device; going on without");
        if let Err(error) = lane.tun.set_offloads(offloads) {
            tracing::info!(%error, "cannot switch offloads of the TUN device off");
        }
        self.coalescer.set_enabled(offloads.tso, offloads.uso);
        self.offloads = lane.tun.offloads();
    }
}

fn send_singly(tun: &Tun, item: &Item<'_, '_>, lane: &Lane) {
    for packet in item.packets() {
        match lane::send_one(tun, packet) {
            Ok(()) => lane.counters.tun_sent.add(1, packet.len()),
            Err(_) => lane.counters.lose(Loss::TunSend),
        }
    }
}
