//! Hosts without an agent and subnets: those behind peers, and this device's own.

use ipnet::IpNet;
use muster_proto::registration::ProxiedDevice;

use super::*;

const SUBNET: &str = "192.168.7.0/24";

fn inside() -> IpAddr {
    "192.168.7.9".parse().unwrap()
}

fn with_subnet() -> DeviceConfig {
    let mut config = config();
    config.site_routes.push(SUBNET.into());
    config
}

/// A core that knows of the subnet, with an open session.
fn connected_with(start: Start, config: DeviceConfig, now: Instant) -> (Control, u64) {
    let mut control = Control::new(start, 7, now);
    let (attempt, _) = register(&mut control, now);
    control.handle_registered(
        attempt,
        Ok(RegisterResponse { config: Some(config), ..RegisterResponse::default() }),
        now,
    );
    control.handle_session_opened(attempt, now);
    actions(&mut control);
    (control, attempt)
}

fn carrier(n: u8, revision: u64) -> Peer {
    Peer { subnets: vec![SUBNET.into()], ..peer(n, revision) }
}

fn subnets(control: &Control, uid: &str) -> Vec<IpNet> {
    control.peers().find(|info| info.message.device_uid == uid).unwrap().config.subnets.clone()
}

#[test]
fn an_address_in_a_subnet_is_looked_up_and_whoever_carries_it_is_told_to_the_data_plane() {
    let (mut control, _) = connected_with(start(), with_subnet(), at(0));
    let (id, by) = lookup(&mut control, &Event::LookupAddress(inside()), at(1)).unwrap();
    assert_eq!(by, LookupBy::Address(inside()));
    control.handle_looked_up(id, LookupResult::Found(Box::new(carrier(1, 5))), at(2));
    let told = commands(&mut control);
    assert!(
        matches!(&told[..], [Command::AddPeer(peer)] if peer.subnets == [SUBNET.parse().unwrap()]),
        "{told:?}"
    );
    // Held, and so answered at once.
    assert_eq!(lookup(&mut control, &Event::LookupAddress("192.168.7.10".parse().unwrap()), at(3)), None);

    // The registrar takes it back: the peer stays.
    control.handle_resolved(&[inside()], at(4));
    assert_eq!(actions(&mut control), [], "it is held");
    control.not_found(LookupBy::Address(inside()), true, at(5));
    let told = commands(&mut control);
    assert!(matches!(&told[0], Command::UpdatePeer(peer) if peer.subnets.is_empty()), "{told:?}");
    assert_eq!(told[1..], [Command::NoSuchDevice(inside())]);
    assert!(control.held_peers().2[0].subnets.is_empty());
    // What no subnet and no pool has is asked for by nobody.
    let elsewhere = Event::LookupAddress("192.168.8.1".parse().unwrap());
    assert_eq!(lookup(&mut control, &elsewhere, at(6)), None);
}

#[test]
fn a_subnet_moves_from_peer_to_peer_and_both_stay() {
    let (mut control, attempt) = connected_with(start(), with_subnet(), at(0));
    for peer in [carrier(1, 5), peer(2, 5)] {
        control.handle_session_message(
            attempt,
            message(Message::Introduction(Introduction { peer: Some(peer) })),
            at(1),
        );
    }
    actions(&mut control);
    let changed = PeerChanged { peer: Some(carrier(2, 6)) };
    control.handle_session_message(attempt, message(Message::PeerChanged(changed)), at(2));
    let told = commands(&mut control);
    assert!(
        matches!(&told[..], [Command::UpdatePeer(first), Command::UpdatePeer(second)]
            if first.subnets.is_empty() && second.subnets == [SUBNET.parse().unwrap()]),
        "{told:?}"
    );
    assert_eq!((subnets(&control, "d-1"), subnets(&control, "d-2").len()), (vec![], 1));
    // From disk it comes back the same.
    let start = Start { config: Some(with_subnet()), peers: control.held_peers().2, ..start() };
    let again = Control::new(start, 1, at(0));
    again.check();
    assert_eq!((subnets(&again, "d-1").len(), subnets(&again, "d-2").len()), (0, 1));
}

