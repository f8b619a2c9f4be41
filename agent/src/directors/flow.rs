//! The UDP flows to directors as a state machine without I/O: hellos that keep each flow open and find out how far and
//! behind which address this host is, and what the other datagrams of a director are. It lives in the data plane, as
//! hellos must leave by the socket that the tunnel's datagrams leave by, for a NAT to treat them alike.

use std::{collections::VecDeque, fmt, net::SocketAddr, time::Duration};

use muster_common::{
    frame::{self, DataHeader, Frame, HELLO, Handle, Welcome},
    time::Instant,
};
use muster_tunnel::{DirectorId, DirectorLink, Endpoint, Hop};
use zeroize::Zeroizing;

/// Directors at a time.
const FLOWS: usize = 16;
/// Addresses of one director that are tried.
const ENDPOINTS: usize = 4;
/// When the hellos of a round are sent, after its beginning: to the director's addresses in turn.
const ROUND: [Duration; 4] =
    [Duration::ZERO, Duration::from_millis(250), Duration::from_millis(500), Duration::from_millis(1_000)];
/// Without an answer after this, a round has failed.
const ROUND_LEN: Duration = Duration::from_millis(2_000);
/// A hello that keeps the flow open should be answered within this; else a round begins.
const ANSWER: Duration = Duration::from_secs(1);
/// Between a round that has failed and the next: at first, and at last after doubling.
const PAUSE_MIN: Duration = Duration::from_secs(2);
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// What a director may ask for as interval between hellos. NATs forget a flow after 30 s at the soonest.
const INTERVAL_MIN: Duration = Duration::from_secs(1);
const INTERVAL_MAX: Duration = Duration::from_secs(25);
/// A director that says for so long that it knows no such session, without an answer to a hello in between, has none:
/// two round trips, but between these. A round's last hello must be sent no sooner.
const SUSPICION: (Duration, Duration) = (Duration::from_millis(500), Duration::from_millis(1_000));
/// Hellos that may be answered yet.
const OUTSTANDING: usize = 8;
/// Hellos in a row that only bring the proof that the last answer asked for, until the flow is bound.
const PROOFS: u8 = 3;

/// What a director has given this device for one attachment.
#[derive(Clone, PartialEq, Eq)]
pub struct Attachment {
    /// Where the director hears hellos and frames, best first. More than four are not used.
    pub endpoints: Vec<SocketAddr>,
    /// The number of the attachment, in every frame.
    pub session: u32,
    /// What hellos and welcomes are authenticated with.
    pub key: Zeroizing<[u8; 32]>,
    /// Time between hellos while they are answered: 1 s to 25 s, whatever is asked for.
    pub hello_interval: Duration,
}

impl fmt::Debug for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Neither the key nor the session, which is half a secret.
        f.debug_struct("Attachment")
            .field("endpoints", &self.endpoints)
            .field("hello_interval", &self.hello_interval)
            .finish_non_exhaustive()
    }
}

/// What has become of a flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FlowEvent {
    /// How frames reach the director from now on, for the tunnel; `None`: not at all.
    Link(DirectorId, Option<DirectorLink>),
    /// A hello was answered, and the director sends where it came from.
    Bound {
        /// Whose flow.
        id: DirectorId,
        /// Where this host is as the director sees it.
        reflexive: SocketAddr,
        /// From the hello to its answer.
        round_trip: Duration,
        /// The director is about to go.
        draining: bool,
    },
    /// The director does not answer over UDP, but may over TCP. Once, until it has answered again.
    Unanswered(DirectorId),
    /// The director does not know the session: only attaching again helps. The flow rests until then.
    Dead(DirectorId),
    /// The director knows no device of this handle.
    NoSuchDevice(DirectorId, Handle),
}

/// What a datagram was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Incoming {
    /// A datagram of the tunnel, behind [`frame::HEADER`] octets, and the peer that it is from.
    Data(Endpoint),
    /// For the flow itself.
    Done,
    /// Malformed, forged, outdated, or of no director.
    Dropped,
}

/// The flows to all directors. What it has to send and to say is to be fetched after every call.
#[derive(Default)]
pub struct Flows {
    /// Few: searched in order, which is also the order of everything that is due at the same time.
    flows: Vec<Flow>,
    transmits: VecDeque<(SocketAddr, [u8; HELLO])>,
    events: VecDeque<FlowEvent>,
}

