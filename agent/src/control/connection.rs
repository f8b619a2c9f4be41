//! The connection to a registrar: attempts at one, the session on it and what comes over that, and how it ends.

use std::{net::IpAddr, time::Duration};

use muster_common::time::Instant;
use muster_proto::{
    admin::TransportCipher,
    registration::{
        DeviceConfig, RegisterRequest, RegisterResponse, SessionHello, SessionResponse, session_response,
    },
};
use rand::RngExt;

use super::{
    Action, Control, DirectorTarget, Failure, Persist, Settings, SettingsError, peer::endpoint,
    peers::Reason, registrars::MAX_REGISTRARS, settings::Underlay,
};

/// A registrar that is silent for so long does not answer any more.
pub(super) const ANSWER_PATIENCE: Duration = Duration::from_secs(30);
/// A session that lasted so long was a good one: the next failure is the first again.
const STABLE: Duration = Duration::from_secs(10);
/// Between attempts at two registrars that have not been tried in this round, in milliseconds.
pub(super) const NEXT_REGISTRAR: std::ops::Range<u64> = 50..250;
/// Before a refusal is taken for final, since a registrar may be behind another one, in milliseconds.
const SECOND_OPINION: std::ops::Range<u64> = 500..1500;
/// Between attempts of a device that is refused, in milliseconds.
const REFUSED_RETRY: std::ops::Range<u64> = 30_000..60_000;
/// Longest time within which a draining registrar is left.
const DRAIN_MAX: Duration = Duration::from_secs(600);

/// The connection to a registrar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Link {
    Waiting { until: Instant },
    Registering { deadline: Instant },
    Opening { deadline: Instant },
    Open { since: Instant, leave_at: Option<Instant> },
}

