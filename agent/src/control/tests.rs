//! The core, input by input, in virtual time.

use muster_proto::{
    admin::Endpoint,
    registration::{
        Bookmark, Drain, Introduction, PairPolicy, PeerChanged, PeerRemoved, RegisterResponse, RootsChanged,
        ServiceChanged, SessionResponse, session_request, session_response::Message,
    },
};

mod ciphers;
mod directors;
mod registrar;
mod site;

use super::*;
use crate::datapath::Event;
use muster_common::time::Instant;

pub(super) fn at(milliseconds: u64) -> Instant {
    Instant::from_boot(Duration::from_millis(1_000_000 + milliseconds))
}

pub(super) fn config() -> DeviceConfig {
    DeviceConfig {
        device_uid: "me".into(),
        name: "alice".into(),
        namespace: "default".into(),
        network: "net".into(),
        domain: "net.example".into(),
        virtual_ipv4: "100.64.1.1".into(),
        routes: vec!["100.64.0.0/11".into()],
        registrars: vec!["r1:7500".into()],
        ..DeviceConfig::default()
    }
}

pub(super) fn peer(n: u8, revision: u64) -> Peer {
    Peer {
        device_uid: format!("d-{n}"),
        name: format!("host{n}"),
        public_key: vec![n; 32],
        virtual_addresses: vec![format!("100.64.2.{n}")],
        private_endpoints: vec![Endpoint { address: format!("192.0.2.{n}"), port: 7551 }],
        policy: Some(PairPolicy { allowed: true }),
        revision,
        ..Peer::default()
    }
}

pub(super) fn address(n: u8) -> IpAddr {
    IpAddr::from([100, 64, 2, n])
}

pub(super) fn start() -> Start {
    Start {
        device_uid: "me".into(),
        public_key: [200; 32],
        agent_version: "1".into(),
        registrar: "r1:7500".into(),
        ..Start::default()
    }
}

fn actions(control: &mut Control) -> Vec<Action> {
    control.check();
    std::iter::from_fn(|| control.poll_action()).collect()
}

fn commands(control: &mut Control) -> Vec<Command> {
    let command = |action| match action {
        Action::Datapath(command) => Some(command),
        _ => None,
    };
    actions(control).into_iter().filter_map(command).collect()
}

fn message(message: Message) -> SessionResponse {
    SessionResponse { message: Some(message) }
}

fn register(control: &mut Control, now: Instant) -> (u64, String) {
    control.handle_timeout(now);
    let found = actions(control).into_iter().find_map(|action| match action {
        Action::Register { attempt, registrar, .. } => Some((attempt, registrar)),
        _ => None,
    });
    found.expect("a Register")
}

/// A core with an open session, and the session's attempt.
fn connected(start: Start, now: Instant) -> (Control, u64) {
    let mut control = Control::new(start, 7, now);
    let (attempt, _) = register(&mut control, now);
    control.handle_registered(
        attempt,
        Ok(RegisterResponse { config: Some(config()), ..RegisterResponse::default() }),
        now,
    );
    control.handle_session_opened(attempt, now);
    assert!(control.is_connected());
    actions(&mut control);
    (control, attempt)
}

fn lookup(control: &mut Control, event: &Event, now: Instant) -> Option<(u64, LookupBy)> {
    control.handle_datapath(event, now);
    actions(control).into_iter().find_map(|action| match action {
        Action::Lookup { id, by } => Some((id, by)),
        _ => None,
    })
}

#[test]
fn it_registers_opens_a_session_and_is_configured() {
    let mut control = Control::new(start(), 1, at(0));
    assert_eq!(control.poll_timeout(), Some(at(0)));
    let (attempt, registrar) = register(&mut control, at(0));
    assert_eq!(registrar, "r1:7500");
    control.handle_registered(
        attempt,
        Ok(RegisterResponse { config: Some(config()), ..RegisterResponse::default() }),
        at(1),
    );
    let did = actions(&mut control);
    assert!(
        matches!(&did[0], Action::Configure(s) if s.virtual_addresses() == [IpAddr::from([100, 64, 1, 1])])
    );
    assert_eq!(did[1], Action::Persist(Persist::Config));
    assert!(matches!(&did[2], Action::OpenSession { hello, .. } if hello.held_peer_uids.is_empty()));
    control.handle_session_opened(attempt, at(2));
    assert!(control.registrar().connected);
}

