//! The connection to a registrar: tells which devices are attached and how much is relayed, and takes what it decides.
//! Relaying goes on without one; everything here is in a task of its own.

mod connection;
mod pace;
#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration};

use anyhow::Context;
use muster_common::{
    identity::Party,
    telemetry::Metrics as Registries,
    time::{Instant, Timestamp},
    tls::{ALPN_H2, Credentials, KeyPair, certificate_validity, certificates_from_pem},
};
use muster_enrollment::{Identity as _, pem};
use muster_proto::director::{DirectorConfig, RegisterRequest, RenewResponse};
use prometheus_client::metrics::gauge::Gauge;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use rustls::ClientConfig;
use tokio::sync::watch;
use uuid::Uuid;
use zeroize::Zeroizing;

use self::{
    connection::Failure,
    pace::{Backoff, Registrars, renewal_due},
};
use crate::identity::{Identity, State};

/// Delays between rounds of attempts.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// Between attempts at two registrars of one round, in milliseconds.
const NEXT_REGISTRAR: std::ops::Range<u64> = 50..250;
/// Between attempts while all registrars refuse the director, in milliseconds.
const REFUSED_RETRY: std::ops::Range<u64> = 30_000..60_000;
/// A session that lasted so long was a good one: the next failure is the first again.
const STABLE: Duration = Duration::from_secs(10);
/// Delays between attempts at a renewal.
const RENEWAL_RETRY: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(3_600));

/// What relays, as the registrar is told of it and decides about it.
pub trait Relaying: Send + Sync + 'static {
    /// Changes whenever a device has attached or has gone.
    fn changes(&self) -> watch::Receiver<u64>;
    /// The devices that are attached, in ascending order.
    fn devices(&self) -> Vec<Uuid>;
    /// Frames and octets relayed since the start.
    fn relayed(&self) -> (u64, u64);
    /// Detaches these devices at once, and does not let them attach again.
    fn refuse(&self, devices: &[Uuid]);
    /// Lets those attach again that were refused: the registrar says anew whom it does not want.
    fn forgive(&self);
}

/// What is told of the connection to registrars.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    connected: Gauge,
    expiry: Gauge,
}

impl Metrics {
    /// Registers them.
    pub fn register(registries: &Registries) -> Self {
        let metrics = Self::default();
        registries.register(|registry| {
            let connected = "1 while a session with a registrar is open";
            registry.register("registrar_connected", connected, metrics.connected.clone());
            let expiry = "When the certificate expires, in seconds since the epoch";
            registry.register("certificate_expiry_seconds", expiry, metrics.expiry.clone());
        });
        metrics
    }
}

/// Credentials, and TLS to registrars, of `identity`.
///
/// # Errors
/// Key, certificate and roots cannot be used.
pub fn credentials(identity: &Identity) -> anyhow::Result<(Arc<Credentials>, Arc<ClientConfig>)> {
    let credentials = Credentials::new(&identity.key_pair()?, &identity.root_certificates()?)?;
    let is_registrar = |party: &Party| matches!(party, Party::Registrar { .. });
    let tls = Arc::new(credentials.client_config(is_registrar, ALPN_H2)?);
    Ok((credentials, tls))
}

/// The connection to registrars, as long as the director runs.
pub struct Client<R> {
    relaying: Arc<R>,
    state: State,
    identity: Identity,
    credentials: Arc<Credentials>,
    tls: Arc<ClientConfig>,
    /// What the director says of itself; made anew for each connection, since addresses change.
    announce: Box<dyn Fn() -> RegisterRequest + Send + Sync>,
    draining: watch::Receiver<bool>,
    metrics: Metrics,
    rng: StdRng,
    registrars: Registrars,
    /// When the certificate is to be renewed.
    renewal: Timestamp,
    renewal_backoff: Backoff,
    drained: bool,
}

impl<R: Relaying> Client<R> {
    /// No connection yet. `draining` says that the director is being shut down.
    ///
    /// # Errors
    /// The identity cannot be used.
    #[expect(clippy::too_many_arguments, reason = "all that the director has of the kind")]
    pub fn new(
        relaying: Arc<R>,
        state: State,
        identity: Identity,
        credentials: Arc<Credentials>,
        tls: Arc<ClientConfig>,
        announce: impl Fn() -> RegisterRequest + Send + Sync + 'static,
        draining: watch::Receiver<bool>,
        metrics: Metrics,
        seed: u64,
    ) -> anyhow::Result<Self> {
        let mut rng = StdRng::seed_from_u64(seed);
        let registrars = Registrars::new(&identity.registrars, &identity.registrar, &mut rng);
        let mut client = Self {
            relaying,
            state,
            credentials,
            tls,
            announce: Box::new(announce),
            draining,
            metrics,
            rng,
            registrars,
            renewal: Timestamp::default(),
            renewal_backoff: Backoff::new(RENEWAL_RETRY.0, RENEWAL_RETRY.1),
            drained: false,
            identity,
        };
        let pair = client.identity.key_pair()?;
        client.plan_renewal(&pair)?;
        Ok(client)
    }

