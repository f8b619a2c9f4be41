//! The host's resolver: a cache that asks the registrars, over TLS with the device's certificate, for names of the
//! network, and the servers that the host already had for all others (design §7). The agent itself reaches its
//! registrars without it.

mod cache;
mod completion;
mod datagram;
mod flights;
mod forwarding;
mod held;
mod key;
mod local;
mod metrics;
mod pool;
mod provider;
mod registrars;
mod service;
mod settings;
mod snapshot;
mod stored;
mod upstream;

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use hickory_proto::rr::{Name, RData, RecordType};
use ipnet::IpNet;
use muster_common::{
    identity::Party,
    name::Domain,
    net::BindError,
    time::{Instant, Timestamp},
    tls::{ALPN_DOT, Credentials, TlsError},
};
use muster_dns::server::{
    bind_tcp, bind_udp,
    metrics::Metrics as ServerMetrics,
    stream::{self, StreamLimits},
    udp::{self, UdpLimits},
};
use prometheus_client::registry::Registry;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};

pub use cache::{CacheLimits, Origin, Prefetch, Unsaved};
pub use held::HeldService;
pub use pool::PoolError;
pub use service::QueryError;
pub use settings::{Completion, Health, Settings, Stub, StubTransport, server_address};
pub use snapshot::SnapshotError;

use cache::Cache;
use completion::Completer;
use forwarding::{Sent, Stubs};
use key::wire_name;
use pool::{Kind, Pool};
use service::{Pools, Route, Service, ServiceHandler, own_request};
use stored::Age;

/// Addresses that have been resolved and that the data plane has not heard of yet.
const RESOLVED_QUEUE: usize = 256;
/// How often the host's own servers are looked up again.
const UPSTREAM_REFRESH: Duration = Duration::from_secs(5);

/// The network whose names the registrars answer.
#[derive(Clone, Debug)]
pub struct Network {
    /// Its domain.
    pub domain: Domain,
    /// Its addresses: reverse names of these are asked of the registrars.
    pub routes: Vec<IpNet>,
}

/// Why the resolver cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ResolverError {
    /// An address to listen on cannot be had.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The credentials cannot be used.
    #[error("cannot use the device's credentials for DNS: {0}")]
    Tls(#[from] TlsError),
    /// A stub domain that is no domain.
    #[error("resolver.stub: {0:?} is not a domain")]
    Stub(String),
    /// The certificates that a stub domain's servers are known by.
    #[error("resolver.stub: cannot use the CA certificates in {}: {reason}; name another file in `ca`", path.display())]
    Ca {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// Why a name does not resolve.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// Not a name.
    #[error("{0:?} is not a DNS name")]
    Name(String),
    /// There is no such name, or none that this device may see.
    #[error("{0} does not exist, or policy hides it from this device")]
    NotFound(Name),
    /// The name has no addresses.
    #[error("{0} exists but has no address")]
    NoAddress(Name),
    /// A server refused to say.
    #[error("cannot resolve {name}: the server answered {code}")]
    Refused {
        /// The name.
        name: Name,
        /// The server's response code.
        code: String,
    },
    /// No answer is to be had.
    #[error("cannot resolve {name}: {source}")]
    Query {
        /// The name.
        name: Name,
        /// Why not.
        source: QueryError,
    },
}

/// What a name resolves to.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DeviceAnswer {
    /// The whole name, without a trailing dot.
    pub name: String,
    /// The device's virtual addresses; for a name outside the network, its addresses.
    pub addresses: Vec<IpAddr>,
    /// From the same answer: the device's private addresses.
    pub private: Vec<IpAddr>,
    /// From the same answer: the addresses of its home director.
    pub director: Vec<IpAddr>,
    /// How long all this holds.
    pub ttl: Duration,
    /// Whether it holds no longer, but no server could be asked.
    pub stale: bool,
}

/// What the resolver has done.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    /// Where it listens.
    pub listen: Vec<SocketAddr>,
    /// The servers for names outside the network.
    pub upstream: Vec<SocketAddr>,
    /// The registrars that are asked.
    pub registrars: Vec<SocketAddr>,
    /// Answers in the cache, and the octets they take.
    pub cache_entries: u64,
    /// Octets that the cache takes.
    pub cache_octets: u64,
    /// Questions so far.
    pub queries: u64,
    /// Those that the cache answered.
    pub cache_hits: u64,
}

/// The running resolver. It stops when this is dropped.
pub struct Resolver {
    service: Arc<Service>,
    network: Network,
    settings: Settings,
    server_metrics: ServerMetrics,
    listen: Arc<Mutex<Vec<SocketAddr>>>,
    tasks: Mutex<JoinSet<()>>,
}

