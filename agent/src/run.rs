//! The agent at work: owns the control core, feeds it with what happens, and does what it says.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use muster_common::{
    identity::Party,
    telemetry::{self, Readiness},
    time::{Instant, Timestamp},
    tls::{ALPN_H2, Credentials, certificates_from_pem},
};
use muster_proto::agent::LeaveResponse;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustls::{ClientConfig, pki_types::CertificateDer};
use sd_notify::NotifyState;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot, watch},
    task::{JoinHandle, JoinSet},
    time::{MissedTickBehavior, interval, sleep},
};

mod ending;
mod status;

use crate::{
    config::Config,
    control::{Action, Control, Persist, Start, Validity},
    datapath::Event,
    host::{Host, Started},
    keys,
    local_api::{Query, Shared, Socket},
    metrics::Metrics,
    private_addresses::{self, Exclusions},
    renewal::{self, Renewed},
    resolver::Unsaved,
    session::{self, DeregisterError, Session},
    state::{Identity, Lock, Peers, State, pem},
    writer::{Write, Writer},
};

/// Version of this agent.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Timers do not run while the host is suspended, so nothing sleeps for longer than this.
const LONGEST_SLEEP: Duration = Duration::from_secs(60);
/// Metrics of the data plane are this fresh.
const METRICS_INTERVAL: Duration = Duration::from_secs(15);
/// Names that have just been resolved are collected for so long before they are written.
const NAMES_DELAY: Duration = Duration::from_millis(500);
/// Names that are on disk already, and have only been asked for again, are written this late.
const NAMES_REFRESH_DELAY: Duration = Duration::from_secs(300);
/// Shortest and longest time between two looks at whether names resolve.
const NAMES_PROBE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// Before an interface that could not be programmed is programmed again.
const REPAIR_DELAY: Duration = Duration::from_secs(5);
/// With addresses from disk and no registrar, the agent is ready after this: the names it knows are answered.
const READY_WITHOUT_REGISTRAR: Duration = Duration::from_secs(3);
/// How long calls of the local API may take to finish.
const API_GRACE: Duration = Duration::from_secs(2);

/// A registrar, for rustls.
pub fn is_registrar(party: &Party) -> bool {
    matches!(party, Party::Registrar { .. })
}

/// Credentials, and TLS to registrars, of `identity`.
pub fn credentials(identity: &Identity) -> anyhow::Result<(Arc<Credentials>, Arc<ClientConfig>, Validity)> {
    let pair = identity.key_pair()?;
    let credentials = Credentials::new(&pair, &identity.root_certificates()?)?;
    let tls = Arc::new(credentials.client_config(is_registrar, ALPN_H2)?);
    Ok((credentials, tls, renewal::validity(&pair)?))
}

/// Runs the agent until it is told to stop, or has left the network.
pub async fn run(config: &Config) -> anyhow::Result<()> {
    let state = State::new(&config.state_dir);
    // What is in memory are keys: no core dumps, and no debugger of another user.
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    let identity = state.identity()?;
    let lock = state.lock()?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    let (agent, mut inputs) = Agent::start(config, state, identity, lock).await?;
    let stop = async {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("stopping: SIGTERM"),
            _ = interrupt.recv() => tracing::info!("stopping: SIGINT"),
        }
    };
    Box::pin(agent.run(&mut inputs, stop)).await
}

/// What the run loop waits for, apart from the agent itself so that it can be borrowed apart.
struct Inputs {
    session: Session,
    queries: mpsc::Receiver<Query>,
    addresses: watch::Receiver<Vec<IpAddr>>,
    events: Option<mpsc::Receiver<Event>>,
    resolved: Option<mpsc::Receiver<IpAddr>>,
    disturbed: Option<watch::Receiver<u64>>,
    names_resolve: Option<oneshot::Receiver<()>>,
    leaving: Option<oneshot::Receiver<Result<(), DeregisterError>>>,
}

struct Agent {
    config: Config,
    state: State,
    identity: Identity,
    validity: Validity,
    credentials: Arc<Credentials>,
    tls: Arc<ClientConfig>,
    control: Control,
    host: Host,
    shared: Arc<Shared>,
    writer: Writer,
    metrics: Metrics,
    readiness: Readiness,
    /// When the names that have been resolved are to be written.
    names_at: Option<Instant>,
    /// When the interface is to be programmed again.
    repair_at: Option<Instant>,
    names_resolve: bool,
    notified: bool,
    leave: Option<(bool, oneshot::Sender<Result<LeaveResponse, String>>)>,
    stop_api: oneshot::Sender<()>,
    api: JoinHandle<()>,
    tasks: JoinSet<()>,
    _lock: Lock,
}

