//! Datagrams from UDP. Their peer is found by session index or by key, never by source address.

use std::net::IpAddr;

use muster_common::time::Instant;
use rustc_hash::FxHashMap;

use super::{Tunnel, schedule};
use crate::{
    cookie::Verdict,
    ecn::{self, Ecn},
    endpoint::Endpoint,
    event::{Event, Fragmentation, Received},
    limits::PACKET_OFFSET,
    message::{CookieReply, Initiation, Message, Response, TAG_LEN},
    opening::Opening,
    packet::Header,
    paths::PathProbe,
    shared::PeerId,
    stats::Dropped,
    subnets::Subnets,
};

impl Tunnel {
    /// Takes a datagram that came from `source` with `ecn` in its IP header; one that came through a director without the
    /// header of its frame. Data is opened in place, and lies
    /// [`PACKET_OFFSET`] octets after the datagram's start.
    pub fn handle_datagram<'a>(
        &mut self,
        source: impl Into<Endpoint>,
        ecn: Ecn,
        datagram: &'a mut [u8],
        now: Instant,
    ) -> Result<Received<'a>, Dropped> {
        let source = source.into();
        let Some(mut opening) = self.begin_receive(source, datagram, now)? else {
            return Ok(Received::Handshake);
        };
        opening.open(datagram);
        self.finish_receive(opening, source, ecn, datagram, now)
    }

    /// Takes a datagram that came from `source`, and does everything but to open data, which is left to the
    /// [`Opening`]; `None` if it was a handshake message or a cookie, which is done with. What is not worth opening, such
    /// as a replay, is dropped here.
    pub fn begin_receive(
        &mut self,
        source: impl Into<Endpoint>,
        datagram: &[u8],
        now: Instant,
    ) -> Result<Option<Opening>, Dropped> {
        let source = source.into();
        self.begin(source, datagram, now).inspect_err(|reason| self.dropped(source, *reason))
    }

    /// Takes data that has been opened, in `datagram`, where it lies [`PACKET_OFFSET`] octets after the start; `source`
    /// and `ecn` are as in [`Self::handle_datagram`]. Messages may be finished in another order than they were begun in;
    /// of those with one counter, one is taken.
    pub fn finish_receive<'a>(
        &mut self,
        opening: Opening,
        source: impl Into<Endpoint>,
        ecn: Ecn,
        datagram: &'a mut [u8],
        now: Instant,
    ) -> Result<Received<'a>, Dropped> {
        let source = source.into();
        self.finish(&opening, source, ecn, datagram, now).inspect_err(|reason| self.dropped(source, *reason))
    }

    fn dropped(&mut self, source: Endpoint, reason: Dropped) {
        self.shared.drops.count(reason);
        tracing::trace!(%source, %reason, "datagram dropped");
    }

    fn begin(&mut self, source: Endpoint, datagram: &[u8], now: Instant) -> Result<Option<Opening>, Dropped> {
        let header = match Message::parse(datagram).ok_or(Dropped::Malformed)? {
            Message::Initiation(m) => return self.receive_initiation(m, source, now).map(|()| None),
            Message::Response(m) => return self.receive_response(m, source, now).map(|()| None),
            Message::CookieReply(m) => return self.receive_cookie(m, now).map(|()| None),
            Message::Data(header) => header,
        };
        let id = *self.shared.indices.get(&header.receiver).ok_or(Dropped::UnknownIndex)?;
        let peer = self.peers.get_mut(id as usize).and_then(Option::as_mut).ok_or(Dropped::UnknownIndex)?;
        peer.begin_receive(header, now).map(Some)
    }

    fn finish<'a>(
        &mut self,
        opening: &Opening,
        source: Endpoint,
        ecn: Ecn,
        datagram: &'a mut [u8],
        now: Instant,
    ) -> Result<Received<'a>, Dropped> {
        // The peer may be gone since, and another have its place.
        let id = *self.shared.indices.get(&opening.index).ok_or(Dropped::UnknownIndex)?;
        let peer = self.peers.get_mut(id as usize).and_then(Option::as_mut).ok_or(Dropped::UnknownIndex)?;
        let (len, end) = (datagram.len(), datagram.len().saturating_sub(TAG_LEN));
        let opened = datagram.get_mut(PACKET_OFFSET..end).unwrap_or_default();
        // Of what is not authentic nothing comes.
        let probe = PathProbe::parse(opened);
        if peer.finish_receive(opening, len, probe, source, &mut self.shared, now)? {
            schedule(peer, id, &mut self.deadlines);
        }
        if probe.is_some() {
            return Ok(Received::Probe);
        }
        if opened.is_empty() {
            return Ok(Received::Keepalive);
        }
        let refused = match Header::parse(opened) {
            Some(inner) if is_from(&self.by_address, &self.subnets, inner.source, id) => {
                let from = peer.public_key;
                let packet = opened.get_mut(..inner.total_len).unwrap_or_default();
                if peer.path_mtu.handle_reply(packet, now) {
                    // Its news may make a probe due.
                    schedule(peer, id, &mut self.deadlines);
                    return Ok(Received::Probe);
                }
                if ecn::decapsulate(ecn, packet) {
                    return Ok(Received::Packet { from, packet });
                }
                Dropped::Congestion
            }
            Some(_) => Dropped::WrongSource,
            None => Dropped::InvalidPacket,
        };
        peer.count_drop(refused);
        Err(refused)
    }

    fn receive_initiation(
        &mut self,
        message: Initiation<'_>,
        source: Endpoint,
        now: Instant,
    ) -> Result<(), Dropped> {
        if self.guard.verify_mac1(message.0).is_none() {
            return Err(Dropped::InvalidMac);
        }
        let rng = &mut self.shared.rng;
        match self.guard.admit(message.0, source.as_source(), rng, now) {
            Verdict::Pass => self.answer_initiation(message, source, now),
            Verdict::DemandCookie => {
                if let Some(reply) =
                    self.guard.reply(message.0, message.sender(), source.as_source(), rng, now)
                {
                    self.shared.transmit(source, Fragmentation::Known, reply.to_vec());
                }
                Err(Dropped::CookieDemanded)
            }
            Verdict::RateLimited => Err(Dropped::RateLimited),
        }
    }

    pub(super) fn answer_initiation(
        &mut self,
        message: Initiation<'_>,
        source: Endpoint,
        now: Instant,
    ) -> Result<(), Dropped> {
        let cipher = self.guard.verify_mac1(message.0).ok_or(Dropped::InvalidMac)?;
        let ephemeral = self.shared.ephemeral();
        let received = self
            .shared
            .identity
            .receive(message.noise(), cipher, ephemeral)
            .map_err(|_| Dropped::NotAuthentic)?;
        let key = received.remote;
        if let Some(id) = self.by_key.get(&key) {
            return self
                .with_peer(*id, |peer, shared| {
                    peer.receive_initiation(received, message, source, shared, now)
                })
                .unwrap_or(Err(Dropped::UnknownKey));
        }
        if key == self.public_key() {
            return Err(Dropped::UnknownKey);
        }
        if self.timestamps.get(&key).is_some_and(|last| received.timestamp <= *last) {
            return Err(Dropped::OldTimestamp);
        }
        if self.keys.initiation(key, message.0, source, now)? {
            self.shared.event(Event::LookupKey(key));
        }
        Ok(())
    }

    fn receive_response(
        &mut self,
        message: Response<'_>,
        source: Endpoint,
        now: Instant,
    ) -> Result<(), Dropped> {
        // Cheapest first: a stranger cannot know the index.
        let id = *self.shared.indices.get(&message.receiver()).ok_or(Dropped::UnknownIndex)?;
        if self.guard.verify_mac1(message.0).is_none() {
            return Err(Dropped::InvalidMac);
        }
        self.with_peer(id, |peer, shared| peer.receive_response(message, source, shared, now))
            .unwrap_or(Err(Dropped::UnknownIndex))
    }

    fn receive_cookie(&mut self, reply: CookieReply<'_>, now: Instant) -> Result<(), Dropped> {
        let id = *self.shared.indices.get(&reply.receiver()).ok_or(Dropped::UnknownIndex)?;
        self.with_peer(id, |peer, _| peer.receive_cookie(reply, now)).unwrap_or(Err(Dropped::UnknownIndex))
    }
}

/// Whether a packet of peer `id` may come from `source`: it is the peer's own, or no peer's and carried by this one.
fn is_from(by_address: &FxHashMap<IpAddr, PeerId>, subnets: &Subnets, source: IpAddr, id: PeerId) -> bool {
    match by_address.get(&source) {
        Some(owner) => *owner == id,
        None => subnets.find(source) == Some(id),
    }
}
