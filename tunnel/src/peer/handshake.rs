//! The handshakes of one peer: when they start, where initiations go, and how they end.
//!
//! **Handshakes that both sides start at once.** A standard peer holds one handshake per peer, so it forgets its own
//! initiation when it answers ours. We answer *and* keep ours, so against a standard peer whichever handshake it
//! finishes is the session. Between two of us both handshakes may finish; then the one that the side with the lower
//! public key started wins: that side only receives through the other from then on, and the side with the higher key
//! changes over with the first message that comes through the winner. An initiation that comes within
//! [`SIMULTANEOUS`] after the lower side's own was finished has crossed it on the way, and is met with an empty
//! message through the finished session. Nothing of this shows on the wire, and no handshake is waited for longer
//! than a lost one.

use muster_common::time::Instant;

use super::Peer;
use crate::{
    cipher::Cipher,
    endpoint::Endpoint,
    event::{Event, Fragmentation},
    limits::{INITIATION_INTERVAL, REKEY_ATTEMPT_TIME, REKEY_TIMEOUT, SIMULTANEOUS},
    message::{CookieReply, INITIATION_LEN, Initiation, Response},
    noise::{ReceivedInitiation, SentInitiation},
    paths::Heard,
    session::Session,
    shared::Shared,
    stats::Dropped,
};

/// Initiations in a row for the cipher that the peer is said to take.
const CIPHER_TRIES: usize = 2;

/// A handshake that we want, from the first initiation until it is finished or given up.
pub(super) struct Attempt {
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
    cipher: Cipher,
    message: [u8; INITIATION_LEN],
}

impl Attempt {
    /// When its first or next initiation is due.
    pub(super) fn due(&self) -> Instant {
        self.due
    }
}

impl Peer {
    /// Candidates are news: they get the initiation that is under way, or a new one if there is a session. With a relay,
    /// a session probes them instead.
    pub(super) fn try_candidates(&mut self, news: &[Endpoint], shared: &mut Shared, now: Instant) {
        let is_relayed = self.paths.is_relayed();
        self.probes_candidates |= !is_relayed;
        match &mut self.attempt {
            Some(Attempt { pending: Some(pending), .. }) => {
                let message = pending.message;
                for destination in
                    news.iter().filter(|endpoint| shared.links.reach(endpoint)).copied().collect::<Vec<_>>()
                {
                    self.send_handshake(destination, &message, shared, now);
                }
            }
            // There was nowhere to send to.
            Some(Attempt { tries: 0, due, .. }) => {
                *due = self.initiation_sent.map_or(now, |sent| now.max(sent + REKEY_TIMEOUT));
            }
            Some(_) => {}
            None if self.is_up && !is_relayed => self.start_handshake(shared, now),
            None => {}
        }
    }

    /// Initiations that were sent of the handshake that is under way.
    pub(super) fn tries(&self) -> usize {
        self.attempt.as_ref().map_or(0, |attempt| attempt.tries)
    }

    /// Sends the initiation that is due, or gives up.
    pub(super) fn handshake_timeout(&mut self, shared: &mut Shared, now: Instant) {
        if let Some(attempt) = &self.attempt
            && attempt.due <= now
        {
            if now - attempt.started >= REKEY_ATTEMPT_TIME {
                self.give_up(shared, now);
            } else {
                self.initiate(shared, now);
            }
        }
    }

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

    /// What the session of the next initiation is to be sealed with. A peer that has lost the instructions for AES, or
    /// the version that uses them, since the registrar last told of it is silent to such initiations; so after a few,
    /// every other one is WireGuard's own.
    fn cipher_of_try(&self, tries: usize) -> Cipher {
        if tries >= CIPHER_TRIES && tries.is_multiple_of(2) { Cipher::default() } else { self.cipher }
    }

