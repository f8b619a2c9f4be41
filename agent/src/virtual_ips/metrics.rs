//! Metrics of virtual IPs.

use muster_common::telemetry;
use prometheus_client::metrics::{counter::Counter, gauge::Gauge};

/// See the fields.
#[derive(Clone, Debug, Default)]
pub(super) struct Metrics {
    /// Virtual IPs with a port and protocol, in the table.
    pub(super) frontends: Gauge,
    /// How often the table was written whole.
    pub(super) loads: Counter,
    /// How often it was changed.
    pub(super) changes: Counter,
    /// How often neither was possible.
    pub(super) failures: Counter,
}

impl Metrics {
    pub(super) fn register(metrics: &telemetry::Metrics) -> Self {
        let own = Self::default();
        metrics.register(|registry| {
            let help = "Virtual IPs, each with a port and protocol, that this host translates";
            registry.register("virtual_ip_frontends", help, own.frontends.clone());
            let help = "Times that all virtual IPs were written to nftables";
            registry.register("virtual_ip_loads", help, own.loads.clone());
            let help = "Changes of virtual IPs that were written to nftables";
            registry.register("virtual_ip_changes", help, own.changes.clone());
            let help = "Times that nftables did not take virtual IPs or their changes";
            registry.register("virtual_ip_failures", help, own.failures.clone());
        });
        own
    }
}
