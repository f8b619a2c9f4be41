//! Registrars that are away, fail, fall silent, drain or refuse, and hosts that move.

use super::*;

#[test]
fn a_registrar_that_is_away_is_tried_ever_more_rarely() {
    let mut control = Control::new(start(), 1, at(0));
    let (mut now, mut last, mut tries) = (at(0), at(0), 0);
    while now < at(3_600_000) {
        let (attempt, _) = register(&mut control, now);
        tries += 1;
        control.handle_registered(attempt, Err(Failure::Unavailable("refused".into())), now);
        assert!(matches!(actions(&mut control)[..], [Action::Disconnect { .. }]));
        assert_eq!(control.registrar().last_error, "refused");
        last = now;
        now = control.poll_timeout().unwrap();
        assert!(now - last >= Duration::from_millis(250), "it spins");
    }
    assert!(now - last <= Duration::from_secs(30));
    assert!((120..300).contains(&tries), "{tries}");
}

#[test]
fn a_failing_registrar_is_left_for_the_next_at_once() {
    let registrars = vec!["r1:7500".to_owned(), "r2:7500".into(), "r3:7500".into()];
    let start = Start { config: Some(DeviceConfig { registrars, ..config() }), ..start() };
    let mut control = Control::new(start, 1, at(0));
    let mut seen = Vec::new();
    for _ in 0..3 {
        let now = control.poll_timeout().unwrap();
        let (attempt, registrar) = register(&mut control, now);
        seen.push(registrar);
        control.handle_registered(attempt, Err(Failure::Unavailable(String::new())), now);
        actions(&mut control);
    }
    seen.sort();
    assert_eq!(seen, ["r1:7500", "r2:7500", "r3:7500"]);
    assert!(control.poll_timeout().unwrap() <= at(1_000));
}

#[test]
fn silence_counts_as_failure() {
    let mut control = Control::new(start(), 1, at(0));
    let (attempt, _) = register(&mut control, at(0));
    control.handle_timeout(at(30_000));
    assert!(matches!(actions(&mut control)[..], [Action::Disconnect { .. }]));
    // The late answer is of no use.
    control.handle_registered(
        attempt,
        Ok(RegisterResponse { config: Some(config()), ..RegisterResponse::default() }),
        at(30_001),
    );
    assert_eq!(actions(&mut control), []);
}

