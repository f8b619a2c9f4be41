//! Joined and split again, packets of any flows are what they were, in the order of each flow.

use super::coalesce::coalesce;
use super::*;

/// What a sender does next.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// A packet of the flow's size, or shorter by so much.
    Data(usize),
    Push,
    Fin,
    Empty,
    /// Set TCP flags of any kind.
    Flags(u8),
    /// Change what follows.
    Window,
    Ack,
    Timestamp,
    Ecn,
    Gap,
    Identification,
    /// Damage an octet of a packet of the flow's size.
    Corrupt(usize),
    Fragment,
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        40 => Just(Step::Data(0)),
        3 => (0usize..200).prop_map(Step::Data),
        2 => Just(Step::Push),
        1 => Just(Step::Fin),
        2 => Just(Step::Empty),
        1 => any::<u8>().prop_map(Step::Flags),
        1 => Just(Step::Window),
        1 => Just(Step::Ack),
        1 => Just(Step::Timestamp),
        1 => Just(Step::Ecn),
        1 => Just(Step::Gap),
        1 => Just(Step::Identification),
        1 => (0usize..2000).prop_map(Step::Corrupt),
        1 => Just(Step::Fragment),
    ]
}

#[derive(Clone, Debug)]
struct Sender {
    shape: Shape,
    size: usize,
    seed: u32,
}

impl Sender {
    fn send(&mut self, step: Step) -> Option<Vec<u8>> {
        let mut shape = self.shape.clone();
        let mut len = self.size;
        match step {
            Step::Data(less) => len = (len - less.min(len - 1)).max(1),
            Step::Push => shape.flags |= PSH,
            Step::Fin => shape.flags |= FIN,
            Step::Empty => len = 0,
            Step::Flags(flags) => shape.flags = flags,
            Step::Fragment => {
                (shape.fragment, shape.extensions) = (0x2000, vec![(44, vec![0, 0, 1, 0, 0, 0, 5])])
            }
            Step::Corrupt(_) => {}
            Step::Window => self.shape.window = self.shape.window.wrapping_add(1),
            Step::Ack => self.shape.ack = self.shape.ack.wrapping_add(1000),
            Step::Timestamp if shape.tcp => self.shape.options = timestamps(self.seed),
            Step::Timestamp => {}
            Step::Ecn => self.shape.tos ^= 1,
            Step::Gap => self.shape.sequence = self.shape.sequence.wrapping_add(self.size as u32),
            Step::Identification => self.shape.identification = self.shape.identification.wrapping_add(100),
        }
        if matches!(
            step,
            Step::Window | Step::Ack | Step::Timestamp | Step::Ecn | Step::Gap | Step::Identification
        ) {
            return None;
        }
        let mut packet = shape.packet(&payload(len, self.seed));
        if let Step::Corrupt(at) = step {
            let at = at % packet.len();
            packet[at] ^= 0x40;
        }
        self.seed += 1;
        self.shape.sequence = self.shape.sequence.wrapping_add(len as u32);
        self.shape.identification = self.shape.identification.wrapping_add(1);
        Some(packet)
    }
}

prop_compose! {
    fn any_sender()(
        (v6, tcp) in any::<(bool, bool)>(),
        port in 0u16..4,
        (identification, sequence) in any::<(u16, u32)>(),
        fragment in prop_oneof![Just(DF), Just(0)],
        options in prop_oneof![Just(vec![]), Just(timestamps(7)), Just(vec![1; 4])],
        size in prop_oneof![8 => 1usize..300, 2 => Just(1400), 1 => 1400usize..9000],
        seed in 0u32..1 << 30,
    ) -> Sender {
        let mut shape = Shape::new(v6, tcp);
        (shape.port, shape.identification, shape.sequence, shape.fragment) = (port, identification, sequence, fragment);
        if tcp {
            shape.options = options;
        }
        Sender { shape, size, seed }
    }
}

