//! The core under random sequences of inputs: whatever comes, in whatever order, its state stays bounded and
//! consistent, removed peers stay removed, the registrar knows which Services are held, and the same seed gives the same
//! actions.

use std::collections::{BTreeMap, BTreeSet};

use muster_common::time::Instant;
use muster_proto::registration::{
    self, Bookmark, Drain, Introduction, PeerChanged, PeerRemoved, RegisterResponse, ServiceChanged,
    SessionResponse, session_request, session_response::Message,
};
use proptest::{collection::vec, prelude::*};

use super::{
    tests::{address, at, config, start},
    *,
};
use crate::datapath::Event;

#[derive(Clone, Debug)]
enum Input {
    /// Time passes, in milliseconds.
    Wait(u64),
    /// The timeout comes.
    Timeout,
    Registered(bool),
    Refused,
    Opened,
    Closed,
    Introduce(u8, u64),
    Change(u8, u64),
    Remove(u8),
    Drain,
    Bookmark(u64),
    Found(u8, u64),
    NotFound,
    LookupUnavailable,
    WantAddress(u8),
    /// An address in a subnet that some peers carry at some revisions.
    WantInside(u8),
    WantKey(u8),
    Idle(u8),
    Down(u8),
    Resolved(u8),
    Endpoints(u8),
    RenewalFailed,
    /// The resolver has names of the Services whose bits are set.
    Hold(u8),
    ServiceChanged(u8),
    /// A new certificate, with its life in seconds.
    Certificate(u64),
}

fn input() -> impl Strategy<Value = Input> {
    let (n, revision) = (1..9_u8, 0..6_u64);
    prop_oneof![
        1 => (0..60_000_u64).prop_map(Input::Wait),
        4 => Just(Input::Timeout),
        4 => prop_oneof![Just(true), Just(true), Just(false)].prop_map(Input::Registered),
        1 => Just(Input::Refused),
        4 => Just(Input::Opened),
        1 => Just(Input::Closed),
        3 => (n.clone(), revision.clone()).prop_map(|(n, r)| Input::Introduce(n, r)),
        2 => (n.clone(), revision.clone()).prop_map(|(n, r)| Input::Change(n, r)),
        2 => n.clone().prop_map(Input::Remove),
        1 => Just(Input::Drain),
        1 => revision.clone().prop_map(Input::Bookmark),
        4 => (n.clone(), revision).prop_map(|(n, r)| Input::Found(n, r)),
        1 => Just(Input::NotFound),
        1 => Just(Input::LookupUnavailable),
        3 => n.clone().prop_map(Input::WantAddress),
        2 => n.clone().prop_map(Input::WantInside),
        2 => n.clone().prop_map(Input::WantKey),
        1 => n.clone().prop_map(Input::Idle),
        1 => n.clone().prop_map(Input::Down),
        1 => n.clone().prop_map(Input::Resolved),
        1 => n.prop_map(Input::Endpoints),
        1 => Just(Input::RenewalFailed),
        3 => any::<u8>().prop_map(Input::Hold),
        2 => (0..8_u8).prop_map(Input::ServiceChanged),
        1 => (0..100_u64).prop_map(Input::Certificate),
    ]
}

/// Subnets move from peer to peer, as an address does, too.
fn peer(n: u8, revision: u64) -> registration::Peer {
    let mut peer = tests::peer(n, revision);
    match (u64::from(n) + revision) % 4 {
        0 => peer.subnets = vec![format!("192.168.{}.0/24", n % 2)],
        1 => peer.subnets = vec!["192.168.0.0/24".into(), "192.168.0.0/16".into()],
        2 => peer.virtual_addresses.push(address(100 + n % 2).to_string()),
        _ => {}
    }
    peer
}

fn inside(n: u8) -> IpAddr {
    IpAddr::from([192, 168, n % 3, n])
}

