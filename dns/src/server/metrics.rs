//! What the listeners count, with the names and labels that CoreDNS has for the same things, so that its
//! dashboards fit: `dns_requests_total` is `coredns_dns_requests_total` there. Counting takes no lock and looks
//! nothing up; sums are made when they are read.

use std::{
    fmt,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use hickory_proto::{op::ResponseCode, rr::RecordType};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::{Registry, Unit},
};

use crate::{engine::Outcome, message::Transport};

/// The types that are counted apart; all others are the last, so that no client can add to the metrics.
const TYPES: [&str; 17] = [
    "A", "AAAA", "MX", "SOA", "CNAME", "PTR", "TXT", "NS", "SRV", "SVCB", "HTTPS", "DS", "DNSKEY", "IXFR",
    "AXFR", "ANY", "other",
];
/// Response codes up to the last one assigned (RFC 6895), and all others.
const CODES: usize = 25;
/// Upper bounds of sizes, in octets.
const SIZES: [u32; 13] = [0, 100, 200, 300, 400, 511, 1023, 2047, 4095, 8291, 16_000, 32_000, 64_000];
/// Upper bounds of durations: 250 µs, doubled so often.
const DURATIONS: usize = 16;
const SHORTEST: u64 = 250_000;

/// Why something was dropped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Reason {
    /// Not a query, or none that could be answered.
    Malformed,
    /// Over the rate of its source.
    Rate,
    /// Too many queries whose answer takes time.
    Busy,
    /// Too many connections.
    Connections,
}

const REASONS: [&str; 4] = ["malformed", "rate", "busy", "connections"];

// Where in a part's counters what is counted. A histogram has its buckets, that without a bound last, and then its
// sum: octets, or nanoseconds.
const SIZE_CELLS: usize = SIZES.len() + 2;
const DURATION_CELLS: usize = DURATIONS + 2;
const REQUESTS: usize = 0;
const REQUEST_SIZES: usize = REQUESTS + 2 * TYPES.len();
const RESPONSE_SIZES: usize = REQUEST_SIZES + SIZE_CELLS;
const TOOK: usize = RESPONSE_SIZES + SIZE_CELLS;
const RESPONSES: usize = TOOK + TYPES.len() * DURATION_CELLS;
const DROPPED: usize = RESPONSES + CODES;
const CONNECTIONS: usize = DROPPED + REASONS.len();
const CELLS: usize = CONNECTIONS + 1;

/// Counters of one listener, or of one of its threads.
struct Part {
    server: Arc<str>,
    proto: &'static str,
    /// Whether a single thread writes, which then needs no atomic additions.
    sole: bool,
    cells: [AtomicU64; CELLS],
}

impl Part {
    fn add(&self, cell: usize, n: u64) {
        let Some(cell) = self.cells.get(cell) else { return };
        if self.sole {
            cell.store(cell.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
        } else {
            cell.fetch_add(n, Ordering::Relaxed);
        }
    }
}

/// The metrics of all listeners of a component.
#[derive(Clone, Default)]
pub struct Metrics(Arc<Mutex<Vec<Arc<Part>>>>);

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

impl Metrics {
    /// Registers the metrics.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register_collector(Box::new(metrics.clone()));
        metrics
    }

    /// The metrics of one listener, for any number of threads.
    pub(super) fn listener(&self, transport: Transport, address: SocketAddr) -> Listener {
        self.part(transport, address, false)
    }

    /// Likewise for one thread, which alone may count with what it gets.
    pub(super) fn sole_listener(&self, transport: Transport, address: SocketAddr) -> Listener {
        self.part(transport, address, true)
    }

    fn part(&self, transport: Transport, address: SocketAddr, sole: bool) -> Listener {
        let scheme = if transport == Transport::Tls { "tls" } else { "dns" };
        let bind = if address.ip().is_unspecified() { String::new() } else { address.ip().to_string() };
        let bind = if bind.contains(':') { format!("[{bind}]") } else { bind };
        let server = format!("{scheme}://{bind}:{}", address.port()).into();
        let proto = if transport == Transport::Udp { "udp" } else { "tcp" };
        let part = Arc::new(Part { server, proto, sole, cells: [const { AtomicU64::new(0) }; CELLS] });
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&part));
        Listener(part)
    }

    /// The sums of all parts of each listener, in the order in which they came.
    fn sums(&self) -> Vec<Sums> {
        let mut all: Vec<Sums> = Vec::new();
        for part in &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            let known = all.iter().position(|sums| (&sums.server, sums.proto) == (&part.server, part.proto));
            let known = known.unwrap_or_else(|| {
                all.push(Sums { server: Arc::clone(&part.server), proto: part.proto, cells: [0; CELLS] });
                all.len() - 1
            });
            for (sum, cell) in all.get_mut(known).into_iter().flat_map(|s| &mut s.cells).zip(&part.cells) {
                *sum = sum.wrapping_add(cell.load(Ordering::Relaxed));
            }
        }
        all
    }
}

