//! The host's resolver: a cache that asks the registrars, over TLS with the device's certificate, for names of the
//! network, and the servers that the host already had for all others (design §7). The agent itself reaches its
//! registrars without it.

mod cache;
mod local;
mod metrics;
mod pool;
mod registrars;
mod service;
mod snapshot;
mod stored;
mod upstream;

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
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

pub use cache::{CacheLimits, Origin, Unsaved};
pub use pool::PoolError;
pub use service::QueryError;
pub use snapshot::SnapshotError;

use cache::Cache;
use pool::Pool;
use service::{Route, Service, ServiceHandler, own_request};
use stored::Age;

/// Addresses that have been resolved and that the data plane has not heard of yet.
const RESOLVED_QUEUE: usize = 256;
/// How often the host's own servers are looked up again.
const UPSTREAM_REFRESH: Duration = Duration::from_secs(5);

/// How the resolver is set up.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where to listen, UDP and TCP. The addresses need not be on the host yet.
    pub listen: Vec<SocketAddr>,
    /// Servers for names outside the network; empty for those that `resolv_conf` names.
    pub upstream: Vec<SocketAddr>,
    /// The host's resolv.conf, or the backup of it if the file itself names us. It is read again when it changes.
    pub resolv_conf: PathBuf,
    /// Who may ask beside this host itself, such as containers on it.
    pub allow: Vec<IpNet>,
    /// Bounds of the cache.
    pub cache: CacheLimits,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            listen: vec![SocketAddr::from(([169, 254, 20, 10], 53))],
            upstream: Vec::new(),
            resolv_conf: "/etc/resolv.conf".into(),
            allow: Vec::new(),
            cache: CacheLimits::default(),
        }
    }
}

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
    listen: Vec<SocketAddr>,
    _tasks: JoinSet<()>,
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
        let mut sockets = Vec::new();
        for address in &settings.listen {
            let udp = bind_udp(*address, true)?;
            // If any port was asked for, both get the same.
            let bound = udp.local_addr().map_err(|e| BindError::new("DNS over UDP", *address, e))?;
            sockets.push((udp, bind_tcp(bound, true)?, bound));
        }
        let listen: Vec<SocketAddr> = sockets.iter().map(|(_, _, address)| *address).collect();
        let tls = || credentials.client_config(registrar, ALPN_DOT);
        let (sender, receiver) = mpsc::channel(RESOLVED_QUEUE);
        let route =
            Route { domain: network.domain.clone(), routes: network.routes.clone(), registrars: Vec::new() };
        let service = Arc::new(Service::new(
            route,
            (Pool::tls(tls()?), Pool::plain(tls()?)),
            Cache::new(settings.cache),
            metrics::Metrics::register(registry),
            sender,
            settings.allow.clone(),
        ));

        let server_metrics = ServerMetrics::register(registry);
        let mut tasks = JoinSet::new();
        for (udp, tcp, address) in sockets {
            let handler = Arc::new(ServiceHandler(Arc::clone(&service)));
            let (tcp_handler, tcp_metrics) = (Arc::clone(&handler), server_metrics.clone());
            let udp_metrics = server_metrics.clone();
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
        service.upstream.set(&upstream::without_own(settings.upstream.clone(), &listen));
        if settings.upstream.is_empty() {
            let (service, path, own) = (Arc::clone(&service), settings.resolv_conf.clone(), listen.clone());
            // Read once before anything is answered.
            service.upstream.set(&host_servers(&path, &own));
            tasks.spawn(async move {
                loop {
                    tokio::time::sleep(UPSTREAM_REFRESH).await;
                    let servers = host_servers(&path, &own);
                    if servers != service.upstream.addresses() {
                        tracing::info!(?servers, "the host's DNS servers have changed");
                        service.upstream.set(&servers);
                    }
                }
            });
        }
        tasks.spawn(registrars::follow(Arc::clone(&service), servers));
        tracing::info!(?listen, upstream = ?service.upstream.addresses(), domain = %network.domain, "resolver started");
        Ok((Self { service, network, listen, _tasks: tasks }, receiver))
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
            Age::Stale => 0,
        };
        Ok(DeviceAnswer {
            name: name.to_ascii().trim_end_matches('.').to_owned(),
            addresses: message.answers.iter().filter_map(|record| address(&record.data)).collect(),
            private: part("private"),
            director: part("director"),
            ttl: Duration::from_secs(ttl.into()),
            stale: age == Age::Stale,
        })
    }

    /// Forgets what is cached at `name` and below, because it has changed. A name without a dot is a device of
    /// this network. What is not a name is ignored.
    pub fn invalidate(&self, name: &str) {
        let whole =
            if name.contains('.') { name.to_owned() } else { format!("{name}.{}", self.network.domain) };
        if let Ok(mut name) = Name::from_ascii(whole) {
            name.set_fqdn(true);
            self.service.cache().invalidate(&name.to_lowercase());
        }
    }

    /// What the resolver has done so far.
    pub fn stats(&self) -> Stats {
        let (queries, cache_hits) = self.service.metrics.totals();
        let cache = self.service.cache();
        Stats {
            listen: self.listen.clone(),
            upstream: self.service.upstream.addresses(),
            registrars: self.service.registrars.addresses(),
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

/// The servers in the resolv.conf at `path`, without ourselves.
fn host_servers(path: &std::path::Path, own: &[SocketAddr]) -> Vec<SocketAddr> {
    match std::fs::read_to_string(path) {
        Ok(text) => upstream::without_own(upstream::name_servers(&text), own),
        Err(error) => {
            tracing::debug!(path = %path.display(), %error, "cannot read the host's DNS servers");
            Vec::new()
        }
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
