//! Which device carries what: with one registrar, with several, and with everything that can happen to them.

use std::collections::BTreeMap;
use std::time::Duration;

use ipnet::IpNet;
use muster_common::time::Instant;
use muster_proto::admin::TokenSpec;
use rand::seq::IndexedRandom as _;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use uuid::Uuid;

use super::decide::{AFTER_START, CONFIRM, Decider, Decision, PATIENCE, Reason};
use crate::registry::plan::site;
use crate::registry::site::Carrier;
use crate::registry::{keys, tests::World};
use crate::session::{Presence, SILENT};
use crate::store::Txn;

const LAN: &str = "192.168.7.0/24";
const OTHER: &str = "192.168.9.0/24";

/// One that runs.
struct Running {
    uid: Uuid,
    decider: Decider,
    /// Its open sessions, and the latest sign of life in them.
    sessions: BTreeMap<Uuid, Presence>,
    /// Whether the store hears of it.
    is_cut_off: bool,
}

/// Registrars with sessions, on one store.
struct Registrars {
    world: World,
    now: Instant,
    running: Vec<Option<Running>>,
    next_session: u64,
    /// What was written, by whom.
    written: Vec<(usize, Decision)>,
}

impl Registrars {
    /// With gates that offer both subnets, and may carry both.
    fn new(registrars: usize, gates: &[&str]) -> (Self, Vec<Uuid>) {
        let mut world = World::with_network(registrars, "10.0.0.0/20");
        let token = world.create_token("t", TokenSpec { reusable: true, ..TokenSpec::default() });
        let mut uids = Vec::new();
        for (gate, key) in gates.iter().zip(1..) {
            let uid = world.join(&token, gate);
            world.register(0, uid, key).unwrap();
            world.offer(0, uid, &[], &[LAN, OTHER]);
            world.approve(gate, false, &[LAN, OTHER]).unwrap();
            uids.push(uid);
        }
        // In the order in which they take over.
        uids.sort_unstable();
        let now = Instant::from_boot(Duration::from_secs(1000));
        let running = (0..registrars).map(|_| None).collect();
        let mut registrars = Self { world, now, running, next_session: 1, written: Vec::new() };
        (0..registrars.running.len()).for_each(|number| registrars.start(number));
        registrars.pass(AFTER_START);
        (registrars, uids)
    }

    fn start(&mut self, number: usize) {
        let uid = self.world.uid();
        let decider = Decider::new(uid, self.now);
        self.world.indexes[number] = self.world.load();
        self.running[number] = Some(Running { uid, decider, sessions: BTreeMap::new(), is_cut_off: false });
        self.announce(number);
    }

    fn announce(&mut self, number: usize) {
        let Some(running) = &mut self.running[number] else { return };
        running.is_cut_off = false;
        self.world.store.apply_txn(&Txn::new().put(keys::registrar(running.uid), "")).unwrap();
    }

    /// The announcement has expired.
    fn cut_off(&mut self, number: usize) {
        let Some(running) = &mut self.running[number] else { return };
        running.is_cut_off = true;
        self.world.store.apply_txn(&Txn::new().delete(keys::registrar(running.uid))).unwrap();
    }

    fn kill(&mut self, number: usize) {
        self.cut_off(number);
        self.running[number] = None;
    }

    fn open(&mut self, number: usize, device: Uuid) {
        let session = self.next_session;
        self.next_session += 1;
        if let Some(running) = &mut self.running[number] {
            running.sessions.insert(device, Presence { session, heard: None });
        }
    }

    fn close(&mut self, number: usize, device: Uuid) {
        if let Some(running) = &mut self.running[number] {
            running.sessions.remove(&device);
        }
    }

    /// The registrar decides by what it knows; returns when it wants to be asked again.
    fn decide(&mut self, number: usize) -> Option<Instant> {
        let now = self.now;
        let running = self.running[number].as_mut()?;
        if running.is_cut_off {
            return None;
        }
        let sessions = &running.sessions;
        let presence = |device| {
            let presence: Presence = sessions.get(&device).copied()?;
            presence.heard.is_none_or(|heard| now < heard + SILENT).then_some(presence)
        };
        let (decisions, next) = running.decider.decide(&self.world.indexes[number], &presence, now);
        for decision in decisions {
            let Decision { network, subnet, revision, carrier, .. } = &decision;
            let carrier = carrier.map(|(device, registrar)| Carrier { device, registrar, revision: 0 });
            let plan = |index: &mut _, _| site::carry(index, network, subnet, *revision, carrier.as_ref());
            if self.world.commit(number, plan).unwrap() {
                running.decider.written(&decision, &presence);
                self.written.push((number, decision));
            }
        }
        next
    }

