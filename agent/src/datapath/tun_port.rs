//! The data plane's side of the TUN device: one super-packet in, and those that a batch of datagrams is joined to out.

use std::{
    io::{self, IoSlice},
    ops::Range,
};

use muster_tunnel::offload::{Coalescer, Item, VirtioHeader};

use super::counters::{Counters, Loss};
use crate::tun::{Offloads, Tun};

/// The longest packet with the header before it.
const SUPER_PACKET: usize = VirtioHeader::LEN + 65_535;

/// A TUN device with the buffers that it takes.
pub(super) struct TunPort {
    tun: Tun,
    buffer: Vec<u8>,
    coalescer: Coalescer,
}

impl TunPort {
    pub(super) fn new(tun: Tun) -> Self {
        let mut coalescer = Coalescer::new();
        let offloads = tun.offloads();
        coalescer.set_enabled(offloads.tso, offloads.uso);
        Self { tun, buffer: vec![0; SUPER_PACKET], coalescer }
    }

    /// The offloads in use.
    pub(super) fn offloads(&self) -> Offloads {
        self.tun.offloads()
    }

    /// Reads one packet or super-packet, with its virtio header.
    pub(super) fn receive(&mut self) -> io::Result<&[u8]> {
        let len = self.tun.recv_super(&mut self.buffer)?;
        Ok(self.buffer.get(..len).unwrap_or_default())
    }

    /// Takes a packet that is to be handed to the host's network stack, at `packet` of `octets`.
    pub(super) fn push(&mut self, octets: &[u8], packet: Range<usize>) {
        self.coalescer.push(octets, packet);
    }

    /// Hands what has been pushed to the host's network stack, as few super-packets.
    pub(super) fn send_pushed(&mut self, octets: &[u8], counters: &mut Counters) {
        let (tun, mut refused) = (&self.tun, None);
        self.coalescer.drain(octets, |item| match tun.send_super(item.slices()) {
            Ok(()) => counters.tun_sent.add(item.count(), item.len()),
            Err(e) if item.count() > 1 => {
                refused = Some((item.is_udp(), e));
                send_singly(tun, &item, counters);
            }
            Err(_) => counters.lose(Loss::TunSend),
        });
        if let Some((is_udp, error)) = refused.filter(|(_, e)| e.raw_os_error() == Some(libc::EINVAL)) {
            self.downgrade(is_udp, &error);
        }
    }

    /// Hands one packet to the host's network stack.
    pub(super) fn send_packet(&self, packet: &[u8], counters: &mut Counters) {
        match send_one(&self.tun, packet) {
            Ok(()) => counters.tun_sent.add(1, packet.len()),
            Err(_) => counters.lose(Loss::TunSend),
        }
    }

    /// The kernel does not take such super-packets after all: do not make them any more.
    fn downgrade(&mut self, is_udp: bool, error: &io::Error) {
        let mut offloads = self.tun.offloads();
        if is_udp {
            offloads.uso = false;
        } else {
            offloads = Offloads { tso: false, uso: false, ..offloads };
        }
        tracing::info!(%error, ?offloads, "the kernel refuses super-packets on the TUN device; going on without");
        if let Err(error) = self.tun.set_offloads(offloads) {
            tracing::info!(%error, "cannot switch offloads of the TUN device off");
        }
        self.coalescer.set_enabled(offloads.tso, offloads.uso);
    }
}

fn send_one(tun: &Tun, packet: &[u8]) -> io::Result<()> {
    let header = VirtioHeader::default().octets();
    tun.send_super(&[IoSlice::new(&header), IoSlice::new(packet)])
}

fn send_singly(tun: &Tun, item: &Item<'_, '_>, counters: &mut Counters) {
    for packet in item.packets() {
        match send_one(tun, packet) {
            Ok(()) => counters.tun_sent.add(1, packet.len()),
            Err(_) => counters.lose(Loss::TunSend),
        }
    }
}
