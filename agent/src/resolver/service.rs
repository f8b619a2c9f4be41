//! The resolver behind its listeners: who may ask, which servers know the answer, the cache in front of them, and
//! one request at a time for each question however many ask it.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwap;
use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, ResponseCode},
    rr::{Name, RecordType},
};
use ipnet::IpNet;
use muster_common::{name::Domain, time::Instant};
use muster_dns::{
    engine::Outcome,
    message::{self, Parsed, Request, Response, Transport, UDP_CEILING},
    reverse::ReverseName,
    server::{Handler, Handling, Source},
};
use tokio::sync::mpsc;

use super::{
    cache::{Cache, Hit, Key, Origin},
    local::LocalAddresses,
    metrics::Metrics,
    pool::{Pool, PoolError},
    stored::{Age, Stored},
};

/// How long a client waits for the servers when there is a stale answer (RFC 8767, 5).
const CLIENT_PATIENCE: Duration = Duration::from_millis(1800);
/// The same for names of the network: devices seldom move, and what waits for them are tunnels that would work.
const NETWORK_PATIENCE: Duration = Duration::from_millis(400);
/// Questions that servers are asked at a time.
const FLIGHTS_MAX: usize = 1024;

/// Why there is no answer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum QueryError {
    /// No server has answered.
    #[error(transparent)]
    Servers(#[from] PoolError),
    /// Too much is being asked.
    #[error("{FLIGHTS_MAX} questions are waiting for an answer already")]
    Busy,
    /// The answer cannot be read.
    #[error("{0}")]
    Unreadable(String),
}

/// A question under way to the servers, shared by all who ask it.
type Flight = Shared<BoxFuture<'static, Result<Arc<Stored>, QueryError>>>;

/// An answer and how old it is.
pub(super) type Answer = (Arc<Stored>, Age);

/// Which names are the network's: those under its domain, and the reverse names of its addresses.
#[derive(Clone, Debug)]
pub(super) struct Route {
    pub(super) domain: Domain,
    pub(super) routes: Vec<IpNet>,
    /// Names of the registrars themselves, which have to be known before a registrar can be asked.
    pub(super) registrars: Vec<String>,
}

impl Route {
    pub(super) fn origin(&self, name: &str) -> Origin {
        if self.registrars.iter().any(|registrar| registrar == name) {
            return Origin::Upstream;
        }
        let within = match ReverseName::parse(name) {
            Some(reverse) => self.routes.iter().any(|route| route.contains(&reverse.prefix)),
            None => self.domain.relative(name).is_some(),
        };
        if within { Origin::Network } else { Origin::Upstream }
    }
}

/// The resolver.
pub(super) struct Service {
    pub(super) route: ArcSwap<Route>,
    pub(super) registrars: Pool,
    pub(super) upstream: Pool,
    pub(super) metrics: Metrics,
    /// Who may ask beside this host itself.
    allowed: Vec<IpNet>,
    local: LocalAddresses,
    cache: Mutex<Cache>,
    flights: Mutex<HashMap<Key, Flight>>,
    resolved: mpsc::Sender<IpAddr>,
}

impl Service {
    pub(super) fn new(
        route: Route,
        (registrars, upstream): (Pool, Pool),
        cache: Cache,
        metrics: Metrics,
        resolved: mpsc::Sender<IpAddr>,
        allowed: Vec<IpNet>,
    ) -> Self {
        Self {
            route: ArcSwap::from_pointee(route),
            registrars,
            upstream,
            metrics,
            allowed,
            local: LocalAddresses::default(),
            cache: Mutex::new(cache),
            flights: Mutex::default(),
            resolved,
        }
    }

    pub(super) fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes the size of the cache after a change.
    fn measure(&self, cache: &Cache) {
        self.metrics.entries.set(i64::try_from(cache.len()).unwrap_or(i64::MAX));
        self.metrics.octets.set(i64::try_from(cache.octets()).unwrap_or(i64::MAX));
    }

