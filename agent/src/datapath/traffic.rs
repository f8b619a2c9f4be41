//! What passes through the data plane, a batch at a time: from the TUN device, sealed, to the sockets, and back. Sealing
//! and opening are done without the core, which only says how and hears what came of it.

use std::ops::{Range, RangeInclusive};

use muster_common::{
    frame::{self, HEADER},
    time::Instant,
};
use muster_tunnel::{
    DirectorId, Ecn, Endpoint, Hop, Opening, PACKET_OFFSET, Received, Sealing, offload::SuperPacket,
};

use super::{
    counters::Loss,
    lane::Lane,
    shared::{Core, Fatal, Shared},
    tun_port::TunPort,
    worker::Worker,
};
use crate::{
    directors::flow,
    udp::{Family, Message, Run},
};

/// First octets of what directors send. All else is the tunnel's, or nobody's.
const FRAMES: RangeInclusive<u8> = 5..=9;

/// A datagram on its way in.
pub(super) struct Incoming {
    opening: Opening,
    source: Endpoint,
    ecn: Ecn,
    /// Where in the receive buffer it is.
    range: Range<usize>,
}

impl Worker {
    /// Takes a batch of packets from the TUN device.
    pub(super) fn packets_from_tun(&mut self) -> Result<(), Fatal> {
        let Self { shared, lane, tun, outgoing, .. } = self;
        match tun.receive(lane) {
            Ok(()) => {}
            // The interface has been deleted from under us; everything else concerns one packet.
            Err(source)
                if matches!(source.raw_os_error(), Some(libc::EBADFD | libc::ENODEV | libc::EBADF)) =>
            {
                return Err(Fatal { action: "read from the TUN device, which somebody has deleted", source });
            }
            Err(_) => lane.counters.lose(Loss::TunReceive),
        }
        let mut packets: Vec<(SuperPacket<'_>, Option<Sealing>)> = Vec::with_capacity(tun.batch().len());
        for packet in tun.batch() {
            match packet {
                Some(packet) => {
                    lane.counters.tun_received.add(packet.segments(), packet.octets().len());
                    packets.push((packet, None));
                }
                None => lane.counters.lose(Loss::TunReceive),
            }
        }
        if packets.is_empty() {
            return Ok(());
        }
        shared.with_core(lane, |core, now| {
            for (packet, sealing) in &mut packets {
                if core.local_addresses.contains(&packet.source()) {
                    // The core counts what it drops, and why.
                    *sealing = core.tunnel.begin_send(packet, now).unwrap_or_default();
                } else {
                    lane.counters.lose(Loss::ForeignSource);
                }
            }
        })?;
        for (packet, sealing) in packets {
            if let Some(sealing) = sealing
                && sealing.seal(&packet, outgoing).is_err()
            {
                lane.counters.lose(Loss::Seal);
            }
        }
        self.send()
    }

    /// Takes datagrams from a socket, opens them where they lie, and hands their packets on.
    pub(super) fn datagrams_from(&mut self, family: Family) -> Result<(), Fatal> {
        let Self { shared, lane, tun, received, incoming, .. } = self;
        if lane.sockets.recv_into(family, received).is_err() {
            lane.counters.lose(Loss::UdpReceive);
        }
        lane.counters.lose_many(Loss::UdpReceive, received.lost());
        let (messages, octets) = received.parts_mut();
        if messages.is_empty() {
            return Ok(());
        }
        let datagrams = messages.iter().map(Message::count).sum();
        let bytes = messages.iter().map(|message| message.range.len()).sum();
        lane.counters.udp_received.add(datagrams, bytes);

        let mut relayed = (0, 0);
        shared.with_core(lane, |core, now| {
            for message in messages {
                let (source, ecn) = (message.source, Ecn::from_bits(message.ecn));
                for range in message.datagrams() {
                    let datagram = octets.get(range.clone()).unwrap_or_default();
                    let (source, start) = match datagram.first() {
                        Some(first) if FRAMES.contains(first) => {
                            match core.flows.handle(source, datagram, now) {
                                flow::Incoming::Data(endpoint) => {
                                    relayed = (relayed.0 + 1, relayed.1 + datagram.len());
                                    (endpoint, range.start + HEADER)
                                }
                                flow::Incoming::Done => continue,
                                flow::Incoming::Dropped => {
                                    lane.counters.lose(Loss::InvalidFrame);
                                    continue;
                                }
                            }
                        }
                        _ => (source.into(), range.start),
                    };
                    incoming.extend(core.begin(source, ecn, octets, start..range.end, now));
                }
            }
        })?;
        if relayed.0 > 0 {
            lane.counters.relay_received.add(relayed.0, relayed.1);
        }
        open(shared, lane, tun, incoming, octets)
    }

    /// Takes a batch of frames that the stream of a director has brought, as [`Self::datagrams_from`] does.
    pub(super) fn frames_from(&mut self, id: DirectorId, batch: &mut [u8]) -> Result<(), Fatal> {
        let Self { shared, lane, tun, incoming, .. } = self;
        let mut relayed = (0, 0);
        shared.with_core(lane, |core, now| {
            let mut start = 0;
            for octets in frame::frames(batch) {
                start += size_of::<u16>();
                let range = start..start + octets.len();
                start = range.end;
                match core.flows.handle_frame(id, octets) {
                    flow::Incoming::Data(endpoint) => {
                        relayed = (relayed.0 + 1, relayed.1 + octets.len());
                        let message = range.start + HEADER..range.end;
                        incoming.extend(core.begin(endpoint, Ecn::NotEct, batch, message, now));
                    }
                    flow::Incoming::Done => {}
                    flow::Incoming::Dropped => lane.counters.lose(Loss::InvalidFrame),
                }
            }
        })?;
        if relayed.0 > 0 {
            lane.counters.relay_received.add(relayed.0, relayed.1);
        }
        open(shared, lane, tun, incoming, batch)
    }

    /// Sends the batch that packets were sealed into.
    fn send(&mut self) -> Result<(), Fatal> {
        let Self { shared, lane, outgoing, .. } = self;
        if outgoing.is_empty() {
            return Ok(());
        }
        for run in outgoing.runs().filter(|run| is_frame(run.octets)) {
            let frames = run.octets.len().div_ceil(run.datagram_len.max(1));
            lane.counters.relay_sent.add(frames, run.octets.len());
        }
        let by_streams = outgoing.runs().filter_map(|run| match run.hop {
            Hop::Stream(id) => Some(run.datagrams().map(move |frame| (id, frame))),
            Hop::Udp(_) => None,
        });
        shared.streams.send(by_streams.flatten(), &lane.counters);
        let sent = lane.sockets.send_runs(outgoing.runs().filter_map(|run| {
            Some(Run {
                destination: run.hop.udp()?,
                ecn: run.ecn,
                fragmentation: run.fragmentation,
                datagram_len: run.datagram_len,
                octets: run.octets,
            })
        }));
        outgoing.clear();
        lane.counters.sent(&sent);
        if sent.too_big().next().is_some() {
            shared.with_core(lane, |core, now| core.paths_too_narrow(lane, &sent, now))?;
        }
        Ok(())
    }
}

/// Whether a datagram is one of a director's, and not one of WireGuard's.
pub(super) fn is_frame(datagram: &[u8]) -> bool {
    datagram.first().is_some_and(|first| FRAMES.contains(first))
}

impl Core {
    /// Begins with the message at `range` of `octets`, which came from `source`.
    fn begin(
        &mut self,
        source: Endpoint,
        ecn: Ecn,
        octets: &[u8],
        range: Range<usize>,
        now: Instant,
    ) -> Option<Incoming> {
        let message = octets.get(range.clone()).unwrap_or_default();
        // The core counts what it drops, and why.
        let opening = self.tunnel.begin_receive(source, message, now).ok().flatten()?;
        Some(Incoming { opening, source, ecn, range })
    }
}

/// Opens messages where they lie in `octets`, and hands their packets on.
fn open(
    shared: &Shared,
    lane: &Lane,
    tun: &mut TunPort,
    incoming: &mut Vec<Incoming>,
    octets: &mut [u8],
) -> Result<(), Fatal> {
    if incoming.is_empty() {
        return Ok(());
    }
    for Incoming { opening, range, .. } in incoming.iter_mut() {
        opening.open(octets.get_mut(range.clone()).unwrap_or_default());
    }
    tun.begin(lane);
    shared.with_core(lane, |core, now| {
        for Incoming { opening, source, ecn, range } in incoming.drain(..) {
            let start = range.start + PACKET_OFFSET;
            let message = octets.get_mut(range).unwrap_or_default();
            if let Ok(Received::Packet { packet, .. }) =
                core.tunnel.finish_receive(opening, source, ecn, message, now)
            {
                let len = packet.len();
                if core.local_addresses.is_destination(packet) {
                    tun.push(octets, start..start + len);
                } else {
                    // The host may be a router, but not for peers.
                    lane.counters.lose(Loss::ForeignDestination);
                }
            }
        }
    })?;
    tun.send_pushed(octets, lane);
    Ok(())
}
