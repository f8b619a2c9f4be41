//! Servers that queries are forwarded to, with fail-over: registrars over TLS, or others over UDP and, for what does not
//! fit, TCP. Streams are hickory's; which server is asked is decided here. A server that has failed is asked for a sign of
//! life in the background until it gives one.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use hickory_proto::{
    op::{DnsRequest, DnsRequestOptions, Message, Query, ResponseCode},
    rr::{Name, RecordType},
};
use hickory_resolver::{
    ConnectionProvider, PoolContext, TlsConfig,
    config::{ConnectionConfig, ResolverOpts},
    net::{
        NetError,
        xfer::{DnsExchange, DnsHandle, FirstAnswer},
    },
};
use muster_common::time::Instant;
use rustls::ClientConfig;

use super::{
    datagram::{self, Reply},
    forwarding::Sent,
    metrics::Forward,
    provider::Provider,
    settings::Health,
};

/// How long one server may take.
const ATTEMPT: Duration = Duration::from_secs(2);
/// How long all of them together may take; stub resolvers give up after 5 s.
const TOTAL: Duration = Duration::from_millis(4500);
/// For so long after a failure a server is asked only if all others have failed too.
const DISTRUST: Duration = Duration::from_secs(10);
/// For so long after all servers have failed none is asked.
const PAUSE: Duration = Duration::from_secs(1);
/// How long a sign of life may take.
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);
/// So many times longer than at first becomes the pause between questions for one.
const CHECKS_SLOWER: u32 = 10;
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

type Exchange = DnsExchange<Provider>;

/// A connection, numbered so that a failure of one is not laid on its successor.
#[derive(Default)]
struct Connection {
    number: u64,
    exchange: Option<Exchange>,
}

struct Server {
    address: SocketAddr,
    /// Whether it is asked over UDP first.
    udp: bool,
    /// Whether it is known to repeat names in small letters.
    folds: AtomicBool,
    stream: (ConnectionConfig, tokio::sync::Mutex<Connection>),
    failed_at: Mutex<Option<Instant>>,
    /// Failures since it last answered.
    fails: AtomicU32,
    /// Whether it is being asked for a sign of life.
    checked: AtomicBool,
}

impl Server {
    fn new(address: SocketAddr, kind: &Kind) -> Arc<Self> {
        let mut config = match kind {
            // Registrars are known by their identity; the name only has to be there.
            Kind::Registrars => ConnectionConfig::tls(address.ip().to_string().into()),
            Kind::Tls(name) => ConnectionConfig::tls(Arc::clone(name)),
            Kind::Udp | Kind::Tcp => ConnectionConfig::tcp(),
        };
        config.port = address.port();
        Arc::new(Self {
            address,
            udp: *kind == Kind::Udp,
            folds: AtomicBool::new(false),
            stream: (config, tokio::sync::Mutex::default()),
            failed_at: Mutex::default(),
            fails: AtomicU32::new(0),
            checked: AtomicBool::new(false),
        })
    }

    fn failed_at(&self) -> Option<Instant> {
        *self.failed_at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed_within(&self, period: Duration, now: Instant) -> bool {
        self.failed_at().is_some_and(|at| now - at < period)
    }

    fn failed_since(&self, moment: Instant) -> bool {
        self.failed_at().is_some_and(|at| at >= moment)
    }

    fn note(&self, failed: bool) {
        *self.failed_at.lock().unwrap_or_else(PoisonError::into_inner) = failed.then(Instant::now);
        if !failed {
            self.fails.store(0, Ordering::Relaxed);
        }
    }

    /// Whether it is asked only when all others have failed, too.
    fn distrusted(&self, health: Health, now: Instant) -> bool {
        let down = health.max_fails > 0 && self.fails.load(Ordering::Relaxed) >= health.max_fails;
        down || self.failed_within(DISTRUST, now)
    }
}

/// A set of servers of one kind, best first.
pub(super) struct Pool {
    servers: ArcSwap<Vec<Arc<Server>>>,
    client: Arc<Client>,
}

/// How servers are reached.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Kind {
    /// Registrars, over TLS.
    Registrars,
    /// Over TLS, with this name in the certificate.
    Tls(Arc<str>),
    /// Over UDP, and over TCP for what does not fit.
    Udp,
    /// Over TCP.
    Tcp,
}

impl Pool {
    /// `tls` is of use for TLS alone, but hickory wants it always.
    pub(super) fn new(
        kind: Kind,
        tls: ClientConfig,
        health: Health,
        metrics: Forward,
        sent: Arc<Sent>,
    ) -> Self {
        let mut options = ResolverOpts::default();
        options.timeout = ATTEMPT;
        options.max_active_requests = PIPELINED;
        let context = PoolContext::new(options, TlsConfig { config: tls });
        let provider = Provider::new(&kind);
        let client = Arc::new(Client { context, provider, kind, health, metrics, sent });
        Self { servers: ArcSwap::default(), client }
    }

