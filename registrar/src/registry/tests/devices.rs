//! Joining, registering, leaving: what each plan does and refuses.

use super::*;
use crate::{allocation::AllocationError, registry::token::Joiner, store::Condition, token::TokenError};

fn namespaced(namespace: &str) -> proto::TokenSpec {
    proto::TokenSpec {
        reusable: true,
        device_namespace: namespace.into(),
        device_labels: [("role".to_owned(), "web".to_owned())].into(),
        ..Default::default()
    }
}

#[test]
fn a_token_fixes_namespace_and_labels() {
    let mut world = World::with_network(1, "10.0.0.0/24");
    let token = world.create_token("t", namespaced("prod"));
    let uid = world.join(&token, "Web");
    let device = world.device(0, uid).unwrap();
    assert_eq!((&*device.name, &*device.namespace), ("web", "prod"));
    assert_eq!(device.labels().get("role").map(String::as_str), Some("web"));
    assert!(!device.is_reachable() && device.certificate_expiry.is_some());
}

#[test]
fn enroll_repeated_with_token_and_key_is_answered_as_before() {
    let mut world = World::with_network(1, "10.0.0.0/24");
    let (reusable, once) = (world.reusable_token(), world.create_token("once", Default::default()));
    for (token, name) in [(&reusable, "a"), (&once, "b")] {
        let first = world.enroll(0, token, name, &key_hash(name)).unwrap();
        let revision = world.indexes[0].revision();
        let again = world.enroll(0, token, name, &key_hash(name)).unwrap();
        assert_eq!((again.uid, again.counts_for), (first.uid, None));
        assert_eq!(world.indexes[0].revision(), revision, "nothing is written");
    }
    let other_key = key_hash("other");
    assert!(matches!(world.enroll(0, &reusable, "a", &other_key), Err(EnrollError::NameTaken { .. })));
    for (name, key) in [("b", &other_key), ("c", &other_key), ("c", &key_hash("b"))] {
        let error = world.enroll(0, &once, name, key).unwrap_err();
        assert_eq!(error, EnrollError::Token(TokenError::Used));
    }
    // Another token with the same key is not a repetition.
    let third = world.create_token("third", namespaced(""));
    assert!(matches!(world.enroll(0, &third, "a", &key_hash("a")), Err(EnrollError::NameTaken { .. })));
    // Once revoked, the key is of no use any more.
    world.revoke(0, "a", true).unwrap();
    assert_eq!(
        world.enroll(0, &reusable, "a", &key_hash("a")).unwrap_err(),
        EnrollError::Revoked { joiner: Joiner::Device, name: "a".into() }
    );
}

#[test]
fn bad_names_and_tokens_are_refused() {
    let mut world = World::with_network(1, "10.0.0.0/24");
    let token = world.reusable_token();
    for name in ["", "-a", "svc", "Director", "a.b", "a_b", &"a".repeat(64), "ä"] {
        assert!(matches!(world.enroll(0, &token, name, &key_hash("k")), Err(EnrollError::Name(_))), "{name}");
    }
    let stranger = JoinToken::with_id("reusable".parse().unwrap(), &mut rand::rng());
    assert_eq!(
        world.enroll(0, &stranger, "a", &key_hash("k")).unwrap_err(),
        EnrollError::Token(TokenError::Unknown)
    );
    assert_eq!(plan::enroll::check_token(&world.indexes[0], &stranger, world.now), Err(TokenError::Unknown));
    assert_eq!(plan::enroll::check_token(&world.indexes[0], &token, world.now), Ok(Joiner::Device));
    world.now = world.now + Duration::from_secs(24 * 3600);
    assert!(matches!(
        world.enroll(0, &token, "a", &key_hash("k")),
        Err(EnrollError::Token(TokenError::Expired { .. }))
    ));
    assert!(matches!(
        plan::enroll::check_token(&world.indexes[0], &token, world.now),
        Err(TokenError::Expired { .. })
    ));
}

#[test]
fn a_prepared_device_is_adopted_by_a_token_of_its_namespace() {
    let mut world = World::with_network(1, "10.0.0.0/24");
    let uid = world.create_device("db", "10.0.0.7").unwrap();
    let wrong = world.create_token("wrong", namespaced("prod"));
    assert!(matches!(world.enroll(0, &wrong, "db", &key_hash("k")), Err(EnrollError::Namespace { .. })));
    let right = world.create_token("right", namespaced("default"));
    assert_eq!(world.join(&right, "db"), uid);
    world.register(0, uid, 1).unwrap();
    let device = world.device(0, uid).unwrap();
    assert_eq!(device.ipv4, Some([10, 0, 0, 7].into()));
    assert_eq!(device.labels().len(), 1);
    // It has joined now: nobody else can be it.
    assert!(matches!(world.enroll(0, &right, "db", &key_hash("k")), Err(EnrollError::NameTaken { .. })));
    assert_eq!(world.join(&right, "db"), uid, "the same key can");
}