    /// All know everything and decide, until nobody has anything to write.
    fn settle(&mut self) {
        for _ in 0..10 {
            let before = self.written.len();
            for number in 0..self.running.len() {
                self.world.catch_up(number);
                self.decide(number);
            }
            if self.written.len() == before {
                return;
            }
        }
        panic!("the registrars do not agree: {:?}", self.written);
    }

    /// Time passes, in which all are asked whenever they want to.
    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.settle();
            self.now += Duration::from_millis(500);
        }
        self.settle();
    }

    fn carrier(&mut self, subnet: &str) -> Option<Carrier> {
        self.world.catch_up(0);
        let subnet: IpNet = subnet.parse().unwrap();
        self.world.indexes[0].network("n").unwrap().carriers.get(&subnet).copied()
    }

    fn device(&mut self, subnet: &str) -> Option<Uuid> {
        self.carrier(subnet).map(|carrier| carrier.device)
    }

    fn uid(&self, number: usize) -> Uuid {
        self.running[number].as_ref().unwrap().uid
    }
}

#[test]
fn the_first_that_may_carries() {
    let (mut registrars, gates) = Registrars::new(1, &["g", "h"]);
    registrars.settle();
    assert_eq!(registrars.carrier(LAN), None, "nobody is there");
    registrars.open(0, gates[1]);
    registrars.settle();
    assert_eq!(registrars.device(LAN), Some(gates[1]));
    registrars.open(0, gates[0]);
    registrars.pass(Duration::from_secs(60));
    assert_eq!(registrars.device(LAN), Some(gates[1]), "it stays with the one that has it");
    assert_eq!(registrars.written.len(), 2);
}

#[test]
fn another_takes_over_from_one_that_is_away() {
    let (mut registrars, gates) = Registrars::new(1, &["g", "h"]);
    registrars.open(0, gates[0]);
    registrars.settle();
    registrars.open(0, gates[1]);
    registrars.close(0, gates[0]);
    registrars.pass(PATIENCE - Duration::from_secs(1));
    assert_eq!(registrars.device(LAN), Some(gates[0]), "it may come back");
    registrars.pass(Duration::from_secs(1) + CONFIRM);
    assert_eq!(registrars.device(LAN), Some(gates[1]));
    let (_, last) = registrars.written.last().unwrap();
    assert_eq!(last.reason, Reason::Lost);

    // The first one comes back, and stays in reserve.
    registrars.open(0, gates[0]);
    registrars.pass(Duration::from_secs(60));
    assert_eq!(registrars.device(LAN), Some(gates[1]));
}

#[test]
fn one_that_comes_back_in_time_keeps_its_subnets() {
    let (mut registrars, gates) = Registrars::new(1, &["g", "h"]);
    gates.iter().for_each(|gate| registrars.open(0, *gate));
    registrars.settle();
    let written = registrars.written.len();
    for _ in 0..10 {
        registrars.close(0, gates[0]);
        registrars.pass(PATIENCE - Duration::from_secs(1));
        registrars.open(0, gates[0]);
        registrars.pass(Duration::from_secs(1));
    }
    assert_eq!(registrars.device(LAN), Some(gates[0]));
    assert_eq!(registrars.written.len(), written);
}

#[test]
fn one_that_says_that_it_is_alive_is_missed_soon() {
    let (mut registrars, gates) = Registrars::new(1, &["g", "h"]);
    gates.iter().for_each(|gate| registrars.open(0, *gate));
    let heard = registrars.now;
    registrars.running[0].as_mut().unwrap().sessions.get_mut(&gates[0]).unwrap().heard = Some(heard);
    registrars.settle();
    assert_eq!(registrars.device(LAN), Some(gates[0]));
    assert_eq!(registrars.decide(0), Some(heard + SILENT), "its silence has to be noticed");
    registrars.pass(SILENT);
    assert_eq!(registrars.decide(0), Some(heard + SILENT + PATIENCE));
    registrars.pass(PATIENCE + CONFIRM);
    assert_eq!(registrars.device(LAN), Some(gates[1]));
}

