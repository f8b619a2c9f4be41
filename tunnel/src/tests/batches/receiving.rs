//! Messages that are begun and finished in any order.

use proptest::prelude::*;
use rand::{SeedableRng as _, rngs::StdRng};

use super::*;
use crate::{Event, PeerConfig, PublicKey, REJECT_AFTER_MESSAGES, Reason, ZERO_KEYS_AFTER};

/// What a message is, of those that node 1 receives.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Data,
    Keepalive,
    /// With a counter of its own.
    Forged,
    WrongSource,
    NoPacket,
}

/// What a thread has still to begin, and to finish.
#[derive(Default)]
struct Thread {
    waiting: Vec<usize>,
    begun: Vec<(Opening, usize)>,
}

fn kinds() -> impl Strategy<Value = Kind> {
    prop_oneof![
        8 => Just(Kind::Data),
        1 => Just(Kind::Keepalive),
        2 => Just(Kind::Forged),
        1 => Just(Kind::WrongSource),
        1 => Just(Kind::NoPacket),
    ]
}

/// A message of each kind, sealed by node 0.
fn messages(network: &mut Network, kinds: &[Kind]) -> Vec<Vec<u8>> {
    let key = network.key(1);
    let forge = |network: &mut Network, inner: &[u8]| {
        let session = network.nodes[0].tunnel.peer_mut(&key).sessions().current().unwrap();
        let mut message = vec![0; inner.len() + 32];
        session.seal(&mut message, network.now, |slot| slot.copy_from_slice(inner)).unwrap();
        message
    };
    let seal = |(index, kind): (usize, &Kind)| match kind {
        Kind::Data => network.sealed(0, &packet(&index.to_be_bytes())),
        Kind::Keepalive => forge(network, &[]),
        Kind::NoPacket => forge(network, &[7; 32]),
        Kind::WrongSource => network.sealed(0, &udp("100.64.0.77", "100.64.0.2", b"forged")),
        Kind::Forged => {
            let mut forged = network.sealed(0, &packet(b"forged"));
            forged[20] ^= 1;
            forged
        }
    };
    kinds.iter().enumerate().map(seal).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    /// Messages, some of them in several copies, are begun and finished in any order: the same comes of it as of handling
    /// one after the other, to the last counter.
    #[test]
    fn any_order_of_beginning_and_finishing(
        seed in 0u64..1_000,
        kinds in prop::collection::vec((kinds(), 1usize..4), 1..24),
        batches in 2usize..5,
        order: u64,
    ) {
        let (kinds, copies): (Vec<_>, Vec<_>) = kinds.into_iter().unzip();
        let copies = copies.iter().enumerate().flat_map(|(index, copies)| vec![index; *copies]);
        let copies: Vec<usize> = copies.collect();
        let mut one_by_one = pair(seed);
        let mut expected = Vec::new();
        let sealed = messages(&mut one_by_one, &kinds);
        for index in &copies {
            let mut datagram = sealed[*index].clone();
            let source = one_by_one.nodes[0].address;
            let tunnel = &mut one_by_one.nodes[1].tunnel;
            expected.push(match tunnel.handle_datagram(source, Ecn::NotEct, &mut datagram, one_by_one.now) {
                Ok(Received::Packet { packet, .. }) => Ok(packet.to_vec()),
                Ok(_) => Ok(vec![]),
                Err(reason) => Err(reason),
            });
        }

        let mut network = pair(seed);
        prop_assert_eq!(&sealed, &messages(&mut network, &kinds));
        // Which thread goes on next is a matter of chance, and which of its messages it opens first.
        let mut rng = StdRng::seed_from_u64(order);
        let mut threads: Vec<Thread> = Vec::new();
        threads.resize_with(batches, Thread::default);
        for index in &copies {
            threads[rng.random_range(0..batches)].waiting.push(*index);
        }
        let mut results = Vec::new();
        while threads.iter().any(|thread| !thread.waiting.is_empty() || !thread.begun.is_empty()) {
            let Thread { waiting, begun } = &mut threads[rng.random_range(0..batches)];
            if rng.random() && !waiting.is_empty() {
                let index = waiting.remove(0);
                match network.begin_receive(1, &sealed[index]) {
                    Ok(opening) => begun.push((opening, index)),
                    Err(reason) => results.push(Err(reason)),
                }
            } else if !begun.is_empty() {
                let (opening, index) = begun.remove(rng.random_range(0..begun.len()));
                results.push(network.finish(1, opening, sealed[index].clone()));
            }
        }
        expected.sort();
        results.sort();
        prop_assert_eq!(results, expected);
        prop_assert_eq!(network.peer(1), one_by_one.peer(1));
        prop_assert_eq!(network.nodes[1].tunnel.drops(), one_by_one.nodes[1].tunnel.drops());
        prop_assert_eq!(network.nodes[1].tunnel.poll_timeout(), one_by_one.nodes[1].tunnel.poll_timeout());
    }
}

