//! Choosing directors in virtual time, against directors that answer, are far away, drain and die.

use muster_proto::{
    admin::Endpoint,
    registration::{HomeDirector, Peer},
};
use muster_tunnel::DirectorLink;
use proptest::prelude::*;
use rand::SeedableRng;
use zeroize::Zeroizing;

use super::*;
use crate::directors::flow::Attachment;

/// A director as it is in truth.
#[derive(Clone, Debug)]
struct Fake {
    round_trip: u64,
    is_up: bool,
    is_draining: bool,
    blocks_udp: bool,
}

const UP: Fake = Fake { round_trip: 10, is_up: true, is_draining: false, blocks_udp: false };

struct World {
    directors: Directors,
    rng: StdRng,
    now: Instant,
    fakes: BTreeMap<String, Fake>,
    /// Which director has which number, and when its flow says hello next.
    flows: BTreeMap<DirectorId, Instant>,
    targets: BTreeMap<DirectorId, (String, u64)>,
    streams: BTreeSet<DirectorId>,
    attaches: usize,
    jitter: bool,
}

fn told(uid: &str) -> DirectorAddress {
    let number = uid.bytes().map(u32::from).sum::<u32>() % 250;
    DirectorAddress {
        name: uid.to_owned(),
        uid: uid.to_owned(),
        address: format!("192.0.2.{number}"),
        port: 7501,
        ..DirectorAddress::default()
    }
}

impl World {
    /// Directors by uid and round trip in milliseconds.
    fn new(fakes: &[(&str, u64)]) -> Self {
        let fakes: BTreeMap<_, _> = fakes
            .iter()
            .map(|(uid, round_trip)| ((*uid).to_owned(), Fake { round_trip: *round_trip, ..UP }))
            .collect();
        let mut world = Self {
            directors: Directors::default(),
            rng: StdRng::seed_from_u64(7),
            now: Instant::from_boot(Duration::from_secs(1_000)),
            fakes,
            flows: BTreeMap::new(),
            targets: BTreeMap::new(),
            streams: BTreeSet::new(),
            attaches: 0,
            jitter: false,
        };
        world.tell();
        world
    }

    /// The registrar's list is what there is.
    fn tell(&mut self) {
        let list: Vec<_> = self.fakes.keys().map(|uid| told(uid)).collect();
        self.directors.update(&list, self.now);
        self.settle();
    }

    fn fake(&self, id: DirectorId) -> Option<(&Fake, u64)> {
        let (uid, attempt) = self.targets.get(&id)?;
        Some((self.fakes.get(uid)?, *attempt))
    }

