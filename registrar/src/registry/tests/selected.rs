//! The EndpointSlices of devices that Services select.

use std::collections::{BTreeMap, BTreeSet};

use muster_common::labels::{Labels, Selector};
use proptest::prelude::*;

use super::*;
use crate::registry::{Slice, selected::SELECTOR_ANNOTATION};

pub(super) fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

/// A Service that selects devices with all of these labels.
pub(super) fn selecting(name: &str, pairs: &[(&str, &str)]) -> proto::Service {
    let mut wanted = service(name);
    wanted.spec.as_mut().unwrap().selector = labels(pairs);
    wanted
}

impl World {
    pub(super) fn label(&mut self, name: &str, labels: Labels) {
        let mut wanted = device(name, "");
        wanted.metadata.as_mut().unwrap().labels = labels;
        let mask = mask(&["metadata.labels"]);
        self.commit(0, |index, _| plan::device::update(index, &wanted, Some(&mask))).unwrap();
    }

    /// A device that has registered.
    pub(super) fn add(&mut self, name: &str, key: u8, labels: Labels) -> Uuid {
        let uid = self.create_device(name, "").unwrap();
        self.register(0, uid, key).unwrap();
        self.label(name, labels);
        uid
    }

    fn selected<'a>(&'a self, service: &str) -> impl Iterator<Item = &'a Slice> + use<'a> {
        let slices = self.indexes[0].network("n").unwrap().services.slices_of("default", service);
        slices.map(|slice| &**slice).filter(|slice| slice.selected.is_some())
    }

    /// Names of the devices that a Service has, from its slices.
    fn names(&self, service: &str) -> Vec<String> {
        let endpoints = self.selected(service).flat_map(|slice| &slice.stored.endpoints);
        let mut names: Vec<String> = endpoints.map(|endpoint| endpoint.node_name.clone()).collect();
        names.sort_unstable();
        names
    }
}

fn port(slice: &Slice) -> Vec<u32> {
    slice.stored.ports.iter().map(|port| port.port).collect()
}

#[test]
fn devices_come_and_go_with_their_labels() {
    let mut world = World::with_services(1);
    let web = labels(&[("app", "web")]);
    let a = world.add("a", 1, web.clone());
    world.add("b", 2, labels(&[("app", "db")]));
    world.create_service(0, &selecting("s", &[("app", "web")])).unwrap();
    assert_eq!(world.names("s"), ["a"]);
    let slice = world.selected("s").next().unwrap().clone();
    let endpoint = &slice.stored.endpoints[0];
    let address = world.device(0, a).unwrap().ipv4.unwrap().to_string();
    assert_eq!((&*endpoint.addresses, port(&slice)), (&[address][..], vec![80]));
    assert_eq!(endpoint.target_ref.as_ref().unwrap().uid, a.to_string());
    assert_eq!(endpoint.conditions.as_ref().unwrap().ready, Some(true));
    let meta = slice.stored.metadata.as_ref().unwrap();
    assert_eq!(meta.labels["kubernetes.io/service-name"], "s");

    // In, out by label, by revocation and by deletion; each is one change, and DNS answers from it at once.
    let before = world.indexes[0].revision();
    world.label("b", labels(&[("app", "web"), (ZONE, "z1")]));
    assert_eq!((world.names("s"), world.indexes[0].revision()), (vec!["a".into(), "b".into()], before + 1));
    let view = world.indexes[0].network("n").unwrap().service("default", "s").unwrap().clone();
    assert_eq!(view.endpoints.len(), 2);
    let zone = |world: &World| world.selected("s").next().unwrap().stored.endpoints[1].zone.clone();
    assert_eq!(zone(&world), "z1");
    world.label("a", labels(&[("app", "web2")]));
    assert_eq!(world.names("s"), ["b"]);
    world.revoke(0, "b", true).unwrap();
    assert_eq!(world.selected("s").count(), 0);
    world.revoke(0, "b", false).unwrap();
    assert_eq!(world.names("s"), ["b"]);
    world.delete_device(0, "b").unwrap();
    assert_eq!(world.names("s"), [""; 0]);
    world.label("a", web);
    assert_eq!(world.names("s"), ["a"]);
    // With another selector, and without one.
    world.update_service(0, &selecting("s", &[("app", "db")]), &["spec.selector"]).unwrap();
    assert_eq!(world.names("s"), [""; 0]);
    world.update_service(0, &selecting("s", &[("app", "web")]), &["spec.selector"]).unwrap();
    assert_eq!(world.names("s"), ["a"]);
    world.update_service(0, &selecting("s", &[]), &["spec.selector"]).unwrap();
    assert_eq!(world.selected("s").count(), 0);
    world.update_service(0, &selecting("s", &[("app", "web")]), &["spec.selector"]).unwrap();
    world.delete_service(0, "s").unwrap();
    assert!(world.indexes[0].network("n").unwrap().services.slices.is_empty());
}

