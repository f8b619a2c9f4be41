//! A registrar: the real index and plans, in a played shell that does what `registry::shell` and `api` do.

mod jobs;
mod sessions;

use std::{collections::BTreeMap, time::Duration};

use muster_agent::control::{LookupBy, LookupResult};
use muster_common::time::Timestamp;
use muster_registrar::{
    registry::{
        Applied, Index, keys,
        plan::{self, register},
        view::{Advertised, By},
    },
    store::{KeyRange, Revision, StoreError, memory::MemoryStore},
};
use rand::RngExt as _;
use uuid::Uuid;

use self::{
    jobs::{Job, Origin, whole},
    sessions::Session,
};
use super::{
    Checked, Violation,
    connections::{Answer, Purpose},
    links::Node,
    must,
    requests::{NETWORK, Request},
    world::{Event, World},
};

/// How long a request or hello waits for the index.
const CATCH_UP: Duration = Duration::from_secs(10);
/// Between searches for what can be forgotten.
const SWEEP_INTERVAL: Duration = Duration::from_secs(60);
/// How far a certificate is back-dated.
pub(super) const BACKDATE: Duration = Duration::from_secs(900);
/// Keys read at a time.
const PAGE: usize = 7;

/// A registrar, running or not.
#[derive(Debug)]
pub(super) struct Registrar {
    pub(super) is_up: bool,
    pub(super) life: u64,
    pub(super) index: Index,
    pub(super) draining: bool,
    jobs: BTreeMap<u64, Job>,
    pub(super) sessions: BTreeMap<u64, Session>,
    by_device: BTreeMap<Uuid, u64>,
    /// When the index reached which revision.
    pub(super) progress: BTreeMap<Revision, Duration>,
    watching: bool,
    /// Nothing is heard of the store before.
    pub(super) stalled: Duration,
}

/// Reads all of the store at one revision.
pub(super) fn load(store: &MemoryStore, now: Timestamp) -> Checked<Index> {
    let failed = |error: StoreError| Violation(format!("cannot read the store: {error}"));
    let (mut index, mut at) = (Index::new(), None);
    for range in keys::loaded() {
        let mut rest = range;
        loop {
            let page = store.range_sync(&rest, at, PAGE).map_err(failed)?;
            at = Some(page.revision);
            let bad = index.load(&page.kvs, now);
            must(bad.is_empty(), || format!("the store holds what cannot be used: {bad:?}"))?;
            match page.kvs.last() {
                Some(last) if page.more => rest = rest.after(&last.key),
                _ => break,
            }
        }
    }
    index.loaded(at.unwrap_or_default());
    Ok(index)
}

impl Registrar {
    /// A registrar that does not run.
    pub(super) fn new() -> Self {
        Self {
            is_up: false,
            life: 0,
            index: Index::new(),
            draining: false,
            jobs: BTreeMap::new(),
            sessions: BTreeMap::new(),
            by_device: BTreeMap::new(),
            progress: BTreeMap::new(),
            watching: false,
            stalled: Duration::ZERO,
        }
    }
}

impl World {
    fn advertised(&self) -> Advertised {
        let registrars = (0..self.registrars.len()).map(|n| format!("r{n}:7500")).collect();
        Advertised { registrars, dns_servers: Vec::new() }
    }

    /// Starts a registrar, from what is in the store.
    pub(super) fn start_registrar(&mut self, r: usize) -> Checked {
        if self.registrars[r].is_up {
            return Ok(());
        }
        let index = load(&self.store, self.civil())?;
        let life = self.registrars[r].life + 1;
        self.note(format_args!("r{r} starts at revision {}", index.revision()));
        let progress = BTreeMap::from([(index.revision(), self.now)]);
        self.registrars[r] = Registrar { is_up: true, life, index, progress, ..Registrar::new() };
        self.after(SWEEP_INTERVAL, Event::Sweep { registrar: r, life });
        Ok(())
    }

