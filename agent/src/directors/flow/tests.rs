//! Flows against directors that are played here, over a network that delays, loses, blocks and rebinds.

use std::net::IpAddr;

use muster_common::frame::{Flags, Key, parse, unbound, unreachable};
use proptest::prelude::*;

use super::*;

mod world;

use self::world::*;

#[test]
fn bound_in_one_round_trip_and_kept_open() {
    let mut world = World::new(&[FIRST]);
    world.run_for(39);
    assert_eq!(world.link, None);
    world.run_for(1);
    let link = DirectorLink { session: 1, hop: Hop::Udp(address(FIRST)), is_draining: false };
    assert_eq!(world.link, Some(link));
    let (reflexive, round_trip) = (world.outside, Duration::from_millis(40));
    let bound = FlowEvent::Bound { id: ID, reflexive, round_trip, draining: false };
    assert_eq!(world.events, std::slice::from_ref(&bound));
    world.run_for(60_000);
    assert_eq!(world.hellos, [at(0), at(15_040), at(30_080), at(45_120)]);
    assert_eq!(world.events, vec![bound; 4]);
}

#[test]
fn the_first_address_that_answers_is_used() {
    let mut world = World::new(&[FIRST, SECOND]);
    world.blocked = vec![address(FIRST)];
    world.run_for(1_000);
    assert_eq!((world.udp(), world.hellos.len()), (Some(address(SECOND)), 2));
}

#[test]
fn a_lost_hello_is_repeated() {
    for lost in 0..3 {
        let mut world = World::new(&[FIRST]);
        // The first hello is on its way already.
        world.to_director.clear();
        world.losses = (1 << lost) - 1;
        world.run_for(1_100);
        assert_eq!(world.udp(), Some(address(FIRST)), "{lost} more lost");
        assert!(world.events.iter().all(|event| *event != FlowEvent::Unanswered(ID)));
    }
}

#[test]
fn without_an_answer_it_is_told_once_and_tried_again() {
    let mut world = World::new(&[FIRST]);
    world.to_director.clear();
    world.blocked = vec![address(FIRST)];
    world.run_for(1_999);
    assert!(world.events.is_empty());
    world.run_for(1);
    assert_eq!(world.events, [FlowEvent::Unanswered(ID)]);
    world.run_for(600_000);
    assert_eq!(world.events.len(), 1);
    assert!((60..100).contains(&world.hellos.len()), "{} hellos in ten minutes", world.hellos.len());
    world.blocked.clear();
    world.run_for(32_100);
    assert_eq!(world.udp(), Some(address(FIRST)));
    // It is told again when it is lost again.
    world.blocked = vec![address(FIRST)];
    world.run_for(15_000 + 3_000);
    assert_eq!((world.events.last(), world.link), (Some(&FlowEvent::Unanswered(ID)), None));
}

#[test]
fn without_addresses_there_is_no_udp() {
    let mut world = World::new(&[]);
    world.run_for(60_000);
    assert_eq!((world.events, world.hellos.len()), (vec![FlowEvent::Unanswered(ID)], 0));
}

#[test]
fn frames_go_over_the_stream_while_udp_does_not_work() {
    let mut world = World::new(&[FIRST]);
    world.to_director.clear();
    world.blocked = vec![address(FIRST)];
    world.run_for(3_000);
    world.flows.stream(ID, true, world.now);
    world.drain();
    let stream = DirectorLink { session: 1, hop: Hop::Stream(ID), is_draining: false };
    assert_eq!(world.link, Some(stream));
    world.blocked.clear();
    world.run_for(32_000);
    assert_eq!(world.udp(), Some(address(FIRST)));
    world.blocked = vec![address(FIRST)];
    world.run_for(20_000);
    assert_eq!(world.link, Some(stream));
    world.flows.stream(ID, false, world.now);
    world.drain();
    assert_eq!(world.link, None);
}