    /// Keeps a session with one of the registrars. Never ends.
    pub async fn run(mut self) {
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        let mut told = String::new();
        let (mut failures, mut refusals) = (0usize, 0usize);
        loop {
            let registrar = self.registrars.current().to_owned();
            let begin = Instant::now();
            let failure = self.connect(&registrar).await;
            let lasted = self.metrics.connected.set(0) == 1;
            if lasted {
                (failures, refusals) = (0, 0);
                told.clear();
                if Instant::now() - begin >= STABLE {
                    backoff.reset();
                }
            }
            failures += 1;
            let (reason, refused) = match failure {
                Failure::Moved => {
                    tracing::info!(registrar, "the registrar is shutting down; going to another");
                    self.registrars.advance();
                    continue;
                }
                Failure::Unavailable(reason) => (reason, false),
                Failure::Refused(reason) => (reason, true),
            };
            refusals = if refused { refusals + 1 } else { 0 };
            if told != reason {
                tracing::warn!(registrar, error = reason, refused, "no registrar; relaying goes on");
                told = reason;
            }
            self.registrars.advance();
            let wait = if refusals > self.registrars.len() {
                Duration::from_millis(self.rng.random_range(REFUSED_RETRY))
            } else if failures % self.registrars.len().max(1) == 0 {
                backoff.fail(&mut self.rng)
            } else {
                Duration::from_millis(self.rng.random_range(NEXT_REGISTRAR))
            };
            tokio::time::sleep(wait).await;
        }
    }

    /// Takes what the registrar has decided.
    fn apply(&mut self, config: &DirectorConfig) {
        if config.drained != self.drained {
            self.drained = config.drained;
            let drained = self.drained;
            tracing::info!(drained, "an operator has decided whether devices should leave this director");
        }
        if config.registrars.is_empty()
            || (config.registrars == self.identity.registrars && config.name == self.identity.name)
        {
            return;
        }
        let mut identity = self.identity.clone();
        identity.registrars.clone_from(&config.registrars);
        if !config.name.is_empty() {
            identity.name.clone_from(&config.name);
        }
        self.registrars.update(&identity.registrars, &identity.registrar, &mut self.rng);
        if let Err(error) = self.state.set_identity(&identity) {
            tracing::warn!(%error, "cannot keep the registrars' addresses; a restart would not know the new ones");
        }
        self.identity = identity;
    }

    /// The roots have been replaced: on disk first, then in use.
    fn replace_roots(&mut self, roots: &[Vec<u8>]) {
        let mut identity = self.identity.clone();
        identity.roots = pem(roots);
        let adopt = || -> anyhow::Result<()> {
            let parsed = certificates_from_pem("the new roots", identity.roots.as_bytes())?;
            // Only roots that can be used are kept.
            Credentials::new(&identity.key_pair()?, &parsed)?;
            self.state.set_identity(&identity)?;
            self.credentials.replace_roots(&parsed)?;
            Ok(())
        };
        match adopt() {
            Ok(()) => {
                tracing::info!(roots = roots.len(), "roots replaced");
                self.identity = identity;
            }
            Err(error) => tracing::warn!(%error, "cannot use the new roots; going on with the old ones"),
        }
    }

    /// A renewal has come to its end.
    fn renewed(&mut self, outcome: Result<(Zeroizing<String>, RenewResponse), String>) {
        let adopted =
            outcome.map_err(anyhow::Error::msg).and_then(|(key, response)| self.adopt(&key, &response));
        match adopted {
            Ok(expiry) => {
                self.renewal_backoff.reset();
                tracing::info!(%expiry, "certificate renewed");
            }
            Err(error) => {
                tracing::warn!(%error, "cannot renew the certificate; trying again later");
                self.renewal = Timestamp::now() + self.renewal_backoff.fail(&mut self.rng);
            }
        }
    }

    /// Takes the next certificate: on disk first, then in use. Nothing has changed if it cannot be used.
    fn adopt(&mut self, key: &str, response: &RenewResponse) -> anyhow::Result<Timestamp> {
        let mut identity = self.identity.clone();
        identity.set_key_pair(&response.certificate_chain, key);
        if !response.roots.is_empty() {
            identity.roots = pem(&response.roots);
        }
        let (pair, roots) = (identity.key_pair()?, identity.root_certificates()?);
        Credentials::new(&pair, &roots)?;
        let party = pair.identity()?.party;
        if party != self.identity.key_pair()?.identity()?.party {
            anyhow::bail!("it is for {party}");
        }
        let own = pair.chain.first().context("there is none")?;
        let (begin, end) = certificate_validity(own)?;
        let now = Timestamp::now();
        if now < begin || now > end {
            anyhow::bail!("it is valid from {begin} to {end}, but it is {now} by this host's clock");
        }
        self.state.set_identity(&identity)?;
        self.credentials.replace_key(&pair)?;
        self.credentials.replace_roots(&roots)?;
        self.identity = identity;
        self.plan_renewal(&pair)?;
        Ok(end)
    }

    fn plan_renewal(&mut self, pair: &KeyPair) -> anyhow::Result<()> {
        let own = pair.chain.first().context("the director's certificate is missing")?;
        let (begin, end) = certificate_validity(own)?;
        self.metrics.expiry.set(i64::try_from(end.unix_seconds()).unwrap_or(i64::MAX));
        self.renewal = renewal_due(begin, end, &mut self.rng);
        Ok(())
    }
}
