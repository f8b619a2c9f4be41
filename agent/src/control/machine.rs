//! The state machine itself: the connection to a registrar, and how each input moves it, the peers and the lookups.

use std::{
    collections::VecDeque,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use muster_common::time::{Instant, Timestamp};
use muster_proto::registration::{
    DeviceConfig, EndpointsChanged, RegisterRequest, RegisterResponse, SessionHello, SessionRequest,
    SessionResponse, session_request, session_response,
};
use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::{
    Action, Failure, LookupBy, LookupResult, MAX_ENDPOINTS, Persist, Settings, Start, Validity,
    backoff::Backoff,
    holding::is_it,
    lookups::Lookups,
    peer::{PeerInfo, endpoint},
    peers::{Peers, Reason},
    registrars::Registrars,
    renewal::Renewal,
};
use crate::datapath::Event;

/// A registrar that is silent for so long does not answer any more.
const ANSWER_PATIENCE: Duration = Duration::from_secs(30);
/// A session that lasted so long was a good one: the next failure is the first again.
const STABLE: Duration = Duration::from_secs(10);
/// Between attempts at two registrars that have not been tried in this round, in milliseconds.
const NEXT_REGISTRAR: std::ops::Range<u64> = 50..250;
/// Before a refusal is taken for final, since a registrar may be behind another one, in milliseconds.
const SECOND_OPINION: std::ops::Range<u64> = 500..1500;
/// Between attempts of a device that is refused, in milliseconds.
const REFUSED_RETRY: std::ops::Range<u64> = 30_000..60_000;
/// Longest time within which a draining registrar is left.
const DRAIN_MAX: Duration = Duration::from_secs(600);
/// Changes of the peers are collected for so long before they are written.
const PERSIST_DELAY: Duration = Duration::from_millis(500);
/// Changes of the private endpoints are told at most this often.
const ENDPOINTS_INTERVAL: Duration = Duration::from_secs(1);

/// The connection to a registrar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Link {
    Waiting { until: Instant },
    Registering { deadline: Instant },
    Opening { deadline: Instant },
    Open { since: Instant, leave_at: Option<Instant> },
}

/// The control core. See the module.
#[derive(Debug)]
pub struct Control {
    pub(super) rng: StdRng,
    pub(super) start: Start,
    pub(super) config: Option<DeviceConfig>,
    pub(super) settings: Option<Settings>,
    pub(super) registrars: Registrars,
    pub(super) link: Link,
    pub(super) attempt: u64,
    pub(super) backoff: Backoff,
    pub(super) refusals: u32,
    pub(super) changed_at: Instant,
    pub(super) last_error: String,
    pub(super) peers: Peers,
    pub(super) revision: u64,
    pub(super) lookups: Lookups,
    pub(super) renewal: Renewal,
    pub(super) endpoints: Vec<SocketAddr>,
    /// Those that there were when the connection was begun.
    pub(super) connected_from: Vec<SocketAddr>,
    pub(super) endpoints_told: bool,
    pub(super) endpoints_at: Instant,
    pub(super) persist_at: Option<Instant>,
    pub(super) actions: VecDeque<Action>,
}

