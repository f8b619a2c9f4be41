//! The directors of the network: which of them this device is attached to, how far away each is, and which are its
//! home and its second, through which peers reach it. Attaching is by certificate alone, so it works while no registrar
//! does.

mod choice;
mod target;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::SocketAddr,
    time::Duration,
};

use muster_common::{frame::Handle, time::Instant};
use muster_proto::{admin::DirectorAddress, registration::Peer};
use muster_tunnel::{DirectorId, Hop};
use rand::{RngExt, rngs::StdRng};

use self::choice::Round;
use super::{Action, Failure, backoff::Backoff};
use crate::{
    datapath::Command,
    directors::flow::{Attachment, FlowEvent},
};
pub use target::DirectorTarget;

/// Directors known at most.
const MAX_DIRECTORS: usize = 16;
/// Before a director whose connection has ended is attached to again, in milliseconds: all its devices come back.
const RETURN: std::ops::Range<u64> = 0..2_000;
/// Between attempts that fail, before and after doubling.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// A director that has not answered for so long does not answer any more.
const ANSWER_PATIENCE: Duration = Duration::from_secs(30);
/// A draining director is left so long after another one has taken its place.
const LEAVE_AFTER: Duration = Duration::from_secs(10);
/// TCP is given up so long after UDP has come back.
const STREAM_LINGERS: Duration = Duration::from_secs(10);
/// A director that no peer is reached through any more stays attached for so long.
const NEED_LINGERS: Duration = Duration::from_secs(600);
/// Measurements that the distance of a director is the median of.
const SAMPLES: usize = 5;
/// What TCP costs: it counts as so much farther away.
const STREAM_PENALTY: Duration = Duration::from_millis(20);

/// What becomes of attachments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DirectorEvent {
    /// The director has taken this device.
    Attached {
        /// Which director.
        id: DirectorId,
        /// Of [`Action::Attach`].
        attempt: u64,
        /// What it has given.
        attachment: Attachment,
        /// From the call to its answer, over TCP.
        round_trip: Duration,
    },
    /// The director is shutting down.
    Draining {
        /// Which director.
        id: DirectorId,
        /// Of [`Action::Attach`].
        attempt: u64,
    },
    /// There is no attachment, or no longer one.
    Closed {
        /// Which director.
        id: DirectorId,
        /// Of [`Action::Attach`].
        attempt: u64,
        /// Why.
        failure: Failure,
    },
    /// Frames cannot go over TCP, or no longer.
    StreamClosed {
        /// Which director.
        id: DirectorId,
        /// Of the [`Action::Attach`] before.
        attempt: u64,
        /// Why.
        reason: String,
    },
}

/// What can be told of a director.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectorView<'a> {
    /// Its number, as the data plane has it.
    pub id: DirectorId,
    /// Its uid, name, region and addresses.
    pub target: &'a DirectorTarget,
    /// What it is to this device.
    pub role: Role,
    /// What frames go by; `None` while it cannot be used.
    pub way: Option<Way>,
    /// Median of the last measurements.
    pub round_trip: Option<Duration>,
    /// This device as the director sees it.
    pub reflexive: Option<SocketAddr>,
    /// Where frames go; `None` unless they go over UDP.
    pub udp: Option<SocketAddr>,
    /// Why it cannot be used; empty while it can.
    pub last_error: &'a str,
}

/// What a director is to this device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Peers reach this device through it.
    Home,
    /// Peers use it if the home does not answer.
    Second,
    /// Known, and perhaps used to reach peers.
    Other,
}

impl Role {
    /// The word that status output uses.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Home => "home",
            Self::Second => "second",
            Self::Other => "other",
        }
    }
}

/// What frames to a director go by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Over UDP, beside the tunnel's other datagrams.
    Udp,
    /// In a stream, where UDP is blocked.
    Tcp,
}

