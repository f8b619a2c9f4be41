//! What one thread moves packets with: a queue of the TUN device, sockets, and counters. Others may look at it, and write
//! to its queue.

use std::io::{self, IoSlice};

use muster_tunnel::offload::VirtioHeader;

use super::{
    Offloads,
    counters::{Counters, Loss},
    translate,
};
use crate::{tun::Tun, udp::UdpSockets};

/// See the module.
pub(super) struct Lane {
    pub(super) tun: Tun,
    pub(super) sockets: UdpSockets,
    pub(super) counters: Counters,
}

impl Lane {
    pub(super) fn new(tun: Tun, sockets: UdpSockets) -> Self {
        sockets.coalesce();
        Self { tun, sockets, counters: Counters::default() }
    }

    /// The offloads in use.
    pub(super) fn offloads(&self) -> Offloads {
        translate::offloads(self.tun.offloads(), self.sockets.offloads())
    }

    /// Hands one packet to the host's network stack.
    pub(super) fn send_packet(&self, packet: &[u8]) {
        match send_one(&self.tun, packet) {
            Ok(()) => self.counters.tun_sent.add(1, packet.len()),
            Err(_) => self.counters.lose(Loss::TunSend),
        }
    }
}

/// Hands one packet to the host's network stack through a queue.
pub(super) fn send_one(tun: &Tun, packet: &[u8]) -> io::Result<()> {
    let header = VirtioHeader::default().octets();
    tun.send_super(&[IoSlice::new(&header), IoSlice::new(packet)])
}
