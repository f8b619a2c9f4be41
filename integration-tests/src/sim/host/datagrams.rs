//! The data plane of a host: datagrams and frames that come in, packets that go out and come out.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use ipnet::IpNet;
use muster_agent::directors::flow::Incoming;
use muster_common::frame::HEADER;
use muster_tunnel::{DirectorId, Dropped, Ecn, Endpoint, Hop, Received, Sent};

use crate::sim::{Checked, must, trace::digest, world::World};

/// First octet of the tunnel's messages that carry data, and the length up to which they are probes or keepalives.
const DATA: (u8, usize) = (4, 64);
/// First octets of the tunnel's messages.
const MESSAGES: std::ops::RangeInclusive<u8> = 1..=4;
/// An address from which nothing came for so long is not sent data while there is a director.
const STALE: Duration = Duration::from_secs(41);
/// A peer that was heard through a director so lately is certainly reached there: no check can have failed since.
const LATELY: Duration = Duration::from_secs(2);

impl World {
    pub(in crate::sim) fn on_datagram(&mut self, h: usize, from: SocketAddr, mut octets: Vec<u8>) -> Checked {
        let now = self.host_now(h);
        let Some(running) = &mut self.hosts[h].running else { return Ok(()) };
        if octets.first().is_none_or(|first| MESSAGES.contains(first)) {
            return self.receive(h, Endpoint::Direct(from), &mut octets);
        }
        match running.flows.handle(from, &octets, now) {
            Incoming::Data(endpoint) => {
                self.receive(h, endpoint, octets.get_mut(HEADER..).unwrap_or_default())
            }
            other => {
                self.note(format_args!("h{h} < {from} of a flow: {other:?}"));
                self.drive(h)
            }
        }
    }

    /// A frame has come by the stream of a director.
    pub(in crate::sim) fn receive_frame(&mut self, h: usize, id: DirectorId, mut octets: Vec<u8>) -> Checked {
        let Some(running) = &mut self.hosts[h].running else { return Ok(()) };
        match running.flows.handle_frame(id, &octets) {
            Incoming::Data(endpoint) => {
                self.receive(h, endpoint, octets.get_mut(HEADER..).unwrap_or_default())
            }
            other => {
                self.note(format_args!("h{h} < stream of {id:?}: {other:?}"));
                self.drive(h)
            }
        }
    }

    /// A message has come for the tunnel.
    fn receive(&mut self, h: usize, from: Endpoint, octets: &mut [u8]) -> Checked {
        let (at, now) = (self.now, self.host_now(h));
        let addresses = self.hosts[h].addresses();
        let host = &mut self.hosts[h];
        let (Some(running), Some(disk)) = (&mut host.running, &host.disk) else { return Ok(()) };
        let uid = disk.uid;
        let received = running.tunnel.handle_datagram(from, Ecn::NotEct, octets, now);
        match (&received, from) {
            (Ok(_), Endpoint::Direct(from)) => drop(running.heard.insert(from, at)),
            (Ok(_), Endpoint::Relay { director, handle }) => {
                running.relayed.insert((director, handle), at);
            }
            (Err(_), _) => {}
        }
        let line = format!("h{h} < {from} {}", outcome(&received));
        if let Ok(Received::Packet { packet, .. }) = &received
            && let Some(reply) = echo_reply(packet)
        {
            self.note(format_args!("{line}, a probe of the path"));
            self.seal(h, &reply, |world, sent| world.note(format_args!("h{h} answers it: {sent:?}")))?;
            return self.drive(h);
        }
        let delivered = match received {
            // The kernel knows of no such request: the tunnel has not waited for it any more.
            Ok(Received::Packet { packet, .. }) if is_echo_reply(packet) => None,
            Ok(Received::Packet { from, packet }) => {
                Some(self.model.deliver(uid, &addresses, from.as_bytes(), packet)?)
            }
            _ => None,
        };
        self.note(format_args!("{line} {delivered:?}"));
        self.counts.delivered += u64::from(delivered.is_some());
        self.drive(h)
    }

    /// A program on the host sends a packet to a virtual address. Returns its number if the host routes it into the
    /// tunnel.
    pub(in crate::sim) fn send_packet(&mut self, h: usize, destination: IpAddr) -> Checked<Option<u64>> {
        let source = self.hosts[h].addresses().into_iter().find(|a| a.is_ipv4() == destination.is_ipv4());
        let host = &mut self.hosts[h];
        if host.asleep.is_some() {
            return Ok(None);
        }
        let (Some(running), Some(disk), Some(source)) = (&host.running, &host.disk, source) else {
            return Ok(None);
        };
        let routes: &[IpNet] = running.settings.as_ref().map_or(&[], |settings| &settings.routes);
        if source == destination || !routes.iter().any(|route| route.contains(&destination)) {
            return Ok(None);
        }
        let (id, packet) = self.model.packet(disk.uid, source, destination);
        self.counts.packets += 1;
        self.seal(h, &packet, |world, sent| {
            world.note(format_args!("h{h} sends packet {id} to {destination}: {sent:?}"));
        })?;
        self.drive(h)?;
        Ok(Some(id))
    }