    fn settle(&mut self) {
        self.directors.settle(&mut self.rng, self.now);
        self.directors.check();
        let actions: Vec<Action> = self.directors.take_actions().collect();
        for action in actions {
            self.perform(action);
        }
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Attach { id, attempt, target } => {
                self.attaches += 1;
                self.targets.insert(id, (target.uid.clone(), attempt));
                let event = match self.fakes.get(&target.uid) {
                    Some(fake) if fake.is_up && !fake.is_draining => DirectorEvent::Attached {
                        id,
                        attempt,
                        attachment: Attachment {
                            endpoints: target.addresses.clone(),
                            session: attempt as u32,
                            key: Zeroizing::new([1; 32]),
                            hello_interval: Duration::from_secs(15),
                        },
                        round_trip: Duration::from_millis(fake.round_trip),
                    },
                    _ => {
                        let failure = Failure::Unavailable("down".into());
                        DirectorEvent::Closed { id, attempt, failure }
                    }
                };
                self.directors.handle(event, &mut self.rng, self.now);
                self.settle();
            }
            Action::Datapath(Command::SetDirector { id, attachment: Some(_) }) => {
                self.flows.insert(id, self.now);
                self.hello(id);
            }
            Action::Datapath(Command::SetDirector { id, attachment: None }) => drop(self.flows.remove(&id)),
            Action::Detach(id) => drop(self.targets.remove(&id)),
            Action::OpenStream { id, .. } => {
                self.streams.insert(id);
                self.flow(FlowEvent::Link(id, Some(link(Hop::Stream(id)))));
            }
            Action::CloseStream(id) => drop(self.streams.remove(&id)),
            other => panic!("{other:?}"),
        }
    }

    fn flow(&mut self, event: FlowEvent) {
        self.directors.handle_flow(&event, &mut self.rng, self.now);
        self.settle();
    }

    /// The flow's hello, and what comes of it.
    fn hello(&mut self, id: DirectorId) {
        self.flows.insert(id, self.now + Duration::from_secs(15));
        let Some((fake, attempt)) = self.fake(id) else { return };
        let fake = fake.clone();
        if !fake.is_up {
            self.flow(FlowEvent::Link(id, None));
            let failure = Failure::Unavailable("it broke".into());
            self.directors.handle(DirectorEvent::Closed { id, attempt, failure }, &mut self.rng, self.now);
            self.settle();
        } else if fake.blocks_udp {
            if !self.streams.contains(&id) {
                self.flow(FlowEvent::Unanswered(id));
            }
        } else {
            let noise = if self.jitter { self.rng.random_range(0..1_000) } else { 0 };
            let hop = Hop::Udp("192.0.2.1:7501".parse().unwrap());
            self.flow(FlowEvent::Link(id, Some(DirectorLink { is_draining: fake.is_draining, ..link(hop) })));
            self.flow(FlowEvent::Bound {
                id,
                reflexive: "198.51.100.1:7551".parse().unwrap(),
                round_trip: Duration::from_micros(fake.round_trip * 1_000 + noise),
                draining: fake.is_draining,
            });
        }
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            let hello = self.flows.iter().map(|(id, at)| (*at, *id)).min();
            let timeout = self.directors.timeout();
            let next = hello.map(|(at, _)| at).into_iter().chain(timeout).min();
            let Some(next) = next.filter(|next| *next <= end) else { break };
            assert!(next >= self.now || timeout != Some(next), "a timeout is overdue");
            self.now = self.now.max(next);
            match hello {
                Some((at, id)) if at <= self.now => self.hello(id),
                _ => {
                    self.settle();
                    assert!(self.directors.timeout().is_none_or(|at| at > self.now), "it spins");
                }
            }
        }
        self.now = end;
        self.settle();
    }

    /// Home and second.
    fn chosen(&self) -> (Option<&str>, Option<&str>) {
        self.directors.chosen()
    }

    /// Those that can be used.
    fn attached(&self) -> Vec<&str> {
        let usable = self.directors.views().into_iter().filter(|view| view.way.is_some());
        let mut uids: Vec<&str> = usable.map(|view| view.target.uid.as_str()).collect();
        uids.sort_unstable();
        uids
    }

    /// It fails at once, and its flow sees it at the next hello, or now.
    fn kill(&mut self, uid: &str) {
        self.fakes.get_mut(uid).unwrap().is_up = false;
        let found = self.targets.iter().find(|(_, (of, _))| of == uid).map(|(id, _)| *id);
        if let Some(id) = found {
            self.hello(id);
        }
    }
}

fn link(hop: Hop) -> DirectorLink {
    DirectorLink { session: 1, hop, is_draining: false }
}

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

#[test]
fn the_nearest_are_kept() {
    let mut world = World::new(&[("a", 50), ("b", 10), ("c", 40), ("d", 20), ("e", 30), ("f", 60)]);
    world.run(SECOND);
    assert_eq!(world.chosen(), (Some("b"), Some("d")));
    assert_eq!(world.attached(), ["b", "d", "e"]);
    let views = world.directors.views();
    assert_eq!((views[0].role, views[0].way), (Role::Home, Some(Way::Udp)));
    assert_eq!(views[0].round_trip, Some(Duration::from_millis(10)));
    assert_eq!(world.directors.reflexive(), ["198.51.100.1:7551".parse().unwrap()]);
    // And stay what they are.
    let before = world.attaches;
    world.run(10 * MINUTE);
    assert_eq!((world.chosen(), world.attaches), ((Some("b"), Some("d")), before));
}