fn registrar(party: &Party) -> bool {
    matches!(party, Party::Registrar { .. })
}

impl Resolver {
    /// Starts the resolver. `servers` tells `HOST:PORT` of the registrars' DNS over TLS; `registry` receives its
    /// metrics. Virtual addresses that have just been resolved come out of the receiver.
    pub fn start(
        settings: &Settings,
        network: Network,
        credentials: &Arc<Credentials>,
        servers: watch::Receiver<Vec<String>>,
        registry: &mut Registry,
    ) -> Result<(Self, mpsc::Receiver<IpAddr>), ResolverError> {
        // All addresses first, so that nothing runs yet if one cannot be had.
        let sockets =
            settings.listen.iter().map(|address| Listener::bind(*address)).collect::<Result<Vec<_>, _>>()?;
        let (sender, receiver) = mpsc::channel(RESOLVED_QUEUE);
        let route =
            Route { domain: network.domain.clone(), routes: network.routes.clone(), registrars: Vec::new() };
        let metrics = metrics::Metrics::register(registry);
        let tls = credentials.client_config(registrar, ALPN_DOT)?;
        let sent = Arc::<Sent>::default();
        let pool =
            |kind| Pool::new(kind, tls.clone(), settings.health, metrics.forward.clone(), Arc::clone(&sent));
        let pools = Pools {
            registrars: pool(Kind::Registrars),
            stubs: Stubs::new(settings, &tls, &metrics.forward, &sent)?,
            upstream: pool(Kind::Udp),
            sent: Arc::clone(&sent),
        };
        let cache = Cache::new(settings.cache).holding(&network.domain);
        let completer = Completer::new(&settings.completion, &network.domain);
        let service = Service::new(route, pools, (cache, completer), metrics, sender, settings.allow.clone());
        let service = Arc::new(service);

        let resolver = Self {
            service: Arc::clone(&service),
            settings: settings.clone(),
            server_metrics: ServerMetrics::register(registry),
            listen: Arc::default(),
            tasks: Mutex::default(),
            network,
        };
        for listener in sockets {
            resolver.serve(listener);
        }
        resolver.name_servers();
        let mut tasks = resolver.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        if settings.upstream.is_empty() {
            let (service, settings, listen) =
                (Arc::clone(&service), settings.clone(), Arc::clone(&resolver.listen));
            tasks.spawn(async move {
                loop {
                    tokio::time::sleep(UPSTREAM_REFRESH).await;
                    let own = listen.lock().unwrap_or_else(PoisonError::into_inner).clone();
                    if let Some(servers) = upstream::host_servers(&settings, &own)
                        && servers != service.pools.upstream.addresses()
                    {
                        tracing::info!(?servers, "the host's DNS servers have changed");
                        service.pools.upstream.set(&servers);
                    }
                }
            });
        }
        tasks.spawn(registrars::follow(Arc::clone(&service), servers));
        drop(tasks);
        let (listen, upstream) = (resolver.listen(), service.pools.upstream.addresses());
        tracing::info!(?listen, ?upstream, domain = %resolver.network.domain, "resolver started");
        Ok((resolver, receiver))
    }

    /// Listens on these addresses of the host, too, at the port of the first that it was started with. What cannot be
    /// had is logged: names resolve without it.
    pub fn listen_also(&self, addresses: &[IpAddr]) {
        let known = self.listen();
        let Some(port) = known.first().map(SocketAddr::port) else { return };
        for address in addresses.iter().map(|ip| SocketAddr::new(*ip, port)) {
            if known.iter().any(|k| k.port() == port && (k.ip() == address.ip() || k.ip().is_unspecified())) {
                continue;
            }
            match Listener::bind(address) {
                Ok(listener) => self.serve(listener),
                Err(error) => {
                    tracing::warn!(%error, "the resolver does not answer on the device's own address")
                }
            }
        }
        // None of them may be asked.
        self.name_servers();
    }

