//! Directors: joining, registering, what devices are told of them, and what operators do with them.

use super::*;
use crate::{registry::view::Advertised, token::TokenError};

fn config_names(world: &World, uid: Uuid) -> Vec<(String, bool)> {
    let state = world.indexes[0].network("n").unwrap();
    let config = state.config(world.device(0, uid).unwrap(), &Advertised::default());
    config.directors.into_iter().map(|address| (address.name, address.draining)).collect()
}

fn peer(world: &World, uid: Uuid) -> muster_proto::registration::Peer {
    let state = world.indexes[0].network("n").unwrap();
    state.peer(world.device(0, uid).unwrap(), 1)
}

fn outside(home: Option<Uuid>, second: Option<Uuid>) -> Outside {
    Outside { reflexive: [([198, 51, 100, 7], 4711).into()].into(), home, second }
}

#[test]
fn a_token_lets_in_what_it_is_for() {
    let mut world = World::with_network(1, "10.0.0.0/24");
    let (devices, directors) = (world.reusable_token(), world.director_token());
    let device = world.enroll(0, &devices, "one", &key_hash("a")).unwrap();
    // Directors have names of their own.
    let director = world.enroll(0, &directors, "One", &key_hash("b")).unwrap();
    assert_eq!((device.joiner, director.joiner), (Joiner::Device, Joiner::Director));
    assert_eq!(director.counts_for.as_deref(), Some("directors"));
    let found = world.indexes[0].director("n", director.uid).unwrap();
    assert_eq!((&*found.name, found.endpoints.len()), ("one", 0));
    assert_eq!(found.to_proto(None).status.unwrap().phase, "Pending");
    assert!(world.device(0, director.uid).is_none());
    assert_eq!(world.indexes[0].network("n").unwrap().devices.len(), 1);
}

#[test]
fn tokens_of_directors_say_nothing_of_devices() {
    let mut world = World::with_network(1, "10.0.0.0/24");
    let create = |world: &mut World, spec: proto::TokenSpec| {
        let secret = JoinToken::with_id("t".parse().unwrap(), &mut rand::rng());
        let token = proto::Token { metadata: Some(meta("n", "")), spec: Some(spec), status: None };
        let (uid, now) = (world.uid(), world.now);
        world.commit(0, |index, _| plan::token::create(index, &token, &secret, uid, now))
    };
    let of = |party: &str| proto::TokenSpec { party: party.into(), ..Default::default() };
    for (path, spec) in [
        ("spec.party", of("operator")),
        ("spec.device_namespace", proto::TokenSpec { device_namespace: "prod".into(), ..of("director") }),
        (
            "spec.device_labels",
            proto::TokenSpec { device_labels: [("a".to_owned(), "b".to_owned())].into(), ..of("director") },
        ),
    ] {
        let AdminError::Field(error) = create(&mut world, spec).unwrap_err() else { panic!("{path}") };
        assert_eq!(error.path, path);
    }
    create(&mut world, of("device")).unwrap();
    let stored = world.indexes[0].network("n").unwrap().tokens["t"].clone();
    assert_eq!((stored.joiner, &*stored.spec().unwrap().party), (Joiner::Device, ""));
    let wanted = proto::Token { metadata: Some(meta("n", "t")), spec: Some(of("director")), status: None };
    let now = world.now;
    let changed = world.commit(0, |index, _| plan::token::update(index, &wanted, None, now));
    let AdminError::Field(error) = changed.unwrap_err() else { panic!("expected a field") };
    assert_eq!(error.path, "spec.party");
}

