//! One peer: its sessions, handshakes, timers, queue and endpoint.
//!
//! **Handshakes that both sides start at once.** A standard peer holds one handshake per peer, so it forgets its own
//! initiation when it answers ours. We answer *and* keep ours, so against a standard peer whichever handshake it
//! finishes is the session. Between two of us both handshakes may finish; then the one that the side with the lower
//! public key started wins: that side only receives through the other from then on, and the side with the higher key
//! changes over with the first message that comes through the winner. An initiation that comes within
//! [`SIMULTANEOUS`] after the lower side's own was finished has crossed it on the way, and is met with an empty
//! message through the finished session. Nothing of this shows on the wire, and no handshake is waited for longer
//! than a lost one.

use std::{
    collections::VecDeque,
    net::{IpAddr, SocketAddr},
};

use muster_common::time::Instant;

use crate::{
    cookie::CookieJar,
    event::{Event, Reason, Sent},
    key::{PresharedKey, PublicKey},
    limits::{
        INITIATION_INTERVAL, MAX_CANDIDATES, OVERHEAD, PEER_QUEUE, REKEY_ATTEMPT_TIME, REKEY_TIMEOUT,
        SIMULTANEOUS,
    },
    message::{CookieReply, DataHeader, INITIATION_LEN, Initiation, Response},
    noise::{ReceivedInitiation, SentInitiation},
    outgoing::Outgoing,
    packet::padded_len,
    session::Session,
    sessions::Sessions,
    shared::{PeerId, Shared},
    stats::{Dropped, Drops, PeerSnapshot},
    tai64n::Tai64n,
    timers::Timers,
    tunnel::PeerConfig,
};

/// A handshake that we want, from the first initiation until it is finished or given up.
struct Attempt {
    started: Instant,
    /// When the first or next initiation is due.
    due: Instant,
    tries: usize,
    pending: Option<Pending>,
}

/// The initiation that was sent last.
struct Pending {
    local_index: u32,
    state: SentInitiation,
    message: [u8; INITIATION_LEN],
}

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
    pub(crate) addresses: Vec<IpAddr>,
    candidates: Vec<SocketAddr>,
    /// Candidates are news: try them even though there is an endpoint.
    probes_candidates: bool,
    endpoint: Option<SocketAddr>,
    sessions: Sessions,
    attempt: Option<Attempt>,
    cookies: CookieJar,
    pub(crate) last_timestamp: Option<Tai64n>,
    initiation_received: Option<Instant>,
    initiation_sent: Option<Instant>,
    queue: VecDeque<Vec<u8>>,
    timers: Timers,
    is_up: bool,
    last_handshake: Option<Instant>,
    had_data: bool,
    counters: Counters,
    /// The entry in the tunnel's list of deadlines.
    pub(crate) scheduled: Option<Instant>,
}

fn usable(candidates: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let mut usable: Vec<SocketAddr> = Vec::new();
    for at in candidates {
        let ip = at.ip();
        if at.port() != 0 && !ip.is_unspecified() && !ip.is_multicast() && !usable.contains(&at) {
            usable.push(at);
        }
    }
    usable.truncate(MAX_CANDIDATES);
    usable
}

impl Peer {
    pub(crate) fn new(id: PeerId, config: PeerConfig, now: Instant) -> Self {
        Self {
            id,
            cookies: CookieJar::new(&config.public_key),
            public_key: config.public_key,
            psk: config.preshared_key.unwrap_or_default(),
            addresses: config.virtual_addresses,
            candidates: usable(config.endpoints),
            probes_candidates: false,
            endpoint: None,
            sessions: Sessions::default(),
            attempt: None,
            last_timestamp: None,
            initiation_received: None,
            initiation_sent: None,
            queue: VecDeque::new(),
            timers: Timers::new(config.persistent_keepalive, now),
            is_up: false,
            last_handshake: None,
            had_data: false,
            counters: Counters::default(),
            scheduled: None,
        }
    }

