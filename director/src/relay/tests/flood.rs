//! Whatever is thrown at a relay, it takes no more memory, and those who behave are served.

use super::*;

#[test]
fn strangers_leave_no_trace() {
    let mut bench = Bench::new(Limits::default());
    let (a, b) = (bench.bound(1, A), bench.bound(2, B));
    let rooms = |v: &Verdicts| (v.forwards.capacity(), v.hellos.capacity(), v.notices.capacity());
    let before = (rooms(&bench.verdicts), bench.relay.snapshot());
    for n in 0..20_000_u32 {
        let from = format!("198.51.{}.{}:9", n >> 8 & 0xff, n & 0xff);
        let hello = frame::hello(&a.key, n, u64::from(n), 0).to_vec();
        bench.forward(&from, &[up(n, b.handle, 48), hello]);
        if n % 1_000 == 0 {
            assert_eq!(bench.reaches((&a, A), &b), Some(udp(B)));
        }
    }
    assert_eq!((rooms(&bench.verdicts), bench.relay.snapshot()), before);
}

#[test]
fn a_batch_of_frames_to_everywhere_fits_the_room_there_is() {
    let mut bench = Bench::new(Limits { octets_per_second: 0, ..Limits::default() });
    let (a, b, c) = (bench.bound(1, A), bench.bound(2, B), bench.bound(3, C));
    let run: Vec<_> = (0..64).map(|n| if n % 2 == 0 { a.frame(&b, 32) } else { a.frame(&c, 32) }).collect();
    let mut buffer = run.concat();
    let arrival =
        Arrival { from: A.parse().unwrap(), ecn: Ecn::NotEct, datagram_len: 48, range: 0..buffer.len() };
    let room = bench.verdicts.forwards.capacity();
    for _ in 0..64 {
        buffer.copy_from_slice(&run.concat());
        bench.relay.forward(&arrival, &mut buffer, bench.now, &mut bench.verdicts);
    }
    assert_eq!((bench.verdicts.forwards.len(), bench.verdicts.forwards.capacity()), (4_096, room));
}

#[test]
fn attaching_again_and_again() {
    let mut bench = Bench::new(Limits { devices: 50, ..Limits::default() });
    let b = bench.bound(200, B);
    for n in 0..20_000_u32 {
        if let Ok(mut agent) = bench.try_attach((n % 100) as u8, "192.0.2.1") {
            match n % 3 {
                0 => drop(bench.hello(&mut agent, A, 0)),
                1 => bench.relay.detach(agent.session, bench.now),
                _ => {}
            }
        }
        if n % 100 == 0 {
            bench.pass(1);
            bench.relay.take_ended();
        }
        let snapshot = bench.relay.snapshot();
        assert!(snapshot.devices <= 50 && snapshot.sessions <= 4 * 50, "{snapshot:?}");
        assert!(bench.relay.due.len() <= snapshot.sessions);
    }
    assert_eq!(bench.relay.device_of(b.session), Some(b.uid));
}
