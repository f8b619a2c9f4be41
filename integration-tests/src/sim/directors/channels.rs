//! Attachments to directors, and the streams that carry frames where UDP is blocked: connections as the sessions with
//! registrars are, each an ordered way up and down that may break.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use muster_agent::{
    control::{DirectorEvent, DirectorTarget, Failure, Validity},
    directors::flow::Attachment,
};
use muster_director::relay::AttachError;
use muster_tunnel::DirectorId;
use uuid::Uuid;

use crate::sim::{
    Checked,
    links::Node,
    world::{Event, World},
};

/// How long an agent waits for a director.
const PATIENCE: Duration = Duration::from_secs(9);
/// How often agents say hello.
const HELLO_INTERVAL: Duration = Duration::from_secs(15);
const LOST: &str = "connection lost";

/// What a channel is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::sim) enum What {
    Attachment,
    Stream,
}

/// A connection of an agent with a director.
#[derive(Debug)]
pub(in crate::sim) struct Channel {
    what: What,
    pub(in crate::sim) host: usize,
    life: u64,
    id: DirectorId,
    attempt: u64,
    pub(in crate::sim) director: usize,
    director_life: u64,
    /// Whose it is, and until when its certificate is good.
    uid: Uuid,
    validity: Validity,
    /// Where it seems to come from.
    from: IpAddr,
    session: Option<u32>,
    began: Duration,
    /// The agent has heard that it is open.
    is_open: bool,
    up: Duration,
    down: Duration,
    doomed: bool,
}

/// What goes up.
#[derive(Debug)]
pub(in crate::sim) enum ToDirector {
    Open,
    Frame(Vec<u8>),
    Hangup,
}

/// What comes down.
#[derive(Debug)]
pub(in crate::sim) enum ToAgent {
    Attached(Attachment),
    Opened,
    Frame(Vec<u8>),
    Draining,
    Closed(Failure),
    /// The agent has waited long enough.
    Timeout,
}

impl World {
    // The agent's end

    /// A host connects to a director.
    pub(in crate::sim) fn open_channel(
        &mut self,
        h: usize,
        what: What,
        id: DirectorId,
        attempt: u64,
        target: &DirectorTarget,
    ) {
        let place = self.hosts[h].place.clone();
        let reached = target.addresses.iter().find(|to| place.address_towards(**to).is_some()).copied();
        let at = |to: SocketAddr| self.directors.iter().position(|d| d.addresses.contains(&to));
        let director = reached.and_then(at).unwrap_or(0);
        let is_it = reached.is_some_and(|to| self.directors[director].addresses.contains(&to))
            && self.directors[director].uid.to_string() == target.uid;
        let from = reached.and_then(|to| self.internet.outside(&place, to));
        let number = self.number();
        let Some(disk) = &self.hosts[h].disk else { return };
        let (uid, validity) = (disk.uid, disk.validity);
        let life = self.hosts[h].life;
        let Some(running) = &mut self.hosts[h].running else { return };
        let session = running.sessions.get(&id).filter(|(of, _)| *of == attempt).map(|(_, session)| *session);
        running.channels.entry((what, id)).or_default().push(number);
        let channel = Channel {
            what,
            host: h,
            life,
            id,
            attempt,
            director,
            director_life: self.directors[director].life,
            uid,
            validity,
            from: from.unwrap_or(IpAddr::from([0, 0, 0, 0])),
            session: session.filter(|_| what == What::Stream),
            began: self.now,
            is_open: false,
            up: Duration::ZERO,
            down: Duration::ZERO,
            doomed: false,
        };
        self.channels.insert(number, channel);
        self.after(PATIENCE, Event::ChannelDown(number, ToAgent::Timeout));
        let refused = match () {
            () if from.is_none() => "no route",
            () if what == What::Stream && session.is_none() => "there is no attachment",
            () if !self.links.is_open(Node::Host(h), Node::Director(director)) => return,
            () if !self.directors[director].is_up => "connection refused",
            () if !is_it => "another one is there",
            () => return self.send_to_director(number, ToDirector::Open),
        };
        let delay = self.links.delay(&mut self.rng);
        let closed = ToAgent::Closed(Failure::Unavailable(refused.into()));
        self.after(delay * 2, Event::ChannelDown(number, closed));
    }

