//! Which endpoints of Services are there: has [`decide`] judge each device whose session has begun or ended, and writes what
//! comes of it, many devices at a time.

mod decide;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    sync::Arc,
    time::Duration,
};

use muster_common::{
    telemetry::Metrics,
    time::{self, Instant},
};
use prometheus_client::metrics::counter::Counter;
use uuid::Uuid;

pub use self::decide::{AFTER_START, Decider, PATIENCE, Place, Verdict};
use crate::{
    registry::{
        Applied, Change, CommitError, Index, Registry,
        plan::presence::{self as plan, Move},
    },
    session::Hub,
};

/// What happens within this time is looked at together: after a restart, thousands of devices come at once.
const GATHER: Duration = Duration::from_millis(100);
/// Before a write that has failed is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Decides of the devices of one registrar.
#[derive(Debug)]
pub struct Presences {
    hub: Arc<Hub>,
    decider: Decider,
    registrar: Uuid,
    /// When to judge a device again.
    due: BTreeMap<Place, Instant>,
    away: Counter,
}

impl Presences {
    /// For the registrar with this uid, whose sessions `hub` has.
    pub fn new(hub: &Arc<Hub>, registrar: Uuid, metrics: &Metrics) -> Self {
        let weak = Arc::downgrade(hub);
        hub.registry().observe(move |applied| {
            if let Some(hub) = weak.upgrade() {
                let concerned = concerned(&hub.registry().read(), applied);
                hub.tell_moved(concerned.into_iter());
            }
        });
        let away = Counter::default();
        metrics.register(|registry| {
            let help = "Endpoints of Services that this registrar has found to be away";
            registry.register("endpoints_away", help, away.clone());
        });
        // Those of registrars that have ceased to run before this one began.
        let found = all(&hub.registry().read(), |_| true);
        hub.tell_moved(found.into_iter());
        let decider = Decider::new(registrar, Instant::now());
        Self { hub: hub.clone(), decider, registrar, due: BTreeMap::new(), away }
    }

    /// Runs until the registrar drains: its devices then go to others.
    pub async fn run(mut self) {
        let draining = self.hub.draining().clone();
        let hub = self.hub.clone();
        loop {
            let next = self.due.values().min().copied();
            let mut places = tokio::select! {
                () = draining.cancelled() => return,
                moved = hub.moved() => moved,
                () = time::until(next) => BTreeSet::new(),
            };
            tokio::time::sleep(GATHER).await;
            let now = Instant::now();
            let due = self.due.iter().filter(|(_, at)| **at <= now).map(|(place, _)| place.clone());
            places.extend(due.collect::<Vec<_>>());
            self.judge(&places, now).await;
        }
    }

    async fn judge(&mut self, places: &BTreeSet<Place>, now: Instant) {
        let registry = self.hub.registry().clone();
        let mut moves = Vec::new();
        for place in places {
            self.due.remove(place);
            let session = self.hub.presence(place.1, now).map(|presence| presence.session);
            let index = registry.read();
            let Some(state) = index.network(&place.0) else { continue };
            let Some(device) = state.devices.by_uid(place.1) else { continue };
            let found = state.presence.get(&place.1).copied();
            // What is nobody's endpoint any more is of no interest, until it is one again.
            if found.is_none() && !state.is_endpoint(device) {
                continue;
            }
            let runs = |registrar| index.registrars().running().contains(&registrar);
            match self.decider.judge(place, found, session, runs, now) {
                Verdict::Keep => {}
                Verdict::Wait(until) => drop(self.due.insert(place.clone(), until)),
                Verdict::Write(revision, registrar) => {
                    if registrar.is_none() {
                        tracing::info!(network = %place.0, device = %device.name, "an endpoint of Services is away");
                        self.away.inc();
                    }
                    let (network, device) = place.clone();
                    moves.push((Move { network, device, revision, registrar }, session));
                }
            }
        }
        for batch in moves.chunks(plan::BATCH) {
            let wanted: Vec<Move> = batch.iter().map(|(wanted, _)| wanted.clone()).collect();
            if let Err(error) = self.write(&registry, &wanted).await {
                tracing::warn!(%error, devices = wanted.len(), "cannot write which endpoints are there; trying again");
                let soon = Instant::now() + RETRY;
                self.due.extend(wanted.into_iter().map(|wanted| ((wanted.network, wanted.device), soon)));
                continue;
            }
            let index = registry.read();
            for (wanted, session) in batch {
                let state = index.network(&wanted.network);
                let found = state.and_then(|state| state.presence.get(&wanted.device));
                let is_here = found.is_some_and(|found| found.registrar == Some(self.registrar));
                if let (true, Some(session)) = (is_here, session) {
                    self.decider.came(&(wanted.network.clone(), wanted.device), *session);
                }
            }
        }
    }

    async fn write(&self, registry: &Registry, moves: &[Move]) -> Result<(), CommitError<Infallible>> {
        registry.commit(|index, _| plan::write(index, moves)).await.map(drop)
    }
}

/// The devices of which the store says where they are, as far as `is_wanted` says of their registrars.
fn all(index: &Index, is_wanted: impl Fn(Option<Uuid>) -> bool) -> Vec<Place> {
    let of = index.networks().flat_map(|state| {
        let presence = state.presence.iter();
        presence.map(|(device, presence)| (state.network.name.clone(), *device, presence.registrar))
    });
    of.filter(|(_, _, registrar)| is_wanted(*registrar))
        .map(|(network, device, _)| (network, device))
        .collect()
}

/// The devices that have to be judged after these changes.
fn concerned(index: &Index, applied: &Applied) -> BTreeSet<Place> {
    let mut places = BTreeSet::new();
    for change in &applied.changes {
        match change {
            Change::Presence { network, device, .. } => drop(places.insert((network.clone(), *device))),
            Change::Registrar { uid, runs: false } => places.extend(all(index, |found| found == Some(*uid))),
            // Devices that have become endpoints, whose sessions may be here.
            Change::EndpointSlice { old, new: Some(new) } => {
                let before = old.as_ref().and_then(|old| old.selected.as_deref()).unwrap_or_default();
                let now = new.selected.as_deref().unwrap_or_default();
                let Some(state) = index.network(&new.network) else { continue };
                let added = now.iter().filter(|uid| before.binary_search(uid).is_err());
                let devices = added.filter_map(|uid| state.devices.by_uid(*uid));
                places.extend(devices.map(|device| (new.network.clone(), state.agent_of(device))));
            }
            _ => {}
        }
    }
    places
}
