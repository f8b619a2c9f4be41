//! Namespaces: how they come, and go with everything in them.

use super::{admin::path_of, *};
use crate::{
    registry::Change,
    store::{KeyRange, Op, Txn},
};

fn in_namespace(mut service: proto::Service, namespace: &str) -> proto::Service {
    service.metadata.as_mut().unwrap().namespace = namespace.into();
    service
}

fn terminate(world: &mut World, name: &str) -> Result<(), AdminError> {
    world.commit(0, |index, _| plan::namespace::terminate(index, "n", name, 0))
}

fn names(world: &World) -> Vec<String> {
    let namespaces = &world.indexes[0].network("n").unwrap().services.namespaces;
    namespaces.keys().map(|name| name.to_string()).collect()
}

#[test]
fn a_network_begins_with_a_default_namespace_that_stays() {
    let mut world = World::with_services(1);
    assert_eq!(names(&world), ["default"]);
    assert_eq!(terminate(&mut world, "Default"), Err(AdminError::DefaultNamespace));
    assert!(matches!(world.create_namespace("default"), Err(AdminError::Exists { .. })));
    // A network of an older store has none, and has it all the same.
    world.store.apply_txn(&Txn::new().delete(keys::namespace("n", "default"))).unwrap();
    world.catch_up(0);
    assert!(names(&world).is_empty() && world.indexes[0].network("n").unwrap().has_namespace("default"));
    world.create_service(0, &service("a")).unwrap();
    world.create_namespace("default").unwrap();
    world.create_service(0, &service("b")).unwrap();
    world.restart(0);
    assert_eq!(world.indexes[0].network("n").unwrap().services().count(), 2);
}

#[test]
fn names_are_dns_labels() {
    let mut world = World::with_services(1);
    for name in ["", "a_b", "a.b", "-a"] {
        assert_eq!(path_of(&world.create_namespace(name).unwrap_err()), "metadata.name");
    }
    assert_eq!(world.create_namespace("Team-1").unwrap().metadata.unwrap().name, "team-1");
}

#[test]
fn nothing_is_added_to_a_namespace_that_is_not_there_or_going() {
    let mut world = World::with_services(2);
    let wanted = in_namespace(service("a"), "team");
    assert_eq!(world.create_service(0, &wanted), Err(AdminError::NoNamespace("team".into())));
    world.create_namespace("team").unwrap();
    world.create_service(0, &wanted).unwrap();
    world.catch_up(1);
    terminate(&mut world, "team").unwrap();
    // The other registrar has not seen that it goes, and is stopped all the same.
    let other = in_namespace(service("b"), "team");
    assert_eq!(world.create_service(1, &other), Err(AdminError::Terminating("team".into())));
    assert_eq!(world.create_namespace("team"), Err(AdminError::Terminating("team".into())));
    // Nor does a Service in it get an address.
    let (mut slice, now) = (slice("s", "a", &["10.0.0.1"]), world.now);
    slice.metadata.as_mut().unwrap().namespace = "team".into();
    assert_eq!(world.create_slice(&slice), Err(AdminError::Terminating("team".into())));
    while !world.commit(0, |index, _| plan::namespace::empty(index, "n", "team", now)).unwrap() {}
    assert_eq!(names(&world), ["default"]);
    world.create_namespace("team").unwrap();
}

