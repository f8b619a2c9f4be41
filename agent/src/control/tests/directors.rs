//! Directors, as the whole core has them: attached from disk or from the registrar's word, and reported back.

use muster_common::frame::Handle;
use muster_proto::{
    admin::DirectorAddress,
    registration::{HomeDirector, Reachability},
};
use muster_tunnel::{DirectorId, DirectorLink, Hop};
use zeroize::Zeroizing;

use super::*;
use crate::directors::flow::{Attachment, FlowEvent};

fn director(uid: &str) -> DirectorAddress {
    DirectorAddress {
        name: uid.into(),
        uid: uid.into(),
        address: "192.0.2.200".into(),
        port: 7501,
        ..DirectorAddress::default()
    }
}

fn with_directors(uids: &[&str]) -> DeviceConfig {
    DeviceConfig { directors: uids.iter().map(|uid| director(uid)).collect(), ..config() }
}

fn relayed(n: u8, home: &str) -> Peer {
    let home = HomeDirector { address: Some(director(home)), handle: n.into() };
    Peer { home_director: Some(home), ..peer(n, 1) }
}

/// Answers every Attach, and the hello after it.
fn attach(control: &mut Control, now: Instant) -> Vec<Action> {
    let did = actions(control);
    for action in &did {
        let Action::Attach { id, attempt, .. } = action else { continue };
        let attachment = Attachment {
            endpoints: vec![],
            session: 1,
            key: Zeroizing::new([1; 32]),
            hello_interval: Duration::from_secs(15),
        };
        let (id, attempt, round_trip) = (*id, *attempt, Duration::from_millis(5));
        control.handle_director(DirectorEvent::Attached { id, attempt, attachment, round_trip }, now);
        let hop = Hop::Udp("192.0.2.200:7501".parse().unwrap());
        let link = Some(DirectorLink { session: 1, hop, is_draining: false });
        control.handle_datapath(&Event::Director(FlowEvent::Link(id, link)), now);
        bound(control, id, 7551, now);
    }
    did
}

fn bound(control: &mut Control, id: DirectorId, port: u16, now: Instant) {
    control.handle_datapath(
        &Event::Director(FlowEvent::Bound {
            id,
            reflexive: SocketAddr::from(([198, 51, 100, 1], port)),
            round_trip: Duration::from_millis(5),
            draining: false,
        }),
        now,
    );
}

fn reported(did: &[Action]) -> Vec<Reachability> {
    let report = |action: &Action| match action {
        Action::Send(SessionRequest {
            message: Some(session_request::Message::EndpointsChanged(changed)),
        }) => changed.reachability.clone(),
        _ => None,
    };
    did.iter().filter_map(report).collect()
}

#[test]
fn directors_known_from_disk_are_attached_to_before_any_registrar() {
    let start = Start {
        config: Some(with_directors(&["d-1"])),
        peers: vec![relayed(1, "d-1"), relayed(2, "elsewhere")],
        ..start()
    };
    let mut control = Control::new(start, 1, at(0));
    let did = attach(&mut control, at(0));
    assert!(matches!(did[0], Action::Configure(_)));
    assert!(did.iter().any(|action| matches!(action, Action::Attach { target, .. } if target.uid == "d-1")));
    let relays = |n: u8| {
        let peer = control.peers().find(|peer| peer.config.public_key == [n; 32]).unwrap();
        peer.config.relays.clone()
    };
    assert_eq!((relays(1), relays(2)), (vec![(DirectorId(0), Handle(1))], vec![]));
    assert_eq!(control.directors()[0].role, Role::Home);
    // With its first word to a registrar it says how it is reached.
    control.handle_timeout(at(1_000));
    let request = actions(&mut control).into_iter().find_map(|action| match action {
        Action::Register { request, .. } => request.reachability,
        _ => None,
    });
    let request = request.unwrap();
    assert_eq!((request.home_director_uid.as_str(), request.reflexive_endpoints[0].port), ("d-1", 7551));
}