    /// Uses these servers from now on. Those that were there before keep their connections.
    pub(super) fn set(&self, addresses: &[SocketAddr]) {
        let known = self.servers.load();
        let server = |address: &SocketAddr| {
            let same = known.iter().find(|server| server.address == *address).cloned();
            same.unwrap_or_else(|| Server::new(*address, &self.client.kind))
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
        !servers.is_empty() && servers.iter().all(|server| server.distrusted(self.client.health, now))
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
        let client = &self.client;
        let now = Instant::now();
        if !servers.is_empty() && servers.iter().all(|server| server.failed_within(PAUSE, now)) {
            return Err(PoolError::Paused);
        }
        let (distrusted, trusted): (Vec<_>, Vec<_>) =
            servers.iter().partition(|server| server.distrusted(client.health, now));
        if trusted.is_empty() && !distrusted.is_empty() {
            client.metrics.all_down();
        }
        let mut last = Err(PoolError::NoServers(match client.kind {
            Kind::Registrars => "the address of no registrar is known yet",
            Kind::Udp => "/etc/resolv.conf and the configuration name none, or only ourselves",
            Kind::Tcp | Kind::Tls(_) => "the configuration names only ourselves",
        }));
        for server in trusted.into_iter().chain(distrusted) {
            let asked = Instant::now();
            let failure = match client.attempt(server, query).await {
                Ok(response) => {
                    let code = response.metadata.response_code;
                    client.metrics.answered(server.address, code, Instant::now() - asked);
                    // As stub resolvers do: one that refuses may be for other names, or other hosts.
                    let passed_on = [ResponseCode::ServFail, ResponseCode::NotImp, ResponseCode::Refused];
                    if !passed_on.contains(&code) {
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
            server.fails.fetch_add(1, Ordering::Relaxed);
            if !server.checked.swap(true, Ordering::Relaxed) {
                tokio::spawn(check(Arc::downgrade(server), Arc::clone(client)));
            }
            if last.is_err() {
                let reason = muster_common::grpc::chain(&failure);
                last = Err(PoolError::Failed { server: server.address, reason });
            }
        }
        last
    }
}

/// Asks a server that has failed for a sign of life until it gives one, or is no longer in use.
async fn check(server: Weak<Server>, client: Arc<Client>) {
    let interval = client.health.interval;
    let mut pause = interval;
    loop {
        tokio::time::sleep(pause).await;
        let Some(server) = server.upgrade() else { return };
        let mut query = Message::query();
        query.metadata.recursion_desired = true;
        query.add_query(Query::query(Name::root(), RecordType::NS));
        // Any answer will do.
        if let Ok(Ok(_)) = tokio::time::timeout(SIGN_OF_LIFE, client.attempt(&server, &query)).await {
            tracing::debug!(server = %server.address, "a DNS server answers again");
            server.note(false);
            server.checked.store(false, Ordering::Relaxed);
            return;
        }
        client.metrics.check_failed(server.address);
        server.fails.fetch_add(1, Ordering::Relaxed);
        pause = (pause * 2).min(interval * CHECKS_SLOWER);
    }
}

/// What reaches servers of one kind.
struct Client {
    context: PoolContext,
    provider: Provider,
    kind: Kind,
    health: Health,
    metrics: Forward,
    sent: Arc<Sent>,
}

impl Client {
    async fn attempt(&self, server: &Server, query: &Message) -> Result<Message, NetError> {
        let mut query = query.clone();
        let response = self.send(server, &query).await?;
        // A server from before EDNS (RFC 6891, 7) may answer what it can read.
        let code = response.metadata.response_code;
        let unread = code == ResponseCode::FormErr || code == ResponseCode::NotImp;
        if unread && response.edns.is_none() && query.edns.take().is_some() {
            return self.send(server, &query).await;
        }
        Ok(response)
    }

    async fn send(&self, server: &Server, query: &Message) -> Result<Message, NetError> {
        let mut query = query.clone();
        query.metadata.id = rand::random();
        let mix = server.udp && !server.folds.load(Ordering::Relaxed);
        if let Some(question) = query.queries.first_mut().filter(|_| mix) {
            question.name.randomize_label_case();
        }
        let mut spelled_otherwise = false;
        if server.udp {
            let _underway = self.sent.note(&query);
            match datagram::exchange(server.address, &query).await? {
                Reply::Whole(response) => return Ok(*response),
                Reply::AskOverTcp { folded } => spelled_otherwise = folded,
            }
        }
        let response = self.send_over_stream(server, &query).await?;
        // What comes over TCP is the server's own: it is known now not to repeat capitals.
        let repeats = |(a, b): (&Query, &Query)| a.name.eq_case(&b.name);
        if spelled_otherwise && !response.queries.iter().zip(&query.queries).all(repeats) {
            tracing::debug!(server = %server.address, "a DNS server does not repeat capitals");
            server.folds.store(true, Ordering::Relaxed);
        }
        Ok(response)
    }

    async fn send_over_stream(&self, server: &Server, query: &Message) -> Result<Message, NetError> {
        let (config, connection) = &server.stream;
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
                Ok(response) => return same_question(query, response.into_message()),
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
fn same_question(query: &Message, response: Message) -> Result<Message, NetError> {
    // A server that cannot read the query need not repeat it.
    if response.queries == query.queries
        || (response.queries.is_empty() && response.metadata.response_code != ResponseCode::NoError)
    {
        Ok(response)
    } else {
        Err(NetError::from("the response is to another question"))
    }
}

#[cfg(test)]
#[path = "pool_tests.rs"]
mod tests;
