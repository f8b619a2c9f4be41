//! Which endpoints are there: with one registrar, with several, and with everything that can happen to them.

use std::{collections::BTreeMap, time::Duration};

use muster_common::{labels::Labels, time::Instant};
use muster_proto::admin::TokenSpec;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use uuid::Uuid;

use super::decide::{AFTER_START, Decider, PATIENCE, Verdict};
use crate::{
    registry::{
        keys,
        plan::presence::{Move, write},
        tests::{World, service},
    },
    store::Txn,
};

/// One that runs.
struct Running {
    uid: Uuid,
    decider: Decider,
    sessions: BTreeMap<Uuid, u64>,
    is_cut_off: bool,
}

/// Registrars with sessions, on one store, and devices that are endpoints of the Service `web`.
struct Registrars {
    world: World,
    now: Instant,
    running: Vec<Option<Running>>,
    devices: Vec<Uuid>,
    next_session: u64,
    written: usize,
}

impl Registrars {
    fn new(registrars: usize, devices: usize) -> Self {
        let mut world = World::with_services(registrars);
        let labels = Labels::from([("app".to_owned(), "web".to_owned())]);
        let token = world.create_token(
            "t",
            TokenSpec { reusable: true, device_labels: labels.clone(), ..TokenSpec::default() },
        );
        let mut wanted = service("web");
        wanted.spec.as_mut().unwrap().selector = labels;
        world.create_service(0, &wanted).unwrap();
        let mut uids = Vec::new();
        for n in 0..devices {
            let uid = world.join(&token, &format!("d{n}"));
            world.register(0, uid, u8::try_from(n).unwrap() + 1).unwrap();
            uids.push(uid);
        }
        let now = Instant::from_boot(Duration::from_secs(1000));
        let running = (0..registrars).map(|_| None).collect();
        let mut all = Self { world, now, running, devices: uids, next_session: 1, written: 0 };
        (0..registrars).for_each(|number| all.start(number));
        all
    }

    fn start(&mut self, number: usize) {
        let uid = self.world.uid();
        let decider = Decider::new(uid, self.now);
        self.running[number] = Some(Running { uid, decider, sessions: BTreeMap::new(), is_cut_off: false });
        self.announce(number, true);
    }

    /// The store hears of a registrar, or its announcement expires.
    fn announce(&mut self, number: usize, runs: bool) {
        let Some(running) = &mut self.running[number] else { return };
        running.is_cut_off = !runs;
        let key = keys::registrar(running.uid);
        let txn = if runs { Txn::new().put(key, "") } else { Txn::new().delete(key) };
        self.world.store.apply_txn(&txn).unwrap();
    }

    fn kill(&mut self, number: usize) {
        self.announce(number, false);
        self.running[number] = None;
    }

    fn open(&mut self, number: usize, device: Uuid) {
        self.next_session += 1;
        if let Some(running) = &mut self.running[number] {
            running.sessions.insert(device, self.next_session);
        }
    }

    fn close(&mut self, number: usize, device: Uuid) {
        if let Some(running) = &mut self.running[number] {
            running.sessions.remove(&device);
        }
    }

    /// A registrar judges all devices by what it knows, and writes what comes of it.
    fn judge(&mut self, number: usize) {
        let Some(running) = self.running[number].as_mut().filter(|running| !running.is_cut_off) else {
            return;
        };
        let mut moves = Vec::new();
        for device in &self.devices {
            let index = &self.world.indexes[number];
            let place = ("n".into(), *device);
            let found = index.network("n").unwrap().presence.get(device).copied();
            let session = running.sessions.get(device).copied();
            let runs = |registrar| index.registrars().running().contains(&registrar);
            if let Verdict::Write(revision, registrar) =
                running.decider.judge(&place, found, session, runs, self.now)
            {
                let (network, device) = place;
                moves.push((Move { network, device, revision, registrar }, session));
            }
        }
        let uid = running.uid;
        let wanted: Vec<Move> = moves.iter().map(|(wanted, _)| wanted.clone()).collect();
        self.written += self.world.commit(number, |index, _| write(index, &wanted)).unwrap();
        for (wanted, session) in moves {
            let state = self.world.indexes[number].network("n").unwrap();
            let is_here =
                state.presence.get(&wanted.device).is_some_and(|found| found.registrar == Some(uid));
            if let (Some(running), Some(session), true) = (&mut self.running[number], session, is_here) {
                running.decider.came(&(wanted.network, wanted.device), session);
            }
        }
    }

    /// Time passes, in steps in which every registrar catches up and judges.
    fn pass(&mut self, span: Duration) {
        let end = self.now + span;
        while self.now < end {
            self.now += Duration::from_millis(500);
            for number in 0..self.running.len() {
                self.world.catch_up(number);
                self.judge(number);
            }
        }
        (0..self.running.len()).for_each(|number| self.world.catch_up(number));
    }

    /// Whether each device is a ready endpoint.
    fn ready(&self) -> Vec<bool> {
        let state = self.world.indexes[0].network("n").unwrap();
        let slices = state.services.slices_of("default", "web");
        let endpoints: Vec<_> = slices.flat_map(|slice| &slice.stored.endpoints).collect();
        let of = |device: &Uuid| {
            let uid = device.to_string();
            let found =
                endpoints.iter().find(|e| e.target_ref.as_ref().is_some_and(|target| target.uid == uid));
            found.unwrap().conditions.unwrap().ready == Some(true)
        };
        self.devices.iter().map(of).collect()
    }
}

