//! Who may attach, for how long, and what an attachment that takes another's place does to frames.

use super::*;

#[test]
fn sessions_and_keys_differ() {
    let mut bench = Bench::new(Limits::default());
    let (a, b) = (bench.attach(1, "192.0.2.1"), bench.attach(2, "192.0.2.1"));
    assert_ne!(a.session, b.session);
    assert_eq!(a.handle, Handle(0x0101_0101_0101_0101));
    let hello = frame::hello(&a.key, b.session, 1, 0);
    assert_eq!(bench.relay.handle_hello(B.parse().unwrap(), &hello, bench.now), None);
    assert_eq!(bench.relay.devices(), [uid(1), uid(2)]);
    assert_eq!(bench.relay.device_of(b.session), Some(uid(2)));
}

#[test]
fn no_more_devices_than_it_takes() {
    let mut bench = Bench::new(Limits { devices: 2, ..Limits::default() });
    let first = bench.attach(1, "192.0.2.1");
    bench.attach(2, "192.0.2.1");
    assert_eq!(bench.try_attach(3, "192.0.2.1").err(), Some(AttachError::Full));
    bench.attach(2, "192.0.2.1");
    bench.relay.detach(first.session, bench.now);
    bench.pass(9);
    assert_eq!(bench.try_attach(3, "192.0.2.1").err(), Some(AttachError::Full));
    bench.pass(1);
    bench.attach(3, "192.0.2.1");
}

#[test]
fn two_devices_with_one_handle() {
    let mut bench = Bench::new(Limits::default());
    let mut other = *uid(1).as_bytes();
    other[15] = 9;
    let other = Uuid::from_bytes(other);
    let first = bench.bound(1, A);
    let again = bench.relay.attach(other, [192, 0, 2, 1].into(), bench.now);
    assert_eq!(again.err(), Some(AttachError::HandleTaken));
    bench.relay.refuse(other, bench.now);
    let b = bench.bound(2, B);
    assert_eq!(bench.reaches((&b, B), &first), Some(udp(A)), "the other is refused, not this one");
}

#[test]
fn a_drained_relay_goes_on_for_those_who_are_there() {
    let mut bench = Bench::new(Limits::default());
    let (mut a, b) = (bench.bound(1, A), bench.bound(2, B));
    bench.relay.drain();
    assert_eq!(bench.try_attach(3, "192.0.2.1").err(), Some(AttachError::Draining));
    assert_eq!(bench.reaches((&b, B), &a), Some(udp(A)));
    a.counter += 1;
    let hello = frame::hello(&a.key, a.session, a.counter, 0);
    let answer = bench.relay.handle_hello(A.parse().unwrap(), &hello, bench.now).unwrap();
    let Some(Frame::Welcome(welcome)) = frame::parse(&answer) else { panic!() };
    assert!(welcome.flags().is_bound && welcome.flags().is_draining);
    assert!(bench.relay.snapshot().is_draining);
}

#[test]
fn refused_at_once_and_from_then_on() {
    let mut bench = Bench::new(Limits::default());
    let (a, b) = (bench.bound(1, A), bench.bound(2, B));
    let second = bench.attach(1, "192.0.2.1");
    bench.relay.refuse(a.uid, bench.now);
    let mut ended = bench.relay.take_ended();
    ended.sort_unstable();
    let mut expected = [a.session, second.session];
    expected.sort_unstable();
    assert_eq!(ended, expected);
    assert!(bench.relay.take_ended().is_empty());
    assert_eq!(bench.reaches((&b, B), &a), None);
    assert_eq!(bench.drops(), [(Dropped::Unreachable, 1)]);
    assert_eq!(bench.reaches((&a, A), &b), None);
    assert_eq!(bench.drops(), [(Dropped::UnknownSession, 1)]);
    assert!(!bench.relay.set_stream(a.session, a.uid, true, bench.now));
    assert_eq!(bench.try_attach(1, "192.0.2.1").err(), Some(AttachError::Refused));
    bench.pass(29 * 24 * 3600);
    assert_eq!(bench.try_attach(1, "192.0.2.1").err(), Some(AttachError::Refused));
    bench.pass(24 * 3600);
    bench.attach(1, "192.0.2.1");
    bench.relay.refuse(a.uid, bench.now);
    bench.relay.forgive();
    bench.attach(1, "192.0.2.1");
}