#[test]
fn the_second_takes_the_place_of_a_lost_home_at_once() {
    let mut world = World::new(&[("a", 10), ("b", 30), ("c", 40), ("d", 50)]);
    world.run(SECOND);
    world.kill("a");
    assert_eq!(world.chosen(), (Some("b"), Some("c")));
    world.run(MINUTE);
    assert_eq!(world.attached(), ["b", "c"]);
    // A minute of being nearer again makes it the home again.
    world.fakes.get_mut("a").unwrap().is_up = true;
    world.run(20 * MINUTE);
    assert_eq!(world.chosen().0, Some("a"));
}

#[test]
fn a_home_without_a_replacement_stays_the_home() {
    let mut world = World::new(&[("a", 10)]);
    world.run(SECOND);
    assert_eq!(world.chosen(), (Some("a"), None));
    world.kill("a");
    let before = world.attaches;
    world.run(10 * MINUTE);
    let tries = world.attaches - before;
    assert!((10..30).contains(&tries), "{tries} attempts in ten minutes");
    assert_eq!(world.chosen(), (Some("a"), None));
    assert!(!world.directors.views()[0].last_error.is_empty());
    world.fakes.get_mut("a").unwrap().is_up = true;
    world.run(MINUTE);
    assert_eq!((world.chosen(), world.attached()), ((Some("a"), None), vec!["a"]));
}

#[test]
fn a_little_nearer_is_not_near_enough() {
    let mut world = World::new(&[("a", 20), ("b", 25)]);
    world.run(SECOND);
    world.fakes.get_mut("b").unwrap().round_trip = 12;
    world.run(10 * MINUTE);
    assert_eq!(world.chosen(), (Some("a"), Some("b")));
    // Ten milliseconds and a third are, but only if they last.
    world.fakes.get_mut("b").unwrap().round_trip = 5;
    world.run(Duration::from_secs(50));
    assert_eq!(world.chosen(), (Some("a"), Some("b")));
    world.run(2 * MINUTE);
    assert_eq!(world.chosen(), (Some("b"), Some("a")));
}

#[test]
fn a_draining_director_is_left_without_haste() {
    let mut world = World::new(&[("a", 10), ("b", 20), ("c", 30)]);
    world.run(SECOND);
    world.fakes.get_mut("a").unwrap().is_draining = true;
    let id = *world.targets.iter().find(|(_, (uid, _))| uid == "a").unwrap().0;
    world.hello(id);
    assert_eq!(world.chosen(), (Some("b"), Some("c")));
    assert_eq!(world.attached(), ["a", "b", "c"]);
    world.run(11 * SECOND);
    assert_eq!(world.attached(), ["b", "c"]);
    // An operator drains the last but one: with its list, the registrar says so.
    let mut list: Vec<_> = ["b", "c"].map(told).to_vec();
    list[0].draining = true;
    world.directors.update(&list, world.now);
    world.settle();
    assert_eq!(world.chosen().0, Some("c"));
    world.run(MINUTE);
    assert_eq!((world.chosen(), world.attached()), ((Some("c"), None), vec!["c"]));
    // The last is used although it drains.
    list[1].draining = true;
    world.directors.update(&list, world.now);
    world.run(MINUTE);
    assert_eq!(world.chosen().0, Some("c"));
}

#[test]
fn where_udp_is_blocked_frames_go_over_tcp_until_it_is_not() {
    let mut world = World::new(&[("a", 10)]);
    world.fakes.get_mut("a").unwrap().blocks_udp = true;
    world.directors = Directors::default();
    world.tell();
    world.run(SECOND);
    let way = |world: &World| world.directors.views()[0].way;
    assert_eq!((world.chosen().0, way(&world), world.streams.len()), (Some("a"), Some(Way::Tcp), 1));
    world.fakes.get_mut("a").unwrap().blocks_udp = false;
    world.run(20 * SECOND);
    assert_eq!((world.chosen().0, way(&world)), (Some("a"), Some(Way::Udp)));
    world.run(MINUTE);
    assert!(world.streams.is_empty());
}