    /// Takes new settings. The session goes on; candidates that are new are tried at once if there is one.
    pub(crate) fn update(&mut self, config: PeerConfig, shared: &mut Shared, now: Instant) {
        self.addresses = config.virtual_addresses;
        self.timers.set_persistent(config.persistent_keepalive, now);
        let psk = config.preshared_key.unwrap_or_default();
        if psk != self.psk {
            self.psk = psk;
            self.drop_pending(shared);
        }
        let candidates = usable(config.endpoints);
        let news: Vec<_> = candidates.iter().copied().filter(|c| !self.candidates.contains(c)).collect();
        self.candidates = candidates;
        if news.is_empty() {
            return;
        }
        self.probes_candidates = true;
        match &mut self.attempt {
            Some(Attempt { pending: Some(pending), .. }) => {
                let message = pending.message;
                for destination in news {
                    self.send_handshake(destination, &message, shared, now);
                }
            }
            // There was nowhere to send to.
            Some(Attempt { tries: 0, due, .. }) => {
                *due = self.initiation_sent.map_or(now, |sent| now.max(sent + REKEY_TIMEOUT));
            }
            Some(_) => {}
            None if self.is_up => self.start_handshake(shared, now),
            None => {}
        }
    }

    /// Drops sessions and handshake and gives their indices back.
    pub(crate) fn shut_down(&mut self, shared: &mut Shared) {
        shared.release(self.sessions.clear());
        self.end_attempt(shared);
    }

    // Sending

    /// Seals `packet` into `out`, or lets it wait for a session.
    pub(crate) fn send(
        &mut self,
        packet: &[u8],
        shared: &mut Shared,
        now: Instant,
        out: &mut Outgoing,
    ) -> Result<Sent, Dropped> {
        let (Some(session), Some(endpoint)) =
            (self.sessions.current().filter(|session| session.can_send(now)), self.endpoint)
        else {
            self.enqueue(packet.to_vec(), shared);
            self.start_handshake(shared, now);
            return Ok(Sent::Queued);
        };
        let padded = padded_len(packet.len(), shared.mtu);
        let len = out
            .append(endpoint, |buffer| session.seal(packet, padded, now, buffer))
            .inspect_err(|reason| self.counters.drops.count(*reason))?;
        let wants_renewal = session.wants_renewal_after_sending(now);
        self.sent_data(len, shared, now);
        if wants_renewal {
            self.start_handshake(shared, now);
        }
        Ok(Sent::Sealed)
    }

    fn sent_data(&mut self, len: usize, shared: &mut Shared, now: Instant) {
        self.had_data = true;
        self.count_sent(len);
        self.timers.sent(now);
        if !self.timers.waits_for_answer() {
            let jitter = shared.jitter();
            self.timers.sent_data(now, jitter);
        } else {
            self.timers.sent_data(now, Default::default());
        }
    }

