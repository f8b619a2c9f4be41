//! What passes through the data plane, a batch at a time: from the TUN device, sealed, to the sockets, and back.

use muster_common::time::Instant;
use muster_tunnel::{
    Ecn, PACKET_OFFSET, Received, Run,
    offload::{SuperPacket, VirtioHeader},
};

use super::{
    counters::Loss,
    event_loop::{EventLoop, Fatal},
};
use crate::udp::{Family, Message, Sent, TooBig};

/// Reads from the TUN device before the others' turn.
const READS: usize = 64;
/// Sealed octets that leave together: more would push each other out of the processor's cache.
const SEND_OCTETS: usize = 128 << 10;

impl EventLoop {
    /// Takes packets from the TUN device until none waits or it is the others' turn.
    pub(super) fn packets_from_tun(&mut self, now: Instant) -> Result<(), Fatal> {
        for _ in 0..READS {
            let octets = match self.tun.receive() {
                Ok(octets) => octets,
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                // The interface has been deleted from under us; everything else concerns one packet.
                Err(source)
                    if matches!(source.raw_os_error(), Some(libc::EBADFD | libc::ENODEV | libc::EBADF)) =>
                {
                    return Err(Fatal {
                        action: "read from the TUN device, which somebody has deleted",
                        source,
                    });
                }
                Err(_) => {
                    self.counters.lose(Loss::TunReceive);
                    break;
                }
            };
            let Some((header, packet)) = octets.split_first_chunk::<{ VirtioHeader::LEN }>() else {
                self.counters.lose(Loss::TunReceive);
                continue;
            };
            let header = VirtioHeader::parse(header).unwrap_or_default();
            let Ok(packet) = SuperPacket::parse(header, packet) else {
                self.counters.lose(Loss::TunReceive);
                continue;
            };
            self.counters.tun_received.add(packet.segments(), octets.len() - VirtioHeader::LEN);
            if !self.local_addresses.contains(&packet.source()) {
                self.counters.lose(Loss::ForeignSource);
                continue;
            }
            // The core counts what it drops, and why.
            let _ = self.tunnel.handle_super_packet(&packet, now, &mut self.outgoing);
            if self.outgoing.octets() >= SEND_OCTETS {
                self.send(now);
            }
        }
        self.send(now);
        Ok(())
    }

    /// Takes datagrams from a socket, opens them where they lie, and hands their packets on.
    pub(super) fn datagrams_from(&mut self, family: Family, now: Instant) {
        if self.sockets.recv_into(family, &mut self.received).is_err() {
            self.counters.lose(Loss::UdpReceive);
        }
        self.counters.lose_many(Loss::UdpReceive, self.received.lost());
        let (messages, octets) = self.received.parts_mut();
        if !messages.is_empty() {
            let datagrams = messages.iter().map(Message::count).sum();
            let bytes = messages.iter().map(|message| message.range.len()).sum();
            self.counters.udp_received.add(datagrams, bytes);
        }
        for message in messages {
            let ecn = Ecn::from_bits(message.ecn);
            for range in message.datagrams() {
                let start = range.start + PACKET_OFFSET;
                let datagram = octets.get_mut(range).unwrap_or_default();
                if let Ok(Received::Packet { packet, .. }) =
                    self.tunnel.handle_datagram(message.source, ecn, datagram, now)
                {
                    let len = packet.len();
                    self.tun.push(octets, start..start + len);
                }
            }
        }
        self.tun.send_pushed(octets, &mut self.counters);
    }

    /// Sends what the core has said by itself (handshakes, keepalives, and packets that have waited for them), and
    /// then the batch that packets were sealed into.
    pub(super) fn send(&mut self, now: Instant) {
        self.transmits.extend(std::iter::from_fn(|| self.tunnel.poll_transmit()));
        if !self.transmits.is_empty() {
            let runs = self.transmits.iter().map(|transmit| Run {
                destination: transmit.destination,
                ecn: Ecn::NotEct,
                fragmentation: transmit.fragmentation,
                datagram_len: transmit.payload.len(),
                octets: &transmit.payload,
            });
            let sent = self.sockets.send_runs(runs);
            self.transmits.clear();
            self.sent(sent, now);
        }
        if !self.outgoing.is_empty() {
            let sent = self.sockets.send_runs(self.outgoing.runs());
            self.outgoing.clear();
            self.sent(sent, now);
        }
    }

    fn sent(&mut self, sent: Sent, now: Instant) {
        self.counters.sent(sent);
        for TooBig { destination, datagram_len } in sent.too_big() {
            if let Ok(mtu) = self.sockets.path_mtu(destination) {
                self.tunnel.path_too_big(destination, mtu, datagram_len, now);
            }
        }
    }
}
