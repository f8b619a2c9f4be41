//! Servers that queries are forwarded to, with fail-over: registrars over TLS, or the host's own servers over UDP
//! and, for what does not fit, TCP. Connections are hickory's; which server is asked is decided here.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwap;
use hickory_proto::op::{DnsRequest, DnsRequestOptions, DnsResponse, Message, ResponseCode};
use hickory_resolver::{
    ConnectionProvider, PoolContext, TlsConfig,
    config::{ConnectionConfig, ResolverOpts},
    net::{
        NetError,
        runtime::TokioRuntimeProvider,
        xfer::{DnsExchange, DnsHandle, FirstAnswer},
    },
};
use muster_common::time::Instant;
use rustls::ClientConfig;

/// How long one server may take.
const ATTEMPT: Duration = Duration::from_secs(2);
/// How long all of them together may take; stub resolvers give up after 5 s.
const TOTAL: Duration = Duration::from_millis(4500);
/// For so long after a failure a server is asked only if all others have failed too.
const DISTRUST: Duration = Duration::from_secs(10);
/// For so long after all servers have failed none is asked.
const PAUSE: Duration = Duration::from_secs(1);
/// Queries on one connection at a time.
const PIPELINED: usize = 1024;

/// Why no server has answered.
#[derive(Clone, Debug, thiserror::Error)]
pub enum PoolError {
    /// There is none.
    #[error("there is no server to ask: {0}")]
    NoServers(&'static str),
    /// All have failed a moment ago.
    #[error("no server has answered a moment ago; trying again shortly")]
    Paused,
    /// The last server asked failed.
    #[error("cannot get an answer from {server}: {reason}")]
    Failed {
        /// Its address.
        server: SocketAddr,
        /// What went wrong.
        reason: String,
    },
    /// They took too long, all together.
    #[error("no server has answered within {} ms", TOTAL.as_millis())]
    Timeout,
}

type Exchange = DnsExchange<TokioRuntimeProvider>;

/// A connection, numbered so that a failure of one is not laid on its successor.
#[derive(Default)]
struct Connection {
    number: u64,
    exchange: Option<Exchange>,
}

struct Server {
    address: SocketAddr,
    /// First the one that is used, then the one for what it truncates.
    connections: Vec<(ConnectionConfig, tokio::sync::Mutex<Connection>)>,
    failed_at: Mutex<Option<Instant>>,
}

impl Server {
    fn new(address: SocketAddr, configs: Vec<ConnectionConfig>) -> Arc<Self> {
        let with_port = |mut config: ConnectionConfig| {
            config.port = address.port();
            (config, tokio::sync::Mutex::default())
        };
        let connections = configs.into_iter().map(with_port).collect();
        Arc::new(Self { address, connections, failed_at: Mutex::default() })
    }

    fn failed_within(&self, period: Duration, now: Instant) -> bool {
        let failed_at = self.failed_at.lock().unwrap_or_else(PoisonError::into_inner);
        failed_at.is_some_and(|at| now - at < period)
    }

    fn failed_since(&self, moment: Instant) -> bool {
        let failed_at = self.failed_at.lock().unwrap_or_else(PoisonError::into_inner);
        failed_at.is_some_and(|at| at >= moment)
    }

    fn note(&self, failed: bool) {
        let mut failed_at = self.failed_at.lock().unwrap_or_else(PoisonError::into_inner);
        *failed_at = failed.then(Instant::now);
    }
}

/// A set of servers of one kind, best first.
pub(super) struct Pool {
    servers: ArcSwap<Vec<Arc<Server>>>,
    context: PoolContext,
    provider: TokioRuntimeProvider,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Tls,
    Plain,
}

impl Pool {
    /// Servers that are reached over TLS with `config`.
    pub(super) fn tls(config: ClientConfig) -> Self {
        Self::new(config, Kind::Tls)
    }

    /// Servers that are reached over UDP and TCP. hickory wants a TLS configuration all the same.
    pub(super) fn plain(unused: ClientConfig) -> Self {
        Self::new(unused, Kind::Plain)
    }

    fn new(config: ClientConfig, kind: Kind) -> Self {
        let mut options = ResolverOpts::default();
        options.timeout = ATTEMPT;
        options.max_active_requests = PIPELINED;
        let context = PoolContext::new(options, TlsConfig { config });
        Self { servers: ArcSwap::default(), context, provider: TokioRuntimeProvider::default(), kind }
    }

    /// Uses these servers from now on. Those that were there before keep their connections.
    pub(super) fn set(&self, addresses: &[SocketAddr]) {
        let known = self.servers.load();
        let server = |address: &SocketAddr| {
            known.iter().find(|server| server.address == *address).cloned().unwrap_or_else(|| {
                let configs = match self.kind {
                    // Registrars are known by their identity; the name only has to be there.
                    Kind::Tls => vec![ConnectionConfig::tls(address.ip().to_string().into())],
                    Kind::Plain => vec![ConnectionConfig::udp(), ConnectionConfig::tcp()],
                };
                Server::new(*address, configs)
            })
        };
        self.servers.store(Arc::new(addresses.iter().map(server).collect()));
    }

