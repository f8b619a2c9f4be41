//! The simulated network: tunnels at addresses, links that delay, lose and reorder by a seed, and a trace of all that
//! was sent.

use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    time::Duration,
};

use muster_common::time::{Instant, Timestamp};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use super::{
    internet::{self, Internet},
    packets::udp,
    path_mtu::{in_fragments, reply},
};
use crate::{
    Cipher, Config, Dropped, Ecn, Event, Fragmentation, Outgoing, PeerConfig, PrivateKey, PublicKey,
    Received, Tunnel,
};

/// One device in the network.
pub(super) struct Node {
    pub(super) tunnel: Tunnel,
    pub(super) mtu: u16,
    pub(super) address: SocketAddr,
    pub(super) virtual_address: String,
    /// Packets that came out of the tunnel for the TUN device.
    pub(super) inbox: Vec<Vec<u8>>,
    pub(super) events: Vec<Event>,
    pub(super) dropped: Vec<Dropped>,
    /// Empty messages received.
    pub(super) keepalives: usize,
    out: Outgoing,
}

pub(super) struct Network {
    pub(super) now: Instant,
    pub(super) nodes: Vec<Node>,
    /// Datagrams under way, by arrival and a number that keeps the order.
    under_way: BTreeMap<(Instant, u64), (SocketAddr, SocketAddr, Vec<u8>)>,
    sent: u64,
    rng: StdRng,
    /// NATs and directors, if there are any.
    pub(super) internet: Internet,
    pub(super) delay: Duration,
    /// Up to this much is added to the delay, at random, which reorders.
    pub(super) jitter: Duration,
    /// Of 100 datagrams so many get lost.
    pub(super) loss: u32,
    /// What tunnels are told that their peers take.
    pub(super) told: Cipher,
    /// Datagrams to these addresses get lost.
    pub(super) black_holes: Vec<SocketAddr>,
    /// What every path takes, with outer IPv4 headers. Nothing larger arrives in one piece.
    pub(super) mtu: usize,
    /// Whether hosts are told of that, as by routers that send ICMP.
    pub(super) tells: bool,
    /// Datagrams that were lost for being larger than that, and those that arrived nevertheless, in fragments.
    pub(super) too_big: usize,
    pub(super) fragmented: usize,
    /// Everything sent: when, from, to, what.
    pub(super) trace: VecDeque<(Instant, SocketAddr, SocketAddr, Vec<u8>)>,
}

pub(super) fn key(n: u8) -> PrivateKey {
    PrivateKey::from_bytes([n; 32])
}

fn is_echo_request(packet: &[u8]) -> bool {
    if packet[0] >> 4 == 4 { packet[9] == 1 && packet[20] == 8 } else { packet[6] == 58 && packet[40] == 128 }
}

impl Network {
    /// `count` tunnels that do not know each other, 10 ms apart.
    pub(super) fn new(count: u8, seed: u64) -> Self {
        Self::with_rate(count, seed, 0)
    }

    pub(super) fn with_rate(count: u8, seed: u64, handshake_rate: u32) -> Self {
        Self::with_aes(count, seed, handshake_rate, |_| false)
    }

    /// Some of the tunnels take AES-256-GCM.
    pub(super) fn with_aes(
        count: u8,
        seed: u64,
        handshake_rate: u32,
        takes_aes: impl Fn(u8) -> bool,
    ) -> Self {
        Self::with_mtus(&vec![1420; count.into()], seed, handshake_rate, takes_aes)
    }

    /// A tunnel for each MTU of an interface.
    pub(super) fn with_mtus(
        mtus: &[usize],
        seed: u64,
        handshake_rate: u32,
        takes_aes: impl Fn(u8) -> bool,
    ) -> Self {
        let count = mtus.len() as u8;
        let now = Instant::from_boot(Duration::from_secs(1_000));
        let mut keys: Vec<_> = (1..=count).map(key).collect();
        // By public key, so that the first node is the one whose handshake wins.
        keys.sort_by_key(PrivateKey::public_key);
        let nodes = (0u8..).zip(keys).zip(mtus).map(|((n, private_key), mtu)| {
            let config = Config {
                private_key,
                seed: [n.wrapping_add(seed as u8); 32],
                mtu: *mtu,
                handshake_rate,
                accepts_aes: takes_aes(n),
            };
            Node {
                tunnel: Tunnel::new(config, now, Timestamp::from_epoch(Duration::from_secs(1_800_000_000))),
                mtu: *mtu as u16,
                address: SocketAddr::from(([192, 0, 2, n + 1], 51_820)),
                virtual_address: format!("100.64.0.{}", n + 1),
                inbox: vec![],
                events: vec![],
                dropped: vec![],
                keepalives: 0,
                out: Outgoing::new(),
            }
        });
        Self {
            now,
            nodes: nodes.collect(),
            under_way: BTreeMap::new(),
            sent: 0,
            rng: StdRng::seed_from_u64(seed),
            internet: Internet::default(),
            delay: Duration::from_millis(10),
            jitter: Duration::ZERO,
            loss: 0,
            told: Cipher::default(),
            black_holes: vec![],
            mtu: 65_535,
            tells: false,
            too_big: 0,
            fragmented: 0,
            trace: VecDeque::new(),
        }
    }