#[test]
fn without_another_one_it_goes_on() {
    let (mut registrars, gates) = Registrars::new(2, &["g", "h"]);
    registrars.open(0, gates[0]);
    registrars.settle();
    registrars.close(0, gates[0]);
    registrars.pass(Duration::from_secs(60));
    let left = registrars.carrier(LAN).unwrap();
    assert_eq!((left.device, left.registrar), (gates[0], None));
    // Who comes first to whichever registrar has it.
    registrars.open(1, gates[1]);
    registrars.pass(PATIENCE);
    let (device, registrar) = (gates[1], Some(registrars.uid(1)));
    let carrier = registrars.carrier(LAN).unwrap();
    assert_eq!((carrier.device, carrier.registrar), (device, registrar));
}

#[test]
fn what_it_may_not_carry_it_loses_at_once() {
    let (mut registrars, gates) = Registrars::new(1, &["g", "h"]);
    registrars.open(0, gates[0]);
    registrars.settle();
    registrars.open(0, gates[1]);
    let name = |registrars: &Registrars, gate| registrars.world.device(0, gate).unwrap().name.to_string();
    let first = name(&registrars, gates[0]);
    registrars.world.approve(&first, false, &[OTHER]).unwrap();
    registrars.settle();
    assert_eq!((registrars.device(LAN), registrars.device(OTHER)), (Some(gates[1]), Some(gates[0])));
    registrars.world.revoke(0, &first, true).unwrap();
    registrars.settle();
    assert_eq!(registrars.device(OTHER), Some(gates[1]));
    let second = name(&registrars, gates[1]);
    registrars.world.revoke(0, &second, true).unwrap();
    registrars.settle();
    assert_eq!((registrars.carrier(LAN), registrars.carrier(OTHER)), (None, None));
}

#[test]
fn a_device_that_moves_to_another_registrar_takes_its_subnets_along() {
    let (mut registrars, gates) = Registrars::new(2, &["g", "h"]);
    registrars.open(0, gates[0]);
    registrars.settle();
    registrars.open(0, gates[1]);
    // The connection to the one before is dead, but not known to be.
    registrars.open(1, gates[0]);
    registrars.pass(Duration::from_secs(20));
    registrars.close(0, gates[0]);
    registrars.pass(Duration::from_secs(20));
    let carrier = registrars.carrier(LAN).unwrap();
    assert_eq!((carrier.device, carrier.registrar), (gates[0], Some(registrars.uid(1))));
    assert_eq!(
        registrars.written.len(),
        4,
        "once when it came, once when it moved: {:?}",
        registrars.written
    );
}

#[test]
fn the_devices_of_a_registrar_that_is_gone_are_missed() {
    let (mut registrars, gates) = Registrars::new(2, &["g", "h"]);
    registrars.open(0, gates[0]);
    registrars.settle();
    registrars.open(1, gates[1]);
    registrars.kill(0);
    registrars.pass(PATIENCE);
    assert_eq!(registrars.device(LAN), Some(gates[1]));
}

#[test]
fn after_a_restart_all_is_as_before() {
    let (mut registrars, gates) = Registrars::new(1, &["g", "h"]);
    registrars.open(0, gates[1]);
    registrars.settle();
    registrars.kill(0);
    registrars.now += Duration::from_secs(3600);
    registrars.start(0);
    registrars.open(0, gates[0]);
    registrars.pass(AFTER_START - Duration::from_secs(1));
    assert_eq!(registrars.device(LAN), Some(gates[1]), "it is about to come back");
    registrars.open(0, gates[1]);
    registrars.pass(Duration::from_secs(60));
    let carrier = registrars.carrier(LAN).unwrap();
    assert_eq!((carrier.device, carrier.registrar), (gates[1], Some(registrars.uid(0))));
}