    fn may_ask(&self, source: SocketAddr) -> bool {
        self.allowed.iter().any(|net| net.contains(&source.ip()))
            || self.local.contains(source, Instant::now())
    }

    /// The cache's answer, if that is to be given, with what else there is to do.
    fn from_cache(self: &Arc<Self>, request: &Request, key: &Key) -> Result<Answer, Option<Answer>> {
        let Some(hit) = self.cache().lookup(key, Instant::now()) else {
            self.metrics.miss(self.origin(request));
            return Err(None);
        };
        let Hit { stored, age, origin, refresh } = hit;
        if age == Age::Stale && refresh {
            self.metrics.miss(origin);
            return Err(Some((stored, age)));
        }
        self.metrics.hit(origin);
        if age == Age::Stale {
            self.metrics.served_stale(origin);
        } else if refresh {
            // The answer is about to expire while in use: have a new one by then.
            drop(self.fly(request, key));
        }
        Ok((stored, age))
    }

    /// Answers `request` from the cache or the servers.
    pub(super) async fn resolve(self: &Arc<Self>, request: &Request) -> Result<Answer, QueryError> {
        let key = Key::of(request);
        match self.from_cache(request, &key) {
            Ok(answer) => Ok(answer),
            Err(stale) => self.ask_servers(request, &key, stale).await,
        }
    }

    async fn ask_servers(
        self: &Arc<Self>,
        request: &Request,
        key: &Key,
        stale: Option<Answer>,
    ) -> Result<Answer, QueryError> {
        let flight = self.fly(request, key)?;
        let Some(stale) = stale else { return flight.await.map(|stored| (stored, Age::Fresh(0))) };
        let origin = self.origin(request);
        let patience = match origin {
            _ if self.pool(origin).is_failing() => Duration::ZERO,
            Origin::Network => NETWORK_PATIENCE,
            Origin::Upstream => CLIENT_PATIENCE,
        };
        match tokio::time::timeout(patience, flight).await {
            Ok(Ok(stored)) if stored.code != ResponseCode::ServFail => Ok((stored, Age::Fresh(0))),
            _ => {
                self.metrics.served_stale(origin);
                Ok(stale)
            }
        }
    }

    fn pool(&self, origin: Origin) -> &Pool {
        match origin {
            Origin::Network => &self.registrars,
            Origin::Upstream => &self.upstream,
        }
    }

    fn origin(&self, request: &Request) -> Origin {
        self.route.load().origin(&message::plain_name(&request.question.name))
    }

    /// Joins those who wait for an answer to the same question, or is the first of them.
    fn fly(self: &Arc<Self>, request: &Request, key: &Key) -> Result<Flight, QueryError> {
        let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(flight) = flights.get(key) {
            return Ok(flight.clone());
        }
        if flights.len() >= FLIGHTS_MAX {
            return Err(QueryError::Busy);
        }
        let (service, request, own_key) = (Arc::clone(self), request.clone(), key.clone());
        // A task of its own: the answer is of use also when nobody waits for it any more.
        let task = tokio::spawn(async move {
            let result = service.fetch(&request, &own_key).await;
            service.flights.lock().unwrap_or_else(PoisonError::into_inner).remove(&own_key);
            result
        });
        let flight = task
            .map(|joined| joined.unwrap_or_else(|e| Err(QueryError::Unreadable(e.to_string()))))
            .boxed()
            .shared();
        flights.insert(key.clone(), flight.clone());
        Ok(flight)
    }

