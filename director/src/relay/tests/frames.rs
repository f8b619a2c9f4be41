//! What becomes of frames, alone and in runs.

use super::*;

#[test]
fn a_run_stays_a_run() {
    let mut bench = Bench::new(Limits::default());
    let (a, b) = (bench.bound(1, A), bench.bound(2, B));
    let mut run = vec![a.frame(&b, 1_200); 45];
    run.push(a.frame(&b, 32));
    let mut expected = vec![(udp(B), a.arrived(&b, 1_200)); 45];
    expected.push((udp(B), a.arrived(&b, 32)));
    assert_eq!(bench.forward(A, &run), expected);
    assert_eq!(bench.verdicts.forwards.len(), 1);
    assert_eq!(bench.drops(), []);
}

#[test]
fn a_run_is_cut_where_headers_change() {
    let mut bench = Bench::new(Limits::default());
    let (a, b, c) = (bench.bound(1, A), bench.bound(2, B), bench.bound(3, C));
    let run = [a.frame(&b, 50), a.frame(&b, 50), a.frame(&c, 50), a.frame(&b, 50), a.frame(&b, 40)];
    let expected = [
        (udp(B), a.arrived(&b, 50)),
        (udp(B), a.arrived(&b, 50)),
        (udp(C), a.arrived(&c, 50)),
        (udp(B), a.arrived(&b, 50)),
        (udp(B), a.arrived(&b, 40)),
    ];
    assert_eq!(bench.forward(A, &run), expected);
    let ranges: Vec<_> = bench.verdicts.forwards.iter().map(|forward| forward.range.len()).collect();
    assert_eq!(ranges, [132, 66, 122]);
}

#[test]
fn what_is_no_frame_does_not_keep_the_others_back() {
    let mut bench = Bench::new(Limits::default());
    let (a, b) = (bench.bound(1, A), bench.bound(2, B));
    let good = a.frame(&b, 50);
    let mut version = good.clone();
    version[1] = 1;
    let run = [vec![4; 66], good.clone(), version, good.clone(), good[..HEADER + 31].to_vec()];
    assert_eq!(bench.forward(A, &run), vec![(udp(B), a.arrived(&b, 50)); 2]);
    assert_eq!(bench.drops(), [(Dropped::Malformed, 3)]);
    assert_eq!(bench.verdicts.notices, []);
    // Whatever comes, in whatever pieces.
    for len in 0..100 {
        bench.forward_len(A, len, &[vec![5; 99]]);
        bench.forward_len(A, len, &[vec![6; 99]]);
        bench.forward_len(A, len, &[good.clone(), good.clone()]);
    }
    let beyond = Arrival { from: A.parse().unwrap(), ecn: Ecn::NotEct, datagram_len: 9, range: 5..50 };
    bench.relay.forward(&beyond, &mut [5; 20], bench.now, &mut bench.verdicts);
}

#[test]
fn strangers_get_nowhere_and_little_to_hear() {
    let mut bench = Bench::new(Limits { unbound_per_second: 5, ..Limits::default() });
    let b = bench.bound(2, B);
    let frame = up(77, b.handle, 40);
    let mut heard = 0;
    for _ in 0..100 {
        assert_eq!(bench.forward(STRANGER, std::slice::from_ref(&frame)), []);
        assert_eq!(bench.drops(), [(Dropped::UnknownSession, 1)]);
        for (to, notice) in &bench.verdicts.notices {
            assert_eq!((*to, *notice), (STRANGER.parse().unwrap(), frame::unbound(77)));
            heard += 1;
        }
    }
    assert_eq!(heard, 5);
    bench.pass(1);
    let hello = frame::hello(&Key::new(&[1; 32]), 77, 1, 0).to_vec();
    assert_eq!(bench.forward(STRANGER, &[hello]), []);
    assert_eq!(bench.verdicts.notices, [(STRANGER.parse().unwrap(), frame::unbound(77))]);
    // Too short to be answered, or nothing that is.
    for octets in [frame[..47].to_vec(), vec![1; 148], vec![8; 16], vec![9; 64], frame::unbound(77).to_vec()]
    {
        bench.forward(STRANGER, &[octets]);
        assert_eq!((bench.verdicts.notices.len(), bench.drops()), (0, vec![(Dropped::Malformed, 1)]));
    }
}

#[test]
fn whoever_is_not_there() {
    let mut bench = Bench::new(Limits::default());
    let (a, b) = (bench.bound(1, A), bench.attach(2, "192.0.2.2"));
    let unknown = Handle(99);
    for handle in [b.handle, unknown] {
        assert_eq!(bench.forward(A, &[up(a.session, handle, 40), up(a.session, handle, 40)]), []);
        assert_eq!(bench.drops(), [(Dropped::Unreachable, 2)]);
        let header = DataHeader { session: a.session, handle };
        assert_eq!(bench.verdicts.notices, [(A.parse().unwrap(), frame::unreachable(header))]);
    }
    assert_eq!(bench.reaches((&a, A), &a), None);
    assert_eq!(bench.drops(), [(Dropped::ToItself, 1)]);
    let told = (0..100).filter(|_| {
        bench.forward(A, &[up(a.session, unknown, 40)]);
        !bench.verdicts.notices.is_empty()
    });
    assert_eq!(told.count(), 8, "ten a second");
}