    /// Makes an initiation and sends it everywhere.
    fn initiate(&mut self, shared: &mut Shared, now: Instant) {
        self.drop_pending(shared);
        let Some(attempt) = &mut self.attempt else { return };
        attempt.due = now + REKEY_TIMEOUT + shared.jitter();
        let tries = attempt.tries;
        if tries > 0 {
            self.paths.distress(now);
        }
        let (is_up, has_news) = (self.is_up, self.probes_candidates);
        let destinations = self.paths.destinations(tries, is_up, has_news, &shared.links, now);
        if destinations.is_empty() {
            return;
        }
        // What the peer started before this initiation does not cross it.
        self.sessions.end_contest();
        let (timestamp, ephemeral) = (shared.labels.label(now), shared.ephemeral());
        let cipher = if shared.accepts_aes { self.cipher_of_try(tries) } else { Cipher::default() };
        if shared.accepts_aes && cipher != self.cipher {
            tracing::debug!(peer = %self.public_key, tries, "no answer for AES-256-GCM; trying WireGuard's own cipher");
        }
        let Ok((state, noise)) =
            shared.identity.initiate(&self.public_key, &self.psk, timestamp, cipher, ephemeral)
        else {
            tracing::debug!(peer = %self.public_key, "cannot make a handshake with this key");
            return;
        };
        let local_index = shared.new_index(self.id);
        let mut message = Initiation::build(local_index, &noise);
        self.cookies.put_macs(&mut message, cipher, now);
        self.initiation_sent = Some(now);
        for destination in destinations {
            self.send_handshake(destination, &message, shared, now);
        }
        if let Some(attempt) = &mut self.attempt {
            attempt.tries += 1;
            attempt.pending = Some(Pending { local_index, state, cipher, message });
        }
    }

    pub(super) fn send_handshake(
        &mut self,
        destination: Endpoint,
        message: &[u8],
        shared: &mut Shared,
        now: Instant,
    ) {
        self.count_sent(message.len(), 1);
        self.timers.sent(now);
        shared.transmit(destination, Fragmentation::Known, message.to_vec());
    }

    pub(super) fn drop_pending(&mut self, shared: &mut Shared) {
        if let Some(pending) = self.attempt.as_mut().and_then(|attempt| attempt.pending.take()) {
            shared.indices.remove(&pending.local_index);
        }
    }

    pub(super) fn end_attempt(&mut self, shared: &mut Shared) {
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
        source: Endpoint,
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
        let cipher = received.cipher;
        let (keys, noise) = received.respond(&self.psk).map_err(|_| Dropped::NotAuthentic)?;
        let local_index = shared.new_index(self.id);
        let Some(mut session) = Session::new(&keys, cipher, local_index, message.sender(), false, now) else {
            shared.indices.remove(&local_index);
            return self.refuse(Dropped::SealFailed);
        };
        session.is_contested = self.attempt.as_ref().is_some_and(|attempt| attempt.pending.is_some());
        shared.release(self.sessions.put_next(session));
        let mut response = Response::build(local_index, message.sender(), &noise);
        self.cookies.put_macs(&mut response, cipher, now);
        self.received(message.0.len(), source, Heard::Handshake, shared, now);
        self.timers.session_made(now);
        self.send_handshake(source, &response, shared, now);
        Ok(())
    }

    /// Finishes our handshake.
    pub(crate) fn receive_response(
        &mut self,
        message: Response<'_>,
        source: Endpoint,
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
        let (local_index, cipher) = (pending.local_index, pending.cipher);
        let Some(session) = Session::new(&keys, cipher, local_index, message.sender(), true, now) else {
            return self.refuse(Dropped::SealFailed);
        };
        // The index lives on as the session's.
        self.attempt = None;
        self.probes_candidates = false;
        let ours_wins = shared.identity.public < self.public_key;
        shared.release(self.sessions.put_current(session, ours_wins));
        self.received(message.0.len(), source, Heard::Handshake, shared, now);
        self.session_made(shared, now);
        self.flush(shared, now, true);
        self.probe_paths(shared, now);
        Ok(())
    }

    /// Keeps a cookie for the next handshake message.
    pub(crate) fn receive_cookie(&mut self, reply: CookieReply<'_>, now: Instant) -> Result<(), Dropped> {
        if self.cookies.receive(reply, now) { Ok(()) } else { self.refuse(Dropped::NotAuthentic) }
    }

    pub(super) fn session_made(&mut self, shared: &mut Shared, now: Instant) {
        self.last_handshake = Some(now);
        self.timers.session_made(now);
        self.paths.session_made(now);
        if let Some(endpoint) = self.paths.current().filter(|_| !self.is_up) {
            self.is_up = true;
            shared.event(Event::PeerUp { public_key: self.public_key, endpoint });
        }
    }
}