#[test]
fn of_copies_that_were_begun_at_once_one_is_taken() {
    let mut network = pair(1);
    let datagram = network.sealed(0, &packet(b"x"));
    let before = network.peer(1);
    let begun = [0; 3].map(|_| network.begin_receive(1, &datagram).unwrap());
    let results = begun.map(|opening| network.finish(1, opening, datagram.clone()));
    assert_eq!(results, [Ok(packet(b"x")), Err(Dropped::Replayed), Err(Dropped::Replayed)]);
    assert_eq!(network.begin_receive(1, &datagram).err(), Some(Dropped::Replayed));
    assert_eq!(network.dropped(1, Dropped::Replayed), [3, 3]);
    let after = network.peer(1);
    assert_eq!(after.received_packets - before.received_packets, 1);
    assert_eq!(after.received_bytes - before.received_bytes, datagram.len() as u64);
}

#[test]
fn forgeries_are_counted_once_and_change_nothing() {
    let mut network = pair(2);
    let datagram = network.sealed(0, &packet(b"x"));
    let mut forged = datagram.clone();
    *forged.last_mut().unwrap() ^= 1;
    let before = network.peer(1);
    let [unopened, genuine] = [0; 2].map(|_| network.begin_receive(1, &datagram).unwrap());
    let mut opening = network.begin_receive(1, &forged).unwrap();
    opening.open(&mut forged);
    let elsewhere = "198.51.100.66:6".parse().unwrap();
    assert_eq!(network.finish_from(1, opening, elsewhere, &mut forged), Err(Dropped::NotAuthentic));
    assert_eq!(network.dropped(1, Dropped::NotAuthentic), [1, 1]);
    let source = network.nodes[0].address;
    let unopened = network.finish_from(1, unopened, source, &mut datagram.clone());
    assert_eq!(unopened, Err(Dropped::NotAuthentic), "nobody has opened it");
    let after = network.peer(1);
    assert_eq!((after.endpoint, after.received_packets), (before.endpoint, before.received_packets));
    assert_eq!(network.nodes[1].events, []);
    assert_eq!(network.finish(1, genuine, datagram), Ok(packet(b"x")), "the counter is still good");
}

/// The same datagram with a counter that was not used yet; it is no longer authentic.
fn with_another_counter(datagram: &[u8]) -> Vec<u8> {
    let mut changed = datagram.to_vec();
    changed[10] = 1;
    changed
}

/// Something that is finished for a shorter datagram than it was begun for is a mistake of the shell's, and harmless.
#[test]
fn no_datagram_is_too_short_to_finish() {
    let mut network = pair(3);
    let source = network.nodes[0].address;
    for len in [0, 1, 16, 31, 32, 33, 40] {
        let datagram = network.sealed(0, &packet(b"x"));
        let mut opening = network.begin_receive(1, &datagram).unwrap();
        opening.open(&mut datagram.clone());
        let _ = network.finish_from(1, opening, source, &mut datagram[..len].to_vec());
        let mut opening = network.begin_receive(1, &with_another_counter(&datagram)).unwrap();
        opening.open(&mut datagram.clone()[..len]);
        assert_eq!(network.finish(1, opening, vec![]), Err(Dropped::NotAuthentic));
    }
}