    /// A registrar dies, and with it all that it held in memory.
    pub(super) fn stop_registrar(&mut self, r: usize) {
        self.note(format_args!("r{r} stops"));
        let life = self.registrars[r].life + 1;
        self.registrars[r] = Registrar { life, ..Registrar::new() };
        self.doom_all(|connection| connection.registrar == r);
        let calls: Vec<u64> =
            self.calls.iter().filter(|(_, c)| c.registrar == r).map(|(id, _)| *id).collect();
        for id in calls {
            let at = self.span(0, 2_000);
            self.after(at, Event::Answer(id, Answer::Unavailable("connection reset".into())));
        }
    }

    /// A registrar asks its agents to go to another one.
    pub(super) fn drain_registrar(&mut self, r: usize, within: Duration) {
        self.note(format_args!("r{r} drains"));
        self.registrars[r].draining = true;
        self.registrars[r].sessions.values_mut().for_each(|session| {
            session.mailbox.drain(muster_registrar::session::mailbox::Away { within, to: [].into() })
        });
        self.flush_sessions(r);
    }

    pub(super) fn is_alive(&self, r: usize, life: u64) -> bool {
        self.registrars[r].is_up && self.registrars[r].life == life
    }

    // Calls

    pub(super) fn on_call(&mut self, id: u64) -> Checked {
        let Some(call) = self.calls.get(&id) else { return Ok(()) };
        let (r, host) = (call.registrar, call.host);
        if !self.is_alive(r, call.registrar_life) || !self.links.is_open(Node::Host(host), Node::Registrar(r))
        {
            return Ok(());
        }
        // Who has been restarted has closed its connections, and what had not arrived by then is not done any more.
        if matches!(call.purpose, Purpose::Register { .. }) && self.hosts[host].life != call.life {
            return Ok(());
        }
        let now = self.civil();
        let uid = match (&call.purpose, call.caller) {
            (Purpose::Enroll(_), _) => Uuid::nil(),
            // On a connection that was made when the certificate was good.
            (Purpose::Lookup { .. } | Purpose::Renew { .. }, Some((uid, _))) => uid,
            (_, Some((uid, validity))) if validity.not_after > now => uid,
            _ => {
                self.answer(id, Answer::Unavailable("the certificate has expired".into()));
                return Ok(());
            }
        };
        let request = match &call.purpose {
            Purpose::Enroll(joining) => {
                let mut enroll = joining.enroll.clone();
                (enroll.now, enroll.lifetime) = (now, self.lifetime);
                enroll.uid = self.uid();
                Request::Enroll(Box::new(enroll))
            }
            Purpose::Register { message, .. } => {
                Request::Register { uid, message: message.clone(), now, before: Default::default() }
            }
            Purpose::Renew { .. } => Request::Renew { uid, expiry: whole(now + self.lifetime) },
            Purpose::Leave => Request::Deregister { uid, now },
            Purpose::Lookup { by, .. } => {
                let by = *by;
                let answer = self.look_up(r, uid, by);
                self.answer(id, answer);
                return Ok(());
            }
            Purpose::Resolve(name) => {
                let index = &self.registrars[r].index;
                let found = register::find(index, NETWORK, uid).ok().and_then(|viewer| {
                    Some(index.network(NETWORK)?.look_up(viewer, By::Name(name))?.addresses().collect())
                });
                self.answer(id, Answer::Resolved(found.unwrap_or_default()));
                return Ok(());
            }
        };
        self.start(r, Origin::Call(id), request)
    }

