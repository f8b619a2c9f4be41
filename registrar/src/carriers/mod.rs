//! Sees to it that each subnet of a site has a device that carries it: asks [`decide`] whenever devices, sessions or
//! registrars come and go, and writes what comes of it.

mod decide;
#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use muster_common::telemetry::Metrics;
use muster_common::time::{self, Instant};
use prometheus_client::metrics::{counter::Counter, gauge::Gauge};
use tokio::sync::watch;
use uuid::Uuid;

pub use self::decide::{AFTER_START, CONFIRM, Decider, Decision, PATIENCE, Reason};
use crate::registry::{Applied, Change, CommitError, Registry, plan::site, site::Carrier};
use crate::session::Hub;

/// What changes within this time is looked at together.
const GATHER: Duration = Duration::from_millis(20);
/// Before a write that has failed is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Decides for the devices of one registrar.
#[derive(Debug)]
pub struct Carriers {
    hub: Arc<Hub>,
    decider: Decider,
    registrar: Uuid,
    changed: watch::Receiver<u64>,
    subnets: Gauge,
    takeovers: Counter,
}

impl Carriers {
    /// For the registrar with this uid, whose sessions `hub` has.
    pub fn new(hub: &Arc<Hub>, registrar: Uuid, metrics: &Metrics) -> Self {
        let (tell, changed) = watch::channel(0);
        hub.registry().observe(move |applied| {
            if bears_on_carriers(applied) {
                tell.send_modify(|count| *count += 1);
            }
        });
        let (subnets, takeovers) = (Gauge::default(), Counter::default());
        metrics.register(|registry| {
            let help = "Subnets of sites that a device with its session at this registrar carries";
            registry.register("carried_subnets", help, subnets.clone());
            let help =
                "Subnets that this registrar has given to another device because the one before was away";
            registry.register("carrier_takeovers", help, takeovers.clone());
        });
        let decider = Decider::new(registrar, Instant::now());
        Self { hub: hub.clone(), decider, registrar, changed, subnets, takeovers }
    }

    /// Runs until the registrar drains: its devices then go to others, which see to them.
    pub async fn run(mut self) {
        let mut sessions = self.hub.sites_changed();
        let draining = self.hub.draining().clone();
        loop {
            let next = self.decide().await;
            tokio::select! {
                () = draining.cancelled() => return,
                // Neither ends before the registry and the hub do.
                changed = self.changed.changed() => if changed.is_err() { return },
                changed = sessions.changed() => if changed.is_err() { return },
                () = time::until(next) => {}
            }
            tokio::time::sleep(GATHER).await;
            self.changed.mark_unchanged();
            sessions.mark_unchanged();
        }
    }

    /// Writes what has to change; returns when to decide again.
    async fn decide(&mut self) -> Option<Instant> {
        let now = Instant::now();
        let registry = self.hub.registry().clone();
        let (decisions, mut next) = {
            let presence = |device| self.hub.presence(device, now);
            let index = registry.read();
            let carried = index.networks().flat_map(|state| state.carriers.values());
            let own = carried.filter(|carrier| carrier.registrar == Some(self.registrar)).count();
            self.subnets.set(i64::try_from(own).unwrap_or(i64::MAX));
            self.decider.decide(&index, &presence, now)
        };
        for decision in decisions {
            match self.write(&registry, &decision).await {
                Ok(true) => self.decider.written(&decision, &|device| self.hub.presence(device, now)),
                // Somebody else was first.
                Ok(false) => {}
                Err(error) => {
                    let Decision { network, subnet, .. } = decision;
                    let what = "cannot write which device carries a subnet; trying again";
                    tracing::warn!(%network, %subnet, %error, "{what}");
                    let soon = Instant::now() + RETRY;
                    next = Some(next.map_or(soon, |next| next.min(soon)));
                }
            }
        }
        next
    }

    /// Returns whether it is written.
    async fn write(&self, registry: &Registry, decision: &Decision) -> Result<bool, CommitError<Infallible>> {
        let Decision { network, subnet, revision, carrier, reason } = decision;
        let carrier = carrier.map(|(device, registrar)| Carrier { device, registrar, revision: 0 });
        let plan = |index: &mut _, _| site::carry(index, network, subnet, *revision, carrier.as_ref());
        if !registry.commit(plan).await? {
            return Ok(false);
        }
        let name = {
            let index = registry.read();
            carrier.and_then(|carrier| Some(index.device(network, carrier.device)?.name.clone()))
        };
        let reason = reason.text();
        match (name, decision.reason) {
            (Some(device), Reason::Away) => {
                tracing::info!(%network, %subnet, device, "the device that carries a subnet is away");
            }
            (Some(device), _) => {
                tracing::info!(%network, %subnet, device, reason, "a device carries a subnet")
            }
            (None, _) => tracing::info!(%network, %subnet, reason, "nobody carries a subnet any more"),
        }
        if decision.reason == Reason::Lost {
            self.takeovers.inc();
        }
        Ok(true)
    }
}

/// Whether one has to decide again after these changes.
fn bears_on_carriers(applied: &Applied) -> bool {
    applied.changes.iter().any(|change| match change {
        Change::Carrier { .. } | Change::Registrar { .. } => true,
        Change::Device { old, new } => {
            let has_site = [old, new].into_iter().flatten().any(|device| device.site.is_some());
            let offers = |device: &Option<Arc<crate::registry::Device>>| {
                let device = device.as_ref().filter(|device| device.is_reachable())?;
                Some(device.may_carry().collect::<Vec<_>>())
            };
            has_site && offers(old) != offers(new)
        }
        _ => false,
    })
}
