//! The director at work: opens everything, relays, keeps a session with a registrar, and leaves in good order.

mod systemd;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    num::NonZeroUsize,
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use muster_common::{
    grpc::{self, AcceptMetrics},
    name::Label,
    net::BindError,
    telemetry::{self, Readiness},
    time::Instant,
    tls::ALPN_H2,
};
use muster_net::UdpSockets;
use muster_proto::{admin::Endpoint, director::RegisterRequest};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use tokio::{
    net::TcpListener,
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
    task::JoinSet,
};
use uuid::Uuid;

use crate::{
    config::{ADVERTISED_MAX, Config, Listen},
    hub::Hub,
    identity::State,
    registrar::{self, Client, Relaying},
    relay::Limits,
    running::{HELLO_INTERVAL, Running, Settings},
};

/// Version of this director.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Between looks whether any device is left.
const LOOK: Duration = Duration::from_millis(50);
/// For those who are to hear that it is over: registrar and devices.
const LAST_WORDS: Duration = Duration::from_millis(200);
/// How long streams that are under way may take to finish.
const FINISH: Duration = Duration::from_secs(2);

impl Relaying for Hub {
    fn changes(&self) -> watch::Receiver<u64> {
        Self::changes(self)
    }

    fn devices(&self) -> Vec<Uuid> {
        Self::devices(self)
    }

    fn relayed(&self) -> (u64, u64) {
        self.metrics.passed_on()
    }

    fn refuse(&self, devices: &[Uuid]) {
        Self::refuse(self, devices);
    }

    fn forgive(&self) {
        Self::forgive(self);
    }
}