/// Why the loop ends.
enum End {
    Stopped,
    Left { deregistered: bool },
}

impl Agent {
    async fn start(
        config: &Config,
        state: State,
        identity: Identity,
        lock: Lock,
    ) -> anyhow::Result<(Self, Inputs)> {
        let (credentials, tls, validity) = credentials(&identity)?;
        let private_key = identity.wireguard_private_key().with_context(|| {
            format!("cannot use the WireGuard key in {}: leave, and join again", config.state_dir.display())
        })?;
        let public_key = keys::wireguard_public_key(&private_key);
        let registries = telemetry::Metrics::with_prefix("muster_agent");
        let metrics = Metrics::register(&registries);
        metrics.certificate_expiry(validity.not_after.unix_seconds());
        let readiness = Readiness::default();
        let socket = Socket::bind(&config.socket).await?;
        let http = telemetry::bind(config.http.listen).await?;
        let shared = Arc::<Shared>::default();
        let host = Host::take(
            config,
            private_key,
            Arc::clone(&credentials),
            registries.clone(),
            Arc::clone(&shared),
        )
        .await?;

        let device_config = state.config();
        let held = state.peers();
        let pools = device_config.iter().flat_map(|c| &c.routes).filter_map(|r| r.parse().ok()).collect();
        let exclusions = Exclusions { interface: config.interface.name.clone(), pools };
        let addresses = private_addresses::watch(exclusions).await?;
        let start = Start {
            device_uid: identity.device_uid.clone(),
            public_key,
            agent_version: VERSION.to_owned(),
            registrar: identity.registrar.clone(),
            config: device_config,
            peers: held.peers,
            revision: held.revision,
            private_endpoints: endpoints(&addresses.borrow(), host.port()),
        };
        let seed = u64::from_le_bytes(keys::seed()?);
        let mut control = Control::new(start, seed, Instant::now());
        control.handle_certificate(validity, Timestamp::now(), Instant::now());

        let (queries_tx, queries) = mpsc::channel(16);
        let (stop_api, stopped) = oneshot::channel();
        let mut tasks = JoinSet::new();
        let api = socket.serve(queries_tx, Arc::clone(&shared), async { drop(stopped.await) });
        let api = tokio::spawn(async move {
            if let Err(error) = api.await {
                tracing::error!(%error, "the local API has ended");
            }
        });
        tasks.spawn(telemetry::serve(http, registries, readiness.clone()));
        let inputs = Inputs {
            session: Session::new(Arc::clone(&tls)),
            queries,
            addresses,
            events: None,
            resolved: None,
            disturbed: None,
            names_resolve: None,
            leaving: None,
        };
        let agent = Self {
            config: config.clone(),
            writer: Writer::start(state.clone()).context("cannot start a thread that writes state")?,
            state,
            identity,
            validity,
            credentials,
            tls,
            control,
            host,
            shared,
            metrics,
            readiness,
            names_at: None,
            repair_at: None,
            names_resolve: !config.resolver.enabled,
            notified: false,
            leave: None,
            stop_api,
            api,
            tasks,
            _lock: lock,
        };
        Ok((agent, inputs))
    }

    async fn run(mut self, inputs: &mut Inputs, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
        tracing::info!(
            network = self.identity.network, device = self.identity.device_uid, name = self.identity.name,
            certificate_expiry = %self.validity.not_after, version = VERSION, "starting"
        );
        if self.validity.not_after < Timestamp::now() {
            tracing::warn!(
                expired = %self.validity.not_after,
                "the device's certificate has expired, so no registrar will accept it; known peers stay reachable. Leave with --force, and join again"
            );
        }
        let end = tokio::select! {
            end = self.work(inputs) => end,
            () = stop => Ok(End::Stopped),
        };
        let _ = sd_notify::notify(&[NotifyState::Stopping]);
        self.readiness.set(false);
        self.finish(end).await
    }