#[test]
fn joining_again_with_token_and_key_is_answered_as_before() {
    let mut world = World::with_network(1, "10.0.0.0/24");
    let reusable = world.director_token();
    let once = proto::TokenSpec { party: "director".into(), ..Default::default() };
    let once = world.create_token("once", once);
    for (token, name) in [(&reusable, "a"), (&once, "b")] {
        let first = world.enroll(0, token, name, &key_hash(name)).unwrap();
        let revision = world.indexes[0].revision();
        let again = world.enroll(0, token, name, &key_hash(name)).unwrap();
        assert_eq!((again.uid, again.counts_for), (first.uid, None));
        assert_eq!(world.indexes[0].revision(), revision, "nothing is written");
    }
    let other_key = key_hash("other");
    let taken = world.enroll(0, &reusable, "a", &other_key).unwrap_err();
    assert!(taken.to_string().contains("muster-director join --name"), "{taken}");
    assert_eq!(world.enroll(0, &once, "b", &other_key), Err(EnrollError::Token(TokenError::Used)));
    // Once revoked, the key is of no use any more; once deleted, the name is free.
    world.update_director(0, "a", proto::DirectorSpec { revoked: true, drained: false }).unwrap();
    let revoked = EnrollError::Revoked { joiner: Joiner::Director, name: "a".into() };
    assert_eq!(world.enroll(0, &reusable, "a", &key_hash("a")), Err(revoked));
    world.delete_director(0, "a").unwrap();
    world.enroll(0, &reusable, "a", &other_key).unwrap();
}

#[test]
fn registering_again_writes_nothing_and_tells_anew() {
    let mut world = World::with_network(1, "10.0.0.0/24");
    let token = world.director_token();
    let uid = world.director(&token, "d1", 7);
    let revision = world.indexes[0].revision();
    world.register_director(0, uid, 7).unwrap();
    assert_eq!(world.indexes[0].revision(), revision);
    let leave = |world: &mut World, leaving| {
        world.commit(0, |index, _| plan::director::leave(index, "n", uid, leaving))
    };
    leave(&mut world, true).unwrap();
    assert!(world.indexes[0].director("n", uid).unwrap().is_draining());
    // It has been started again.
    world.register_director(0, uid, 8).unwrap();
    let director = world.indexes[0].director("n", uid).unwrap().clone();
    assert!(!director.is_draining() && director.address().unwrap().address == "192.0.2.8");
    let expiry = world.now + Duration::from_secs(99);
    world.commit(0, |index, _| plan::director::renew(index, "n", uid, expiry)).unwrap();
    let told = world.indexes[0].network("n").unwrap().directors.revision;
    assert_eq!(told, director.revision, "of a new certificate, no device is told");

    world.update_director(0, "d1", proto::DirectorSpec { revoked: true, drained: false }).unwrap();
    assert_eq!(world.register_director(0, uid, 9), Err(DirectorError::Revoked));
    assert_eq!(leave(&mut world, true), Err(DirectorError::Revoked));
    world.delete_director(0, "d1").unwrap();
    assert_eq!(world.register_director(0, uid, 9), Err(DirectorError::Gone));
    let empty = plan::director::Registration { region: "", endpoints: &[], tcp_ports: &[], version: "" };
    let uid = world.join(&token, "d2");
    let refused = world.commit(0, |index, _| plan::director::register(index, "n", uid, &empty));
    assert!(matches!(refused, Err(DirectorError::Field(_))));
}

