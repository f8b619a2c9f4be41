//! What the registry tells of itself at `/metrics`.

use muster_common::telemetry::Metrics;
use prometheus_client::metrics::{counter::Counter, gauge::Gauge};

/// Metrics of one registry.
#[derive(Clone, Debug, Default)]
pub struct RegistryMetrics {
    /// Devices in the index.
    pub devices: Gauge,
    /// Revision that the index shows.
    pub revision: Gauge,
    /// Values in the store that were skipped.
    pub bad_values: Counter,
    /// Transactions committed.
    pub commits: Counter,
    /// Transactions that had to be planned again.
    pub conflicts: Counter,
    /// Seconds since the store last confirmed what is served.
    pub store_age: Gauge,
    /// Times that the watch of the store broke.
    pub watch_failures: Counter,
}

impl RegistryMetrics {
    /// Registers all of them.
    pub fn register(&self, metrics: &Metrics) {
        metrics.register(|registry| {
            registry.register("devices", "Devices in the registry", self.devices.clone());
            registry.register(
                "revision",
                "Revision of the store that is being served",
                self.revision.clone(),
            );
            registry.register(
                "bad_values",
                "Values in the store that cannot be used",
                self.bad_values.clone(),
            );
            registry.register("commits", "Transactions committed", self.commits.clone());
            registry.register(
                "conflicts",
                "Transactions that had to be planned again",
                self.conflicts.clone(),
            );
            let help = "Seconds since the store last confirmed what is served; from 5 on, it is stale";
            registry.register("store_age_seconds", help, self.store_age.clone());
            let help = "Times that following the store failed";
            registry.register("watch_failures", help, self.watch_failures.clone());
        });
    }
}