#[test]
fn a_peer_speaks_for_others_and_one_that_moves_takes_nobody_along() {
    let (mut control, attempt) = connected(start(), at(0));
    let printer = "100.64.3.3".to_owned();
    let mut first = peer(1, 5);
    first.virtual_addresses.extend((0..250u8).map(|n| format!("100.64.9.{n}")).chain([printer.clone()]));
    let mut second = peer(2, 5);
    for peer in [&first, &second] {
        let introduction = Introduction { peer: Some(peer.clone()) };
        control.handle_session_message(attempt, message(Message::Introduction(introduction)), at(1));
    }
    let held: Vec<usize> = control.peers().map(|info| info.config.virtual_addresses.len()).collect();
    assert_eq!(held, [252, 1]);
    actions(&mut control);
    second.virtual_addresses.push(printer);
    second.revision = 6;
    let changed = PeerChanged { peer: Some(second) };
    control.handle_session_message(attempt, message(Message::PeerChanged(changed)), at(2));
    let told = commands(&mut control);
    assert!(matches!(&told[..], [Command::UpdatePeer(_), Command::UpdatePeer(_)]), "{told:?}");
    let held: Vec<usize> = control.peers().map(|info| info.config.virtual_addresses.len()).collect();
    assert_eq!(held, [251, 2]);

    let many = Peer {
        virtual_addresses: (0..513).map(|n| format!("100.65.{}.{}", n / 256, n % 256)).collect(),
        ..peer(3, 7)
    };
    let introduction = Introduction { peer: Some(many) };
    control.handle_session_message(attempt, message(Message::Introduction(introduction)), at(3));
    assert_eq!(control.peers().count(), 2);
}

#[test]
fn a_subnet_that_takes_in_a_pool_is_ignored() {
    let (mut control, attempt) = connected(start(), at(0));
    let greedy = ["100.64.0.0/10", "100.64.2.0/24", "10.0.0.0/8", "0.0.0.0/0", "x"].map(str::to_owned);
    let introduction = Introduction { peer: Some(Peer { subnets: greedy.into(), ..peer(1, 5) }) };
    control.handle_session_message(attempt, message(Message::Introduction(introduction)), at(1));
    assert_eq!(subnets(&control, "d-1"), ["10.0.0.0/8".parse().unwrap()]);
}

#[test]
fn what_this_device_carries_is_its_own() {
    let offer =
        Offer { hosts: vec![("printer".into(), inside())], subnets: vec!["192.168.9.0/24".parse().unwrap()] };
    let mut control = Control::new(Start { offer, ..start() }, 7, at(0));
    control.handle_timeout(at(0));
    let request = actions(&mut control).into_iter().find_map(|action| match action {
        Action::Register { request, attempt, .. } => Some((request, attempt)),
        _ => None,
    });
    let (request, attempt) = request.unwrap();
    let [printer] = &request.proxied_hosts[..] else { panic!("{request:?}") };
    assert_eq!((printer.name.as_str(), printer.lan_address.as_str()), ("printer", "192.168.7.9"));
    assert_eq!(request.offered_subnets, ["192.168.9.0/24"]);

    let mut config = with_subnet();
    config.site_routes.push("192.168.9.0/24".into());
    config.subnets = vec!["192.168.9.0/24".into()];
    config.active_subnets = config.subnets.clone();
    config.proxied_devices = vec![ProxiedDevice {
        name: "printer".into(),
        lan_address: "192.168.7.9".into(),
        virtual_ipv4: "100.64.3.3".into(),
        ..ProxiedDevice::default()
    }];
    control.handle_registered(
        attempt,
        Ok(RegisterResponse { config: Some(config), ..RegisterResponse::default() }),
        at(1),
    );
    control.handle_session_opened(attempt, at(1));
    let routes = |settings: &Settings| settings.routes.iter().map(ToString::to_string).collect::<Vec<_>>();
    let settings = control.settings().unwrap();
    assert_eq!(routes(settings), ["100.64.0.0/11", SUBNET]);
    assert_eq!(settings.proxied_addresses(), ["100.64.3.3".parse::<IpAddr>().unwrap()]);
    actions(&mut control);
    for own in ["100.64.3.3", "192.168.9.77"] {
        let own = own.parse().unwrap();
        control.handle_datapath(&Event::LookupAddress(own), at(2));
        assert_eq!(actions(&mut control), [Action::Datapath(Command::NoSuchDevice(own))]);
    }

    // The host comes to be in the other subnet, and leaves it again.
    let (here, elsewhere) = ("192.168.7.77:7551".parse().unwrap(), "10.0.0.7:7551".parse().unwrap());
    for (endpoint, expected) in [(here, &["100.64.0.0/11"][..]), (elsewhere, &["100.64.0.0/11", SUBNET])] {
        control.handle_private_endpoints(vec![endpoint], at(3));
        let configured = actions(&mut control).into_iter().find_map(|action| match action {
            Action::Configure(settings) => Some(routes(&settings)),
            _ => None,
        });
        assert_eq!(configured.unwrap(), expected);
    }
}