#[test]
fn a_session_is_renewed_meanwhile() {
    let mut network = pair(4);
    let sent = [b"1", b"2"].map(|payload| network.sealed(0, &packet(payload)));
    let [one, two] = [0, 1].map(|n| network.begin_receive(1, &sent[n]).unwrap());
    let plain = packet(b"3");
    let whole = SuperPacket::parse(VirtioHeader::default(), &plain).unwrap();
    let sealing = network.begin_send(0, &whole).unwrap().unwrap();
    network.renew();
    assert_eq!(network.finish(1, one, sent[0].clone()), Ok(packet(b"1")), "retired sessions receive");
    let mut out = Outgoing::new();
    sealing.seal(&whole, &mut out).unwrap();
    let three = datagrams(&out).remove(0);
    let opening = network.begin_receive(1, &three).unwrap();
    assert_eq!(network.finish(1, opening, three), Ok(plain));
    // The third renewal makes it one too many.
    network.renew();
    network.renew();
    assert_eq!(network.finish(1, two, sent[1].clone()), Err(Dropped::UnknownIndex));
    assert_eq!(network.dropped(1, Dropped::UnknownIndex)[1], 1);
    network.loss = 0;
    network.assert_works();
}

/// Several messages of a session that is not confirmed are begun; whichever is finished first confirms it.
#[test]
fn a_session_is_confirmed_meanwhile() {
    for first in 0..2 {
        let mut network = Network::pair(5);
        network.loss = 100;
        let [a, b] = [0, 1].map(|n| network.nodes[n].address);
        network.send(0, 1, b"first");
        network.deliver(1, a, network.last(0, 1)).unwrap();
        network.send(1, 0, b"has waited");
        network.deliver(0, b, network.last(1, 2)).unwrap();
        let sent = [network.last(0, 4), network.sealed(0, &packet(b"second"))];
        let mut begun = [0, 1].map(|n| Some(network.begin_receive(1, &sent[n]).unwrap()));
        network.nodes[1].events.clear();
        for (n, payload) in [(first, ["first", "second"][first]), (1 - first, ["second", "first"][first])] {
            let opening = begun[n].take().unwrap();
            assert_eq!(network.finish(1, opening, sent[n].clone()), Ok(packet(payload.as_bytes())));
            if n == first {
                // What has waited is sealed before anything that is begun later.
                let later = network.sealed(1, &udp("100.64.0.2", "100.64.0.1", b"later"));
                network.collect(1);
                assert!(counter(&network.last(1, 4)) < counter(&later));
                network.deliver(0, b, network.last(1, 4)).unwrap();
                assert_eq!(network.take_payloads(0), [b"has waited"]);
            }
        }
        let public_key = network.key(0);
        assert_eq!(network.nodes[1].events, [Event::PeerUp { public_key, endpoint: a.into() }]);
        assert_eq!(network.nodes[1].tunnel.sizes()[0], 1);
    }
}

/// Most messages that arrive only put off what is due, but one that confirms a session lets go what has waited for it.
#[test]
fn what_becomes_due_by_a_confirmation_is_not_missed() {
    let mut network = pair(8);
    network.run_secs(6);
    let [a, b] = [0, 1].map(|n| network.nodes[n].address);
    let [key_a, key_b] = [0, 1].map(|n| network.key(n));
    network.nodes[0].tunnel.connect(&key_b, network.now);
    network.collect(0);
    network.deliver(1, a, network.last(0, 1)).unwrap();
    let data = network.sealed(0, &packet(b"x"));
    let opening = network.begin_receive(1, &data).unwrap();
    assert_eq!(network.finish(1, opening, data), Ok(packet(b"x")));
    let session = network.nodes[1].tunnel.peer_mut(&key_a).sessions().current().unwrap();
    session.set_send_counter(REJECT_AFTER_MESSAGES);
    network.send_packet(1, &udp("100.64.0.2", "100.64.0.1", &[7; 1_000]));
    assert_eq!(network.peer(1).queued, 1);
    network.deliver(0, b, network.last(1, 2)).unwrap();
    let confirmation = network.last(0, 4);
    let opening = network.begin_receive(1, &confirmation).unwrap();
    assert_eq!(network.finish(1, opening, confirmation), Ok(vec![]));
    assert_eq!(network.peer(1).queued, 0);
    let (due, reason) = network.nodes[1].tunnel.poll_timeout().unwrap();
    assert!(due <= network.now && reason == Reason::PathMtu, "a probe, as data flows");
}