    /// Two tunnels that know each other's key and address.
    pub(super) fn pair(seed: u64) -> Self {
        let mut network = Self::new(2, seed);
        network.introduce(0, 1);
        network.introduce(1, 0);
        network
    }

    /// What others configure to reach a node.
    pub(super) fn config(&self, n: usize) -> PeerConfig {
        PeerConfig {
            virtual_addresses: vec![self.nodes[n].virtual_address.parse().unwrap()],
            endpoints: vec![self.nodes[n].address],
            cipher: self.told,
            ..PeerConfig::new(self.key(n))
        }
    }

    pub(super) fn key(&self, n: usize) -> PublicKey {
        self.nodes[n].tunnel.public_key()
    }

    /// Tells `to` of `of`.
    pub(super) fn introduce(&mut self, to: usize, of: usize) {
        let config = self.config(of);
        self.nodes[to].tunnel.add_peer(config, self.now);
        self.collect(to);
    }

    /// A program at `from` sends a packet to `to`.
    pub(super) fn send(&mut self, from: usize, to: usize, payload: &[u8]) {
        let packet = udp(&self.nodes[from].virtual_address, &self.nodes[to].virtual_address, payload);
        self.send_packet(from, &packet);
    }

    pub(super) fn send_packet(&mut self, from: usize, packet: &[u8]) {
        let node = &mut self.nodes[from];
        if let Err(reason) = node.tunnel.handle_packet(packet, self.now, &mut node.out) {
            node.dropped.push(reason);
        }
        self.collect(from);
    }

    /// Takes from a tunnel all that it has to say.
    pub(super) fn collect(&mut self, n: usize) {
        let node = &mut self.nodes[n];
        assert!(node.tunnel.deadlines_hold());
        let mut datagrams = Vec::new();
        while let Some(transmit) = node.tunnel.poll_transmit() {
            datagrams.push((transmit.hop, transmit.fragmentation, transmit.payload));
        }
        for run in node.out.runs() {
            let to = (run.hop, run.fragmentation);
            datagrams.extend(run.datagrams().map(|datagram| (to.0, to.1, datagram.to_vec())));
        }
        node.out.clear();
        while let Some(event) = node.tunnel.poll_event() {
            node.events.push(event);
        }
        while let Some(packet) = node.tunnel.poll_packet() {
            node.inbox.push(packet);
        }
        let from = node.address;
        for (hop, fragmentation, payload) in datagrams {
            let to = hop.udp().expect("there are no streams");
            let is_too_big = payload.len() + 28 > self.mtu;
            if is_too_big && self.tells && fragmentation != Fragmentation::Anyone {
                self.nodes[n].tunnel.path_too_big(to, self.mtu, payload.len(), self.now);
            }
            // What the host knows to be too big it fragments itself.
            let arrives = match fragmentation {
                Fragmentation::Anyone => true,
                Fragmentation::Known => !is_too_big || self.tells,
                Fragmentation::Never => !is_too_big,
            };
            if arrives {
                self.fragmented += usize::from(is_too_big);
                self.post(from, to, payload);
            } else {
                self.too_big += 1;
                self.trace.push_back((self.now, from, to, payload));
            }
        }
    }

    /// Puts a datagram on its way.
    pub(super) fn post(&mut self, from: SocketAddr, to: SocketAddr, payload: Vec<u8>) {
        self.trace.push_back((self.now, from, to, payload.clone()));
        let lost = self.rng.random_range(0..100) < self.loss || self.black_holes.contains(&to);
        let jitter = self.jitter.mul_f64(self.rng.random_range(0.0..1.0));
        let mut delay = self.delay + jitter;
        let datagram = match self.internet.forward(to, &payload) {
            Some(relayed) => {
                delay *= 2;
                relayed
            }
            None => self.internet.leave(from, to, self.now).map(|from| (from, to, payload)),
        };
        if let Some(datagram) = datagram.filter(|_| !lost) {
            self.sent += 1;
            self.under_way.insert((self.now + delay, self.sent), datagram);
        }
    }

