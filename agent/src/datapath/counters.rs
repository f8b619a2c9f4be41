//! Counting what passes through the data plane, and what does not and why. Each thread counts for itself, so that
//! counting waits for nobody; whoever wants to know adds up.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use muster_tunnel::Dropped;

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
    Seal,
    /// A stream to a director has no room, or is gone.
    StreamFull,
    /// What looks like a director's is not, or is of no flow.
    InvalidFrame,
    /// The host forwards, or uses an address that peers do not know as this device's.
    ForeignSource,
    /// A peer has sent it to an address that is not this device's, nor of what it carries.
    ForeignDestination,
}

const LOSSES: [(Loss, &str); 10] = [
    (Loss::TunReceive, "tun_receive_failed"),
    (Loss::TunSend, "tun_send_failed"),
    (Loss::UdpReceive, "udp_receive_failed"),
    (Loss::UdpSend, "udp_send_failed"),
    (Loss::UdpSendBufferFull, "udp_send_buffer_full"),
    (Loss::Seal, Dropped::SealFailed.as_str()),
    (Loss::StreamFull, "stream_full"),
    (Loss::InvalidFrame, "invalid_frame"),
    (Loss::ForeignSource, "foreign_source"),
    (Loss::ForeignDestination, "foreign_destination"),
];

/// A number that one thread counts and others read: no more than a plain addition.
#[derive(Default)]
struct Count(AtomicU64);

impl Count {
    fn add(&self, number: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(number), Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// A [`Counter`] of one thread.
#[derive(Default)]
pub(super) struct ThreadCounter {
    packets: Count,
    bytes: Count,
    calls: Count,
}

impl ThreadCounter {
    /// Counts what one system call has moved.
    pub(super) fn add(&self, packets: usize, bytes: usize) {
        self.add_calls(packets as u64, bytes as u64, 1);
    }

    fn add_calls(&self, packets: u64, bytes: u64, calls: u64) {
        self.packets.add(packets);
        self.bytes.add(bytes);
        self.calls.add(calls);
    }

    fn add_to(&self, sum: &mut Counter) {
        sum.packets += self.packets.get();
        sum.bytes += self.bytes.get();
        sum.calls += self.calls.get();
    }
}

/// What one thread has counted, apart from what others count in the processor's cache.
#[derive(Default)]
#[repr(align(128))]
pub(super) struct Counters {
    pub(super) tun_received: ThreadCounter,
    pub(super) tun_sent: ThreadCounter,
    pub(super) udp_received: ThreadCounter,
    udp_sent: ThreadCounter,
    /// Of what UDP or a stream brings, and of what is sent: what directors forward.
    pub(super) relay_received: ThreadCounter,
    pub(super) relay_sent: ThreadCounter,
    losses: [Count; LOSSES.len()],
}

impl Counters {
    pub(super) fn lose(&self, reason: Loss) {
        self.lose_many(reason, 1);
    }

    pub(super) fn lose_many(&self, reason: Loss, number: u64) {
        if let Some(count) = self.losses.get(reason as usize) {
            count.add(number);
        }
    }

    pub(super) fn sent(&self, sent: &Sent) {
        self.udp_sent.add_calls(sent.datagrams, sent.bytes, sent.calls);
        self.lose_many(Loss::UdpSendBufferFull, sent.full);
        self.lose_many(Loss::UdpSend, sent.failed);
    }

    /// Adds what this thread has counted.
    pub(super) fn add_to(&self, snapshot: &mut Snapshot) {
        self.tun_received.add_to(&mut snapshot.tun_received);
        self.tun_sent.add_to(&mut snapshot.tun_sent);
        self.udp_received.add_to(&mut snapshot.udp_received);
        self.udp_sent.add_to(&mut snapshot.udp_sent);
        self.relay_received.add_to(&mut snapshot.relay_received);
        self.relay_sent.add_to(&mut snapshot.relay_sent);
        for (reason, name) in LOSSES {
            let count = self.losses.get(reason as usize).map_or(0, Count::get);
            *snapshot.drops.entry(name).or_default() += count;
        }
    }
}
