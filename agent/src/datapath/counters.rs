//! Counting what passes through the data plane, and what does not and why.

use super::{Counter, Snapshot};
use crate::udp::Sent;

/// Reasons to drop that arise at the edge of the data plane; the core has its own.
#[derive(Clone, Copy)]
pub(super) enum Loss {
    TunReceive,
    TunSend,
    UdpReceive,
    UdpSend,
    UdpSendBufferFull,
    /// The host forwards, or uses an address that peers do not know as this device's.
    ForeignSource,
}

const LOSSES: [(Loss, &str); 6] = [
    (Loss::TunReceive, "tun_receive_failed"),
    (Loss::TunSend, "tun_send_failed"),
    (Loss::UdpReceive, "udp_receive_failed"),
    (Loss::UdpSend, "udp_send_failed"),
    (Loss::UdpSendBufferFull, "udp_send_buffer_full"),
    (Loss::ForeignSource, "foreign_source"),
];

#[derive(Default)]
pub(super) struct Counters {
    pub(super) tun_received: Counter,
    pub(super) tun_sent: Counter,
    pub(super) udp_received: Counter,
    udp_sent: Counter,
    losses: [u64; LOSSES.len()],
}

impl Counters {
    pub(super) fn lose(&mut self, reason: Loss) {
        self.lose_many(reason, 1);
    }

    pub(super) fn lose_many(&mut self, reason: Loss, number: u64) {
        if let Some(count) = self.losses.get_mut(reason as usize) {
            *count += number;
        }
    }

    pub(super) fn sent(&mut self, sent: Sent) {
        self.udp_sent.packets += sent.datagrams;
        self.udp_sent.bytes += sent.bytes;
        self.udp_sent.calls += sent.calls;
        self.lose_many(Loss::UdpSendBufferFull, sent.full);
        self.lose_many(Loss::UdpSend, sent.failed);
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        let count = |reason: Loss| self.losses.get(reason as usize).copied().unwrap_or(0);
        Snapshot {
            tun_received: self.tun_received,
            tun_sent: self.tun_sent,
            udp_received: self.udp_received,
            udp_sent: self.udp_sent,
            drops: LOSSES.iter().map(|(reason, name)| (*name, count(*reason))).collect(),
            ..Snapshot::default()
        }
    }
}
