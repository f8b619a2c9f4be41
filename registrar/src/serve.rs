//! `muster-registrar serve`: opens the store, loads the registry, and answers gRPC, DNS and HTTP until it is told to
//! stop. Everything is bound before anything is loaded, so that a wrong configuration shows at once.

mod dns;
mod drain;
mod format;
mod metrics;
mod stale;
mod succession;
mod systemd;
mod trust;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use muster_common::{
    file, grpc,
    net::BindError,
    telemetry::{self, Metrics, Readiness},
    time::Timestamp,
    tls::{ALPN_H2, TlsError},
};
use tokio::{
    net::{TcpListener, TcpSocket},
    signal::unix::{Signal, SignalKind, signal},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tonic::{service::interceptor::InterceptedService, transport::Server};
use tonic_health::ServingStatus;
use tower::layer::util::{Identity as NoLayer, Stack};

pub(crate) use self::format::read_format;
pub use self::trust::TrustError;
use self::{dns::DnsSockets, format::check_store, stale::Stale, trust::Trust};
use crate::{
    api::{Api, Settings, limit::Rate},
    balance::{Balance, Identity},
    carriers::Carriers,
    config::{Config, StoreKind},
    init,
    presence::Presences,
    registry::{Registry, keys, view::Advertised},
    session::Hub,
    store::{Revision, Store, StoreError, etcd::EtcdStore, sqlite::SqliteStore},
};

/// Between looks at the CA's files and at the registrar's own certificate.
const REFRESH: Duration = Duration::from_secs(30);
/// How long such a look may take.
const MAINTENANCE: Duration = Duration::from_secs(10);
/// For how long the store keeps history, for registrars that were cut off from it for a while.
const HISTORY: Duration = Duration::from_secs(10 * 60);
/// How often an idle connection is checked, and how long the check may take.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(20));
/// Connections that may wait to be accepted, as far as the system allows (`net.core.somaxconn`). All agents come at once
/// when a registrar starts again; one that finds no room tries again after a second, and then after three.
const BACKLOG: u32 = 16_384;
/// The most that the headers of a request may take, in octets.
const HEADERS: u32 = 16 * 1024;
/// What one stream, and one connection, may send before it is read, in octets.
const WINDOWS: (u32, u32) = (64 * 1024, 256 * 1024);

/// Why the registrar does not serve, or does not go on to.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Another one runs.
    #[error("cannot use the data directory {}: {source}; stop that one first", directory.display())]
    Runs {
        /// The data directory.
        directory: PathBuf,
        /// Who has it.
        source: file::LockError,
    },
    /// A value of the configuration cannot be used.
    #[error(transparent)]
    Config(#[from] muster_common::config::ConfigError),
    /// There is no thread to spare.
    #[error(
        "cannot start the thread that encodes DNS answers ({0}); raise the limit of tasks (TasksMax, ulimit -u)"
    )]
    Thread(#[source] io::Error),
    /// The store cannot be opened or read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The store does not answer.
    #[error("cannot reach {place}; start it, or correct [store] in the configuration")]
    Unreachable {
        /// Where it is.
        place: String,
        /// What it said.
        source: StoreError,
    },
    /// The store is empty.
    #[error(
        "the store at {0} holds no Muster deployment; make one with `muster-registrar init`, or set the right store"
    )]
    Empty(String),
    /// The store is not what it was at start.
    #[error(
        "the store at {0} was replaced by another while it was served, such as by a restore; start again to serve that one"
    )]
    Replaced(String),
    /// The store has been written by something else, or by a newer version.
    #[error("the store at {place} {reason}; nothing was changed")]
    Format {
        /// Where it is.
        place: String,
        /// What is wrong and what to do.
        reason: String,
    },
    /// The store is not whole yet.
    #[error(
        "the store at {place} is incomplete: putting {contents} into it has not been finished. Run the same command \
         (`muster-registrar restore` or `migrate`) again, which goes on where it was"
    )]
    Incomplete {
        /// Where it is.
        place: String,
        /// What is being put into it.
        contents: String,
    },
    /// Another store is served in its place.
    #[error(
        "the store at {place} has been migrated to {target}: set store.kind to that in the configuration. To use this \
         one again after all, without what was changed there: `muster-registrar migrate --undo`"
    )]
    Migrated {
        /// Where it is.
        place: String,
        /// Where its contents are now.
        target: String,
    },
    /// The CA, or the registrar's certificate.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// TLS cannot be set up.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// A port is taken.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The host's address is not known.
    #[error(
        "cannot find out this host's address ({0}); set advertise.registrars and advertise.dns in the configuration"
    )]
    Address(io::Error),
    /// Signals cannot be received.
    #[error("cannot receive signals: {0}")]
    Signal(io::Error),
    /// A listener has failed for good.
    #[error("{0}")]
    Ended(String),
}