#[test]
fn a_registrar_that_leaves_lookups_unanswered_is_left_for_another() {
    let two = DeviceConfig { registrars: vec!["r1:7500".into(), "r2:7500".into()], ..config() };
    let start = Start { config: Some(two.clone()), ..start() };
    let open = |control: &mut Control, now| {
        let (attempt, registrar) = register(control, now);
        control.handle_registered(
            attempt,
            Ok(RegisterResponse { config: Some(two.clone()), ..RegisterResponse::default() }),
            now,
        );
        control.handle_session_opened(attempt, now);
        (attempt, registrar)
    };
    let mut control = Control::new(start, 1, at(0));
    let (attempt, first) = open(&mut control, at(0));
    actions(&mut control);
    // What else it says shows that it lives.
    let (slow, _) = lookup(&mut control, &Event::LookupAddress(address(1)), at(100)).unwrap();
    control.handle_session_message(attempt, message(Message::Bookmark(Bookmark { revision: 1 })), at(900));
    control.handle_timeout(at(1_800));
    assert_eq!(actions(&mut control), []);
    // A slow one is given more time.
    control.handle_looked_up(slow, LookupResult::NotFound, at(1_850));
    actions(&mut control);
    let (quick, _) = lookup(&mut control, &Event::LookupAddress(address(2)), at(2_000)).unwrap();
    control.handle_timeout(at(6_500));
    assert_eq!(actions(&mut control), []);
    control.handle_looked_up(quick, LookupResult::NotFound, at(6_600));
    let (quick, _) = lookup(&mut control, &Event::LookupAddress(address(2)), at(20_000)).unwrap();
    control.handle_looked_up(quick, LookupResult::NotFound, at(20_001));
    actions(&mut control);
    // One that hangs is left, and the lookup goes to the next.
    let lost = lookup(&mut control, &Event::LookupAddress(address(3)), at(30_000)).unwrap();
    assert_eq!(control.poll_timeout(), Some(at(31_000)));
    control.handle_timeout(at(31_000));
    let did = actions(&mut control);
    let [Action::Disconnect { attempt: left }, Action::Register { attempt: next, registrar, .. }] = &did[..]
    else {
        panic!("{did:?}");
    };
    assert!(*left == attempt && *registrar != first, "{registrar}");
    let second = registrar.clone();
    control.handle_registered(
        *next,
        Ok(RegisterResponse { config: Some(two), ..RegisterResponse::default() }),
        at(31_010),
    );
    control.handle_session_opened(*next, at(31_020));
    let again = actions(&mut control).into_iter().find_map(|action| match action {
        Action::Lookup { id, by } => Some((id, by)),
        _ => None,
    });
    assert!(again.is_some_and(|(id, by)| id != lost.0 && by == lost.1), "{again:?}");
    // If that one hangs, too, it is given twice the time.
    control.handle_timeout(at(33_000));
    assert_eq!(actions(&mut control), []);
    control.handle_timeout(at(33_020));
    let did = actions(&mut control);
    let [Action::Disconnect { .. }, Action::Register { attempt, .. }] = did[..] else { panic!("{did:?}") };
    control.handle_registered(attempt, Ok(RegisterResponse::default()), at(33_030));
    control.handle_session_opened(attempt, at(33_040));
    actions(&mut control);
    // It does not go back to the one that it has just left only because this one would have fewer agents.
    let drain = |registrars: &[&String]| {
        let registrars = registrars.iter().map(|address| (*address).clone()).collect();
        message(Message::Drain(Drain { within: None, registrars }))
    };
    control.handle_session_message(attempt, drain(&[&second]), at(33_050));
    control.handle_timeout(at(33_050));
    assert_eq!(actions(&mut control), []);
    // But if this one stops, it does.
    control.handle_session_message(attempt, drain(&[]), at(33_060));
    control.handle_timeout(at(33_060));
    let did = actions(&mut control);
    assert!(
        matches!(&did[..], [Action::Disconnect { .. }, Action::Register { registrar, .. }] if *registrar == second)
    );
}

#[test]
fn the_only_registrar_is_not_left_for_its_silence() {
    let (mut control, _) = connected(start(), at(0));
    lookup(&mut control, &Event::LookupAddress(address(1)), at(0)).unwrap();
    assert_eq!(control.poll_timeout(), Some(at(5_000)));
    control.handle_timeout(at(4_999));
    assert_eq!(actions(&mut control), []);
}

#[test]
fn a_draining_registrar_is_left_within_its_time() {
    let (mut control, attempt) = connected(start(), at(0));
    let within = Some(pbjson_types::Duration { seconds: 10, nanos: 0 });
    control.handle_session_message(
        attempt,
        message(Message::Drain(Drain { within, registrars: vec![] })),
        at(0),
    );
    let leave = control.poll_timeout().unwrap();
    assert!(leave > at(0) && leave <= at(10_000));
    control.handle_timeout(leave);
    let did = actions(&mut control);
    assert!(
        matches!(did[..], [Action::Disconnect { attempt: a }, Action::Register { attempt: b, .. }] if a == attempt && b > a)
    );
}

