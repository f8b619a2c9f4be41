//! Counting what passes through the data plane, and what does not and why.

use super::{Counter, Snapshot};
use crate::{tun::Tun, udp::Sent};

/// Reasons to drop that arise at the edge of the data plane; the core has its own.
#[derive(Clone, Copy)]
pub(super) enum Drop {
    TunReceive,
    TunSend,
    UdpReceive,
    UdpSend,
    UdpSendBufferFull,
    /// The host forwards, or uses an address that peers do not know as this device's.
    ForeignSource,
}

const DROPS: [(Drop, &str); 6] = [
    (Drop::TunReceive, "tun_receive_failed"),
    (Drop::TunSend, "tun_send_failed"),
    (Drop::UdpReceive, "udp_receive_failed"),
    (Drop::UdpSend, "udp_send_failed"),
    (Drop::UdpSendBufferFull, "udp_send_buffer_full"),
    (Drop::ForeignSource, "foreign_source"),
];

#[derive(Default)]
pub(super) struct Counters {
    pub(super) tun_received: Counter,
    tun_sent: Counter,
    pub(super) udp_received: Counter,
    udp_sent: Counter,
    drops: [u64; DROPS.len()],
}

impl Counters {
    pub(super) fn drop(&mut self, reason: Drop) {
        self.drop_many(reason, 1);
    }

    fn drop_many(&mut self, reason: Drop, number: u64) {
        if let Some(count) = self.drops.get_mut(reason as usize) {
            *count += number;
        }
    }

    /// Writes a packet to the TUN device, and counts it or its loss: one that the kernel refuses is that packet's fault.
    pub(super) fn tun_send(&mut self, tun: &Tun, packet: &[u8]) {
        match tun.send(packet) {
            Ok(()) => self.tun_sent.count(packet.len()),
            Err(_) => self.drop(Drop::TunSend),
        }
    }

    pub(super) fn sent(&mut self, sent: Sent) {
        self.udp_sent.packets += sent.datagrams;
        self.udp_sent.bytes += sent.bytes;
        self.drop_many(Drop::UdpSendBufferFull, sent.full);
        self.drop_many(Drop::UdpSend, sent.failed);
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        let count = |reason: Drop| self.drops.get(reason as usize).copied().unwrap_or(0);
        Snapshot {
            tun_received: self.tun_received,
            tun_sent: self.tun_sent,
            udp_received: self.udp_received,
            udp_sent: self.udp_sent,
            drops: DROPS.iter().map(|(reason, name)| (*name, count(*reason))).collect(),
            ..Snapshot::default()
        }
    }
}