#[test]
fn a_rebinding_nat_costs_two_round_trips() {
    for other in ["198.51.100.1:40001", "203.0.113.7:40000"] {
        let mut world = World::new(&[FIRST, SECOND]);
        world.run_for(100);
        world.outside = address(other);
        let (start, hellos) = (world.now, world.hellos.len());
        world.send_data();
        // The frame and its refusal, and a hello; from another address of the Internet another hello.
        let round_trips = if world.outside.ip() == world.director.attached_from { 2 } else { 3 };
        world.run_for(round_trips * 40 - 1);
        assert_ne!(world.director.bound, world.events.last().and_then(reflexive), "not yet");
        world.run_for(1);
        assert_eq!(world.director.bound, Some(world.outside));
        assert_eq!(world.events.last().and_then(reflexive), Some(world.outside));
        assert_eq!(world.udp(), Some(address(FIRST)));
        assert_eq!((world.now - start).as_millis(), u128::from(round_trips * 40));
        assert_eq!(world.hellos.len() - hellos, round_trips as usize - 1);
    }
}

fn reflexive(event: &FlowEvent) -> Option<SocketAddr> {
    match event {
        FlowEvent::Bound { reflexive, .. } => Some(*reflexive),
        _ => None,
    }
}

#[test]
fn without_traffic_the_next_hello_notices_a_rebinding() {
    let mut world = World::new(&[FIRST]);
    world.run_for(100);
    world.outside = address("203.0.113.7:40000");
    world.run_for(15_100);
    assert_eq!(world.director.bound, Some(world.outside));
}

#[test]
fn a_host_that_moves_says_so_at_once() {
    let mut world = World::new(&[FIRST, SECOND]);
    world.run_for(100);
    world.outside = address("203.0.113.7:40000");
    world.flows.host_moved(world.now);
    world.drain();
    world.run_for(80);
    assert_eq!(world.director.bound, Some(world.outside));
    // Into a network without IPv4.
    world.blocked = vec![address(FIRST)];
    world.outside = address("[2001:db8:7::7]:40000");
    world.flows.host_moved(world.now);
    world.drain();
    world.run_for(250 + 80);
    assert_eq!((world.director.bound, world.udp()), (Some(world.outside), Some(address(SECOND))));
}

#[test]
fn an_answer_from_before_the_move_counts_for_nothing() {
    let mut world = World::new(&[FIRST]);
    world.run_for(15_040 + 39);
    let (at, from, octets) = world.to_agent.pop_front().expect("the answer to the second hello");
    world.flows.host_moved(world.now);
    assert_eq!(world.flows.handle(from, &octets, at), Incoming::Dropped);
}

#[test]
fn a_session_that_the_director_has_lost_is_dead_soon() {
    for is_idle in [true, false] {
        let mut world = World::new(&[FIRST]);
        world.run_for(100);
        world.restart();
        let until = world.now + Duration::from_millis(if is_idle { 16_000 } else { 800 });
        while world.now < until && !world.events.contains(&FlowEvent::Dead(ID)) {
            if !is_idle {
                world.send_data();
            }
            world.run_for(10);
        }
        assert!(world.events.contains(&FlowEvent::Dead(ID)), "idle: {is_idle}");
        assert_eq!((world.link, world.flows.poll_timeout()), (None, None));
        let before = world.hellos.len();
        world.flows.host_moved(world.now);
        world.run_for(100_000);
        assert_eq!(world.hellos.len(), before, "only attaching again helps");
        world.attach(&[FIRST]);
        world.run_for(40);
        assert_eq!(world.udp(), Some(address(FIRST)));
    }
}

#[test]
fn refusals_of_what_was_under_way_do_not_end_a_session() {
    let mut world = World::new(&[FIRST]);
    world.delay = Duration::from_millis(400);
    world.run_for(1_000);
    world.outside = address("203.0.113.7:40000");
    for _ in 0..300 {
        world.send_data();
        world.run_for(10);
    }
    assert!(!world.events.contains(&FlowEvent::Dead(ID)));
    assert_eq!(world.director.bound, Some(world.outside));
}

#[test]
fn the_old_link_is_used_until_the_new_session_is_bound() {
    let mut world = World::new(&[FIRST]);
    world.run_for(100);
    world.attach(&[FIRST]);
    assert_eq!(world.link.map(|link| link.session), Some(1));
    let old = DataHeader { session: 1, handle: Handle(7) };
    world.run_for(40);
    assert_eq!(world.link.map(|link| link.session), Some(2));
    let data = Incoming::Data(Endpoint::Relay { director: ID, handle: Handle(7) });
    assert_eq!(world.flows.handle(address(FIRST), &old.octets(), world.now), data);
    // One that never gets bound loses the link.
    world.blocked = vec![address(FIRST)];
    world.attach(&[FIRST]);
    world.to_director.clear();
    world.run_for(2_000);
    assert_eq!((world.link, world.events.last()), (None, Some(&FlowEvent::Unanswered(ID))));
}

