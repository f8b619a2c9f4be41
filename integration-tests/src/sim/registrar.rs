//! A registrar: the real index and plans, in a played shell that does what `registry::shell` and `api` do.

mod sessions;

use std::{collections::BTreeMap, time::Duration};

use muster_agent::control::{LookupBy, LookupResult, Validity};
use muster_common::time::Timestamp;
use muster_proto::{registration::RegisterResponse, storage::Claim};
use muster_registrar::{
    registry::{
        Applied, Index, keys,
        plan::{self, Held, Outcome, register},
        view::{Advertised, By},
    },
    store::{KeyRange, Op, Revision, StoreError, Txn, TxnOutcome, memory::MemoryStore},
};
use prost::Message as _;
use rand::RngExt as _;
use uuid::Uuid;

use self::sessions::Session;
use super::{
    Checked, Violation,
    links::Node,
    must,
    requests::{NETWORK, Refusal, Reply, Request},
    world::{Answer, Event, Purpose, World},
};

/// How often a request is planned before it is given up.
const ATTEMPTS: u32 = 32;
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

/// A request under way.
#[derive(Debug)]
struct Job {
    origin: Origin,
    request: Request,
    attempt: u32,
    stage: Stage,
}

#[derive(Clone, Copy, Debug)]
enum Origin {
    Call(u64),
    Session(u64),
    Operator,
}