const ZONE: &str = "topology.kubernetes.io/zone";

#[test]
fn only_devices_that_have_registered_are_endpoints() {
    let mut world = World::with_services(1);
    let mut wanted = device("a", "10.0.0.9");
    wanted.metadata.as_mut().unwrap().labels = labels(&[("app", "web")]);
    let (uid, now) = (world.uid(), world.now);
    world.commit(0, |index, _| plan::device::create(index, &wanted, uid, now)).unwrap();
    world.create_service(0, &selecting("s", &[("app", "web")])).unwrap();
    assert_eq!(world.names("s"), [""; 0]);
    world.register(0, uid, 1).unwrap();
    assert_eq!(world.names("s"), ["a"]);
}

#[test]
fn hosts_without_an_agent_are_endpoints_while_somebody_speaks_for_them() {
    let mut world = World::with_services(1);
    let gate = world.add("gate", 1, Labels::new());
    world.approve("gate", true, &[]).unwrap();
    world.offer(0, gate, &["tv"], &[]);
    world.label("tv", labels(&[("app", "tv")]));
    world.create_service(0, &selecting("s", &[("app", "tv")])).unwrap();
    assert_eq!(world.names("s"), ["tv"]);
    world.approve("gate", false, &[]).unwrap();
    assert_eq!(world.names("s"), [""; 0]);
    world.approve("gate", true, &[]).unwrap();
    assert_eq!(world.names("s"), ["tv"]);
    world.revoke(0, "gate", true).unwrap();
    assert_eq!(world.names("s"), [""; 0]);
}

#[test]
fn selectors_of_sets_are_in_an_annotation() {
    let mut world = World::with_services(1);
    for (key, (name, pairs)) in [
        ("a", &[("tier", "x")][..]),
        ("b", &[("tier", "y"), ("old", "")]),
        ("c", &[("tier", "z")]),
        ("d", &[]),
    ]
    .into_iter()
    .enumerate()
    {
        world.add(name, u8::try_from(key).unwrap() + 1, labels(pairs));
    }
    for (name, text, expected) in [
        ("s1", "tier in (x,y)", &["a", "b"][..]),
        ("s2", "tier in (x,y),!old", &["a"]),
        ("s3", "tier notin (x)", &["b", "c", "d"]),
        ("s4", "!tier", &["d"]),
        ("s5", "tier", &["a", "b", "c"]),
    ] {
        let mut wanted = selecting(name, &[]);
        let annotations = &mut wanted.metadata.as_mut().unwrap().annotations;
        annotations.insert(SELECTOR_ANNOTATION.into(), text.into());
        world.create_service(0, &wanted).unwrap();
        assert_eq!(world.names(name), expected, "{text}");
    }
    world.label("c", labels(&[("tier", "y")]));
    assert_eq!([world.names("s1").len(), world.names("s2").len(), world.names("s5").len()], [3, 2, 3]);
    let mut wanted = selecting("bad", &[]);
    wanted.metadata.as_mut().unwrap().annotations.insert(SELECTOR_ANNOTATION.into(), "a within b".into());
    let error = world.create_service(0, &wanted).unwrap_err();
    assert_eq!(super::admin::path_of(&error), "metadata.annotations[muster/selector]");
}