#[test]
fn what_peers_need_is_attached_too() {
    let mut world = World::new(&[("a", 10), ("b", 20), ("c", 30), ("d", 40), ("e", 50)]);
    world.run(SECOND);
    let home = |uid: &str| Some(HomeDirector { address: Some(told(uid)), handle: 77 });
    let peer = Peer { home_director: home("e"), second_director: home("d"), ..Peer::default() };
    let relays = world.directors.relays(&peer);
    assert_eq!(relays.iter().map(|(_, handle)| handle.0).collect::<Vec<_>>(), [77, 77]);
    world.directors.need(std::iter::once(relays.as_slice()), world.now);
    world.settle();
    assert_eq!(world.attached(), ["a", "b", "c", "e"]);
    assert_eq!(world.chosen(), (Some("a"), Some("b")));
    world.directors.need(std::iter::empty(), world.now);
    world.run(9 * MINUTE);
    assert_eq!(world.attached(), ["a", "b", "c", "e"]);
    world.run(2 * MINUTE);
    assert_eq!(world.attached(), ["a", "b", "c"]);
    // One that is attached anyway will do.
    let peer = Peer { home_director: home("e"), second_director: home("c"), ..Peer::default() };
    world.directors.need(std::iter::once(world.directors.relays(&peer).as_slice()), world.now);
    world.settle();
    assert_eq!(world.attached(), ["a", "b", "c"]);
    // Unknown, and not attached anywhere.
    let nowhere = HomeDirector { handle: 0, ..home("a").unwrap() };
    let peer = Peer { home_director: home("z"), second_director: Some(nowhere), ..Peer::default() };
    assert_eq!(world.directors.relays(&peer), []);
}

#[test]
fn directors_come_and_go_with_the_registrars_list() {
    let mut world = World::new(&[("a", 10), ("b", 20)]);
    world.run(SECOND);
    world.fakes.remove("a");
    world.fakes.insert("c".into(), Fake { round_trip: 5, ..UP });
    world.tell();
    assert_eq!(world.chosen().0, Some("b"));
    world.run(SECOND);
    assert_eq!(world.attached(), ["b", "c"]);
    world.run(2 * MINUTE);
    assert_eq!(world.chosen(), (Some("c"), Some("b")));
    // Those that have not registered are no directors to attach to.
    let unregistered = DirectorAddress { uid: String::new(), ..told("x") };
    assert!(world.directors.update(&[unregistered], world.now));
    world.settle();
    assert_eq!((world.chosen(), world.attached().len()), ((None, None), 0));
    assert_eq!(world.directors.timeout(), None);
    let many: Vec<_> = (0..40).map(|n| told(&format!("d{n:02}"))).collect();
    assert!(world.directors.update(&many, world.now));
    assert_eq!(world.directors.views().len(), MAX_DIRECTORS);
    let endpoint = Endpoint { address: "192.0.2.9".into(), port: 1 };
    let moved = DirectorAddress { other_endpoints: vec![endpoint], ..told("d00") };
    assert!(!world.directors.update(&[&[moved], &many[1..16]].concat(), world.now));
}

#[test]
fn a_host_that_moves_measures_anew() {
    let mut world = World::new(&[("a", 10), ("b", 60)]);
    world.run(SECOND);
    assert_eq!(world.chosen().0, Some("a"));
    (world.fakes.get_mut("a").unwrap().round_trip, world.fakes.get_mut("b").unwrap().round_trip) = (60, 10);
    let before = world.attaches;
    world.directors.host_moved(true, &mut world.rng, world.now);
    world.settle();
    // What is attached is attached again, as its connection is from an address that is gone.
    world.run(SECOND);
    assert_eq!(world.attaches, before + 2);
    world.run(2 * MINUTE);
    assert_eq!(world.chosen(), (Some("b"), Some("a")));
}

