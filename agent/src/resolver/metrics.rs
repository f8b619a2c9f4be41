//! What the resolver counts. Names and labels are CoreDNS' (plugin `cache`) where the meaning is the same.

use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use super::cache::Origin;

/// `zones` tells names of the network from all others.
#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Zones {
    server: &'static str,
    zones: &'static str,
    view: &'static str,
}

impl Zones {
    fn of(origin: Origin) -> Self {
        let zones = match origin {
            Origin::Network => "network",
            Origin::Upstream => ".",
        };
        Self { server: "dns://", zones, view: "" }
    }
}

/// The resolver's metrics.
#[derive(Debug)]
pub(super) struct Metrics {
    hits: Family<Zones, Counter>,
    misses: Family<Zones, Counter>,
    stale: Family<Zones, Counter>,
    failures: Family<Zones, Counter>,
    pub(super) entries: Gauge,
    pub(super) octets: Gauge,
    queries: AtomicU64,
    cache_hits: AtomicU64,
}

impl Metrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            hits: Family::default(),
            misses: Family::default(),
            stale: Family::default(),
            failures: Family::default(),
            entries: Gauge::default(),
            octets: Gauge::default(),
            queries: AtomicU64::new(0),
            cache_hits: AtomicU64::new(0),
        };
        registry.register("cache_hits", "Answers from the cache", metrics.hits.clone());
        registry.register(
            "cache_misses",
            "Questions that the cache had no answer to",
            metrics.misses.clone(),
        );
        registry.register("cache_served_stale", "Stale answers from the cache", metrics.stale.clone());
        registry.register("forward_failures", "Questions that no server answered", metrics.failures.clone());
        registry.register("cache_entries", "Answers in the cache", metrics.entries.clone());
        registry.register("cache_size_bytes", "Size of the cache", metrics.octets.clone());
        metrics
    }

    /// A question whose answer was in the cache.
    pub(super) fn hit(&self, origin: Origin) {
        self.queries.fetch_add(1, Ordering::Relaxed);
        self.cache_hits.fetch_add(1, Ordering::Relaxed);
        self.hits.get_or_create(&Zones::of(origin)).inc();
    }

    /// A question that servers had to be asked for.
    pub(super) fn miss(&self, origin: Origin) {
        self.queries.fetch_add(1, Ordering::Relaxed);
        self.misses.get_or_create(&Zones::of(origin)).inc();
    }

    /// An answer that was given although it holds no longer.
    pub(super) fn served_stale(&self, origin: Origin) {
        self.stale.get_or_create(&Zones::of(origin)).inc();
    }

    /// A question that no server answered.
    pub(super) fn failure(&self, origin: Origin) {
        self.failures.get_or_create(&Zones::of(origin)).inc();
    }

    /// Questions, and those of them that the cache answered.
    pub(super) fn totals(&self) -> (u64, u64) {
        (self.queries.load(Ordering::Relaxed), self.cache_hits.load(Ordering::Relaxed))
    }
}