    fn count_sent(&mut self, len: usize) {
        self.counters.sent_bytes += len as u64;
        self.counters.sent_packets += 1;
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

    fn drop(&mut self, reason: Dropped, number: usize, shared: &mut Shared) {
        self.counters.drops.add(reason, number);
        shared.drops.add(reason, number);
    }

    /// Sends an empty message, or starts a handshake if there is no session to send it through.
    fn send_keepalive(&mut self, shared: &mut Shared, now: Instant) {
        let (Some(session), Some(endpoint)) =
            (self.sessions.current().filter(|session| session.can_send(now)), self.endpoint)
        else {
            return self.start_handshake(shared, now);
        };
        let mut message = Vec::with_capacity(OVERHEAD);
        if session.seal(&[], 0, now, &mut message).is_ok() {
            let wants_renewal = session.wants_renewal_after_sending(now);
            self.count_sent(message.len());
            self.timers.sent(now);
            shared.transmit(endpoint, message);
            if wants_renewal {
                self.start_handshake(shared, now);
            }
        }
    }

    /// Sends what has waited for the session, or an empty message, which confirms the session to the peer.
    fn flush(&mut self, shared: &mut Shared, now: Instant, or_keepalive: bool) {
        if self.queue.is_empty() {
            if or_keepalive {
                self.send_keepalive(shared, now);
            }
            return;
        }
        for packet in std::mem::take(&mut self.queue) {
            let (Some(session), Some(endpoint)) = (self.sessions.current(), self.endpoint) else { return };
            let padded = padded_len(packet.len(), shared.mtu);
            let mut message = Vec::new();
            match session.seal(&packet, padded, now, &mut message) {
                Ok(()) => {
                    self.sent_data(message.len(), shared, now);
                    shared.transmit(endpoint, message);
                }
                Err(reason) => self.drop(reason, 1, shared),
            }
        }
    }

    // Handshakes

    /// Starts a handshake unless one is under way. It waits where the protocol's pace demands it, or where the peer
    /// has started one whose confirmation must be about to come.
    pub(crate) fn start_handshake(&mut self, shared: &mut Shared, now: Instant) {
        if self.attempt.is_some() {
            return;
        }
        let paced = self.initiation_sent.map_or(now, |sent| sent + REKEY_TIMEOUT);
        let peers = self.sessions.next().map_or(now, |next| next.created + SIMULTANEOUS);
        let due = now.max(paced).max(peers);
        self.attempt = Some(Attempt { started: now, due, tries: 0, pending: None });
        if due <= now {
            self.initiate(shared, now);
        }
    }

    /// Where to send an initiation: the endpoint, and all candidates while it is unknown or does not answer. The
    /// order changes from try to try, because the peer answers the copy that comes first.
    fn destinations(&self, tries: usize) -> Vec<SocketAddr> {
        let mut all: Vec<_> = self.endpoint.into_iter().collect();
        if all.is_empty() || tries > 0 || self.probes_candidates {
            all.extend(self.candidates.iter().copied().filter(|c| Some(*c) != self.endpoint));
        }
        if !all.is_empty() {
            let first = tries % all.len();
            all.rotate_left(first);
        }
        all
    }

    /// Makes an initiation and sends it everywhere.
    fn initiate(&mut self, shared: &mut Shared, now: Instant) {
        self.drop_pending(shared);
        let Some(attempt) = &mut self.attempt else { return };
        attempt.due = now + REKEY_TIMEOUT + shared.jitter();
        let tries = attempt.tries;
        let destinations = self.destinations(tries);
        if destinations.is_empty() {
            return;
        }
        // What the peer started before this initiation does not cross it.
        self.sessions.end_contest();
        let (timestamp, ephemeral) = (shared.labels.label(now), shared.ephemeral());
        let Ok((state, noise)) = shared.identity.initiate(&self.public_key, &self.psk, timestamp, ephemeral)
        else {
            tracing::debug!(peer = %self.public_key, "cannot make a handshake with this key");
            return;
        };
        let local_index = shared.new_index(self.id);
        let mut message = Initiation::build(local_index, &noise);
        self.cookies.put_macs(&mut message, now);
        self.initiation_sent = Some(now);
        for destination in destinations {
            self.send_handshake(destination, &message, shared, now);
        }
        if let Some(attempt) = &mut self.attempt {
            attempt.tries += 1;
            attempt.pending = Some(Pending { local_index, state, message });
        }
    }

    fn send_handshake(&mut self, destination: SocketAddr, message: &[u8], shared: &mut Shared, now: Instant) {
        self.count_sent(message.len());
        self.timers.sent(now);
        shared.transmit(destination, message.to_vec());
    }

    fn drop_pending(&mut self, shared: &mut Shared) {
        if let Some(pending) = self.attempt.as_mut().and_then(|attempt| attempt.pending.take()) {
            shared.indices.remove(&pending.local_index);
        }
    }

    fn end_attempt(&mut self, shared: &mut Shared) {
        self.drop_pending(shared);
        self.attempt = None;
        self.probes_candidates = false;
    }

    fn give_up(&mut self, shared: &mut Shared, now: Instant) {
        self.end_attempt(shared);
        self.drop(Dropped::NoSession, self.queue.len(), shared);
        self.queue.clear();
        self.timers.given_up(now);
        self.is_up = false;
        tracing::debug!(peer = %self.public_key, "peer does not answer");
        shared.event(Event::PeerDown(self.public_key));
    }

    /// Answers an authentic initiation.
    pub(crate) fn receive_initiation(
        &mut self,
        received: ReceivedInitiation,
        message: Initiation<'_>,
        source: SocketAddr,
        shared: &mut Shared,
        now: Instant,
    ) -> Result<(), Dropped> {
        if self.last_timestamp.is_some_and(|last| received.timestamp <= last) {
            return self.refuse(Dropped::OldTimestamp);
        }
        if self.initiation_received.is_some_and(|at| now - at < INITIATION_INTERVAL) {
            return self.refuse(Dropped::RateLimited);
        }
        self.last_timestamp = Some(received.timestamp);
        self.initiation_received = Some(now);
        let ours_wins = shared.identity.public < self.public_key;
        let has_won = self
            .sessions
            .current()
            .is_some_and(|current| ours_wins && current.is_initiator && now - current.created < SIMULTANEOUS);
        if has_won {
            self.send_keepalive(shared, now);
            return self.refuse(Dropped::Simultaneous);
        }
        let (keys, noise) = received.respond(&self.psk).map_err(|_| Dropped::NotAuthentic)?;
        let local_index = shared.new_index(self.id);
        let Some(mut session) = Session::new(&keys, local_index, message.sender(), false, now) else {
            shared.indices.remove(&local_index);
            return self.refuse(Dropped::SealFailed);
        };
        session.is_contested = self.attempt.as_ref().is_some_and(|attempt| attempt.pending.is_some());
        shared.release(self.sessions.put_next(session));
        let mut response = Response::build(local_index, message.sender(), &noise);
        self.cookies.put_macs(&mut response, now);
        self.received(message.0.len(), source, shared, now);
        self.timers.session_made(now);
        self.send_handshake(source, &response, shared, now);
        Ok(())
    }

    /// Finishes our handshake.
    pub(crate) fn receive_response(
        &mut self,
        message: Response<'_>,
        source: SocketAddr,
        shared: &mut Shared,
        now: Instant,
    ) -> Result<(), Dropped> {
        let pending = self.attempt.as_mut().and_then(|attempt| attempt.pending.as_mut());
        let Some(pending) = pending.filter(|pending| pending.local_index == message.receiver()) else {
            return self.refuse(Dropped::UnknownIndex);
        };
        let Ok(keys) = pending.state.complete(message.noise()) else {
            return self.refuse(Dropped::NotAuthentic);
        };
        let local_index = pending.local_index;
        let Some(session) = Session::new(&keys, local_index, message.sender(), true, now) else {
            return self.refuse(Dropped::SealFailed);
        };
        // The index lives on as the session's.
        self.attempt = None;
        self.probes_candidates = false;
        let ours_wins = shared.identity.public < self.public_key;
        shared.release(self.sessions.put_current(session, ours_wins));
        self.received(message.0.len(), source, shared, now);
        self.session_made(shared, now);
        self.flush(shared, now, true);
        Ok(())
    }

    /// Keeps a cookie for the next handshake message.
    pub(crate) fn receive_cookie(&mut self, reply: CookieReply<'_>, now: Instant) -> Result<(), Dropped> {
        if self.cookies.receive(reply, now) { Ok(()) } else { self.refuse(Dropped::NotAuthentic) }
    }

    fn session_made(&mut self, shared: &mut Shared, now: Instant) {
        self.last_handshake = Some(now);
        self.timers.session_made(now);
        if let Some(endpoint) = self.endpoint.filter(|_| !self.is_up) {
            self.is_up = true;
            shared.event(Event::PeerUp { public_key: self.public_key, endpoint });
        }
    }

    fn refuse<T>(&mut self, reason: Dropped) -> Result<T, Dropped> {
        self.counters.drops.count(reason);
        Err(reason)
    }

    // Receiving

    /// Opens a message in place and does all that its arrival means.
    pub(crate) fn receive_data<'a>(
        &mut self,
        header: DataHeader,
        sealed: &'a mut [u8],
        source: SocketAddr,
        shared: &mut Shared,
        now: Instant,
    ) -> Result<&'a mut [u8], Dropped> {
        let len = sealed.len() + OVERHEAD / 2;
        let Some((session, is_next)) = self.sessions.by_index(header.receiver) else {
            return self.refuse(Dropped::UnknownIndex);
        };
        let opened = match session.open(header.counter, sealed, now) {
            Ok(opened) => opened,
            Err(reason) => return self.refuse(reason),
        };
        self.received(len, source, shared, now);
        if is_next {
            shared.release(self.sessions.confirm_next());
            self.end_attempt(shared);
            self.session_made(shared, now);
            self.flush(shared, now, false);
        }
        if !opened.is_empty() {
            self.had_data = true;
            self.timers.received_data(now);
        }
        if self.sessions.current().is_some_and(|session| session.wants_renewal_after_receiving(now)) {
            self.start_handshake(shared, now);
        }
        Ok(opened)
    }

    /// Notes a drop that only the tunnel could decide on.
    pub(crate) fn count_drop(&mut self, reason: Dropped) {
        self.counters.drops.count(reason);
    }

    /// An authentic datagram came from `source`: that is where the peer is.
    fn received(&mut self, len: usize, source: SocketAddr, shared: &mut Shared, now: Instant) {
        self.counters.received_bytes += len as u64;
        self.counters.received_packets += 1;
        self.timers.received(now);
        if self.endpoint != Some(source) {
            self.endpoint = Some(source);
            if self.is_up {
                shared.event(Event::EndpointChanged { public_key: self.public_key, endpoint: source });
            }
        }
    }

    // Time

    /// What is due next, and when.
    pub(crate) fn next_timeout(&self) -> Option<(Instant, Reason)> {
        let handshake = self.attempt.as_ref().map(|attempt| (attempt.due, Reason::Handshake));
        handshake.into_iter().chain(self.timers.next()).min()
    }

    /// Does everything that is due.
    pub(crate) fn handle_timeout(&mut self, shared: &mut Shared, now: Instant) {
        if let Some(attempt) = &self.attempt
            && attempt.due <= now
        {
            if now - attempt.started >= REKEY_ATTEMPT_TIME {
                self.give_up(shared, now);
            } else {
                self.initiate(shared, now);
            }
        }
        while let Some(reason) = self.timers.take_due(now) {
            match reason {
                Reason::NoAnswer => self.start_handshake(shared, now),
                // Without a session there is nothing to keep alive.
                Reason::Keepalive if self.sessions.can_send(now) => self.send_keepalive(shared, now),
                Reason::PersistentKeepalive => self.send_keepalive(shared, now),
                Reason::WipeKeys => shared.release(self.sessions.clear()),
                Reason::Idle => shared.event(Event::PeerIdle(self.public_key)),
                Reason::Keepalive | Reason::Handshake | Reason::Lookup => {}
            }
        }
    }

    pub(crate) fn snapshot(&self, now: Instant) -> PeerSnapshot {
        let counters = &self.counters;
        PeerSnapshot {
            public_key: self.public_key,
            virtual_addresses: self.addresses.clone(),
            endpoint: self.endpoint,
            last_handshake: self.last_handshake,
            last_data: self.had_data.then_some(self.timers.last_data),
            received_bytes: counters.received_bytes,
            received_packets: counters.received_packets,
            sent_bytes: counters.sent_bytes,
            sent_packets: counters.sent_packets,
            queued: self.queue.len(),
            has_session: self.sessions.can_send(now),
            drops: counters.drops,
        }
    }

    #[cfg(test)]
    pub(crate) fn sessions(&mut self) -> &mut Sessions {
        &mut self.sessions
    }
}
