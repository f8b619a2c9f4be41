//! One peer: its sessions, handshakes, timers, queue and paths.

use std::{collections::VecDeque, net::IpAddr};

use ipnet::IpNet;
use muster_common::time::Instant;

use self::handshake::Attempt;
use crate::{
    cipher::Cipher,
    config::PeerConfig,
    cookie::CookieJar,
    ecn::{self, Ecn},
    endpoint::Endpoint,
    event::{Event, Fragmentation, Reason},
    key::{PresharedKey, PublicKey},
    limits::{ASSUMED_MTU, OVERHEAD, PEER_QUEUE, TOO_BIG_RATE},
    message::DataHeader,
    offload::{SuperPacket, VirtioHeader},
    opening::Opening,
    packet::padded_len,
    path_mtu::PathMtu,
    paths::{Heard, PathProbe, Paths},
    rate::TokenBucket,
    sealing::Sealing,
    sessions::Sessions,
    shared::{PeerId, Shared},
    stats::{Dropped, Drops, PeerSnapshot},
    tai64n::Tai64n,
    timers::Timers,
};

mod choice;
mod handshake;
mod path;

#[derive(Default)]
struct Counters {
    received_bytes: u64,
    received_packets: u64,
    sent_bytes: u64,
    sent_packets: u64,
    drops: Drops,
}

pub(crate) struct Peer {
    id: PeerId,
    pub(crate) public_key: PublicKey,
    psk: PresharedKey,
    /// What to begin sessions with.
    cipher: Cipher,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) subnets: Vec<IpNet>,
    /// Candidates are news: try them even though there is an endpoint.
    probes_candidates: bool,
    paths: Paths,
    sessions: Sessions,
    attempt: Option<Attempt>,
    cookies: CookieJar,
    pub(crate) last_timestamp: Option<Tai64n>,
    initiation_received: Option<Instant>,
    initiation_sent: Option<Instant>,
    queue: VecDeque<Vec<u8>>,
    timers: Timers,
    pub(crate) path_mtu: PathMtu,
    /// Source and destination of the packet that was sent last of those that make probing worth while: a probe's,
    /// too.
    flow: Option<(IpAddr, IpAddr)>,
    /// "Too big" errors.
    errors: TokenBucket,
    is_up: bool,
    last_handshake: Option<Instant>,
    had_data: bool,
    counters: Counters,
    /// The entry in the tunnel's list of deadlines.
    pub(crate) scheduled: Option<Instant>,
}

/// As the choice of paths calls them.
fn relays(config: &PeerConfig) -> Vec<Endpoint> {
    config
        .relays
        .iter()
        .map(|(director, handle)| Endpoint::Relay { director: *director, handle: *handle })
        .collect()
}

impl Peer {
    pub(crate) fn new(id: PeerId, config: PeerConfig, shared: &Shared, now: Instant) -> Self {
        let mut paths = Paths::new(shared.identity.public > config.public_key, now);
        paths.set(&config.endpoints, &relays(&config), &shared.links, now);
        let mtu = shared.mtu;
        Self {
            id,
            cookies: CookieJar::new(&config.public_key),
            public_key: config.public_key,
            psk: config.preshared_key.unwrap_or_default(),
            cipher: config.cipher,
            addresses: config.virtual_addresses,
            subnets: config.subnets,
            probes_candidates: false,
            paths,
            sessions: Sessions::default(),
            attempt: None,
            last_timestamp: None,
            initiation_received: None,
            initiation_sent: None,
            queue: VecDeque::new(),
            timers: Timers::new(config.persistent_keepalive, now),
            path_mtu: PathMtu::new(ASSUMED_MTU.min(mtu), mtu),
            flow: None,
            errors: TokenBucket::new(TOO_BIG_RATE, TOO_BIG_RATE, now),
            is_up: false,
            last_handshake: None,
            had_data: false,
            counters: Counters::default(),
            scheduled: None,
        }
    }

