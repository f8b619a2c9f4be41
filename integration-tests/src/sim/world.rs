//! The world: virtual time, the queue of events, the store, and everybody in it. One event is handled at a time.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use muster_agent::control::{Failure, LookupBy, LookupResult, Validity};
use muster_common::time::{Instant, Timestamp};
use muster_proto::{
    admin,
    registration::{RegisterResponse, SessionHello, SessionRequest, SessionResponse},
};
use muster_registrar::{
    registry::plan::{Outcome, network},
    store::{KeyRange, Txn, TxnOutcome, memory::MemoryStore},
    token::JoinToken,
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use uuid::Uuid;

use super::{
    Checked, Counts, Summary, Violation,
    host::{Host, Joining},
    links::{Links, Node},
    model::Model,
    must,
    queue::Queue,
    registrar::Registrar,
    requests::{DOMAIN, NETWORK},
    trace::Trace,
};

/// Civil time when the run begins.
const CIVIL_START: Duration = Duration::from_secs(1_800_000_000);
/// Time since boot when the run begins.
const BOOT: Duration = Duration::from_secs(100);

/// What happens at a moment.
#[derive(Debug)]
pub(super) enum Event {
    /// A timeout of an agent.
    Wake { host: usize, life: u64 },
    /// An agent looks at its certificate, since clocks get set.
    Certificate { host: usize, life: u64 },
    /// A datagram arrives.
    Datagram { from: SocketAddr, to: SocketAddr, octets: Vec<u8> },
    /// A call reaches its registrar.
    Call(u64),
    /// A call is answered.
    Answer(u64, Answer),
    /// A transaction reaches the store; the job that waits for it, if any.
    Txn { registrar: usize, life: u64, job: Option<u64>, txn: Txn },
    /// A registrar hears of the store's changes.
    Watch { registrar: usize, life: u64 },
    /// A registrar waits no longer for its index, for a job.
    GiveUp { registrar: usize, life: u64, job: u64 },
    /// A registrar waits no longer for its index, for a hello.
    Greet { registrar: usize, life: u64, connection: u64 },
    /// A program sends its next packet.
    Flow { from: usize, to: IpAddr, left: u32 },
    /// Connections between two that have been parted since are broken.
    KeepAlive { host: usize, registrar: usize },
    /// A registrar that drains has waited long enough.
    Stop { registrar: usize, life: u64 },
    /// A registrar forgets addresses whose quarantine is over.
    Sweep { registrar: usize, life: u64 },
    /// A message arrives at the registrar's end of a session.
    Up(u64, Up),
    /// A message arrives at the agent's end of a session.
    Down(u64, Down),
}

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

/// A token that an operator has made.
#[derive(Clone, Debug)]
pub(super) struct Token {
    pub(super) secret: JoinToken,
    pub(super) reusable: bool,
    pub(super) expires: Timestamp,
    /// The devices that have joined with it.
    pub(super) joined: BTreeSet<Uuid>,
}

pub(super) struct World {
    seed: u64,
    pub(super) now: Duration,
    pub(super) rng: StdRng,
    pub(super) trace: Trace,
    queue: Queue<Event>,
    pub(super) store: MemoryStore,
    pub(super) registrars: Vec<Registrar>,
    pub(super) hosts: Vec<Host>,
    pub(super) links: Links,
    pub(super) calls: BTreeMap<u64, Call>,
    pub(super) connections: BTreeMap<u64, Connection>,
    next: u64,
    pub(super) model: Model,
    pub(super) tokens: Vec<Token>,
    pub(super) lifetime: Duration,
    pub(super) counts: Counts,
    /// Nobody sends packets of their own accord: the run is being checked.
    pub(super) quiet: bool,
    /// Datagrams that somebody has recorded.
    pub(super) recorded: Vec<(SocketAddr, SocketAddr, Vec<u8>)>,
}

impl World {
    pub(super) fn new(seed: u64, echo: bool) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let lifetime = [3600, 6 * 3600, 48 * 3600, 30 * 86_400][rng.random_range(0..4)];
        let quarantine = Duration::from_secs([600, 7200, 86_400][rng.random_range(0..3)]);
        Self {
            seed,
            now: Duration::ZERO,
            rng,
            trace: Trace::new(echo),
            queue: Queue::new(),
            store: MemoryStore::new(),
            registrars: Vec::new(),
            hosts: Vec::new(),
            links: Links::default(),
            calls: BTreeMap::new(),
            connections: BTreeMap::new(),
            next: 1,
            model: Model::new(quarantine),
            tokens: Vec::new(),
            lifetime: Duration::from_secs(lifetime),
            counts: Counts::default(),
            quiet: false,
            recorded: Vec::new(),
        }
    }

    /// Plays the whole run.
    pub(super) fn play(&mut self) -> Checked {
        self.set_up()?;
        for n in 1..=self.rng.random_range(100..240) {
            let pause = self.pause();
            self.advance(pause)?;
            self.operate()?;
            self.check()?;
            if n % 60 == 0 {
                self.settle()?;
            }
        }
        self.settle()
    }

    pub(super) fn summary(&self) -> Summary {
        let counts = Counts { seconds: self.now.as_secs(), ..self.counts.clone() };
        Summary { seed: self.seed, hash: self.trace.hash(), lines: self.trace.lines(), counts }
    }

    fn set_up(&mut self) -> Checked {
        let spec = admin::NetworkSpec {
            domain: DOMAIN.into(),
            device_pool_v4: ["100.64.0.0/27", "100.64.0.0/26", "100.64.0.0/20"][self.rng.random_range(0..3)]
                .into(),
            device_pool_v6: if self.rng.random_bool(0.7) { "fd00:5::/64".into() } else { String::new() },
            service_pool_v4: "100.96.0.0/20".into(),
            address_quarantine: Some(pbjson_types::Duration {
                seconds: i64::try_from(self.model.quarantine().as_secs()).unwrap_or(0),
                nanos: 0,
            }),
            ..Default::default()
        };
        let wanted = admin::Network {
            metadata: Some(admin::ObjectMeta { name: NETWORK.into(), ..Default::default() }),
            spec: Some(spec),
            status: None,
        };
        let (uid, civil) = (self.uid(), self.civil());
        let mut index = super::registrar::load(&self.store, civil)?;
        match network::create(&index, &wanted, uid, [1; 5], civil) {
            Ok(Outcome::Write(plan)) => drop(self.commit(&plan.txn)?),
            other => return Err(Violation(format!("cannot create the network: {other:?}"))),
        }
        index = super::registrar::load(&self.store, civil)?;
        must(index.network(NETWORK).is_some(), || "the network is not there".into())?;
        for registrar in 0..self.rng.random_range(1..=3) {
            self.registrars.push(Registrar::new());
            self.start_registrar(registrar)?;
        }
        for host in 0..self.rng.random_range(3..=7) {
            let skew = Duration::from_secs(self.rng.random_range(0..300));
            self.hosts.push(Host::new(host, skew));
        }
        self.create_token(true)?;
        self.advance(Duration::from_secs(1))?;
        // All at once.
        for h in 0..self.hosts.len() {
            self.join(h, None);
        }
        Ok(())
    }

    /// Time until the next operation.
    fn pause(&mut self) -> Duration {
        let all_up = self.registrars.iter().all(|r| r.is_up);
        let (least, most) = match self.rng.random_range(0..100) {
            0..20 => (0, 1),
            20..45 => (0, 100),
            45..65 => (100, 1_500),
            65..85 => (1_500, 20_000),
            85..94 => (20_000, 200_000),
            94..98 => (200_000, 2_400_000),
            _ if all_up => (2_400_000, 2 * 86_400_000),
            _ => (2_400_000, 7_200_000),
        };
        Duration::from_millis(self.rng.random_range(least..most))
    }

    /// Lets time pass.
    pub(super) fn advance(&mut self, span: Duration) -> Checked {
        let end = self.now + span;
        while let Some((at, event)) = self.queue.pop(end) {
            self.now = at;
            self.handle(event)?;
        }
        self.now = end;
        Ok(())
    }

    fn handle(&mut self, event: Event) -> Checked {
        match event {
            Event::Wake { host, life } => self.on_wake(host, life),
            Event::Certificate { host, life } => self.on_certificate(host, life),
            Event::Datagram { from, to, octets } => self.on_datagram(from, to, octets),
            Event::Call(id) => self.on_call(id),
            Event::Answer(id, answer) => self.on_answer(id, answer),
            Event::Txn { registrar, life, job, txn } => self.on_txn(registrar, life, job, &txn),
            Event::Watch { registrar, life } => self.on_watch(registrar, life),
            Event::GiveUp { registrar, life, job } => self.on_give_up(registrar, life, job),
            Event::Greet { registrar, life, connection } => self.on_greet(registrar, life, connection),
            Event::Sweep { registrar, life } => self.on_sweep(registrar, life),
            Event::Flow { from, to, left } => self.on_flow(from, to, left),
            Event::KeepAlive { host, registrar } => {
                if !self.links.is_open(Node::Host(host), Node::Registrar(registrar)) {
                    self.doom_all(|c| c.host == host && c.registrar == registrar);
                }
                Ok(())
            }
            Event::Stop { registrar, life } => {
                if self.registrars[registrar].life == life {
                    self.stop_registrar(registrar);
                }
                Ok(())
            }
            Event::Up(connection, message) => self.on_up(connection, message),
            Event::Down(connection, message) => self.on_down(connection, message),
        }
    }

    // Time and chance

    /// Civil time, as registrars know it.
    pub(super) fn civil(&self) -> Timestamp {
        Timestamp::from_epoch(CIVIL_START + self.now)
    }

    /// Time since boot, of what has never been restarted.
    pub(super) fn instant(&self) -> Instant {
        Instant::from_boot(BOOT + self.now)
    }

    /// A new number.
    pub(super) fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// A new uid.
    pub(super) fn uid(&mut self) -> Uuid {
        uuid::Builder::from_random_bytes(self.rng.random()).into_uuid()
    }

    /// A span between two numbers of milliseconds.
    pub(super) fn span(&mut self, least: u64, most: u64) -> Duration {
        Duration::from_millis(self.rng.random_range(least..=most))
    }

    /// Adds an event that happens `after` now.
    pub(super) fn after(&mut self, after: Duration, event: Event) {
        self.queue.push(self.now + after, event);
    }

    /// Adds a line to the trace.
    pub(super) fn note(&mut self, text: std::fmt::Arguments<'_>) {
        self.trace.line(self.now, text);
    }

    // The store

    /// Applies a transaction; the model looks at what it changes, and the registrars are going to hear of it.
    pub(super) fn commit(&mut self, txn: &Txn) -> Checked<TxnOutcome> {
        let store =
            |error: muster_registrar::store::StoreError| Violation(format!("the store refuses: {error}"));
        let before = self.store.model().revision();
        let outcome = self.store.apply_txn(txn).map_err(store)?;
        let changes = self.store.changes_sync(&KeyRange::all(), before + 1).map_err(store)?;
        let civil = self.civil();
        for batch in &changes.batches {
            let keys: Vec<String> =
                batch.events.iter().map(|e| String::from_utf8_lossy(e.key()).into_owned()).collect();
            self.note(format_args!("store {} {keys:?}", batch.revision));
            self.model.observe(batch, civil)?;
        }
        for registrar in 0..self.registrars.len() {
            self.watch_soon(registrar);
        }
        Ok(outcome)
    }

    // Calls and connections

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
        self.queue.push(at, Event::Up(id, message));
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
        self.queue.push(at, Event::Down(id, message));
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
}
