//! What comes back to a host from registrars: answers to calls, and what its session says.

use muster_agent::control::{Failure, LookupResult};

use super::{Disk, Joining, TOKEN_NEWS};
use crate::sim::{
    Checked, Violation,
    connections::{Answer, Call, Down, Purpose},
    links::Node,
    must,
    registrar::BACKDATE,
    requests::Refusal,
    trace::digest,
    world::{Event, World},
};

impl World {
    /// A call of a host is answered, or not.
    pub(in crate::sim) fn on_answer(&mut self, id: u64, answer: Answer) -> Checked {
        let Some(call) = self.calls.remove(&id) else { return Ok(()) };
        let h = call.host;
        if self.hosts[h].life != call.life {
            return Ok(());
        }
        if self.hosts[h].asleep.is_some() {
            self.calls.insert(id, call);
            self.hosts[h].held_back.push(Event::Answer(id, answer));
            return Ok(());
        }
        self.take_answer(&call, answer)?;
        self.drive(h)
    }

    fn take_answer(&mut self, call: &Call, answer: Answer) -> Checked {
        let (h, now, civil) = (call.host, self.host_now(call.host), self.host_civil(call.host));
        match &call.purpose {
            Purpose::Enroll(joining) => return self.joined(h, joining, answer),
            Purpose::Leave => {
                if matches!(answer, Answer::Left) {
                    self.wipe(h);
                }
                self.hosts[h].is_leaving = false;
                return Ok(());
            }
            _ => {}
        }
        let host = &mut self.hosts[h];
        let (Some(running), Some(disk)) = (&mut host.running, &mut host.disk) else { return Ok(()) };
        match (&call.purpose, answer) {
            (Purpose::Register { attempt, .. }, Answer::Registered(response)) => {
                self.counts.registered += 1;
                running.control.handle_registered(*attempt, Ok(*response), now);
            }
            (Purpose::Register { attempt, .. }, answer) => {
                running.control.handle_registered(*attempt, Err(failure(answer)), now);
            }
            (Purpose::Lookup { attempt, id, .. }, answer) if *attempt == running.attempt => {
                self.counts.lookups += 1;
                let result = match answer {
                    Answer::LookedUp(result) => result,
                    Answer::Refused(_) => LookupResult::NotFound,
                    _ => LookupResult::Unavailable,
                };
                self.trace.line(self.now, format_args!("h{h} lookup {id}: {}", found(&result)));
                running.control.handle_looked_up(*id, result, now);
            }
            (Purpose::Renew { .. }, Answer::Renewed(validity)) => {
                self.counts.renewed += 1;
                disk.validity = validity;
                running.control.handle_certificate(validity, civil, now);
            }
            (Purpose::Renew { attempt }, _) if *attempt == running.attempt => {
                running.control.handle_renewal_failed(now);
            }
            (Purpose::Resolve(_), Answer::Resolved(addresses)) => {
                running.control.handle_resolved(&addresses, now);
            }
            _ => {}
        }
        Ok(())
    }

    fn joined(&mut self, h: usize, joining: &Joining, answer: Answer) -> Checked {
        match answer {
            Answer::Enrolled { uid, validity } => {
                self.note(format_args!("h{h} has joined as {uid}"));
                self.counts.joined += 1;
                let name = &joining.enroll.name;
                let owner = self.model.by_name(name);
                must(owner.is_none_or(|owner| owner == uid), || {
                    format!("{uid} joined as {name}, {owner:?}'s")
                })?;
                let Some(token) = joining.token.and_then(|n| self.tokens.get_mut(n)) else {
                    return Err(Violation(format!("{uid} joined with a token that nobody has made")));
                };
                // Unless the answer is a repetition, the token must have been good when the request was taken.
                let is_new = token.joined.insert(uid);
                let asked = validity.not_before + BACKDATE;
                let revoked = self.model.revoked_tokens.get(token.secret.id().as_str());
                let good = token.expires > asked && revoked.is_none_or(|at| asked <= *at + TOKEN_NEWS);
                must(!is_new || good, || {
                    format!("{uid} joined at {asked} with {token:?}, revoked: {revoked:?}")
                })?;
                let once = token.reusable || token.joined.len() == 1;
                must(once, || format!("a one-off token let in {:?}", token.joined))?;
                self.hosts[h].disk = Some(Disk {
                    uid,
                    validity,
                    private_key: joining.private_key,
                    registrar: format!("r{}:7500", joining.registrar),
                    config: None,
                    peers: Vec::new(),
                    epoch: 0,
                    revision: 0,
                });
                self.hosts[h].joining = None;
                self.start_agent(h)
            }
            Answer::NotEnrolled(refusal) => {
                self.note(format_args!("h{h} may not join: {refusal:?}"));
                // A lost answer is asked for again; a refusal is final.
                if !matches!(refusal, Refusal::Unavailable(_)) {
                    self.hosts[h].joining = None;
                }
                Ok(())
            }
            _ => {
                self.note(format_args!("h{h} cannot join just now"));
                Ok(())
            }
        }
    }

    pub(in crate::sim) fn on_down(&mut self, connection: u64, message: Down) -> Checked {
        let Some(c) = self.connections.get(&connection) else { return Ok(()) };
        let (h, attempt, life, doomed) = (c.host, c.attempt, c.life, c.doomed);
        if self.hosts[h].asleep.is_some() && self.hosts[h].life == life {
            self.hosts[h].held_back.push(Event::Down(connection, message));
            return Ok(());
        }
        let open = self.links.is_open(Node::Host(h), Node::Registrar(c.registrar));
        let is_loss =
            matches!(&message, Down::Closed(Failure::Unavailable(reason)) if reason == "connection lost");
        if !is_loss && (doomed || !open) {
            self.doom(connection);
            return Ok(());
        }
        let now = self.host_now(h);
        if self.hosts[h].life != life {
            return Ok(());
        }
        let Some(running) = self.hosts[h].running.as_mut().filter(|r| r.connection == Some(connection))
        else {
            return Ok(());
        };
        let line = match message {
            Down::Opened => {
                self.counts.sessions += 1;
                running.control.handle_session_opened(attempt, now);
                "session opened".to_owned()
            }
            Down::Message(message) => {
                let line = format!("{:x}", digest(format!("{message:?}").as_bytes()));
                running.control.handle_session_message(attempt, *message, now);
                line
            }
            Down::Closed(failure) => {
                let line = format!("session closed: {failure:?}");
                running.connection = None;
                running.control.handle_session_closed(attempt, failure, now);
                line
            }
        };
        self.note(format_args!("h{h} {line}"));
        self.drive(h)
    }
}

fn failure(answer: Answer) -> Failure {
    match answer {
        Answer::Refused(reason) => Failure::Refused(reason),
        Answer::Unavailable(reason) => Failure::Unavailable(reason),
        other => Failure::Unavailable(format!("{other:?}")),
    }
}

fn found(result: &LookupResult) -> String {
    match result {
        LookupResult::Found(peer) => format!("{} at {}", peer.name, peer.revision),
        other => format!("{other:?}"),
    }
}
