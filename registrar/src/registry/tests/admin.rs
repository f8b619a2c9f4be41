//! What operators may and may not do.

use super::*;
use crate::{
    registry::plan::network::NeedsLock,
    store::{Event, KeyValue, WatchBatch},
};

pub(super) fn path_of(error: &AdminError) -> &str {
    match error {
        AdminError::Field(field) => &field.path,
        AdminError::Address { path, .. } => path,
        other => panic!("not about a field: {other}"),
    }
}

#[test]
fn networks_are_apart() {
    let mut world = World::with_network(1, "10.0.0.0/24");
    let mut create =
        |name: &str, domain: &str, pool: &str| world.create_network(&network(name, domain, pool));
    assert!(matches!(create("n", "m.example", "10.1.0.0/24"), Err(AdminError::Exists { .. })));
    assert_eq!(path_of(&create("m", "N.example.", "10.1.0.0/24").unwrap_err()), "spec.domain");
    assert_eq!(path_of(&create("m", "m.example", "10.0.0.0/16").unwrap_err()), "spec.device_pool_v4");
    assert_eq!(path_of(&create("m", "example", "10.1.0.0/24").unwrap_err()), "spec.domain");
    assert_eq!(path_of(&create("", "m.example", "10.1.0.0/24").unwrap_err()), "metadata.name");
    assert_eq!(create("M", "m.example", "10.1.0.0/24").unwrap(), "m");
    // Without pools, it gets the defaults.
    assert_eq!(create("o", "o.example", "").unwrap(), "o");
    let pools = world.indexes[0].network("o").unwrap().network.pools;
    assert_eq!(pools.device_v4.unwrap().to_string(), "100.64.0.0/11");
    assert!(pools.device_v6.unwrap().to_string().starts_with("fd01:203:405:"));
}

#[test]
fn two_registrars_do_not_create_overlapping_networks() {
    let mut world = World::new(2);
    let (a, b) = (network("a", "a.example", "10.0.0.0/24"), network("b", "a.example", "10.1.0.0/24"));
    let c = network("c", "c.example", "10.0.0.0/25");
    world.create_network(&a).unwrap();
    let (uid, now) = (world.uid(), world.now);
    for (other, path) in [(b, "spec.domain"), (c, "spec.device_pool_v4")] {
        world.indexes[1] = Index::new();
        world.indexes[1].loaded(1);
        let error = world.commit(1, |index, _| plan::network::create(index, &other, uid, [0; 5], now));
        assert_eq!(path_of(&error.unwrap_err()), path);
    }
}

