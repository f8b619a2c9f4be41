//! Which way to a peer: its addresses and relays, the probes that find out which of them work, and when the current one
//! is left for another. No I/O and no keys: see [`Paths`].

use std::{net::SocketAddr, time::Duration};

use muster_common::time::Instant;

use self::candidates::Candidates;
use crate::{
    endpoint::{DirectorId, Endpoint, Links},
    limits::{IDLE_AFTER, MAX_CANDIDATES},
};

mod candidates;
mod choice;
mod probe;
#[cfg(test)]
mod tests;

pub(crate) use probe::{LEN as PROBE_LEN, PathProbe};

/// When the probes of a round leave, in milliseconds after its begin. The first opens the NATs on this side, the second
/// meets those that the other side has opened meanwhile.
const ROUND: [u64; 6] = [0, 50, 150, 350, 750, 1_550];
/// How long the last answers of a round are waited for.
const ROUND_ENDS: Duration = Duration::from_millis(2_550);
/// Probes of a round after which it ends if the current path is direct and was measured.
const ROUND_LEAST: usize = 3;
/// How often a round is held while data flows through a relay; up to [`ROUND_SPREAD`] is added.
const ROUND_EVERY: Duration = Duration::from_secs(48);
const ROUND_SPREAD: Duration = Duration::from_secs(24);
/// Least time between rounds that the peer's probes, or the loss of a path, start.
const ROUND_AGAIN: Duration = Duration::from_secs(10);
/// Data flows for this long after the last packet was sent.
const DATA_FLOWS_FOR: Duration = Duration::from_secs(10);
/// Data was sent and nothing has come for this long: the path is checked.
const SILENCE: Duration = Duration::from_secs(2);
/// Probes of a check, and how long each is waited for: as many round trips of the path, if they are known, within these
/// bounds.
const CHECK_PROBES: u8 = 3;
const CHECK_ROUND_TRIPS: u32 = 3;
const CHECK_INTERVAL: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(300));
/// A path on which the peer is not heard any more, while it is heard on another.
const QUIET: Duration = Duration::from_secs(1);
/// Least time between checks that are begun because the peer uses another path.
const DOUBT_EVERY: Duration = Duration::from_secs(5);
/// How long an address stays proven, and how often it is proven again while it is in use.
const FRESH_FOR: Duration = Duration::from_secs(20);
/// Time between the probes by which an address is kept fresh, while they are not answered.
const FRESHEN_EVERY: Duration = Duration::from_secs(5);
/// An address from which nothing came for this long is not sent to before it is proven again.
const STALE_AFTER: Duration = Duration::from_secs(40);
/// How long a relay through which nothing came, or whose director does not have the peer, is not chosen.
const LOST_FOR: Duration = Duration::from_secs(30);
/// Least time between two probes of an endpoint because the peer was heard from it.
const TRIGGERED_EVERY: Duration = Duration::from_millis(40);
/// Endpoints that are remembered because the peer was heard from them.
const LEARNED: usize = 4;
/// Relays of one peer that are kept.
const RELAYS: usize = 4;
/// Unanswered probes of one endpoint that are remembered.
const PROBES_KEPT: usize = ROUND.len();
/// An address is left for another whose round trip is shorter by so much, and by a fifth.
const BETTER_BY: Duration = Duration::from_millis(1);

/// Why a peer is reached where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The handshake came from there.
    Handshake,
    /// A probe was answered there.
    Probe,
    /// The peer sends from there.
    Roamed,
    /// Nothing came any more from where it was before.
    Silence,
    /// The director that it was reached through is away, drains, or does not have it.
    DirectorLost,
    /// This host moved, and what it was reached by before does not work any more.
    HostMoved,
}

impl Why {
    /// The reason in `snake_case`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Handshake => "handshake",
            Self::Probe => "probe",
            Self::Roamed => "roamed",
            Self::Silence => "silence",
            Self::DirectorLost => "director_lost",
            Self::HostMoved => "host_moved",
        }
    }
}

/// The way to a peer at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathSnapshot {
    /// Where it is reached.
    pub endpoint: Endpoint,
    /// How long a probe and its answer took, if there was one.
    pub round_trip: Option<Duration>,
    /// Since when it is reached there.
    pub since: Instant,
    /// Why it is.
    pub why: Why,
}

/// What an authentic datagram was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    Handshake,
    Data,
    Keepalive,
    Probe,
}

#[derive(Clone, Copy, Debug)]
struct Current {
    endpoint: Endpoint,
    since: Instant,
    why: Why,
    /// When something authentic last came from there.
    heard: Instant,
    /// It was checked in vain, and there was no other.
    is_lost: bool,
}