struct Flow {
    id: DirectorId,
    endpoints: Vec<SocketAddr>,
    session: u32,
    /// The session before, which the director keeps for a moment.
    previous: Option<u32>,
    key: frame::Key,
    interval: Duration,
    /// Of the last hello.
    counter: u64,
    outstanding: VecDeque<Hello>,
    schedule: Schedule,
    /// Until the next round, if this one fails.
    pause: Duration,
    /// The address of the director by which it is bound, and the counter of the hello that did it.
    bound: Option<(SocketAddr, u64)>,
    is_draining: bool,
    has_stream: bool,
    /// The link of the session before, in use until this one is bound.
    inherited: Option<DirectorLink>,
    /// As the tunnel knows it.
    link: Option<DirectorLink>,
    round_trip: Option<Duration>,
    /// What the director wants to see in the next hello to this address of its own.
    proof: Option<(SocketAddr, u64)>,
    proofs: u8,
    /// Since when the director says that it does not know the session.
    suspected: Option<Instant>,
    /// [`FlowEvent::Unanswered`] was told.
    is_unanswered: bool,
}

struct Hello {
    counter: u64,
    to: SocketAddr,
    at: Instant,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Schedule {
    /// Hellos to all addresses, of which so many have been sent.
    Round { start: Instant, sent: usize },
    /// All is well; the next hello.
    Quiet { next: Instant },
    /// A hello was sent to see whether all is well.
    Asked { at: Instant },
    /// A round has failed; the next.
    Pause { until: Instant },
    /// The session does not exist.
    Dead,
}

impl Flows {
    /// No flows.
    pub fn new() -> Self {
        Self::default()
    }

    /// Opens a flow, or renews one with what a new attachment gave. The link of the one before is used until the new one
    /// is bound. Directors beyond the sixteenth get none.
    pub fn attach(&mut self, id: DirectorId, attachment: Attachment, now: Instant) {
        let has_room = self.flows.len() < FLOWS;
        match self.flows.iter_mut().find(|flow| flow.id == id) {
            Some(flow) if flow.session == attachment.session => flow.update(&attachment, now),
            Some(flow) => *flow = Flow::new(id, &attachment, Some(flow), now),
            None if has_room => self.flows.push(Flow::new(id, &attachment, None, now)),
            None => tracing::warn!(?id, "no flow to the director: there are as many as there may be"),
        }
        self.handle_timeout(now);
    }

    /// Closes a flow.
    pub fn detach(&mut self, id: DirectorId) {
        let Some(at) = self.flows.iter().position(|flow| flow.id == id) else { return };
        if self.flows.remove(at).link.is_some() {
            self.events.push_back(FlowEvent::Link(id, None));
        }
    }

    /// The director's frames can go over TCP, or no longer can. They do while UDP does not work.
    pub fn stream(&mut self, id: DirectorId, open: bool, _now: Instant) {
        let Some(flow) = self.flows.iter_mut().find(|flow| flow.id == id) else { return };
        flow.has_stream = open;
        flow.inherited = None;
        flow.relink(&mut self.events);
    }

    /// Takes a datagram that does not begin as WireGuard's do (1 to 4).
    pub fn handle(&mut self, from: SocketAddr, datagram: &[u8], now: Instant) -> Incoming {
        let Some(parsed) = frame::parse(datagram) else { return Incoming::Dropped };
        let session = match &parsed {
            Frame::Data(header, _) | Frame::Unreachable(header) => header.session,
            Frame::Welcome(welcome) => welcome.session(),
            Frame::Unbound { session } => *session,
            // These are for directors.
            Frame::Hello(_) => return Incoming::Dropped,
        };
        let flow = self.flows.iter_mut().find(|flow| flow.has(session) && flow.endpoints.contains(&from));
        let Some(flow) = flow else { return Incoming::Dropped };
        match parsed {
            Frame::Data(header, _) => return flow.data(header),
            Frame::Unreachable(header) => {
                self.events.push_back(FlowEvent::NoSuchDevice(flow.id, header.handle))
            }
            Frame::Unbound { .. } if session == flow.session => flow.unbound(now, &mut self.events),
            Frame::Welcome(welcome) => {
                let Some(transmit) = flow.welcome(from, &welcome, now, &mut self.events) else {
                    return Incoming::Dropped;
                };
                self.transmits.extend(transmit);
            }
            _ => return Incoming::Dropped,
        }
        self.handle_timeout(now);
        Incoming::Done
    }

    /// Takes a frame that came by the director's stream.
    pub fn handle_frame(&mut self, id: DirectorId, octets: &[u8]) -> Incoming {
        let Some(flow) = self.flows.iter().find(|flow| flow.id == id) else { return Incoming::Dropped };
        match frame::parse(octets) {
            Some(Frame::Data(header, _)) if flow.has(header.session) => flow.data(header),
            Some(Frame::Unreachable(header)) if flow.has(header.session) => {
                self.events.push_back(FlowEvent::NoSuchDevice(id, header.handle));
                Incoming::Done
            }
            _ => Incoming::Dropped,
        }
    }

