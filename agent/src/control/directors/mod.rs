//! The directors of the network: which of them this device is attached to, how far away each is, and which are its
//! home and its second, through which peers reach it. Attaching is by certificate alone, so it works while no registrar
//! does.

mod choice;
mod director;
mod distance;
mod event;
mod target;
#[cfg(test)]
mod tests;
mod trouble;
mod view;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use muster_common::{frame::Handle, time::Instant};
use muster_proto::{admin::DirectorAddress, registration::Peer};
use muster_tunnel::{DirectorId, Hop};
use rand::{RngExt, rngs::StdRng};

use self::{
    choice::Round,
    director::{Director, State, Stream},
    trouble::{Trouble, Troubles},
};
pub use self::{
    event::DirectorEvent,
    target::DirectorTarget,
    view::{DirectorView, Role, Way},
};
use super::{Action, Failure};
use crate::{datapath::Command, directors::flow::FlowEvent};

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
    /// How often the home has become another, the first not counted.
    home_changes: u64,
    troubles: Troubles,
    actions: Vec<Action>,
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
                    director.distance.attached(round_trip);
                    let attachment = Some(attachment);
                    self.actions.push(Action::Datapath(Command::SetDirector { id, attachment }));
                }
            }
            DirectorEvent::Draining { .. } => director.is_draining = true,
            DirectorEvent::Closed { failure, .. } => {
                let (wait, trouble) = match (director.state, &failure) {
                    (State::Idle | State::Waiting { .. }, _) => return,
                    (State::Attached, _) => (Duration::from_millis(rng.random_range(RETURN)), Trouble::Lost),
                    (State::Attaching { .. }, Failure::Refused(_)) => {
                        (director.backoff.fail(rng), Trouble::Refused)
                    }
                    (State::Attaching { .. }, _) => (director.backoff.fail(rng), Trouble::Unavailable),
                };
                self.troubles.count(trouble);
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
                    self.troubles.count(Trouble::StreamClosed);
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
                director.distance.measured(round_trip);
                director.is_draining |= draining;
                director.backoff.reset();
                director.stream = match director.stream {
                    Stream::Open => Stream::Closing { at: now + STREAM_LINGERS },
                    Stream::Waiting { .. } => Stream::Closed,
                    other => other,
                };
                let before = self.home;
                self.compare(id);
                self.count_home(before);
            }
            FlowEvent::Unanswered(id) => {
                let Some(director) = self.flowing(id) else { return };
                "it does not answer over UDP".clone_into(&mut director.last_error);
                director.stream = match director.stream {
                    Stream::Closed => Stream::Waiting { until: now },
                    Stream::Closing { .. } => Stream::Open,
                    other => other,
                };
                self.troubles.count(Trouble::UdpUnanswered);
            }
            FlowEvent::Dead(id) => {
                let Some(director) = self.flowing(id) else { return };
                if director.state == State::Attached {
                    let wait = Duration::from_millis(rng.random_range(RETURN));
                    director.state = State::Waiting { until: now + wait };
                    "it does not know this device any more".clone_into(&mut director.last_error);
                    self.troubles.count(Trouble::UnknownSession);
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
            director.streak = 0;
            director.distance.forget();
            director.backoff.reset();
            if is_gone {
                // Seen from where the host is not any more. It asks again at once.
                director.reflexive = None;
            }
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
        let before = self.home;
        self.choose(now);
        self.count_home(before);
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
                self.troubles.count(Trouble::Unavailable);
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

    fn count_home(&mut self, before: Option<DirectorId>) {
        self.home_changes += u64::from(before.is_some() && before != self.home);
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
        (director.way, director.udp, director.stream, director.reflexive) =
            (None, None, Stream::Closed, None);
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
            self.count_home(Some(id));
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