#[test]
fn it_comes_up_from_disk_before_any_registrar() {
    let start = Start { config: Some(config()), peers: vec![peer(1, 5)], revision: 5, ..start() };
    let mut control = Control::new(start, 1, at(0));
    let did = actions(&mut control);
    assert!(matches!(did[0], Action::Configure(_)));
    assert!(matches!(&did[1], Action::Datapath(Command::AddPeer(p)) if p.public_key == [1; 32]));
    assert_eq!(did.len(), 2);
    let (attempt, _) = register(&mut control, at(0));
    control.handle_registered(
        attempt,
        Ok(RegisterResponse { config: Some(config()), ..RegisterResponse::default() }),
        at(1),
    );
    let did = actions(&mut control);
    let [Action::OpenSession { hello, .. }] = &did[..] else { panic!("{did:?}") };
    assert_eq!((hello.revision, &hello.held_peer_uids[..]), (5, &["d-1".to_owned()][..]));
}

#[test]
fn another_store_s_revisions_are_not_compared_with_those_of_the_last() {
    let start =
        Start { config: Some(config()), peers: vec![peer(1, 500)], epoch: 7, revision: 500, ..start() };
    let mut control = Control::new(start, 1, at(0));
    actions(&mut control);
    let (attempt, _) = register(&mut control, at(0));
    let answer = |store_epoch| RegisterResponse { config: Some(config()), store_epoch, unsaved: false };
    control.handle_registered(attempt, Ok(answer(7)), at(1));
    let did = actions(&mut control);
    assert!(matches!(&did[..], [Action::OpenSession { hello, .. }] if hello.revision == 500));
    // In the same store, what is older than what is held is no news.
    let moved = |revision| {
        let private_endpoints = vec![Endpoint { address: "192.0.2.99".into(), port: 7551 }];
        let peer = Some(Peer { private_endpoints, ..peer(1, revision) });
        SessionResponse { message: Some(Message::PeerChanged(PeerChanged { peer })) }
    };
    control.handle_session_message(attempt, moved(20), at(2));
    assert_eq!(commands(&mut control), []);

    control.handle_session_closed(attempt, Failure::Unavailable(String::new()), at(3));
    let (attempt, _) = register(&mut control, at(60_000));
    control.handle_registered(attempt, Ok(answer(8)), at(60_001));
    let did = actions(&mut control);
    let Some(Action::OpenSession { hello, .. }) = did.last() else { panic!("{did:?}") };
    assert_eq!((hello.revision, &hello.held_peer_uids[..]), (0, &["d-1".to_owned()][..]));
    // The peer is kept until something is told of it, and then that counts.
    assert_eq!(control.peers().count(), 1);
    control.handle_session_message(attempt, moved(20), at(60_002));
    assert!(matches!(&commands(&mut control)[..], [Command::UpdatePeer(_)]));
    let (epoch, _, peers) = control.held_peers();
    assert_eq!((epoch, peers[0].revision), (8, 20));
}

#[test]
fn a_packet_makes_one_lookup_and_the_answer_a_peer() {
    let (mut control, _) = connected(start(), at(0));
    let wanted = Event::LookupAddress(address(1));
    let (id, by) = lookup(&mut control, &wanted, at(1)).unwrap();
    assert_eq!(by, LookupBy::Address(address(1)));
    assert_eq!(lookup(&mut control, &wanted, at(2)), None);
    control.handle_looked_up(id, LookupResult::Found(Box::new(peer(1, 3))), at(3));
    let did = actions(&mut control);
    assert!(
        matches!(&did[0], Action::Datapath(Command::AddPeer(p)) if p.endpoints == ["192.0.2.1:7551".parse().unwrap()])
    );
    let Action::Send(report) = &did[1] else { panic!("{did:?}") };
    let Some(session_request::Message::HeldPeers(held)) = &report.message else { panic!("{report:?}") };
    assert_eq!(held.added_uids, ["d-1"]);
    // Wanted again, it is there.
    control.handle_datapath(&wanted, at(4));
    assert!(matches!(commands(&mut control)[..], [Command::AddPeer(_)]));
}

