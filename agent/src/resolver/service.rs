//! The resolver behind its listeners: who may ask, which servers know the answer, the cache in front of them, and what
//! is given where they cannot answer.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwap;
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
    wire::Question,
};
use tokio::{runtime::Handle, sync::mpsc};

use super::{
    cache::{Cache, Hit, Origin},
    completion::{self, Completer},
    flights::{FLIGHTS_MAX, Flight, Flights, Landed, Landing},
    forwarding::{Sent, Stubs},
    key::{Key, Probe},
    local::LocalAddresses,
    metrics::Metrics,
    pool::{Pool, PoolError},
    stored::{Age, Stored},
};

/// How long a client waits for the servers when there is a stale answer (RFC 8767, 5).
const CLIENT_PATIENCE: Duration = Duration::from_millis(1800);
/// The same for names of the network: devices seldom move, and what waits for them are tunnels that would work.
const NETWORK_PATIENCE: Duration = Duration::from_millis(400);

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

/// The servers, by what they are asked for.
pub(super) struct Pools {
    pub(super) registrars: Pool,
    pub(super) stubs: Stubs,
    pub(super) upstream: Pool,
    /// What is under way to them.
    pub(super) sent: Arc<Sent>,
}

/// The resolver.
pub(super) struct Service {
    pub(super) route: ArcSwap<Route>,
    pub(super) pools: Pools,
    pub(super) metrics: Metrics,
    completer: Completer,
    /// Who may ask beside this host itself.
    allowed: Vec<IpNet>,
    local: LocalAddresses,
    cache: Mutex<Cache>,
    flights: Arc<Flights>,
    /// Queries are handled on threads outside of it.
    runtime: Handle,
    resolved: mpsc::Sender<IpAddr>,
}

impl Service {
    pub(super) fn new(
        route: Route,
        pools: Pools,
        (cache, completer): (Cache, Completer),
        metrics: Metrics,
        resolved: mpsc::Sender<IpAddr>,
        allowed: Vec<IpNet>,
    ) -> Self {
        Self {
            route: ArcSwap::from_pointee(route),
            pools,
            metrics,
            completer,
            allowed,
            local: LocalAddresses::default(),
            cache: Mutex::new(cache),
            flights: Arc::default(),
            runtime: Handle::current(),
            resolved,
        }
    }

    pub(super) fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn may_ask(&self, source: SocketAddr, now: Instant) -> bool {
        self.allowed.iter().any(|net| net.contains(&source.ip())) || self.local.contains(source, now)
    }

    /// What is cached or under way at `zone` (on the wire, in lower case) and below has changed.
    pub(super) fn invalidate(&self, zone: &[u8]) {
        // Before the cache: whoever has an answer then sees either here or there that it is outdated.
        self.flights.outdate(zone);
        let mut cache = self.cache();
        cache.outdate_with_reverse(zone);
        self.metrics.measure(&cache);
    }

    /// The answer in the cache, if that is to be given, with what else there is to do.
    fn judge(
        self: &Arc<Self>,
        request: &Request,
        key: &Key,
        hit: Option<Hit>,
    ) -> Result<Answer, Option<Answer>> {
        let Some(Hit { stored, age, origin, refresh, announce }) = hit else {
            self.metrics.miss(self.origin(&request.question.name));
            return Err(None);
        };
        if announce {
            self.announce(&stored);
        }
        if age.is_stale() && refresh {
            self.metrics.miss(origin);
            return Err(Some((stored, age)));
        }
        self.metrics.hit(origin, stored.negative);
        if age.is_stale() {
            self.metrics.served_stale(origin);
        } else if refresh {
            // The answer is about to expire while in use: have a new one by then.
            self.metrics.prefetched(origin);
            drop(self.fly(request, key));
        }
        Ok((stored, age))
    }

    /// Answers `request` from the cache or the servers.
    pub(super) async fn resolve(self: &Arc<Self>, request: &Request) -> Result<Answer, QueryError> {
        let key = Key::of(request);
        let hit = self.cache().lookup(&key, Instant::now());
        match self.judge(request, &key, hit) {
            Ok(answer) => Ok(answer),
            Err(stale) => self.ask_servers(request, &key, stale).await,
        }
    }