#[test]
fn what_never_changes_is_refused() {
    let mut world = World::with_network(1, "10.0.0.0/24");
    let mut update = |wanted: &proto::Network, paths: &[&str]| {
        let mask = mask(paths);
        world.commit(0, |index, _| plan::network::update(index, wanted, Some(&mask), None))
    };
    let mut wanted = network("n", "m.example", "10.0.0.0/24");
    assert_eq!(path_of(&update(&wanted, &[]).unwrap_err()), "spec.domain");
    assert_eq!(path_of(&update(&wanted, &["spec.domain"]).unwrap_err()), "spec.domain");
    assert_eq!(path_of(&update(&wanted, &["status.devices"]).unwrap_err()), "update_mask");
    wanted.spec.as_mut().unwrap().public_addresses = vec!["192.0.2.9".into()];
    assert_eq!(update(&wanted, &["spec.public_addresses"]).unwrap(), NeedsLock::No);
    wanted.metadata.as_mut().unwrap().resource_version = 1;
    assert!(matches!(update(&wanted, &["metadata.labels"]), Err(AdminError::Changed { .. })));
    let network = &world.indexes[0].network("n").unwrap().network;
    assert_eq!(network.public_addresses, ["192.0.2.9".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!(network.domain.as_str(), "n.example");
}

#[test]
fn pools_change_only_under_a_lock_and_without_devices() {
    let mut world = World::with_network(2, "10.0.0.0/24");
    let token = world.reusable_token();
    world.catch_up(1);
    let wanted = network("n", "", "10.9.0.0/24");
    let mask = mask(&["spec.device_pool_v4"]);
    let update = |world: &mut World, lock| {
        world.commit(0, |index, _| plan::network::update(index, &wanted, Some(&mask), lock))
    };
    assert_eq!(update(&mut world, None).unwrap(), NeedsLock::Yes);
    let lock = world.uid();
    world.commit(0, |index, _| plan::network::lock(index, "n", 0, lock)).unwrap();
    // The other registrar does not know of the lock, and is stopped all the same.
    assert_eq!(world.enroll(1, &token, "a", &key_hash("a")).unwrap_err(), EnrollError::Locked("n".into()));
    let revision = world.indexes[0].lock_revision("n");
    assert_eq!(update(&mut world, revision).unwrap(), NeedsLock::No);
    assert_eq!(world.indexes[0].lock_revision("n"), None);
    // Nor has it seen the new pools, until what it sees is not enough.
    let uid = world.enroll(1, &token, "a", &key_hash("a")).unwrap().uid;
    world.register(1, uid, 1).unwrap();
    assert_eq!(world.device(1, uid).unwrap().ipv4.unwrap().octets()[..2], [10, 9]);
    world.catch_up(0);
    let back = network("n", "", "10.0.0.0/24");
    let error = world.commit(0, |index, _| plan::network::update(index, &back, Some(&mask), None));
    assert!(matches!(error, Err(AdminError::NotEmpty { devices: 1, .. })));
}

#[test]
fn a_network_is_deleted_with_everything_or_not_at_all() {
    let mut world = World::with_network(1, "10.0.0.0/22");
    let token = world.reusable_token();
    let version = world.indexes[0].network("n").unwrap().network.revision;
    let lock_uid = world.uid();
    let lock = |world: &mut World, version| {
        world.commit(0, |index, _| plan::network::lock(index, "n", version, lock_uid))
    };
    for n in 0..150_u8 {
        let uid = world.join(&token, &format!("d{n}"));
        world.register(0, uid, n + 1).unwrap();
    }
    assert!(matches!(lock(&mut world, 0), Err(AdminError::NotEmpty { devices: 150, .. })));
    (0..150).for_each(|n| world.delete_device(0, &format!("d{n}")).unwrap());
    assert!(matches!(lock(&mut world, version + 1), Err(AdminError::Changed { .. })));
    lock(&mut world, version).unwrap();
    let revision = world.indexes[0].lock_revision("n").unwrap();
    let mut steps = 1;
    while !world.commit(0, |index, _| plan::network::delete(index, "n", revision)).unwrap() {
        steps += 1;
    }
    assert!(steps > 2, "150 addresses do not fit into one transaction");
    let left: Vec<_> = world.store.range_sync(&KeyRange::all(), None, 100).unwrap().kvs;
    assert_eq!(left.iter().map(|kv| &*kv.key).collect::<Vec<_>>(), [b"meta/networks"]);
    assert!(
        world.indexes[0].network("n").is_none() && world.indexes[0].network_by_domain("n.example").is_none()
    );
}

#[test]
fn devices_are_prepared_with_chosen_addresses() {
    let mut world = World::with_network(1, "10.0.0.0/24");
    let uid = world.create_device("a", "10.0.0.5").unwrap();
    assert_eq!(world.device(0, uid).unwrap().ipv4, Some([10, 0, 0, 5].into()));
    for (name, address) in [("b", "10.0.0.5"), ("b", "10.0.1.5"), ("b", "10.0.0.0"), ("b", "x")] {
        assert_eq!(
            path_of(&world.create_device(name, address).unwrap_err()),
            "spec.virtual_ipv4",
            "{address}"
        );
    }
    for name in ["", "svc", "a_b"] {
        assert_eq!(path_of(&world.create_device(name, "").unwrap_err()), "metadata.name");
    }
    assert!(matches!(world.create_device("A", ""), Err(AdminError::Exists { .. })));
    let mut v6 = device("b", "");
    v6.spec.as_mut().unwrap().virtual_ipv6 = "fd00::1".into();
    let (other, now) = (world.uid(), world.now);
    let error = world.commit(0, |index, _| plan::device::create(index, &v6, other, now)).unwrap_err();
    assert_eq!(path_of(&error), "spec.virtual_ipv6");
    // Deletion begins the quarantine.
    world.delete_device(0, "a").unwrap();
    assert_eq!(path_of(&world.create_device("a", "10.0.0.5").unwrap_err()), "spec.virtual_ipv4");
    world.now = world.now + Duration::from_secs(24 * 3600);
    world.create_device("a", "10.0.0.5").unwrap();
    assert!(matches!(world.delete_device(0, "z"), Err(AdminError::NotFound { .. })));
}

#[test]
fn updates_of_devices_keep_to_the_mask() {
    let mut world = World::with_network(1, "10.0.0.0/24");
    let uid = world.create_device("a", "").unwrap();
    let mut wanted = device("a", "");
    let fields = wanted.metadata.as_mut().unwrap();
    fields.labels = [("role".to_owned(), "web".to_owned())].into();
    fields.annotations = [("note".to_owned(), "x".to_owned())].into();
    let mut update = |wanted: &proto::Device, paths: &[&str]| {
        let mask = mask(paths);
        let result = world.commit(0, |index, _| plan::device::update(index, wanted, Some(&mask)));
        (result, world.device(0, uid).unwrap().clone())
    };
    let (_, device) = update(&wanted, &["metadata.labels"]);
    assert_eq!((device.labels().len(), device.meta.unwrap().annotations.len()), (1, 0));
    let (_, device) = update(&wanted, &[]);
    assert_eq!(device.meta.unwrap().annotations.len(), 1);
    let (result, _) = update(&wanted, &["spec.virtual_ipv4"]);
    assert_eq!(path_of(&result.unwrap_err()), "update_mask");
    wanted.spec.as_mut().unwrap().virtual_ipv4 = "10.0.0.9".into();
    let (result, _) = update(&wanted, &[]);
    assert_eq!(path_of(&result.unwrap_err()), "spec.virtual_ipv4");
    wanted.metadata.as_mut().unwrap().labels = [("a b".to_owned(), String::new())].into();
    let (result, _) = update(&wanted, &["metadata.labels"]);
    assert_eq!(path_of(&result.unwrap_err()), "metadata.labels");
    wanted.metadata.as_mut().unwrap().labels.clear();
    wanted.metadata.as_mut().unwrap().resource_version = 1;
    let (result, _) = update(&wanted, &["metadata.labels"]);
    assert!(matches!(result, Err(AdminError::Changed { .. })));
}

#[test]
fn tokens_are_checked_revoked_and_counted() {
    let mut world = World::with_network(1, "10.0.0.0/24");
    let secret = JoinToken::generate(&mut rand::rng());
    let create = |world: &mut World, spec: proto::TokenSpec| {
        let token = proto::Token { metadata: Some(meta("n", "")), spec: Some(spec), status: None };
        let (uid, now) = (world.uid(), world.now);
        world.commit(0, |index, _| plan::token::create(index, &token, &secret, uid, now))
    };
    let at = |seconds: i64| Some(pbjson_types::Timestamp { seconds: 1_800_000_000 + seconds, nanos: 0 });
    for (path, spec) in [
        ("spec.expires_at", proto::TokenSpec { expires_at: at(0), ..Default::default() }),
        ("spec.expires_at", proto::TokenSpec { expires_at: at(400_000_000), ..Default::default() }),
        ("spec.device_namespace", proto::TokenSpec { device_namespace: "-".into(), ..Default::default() }),
        (
            "spec.device_labels",
            proto::TokenSpec {
                device_labels: [("-".to_owned(), String::new())].into(),
                ..Default::default()
            },
        ),
    ] {
        assert_eq!(path_of(&create(&mut world, spec).unwrap_err()), path);
    }
    let name = create(&mut world, proto::TokenSpec { reusable: true, ..Default::default() }).unwrap();
    assert!(matches!(create(&mut world, Default::default()), Err(AdminError::Exists { .. })));
    let token = || world.indexes[0].network("n").unwrap().tokens[&name].clone();
    let shown = token().to_proto(world.now);
    assert_eq!(shown.status.unwrap().phase, "Active");
    assert_eq!(shown.spec.as_ref().unwrap().expires_at, at(24 * 3600));
    assert_eq!(token().to_proto(world.now + Duration::from_secs(24 * 3600)).status.unwrap().phase, "Expired");
    for _ in 0..2 {
        world.commit(0, |index, _| plan::token::count(index, "n", &name, 3)).unwrap();
    }
    let mut wanted = proto::Token { metadata: Some(meta("n", &name)), spec: shown.spec, status: None };
    wanted.spec.as_mut().unwrap().revoked = true;
    let (now, all) = (world.now, mask(&[]));
    world.commit(0, |index, _| plan::token::update(index, &wanted, Some(&all), now)).unwrap();
    let token = world.indexes[0].network("n").unwrap().tokens[&name].clone();
    assert_eq!((token.uses(), &*token.to_proto(now).status.unwrap().phase), (6, "Revoked"));
    assert!(world.enroll(0, &secret, "a", &key_hash("a")).is_err());
    wanted.spec.as_mut().unwrap().reusable = false;
    let error = world.commit(0, |index, _| plan::token::update(index, &wanted, None, now)).unwrap_err();
    assert_eq!(path_of(&error), "spec.reusable");
    world.commit(0, |index, _| plan::token::delete(index, "n", &name, 0)).unwrap();
    assert!(world.indexes[0].network("n").unwrap().tokens.is_empty());
}

#[test]
fn released_addresses_are_forgotten_after_their_quarantine() {
    let mut world = World::with_network(1, "10.0.0.0/24");
    let token = world.reusable_token();
    let uid = world.join(&token, "a");
    world.register(0, uid, 1).unwrap();
    world.delete_device(0, "a").unwrap();
    assert!(plan::sweep::addresses(&world.indexes[0], world.now).is_none());
    world.now = world.now + Duration::from_secs(24 * 3600);
    let txn = plan::sweep::addresses(&world.indexes[0], world.now).unwrap();
    world.store.apply_txn(&txn).unwrap();
    world.catch_up(0);
    assert!(plan::sweep::addresses(&world.indexes[0], world.now).is_none());
    assert!(world.store.range_sync(&keys::addresses("n"), None, 9).unwrap().kvs.is_empty());
}

#[test]
fn values_that_do_not_decode_are_skipped_and_told() {
    let mut world = World::with_network(1, "10.0.0.0/24");
    let token = world.reusable_token();
    let uid = world.join(&token, "a");
    let good = world.device(0, uid).unwrap().clone();
    let put = |key: &[u8], value: &[u8]| {
        let key = bytes::Bytes::copy_from_slice(key);
        let value = bytes::Bytes::copy_from_slice(value);
        Event::Put(KeyValue { key, value, create_revision: 90, mod_revision: 90 })
    };
    let events = vec![
        put(b"\xff", b""),
        put(b"devices/n/x", b""),
        put(b"devices/other/00000000-0000-0000-0000-000000000001", b""),
        put(&keys::device("n", uid), b"\xff\xff\xff"),
        put(&keys::device("n", uid), b""),
        put(&keys::network("n"), b"\x0a\xff"),
        put(&keys::token("n", "reusable"), b"\x07"),
        put(b"addresses/n/device/4ff", b""),
        put(&keys::device_name("n", "b"), b"never read"),
    ];
    let (now, count) = (world.now, events.len());
    let applied = world.indexes[0].apply(&WatchBatch { revision: 90, events }, now);
    assert_eq!(applied.bad.len(), count - 1);
    assert!(applied.changes.is_empty());
    assert_eq!(world.device(0, uid), Some(&good), "what was known stays");
}