/// Queries of each type in a batch, whose duration will be known at its end.
#[derive(Default, Debug)]
pub(super) struct Tally {
    types: [u32; TYPES.len()],
}

/// The metrics of one listener.
#[derive(Clone)]
pub(super) struct Listener(Arc<Part>);

impl Listener {
    /// Counts a query of `query` octets that has been handled, and its response of `response` octets. What it took
    /// is for [`Self::took`] to say.
    pub(super) fn handled(
        &self,
        v4: bool,
        outcome: Outcome,
        query: usize,
        response: usize,
        tally: &mut Tally,
    ) {
        let Outcome::Response { code, record_type } = outcome else { return self.dropped(Reason::Malformed) };
        let kind = type_index(record_type);
        self.0.add(REQUESTS + if v4 { kind } else { TYPES.len() + kind }, 1);
        for (cells, octets) in [(REQUEST_SIZES, query), (RESPONSE_SIZES, response)] {
            let bucket = SIZES.iter().position(|bound| octets <= *bound as usize).unwrap_or(SIZES.len());
            self.0.add(cells + bucket, 1);
            self.0.add(cells + SIZE_CELLS - 1, octets as u64);
        }
        self.0.add(RESPONSES + usize::from(u16::from(code)).min(CODES - 1), 1);
        if let Some(count) = tally.types.get_mut(kind) {
            *count += 1;
        }
    }

    /// Says how long the queries in `tally` took, and empties it.
    pub(super) fn took(&self, tally: &mut Tally, took: Duration) {
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let bucket = (0..DURATIONS).find(|i| nanoseconds <= SHORTEST << i).unwrap_or(DURATIONS);
        for (kind, count) in tally.types.iter_mut().enumerate().filter(|(_, count)| **count > 0) {
            let (cells, n) = (TOOK + kind * DURATION_CELLS, u64::from(std::mem::take(count)));
            self.0.add(cells + bucket, n);
            self.0.add(cells + DURATION_CELLS - 1, n.saturating_mul(nanoseconds));
        }
    }

    /// Counts a query or a connection that was dropped.
    pub(super) fn dropped(&self, reason: Reason) {
        self.0.add(DROPPED + reason as usize, 1);
    }

    /// Counts a connection, until what is returned is dropped.
    pub(super) fn connected(&self) -> Connected {
        self.0.add(CONNECTIONS, 1);
        Connected(self.clone())
    }
}

/// An open connection.
pub(super) struct Connected(Listener);

impl Drop for Connected {
    fn drop(&mut self) {
        self.0.0.add(CONNECTIONS, u64::MAX);
    }
}

/// What one listener has counted.
struct Sums {
    server: Arc<str>,
    proto: &'static str,
    cells: [u64; CELLS],
}

type Labels<'a> = Vec<(&'a str, &'a str)>;

impl Sums {
    fn get(&self, cell: usize) -> u64 {
        self.cells.get(cell).copied().unwrap_or(0)
    }

    /// Every label set begins with the listener, and two that CoreDNS uses where it serves zones apart.
    fn labels<'a>(&'a self, more: &[(&'a str, &'a str)]) -> Labels<'a> {
        [&[("server", &*self.server), ("zone", "."), ("view", "")], more].concat()
    }

    /// Buckets and sum of the histogram at `cells`.
    fn histogram(&self, cells: usize, bounds: impl Iterator<Item = f64>, unit: f64) -> Observed {
        let bounds: Vec<f64> = bounds.chain([f64::INFINITY]).collect();
        let sum = self.get(cells + bounds.len()) as f64 * unit;
        Observed {
            sum,
            buckets: (cells..).zip(bounds).map(|(cell, bound)| (bound, self.get(cell))).collect(),
        }
    }
}

struct Observed {
    sum: f64,
    buckets: Vec<(f64, u64)>,
}

impl Observed {
    fn count(&self) -> u64 {
        self.buckets.iter().map(|(_, count)| count).sum()
    }
}

