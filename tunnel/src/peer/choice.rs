//! The paths to a peer at work: probes leave and are answered, directors come and go, and what follows when the current
//! path is another than before.

use muster_common::time::Instant;
use rand::RngExt as _;

use super::Peer;
use crate::{
    endpoint::{DirectorId, Endpoint},
    event::{Event, Fragmentation},
    limits::{ASSUMED_MTU, OVERHEAD, RELAY_ASSUMED_MTU},
    paths::{PROBE_LEN, PathProbe},
    shared::Shared,
};

impl Peer {
    /// The current path is another than before.
    #[cold]
    pub(super) fn path_changed(&mut self, shared: &mut Shared, now: Instant) {
        let Some(path) = self.paths.snapshot() else { return };
        let base = if path.endpoint.is_relay() { RELAY_ASSUMED_MTU } else { ASSUMED_MTU };
        self.path_mtu.path_changed_to(base, now);
        tracing::debug!(peer = %self.public_key, endpoint = %path.endpoint, why = path.why.as_str(), "the path changed");
        if self.is_up {
            shared.event(Event::EndpointChanged { public_key: self.public_key, endpoint: path.endpoint });
        }
    }

    /// Sends the probes that are due, if there is a session.
    pub(super) fn probe_paths(&mut self, shared: &mut Shared, now: Instant) {
        if !self.sessions.can_send(now) {
            return self.paths.forget_probes();
        }
        loop {
            let Shared { links, rng, .. } = &mut *shared;
            let Some((endpoint, nonce)) = self.paths.next_probe(links, now, || rng.random()) else { return };
            self.send_probe(PathProbe::Request(nonce), endpoint, shared, now);
        }
    }

    /// Nothing has to come back, so for WireGuard's timers it is no data. It counts as sent only where data goes, since
    /// elsewhere it may get lost.
    fn send_probe(&mut self, probe: PathProbe, endpoint: Endpoint, shared: &mut Shared, now: Instant) {
        let Some(session) = self.sessions.current() else { return };
        let mut message = vec![0; PROBE_LEN + OVERHEAD];
        if session.seal(&mut message, now, |inner| inner.copy_from_slice(&probe.octets())).is_ok() {
            self.count_sent(message.len(), 1);
            if self.paths.current() == Some(endpoint) {
                self.timers.sent(now);
            }
            shared.transmit(endpoint, Fragmentation::Known, message);
        }
    }

    /// Answers a request where it came from, or takes the answer to ours.
    pub(super) fn receive_probe(
        &mut self,
        probe: PathProbe,
        from: Endpoint,
        shared: &mut Shared,
        now: Instant,
    ) {
        match probe {
            PathProbe::Request(nonce) => {
                self.send_probe(PathProbe::Answer(nonce), from, shared, now);
                self.paths.asked(from, now);
            }
            PathProbe::Answer(nonce) => {
                if self.paths.answered(nonce, from, now) {
                    self.path_changed(shared, now);
                }
            }
        }
    }

    /// Nothing came for so long from where data goes that this must be proven first.
    #[cold]
    pub(super) fn leave_stale_path(&mut self, shared: &mut Shared, now: Instant) {
        if self.paths.leave_stale(&shared.links, now) {
            self.path_changed(shared, now);
        }
        self.probe_paths(shared, now);
    }

    /// This host reaches others in another way than before.
    pub(crate) fn host_moved(&mut self, shared: &mut Shared, now: Instant) {
        self.path_mtu.path_changed(now);
        if self.paths.host_moved(&shared.links, now) {
            self.path_changed(shared, now);
        }
        self.probe_paths(shared, now);
    }

    /// The link to a director is another than before; it may be the first one. Then what waits for an answer, or for a way
    /// to the peer, goes there, too.
    pub(crate) fn director_changed(
        &mut self,
        director: DirectorId,
        is_new: bool,
        shared: &mut Shared,
        now: Instant,
    ) {
        if !self.paths.is_relayed() {
            return;
        }
        if self.paths.director_changed(director, &shared.links, now) {
            self.path_changed(shared, now);
        }
        if is_new {
            self.try_candidates(&self.paths.relays_at(director), shared, now);
            if self.has_queued() {
                self.start_handshake(shared, now);
            }
        }
        self.probe_paths(shared, now);
    }

    /// The director of `relay` does not have that device, which may be this peer.
    pub(crate) fn unreachable_through(&mut self, relay: Endpoint, shared: &mut Shared, now: Instant) {
        if !self.paths.has(&relay) {
            return;
        }
        let is_repeated =
            self.initiation_sent.is_some_and(|sent| self.paths.is_unreachable_since(&relay, sent));
        if self.paths.unreachable(relay, &shared.links, now) {
            self.path_changed(shared, now);
        }
        // The initiation has not arrived: the others are tried at once. Once, as their directors may well say the same, and so
        // on in circles.
        let mut others = self.paths.destinations(1, self.is_up, true, &shared.links, now);
        others.retain(|other| *other != relay);
        if self.tries() == 1 && !is_repeated {
            self.try_candidates(&others, shared, now);
        }
        self.probe_paths(shared, now);
    }
}
