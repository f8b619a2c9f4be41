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
    calls: Family<TrafficLabels, Counter<u64, AtomicU64>>,
    drops: Family<DropLabels, Counter<u64, AtomicU64>>,
    queued: Gauge,
    offload: Family<OffloadLabels, Gauge>,
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

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OffloadLabels {
    name: &'static str,
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
            let calls =
                "System calls that moved these packets: reads and writes (tun), receives and sends (udp)";
            registry.register("datapath_calls", calls, m.calls.clone());
            registry.register("datapath_drops", "Packets dropped, by reason", m.drops.clone());
            let queued = "Packets that wait for a session with their peer";
            registry.register("datapath_queued_packets", queued, m.queued.clone());
            registry.register(
                "offload",
                "1 for an offload of the kernel's that is in use",
                m.offload.clone(),
            );
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
            self.calls.get_or_create(&labels).inner().store(counter.calls, Relaxed);
        }
        for (reason, count) in &snapshot.drops {
            self.drops.get_or_create(&DropLabels { reason }).inner().store(*count, Relaxed);
        }
        let queued: usize = snapshot.peers.values().map(|peer| peer.queued).sum();
        self.queued.set(i64::try_from(queued).unwrap_or(i64::MAX));
        for (name, in_use) in snapshot.offloads.named() {
            self.offload.get_or_create(&OffloadLabels { name }).set(in_use.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::datapath::{Counter, Offloads, PeerSnapshot};

    /// Where the metrics are documented.
    const OPERATING: &str = include_str!("../../docs/operating.md");

    #[test]
    fn the_data_plane_is_told_of_without_a_label_for_each_peer() {
        let peers = (0..100u8).map(|n| ([n; 32], PeerSnapshot { queued: 2, ..PeerSnapshot::default() }));
        let mut snapshot = Snapshot {
            peers: peers.collect(),
            udp_sent: Counter { packets: 40, bytes: 4_000, calls: 2 },
            offloads: Offloads { tun_tso: true, ..Offloads::default() },
            drops: BTreeMap::from([("no_route", 3), ("replayed", 0)]),
            ..Snapshot::default()
        };
        let registries = Registries::with_prefix("muster_agent");
        let metrics = Metrics::register(&registries);
        metrics.datapath(&snapshot);
        let text = registries.encode();
        for line in [
            "muster_agent_datapath_packets_total{side=\"udp\",direction=\"sent\"} 40\n",
            "muster_agent_datapath_bytes_total{side=\"udp\",direction=\"sent\"} 4000\n",
            "muster_agent_datapath_calls_total{side=\"udp\",direction=\"sent\"} 2\n",
            "muster_agent_datapath_drops_total{reason=\"no_route\"} 3\n",
            "muster_agent_datapath_drops_total{reason=\"replayed\"} 0\n",
            "muster_agent_datapath_queued_packets 200\n",
            "muster_agent_offload{name=\"tun_tso\"} 1\n",
            "muster_agent_offload{name=\"udp_gro\"} 0\n",
        ] {
            assert!(text.contains(line), "{line}{text}");
        }
        assert!(text.lines().count() < 70, "{text}");
        // The kernel refuses, after all.
        snapshot.offloads.tun_tso = false;
        metrics.datapath(&snapshot);
        assert!(registries.encode().contains("muster_agent_offload{name=\"tun_tso\"} 0\n"));
    }

    #[test]
    fn every_metric_offload_and_reason_is_documented() {
        let registries = Registries::with_prefix("muster_agent");
        let _metrics = Metrics::register(&registries);
        let chapter =
            OPERATING.split("\nAgent, each with the prefix").nth(1).unwrap().split("\n## ").next().unwrap();
        let text = registries.encode();
        let names =
            text.lines().filter_map(|line| line.strip_prefix("# TYPE muster_agent_")?.split_once(' '));
        for (name, kind) in names {
            let name = if kind == "counter" { format!("{name}_total") } else { name.to_owned() };
            assert!(chapter.contains(&format!("`{name}")), "{name}");
        }
        let reasons = muster_tunnel::Dropped::ALL.iter().map(|reason| reason.as_str());
        for name in Offloads::default().named().map(|(name, _)| name).into_iter().chain(reasons) {
            assert!(chapter.contains(&format!("`{name}`")), "{name}");
        }
    }
}
