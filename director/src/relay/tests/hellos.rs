//! Which address is bound: only one where the device was seen to receive.

use super::*;

#[test]
fn the_host_that_attached_is_bound_at_once() {
    let mut bench = Bench::new(Limits::default());
    let mut a = bench.attach(1, "::ffff:192.0.2.1");
    assert!(bench.hello(&mut a, A, 0).unwrap().0);
    assert!(bench.hello(&mut a, "192.0.2.1:1001", 0).unwrap().0, "its NAT has taken another port");
    let b = bench.bound(2, B);
    assert_eq!(bench.reaches((&b, B), &a), Some(udp("192.0.2.1:1001")));
    assert_eq!(bench.reaches((&a, A), &b), None, "frames from the old one are not taken");
    assert_eq!(bench.drops(), [(Dropped::NotBound, 1)]);
    assert_eq!(bench.verdicts.notices, [(A.parse().unwrap(), frame::unbound(a.session))]);
}

#[test]
fn another_address_has_to_prove_that_it_receives() {
    let mut bench = Bench::new(Limits::default());
    let (mut a, b) = (bench.bound(1, A), bench.bound(2, B));
    let (is_bound, proof) = bench.hello(&mut a, C, 0).unwrap();
    assert!(!is_bound && proof != 0);
    assert_eq!(bench.reaches((&b, B), &a), Some(udp(A)), "nothing has moved");
    for wrong in [0, proof ^ 1, u64::MAX] {
        assert!(!bench.hello(&mut a, C, wrong).unwrap().0);
    }
    assert!(!bench.hello(&mut a, "192.0.2.3:3001", proof).unwrap().0, "a proof is of one port");
    assert!(bench.hello(&mut a, C, proof).unwrap().0);
    assert_eq!(bench.reaches((&b, B), &a), Some(udp(C)));
    assert!(bench.hello(&mut a, "192.0.2.3:3002", 0).unwrap().0, "from now on it is the bound host");
    assert!(bench.hello(&mut a, A, 0).unwrap().0, "and the one that attached always is");
}

#[test]
fn a_proof_is_of_one_session() {
    let mut bench = Bench::new(Limits::default());
    let (mut a, mut b) = (bench.bound(1, A), bench.bound(2, B));
    let (_, proof) = bench.hello(&mut a, C, 0).unwrap();
    assert!(!bench.hello(&mut b, C, proof).unwrap().0);
}

#[test]
fn what_came_before_is_dropped() {
    let mut bench = Bench::new(Limits::default());
    let mut a = bench.attach(1, "192.0.2.1");
    let hello = |counter| frame::hello(&a.key, a.session, counter, 0);
    let (first, second) = (hello(1), hello(2));
    let mut send = |from: &str, octets: &[u8]| {
        bench.relay.handle_hello(from.parse().unwrap(), octets, bench.now).is_some()
    };
    assert!(send(A, &second));
    assert!(!send(A, &second) && !send(A, &first) && !send("192.0.2.1:5", &second));
    assert!(send(A, &hello(3)));
    // Captured before it arrived, and sent from elsewhere: it does not use up the counter.
    assert!(send(STRANGER, &hello(4)));
    assert!(send(A, &hello(4)));
    a.counter = 4;
    let b = bench.bound(2, B);
    assert_eq!(bench.reaches((&b, B), &a), Some(udp(A)));
}

#[test]
fn forged_and_mangled_hellos() {
    let mut bench = Bench::new(Limits::default());
    let a = bench.attach(1, "192.0.2.1");
    let good = frame::hello(&a.key, a.session, 1, 0);
    let from = A.parse().unwrap();
    for bit in 0..good.len() * 8 {
        let mut bad = good;
        bad[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(bench.relay.handle_hello(from, &bad, bench.now), None, "bit {bit}");
    }
    for len in 0..good.len() {
        assert_eq!(bench.relay.handle_hello(from, &good[..len], bench.now), None);
    }
    assert!(bench.relay.handle_hello(from, &good, bench.now).is_some());
}

#[test]
fn a_silent_address_is_forgotten() {
    let mut bench = Bench::new(Limits::default());
    let (mut a, mut b) = (bench.bound(1, A), bench.bound(2, B));
    for _ in 0..3 {
        bench.pass(59);
        assert!(bench.hello(&mut b, B, 0).unwrap().0);
        assert_eq!(bench.reaches((&b, B), &a).is_some(), bench.hello(&mut a, A, 0).is_some());
    }
    bench.pass(59);
    bench.hello(&mut b, B, 0).unwrap();
    assert_eq!(bench.reaches((&b, B), &a), Some(udp(A)));
    bench.pass(1);
    assert_eq!(bench.reaches((&b, B), &a), None);
    assert_eq!(bench.relay.snapshot().bound, 1);
    assert_eq!(bench.relay.snapshot().devices, 2, "it is attached still");
    assert!(bench.hello(&mut a, A, 0).unwrap().0);
    assert_eq!(bench.reaches((&b, B), &a), Some(udp(A)));
}

#[test]
fn while_frames_leave_by_a_stream_udp_has_to_prove_itself() {
    let mut bench = Bench::new(Limits::default());
    let (mut a, b) = (bench.bound(1, A), bench.bound(2, B));
    assert!(bench.relay.set_stream(a.session, a.uid, true, bench.now));
    assert_eq!(bench.reaches((&b, B), &a), Some(To::Stream(a.session)), "at once");
    // UDP may be open on the way here alone.
    let (is_bound, proof) = bench.hello(&mut a, A, 0).unwrap();
    assert!(!is_bound);
    assert_eq!(bench.reaches((&b, B), &a), Some(To::Stream(a.session)));
    assert!(bench.hello(&mut a, A, proof).unwrap().0);
    assert_eq!(bench.reaches((&b, B), &a), Some(udp(A)));
    assert!(bench.hello(&mut a, A, 0).unwrap().0);
    // Silent again while the stream is open: back to it.
    bench.pass(60);
    let b = bench.bound(2, B);
    assert_eq!(bench.reaches((&b, B), &a), Some(To::Stream(a.session)));
    assert!(bench.relay.set_stream(a.session, a.uid, false, bench.now));
    assert_eq!(bench.reaches((&b, B), &a), None);
}

#[test]
fn a_stream_is_its_own_devices() {
    let mut bench = Bench::new(Limits::default());
    let (a, b) = (bench.attach(1, "192.0.2.1"), bench.bound(2, B));
    assert!(!bench.relay.set_stream(a.session, b.uid, true, bench.now));
    assert!(!bench.relay.set_stream(a.session ^ 1, a.uid, true, bench.now));
    assert_eq!(bench.reaches((&b, B), &a), None);
}
