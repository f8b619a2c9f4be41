//! Directors: the real relay core, in a played shell that does what the director's sockets, its attachments and its
//! session with a registrar do.

pub(super) mod channels;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::Duration,
};

use muster_common::{frame::DataHeader, time::Timestamp, tls::SpkiHash};
use muster_director::relay::{Arrival, Limits, Relay, To, Verdict, Verdicts};
use muster_proto::admin;
use muster_registrar::{
    registry::{
        Applied, Change, Index,
        plan::{Outcome, director, enroll, register, token},
    },
    token::JoinToken,
};
use muster_tunnel::Ecn;
use rand::RngExt as _;
use uuid::Uuid;

use super::{
    Checked, Violation,
    links::Node,
    must,
    registrar::load,
    requests::NETWORK,
    world::{Event, World},
};

/// Between looks at the session with a registrar, while there is one and while there is none.
const TICK: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(2));
/// How long a director that drains waits for its devices.
const DRAIN: Duration = Duration::from_secs(30);

/// A director, running or not.
#[derive(Debug)]
pub(super) struct Director {
    pub(super) is_up: bool,
    pub(super) life: u64,
    pub(super) uid: Uuid,
    name: String,
    pub(super) addresses: Vec<SocketAddr>,
    pub(super) relay: Relay,
    verdicts: Verdicts,
    /// Where it has its session, and that registrar's life.
    pub(super) registrar: Option<(usize, u64)>,
    /// Since when it has it.
    pub(super) since: Duration,
    /// Whom it refuses, as it was told.
    pub(super) refused: BTreeSet<Uuid>,
    /// When each device last attached.
    pub(super) attached: BTreeMap<Uuid, Duration>,
    wake: Option<Duration>,
    pub(super) is_draining: bool,
}

impl World {
    // What operators do

    /// Writes what a director or an operator asks for at once, planned on what the store holds.
    fn write<T>(
        &mut self,
        what: &str,
        plan: impl FnOnce(&mut Index, Timestamp) -> Result<Outcome<T>, String>,
    ) -> Checked {
        let civil = self.civil();
        let mut index = load(&self.store, civil)?;
        match plan(&mut index, civil) {
            Ok(Outcome::Write(plan)) => drop(self.commit(&plan.txn)?),
            Ok(Outcome::Done(_)) => {}
            Err(error) => return Err(Violation(format!("cannot {what}: {error}"))),
        }
        Ok(())
    }

    /// An operator lets directors join: there are `number` of them, and they run.
    pub(super) fn add_directors(&mut self, number: usize) -> Checked {
        let secret = JoinToken::generate(&mut self.rng);
        let uid = self.uid();
        let spec = admin::TokenSpec {
            reusable: true,
            party: "director".into(),
            expires_at: Some(pbjson_types::Timestamp { seconds: 2_000_000_000, nanos: 0 }),
            ..Default::default()
        };
        let metadata = Some(admin::ObjectMeta { network: NETWORK.into(), ..Default::default() });
        let wanted = admin::Token { metadata, spec: Some(spec), status: None };
        self.write("create a token for directors", |index, now| {
            token::create(index, &wanted, &secret, uid, now).map_err(|e| e.to_string())
        })?;
        self.director_token = Some(secret);
        for d in 0..number {
            let relay = Relay::new(self.rng.random(), Limits::default());
            self.directors.push(Director {
                is_up: false,
                life: 0,
                uid: Uuid::nil(),
                name: String::new(),
                addresses: Vec::new(),
                relay,
                verdicts: Verdicts::of_stream(1_000),
                registrar: None,
                since: Duration::ZERO,
                refused: BTreeSet::new(),
                attached: BTreeMap::new(),
                wake: None,
                is_draining: false,
            });
            self.enroll_director(d, true)?;
            self.start_director(d);
        }
        Ok(())
    }