#[test]
fn register_is_idempotent_and_keeps_addresses() {
    let mut world = World::with_network(1, "10.0.0.0/24");
    let token = world.reusable_token();
    let uid = world.join(&token, "a");
    world.register(0, uid, 1).unwrap();
    let (addresses, revision) = (world.device(0, uid).unwrap().ipv4, world.indexes[0].revision());
    assert!(addresses.is_some());
    world.register(0, uid, 1).unwrap();
    assert_eq!(world.indexes[0].revision(), revision, "nothing has changed, nothing is written");
    world.register(0, uid, 2).unwrap();
    assert_eq!(world.indexes[0].revision(), revision + 1);
    world.restart(0);
    world.register(0, uid, 2).unwrap();
    let device = world.device(0, uid).unwrap();
    assert_eq!((device.ipv4, device.key), (addresses, Some([2; 32])));
    let devices = &world.indexes[0].network("n").unwrap().devices;
    assert!(devices.by_key(&[1; 32]).is_none() && devices.by_key(&[2; 32]).is_some());
    // The key that was given up is free.
    let other = world.join(&token, "b");
    assert_eq!(world.register(0, other, 2), Err(DeviceError::KeyTaken));
    assert_eq!(world.register(0, other, 1), Ok(()));
}

#[test]
fn a_full_pool_is_told_and_reserves_nothing() {
    let mut world = World::with_network(1, "10.0.0.0/30");
    let token = world.reusable_token();
    let uids: Vec<Uuid> = ["a", "b", "c"].iter().map(|name| world.join(&token, name)).collect();
    world.register(0, uids[0], 1).unwrap();
    world.register(0, uids[1], 2).unwrap();
    for _ in 0..3 {
        let error = world.register(0, uids[2], 3).unwrap_err();
        assert!(matches!(error, DeviceError::Allocation(AllocationError::Exhausted { .. })), "{error}");
    }
    // A released address comes back after its quarantine, not before.
    world.delete_device(0, "a").unwrap();
    assert!(world.register(0, uids[2], 3).is_err());
    world.now = world.now + Duration::from_secs(24 * 3600 - 1);
    assert!(world.register(0, uids[2], 3).is_err());
    world.now = world.now + Duration::from_secs(1);
    world.restart(0);
    world.register(0, uids[2], 3).unwrap();
}

#[test]
fn an_address_that_is_left_over_is_given_up_when_the_other_family_is_full() {
    let mut world = World::new(1);
    let mut wanted = network("n", "n.example", "10.0.0.0/24");
    wanted.spec.as_mut().unwrap().device_pool_v6 = "fd00::/126".into();
    world.create_network(&wanted).unwrap();
    let token = world.reusable_token();
    for n in 0..3_u8 {
        let uid = world.join(&token, &format!("d{n}"));
        world.register(0, uid, n + 1).unwrap();
    }
    let uid = world.join(&token, "last");
    for _ in 0..300 {
        assert!(world.register(0, uid, 9).is_err());
    }
    let now = world.now;
    let state = world.indexes[0].network_mut("n").unwrap();
    let counts = state.pool(crate::allocation::PoolKind::DeviceV4).unwrap().counts(now);
    assert_eq!((counts.used, counts.reserved), (3, 0));
}

#[test]
fn devices_that_are_gone_or_revoked_are_refused() {
    let mut world = World::with_network(1, "10.0.0.0/24");
    let token = world.reusable_token();
    let (a, b) = (world.join(&token, "a"), world.join(&token, "b"));
    world.register(0, a, 1).unwrap();
    let now = world.now;
    world.commit(0, |index, _| plan::register::deregister(index, "n", a, now)).unwrap();
    world.revoke(0, "b", true).unwrap();
    for (uid, error) in [(a, DeviceError::Gone), (b, DeviceError::Revoked)] {
        assert_eq!(world.register(0, uid, 5), Err(error.clone()));
        let index = &world.indexes[0];
        let of = |result: Result<Outcome<()>, DeviceError>| result.map(|_| ()).unwrap_err();
        assert_eq!(of(plan::register::endpoints(index, "n", uid, &[], None)), error);
        assert_eq!(of(plan::register::renew(index, "n", uid, now)), error);
        assert_eq!(of(plan::register::deregister(index, "n", uid, now)), error);
    }
    assert!(plan::register::find(&world.indexes[0], "other", b).is_err(), "no device is in two networks");
    world.revoke(0, "b", false).unwrap();
    assert_eq!(world.register(0, b, 5), Ok(()));
    // The name of a device that has left is free.
    assert_ne!(world.join(&token, "a"), a);
}