    fn listen(&self) -> Vec<SocketAddr> {
        self.listen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Sets the servers for names outside the network, none of which may be ourselves.
    fn name_servers(&self) {
        let (own, pools) = (self.listen(), &self.service.pools);
        if !self.settings.upstream.is_empty() {
            pools.upstream.set(&upstream::without_own(self.settings.upstream.clone(), &own));
        } else if let Some(servers) = upstream::host_servers(&self.settings, &own) {
            pools.upstream.set(&servers);
        }
        for stub in pools.stubs.iter() {
            stub.pool.set(&upstream::without_own(stub.stub.servers.clone(), &own));
        }
    }

    fn serve(&self, Listener { udp, tcp, address }: Listener) {
        self.listen.lock().unwrap_or_else(PoisonError::into_inner).push(address);
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        let handler = Arc::new(ServiceHandler(Arc::clone(&self.service)));
        let (tcp_handler, tcp_metrics) = (Arc::clone(&handler), self.server_metrics.clone());
        let udp_metrics = self.server_metrics.clone();
        // Clients are this host's own programs: no rate is too high.
        let limits = UdpLimits { rate: None, ..UdpLimits::default() };
        tasks.spawn(async move {
            let ended = udp::serve(udp, handler, limits, &udp_metrics).await;
            tracing::error!(%address, ?ended, "the resolver no longer answers over UDP");
        });
        tasks.spawn(async move {
            let limits = StreamLimits::default();
            let ended = stream::serve_tcp(tcp, tcp_handler, limits, &tcp_metrics).await;
            tracing::error!(%address, ?ended, "the resolver no longer answers over TCP");
        });
    }

    /// Resolves `name`; one without a dot is a device of this network.
    pub async fn resolve(&self, name: &str) -> Result<DeviceAnswer, ResolveError> {
        let bad = || ResolveError::Name(name.chars().take(300).collect());
        let whole =
            if name.contains('.') { name.to_owned() } else { format!("{name}.{}", self.network.domain) };
        let mut name = Name::from_ascii(&whole).map_err(|_| bad())?;
        name.set_fqdn(true);
        if name.is_root() {
            return Err(bad());
        }
        let (v4, v6) =
            tokio::join!(self.resolve_type(&name, RecordType::A), self.resolve_type(&name, RecordType::AAAA));
        let answer = match (v4, v6) {
            (Ok(mut v4), Ok(v6)) => {
                v4.ttl = v4.ttl.min(v6.ttl);
                v4.stale |= v6.stale;
                v4.addresses.extend(v6.addresses);
                for (known, more) in [(&mut v4.private, v6.private), (&mut v4.director, v6.director)] {
                    known.extend(more.into_iter().filter(|a| !known.contains(a)).collect::<Vec<_>>());
                }
                v4
            }
            (Ok(one), Err(_)) | (Err(_), Ok(one)) if !one.addresses.is_empty() => one,
            (Err(error), _) | (_, Err(error)) => return Err(error),
        };
        if answer.addresses.is_empty() { Err(ResolveError::NoAddress(name)) } else { Ok(answer) }
    }

    async fn resolve_type(&self, name: &Name, record_type: RecordType) -> Result<DeviceAnswer, ResolveError> {
        let failed = |source| ResolveError::Query { name: name.clone(), source };
        let request = own_request(name.clone(), record_type);
        let (stored, age) = self.service.resolve(&request).await.map_err(failed)?;
        let unreadable = |e: stored::StoredError| failed(QueryError::Unreadable(e.to_string()));
        let message = stored.message().map_err(unreadable)?;
        match message.metadata.response_code {
            hickory_proto::op::ResponseCode::NoError => {}
            hickory_proto::op::ResponseCode::NXDomain => return Err(ResolveError::NotFound(name.clone())),
            code => return Err(ResolveError::Refused { name: name.clone(), code: code.to_string() }),
        }
        let part = |label: &str| {
            let owner = name.prepend_label(label).ok();
            let records = message.additionals.iter().filter(|record| Some(&record.name) == owner.as_ref());
            records.filter_map(|record| address(&record.data)).collect()
        };
        let ttl = match age {
            Age::Fresh(seconds) => stored.ttl.unwrap_or(0).saturating_sub(seconds),
            Age::Stale | Age::Outdated => 0,
        };
        Ok(DeviceAnswer {
            name: name.to_ascii().trim_end_matches('.').to_owned(),
            addresses: message.answers.iter().filter_map(|record| address(&record.data)).collect(),
            private: part("private"),
            director: part("director"),
            ttl: Duration::from_secs(ttl.into()),
            stale: age.is_stale(),
        })
    }

    /// What is cached at `name` and below, and at the reverse names of the addresses there, has changed: it is given only
    /// if no registrar answers. A name without a dot is a device of this network. What is not a name is ignored.
    pub fn invalidate(&self, name: &str) {
        let whole =
            if name.contains('.') { name.to_owned() } else { format!("{name}.{}", self.network.domain) };
        if let Ok(name) = Name::from_ascii(whole) {
            self.service.invalidate(&wire_name(&name));
        }
    }

    /// The same for a Service, with the names of its endpoints and ports. To be called whenever a registrar says
    /// `ServiceChanged`.
    pub fn invalidate_service(&self, service: &HeldService) {
        self.invalidate(&format!("{}.{}.svc.{}", service.name, service.namespace, self.network.domain));
    }

    /// The Services whose names are cached, sorted, at most 4096: those whose changes a registrar has to tell.
    pub fn held_services(&self) -> Vec<HeldService> {
        self.service.cache().held().services()
    }

    /// Changes whenever [`Self::held_services`] does.
    pub fn held_changes(&self) -> watch::Receiver<u64> {
        self.service.cache().held().changes()
    }

    /// What the resolver has done so far.
    pub fn stats(&self) -> Stats {
        let (queries, cache_hits) = self.service.metrics.totals();
        let cache = self.service.cache();
        Stats {
            listen: self.listen(),
            upstream: self.service.pools.upstream.addresses(),
            registrars: self.service.pools.registrars.addresses(),
            cache_entries: cache.len() as u64,
            cache_octets: cache.octets() as u64,
            queries,
            cache_hits,
        }
    }

    /// Changes which reverse names are the network's.
    pub fn set_routes(&self, routes: Vec<IpNet>) {
        self.service.route.rcu(|route| Route { routes: routes.clone(), ..Route::clone(route) });
    }

    /// What is cached of the network's names, to be given to [`Self::restore`] after a restart.
    pub fn snapshot(&self) -> Vec<u8> {
        let mut cache = self.service.cache();
        cache.saved();
        snapshot::save(&cache, &self.network.domain, Instant::now(), Timestamp::now())
    }

    /// What has been learnt since the last [`Self::snapshot`].
    pub fn unsaved(&self) -> Unsaved {
        self.service.cache().unsaved()
    }

    /// Takes up a snapshot; tells how many answers it held. They are given only while no registrar answers.
    pub fn restore(&self, octets: &[u8]) -> Result<usize, SnapshotError> {
        let mut cache = self.service.cache();
        snapshot::restore(octets, &mut cache, &self.network.domain, Instant::now(), Timestamp::now())
    }
}

fn address(data: &RData) -> Option<IpAddr> {
    data.ip_addr()
}

/// An address to listen on, had.
struct Listener {
    udp: udp::UdpSockets,
    tcp: tokio::net::TcpListener,
    address: SocketAddr,
}

impl Listener {
    fn bind(address: SocketAddr) -> Result<Self, BindError> {
        let udp = bind_udp(address, true)?;
        // If any port was asked for, both get the same.
        let bound = udp.local_addr().map_err(|e| BindError::new("DNS over UDP", address, e))?;
        Ok(Self { udp, tcp: bind_tcp(bound, true)?, address: bound })
    }
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::{Message, ResponseCode};
    use muster_common::tls::KeyPair;
    use muster_dns::{
        message::Transport,
        server::{Handler, Handling, Source},
    };