impl Way {
    /// The word that status output uses.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Directors {
    known: BTreeMap<DirectorId, Director>,
    home: Option<DirectorId>,
    second: Option<DirectorId>,
    /// The nearest ones, which stay attached.
    kept: BTreeSet<DirectorId>,
    /// Those that peers are reached through alone, and until when once there is no such peer any more.
    needed: BTreeMap<DirectorId, Option<Instant>>,
    round: Option<Round>,
    next_round: Option<Instant>,
    /// Not before this is there another round, whatever happens.
    soonest_round: Option<Instant>,
    /// When the first home is chosen, although not all have answered yet.
    choice_at: Option<Instant>,
    attempts: u64,
    actions: Vec<Action>,
}

#[derive(Debug)]
struct Director {
    target: DirectorTarget,
    state: State,
    attempt: u64,
    backoff: Backoff,
    way: Option<Way>,
    /// Where frames go, if over UDP.
    udp: Option<SocketAddr>,
    stream: Stream,
    reflexive: Option<SocketAddr>,
    samples: VecDeque<Duration>,
    /// Of the last attachment, for want of a better measurement.
    tcp_round_trip: Option<Duration>,
    /// Measurements in a row by which it is so much nearer than the home that it should be it.
    streak: u8,
    is_draining: bool,
    leave_at: Option<Instant>,
    last_error: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Idle,
    Waiting { until: Instant },
    Attaching { deadline: Instant },
    Attached,
}

/// The TCP path of a director.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stream {
    Closed,
    Open,
    /// UDP is back.
    Closing {
        at: Instant,
    },
    Waiting {
        until: Instant,
    },
}

impl Directors {
    /// The registrar's list; others are left. True if peers may be reached otherwise than before.
    pub(super) fn update(&mut self, told: &[DirectorAddress], now: Instant) -> bool {
        let mut targets: BTreeMap<String, DirectorTarget> = BTreeMap::new();
        for target in told.iter().filter_map(DirectorTarget::new).take(MAX_DIRECTORS) {
            targets.entry(target.uid.clone()).or_insert(target);
        }
        let gone: Vec<DirectorId> = self
            .known
            .iter()
            .filter(|(_, director)| !targets.contains_key(&director.target.uid))
            .map(|(id, _)| *id)
            .collect();
        let mut is_changed = !gone.is_empty();
        for id in gone {
            self.detach(id);
            self.known.remove(&id);
            self.forget(id);
        }
        for director in self.known.values_mut() {
            if let Some(target) = targets.remove(&director.target.uid) {
                director.target = target;
            }
        }
        for target in targets.into_values() {
            let Some(id) = (0..).map(DirectorId).find(|id| !self.known.contains_key(id)) else { break };
            self.known.insert(id, Director::new(target));
            is_changed = true;
            self.next_round = Some(now);
        }
        is_changed
    }

    /// What has become of an attachment.
    pub(super) fn handle(&mut self, event: DirectorEvent, rng: &mut StdRng, now: Instant) {
        let (id, attempt) = match &event {
            DirectorEvent::Attached { id, attempt, .. }
            | DirectorEvent::Draining { id, attempt }
            | DirectorEvent::Closed { id, attempt, .. }
            | DirectorEvent::StreamClosed { id, attempt, .. } => (*id, *attempt),
        };
        let Some(director) = self.known.get_mut(&id).filter(|director| director.attempt == attempt) else {
            return;
        };
        match event {
            DirectorEvent::Attached { attachment, round_trip, .. } => {
                if matches!(director.state, State::Attaching { .. }) {
                    director.state = State::Attached;
                    director.is_draining = false;
                    director.last_error.clear();
                    director.tcp_round_trip = Some(round_trip);
                    let attachment = Some(attachment);
                    self.actions.push(Action::Datapath(Command::SetDirector { id, attachment }));
                }
            }
            DirectorEvent::Draining { .. } => director.is_draining = true,
            DirectorEvent::Closed { failure, .. } => {
                let wait = match director.state {
                    State::Attached => Duration::from_millis(rng.random_range(RETURN)),
                    State::Attaching { .. } => director.backoff.fail(rng),
                    State::Idle | State::Waiting { .. } => return,
                };
                let (Failure::Unavailable(reason) | Failure::Refused(reason)) = failure;
                director.last_error = reason;
                director.state = State::Waiting { until: now + wait };
            }
            DirectorEvent::StreamClosed { reason, .. } => {
                if matches!(director.stream, Stream::Open | Stream::Closing { .. }) {
                    if director.way != Some(Way::Udp) {
                        director.last_error = reason;
                    }
                    let until = now + director.backoff.fail(rng);
                    director.stream = Stream::Waiting { until };
                }
            }
        }
    }