#[derive(Debug)]
enum Stage {
    Planning,
    Writing {
        reservations: Vec<Held>,
        reply: Reply,
    },
    /// Waits for the index, then answers, or plans again.
    Reaching {
        revision: Revision,
        reservations: Vec<Held>,
        reply: Option<Reply>,
    },
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
        self.registrars[r].sessions.values_mut().for_each(|session| session.mailbox.drain(within));
        self.flush_sessions(r);
    }

    fn is_alive(&self, r: usize, life: u64) -> bool {
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
            Purpose::Register { message, .. } => Request::Register { uid, message: message.clone(), now },
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

    // Requests that write

    /// Has a registrar carry out an operator's request.
    pub(super) fn administer(&mut self, r: usize, request: Request) -> Checked {
        if self.registrars[r].is_up { self.start(r, Origin::Operator, request) } else { Ok(()) }
    }

    fn start(&mut self, r: usize, origin: Origin, request: Request) -> Checked {
        self.note(format_args!("r{r} {}", request.describe()));
        let id = self.number();
        let job = Job { origin, request, attempt: 0, stage: Stage::Planning };
        self.registrars[r].jobs.insert(id, job);
        self.plan(r, id)
    }

    fn plan(&mut self, r: usize, id: u64) -> Checked {
        let registrar = &mut self.registrars[r];
        let Some(job) = registrar.jobs.get_mut(&id) else { return Ok(()) };
        if job.attempt >= ATTEMPTS {
            return self.finish(r, id, Err(Refusal::Unavailable("contended".into())));
        }
        match job.request.plan(&mut registrar.index, job.attempt) {
            Ok(Outcome::Done(reply)) => self.finish(r, id, Ok(reply)),
            Ok(Outcome::Write(plan)) => {
                job.stage = Stage::Writing { reservations: plan.reservations, reply: plan.reply };
                let life = registrar.life;
                let at = self.span(0, 15);
                self.after(at, Event::Txn { registrar: r, life, job: Some(id), txn: plan.txn });
                Ok(())
            }
            Err(Refusal::NameTaken) => {
                if let Request::Enroll(enroll) = &mut job.request
                    && enroll.claim.is_none()
                {
                    let key = KeyRange::key(keys::device_name(NETWORK, &enroll.name));
                    let page = self.store.range_sync(&key, None, 1).map_err(|e| Violation(e.to_string()))?;
                    let found = page.kvs.first().and_then(|kv| Claim::decode(&*kv.value).ok());
                    enroll.claim = Some(found.unwrap_or_default());
                    return self.plan(r, id);
                }
                self.finish(r, id, Err(Refusal::NameTaken))
            }
            Err(refusal) => self.finish(r, id, Err(refusal)),
        }
    }

    pub(super) fn on_txn(&mut self, r: usize, life: u64, job: Option<u64>, txn: &Txn) -> Checked {
        let Some(id) = job else { return self.commit(txn).map(drop) };
        if !self.is_alive(r, life) {
            // The registrar has died meanwhile; what it wrote may have got through.
            return if self.rng.random_bool(0.5) { self.commit(txn).map(drop) } else { Ok(()) };
        }
        let chance = self.rng.random_range(0..100);
        if chance < 2 {
            // Nobody knows whether it is going to be written: it is, later.
            let at = self.span(0, 50);
            self.after(at, Event::Txn { registrar: r, life, job: None, txn: txn.clone() });
            return self.doubt(r, id, txn);
        }
        let outcome = self.commit(txn)?;
        match outcome {
            _ if chance < 4 => self.doubt(r, id, txn),
            TxnOutcome::Committed(revision) => self.written(r, id, Some(revision)),
            TxnOutcome::Conflict => {
                self.counts.conflicts += 1;
                self.written(r, id, None)
            }
        }
    }

    /// The store's answer was lost: looks whether the transaction was written.
    fn doubt(&mut self, r: usize, id: u64, txn: &Txn) -> Checked {
        self.note(format_args!("r{r} does not know whether {id} was written"));
        let Some(witness) = txn.ops.first() else { return self.written(r, id, None) };
        let page = self.store.range_sync(&KeyRange::key(witness.key().clone()), None, 1);
        let page = page.map_err(|e| Violation(e.to_string()))?;
        let found = page.kvs.first();
        let happened = match witness {
            Op::Put { value, .. } => found.is_some_and(|kv| kv.value == *value),
            Op::Delete { .. } => found.is_none(),
        };
        self.written(r, id, happened.then_some(page.revision))
    }

    /// A transaction was written at a revision, or has to be planned again.
    fn written(&mut self, r: usize, id: u64, revision: Option<Revision>) -> Checked {
        let now = self.store.model().revision();
        let registrar = &mut self.registrars[r];
        let Some(job) = registrar.jobs.get_mut(&id) else { return Ok(()) };
        let Stage::Writing { reservations, reply } = std::mem::replace(&mut job.stage, Stage::Planning)
        else {
            return Ok(());
        };
        job.stage = match revision {
            Some(revision) => Stage::Reaching { revision, reservations, reply: Some(reply) },
            None => {
                reservations.iter().for_each(|held| registrar.index.cancel(held));
                Stage::Reaching { revision: now, reservations: Vec::new(), reply: None }
            }
        };
        let life = registrar.life;
        self.after(CATCH_UP, Event::GiveUp { registrar: r, life, job: id });
        self.advance_jobs(r)
    }

    /// Goes on with the requests whose revision the index has reached.
    fn advance_jobs(&mut self, r: usize) -> Checked {
        let reached = self.registrars[r].index.revision();
        let ready = |job: &Job| matches!(job.stage, Stage::Reaching { revision, .. } if revision <= reached);
        let ids: Vec<u64> =
            self.registrars[r].jobs.iter().filter(|(_, job)| ready(job)).map(|(id, _)| *id).collect();
        for id in ids {
            let Some(job) = self.registrars[r].jobs.get_mut(&id) else { continue };
            match std::mem::replace(&mut job.stage, Stage::Planning) {
                Stage::Reaching { reply: Some(reply), .. } => self.finish(r, id, Ok(reply))?,
                _ => {
                    job.attempt += 1;
                    self.plan(r, id)?;
                }
            }
        }
        Ok(())
    }

    pub(super) fn on_give_up(&mut self, r: usize, life: u64, id: u64) -> Checked {
        if !self.is_alive(r, life) {
            return Ok(());
        }
        let registrar = &mut self.registrars[r];
        let Some(job) = registrar.jobs.get_mut(&id) else { return Ok(()) };
        if let Stage::Reaching { reservations, .. } = &job.stage {
            reservations.iter().for_each(|held| registrar.index.cancel(held));
            return self.finish(r, id, Err(Refusal::Unavailable("behind".into())));
        }
        Ok(())
    }

    /// Answers a request.
    fn finish(&mut self, r: usize, id: u64, result: Result<Reply, Refusal>) -> Checked {
        let Some(job) = self.registrars[r].jobs.remove(&id) else { return Ok(()) };
        if let Err(refusal) = &result {
            self.note(format_args!("r{r} refuses to {}: {refusal:?}", job.request.describe()));
        }
        match job.origin {
            Origin::Operator => Ok(()),
            Origin::Session(connection) => self.endpoints_written(r, connection, &job.request, result),
            Origin::Call(call) => {
                let answer = self.answer_to(r, &job.request, result)?;
                self.answer(call, answer);
                Ok(())
            }
        }
    }

    fn answer_to(&mut self, r: usize, request: &Request, result: Result<Reply, Refusal>) -> Checked<Answer> {
        let advertised = self.advertised();
        let index = &self.registrars[r].index;
        Ok(match (result, request) {
            (Err(refusal), Request::Enroll(_)) => Answer::NotEnrolled(refusal),
            (Err(Refusal::Device(reason)), _) => Answer::Refused(reason),
            (Err(refusal), _) => Answer::Unavailable(format!("{refusal:?}")),
            (Ok(Reply::Enrolled(enrolled)), Request::Enroll(enroll)) => {
                let uid = enrolled.uid;
                let validity = validity(enroll.now, enroll.lifetime);
                if let Some(name) = enrolled.counts_for {
                    self.start(r, Origin::Operator, Request::CountUse { name: name.into() })?;
                }
                Answer::Enrolled { uid, validity }
            }
            (Ok(_), Request::Register { uid, .. }) => match register::find(index, NETWORK, *uid) {
                Ok(device) => {
                    let config = index.network(NETWORK).map(|state| state.config(device, &advertised));
                    Answer::Registered(Box::new(RegisterResponse { config }))
                }
                Err(error) => Answer::Refused(error.to_string()),
            },
            (Ok(_), Request::Renew { expiry, .. }) => Answer::Renewed(Validity {
                not_before: expiry.saturating_sub(self.lifetime + BACKDATE),
                not_after: *expiry,
            }),
            (Ok(_), _) => Answer::Left,
        })
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
        match self.store.changes_sync(&KeyRange::all(), registrar.index.revision() + 1) {
            Ok(changes) => {
                let more = changes.batches.len() > most;
                for batch in changes.batches.iter().take(most) {
                    let applied = registrar.index.apply(batch, civil);
                    must(applied.bad.is_empty(), || format!("r{r} cannot use {:?}", applied.bad))?;
                    registrar.progress.insert(registrar.index.revision(), now);
                    registrar.changed(&applied);
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
                index.continue_serials(&registrar.index);
                registrar.index = index;
                registrar.progress.insert(applied.revision, now);
                registrar.changed(&applied);
                self.note(format_args!("r{r} loads anew at revision {}", applied.revision));
            }
            Err(error) => return Err(Violation(format!("r{r} cannot follow the store: {error}"))),
        }
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

/// Certificates count whole seconds.
fn whole(at: Timestamp) -> Timestamp {
    Timestamp::from_epoch(Duration::from_secs(at.unix_seconds()))
}

fn validity(now: Timestamp, lifetime: Duration) -> Validity {
    Validity { not_before: whole(now.saturating_sub(BACKDATE)), not_after: whole(now + lifetime) }
}
