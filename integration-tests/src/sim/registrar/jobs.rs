//! Requests under way at a registrar: planned, written, awaited and answered, as `registry::shell` does it.

use std::time::Duration;

use muster_agent::control::Validity;
use muster_common::time::Timestamp;
use muster_proto::{registration::RegisterResponse, storage::Claim};
use muster_registrar::{
    registry::{
        keys,
        plan::{Held, Outcome, register},
    },
    store::{KeyRange, Op, Revision, Txn, TxnOutcome},
};
use prost::Message as _;
use rand::RngExt as _;

use super::{BACKDATE, CATCH_UP};
use crate::sim::{
    Checked, Violation,
    connections::Answer,
    requests::{NETWORK, Refusal, Reply, Request},
    world::{Event, World},
};

/// How often a request is planned before it is given up.
const ATTEMPTS: u32 = 32;

/// A request under way.
#[derive(Debug)]
pub(super) struct Job {
    origin: Origin,
    request: Request,
    attempt: u32,
    stage: Stage,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Origin {
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

impl World {
    /// Has a registrar carry out an operator's request.
    pub(in crate::sim) fn administer(&mut self, r: usize, request: Request) -> Checked {
        if self.registrars[r].is_up { self.start(r, Origin::Operator, request) } else { Ok(()) }
    }

    pub(super) fn start(&mut self, r: usize, origin: Origin, request: Request) -> Checked {
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

    pub(in crate::sim) fn on_txn(&mut self, r: usize, life: u64, job: Option<u64>, txn: &Txn) -> Checked {
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
    pub(super) fn advance_jobs(&mut self, r: usize) -> Checked {
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

    pub(in crate::sim) fn on_give_up(&mut self, r: usize, life: u64, id: u64) -> Checked {
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
                    let store_epoch = index.format().map_or(0, |format| format.epoch);
                    Answer::Registered(Box::new(RegisterResponse { config, store_epoch, unsaved: false }))
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
}

/// Certificates count whole seconds.
pub(super) fn whole(at: Timestamp) -> Timestamp {
    Timestamp::from_epoch(Duration::from_secs(at.unix_seconds()))
}

fn validity(now: Timestamp, lifetime: Duration) -> Validity {
    Validity { not_before: whole(now.saturating_sub(BACKDATE)), not_after: whole(now + lifetime) }
}