    /// Director `d` is set up anew, at addresses of its own or where it has been.
    pub(super) fn enroll_director(&mut self, d: usize, is_elsewhere: bool) -> Checked {
        let (uid, number) = (self.uid(), self.number());
        let key = SpkiHash::of_spki(&self.rng.random::<[u8; 32]>());
        let Some(token) = self.director_token.clone() else { return Ok(()) };
        let director = &mut self.directors[d];
        (director.uid, director.name) = (uid, format!("d{d}-{number}"));
        if is_elsewhere {
            let host = (number % 200) as u16 + 1;
            director.addresses = vec![
                SocketAddr::from(([198, 51, 100 + d as u8, host as u8], 7501)),
                SocketAddr::from(([0x2001, 0xdb8, 0xd, d as u16, 0, 0, 0, host], 7501)),
            ];
        }
        let name = director.name.clone();
        self.note(format_args!("d{d} joins as {name}, {uid}"));
        self.write("enroll a director", |index, now| {
            let enrollment = enroll::Enrollment {
                token: &token,
                key: &key,
                name: &name,
                uid,
                certificate_expiry: now + Duration::from_secs(300 * 86_400),
                now,
                claim: None,
            };
            enroll::plan(index, &enrollment).map_err(|e| e.to_string())
        })
    }

    /// An operator deletes a director, and sets up another one in its place.
    pub(super) fn replace_director(&mut self, d: usize) -> Checked {
        self.stop_director(d);
        let name = self.directors[d].name.clone();
        self.write("delete a director", |index, _| {
            director::delete(index, NETWORK, &name, 0).map_err(|e| e.to_string())
        })?;
        let is_elsewhere = self.rng.random_bool(0.5);
        self.enroll_director(d, is_elsewhere)?;
        self.start_director(d);
        Ok(())
    }

    /// An operator wants devices to leave a director, or not any more.
    pub(super) fn set_drained(&mut self, d: usize, drained: bool) -> Checked {
        let name = self.directors[d].name.clone();
        self.note(format_args!("d{d} is to be left: {drained}"));
        let wanted = admin::Director {
            metadata: Some(admin::ObjectMeta { name, network: NETWORK.into(), ..Default::default() }),
            spec: Some(admin::DirectorSpec { drained, ..Default::default() }),
            status: None,
        };
        let mask = pbjson_types::FieldMask { paths: vec!["spec.drained".into()] };
        self.write("drain a director", |index, _| {
            director::update(index, &wanted, Some(&mask)).map_err(|e| e.to_string())
        })
    }

    // Life

    pub(super) fn start_director(&mut self, d: usize) {
        if self.directors[d].is_up {
            return;
        }
        self.note(format_args!("d{d} starts"));
        let relay = Relay::new(self.rng.random(), Limits::default());
        let director = &mut self.directors[d];
        director.life += 1;
        (director.is_up, director.is_draining, director.wake) = (true, false, None);
        (director.relay, director.registrar) = (relay, None);
        director.refused.clear();
        let life = director.life;
        self.after(Duration::from_millis(10), Event::DirectorTick { director: d, life });
    }

    /// The director dies, and with it all that it held in memory.
    pub(super) fn stop_director(&mut self, d: usize) {
        if !self.directors[d].is_up {
            return;
        }
        self.note(format_args!("d{d} stops"));
        let director = &mut self.directors[d];
        (director.is_up, director.registrar) = (false, None);
        director.life += 1;
        self.doom_channels(|channel| channel.director == d);
    }

    /// The director asks its devices to go, and stops.
    pub(super) fn drain_director(&mut self, d: usize) -> Checked {
        let director = &mut self.directors[d];
        if !director.is_up || std::mem::replace(&mut director.is_draining, true) {
            return Ok(());
        }
        director.relay.drain();
        let (life, uid) = (director.life, director.uid);
        self.note(format_args!("d{d} drains"));
        self.tell_draining(d);
        if self.directors[d].registrar.is_some() {
            self.write("leave", |index, _| {
                director::leave(index, NETWORK, uid, true).map_err(|e| e.to_string())
            })?;
        }
        self.after(DRAIN, Event::DirectorStop { director: d, life });
        Ok(())
    }

    fn is_director(&self, d: usize, life: u64) -> bool {
        self.directors[d].is_up && self.directors[d].life == life
    }

    pub(super) fn on_director_stop(&mut self, d: usize, life: u64) {
        if self.is_director(d, life) {
            self.stop_director(d);
        }
    }

    pub(super) fn on_director_wake(&mut self, d: usize, life: u64) {
        let (at, now) = (self.now, self.instant());
        if self.is_director(d, life) && self.directors[d].wake == Some(at) {
            self.directors[d].wake = None;
            self.directors[d].relay.handle_timeout(now);
            self.settle_director(d);
        }
    }