#[test]
fn devices_are_told_of_those_that_have_registered() {
    let mut wanted = network("n", "n.example", "10.0.0.0/24");
    wanted.spec.as_mut().unwrap().directors = vec![proto::DirectorAddress {
        name: "static".into(),
        address: "192.0.2.99".into(),
        port: 7501,
        ..Default::default()
    }];
    let mut world = World::new(1);
    world.create_network(&wanted).unwrap();
    let (devices, directors) = (world.reusable_token(), world.director_token());
    let uid = world.join(&devices, "a");
    world.register(0, uid, 1).unwrap();
    let told = |name: &str, draining| (name.to_owned(), draining);
    assert_eq!(config_names(&world, uid), [told("static", false)]);
    let home = peer(&world, uid).home_director.unwrap();
    assert_eq!((home.address.unwrap().name, home.handle), ("static".to_owned(), 0));

    // One that has joined and is nowhere yet changes nothing.
    world.join(&directors, "d0");
    assert_eq!(config_names(&world, uid), [told("static", false)]);
    let (one, two) = (world.director(&directors, "d1", 1), world.director(&directors, "d2", 2));
    assert_eq!(config_names(&world, uid), [told("d1", false), told("d2", false)]);
    assert_eq!(peer(&world, uid).home_director, None, "it is not attached");

    world.set_outside(uid, &outside(Some(one), Some(two))).unwrap();
    let seen = peer(&world, uid);
    let (home, second) = (seen.home_director.unwrap(), seen.second_director.unwrap());
    let handle = u64::from_be_bytes(uid.as_bytes()[..8].try_into().unwrap()).max(1);
    assert_eq!((home.handle, second.handle), (handle, handle));
    assert_eq!((home.address.unwrap().uid, second.address.unwrap().uid), (one.to_string(), two.to_string()));
    assert_eq!(seen.reflexive_endpoints.len(), 1);
    assert_eq!(seen.reflexive_endpoint.unwrap().port, 4711);
    let state = world.indexes[0].network("n").unwrap();
    let addresses = state.director_addresses(world.device(0, uid).unwrap());
    assert_eq!(addresses, [([192, 0, 2, 1], 7501).into()]);

    // Drained, it is told last, and is reached still.
    world.update_director(0, "d1", proto::DirectorSpec { revoked: false, drained: true }).unwrap();
    assert_eq!(config_names(&world, uid), [told("d2", false), told("d1", true)]);
    assert!(peer(&world, uid).home_director.unwrap().address.unwrap().draining);
    // Revoked, it is not told any more, nor are those that the operator has named.
    world.update_director(0, "d1", proto::DirectorSpec { revoked: true, drained: false }).unwrap();
    assert_eq!(config_names(&world, uid), [told("d2", false)]);
    assert_eq!(peer(&world, uid).home_director, None);
    assert!(peer(&world, uid).second_director.is_some());
    world.update_director(0, "d2", proto::DirectorSpec { revoked: true, drained: false }).unwrap();
    assert!(config_names(&world, uid).is_empty());
    let state = world.indexes[0].network("n").unwrap();
    assert!(state.director_addresses(world.device(0, uid).unwrap()).is_empty());
}

#[test]
fn deleting_a_director_shows_in_the_networks_revision() {
    let mut world = World::with_network(1, "10.0.0.0/24");
    let token = world.director_token();
    world.director(&token, "d1", 1);
    let before = world.indexes[0].network("n").unwrap().network.revision;
    world.delete_director(0, "d1").unwrap();
    world.restart(0);
    let state = world.indexes[0].network("n").unwrap();
    assert!(state.directors.is_empty() && state.network.revision > before);
    assert!(matches!(world.delete_director(0, "d1"), Err(AdminError::NotFound { .. })));
}

#[test]
fn what_a_device_tells_of_its_ways_is_kept_until_it_tells_anew() {
    let mut world = World::with_network(1, "10.0.0.0/24");
    let token = world.reusable_token();
    let uid = world.join(&token, "a");
    world.register(0, uid, 1).unwrap();
    let told = outside(Some(Uuid::from_u128(77)), None);
    world.set_outside(uid, &told).unwrap();
    let revision = world.indexes[0].revision();
    world.set_outside(uid, &told).unwrap();
    // An agent that registers before it is attached says nothing of it.
    world.register(0, uid, 1).unwrap();
    assert_eq!(world.indexes[0].revision(), revision);
    assert_eq!(world.device(0, uid).unwrap().outside.as_deref(), Some(&told));
    assert_eq!(peer(&world, uid).home_director, None, "there is no such director");
    world.restart(0);
    assert_eq!(world.device(0, uid).unwrap().outside.as_deref(), Some(&told));
    world.set_outside(uid, &Outside::default()).unwrap();
    assert_eq!(world.device(0, uid).unwrap().outside, None);
}

#[test]
fn with_a_network_go_its_directors() {
    let mut world = World::with_network(1, "10.0.0.0/24");
    let token = world.director_token();
    world.director(&token, "d1", 1);
    let lock = world.uid();
    world.commit(0, |index, _| plan::network::lock(index, "n", 0, lock)).unwrap();
    let revision = world.indexes[0].lock_revision("n").unwrap();
    while !world.commit(0, |index, _| plan::network::delete(index, "n", revision)).unwrap() {}
    let left = world.store.range_sync(&KeyRange::prefix("director"), None, 10).unwrap().kvs;
    assert!(left.is_empty(), "{left:?}");
}
