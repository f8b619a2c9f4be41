//! What the listeners count, with the names and labels that CoreDNS has for the same things, so that its
//! dashboards fit: `dns_requests_total` is `coredns_dns_requests_total` there.

use std::{borrow::Cow, net::SocketAddr, sync::Arc, time::Duration};

use hickory_proto::{op::ResponseCode, rr::RecordType};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

use super::Source;
use crate::{engine::Outcome, message::Transport};

/// Every label set begins with these: the listener, and two that CoreDNS uses where it serves zones apart.
#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Server {
    server: Arc<str>,
    zone: &'static str,
    view: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Request {
    #[prometheus(flatten)]
    server: Server,
    proto: &'static str,
    family: &'static str,
    r#type: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Typed {
    #[prometheus(flatten)]
    server: Server,
    r#type: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Sized {
    #[prometheus(flatten)]
    server: Server,
    proto: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Response {
    #[prometheus(flatten)]
    server: Server,
    rcode: Cow<'static, str>,
    plugin: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Dropped {
    server: Arc<str>,
    reason: &'static str,
}

type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

/// The metrics of all listeners of a component.
#[derive(Clone, Debug)]
pub struct Metrics {
    requests: Family<Request, Counter>,
    request_sizes: Histograms<Sized>,
    response_sizes: Histograms<Sized>,
    durations: Histograms<Typed>,
    responses: Family<Response, Counter>,
    dropped: Family<Dropped, Counter>,
    connections: Family<Sized, Gauge>,
}

impl Metrics {
    /// Registers the metrics.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            requests: Family::default(),
            request_sizes: Family::new_with_constructor(sizes),
            response_sizes: Family::new_with_constructor(sizes),
            durations: Family::new_with_constructor(durations),
            responses: Family::default(),
            dropped: Family::default(),
            connections: Family::default(),
        };
        registry.register("dns_requests", "DNS queries", metrics.requests.clone());
        registry.register_with_unit(
            "dns_request_size",
            "Size of DNS queries",
            Unit::Bytes,
            metrics.request_sizes.clone(),
        );
        registry.register_with_unit(
            "dns_response_size",
            "Size of DNS responses",
            Unit::Bytes,
            metrics.response_sizes.clone(),
        );
        registry.register_with_unit(
            "dns_request_duration",
            "Time from query to response",
            Unit::Seconds,
            metrics.durations.clone(),
        );
        registry.register("dns_responses", "DNS responses, by response code", metrics.responses.clone());
        registry.register(
            "dns_dropped",
            "DNS queries and connections that were dropped, by reason",
            metrics.dropped.clone(),
        );
        registry.register("dns_connections", "Open DNS connections", metrics.connections.clone());
        metrics
    }

    /// The metrics of one listener.
    pub(super) fn listener(&self, transport: Transport, address: SocketAddr) -> Listener {
        let scheme = if transport == Transport::Tls { "tls" } else { "dns" };
        let bind = if address.ip().is_unspecified() { String::new() } else { address.ip().to_string() };
        let bind = if bind.contains(':') { format!("[{bind}]") } else { bind };
        let server: Arc<str> = format!("{scheme}://{bind}:{}", address.port()).into();
        let server = Server { server, zone: ".", view: "" };
        let proto = if transport == Transport::Udp { "udp" } else { "tcp" };
        let sized = Sized { server: server.clone(), proto };
        Listener {
            request_sizes: self.request_sizes.get_or_create_owned(&sized),
            response_sizes: self.response_sizes.get_or_create_owned(&sized),
            connections: self.connections.get_or_create_owned(&sized),
            metrics: self.clone(),
            server,
            proto,
        }
    }
}

/// The metrics of one listener.
#[derive(Clone, Debug)]
pub(super) struct Listener {
    metrics: Metrics,
    server: Server,
    proto: &'static str,
    request_sizes: Histogram,
    response_sizes: Histogram,
    pub(super) connections: Gauge,
}

impl Listener {
    /// Counts a query that has been handled, and its response of `response` octets.
    pub(super) fn handled(
        &self,
        source: &Source,
        outcome: Outcome,
        query: usize,
        response: usize,
        took: Duration,
    ) {
        let Outcome::Response { code, record_type } = outcome else { return self.dropped("malformed") };
        let family = if source.address.is_ipv4() { "1" } else { "2" };
        let (server, kind) = (self.server.clone(), type_name(record_type));
        let request = Request { server: server.clone(), proto: self.proto, family, r#type: kind };
        self.metrics.requests.get_or_create(&request).inc();
        self.request_sizes.observe(octets(query));
        self.response_sizes.observe(octets(response));
        let typed = Typed { server: server.clone(), r#type: kind };
        self.metrics.durations.get_or_create(&typed).observe(took.as_secs_f64());
        let response = Response { server, rcode: code_name(code), plugin: "muster" };
        self.metrics.responses.get_or_create(&response).inc();
    }

    /// Counts a query or a connection that was dropped.
    pub(super) fn dropped(&self, reason: &'static str) {
        let dropped = Dropped { server: Arc::clone(&self.server.server), reason };
        self.metrics.dropped.get_or_create(&dropped).inc();
    }
}

fn sizes() -> Histogram {
    const BOUNDS: [f64; 12] = [100., 200., 300., 400., 511., 1023., 2047., 4095., 8291., 16e3, 32e3, 64e3];
    Histogram::new([0.].into_iter().chain(BOUNDS))
}

fn durations() -> Histogram {
    // 250 µs, doubled 15 times.
    Histogram::new((0..16).map(|i| 0.000_25 * f64::from(1_u32 << i)))
}

fn octets(n: usize) -> f64 {
    f64::from(u32::try_from(n).unwrap_or(u32::MAX))
}

/// The types that are counted apart; all others are `other`, so that no client can add to the metrics.
fn type_name(record_type: Option<RecordType>) -> &'static str {
    match record_type {
        Some(RecordType::A) => "A",
        Some(RecordType::AAAA) => "AAAA",
        Some(RecordType::MX) => "MX",
        Some(RecordType::SOA) => "SOA",
        Some(RecordType::CNAME) => "CNAME",
        Some(RecordType::PTR) => "PTR",
        Some(RecordType::TXT) => "TXT",
        Some(RecordType::NS) => "NS",
        Some(RecordType::SRV) => "SRV",
        Some(RecordType::SVCB) => "SVCB",
        Some(RecordType::HTTPS) => "HTTPS",
        Some(RecordType::DS) => "DS",
        Some(RecordType::DNSKEY) => "DNSKEY",
        Some(RecordType::IXFR) => "IXFR",
        Some(RecordType::AXFR) => "AXFR",
        Some(RecordType::ANY) => "ANY",
        _ => "other",
    }
}

fn code_name(code: ResponseCode) -> Cow<'static, str> {
    match code {
        ResponseCode::NoError => "NOERROR".into(),
        ResponseCode::FormErr => "FORMERR".into(),
        ResponseCode::ServFail => "SERVFAIL".into(),
        ResponseCode::NXDomain => "NXDOMAIN".into(),
        ResponseCode::NotImp => "NOTIMP".into(),
        ResponseCode::Refused => "REFUSED".into(),
        ResponseCode::BADVERS => "BADVERS".into(),
        other => u16::from(other).to_string().into(),
    }
}