    /// What follows from whatever has happened at a relay.
    fn settle_director(&mut self, d: usize) {
        let ended = self.directors[d].relay.take_ended();
        self.close_channels(d, &ended);
        let (at, now) = (self.now, self.instant());
        let director = &mut self.directors[d];
        let Some(due) = director.relay.poll_timeout() else { return };
        let wake = at + due.saturating_duration_since(now);
        if director.wake.is_none_or(|scheduled| scheduled > wake || scheduled < at) {
            director.wake = Some(wake);
            let life = director.life;
            self.after(wake - at, Event::DirectorWake { director: d, life });
        }
    }

    // The session with a registrar

    pub(super) fn on_director_tick(&mut self, d: usize, life: u64) -> Checked {
        if !self.is_director(d, life) {
            return Ok(());
        }
        let has_session = self.director_session(d).is_some();
        if !has_session {
            self.directors[d].registrar = None;
            let r = self.rng.random_range(0..self.registrars.len());
            self.open_director_session(d, r)?;
        }
        let pause = if self.directors[d].registrar.is_some() { TICK.0 } else { TICK.1 };
        self.after(pause, Event::DirectorTick { director: d, life });
        Ok(())
    }

    /// The registrar that a director has a sound session with.
    pub(super) fn director_session(&self, d: usize) -> Option<usize> {
        let (r, life) = self.directors[d].registrar?;
        let registrar = &self.registrars[r];
        let open = registrar.is_up && registrar.life == life && !registrar.draining;
        (open && self.links.is_open(Node::Director(d), Node::Registrar(r))).then_some(r)
    }

    fn open_director_session(&mut self, d: usize, r: usize) -> Checked {
        let (registrar, uid) = (&self.registrars[r], self.directors[d].uid);
        let is_reached = registrar.is_up
            && !registrar.draining
            && self.links.is_open(Node::Director(d), Node::Registrar(r));
        if !is_reached || director::find(&registrar.index, NETWORK, uid).is_err() {
            return Ok(());
        }
        self.note(format_args!("d{d} has a session at r{r}"));
        let life = self.registrars[r].life;
        let now = self.now;
        let director = &mut self.directors[d];
        director.registrar = Some((r, life));
        director.since = now;
        // Whom it refuses it is told anew, and of whom it has.
        director.relay.forgive();
        director.refused.clear();
        let devices = director.relay.devices();
        let (endpoints, is_draining) = (director.addresses.clone(), director.is_draining);
        for uid in devices {
            self.vet_soon(d, uid);
        }
        if is_draining {
            return Ok(());
        }
        self.write("register a director", |index, _| {
            let registration =
                director::Registration { region: "", endpoints: &endpoints, tcp_ports: &[], version: "sim" };
            director::register(index, NETWORK, uid, &registration).map_err(|e| e.to_string())
        })
    }

    /// A registrar has heard of changes: directors with a session there are told whom to refuse.
    pub(super) fn tell_directors(&mut self, r: usize, applied: &Applied) {
        let refused = applied.changes.iter().filter_map(|change| match change {
            Change::Device { old, new } => {
                let is_refused = new.as_ref().is_none_or(|device| device.revoked);
                new.as_ref().or(old.as_ref()).filter(|_| is_refused).map(|device| device.uid)
            }
            _ => None,
        });
        let refused: Vec<Uuid> = refused.collect();
        for d in 0..self.directors.len() {
            if self.director_session(d) == Some(r) {
                refused.iter().for_each(|uid| self.refuse_soon(d, r, *uid));
            }
        }
    }

    /// A device has attached: the registrar is asked whether it may.
    fn vet_soon(&mut self, d: usize, uid: Uuid) {
        let delay = self.links.delay(&mut self.rng) + Duration::from_millis(200);
        let (life, now) = (self.directors[d].life, self.now);
        self.directors[d].attached.insert(uid, now);
        self.after(delay, Event::Vet { director: d, life, uid });
    }

    pub(super) fn on_vet(&mut self, d: usize, life: u64, uid: Uuid) {
        if self.is_director(d, life)
            && let Some(r) = self.director_session(d)
            && register::find(&self.registrars[r].index, NETWORK, uid).is_err()
        {
            self.refuse_soon(d, r, uid);
        }
    }

