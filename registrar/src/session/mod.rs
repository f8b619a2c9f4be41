//! The sessions that are open: who is online, who holds whom, and what has to be told to whom. A change costs as much
//! as the device has holders, and no session ever waits for another.

mod directors;
pub mod mailbox;
mod open;
mod probes;
mod stream;

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use muster_common::{telemetry::Metrics, time::Instant};
use prometheus_client::metrics::{counter::Counter, gauge::Gauge};
use rustls::pki_types::CertificateDer;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::mailbox::{Away, End, Item, Mailbox};
use self::open::Open;
use crate::registry::{
    Applied, Change, Device, Director, Registry, director::is_told_differently, registrar, view::Advertised,
};

pub use self::directors::{DEVICES_MAX, run_director};
pub use self::mailbox::{HELD_MAX, SERVICES_MAX};
pub use self::stream::run;

/// A device that says that it is alive counts as away so long after it has said it for the last time.
pub const SILENT: Duration = Duration::from_secs(6);

/// An open session of a device that has not fallen silent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Presence {
    /// Tells sessions apart; a later one has a higher number.
    pub session: u64,
    /// When it last said that it is alive, if it is one of those that do.
    pub heard: Option<Instant>,
}

/// All open sessions of this registrar.
#[derive(Debug)]
pub struct Hub {
    registry: Arc<Registry>,
    /// What this registrar itself tells devices of where to find it.
    own: Advertised,
    /// The same of all registrars.
    advertised: ArcSwap<Advertised>,
    roots: watch::Receiver<Vec<CertificateDer<'static>>>,
    open: Mutex<Open>,
    directors: Mutex<directors::Open>,
    next_id: AtomicU64,
    /// Counts sessions that open or close of devices that carry something for hosts without an agent.
    sites: watch::Sender<u64>,
    /// Endpoints of Services of which it may have changed where their sessions are, with their networks, until somebody
    /// asks.
    moved: Mutex<BTreeSet<(Arc<str>, Uuid)>>,
    moves: Notify,
    draining: CancellationToken,
    closing: CancellationToken,
    sessions: Gauge,
    director_sessions: Gauge,
    introductions: Counter,
    ended: Counter,
}

/// One open session.
#[derive(Debug)]
struct Session {
    id: u64,
    network: Arc<str>,
    device: Uuid,
    mailbox: Mutex<Mailbox>,
    ready: Notify,
    /// When the device last said that it is alive, if it is one of those that do.
    alive: Mutex<Option<Instant>>,
}

impl Session {
    /// Changes what waits to be sent, and wakes the session.
    fn post(&self, change: impl FnOnce(&mut Mailbox)) {
        change(&mut lock(&self.mailbox));
        self.ready.notify_one();
    }

    fn pop(&self) -> Option<Item> {
        lock(&self.mailbox).pop()
    }
}

/// A session that is closed when this is dropped.
#[derive(Debug)]
struct Registered {
    hub: Arc<Hub>,
    session: Arc<Session>,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.hub.close(&self.session);
    }
}

/// The registrar does not accept sessions any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Draining;