    /// The servers in use.
    pub(super) fn addresses(&self) -> Vec<SocketAddr> {
        self.servers.load().iter().map(|server| server.address).collect()
    }

    /// Whether there are servers, and all of them have failed a short while ago.
    pub(super) fn is_failing(&self) -> bool {
        let (servers, now) = (self.servers.load(), Instant::now());
        !servers.is_empty() && servers.iter().all(|server| server.failed_within(DISTRUST, now))
    }

    /// Asks one server after another until one answers.
    pub(super) async fn exchange(&self, query: &Message) -> Result<Message, PoolError> {
        match tokio::time::timeout(TOTAL, self.try_all(query)).await {
            Ok(result) => result,
            Err(_) => Err(PoolError::Timeout),
        }
    }

    async fn try_all(&self, query: &Message) -> Result<Message, PoolError> {
        let servers = self.servers.load_full();
        let now = Instant::now();
        if !servers.is_empty() && servers.iter().all(|server| server.failed_within(PAUSE, now)) {
            return Err(PoolError::Paused);
        }
        let (distrusted, trusted): (Vec<_>, Vec<_>) =
            servers.iter().partition(|server| server.failed_within(DISTRUST, now));
        let mut last = Err(PoolError::NoServers(match self.kind {
            Kind::Tls => "the address of no registrar is known yet",
            Kind::Plain => "/etc/resolv.conf and the configuration name none, or only ourselves",
        }));
        for server in trusted.into_iter().chain(distrusted) {
            let failure = match self.attempt(server, query).await {
                Ok(response) => {
                    let code = response.metadata.response_code;
                    if code != ResponseCode::ServFail && code != ResponseCode::NotImp {
                        server.note(false);
                        return Ok(response);
                    }
                    // It is there, but cannot answer this: another may, and if not, it has said so itself.
                    last = Ok(response);
                    continue;
                }
                Err(error) => error,
            };
            tracing::debug!(server = %server.address, error = %failure, "a DNS server failed");
            server.note(true);
            if last.is_err() {
                let reason = muster_common::grpc::chain(&failure);
                last = Err(PoolError::Failed { server: server.address, reason });
            }
        }
        last
    }

    async fn attempt(&self, server: &Server, query: &Message) -> Result<Message, NetError> {
        let mut response = Err(NetError::NoConnections);
        for (config, connection) in &server.connections {
            response = self.send(server, config, connection, query).await;
            match &response {
                Ok(message) if message.metadata.truncation => {}
                _ => break,
            }
        }
        response
    }

    async fn send(
        &self,
        server: &Server,
        config: &ConnectionConfig,
        connection: &tokio::sync::Mutex<Connection>,
        query: &Message,
    ) -> Result<Message, NetError> {
        let asked = Instant::now();
        loop {
            let (exchange, number, reused) = {
                let mut open = connection.lock().await;
                match &open.exchange {
                    Some(exchange) => (exchange.clone(), open.number, true),
                    // Whoever connected while we waited for our turn has failed: not one after the other again.
                    None if server.failed_since(asked) => return Err(NetError::Timeout),
                    None => {
                        let connecting =
                            self.provider.new_connection(server.address.ip(), config, &self.context)?;
                        let connected = tokio::time::timeout(ATTEMPT, connecting).await;
                        if !matches!(connected, Ok(Ok(_))) {
                            server.note(true);
                        }
                        let exchange = connected.map_err(|_| NetError::Timeout)??;
                        open.number += 1;
                        open.exchange = Some(exchange.clone());
                        (exchange, open.number, false)
                    }
                }
            };
            let request = DnsRequest::new(query.clone(), DnsRequestOptions::default());
            let error = match exchange.send(request).first_answer().await {
                Ok(response) => return check(query, response),
                Err(error) => error,
            };
            // hickory calls a connection that has ended busy, too. Nothing is lost by leaving one that really is:
            // what is under way on it goes on.
            let mut open = connection.lock().await;
            if open.number == number {
                open.exchange = None;
            }
            drop(open);
            // A server closes idle connections whenever it likes: that is no failure.
            if !reused || matches!(error, NetError::Timeout) {
                return Err(error);
            }
        }
    }
}

/// The response, if it answers `query`.
fn check(query: &Message, response: DnsResponse) -> Result<Message, NetError> {
    let response = response.into_message();
    // A server that cannot read the query need not repeat it.
    if response.queries == query.queries
        || (response.queries.is_empty() && response.metadata.response_code != ResponseCode::NoError)
    {
        Ok(response)
    } else {
        Err(NetError::from("the response is to another question"))
    }
}