/// Raises the soft limit of open files to the hard one, which it returns (`None` for no limit): each agent holds a
/// connection, and the usual soft limit of 1,024 would be the bound long before the configured one.
fn allow_open_files() -> Option<u64> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    match setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        Ok(()) => maximum,
        Err(_) => current,
    }
}

/// Does without huge pages, which the allocator would ask for. Each connection has some 50 KiB of buffers that are mostly
/// empty: in small pages, only what has been used of them takes memory. A kernel that does not know this loses nothing.
fn keep_pages_small() {
    let _not_known = rustix::thread::disable_transparent_huge_pages(true);
}

/// Serves until SIGTERM or SIGINT, then drains. SIGHUP has the CA's files read again at once.
///
/// # Errors
/// See [`ServeError`].
pub async fn serve(mut config: Config) -> Result<(), ServeError> {
    let mut signals = Signals::new().map_err(ServeError::Signal)?;
    let open_files = allow_open_files();
    let runs = |source| ServeError::Runs { directory: config.data_dir.clone(), source };
    let _lock = file::lock_existing(&config.data_dir).map_err(runs)?;
    keep_pages_small();
    let (grpc_listener, dns_sockets, http_listener) = bind(&config).await?;
    let dns_addresses = dns_sockets.addresses();
    let (metrics, readiness) = (Metrics::with_prefix("muster_registrar"), Readiness::default());
    let (store, store_failed) = open_store(&config, &metrics, &readiness)?;
    let place = config.place(config.store.kind);
    let format = read_format(&*store, &place).await?;
    let mut trust = Trust::open(&config, store.clone(), &format.trust_domain, Timestamp::now()).await?;

    let mut tasks = JoinSet::new();
    {
        let (metrics, readiness) = (metrics.clone(), readiness.clone());
        tasks.spawn(async move {
            telemetry::serve(http_listener, metrics, readiness).await;
            "metrics and health"
        });
    }
    tasks.spawn(async {
        store_failed.await;
        "the store"
    });
    tasks.spawn(async {
        systemd::watchdog().await;
        "the watchdog"
    });

    let registry = Registry::load(store.clone()).await?;
    registry.metrics().register(&metrics);
    metrics::register(&metrics, &registry, trust.ca(), trust.expiry());
    advertise(&mut config, &registry)?;
    let advertised = Advertised {
        registrars: config.advertise.registrars.clone(),
        dns_servers: config.advertise.dns.clone(),
    };
    let hub = Hub::new(&registry, advertised.clone(), trust.ca().roots());
    hub.register_metrics(&metrics);
    let uid = uuid::Builder::from_random_bytes(rand::random()).into_uuid();
    let announcement = store.announce(keys::registrar(uid)).await?;
    // A migration marks the store first and then looks who runs. So one of the two sees the other.
    read_format(&*store, &place).await?;
    let identity = Identity { uid: trust.own_uid()?, run: uid, host: host_name(), advertised };
    let balance = Balance::new(&hub, identity, &metrics);
    tasks.spawn(async {
        balance.run().await;
        drain::BALANCE
    });
    let carriers = Carriers::new(&hub, uid, &metrics);
    tasks.spawn(async {
        carriers.run().await;
        "the choice of carriers"
    });
    let presences = Presences::new(&hub, uid, &metrics);
    tasks.spawn(async {
        presences.run().await;
        "the presence of endpoints"
    });
    dns::spawn(&mut tasks, dns_sockets, &config, &hub, trust.credentials(), &metrics)?;

    let stop = CancellationToken::new();
    let health = tonic_health::server::HealthReporter::new();
    health.set_service_status("", ServingStatus::Serving).await;
    {
        let tls = Arc::new(trust.credentials().server_config(ALPN_H2)?);
        let counted = grpc::AcceptMetrics::default();
        metrics.register(|registry| counted.register(registry));
        let incoming = grpc::incoming(grpc_listener, tls, config.limits.bounds(), counted);
        let router = router(&config, &hub, &trust, &health)?;
        let stop = stop.clone();
        tasks.spawn(async move {
            let served = router.serve_with_incoming_shutdown(incoming, stop.cancelled_owned()).await;
            if let Err(error) = served {
                tracing::error!(error = grpc::chain(&error), "gRPC ended");
            }
            drain::GRPC
        });
    }
    readiness.set(true);
    systemd::ready();
    let Config { listen, .. } = &config;
    tracing::info!(grpc = %listen.grpc, dns = ?dns_addresses, dot = %listen.dot, http = %listen.http, "serving");
    if open_files
        .is_some_and(|files| usize::try_from(files).is_ok_and(|files| files < config.limits.connections))
    {
        tracing::warn!(
            open_files,
            connections = config.limits.connections,
            "fewer files can be open than connections are allowed; raise LimitNOFILE or `ulimit -Hn`"
        );
    }

    let mut refresh = tokio::time::interval(REFRESH);
    let mut history = History::default();
    loop {
        tokio::select! {
            told = signals.next() => match told {
                Told::Stop(signal) => {
                    tracing::info!(signal, "stopping");
                    break;
                }
                Told::Reload => tracing::info!("reading the CA again"),
            },
            _ = refresh.tick() => {}
            Some(ended) = tasks.join_next() => {
                let what = ended.map_or_else(|error| error.to_string(), str::to_owned);
                return Err(ServeError::Ended(format!("{what} ended unexpectedly; see the log")));
            }
        }
        let now = Timestamp::now();
        let maintained = async {
            check_store(&*store, &place, &format).await?;
            match trust.refresh(now).await {
                Ok(()) => {}
                Err(error @ TrustError::Retired { .. }) => return Err(ServeError::from(error)),
                Err(error) => {
                    tracing::error!(%error, "CA, roots or certificate are not up to date; trying again");
                }
            }
            history.forget(&*store, now).await;
            Ok(())
        };
        // A store that is away must not keep the registrar from hearing that it shall stop.
        match tokio::time::timeout(MAINTENANCE, maintained).await {
            Ok(maintained) => maintained?,
            Err(_) => tracing::warn!("the store takes too long for maintenance; trying again"),
        }
    }

    readiness.set(false);
    health.set_service_status("", ServingStatus::NotServing).await;
    drain::drain(config.drain.get(), &hub, &stop, &mut tasks, signals.stop()).await;
    registry.flush_uses().await;
    announcement.end().await;
    tracing::info!("stopped");
    Ok(())
}

