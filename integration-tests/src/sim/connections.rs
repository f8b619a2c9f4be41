//! Calls and sessions between hosts and registrars: each call is answered or not, each direction of a session is
//! ordered, and both break where hosts and registrars are parted or die.

use std::{net::IpAddr, time::Duration};

use muster_agent::control::{Failure, LookupBy, LookupResult, Validity};
use muster_proto::registration::{RegisterResponse, SessionHello, SessionRequest, SessionResponse};
use rand::RngExt as _;
use uuid::Uuid;

use super::{
    host::Joining,
    links::Node,
    world::{Event, World},
};

/// What goes up on a connection.
#[derive(Debug)]
pub(super) enum Up {
    Open(SessionHello),
    Message(SessionRequest),
    /// The agent has gone.
    Hangup,
}

/// What comes down on a connection.
#[derive(Debug)]
pub(super) enum Down {
    Opened,
    Message(Box<SessionResponse>),
    Closed(Failure),
}

/// A unary call under way.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) host: usize,
    pub(super) life: u64,
    pub(super) registrar: usize,
    pub(super) registrar_life: u64,
    pub(super) purpose: Purpose,
    /// The certificate that it is made with.
    pub(super) caller: Option<(Uuid, Validity)>,
}

/// What a call is for.
#[derive(Debug)]
pub(super) enum Purpose {
    Enroll(Box<Joining>),
    Register { attempt: u64, message: muster_proto::registration::RegisterRequest },
    Lookup { attempt: u64, id: u64, by: LookupBy },
    Renew { attempt: u64 },
    Leave,
    Resolve(String),
}

/// What comes of a call.
#[derive(Debug)]
pub(super) enum Answer {
    /// None, in time.
    Unavailable(String),
    Refused(String),
    Enrolled {
        uid: Uuid,
        validity: Validity,
    },
    NotEnrolled(super::requests::Refusal),
    Registered(Box<RegisterResponse>),
    LookedUp(LookupResult),
    Renewed(Validity),
    Left,
    Resolved(Vec<IpAddr>),
}

/// A session's connection. Each direction is ordered; once doomed, nothing passes any more.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) host: usize,
    pub(super) life: u64,
    pub(super) attempt: u64,
    pub(super) uid: Uuid,
    pub(super) registrar: usize,
    pub(super) registrar_life: u64,
    up: Duration,
    down: Duration,
    pub(super) doomed: bool,
}

impl World {
    /// Sends a call on its way. Whatever happens, it is answered in time.
    pub(super) fn call(&mut self, host: usize, registrar: usize, purpose: Purpose) {
        let caller = self.hosts[host].disk.as_ref().map(|disk| (disk.uid, disk.validity));
        let (life, registrar_life) = (self.hosts[host].life, self.registrars[registrar].life);
        let id = self.number();
        let is_lookup = matches!(purpose, Purpose::Lookup { .. });
        self.calls.insert(id, Call { host, life, registrar, registrar_life, purpose, caller });
        let timeout = Duration::from_secs(if is_lookup { 5 } else { 20 });
        self.after(timeout, Event::Answer(id, Answer::Unavailable("no answer".into())));
        if !self.links.is_open(Node::Host(host), Node::Registrar(registrar)) {
            return;
        }
        let delay = self.links.delay(&mut self.rng);
        if self.registrars[registrar].is_up {
            self.after(delay, Event::Call(id));
        } else {
            self.after(delay * 2, Event::Answer(id, Answer::Unavailable("connection refused".into())));
        }
    }

    /// Sends the answer to a call on its way.
    pub(super) fn answer(&mut self, id: u64, answer: Answer) {
        let Some(call) = self.calls.get(&id) else { return };
        let (host, registrar) = (Node::Host(call.host), Node::Registrar(call.registrar));
        if self.links.is_open(host, registrar) && !self.rng.random_bool(self.links.broken) {
            let delay = self.links.delay(&mut self.rng);
            self.after(delay, Event::Answer(id, answer));
        }
    }

    /// A new connection.
    pub(super) fn connect(&mut self, host: usize, attempt: u64, registrar: usize, uid: Uuid) -> u64 {
        let id = self.number();
        let connection = Connection {
            host,
            life: self.hosts[host].life,
            attempt,
            uid,
            registrar,
            registrar_life: self.registrars[registrar].life,
            up: Duration::ZERO,
            down: Duration::ZERO,
            doomed: false,
        };
        self.connections.insert(id, connection);
        id
    }

    /// Sends a message up.
    pub(super) fn send_up(&mut self, id: u64, message: Up) {
        let delay = self.links.delay(&mut self.rng);
        let now = self.now;
        let Some(connection) = self.connections.get_mut(&id).filter(|c| !c.doomed) else { return };
        let (host, registrar) = (Node::Host(connection.host), Node::Registrar(connection.registrar));
        if !self.links.is_open(host, registrar) || !self.registrars[connection.registrar].is_up {
            return self.doom(id);
        }
        connection.up = connection.up.max(now + delay);
        let at = connection.up;
        self.after(at - now, Event::Up(id, message));
    }

    /// Sends a message down.
    pub(super) fn send_down(&mut self, id: u64, message: Down) {
        let delay = self.links.delay(&mut self.rng);
        let now = self.now;
        let Some(connection) = self.connections.get_mut(&id).filter(|c| !c.doomed) else { return };
        let (host, registrar) = (Node::Host(connection.host), Node::Registrar(connection.registrar));
        if !self.links.is_open(host, registrar) {
            return self.doom(id);
        }
        connection.down = connection.down.max(now + delay);
        let at = connection.down;
        self.after(at - now, Event::Down(id, message));
    }

    /// The connection is broken: each side notices, some time or other.
    pub(super) fn doom(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id).filter(|c| !c.doomed) else { return };
        connection.doomed = true;
        let (up, down) = (self.span(0, 20_000), self.span(0, 20_000));
        self.after(up, Event::Up(id, Up::Hangup));
        self.after(down, Event::Down(id, Down::Closed(Failure::Unavailable("connection lost".into()))));
    }

    /// Breaks the connections that `broken` picks.
    pub(super) fn doom_all(&mut self, broken: impl Fn(&Connection) -> bool) {
        let ids: Vec<u64> = self.connections.iter().filter(|(_, c)| broken(c)).map(|(id, _)| *id).collect();
        ids.into_iter().for_each(|id| self.doom(id));
    }

    /// Breaks the connections of a host with a registrar or director.
    pub(super) fn doom_between(&mut self, host: usize, with: Node) {
        match with {
            Node::Registrar(registrar) => self.doom_all(|c| c.host == host && c.registrar == registrar),
            Node::Director(director) => self.doom_channels(|c| c.host == host && c.director == director),
            Node::Host(_) => {}
        }
    }
}