#[test]
fn hellos_are_looked_at_before_the_relay_is_written_to() {
    let mut bench = Bench::new(Limits::default());
    let mut a = bench.attach(1, "192.0.2.1");
    let hello = |counter| frame::hello(&a.key, a.session, counter, 0).to_vec();
    let mut forged = hello(1);
    forged[60] ^= 1;
    assert_eq!(bench.forward(A, &[forged, hello(1)]), []);
    assert_eq!(bench.drops(), [(Dropped::NotAuthentic, 1)]);
    let greeting = Greeting { from: A.parse().unwrap(), range: 164..228 };
    assert_eq!(bench.verdicts.hellos, [greeting]);
    // Many of one session: ten a second, and replays are not among them.
    let run: Vec<_> = (2..40).map(hello).collect();
    bench.forward(A, &run);
    assert_eq!((bench.verdicts.hellos.len(), bench.drops()), (9, vec![(Dropped::RateLimited, 29)]));
    bench.pass(1);
    a.counter = 50;
    let taken = frame::hello(&a.key, a.session, 50, 0).to_vec();
    assert!(bench.relay.handle_hello(A.parse().unwrap(), &taken, bench.now).is_some());
    bench.forward(A, &[taken]);
    assert_eq!((bench.verdicts.hellos.len(), bench.drops()), (0, vec![(Dropped::NotAuthentic, 1)]));
}

#[test]
fn frames_of_streams() {
    let mut bench = Bench::new(Limits::default());
    let (a, b) = (bench.attach(1, "192.0.2.1"), bench.bound(2, B));
    let mut frame = a.frame(&b, 40);
    let unknown = Verdict::Drop(Dropped::UnknownSession, None);
    assert_eq!(bench.relay.forward_frame(a.session, &mut frame, bench.now), unknown, "no stream is open");
    bench.relay.set_stream(a.session, a.uid, true, bench.now);
    assert_eq!(bench.relay.forward_frame(a.session, &mut frame, bench.now), Verdict::Forward(udp(B)));
    assert_eq!(frame, a.arrived(&b, 40));
    assert_eq!(bench.reaches((&b, B), &a), Some(To::Stream(a.session)));
    let malformed = Verdict::Drop(Dropped::Malformed, None);
    let other = &mut b.frame(&a, 40);
    assert_eq!(bench.relay.forward_frame(a.session, other, bench.now), malformed, "of another session");
    assert_eq!(bench.relay.forward_frame(a.session, &mut [5; 47], bench.now), malformed);
    let header = DataHeader { session: a.session, handle: Handle(99) };
    let mut nobody = up(a.session, Handle(99), 40);
    let told = Verdict::Drop(Dropped::Unreachable, Some(frame::unreachable(header)));
    assert_eq!(bench.relay.forward_frame(a.session, &mut nobody, bench.now), told);
}

#[test]
fn a_device_sends_no_more_than_it_may() {
    let limits = Limits { octets_per_second: 10_000, burst: 5_000, ..Limits::default() };
    let mut bench = Bench::new(limits);
    let (a, b) = (bench.bound(1, A), bench.bound(2, B));
    let run = vec![a.frame(&b, 984); 2];
    let passed = |bench: &mut Bench, from: &str, run: &[Vec<u8>]| {
        let sent = bench.forward(from, run).len();
        (sent, bench.verdicts.drops[Dropped::RateLimited])
    };
    assert_eq!(passed(&mut bench, A, &run), (2, 0));
    assert_eq!(passed(&mut bench, A, &run), (2, 0));
    assert_eq!(passed(&mut bench, A, &run), (0, 2));
    assert_eq!(passed(&mut bench, A, &run[..1]), (1, 0), "a shorter one still fits");
    // Others are not kept back, and it gets no more by attaching anew.
    assert!(bench.reaches((&b, B), &a).is_some());
    let new = bench.bound(1, A);
    assert_eq!(passed(&mut bench, A, &[new.frame(&b, 984)]), (0, 1));
    let mut frame = new.frame(&b, 984);
    bench.relay.set_stream(new.session, new.uid, true, bench.now);
    let limited = Verdict::Drop(Dropped::RateLimited, None);
    assert_eq!(bench.relay.forward_frame(new.session, &mut frame, bench.now), limited);
    bench.pass(1);
    assert_eq!(bench.relay.forward_frame(new.session, &mut frame, bench.now), Verdict::Forward(udp(B)));
}