    use super::*;

    /// A device whose certificate only itself vouches for: enough to start with.
    fn credentials() -> Arc<Credentials> {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::default();
        let id = "spiffe://muster.test/network/net/device/d1".try_into().unwrap();
        params.subject_alt_names = vec![rcgen::SanType::URI(id)];
        let certificate = params.self_signed(&key).unwrap();
        let pair =
            KeyPair { chain: vec![certificate.der().clone()], key: key.serialize_der().try_into().unwrap() };
        Credentials::new(&pair, &[certificate.der().clone()]).unwrap()
    }

    #[tokio::test]
    async fn other_hosts_are_refused() {
        let settings = Settings {
            listen: vec!["127.0.0.1:0".parse().unwrap()],
            allow: vec!["198.51.100.0/24".parse().unwrap()],
            ..Settings::default()
        };
        let network = Network { domain: "net.example".parse().unwrap(), routes: Vec::new() };
        let (_servers, watch) = watch::channel(Vec::new());
        let started = Resolver::start(&settings, network, &credentials(), watch, &mut Registry::default());
        let (resolver, _resolved) = started.unwrap();
        let handler = ServiceHandler(Arc::clone(&resolver.service));
        let mut query = Message::query();
        let name = Name::from_ascii("web.net.example.").unwrap();
        query.add_query(hickory_proto::op::Query::query(name, RecordType::A));
        let query = query.to_vec().unwrap();
        let refused = |address: &str| {
            let address = address.parse().unwrap();
            let source = Source { address, transport: Transport::Udp, identity: None };
            let mut out = Vec::new();
            let done = matches!(handler.handle(&query, &source, &mut out), Handling::Done(_));
            done && Message::from_vec(&out).unwrap().metadata.response_code == ResponseCode::Refused
        };
        for stranger in ["192.0.2.1:5353", "[2001:db8::1]:5353", "100.64.0.9:5353"] {
            assert!(refused(stranger), "{stranger}");
        }
        for known in ["127.0.0.1:5353", "198.51.100.7:5353", "[::1]:5353"] {
            assert!(!refused(known), "{known}");
        }
    }
}