#[test]
fn names_are_gone_at_once_and_contents_in_parts() {
    let mut world = World::with_services(1);
    world.create_namespace("team").unwrap();
    world.create_namespace("team-b").unwrap();
    world.create_service(0, &in_namespace(service("kept"), "team-b")).unwrap();
    let mut headless = in_namespace(service("x"), "team");
    headless.spec.as_mut().unwrap().cluster_ip = "None".into();
    for n in 0..100 {
        headless.metadata.as_mut().unwrap().name = format!("s{n}");
        world.create_service(0, &headless).unwrap();
        let mut slice = slice(&format!("s{n}"), &format!("s{n}"), &["10.0.0.1"]);
        slice.metadata.as_mut().unwrap().namespace = "team".into();
        world.create_slice(&slice).unwrap();
    }
    let address = world.create_service(0, &in_namespace(service("vip"), "team")).unwrap();
    let address = address.spec.unwrap().cluster_ip.parse().unwrap();
    let before = world.indexes[0].revision();
    terminate(&mut world, "team").unwrap();
    let changes = world.store.changes_sync(&KeyRange::all(), before + 1).unwrap();
    let mut replayed = world.load();
    let state = world.indexes[0].network("n").unwrap();
    assert!(!state.has_namespace("team") && state.service("team", "s1").is_none());
    assert_eq!((state.services().count(), state.services_at("10.0.0.1".parse().unwrap()).count()), (1, 0));
    assert_eq!(state.services.services.len(), 102);
    // Those that follow the names hear of each.
    let applied = replayed.apply(&changes.batches[0], world.now);
    assert!(matches!(&applied.changes[..], [Change::Namespace { .. }]));
    // Half-way, a registrar dies; another one finds what is left to do.
    let now = world.now;
    assert!(!world.commit(0, |index, _| plan::namespace::empty(index, "n", "team", now)).unwrap());
    world.restart(0);
    assert_eq!(plan::namespace::terminating(&world.indexes[0]), [("n".to_owned(), "team".to_owned())]);
    let mut steps = 0;
    while !world.commit(0, |index, _| plan::namespace::empty(index, "n", "team", now)).unwrap() {
        steps += 1;
    }
    assert!(steps >= 1, "201 objects do not fit into one transaction");
    let state = world.indexes[0].network("n").unwrap();
    assert_eq!((state.services.services.len(), state.services.slices.len()), (1, 0));
    assert!(
        state.released().any(|(owner, released, _)| (owner, released) == (keys::Owner::Service, address))
    );
    assert!(plan::namespace::terminating(&world.indexes[0]).is_empty());
    // Emptying what is not there, or not going, does nothing.
    assert!(world.commit(0, |index, _| plan::namespace::empty(index, "n", "team-b", now)).unwrap());
    assert_eq!(world.indexes[0].network("n").unwrap().services.services.len(), 1);
}

#[test]
fn every_service_of_a_namespace_is_told_of_when_it_goes() {
    let mut world = World::with_services(1);
    world.create_namespace("team").unwrap();
    for name in ["a", "b"] {
        world.create_service(0, &in_namespace(service(name), "team")).unwrap();
    }
    let mut old = world.load();
    terminate(&mut world, "team").unwrap();
    let changes = world.store.changes_sync(&KeyRange::all(), old.revision() + 1).unwrap();
    let told: Vec<_> = old.apply(&changes.batches[0], world.now).services;
    let keys: Vec<&str> = told.iter().map(|name| &*name.key).collect();
    assert_eq!(keys, ["team\0a", "team\0b"]);
}

#[test]
fn a_namespace_with_devices_is_not_deleted() {
    let mut world = World::with_services(1);
    world.create_namespace("team").unwrap();
    let mut wanted = device("d", "");
    wanted.metadata.as_mut().unwrap().namespace = "team".into();
    let (uid, now) = (world.uid(), world.now);
    world.commit(0, |index, _| plan::device::create(index, &wanted, uid, now)).unwrap();
    let in_use = Err(AdminError::NamespaceInUse { name: "team".into(), devices: 1 });
    assert_eq!(terminate(&mut world, "team"), in_use);
    world.restart(0);
    assert_eq!(terminate(&mut world, "team"), in_use);
    world.delete_device(0, "d").unwrap();
    terminate(&mut world, "team").unwrap();
}

#[test]
fn labels_of_a_namespace_change_and_its_phase_stays() {
    let mut world = World::with_services(1);
    world.create_namespace("team").unwrap();
    let mut wanted = proto::Namespace { metadata: Some(meta("n", "team")), status: None };
    wanted.metadata.as_mut().unwrap().labels.insert("a".into(), "b".into());
    wanted.status = Some(proto::NamespaceStatus { phase: "Terminating".into() });
    let updated = world.commit(0, |index, _| plan::namespace::update(index, &wanted, None)).unwrap();
    assert_eq!((updated.metadata.unwrap().labels.len(), &*updated.status.unwrap().phase), (1, "Active"));
    let bad = mask(&["status.phase"]);
    let error = world.commit(0, |index, _| plan::namespace::update(index, &wanted, Some(&bad))).unwrap_err();
    assert_eq!(path_of(&error), "update_mask");
}