#[derive(Clone, Copy, Debug)]
struct Round {
    began: Instant,
    step: usize,
}

impl Round {
    fn due(&self) -> Instant {
        self.began + ROUND.get(self.step).map_or(ROUND_ENDS, |at| Duration::from_millis(*at))
    }
}

/// Whether the current path still works.
#[derive(Clone, Copy, Debug)]
struct Check {
    began: Instant,
    sent: u8,
    due: Instant,
    interval: Duration,
    why: Why,
    /// Only an answer ends it: the peer may be heard where it does not hear us.
    wants_answer: bool,
}

/// The paths to one peer.
///
/// Without relays WireGuard's own rule holds: the peer is where the last authentic datagram came from, and nothing is
/// probed. With relays data goes through one of them until an address is proven by the answer to a probe.
///
/// Functions that return a `bool` tell whether the current path is another than before. After each call the probes of
/// [`Self::next_probe`] are to be sent, if there is a session.
#[derive(Debug)]
pub(crate) struct Paths {
    current: Option<Current>,
    candidates: Candidates,
    /// The addresses that were told last, best first.
    told: Vec<Endpoint>,
    /// There are relays among the candidates.
    is_relayed: bool,
    /// Where both sides could follow each other for ever, only one does.
    follows: bool,
    round: Option<Round>,
    round_began: Option<Instant>,
    next_round: Instant,
    check: Option<Check>,
    doubted: Option<Instant>,
    /// When data was first sent since the peer was heard on the current path.
    unanswered: Option<Instant>,
    data_sent: Option<Instant>,
    /// When data was last exchanged.
    data: Option<Instant>,
    freshened: Option<Instant>,
    /// The last nonce: rounds are spread by it.
    nonce: u64,
}

fn is_usable(at: &SocketAddr) -> bool {
    let ip = at.ip();
    at.port() != 0 && !ip.is_unspecified() && !ip.is_multicast()
}

impl Paths {
    /// Without candidates. Of two peers, one `follows`.
    pub(crate) fn new(follows: bool, now: Instant) -> Self {
        Self {
            current: None,
            candidates: Candidates::default(),
            told: Vec::new(),
            is_relayed: false,
            follows,
            round: None,
            round_began: None,
            next_round: now,
            check: None,
            doubted: None,
            unanswered: None,
            data_sent: None,
            data: None,
            freshened: None,
            nonce: 0,
        }
    }

    /// Replaces what was told of the peer, best first. Returns what is new, and whether the current path changed.
    pub(crate) fn set(
        &mut self,
        direct: &[SocketAddr],
        relays: &[Endpoint],
        links: &Links,
        now: Instant,
    ) -> (Vec<Endpoint>, bool) {
        let mut addresses: Vec<Endpoint> = Vec::new();
        for at in direct.iter().filter(|at| is_usable(at)) {
            if !addresses.contains(&(*at).into()) {
                addresses.push((*at).into());
            }
        }
        addresses.truncate(MAX_CANDIDATES);
        let relays = relays.iter().take(RELAYS).copied();
        // Also one that has come back to an address that it had before.
        let is_elsewhere = self.told != addresses;
        self.told.clone_from(&addresses);
        let news = self.candidates.tell(addresses.into_iter().chain(relays), self.current(), now);
        self.is_relayed = self.candidates.has_relays();
        if !self.is_relayed {
            (self.round, self.check, self.unanswered) = (None, None, None);
            return (news, false);
        }
        let has_moved = self.settle(links, now);
        if self.current.is_some() && (is_elsewhere || !news.is_empty()) {
            self.begin_round(now);
        }
        (news, has_moved)
    }

    /// Where data goes.
    #[inline]
    pub(crate) fn current(&self) -> Option<Endpoint> {
        self.current.as_ref().map(|current| current.endpoint)
    }

    /// Whether `endpoint` is one of the peer's.
    pub(crate) fn has(&self, endpoint: &Endpoint) -> bool {
        self.candidates.get(endpoint).is_some()
    }

    /// The relays of the peer at one director.
    pub(crate) fn relays_at(&self, director: DirectorId) -> Vec<Endpoint> {
        let all = self.candidates.iter().map(|candidate| candidate.endpoint);
        all.filter(|endpoint| matches!(endpoint, Endpoint::Relay { director: d, .. } if *d == director))
            .collect()
    }

    pub(crate) fn snapshot(&self) -> Option<PathSnapshot> {
        let Current { endpoint, since, why, .. } = self.current?;
        let round_trip = self.candidates.get(&endpoint).and_then(|candidate| candidate.round_trip);
        Some(PathSnapshot { endpoint, round_trip, since, why })
    }

