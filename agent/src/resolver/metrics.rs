//! What the resolver counts. Names and labels are CoreDNS' (plugins `cache` and `forward`) where the meaning is the same:
//! `cache_hits_total` is `coredns_cache_hits_total` there. A hit looks nothing up.

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use hickory_proto::op::ResponseCode;
use muster_dns::server::metrics::rcode;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

use super::cache::{Cache, Origin};

/// `zones` tells names of the network from all others.
#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Zones {
    server: &'static str,
    zones: &'static str,
    view: &'static str,
}

impl Zones {
    fn of(origin: Origin) -> Self {
        Self { server: "dns://", zones: zones(origin), view: "" }
    }
}

fn zones(origin: Origin) -> &'static str {
    match origin {
        Origin::Network => "network",
        Origin::Upstream => ".",
    }
}

/// `type` is `success`, or `denial` for answers that there is nothing.
#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Types {
    server: &'static str,
    r#type: &'static str,
    zones: &'static str,
    view: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Server {
    proxy_name: &'static str,
    to: String,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Exchange {
    proxy_name: &'static str,
    to: String,
    rcode: &'static str,
}

/// Counters of one origin.
#[derive(Debug)]
struct Counters {
    success: Counter,
    denial: Counter,
    requests: Counter,
    misses: Counter,
    stale: Counter,
    prefetches: Counter,
    failures: Counter,
}

/// The resolver's metrics.
#[derive(Debug)]
pub(super) struct Metrics {
    network: Counters,
    upstream: Counters,
    evictions: Counter,
    successes: Gauge,
    denials: Gauge,
    octets: Gauge,
    rejects: Counter,
    pub(super) forward: Forward,
    queries: AtomicU64,
    cache_hits: AtomicU64,
}

/// What is counted of the servers.
#[derive(Clone, Debug)]
pub(super) struct Forward {
    durations: Family<Exchange, Histogram, fn() -> Histogram>,
    failed_checks: Family<Server, Counter>,
    broken: Counter,
}

impl Forward {
    fn register(registry: &mut Registry) -> Self {
        // CoreDNS' buckets.
        let histogram: fn() -> Histogram = || Histogram::new(exponential_buckets(0.000_25, 2.0, 16));
        let durations = Family::new_with_constructor(histogram);
        let forward = Self { durations, failed_checks: Family::default(), broken: Counter::default() };
        registry.register_with_unit(
            "proxy_request_duration",
            "Time that servers took to answer",
            Unit::Seconds,
            forward.durations.clone(),
        );
        let help = "Servers that had failed and did not answer when asked for a sign of life";
        registry.register("proxy_healthcheck_failures", help, forward.failed_checks.clone());
        let help = "Questions that were sent although all servers were down";
        registry.register("forward_healthcheck_broken", help, forward.broken.clone());
        forward
    }

    /// A server has answered.
    pub(super) fn answered(&self, to: SocketAddr, code: ResponseCode, took: Duration) {
        let labels = Exchange { proxy_name: "forward", to: to.to_string(), rcode: rcode(code) };
        self.durations.get_or_create(&labels).observe(took.as_secs_f64());
    }

    /// A server that had failed still does.
    pub(super) fn check_failed(&self, to: SocketAddr) {
        self.failed_checks.get_or_create(&Server { proxy_name: "forward", to: to.to_string() }).inc();
    }

    /// All servers are down, and are asked all the same.
    pub(super) fn all_down(&self) {
        self.broken.inc();
    }
}

impl Metrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let mut by_zone = |name: &str, help: &str| {
            let family = Family::<Zones, Counter>::default();
            registry.register(name, help, family.clone());
            move |origin| family.get_or_create_owned(&Zones::of(origin))
        };
        let requests = by_zone("cache_requests", "Questions that the cache was asked");
        let misses = by_zone("cache_misses", "Questions that the cache had no answer to");
        let stale = by_zone("cache_served_stale", "Stale answers from the cache");
        let prefetches =
            by_zone("cache_prefetch", "Answers in use that were fetched anew before they expired");
        let failures = by_zone("forward_failures", "Questions that no server answered");
        let hits = Family::<Types, Counter>::default();
        registry.register("cache_hits", "Answers from the cache", hits.clone());
        let hits = |origin, r#type| {
            let labels = Types { server: "dns://", r#type, zones: zones(origin), view: "" };
            hits.get_or_create_owned(&labels)
        };
        let counters = |origin| Counters {
            success: hits(origin, "success"),
            denial: hits(origin, "denial"),
            requests: requests(origin),
            misses: misses(origin),
            stale: stale(origin),
            prefetches: prefetches(origin),
            failures: failures(origin),
        };
        let (network, upstream) = (counters(Origin::Network), counters(Origin::Upstream));
        let (evictions, rejects, octets) = (Counter::default(), Counter::default(), Gauge::default());
        let entries = Family::<Types, Gauge>::default();
        registry.register("cache_entries", "Answers in the cache", entries.clone());
        let entries = |r#type| {
            let labels = Types { server: "dns://", r#type, zones: ".", view: "" };
            entries.get_or_create_owned(&labels)
        };
        registry.register("cache_size_bytes", "Size of the cache", octets.clone());
        let help = "Answers that had to give way to others in the cache";
        registry.register("cache_evictions", help, evictions.clone());
        let help = "Questions refused because too many were under way";
        registry.register("forward_max_concurrent_rejects", help, rejects.clone());
        Self {
            network,
            upstream,
            evictions,
            successes: entries("success"),
            denials: entries("denial"),
            octets,
            rejects,
            forward: Forward::register(registry),
            queries: AtomicU64::new(0),
            cache_hits: AtomicU64::new(0),
        }
    }

    fn counters(&self, origin: Origin) -> &Counters {
        match origin {
            Origin::Network => &self.network,
            Origin::Upstream => &self.upstream,
        }
    }

    /// A question whose answer was in the cache; or that there is nothing, if that is `negative`.
    pub(super) fn hit(&self, origin: Origin, negative: bool) {
        self.queries.fetch_add(1, Ordering::Relaxed);
        self.cache_hits.fetch_add(1, Ordering::Relaxed);
        let counters = self.counters(origin);
        counters.requests.inc();
        if negative {
            counters.denial.inc()
        } else {
            counters.success.inc()
        };
    }

    /// A question that servers had to be asked for.
    pub(super) fn miss(&self, origin: Origin) {
        self.queries.fetch_add(1, Ordering::Relaxed);
        let counters = self.counters(origin);
        counters.requests.inc();
        counters.misses.inc();
    }

    /// An answer that was given although it holds no longer.
    pub(super) fn served_stale(&self, origin: Origin) {
        self.counters(origin).stale.inc();
    }

    /// An answer that is fetched anew before it expires.
    pub(super) fn prefetched(&self, origin: Origin) {
        self.counters(origin).prefetches.inc();
    }

    /// A question that no server answered.
    pub(super) fn failure(&self, origin: Origin) {
        self.counters(origin).failures.inc();
    }

    /// A question for which there was no room.
    pub(super) fn rejected(&self) {
        self.rejects.inc();
    }

    /// The cache has changed.
    pub(super) fn measure(&self, cache: &Cache) {
        let gauge = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        self.denials.set(gauge(cache.negatives()));
        self.successes.set(gauge(cache.len().saturating_sub(cache.negatives())));
        self.octets.set(gauge(cache.octets()));
        self.evictions.inc_by(cache.evictions().saturating_sub(self.evictions.get()));
    }

    /// Questions, and those of them that the cache answered.
    pub(super) fn totals(&self) -> (u64, u64) {
        (self.queries.load(Ordering::Relaxed), self.cache_hits.load(Ordering::Relaxed))
    }
}