fn endpoints(control: &Control) -> Vec<String> {
    control.peers().flat_map(|info| info.config.endpoints.iter().map(ToString::to_string)).collect()
}

/// The carrier's own address in the subnet would be reached through the tunnel to it.
#[test]
fn no_peer_is_reached_inside_of_a_subnet_that_is_routed_into_the_tunnel() {
    let (mut control, attempt) = connected(start(), at(0));
    let inner = Endpoint { address: "192.168.7.1".into(), port: 7551 };
    let mut gate = carrier(1, 5);
    gate.private_endpoints.push(inner.clone());
    let introduction = Introduction { peer: Some(gate) };
    control.handle_session_message(attempt, message(Message::Introduction(introduction)), at(1));
    assert_eq!(endpoints(&control), ["192.0.2.1:7551", "192.168.7.1:7551"], "nothing is routed there yet");
    actions(&mut control);
    control.handle_session_message(attempt, message(Message::Config(with_subnet())), at(2));
    let told = commands(&mut control);
    assert!(
        matches!(&told[..], [Command::UpdatePeer(peer)] if peer.endpoints == ["192.0.2.1:7551".parse().unwrap()]),
        "{told:?}"
    );
    // Nor one that is told of later, or from disk.
    let other = Peer { reflexive_endpoints: vec![inner], ..peer(2, 6) };
    let introduction = Introduction { peer: Some(other) };
    control.handle_session_message(attempt, message(Message::Introduction(introduction)), at(3));
    assert_eq!(endpoints(&control), ["192.0.2.1:7551", "192.0.2.2:7551"]);
    let start = Start { config: Some(with_subnet()), peers: control.held_peers().2, ..start() };
    assert_eq!(endpoints(&Control::new(start, 1, at(0))), ["192.0.2.1:7551", "192.0.2.2:7551"]);
    // Once this host is there itself, that is the way.
    control.handle_private_endpoints(vec!["192.168.7.77:7551".parse().unwrap()], at(4));
    assert_eq!(endpoints(&control).len(), 4);
}

#[test]
fn what_the_host_resolves_names_with_stays_outside() {
    let (mut control, _) = connected_with(start(), with_subnet(), at(0));
    control.handle_resolvers(vec!["10.0.0.53".parse().unwrap(), inside()], at(1));
    let settings = control.settings().unwrap();
    assert_eq!((settings.routes.len(), settings.left_out.len()), (1, 1));
    control.handle_resolvers(vec!["10.0.0.53".parse().unwrap()], at(2));
    let settings = control.settings().unwrap();
    assert_eq!((settings.routes.len(), settings.left_out.len()), (2, 0));
}

fn is_alive(action: &Action) -> bool {
    let alive = session_request::Message::Alive(muster_proto::registration::Alive {});
    matches!(action, Action::Send(request) if request.message.as_ref() == Some(&alive))
}

#[test]
fn a_device_that_may_carry_says_that_it_is_alive() {
    let offer = Offer { subnets: vec![SUBNET.parse().unwrap()], ..Offer::default() };
    let config = DeviceConfig { subnets: vec![SUBNET.into()], ..config() };
    let (mut control, _) = connected_with(Start { offer, ..start() }, config, at(0));
    for second in 1..4 {
        let due = at(2000 * second);
        assert_eq!(control.poll_timeout(), Some(due));
        control.handle_timeout(at(2000 * second - 1));
        assert!(!actions(&mut control).iter().any(is_alive));
        control.handle_timeout(due);
        assert!(actions(&mut control).iter().any(is_alive));
    }
    // One that may not carry anything sleeps.
    let (mut control, _) = connected(start(), at(0));
    control.handle_timeout(at(60_000));
    assert!(!actions(&mut control).iter().any(is_alive));
}