    /// The agent gives its channels to a director up, except one.
    pub(in crate::sim) fn close_channel(
        &mut self,
        h: usize,
        what: What,
        id: DirectorId,
        except: Option<u64>,
    ) {
        let Some(running) = &mut self.hosts[h].running else { return };
        let Some(channels) = running.channels.get_mut(&(what, id)) else { return };
        let left: Vec<u64> = channels.iter().copied().filter(|channel| Some(*channel) != except).collect();
        channels.retain(|channel| Some(*channel) == except);
        if what == What::Attachment && except.is_none() {
            running.sessions.remove(&id);
        }
        left.into_iter().for_each(|channel| self.hang_up_channel(channel));
    }

    pub(in crate::sim) fn hang_up_channel(&mut self, id: u64) {
        let Some(channel) = self.channels.get(&id).filter(|channel| !channel.doomed) else { return };
        if self.links.is_open(Node::Host(channel.host), Node::Director(channel.director)) {
            self.send_to_director(id, ToDirector::Hangup);
        } else {
            self.doom_channel(id);
        }
    }

    /// An agent sends a frame by its stream.
    pub(in crate::sim) fn send_frame(&mut self, h: usize, id: DirectorId, octets: Vec<u8>) {
        let running = self.hosts[h].running.as_ref();
        let channels = running.and_then(|running| running.channels.get(&(What::Stream, id)));
        let open = channels.and_then(|channels| channels.last().copied());
        if let Some(channel) = open.filter(|channel| self.channels.get(channel).is_some_and(|c| c.is_open)) {
            self.counts.datagrams += 1;
            self.send_to_director(channel, ToDirector::Frame(octets));
        }
    }

    pub(in crate::sim) fn on_channel_down(&mut self, number: u64, message: ToAgent) -> Checked {
        let Some(channel) = self.channels.get(&number) else { return Ok(()) };
        let (h, what, id, attempt) = (channel.host, channel.what, channel.id, channel.attempt);
        let (session, is_open, rtt) = (channel.session, channel.is_open, self.now - channel.began);
        if self.hosts[h].life != channel.life {
            return Ok(());
        }
        if self.hosts[h].asleep.is_some() {
            self.hosts[h].held_back.push(Event::ChannelDown(number, message));
            return Ok(());
        }
        let is_local = match &message {
            ToAgent::Timeout => true,
            ToAgent::Closed(Failure::Unavailable(reason)) => reason == LOST || !is_open,
            _ => false,
        };
        let open = self.links.is_open(Node::Host(h), Node::Director(channel.director));
        if !is_local && (channel.doomed || !open) {
            self.doom_channel(number);
            return Ok(());
        }
        let now = self.host_now(h);
        let Some(running) = &mut self.hosts[h].running else { return Ok(()) };
        let held = running.channels.get(&(what, id)).is_some_and(|held| held.contains(&number));
        if !held || (is_open && matches!(message, ToAgent::Timeout)) {
            return Ok(());
        }
        let failure = match message {
            ToAgent::Frame(octets) => return self.receive_frame(h, id, octets),
            ToAgent::Attached(attachment) => {
                running.sessions.insert(id, (attempt, attachment.session));
                self.counts.attached += 1;
                let event = DirectorEvent::Attached { id, attempt, attachment, round_trip: rtt };
                running.control.handle_director(event, now);
                self.note(format_args!("h{h} is attached to {id:?}, attempt {attempt}"));
                self.open_at_agent(number);
                self.close_channel(h, what, id, Some(number));
                return self.drive(h);
            }
            ToAgent::Opened => {
                running.flows.stream(id, true, now);
                self.note(format_args!("h{h} has a stream to {id:?}"));
                self.open_at_agent(number);
                return self.drive(h);
            }
            ToAgent::Draining => {
                running.control.handle_director(DirectorEvent::Draining { id, attempt }, now);
                return self.drive(h);
            }
            ToAgent::Closed(failure) => failure,
            ToAgent::Timeout => Failure::Unavailable("no answer".into()),
        };
        self.note(format_args!(
            "h{h} {what:?} to {id:?}, attempt {attempt}, session {session:?}: {failure:?}"
        ));
        let is_last =
            self.hosts[h].running.as_ref().and_then(|r| r.channels.get(&(what, id))?.last().copied())
                == Some(number);
        let Some(running) = &mut self.hosts[h].running else { return Ok(()) };
        running.channels.entry((what, id)).or_default().retain(|held| *held != number);
        match what {
            // One that was to be replaced goes with it.
            What::Attachment if !is_last => return Ok(()),
            What::Attachment => {
                running.control.handle_director(DirectorEvent::Closed { id, attempt, failure }, now);
                self.close_channel(h, what, id, None);
            }
            What::Stream => {
                if is_open {
                    running.flows.stream(id, false, now);
                }
                let reason = format!("{failure:?}");
                running.control.handle_director(DirectorEvent::StreamClosed { id, attempt, reason }, now);
            }
        }
        self.hang_up_channel(number);
        self.drive(h)
    }