#[test]
fn an_endpoint_without_a_session_is_not_ready_after_a_while() {
    let mut all = Registrars::new(1, 2);
    let (a, b) = (all.devices[0], all.devices[1]);
    // Of those that nobody has seen yet, nothing is known.
    all.pass(AFTER_START);
    assert_eq!((all.ready(), all.written), (vec![true, true], 0));
    all.open(0, a);
    all.open(0, b);
    all.pass(Duration::from_secs(1));
    assert_eq!((all.ready(), all.written), (vec![true, true], 2));
    all.close(0, a);
    all.pass(PATIENCE - Duration::from_secs(1));
    assert_eq!(all.ready(), [true, true]);
    all.pass(Duration::from_secs(2));
    assert_eq!(all.ready(), [false, true]);
    // DNS follows, and where it is published all the same it stays.
    let view = |all: &Registrars| {
        let state = all.world.indexes[0].network("n").unwrap();
        state.service("default", "web").unwrap().endpoints.len()
    };
    assert_eq!(view(&all), 1);
    let mut wanted = service("web");
    wanted.spec.as_mut().unwrap().publish_not_ready_addresses = true;
    all.world.update_service(0, &wanted, &["spec.publish_not_ready_addresses"]).unwrap();
    assert_eq!(view(&all), 2);
    all.open(0, a);
    all.pass(Duration::from_secs(1));
    assert_eq!((all.ready(), all.written), (vec![true, true], 4));
    // A short break writes nothing.
    all.close(0, a);
    all.pass(PATIENCE / 2);
    all.open(0, a);
    all.pass(PATIENCE * 2);
    assert_eq!((all.ready(), all.written), (vec![true, true], 4));
}

#[test]
fn the_devices_of_a_registrar_that_dies_are_given_time_to_come_to_another() {
    let mut all = Registrars::new(2, 2);
    let (a, b) = (all.devices[0], all.devices[1]);
    all.pass(AFTER_START);
    all.open(0, a);
    all.open(0, b);
    all.pass(Duration::from_secs(1));
    all.kill(0);
    all.pass(Duration::from_secs(2));
    all.open(1, a);
    all.pass(PATIENCE);
    assert_eq!(all.ready(), [true, false]);
    // It was alone, and comes back as another: nobody is away before all could have come.
    all.kill(1);
    all.pass(Duration::from_secs(600));
    all.start(1);
    all.pass(AFTER_START - Duration::from_secs(2));
    assert_eq!(all.ready(), [true, false]);
    all.pass(Duration::from_secs(4));
    assert_eq!(all.ready(), [false, false]);
    all.open(1, b);
    all.pass(Duration::from_secs(1));
    assert_eq!(all.ready(), [false, true]);
}

#[test]
fn a_session_that_only_looks_alive_is_no_reason_to_write_again_and_again() {
    let mut all = Registrars::new(2, 1);
    let a = all.devices[0];
    all.pass(AFTER_START);
    all.open(0, a);
    all.pass(Duration::from_secs(1));
    // It has gone to another one; the first one's connection takes long to die.
    all.open(1, a);
    all.pass(Duration::from_secs(60));
    assert_eq!((all.ready(), all.written), (vec![true], 2));
    all.close(0, a);
    all.pass(Duration::from_secs(60));
    assert_eq!((all.ready(), all.written), (vec![true], 2));
}

#[test]
fn whatever_happens_the_store_comes_to_say_who_is_there() {
    for seed in 0..200 {
        let mut rng = StdRng::seed_from_u64(seed);
        let registrars = rng.random_range(1..=3);
        let mut all = Registrars::new(registrars, 4);
        for _ in 0..40 {
            let number = rng.random_range(0..registrars);
            let device = all.devices[rng.random_range(0..all.devices.len())];
            match rng.random_range(0..9) {
                0 => all.kill(number),
                1 => all.announce(number, false),
                2 => all.announce(number, true),
                3 if all.running[number].is_none() => all.start(number),
                // A device has its newest session at one place; older ones may hang on.
                4..=6 => all.open(number, device),
                _ => all.close(number, device),
            }
            all.pass(Duration::from_millis(rng.random_range(500..8000)));
        }
        // All registrars run and hear, and only the newest session of each device is left.
        for number in 0..registrars {
            match all.running[number].is_some() {
                true => all.announce(number, true),
                false => all.start(number),
            }
        }
        let mut newest: BTreeMap<Uuid, (u64, usize)> = BTreeMap::new();
        for (number, running) in all.running.iter().enumerate() {
            for (device, session) in &running.as_ref().unwrap().sessions {
                let latest = newest.entry(*device).or_default();
                *latest = (*latest).max((*session, number));
            }
        }
        for running in all.running.iter_mut().flatten() {
            running.sessions.retain(|device, session| newest[device].0 == *session);
        }
        all.pass(AFTER_START + PATIENCE * 3);
        let settled = all.written;
        let ready = all.ready();
        for (device, is_ready) in all.devices.iter().zip(ready) {
            let found = all.world.indexes[0].network("n").unwrap().presence.get(device).copied();
            let expected = newest.get(device).map(|(_, number)| all.running[*number].as_ref().unwrap().uid);
            let is_right = match found {
                Some(found) => found.registrar == expected && is_ready == expected.is_some(),
                None => expected.is_none() && is_ready,
            };
            assert!(is_right, "seed {seed}: {device} is {found:?}, ready {is_ready}, expected {expected:?}");
        }
        all.pass(Duration::from_secs(120));
        assert_eq!(all.written, settled, "seed {seed}");
        let devices = all.devices.len();
        assert!(all.running.iter().flatten().all(|running| running.decider.remembers() <= 2 * devices));
    }
}