    /// What the data plane says of a flow.
    pub(super) fn handle_flow(&mut self, event: &FlowEvent, rng: &mut StdRng, now: Instant) {
        match *event {
            FlowEvent::Link(id, link) => {
                let Some(director) = self.flowing(id) else { return };
                director.way = link.map(|link| match link.hop {
                    Hop::Udp(_) => Way::Udp,
                    Hop::Stream(_) => Way::Tcp,
                });
                director.udp = link.and_then(|link| link.hop.udp());
                director.is_draining |= link.is_some_and(|link| link.is_draining);
                if director.way.is_some() {
                    director.last_error.clear();
                }
            }
            FlowEvent::Bound { id, reflexive, round_trip, draining } => {
                let Some(director) = self.flowing(id) else { return };
                director.reflexive = Some(reflexive);
                if director.samples.len() >= SAMPLES {
                    director.samples.pop_front();
                }
                director.samples.push_back(round_trip);
                director.is_draining |= draining;
                director.backoff.reset();
                director.stream = match director.stream {
                    Stream::Open => Stream::Closing { at: now + STREAM_LINGERS },
                    Stream::Waiting { .. } => Stream::Closed,
                    other => other,
                };
                self.compare(id);
            }
            FlowEvent::Unanswered(id) => {
                let Some(director) = self.flowing(id) else { return };
                "it does not answer over UDP".clone_into(&mut director.last_error);
                director.stream = match director.stream {
                    Stream::Closed => Stream::Waiting { until: now },
                    Stream::Closing { .. } => Stream::Open,
                    other => other,
                };
            }
            FlowEvent::Dead(id) => {
                let Some(director) = self.flowing(id) else { return };
                if director.state == State::Attached {
                    let wait = Duration::from_millis(rng.random_range(RETURN));
                    director.state = State::Waiting { until: now + wait };
                    "it does not know this device any more".clone_into(&mut director.last_error);
                }
            }
            FlowEvent::NoSuchDevice(..) => {}
        }
    }

    /// The director, unless it has been left, and what its flow says has crossed with that.
    fn flowing(&mut self, id: DirectorId) -> Option<&mut Director> {
        self.known.get_mut(&id).filter(|director| director.state != State::Idle)
    }

    /// This host has another address, and an old one is gone if `is_gone`: distances are others, and what failed may
    /// succeed.
    pub(super) fn host_moved(&mut self, is_gone: bool, rng: &mut StdRng, now: Instant) {
        let soon = now + Duration::from_millis(rng.random_range(50..250));
        for director in self.known.values_mut() {
            (director.streak, director.tcp_round_trip) = (0, None);
            director.samples.clear();
            director.backoff.reset();
            match &mut director.state {
                State::Waiting { until } => *until = (*until).min(soon),
                // Its connection only looks alive. The new attachment is made before the old one is given up.
                state @ State::Attached if is_gone => *state = State::Waiting { until: soon },
                _ => {}
            }
        }
        if !self.known.is_empty() {
            self.next_round = Some(soon);
        }
    }