#[test]
fn devices_spread_over_directors_that_are_equally_near() {
    let mut homes: BTreeMap<String, usize> = BTreeMap::new();
    for seed in 0..300 {
        let mut world = World::new(&[]);
        (world.rng, world.jitter) = (StdRng::seed_from_u64(seed), true);
        world.fakes = ["a", "b", "c"].map(|uid| (uid.to_owned(), UP)).into();
        world.tell();
        world.run(SECOND);
        *homes.entry(world.chosen().0.unwrap().to_owned()).or_default() += 1;
    }
    assert!(homes.len() == 3 && homes.values().all(|number| *number > 60), "{homes:?}");
}

#[derive(Clone, Debug)]
enum Step {
    Run(u64),
    Up(usize, bool),
    Drain(usize, bool),
    Block(usize, bool),
    RoundTrip(usize, u64),
    Tell(u8),
    Move(bool),
    Need(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let n = 0..8_usize;
    prop_oneof![
        4 => (0..200_u64).prop_map(Step::Run),
        2 => (n.clone(), any::<bool>()).prop_map(|(n, up)| Step::Up(n, up)),
        1 => (n.clone(), any::<bool>()).prop_map(|(n, on)| Step::Drain(n, on)),
        1 => (n.clone(), any::<bool>()).prop_map(|(n, on)| Step::Block(n, on)),
        2 => (n.clone(), 1..300_u64).prop_map(|(n, ms)| Step::RoundTrip(n, ms)),
        1 => any::<u8>().prop_map(Step::Tell),
        1 => any::<bool>().prop_map(Step::Move),
        1 => n.prop_map(Step::Need),
    ]
}

proptest! {
    /// Whatever happens, attempts stay few; and when all is well again, home and second are attached and usable.
    #[test]
    fn directors_are_found_again(steps in prop::collection::vec(step(), 0..30)) {
        let uids: Vec<String> = (0..8).map(|n| format!("d{n}")).collect();
        let all: Vec<(&str, u64)> = uids.iter().zip([10, 20, 30, 40, 50, 60, 70, 80]).map(|(u, r)| (u.as_str(), r)).collect();
        let mut world = World::new(&all);
        let mut minutes = 1;
        for step in steps {
            match step {
                Step::Run(seconds) => {
                    minutes += seconds / 60 + 1;
                    world.run(Duration::from_secs(seconds));
                }
                Step::Up(n, true) => world.fakes.get_mut(&uids[n]).unwrap().is_up = true,
                Step::Up(n, false) => world.kill(&uids[n]),
                Step::Drain(n, on) => world.fakes.get_mut(&uids[n]).unwrap().is_draining = on,
                Step::Block(n, on) => world.fakes.get_mut(&uids[n]).unwrap().blocks_udp = on,
                Step::RoundTrip(n, ms) => world.fakes.get_mut(&uids[n]).unwrap().round_trip = ms,
                Step::Tell(bits) => {
                    let some: Vec<_> = (0..8).filter(|n| bits & 1 << n != 0).map(|n| told(&uids[n])).collect();
                    world.directors.update(&some, world.now);
                    world.settle();
                }
                Step::Move(gone) => {
                    world.directors.host_moved(gone, &mut world.rng, world.now);
                    world.settle();
                }
                Step::Need(n) => {
                    let address = Some(told(&uids[n]));
                    let home_director = Some(HomeDirector { address, handle: 5 });
                    let relays = world.directors.relays(&Peer { home_director, ..Peer::default() });
                    world.directors.need(std::iter::once(relays.as_slice()), world.now);
                    world.settle();
                }
            }
            prop_assert!(world.attached().len() <= MAX_DIRECTORS);
        }
        prop_assert!(world.attaches as u64 <= 40 + 40 * minutes, "{} in {minutes}", world.attaches);
        for fake in world.fakes.values_mut() {
            (fake.is_up, fake.is_draining, fake.blocks_udp) = (true, false, false);
        }
        world.tell();
        world.run(5 * MINUTE);
        let views = world.directors.views();
        prop_assert_eq!((views[0].role, views[0].way), (Role::Home, Some(Way::Udp)));
        prop_assert_eq!((views[1].role, views[1].way), (Role::Second, Some(Way::Udp)));
    }
}