impl Control {
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
                if response.unsaved {
                    (self.endpoints_told, self.endpoints_at) = (false, now);
                }
                if let Some(config) = response.config {
                    self.apply_config(config, now);
                }
                if response.store_epoch != self.epoch {
                    self.begin_epoch(response.store_epoch, now);
                }
                self.link = Link::Opening { deadline: now + ANSWER_PATIENCE };
                let hello = SessionHello {
                    revision: self.revision,
                    held_peer_uids: self.peers.hello(),
                    held_services: self.services.hello(now),
                    watch_virtual_services: self.virtual_services.hello(),
                };
                self.actions.push_back(Action::OpenSession { attempt, hello });
            }
        }
        self.settle(now);
    }

    /// The registrars have another store than before, such as one restored from a backup: its revisions say nothing about
    /// what is held, which therefore gives way to whatever is told.
    fn begin_epoch(&mut self, epoch: u64, now: Instant) {
        self.epoch = epoch;
        self.revision = 0;
        self.peers.forget_revisions();
        self.persist_soon(now);
    }

    /// The session of [`Action::OpenSession`] is open.
    pub fn handle_session_opened(&mut self, attempt: u64, now: Instant) {
        if attempt == self.attempt && matches!(self.link, Link::Opening { .. }) {
            self.link = Link::Open { since: now, leave_at: None };
            self.alive_at = now;
            self.health.session_opened();
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
        self.silence.heard(now);
        if !matches!(self.link, Link::Open { .. }) {
            return;
        }
        use session_response::Message;
        match message.message {
            Some(Message::Config(config)) => self.apply_config(config, now),
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
            Some(Message::Drain(mut drain)) => {
                let within = drain.within.map_or(Duration::ZERO, |d| {
                    Duration::from_secs(u64::try_from(d.seconds).unwrap_or(0))
                        + Duration::from_nanos(u64::try_from(d.nanos).unwrap_or(0))
                });
                let moment = within.min(DRAIN_MAX).mul_f64(self.rng.random_range(0.0..=1.0));
                let any_will_do = drain.registrars.is_empty();
                drain.registrars.retain(|address| !self.registrars.was_silent(address, now));
                if let Link::Open { leave_at: leave_at @ None, .. } = &mut self.link
                    && (any_will_do || !drain.registrars.is_empty())
                {
                    *leave_at = Some(now + moment);
                    self.leave_for = drain.registrars;
                    self.leave_for.truncate(MAX_REGISTRARS);
                }
            }
            Some(Message::Bookmark(bookmark)) => self.revision = bookmark.revision,
            Some(Message::ServiceChanged(changed)) => self.services.changed(changed),
            Some(Message::EndpointProbes(told)) => self.actions.push_back(Action::Probe(told.probes)),
            Some(Message::VirtualServicesChanged(part)) => {
                if let Some(changed) = self.virtual_services.take(part) {
                    self.actions.push_back(Action::VirtualServices(Box::new(changed)));
                }
            }
            None => {}
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

    pub(super) fn connect(&mut self, now: Instant) {
        self.attempt += 1;
        self.link = Link::Registering { deadline: now + ANSWER_PATIENCE };
        self.endpoints_told = true;
        self.connected_from.clone_from(&self.endpoints);
        let ciphers = self.start.accepts_aes.then_some(TransportCipher::Aes256Gcm);
        let request = RegisterRequest {
            public_key: self.start.public_key.to_vec(),
            private_endpoints: self.endpoints.iter().map(endpoint).collect(),
            agent_version: self.start.agent_version.clone(),
            transport_ciphers: ciphers.into_iter().map(i32::from).collect(),
            reachability: Some(self.tell_reachability(now)),
            proxied_hosts: self.start.offer.hosts(),
            offered_subnets: self.start.offer.subnets.iter().map(ToString::to_string).collect(),
        };
        let registrar = self.registrars.current().to_owned();
        self.actions.push_back(Action::Register { attempt: self.attempt, registrar, request });
    }

    /// When the registrar is left because it does not answer; `None` if nothing is asked, or there is no other one.
    pub(super) fn silent_at(&self) -> Option<Instant> {
        let oldest = self.lookups.oldest_sent().filter(|_| self.registrars.has_other());
        oldest.map(|oldest| self.silence.due(oldest))
    }

    /// Begins a new connection in place of the one there is.
    pub(super) fn reconnect(&mut self, reason: &str, now: Instant) {
        self.actions.push_back(Action::Disconnect { attempt: self.attempt });
        self.lookups.disconnected();
        if self.is_connected() {
            self.changed_at = now;
        }
        reason.clone_into(&mut self.last_error);
        self.connect(now);
    }

    /// Gives up the connection, or the attempt at one.
    pub(super) fn fail(&mut self, failure: Failure, now: Instant) {
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

    fn settings_from(&self, config: &DeviceConfig) -> Result<Settings, SettingsError> {
        let mut settings = Settings::new(config, &self.start.device_uid, &self.start.offer)?;
        let directors = config.directors.iter().filter_map(DirectorTarget::new);
        let directors: Vec<IpAddr> = directors.flat_map(|target| target.addresses).map(|a| a.ip()).collect();
        let (endpoints, resolvers) = (&self.endpoints[..], &self.resolvers[..]);
        settings.stay_off(&Underlay { endpoints, directors: &directors, resolvers });
        Ok(settings)
    }

    /// The host has other addresses or resolvers: what is routed may depend on them.
    pub(super) fn reconfigure(&mut self) {
        if let Some(settings) = self.config.as_ref().and_then(|config| self.settings_from(config).ok()) {
            self.configure(settings);
        }
    }

    fn configure(&mut self, settings: Settings) {
        if self.settings.as_ref() == Some(&settings) {
            return;
        }
        let before = self.settings.as_ref().map_or(&[][..], |settings| &settings.left_out);
        for (subnet, reason) in settings.left_out.iter().filter(|new| !before.contains(new)) {
            tracing::warn!(%subnet, reason, "a subnet that another device carries is not routed into the network");
        }
        let mut commands = Vec::new();
        self.peers.avoid(&settings.site_routes(), &mut commands);
        self.tell_datapath(commands);
        self.actions.push_back(Action::Configure(Box::new(settings.clone())));
        self.settings = Some(settings);
    }

    pub(super) fn apply_config(&mut self, config: DeviceConfig, now: Instant) {
        if self.config.as_ref() == Some(&config) {
            return;
        }
        let settings = match self.settings_from(&config) {
            Ok(settings) => settings,
            Err(error) => {
                tracing::warn!(%error, "cannot use the configuration from the registrar; going on with the last one");
                return;
            }
        };
        self.registrars.update(&settings.registrars, &self.start.registrar, &mut self.rng);
        self.configure(settings);
        if self.directors.update(&config.directors, now) {
            let (mut commands, directors) = (Vec::new(), &self.directors);
            self.peers.relay(|peer| directors.relays(peer), &mut commands);
            self.tell_datapath(commands);
        }
        self.config = Some(config);
        self.actions.push_back(Action::Persist(Persist::Config));
    }
}