    fn open_at_agent(&mut self, number: u64) {
        if let Some(channel) = self.channels.get_mut(&number) {
            channel.is_open = true;
        }
    }

    // The director's end

    pub(in crate::sim) fn on_channel_up(&mut self, number: u64, message: ToDirector) -> Checked {
        let now = self.instant();
        let civil = self.civil();
        let Some(channel) = self.channels.get_mut(&number) else { return Ok(()) };
        let (d, uid) = (channel.director, channel.uid);
        let (what, session) = (channel.what, channel.session);
        let director = &mut self.directors[d];
        if !director.is_up || director.life != channel.director_life {
            return Ok(());
        }
        let is_hangup = matches!(message, ToDirector::Hangup);
        if !is_hangup && (channel.doomed || !self.links.is_open(Node::Host(channel.host), Node::Director(d)))
        {
            self.doom_channel(number);
            return Ok(());
        }
        match (message, what, session) {
            (ToDirector::Hangup, What::Attachment, Some(session)) => director.relay.detach(session, now),
            (ToDirector::Hangup, What::Stream, Some(session)) => {
                director.relay.set_stream(session, uid, false, now);
            }
            (ToDirector::Open, What::Attachment, _) => {
                let (from, is_good) = (channel.from, channel.validity.not_after > civil);
                let attached =
                    if is_good { director.relay.attach(uid, from, now).map(Some) } else { Ok(None) };
                let answer = match attached {
                    Ok(Some(attached)) => {
                        channel.session = Some(attached.session);
                        ToAgent::Attached(Attachment {
                            endpoints: director.addresses.clone(),
                            session: attached.session,
                            key: attached.key,
                            hello_interval: HELLO_INTERVAL,
                        })
                    }
                    Ok(None) => ToAgent::Closed(Failure::Unavailable("the certificate has expired".into())),
                    Err(error @ AttachError::Refused) => ToAgent::Closed(Failure::Refused(error.to_string())),
                    Err(error) => ToAgent::Closed(Failure::Unavailable(error.to_string())),
                };
                let is_attached = matches!(answer, ToAgent::Attached(_));
                self.send_to_agent(number, answer);
                if is_attached {
                    self.vet_soon(d, uid);
                }
            }
            (ToDirector::Open, What::Stream, Some(session)) => {
                let is_open = director.relay.set_stream(session, uid, true, now);
                let gone = || ToAgent::Closed(Failure::Unavailable("there is no such session".into()));
                self.send_to_agent(number, if is_open { ToAgent::Opened } else { gone() });
            }
            (ToDirector::Frame(octets), What::Stream, Some(session)) => {
                if let Some(notice) = self.on_director_frame(d, session, octets)? {
                    self.send_to_agent(number, ToAgent::Frame(notice));
                }
            }
            _ => {}
        }
        self.settle_director(d);
        Ok(())
    }