proptest! {
    #[test]
    fn of_any_flows(
        mut senders in prop::collection::vec(any_sender(), 1..12),
        steps in prop::collection::vec((any::<prop::sample::Index>(), any_step(), 1usize..16), 1..20),
    ) {
        let mut packets = Vec::new();
        let mut flows = Vec::new();
        for (sender, step, times) in steps {
            let sender = sender.get_mut(&mut senders);
            for _ in 0..times {
                packets.extend(sender.send(step));
                // Senders with the same port are one flow to everyone else; an address or port that is damaged is
                // another one's.
                let len = packets.last().map_or(1, Vec::len);
                let is_known = !matches!(step, Step::Corrupt(at) if at % len < sender.shape.transport_at() + 4);
                let number = if is_known { 0 } else { packets.len() };
                let flow = (sender.shape.v6, sender.shape.tcp, sender.shape.port, number);
                flows.resize(packets.len(), flow);
            }
        }
        check(&packets, &flows)?;
    }

    #[test]
    fn of_streams_that_alternate(
        mut senders in prop::collection::vec(any_sender(), 1..24),
        turns in prop::collection::vec(any::<prop::sample::Index>(), 1..200),
    ) {
        for (port, sender) in senders.iter_mut().enumerate() {
            sender.shape.port = port as u16;
            sender.size = sender.size.min(1200);
        }
        let mut packets = Vec::new();
        let mut flows = Vec::new();
        for turn in turns {
            let sender = turn.get_mut(&mut senders);
            packets.extend(sender.send(Step::Data(0)));
            flows.push(sender.shape.port);
        }
        let items = check(&packets, &flows)?;
        // Of few enough flows all is joined that can be.
        if senders.len() <= 16 {
            let of_flow = |sender: &Sender| {
                let most = ((65_535 - sender.shape.headers_len()) / sender.size).min(MAX_PACKETS);
                flows.iter().filter(|port| **port == sender.shape.port).count().div_ceil(most)
            };
            prop_assert_eq!(items, senders.iter().map(of_flow).sum::<usize>());
        }
    }

    #[test]
    fn of_any_octets(
        packets in prop::collection::vec(
            (any::<u8>(), prop::collection::vec(any::<u8>(), 0..120), any_shape(), 0u8..4), 1..20),
    ) {
        let octets = |(first, mut octets, shape, kind): (u8, Vec<u8>, Shape, u8)| match kind {
            0 => octets,
            1 => {
                if let Some(octet) = octets.first_mut() {
                    *octet = if first % 2 == 0 { 0x45 } else { 0x60 };
                }
                octets
            }
            2 => {
                let mut packet = shape.packet(&octets);
                packet.truncate(first.into());
                packet
            }
            _ => shape.packet(&octets),
        };
        let packets: Vec<_> = packets.into_iter().map(octets).collect();
        // No two are known to be of one flow.
        let flows: Vec<_> = (0..packets.len()).collect();
        check(&packets, &flows)?;
    }
}

/// The number of items, once they have been found to be right.
fn check<F: PartialEq>(packets: &[Vec<u8>], flows: &[F]) -> Result<usize, TestCaseError> {
    let items = coalesce(packets);
    let mut all: Vec<_> = items.iter().flat_map(|item| item.packets.clone()).collect();
    for (at, index) in all.iter().enumerate() {
        let overtaken = all[at..].iter().find(|later| *later < index && flows[**later] == flows[*index]);
        prop_assert_eq!(overtaken, None, "overtaken by {}", index);
    }
    all.sort_unstable();
    prop_assert_eq!(all, (0..packets.len()).collect::<Vec<_>>());
    prop_assert!(items.is_sorted_by_key(|item| item.packets[0]));
    for item in &items {
        prop_assert!(item.octets.len() <= 65_535 && item.packets.len() <= MAX_PACKETS);
        let originals: Vec<_> = item.packets.iter().map(|index| packets[*index].clone()).collect();
        if let [original] = &originals[..] {
            prop_assert_eq!((item.header, &item.octets), (VirtioHeader::default(), original));
        } else {
            let segments = split(item.header, &item.octets).unwrap();
            prop_assert!(segments == originals, "{:?}", item.packets);
        }
    }
    Ok(items.len())
}

/// The exception: what all carry the same identification counts up when split (RFC 6864 §4.1).
#[test]
fn but_for_an_identification_without_meaning() {
    for tcp in [false, true] {
        let mut shape = Shape::new(false, tcp);
        shape.identification = 0;
        let mut packets = Vec::new();
        for _ in 0..5 {
            packets.push(shape.packet(&[7; 100]));
            shape.sequence = shape.sequence.wrapping_add(100);
        }
        let item = coalesce(&packets).remove(0);
        let segments = split(item.header, &item.octets).unwrap();
        assert_eq!(segments.len(), 5);
        for (index, (segment, packet)) in segments.iter().zip(&packets).enumerate() {
            assert_eq!(segment[4..6], [0, index as u8]);
            assert_eq!((&segment[..4], &segment[12..]), (&packet[..4], &packet[12..]));
            assert_eq!(segment[6..10], packet[6..10]);
        }
    }
}
