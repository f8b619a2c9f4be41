//! What agents are told of the Services that have virtual IPs.

use std::collections::BTreeMap;

use muster_common::{digest, labels::Labels};
use muster_proto::registration::{VirtualEndpoints, VirtualService, VirtualServicesChanged};
use proptest::prelude::*;

use super::{
    selected::{labels, selecting},
    *,
};
use crate::registry::virtual_services::Cursor;

/// What an agent makes of what it is told.
#[derive(Clone, Debug, Default, PartialEq)]
struct Agent {
    services: BTreeMap<String, VirtualService>,
    endpoints: BTreeMap<String, VirtualEndpoints>,
    revision: u64,
    digest: u64,
}

impl Agent {
    fn take(&mut self, message: VirtualServicesChanged) {
        if message.is_snapshot {
            self.services.clear();
            self.endpoints.clear();
        }
        let key = |namespace: &str, name: &str| format!("{namespace}/{name}");
        for name in message.removed_services {
            self.services.remove(&name);
        }
        for name in message.removed_endpoints {
            self.endpoints.remove(&name);
        }
        for service in message.services {
            self.services.insert(key(&service.namespace, &service.name), service);
        }
        for endpoints in message.endpoints {
            self.endpoints.insert(key(&endpoints.namespace, &endpoints.name), endpoints);
        }
        if message.revision != 0 {
            (self.revision, self.digest) = (message.revision, message.digest);
        }
    }

    /// Takes all that is there to be told; returns how many objects that was.
    fn follow(&mut self, index: &Index, cursor: &mut Cursor) -> usize {
        let state = index.network("n").unwrap();
        let mut told = 0;
        loop {
            let (message, is_more) = state.virtual_services_after(cursor, index.revision());
            told += message.services.len() + message.endpoints.len();
            told += message.removed_services.len() + message.removed_endpoints.len();
            assert_eq!(is_more, message.revision == 0);
            self.take(message);
            if !is_more {
                return told;
            }
        }
    }

    /// Comes back, having been away.
    fn come_back(&mut self, index: &Index) -> (Cursor, usize) {
        let mut cursor = index.network("n").unwrap().virtual_services_from(self.revision, self.digest);
        let told = self.follow(index, &mut cursor);
        (cursor, told)
    }

    fn sum(&self) -> u64 {
        let services = self.services.values().map(|service| service.encode_to_vec());
        let all = services.chain(self.endpoints.values().map(|endpoints| endpoints.encode_to_vec()));
        digest::of_all(all)
    }
}