    async fn fetch(&self, request: &Request, key: &Key) -> Result<Arc<Stored>, QueryError> {
        let origin = self.origin(request);
        let fetched = self.pool(origin).exchange(&query(key)).await.map_err(QueryError::from);
        let fetched = fetched.and_then(|message| {
            let ttl_max = self.cache().ttl_max();
            Stored::new(message, ttl_max).map_err(|e| QueryError::Unreadable(e.to_string()))
        });
        let now = Instant::now();
        let mut cache = self.cache();
        match fetched {
            Ok(stored) if stored.code != ResponseCode::ServFail => {
                let stored = Arc::new(stored);
                cache.insert(key.clone(), Arc::clone(&stored), origin, now);
                self.measure(&cache);
                Ok(stored)
            }
            failed => {
                cache.failed(key, now);
                self.metrics.failure(origin);
                failed.map(Arc::new)
            }
        }
    }

    /// Tells the data plane that the addresses in an answer are about to be used.
    fn announce(&self, request: &Request, stored: &Stored) {
        if !stored.addresses.is_empty() && self.origin(request) == Origin::Network {
            for address in &stored.addresses {
                // A hint: if the data plane is behind, the packet itself will tell it.
                let _ = self.resolved.try_send(*address);
            }
        }
    }

    fn write(
        &self,
        request: &Request,
        transport: Transport,
        result: Result<Answer, QueryError>,
        out: &mut Vec<u8>,
    ) -> Outcome {
        let record_type = Some(request.record_type());
        match result {
            Ok((stored, age)) => {
                self.announce(request, &stored);
                stored.write(request, transport, age, out);
                Outcome::Response { code: stored.code, record_type }
            }
            Err(error) => {
                tracing::debug!(name = %request.question.name, %error, "cannot answer a DNS query");
                reject(request.response(ResponseCode::ServFail), out)
            }
        }
    }
}

impl Handler for ServiceHandler {
    fn handle(&self, query: &[u8], source: &Source, out: &mut Vec<u8>) -> Handling {
        let request = match message::parse(query) {
            Parsed::Silence => {
                out.clear();
                return Handling::Done(Outcome::Silence);
            }
            Parsed::Rejected(response) => return Handling::Done(reject(response, out)),
            Parsed::Request(request) => request,
        };
        let transfer = matches!(request.record_type(), RecordType::AXFR | RecordType::IXFR);
        if transfer || !self.0.may_ask(source.address) {
            return Handling::Done(reject(request.response(ResponseCode::Refused), out));
        }
        let key = Key::of(&request);
        let transport = source.transport;
        match self.0.from_cache(&request, &key) {
            Ok(answer) => Handling::Done(self.0.write(&request, transport, Ok(answer), out)),
            Err(stale) => {
                let service = Arc::clone(&self.0);
                Handling::Later(Box::pin(async move {
                    let result = service.ask_servers(&request, &key, stale).await;
                    let mut out = Vec::new();
                    let outcome = service.write(&request, transport, result, &mut out);
                    (outcome, out)
                }))
            }
        }
    }
}

/// The resolver as the listeners see it.
pub(super) struct ServiceHandler(pub(super) Arc<Service>);

/// Writes a response without records.
fn reject(mut response: Response, out: &mut Vec<u8>) -> Outcome {
    response.metadata.recursion_available = true;
    let code = response.metadata.response_code;
    let record_type = response.question.as_ref().map(|question| question.query_type());
    match response.encode(message::UDP_MINIMUM, out) {
        Ok(()) => Outcome::Response { code, record_type },
        Err(_) => {
            out.clear();
            Outcome::Silence
        }
    }
}

/// The query that servers are sent for `key`.
fn query(key: &Key) -> Message {
    let mut message = Message::new(rand::random(), MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.metadata.checking_disabled = key.checking_disabled;
    message.add_query(hickory_proto::op::Query::query(key.name.clone(), key.record_type));
    let mut edns = Edns::new();
    edns.set_max_payload(UDP_CEILING);
    edns.set_dnssec_ok(key.dnssec_ok);
    message.set_edns(edns);
    message
}

/// A request of the agent's own.
pub(super) fn own_request(name: Name, record_type: RecordType) -> Request {
    let mut message = Message::new(0, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    let question = hickory_proto::op::Query::query(name, record_type);
    Request { metadata: message.metadata, question, edns: None }
}