    /// Takes new settings. The session goes on; candidates that are new are tried at once if there is one.
    pub(crate) fn update(&mut self, config: PeerConfig, shared: &mut Shared, now: Instant) {
        let relays = relays(&config);
        self.addresses = config.virtual_addresses;
        self.subnets = config.subnets;
        if self.flow.is_some_and(|(_, destination)| !self.carries(destination)) {
            self.flow = None;
            self.path_mtu.path_changed(now);
        }
        self.cipher = config.cipher;
        self.timers.set_persistent(config.persistent_keepalive, now);
        let psk = config.preshared_key.unwrap_or_default();
        if psk != self.psk {
            self.psk = psk;
            self.drop_pending(shared);
        }
        let (news, has_moved) = self.paths.set(&config.endpoints, &relays, &shared.links, now);
        if has_moved {
            self.path_changed(shared, now);
        }
        if !news.is_empty() {
            self.try_candidates(&news, shared, now);
        }
        self.probe_paths(shared, now);
    }

    /// Drops sessions and handshake and gives their indices back.
    pub(crate) fn shut_down(&mut self, shared: &mut Shared) {
        shared.release(self.sessions.clear());
        self.end_attempt(shared);
    }

    // Sending

    /// Does all that sending a packet means but to seal it; `None` if it waits for a session. It does so, too, where the
    /// session has not enough counters left for all of its segments.
    pub(crate) fn begin_send(
        &mut self,
        packet: &SuperPacket<'_>,
        shared: &mut Shared,
        now: Instant,
    ) -> Result<Option<Sealing>, Dropped> {
        if self.paths.is_stale(now) {
            self.leave_stale_path(shared, now);
        }
        let mtu = self.segment_mtu();
        let narrowed = if packet.segment_len(0) > mtu { packet.narrowed(mtu) } else { None };
        let narrowed_to = narrowed.map(|_| mtu);
        let packet = narrowed.as_ref().unwrap_or(packet);
        let segments = packet.segments();
        let Some(manner) = self.manner(packet) else {
            self.counters.drops.add(Dropped::TooBig, segments);
            shared.drops.add(Dropped::TooBig, segments - 1);
            self.tell_too_big(packet, shared, now);
            return Err(Dropped::TooBig);
        };
        let route = self.paths.current().and_then(|endpoint| shared.links.route(&endpoint));
        let reserved = route
            .zip(self.sessions.current())
            .and_then(|(route, session)| Some((route, session.reserve(segments, now)?, session)));
        let Some((route, first_counter, session)) = reserved else {
            for index in 0..segments {
                self.enqueue(packet.segment(index), shared);
            }
            self.start_handshake(shared, now);
            return Ok(None);
        };
        let sealing = Sealing {
            key: session.sending.clone(),
            receiver: session.remote_index,
            first_counter,
            segments,
            route,
            marks: (ecn::outer(Ecn::from_bits(packet.ecn())), manner.fragmentation),
            pad_to: manner.pad_to,
            narrowed_to,
        };
        let wants_renewal = session.wants_renewal_after_sending(now);
        self.sent_data(sealing.octets(packet), segments, shared, now);
        self.note_flow(packet, manner, now);
        if wants_renewal {
            self.start_handshake(shared, now);
        }
        Ok(Some(sealing))
    }

    fn sent_data(&mut self, octets: usize, datagrams: usize, shared: &mut Shared, now: Instant) {
        self.had_data = true;
        self.count_sent(octets, datagrams);
        self.timers.sent(now);
        self.timers.sent_data(now, || shared.jitter());
        self.paths.sent_data(now);
    }

    fn count_sent(&mut self, octets: usize, datagrams: usize) {
        self.counters.sent_bytes += octets as u64;
        self.counters.sent_packets += datagrams as u64;
    }

    /// Lets a packet wait for a session; beyond [`PEER_QUEUE`] the oldest is dropped.
    pub(crate) fn enqueue(&mut self, packet: Vec<u8>, shared: &mut Shared) {
        if self.queue.len() >= PEER_QUEUE {
            self.queue.pop_front();
            self.drop(Dropped::QueueFull, 1, shared);
        }
        self.queue.push_back(packet);
    }

    /// Takes waiting packets that `belongs` picks.
    pub(crate) fn take_queued(&mut self, belongs: impl Fn(&[u8]) -> bool) -> Vec<Vec<u8>> {
        let (taken, kept) = self.queue.drain(..).partition::<Vec<_>, _>(|packet| belongs(packet));
        self.queue = kept.into();
        taken
    }