    /// Frames leave by the stream of a session.
    pub(super) fn send_by_stream(&mut self, d: usize, session: u32, octets: Vec<u8>) {
        let is_it = |c: &Channel| c.director == d && c.what == What::Stream && c.session == Some(session);
        let found = self.channels.iter().rev().find(|(_, channel)| is_it(channel));
        if let Some(number) = found.map(|(number, _)| *number) {
            self.send_to_agent(number, ToAgent::Frame(octets));
        }
    }

    /// Sessions have ended: so do their channels.
    pub(super) fn close_channels(&mut self, d: usize, sessions: &[u32]) {
        let life = self.directors[d].life;
        let is_it = |c: &Channel| {
            c.director == d && c.director_life == life && c.session.is_some_and(|s| sessions.contains(&s))
        };
        let ended: Vec<u64> =
            self.channels.iter().filter(|(_, channel)| is_it(channel)).map(|(number, _)| *number).collect();
        for number in ended {
            let uid = self.channels.get(&number).map(|channel| channel.uid);
            let failure = if uid.is_some_and(|uid| self.directors[d].refused.contains(&uid)) {
                Failure::Refused("refused".into())
            } else {
                Failure::Unavailable("the director has ended the attachment".into())
            };
            self.send_to_agent(number, ToAgent::Closed(failure));
        }
    }

    pub(super) fn tell_draining(&mut self, d: usize) {
        let life = self.directors[d].life;
        let is_it = |c: &Channel| {
            c.director == d && c.director_life == life && c.what == What::Attachment && c.session.is_some()
        };
        let attached: Vec<u64> =
            self.channels.iter().filter(|(_, channel)| is_it(channel)).map(|(number, _)| *number).collect();
        attached.into_iter().for_each(|number| self.send_to_agent(number, ToAgent::Draining));
    }

    // The way

    fn send_to_director(&mut self, number: u64, message: ToDirector) {
        let (delay, now) = (self.links.delay(&mut self.rng), self.now);
        let Some(channel) = self.channels.get_mut(&number).filter(|channel| !channel.doomed) else { return };
        let is_open = self.links.is_open(Node::Host(channel.host), Node::Director(channel.director));
        if !is_open || !self.directors[channel.director].is_up {
            return self.doom_channel(number);
        }
        channel.up = channel.up.max(now + delay);
        let at = channel.up;
        self.after(at - now, Event::ChannelUp(number, message));
    }

    fn send_to_agent(&mut self, number: u64, message: ToAgent) {
        let (delay, now) = (self.links.delay(&mut self.rng), self.now);
        let Some(channel) = self.channels.get_mut(&number).filter(|channel| !channel.doomed) else { return };
        if !self.links.is_open(Node::Host(channel.host), Node::Director(channel.director)) {
            return self.doom_channel(number);
        }
        channel.down = channel.down.max(now + delay);
        let at = channel.down;
        self.after(at - now, Event::ChannelDown(number, message));
    }

    /// The channel is broken: each side notices, some time or other.
    pub(in crate::sim) fn doom_channel(&mut self, number: u64) {
        let Some(channel) = self.channels.get_mut(&number).filter(|channel| !channel.doomed) else { return };
        channel.doomed = true;
        let (up, down) = (self.span(0, 20_000), self.span(0, 20_000));
        self.after(up, Event::ChannelUp(number, ToDirector::Hangup));
        let lost = ToAgent::Closed(Failure::Unavailable(LOST.into()));
        self.after(down, Event::ChannelDown(number, lost));
    }

    /// Breaks the channels that `broken` picks.
    pub(in crate::sim) fn doom_channels(&mut self, broken: impl Fn(&Channel) -> bool) {
        let numbers: Vec<u64> =
            self.channels.iter().filter(|(_, channel)| broken(channel)).map(|(number, _)| *number).collect();
        numbers.into_iter().for_each(|number| self.doom_channel(number));
    }
}