/// Devices come, go and move, registrars die, start and are cut off, and each knows of the others' writes late. In the
/// end all subnets are carried by devices that can, nobody writes any more, and nobody ever lost a subnet while its
/// session was open at a registrar that the others know to run.
#[test]
fn whatever_happens_all_is_carried_in_the_end() {
    for seed in 0..300 {
        let mut rng = StdRng::seed_from_u64(seed);
        let number = rng.random_range(1..=3);
        let (mut registrars, gates) = Registrars::new(number, &["f", "g", "h"]);
        // Where each device is, and where it was and its session is not known to have ended.
        let mut at: BTreeMap<Uuid, usize> = BTreeMap::new();
        let mut stale: Vec<(usize, Uuid)> = Vec::new();
        for _ in 0..rng.random_range(10..60) {
            let gate = *gates.choose(&mut rng).unwrap();
            let registrar = rng.random_range(0..number);
            match rng.random_range(0..10) {
                0..4 if registrars.running[registrar].is_some() => {
                    if let Some(before) = at.insert(gate, registrar)
                        && before != registrar
                    {
                        stale.push((before, gate));
                    }
                    registrars.open(registrar, gate);
                }
                4..6 => {
                    if let Some(registrar) = at.remove(&gate) {
                        registrars.close(registrar, gate);
                    }
                }
                6 => {
                    registrars.kill(registrar);
                    at.retain(|_, at| *at != registrar);
                    stale.retain(|(at, _)| *at != registrar);
                }
                7 if registrars.running[registrar].is_none() => registrars.start(registrar),
                8 => registrars.cut_off(registrar),
                9 => registrars.announce(registrar),
                _ => {}
            }
            let written = registrars.written.len();
            if rng.random_bool(0.3) {
                registrars.pass(Duration::from_millis(rng.random_range(0..8000)));
            } else {
                for other in 0..number {
                    if rng.random_bool(0.5) {
                        registrars.world.catch_up(other);
                    }
                    registrars.decide(other);
                }
                registrars.settle();
            }
            for (_, decision) in &registrars.written[written..] {
                if decision.reason != Reason::Lost {
                    continue;
                }
                // Who it was taken from is at no registrar that the others hear of.
                let (device, _) = decision.carrier.unwrap();
                for (gate, registrar) in &at {
                    let heard = registrars.running[*registrar].as_ref().is_some_and(|r| !r.is_cut_off);
                    let before = before(&registrars.written, decision);
                    let lost = before == Some(*gate) && device != *gate;
                    assert!(!(lost && heard), "seed {seed}: {gate} lost {}", decision.subnet);
                }
            }
            if rng.random_bool(0.3) {
                stale.drain(..).for_each(|(registrar, gate)| {
                    if at.get(&gate).is_none_or(|at| *at != registrar) {
                        registrars.close(registrar, gate);
                    }
                });
            }
        }
        for registrar in 0..number {
            match registrars.running[registrar] {
                Some(_) => registrars.announce(registrar),
                None => registrars.start(registrar),
            }
        }
        for (registrar, gate) in stale {
            if at.get(&gate).is_none_or(|at| *at != registrar) {
                registrars.close(registrar, gate);
            }
        }
        registrars.pass(AFTER_START + 3 * PATIENCE);
        let written = registrars.written.len();
        registrars.pass(Duration::from_secs(60));
        assert_eq!(registrars.written.len(), written, "seed {seed}: it never ends");
        for subnet in [LAN, OTHER] {
            let Some(carrier) = registrars.carrier(subnet) else {
                assert!(at.is_empty(), "seed {seed}: nobody carries {subnet}");
                continue;
            };
            let registrar = at.get(&carrier.device).map(|registrar| registrars.uid(*registrar));
            assert!(registrar.is_some() || at.is_empty(), "seed {seed}: {subnet} by one that is away");
            if registrar.is_some() {
                assert_eq!(carrier.registrar, registrar, "seed {seed}: {subnet}");
            }
        }
    }
}

/// Who carried the subnet when `decision` was made.
fn before(written: &[(usize, Decision)], decision: &Decision) -> Option<Uuid> {
    let at = written.iter().position(|(_, other)| std::ptr::eq(other, decision))?;
    let earlier = written[..at].iter().rev().find(|(_, other)| other.subnet == decision.subnet)?;
    earlier.1.carrier.map(|(device, _)| device)
}
