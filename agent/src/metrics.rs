//! The agent's metrics, beside those of its resolver.

use std::sync::atomic::AtomicU64;

use muster_common::telemetry::Metrics as Registries;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
};

use crate::{
    control::{Control, LookupResult},
    datapath::Snapshot,
};

/// Handles to all of them.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    connected: Gauge,
    peers: Gauge,
    lookups_pending: Gauge,
    attempts: Counter,
    lookups: Family<LookupLabels, Counter>,
    certificate_expiry: Gauge,
    packets: Family<TrafficLabels, Counter<u64, AtomicU64>>,
    bytes: Family<TrafficLabels, Counter<u64, AtomicU64>>,
    drops: Family<DropLabels, Counter<u64, AtomicU64>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LookupLabels {
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TrafficLabels {
    side: &'static str,
    direction: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DropLabels {
    reason: &'static str,
}

impl Metrics {
    /// Registers all.
    pub fn register(registries: &Registries) -> Self {
        let m = Self::default();
        registries.register(|registry| {
            registry.register("registrar_connected", "1 while a session is open", m.connected.clone());
            registry.register("registrar_attempts", "Attempts to connect to a registrar", m.attempts.clone());
            registry.register("peers", "Peers held", m.peers.clone());
            registry.register(
                "lookups_pending",
                "Lookups wanted and not answered",
                m.lookups_pending.clone(),
            );
            registry.register("lookups", "Lookups answered, by result", m.lookups.clone());
            let expiry = "When the certificate expires, in seconds since the epoch";
            registry.register("certificate_expiry_seconds", expiry, m.certificate_expiry.clone());
            let packets = "Packets, at the host's side (tun) and the network's (udp)";
            registry.register("datapath_packets", packets, m.packets.clone());
            let bytes = "Octets, at the host's side (tun) and the network's (udp)";
            registry.register("datapath_bytes", bytes, m.bytes.clone());
            registry.register("datapath_drops", "Packets dropped, by reason", m.drops.clone());
        });
        m
    }

    /// A registrar is tried.
    pub fn attempt(&self) {
        self.attempts.inc();
    }

    /// A lookup has been answered.
    pub fn looked_up(&self, result: &LookupResult) {
        let result = match result {
            LookupResult::Found(_) => "found",
            LookupResult::NotFound => "not_found",
            LookupResult::Unavailable => "unavailable",
        };
        self.lookups.get_or_create(&LookupLabels { result }).inc();
    }

    /// The certificate in use expires then.
    pub fn certificate_expiry(&self, unix_seconds: u64) {
        self.certificate_expiry.set(i64::try_from(unix_seconds).unwrap_or(i64::MAX));
    }

    /// The core as it is now.
    pub fn control(&self, control: &Control) {
        self.connected.set(control.is_connected().into());
        self.peers.set(i64::try_from(control.peers().count()).unwrap_or(i64::MAX));
        self.lookups_pending.set(i64::try_from(control.lookups().0).unwrap_or(i64::MAX));
    }

    /// The data plane as it is now.
    pub fn datapath(&self, snapshot: &Snapshot) {
        use std::sync::atomic::Ordering::Relaxed;
        let all = [
            ("tun", "received", snapshot.tun_received),
            ("tun", "sent", snapshot.tun_sent),
            ("udp", "received", snapshot.udp_received),
            ("udp", "sent", snapshot.udp_sent),
        ];
        for (side, direction, counter) in all {
            let labels = TrafficLabels { side, direction };
            self.packets.get_or_create(&labels).inner().store(counter.packets, Relaxed);
            self.bytes.get_or_create(&labels).inner().store(counter.bytes, Relaxed);
        }
        for (reason, count) in &snapshot.drops {
            self.drops.get_or_create(&DropLabels { reason }).inner().store(*count, Relaxed);
        }
    }
}
