//! Frames of streams in batches: the same as one by one, and runs where they can be.

use muster_common::frame::{frames, push_frame};
use proptest::prelude::*;

use super::*;

/// A relay with a device that has a stream, one with an address, and one that has neither.
fn bench() -> (Bench, [Agent; 3]) {
    let mut bench = Bench::new(Limits { octets_per_second: 0, ..Limits::default() });
    let agents = [bench.attach(1, "192.0.2.1"), bench.bound(2, B), bench.attach(3, "192.0.2.3")];
    assert!(bench.relay.set_stream(agents[0].session, agents[0].uid, true, bench.now));
    (bench, agents)
}

fn batch(frames: &[Vec<u8>]) -> Vec<u8> {
    let mut batch = Vec::new();
    for frame in frames {
        assert!(push_frame(&mut batch, frame));
    }
    batch
}

impl Bench {
    /// What leaves, by frames.
    fn forward_batch(&mut self, session: u32, mut batch: Vec<u8>) -> Vec<Sent> {
        self.verdicts.clear();
        self.relay.forward_batch(session, &mut batch, self.now, &mut self.verdicts);
        let sent = self.verdicts.forwards.iter().flat_map(|forward| {
            let octets = batch[forward.range.clone()].chunks(forward.datagram_len);
            octets.map(|octets| (forward.to, octets.to_vec())).collect::<Vec<_>>()
        });
        sent.collect()
    }
}

#[test]
fn frames_to_one_address_leave_as_runs() {
    let (mut bench, [a, b, c]) = bench();
    let mut sent = vec![a.frame(&b, 700); 70];
    sent.push(a.frame(&b, 50));
    sent.push(a.frame(&b, 60));
    sent.push(a.frame(&c, 60));
    let frames = bench.forward_batch(a.session, batch(&sent));
    let expected: Vec<_> = [vec![700; 70], vec![50, 60]].concat();
    assert!(frames.iter().eq(&expected.iter().map(|len| (udp(B), a.arrived(&b, *len))).collect::<Vec<_>>()));
    let runs: Vec<_> = bench.verdicts.forwards.iter().map(|forward| forward.range.len()).collect();
    assert_eq!(runs, [64 * 716, 6 * 716 + 66, 76]);
    let header = DataHeader { session: a.session, handle: c.handle };
    assert_eq!(
        (bench.drops(), &bench.verdicts.told[..]),
        (vec![(Dropped::Unreachable, 1)], [frame::unreachable(header)].as_slice())
    );
}

#[test]
fn runs_are_no_longer_than_what_leaves_whole() {
    let (mut bench, [a, b, _]) = bench();
    bench.forward_batch(a.session, batch(&vec![a.frame(&b, 9_000 - HEADER); 7]));
    assert_eq!(bench.verdicts.forwards.len(), 1);
    bench.forward_batch(
        a.session,
        batch(&[vec![a.frame(&b, 9_000 - HEADER); 7], vec![a.frame(&b, 2_493)]].concat()),
    );
    assert_eq!(bench.verdicts.forwards.len(), 2);
}

#[test]
fn a_batch_that_is_cut_off() {
    let (mut bench, [a, b, _]) = bench();
    let whole = batch(&[a.frame(&b, 40), a.frame(&b, 40)]);
    assert_eq!(bench.forward_batch(a.session, whole[..whole.len() - 1].to_vec()).len(), 1);
    assert_eq!(bench.drops(), [(Dropped::Malformed, 1)]);
    assert_eq!(bench.forward_batch(a.session, whole[..59].to_vec()).len(), 1);
    assert_eq!(bench.drops(), [(Dropped::Malformed, 1)]);
    assert_eq!(bench.forward_batch(a.session, vec![0; 10]), []);
    assert_eq!(bench.drops(), [(Dropped::Malformed, 5)]);
}

proptest! {
    #[test]
    fn a_batch_is_its_frames(
        frames_of in prop::collection::vec((0_usize..4, prop_oneof![Just(100_usize), 0_usize..200]), 0..100)
    ) {
        let (mut bench, agents) = bench();
        let frame = |(to, len): &(usize, usize)| match agents.get(*to) {
            Some(to) => agents[0].frame(to, *len),
            None => vec![5; *len],
        };
        let sent: Vec<_> = frames_of.iter().map(frame).collect();
        let mut expected = Vec::new();
        for frame in &sent {
            let mut frame = frame.clone();
            if let Verdict::Forward(to) = bench.relay.forward_frame(agents[0].session, &mut frame, bench.now) {
                expected.push((to, frame));
            }
        }
        prop_assert_eq!(bench.forward_batch(agents[0].session, batch(&sent)), expected);
    }

    #[test]
    fn any_octets(mut octets in prop::collection::vec(prop_oneof![3 => Just(0_u8), 1 => any::<u8>()], 0..300)) {
        let (bench, agents) = bench();
        let mut verdicts = Verdicts::new(1);
        let before = frames(&octets).count();
        bench.relay.forward_batch(agents[0].session, &mut octets, bench.now, &mut verdicts);
        prop_assert!(verdicts.forwards.is_empty());
        prop_assert!(verdicts.drops[Dropped::Malformed] as usize >= before);
    }
}