#[test]
fn what_does_not_exist_is_said_to_the_data_plane() {
    let (mut control, _) = connected(start(), at(0));
    // Outside the network, and this device itself: without asking.
    for ip in [IpAddr::from([192, 0, 2, 1]), IpAddr::from([100, 64, 1, 1])] {
        control.handle_datapath(&Event::LookupAddress(ip), at(1));
        assert_eq!(commands(&mut control), [Command::NoSuchDevice(ip)]);
    }
    let (id, _) = lookup(&mut control, &Event::LookupKey([9; 32]), at(2)).unwrap();
    control.handle_looked_up(id, LookupResult::NotFound, at(3));
    assert_eq!(commands(&mut control), [Command::UnknownKey([9; 32])]);
    // A hidden peer, one of another address, and this device look the same.
    let hidden = Peer { policy: None, ..peer(1, 1) };
    let me = Peer { device_uid: "me".into(), ..peer(1, 1) };
    for answer in [hidden, peer(2, 1), me] {
        let (id, _) = lookup(&mut control, &Event::LookupAddress(address(1)), at(4)).unwrap();
        control.handle_looked_up(id, LookupResult::Found(Box::new(answer)), at(5));
        assert_eq!(commands(&mut control), [Command::NoSuchDevice(address(1))]);
        assert_eq!(control.peers().count(), 0);
    }
}

#[test]
fn lookups_wait_for_a_registrar_but_not_for_ever() {
    let start = Start { config: Some(config()), ..start() };
    let mut control = Control::new(start, 1, at(0));
    actions(&mut control);
    assert_eq!(lookup(&mut control, &Event::LookupAddress(address(1)), at(0)), None);
    control.handle_timeout(at(4_999));
    assert_eq!(commands(&mut control), []);
    control.handle_timeout(at(5_000));
    assert_eq!(commands(&mut control), [Command::NoSuchDevice(address(1))]);
    // One that gets no answer is tried again, and ends likewise.
    let (mut control, _) = connected(super::tests::start(), at(0));
    let (id, _) = lookup(&mut control, &Event::LookupAddress(address(1)), at(0)).unwrap();
    control.handle_looked_up(id, LookupResult::Unavailable, at(100));
    assert_eq!(actions(&mut control), []);
    control.handle_timeout(at(600));
    assert!(matches!(actions(&mut control)[..], [Action::Lookup { .. }]));
    control.handle_timeout(at(5_000));
    assert_eq!(commands(&mut control), [Command::NoSuchDevice(address(1))]);
}

#[test]
fn resolved_names_are_looked_up_ahead() {
    let (mut control, _) = connected(start(), at(0));
    control.handle_resolved(&[address(1), IpAddr::from([192, 0, 2, 1])], at(1));
    let did = actions(&mut control);
    let [Action::Lookup { id, by }] = did[..] else { panic!("{did:?}") };
    assert_eq!(by, LookupBy::Address(address(1)));
    // Nobody waits for it: a negative answer is nothing to tell.
    control.handle_looked_up(id, LookupResult::NotFound, at(2));
    assert_eq!(actions(&mut control), []);
}

#[test]
fn removed_peers_go_at_once_and_older_lookups_do_not_bring_them_back() {
    let (mut control, attempt) = connected(start(), at(0));
    let introduce = |n, r| message(Message::Introduction(Introduction { peer: Some(peer(n, r)) }));
    control.handle_session_message(attempt, introduce(1, 1), at(1));
    assert!(matches!(commands(&mut control)[..], [Command::AddPeer(_)]));
    control.handle_datapath(&Event::PeerDown([1; 32]), at(2));
    let did = actions(&mut control);
    let [Action::Lookup { id, .. }] = did[..] else { panic!("{did:?}") };
    let removed = message(Message::PeerRemoved(PeerRemoved { device_uid: "d-1".into() }));
    control.handle_session_message(attempt, removed, at(3));
    assert_eq!(commands(&mut control), [Command::RemovePeer([1; 32])]);
    // Sent before the removal, answered after it: asked again.
    control.handle_looked_up(id, LookupResult::Found(Box::new(peer(1, 1))), at(4));
    assert_eq!(control.peers().count(), 0);
    let did = actions(&mut control);
    let [Action::Lookup { id, .. }] = did[..] else { panic!("{did:?}") };
    control.handle_looked_up(id, LookupResult::NotFound, at(5));
    assert_eq!(actions(&mut control), []);
}