/// Plays `inputs`, checks what must hold after each, and returns all actions.
fn play(seed: u64, inputs: &[Input]) -> Vec<Action> {
    let mut control = Control::new(start(), seed, at(0));
    let (mut now, mut attempt, mut trace) = (at(0), 0, Vec::new());
    // Lookups under way, with the peers that have been removed since each was sent.
    let mut lookups: Vec<(u64, LookupBy, BTreeSet<u8>)> = Vec::new();
    // What the data plane would hold, and what it waits for.
    let (mut plane, mut awaited) = (BTreeMap::new(), BTreeSet::new());
    // What the resolver holds names of, what the registrar knows of that, and what is to be forgotten.
    let (mut resolver, mut registrar, mut changed) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for input in inputs {
        let message = |m| SessionResponse { message: Some(m) };
        let mut removed = None;
        match input.clone() {
            Input::Wait(ms) => now += Duration::from_millis(ms),
            Input::Timeout => {
                if let Some(at) = control.poll_timeout() {
                    now = now.max(at);
                }
                control.handle_timeout(now);
                assert!(control.poll_timeout().is_none_or(|at| at > now), "it spins");
            }
            Input::Certificate(life) => {
                let civil = Timestamp::from_epoch(now.since_boot());
                let validity = Validity { not_before: civil, not_after: civil + Duration::from_secs(life) };
                control.handle_certificate(validity, civil, now);
            }
            Input::Registered(ok) => {
                let mut config = config();
                config.site_routes.push("192.168.0.0/16".into());
                // Now and then there is another store.
                let answer =
                    RegisterResponse { config: Some(config), store_epoch: attempt / 3, unsaved: false };
                let failure = Failure::Unavailable(String::new());
                control.handle_registered(attempt, if ok { Ok(answer) } else { Err(failure) }, now);
            }
            Input::Refused => {
                control.handle_registered(attempt, Err(Failure::Refused(String::new())), now);
                control.handle_session_closed(attempt, Failure::Refused(String::new()), now);
            }
            Input::Opened => control.handle_session_opened(attempt, now),
            Input::Closed => {
                control.handle_session_closed(attempt, Failure::Unavailable(String::new()), now);
            }
            Input::Introduce(n, r) => {
                let introduction = Introduction { peer: Some(peer(n, r)) };
                control.handle_session_message(attempt, message(Message::Introduction(introduction)), now);
            }
            Input::Change(n, r) => {
                let changed = PeerChanged { peer: Some(peer(n, r)) };
                control.handle_session_message(attempt, message(Message::PeerChanged(changed)), now);
            }
            Input::Remove(n) => {
                let gone = PeerRemoved { device_uid: format!("d-{n}") };
                control.handle_session_message(attempt, message(Message::PeerRemoved(gone)), now);
                if control.is_connected() {
                    removed = Some(n);
                    lookups.iter_mut().for_each(|(_, _, gone)| _ = gone.insert(n));
                }
            }
            Input::Drain => {
                let within = Some(pbjson_types::Duration { seconds: 20, nanos: 0 });
                control.handle_session_message(
                    attempt,
                    message(Message::Drain(Drain { within, registrars: vec![] })),
                    now,
                );
            }
            Input::Bookmark(revision) => {
                let bookmark = Message::Bookmark(Bookmark { revision });
                control.handle_session_message(attempt, message(bookmark), now);
            }
            Input::Found(n, r) => {
                if let Some((id, _, gone)) = pop(&mut lookups) {
                    let before: BTreeSet<String> = uids(&control);
                    control.handle_looked_up(id, LookupResult::Found(Box::new(peer(n, r))), now);
                    let uid = format!("d-{n}");
                    let back = uids(&control).contains(&uid) && !before.contains(&uid);
                    assert!(!(back && gone.contains(&n)), "an older lookup brought {uid} back");
                }
            }
            Input::NotFound => {
                if let Some((id, ..)) = pop(&mut lookups) {
                    control.handle_looked_up(id, LookupResult::NotFound, now);
                }
            }
            Input::LookupUnavailable => {
                if let Some((id, ..)) = pop(&mut lookups) {
                    control.handle_looked_up(id, LookupResult::Unavailable, now);
                }
            }
            Input::WantAddress(n) => {
                awaited.insert(LookupBy::Address(address(n)));
                control.handle_datapath(&Event::LookupAddress(address(n)), now);
            }
            Input::WantInside(n) => {
                awaited.insert(LookupBy::Address(inside(n)));
                control.handle_datapath(&Event::LookupAddress(inside(n)), now);
            }
            Input::WantKey(n) => {
                awaited.insert(LookupBy::PublicKey([n; 32]));
                control.handle_datapath(&Event::LookupKey([n; 32]), now);
            }
            Input::Idle(n) => control.handle_datapath(&Event::PeerIdle([n; 32]), now),
            Input::Down(n) => control.handle_datapath(&Event::PeerDown([n; 32]), now),
            Input::Resolved(n) => control.handle_resolved(&[address(n)], now),
            Input::Endpoints(n) => {
                control.handle_private_endpoints(vec![SocketAddr::from(([192, 0, 2, n], 1))], now);
            }
            Input::Hold(bits) => {
                let held = (0..8).filter(|n| bits >> n & 1 == 1).map(service);
                resolver = held.clone().map(|s| format!("{}/{}", s.namespace, s.name)).collect();
                control.handle_services_held(held.collect(), now);
            }
            Input::ServiceChanged(n) => {
                let HeldService { namespace, name } = service(n);
                if control.is_connected() && registrar.contains(&format!("{namespace}/{name}")) {
                    changed.insert(service(n));
                }
                let told = Message::ServiceChanged(ServiceChanged { namespace, name });
                control.handle_session_message(attempt, message(told), now);
            }
            Input::RenewalFailed => control.handle_renewal_failed(now),
        }
        control.check();
        if let Some(n) = removed {
            assert!(!uids(&control).contains(&format!("d-{n}")), "held after PeerRemoved");
        }
        while let Some(action) = control.poll_action() {
            match &action {
                Action::Register { attempt: new, .. } => {
                    assert!(*new > attempt, "attempts go up");
                    attempt = *new;
                }
                Action::Lookup { id, by } => {
                    lookups.push((*id, *by, BTreeSet::new()));
                    let in_flight: BTreeSet<_> = lookups.iter().map(|(id, ..)| id).collect();
                    assert_eq!(in_flight.len(), lookups.len(), "ids are used once");
                }
                Action::Disconnect { .. } => lookups.clear(),
                Action::OpenSession { hello, .. } => {
                    registrar = hello.held_services.iter().cloned().collect();
                    assert!(registrar.is_superset(&resolver), "a hello tells of all");
                }
                Action::Send(request) => tell(&mut registrar, request, &mut changed),
                Action::ForgetServices(services) => services.iter().for_each(|s| _ = changed.remove(s)),
                Action::Datapath(Command::AddPeer(p) | Command::UpdatePeer(p)) => {
                    plane.insert(p.public_key, p.clone());
                    awaited.remove(&LookupBy::PublicKey(p.public_key));
                    awaited.retain(|by| match by {
                        LookupBy::Address(a) => {
                            !(p.virtual_addresses.contains(a) || p.subnets.iter().any(|s| s.contains(a)))
                        }
                        LookupBy::PublicKey(_) => true,
                    });
                }
                Action::Datapath(Command::RemovePeer(key)) => {
                    assert!(plane.remove(key).is_some(), "not held");
                }
                Action::Datapath(Command::NoSuchDevice(a)) => drop(awaited.remove(&LookupBy::Address(*a))),
                Action::Datapath(Command::UnknownKey(k)) => drop(awaited.remove(&LookupBy::PublicKey(*k))),
                _ => {}
            }
            trace.push(action);
        }
        let held: BTreeMap<_, _> = control.peers().map(|p| (p.config.public_key, p.config.clone())).collect();
        assert_eq!(held, plane, "data plane and core hold the same");
        assert!(control.poll_timeout().is_some() || control.is_connected(), "nothing to wait for");
    }
    // Whatever the data plane waits for is answered in time.
    now += LOOKUP_PATIENCE;
    control.handle_timeout(now);
    while let Some(action) = control.poll_action() {
        match action {
            Action::Datapath(Command::NoSuchDevice(a)) => drop(awaited.remove(&LookupBy::Address(a))),
            Action::Datapath(Command::UnknownKey(k)) => drop(awaited.remove(&LookupBy::PublicKey(k))),
            Action::Send(request) => tell(&mut registrar, &request, &mut changed),
            Action::ForgetServices(services) => services.iter().for_each(|s| _ = changed.remove(s)),
            _ => {}
        }
    }
    assert_eq!(awaited, BTreeSet::new(), "unanswered");
    assert_eq!(changed, BTreeSet::new(), "not forgotten");
    assert!(!control.is_connected() || registrar.is_superset(&resolver), "not told");
    trace
}

