//! What a director counts, for `/metrics` and for the registrar.

use std::sync::{Arc, atomic::AtomicU64};

use muster_common::telemetry;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric},
    metrics::{counter::Counter, family::Family, gauge::ConstGauge},
};

use crate::{
    hub::Hub,
    relay::{AttachError, Drops},
};

/// All of them; clones count together.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// Over UDP.
    pub(crate) udp: Transport,
    /// Over streams.
    pub(crate) tcp: Transport,
    drops: Family<DropLabels, Counter>,
    refused: Family<RefusedLabels, Counter>,
    pub(crate) hellos: Counter,
    pub(crate) notices: Counter,
}

/// Frames of one transport.
#[derive(Clone, Debug)]
pub(crate) struct Transport {
    pub(crate) received: Direction,
    pub(crate) sent: Direction,
}

/// Frames of one direction.
#[derive(Clone, Debug)]
pub(crate) struct Direction {
    frames: Counter,
    octets: Counter,
    /// System calls, or messages of streams.
    calls: Counter,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DirectionLabels {
    transport: &'static str,
    direction: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DropLabels {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RefusedLabels {
    reason: &'static str,
}

impl Metrics {
    /// Registers all.
    pub fn register(registry: &telemetry::Metrics) -> Self {
        type ByDirection = Family<DirectionLabels, Counter<u64, AtomicU64>>;
        let (frames, octets, calls) =
            (ByDirection::default(), ByDirection::default(), ByDirection::default());
        let direction = |transport, direction| {
            let labels = DirectionLabels { transport, direction };
            Direction {
                frames: frames.get_or_create(&labels).clone(),
                octets: octets.get_or_create(&labels).clone(),
                calls: calls.get_or_create(&labels).clone(),
            }
        };
        let transport =
            |name| Transport { received: direction(name, "received"), sent: direction(name, "sent") };
        let m = Self {
            udp: transport("udp"),
            tcp: transport("tcp"),
            drops: Family::default(),
            refused: Family::default(),
            hellos: Counter::default(),
            notices: Counter::default(),
        };
        registry.register(|registry| {
            registry.register("frames", "Frames, by transport and direction", frames);
            registry.register("octets", "Octets of frames, headers included", octets);
            let text = "What moved these frames: system calls (udp), messages of streams (tcp)";
            registry.register("calls", text, calls);
            registry.register("drops", "Frames and hellos dropped, by reason", m.drops.clone());
            registry.register("attach_refused", "Attachments refused, by reason", m.refused.clone());
            registry.register("hellos", "Hellos answered", m.hellos.clone());
            let text = "Notices to agents: that a hello is due, or that a device is not here";
            registry.register("notices", text, m.notices.clone());
        });
        m
    }

    pub(crate) fn dropped(&self, drops: &Drops) {
        for (reason, frames) in drops.iter() {
            self.drops.get_or_create(&DropLabels { reason: reason.as_str() }).inc_by(frames);
        }
    }

    pub(crate) fn refused(&self, reason: AttachError) {
        let reason = match reason {
            AttachError::Refused => "refused",
            AttachError::Full => "full",
            AttachError::Draining => "draining",
            AttachError::HandleTaken => "handle_taken",
            AttachError::TooOften => "too_often",
        };
        self.refused.get_or_create(&RefusedLabels { reason }).inc();
    }

    /// Frames passed on since the start, and their octets.
    pub(crate) fn passed_on(&self) -> (u64, u64) {
        let sent = [&self.udp.sent, &self.tcp.sent];
        (sent.iter().map(|sent| sent.frames.get()).sum(), sent.iter().map(|sent| sent.octets.get()).sum())
    }
}

impl Direction {
    pub(crate) fn count(&self, frames: u64, octets: u64, calls: u64) {
        self.frames.inc_by(frames);
        self.octets.inc_by(octets);
        self.calls.inc_by(calls);
    }
}

/// How many are attached, asked when it is to be told.
#[derive(Debug)]
pub(crate) struct Attachments(pub(crate) Arc<Hub>);

impl Collector for Attachments {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let snapshot = self.0.snapshot();
        let mut gauge = |name: &str, help: &str, value: usize| {
            let gauge = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
            let encoder = encoder.encode_descriptor(name, help, None, gauge.metric_type())?;
            gauge.encode(encoder)
        };
        gauge("attached", "Devices attached", snapshot.devices)?;
        gauge(
            "sessions",
            "Sessions of devices; one that attaches anew has two for a while",
            snapshot.sessions,
        )?;
        gauge("bound", "Sessions with an address that frames go to", snapshot.bound)?;
        gauge("streams", "Sessions whose frames may go by TCP", snapshot.streams)?;
        gauge("refused_devices", "Devices that may not attach", snapshot.refused)?;
        gauge("draining", "1 while devices are asked to leave", usize::from(snapshot.is_draining))
    }
}
