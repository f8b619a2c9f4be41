//! Sending and receiving in two halves, as threads do it: in any order of the halves everything arrives once, as it does
//! when one packet is dealt with after the other.

use std::{collections::BTreeSet, net::SocketAddr, sync::Mutex};

use super::{
    network::Network,
    packets::{ip, udp},
};
use crate::{
    Cipher, Dropped, Ecn, Opening, Outgoing, PeerSnapshot, Received, Sealing,
    offload::{SuperPacket, VirtioHeader},
};

mod receiving;
mod sending;

/// Two tunnels with a session, every other seed's with AES, and nothing under way.
fn pair(seed: u64) -> Network {
    let takes_aes = seed % 2 == 1;
    let mut network = Network::with_aes(2, seed, 0, |_| takes_aes);
    network.told = if takes_aes { Cipher::Aes256Gcm } else { Cipher::default() };
    network.introduce(0, 1);
    network.introduce(1, 0);
    network.assert_works();
    network.loss = 100;
    network.trace.clear();
    for node in &mut network.nodes {
        node.events.clear();
    }
    network
}

fn datagrams(out: &Outgoing) -> Vec<Vec<u8>> {
    out.runs().flat_map(|run| run.datagrams().map(<[u8]>::to_vec).collect::<Vec<_>>()).collect()
}

fn counter(datagram: &[u8]) -> u64 {
    u64::from_le_bytes(*datagram[8..].first_chunk().unwrap())
}

/// The counters of datagrams, in their order.
fn counters(datagrams: &[Vec<u8>]) -> Vec<u64> {
    datagrams.iter().map(|datagram| counter(datagram)).collect()
}

/// A packet of node 0's for node 1.
fn packet(payload: &[u8]) -> Vec<u8> {
    udp("100.64.0.1", "100.64.0.2", payload)
}

/// A super-packet of UDP for node 1 in segments of `size` octets of payload, and its header.
fn super_packet(payload: &[u8], size: u16) -> (VirtioHeader, Vec<u8>) {
    let header = VirtioHeader {
        flags: VirtioHeader::NEEDS_CSUM,
        gso_type: VirtioHeader::GSO_UDP_L4,
        gso_size: size,
        csum_start: 20,
        csum_offset: 6,
        ..VirtioHeader::default()
    };
    (header, packet(payload))
}

impl Network {
    fn begin_send(&mut self, n: usize, packet: &SuperPacket<'_>) -> Result<Option<Sealing>, Dropped> {
        self.nodes[n].tunnel.begin_send(packet, self.now)
    }

    /// A plain packet sealed, that is sent nowhere.
    fn sealed(&mut self, n: usize, packet: &[u8]) -> Vec<u8> {
        let mut out = Outgoing::new();
        self.nodes[n].tunnel.handle_packet(packet, self.now, &mut out).unwrap();
        datagrams(&out).pop().expect("it waits")
    }

    fn begin_receive(&mut self, n: usize, datagram: &[u8]) -> Result<Opening, Dropped> {
        let source = self.nodes[1 - n].address;
        let opening = self.nodes[n].tunnel.begin_receive(source, datagram, self.now)?;
        Ok(opening.expect("no transport data"))
    }

    /// Finishes a message, which has been opened, that came from `source`.
    fn finish_from(
        &mut self,
        n: usize,
        opening: Opening,
        source: SocketAddr,
        datagram: &mut [u8],
    ) -> Result<Vec<u8>, Dropped> {
        let tunnel = &mut self.nodes[n].tunnel;
        let address = datagram.as_ptr();
        let result = match tunnel.finish_receive(opening, source, Ecn::NotEct, datagram, self.now) {
            Ok(Received::Packet { packet, .. }) => {
                assert_eq!(packet.as_ptr(), address.wrapping_add(crate::PACKET_OFFSET));
                Ok(packet.to_vec())
            }
            Ok(Received::Keepalive) => Ok(vec![]),
            Ok(other) => panic!("{other:?}"),
            Err(reason) => Err(reason),
        };
        assert!(tunnel.deadlines_hold());
        result
    }

    /// Opens a message of the other node's and finishes it.
    fn finish(&mut self, n: usize, mut opening: Opening, mut datagram: Vec<u8>) -> Result<Vec<u8>, Dropped> {
        opening.open(&mut datagram);
        let source = self.nodes[1 - n].address;
        self.finish_from(n, opening, source, &mut datagram)
    }

    /// A new session that node 0 begins.
    fn renew(&mut self) {
        self.loss = 0;
        self.run_secs(6);
        let key = self.key(1);
        let before = self.current_index(0, 1);
        self.nodes[0].tunnel.connect(&key, self.now);
        self.collect(0);
        self.run_millis(100);
        assert_ne!(self.current_index(0, 1), before);
        self.loss = 100;
    }