/// The host's name, without what makes it unique in the world.
fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim().split('.').next() {
        Some(first) if !first.is_empty() => first.to_owned(),
        _ => "registrar".to_owned(),
    }
}

/// Fills in what devices are told of where to find this registrar, unless the configuration says it.
fn advertise(config: &mut Config, registry: &Registry) -> Result<(), ServeError> {
    if !config.advertise.registrars.is_empty() && !config.advertise.dns.is_empty() {
        return Ok(());
    }
    let mut addresses: Vec<IpAddr> = Vec::new();
    for state in registry.read().networks() {
        addresses.extend(&state.network.public_addresses);
    }
    if addresses.is_empty() {
        addresses.push(init::default_address().map_err(ServeError::Address)?);
    }
    addresses.sort_unstable();
    addresses.dedup();
    init::advertise(config, &addresses);
    Ok(())
}

/// Everything that is spoken on the gRPC port.
fn router(
    config: &Config,
    hub: &Arc<Hub>,
    trust: &Trust,
    health: &tonic_health::server::HealthReporter,
) -> Result<tonic::transport::server::Router<Stack<Stale, NoLayer>>, ServeError> {
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(muster_proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .map_err(|error| ServeError::Ended(format!("cannot set up gRPC reflection: {error}")))?;
    let health = tonic_health::server::HealthService::from_health_reporter(health.clone());
    let limits = &config.limits;
    let settings = Settings {
        certificate_lifetime: config.certificates.device_lifetime.get(),
        message_octets: limits.message_octets,
        enroll: Rate { per_second: limits.joins_per_second.into(), burst: limits.joins_burst.into() },
        ..Settings::new(trust.credentials().trust_domain())
    };
    let services = Api::new(hub.registry().clone(), hub.clone(), trust.ca().clone(), settings);
    let known = services.clone();
    Ok(Server::builder()
        .layer(Stale::new(hub.registry()))
        .timeout(limits.request_timeout.get())
        .max_concurrent_streams(limits.requests_per_connection)
        .initial_stream_window_size(WINDOWS.0)
        .initial_connection_window_size(WINDOWS.1)
        .http2_max_header_list_size(HEADERS)
        .http2_keepalive_interval(Some(KEEPALIVE.0))
        .http2_keepalive_timeout(Some(KEEPALIVE.1))
        .add_routes(services.routes())
        .add_service(
            tonic_health::pb::health_server::HealthServer::new(health)
                .max_decoding_message_size(limits.message_octets),
        )
        // What strangers can do without a certificate is to join and to ask for health.
        .add_service(InterceptedService::new(reflection, move |request| known.known(request))))
}

async fn bind(config: &Config) -> Result<(TcpListener, DnsSockets, TcpListener), BindError> {
    let listen = &config.listen;
    let grpc = bind_grpc(listen.grpc)?;
    let dns = DnsSockets::bind(listen, config.dns.workers)?;
    Ok((grpc, dns, telemetry::bind(listen.http).await?))
}

fn bind_grpc(address: SocketAddr) -> Result<TcpListener, BindError> {
    let bind = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    bind().map_err(|error| BindError::new("gRPC", address, error))
}

/// The store, and what completes if it closes itself.
type Opened = (Arc<dyn Store>, Pin<Box<dyn Future<Output = ()> + Send>>);

fn open_store(config: &Config, metrics: &Metrics, readiness: &Readiness) -> Result<Opened, StoreError> {
    Ok(match config.store.kind {
        StoreKind::Sqlite => {
            let store = SqliteStore::open(config.sqlite_path())?;
            store.register_metrics(metrics);
            readiness.tell(store.trouble());
            let failed = store.failed();
            (Arc::new(store), Box::pin(failed))
        }
        StoreKind::Etcd => (Arc::new(EtcdStore::open(&config.etcd())?), Box::pin(std::future::pending())),
    })
}

/// Has the store forget its history once it is old.
#[derive(Default)]
struct History {
    /// The revision at some time in the past.
    seen: Option<(Timestamp, Revision)>,
}

impl History {
    async fn forget(&mut self, store: &dyn Store, now: Timestamp) {
        let due = match self.seen {
            None => None,
            Some((at, revision)) if now >= at + HISTORY => Some(revision),
            Some(_) => return,
        };
        let forgotten = async {
            if let Some(revision) = due {
                store.compact(revision).await?;
            }
            store.revision().await
        };
        match forgotten.await {
            Ok(revision) => self.seen = Some((now, revision)),
            Err(error) => tracing::warn!(%error, "cannot compact the store's history; trying again"),
        }
    }
}

/// What the process is told from outside.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Told {
    Stop(&'static str),
    Reload,
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    reload: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            reload: signal(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> Told {
        tokio::select! {
            _ = self.terminate.recv() => Told::Stop("SIGTERM"),
            _ = self.interrupt.recv() => Told::Stop("SIGINT"),
            _ = self.reload.recv() => Told::Reload,
        }
    }

    /// Waits until the process is told to stop.
    async fn stop(&mut self) -> &'static str {
        loop {
            if let Told::Stop(signal) = self.next().await {
                return signal;
            }
        }
    }
}