#[test]
fn a_draining_director_is_said_to_be() {
    let mut world = World::new(&[FIRST]);
    world.run_for(100);
    world.director.is_draining = true;
    world.run_for(15_100);
    assert!(world.link.is_some_and(|link| link.is_draining));
    assert!(matches!(world.events.last(), Some(FlowEvent::Bound { draining: true, .. })));
}

#[test]
fn closing_takes_the_link() {
    let mut world = World::new(&[FIRST]);
    world.run_for(100);
    world.flows.detach(ID);
    world.flows.detach(ID);
    world.drain();
    assert_eq!((world.link, world.flows.poll_timeout()), (None, None));
}

#[test]
fn frames_are_of_directors_alone() {
    let mut world = World::new(&[FIRST]);
    world.run_for(100);
    let (from, now) = (address(FIRST), world.now);
    let header = DataHeader { session: 1, handle: Handle(7) };
    let data = Incoming::Data(Endpoint::Relay { director: ID, handle: Handle(7) });
    assert_eq!(world.flows.handle(from, &header.octets(), now), data);
    assert_eq!(world.flows.handle_frame(ID, &header.octets()), data);
    for (from, session) in [(address("192.0.2.9:7501"), 1), (from, 2)] {
        let header = DataHeader { session, handle: Handle(7) };
        for datagram in [header.octets(), unbound(session), unreachable(header)] {
            assert_eq!(world.flows.handle(from, &datagram, now), Incoming::Dropped);
        }
    }
    assert_eq!(world.flows.handle_frame(DirectorId(4), &header.octets()), Incoming::Dropped);
    assert_eq!(world.flows.poll_transmit(), None);
    assert_eq!(world.flows.handle(from, &unreachable(header), now), Incoming::Done);
    assert_eq!(world.flows.poll_event(), Some(FlowEvent::NoSuchDevice(ID, Handle(7))));
}

#[test]
fn forged_and_repeated_welcomes_change_nothing() {
    let mut world = World::new(&[FIRST]);
    let mut sent = world.to_director[0].3.clone();
    let Some(Frame::Hello(hello)) = parse(&sent) else { panic!("a hello") };
    let (from, flags) = (address(FIRST), Flags { is_bound: true, is_draining: false });
    let forged = frame::welcome(&Key::new(&[2; 32]), &hello, world.outside, 0, flags);
    let good = frame::welcome(&Key::new(&[1; 32]), &hello, world.outside, 0, flags);
    let elsewhere = address("192.0.2.9:7501");
    assert_eq!(world.flows.handle(from, &forged, world.now), Incoming::Dropped);
    assert_eq!(world.flows.handle(elsewhere, &good, world.now), Incoming::Dropped);
    assert_eq!(world.flows.poll_event(), None);
    assert_eq!(world.flows.handle(from, &good, world.now), Incoming::Done);
    assert!(world.flows.poll_event().is_some());
    while world.flows.poll_event().is_some() {}
    assert_eq!(world.flows.handle(from, &good, world.now), Incoming::Dropped);
    // Of a hello that was never sent.
    sent[15] = 9;
    let Some(Frame::Hello(hello)) = parse(&sent) else { panic!("a hello") };
    let never = frame::welcome(&Key::new(&[1; 32]), &hello, world.outside, 0, flags);
    assert_eq!(world.flows.handle(from, &never, world.now), Incoming::Dropped);
    assert_eq!(world.flows.poll_event(), None);
}

#[test]
fn there_are_so_many_flows_and_no_more() {
    let mut flows = Flows::new();
    for id in 0..20 {
        flows.attach(DirectorId(id), attachment(u32::from(id), &[FIRST]), at(0));
    }
    assert_eq!(std::iter::from_fn(|| flows.poll_transmit()).count(), FLOWS);
}

#[test]
fn secrets_are_not_shown() {
    let shown = format!("{:?}", attachment(77, &[FIRST]));
    assert!(shown.contains(FIRST) && !shown.contains("77"), "{shown}");
}