#[test]
fn held_peers_change_and_others_do_not_come_back() {
    let (mut control, attempt) = connected(start(), at(0));
    let change = |p| message(Message::PeerChanged(PeerChanged { peer: Some(p) }));
    control.handle_session_message(attempt, change(peer(1, 9)), at(1));
    assert_eq!(actions(&mut control), []);
    let introduction = Introduction { peer: Some(peer(1, 9)) };
    control.handle_session_message(attempt, message(Message::Introduction(introduction)), at(1));
    actions(&mut control);
    // Older news is no news; a new endpoint updates; a new key replaces.
    control.handle_session_message(attempt, change(peer(1, 8)), at(2));
    assert_eq!(commands(&mut control), []);
    let moved =
        Peer { private_endpoints: vec![Endpoint { address: "192.0.2.77".into(), port: 1 }], ..peer(1, 10) };
    control.handle_session_message(attempt, change(moved), at(3));
    assert!(matches!(&commands(&mut control)[..], [Command::UpdatePeer(p)] if p.endpoints.len() == 1));
    let rekeyed = Peer { public_key: vec![42; 32], ..peer(1, 11) };
    control.handle_session_message(attempt, change(rekeyed), at(4));
    let did = commands(&mut control);
    assert!(
        matches!(&did[..], [Command::RemovePeer(old), Command::AddPeer(p)] if *old == [1; 32] && p.public_key == [42; 32])
    );
    // Policy hides it: gone.
    let hidden = Peer { policy: Some(PairPolicy { allowed: false }), ..peer(1, 12) };
    control.handle_session_message(attempt, change(hidden), at(5));
    assert_eq!(commands(&mut control), [Command::RemovePeer([42; 32])]);
    // An address that has moved to another device has one owner.
    for (n, uid) in [(2, "d-2"), (2, "d-3")] {
        let p = Peer { device_uid: uid.into(), public_key: vec![uid.as_bytes()[2]; 32], ..peer(n, 13) };
        control.handle_session_message(
            attempt,
            message(Message::Introduction(Introduction { peer: Some(p) })),
            at(6),
        );
    }
    assert_eq!(control.peers().map(|p| p.message.device_uid.as_str()).collect::<Vec<_>>(), ["d-3"]);
}

#[test]
fn idle_peers_are_forgotten_and_reported() {
    let (mut control, attempt) = connected(start(), at(0));
    let introduction = Introduction { peer: Some(peer(1, 1)) };
    control.handle_session_message(attempt, message(Message::Introduction(introduction)), at(1));
    actions(&mut control);
    control.handle_datapath(&Event::PeerIdle([1; 32]), at(2));
    let did = actions(&mut control);
    assert_eq!(did[0], Action::Datapath(Command::RemovePeer([1; 32])));
    let Action::Send(report) = &did[1] else { panic!("{did:?}") };
    let Some(session_request::Message::HeldPeers(held)) = &report.message else { panic!("{report:?}") };
    assert_eq!((held.added_uids.len(), &held.removed_uids[..]), (0, &["d-1".to_owned()][..]));
    control.handle_timeout(at(503));
    assert_eq!(actions(&mut control), [Action::Persist(Persist::Peers)]);
}

#[test]
fn the_certificate_is_renewed_at_two_thirds_of_its_life() {
    let day = 86_400;
    let civil = |s: u64| Timestamp::from_epoch(Duration::from_secs(s));
    let validity = Validity { not_before: civil(1_000_000), not_after: civil(1_000_000 + 30 * day) };
    let mut times = std::collections::BTreeSet::new();
    for seed in 0..20 {
        let mut control = Control::new(start(), seed, at(0));
        let (attempt, _) = register(&mut control, at(0));
        control.handle_registered(
            attempt,
            Ok(RegisterResponse { config: Some(config()), ..RegisterResponse::default() }),
            at(0),
        );
        control.handle_session_opened(attempt, at(0));
        actions(&mut control);
        control.handle_certificate(validity, civil(1_000_000), at(0));
        let due = control.poll_timeout().unwrap();
        let share = (due - at(0)).as_secs_f64() / (30 * day) as f64;
        assert!((0.61..0.72).contains(&share), "{share}");
        times.insert(due);
        control.handle_timeout(due);
        assert_eq!(actions(&mut control), [Action::Renew]);
        control.handle_timeout(due + Duration::from_secs(1));
        assert_eq!(actions(&mut control), []);
        // It fails, and is tried again; the session goes on.
        control.handle_renewal_failed(due + Duration::from_secs(2));
        let again = control.poll_timeout().unwrap();
        assert!(again > due + Duration::from_secs(30));
        control.handle_timeout(again);
        assert_eq!(actions(&mut control), [Action::Renew]);
        let next = Validity { not_before: civil(2_000_000), not_after: civil(2_000_000 + 30 * day) };
        control.handle_certificate(next, civil(2_000_000), again);
        assert!(control.poll_timeout().unwrap() > again + Duration::from_secs(15 * day));
        assert!(control.is_connected());
        // One that is back-dated for longer than it is valid does not make it renew in a loop.
        let due = control.poll_timeout().unwrap();
        control.handle_timeout(due);
        assert_eq!(actions(&mut control), [Action::Renew]);
        let short = Validity { not_before: civil(9_000_000 - 900), not_after: civil(9_000_060) };
        control.handle_certificate(short, civil(9_000_000), due);
        assert!(control.poll_timeout().unwrap() >= due + Duration::from_secs(30));
    }
    assert!(times.len() > 15, "no jitter");
}