    pub(crate) fn has_queued(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Sends what waits, if there is a session, and starts a handshake for it, if there is none.
    pub(crate) fn send_queued(&mut self, shared: &mut Shared, now: Instant) {
        if !self.has_queued() {
            return;
        }
        if self.sessions.can_send(now) && self.paths.current().is_some() {
            self.flush(shared, now, false);
        } else {
            self.start_handshake(shared, now);
        }
    }

    fn drop(&mut self, reason: Dropped, number: usize, shared: &mut Shared) {
        self.counters.drops.add(reason, number);
        shared.drops.add(reason, number);
    }

    /// Sends an empty message, or starts a handshake if there is no session to send it through.
    fn send_keepalive(&mut self, shared: &mut Shared, now: Instant) {
        let (Some(session), Some(endpoint)) =
            (self.sessions.current().filter(|session| session.can_send(now)), self.paths.current())
        else {
            return self.start_handshake(shared, now);
        };
        let mut message = vec![0; OVERHEAD];
        if session.seal(&mut message, now, |_| {}).is_ok() {
            let wants_renewal = session.wants_renewal_after_sending(now);
            self.count_sent(message.len(), 1);
            self.timers.sent(now);
            shared.transmit(endpoint, Fragmentation::Known, message);
            if wants_renewal {
                self.start_handshake(shared, now);
            }
        }
    }

    /// Sends what has waited for the session, or if that is nothing an empty message, which confirms the session to the
    /// peer.
    fn flush(&mut self, shared: &mut Shared, now: Instant, or_keepalive: bool) {
        let sent_before = self.counters.sent_packets;
        for packet in std::mem::take(&mut self.queue) {
            let Ok(whole) = SuperPacket::parse(VirtioHeader::default(), &packet) else {
                self.drop(Dropped::InvalidPacket, 1, shared);
                continue;
            };
            let Some(manner) = self.manner(&whole) else {
                self.drop(Dropped::TooBig, 1, shared);
                self.tell_too_big(&whole, shared, now);
                continue;
            };
            let (Some(session), Some(endpoint)) = (self.sessions.current(), self.paths.current()) else {
                return;
            };
            let padded = padded_len(packet.len(), manner.pad_to);
            let mut message = vec![0; padded + OVERHEAD];
            let write = |inner: &mut [u8]| inner[..packet.len()].copy_from_slice(&packet);
            match session.seal(&mut message, now, write) {
                Ok(()) => {
                    self.sent_data(message.len(), 1, shared, now);
                    self.note_flow(&whole, manner, now);
                    shared.transmit(endpoint, manner.fragmentation, message);
                }
                Err(reason) => self.drop(reason, 1, shared),
            }
        }
        if or_keepalive && self.counters.sent_packets == sent_before {
            self.send_keepalive(shared, now);
        }
        self.probe(shared, now);
    }

    // Receiving

    fn refuse<T>(&mut self, reason: Dropped) -> Result<T, Dropped> {
        self.counters.drops.count(reason);
        Err(reason)
    }

    /// Looks up the session of a message, and whether it is worth opening.
    pub(crate) fn begin_receive(&mut self, header: DataHeader, now: Instant) -> Result<Opening, Dropped> {
        let DataHeader { receiver: index, counter } = header;
        let Some((session, _)) = self.sessions.by_index(index) else {
            return self.refuse(Dropped::UnknownIndex);
        };
        if let Err(reason) = session.check(counter, now) {
            return self.refuse(reason);
        }
        Ok(Opening { key: session.receiving.clone(), index, counter, is_authentic: false })
    }

    /// Does all that the arrival of a message of `len` octets means, which has been opened and is `probe`, if it is one, and
    /// tells whether something may have become due earlier than before.
    pub(crate) fn finish_receive(
        &mut self,
        opening: &Opening,
        len: usize,
        probe: Option<PathProbe>,
        source: Endpoint,
        shared: &mut Shared,
        now: Instant,
    ) -> Result<bool, Dropped> {
        let Some((session, is_next)) =
            self.sessions.by_index(opening.index).filter(|(session, _)| session.receiving.is(&opening.key))
        else {
            return self.refuse(Dropped::UnknownIndex);
        };
        if !opening.is_authentic {
            return self.refuse(Dropped::NotAuthentic);
        }
        if let Err(reason) = session.accept(opening.counter) {
            return self.refuse(reason);
        }
        let is_usual = !is_next && probe.is_none() && self.paths.current() == Some(source);
        let only_puts_off = is_usual && self.timers.received_data_only_puts_off();
        let has_data = len > OVERHEAD && probe.is_none();
        let what = match probe {
            Some(_) => Heard::Probe,
            None if has_data => Heard::Data,
            None => Heard::Keepalive,
        };
        self.received(len, source, what, shared, now);
        if is_next {
            shared.release(self.sessions.confirm_next());
            self.end_attempt(shared);
            self.session_made(shared, now);
            self.flush(shared, now, false);
        }
        if has_data {
            self.had_data = true;
            self.timers.received_data(now);
        }
        let wants_renewal =
            self.sessions.current().is_some_and(|session| session.wants_renewal_after_receiving(now));
        if wants_renewal {
            self.start_handshake(shared, now);
        }
        if let Some(probe) = probe {
            self.receive_probe(probe, source, shared, now);
        }
        if !is_usual {
            self.probe_paths(shared, now);
        }
        Ok(wants_renewal || !only_puts_off)
    }

    /// Notes a drop that only the tunnel could decide on.
    pub(crate) fn count_drop(&mut self, reason: Dropped) {
        self.counters.drops.count(reason);
    }

    /// An authentic datagram came from `source`.
    fn received(&mut self, len: usize, source: Endpoint, what: Heard, shared: &mut Shared, now: Instant) {
        self.counters.received_bytes += len as u64;
        self.counters.received_packets += 1;
        self.timers.received(now);
        self.path_mtu.data_received(now);
        if self.paths.heard(source, what, &shared.links, now) {
            self.path_changed(shared, now);
        }
    }

    // Time

    /// What is due next, and when.
    pub(crate) fn next_timeout(&self) -> Option<(Instant, Reason)> {
        let handshake = self.attempt.as_ref().map(|attempt| (attempt.due(), Reason::Handshake));
        let path_mtu = self.path_mtu.poll_timeout().map(|at| (at, Reason::PathMtu));
        let path = self.paths.poll_timeout().map(|at| (at, Reason::Path));
        handshake.into_iter().chain(path_mtu).chain(path).chain(self.timers.next()).min()
    }

    /// Does everything that is due.
    pub(crate) fn handle_timeout(&mut self, shared: &mut Shared, now: Instant) {
        self.handshake_timeout(shared, now);
        while let Some(reason) = self.timers.take_due(now) {
            match reason {
                Reason::NoAnswer => {
                    self.path_mtu.no_answer(now);
                    self.paths.distress(now);
                    self.start_handshake(shared, now);
                }
                // Without a session there is nothing to keep alive.
                Reason::Keepalive if self.sessions.can_send(now) => self.send_keepalive(shared, now),
                Reason::PersistentKeepalive => self.send_keepalive(shared, now),
                Reason::WipeKeys => shared.release(self.sessions.clear()),
                Reason::Idle => shared.event(Event::PeerIdle(self.public_key)),
                Reason::Keepalive | Reason::PathMtu | Reason::Path | Reason::Handshake | Reason::Lookup => {}
            }
        }
        if self.paths.handle_timeout(&shared.links, now) {
            self.path_changed(shared, now);
        }
        self.probe_paths(shared, now);
        self.path_mtu.handle_timeout(now);
        self.probe(shared, now);
    }

    /// Whether packets to `address` may be for this peer.
    fn carries(&self, address: IpAddr) -> bool {
        self.addresses.contains(&address) || self.subnets.iter().any(|subnet| subnet.contains(&address))
    }

    pub(crate) fn snapshot(&self, now: Instant) -> PeerSnapshot {
        let counters = &self.counters;
        PeerSnapshot {
            public_key: self.public_key,
            virtual_addresses: self.addresses.clone(),
            endpoint: self.paths.current().and_then(|endpoint| endpoint.direct()),
            path: self.paths.snapshot(),
            last_handshake: self.last_handshake,
            last_data: self.had_data.then_some(self.timers.last_data),
            received_bytes: counters.received_bytes,
            received_packets: counters.received_packets,
            sent_bytes: counters.sent_bytes,
            sent_packets: counters.sent_packets,
            path_mtu: self.path_mtu.current(),
            queued: self.queue.len(),
            has_session: self.sessions.can_send(now),
            cipher: self.sessions.cipher(),
            drops: counters.drops,
        }
    }

    #[cfg(test)]
    pub(crate) fn sessions(&mut self) -> &mut Sessions {
        &mut self.sessions
    }
}
