//! Keeps the store told of this registrar, and its share of the agents near that of the others: [`decide`] says how many
//! are too many, and those are asked to go, spread over time.

mod decide;

use std::{sync::Arc, time::Duration};

use muster_common::{
    telemetry::Metrics,
    time::{Instant, Timestamp},
};
use prometheus_client::metrics::counter::Counter;
use uuid::Uuid;

use self::decide::{is_news, too_many};
use crate::{
    registry::{
        CommitError, Registrar, Registry,
        field::FieldError,
        plan::registrar::{self as plan, Own},
        view::Advertised,
    },
    session::Hub,
};

/// Between looks at how many sessions there are, and so between writes.
const TELL: Duration = Duration::from_secs(10);
/// Between looks whether there are too many: agents that were asked have gone by then, and all have told.
const BALANCE: Duration = Duration::from_secs(60);
/// Within which agents go.
const WITHIN: Duration = Duration::from_secs(30);

/// Says who this registrar is.
#[derive(Debug)]
pub struct Identity {
    /// As in its certificate.
    pub uid: Uuid,
    /// What it announces itself by.
    pub run: Uuid,
    /// Name of its host.
    pub host: String,
    /// Where it is reached.
    pub advertised: Advertised,
}

impl Identity {
    /// Writes to the store who and where this registrar is.
    ///
    /// # Errors
    /// If the store does not take it, or an address cannot be told.
    pub async fn tell(&self, registry: &Registry, sessions: u64) -> Result<(), CommitError<FieldError>> {
        let own = Own {
            uid: self.uid,
            run: self.run,
            host: &self.host,
            advertised: &self.advertised,
            version: env!("CARGO_PKG_VERSION"),
            sessions,
        };
        registry.commit(|index, _| plan::tell(index, &own, Timestamp::now())).await
    }
}

/// Balances one registrar.
#[derive(Debug)]
pub struct Balance {
    hub: Arc<Hub>,
    identity: Identity,
    /// The number of sessions that the store was told of last, in this run.
    told: Option<u64>,
    sent_away: Counter,
}

impl Balance {
    /// For the registrar whose sessions `hub` has.
    pub fn new(hub: &Arc<Hub>, identity: Identity, metrics: &Metrics) -> Self {
        let sent_away = Counter::default();
        metrics.register(|registry| {
            let help = "Agents that were asked to go to a registrar with fewer";
            registry.register("sessions_sent_away", help, sent_away.clone());
        });
        Self { hub: hub.clone(), identity, told: None, sent_away }
    }

    /// Runs until the registrar drains.
    pub async fn run(mut self) {
        let draining = self.hub.draining().clone();
        let mut balanced = Instant::now();
        loop {
            self.tell().await;
            tokio::select! {
                () = draining.cancelled() => return,
                () = tokio::time::sleep(TELL) => {}
            }
            let now = Instant::now();
            if now - balanced >= BALANCE {
                balanced = now;
                self.balance();
            }
        }
    }

    async fn tell(&mut self) {
        let registry = self.hub.registry();
        let sessions = self.hub.len() as u64;
        // An operator may have deleted it while it was cut off.
        let is_known = registry.read().registrars().by_uid(self.identity.uid).is_some();
        let is_told = is_known && self.told.is_some_and(|told| !is_news(told, sessions));
        if is_told || registry.freshness().is_stale() {
            return;
        }
        match self.identity.tell(registry, sessions).await {
            Ok(()) => self.told = Some(sessions),
            Err(error) => tracing::warn!(%error, "cannot tell the store of this registrar; trying again"),
        }
    }

    fn balance(&self) {
        let registry = self.hub.registry();
        // What is known of the others is old.
        if registry.freshness().is_stale() {
            return;
        }
        let own = self.hub.len() as u64;
        let others: Vec<Arc<Registrar>> = {
            let index = registry.read();
            let all = index.registrars();
            let is_other = |other: &&Arc<Registrar>| other.uid != self.identity.uid && all.runs(other);
            all.iter().filter(is_other).cloned().collect()
        };
        let sessions: Vec<u64> = others.iter().map(|other| other.sessions()).collect();
        let Some(excess) = too_many(own, &sessions) else { return };
        let room = others.iter().filter(|other| other.sessions() < excess.fair);
        let to: Vec<String> = room.flat_map(|other| other.addresses()).cloned().collect();
        if to.is_empty() {
            return;
        }
        tracing::info!(
            sessions = own,
            moving = excess.count,
            ?to,
            "asking agents to go to registrars with fewer"
        );
        self.sent_away.inc_by(excess.count);
        self.hub.send_away(usize::try_from(excess.count).unwrap_or(usize::MAX), &to, WITHIN);
    }
}