#[test]
fn a_named_port_is_what_each_device_says() {
    let mut world = World::with_services(1);
    world.add("a", 1, labels(&[("app", "web"), ("port.muster/http", "8080")]));
    world.add("b", 2, labels(&[("app", "web"), ("port.muster/http", "8081")]));
    world.add("c", 3, labels(&[("app", "web"), ("port.muster/http", "x")]));
    let mut wanted = selecting("s", &[("app", "web")]);
    wanted.spec.as_mut().unwrap().ports[0].target_port = "http".into();
    world.create_service(0, &wanted).unwrap();
    let ports = |world: &World| {
        let of = |slice: &Slice| (slice.stored.endpoints[0].node_name.clone(), port(slice));
        world.selected("s").map(of).collect::<BTreeMap<_, _>>()
    };
    let expected = [("a", vec![8080]), ("b", vec![8081]), ("c", vec![])];
    assert_eq!(ports(&world), expected.map(|(name, ports)| (name.to_owned(), ports)).into());
    world.label("c", labels(&[("app", "web"), ("port.muster/http", "8080")]));
    assert_eq!((ports(&world).len(), world.names("s").len()), (2, 3));
}

#[test]
fn many_endpoints_are_in_several_slices_and_one_change_touches_few() {
    let mut world = World::with_services(1);
    for n in 0..230_u8 {
        world.add(&format!("d{n}"), n + 1, labels(&[("app", "web")]));
    }
    world.create_service(0, &selecting("s", &[("app", "web")])).unwrap();
    let sizes = |world: &World| {
        let sizes: Vec<usize> = world.selected("s").map(|slice| slice.stored.endpoints.len()).collect();
        assert!(sizes.iter().all(|size| (1..=100).contains(size)), "{sizes:?}");
        (sizes.iter().sum::<usize>(), sizes.len())
    };
    let (all, slices) = sizes(&world);
    assert_eq!(all, 230);
    assert!(slices >= 3);
    let revisions = |world: &World| -> Vec<u64> { world.selected("s").map(|slice| slice.revision).collect() };
    let before = revisions(&world);
    world.label("d7", Labels::new());
    let untouched = revisions(&world).iter().filter(|revision| before.contains(revision)).count();
    assert_eq!((sizes(&world).0, untouched), (229, slices - 1));
}

#[test]
fn nobody_changes_what_is_selected() {
    let mut world = World::with_services(1);
    world.add("a", 1, labels(&[("app", "web")]));
    world.create_service(0, &selecting("s", &[("app", "web")])).unwrap();
    let name = world.selected("s").next().unwrap().name.to_string();
    let mut wanted = slice(&name, "s", &["192.0.2.1"]);
    let refused = [
        world.commit(0, |index, _| plan::slice::update(index, &wanted, None)).unwrap_err(),
        world.commit(0, |index, _| plan::slice::delete(index, "n", "", &name, 0)).unwrap_err(),
    ];
    for error in refused {
        assert!(matches!(&error, AdminError::Selected { .. }), "{error}");
        assert!(error.to_string().contains("muster label"), "{error}");
    }
    wanted.metadata.as_mut().unwrap().name = "x.selected".into();
    assert_eq!(super::admin::path_of(&world.create_slice(&wanted).unwrap_err()), "metadata.name");
    // Slices that are made by hand stand beside them.
    world.create_slice(&slice("by-hand", "s", &["192.0.2.1"])).unwrap();
    let view = world.indexes[0].network("n").unwrap().service("default", "s").unwrap().clone();
    assert_eq!(view.endpoints.len(), 2);
}

const NAMES: [&str; 5] = ["d0", "d1", "d2", "d3", "d4"];
const SERVICES: [&str; 3] = ["s0", "s1", "s2"];
const SELECTORS: [&str; 6] = ["a=x", "a=x,b=y", "a in (x,y)", "b notin (x)", "!a", "a"];