    fn peer(&self, n: usize) -> PeerSnapshot {
        self.nodes[n].tunnel.peer(&self.key(1 - n), self.now).unwrap()
    }

    /// How often something was dropped at a node, by the peer's account and by the tunnel's.
    fn dropped(&self, n: usize, reason: Dropped) -> [u64; 2] {
        [self.peer(n).drops.get(reason), self.nodes[n].tunnel.drops().get(reason)]
    }
}

#[test]
fn sealing_and_opening_go_on_in_other_threads() {
    let mut network = pair(30);
    let plain: Vec<_> = (0..64u32).map(|n| packet(&n.to_be_bytes())).collect();
    let plain: Vec<_> =
        plain.iter().map(|p| SuperPacket::parse(VirtioHeader::default(), p).unwrap()).collect();
    let begun: Vec<_> = plain.iter().map(|p| (p, network.begin_send(0, p).unwrap().unwrap())).collect();
    let (mut sealed, others) = std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            let mut out = Outgoing::new();
            for (packet, sealing) in begun {
                sealing.seal(packet, &mut out).unwrap();
            }
            datagrams(&out)
        });
        // The tunnel goes on.
        let others: Vec<_> =
            (0..64u32).map(|n| network.sealed(0, &packet(&(64 + n).to_be_bytes()))).collect();
        (thread.join().unwrap(), others)
    });
    sealed.extend(others);
    assert_eq!(counters(&sealed).into_iter().collect::<BTreeSet<_>>().len(), 128);
    let mut begun: Vec<_> =
        sealed.into_iter().map(|datagram| (network.begin_receive(1, &datagram).unwrap(), datagram)).collect();
    std::thread::scope(|scope| {
        for half in begun.chunks_mut(64) {
            scope.spawn(|| half.iter_mut().for_each(|(opening, datagram)| opening.open(datagram)));
        }
    });
    let source = network.nodes[0].address;
    for (n, (opening, mut datagram)) in (0..128u32).zip(begun) {
        assert_eq!(network.finish_from(1, opening, source, &mut datagram), Ok(packet(&n.to_be_bytes())));
    }
}

/// Two tunnels, each behind a lock, and threads that send through the one and receive through the other.
#[test]
fn threads_share_two_tunnels() {
    const THREADS: u32 = 4;
    const BATCHES: u32 = 40;
    const BATCH: u32 = 16;
    let mut network = pair(31);
    let (now, source) = (network.now, network.nodes[0].address);
    let (a, b) = network.nodes.split_at_mut(1);
    let [a, b] = [a, b].map(|nodes| Mutex::new(&mut nodes[0].tunnel));
    let work = |thread: u32| {
        let (mut out, mut arrived) = (Outgoing::new(), Vec::new());
        for batch in 0..BATCHES {
            let first = (thread * BATCHES + batch) * BATCH;
            let packets: Vec<_> = (first..first + BATCH).map(|n| packet(&n.to_be_bytes())).collect();
            let packets = packets.iter().map(|p| SuperPacket::parse(VirtioHeader::default(), p).unwrap());
            let begun: Vec<_> = {
                let mut tunnel = a.lock().unwrap();
                packets.map(|p| (p, tunnel.begin_send(&p, now).unwrap().unwrap())).collect()
            };
            begun.into_iter().for_each(|(packet, sealing)| sealing.seal(&packet, &mut out).unwrap());
            let mut received: Vec<_> = {
                let mut tunnel = b.lock().unwrap();
                let begin = |datagram: Vec<u8>| {
                    (tunnel.begin_receive(source, &datagram, now).unwrap().unwrap(), datagram)
                };
                datagrams(&out).into_iter().map(begin).collect()
            };
            out.clear();
            received.iter_mut().for_each(|(opening, datagram)| opening.open(datagram));
            let mut tunnel = b.lock().unwrap();
            for (opening, mut datagram) in received {
                match tunnel.finish_receive(opening, source, Ecn::NotEct, &mut datagram, now).unwrap() {
                    Received::Packet { packet, .. } => {
                        arrived.push(u32::from_be_bytes(*packet[28..].first_chunk().unwrap()));
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
        arrived
    };
    let mut arrived: Vec<u32> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|thread| scope.spawn(move || work(thread))).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    assert!(arrived.chunks(BATCH as usize).all(|batch| batch.is_sorted()), "each batch in its order");
    arrived.sort();
    assert!(arrived.into_iter().eq(0..THREADS * BATCHES * BATCH));
}