/// The same for one that comes from elsewhere, which makes the path unknown, and for one that comes when it is time to
/// renew the session.
#[test]
fn what_becomes_due_by_a_move_or_by_age_is_not_missed() {
    let mut network = pair(9);
    let data = |network: &mut Network, from: usize, payload| {
        let addresses = [["100.64.0.1", "100.64.0.2"], ["100.64.0.2", "100.64.0.1"]][from];
        let mut datagram = network.sealed(from, &udp(addresses[0], addresses[1], payload));
        let mut opening = network.begin_receive(1 - from, &datagram).unwrap();
        opening.open(&mut datagram);
        (opening, datagram)
    };
    let [source, elsewhere] = [network.nodes[0].address, "198.51.100.9:9".parse().unwrap()];
    network.send_packet(1, &udp("100.64.0.2", "100.64.0.1", &[7; 1_000]));
    network.run_millis(1);
    for from in [source, elsewhere] {
        let due = network.nodes[1].tunnel.poll_timeout().unwrap();
        let (opening, mut datagram) = data(&mut network, 0, b"x");
        network.finish_from(1, opening, from, &mut datagram).unwrap();
        let comes_nearer = network.nodes[1].tunnel.poll_timeout().unwrap() < due;
        assert_eq!(comes_nearer, from == elsewhere, "a new probe, before the first one is lost");
    }

    let mut network = pair(10);
    let source = network.nodes[1].address;
    network.run_secs(164);
    for initiations in [0, 1] {
        let (opening, mut datagram) = data(&mut network, 1, b"x");
        network.finish_from(0, opening, source, &mut datagram).unwrap();
        network.collect(0);
        assert_eq!(network.count(0, 1), initiations);
        network.run_secs(2);
    }
}

#[test]
fn keys_are_wiped_meanwhile() {
    let mut network = pair(6);
    let datagram = network.sealed(0, &packet(b"x"));
    let opening = network.begin_receive(1, &datagram).unwrap();
    let plain = packet(b"y");
    let whole = SuperPacket::parse(VirtioHeader::default(), &plain).unwrap();
    let sealing = network.begin_send(0, &whole).unwrap().unwrap();
    network.run(2 * ZERO_KEYS_AFTER);
    assert!(network.nodes.iter().all(|node| node.tunnel.sizes()[0] == 0));
    assert_eq!(network.finish(1, opening, datagram), Err(Dropped::UnknownIndex));
    assert_eq!(network.dropped(1, Dropped::UnknownIndex), [0, 1], "nobody's any more");
    let mut out = Outgoing::new();
    sealing.seal(&whole, &mut out).unwrap();
    assert_eq!(network.begin_receive(1, &datagrams(&out)[0]).err(), Some(Dropped::UnknownIndex));
}

#[test]
fn a_peer_is_removed_meanwhile_and_another_has_its_place() {
    let mut network = pair(7);
    let datagram = network.sealed(0, &packet(b"x"));
    let opening = network.begin_receive(1, &datagram).unwrap();
    let (key, other) = (network.key(0), PublicKey::from_bytes([9; 32]));
    assert!(network.nodes[1].tunnel.remove_peer(&key));
    let now = network.now;
    let addresses = vec!["100.64.0.1".parse().unwrap()];
    let config = PeerConfig { virtual_addresses: addresses, ..PeerConfig::new(other) };
    network.nodes[1].tunnel.add_peer(config, now);
    assert_eq!(network.nodes[1].tunnel.sizes()[3], 1, "it has its place");
    assert_eq!(network.finish(1, opening, datagram), Err(Dropped::UnknownIndex));
    assert_eq!(network.nodes[1].tunnel.drops().get(Dropped::UnknownIndex), 1);
    let other = network.nodes[1].tunnel.peer(&other, now).unwrap();
    assert_eq!((other.drops, other.endpoint), Default::default());
}