#[test]
fn only_services_with_virtual_ips_are_told_of() {
    let mut world = World::with_services(1);
    world.add("a", 1, labels(&[("app", "web")]));
    let mut plain = selecting("plain", &[("app", "web")]);
    let spec = plain.spec.as_mut().unwrap();
    spec.external_ips = vec!["192.0.2.7".into()];
    spec.session_affinity = "ClientIP".into();
    spec.internal_traffic_policy = "Local".into();
    spec.traffic_distribution = "PreferClose".into();
    let mut headless = selecting("headless", &[("app", "web")]);
    headless.spec.as_mut().unwrap().cluster_ip = "None".into();
    let mut other = service("other");
    let spec = other.spec.as_mut().unwrap();
    (spec.r#type, spec.external_name) = ("ExternalName".into(), "a.example".into());
    for service in [&plain, &headless, &other] {
        world.create_service(0, service).unwrap();
    }
    let mut agent = Agent::default();
    agent.come_back(&world.indexes[0]);
    assert_eq!((agent.services.len(), agent.endpoints.len()), (1, 1));
    let told = &agent.services["default/plain"];
    assert_eq!((told.addresses.len(), told.affinity_seconds, told.is_local), (2, 10_800, true));
    assert_eq!((told.prefers_zone, told.prefers_host), (true, false));
    assert!(told.addresses.contains(&"192.0.2.7".to_owned()));
    assert_eq!((&*told.ports[0].name, &*told.ports[0].protocol, told.ports[0].port), ("http", "TCP", 80));
    let endpoints = agent.endpoints.values().next().unwrap();
    assert_eq!((&*endpoints.service, endpoints.endpoints.len(), endpoints.ports[0].port), ("plain", 1, 80));
    assert!(endpoints.endpoints[0].is_ready);
}

#[test]
fn who_comes_back_is_told_what_is_new_and_no_more() {
    let mut world = World::with_services(1);
    for n in 0..20 {
        world.create_service(0, &selecting(&format!("s{n}"), &[("app", "web")])).unwrap();
    }
    let mut agent = Agent::default();
    let (mut cursor, told) = agent.come_back(&world.indexes[0]);
    assert_eq!(told, 20);
    // Nothing new costs nothing: here, at a registrar that has just started, and whatever else has changed.
    world.add("other", 9, Labels::new());
    assert_eq!(agent.follow(&world.indexes[0], &mut cursor), 0);
    world.restart(0);
    assert_eq!(agent.come_back(&world.indexes[0]).1, 0);
    // Often changed is told once.
    let revision = agent.revision;
    for n in 1..5_u32 {
        let mut wanted = service("s3");
        wanted.spec.as_mut().unwrap().ports[0].port = n;
        world.update_service(0, &wanted, &["spec.ports"]).unwrap();
    }
    world.delete_service(0, "s4").unwrap();
    assert_eq!(agent.come_back(&world.indexes[0]).1, 2);
    assert_eq!((agent.services.len(), agent.services["default/s3"].ports[0].port), (19, 4));
    assert!(agent.revision > revision);
    // A registrar that does not know what was before begins anew.
    world.delete_service(0, "s5").unwrap();
    world.restart(0);
    assert_eq!(agent.come_back(&world.indexes[0]).1, 18);
    assert_eq!(agent.services.len(), 18);
}

#[test]
fn so_much_has_been_removed_that_one_begins_anew() {
    let mut world = World::with_services(1);
    let mut agent = Agent::default();
    let mut external = service("s");
    external.spec.as_mut().unwrap().cluster_ip = "None".into();
    external.spec.as_mut().unwrap().external_ips = vec!["192.0.2.7".into()];
    world.create_service(0, &external).unwrap();
    agent.come_back(&world.indexes[0]);
    for n in 0..4200 {
        let name = format!("x{n}");
        external.metadata.as_mut().unwrap().name = name.clone();
        world.create_service(0, &external).unwrap();
        world.delete_service(0, &name).unwrap();
    }
    let mut other = agent.clone();
    let mut cursor = world.indexes[0].network("n").unwrap().virtual_services_from(other.revision, 1);
    let state = world.indexes[0].network("n").unwrap();
    assert!(state.virtual_services_after(&mut cursor, 1 << 40).0.is_snapshot);
    // But where all is as it was, nothing is told.
    assert_eq!(other.come_back(&world.indexes[0]).1, 0);
}

#[test]
fn much_is_told_in_parts() {
    let mut world = World::with_services(1);
    let mut wanted = service("s");
    let spec = wanted.spec.as_mut().unwrap();
    spec.ports = (1..=128)
        .map(|n| proto::ServicePort { name: format!("port-{n}"), port: n, ..Default::default() })
        .collect();
    spec.cluster_ip = "None".into();
    spec.external_ips = (1..60).map(|n| format!("192.0.2.{n}")).collect();
    for n in 0..80 {
        wanted.metadata.as_mut().unwrap().name = format!("s{n}");
        world.create_service(0, &wanted).unwrap();
    }
    let state = world.indexes[0].network("n").unwrap();
    let mut cursor = state.virtual_services_from(0, 0);
    let mut agent = Agent::default();
    let (first, is_more) = state.virtual_services_after(&mut cursor, 99);
    assert!(is_more && first.is_snapshot && first.revision == 0);
    agent.take(first);
    // What changes meanwhile comes at the end.
    wanted.metadata.as_mut().unwrap().name = "s0".into();
    wanted.spec.as_mut().unwrap().ports.truncate(1);
    world.update_service(0, &wanted, &["spec.ports"]).unwrap();
    world.delete_service(0, "s1").unwrap();
    agent.follow(&world.indexes[0], &mut cursor);
    assert_eq!((agent.services.len(), agent.services["default/s0"].ports.len()), (79, 1));
    assert_eq!(agent.sum(), agent.digest);
}

#[derive(Clone, Debug)]
enum Step {
    Create(usize, bool),
    Headless(usize, bool),
    Delete(usize),
    Slice(usize, u8),
    Label(u8, bool),
    Follow(usize),
    ComeBack(usize),
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let (service, agent) = (0..4_usize, 0..3_usize);
    prop_oneof![
        4 => (service.clone(), any::<bool>()).prop_map(|(s, headless)| Step::Create(s, headless)),
        2 => (service.clone(), any::<bool>()).prop_map(|(s, headless)| Step::Headless(s, headless)),
        1 => service.clone().prop_map(Step::Delete),
        2 => (service, any::<u8>()).prop_map(|(s, n)| Step::Slice(s, n)),
        4 => (0..4_u8, any::<bool>()).prop_map(|(d, on)| Step::Label(d, on)),
        4 => agent.clone().prop_map(Step::Follow),
        2 => agent.prop_map(Step::ComeBack),
        1 => Just(Step::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Agents that follow, come back after a while, or go to another registrar, hold what there is.
    #[test]
    fn agents_hold_what_there_is(steps in proptest::collection::vec(step(), 1..60)) {
        let mut world = World::with_services(1);
        for d in 0..4_u8 {
            world.add(&format!("d{d}"), d + 1, Labels::new());
        }
        let mut agents = vec![(Agent::default(), None::<Cursor>); 3];
        for step in steps {
            // What does not go through is refused, and changes nothing.
            match step {
                Step::Create(s, headless) => {
                    let mut wanted = selecting(&format!("s{s}"), &[("app", "web")]);
                    if headless {
                        wanted.spec.as_mut().unwrap().cluster_ip = "None".into();
                    }
                    drop(world.create_service(0, &wanted));
                }
                Step::Headless(s, with) => {
                    let mut wanted = service(&format!("s{s}"));
                    let ips = if with { vec!["192.0.2.9".to_owned()] } else { Vec::new() };
                    wanted.spec.as_mut().unwrap().external_ips = ips;
                    drop(world.update_service(0, &wanted, &["spec.external_ips"]));
                }
                Step::Delete(s) => drop(world.delete_service(0, &format!("s{s}"))),
                Step::Slice(s, n) => {
                    let wanted = slice(&format!("x{}", n % 3), &format!("s{s}"), &["192.0.2.1"]);
                    if world.create_slice(&wanted).is_err() {
                        let name = format!("x{}", n % 3);
                        drop(world.commit(0, |index, _| plan::slice::delete(index, "n", "", &name, 0)));
                    }
                }
                Step::Label(d, on) => {
                    let app = if on { labels(&[("app", "web")]) } else { Labels::new() };
                    world.label(&format!("d{d}"), app);
                }
                Step::Follow(a) => {
                    let (agent, cursor) = &mut agents[a];
                    match cursor {
                        Some(cursor) => drop(agent.follow(&world.indexes[0], cursor)),
                        None => *cursor = Some(agent.come_back(&world.indexes[0]).0),
                    }
                }
                Step::ComeBack(a) => {
                    let (agent, cursor) = &mut agents[a];
                    *cursor = Some(agent.come_back(&world.indexes[0]).0);
                }
                // As when the registry is loaded anew: those who follow go on.
                Step::Restart => {
                    let mut loaded = world.load();
                    loaded.continue_from(&world.indexes[0]);
                    world.indexes[0] = loaded;
                }
            }
        }
        let mut fresh = Agent::default();
        fresh.come_back(&world.load());
        prop_assert_eq!(fresh.sum(), fresh.digest);
        for (agent, cursor) in &mut agents {
            match cursor {
                Some(cursor) => drop(agent.follow(&world.indexes[0], cursor)),
                None => drop(agent.come_back(&world.indexes[0])),
            }
            prop_assert_eq!(&*agent, &fresh);
        }
    }
}