#[test]
fn a_network_goes_with_its_services() {
    let mut world = World::with_services(1);
    world.create_namespace("team").unwrap();
    for n in 0..25 {
        world.create_service(0, &service(&format!("s{n}"))).unwrap();
        for part in 0..5 {
            world.create_slice(&slice(&format!("s{n}-{part}"), &format!("s{n}"), &["10.0.0.1"])).unwrap();
        }
    }
    world.delete_service(0, "s1").unwrap();
    let lock = world.uid();
    world.commit(0, |index, _| plan::network::lock(index, "n", 0, lock)).unwrap();
    assert_eq!(world.create_service(0, &service("late")), Err(AdminError::Locked("n".into())));
    let revision = world.indexes[0].lock_revision("n").unwrap();
    while !world.commit(0, |index, _| plan::network::delete(index, "n", revision)).unwrap() {}
    let left = world.store.range_sync(&KeyRange::all(), None, 100).unwrap().kvs;
    assert_eq!(left.iter().map(|kv| &*kv.key).collect::<Vec<_>>(), [b"meta/networks"]);
}

#[test]
fn service_pools_stay_while_services_have_addresses_from_them() {
    let mut world = World::with_services(1);
    world.create_service(0, &service("a")).unwrap();
    let mut wanted = service_network();
    wanted.spec.as_mut().unwrap().service_pool_v4 = "10.2.0.0/27".into();
    wanted.spec.as_mut().unwrap().service_pool_v6 = "fd00:2::/120".into();
    let update = |world: &mut World, path: &str| {
        let mask = mask(&[path]);
        world.commit(0, |index, _| plan::network::update(index, &wanted, Some(&mask), None))
    };
    let error = update(&mut world, "spec.service_pool_v4").unwrap_err();
    assert_eq!(path_of(&error), "spec.service_pool_v4");
    assert_eq!(update(&mut world, "spec.service_pool_v6"), Ok(plan::network::NeedsLock::Yes));
}

#[test]
fn external_domains_belong_to_one_network() {
    let mut world = World::with_services(1);
    let mut other = network("o", "o.example", "10.9.0.0/24");
    other.spec.as_mut().unwrap().external_domain = "n.example".into();
    assert_eq!(path_of(&world.create_network(&other).unwrap_err()), "spec.external_domain");
    other.spec.as_mut().unwrap().external_domain = "ext.o.example".into();
    world.create_network(&other).unwrap();
    let mut wanted = service_network();
    wanted.spec.as_mut().unwrap().external_domain = "ext.o.example".into();
    let mask = mask(&["spec.external_domain"]);
    let error =
        world.commit(0, |index, _| plan::network::update(index, &wanted, Some(&mask), None)).unwrap_err();
    assert_eq!(path_of(&error), "spec.external_domain");
    wanted.spec.as_mut().unwrap().external_domain = "ext.n.example".into();
    world.commit(0, |index, _| plan::network::update(index, &wanted, Some(&mask), None)).unwrap();
    let found = world.indexes[0].network_by_external_domain("ext.n.example").unwrap();
    assert_eq!(&*found.network.name, "n");
    wanted.spec.as_mut().unwrap().external_domain.clear();
    world.commit(0, |index, _| plan::network::update(index, &wanted, Some(&mask), None)).unwrap();
    assert!(world.indexes[0].network_by_external_domain("ext.n.example").is_none());
}

#[tokio::test]
async fn a_deletion_that_was_begun_is_finished_by_whoever_finds_it() {
    let mut world = World::with_services(1);
    world.create_namespace("team").unwrap();
    world.create_service(0, &in_namespace(service("a"), "team")).unwrap();
    terminate(&mut world, "team").unwrap();
    let store = world.store.clone();
    let registry = crate::registry::Registry::load(std::sync::Arc::new(store)).await.unwrap();
    crate::registry::tasks::finish_deletions(&registry).await;
    let index = registry.read();
    let state = index.network("n").unwrap();
    assert!(!state.services.namespaces.contains_key("team") && state.services.services.is_empty());
}

#[test]
fn transactions_hold_each_key_once() {
    let mut world = World::with_services(1);
    world.create_namespace("team").unwrap();
    for n in 0..12 {
        let mut dual = in_namespace(service(&format!("s{n}")), "team");
        dual.spec.as_mut().unwrap().ip_family_policy = "RequireDualStack".into();
        world.create_service(0, &dual).unwrap();
    }
    terminate(&mut world, "team").unwrap();
    let Ok(Outcome::Write(plan)) = plan::namespace::empty(&world.indexes[0], "n", "team", world.now) else {
        panic!("there is something to delete")
    };
    plan.txn.check().unwrap();
    assert_eq!(plan.txn.ops.iter().filter(|op| matches!(op, Op::Put { .. })).count(), 24);
}