#[derive(Clone, Debug)]
enum Step {
    Run(u64),
    Data,
    Rebind(u8),
    Block(bool, bool),
    Lose(u64),
    Delay(u64),
    Restart,
    Drain,
    Move,
    Stream(bool),
    Attach,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1u64..40_000).prop_map(Step::Run),
        4 => (1u64..300).prop_map(Step::Run),
        4 => Just(Step::Data),
        2 => any::<u8>().prop_map(Step::Rebind),
        1 => any::<(bool, bool)>().prop_map(|(a, b)| Step::Block(a, b)),
        1 => any::<u64>().prop_map(Step::Lose),
        1 => (0u64..900).prop_map(Step::Delay),
        1 => Just(Step::Restart),
        1 => Just(Step::Drain),
        1 => Just(Step::Move),
        1 => any::<bool>().prop_map(Step::Stream),
        1 => Just(Step::Attach),
    ]
}

proptest! {
    /// Whatever happens, a flow works again soon after the network does, and is not noisy meanwhile.
    #[test]
    fn flows_heal(steps in prop::collection::vec(step(), 0..60)) {
        let endpoints = [FIRST, SECOND];
        let mut world = World::new(&endpoints);
        let mut calls = 0;
        for step in steps {
            match step {
                Step::Run(milliseconds) => world.run_for(milliseconds),
                Step::Data => world.send_data(),
                Step::Rebind(n) => {
                    world.outside = SocketAddr::new([203, 0, 113, n % 3].into(), 40_000 + u16::from(n / 3));
                }
                Step::Block(first, second) => {
                    world.blocked.clear();
                    world.blocked.extend(first.then(|| address(FIRST)));
                    world.blocked.extend(second.then(|| address(SECOND)));
                }
                Step::Lose(losses) => world.losses = losses,
                // Nothing overtakes.
                Step::Delay(milliseconds) => {
                    world.run_for(900);
                    world.delay = Duration::from_millis(milliseconds);
                }
                Step::Restart => world.restart(),
                Step::Drain => world.director.is_draining = true,
                Step::Move => {
                    calls += 1;
                    world.flows.host_moved(world.now);
                }
                Step::Stream(open) => world.flows.stream(ID, open, world.now),
                Step::Attach => {
                    calls += 1;
                    world.attach(&endpoints);
                }
            }
            world.drain();
        }
        // A round has four hellos and at most three more for proofs; rounds begin at most every half a second, but on demand.
        let seconds = (world.now - at(0)).as_secs() as usize + 1;
        prop_assert!(world.hellos.len() <= (calls + 1) * 7 + 14 * seconds);
        prop_assert!(world.flows.transmits.is_empty() && world.flows.events.is_empty());

        world.blocked.clear();
        world.losses = 0;
        world.delay = Duration::from_millis(20);
        // What is still under way.
        world.run_for(2_000);
        let healed = world.now;
        while world.now < healed + Duration::from_secs(40) {
            if std::mem::take(&mut world.events).contains(&FlowEvent::Dead(ID)) {
                world.attach(&endpoints);
            }
            world.send_data();
            world.run_for(100);
        }
        if world.director.session != Some(world.attachments) {
            prop_assert!(world.flows.flows[0].schedule == Schedule::Dead);
            world.attach(&endpoints);
            world.run_for(100);
        }
        prop_assert!(world.udp().is_some(), "link: {:?}", world.link);
        prop_assert_eq!(world.director.bound, Some(world.outside));
    }

    #[test]
    fn any_octets(datagram in prop::collection::vec(any::<u8>(), 0..80), kind in 5u8..10, fit: bool) {
        let mut world = World::new(&[FIRST]);
        world.run_for(100);
        let mut datagram = datagram;
        if let [first, version, ..] = datagram.as_mut_slice() {
            (*first, *version) = (kind, u8::from(matches!(kind, 6 | 7)));
        }
        if fit && let Some(octets) = datagram.get_mut(2..8) {
            octets.copy_from_slice(&[0, 0, 0, 0, 0, 1]);
        }
        let before = world.link;
        world.flows.handle(address(FIRST), &datagram, world.now);
        world.flows.handle_frame(ID, &datagram);
        while world.flows.poll_transmit().is_some() {}
        world.drain();
        prop_assert_eq!(world.link, before);
    }
}