#[test]
fn an_expired_certificate_tears_nothing_down() {
    let start = Start { config: Some(config()), peers: vec![peer(1, 1)], ..start() };
    let mut control = Control::new(start, 1, at(0));
    let civil = |s: u64| Timestamp::from_epoch(Duration::from_secs(s));
    control.handle_certificate(Validity { not_before: civil(1), not_after: civil(2) }, civil(3), at(0));
    actions(&mut control);
    for _ in 0..50 {
        let now = control.poll_timeout().unwrap();
        let (attempt, _) = register(&mut control, now);
        control.handle_registered(attempt, Err(Failure::Unavailable("certificate expired".into())), now);
        assert_eq!(commands(&mut control), []);
    }
    assert_eq!(control.peers().count(), 1);
}

#[test]
fn changed_endpoints_roots_and_bookmarks() {
    let (mut control, attempt) = connected(start(), at(0));
    let endpoints = vec!["192.0.2.5:7551".parse().unwrap()];
    control.handle_private_endpoints(endpoints.clone(), at(1));
    assert!(matches!(actions(&mut control)[..], [Action::Send(_)]));
    control.handle_private_endpoints(endpoints, at(2));
    assert_eq!(actions(&mut control), []);
    // Flapping is told once a second, and then as it is by then.
    control.handle_private_endpoints(vec![], at(3));
    assert_eq!(actions(&mut control), []);
    control.handle_timeout(control.poll_timeout().unwrap());
    assert!(matches!(actions(&mut control)[..], [Action::Send(_)]));
    let roots = RootsChanged { roots: vec![vec![1]] };
    control.handle_session_message(attempt, message(Message::RootsChanged(roots)), at(4));
    assert_eq!(actions(&mut control), [Action::ReplaceRoots(vec![vec![1]])]);
    control.handle_session_message(attempt, message(Message::Bookmark(Bookmark { revision: 77 })), at(5));
    assert_eq!(control.held_peers().1, 77);
    // A configuration that cannot be used changes nothing.
    let bad = DeviceConfig { virtual_ipv4: "x".into(), ..config() };
    control.handle_session_message(attempt, message(Message::Config(bad)), at(6));
    assert_eq!(actions(&mut control), []);
    assert_eq!(control.config(), Some(&config()));
}