#[test]
fn a_host_that_moves_connects_anew_at_once() {
    let endpoint = |text: &str| -> SocketAddr { text.parse().unwrap() };
    let (here, also, there) =
        (endpoint("192.0.2.1:7551"), endpoint("192.0.2.2:7551"), endpoint("198.51.100.1:7551"));
    let start = Start { private_endpoints: vec![here], ..start() };
    let (mut control, attempt) = connected(start, at(0));
    // One more address is no reason to give up a connection.
    control.handle_private_endpoints(vec![here, also], at(20_000));
    assert!(!actions(&mut control).iter().any(|a| matches!(a, Action::Disconnect { .. })));
    // Nor is having none for a while.
    control.handle_private_endpoints(vec![], at(21_000));
    assert!(!actions(&mut control).iter().any(|a| matches!(a, Action::Disconnect { .. })));
    control.handle_private_endpoints(vec![here], at(22_000));
    assert!(!actions(&mut control).iter().any(|a| matches!(a, Action::Disconnect { .. })));
    control.handle_private_endpoints(vec![], at(29_000));
    actions(&mut control);
    // The one that it may come from is gone: it would seem alive until its keepalives fail.
    control.handle_private_endpoints(vec![there], at(30_000));
    let did = actions(&mut control);
    let [Action::Disconnect { attempt: old }, Action::Register { attempt: new, request, .. }] = &did[..]
    else {
        panic!("{did:?}");
    };
    assert!(*old == attempt && *new > attempt);
    assert_eq!(request.private_endpoints.len(), 1);
    assert_eq!(request.private_endpoints[0].address, "198.51.100.1");
    assert!(!control.is_connected());
    // Whoever waits for long because nothing could be reached tries again from there.
    let (mut new, mut now) = (*new, at(30_000));
    for _ in 0..12 {
        control.handle_registered(new, Err(Failure::Unavailable("no route".into())), now);
        actions(&mut control);
        now = control.poll_timeout().unwrap();
        new = register(&mut control, now).0;
    }
    control.handle_registered(new, Err(Failure::Unavailable("no route".into())), now);
    assert!(control.poll_timeout().unwrap() > now + Duration::from_secs(5));
    control.handle_private_endpoints(vec![here], now);
    assert!(control.poll_timeout().unwrap() < now + Duration::from_secs(1));
}

#[test]
fn what_a_registrar_could_not_keep_is_told_again() {
    let endpoint: SocketAddr = "192.0.2.1:7551".parse().unwrap();
    for unsaved in [false, true] {
        let start = Start { private_endpoints: vec![endpoint], ..start() };
        let mut control = Control::new(start, 7, at(0));
        let (attempt, _) = register(&mut control, at(0));
        let answer = RegisterResponse { config: Some(config()), unsaved, ..RegisterResponse::default() };
        control.handle_registered(attempt, Ok(answer), at(0));
        control.handle_session_opened(attempt, at(0));
        let told = actions(&mut control).into_iter().find_map(|action| match action {
            Action::Send(SessionRequest {
                message: Some(session_request::Message::EndpointsChanged(changed)),
            }) => Some(changed.private_endpoints),
            _ => None,
        });
        assert_eq!(told.map(|endpoints| endpoints.len()), unsaved.then_some(1));
    }
}

#[test]
fn a_refused_device_lets_its_peers_go_and_asks_rarely() {
    let start = Start { config: Some(config()), peers: vec![peer(1, 1)], ..start() };
    let (mut control, attempt) = connected(start, at(0));
    let refused = || Failure::Refused("revoked".into());
    control.handle_session_closed(attempt, refused(), at(1));
    // One registrar may be behind; a second refusal counts.
    assert!(!control.is_refused());
    assert_eq!(control.peers().count(), 1);
    let now = control.poll_timeout().unwrap();
    let (attempt, _) = register(&mut control, now);
    control.handle_registered(attempt, Err(refused()), now);
    assert!(control.is_refused());
    assert!(commands(&mut control).contains(&Command::RemovePeer([1; 32])));
    control.handle_datapath(&Event::LookupAddress(address(1)), now);
    assert_eq!(commands(&mut control), [Command::NoSuchDevice(address(1))]);
    control.handle_timeout(now + Duration::from_secs(3));
    actions(&mut control);
    assert!(control.poll_timeout().unwrap() - now >= Duration::from_secs(30));
    // And comes back when it is let in again.
    let later = control.poll_timeout().unwrap();
    let (attempt, _) = register(&mut control, later);
    control.handle_registered(
        attempt,
        Ok(RegisterResponse { config: Some(config()), ..RegisterResponse::default() }),
        later,
    );
    control.handle_session_opened(attempt, later);
    assert!(!control.is_refused());
}

#[test]
fn losing_the_registrar_keeps_the_peers() {
    let start = Start { config: Some(config()), peers: vec![peer(1, 1)], ..start() };
    let (mut control, attempt) = connected(start, at(0));
    control.handle_session_closed(attempt, Failure::Unavailable("gone".into()), at(1));
    assert_eq!(commands(&mut control), []);
    assert_eq!(control.peers().count(), 1);
}