    /// Where an initiation goes, after `tries` in vain. The first one goes along the current path if the peer `is_up`, and
    /// else through one relay, so that it arrives; the others everywhere, as the first does where there is no relay. Their
    /// order changes from try to try, because the peer answers the copy that comes first.
    pub(crate) fn destinations(
        &self,
        tries: usize,
        is_up: bool,
        has_news: bool,
        links: &Links,
        now: Instant,
    ) -> Vec<Endpoint> {
        let current = self.current.filter(|current| links.reach(&current.endpoint));
        let mut all: Vec<Endpoint> = current.iter().map(|current| current.endpoint).collect();
        if self.is_relayed && tries == 0 && !has_news {
            let current = current.filter(|current| is_up && !current.is_lost).map(|current| current.endpoint);
            if let Some(first) = current.or_else(|| self.candidates.relay(None, links, now)) {
                return vec![first];
            }
        }
        if all.is_empty() || tries > 0 || has_news || self.is_relayed {
            let others = self.candidates.iter().map(|candidate| candidate.endpoint);
            let current = current.map(|current| current.endpoint);
            all.extend(others.filter(|other| Some(*other) != current && links.reach(other)));
        }
        if !all.is_empty() {
            let first = tries % all.len();
            all.rotate_left(first);
        }
        all
    }

    /// The probe to send next: a request with this nonce. `nonce` must be unpredictable to the peer.
    pub(crate) fn next_probe(
        &mut self,
        links: &Links,
        now: Instant,
        nonce: impl FnOnce() -> u64,
    ) -> Option<(Endpoint, u64)> {
        let (endpoint, nonce) = self.candidates.next_probe(links, now, nonce)?;
        self.nonce = nonce;
        Some((endpoint, nonce))
    }

    /// There is no session to send probes with: none will be due before something else is.
    pub(crate) fn forget_probes(&mut self) {
        self.candidates.forget_probes();
    }

    // Rounds, checks and silence

    /// There is a session: all addresses are probed.
    pub(crate) fn session_made(&mut self, now: Instant) {
        self.begin_round(now);
    }

    /// This host reaches others in another way than before. An address that peers knew may be gone, and theirs may let
    /// nobody else in: a relay serves until an address is proven again, which takes a round trip.
    pub(crate) fn host_moved(&mut self, links: &Links, now: Instant) -> bool {
        let is_direct = self.current().is_some_and(|current| !current.is_relay());
        let relay = self.candidates.relay(None, links, now).filter(|_| is_direct);
        let has_moved = relay.is_some_and(|relay| self.go(relay, Why::HostMoved, now));
        self.begin_check(Why::HostMoved, false, now);
        self.begin_round(now);
        has_moved
    }

    /// The peer does not answer: the current path is checked.
    pub(crate) fn distress(&mut self, now: Instant) {
        self.begin_check(Why::Silence, false, now);
    }

    fn begin_round(&mut self, now: Instant) {
        if self.is_relayed && self.current.is_some() {
            self.candidates.forget_round_trips();
            self.round = Some(Round { began: now, step: 0 });
            self.round_began = Some(now);
            let spread = ROUND_SPREAD.as_nanos() as u64;
            self.next_round = now + ROUND_EVERY + Duration::from_nanos(self.nonce % spread);
            self.next_step();
        }
    }

    /// Begins a round unless there was one lately.
    fn begin_round_again(&mut self, now: Instant) {
        if self.round_began.is_none_or(|at| now - at >= ROUND_AGAIN) {
            self.begin_round(now);
        }
    }

    fn next_step(&mut self) {
        if let Some(round) = &mut self.round {
            round.step += 1;
            self.candidates.want_probes(self.current.map(|current| current.endpoint));
        }
    }

    fn begin_check(&mut self, why: Why, wants_answer: bool, now: Instant) {
        self.unanswered = None;
        if self.is_relayed
            && let Some(current) = &self.current
        {
            let known = self.candidates.get(&current.endpoint).and_then(|candidate| candidate.round_trip);
            let (least, most) = CHECK_INTERVAL;
            let interval = known.map_or(most, |known| (known * CHECK_ROUND_TRIPS).clamp(least, most));
            self.candidates.want_probe(&current.endpoint);
            self.check =
                Some(Check { began: now, sent: 1, due: now + interval, interval, why, wants_answer });
        }
    }

    /// Whether there are relays: only then are paths probed.
    pub(crate) fn is_relayed(&self) -> bool {
        self.is_relayed
    }