    fn look_up(&mut self, r: usize, uid: Uuid, by: LookupBy) -> Answer {
        let index = &self.registrars[r].index;
        let viewer = match register::find(index, NETWORK, uid) {
            Ok(viewer) => viewer,
            Err(error) => return Answer::Refused(error.to_string()),
        };
        let Some(state) = index.network(NETWORK) else { return Answer::Refused("no network".into()) };
        let by = match &by {
            LookupBy::Address(address) => By::Address(*address),
            LookupBy::PublicKey(key) => By::Key(key),
        };
        let Some(found) = state.look_up(viewer, by) else { return Answer::LookedUp(LookupResult::NotFound) };
        let (peer, found, has_key) = (state.peer(found, index.revision()), found.uid, viewer.key.is_some());
        if has_key && found != uid {
            let now = self.instant();
            let registrar = &mut self.registrars[r];
            if let Some(session) = registrar.by_device.get(&found).and_then(|c| registrar.sessions.get_mut(c))
            {
                session.mailbox.introduce(uid, now);
            }
            self.flush_sessions(r);
        }
        Answer::LookedUp(LookupResult::Found(Box::new(peer)))
    }

    // The store's changes

    /// A registrar is going to hear of the store's changes.
    pub(super) fn watch_soon(&mut self, r: usize) {
        let registrar = &self.registrars[r];
        if !registrar.is_up || registrar.watching {
            return;
        }
        let (life, stalled) = (registrar.life, registrar.stalled);
        let lag = self.span(0, 30).max(stalled.saturating_sub(self.now));
        self.registrars[r].watching = true;
        self.after(lag, Event::Watch { registrar: r, life });
    }

    pub(super) fn on_watch(&mut self, r: usize, life: u64) -> Checked {
        if !self.is_alive(r, life) {
            return Ok(());
        }
        let (civil, now) = (self.civil(), self.now);
        let most = self.rng.random_range(1..=8);
        let registrar = &mut self.registrars[r];
        registrar.watching = false;
        let mut news = Vec::new();
        match self.store.changes_sync(&KeyRange::all(), registrar.index.revision() + 1) {
            Ok(changes) => {
                let more = changes.batches.len() > most;
                for batch in changes.batches.iter().take(most) {
                    let applied = registrar.index.apply(batch, civil);
                    must(applied.bad.is_empty(), || format!("r{r} cannot use {:?}", applied.bad))?;
                    registrar.progress.insert(registrar.index.revision(), now);
                    registrar.changed(&applied);
                    news.push(applied);
                }
                if more {
                    self.watch_soon(r);
                }
            }
            Err(StoreError::Compacted { .. }) => {
                let mut index = load(&self.store, civil)?;
                let applied = Applied {
                    revision: index.revision(),
                    changes: registrar.index.changes_to(&index),
                    ..Applied::default()
                };
                index.continue_from(&registrar.index);
                registrar.index = index;
                registrar.progress.insert(applied.revision, now);
                registrar.changed(&applied);
                self.note(format_args!("r{r} loads anew at revision {}", applied.revision));
                news.push(applied);
            }
            Err(error) => return Err(Violation(format!("r{r} cannot follow the store: {error}"))),
        }
        news.iter().for_each(|applied| self.tell_directors(r, applied));
        self.advance_jobs(r)?;
        let reached = self.registrars[r].index.revision();
        let waiting: Vec<u64> = self.registrars[r]
            .sessions
            .iter()
            .filter(|(_, s)| s.greeting.as_ref().is_some_and(|hello| hello.revision <= reached))
            .map(|(id, _)| *id)
            .collect();
        for connection in waiting {
            self.greet(r, connection, false)?;
        }
        self.flush_sessions(r);
        Ok(())
    }

    pub(super) fn on_sweep(&mut self, r: usize, life: u64) -> Checked {
        if !self.is_alive(r, life) {
            return Ok(());
        }
        if let Some(txn) = plan::sweep::addresses(&self.registrars[r].index, self.civil()) {
            self.note(format_args!("r{r} sweeps"));
            self.after(Duration::from_millis(3), Event::Txn { registrar: r, life, job: None, txn });
        }
        self.after(SWEEP_INTERVAL, Event::Sweep { registrar: r, life });
        Ok(())
    }
}