    /// Feeds the core until it is over.
    async fn work(&mut self, inputs: &mut Inputs) -> anyhow::Result<End> {
        let mut metrics_tick = interval(METRICS_INTERVAL);
        metrics_tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let watchdog = sd_notify::watchdog_enabled().map_or(LONGEST_SLEEP, |period| period / 3);
        let mut watchdog_tick = interval(watchdog.max(Duration::from_millis(100)));
        let mut clock_tick = interval(Duration::from_secs(3600));
        loop {
            self.perform(inputs).await?;
            self.update_readiness();
            let now = Instant::now();
            let next = [self.control.poll_timeout(), self.names_at, self.repair_at, self.ready_at()];
            let next = next.into_iter().flatten().min();
            let pause = next.map_or(LONGEST_SLEEP, |at| (at - now).min(LONGEST_SLEEP));
            tokio::select! {
                event = inputs.session.next() => self.handle_session(event),
                event = receive(&mut inputs.events), if inputs.events.is_some() => {
                    self.handle_datapath(&alive(event)?);
                }
                Some(address) = receive(&mut inputs.resolved) => {
                    self.control.handle_resolved(&[address], Instant::now());
                    self.plan_names();
                }
                Some(()) = change(&mut inputs.disturbed) => {
                    tracing::info!(interface = self.config.interface.name, "somebody has changed the interface: programming it again");
                    self.repair().await;
                }
                Some(query) = inputs.queries.recv() => self.answer(query, inputs),
                Ok(()) = inputs.addresses.changed() => {
                    let endpoints = endpoints(&inputs.addresses.borrow_and_update(), self.host.port());
                    tracing::info!(?endpoints, "private addresses");
                    self.control.handle_private_endpoints(endpoints, Instant::now());
                    self.host.roam().await;
                }
                Some(()) = completion(&mut inputs.names_resolve) => {
                    self.names_resolve = true;
                    self.names_at.get_or_insert(Instant::now() + NAMES_DELAY);
                }
                Some(result) = completion(&mut inputs.leaving) => {
                    if let Some(end) = self.left(result) {
                        return Ok(end);
                    }
                }
                _ = metrics_tick.tick() => {
                    self.metrics.control(&self.control);
                    if let Some(snapshot) = self.shared.snapshot().await {
                        self.metrics.datapath(&snapshot);
                    }
                }
                _ = watchdog_tick.tick() => drop(sd_notify::notify(&[NotifyState::Watchdog])),
                _ = clock_tick.tick() => {
                    self.control.handle_certificate(self.validity, Timestamp::now(), Instant::now());
                }
                () = sleep(pause) => {}
            }
            let now = Instant::now();
            if self.control.poll_timeout().is_some_and(|at| at <= now) {
                self.control.handle_timeout(now);
            }
            if self.repair_at.is_some_and(|at| at <= now) {
                self.repair().await;
            }
            if self.names_at.is_some_and(|at| at <= now) {
                self.save_names();
            }
        }
    }

    /// Does what the core says.
    async fn perform(&mut self, inputs: &mut Inputs) -> anyhow::Result<()> {
        while let Some(action) = self.control.poll_action() {
            match action {
                Action::Register { attempt, registrar, request } => {
                    tracing::debug!(registrar, attempt, "connecting");
                    self.metrics.attempt();
                    inputs.session.register(attempt, registrar, request);
                }
                Action::OpenSession { attempt, hello } => inputs.session.open(attempt, hello),
                Action::Send(message) => inputs.session.send(message),
                Action::Disconnect { attempt } => inputs.session.disconnect(attempt),
                Action::Lookup { id, by } => inputs.session.look_up(id, by),
                Action::Renew => {
                    tracing::info!("renewing the certificate");
                    inputs.session.renew(self.identity.device_uid.clone());
                }
                Action::Configure(settings) => {
                    let configured = self.host.is_configured();
                    let names = if configured { None } else { self.state.names() };
                    match self.host.configure(&settings, names).await {
                        Ok(Some(Started { events, resolved, disturbed })) => {
                            inputs.events = Some(events);
                            inputs.resolved = Some(resolved);
                            inputs.disturbed = Some(disturbed);
                            inputs.names_resolve = Some(self.probe_names(&settings.name));
                        }
                        Ok(None) => {}
                        // Tunnels that work are not given up because something new does not.
                        Err(error) if configured => self.repair_later(&error),
                        Err(error) => return Err(error),
                    }
                }
                Action::Datapath(command) => self.host.tell(command).await,
                Action::ForgetName(name) => {
                    if let Some(resolver) = self.shared.resolver.load_full() {
                        resolver.invalidate(&name);
                        self.names_at.get_or_insert(Instant::now() + NAMES_DELAY);
                    }
                }
                Action::ReplaceRoots(roots) => self.replace_roots(&roots),
                Action::Persist(Persist::Config) => {
                    if let Some(config) = self.control.config() {
                        self.writer.write(Write::Config(Box::new(config.clone())));
                    }
                }
                Action::Persist(Persist::Peers) => {
                    let (revision, peers) = self.control.held_peers();
                    self.writer.write(Write::Peers(Peers { revision, peers }));
                }
            }
        }
        Ok(())
    }