impl EncodeMetric for Observed {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        encoder.encode_histogram::<NoLabelSet>(self.sum, self.count(), &self.buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let all = self.sums();
        // UDP and TCP at one address are one server where no label tells them apart.
        let mut servers: Vec<Sums> = Vec::new();
        for sums in &all {
            match servers.iter_mut().find(|server| server.server == sums.server) {
                Some(server) => {
                    server.cells.iter_mut().zip(sums.cells).for_each(|(a, b)| *a = a.wrapping_add(b));
                }
                None => {
                    let (server, cells) = (Arc::clone(&sums.server), sums.cells);
                    servers.push(Sums { server, proto: sums.proto, cells });
                }
            }
        }
        let octets = || SIZES.into_iter().map(f64::from);
        let seconds = || (0..DURATIONS).map(|i| (SHORTEST << i) as f64 / 1e9);

        let mut requests = Vec::new();
        for sums in &all {
            for (family, cells) in [("1", REQUESTS), ("2", REQUESTS + TYPES.len())] {
                for (cell, kind) in (cells..).zip(TYPES).filter(|(cell, _)| sums.get(*cell) > 0) {
                    let labels = [("proto", sums.proto), ("family", family), ("type", kind)];
                    requests.push((sums.labels(&labels), ConstCounter::new(sums.get(cell))));
                }
            }
        }
        family(&mut encoder, "dns_requests", "DNS queries.", None, &requests)?;
        for (name, help, cells) in [
            ("dns_request_size", "Size of DNS queries.", REQUEST_SIZES),
            ("dns_response_size", "Size of DNS responses.", RESPONSE_SIZES),
        ] {
            let of =
                |sums| (Sums::labels(sums, &[("proto", sums.proto)]), sums.histogram(cells, octets(), 1.));
            family(&mut encoder, name, help, Some(Unit::Bytes), &all.iter().map(of).collect::<Vec<_>>())?;
        }
        let (mut durations, mut responses, mut dropped) = (Vec::new(), Vec::new(), Vec::new());
        for server in &servers {
            for (number, kind) in TYPES.into_iter().enumerate() {
                let took = server.histogram(TOOK + number * DURATION_CELLS, seconds(), 1e-9);
                if took.count() > 0 {
                    durations.push((server.labels(&[("type", kind)]), took));
                }
            }
            for code in (0..CODES).filter(|code| server.get(RESPONSES + code) > 0) {
                let labels = server.labels(&[("rcode", code_name(code)), ("plugin", "muster")]);
                responses.push((labels, ConstCounter::new(server.get(RESPONSES + code))));
            }
            for (cell, reason) in (DROPPED..).zip(REASONS).filter(|(cell, _)| server.get(*cell) > 0) {
                let labels = vec![("server", &*server.server), ("reason", reason)];
                dropped.push((labels, ConstCounter::new(server.get(cell))));
            }
        }
        let took = "Time from query to response.";
        family(&mut encoder, "dns_request_duration", took, Some(Unit::Seconds), &durations)?;
        family(&mut encoder, "dns_responses", "DNS responses, by response code.", None, &responses)?;
        let help = "DNS queries and connections that were dropped, by reason.";
        family(&mut encoder, "dns_dropped", help, None, &dropped)?;
        let of = |sums: &Sums| sums.get(CONNECTIONS).cast_signed();
        let open = all.iter().map(|sums| (sums.labels(&[("proto", sums.proto)]), ConstGauge::new(of(sums))));
        family(&mut encoder, "dns_connections", "Open DNS connections.", None, &open.collect::<Vec<_>>())
    }
}

/// Encodes metrics of one name, unless there are none.
fn family<M: EncodeMetric>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    unit: Option<Unit>,
    metrics: &[(Labels<'_>, M)],
) -> fmt::Result {
    let Some((_, first)) = metrics.first() else { return Ok(()) };
    let mut encoder = encoder.encode_descriptor(name, help, unit.as_ref(), first.metric_type())?;
    metrics.iter().try_for_each(|(labels, metric)| metric.encode(encoder.encode_family(&labels.as_slice())?))
}

fn type_index(record_type: Option<RecordType>) -> usize {
    match record_type {
        Some(RecordType::A) => 0,
        Some(RecordType::AAAA) => 1,
        Some(RecordType::MX) => 2,
        Some(RecordType::SOA) => 3,
        Some(RecordType::CNAME) => 4,
        Some(RecordType::PTR) => 5,
        Some(RecordType::TXT) => 6,
        Some(RecordType::NS) => 7,
        Some(RecordType::SRV) => 8,
        Some(RecordType::SVCB) => 9,
        Some(RecordType::HTTPS) => 10,
        Some(RecordType::DS) => 11,
        Some(RecordType::DNSKEY) => 12,
        Some(RecordType::IXFR) => 13,
        Some(RecordType::AXFR) => 14,
        Some(RecordType::ANY) => 15,
        _ => 16,
    }
}

/// The name of a response code in labels, as CoreDNS has it (RFC 6895's mnemonics); `other` for one that is not assigned.
pub fn rcode(code: ResponseCode) -> &'static str {
    code_name(usize::from(u16::from(code)))
}

fn code_name(code: usize) -> &'static str {
    const NAMES: [&str; CODES] = [
        "NOERROR", "FORMERR", "SERVFAIL", "NXDOMAIN", "NOTIMP", "REFUSED", "6", "7", "8", "9", "10", "11",
        "12", "13", "14", "15", "BADVERS", "17", "18", "19", "20", "21", "22", "23", "other",
    ];
    NAMES.get(code).copied().unwrap_or("other")
}