    /// Answers `request`, whose name is completed if it is short.
    async fn complete(self: &Arc<Self>, request: &Request) -> Result<Answer, QueryError> {
        let asked = &request.question.name;
        let mut missing = None;
        for name in self.completer.names(asked) {
            let as_asked = name == *asked;
            let mut candidate = request.clone();
            candidate.question.name = name;
            let (stored, age) = self.resolve(&candidate).await?;
            match stored.code {
                ResponseCode::NXDomain => {
                    if as_asked {
                        missing = Some((stored, age));
                    }
                }
                _ if as_asked => return Ok((stored, age)),
                ResponseCode::NoError => {
                    let unreadable = |e: &dyn ToString| QueryError::Unreadable(e.to_string());
                    let message = stored.message().map_err(|e| unreadable(&e))?;
                    let message = completion::alias(asked, message, stored.ttl.unwrap_or(0));
                    let ttl_max = self.cache().ttl_max();
                    let message = message.map_err(|e| unreadable(&e))?;
                    let stored = Stored::new(message, ttl_max).map_err(|e| unreadable(&e))?;
                    return Ok((Arc::new(stored), age));
                }
                code => {
                    let reason = format!("the server answered {code} for {}", candidate.question.name);
                    return Err(QueryError::Unreadable(reason));
                }
            }
        }
        missing.ok_or_else(|| QueryError::Unreadable("the name was not asked for".into()))
    }

    async fn ask_servers(
        self: &Arc<Self>,
        request: &Request,
        key: &Key,
        stale: Option<Answer>,
    ) -> Result<Answer, QueryError> {
        let flight = self.fly(request, key);
        let Some(stale) = stale else { return flight?.await.map(|stored| (stored, Age::Fresh(0))) };
        let origin = self.origin(&request.question.name);
        if let Ok(flight) = flight {
            let patience = patience(origin, stale.1, self.pool(origin, key).is_failing());
            match tokio::time::timeout(patience, flight).await {
                Ok(Ok(stored)) if stored.is_answer() => return Ok((stored, Age::Fresh(0))),
                _ => {}
            }
        }
        self.metrics.served_stale(origin);
        Ok(stale)
    }

    fn pool(&self, origin: Origin, key: &Key) -> &Pool {
        match origin {
            Origin::Network => &self.pools.registrars,
            Origin::Upstream => self.pools.stubs.find(key.wire_name()).unwrap_or(&self.pools.upstream),
        }
    }

    fn origin(&self, name: &Name) -> Origin {
        self.route.load().origin(&message::plain_name(name))
    }

    /// Has the servers asked, if they are not being asked already.
    fn fly(self: &Arc<Self>, request: &Request, key: &Key) -> Result<Flight, QueryError> {
        let (service, name) = (Arc::clone(self), request.question.name.clone());
        let fetch = |landing| async move { service.fetch(&name, &landing).await };
        self.flights.join(key, &self.runtime, fetch).inspect_err(|_| self.metrics.rejected())
    }

    async fn fetch(&self, name: &Name, landing: &Landing) -> Landed {
        let (origin, key) = (self.origin(name), &landing.key);
        let fetched = self.pool(origin, key).exchange(&query(key)).await.map_err(QueryError::from);
        let fetched = fetched.and_then(|message| {
            let ttl_max = self.cache().ttl_max();
            Stored::new(message, ttl_max).map_err(|e| QueryError::Unreadable(e.to_string()))
        });
        let now = Instant::now();
        let mut cache = self.cache();
        // Seen with the cache in hand: a change from now on finds there what is kept here. Only registrars tell of any.
        let current = origin == Origin::Upstream || landing.is_current();
        let result = match fetched {
            Ok(stored) if stored.is_answer() => {
                let stored = Arc::new(stored);
                if current {
                    cache.insert(key.clone(), Arc::clone(&stored), origin, now);
                } else {
                    cache.insert_outdated(key.clone(), Arc::clone(&stored), origin, now);
                }
                if origin == Origin::Network {
                    self.announce(&stored);
                }
                Ok(stored)
            }
            failed => {
                self.metrics.failure(origin);
                let failed = failed.map(Arc::new);
                // A failure from before a change is no reason not to ask after it.
                if current {
                    cache.failed(key, now);
                    if let Ok(stored) = &failed {
                        cache.keep_failure(key.clone(), Arc::clone(stored), origin, now);
                    }
                }
                failed
            }
        };
        self.metrics.measure(&cache);
        result
    }