    /// Before data is sent: whether the current path is to be left first, with [`Self::leave_stale`].
    #[inline]
    pub(crate) fn is_stale(&self, now: Instant) -> bool {
        self.is_relayed
            && self.current.is_some_and(|current| {
                !current.endpoint.is_relay() && !current.is_lost && now - current.heard >= STALE_AFTER
            })
    }

    /// Data was sent.
    #[inline]
    pub(crate) fn sent_data(&mut self, now: Instant) {
        if self.is_relayed {
            (self.data_sent, self.data) = (Some(now), Some(now));
            if self.unanswered.is_none() && self.check.is_none() {
                self.unanswered = Some(now);
            }
        }
    }

    // Time

    /// When [`Self::handle_timeout`] wants to be called.
    #[inline]
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        if !self.is_relayed {
            return None;
        }
        let round = self.round.map(|round| round.due());
        let check = self.check.map(|check| check.due);
        let silence = self.silence_due();
        [round, check, silence, self.freshening_due(), self.periodic_due()].into_iter().flatten().min()
    }

    fn silence_due(&self) -> Option<Instant> {
        self.unanswered.filter(|_| self.check.is_none()).map(|at| at + SILENCE)
    }

    /// When an address in use is to be proven again.
    fn freshening_due(&self) -> Option<Instant> {
        let current = self.current.filter(|current| !current.endpoint.is_relay() && !current.is_lost)?;
        let at = current.heard + FRESH_FOR;
        let at = self.freshened.map_or(at, |freshened| at.max(freshened + FRESHEN_EVERY));
        (at < current.heard + STALE_AFTER && at < self.data? + IDLE_AFTER).then_some(at)
    }

    /// When it is tried again to do without a relay.
    fn periodic_due(&self) -> Option<Instant> {
        let is_direct = self.current.is_none_or(|current| !current.endpoint.is_relay() && !current.is_lost);
        let is_due = !is_direct && self.round.is_none();
        self.data_sent
            .filter(|sent| is_due && self.next_round <= *sent + DATA_FLOWS_FOR)
            .map(|_| self.next_round)
    }

    /// Does what is due.
    pub(crate) fn handle_timeout(&mut self, links: &Links, now: Instant) -> bool {
        let mut has_moved = false;
        if self.round.is_some_and(|round| round.due() <= now) {
            has_moved |= self.go_on(now);
        }
        if let Some(check) = self.check.filter(|check| check.due <= now) {
            has_moved |= self.go_on_checking(check, links, now);
        }
        if self.silence_due().is_some_and(|at| at <= now) {
            self.begin_check(Why::Silence, false, now);
        }
        if let (Some(at), Some(current)) = (self.freshening_due(), self.current())
            && at <= now
        {
            self.freshened = Some(now);
            self.candidates.want_probe(&current);
        }
        if self.periodic_due().is_some_and(|at| at <= now) {
            self.begin_round(now);
        }
        has_moved
    }

    /// The next step of the round. One that is late, since the host slept, is not made up for.
    fn go_on(&mut self, now: Instant) -> bool {
        let Some(round) = self.round else { return false };
        let is_measured = self.current.is_some_and(|current| {
            let candidate = self.candidates.get(&current.endpoint);
            !current.endpoint.is_relay() && candidate.is_some_and(|candidate| candidate.round_trip.is_some())
        });
        if round.step >= ROUND.len() || (round.step >= ROUND_LEAST && is_measured) {
            let has_moved = self.choose(true, now);
            self.round = None;
            return has_moved;
        }
        let has_moved = self.is_passed_by(now) && self.choose(true, now);
        self.next_step();
        if let Some(round) = &mut self.round {
            let late = now - round.due();
            round.began += if late > ROUND_ENDS { late } else { Duration::ZERO };
        }
        has_moved
    }

    /// Whether nothing has come from the current address since the round began, while another one has answered, and it had
    /// the time of several such answers: the peer is not there any more. Nobody waits for the end of the round then.
    fn is_passed_by(&self, now: Instant) -> bool {
        let (Some(current), Some(began)) = (self.current, self.round_began) else { return false };
        let fastest = self.candidates.fastest(Some(current.endpoint));
        !current.endpoint.is_relay()
            && current.heard < began
            && fastest.is_some_and(|(round_trip, _)| now - began >= round_trip * CHECK_ROUND_TRIPS)
    }

    fn go_on_checking(&mut self, check: Check, links: &Links, now: Instant) -> bool {
        if check.sent >= CHECK_PROBES {
            return self.give_up(check, links, now);
        }
        if let Some(current) = &self.current {
            self.candidates.want_probe(&current.endpoint);
        }
        self.check = Some(Check { sent: check.sent + 1, due: now + check.interval, ..check });
        false
    }
}