impl Control {
    /// Comes up from what is on disk; `seed` drives everything random.
    pub fn new(mut start: Start, seed: u64, now: Instant) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let config = start.config.take();
        let peers = std::mem::take(&mut start.peers);
        let mut endpoints = std::mem::take(&mut start.private_endpoints);
        endpoints.truncate(MAX_ENDPOINTS);
        let mut control = Self {
            registrars: Registrars::new(&[], &start.registrar, &mut rng),
            rng,
            config: None,
            settings: None,
            link: Link::Waiting { until: now },
            attempt: 0,
            backoff: Backoff::new(Duration::from_millis(500), Duration::from_secs(30)),
            refusals: 0,
            changed_at: now,
            last_error: String::new(),
            peers: Peers::default(),
            revision: start.revision,
            lookups: Lookups::default(),
            renewal: Renewal::new(),
            endpoints,
            connected_from: Vec::new(),
            endpoints_told: true,
            endpoints_at: now,
            persist_at: None,
            actions: VecDeque::new(),
            start,
        };
        if let Some(config) = config {
            control.apply_config(config);
            // Nothing is new: it comes from the disk.
            control.actions.retain(|action| !matches!(action, Action::Persist(_)));
        }
        // Peers are of no use to a data plane that has no addresses yet.
        if control.settings.is_some() {
            for peer in peers {
                control.offer(peer, Reason::Introduced, now);
            }
        }
        control.persist_at = None;
        control.settle(now);
        control
    }

    /// The answer to [`Action::Register`].
    pub fn handle_registered(
        &mut self,
        attempt: u64,
        result: Result<RegisterResponse, Failure>,
        now: Instant,
    ) {
        if attempt != self.attempt || !matches!(self.link, Link::Registering { .. }) {
            return;
        }
        match result {
            Err(failure) => self.fail(failure, now),
            Ok(response) => {
                if let Some(config) = response.config {
                    self.apply_config(config);
                }
                self.link = Link::Opening { deadline: now + ANSWER_PATIENCE };
                let hello = SessionHello {
                    revision: self.revision,
                    held_peer_uids: self.peers.hello(),
                    held_services: Vec::new(),
                };
                self.actions.push_back(Action::OpenSession { attempt, hello });
            }
        }
        self.settle(now);
    }

    /// The session of [`Action::OpenSession`] is open.
    pub fn handle_session_opened(&mut self, attempt: u64, now: Instant) {
        if attempt == self.attempt && matches!(self.link, Link::Opening { .. }) {
            self.link = Link::Open { since: now, leave_at: None };
            self.changed_at = now;
            self.last_error.clear();
            self.refusals = 0;
        }
        self.settle(now);
    }

    /// A message came on the session.
    pub fn handle_session_message(&mut self, attempt: u64, message: SessionResponse, now: Instant) {
        if attempt != self.attempt {
            return;
        }
        self.handle_session_opened(attempt, now);
        if !matches!(self.link, Link::Open { .. }) {
            return;
        }
        use session_response::Message;
        match message.message {
            Some(Message::Config(config)) => self.apply_config(config),
            Some(Message::Introduction(introduction)) => {
                if let Some(peer) = introduction.peer {
                    self.offer(peer, Reason::Introduced, now);
                }
            }
            Some(Message::PeerChanged(changed)) => {
                // One that has been forgotten meanwhile stays forgotten.
                if let Some(peer) = changed.peer
                    && self.peers.get(&peer.device_uid).is_some()
                {
                    self.offer(peer, Reason::Changed, now);
                }
            }
            Some(Message::PeerRemoved(removed)) => {
                self.remove_for_good(&removed.device_uid, now);
            }
            Some(Message::RootsChanged(changed)) => {
                self.actions.push_back(Action::ReplaceRoots(changed.roots));
            }
            Some(Message::Drain(drain)) => {
                let within = drain.within.map_or(Duration::ZERO, |d| {
                    Duration::from_secs(u64::try_from(d.seconds).unwrap_or(0))
                        + Duration::from_nanos(u64::try_from(d.nanos).unwrap_or(0))
                });
                let moment = within.min(DRAIN_MAX).mul_f64(self.rng.random_range(0.0..=1.0));
                if let Link::Open { leave_at: leave_at @ None, .. } = &mut self.link {
                    *leave_at = Some(now + moment);
                }
            }
            Some(Message::Bookmark(bookmark)) => self.revision = bookmark.revision,
            Some(Message::ServiceChanged(_)) | None => {}
        }
        self.settle(now);
    }

    /// The session has ended, or could not be opened.
    pub fn handle_session_closed(&mut self, attempt: u64, failure: Failure, now: Instant) {
        if attempt == self.attempt && matches!(self.link, Link::Opening { .. } | Link::Open { .. }) {
            self.fail(failure, now);
        }
        self.settle(now);
    }

    /// The answer to [`Action::Lookup`].
    pub fn handle_looked_up(&mut self, id: u64, result: LookupResult, now: Instant) {
        match result {
            LookupResult::Unavailable => self.lookups.retry(id, now),
            LookupResult::NotFound => {
                if let Some(answered) = self.lookups.finish(id) {
                    self.not_found(answered.by, answered.awaited, now);
                }
            }
            LookupResult::Found(peer) => {
                let Some(answered) = self.lookups.finish(id) else { return };
                let (by, awaited) = (answered.by, answered.awaited);
                let outdated = self.peers.removed_since(&peer.device_uid, answered.removals);
                let own = peer.device_uid == self.start.device_uid;
                match PeerInfo::try_from(*peer) {
                    _ if outdated => self.want(by, awaited, now),
                    Ok(info) if !own && is_it(&info, by) => self.put(info, Reason::Lookup, now),
                    Ok(_) => self.not_found(by, awaited, now),
                    Err(error) => {
                        tracing::debug!(%error, "a lookup found a peer that cannot be used");
                        self.not_found(by, awaited, now);
                    }
                }
            }
        }
        self.settle(now);
    }

    /// The data plane wants something, or tells something.
    pub fn handle_datapath(&mut self, event: &Event, now: Instant) {
        match *event {
            Event::LookupAddress(address) => self.handle_wanted(LookupBy::Address(address), now),
            Event::LookupKey(key) => self.handle_wanted(LookupBy::PublicKey(key), now),
            Event::PeerUp { public_key, .. } => {
                if let Some(uid) = self.peers.by_key(&public_key).map(str::to_owned) {
                    self.peers.touch(&uid);
                }
            }
            // It may have moved, and an introduction makes it answer.
            Event::PeerDown(key) => {
                if self.peers.by_key(&key).is_some() {
                    self.want(LookupBy::PublicKey(key), false, now);
                }
            }
            Event::PeerIdle(key) => {
                if let Some(uid) = self.peers.by_key(&key).map(str::to_owned) {
                    let mut commands = Vec::new();
                    self.peers.remove(&uid, &mut commands);
                    self.tell_datapath(commands);
                    self.persist_soon(now);
                }
            }
            Event::EndpointChanged { .. } | Event::Failed(_) => {}
        }
        self.settle(now);
    }

    /// A name has been resolved to these addresses: packets are about to follow.
    pub fn handle_resolved(&mut self, addresses: &[IpAddr], now: Instant) {
        for address in addresses {
            if self.peers.by_address(*address).is_none() && self.is_peer_address(*address) {
                self.want(LookupBy::Address(*address), false, now);
            }
        }
        self.settle(now);
    }

    /// This device's tunnel is reached elsewhere on its own networks; best first.
    pub fn handle_private_endpoints(&mut self, mut endpoints: Vec<SocketAddr>, now: Instant) {
        endpoints.truncate(MAX_ENDPOINTS);
        if endpoints != self.endpoints {
            // Without any address there is nothing to move to; the old one may well come back.
            let moved =
                !endpoints.is_empty() && self.connected_from.iter().any(|old| !endpoints.contains(old));
            self.endpoints = endpoints;
            self.endpoints_told = false;
            match &mut self.link {
                // The host is on another network: what failed there may succeed here.
                Link::Waiting { until } if self.refusals == 0 => {
                    let soon = Duration::from_millis(self.rng.random_range(NEXT_REGISTRAR));
                    *until = (*until).min(now + soon);
                }
                // A connection from an address that is gone only looks alive, until its keepalives fail.
                Link::Registering { .. } | Link::Opening { .. } | Link::Open { .. } if moved => {
                    self.reconnect("an address of this host is gone", now);
                }
                _ => {}
            }
        }
        self.settle(now);
    }

    /// The certificate in use, and the civil time. To be called at start, after a renewal, and every hour, since
    /// clocks get set.
    pub fn handle_certificate(&mut self, validity: Validity, civil: Timestamp, now: Instant) {
        self.renewal.set(validity, civil, now, &mut self.rng);
        self.settle(now);
    }

    /// The [`Action::Renew`] failed. (After one that did not, [`Self::handle_certificate`] is called.)
    pub fn handle_renewal_failed(&mut self, now: Instant) {
        self.renewal.failed(now, &mut self.rng);
        self.settle(now);
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Instant) {
        match self.link {
            Link::Waiting { until } if until <= now => self.connect(now),
            Link::Registering { deadline } | Link::Opening { deadline } if deadline <= now => {
                let reason = format!("no answer within {} s", ANSWER_PATIENCE.as_secs());
                self.fail(Failure::Unavailable(reason), now);
            }
            Link::Open { leave_at: Some(leave_at), .. } if leave_at <= now => {
                self.registrars.advance();
                self.reconnect("the registrar is shutting down", now);
            }
            _ => {}
        }
        for by in self.lookups.expire(now) {
            self.answer_negative(by);
        }
        if self.persist_at.is_some_and(|at| at <= now) {
            self.persist_at = None;
            self.actions.push_back(Action::Persist(Persist::Peers));
        }
        self.settle(now);
    }

    /// When [`Self::handle_timeout`] is to be called next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let connected = self.is_connected();
        let link = match self.link {
            Link::Waiting { until } => Some(until),
            Link::Registering { deadline } | Link::Opening { deadline } => Some(deadline),
            Link::Open { leave_at, .. } => leave_at,
        };
        let endpoints = (connected && !self.endpoints_told).then_some(self.endpoints_at);
        [link, endpoints, self.persist_at, self.lookups.timeout(connected), self.renewal.timeout(connected)]
            .into_iter()
            .flatten()
            .min()
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    fn connect(&mut self, now: Instant) {
        self.attempt += 1;
        self.link = Link::Registering { deadline: now + ANSWER_PATIENCE };
        self.endpoints_told = true;
        self.connected_from.clone_from(&self.endpoints);
        let request = RegisterRequest {
            public_key: self.start.public_key.to_vec(),
            private_endpoints: self.endpoints.iter().map(endpoint).collect(),
            agent_version: self.start.agent_version.clone(),
        };
        let registrar = self.registrars.current().to_owned();
        self.actions.push_back(Action::Register { attempt: self.attempt, registrar, request });
    }

    /// Begins a new connection in place of the one there is.
    fn reconnect(&mut self, reason: &str, now: Instant) {
        self.actions.push_back(Action::Disconnect { attempt: self.attempt });
        self.lookups.disconnected();
        if self.is_connected() {
            self.changed_at = now;
        }
        reason.clone_into(&mut self.last_error);
        self.connect(now);
    }

    /// Gives up the connection, or the attempt at one.
    fn fail(&mut self, failure: Failure, now: Instant) {
        self.actions.push_back(Action::Disconnect { attempt: self.attempt });
        self.lookups.disconnected();
        if let Link::Open { since, .. } = self.link {
            self.changed_at = now;
            if now - since >= STABLE {
                self.backoff.reset();
            }
        }
        let wait = match failure {
            Failure::Unavailable(reason) => {
                self.last_error = reason;
                if self.registrars.at_end() {
                    self.backoff.fail(&mut self.rng)
                } else {
                    Duration::from_millis(self.rng.random_range(NEXT_REGISTRAR))
                }
            }
            Failure::Refused(reason) => {
                self.last_error = reason;
                self.refusals = self.refusals.saturating_add(1);
                let range = if self.is_refused() { REFUSED_RETRY } else { SECOND_OPINION };
                Duration::from_millis(self.rng.random_range(range))
            }
        };
        if self.is_refused() {
            self.cut_off(now);
        }
        self.registrars.advance();
        self.link = Link::Waiting { until: now + wait };
    }

    /// The registrar refuses this device: it is nobody's peer any more.
    fn cut_off(&mut self, now: Instant) {
        for by in self.lookups.clear() {
            self.answer_negative(by);
        }
        if self.peers.len() > 0 {
            let mut commands = Vec::new();
            self.peers.clear(&mut commands);
            self.tell_datapath(commands);
            self.persist_soon(now);
        }
    }

    fn apply_config(&mut self, config: DeviceConfig) {
        if self.config.as_ref() == Some(&config) {
            return;
        }
        let settings = match Settings::new(&config, &self.start.device_uid) {
            Ok(settings) => settings,
            Err(error) => {
                tracing::warn!(%error, "cannot use the configuration from the registrar; going on with the last one");
                return;
            }
        };
        self.registrars.update(&settings.registrars, &self.start.registrar, &mut self.rng);
        if self.settings.as_ref() != Some(&settings) {
            self.actions.push_back(Action::Configure(Box::new(settings.clone())));
            self.settings = Some(settings);
        }
        self.config = Some(config);
        self.actions.push_back(Action::Persist(Persist::Config));
    }

    pub(super) fn persist_soon(&mut self, now: Instant) {
        self.persist_at.get_or_insert(now + PERSIST_DELAY);
    }

    /// What follows from any input: lookups go out, the registrar is told what is new, renewal is begun.
    fn settle(&mut self, now: Instant) {
        match self.link {
            Link::Open { .. } => {
                while let Some((id, by)) = self.lookups.send(self.peers.removals(), now) {
                    self.actions.push_back(Action::Lookup { id, by });
                }
                if let Some(report) = self.peers.report() {
                    self.send(session_request::Message::HeldPeers(report));
                }
                if !self.endpoints_told && self.endpoints_at <= now {
                    self.endpoints_told = true;
                    self.endpoints_at = now + ENDPOINTS_INTERVAL;
                    let private_endpoints = self.endpoints.iter().map(endpoint).collect();
                    self.send(session_request::Message::EndpointsChanged(EndpointsChanged {
                        private_endpoints,
                    }));
                }
                if self.renewal.start(now, &mut self.rng) {
                    self.actions.push_back(Action::Renew);
                }
            }
            Link::Opening { .. } => {}
            Link::Waiting { .. } | Link::Registering { .. } => self.peers.forget_report(),
        }
        self.peers.prune(self.lookups.oldest_removals());
    }

    fn send(&mut self, message: session_request::Message) {
        self.actions.push_back(Action::Send(SessionRequest { message: Some(message) }));
    }

    #[cfg(test)]
    pub(super) fn check(&self) {
        self.peers.check();
        let (wanted, in_flight) = self.lookups.len();
        assert!(wanted <= super::MAX_LOOKUPS && in_flight <= super::MAX_LOOKUPS_IN_FLIGHT);
        assert!(in_flight == 0 || self.is_connected());
        assert!(!self.is_refused() || self.peers.len() == 0);
    }
}