    /// This host has another address: finds out at once how it reaches directors now, and tells them.
    pub fn host_moved(&mut self, now: Instant) {
        for flow in self.flows.iter_mut().filter(|flow| flow.schedule != Schedule::Dead) {
            // An answer to what was sent from where the host has been says nothing.
            flow.outstanding.clear();
            flow.suspected = None;
            flow.begin_round(now);
        }
        self.handle_timeout(now);
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        for flow in &mut self.flows {
            self.transmits.extend(flow.handle_timeout(now, &mut self.events));
        }
    }

    /// When something will be due.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.flows.iter().filter_map(Flow::poll_timeout).min()
    }

    /// The next hello to send, and where to.
    pub fn poll_transmit(&mut self) -> Option<(SocketAddr, [u8; HELLO])> {
        self.transmits.pop_front()
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<FlowEvent> {
        self.events.pop_front()
    }
}

impl Flow {
    fn new(id: DirectorId, attachment: &Attachment, before: Option<&Self>, now: Instant) -> Self {
        let before = before.filter(|before| before.schedule != Schedule::Dead);
        let link = before.and_then(|before| before.link);
        let mut this = Self {
            id,
            endpoints: Vec::new(),
            session: attachment.session,
            previous: before.map(|before| before.session),
            key: frame::Key::new(&attachment.key),
            interval: INTERVAL_MAX,
            counter: 0,
            outstanding: VecDeque::new(),
            schedule: Schedule::Round { start: now, sent: 0 },
            pause: PAUSE_MIN,
            bound: None,
            is_draining: false,
            has_stream: false,
            inherited: link,
            link,
            round_trip: None,
            proof: None,
            proofs: 0,
            suspected: None,
            is_unanswered: false,
        };
        this.set(attachment);
        this
    }

    fn set(&mut self, attachment: &Attachment) {
        self.endpoints = attachment.endpoints.iter().take(ENDPOINTS).copied().collect();
        self.interval = attachment.hello_interval.clamp(INTERVAL_MIN, INTERVAL_MAX);
    }

    /// The same session, perhaps at other addresses.
    fn update(&mut self, attachment: &Attachment, now: Instant) {
        self.set(attachment);
        if self.bound.is_some_and(|(via, _)| !self.endpoints.contains(&via)) {
            self.begin_round(now);
        }
    }

    fn has(&self, session: u32) -> bool {
        self.session == session || self.previous == Some(session)
    }

    fn data(&self, header: DataHeader) -> Incoming {
        Incoming::Data(Endpoint::Relay { director: self.id, handle: header.handle })
    }

    fn begin_round(&mut self, now: Instant) {
        self.schedule = Schedule::Round { start: now, sent: 0 };
        (self.proof, self.proofs) = (None, 0);
    }

    fn hello(&mut self, to: SocketAddr, now: Instant) -> (SocketAddr, [u8; HELLO]) {
        self.counter += 1;
        if self.outstanding.len() >= OUTSTANDING {
            self.outstanding.pop_front();
        }
        self.outstanding.push_back(Hello { counter: self.counter, to, at: now });
        let proof = self.proof.filter(|(address, _)| *address == to).map_or(0, |(_, proof)| proof);
        (to, frame::hello(&self.key, self.session, self.counter, proof))
    }

    /// The address for hello number `number` of a round: the one in use, and then the others in turn.
    fn address(&self, number: usize) -> Option<SocketAddr> {
        let first = self.bound.and_then(|(via, _)| self.endpoints.iter().position(|other| *other == via));
        let at = (first.unwrap_or(0) + number).checked_rem(self.endpoints.len())?;
        self.endpoints.get(at).copied()
    }

    /// An answer to a hello. `None` if it is not, else a hello that is due at once.
    fn welcome(
        &mut self,
        from: SocketAddr,
        welcome: &Welcome<'_>,
        now: Instant,
        events: &mut VecDeque<FlowEvent>,
    ) -> Option<Option<(SocketAddr, [u8; HELLO])>> {
        if welcome.session() != self.session || self.schedule == Schedule::Dead {
            return None;
        }
        let answers = |hello: &Hello| hello.counter == welcome.counter() && hello.to == from;
        let at = self.outstanding.iter().position(answers)?;
        if !welcome.is_authentic(&self.key) {
            return None;
        }
        let hello = self.outstanding.remove(at)?;
        // The director knows the session, whatever else.
        self.suspected = None;
        let flags = welcome.flags();
        if flags.is_bound {
            if self.bound.is_none_or(|(_, counter)| counter < hello.counter) {
                self.bound = Some((from, hello.counter));
            }
            let round_trip = now - hello.at;
            self.round_trip = Some(round_trip);
            self.is_draining = flags.is_draining;
            (self.is_unanswered, self.pause, self.inherited) = (false, PAUSE_MIN, None);
            (self.proof, self.proofs) = (None, 0);
            self.schedule = Schedule::Quiet { next: now + self.interval };
            self.relink(events);
            let (id, reflexive, draining) = (self.id, welcome.from(), flags.is_draining);
            events.push_back(FlowEvent::Bound { id, reflexive, round_trip, draining });
            return Some(None);
        }
        // From an address that the director has not seen yet: it sends there only after it has been heard from there.
        let is_looking = !matches!(self.schedule, Schedule::Quiet { .. });
        if !is_looking || welcome.proof() == 0 {
            return Some(None);
        }
        self.proof = Some((from, welcome.proof()));
        if self.proofs >= PROOFS {
            return Some(None);
        }
        self.proofs += 1;
        Some(Some(self.hello(from, now)))
    }