    /// Tells the data plane that the addresses in an answer are about to be used.
    fn announce(&self, stored: &Stored) {
        for address in stored.addresses() {
            // A hint: if the data plane is behind, the packet itself will tell it.
            let _ = self.resolved.try_send(address);
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
                stored.write(request, transport, age, out);
                Outcome::Response { code: stored.code, record_type }
            }
            Err(error) => {
                tracing::debug!(name = %request.question.name, %error, "cannot answer a DNS query");
                reject(request.response(ResponseCode::ServFail), out)
            }
        }
    }

    /// Answers an ordinary query from the cache, without allocating and without hickory. Otherwise returns what the
    /// cache has, if it has been looked up.
    fn answer_fast(
        self: &Arc<Self>,
        query: &[u8],
        source: &Source,
        out: &mut Vec<u8>,
    ) -> Result<Outcome, Option<Option<Hit>>> {
        let Some(question) = Question::parse(query) else { return Err(None) };
        let now = Instant::now();
        if is_transfer(question.qtype.into()) || !self.may_ask(source.address, now) {
            return Err(None);
        }
        let before = self.completer.applies(question.labels.into());
        if before == Some(true) {
            return Err(None);
        }
        let hit = self.cache().lookup(Probe::of(&question).octets(), now);
        let Some(Hit { stored, age: Age::Fresh(seconds), origin, refresh: false, announce }) = &hit else {
            return Err(Some(hit));
        };
        let completed = before.is_some() && stored.code == ResponseCode::NXDomain;
        if completed || !stored.write_ordinary((query, &question), source.transport, *seconds, out) {
            return Err(Some(hit));
        }
        if *announce {
            self.announce(stored);
        }
        self.metrics.hit(*origin, stored.negative);
        Ok(Outcome::Response { code: stored.code, record_type: Some(question.qtype.into()) })
    }
}

/// How long servers are waited for where there is an answer of this age; `failing` if all of them seem to be away. An
/// answer that is known to have changed would likely lead astray, while a registrar, which told so a moment ago, is most
/// likely there, if slow: it gets all the time that clients have. It even gets some where it seems to be away, since that
/// may be over, and costs nothing where connections are refused.
fn patience(origin: Origin, age: Age, failing: bool) -> Duration {
    match (origin, age, failing) {
        (Origin::Network, Age::Outdated, true) => NETWORK_PATIENCE,
        (_, _, true) => Duration::ZERO,
        (Origin::Network, Age::Fresh(_) | Age::Stale, false) => NETWORK_PATIENCE,
        (Origin::Network, Age::Outdated, false) | (Origin::Upstream, _, false) => CLIENT_PATIENCE,
    }
}

fn is_transfer(record_type: RecordType) -> bool {
    matches!(record_type, RecordType::AXFR | RecordType::IXFR)
}

impl Handler for ServiceHandler {
    fn handle(&self, query: &[u8], source: &Source, out: &mut Vec<u8>) -> Handling {
        let looked_up = match self.0.answer_fast(query, source, out) {
            Ok(outcome) => return Handling::Done(outcome),
            Err(looked_up) => looked_up,
        };
        out.clear();
        let request = match message::parse(query) {
            Parsed::Silence => return Handling::Done(Outcome::Silence),
            Parsed::Rejected(response) => return Handling::Done(reject(response, out)),
            Parsed::Request(request) => request,
        };
        let now = Instant::now();
        if is_transfer(request.record_type()) || !self.0.may_ask(source.address, now) {
            return Handling::Done(reject(request.response(ResponseCode::Refused), out));
        }
        let transport = source.transport;
        let service = Arc::clone(&self.0);
        if self.0.pools.sent.is_own(&request.question.name) {
            tracing::warn!(
                from = %source.address, name = %request.question.name,
                "a query of our own has come back: a DNS server that we ask asks us; name others in resolver.upstream"
            );
            return Handling::Done(reject(request.response(ResponseCode::ServFail), out));
        }
        if service.completer.applies(request.question.name.iter().count()).is_some() {
            return Handling::Later(Box::pin(async move {
                let result = service.complete(&request).await;
                let mut out = Vec::new();
                let outcome = service.write(&request, transport, result, &mut out);
                (outcome, out)
            }));
        }
        let key = Key::of(&request);
        let hit = looked_up.unwrap_or_else(|| self.0.cache().lookup(&key, now));
        match self.0.judge(&request, &key, hit) {
            Ok(answer) => Handling::Done(self.0.write(&request, transport, Ok(answer), out)),
            Err(stale) => Handling::Later(Box::pin(async move {
                let result = service.ask_servers(&request, &key, stale).await;
                let mut out = Vec::new();
                let outcome = service.write(&request, transport, result, &mut out);
                (outcome, out)
            })),
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
    message.metadata.checking_disabled = key.checking_disabled();
    message.add_query(hickory_proto::op::Query::query(key.name(), key.record_type()));
    let mut edns = Edns::new();
    edns.set_max_payload(UDP_CEILING);
    edns.set_dnssec_ok(key.dnssec_ok());
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_changed_is_given_later_than_what_has_merely_expired() {
        let of = |age, failing| patience(Origin::Network, age, failing);
        assert!(of(Age::Outdated, false) > of(Age::Stale, false));
        assert!(of(Age::Outdated, true) > of(Age::Stale, true));
        // Devices' names must not wait for registrars that are away.
        assert_eq!(of(Age::Stale, true), Duration::ZERO);
        // Stub resolvers give up after 5 s, and have to hear of the old answer before.
        assert!(of(Age::Outdated, false) <= CLIENT_PATIENCE);
    }
}