    /// The peers are these: what they are reached through stays attached, too.
    pub(super) fn need<'a>(&mut self, peers: impl Iterator<Item = &'a [(DirectorId, Handle)]>, now: Instant) {
        let near = |id: &DirectorId| self.kept.contains(id) || [self.home, self.second].contains(&Some(*id));
        let needed: BTreeSet<DirectorId> = peers
            .filter(|relays| !relays.iter().any(|(id, _)| near(id)))
            .filter_map(|relays| relays.first().map(|(id, _)| *id))
            .collect();
        for (id, until) in &mut self.needed {
            if !needed.contains(id) {
                until.get_or_insert(now + NEED_LINGERS);
            }
        }
        self.needed.extend(needed.into_iter().map(|id| (id, None)));
    }

    /// How `peer` is reached through directors, home first.
    pub(super) fn relays(&self, peer: &Peer) -> Vec<(DirectorId, Handle)> {
        let mut relays: Vec<(DirectorId, Handle)> = Vec::new();
        for director in peer.home_director.iter().chain(&peer.second_director) {
            let Some(address) = director.address.as_ref().filter(|address| !address.uid.is_empty()) else {
                continue;
            };
            let found = self.known.iter().find(|(_, known)| known.target.uid == address.uid);
            if let Some((id, _)) = found
                && director.handle != 0
                && !relays.iter().any(|(other, _)| other == id)
            {
                relays.push((*id, Handle(director.handle)));
            }
        }
        relays
    }

    /// What follows: who is attached to and who is left, and which ones are home and second.
    pub(super) fn settle(&mut self, rng: &mut StdRng, now: Instant) {
        self.needed.retain(|_, until| until.is_none_or(|until| until > now));
        self.advance_round(rng, now);
        self.choose(now);
        self.leave_draining(now);
        let ids: Vec<DirectorId> = self.known.keys().copied().collect();
        for id in ids {
            let wanted = self.is_wanted(id);
            let Some(director) = self.known.get_mut(&id) else { continue };
            if let State::Attaching { deadline } = director.state
                && deadline <= now
            {
                director.last_error = format!("no answer within {} s", ANSWER_PATIENCE.as_secs());
                director.state = State::Waiting { until: now + director.backoff.fail(rng) };
            }
            match director.state {
                _ if !wanted => self.detach(id),
                State::Idle => self.attach(id, now),
                State::Waiting { until } if until <= now => self.attach(id, now),
                _ => self.settle_stream(id, now),
            }
        }
        self.put_off_round(now);
    }

    /// When [`Self::settle`] is to be called next.
    pub(super) fn timeout(&self) -> Option<Instant> {
        let of = |director: &Director| {
            let state = match director.state {
                State::Idle | State::Attached => None,
                State::Waiting { until } => Some(until),
                State::Attaching { deadline } => Some(deadline),
            };
            let stream = match director.stream {
                Stream::Closing { at } => Some(at),
                Stream::Waiting { until } if director.state == State::Attached => Some(until),
                _ => None,
            };
            [state, stream, director.leave_at].into_iter().flatten().min()
        };
        let directors = self.known.values().filter_map(of);
        let needed = self.needed.values().copied().flatten();
        directors.chain(needed).chain(self.round_timeout()).chain(self.choice_at).min()
    }

    /// What is to be done.
    pub(super) fn take_actions(&mut self) -> impl Iterator<Item = Action> {
        std::mem::take(&mut self.actions).into_iter()
    }

    /// Uids of home and second.
    pub(super) fn chosen(&self) -> (Option<&str>, Option<&str>) {
        let uid = |id: Option<DirectorId>| Some(self.known.get(&id?)?.target.uid.as_str());
        (uid(self.home), uid(self.second))
    }

    /// This device as directors see it, each address once, what the home sees first.
    pub(super) fn reflexive(&self) -> Vec<SocketAddr> {
        let mut addresses: Vec<SocketAddr> = Vec::new();
        for view in self.views() {
            addresses.extend(view.reflexive.filter(|address| !addresses.contains(address)));
        }
        addresses
    }

    /// All of them, home and second first.
    pub(super) fn views(&self) -> Vec<DirectorView<'_>> {
        let mut views: Vec<_> = self
            .known
            .iter()
            .map(|(id, director)| DirectorView {
                id: *id,
                target: &director.target,
                role: match Some(*id) {
                    id if id == self.home => Role::Home,
                    id if id == self.second => Role::Second,
                    _ => Role::Other,
                },
                way: director.way,
                round_trip: director.median(),
                reflexive: director.reflexive,
                udp: director.udp,
                last_error: if director.way.is_some() { "" } else { &director.last_error },
            })
            .collect();
        views.sort_by_key(|view| (view.role, view.id));
        views
    }

    fn attach(&mut self, id: DirectorId, now: Instant) {
        let Some(director) = self.known.get_mut(&id) else { return };
        // The stream was of the attachment before.
        if director.stream != Stream::Closed {
            director.stream = Stream::Closed;
            self.actions.push(Action::CloseStream(id));
        }
        self.attempts += 1;
        director.attempt = self.attempts;
        director.state = State::Attaching { deadline: now + ANSWER_PATIENCE };
        let target = Box::new(director.target.clone());
        self.actions.push(Action::Attach { id, attempt: self.attempts, target });
    }

    fn detach(&mut self, id: DirectorId) {
        let Some(director) = self.known.get_mut(&id).filter(|director| director.state != State::Idle) else {
            return;
        };
        director.state = State::Idle;
        (director.way, director.udp, director.stream, director.reflexive) = (None, None, Stream::Closed, None);
        (director.is_draining, director.leave_at, director.streak) = (false, None, 0);
        self.actions.push(Action::Datapath(Command::SetDirector { id, attachment: None }));
        self.actions.push(Action::Detach(id));
    }

    /// As if it had never been there.
    fn forget(&mut self, id: DirectorId) {
        self.kept.remove(&id);
        self.needed.remove(&id);
        self.second = self.second.filter(|second| *second != id);
        if self.home == Some(id) {
            self.home = self.second.take();
        }
        if let Some(round) = &mut self.round {
            round.forget(id);
        }
    }

    fn settle_stream(&mut self, id: DirectorId, now: Instant) {
        let Some(director) = self.known.get_mut(&id) else { return };
        match director.stream {
            Stream::Waiting { until } if until <= now && director.state == State::Attached => {
                director.stream = Stream::Open;
                let (attempt, target) = (director.attempt, Box::new(director.target.clone()));
                self.actions.push(Action::OpenStream { id, attempt, target });
            }
            Stream::Closing { at } if at <= now => {
                director.stream = Stream::Closed;
                self.actions.push(Action::CloseStream(id));
            }
            _ => {}
        }
    }

    #[cfg(test)]
    pub(super) fn check(&self) {
        assert!(self.known.len() <= MAX_DIRECTORS);
        let all = self.kept.iter().chain(self.needed.keys()).chain(&self.home).chain(&self.second);
        assert!(all.into_iter().all(|id| self.known.contains_key(id)));
        assert!(self.home.is_none() || self.home != self.second, "{:?}", self.home);
        assert!(self.known.values().all(|d| d.state != State::Idle || d.way.is_none()));
    }
}

impl Director {
    fn new(target: DirectorTarget) -> Self {
        Self {
            target,
            state: State::Idle,
            attempt: 0,
            backoff: Backoff::new(RETRY.0, RETRY.1),
            way: None,
            udp: None,
            stream: Stream::Closed,
            reflexive: None,
            samples: VecDeque::new(),
            tcp_round_trip: None,
            streak: 0,
            is_draining: false,
            leave_at: None,
            last_error: String::new(),
        }
    }

    /// Frames reach it.
    fn is_usable(&self) -> bool {
        self.way.is_some()
    }

    /// Devices are to leave it if they can.
    fn is_leaving(&self) -> bool {
        self.is_draining || self.target.is_drained
    }

    fn median(&self) -> Option<Duration> {
        let mut sorted: Vec<Duration> = self.samples.iter().copied().collect();
        sorted.sort();
        sorted.get(sorted.len() / 2).copied().or(self.tcp_round_trip)
    }

    /// How far away it counts as.
    fn distance(&self) -> Duration {
        let penalty = if self.way == Some(Way::Tcp) { STREAM_PENALTY } else { Duration::ZERO };
        self.median().map_or(Duration::MAX, |median| median + penalty)
    }
}