    pub(super) fn deliver(
        &mut self,
        n: usize,
        from: SocketAddr,
        mut datagram: Vec<u8>,
    ) -> Result<(), Dropped> {
        let node = &mut self.nodes[n];
        let (from, start) = internet::unframe(from, &datagram);
        let result = match node.tunnel.handle_datagram(from, Ecn::NotEct, &mut datagram[start..], self.now) {
            Ok(Received::Packet { packet, .. }) if is_echo_request(packet) => {
                let reply = in_fragments(reply(packet), node.mtu);
                self.send_packet(n, &reply);
                Ok(())
            }
            Ok(Received::Packet { packet, .. }) => {
                node.inbox.push(packet.to_vec());
                Ok(())
            }
            Ok(Received::Keepalive) => {
                node.keepalives += 1;
                Ok(())
            }
            Ok(Received::Probe | Received::Handshake) => Ok(()),
            Err(reason) => {
                node.dropped.push(reason);
                Err(reason)
            }
        };
        self.collect(n);
        result
    }

    /// Lets time pass and everything in it happen.
    pub(super) fn run(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            let arrival = self.under_way.keys().next().map(|(at, _)| *at);
            let timeout = self.nodes.iter().filter_map(|n| n.tunnel.poll_timeout()).map(|(at, _)| at).min();
            let Some(next) = arrival.into_iter().chain(timeout).min().filter(|at| *at <= end) else { break };
            self.now = self.now.max(next);
            while let Some(entry) = self.under_way.first_entry().filter(|e| e.key().0 <= self.now) {
                let (from, to, payload) = entry.remove();
                let Some(to) = self.internet.arrive(from, to, self.now) else { continue };
                if let Some(n) = self.nodes.iter().position(|node| node.address == to) {
                    let _ = self.deliver(n, from, payload);
                }
            }
            for n in 0..self.nodes.len() {
                self.nodes[n].tunnel.handle_timeout(self.now);
                self.collect(n);
            }
        }
        self.now = end;
    }

    pub(super) fn run_secs(&mut self, seconds: u64) {
        self.run(Duration::from_secs(seconds));
    }

    pub(super) fn run_millis(&mut self, milliseconds: u64) {
        self.run(Duration::from_millis(milliseconds));
    }

    /// The host of every node is suspended: the clock goes on and nothing happens; what was under way is lost.
    pub(super) fn suspend(&mut self, time: Duration) {
        self.under_way.clear();
        self.now += time;
    }

    /// The payloads of the UDP packets that came to a node since last asked.
    pub(super) fn take_payloads(&mut self, n: usize) -> Vec<Vec<u8>> {
        self.nodes[n].inbox.drain(..).map(|packet| packet[28..].to_vec()).collect()
    }

    /// Datagrams of one type in the trace.
    pub(super) fn count(&self, from: usize, kind: u8) -> usize {
        let from = self.nodes[from].address;
        self.trace.iter().filter(|(_, f, _, payload)| *f == from && payload[0] == kind).count()
    }

    /// The last datagram of a type that a node sent.
    pub(super) fn last(&self, from: usize, kind: u8) -> Vec<u8> {
        let from = self.nodes[from].address;
        let found = self.trace.iter().rev().find(|(_, f, _, payload)| *f == from && payload[0] == kind);
        found.map(|(.., payload)| payload.clone()).expect("no such datagram was sent")
    }

    /// The local index of the session that a node sends with, as its peer knows it, and the reverse.
    pub(super) fn current_index(&mut self, n: usize, peer: usize) -> u32 {
        let key = self.key(peer);
        self.nodes[n].tunnel.peer_mut(&key).sessions().current().expect("no session").local_index
    }

    /// Packets both ways arrive.
    pub(super) fn assert_works(&mut self) {
        self.take_payloads(0);
        self.take_payloads(1);
        self.send(0, 1, b"to one");
        self.send(1, 0, b"to zero");
        self.run_millis(200);
        assert_eq!(self.take_payloads(1), [b"to one"]);
        assert_eq!(self.take_payloads(0), [b"to zero"]);
    }

    /// Both sides send with one and the same session.
    pub(super) fn assert_one_session(&mut self) {
        let (a, b) = (self.nodes[0].address, self.nodes[1].address);
        let (index_a, index_b) = (self.current_index(0, 1), self.current_index(1, 0));
        self.trace.clear();
        self.send(0, 1, b"x");
        self.send(1, 0, b"y");
        let receiver = |from| {
            let found = self.trace.iter().find(|(_, f, _, payload)| *f == from && payload[0] == 4);
            u32::from_le_bytes(*found.unwrap().3[4..].first_chunk().unwrap())
        };
        assert_eq!((receiver(a), receiver(b)), (index_b, index_a));
        self.run_millis(100);
    }
}
