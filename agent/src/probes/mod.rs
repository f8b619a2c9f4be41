//! Readiness probes of the endpoints that this host has, with kubelet's parameters and meanings: each in a task of its own,
//! and so many at a time. What they find is told as a whole whenever something of it changes.

pub mod check;
mod http;
pub mod streak;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use muster_common::telemetry::Metrics;
use muster_proto::registration::{EndpointProbe, EndpointReadiness};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
};
use rand::RngExt as _;
use tokio::{
    sync::{Semaphore, watch},
    task::AbortHandle,
    time::{MissedTickBehavior, interval, sleep, timeout},
};

use self::{check::CheckError, streak::Streak};

/// Endpoints that are probed at most; the registrar takes no more.
const MAX: usize = 4096;
/// Checks at a time.
const AT_A_TIME: usize = 64;

/// What tells endpoints apart: Service and device.
type Key = (String, String, String);

/// What probes have found: whether each endpoint is ready, if that is known.
pub type Found = BTreeMap<Key, bool>;

/// What has been found, and the means to find it.
#[derive(Debug)]
struct Shared {
    found: watch::Sender<Found>,
    places: Semaphore,
    may_exec: bool,
    checks: Family<ResultLabel, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

/// The probes that run.
#[derive(Debug)]
pub struct Probes {
    shared: Arc<Shared>,
    running: BTreeMap<Key, (EndpointProbe, AbortHandle)>,
}

impl Probes {
    /// None yet. `may_exec` says whether commands may be run.
    pub fn new(may_exec: bool, metrics: &Metrics) -> Self {
        let checks = Family::<ResultLabel, Counter>::default();
        metrics.register(|registry| {
            registry.register("probes", "Checks of endpoints that this host has", checks.clone());
        });
        let found = watch::Sender::default();
        let shared = Shared { found, places: Semaphore::new(AT_A_TIME), may_exec, checks };
        Self { shared: Arc::new(shared), running: BTreeMap::new() }
    }

    /// Follows what is found.
    pub fn found(&self) -> watch::Receiver<Found> {
        self.shared.found.subscribe()
    }

    /// Probes these endpoints, and no others. Those that are probed already go on. An endpoint whose address is not among
    /// `allowed`, those of this host and of the ones that it speaks for, is not probed.
    pub fn set(&mut self, wanted: Vec<EndpointProbe>, allowed: &BTreeSet<IpAddr>) {
        let mut before = std::mem::take(&mut self.running);
        for probe in wanted.into_iter().take(MAX) {
            let key = (probe.namespace.clone(), probe.service.clone(), probe.device_uid.clone());
            let Some(address) = probe.address.parse().ok().filter(|address| allowed.contains(address)) else {
                tracing::warn!(
                    service = probe.service,
                    address = probe.address,
                    "the registrar asks for a probe of an address that is not this host's"
                );
                continue;
            };
            let same = before.remove(&key).and_then(|(old, handle)| {
                if old == probe {
                    return Some(handle);
                }
                handle.abort();
                None
            });
            let handle = same.unwrap_or_else(|| {
                tokio::spawn(run(self.shared.clone(), key.clone(), probe.clone(), address)).abort_handle()
            });
            self.running.insert(key, (probe, handle));
        }
        before.values().for_each(|(_, handle)| handle.abort());
        let running = &self.running;
        self.shared.found.send_if_modified(|found| {
            let count = found.len();
            found.retain(|key, _| running.contains_key(key));
            found.len() != count
        });
    }
}

impl Drop for Probes {
    fn drop(&mut self) {
        self.running.values().for_each(|(_, handle)| handle.abort());
    }
}

/// As the registrar is told.
pub fn told(found: &Found) -> Vec<EndpointReadiness> {
    let one = |((namespace, service, device_uid), ready): (&Key, &bool)| EndpointReadiness {
        namespace: namespace.clone(),
        service: service.clone(),
        device_uid: device_uid.clone(),
        ready: *ready,
    };
    found.iter().map(one).collect()
}

/// Probes one endpoint until it is aborted.
async fn run(shared: Arc<Shared>, key: Key, endpoint: EndpointProbe, address: IpAddr) {
    let Some(probe) = &endpoint.probe else { return };
    let seconds = |number: u32| Duration::from_secs(u64::from(number.max(1)));
    let (period, patience) = (seconds(probe.period_seconds), seconds(probe.timeout_seconds));
    // Many that begin at once do not go on at once.
    let first = period.min(Duration::from_secs(1)).mul_f64(rand::rng().random_range(0.0..1.0));
    sleep(Duration::from_secs(probe.initial_delay_seconds.into()) + first).await;
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut streak = Streak::new(probe.success_threshold, probe.failure_threshold);
    loop {
        ticks.tick().await;
        let result = {
            // It is never closed.
            let _place = shared.places.acquire().await;
            let checked = timeout(patience, check::check(probe, address, shared.may_exec)).await;
            checked.unwrap_or(Err(CheckError::Timeout(probe.timeout_seconds.max(1))))
        };
        let label = ResultLabel { result: if result.is_ok() { "success" } else { "failure" } };
        shared.checks.get_or_create(&label).inc();
        if let Some(ready) = streak.add(result.is_ok()) {
            let (namespace, service) = (&key.0, &key.1);
            match &result {
                Ok(()) => tracing::info!(namespace, service, %address, "an endpoint is ready"),
                Err(error) => {
                    tracing::warn!(namespace, service, %address, %error, "an endpoint is not ready")
                }
            }
            shared.found.send_modify(|found| {
                found.insert(key.clone(), ready);
            });
        }
    }
}
