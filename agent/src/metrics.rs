//! The agent's metrics, beside those of its resolver.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use muster_common::telemetry::Metrics as Registries;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use crate::{
    control::{Control, LookupResult, Role, Way},
    datapath::{Path, Snapshot},
    port_mapping::Protocol,
};

type Octets = Counter<u64, AtomicU64>;

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
    directors: Family<DirectorLabels, Gauge>,
    director_round_trip: Family<RoleLabels, Gauge<f64, AtomicU64>>,
    director_failures: Family<DropLabels, Octets>,
    home_changes: Octets,
    relay_packets: Family<DirectionLabels, Octets>,
    relay_bytes: Family<DirectionLabels, Octets>,
    peer_paths: Family<PathLabels, Gauge>,
    path_changes: Family<ChangeLabels, Counter>,
    port_mapping: Family<ProtocolLabels, Gauge>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DirectorLabels {
    role: &'static str,
    transport: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RoleLabels {
    role: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DirectionLabels {
    direction: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PathLabels {
    path: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ChangeLabels {
    to: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ProtocolLabels {
    protocol: &'static str,
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
            m.register_relaying(registry);
        });
        m
    }

    fn register_relaying(&self, registry: &mut Registry) {
        let directors = "Directors known, by what they are to this device and what frames go by";
        registry.register("directors", directors, self.directors.clone());
        let round_trip = "Round trip to the home and the second director, median of the last measurements";
        registry.register("director_round_trip_seconds", round_trip, self.director_round_trip.clone());
        let failures = "What has gone wrong with directors, by reason";
        registry.register("director_failures", failures, self.director_failures.clone());
        let changes = "Times that another director has become the home, the first not counted";
        registry.register("director_home_changes", changes, self.home_changes.clone());
        registry.register("relay_packets", "Frames from and to directors", self.relay_packets.clone());
        let bytes = "Octets of frames from and to directors, headers included";
        registry.register("relay_bytes", bytes, self.relay_bytes.clone());
        registry.register("peer_paths", "Peers held, by the path in use", self.peer_paths.clone());
        let changes = "Paths of peers that have become direct, or relayed again";
        registry.register("path_changes", changes, self.path_changes.clone());
        for to in [Path::Direct, Path::Relay] {
            drop(self.path_changes.get_or_create(&ChangeLabels { to: to.as_str() }));
        }
        let mapping = "1 for the protocol by which the gateway maps a port to the tunnel";
        registry.register("port_mapping", mapping, self.port_mapping.clone());
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
        self.directors(control);
    }

    fn directors(&self, control: &Control) {
        let views = control.directors();
        for role in [Role::Home, Role::Second, Role::Other] {
            for way in [Some(Way::Udp), Some(Way::Tcp), None] {
                let number = views.iter().filter(|view| (view.role, view.way) == (role, way)).count();
                let labels =
                    DirectorLabels { role: role.as_str(), transport: way.map_or("none", |way| way.as_str()) };
                self.directors.get_or_create(&labels).set(i64::try_from(number).unwrap_or(i64::MAX));
            }
        }
        for role in [Role::Home, Role::Second] {
            let labels = RoleLabels { role: role.as_str() };
            let round_trip = views.iter().find(|view| view.role == role).and_then(|view| view.round_trip);
            match round_trip {
                Some(time) => drop(self.director_round_trip.get_or_create(&labels).set(time.as_secs_f64())),
                None => drop(self.director_round_trip.remove(&labels)),
            }
        }
        for (reason, number) in control.director_troubles() {
            self.director_failures.get_or_create(&DropLabels { reason }).inner().store(number, Relaxed);
        }
        self.home_changes.inner().store(control.home_changes(), Relaxed);
    }

    /// The path of a peer has become of this kind.
    pub fn path_changed(&self, to: Path) {
        self.path_changes.get_or_create(&ChangeLabels { to: to.as_str() }).inc();
    }

    /// There is a mapping by this protocol, or none.
    pub fn port_mapping(&self, by: Option<Protocol>) {
        for protocol in Protocol::ALL {
            let labels = ProtocolLabels { protocol: protocol.as_str() };
            self.port_mapping.get_or_create(&labels).set((by == Some(protocol)).into());
        }
    }

    /// The data plane as it is now.
    pub fn datapath(&self, snapshot: &Snapshot) {
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
        for (direction, counter) in [("received", snapshot.relay_received), ("sent", snapshot.relay_sent)] {
            let labels = DirectionLabels { direction };
            self.relay_packets.get_or_create(&labels).inner().store(counter.packets, Relaxed);
            self.relay_bytes.get_or_create(&labels).inner().store(counter.bytes, Relaxed);
        }
        for path in [Path::Direct, Path::Relay, Path::None] {
            let number = snapshot.peers.values().filter(|peer| peer.path == path).count();
            let labels = PathLabels { path: path.as_str() };
            self.peer_paths.get_or_create(&labels).set(i64::try_from(number).unwrap_or(i64::MAX));
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
    use std::{collections::BTreeMap, time::Duration};

    use muster_common::time::Instant;

    use super::*;
    use crate::{
        control::Start,
        datapath::{Counter, Offloads, PeerSnapshot},
    };

    /// Where the metrics are documented.
    const OPERATING: &str = include_str!("../../docs/operating.md");

    #[test]
    fn the_data_plane_is_told_of_without_a_label_for_each_peer() {
        let peers = (0..100u8).map(|n| ([n; 32], PeerSnapshot { queued: 2, ..PeerSnapshot::default() }));
        let mut snapshot = Snapshot {
            peers: peers.collect(),
            udp_sent: Counter { packets: 40, bytes: 4_000, calls: 2 },
            relay_sent: Counter { packets: 7, bytes: 700, calls: 1 },
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
            "muster_agent_relay_packets_total{direction=\"sent\"} 7\n",
            "muster_agent_relay_bytes_total{direction=\"sent\"} 700\n",
            "muster_agent_peer_paths{path=\"none\"} 100\n",
            "muster_agent_peer_paths{path=\"relay\"} 0\n",
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
    fn directors_and_paths_are_told_of_with_few_labels() {
        let registries = Registries::with_prefix("muster_agent");
        let metrics = Metrics::register(&registries);
        let control = Control::new(Start::default(), 0, Instant::from_boot(Duration::ZERO));
        metrics.control(&control);
        metrics.port_mapping(Some(Protocol::Upnp));
        metrics.path_changed(Path::Direct);
        let text = registries.encode();
        for line in [
            "muster_agent_directors{role=\"home\",transport=\"udp\"} 0\n",
            "muster_agent_director_failures_total{reason=\"refused\"} 0\n",
            "muster_agent_director_home_changes_total 0\n",
            "muster_agent_path_changes_total{to=\"direct\"} 1\n",
            "muster_agent_port_mapping{protocol=\"upnp\"} 1\n",
            "muster_agent_port_mapping{protocol=\"pcp\"} 0\n",
        ] {
            assert!(text.contains(line), "{line}{text}");
        }
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
        let control = Control::new(Start::default(), 0, Instant::from_boot(Duration::ZERO));
        for (reason, _) in control.director_troubles() {
            assert!(chapter.contains(&format!("`{reason}`")), "{reason}");
        }
        for name in Offloads::default().named().map(|(name, _)| name).into_iter().chain(reasons) {
            assert!(chapter.contains(&format!("`{name}`")), "{name}");
        }
    }
}