fn service(n: u8) -> HeldService {
    HeldService { namespace: "default".into(), name: format!("s{n}") }
}

/// What the registrar makes of a message. Of a Service that is given up there are no names to forget: the resolver has
/// had none for long.
fn tell(registrar: &mut BTreeSet<String>, request: &SessionRequest, changed: &mut BTreeSet<HeldService>) {
    if let Some(session_request::Message::HeldServices(held)) = &request.message {
        assert!(held.added.len() + held.removed.len() > 0, "nothing to tell");
        held.removed.iter().for_each(|service| assert!(registrar.remove(service), "{service} was not held"));
        held.added.iter().for_each(|s| assert!(registrar.insert(s.clone()), "{s} was held already"));
        changed.retain(|service| !held.removed.contains(&format!("{}/{}", service.namespace, service.name)));
    }
}

fn pop<T>(items: &mut Vec<T>) -> Option<T> {
    if items.is_empty() { None } else { Some(items.remove(0)) }
}

fn uids(control: &Control) -> BTreeSet<String> {
    control.peers().map(|p| p.message.device_uid.clone()).collect()
}

/// No input, and no time, makes it act more often than its back-off allows.
fn actions_in(seed: u64, span: Duration) -> usize {
    let mut control = Control::new(start(), seed, at(0));
    let (mut now, mut actions): (Instant, usize) = (at(0), 0);
    while now < at(0) + span {
        let mut attempt = None;
        while let Some(action) = control.poll_action() {
            actions += 1;
            if let Action::Register { attempt: a, .. } = action {
                attempt = Some(a);
            }
        }
        if let Some(attempt) = attempt {
            control.handle_registered(attempt, Err(Failure::Unavailable(String::new())), now);
        }
        if let Some(at) = control.poll_timeout() {
            now = now.max(at);
        }
        control.handle_timeout(now);
    }
    actions
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_inputs_is_survived(seed: u64, inputs in vec(input(), 0..200)) {
        play(seed, &inputs);
    }

    #[test]
    fn the_same_seed_gives_the_same_actions(seed: u64, inputs in vec(input(), 0..100)) {
        prop_assert_eq!(play(seed, &inputs), play(seed, &inputs));
    }

    #[test]
    fn without_a_registrar_it_does_not_spin(seed: u64) {
        prop_assert!(actions_in(seed, Duration::from_secs(3600)) < 600);
    }
}
