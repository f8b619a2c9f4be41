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
    tls::{ALPN_H2, Credentials},
};
use muster_enrollment::Identity as _;
use muster_proto::agent::LeaveResponse;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustls::ClientConfig;
use sd_notify::NotifyState;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot, watch},
    task::{JoinHandle, JoinSet},
    time::{MissedTickBehavior, interval, sleep},
};

mod arrivals;
mod ending;
mod names;
mod readiness;
mod registrar;
mod relays;
mod services;
mod status;

use self::arrivals::{change, completion, mapping, receive};
use crate::{
    config::Config,
    control::{self, Action, Control, Persist, Start, Validity},
    datapath::{Command, Event},
    directors::attach::Attachments,
    host::{Host, Started},
    keys,
    local_api::{Query, Shared, Socket},
    metrics::Metrics,
    port_mapping::PortMapping,
    private_addresses::{self, Exclusions},
    probes::{self, Found, Probes},
    renewal,
    session::{DeregisterError, Session},
    state::{Identity, Lock, Peers, State},
    virtual_ips::{VirtualIps, table::Place},
    writer::{Write, Writer},
};

/// Version of this agent.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Timers do not run while the host is suspended, so nothing sleeps for longer than this.
const LONGEST_SLEEP: Duration = Duration::from_secs(60);
/// Metrics of the data plane are this fresh.
const METRICS_INTERVAL: Duration = Duration::from_secs(15);
/// Before an interface that could not be programmed is programmed again.
const REPAIR_DELAY: Duration = Duration::from_secs(5);
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
    directors: Attachments,
    queries: mpsc::Receiver<Query>,
    addresses: watch::Receiver<Vec<IpAddr>>,
    events: Option<mpsc::Receiver<Event>>,
    resolved: Option<mpsc::Receiver<IpAddr>>,
    disturbed: Option<watch::Receiver<u64>>,
    names_resolve: Option<oneshot::Receiver<()>>,
    /// Changes of the Services that have cached names.
    held: Option<watch::Receiver<u64>>,
    leaving: Option<oneshot::Receiver<Result<(), DeregisterError>>>,
    port_mapping: Option<PortMapping>,
    /// Changes when all Services with virtual IPs have to be asked for anew.
    lost: Option<watch::Receiver<u64>>,
    /// What probes have found.
    found: Option<watch::Receiver<Found>>,
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
    writer: Arc<Writer>,
    /// `None` if this host does without.
    virtual_ips: Option<VirtualIps>,
    probes: Probes,
    metrics: Metrics,
    paths: relays::Paths,
    readiness: Readiness,
    /// When the names that have been resolved are to be written.
    names_at: Option<Instant>,
    /// When the core is to hear which Services have cached names.
    held_at: Option<Instant>,
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
            private_key.clone(),
            Arc::clone(&credentials),
            registries.clone(),
            Arc::clone(&shared),
        )
        .await?;

        let device_config = state.config();
        let held = state.peers();
        let pools = device_config.iter().flat_map(control::pools).collect();
        let exclusions = Exclusions { interface: config.interface.name.clone(), pools };
        let addresses = private_addresses::watch(exclusions).await?;
        let writer =
            Arc::new(Writer::start(state.clone()).context("cannot start a thread that writes state")?);
        writer.register_metrics(&registries);
        readiness.tell(writer.trouble());
        let (virtual_ips, virtual_services, lost) = services::start(config, &state, &writer, &registries);
        let probes = Probes::new(config.services.exec_probes, &registries);
        let start = Start {
            device_uid: identity.device_uid.clone(),
            public_key,
            agent_version: VERSION.to_owned(),
            accepts_aes: config.accepts_aes(),
            offer: config.site.offer()?,
            registrar: identity.registrar.clone(),
            config: device_config,
            peers: held.peers,
            epoch: held.epoch,
            revision: held.revision,
            private_endpoints: endpoints(&addresses.borrow(), host.port()),
            virtual_services,
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
        let port_mapping = match config.tunnel.port_mapping {
            true => PortMapping::start(host.port(), &private_key).await,
            false => None,
        };
        let inputs = Inputs {
            session: Session::new(Arc::clone(&tls)),
            directors: Attachments::new(
                Arc::clone(&credentials),
                &identity.network,
                &identity.device_uid,
                VERSION,
            ),
            queries,
            addresses,
            events: None,
            resolved: None,
            disturbed: None,
            names_resolve: None,
            held: None,
            leaving: None,
            port_mapping,
            lost,
            found: Some(probes.found()),
        };
        let agent = Self {
            config: config.clone(),
            writer,
            virtual_ips,
            probes,
            state,
            identity,
            validity,
            credentials,
            tls,
            control,
            host,
            shared,
            metrics,
            paths: relays::Paths::default(),
            readiness,
            names_at: None,
            held_at: None,
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
        // Beside the rest, as the gateway may not answer.
        let give_back = async {
            if let Some(port_mapping) = inputs.port_mapping.take() {
                port_mapping.stop().await;
            }
        };
        tokio::join!(Box::pin(self.finish(end)), give_back).0
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
            let own = [self.names_at, self.held_at, self.repair_at, self.ready_at()];
            let next = own.into_iter().chain([self.control.poll_timeout()]).flatten().min();
            let pause = next.map_or(LONGEST_SLEEP, |at| (at - now).min(LONGEST_SLEEP));
            tokio::select! {
                event = inputs.session.next() => self.handle_session(event),
                event = inputs.directors.next() => self.handle_director(event),
                event = receive(&mut inputs.events), if inputs.events.is_some() => {
                    self.handle_datapath(&alive(event)?, inputs.port_mapping.as_ref());
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
                    self.look_at_resolvers();
                    self.host.roam().await;
                    self.host.update_site().await;
                }
                mapped = mapping(&mut inputs.port_mapping), if inputs.port_mapping.is_some() => {
                    self.control.handle_mapped(mapped, Instant::now());
                }
                Some(()) = change(&mut inputs.found) => {
                    let found = inputs.found.as_ref().map(|found| probes::told(&found.borrow()));
                    self.control.handle_health(found.unwrap_or_default(), Instant::now());
                }
                Some(()) = change(&mut inputs.lost) => {
                    self.control.handle_virtual_services_lost(Instant::now());
                }
                Some(()) = completion(&mut inputs.names_resolve) => self.names_do_resolve(),
                Some(()) = change(&mut inputs.held) => self.plan_held(),
                Some(result) = completion(&mut inputs.leaving) => {
                    if let Some(end) = self.left(result) {
                        return Ok(end);
                    }
                }
                _ = metrics_tick.tick() => {
                    self.host.update_site().await;
                    self.look_at_resolvers();
                    self.metrics.control(&self.control);
                    self.metrics.port_mapping(inputs.port_mapping.as_ref().and_then(PortMapping::protocol));
                    if let Some(snapshot) = self.shared.snapshot().await {
                        self.metrics.datapath(&snapshot);
                        self.paths.prune(&snapshot);
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
            if self.held_at.is_some_and(|at| at <= now) {
                self.hold_services();
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
                Action::Attach { id, attempt, target } => {
                    tracing::debug!(director = target.name, "attaching");
                    self.name_directors();
                    inputs.directors.attach(id, attempt, *target);
                }
                Action::Detach(id) => inputs.directors.detach(id),
                Action::OpenStream { id, attempt, target } => {
                    // A flow that has not been answered is one of a data plane that runs.
                    if let Some(datapath) = self.shared.datapath.load_full() {
                        inputs.directors.open_stream(id, attempt, *target, datapath.as_ref().clone());
                    }
                }
                Action::CloseStream(id) => {
                    inputs.directors.close_stream(id);
                    self.host.tell(Command::SetStream { id, stream: None }).await;
                }
                Action::Configure(settings) => {
                    let configured = self.host.is_configured();
                    let names = if configured { None } else { self.state.names() };
                    match self.host.configure(&settings, names).await {
                        Ok(Some(Started { events, resolved, disturbed })) => {
                            inputs.events = Some(events);
                            inputs.resolved = Some(resolved);
                            inputs.disturbed = Some(disturbed);
                            inputs.held = self.follow_held();
                            self.look_at_resolvers();
                            inputs.names_resolve = Some(self.probe_names(&settings.name));
                        }
                        Ok(None) => {}
                        // Tunnels that work are not given up because something new does not.
                        Err(error) if configured => self.repair_later(&error),
                        Err(error) => return Err(error),
                    }
                    if let Some(virtual_ips) = &self.virtual_ips {
                        virtual_ips.move_to(Place::new(&settings));
                    }
                }
                Action::Probe(probes) => self.probe(probes),
                Action::VirtualServices(changed) => {
                    if let Some(virtual_ips) = &self.virtual_ips {
                        virtual_ips.take(*changed);
                    }
                }
                Action::Datapath(command) => self.host.tell(command).await,
                Action::ForgetName(name) => self.forget_name(&name),
                Action::ForgetServices(services) => self.forget_services(&services),
                Action::ReplaceRoots(roots) => self.replace_roots(&roots),
                Action::Persist(Persist::Config) => {
                    if let Some(config) = self.control.config() {
                        self.writer.write(Write::Config(Box::new(config.clone())));
                    }
                }
                Action::Persist(Persist::Peers) => {
                    let (epoch, revision, peers) = self.control.held_peers();
                    self.writer.write(Write::Peers(Peers { epoch, revision, peers }));
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

    fn handle_datapath(&mut self, event: &Event, port_mapping: Option<&PortMapping>) {
        match event {
            Event::PeerUp { endpoint, .. } => tracing::debug!(%endpoint, "peer is reached"),
            other => tracing::trace!(?other, "data plane"),
        }
        if let Some(to) = self.paths.handle(event) {
            self.metrics.path_changed(to);
        }
        let before = self.control.reflexive_endpoints();
        self.control.handle_datapath(event, Instant::now());
        let after = self.control.reflexive_endpoints();
        if let Some(port_mapping) = port_mapping
            && before.iter().any(|address| !after.contains(address))
        {
            port_mapping.recheck();
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