/// Runs the director until it is told to stop.
///
/// # Errors
/// It cannot begin, or cannot go on.
pub async fn run(config: &Config) -> anyhow::Result<()> {
    let state = State::new(&config.state_dir);
    // In memory are keys: no core dumps, and no debugger of another user.
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    let identity = state.identity()?;
    let _lock = state.lock()?;
    let mut signals = Signals::new()?;
    let open_files = allow_open_files();
    // Everything is bound first, so that a wrong configuration shows at once.
    let sockets = UdpSockets::bind_at(&config.listen.udp, threads(config))?;
    let listeners = listen(&config.listen).await?;
    let http = telemetry::bind(config.listen.http).await?;
    let endpoints = endpoints(config)?;

    let registries = telemetry::Metrics::with_prefix("muster_director");
    let metrics = registrar::Metrics::register(&registries);
    let accepted = AcceptMetrics::default();
    registries.register(|registry| accepted.register(registry));
    let (credentials, tls) = registrar::credentials(&identity)?;
    let limits = Limits {
        devices: usize::try_from(config.limits.devices).unwrap_or(usize::MAX),
        octets_per_second: config.limits.device_rate,
        burst: config.limits.device_burst,
        ..Limits::default()
    };
    let network: Label = identity.network.parse().context("the identity's network has no valid name")?;
    let settings =
        Settings { sockets, limits, network, endpoints: endpoints.clone(), hello_interval: HELLO_INTERVAL };
    let mut running = Running::start(settings, &registries).context("cannot begin to relay")?;

    let readiness = Readiness::default();
    let mut tasks = JoinSet::new();
    tasks.spawn(telemetry::serve(http, registries, readiness.clone()));
    tasks.spawn(systemd::watchdog());
    let (stop, stopped) = watch::channel(false);
    let server_tls = Arc::new(credentials.server_config(ALPN_H2)?);
    let mut servers = JoinSet::new();
    for listener in listeners {
        let mut stopped = stopped.clone();
        let stopped = async move { drop(stopped.wait_for(|stopped| *stopped).await) };
        let bounds = config.limits.bounds();
        servers.spawn(running.serve(listener, Arc::clone(&server_tls), bounds, accepted.clone(), stopped));
    }
    let (draining, drained) = watch::channel(false);
    let (name, announced) = (identity.name.clone(), config.clone());
    let announce = move || announcement(&announced, &endpoints);
    let seed = rand::random();
    let client =
        Client::new(running.hub(), state, identity, credentials, tls, announce, drained, metrics, seed)?;
    tasks.spawn(client.run());

    readiness.set(true);
    systemd::ready();
    let Listen { udp, tcp, http } = &config.listen;
    tracing::info!(name, ?udp, ?tcp, %http, threads = threads(config), "relaying");
    if open_files
        .is_some_and(|files| usize::try_from(files).is_ok_and(|files| files < config.limits.connections))
    {
        tracing::warn!(
            open_files,
            connections = config.limits.connections,
            "fewer files can be open than connections are allowed; raise LimitNOFILE or `ulimit -Hn`"
        );
    }

    tokio::select! {
        signal = signals.next() => tracing::info!(signal, "draining"),
        error = running.failed() => {
            return Err(anyhow::Error::new(error).context("cannot relay any more; restart the director"));
        }
        Some(ended) = servers.join_next() => {
            let reason = match ended {
                Ok(Err(error)) => grpc::chain(&error),
                other => format!("{other:?}"),
            };
            anyhow::bail!("a listener has ended: {reason}\nremedy: restart the director");
        }
    }
    systemd::stopping(config.drain() + FINISH + LAST_WORDS);
    draining.send_replace(true);
    drain(config, &running, &mut signals).await;
    stop.send_replace(true);
    let finished = async { while servers.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(FINISH, finished).await;
    tasks.shutdown().await;
    Ok(())
}

/// Sends the devices elsewhere, and waits until they are gone, as long as may be.
async fn drain(config: &Config, running: &Running, signals: &mut Signals) {
    let begin = Instant::now();
    // They need a while to let go of a director after they have left it for another.
    running.drain(config.drain() / 2);
    let gone = async {
        while running.counters().attached > 0 || Instant::now() - begin < LAST_WORDS {
            tokio::time::sleep(LOOK).await;
        }
    };
    tokio::select! {
        outcome = tokio::time::timeout(config.drain(), gone) => {
            let left = running.counters().attached;
            if outcome.is_err() && left > 0 {
                tracing::warn!(devices = left, "some devices have not left in time");
            }
        }
        signal = signals.next() => tracing::info!(signal, "not waiting any longer"),
    }
}

/// What the registrar is told.
fn announcement(config: &Config, endpoints: &[Endpoint]) -> RegisterRequest {
    RegisterRequest {
        region: config.region.clone(),
        endpoints: endpoints.to_vec(),
        tcp_ports: config.tcp_ports().into_iter().map(u32::from).collect(),
        capacity: config.limits.devices,
        version: VERSION.to_owned(),
    }
}

/// Where devices reach the director: as configured, else the very addresses that it listens on, else those that the
/// host's default routes leave from.
fn endpoints(config: &Config) -> anyhow::Result<Vec<Endpoint>> {
    let mut chosen = config.advertise.endpoints.clone();
    if chosen.is_empty() {
        for listened in &config.listen.udp {
            let from_routes = match listened.ip() {
                IpAddr::V4(Ipv4Addr::UNSPECIFIED) => vec![own_address(Ipv4Addr::UNSPECIFIED.into())],
                IpAddr::V6(Ipv6Addr::UNSPECIFIED) => {
                    let both: [IpAddr; 2] = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
                    both.map(own_address).into()
                }
                address => vec![Some(address)],
            };
            for address in from_routes.into_iter().flatten() {
                let endpoint = SocketAddr::new(address, config.port());
                if !chosen.contains(&endpoint) {
                    chosen.push(endpoint);
                }
            }
        }
        chosen.truncate(ADVERTISED_MAX);
    }
    if chosen.is_empty() {
        anyhow::bail!(
            "cannot find out this host's address: there is no default route\nremedy: set advertise.endpoints in the configuration, such as [\"198.51.100.10:7501\"]"
        );
    }
    Ok(chosen
        .iter()
        .map(|endpoint| Endpoint { address: endpoint.ip().to_string(), port: endpoint.port().into() })
        .collect())
}

/// The address, of the family of `unspecified`, that this host would send to the internet from. Nothing is sent.
fn own_address(unspecified: IpAddr) -> Option<IpAddr> {
    // Of networks kept for documentation (RFC 5737, RFC 3849), so only a default route leads there.
    let outside: IpAddr = match unspecified {
        IpAddr::V4(_) => Ipv4Addr::new(198, 51, 100, 1).into(),
        IpAddr::V6(_) => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into(),
    };
    let socket = UdpSocket::bind((unspecified, 0)).ok()?;
    socket.connect((outside, 9)).ok()?;
    let own = socket.local_addr().ok()?.ip();
    (!own.is_unspecified() && !own.is_loopback()).then_some(own)
}

async fn listen(config: &Listen) -> Result<Vec<TcpListener>, BindError> {
    let mut listeners = Vec::new();
    for &address in &config.tcp {
        let listener = TcpListener::bind(address).await;
        listeners.push(listener.map_err(|e| BindError::new("devices over TCP", address, e))?);
    }
    Ok(listeners)
}

/// How many threads relay.
fn threads(config: &Config) -> NonZeroUsize {
    let processors = || std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    NonZeroUsize::new(config.threads).unwrap_or_else(processors)
}

/// Raises the soft limit of open files to the hard one, which it returns (`None` for no limit): each device holds a
/// connection.
fn allow_open_files() -> Option<u64> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    match setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        Ok(()) => maximum,
        Err(_) => current,
    }
}