fn told(action: &Action) -> (Vec<String>, Vec<String>) {
    match action {
        Action::Send(SessionRequest { message: Some(session_request::Message::HeldServices(held)) }) => {
            (held.added.clone(), held.removed.clone())
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_registrar_is_told_of_held_services_and_tells_of_their_changes() {
    let service = |name: &str| HeldService { namespace: "shop".into(), name: name.into() };
    let changed = |name: &str| {
        message(Message::ServiceChanged(ServiceChanged { namespace: "shop".into(), name: name.into() }))
    };
    // Before there is a session, nothing can be told; then everything is.
    let mut control = Control::new(start(), 1, at(0));
    control.handle_services_held(vec![service("a"), service("_tcp")], at(0));
    let (attempt, _) = register(&mut control, at(0));
    control.handle_registered(
        attempt,
        Ok(RegisterResponse { config: Some(config()), ..RegisterResponse::default() }),
        at(0),
    );
    let did = actions(&mut control);
    assert!(matches!(&did[2], Action::OpenSession { hello, .. } if hello.held_services == ["shop/a"]));
    // What is learnt before the session is open is told when it is.
    control.handle_services_held(vec![service("a"), service("b")], at(1_000));
    assert_eq!(actions(&mut control), []);
    control.handle_session_opened(attempt, at(2_000));
    assert_eq!(told(&actions(&mut control)[0]), (vec!["shop/b".into()], vec![]));
    // A flood is told in one message.
    control.handle_services_held(vec![service("a"), service("b"), service("c")], at(2_010));
    control.handle_services_held(["a", "b", "c", "d"].map(service).to_vec(), at(2_020));
    assert_eq!((actions(&mut control), control.poll_timeout()), (vec![], Some(at(2_100))));
    control.handle_timeout(at(2_100));
    assert_eq!(told(&actions(&mut control)[0]), (vec!["shop/c".into(), "shop/d".into()], vec![]));

    control.handle_session_message(attempt, changed("b"), at(3_000));
    assert_eq!(actions(&mut control), [Action::ForgetServices(vec![service("b")])]);
    // Of no interest.
    control.handle_session_message(attempt, changed("x"), at(3_001));
    control.handle_session_message(attempt - 1, changed("a"), at(3_001));
    assert_eq!(actions(&mut control), []);
    // The resolver forgets its names, and learns them again, which is nothing new.
    control.handle_services_held(["a", "c", "d"].map(service).to_vec(), at(3_002));
    control.handle_services_held(["a", "b", "c", "d"].map(service).to_vec(), at(3_500));
    assert_eq!((actions(&mut control), control.poll_timeout()), (vec![], None));
    // Several at once are forgotten at once, even if the connection breaks.
    for name in ["d", "a", "c"] {
        control.handle_session_message(attempt, changed(name), at(4_000));
    }
    assert_eq!(actions(&mut control), [Action::ForgetServices(vec![service("d")])]);
    control.handle_session_closed(attempt, Failure::Unavailable("gone".into()), at(4_001));
    actions(&mut control);
    control.handle_timeout(at(4_010));
    assert_eq!(actions(&mut control), [Action::ForgetServices(vec![service("a"), service("c")])]);
    // The next session begins with all; what is not asked for any more is dropped after a while.
    control.handle_services_held(vec![service("a")], at(5_000));
    let (attempt, _) = register(&mut control, at(5_000));
    control.handle_registered(
        attempt,
        Ok(RegisterResponse { config: Some(config()), ..RegisterResponse::default() }),
        at(5_000),
    );
    let did = actions(&mut control);
    let Action::OpenSession { hello, .. } = &did[0] else { panic!("{did:?}") };
    assert_eq!(hello.held_services, ["shop/a", "shop/b", "shop/c", "shop/d"]);
    control.handle_session_opened(attempt, at(5_000));
    let due = control.poll_timeout().unwrap();
    assert_eq!(due, at(305_000));
    control.handle_timeout(due);
    let removed = ["shop/b", "shop/c", "shop/d"].map(str::to_owned).to_vec();
    assert_eq!(told(&actions(&mut control)[0]), (vec![], removed));
}

#[test]
fn everything_is_bounded() {
    let (mut control, attempt) = connected(start(), at(0));
    let mut refused = 0;
    for n in 0..1000_u32 {
        let ip = IpAddr::from([100, 65, (n >> 8) as u8, n as u8]);
        control.handle_datapath(&Event::LookupAddress(ip), at(1));
        refused += commands(&mut control).len();
    }
    assert_eq!(control.lookups(), (MAX_LOOKUPS, MAX_LOOKUPS_IN_FLIGHT));
    assert_eq!(refused, 1000 - MAX_LOOKUPS);
    for n in 0..MAX_PEERS as u32 + 100 {
        let mut key = [1; 32];
        key[..4].copy_from_slice(&n.to_be_bytes());
        let p = Peer {
            device_uid: format!("d-{n}"),
            public_key: key.to_vec(),
            virtual_addresses: vec![std::net::Ipv4Addr::from(0x6440_0000 + n).to_string()],
            ..peer(1, 1)
        };
        control.handle_session_message(
            attempt,
            message(Message::Introduction(Introduction { peer: Some(p) })),
            at(2),
        );
        while control.poll_action().is_some() {}
    }
    control.check();
    assert_eq!(control.peers().count(), MAX_PEERS);
    // The first ones went.
    assert!(control.peers().all(|p| p.message.device_uid != "d-0"));
}