#[test]
fn attaching_anew_loses_nothing() {
    let mut bench = Bench::new(Limits::default());
    let (a, b) = (bench.bound(1, A), bench.bound(2, B));
    let mut new = bench.attach(1, "192.0.2.1");
    assert_eq!(bench.reaches((&b, B), &a), Some(udp(A)), "until the new one is reached");
    let there = "192.0.2.1:1111";
    assert!(bench.hello(&mut new, there, 0).unwrap().0);
    assert_eq!(bench.forward(B, &[b.frame(&new, 40)]), [(udp(there), b.arrived(&new, 40))]);
    assert_eq!(bench.reaches((&new, there), &b), Some(udp(B)));
    bench.pass(9);
    assert_eq!(bench.reaches((&a, A), &b), Some(udp(B)), "what is under way arrives");
    bench.pass(1);
    assert_eq!(bench.reaches((&a, A), &b), None);
    assert_eq!(bench.relay.take_ended(), [a.session]);
    assert_eq!(bench.reaches((&b, B), &new), Some(udp(there)));
}

#[test]
fn an_older_session_does_not_get_its_frames_back() {
    let mut bench = Bench::new(Limits::default());
    let (mut a, b) = (bench.bound(1, A), bench.bound(2, B));
    let new = bench.bound(1, "192.0.2.1:1111");
    assert!(bench.hello(&mut a, A, 0).unwrap().0);
    assert_eq!(bench.reaches((&b, B), &new), Some(udp("192.0.2.1:1111")));
    bench.relay.detach(new.session, bench.now);
    bench.pass(9);
    assert_eq!(bench.reaches((&b, B), &new), Some(udp("192.0.2.1:1111")));
}

#[test]
fn if_the_newer_goes_the_older_has_them_as_long_as_it_lives() {
    let mut bench = Bench::new(Limits::default());
    let (a, b) = (bench.attach(1, "192.0.2.1"), bench.bound(2, B));
    let mut a = Agent { counter: 0, ..a };
    let mut new = bench.attach(1, "192.0.2.1");
    assert!(bench.hello(&mut a, A, 0).unwrap().0);
    bench.relay.detach(new.session, bench.now);
    bench.pass(5);
    assert!(bench.hello(&mut new, "192.0.2.1:1111", 0).unwrap().0);
    bench.pass(5);
    assert_eq!(bench.relay.take_ended(), [new.session]);
    assert_eq!(bench.reaches((&b, B), &a), Some(udp(A)));
    bench.pass(5);
    assert_eq!(bench.reaches((&b, B), &a), None);
}

#[test]
fn a_device_has_four_sessions_at_most() {
    let mut bench = Bench::new(Limits::default());
    let b = bench.bound(2, B);
    let first = bench.bound(1, A);
    let more: Vec<_> = (0..10).map(|_| bench.attach(1, "192.0.2.1").session).collect();
    assert_eq!(bench.relay.take_ended(), more[..7]);
    assert_eq!(bench.relay.snapshot().sessions, 5);
    assert_eq!(bench.reaches((&b, B), &first), Some(udp(A)), "the one in use stays");
}

#[test]
fn a_device_does_not_attach_without_end() {
    let mut bench = Bench::new(Limits::default());
    let passed =
        |bench: &mut Bench| (0..50).filter(|_| bench.try_attach(1, "192.0.2.1").is_ok()).count() as u64;
    assert_eq!(passed(&mut bench), ATTACHES + 1);
    assert_eq!(bench.try_attach(1, "192.0.2.1").err(), Some(AttachError::TooOften));
    bench.attach(2, "192.0.2.1");
    bench.pass(2);
    assert_eq!(passed(&mut bench), 2);
}

#[test]
fn who_detaches_is_forgotten() {
    let mut bench = Bench::new(Limits::default());
    for device in 1..100 {
        let a = bench.bound(device, A);
        bench.relay.set_stream(a.session, a.uid, true, bench.now);
        bench.relay.detach(a.session, bench.now);
        bench.relay.detach(a.session, bench.now);
    }
    assert_eq!(bench.relay.snapshot().sessions, 99);
    bench.pass(10);
    assert_eq!(bench.relay.snapshot(), Snapshot::default());
    assert_eq!(bench.relay.poll_timeout(), None);
    assert!(bench.relay.sessions.is_empty() && bench.relay.devices.is_empty() && bench.relay.due.is_empty());
    assert_eq!(bench.relay.take_ended().len(), 99);
}