/// The session holds too many peers or Services.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct TooMany;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Hub {
    /// A hub without sessions, which learns of all changes of `registry` from now on.
    pub fn new(
        registry: &Arc<Registry>,
        own: Advertised,
        roots: watch::Receiver<Vec<CertificateDer<'static>>>,
    ) -> Arc<Self> {
        let hub = Arc::new(Self {
            registry: registry.clone(),
            advertised: ArcSwap::from_pointee(registry.read().registrars().advertised(&own)),
            own,
            roots,
            open: Mutex::default(),
            directors: Mutex::default(),
            next_id: AtomicU64::new(1),
            sites: watch::Sender::default(),
            moved: Mutex::default(),
            moves: Notify::new(),
            draining: CancellationToken::new(),
            closing: CancellationToken::new(),
            sessions: Gauge::default(),
            director_sessions: Gauge::default(),
            introductions: Counter::default(),
            ended: Counter::default(),
        });
        let weak = Arc::downgrade(&hub);
        registry.observe(move |applied| {
            if let Some(hub) = weak.upgrade() {
                hub.changed(applied);
            }
        });
        hub
    }

    /// The registry that the sessions are about.
    pub fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    /// Where devices are told to go: this registrar first, then the others.
    pub fn advertised(&self) -> Arc<Advertised> {
        self.advertised.load_full()
    }

    /// Where this registrar is.
    pub fn own(&self) -> &Advertised {
        &self.own
    }

    /// Registers the hub's metrics.
    pub fn register_metrics(&self, metrics: &Metrics) {
        metrics.register(|registry| {
            registry.register("sessions", "Open sessions of agents", self.sessions.clone());
            let help = "Open sessions of directors";
            registry.register("director_sessions", help, self.director_sessions.clone());
            registry.register("introductions", "Introductions made", self.introductions.clone());
            registry.register("sessions_ended", "Sessions ended by the registrar", self.ended.clone());
        });
    }

    /// Whether a session of the device is open here.
    pub fn is_online(&self, device: Uuid) -> bool {
        lock(&self.open).by_device.contains_key(&device)
    }

    /// The session of the device that is open here, unless the device has fallen silent.
    pub fn presence(&self, device: Uuid, now: Instant) -> Option<Presence> {
        let open = lock(&self.open);
        let session = open.by_device.get(&device).and_then(|id| open.sessions.get(id))?;
        let heard = *lock(&session.alive);
        heard.is_none_or(|heard| now < heard + SILENT).then_some(Presence { session: session.id, heard })
    }

    /// A device has said that it is alive.
    fn is_alive(&self, session: &Session, now: Instant) {
        let before = lock(&session.alive).replace(now);
        if before.is_some_and(|before| before + SILENT <= now) {
            self.session_changed(&session.network, session.device);
        }
    }

    /// Changes when a session opens or closes of a device that carries something for hosts without an agent, and when one
    /// is heard again after a silence.
    pub fn sites_changed(&self) -> watch::Receiver<u64> {
        self.sites.subscribe()
    }

    /// Waits until it may have changed where the sessions of endpoints are, and says of which.
    pub async fn moved(&self) -> BTreeSet<(Arc<str>, Uuid)> {
        loop {
            let moved = std::mem::take(&mut *lock(&self.moved));
            if !moved.is_empty() {
                return moved;
            }
            self.moves.notified().await;
        }
    }

    /// Has [`Self::moved`] tell of these devices.
    pub fn tell_moved(&self, devices: impl Iterator<Item = (Arc<str>, Uuid)>) {
        let mut devices = devices.peekable();
        if devices.peek().is_some() {
            lock(&self.moved).extend(devices);
            self.moves.notify_one();
        }
    }

    /// A session has opened, closed, or is heard again after a silence.
    fn session_changed(&self, network: &Arc<str>, device: Uuid) {
        let (has_site, is_endpoint) = {
            let index = self.registry.read();
            let found = index.network(network).and_then(|state| Some((state, state.devices.by_uid(device)?)));
            found.map_or((false, false), |(state, device)| (device.site.is_some(), state.is_endpoint(device)))
        };
        if has_site {
            self.sites.send_modify(|count| *count += 1);
        }
        self.tell_moved(is_endpoint.then(|| (network.clone(), device)).into_iter());
    }

    /// How many sessions of devices are open.
    pub fn len(&self) -> usize {
        lock(&self.open).sessions.len()
    }

    /// Whether no session is open.
    pub fn is_empty(&self) -> bool {
        self.len() == 0 && lock(&self.directors).is_empty()
    }

    /// Asks all agents and directors to go to another registrar, each at a random moment within `within`, and lets no new session
    /// open.
    pub fn drain(&self, within: Duration) {
        self.draining.cancel();
        for session in lock(&self.open).sessions.values() {
            session.post(|mailbox| mailbox.drain(Away { within, to: [].into() }));
        }
        lock(&self.directors).drain(within);
    }

    /// Asks `count` agents to go to one of the registrars `to`, each at a random moment within `within`: those that came
    /// last, which have been here for the shortest time.
    pub fn send_away(&self, count: usize, to: &[String], within: Duration) {
        let away = Away { within, to: to.into() };
        for session in lock(&self.open).sessions.values().rev().take(count) {
            session.post(|mailbox| mailbox.drain(away.clone()));
        }
    }

    /// Ends all sessions and watches.
    pub fn shutdown(&self) {
        self.draining.cancel();
        self.closing.cancel();
        let mut open = lock(&self.open);
        let ids: Vec<u64> = open.sessions.keys().copied().collect();
        ids.into_iter().for_each(|id| open.end(id, End::Shutdown));
        drop(open);
        lock(&self.directors).shutdown();
    }

    /// Cancelled by [`Self::drain`] and [`Self::shutdown`].
    pub fn draining(&self) -> &CancellationToken {
        &self.draining
    }

    /// Cancelled by [`Self::shutdown`].
    pub fn closing(&self) -> &CancellationToken {
        &self.closing
    }

    /// Tells `device`, if it is online, that `peer` is about to reach it.
    pub fn introduce(&self, device: Uuid, peer: Uuid, now: Instant) {
        let session = {
            let open = lock(&self.open);
            open.by_device.get(&device).and_then(|id| open.sessions.get(id)).cloned()
        };
        if let Some(session) = session {
            session.post(|mailbox| mailbox.introduce(peer, now));
        }
    }

    /// Opens a session; an older one of the same device is ended.
    fn open(self: &Arc<Self>, network: Arc<str>, device: Uuid) -> Result<Registered, Draining> {
        let session = Arc::new(Session {
            id: self.next_id.fetch_add(1, Ordering::Relaxed),
            network,
            device,
            mailbox: Mutex::default(),
            ready: Notify::new(),
            alive: Mutex::default(),
        });
        let mut open = lock(&self.open);
        // Under the lock, so that a drain reaches every session that it does not refuse.
        if self.draining.is_cancelled() {
            return Err(Draining);
        }
        if let Some(older) = open.by_device.insert(device, session.id) {
            open.end(older, End::Replaced);
        }
        open.sessions.insert(session.id, session.clone());
        drop(open);
        self.sessions.inc();
        self.session_changed(&session.network, device);
        Ok(Registered { hub: self.clone(), session })
    }

    fn close(&self, session: &Session) {
        let (held, services) = {
            let mailbox = lock(&session.mailbox);
            (mailbox.held(), mailbox.held_services())
        };
        let mut open = lock(&self.open);
        open.sessions.remove(&session.id);
        if open.by_device.get(&session.device) == Some(&session.id) {
            open.by_device.remove(&session.device);
        }
        for peer in held {
            open.remove_holder(peer, session.id);
        }
        for service in services {
            open.remove_service_holder(&session.network, &service, session.id);
        }
        drop(open);
        self.sessions.dec();
        self.session_changed(&session.network, session.device);
    }

    /// Notes that a session holds peers; returns those that it did not hold before.
    fn hold(&self, session: &Session, peers: &[Uuid]) -> Result<Vec<Uuid>, TooMany> {
        let mut new = Vec::new();
        let mut open = lock(&self.open);
        let mut mailbox = lock(&session.mailbox);
        for peer in peers {
            if mailbox.hold(*peer).ok_or(TooMany)? {
                open.holders.entry(*peer).or_default().push(session.id);
                new.push(*peer);
            }
        }
        Ok(new)
    }

    /// Notes that a session holds peers no longer.
    fn release(&self, session: &Session, peers: &[Uuid]) {
        let mut open = lock(&self.open);
        let mut mailbox = lock(&session.mailbox);
        for peer in peers {
            if mailbox.release(*peer) {
                open.remove_holder(*peer, session.id);
            }
        }
    }

    /// Notes that a session holds the names of Services; returns those that it did not hold before.
    fn hold_services(&self, session: &Session, services: &[Arc<str>]) -> Result<Vec<Arc<str>>, TooMany> {
        let mut new = Vec::new();
        let mut open = lock(&self.open);
        let mut mailbox = lock(&session.mailbox);
        for service in services {
            if mailbox.hold_service(service).ok_or(TooMany)? {
                let holders = open.service_holders.entry(session.network.clone()).or_default();
                holders.entry(service.clone()).or_default().push(session.id);
                new.push(service.clone());
            }
        }
        Ok(new)
    }

    /// Notes that a session holds the names of Services no longer.
    fn release_services(&self, session: &Session, services: &[Arc<str>]) {
        let mut open = lock(&self.open);
        let mut mailbox = lock(&session.mailbox);
        for service in services {
            if mailbox.release_service(service) {
                open.remove_service_holder(&session.network, service, session.id);
            }
        }
    }

    /// Tells all whom it concerns what has changed.
    fn changed(&self, applied: &Applied) {
        // Before the sessions are locked: others look at sessions while they read the registry.
        let (probing, elsewhere): (BTreeSet<Uuid>, _) = {
            let index = self.registry.read();
            let probing = applied.changes.iter().flat_map(|change| probes::concerned(&index, change));
            let elsewhere = applied.changes.iter().any(|change| match change {
                Change::RegistrarRecord { old, new } => {
                    registrar::is_told_differently(old.as_deref(), new.as_deref())
                }
                _ => false,
            });
            (probing.collect(), elsewhere.then(|| index.registrars().advertised(&self.own)))
        };
        let mut open = lock(&self.open);
        open.probes_changed(probing.into_iter());
        for change in &applied.changes {
            match change {
                Change::Device { old, new } => {
                    open.device_changed(old.as_deref(), new.as_deref(), applied.revision);
                    if let Some(device) = refused(old.as_deref(), new.as_deref()) {
                        lock(&self.directors).refuse(&device.network, device.uid);
                    }
                    if let (Some(old), Some(new)) = (old, new)
                        && old.revoked
                        && !new.revoked
                    {
                        lock(&self.directors).forgive(&new.network);
                    }
                }
                Change::Network { old, new } => {
                    let Some(network) = new.as_ref().or(old.as_ref()) else { continue };
                    open.tell_all(&network.name);
                }
                Change::Director { old, new } => {
                    lock(&self.directors).changed(old.as_deref(), new.as_deref());
                    if let Some(director) = told_differently(old.as_deref(), new.as_deref()) {
                        open.tell_all(&director.network);
                    }
                }
                Change::Carrier { network, old, new, .. } => {
                    open.carrier_changed(network, *old, *new, applied.revision);
                }
                Change::Registrar { .. }
                | Change::RegistrarRecord { .. }
                | Change::Presence { .. }
                | Change::Token { .. }
                | Change::Namespace { .. }
                | Change::Service { .. }
                | Change::EndpointSlice { .. } => {}
            }
        }
        if let Some(advertised) = elsewhere {
            self.advertised.store(advertised.into());
            open.tell_where_registrars_are();
            lock(&self.directors).tell_all();
        }
        for network in &applied.virtual_services {
            open.virtual_services_changed(network);
        }
        for service in &applied.services {
            open.service_changed(service, applied.revision);
        }
    }
}

/// The device of a change, if nobody must relay for it from then on.
fn refused<'a>(old: Option<&'a Device>, new: Option<&'a Device>) -> Option<&'a Device> {
    new.or(old).filter(|_| new.is_none_or(|new| new.revoked))
}

/// The director of a change, if devices have to be told.
fn told_differently<'a>(old: Option<&'a Director>, new: Option<&'a Director>) -> Option<&'a Director> {
    let differs = match (old, new) {
        (Some(old), Some(new)) => is_told_differently(old, new),
        // One that has just joined is not told of before it registers.
        (one, other) => one.or(other).is_some_and(|director| !director.endpoints.is_empty()),
    };
    new.or(old).filter(|_| differs)
}

#[cfg(test)]
mod tests;
