//! What is counted when somebody asks: addresses of pools, and when certificates expire.

use std::{
    fmt,
    sync::{
        Arc, Weak,
        atomic::{AtomicI64, Ordering},
    },
};

use muster_common::{telemetry::Metrics, time::Timestamp};
use prometheus_client::{collector::Collector, encoding::DescriptorEncoder, metrics::MetricType};

use crate::{allocation::Counts, ca::SharedCa, registry::Registry};

/// Has pools and certificates told at `/metrics`. `own` is when the registrar's own certificate expires.
pub(super) fn register(metrics: &Metrics, registry: &Arc<Registry>, ca: &Arc<SharedCa>, own: Arc<AtomicI64>) {
    let state = State { registry: Arc::downgrade(registry), ca: ca.clone(), own };
    metrics.register(|metrics| metrics.register_collector(Box::new(state)));
}

#[derive(Debug)]
struct State {
    registry: Weak<Registry>,
    ca: Arc<SharedCa>,
    own: Arc<AtomicI64>,
}

impl Collector for State {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let help = "When certificates of the registrar's expire, in Unix time";
        let mut expiry =
            encoder.encode_descriptor("certificate_expiry_seconds", help, None, MetricType::Gauge)?;
        let ca = i64::try_from(self.ca.current().expiry().unix_seconds()).unwrap_or(i64::MAX);
        for (certificate, at) in [("ca", ca), ("registrar", self.own.load(Ordering::Relaxed))] {
            expiry.encode_family(&[("certificate", certificate)])?.encode_gauge(&at)?;
        }

        let help = "Addresses of the networks' pools";
        let mut addresses = encoder.encode_descriptor("pool_addresses", help, None, MetricType::Gauge)?;
        for (network, pool, counts) in self.pools() {
            for (state, count) in [
                ("free", i64::try_from(counts.free).unwrap_or(i64::MAX)),
                ("reserved", i64::try_from(counts.reserved).unwrap_or(i64::MAX)),
                ("used", i64::try_from(counts.used).unwrap_or(i64::MAX)),
                ("quarantined", i64::try_from(counts.quarantined).unwrap_or(i64::MAX)),
            ] {
                let labels = [("network", &*network), ("pool", &*pool), ("state", state)];
                addresses.encode_family(&labels)?.encode_gauge(&count)?;
            }
        }
        Ok(())
    }
}

impl State {
    /// Counted under the lock, written without it.
    fn pools(&self) -> Vec<(Arc<str>, String, Counts)> {
        let Some(registry) = self.registry.upgrade() else { return Vec::new() };
        let now = Timestamp::now();
        let index = registry.read();
        let mut all = Vec::new();
        for state in index.networks() {
            for (kind, pool) in state.pools() {
                all.push((state.network.name.clone(), kind.to_string(), pool.counts(now)));
            }
        }
        all
    }
}
