//! The world: virtual time, the queue of events, the store, and everybody in it. One event is handled at a time.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use muster_common::time::{Instant, Timestamp};
use muster_proto::admin;
use muster_registrar::{
    registry::plan::{Outcome, network},
    store::{KeyRange, Txn, TxnOutcome, memory::MemoryStore},
    token::JoinToken,
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use uuid::Uuid;

use super::{
    Checked, Counts, Scenario, Summary, Violation,
    connections::{Answer, Call, Connection, Down, Up},
    directors::{
        Director,
        channels::{Channel, ToAgent, ToDirector},
    },
    host::Host,
    internet::{Internet, Place},
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
    Datagram(Box<Datagram>),
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
    KeepAlive { host: usize, with: Node },
    /// A registrar that drains has waited long enough.
    Stop { registrar: usize, life: u64 },
    /// A registrar forgets addresses whose quarantine is over.
    Sweep { registrar: usize, life: u64 },
    /// A message arrives at the registrar's end of a session.
    Up(u64, Up),
    /// A message arrives at the agent's end of a session.
    Down(u64, Down),
    /// A host that was suspended goes on.
    Resume { host: usize },
    /// A timeout of a relay.
    DirectorWake { director: usize, life: u64 },
    /// A director looks after its session with a registrar.
    DirectorTick { director: usize, life: u64 },
    /// A director that drains has waited long enough.
    DirectorStop { director: usize, life: u64 },
    /// A registrar hears that a device has attached.
    Vet { director: usize, life: u64, uid: Uuid },
    /// A director hears of a device that it must not relay for.
    Refuse { director: usize, life: u64, registrar: usize, uid: Uuid },
    /// A message arrives at the director's end of a channel.
    ChannelUp(u64, ToDirector),
    /// A message arrives at the agent's end of a channel.
    ChannelDown(u64, ToAgent),
}

/// A datagram under way.
#[derive(Clone, Debug)]
pub(super) struct Datagram {
    /// Who has sent it; `None` for somebody else.
    pub(super) origin: Option<Node>,
    /// The site whose LAN it does not leave.
    pub(super) lan: Option<usize>,
    pub(super) from: SocketAddr,
    pub(super) to: SocketAddr,
    pub(super) octets: Vec<u8>,
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
    pub(super) recorded: Vec<Datagram>,
    /// What the run is about.
    pub(super) scenario: Scenario,
    pub(super) internet: Internet,
    pub(super) directors: Vec<Director>,
    pub(super) director_token: Option<JoinToken>,
    pub(super) channels: BTreeMap<u64, Channel>,
}

impl World {
    pub(super) fn new(scenario: Scenario, seed: u64, echo: bool) -> Self {
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
            scenario,
            internet: Internet::default(),
            directors: Vec::new(),
            director_token: None,
            channels: BTreeMap::new(),
        }
    }

    /// Plays the whole run.
    pub(super) fn play(&mut self) -> Checked {
        self.set_up()?;
        let operations = match self.scenario {
            Scenario::Lives => 100..240,
            Scenario::Paths => 30..70,
        };
        for n in 1..=self.rng.random_range(operations) {
            let pause = self.pause();
            self.advance(pause)?;
            match self.scenario {
                Scenario::Paths if self.rng.random_bool(0.7) => self.operate_paths()?,
                _ => self.operate()?,
            }
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
        let has_paths = self.scenario == Scenario::Paths;
        if has_paths {
            self.set_up_paths()?;
        }
        let hosts = if has_paths { 3..=5 } else { 3..=7 };
        for host in 0..self.rng.random_range(hosts) {
            let skew = Duration::from_secs(self.rng.random_range(0..300));
            let place = Place::open(host as u8, 2);
            self.hosts.push(Host::new(place, skew));
            if has_paths {
                self.hosts[host].place = self.new_place(host);
            }
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
        if self.scenario == Scenario::Paths {
            let most = [100, 1_500, 8_000, 30_000, 90_000, 400_000][self.rng.random_range(0..6)];
            return self.span(0, most);
        }
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
            Event::Datagram(datagram) => self.arrive(*datagram),
            Event::Call(id) => self.on_call(id),
            Event::Answer(id, answer) => self.on_answer(id, answer),
            Event::Txn { registrar, life, job, txn } => self.on_txn(registrar, life, job, &txn),
            Event::Watch { registrar, life } => self.on_watch(registrar, life),
            Event::GiveUp { registrar, life, job } => self.on_give_up(registrar, life, job),
            Event::Greet { registrar, life, connection } => self.on_greet(registrar, life, connection),
            Event::Sweep { registrar, life } => self.on_sweep(registrar, life),
            Event::Flow { from, to, left } => self.on_flow(from, to, left),
            Event::KeepAlive { host, with } => {
                if !self.links.is_open(Node::Host(host), with) {
                    self.doom_between(host, with);
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
            Event::Resume { host } => self.resume(host),
            Event::DirectorWake { director, life } => {
                self.on_director_wake(director, life);
                Ok(())
            }
            Event::DirectorTick { director, life } => self.on_director_tick(director, life),
            Event::DirectorStop { director, life } => {
                self.on_director_stop(director, life);
                Ok(())
            }
            Event::Vet { director, life, uid } => {
                self.on_vet(director, life, uid);
                Ok(())
            }
            Event::Refuse { director, life, registrar, uid } => {
                self.on_refuse(director, life, registrar, uid);
                Ok(())
            }
            Event::ChannelUp(channel, message) => self.on_channel_up(channel, message),
            Event::ChannelDown(channel, message) => self.on_channel_down(channel, message),
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
}
