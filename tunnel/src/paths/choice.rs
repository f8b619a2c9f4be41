//! When one path is left for another.

use muster_common::time::Instant;

use super::{
    BETTER_BY, Check, Current, DOUBT_EVERY, FRESH_FOR, Heard, Paths, QUIET, ROUND_AGAIN, STALE_AFTER, Why,
};
use crate::endpoint::{DirectorId, Endpoint, Links};

impl Paths {
    /// Something authentic came from `from`.
    #[inline]
    pub(crate) fn heard(&mut self, from: Endpoint, what: Heard, links: &Links, now: Instant) -> bool {
        if what == Heard::Data {
            self.data = Some(now);
        }
        match &mut self.current {
            Some(current) if current.endpoint == from => {
                current.heard = now;
                current.is_lost = false;
                self.unanswered = None;
                if self.check.is_some_and(|check| !check.wants_answer) {
                    self.check = None;
                }
                false
            }
            _ => self.heard_elsewhere(from, what, links, now),
        }
    }

    fn heard_elsewhere(&mut self, from: Endpoint, what: Heard, links: &Links, now: Instant) -> bool {
        self.is_relayed |= from.is_relay();
        let Some(current) = self.current else { return self.go(from, Why::Handshake, now) };
        if !self.is_relayed {
            // A probe alone moves nothing: the peer tries all ways, and some may be worse.
            return what != Heard::Probe && self.go(from, Why::Roamed, now);
        }
        let is_known = self.candidates.get(&from).is_some();
        self.candidates.learn(from, Some(current.endpoint));
        if let Some(candidate) = self.candidates.get_mut(&from) {
            candidate.heard = Some(now);
        }
        if !from.is_relay() {
            self.candidates.want_proof(&from, now);
        }
        if what == Heard::Probe {
            return false;
        }
        let is_away = current.is_lost || !links.reach(&current.endpoint);
        if is_away && links.reach(&from) {
            return self.go(from, Why::Roamed, now);
        }
        if self.is_stale(now) && links.reach(&from) {
            // Data that has waited for a handshake would else go where nobody is any more.
            let has_moved = self.go(from, Why::Roamed, now);
            self.begin_round_again(now);
            return has_moved;
        }
        let is_quiet = now - current.heard >= QUIET;
        match (current.endpoint.is_relay(), from.is_relay()) {
            (false, false) if !is_known => self.go(from, Why::Roamed, now),
            (false, false) if is_quiet => {
                let current = self.candidates.get(&current.endpoint);
                // Two hosts with two networks in common would else follow each other from one to the other for ever.
                if self.follows || !current.is_some_and(|current| current.is_proven(FRESH_FOR, now)) {
                    return self.go(from, Why::Roamed, now);
                }
                self.doubt(now);
                false
            }
            (false, true) => {
                self.doubt(now);
                false
            }
            (true, true) if links.is_steady(&from) || !links.is_steady(&current.endpoint) => {
                (what == Heard::Handshake || self.follows) && self.go(from, Why::Roamed, now)
            }
            _ => false,
        }
    }

    /// The peer has sent a request from `from`, which is answered there.
    pub(crate) fn asked(&mut self, from: Endpoint, now: Instant) {
        // It holds a round: NATs open if both sides do so at the same time.
        if from.is_relay() && self.current() == Some(from) {
            self.begin_round_again(now);
        }
    }

    /// The answer to one of our requests came from `from`.
    pub(crate) fn answered(&mut self, nonce: u64, from: Endpoint, now: Instant) -> bool {
        let is_measured = self.round.is_some();
        let Some(candidate) = self.candidates.get_mut(&from) else { return false };
        let Some(sent) = candidate.take_sent(nonce) else { return false };
        let round_trip = now - sent;
        let shortest = candidate.round_trip.filter(|before| is_measured && *before < round_trip);
        candidate.round_trip = Some(shortest.unwrap_or(round_trip));
        (candidate.proven, candidate.heard) = (Some(now), Some(now));
        match self.current {
            Some(current) if current.endpoint == from => {
                self.check = None;
                self.choose(false, now)
            }
            Some(current) if current.is_lost || (current.endpoint.is_relay() && !from.is_relay()) => {
                self.go(from, Why::Probe, now)
            }
            _ => self.choose(false, now),
        }
    }

    /// Takes the fastest address of those that a round has measured; at its end also instead of one that did not answer.
    pub(super) fn choose(&mut self, is_end: bool, now: Instant) -> bool {
        let Some(current) = self.current.filter(|_| self.round.is_some()) else { return false };
        let Some((round_trip, fastest)) = self.candidates.fastest(Some(current.endpoint)) else {
            return false;
        };
        let measured = self.candidates.get(&current.endpoint).and_then(|candidate| candidate.round_trip);
        let is_better = match measured {
            _ if current.endpoint.is_relay() => true,
            Some(measured) => round_trip * 5 <= measured * 4 && round_trip + BETTER_BY <= measured,
            None => is_end,
        };
        is_better && self.go(fastest, Why::Probe, now)
    }