#[test]
fn the_registrar_hears_of_home_and_reflexive_address_without_a_flood() {
    let (mut control, attempt) = connected(start(), at(0));
    let config = message(Message::Config(with_directors(&["d-1"])));
    control.handle_session_message(attempt, config, at(10_000));
    attach(&mut control, at(10_000));
    let told = reported(&actions(&mut control));
    let [told] = &told[..] else { panic!("{told:?}") };
    assert_eq!((told.home_director_uid.as_str(), told.second_director_uid.as_str()), ("d-1", ""));
    assert_eq!(told.reflexive_endpoints, [Endpoint { address: "198.51.100.1".into(), port: 7551 }]);
    // A NAT that gives another port every 15 seconds: every half minute is enough.
    let mut reports = 0;
    for n in 1..=20_u16 {
        bound(&mut control, DirectorId(0), 8_000 + n, at(10_000 + u64::from(n) * 15_000));
        reports += reported(&actions(&mut control)).len();
    }
    assert_eq!(reports, 10);
    // What the gateway maps comes first.
    control.handle_mapped(Some("203.0.113.1:7551".parse().unwrap()), at(400_000));
    let told = reported(&actions(&mut control));
    assert_eq!(told[0].reflexive_endpoints[0].address, "203.0.113.1");
    assert_eq!(control.reflexive_endpoints().len(), 2);
    // Nothing is new, so nothing is said.
    control.handle_timeout(at(500_000));
    assert_eq!(reported(&actions(&mut control)), []);
}

/// What directors saw of the host where it was before would lead its peers there.
#[test]
fn a_host_that_moves_takes_back_how_it_looked_from_outside_and_tells_the_new_at_once() {
    let before = vec!["192.168.1.5:7551".parse().unwrap()];
    let (mut control, attempt) = connected(Start { private_endpoints: before, ..start() }, at(0));
    let config = message(Message::Config(with_directors(&["d-1"])));
    control.handle_session_message(attempt, config, at(1_000));
    attach(&mut control, at(1_000));
    assert_eq!(reported(&actions(&mut control))[0].reflexive_endpoints.len(), 1);
    control.handle_private_endpoints(vec!["192.168.2.5:7551".parse().unwrap()], at(9_000));
    assert_eq!(control.reflexive_endpoints(), []);
    let registers = actions(&mut control).into_iter().find_map(|action| match action {
        Action::Register { attempt, request, .. } => Some((attempt, request.reachability.unwrap())),
        _ => None,
    });
    let (attempt, reachability) = registers.unwrap();
    assert_eq!(reachability.reflexive_endpoints, []);
    control.handle_registered(attempt, Ok(RegisterResponse::default()), at(9_010));
    control.handle_session_opened(attempt, at(9_020));
    actions(&mut control);
    bound(&mut control, DirectorId(0), 9_000, at(9_030));
    let told = reported(&actions(&mut control));
    assert_eq!(told[0].reflexive_endpoints[0].port, 9_000, "half a minute would be too long");
}

#[test]
fn peers_are_reached_through_directors_that_come_later() {
    let (mut control, attempt) = connected(start(), at(0));
    let introduced = message(Message::Introduction(Introduction { peer: Some(relayed(1, "d-2")) }));
    control.handle_session_message(attempt, introduced, at(1));
    assert!(matches!(&commands(&mut control)[..], [Command::AddPeer(peer)] if peer.relays.is_empty()));
    let config = message(Message::Config(with_directors(&["d-1", "d-2"])));
    control.handle_session_message(attempt, config, at(2));
    let did = commands(&mut control);
    let expected = [(DirectorId(1), Handle(1))];
    assert!(matches!(&did[..], [Command::UpdatePeer(peer)] if peer.relays == expected), "{did:?}");
    // And no longer through those that are gone.
    let config = message(Message::Config(with_directors(&["d-1"])));
    control.handle_session_message(attempt, config, at(3));
    let did = commands(&mut control);
    let is_gone = |command: &Command| matches!(command, Command::UpdatePeer(peer) if peer.relays.is_empty());
    assert!(did.iter().any(is_gone), "{did:?}");
}