#[derive(Clone, Debug)]
enum Step {
    Add(usize),
    Delete(usize),
    Revoke(usize, bool),
    Label(usize, usize, usize),
    Select(usize, usize),
    DeleteService(usize),
    Reload,
}

fn step() -> impl Strategy<Value = Step> {
    let (device, service) = (0..NAMES.len(), 0..SERVICES.len());
    prop_oneof![
        3 => device.clone().prop_map(Step::Add),
        1 => device.clone().prop_map(Step::Delete),
        1 => (device.clone(), any::<bool>()).prop_map(|(d, revoked)| Step::Revoke(d, revoked)),
        5 => (device, 0..3_usize, 0..3_usize).prop_map(|(d, a, b)| Step::Label(d, a, b)),
        4 => (service.clone(), 0..SELECTORS.len()).prop_map(|(s, n)| Step::Select(s, n)),
        1 => service.prop_map(Step::DeleteService),
        1 => Just(Step::Reload),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever happens, each Service has what its selector selects: as a model says, and as an index that has just been
    /// loaded says.
    #[test]
    fn services_have_what_they_select(steps in proptest::collection::vec(step(), 1..40)) {
        let mut world = World::with_services(1);
        let mut devices: BTreeMap<usize, (bool, Labels)> = BTreeMap::new();
        let mut services: BTreeMap<usize, Selector> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Add(d) if !devices.contains_key(&d) => {
                    world.add(NAMES[d], u8::try_from(d).unwrap() + 1, Labels::new());
                    devices.insert(d, (false, Labels::new()));
                }
                Step::Delete(d) if devices.remove(&d).is_some() => world.delete_device(0, NAMES[d]).unwrap(),
                Step::Revoke(d, revoked) => {
                    if let Some(device) = devices.get_mut(&d) {
                        device.0 = revoked;
                        world.revoke(0, NAMES[d], revoked).unwrap();
                    }
                }
                Step::Label(d, a, b) => {
                    let Some(device) = devices.get_mut(&d) else { continue };
                    let value = |key: &'static str, n: usize| Some((key, *["x", "y"].get(n)?));
                    let pairs: Vec<_> = [value("a", a), value("b", b)].into_iter().flatten().collect();
                    device.1 = labels(&pairs);
                    world.label(NAMES[d], labels(&pairs));
                }
                Step::Select(s, n) => {
                    let mut wanted = selecting(SERVICES[s], &[]);
                    let annotations = &mut wanted.metadata.as_mut().unwrap().annotations;
                    annotations.insert(SELECTOR_ANNOTATION.into(), SELECTORS[n].into());
                    match services.insert(s, SELECTORS[n].parse().unwrap()) {
                        Some(_) => world.update_service(0, &wanted, &["metadata.annotations"]).unwrap(),
                        None => world.create_service(0, &wanted).unwrap(),
                    };
                }
                Step::DeleteService(s) if services.remove(&s).is_some() => {
                    world.delete_service(0, SERVICES[s]).unwrap();
                }
                Step::Reload => world.restart(0),
                _ => {}
            }
            for (s, selector) in &services {
                let expected: BTreeSet<&str> = devices
                    .iter()
                    .filter(|(_, (revoked, labels))| !revoked && selector.matches(labels))
                    .map(|(d, _)| NAMES[*d])
                    .collect();
                let found = world.names(SERVICES[*s]);
                prop_assert_eq!(found, expected.into_iter().collect::<Vec<_>>());
            }
            // What has come about by changes is what is loaded.
            let loaded = world.load();
            prop_assert!(world.indexes[0].changes_to(&loaded).is_empty());
            prop_assert!(world.indexes[0].services_changed_to(&loaded).is_empty());
            let slices = |index: &Index| -> Vec<Slice> {
                index.network("n").unwrap().services.slices.iter().map(|slice| (**slice).clone()).collect()
            };
            let (found, expected) = (slices(&world.indexes[0]), slices(&loaded));
            prop_assert!(found.len() == expected.len());
            prop_assert!(found.iter().zip(&expected).all(|(found, expected)| found.is_like(expected)));
        }
    }
}