    /// The current path does not pass its check: the next best is taken.
    pub(super) fn give_up(&mut self, check: Check, links: &Links, now: Instant) -> bool {
        self.check = None;
        let Some(current) = &mut self.current else { return false };
        let endpoint = current.endpoint;
        current.is_lost = true;
        self.candidates.set_lost(&endpoint, Some(now));
        let proven = self.candidates.direct(Some(endpoint), now - check.began, now).map(|c| c.endpoint);
        if let Some(next) = proven.or_else(|| self.candidates.relay(Some(endpoint), links, now)) {
            let has_moved = self.go(next, check.why, now);
            self.begin_round(now);
            return has_moved;
        }
        self.begin_round_again(now);
        false
    }

    /// Nothing came from the current address for so long that it must be proven before data is sent there.
    #[cold]
    pub(crate) fn leave_stale(&mut self, links: &Links, now: Instant) -> bool {
        let Some(relay) = self.candidates.relay(None, links, now) else {
            self.begin_round_again(now);
            return false;
        };
        let has_moved = self.go(relay, Why::Silence, now);
        self.begin_round(now);
        has_moved
    }

    /// The link to a director is another than before.
    pub(crate) fn director_changed(&mut self, director: DirectorId, links: &Links, now: Instant) -> bool {
        self.candidates
            .set_found(|endpoint| matches!(endpoint, Endpoint::Relay { director: d, .. } if *d == director));
        self.settle(links, now)
    }

    /// Whether the director of `relay` has said at this time or after it that it does not have the peer.
    pub(crate) fn is_unreachable_since(&self, relay: &Endpoint, since: Instant) -> bool {
        self.candidates.is_lost_since(relay, since)
    }

    /// The director says that it does not have the peer.
    pub(crate) fn unreachable(&mut self, relay: Endpoint, links: &Links, now: Instant) -> bool {
        self.candidates.set_lost(&relay, Some(now));
        let Some(current) = self.current.as_mut().filter(|current| current.endpoint == relay) else {
            return false;
        };
        current.is_lost = true;
        self.settle(links, now)
    }

    /// Leaves a relay that is not reached, drains, or is no longer one of the peer's, and a path that is lost, if there is
    /// another.
    pub(super) fn settle(&mut self, links: &Links, now: Instant) -> bool {
        let Some(current) = self.current.filter(|_| self.is_relayed) else { return false };
        let endpoint = current.endpoint;
        let other = self.candidates.relay(Some(endpoint), links, now);
        let is_away = current.is_lost || !links.reach(&endpoint);
        let next = if is_away {
            let direct = self.candidates.direct(Some(endpoint), STALE_AFTER, now).map(|c| c.endpoint);
            if endpoint.is_relay() { other.or(direct) } else { direct.or(other) }
        } else if endpoint.is_relay() {
            let is_told = |relay: &Endpoint| self.candidates.get(relay).is_some_and(|c| c.is_told);
            let is_left = !links.is_steady(&endpoint) || !is_told(&endpoint);
            other.filter(|other| is_left && links.is_steady(other) && (is_told(other) || is_told(&endpoint)))
        } else {
            None
        };
        let Some(next) = next else { return false };
        let why = if endpoint.is_relay() { Why::DirectorLost } else { Why::Silence };
        let has_moved = self.go(next, why, now);
        if self.round_began.is_none_or(|at| now - at >= ROUND_AGAIN) {
            self.begin_round(now);
        }
        has_moved
    }

    /// Makes `endpoint` the current path.
    pub(super) fn go(&mut self, endpoint: Endpoint, why: Why, now: Instant) -> bool {
        if let Some(old) = self.current {
            if old.endpoint == endpoint {
                return false;
            }
            if let Some(candidate) = self.candidates.get_mut(&old.endpoint) {
                candidate.heard = candidate.heard.max(Some(old.heard));
            }
        }
        // An address that is taken for want of a better one is not fresh for that.
        let known =
            self.candidates.get(&endpoint).and_then(|candidate| candidate.heard.max(candidate.proven));
        let is_makeshift = matches!(why, Why::DirectorLost | Why::Silence) && !endpoint.is_relay();
        let heard = known.filter(|_| is_makeshift).unwrap_or(now);
        if self.is_relayed {
            self.candidates.learn(endpoint, Some(endpoint));
        }
        self.current = Some(Current { endpoint, since: now, why, heard, is_lost: false });
        (self.check, self.unanswered, self.doubted) = (None, None, None);
        true
    }

    /// The peer uses another path, so perhaps it does not hear us on this one.
    fn doubt(&mut self, now: Instant) {
        let Some(current) = self.current.filter(|_| self.check.is_none()) else { return };
        let is_proven = self.candidates.get(&current.endpoint).is_some_and(|c| c.is_proven(QUIET, now));
        if !is_proven && self.doubted.is_none_or(|at| now - at >= DOUBT_EVERY) {
            self.doubted = Some(now);
            self.begin_check(Why::Silence, true, now);
        }
    }
}