    async fn repair(&mut self) {
        self.repair_at = None;
        if let Err(error) = self.host.repair().await {
            self.repair_later(&error);
        }
    }

    fn repair_later(&mut self, error: &anyhow::Error) {
        tracing::warn!(%error, "cannot program the interface; trying again");
        self.repair_at = Some(Instant::now() + REPAIR_DELAY);
    }

    fn handle_session(&mut self, event: session::Event) {
        let now = Instant::now();
        let before = self.control.registrar();
        match event {
            session::Event::Registered { attempt, result } => {
                self.control.handle_registered(attempt, result, now)
            }
            session::Event::Opened { attempt } => self.control.handle_session_opened(attempt, now),
            session::Event::Message { attempt, message } => {
                self.control.handle_session_message(attempt, message, now);
            }
            session::Event::Closed { attempt, failure } => {
                self.control.handle_session_closed(attempt, failure, now);
            }
            session::Event::LookedUp { id, result } => {
                self.metrics.looked_up(&result);
                self.control.handle_looked_up(id, result, now);
            }
            session::Event::Renewed(Ok(renewed)) => self.renewed(&renewed),
            session::Event::Renewed(Err(error)) => {
                tracing::warn!(error, "cannot renew the certificate; trying again later");
                self.control.handle_renewal_failed(now);
            }
        }
        let after = self.control.registrar();
        if after.connected && !before.connected {
            tracing::info!(registrar = after.address, "connected");
        } else if after.last_error != before.last_error && !after.last_error.is_empty() {
            tracing::warn!(
                registrar = before.address,
                error = after.last_error,
                refused = after.refused,
                "no registrar"
            );
        }
        self.metrics.control(&self.control);
    }

    fn handle_datapath(&mut self, event: &Event) {
        match event {
            Event::PeerUp { endpoint, .. } => tracing::debug!(%endpoint, "peer is reached"),
            other => tracing::trace!(?other, "data plane"),
        }
        self.control.handle_datapath(event, Instant::now());
    }

    /// The certificate has been renewed: on disk first, then in use.
    fn renewed(&mut self, renewed: &Renewed) {
        let identity = renewed.apply(&self.identity);
        let adopt = || -> anyhow::Result<Validity> {
            let (pair, roots) = (identity.key_pair()?, identity.root_certificates()?);
            let validity = renewal::validity(&pair)?;
            self.state.set_identity(&identity)?;
            self.credentials.replace_key(&pair)?;
            self.credentials.replace_roots(&roots)?;
            Ok(validity)
        };
        match adopt() {
            Ok(validity) => {
                tracing::info!(expiry = %validity.not_after, "certificate renewed");
                self.identity = identity;
                self.validity = validity;
                self.metrics.certificate_expiry(validity.not_after.unix_seconds());
                self.control.handle_certificate(validity, Timestamp::now(), Instant::now());
            }
            Err(error) => {
                tracing::warn!(%error, "cannot use the renewed certificate; trying again later");
                self.control.handle_renewal_failed(Instant::now());
            }
        }
    }

    fn replace_roots(&mut self, roots: &[Vec<u8>]) {
        let mut identity = self.identity.clone();
        identity.roots = pem(roots);
        let adopt = || -> anyhow::Result<()> {
            let parsed: Vec<CertificateDer<'static>> =
                certificates_from_pem("the new roots", identity.roots.as_bytes())?;
            // Only roots that can be used are kept.
            Credentials::new(&identity.key_pair()?, &parsed)?;
            self.state.set_identity(&identity)?;
            self.credentials.replace_roots(&parsed)?;
            Ok(())
        };
        match adopt() {
            Ok(()) => {
                tracing::info!(roots = roots.len(), "roots replaced");
                self.identity = identity;
            }
            Err(error) => tracing::warn!(%error, "cannot use the new roots; going on with the old ones"),
        }
    }