    /// The director knows the session not at all, or not from where this host is now.
    fn unbound(&mut self, now: Instant, events: &mut VecDeque<FlowEvent>) {
        if self.schedule == Schedule::Dead {
            return;
        }
        // Frames that were on their way before the first hello may be complained about for a round trip.
        let patience = (self.round_trip.unwrap_or_default() * 2).clamp(SUSPICION.0, SUSPICION.1);
        match self.suspected {
            None => {
                self.suspected = Some(now);
                self.begin_round(now);
            }
            Some(since) if now - since >= patience => {
                self.schedule = Schedule::Dead;
                (self.bound, self.inherited, self.has_stream) = (None, None, false);
                self.relink(events);
                events.push_back(FlowEvent::Dead(self.id));
            }
            Some(_) => {}
        }
    }

    fn handle_timeout(
        &mut self,
        now: Instant,
        events: &mut VecDeque<FlowEvent>,
    ) -> Option<(SocketAddr, [u8; HELLO])> {
        if self.poll_timeout().is_none_or(|due| due > now) {
            return None;
        }
        match self.schedule {
            Schedule::Round { start, sent } if sent < ROUND.len() && !self.endpoints.is_empty() => {
                // Those that are overdue are not made up for.
                let due = ROUND.iter().filter(|after| start + **after <= now).count();
                self.schedule = Schedule::Round { start, sent: due.max(sent + 1) };
                let to = self.address(sent)?;
                Some(self.hello(to, now))
            }
            Schedule::Round { .. } => {
                self.fail(now, events);
                None
            }
            Schedule::Quiet { .. } => match self.bound {
                Some((via, _)) => {
                    self.schedule = Schedule::Asked { at: now };
                    Some(self.hello(via, now))
                }
                None => self.start_round(now, events),
            },
            Schedule::Asked { .. } | Schedule::Pause { .. } => self.start_round(now, events),
            Schedule::Dead => None,
        }
    }

    /// Begins a round with its first hello.
    fn start_round(
        &mut self,
        now: Instant,
        events: &mut VecDeque<FlowEvent>,
    ) -> Option<(SocketAddr, [u8; HELLO])> {
        self.begin_round(now);
        self.handle_timeout(now, events)
    }

    /// No address of the director has answered.
    fn fail(&mut self, now: Instant, events: &mut VecDeque<FlowEvent>) {
        self.schedule = Schedule::Pause { until: now + self.pause };
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        // A suspicion stays: without a link nothing but hellos is sent, and what is said of those counts.
        (self.bound, self.inherited) = (None, None);
        self.relink(events);
        if !std::mem::replace(&mut self.is_unanswered, true) {
            events.push_back(FlowEvent::Unanswered(self.id));
        }
    }

    fn poll_timeout(&self) -> Option<Instant> {
        match self.schedule {
            Schedule::Round { start, .. } if self.endpoints.is_empty() => Some(start),
            Schedule::Round { start, sent } => Some(start + ROUND.get(sent).copied().unwrap_or(ROUND_LEN)),
            Schedule::Quiet { next } => Some(next),
            Schedule::Asked { at } => Some(at + ANSWER),
            Schedule::Pause { until } => Some(until),
            Schedule::Dead => None,
        }
    }

    /// Tells the tunnel if frames reach the director in another way than before.
    fn relink(&mut self, events: &mut VecDeque<FlowEvent>) {
        let hop = self.bound.map(|(via, _)| Hop::Udp(via));
        let hop = hop.or_else(|| self.has_stream.then_some(Hop::Stream(self.id)));
        let own = hop.map(|hop| DirectorLink { session: self.session, hop, is_draining: self.is_draining });
        let link = own.or(self.inherited);
        if self.link != link {
            self.link = link;
            events.push_back(FlowEvent::Link(self.id, link));
        }
    }
}

#[cfg(test)]
mod tests;
