//! The state machine itself: how each input moves the connection, the peers and the lookups, and what follows.

use std::{
    collections::VecDeque,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use muster_common::time::{Instant, Timestamp};
use muster_proto::registration::{
    Alive, DeviceConfig, EndpointReadiness, EndpointsChanged, SessionRequest, session_request,
};
use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::{
    Action, DirectorEvent, Failure, LookupBy, LookupResult, MAX_ENDPOINTS, Persist, Settings, Start,
    Validity,
    backoff::Backoff,
    connection::{ANSWER_PATIENCE, Link, NEXT_REGISTRAR},
    directors::Directors,
    health::Health,
    holding::is_it,
    lookups::Lookups,
    peer::{PeerInfo, endpoint},
    peers::{Peers, Reason},
    reachability::Told,
    registrars::Registrars,
    renewal::Renewal,
    services::Services,
    silence::Silence,
    virtual_services::VirtualServices,
};
use crate::{datapath::Event, resolver::HeldService};

/// Changes of the peers are collected for so long before they are written.
const PERSIST_DELAY: Duration = Duration::from_millis(500);
/// Changes of the private endpoints are told at most this often.
const ENDPOINTS_INTERVAL: Duration = Duration::from_secs(1);
/// How often a device that may carry subnets says that it is alive, as the API has it.
const ALIVE_INTERVAL: Duration = Duration::from_secs(2);

/// The control core. See the module.
#[derive(Debug)]
pub struct Control {
    pub(super) rng: StdRng,
    pub(super) start: Start,
    pub(super) config: Option<DeviceConfig>,
    pub(super) settings: Option<Settings>,
    pub(super) registrars: Registrars,
    pub(super) link: Link,
    /// The registrars to choose from when this one is left; any other if empty.
    pub(super) leave_for: Vec<String>,
    pub(super) attempt: u64,
    pub(super) backoff: Backoff,
    pub(super) refusals: u32,
    pub(super) changed_at: Instant,
    pub(super) last_error: String,
    pub(super) peers: Peers,
    pub(super) epoch: u64,
    pub(super) revision: u64,
    pub(super) lookups: Lookups,
    pub(super) silence: Silence,
    pub(super) services: Services,
    pub(super) virtual_services: VirtualServices,
    pub(super) health: Health,
    pub(super) directors: Directors,
    /// What the gateway maps to this device's tunnel.
    pub(super) mapped: Option<SocketAddr>,
    pub(super) told: Told,
    pub(super) renewal: Renewal,
    pub(super) endpoints: Vec<SocketAddr>,
    /// Where names are resolved.
    pub(super) resolvers: Vec<IpAddr>,
    /// When the registrar is told next that this device is alive, if it may carry subnets.
    pub(super) alive_at: Instant,
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
            leave_for: Vec::new(),
            attempt: 0,
            backoff: Backoff::new(Duration::from_millis(500), Duration::from_secs(30)),
            refusals: 0,
            changed_at: now,
            last_error: String::new(),
            peers: Peers::default(),
            epoch: start.epoch,
            revision: start.revision,
            lookups: Lookups::default(),
            silence: Silence::new(now),
            services: Services::default(),
            virtual_services: VirtualServices::new(start.virtual_services),
            health: Health::default(),
            directors: Directors::default(),
            mapped: None,
            told: Told::default(),
            renewal: Renewal::new(),
            endpoints,
            resolvers: Vec::new(),
            alive_at: now,
            connected_from: Vec::new(),
            endpoints_told: true,
            endpoints_at: now,
            persist_at: None,
            actions: VecDeque::new(),
            start,
        };
        if let Some(config) = config {
            control.apply_config(config, now);
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

    /// The answer to [`Action::Lookup`].
    pub fn handle_looked_up(&mut self, id: u64, result: LookupResult, now: Instant) {
        match result {
            LookupResult::Unavailable => self.lookups.retry(id, now),
            LookupResult::NotFound => {
                if let Some(answered) = self.lookups.finish(id) {
                    self.silence.answered(answered.sent_at, now);
                    self.not_found(answered.by, answered.awaited, now);
                }
            }
            LookupResult::Found(peer) => {
                let Some(answered) = self.lookups.finish(id) else { return };
                self.silence.answered(answered.sent_at, now);
                let (by, awaited) = (answered.by, answered.awaited);
                let outdated = self.peers.removed_since(&peer.device_uid, answered.removals);
                let own = peer.device_uid == self.start.device_uid;
                match PeerInfo::new(*peer, self.start.accepts_aes) {
                    _ if outdated => self.want(by, awaited, now),
                    Ok(info) if !own && is_it(&info, by) => {
                        self.put(info, Reason::Lookup, now);
                        // What is held may be newer than the answer, and say otherwise.
                        if awaited && self.holder(by).is_none() {
                            self.answer_negative(by);
                        }
                    }
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
            Event::Director(ref event) => self.directors.handle_flow(event, &mut self.rng, now),
            Event::EndpointChanged { .. } | Event::Failed(_) => {}
        }
        self.settle(now);
    }

    /// Something has become of an attachment to a director.
    pub fn handle_director(&mut self, event: DirectorEvent, now: Instant) {
        self.directors.handle(event, &mut self.rng, now);
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

    /// The resolver has names of these Services now, and of no others. To be called whenever that changes.
    pub fn handle_services_held(&mut self, services: Vec<HeldService>, now: Instant) {
        self.services.hold(services, now);
        self.settle(now);
    }

    /// Probes have found this of the endpoints that this host has; all that is known.
    pub fn handle_health(&mut self, found: Vec<EndpointReadiness>, now: Instant) {
        self.health.found(found);
        self.settle(now);
    }

    /// What was told of the Services that have virtual IPs does not fit together: all of it is asked for.
    pub fn handle_virtual_services_lost(&mut self, now: Instant) {
        self.virtual_services.forget();
        if matches!(self.link, Link::Opening { .. } | Link::Open { .. }) {
            self.reconnect("what it told of Services does not fit together", now);
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
            let is_gone = self.endpoints.iter().any(|old| !endpoints.contains(old));
            self.endpoints = endpoints;
            self.endpoints_told = false;
            self.reconfigure();
            self.directors.host_moved(is_gone, &mut self.rng, now);
            if is_gone {
                self.told.host_moved();
            }
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

    /// Names are resolved there, the network's and all others.
    pub fn handle_resolvers(&mut self, mut resolvers: Vec<IpAddr>, now: Instant) {
        resolvers.sort_unstable();
        resolvers.dedup();
        if resolvers != self.resolvers {
            self.resolvers = resolvers;
            self.reconfigure();
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
                let to = std::mem::take(&mut self.leave_for);
                self.registrars.go_to(&to, &mut self.rng);
                self.reconnect("the registrar has asked to go to another", now);
            }
            Link::Open { .. } if self.silent_at().is_some_and(|at| at <= now) => {
                self.silence.left();
                self.registrars.leave_silent(now);
                self.reconnect("the registrar does not answer", now);
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
            Link::Open { leave_at, .. } => leave_at.into_iter().chain(self.silent_at()).min(),
        };
        let endpoints = if self.endpoints_told { self.reachability_due() } else { Some(self.endpoints_at) };
        let endpoints = endpoints.filter(|_| connected);
        let (lookups, services) = (self.lookups.timeout(connected), self.services.timeout(connected));
        let renewal = self.renewal.timeout(connected);
        let directors = self.directors.timeout();
        let alive = (connected && self.may_carry()).then_some(self.alive_at);
        [link, endpoints, self.persist_at, lookups, services, renewal, directors, alive]
            .into_iter()
            .flatten()
            .min()
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    pub(super) fn persist_soon(&mut self, now: Instant) {
        self.persist_at.get_or_insert(now + PERSIST_DELAY);
    }

    /// What follows from any input: directors are chosen, lookups go out, the registrar is told what is new, renewal is
    /// begun.
    pub(super) fn settle(&mut self, now: Instant) {
        self.directors.need(self.peers.iter().map(|peer| peer.config.relays.as_slice()), now);
        self.directors.settle(&mut self.rng, now);
        self.actions.extend(self.directors.take_actions());
        match self.link {
            Link::Open { .. } => {
                while let Some((id, by)) = self.lookups.send(self.peers.removals(), now) {
                    self.actions.push_back(Action::Lookup { id, by });
                }
                if let Some(report) = self.peers.report() {
                    self.send(session_request::Message::HeldPeers(report));
                }
                if let Some(report) = self.health.report() {
                    self.send(session_request::Message::EndpointHealth(report));
                }
                if let Some(report) = self.services.report(now) {
                    self.send(session_request::Message::HeldServices(report));
                }
                let is_due = (!self.endpoints_told && self.endpoints_at <= now)
                    || self.reachability_due().is_some_and(|due| due <= now);
                if is_due {
                    self.endpoints_told = true;
                    self.endpoints_at = now + ENDPOINTS_INTERVAL;
                    let private_endpoints = self.endpoints.iter().map(endpoint).collect();
                    let reachability = Some(self.tell_reachability(now));
                    self.send(session_request::Message::EndpointsChanged(EndpointsChanged {
                        private_endpoints,
                        reachability,
                    }));
                }
                if self.may_carry() && self.alive_at <= now {
                    self.alive_at = now + ALIVE_INTERVAL;
                    self.send(session_request::Message::Alive(Alive {}));
                }
                if self.renewal.start(now, &mut self.rng) {
                    self.actions.push_back(Action::Renew);
                }
            }
            Link::Opening { .. } => {}
            Link::Waiting { .. } | Link::Registering { .. } => self.peers.forget_report(),
        }
        if let Some(services) = self.services.forget(now) {
            self.actions.push_back(Action::ForgetServices(services));
        }
        self.peers.prune(self.lookups.oldest_removals());
    }

    /// Whether another device has to take over soon once this one is dead.
    fn may_carry(&self) -> bool {
        self.settings.as_ref().is_some_and(|settings| !settings.subnets.is_empty())
    }

    fn send(&mut self, message: session_request::Message) {
        self.actions.push_back(Action::Send(SessionRequest { message: Some(message) }));
    }

    #[cfg(test)]
    pub(super) fn check(&self) {
        self.peers.check();
        self.directors.check();
        self.services.check();
        let (wanted, in_flight) = self.lookups.len();
        assert!(wanted <= super::MAX_LOOKUPS && in_flight <= super::MAX_LOOKUPS_IN_FLIGHT);
        assert!(in_flight == 0 || self.is_connected());
        assert!(!self.is_refused() || self.peers.len() == 0);
    }
}