#[test]
fn two_registrars_never_give_one_thing_to_two() {
    let mut world = World::with_network(2, "10.0.0.0/30");
    let token = world.reusable_token();
    world.catch_up(1);
    // The same name.
    let first = world.enroll(0, &token, "a", &key_hash("1")).unwrap();
    assert!(matches!(world.enroll(1, &token, "a", &key_hash("2")), Err(EnrollError::NameTaken { .. })));
    let second = world.enroll(1, &token, "b", &key_hash("2")).unwrap();
    world.catch_up(0);
    // The same key: registrar 1 has not seen what registrar 0 wrote.
    world.register(0, first.uid, 7).unwrap();
    assert_eq!(world.register(1, second.uid, 7), Err(DeviceError::KeyTaken));
    // The same address: of two that there are, each gets one.
    world.register(1, second.uid, 8).unwrap();
    let addresses: Vec<_> = [first.uid, second.uid].map(|uid| world.device(1, uid).unwrap().ipv4).to_vec();
    assert!(addresses[0].is_some() && addresses[1].is_some() && addresses[0] != addresses[1]);
    // One-off tokens are used once.
    let once = world.create_token("once", Default::default());
    world.catch_up(1);
    world.enroll(0, &once, "c", &key_hash("3")).unwrap();
    assert_eq!(
        world.enroll(1, &once, "d", &key_hash("4")).unwrap_err(),
        EnrollError::Token(TokenError::Used)
    );
}

#[test]
fn a_device_deleted_elsewhere_does_not_come_back() {
    let mut world = World::with_network(2, "10.0.0.0/24");
    let token = world.reusable_token();
    let uid = world.join(&token, "a");
    world.catch_up(1);
    world.delete_device(0, "a").unwrap();
    assert_eq!(world.register(1, uid, 1), Err(DeviceError::Gone));
    let keys = world.store.range_sync(&KeyRange::prefix("device"), None, 100).unwrap().kvs;
    assert!(keys.is_empty(), "{keys:?}");
}

#[test]
fn plans_stay_within_the_limits_of_a_transaction() {
    let mut world = World::with_network(1, "10.0.0.0/24");
    let token = world.reusable_token();
    let uid = world.join(&token, "a");
    let (endpoints, now) = (["192.0.2.1:1".parse().unwrap()], world.now);
    let request = Registration {
        before: None,
        key: [1; 32],
        endpoints: &endpoints,
        outside: None,
        hosts: &[],
        subnets: &[],
        aes_256_gcm: true,
        agent_version: "1",
        attempt: 0,
        now,
    };
    let Ok(Outcome::Write(plan)) = plan::register::register(&mut world.indexes[0], "n", uid, &request) else {
        panic!("must write");
    };
    // What makes it safe against others: the device as it was seen, the key and the address not taken.
    let device = keys::device("n", uid);
    let seen = world.device(0, uid).unwrap().revision;
    assert!(plan.txn.conditions.contains(&Condition::ModRevision(device, seen)));
    assert!(plan.txn.conditions.contains(&Condition::Absent(keys::device_key("n", &[1; 32]))));
    assert_eq!((plan.txn.conditions.len(), plan.txn.ops.len()), (3, 3));
}

/// An agent that was started anew registers while the request of its life before is still under way.
#[test]
fn a_registration_that_was_overtaken_is_not_written() {
    let mut world = World::with_network(1, "10.0.0.0/24");
    let token = world.reusable_token();
    let uid = world.join(&token, "a");
    world.register(0, uid, 2).unwrap();
    let before = world.device(0, uid).unwrap().clone();
    let endpoints = [([192, 0, 2, 1], 1002).into()];
    let plan = |world: &mut World, agent_version| {
        let request = Registration {
            before: Some(&before),
            key: [2; 32],
            endpoints: &endpoints,
            outside: None,
            hosts: &[],
            subnets: &[],
            aes_256_gcm: before.aes_256_gcm,
            agent_version,
            attempt: 1,
            now: world.now,
        };
        plan::register::register(&mut world.indexes[0], "n", uid, &request)
    };
    // Nobody has registered meanwhile, whatever else has changed.
    world.revoke(0, "a", true).unwrap();
    world.revoke(0, "a", false).unwrap();
    assert!(matches!(plan(&mut world, "0"), Ok(Outcome::Write(_))));
    // The other one has another key.
    world.register(0, uid, 3).unwrap();
    assert!(matches!(plan(&mut world, "0"), Err(DeviceError::Superseded)));
    // What was written already, and is only not known to be, is no conflict.
    world.register(0, uid, 2).unwrap();
    assert!(matches!(plan(&mut world, "1"), Ok(Outcome::Done(()))));
}
