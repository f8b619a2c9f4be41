//! The data path: no allocation, and the relay only for reading. A received message is cut where its frames' headers
//! change; each piece costs two look-ups, and each frame a comparison and a store of sixteen octets.

use std::net::SocketAddr;

use muster_common::{
    frame::{self, DataHeader, Frame, HEADER, HELLO},
    time::Instant,
};

use super::{
    Arrival, Dropped, Forward, Greeting, Relay, SHORTEST, Session, To, Verdict, Verdicts, rate::Rate,
};

/// Notices a second to one session, and hellos a second from it; as many at once.
const PER_SESSION: u64 = 10;

impl Relay {
    /// Says what becomes of `arrival`, whose octets are in `buffer`: frames to pass on have their headers overwritten
    /// there. Verdicts are added to `out`, in the order in which the frames came.
    pub fn forward(&self, arrival: &Arrival, buffer: &mut [u8], now: Instant, out: &mut Verdicts) {
        let mut at = arrival.range.start;
        let mut octets = buffer.get_mut(arrival.range.clone()).unwrap_or_default();
        let datagram_len = arrival.datagram_len.max(1);
        while !octets.is_empty() {
            let (piece, rest) = octets.split_at_mut(piece_len(octets, datagram_len));
            self.forward_piece(arrival, at, piece, now, out);
            at += piece.len();
            octets = rest;
        }
    }

    /// Says what becomes of a frame that came by the stream of `session`; its header is overwritten if it is passed on.
    pub fn forward_frame(&self, session: u32, octets: &mut [u8], now: Instant) -> Verdict {
        let Some(header) = data_header(octets).filter(|header| header.session == session) else {
            return Verdict::Drop(Dropped::Malformed, None);
        };
        let Some(sender) = self.sessions.get(&session).filter(|sender| sender.has_stream) else {
            return Verdict::Drop(Dropped::UnknownSession, None);
        };
        match self.route(sender, header, octets.len(), now) {
            Ok((to, header)) => {
                overwrite(octets, header);
                Verdict::Forward(to)
            }
            Err(reason) => {
                let is_told = reason == Dropped::Unreachable && admits(&sender.notices, now);
                Verdict::Drop(reason, is_told.then(|| frame::unreachable(header)))
            }
        }
    }

    /// A piece is datagrams with one header, or one datagram of any sort.
    fn forward_piece(
        &self,
        arrival: &Arrival,
        at: usize,
        piece: &mut [u8],
        now: Instant,
        out: &mut Verdicts,
    ) {
        let Some(header) = data_header(piece) else {
            return self.handle_other(arrival.from, at, piece, now, out);
        };
        let datagram_len = arrival.datagram_len.max(1);
        let frames = piece.len().div_ceil(datagram_len) as u64;
        let Some(sender) = self.sessions.get(&header.session) else {
            out.drops.add(Dropped::UnknownSession, frames);
            return unbound(header.session, None, arrival.from, now, out);
        };
        if sender.endpoint != Some(arrival.from) {
            out.drops.add(Dropped::NotBound, frames);
            return unbound(header.session, Some(sender), arrival.from, now, out);
        }
        match self.route(sender, header, piece.len(), now) {
            Ok((to, header)) => {
                piece.chunks_mut(datagram_len).for_each(|octets| overwrite(octets, header));
                let range = at..at + piece.len();
                out.forwards.push(Forward { to, ecn: arrival.ecn, datagram_len, range });
            }
            Err(reason) => {
                out.drops.add(reason, frames);
                if reason == Dropped::Unreachable && admits(&sender.notices, now) {
                    out.notices.push((arrival.from, frame::unreachable(header)));
                }
            }
        }
    }

    /// Where frames of `sender` go, and with which header.
    fn route(
        &self,
        sender: &Session,
        header: DataHeader,
        octets: usize,
        now: Instant,
    ) -> Result<(To, DataHeader), Dropped> {
        if header.handle == sender.handle {
            return Err(Dropped::ToItself);
        }
        if !self.rate.admits(octets as u64, &sender.octets, now) {
            return Err(Dropped::RateLimited);
        }
        let device = self.devices.get(&header.handle).ok_or(Dropped::Unreachable)?;
        let receiver = self.sessions.get(&device.current).ok_or(Dropped::Unreachable)?;
        let to = receiver.to().ok_or(Dropped::Unreachable)?;
        Ok((to, DataHeader { session: device.current, handle: sender.handle }))
    }

    /// A hello, or nothing that agents send. Whether a hello is worth the relay's writing side is seen here: forged,
    /// replayed and too many ones never get there.
    fn handle_other(&self, from: SocketAddr, at: usize, octets: &[u8], now: Instant, out: &mut Verdicts) {
        let hello = match frame::parse(octets) {
            Some(Frame::Hello(hello)) if octets.len() == HELLO => hello,
            _ => return out.drops.add(Dropped::Malformed, 1),
        };
        let Some(session) = self.sessions.get(&hello.session()) else {
            out.drops.add(Dropped::UnknownSession, 1);
            return unbound(hello.session(), None, from, now, out);
        };
        if !session.is_new(&hello) {
            out.drops.add(Dropped::NotAuthentic, 1);
        } else if !admits(&session.hellos, now) {
            out.drops.add(Dropped::RateLimited, 1);
        } else {
            out.hellos.push(Greeting { from, range: at..at + octets.len() });
        }
    }
}

/// The header of a frame that is long enough to be passed on.
fn data_header(octets: &[u8]) -> Option<DataHeader> {
    if octets.len() < SHORTEST { None } else { DataHeader::parse(octets) }
}

/// Octets of the datagrams at the beginning that have one header and could be passed on; the first is counted in
/// any case.
fn piece_len(octets: &[u8], datagram_len: usize) -> usize {
    let first = octets.first_chunk::<HEADER>();
    let is_alike = |next: &&[u8]| next.len() >= SHORTEST && next.first_chunk() == first;
    let mut datagrams = octets.chunks(datagram_len);
    let len = datagrams.next().map_or(0, <[u8]>::len);
    if first.is_none() || data_header(octets.get(..len).unwrap_or_default()).is_none() {
        return len;
    }
    len + datagrams.take_while(is_alike).map(<[u8]>::len).sum::<usize>()
}

fn overwrite(octets: &mut [u8], header: DataHeader) {
    if let Some(place) = octets.first_chunk_mut::<HEADER>() {
        *place = header.octets();
    }
}

fn admits(spent: &std::sync::atomic::AtomicU64, now: Instant) -> bool {
    Rate::new(PER_SESSION, PER_SESSION).admits(1, spent, now)
}

/// Tells `to` that `session` is not known, or not from there; strangers and the few who are mistaken share what may be
/// told in a second.
fn unbound(session: u32, known: Option<&Session>, to: SocketAddr, now: Instant, out: &mut Verdicts) {
    if known.is_none_or(|known| admits(&known.notices, now)) && out.admits_unbound(now) {
        out.notices.push((to, frame::unbound(session)));
    }
}