/// SIGTERM and SIGINT.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        let signal = |kind| signal(kind).context("cannot receive signals");
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(text: &str) -> Vec<String> {
        let config: Config = toml::from_str(text).unwrap();
        let endpoints = endpoints(&config).unwrap();
        endpoints.iter().map(|e| format!("{} {}", e.address, e.port)).collect()
    }

    #[test]
    fn devices_are_told_what_is_configured_or_listened_on() {
        let listen = "[listen]\nudp = [\"192.0.2.7:7000\", \"[2001:db8::7]:7000\"]\n";
        assert_eq!(told(listen), ["192.0.2.7 7000", "2001:db8::7 7000"]);
        let advertise = format!("{listen}[advertise]\nendpoints = [\"203.0.113.1:99\"]\n");
        assert_eq!(told(&advertise), ["203.0.113.1 99"]);
    }

    #[test]
    fn the_registrar_is_told_all_there_is() {
        let config: Config = toml::from_str(
            "region = \"eu\"\n[listen]\ntcp = [\"[::]:7501\", \"[::]:443\"]\n[limits]\ndevices = 9\n",
        )
        .unwrap();
        let endpoint = Endpoint { address: "192.0.2.7".into(), port: 7501 };
        let request = announcement(&config, std::slice::from_ref(&endpoint));
        let expected = RegisterRequest {
            region: "eu".into(),
            endpoints: vec![endpoint],
            tcp_ports: vec![443],
            capacity: 9,
            version: VERSION.into(),
        };
        assert_eq!(request, expected);
    }

    const OPERATING: &str = include_str!("../../docs/operating.md");

    #[test]
    fn every_metric_is_documented() {
        let registries = telemetry::Metrics::with_prefix("muster_director");
        let _ = registrar::Metrics::register(&registries);
        registries.register(|registry| AcceptMetrics::default().register(registry));
        let metrics = crate::metrics::Metrics::register(&registries);
        let hub = Arc::new(Hub::new(crate::relay::Relay::new([1; 32], Limits::default()), metrics));
        registries.register(|registry| {
            registry.register_collector(Box::new(crate::metrics::Attachments(hub)));
        });
        let chapter = OPERATING
            .split("\nDirector, each with the prefix")
            .nth(1)
            .unwrap()
            .split("\n## ")
            .next()
            .unwrap();
        let text = registries.encode();
        let names: Vec<_> = text
            .lines()
            .filter_map(|line| line.strip_prefix("# TYPE muster_director_")?.split_once(' '))
            .map(|(name, kind)| if kind == "counter" { format!("{name}_total") } else { name.to_owned() })
            .collect();
        assert!(names.len() > 15, "{names:?}");
        for name in &names {
            assert!(chapter.contains(&format!("`{name}")), "{name}");
        }
        for reason in crate::relay::Dropped::ALL {
            assert!(chapter.contains(&format!("`{}`", reason.as_str())), "{reason:?}");
        }
    }

    #[test]
    fn every_key_is_documented() {
        let chapter =
            OPERATING.split("\n| director | default |").nth(1).unwrap().split("\n###").next().unwrap();
        let mut section = String::new();
        for line in muster_common::config::print(&Config::default()).lines() {
            if let Some(name) = line.strip_prefix('[') {
                section = format!("{}.", name.trim_end_matches(']'));
            } else if let Some((key, _)) = line.split_once(" = ") {
                assert!(chapter.contains(&format!("`{section}{key}`")), "{section}{key}");
            }
        }
    }
}