    /// Finds out when this device's own name resolves: then all do.
    fn probe_names(&mut self, name: &str) -> oneshot::Receiver<()> {
        let (done, resolves) = oneshot::channel();
        let (shared, name) = (Arc::clone(&self.shared), name.to_owned());
        self.tasks.spawn(async move {
            let mut pause = NAMES_PROBE.0;
            while let Some(resolver) = shared.resolver.load_full() {
                if resolver.resolve(&name).await.is_ok() {
                    let _ = done.send(());
                    return;
                }
                drop(resolver);
                sleep(pause).await;
                pause = (pause * 3 / 2).min(NAMES_PROBE.1);
            }
        });
        resolves
    }

    /// When the agent counts as ready although no registrar has answered for its names.
    fn ready_at(&self) -> Option<Instant> {
        let waits = !self.names_resolve && self.control.settings().is_some() && !self.control.is_connected();
        waits
            .then(|| self.control.registrar().since + READY_WITHOUT_REGISTRAR)
            .filter(|at| *at > Instant::now())
    }

    fn update_readiness(&mut self) {
        let registrar = self.control.registrar();
        let patience_over =
            !registrar.connected && Instant::now() - registrar.since >= READY_WITHOUT_REGISTRAR;
        // Who has been told that names resolve as far as they can is not told otherwise once a registrar is there.
        let names = self.names_resolve || patience_over || self.notified;
        let ready = self.control.settings().is_some() && names && !registrar.refused;
        if ready != self.readiness.get() {
            self.readiness.set(ready);
            tracing::info!(ready, "readiness");
        }
        if ready && !self.notified {
            self.notified = true;
            let _ = sd_notify::notify(&[NotifyState::Ready]);
        }
    }

    /// Sees to it that names which have been learnt are written.
    fn plan_names(&mut self) {
        let Some(resolver) = self.shared.resolver.load_full() else { return };
        let delay = match resolver.unsaved() {
            Unsaved::Nothing => return,
            Unsaved::Refreshed => NAMES_REFRESH_DELAY,
            Unsaved::New => NAMES_DELAY,
        };
        let at = Instant::now() + delay;
        self.names_at = Some(self.names_at.map_or(at, |planned| planned.min(at)));
    }

    fn save_names(&mut self) {
        self.names_at = None;
        if let Some(resolver) = self.shared.resolver.load_full() {
            self.writer.write(Write::Names(resolver.snapshot()));
        }
    }
}

fn endpoints(addresses: &[IpAddr], port: u16) -> Vec<SocketAddr> {
    addresses.iter().map(|address| SocketAddr::new(*address, port)).collect()
}

/// An event of a data plane that goes on.
fn alive(event: Option<Event>) -> anyhow::Result<Event> {
    let reason = match event {
        Some(Event::Failed(reason)) => reason,
        Some(event) => return Ok(event),
        None => "its thread is gone; look for a panic above".to_owned(),
    };
    anyhow::bail!("the data plane has ended: {reason}\nremedy: restart the agent")
}

/// The next of what comes, if anything can.
async fn receive<T>(receiver: &mut Option<mpsc::Receiver<T>>) -> Option<T> {
    match receiver {
        Some(receiver) => receiver.recv().await,
        None => None,
    }
}

/// The next change, if there can be any.
async fn change(receiver: &mut Option<watch::Receiver<u64>>) -> Option<()> {
    receiver.as_mut()?.changed().await.ok()
}

/// What comes once.
async fn completion<T>(receiver: &mut Option<oneshot::Receiver<T>>) -> Option<T> {
    let outcome = receiver.as_mut()?.await.ok();
    *receiver = None;
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_data_plane_never_ends_in_silence() {
        assert_eq!(alive(Some(Event::PeerDown([1; 32]))).unwrap(), Event::PeerDown([1; 32]));
        for (end, reason) in [(Some(Event::Failed("no device".into())), "no device"), (None, "panic")] {
            let error = alive(end).unwrap_err().to_string();
            assert!(error.contains(reason) && error.contains("restart the agent"), "{error}");
        }
    }
}