    /// Hands a packet to a host's tunnel, tells what became of it, and sends what came of it.
    fn seal(
        &mut self,
        h: usize,
        packet: &[u8],
        tell: impl FnOnce(&mut Self, Result<Sent, Dropped>),
    ) -> Checked {
        let now = self.host_now(h);
        let Some(running) = &mut self.hosts[h].running else { return Ok(()) };
        running.out.clear();
        let sent = running.tunnel.handle_packet(packet, now, &mut running.out);
        let mut sealed: Vec<(Hop, Vec<u8>)> = Vec::new();
        for run in running.out.runs() {
            sealed.extend(run.datagrams().map(|datagram| (run.hop, datagram.to_vec())));
        }
        tell(self, sent);
        // What the core has to send goes first.
        self.transmit(h)?;
        sealed.into_iter().try_for_each(|(hop, octets)| self.send(h, hop, octets))
    }

    /// Sends a message of the tunnel. Data goes only where the peer was heard from lately, or through a director.
    pub(super) fn send(&mut self, h: usize, hop: Hop, octets: Vec<u8>) -> Checked {
        let to = match hop {
            Hop::Udp(to) => to,
            Hop::Stream(id) => {
                self.note(format_args!(
                    "h{h} > stream of {id:?} {} octets {:x}",
                    octets.len(),
                    digest(&octets)
                ));
                self.send_frame(h, id, octets);
                return Ok(());
            }
        };
        if octets.first() == Some(&DATA.0)
            && octets.len() > DATA.1
            && let Some(running) = &self.hosts[h].running
        {
            let heard = running.heard.get(&to).copied();
            must(heard.is_some(), || format!("h{h} sends data to {to}, from where nothing ever came"))?;
            let is_fresh = heard.is_some_and(|heard| self.now - heard < STALE);
            must(is_fresh || !self.has_relay(h, to), || {
                format!(
                    "h{h} sends data to {to}, from where nothing came since {heard:?}, and has a director"
                )
            })?;
        }
        self.send_datagram(h, to, octets);
        Ok(())
    }

    /// Whether the peer that is reached at `to` is reached through a director, too: it was heard lately.
    fn has_relay(&self, h: usize, to: SocketAddr) -> bool {
        let (now, Some(running)) = (self.host_now(h), &self.hosts[h].running) else { return false };
        let at = |peer: &muster_agent::control::PeerInfo| {
            let key = muster_tunnel::PublicKey::from_bytes(peer.config.public_key);
            running.tunnel.peer(&key, now).and_then(|peer| peer.path).map(|path| path.endpoint)
        };
        let peer = running.control.peers().find(|peer| at(peer) == Some(Endpoint::Direct(to)));
        peer.is_some_and(|peer| {
            peer.config.relays.iter().any(|relay| {
                let is_heard = running.relayed.get(relay).is_some_and(|heard| self.now - *heard < LATELY);
                is_heard && running.links.contains_key(&relay.0)
            })
        })
    }
}

/// What a host answers to an echo request, checksums aside; `None` to all else.
fn echo_reply(packet: &[u8]) -> Option<Vec<u8>> {
    let mut reply = packet.to_vec();
    let (addresses, kind) = match (packet.first()? >> 4, packet.get(9)?, packet.get(6)?) {
        (4, 1, _) if packet.get(20) == Some(&8) => (12..20, (20, 0)),
        (6, _, 58) if packet.get(40) == Some(&128) => (8..40, (40, 129)),
        _ => return None,
    };
    let half = addresses.len() / 2;
    reply.get_mut(addresses)?.rotate_left(half);
    *reply.get_mut(kind.0)? = kind.1;
    Some(reply)
}

fn is_echo_reply(packet: &[u8]) -> bool {
    match packet.first().map(|first| first >> 4) {
        Some(4) => packet.get(9) == Some(&1) && packet.get(20) == Some(&0),
        _ => packet.get(6) == Some(&58) && packet.get(40) == Some(&129),
    }
}

fn outcome(received: &Result<Received<'_>, Dropped>) -> String {
    match received {
        Ok(Received::Packet { packet, .. }) => format!("{} octets", packet.len()),
        Ok(other) => format!("{other:?}"),
        Err(dropped) => dropped.as_str().to_owned(),
    }
}
