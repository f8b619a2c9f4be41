//! What the path to a peer takes: how packets of each size leave, probes, and errors for those that are too big.

use std::net::SocketAddr;

use muster_common::time::Instant;
use rand::RngExt as _;

use super::Peer;
use crate::{
    endpoint::Hop,
    event::Fragmentation,
    icmp::{self, TooBig},
    limits::{OVERHEAD, OVERHEAD_V4, OVERHEAD_V6, PACKET_OFFSET},
    offload::SuperPacket,
    path_mtu::{MIN_PLPMTU, SMALLEST_PROBE, may_be_echo_reply, probe_packet},
    shared::Shared,
};

/// How packets leave.
#[derive(Clone, Copy)]
pub(super) struct Manner {
    /// It makes probing worth while: see [`crate::path_mtu::is_data`].
    is_data: bool,
    /// Padding makes them no longer than this.
    pub(super) pad_to: usize,
    pub(super) fragmentation: Fragmentation,
}

impl Peer {
    /// What TCP is cut to where it leaves that to this device. Fragments take longer than segments, and over IPv6 are made
    /// only if routers tell that they have to be; what surely fits has no need of them.
    #[inline]
    pub(super) fn segment_mtu(&self) -> usize {
        if self.path_mtu.needs_fragments()
            && self.paths.current().is_some_and(|endpoint| endpoint.may_be_ipv6())
        {
            return (MIN_PLPMTU - OVERHEAD_V6).into();
        }
        self.path_mtu.current().into()
    }

    /// How the segments of a packet leave; `None` if they are too big to.
    #[inline]
    pub(super) fn manner(&self, packet: &SuperPacket<'_>) -> Option<Manner> {
        let (len, mtu) = (packet.segment_len(0), usize::from(self.path_mtu.current()));
        let is_large = len > SMALLEST_PROBE.into();
        if is_large && may_be_echo_reply(packet.octets()) {
            // It may answer the peer's probe, which asks for the way to this device, not for the way back: whatever the
            // latter takes, it arrives.
            return Some(Manner { is_data: false, pad_to: 0, fragmentation: Fragmentation::Anyone });
        }
        let fragmentation = if len > mtu {
            icmp::may_be_fragmented(packet.octets()).then_some(Fragmentation::Anyone)?
        } else if self.path_mtu.needs_fragments() {
            Fragmentation::Anyone
        } else {
            Fragmentation::Known
        };
        Some(Manner { is_data: is_large, pad_to: mtu, fragmentation })
    }

    /// Tells the sender of a packet that was dropped what the path takes, unless it was told enough lately.
    #[cold]
    pub(super) fn tell_too_big(&mut self, packet: &SuperPacket<'_>, shared: &mut Shared, now: Instant) {
        if self.errors.take(now)
            && let TooBig::Error(error) = icmp::too_big(&packet.segment(0), self.path_mtu.current())
        {
            shared.packet(error);
        }
    }

    /// A packet was sent; if it makes probing worth while, a probe may be due.
    #[inline]
    pub(super) fn note_flow(&mut self, packet: &SuperPacket<'_>, manner: Manner, now: Instant) {
        if manner.is_data {
            self.flow = Some((packet.source(), packet.destination()));
            self.path_mtu.data_sent(now);
        }
    }

    /// Sends the probe that is due, if there is a session. It takes the way of the packets that make it worth while.
    /// For WireGuard's timers it is no data: nothing has to come back.
    pub(super) fn probe(&mut self, shared: &mut Shared, now: Instant) {
        let (Some(session), Some(endpoint), Some((source, destination))) = (
            self.sessions.current().filter(|session| session.can_send(now)),
            self.paths.current(),
            self.flow,
        ) else {
            return;
        };
        let Some(probe) = self.path_mtu.next_probe(now, || shared.rng.random()) else { return };
        let mut message = vec![0; PACKET_OFFSET];
        probe_packet(&probe, source, destination, &mut message);
        message.resize(message.len() + OVERHEAD - PACKET_OFFSET, 0);
        if session.seal(&mut message, now, |_| {}).is_ok() {
            tracing::trace!(peer = %self.public_key, size = probe.size, "probing the path");
            self.count_sent(message.len(), 1);
            self.timers.sent(now);
            shared.transmit(endpoint, Fragmentation::Never, message);
        }
    }

    /// A datagram to `destination` was too big for the path, of which the kernel says that it takes `outer_mtu`.
    pub(crate) fn path_too_big(
        &mut self,
        destination: SocketAddr,
        outer_mtu: usize,
        datagram_len: usize,
        shared: &Shared,
        now: Instant,
    ) {
        let route = self.paths.current().and_then(|endpoint| shared.links.route(&endpoint));
        let Some(route) = route.filter(|route| route.hop == Hop::Udp(destination)) else { return };
        let overhead = if destination.is_ipv4() { OVERHEAD_V4 } else { OVERHEAD_V6 };
        let known = outer_mtu.saturating_sub(usize::from(overhead) + route.header_len());
        let refused = datagram_len.saturating_sub(OVERHEAD + route.header_len());
        let mtu = if known < refused { known } else { refused.saturating_sub(1) };
        tracing::debug!(peer = %self.public_key, %destination, mtu, "the path takes no larger packets");
        self.path_mtu.too_big(u16::try_from(mtu).unwrap_or(u16::MAX), now);
    }
}