    fn refuse_soon(&mut self, d: usize, r: usize, uid: Uuid) {
        let delay = self.links.delay(&mut self.rng);
        let life = self.directors[d].life;
        self.after(delay, Event::Refuse { director: d, life, registrar: r, uid });
    }

    pub(super) fn on_refuse(&mut self, d: usize, life: u64, r: usize, uid: Uuid) {
        if !self.is_director(d, life) || self.directors[d].registrar.is_none_or(|(at, _)| at != r) {
            return;
        }
        if self.director_session(d).is_none() {
            // The news is lost with the session; the next one begins with all of it.
            self.directors[d].registrar = None;
            return;
        }
        self.note(format_args!("d{d} refuses {uid}"));
        let now = self.instant();
        self.directors[d].refused.insert(uid);
        self.directors[d].relay.refuse(uid, now);
        self.settle_director(d);
    }

    // Frames

    /// A datagram has come from `from`.
    pub(super) fn on_director_datagram(
        &mut self,
        d: usize,
        from: SocketAddr,
        mut octets: Vec<u8>,
    ) -> Checked {
        if !self.directors[d].is_up {
            return Ok(());
        }
        let now = self.instant();
        let director = &mut self.directors[d];
        let mut verdicts = std::mem::replace(&mut director.verdicts, Verdicts::of_stream(1));
        verdicts.clear();
        let len = octets.len();
        let arrival = Arrival { from, ecn: Ecn::NotEct, datagram_len: len, range: 0..len };
        director.relay.forward(&arrival, &mut octets, now, &mut verdicts);
        for greeting in &verdicts.hellos {
            let hello = &octets[greeting.range.clone()];
            if let Some(welcome) = self.directors[d].relay.handle_hello(greeting.from, hello, now) {
                must(welcome.len() <= hello.len(), || format!("d{d} answers a hello with more than it was"))?;
                self.send_from_director(d, greeting.from, welcome.to_vec());
            }
        }
        for forward in &verdicts.forwards {
            self.pass_on(d, forward.to, octets[forward.range.clone()].to_vec())?;
        }
        for (to, notice) in &verdicts.notices {
            must(notice.len() <= len, || format!("d{d} tells {to} more than it sent"))?;
            self.send_from_director(d, *to, notice.to_vec());
        }
        self.directors[d].verdicts = verdicts;
        self.settle_director(d);
        Ok(())
    }

    /// A frame has come by the stream of `session`; what is to be sent back by it.
    fn on_director_frame(&mut self, d: usize, session: u32, mut octets: Vec<u8>) -> Checked<Option<Vec<u8>>> {
        let now = self.instant();
        match self.directors[d].relay.forward_frame(session, &mut octets, now) {
            Verdict::Forward(to) => self.pass_on(d, to, octets).map(|()| None),
            Verdict::Drop(_, notice) => Ok(notice.map(|notice| notice.to_vec())),
        }
    }

    /// Passes a frame on: neither from nor to anybody who is refused.
    fn pass_on(&mut self, d: usize, to: To, octets: Vec<u8>) -> Checked {
        let director = &self.directors[d];
        let header = DataHeader::parse(&octets);
        let header = header.ok_or_else(|| Violation(format!("d{d} passes on what is no frame")))?;
        let receiver = director.relay.device_of(header.session);
        must(receiver.is_some_and(|uid| !director.refused.contains(&uid)), || {
            format!("d{d} passes a frame on to {receiver:?}, which is refused")
        })?;
        let handle = |uid: &Uuid| muster_common::frame::Handle::of_device(uid.as_bytes());
        must(!director.refused.iter().any(|uid| handle(uid) == header.handle), || {
            format!("d{d} passes on a frame of {:?}, which is refused", header.handle)
        })?;
        self.counts.relayed += 1;
        match to {
            To::Udp(to) => self.send_from_director(d, to, octets),
            To::Stream(session) => self.send_by_stream(d, session, octets),
        }
        Ok(())
    }

    fn send_from_director(&mut self, d: usize, to: SocketAddr, octets: Vec<u8>) {
        let own = self.directors[d].addresses.iter().copied().find(|own| own.is_ipv4() == to.is_ipv4());
        if let Some(from) = own {
            self.carry(Node::Director(d), None, from, to, octets);
        }
    }
}
