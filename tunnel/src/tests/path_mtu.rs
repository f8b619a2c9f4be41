//! Path MTU discovery over a simulated path, with real probe packets and virtual time.

use std::{collections::VecDeque, net::IpAddr, time::Duration};

use muster_common::time::Instant;
use proptest::prelude::*;
use rand::{SeedableRng as _, rngs::StdRng};

use super::packets::udp;
use crate::path_mtu::*;

/// Data is sent this often.
const DATA_INTERVAL: Duration = Duration::from_millis(100);
/// More than this are never sent in a minute: two a second, and one more for the minute's end.
const PROBES_A_MINUTE: usize = 121;

struct Path {
    mtu: u16,
    /// Whether what is too big is told of, or dropped silently.
    tells: bool,
    answers: bool,
    /// MTU of the interface of the peer.
    peer_mtu: u16,
    /// Percent of packets lost, each way.
    loss: u32,
    round_trip: Duration,
    /// Whether small messages come from the peer.
    is_alive: bool,
}

fn path(mtu: u16) -> Path {
    let round_trip = Duration::from_millis(40);
    Path { mtu, tells: false, answers: true, peer_mtu: 8920, loss: 0, round_trip, is_alive: true }
}

struct Simulation {
    path_mtu: PathMtu,
    path: Path,
    rng: StdRng,
    now: Instant,
    sends: bool,
    next_data: Instant,
    addresses: [IpAddr; 2],
    replies: VecDeque<(Instant, Vec<u8>)>,
    probes: Vec<(Instant, u16)>,
    /// What [`PathMtu::current`] was after each change.
    sizes: Vec<u16>,
    wakes: usize,
}

impl Simulation {
    fn new(base: u16, max: u16, path: Path, seed: u64) -> Self {
        let path_mtu = PathMtu::new(base, max);
        let now = Instant::from_boot(Duration::from_secs(1000));
        let addresses =
            if seed.is_multiple_of(2) { ["10.0.0.1", "10.0.0.9"] } else { ["fd00::1", "fd00::9"] };
        Self {
            sizes: vec![path_mtu.current()],
            path_mtu,
            path,
            rng: StdRng::seed_from_u64(seed),
            now,
            sends: true,
            next_data: now,
            addresses: addresses.map(|a| a.parse().unwrap()),
            replies: VecDeque::new(),
            probes: Vec::new(),
            wakes: 0,
        }
    }

    fn run_secs(&mut self, seconds: u64) {
        let end = self.now + Duration::from_secs(seconds);
        loop {
            let data = self.sends.then_some(self.next_data);
            let reply = self.replies.front().map(|(at, _)| *at);
            let timeout = self.path_mtu.poll_timeout();
            let next = [data, reply, timeout].into_iter().flatten().min().filter(|at| *at <= end);
            let Some(next) = next else { break };
            self.now = self.now.max(next);
            if data.is_some_and(|at| at <= self.now) {
                self.next_data = self.now + DATA_INTERVAL;
                self.path_mtu.data_sent(self.now);
                if self.path.is_alive {
                    self.path_mtu.data_received(self.now);
                }
            }
            if reply.is_some_and(|at| at <= self.now) {
                let (_, reply) = self.replies.pop_front().unwrap();
                assert!(self.path_mtu.handle_reply(&reply, self.now), "not recognised");
                self.path_mtu.data_received(self.now);
            }
            if timeout.is_some_and(|at| at <= self.now) {
                self.wakes += 1;
                self.path_mtu.handle_timeout(self.now);
            }
            if let Some(probe) = self.path_mtu.next_probe(self.now, || self.rng.random()) {
                self.send(probe);
            }
            if *self.sizes.last().unwrap() != self.path_mtu.current() {
                self.sizes.push(self.path_mtu.current());
            }
        }
        self.now = end;
        self.next_data = self.next_data.max(end);
        self.assert_bounds();
    }

    fn send(&mut self, probe: Probe) {
        self.probes.push((self.now, probe.size));
        let mut request = Vec::new();
        probe_packet(&probe, self.addresses[0], self.addresses[1], &mut request);
        assert_eq!(request.len(), usize::from(probe.size));
        let is_lost = |rng: &mut StdRng| rng.random_range(0..100) < self.path.loss;
        if probe.size > self.path.mtu {
            if self.path.tells {
                self.path_mtu.too_big(self.path.mtu, self.now);
            }
        } else if self.path.answers && !is_lost(&mut self.rng) && !is_lost(&mut self.rng) {
            let reply = in_fragments(reply(&request), self.path.peer_mtu);
            self.replies.push_back((self.now + self.path.round_trip, reply));
        }
    }

    fn assert_bounds(&self) {
        assert!(self.sizes.iter().all(|size| *size >= MIN_PLPMTU), "{:?}", self.sizes);
        for (i, (at, _)) in self.probes.iter().enumerate() {
            let minute = self.probes[i..].iter().take_while(|(t, _)| *t - *at < Duration::from_secs(60));
            assert!(minute.count() <= PROBES_A_MINUTE);
        }
    }

    fn assert_converged(&self) {
        let (current, mtu) = (self.path_mtu.current(), self.path.mtu);
        assert!(current <= mtu && mtu - current <= 16, "{current} on a path of {mtu}: {:?}", self.sizes);
    }

    /// Probes sent during the last `seconds`.
    fn recent(&self, seconds: u64) -> usize {
        self.probes.iter().filter(|(at, _)| self.now - *at < Duration::from_secs(seconds)).count()
    }
}

/// What a host answers to an echo request.
pub(crate) fn reply(request: &[u8]) -> Vec<u8> {
    let mut reply = request.to_vec();
    let (addresses, half, message, kind) =
        if request[0] >> 4 == 4 { (12..20, 4, 20, 0) } else { (8..40, 16, 40, 129) };
    reply[addresses].rotate_left(half);
    reply[message] = kind;
    reply
}

/// The first fragment of a packet, or the whole if it fits.
pub(crate) fn in_fragments(mut packet: Vec<u8>, mtu: u16) -> Vec<u8> {
    let len = |header: u16| header + (mtu - header) / 8 * 8;
    if packet.len() <= usize::from(mtu) {
    } else if packet[0] >> 4 == 4 {
        packet.truncate(len(20).into());
        packet[2..4].copy_from_slice(&len(20).to_be_bytes());
        packet[6] = 0x20;
    } else {
        let fragment_header = [std::mem::replace(&mut packet[6], 44), 0, 0, 1, 9, 9, 9, 9];
        packet.splice(40..40, fragment_header);
        packet.truncate(len(48).into());
        packet[4..6].copy_from_slice(&(len(48) - 40).to_be_bytes());
    }
    packet
}

#[test]
fn a_peer_with_a_smaller_interface() {
    for seed in 0..2 {
        let mut sim = Simulation::new(1420, 8920, Path { peer_mtu: 1420, ..path(8920) }, seed);
        sim.run_secs(10);
        assert_eq!(sim.sizes, [1420]);
        let sizes: Vec<_> = sim.probes.iter().map(|(_, size)| *size).collect();
        assert_eq!(sizes, [1420, 8920, 1440, 1430, 1425], "one of each size");
    }
}

/// Probes and answers between two devices, one of which has sent a single packet.
#[test]
fn two_devices_do_not_keep_each_other_awake() {
    let mut now = Instant::from_boot(Duration::from_secs(9));
    let addresses: [IpAddr; 2] = ["10.0.0.1", "10.0.0.9"].map(|a| a.parse().unwrap());
    let mut devices = [PathMtu::new(1420, 8920), PathMtu::new(1420, 8920)];
    devices[0].data_sent(now);
    let mut probes = [0; 2];
    while let Some(at) = devices.iter().filter_map(PathMtu::poll_timeout).min() {
        now = now.max(at);
        for n in 0..2 {
            devices[n].handle_timeout(now);
            let Some(probe) = devices[n].next_probe(now, || 7) else { continue };
            probes[n] += 1;
            let mut request = Vec::new();
            probe_packet(&probe, addresses[n], addresses[1 - n], &mut request);
            devices[1 - n].data_received(now);
            let answer = reply(&request);
            if is_data(&answer) {
                devices[1 - n].data_sent(now);
            }
            assert!(devices[n].handle_reply(&answer, now));
        }
        assert!(now < Instant::from_boot(Duration::from_secs(60)));
    }
    assert_eq!(probes, [2, 0]);
}

#[test]
fn base_then_max_on_a_jumbo_path() {
    for seed in 0..2 {
        let mut sim = Simulation::new(1420, 8920, path(8920), seed);
        assert_eq!(sim.path_mtu.current(), 1420);
        sim.run_secs(2);
        assert_eq!(sim.probes.iter().map(|(_, size)| *size).collect::<Vec<_>>(), [1420, 8920]);
        assert_eq!(sim.sizes, [1420, 8920]);
    }
}

#[test]
fn a_told_mtu_is_used_at_once() {
    let mut sim = Simulation::new(1420, 8920, Path { tells: true, ..path(1440) }, 1);
    sim.run_secs(5);
    assert_eq!(sim.probes.iter().map(|(_, size)| *size).collect::<Vec<_>>(), [1420, 8920, 1440]);
    sim.run_secs(700);
    assert_eq!(sim.probes.iter().filter(|(_, size)| *size > 1440).count(), 2, "and one more to raise it");
    assert_eq!(sim.sizes, [1420, 1440]);
    assert!(!sim.path_mtu.needs_fragments());
}

#[test]
fn base_in_a_black_hole() {
    let mut sim = Simulation::new(1420, 1420, path(1300), 1);
    sim.run_secs(4);
    assert_eq!(sim.sizes[..2], [1420, 1280], "within seconds");
    sim.run_secs(60);
    sim.assert_converged();
    assert!(!sim.path_mtu.needs_fragments());
}

#[test]
fn a_path_that_takes_less_than_1280() {
    for tells in [false, true] {
        let mut sim = Simulation::new(1420, 8920, Path { tells, ..path(1200) }, 1);
        sim.run_secs(20);
        assert_eq!(sim.sizes, [1420, 1280]);
        assert!(sim.path_mtu.needs_fragments());
        sim.run_secs(500);
        assert_eq!(sim.recent(500), 0);
        sim.path.mtu = 1500;
        sim.run_secs(240);
        sim.assert_converged();
        assert!(!sim.path_mtu.needs_fragments());
    }
}

#[test]
fn a_peer_that_never_answers_keeps_base() {
    for mtu in [1300, 8920] {
        let mut sim = Simulation::new(1420, 8920, Path { answers: false, ..path(mtu) }, 1);
        sim.run_secs(3600);
        assert_eq!(sim.sizes, [1420]);
        assert!(sim.recent(1200) <= 6, "only the smallest, every ten minutes");
        sim.path_mtu.too_big(1300, sim.now);
        assert_eq!(sim.path_mtu.current(), 1300);
        sim.path_mtu.too_big(1350, sim.now);
        sim.path_mtu.too_big(900, sim.now);
        assert_eq!(sim.path_mtu.current(), 1280);
        assert!(sim.path_mtu.needs_fragments());
    }
}

#[test]
fn a_path_that_shrinks_silently() {
    for (mtu, later) in [(8920, 1420), (8920, 1290), (1440, 1400), (4000, 1281)] {
        let mut sim = Simulation::new(1420, 8920, path(mtu), 1);
        sim.run_secs(120);
        sim.assert_converged();
        sim.path.mtu = later;
        sim.run_secs(40);
        assert!(sim.path_mtu.current() <= later, "no black hole");
        sim.run_secs(120);
        sim.assert_converged();
    }
}

#[test]
fn no_answer_makes_the_check_at_once() {
    let mut sim = Simulation::new(1420, 8920, path(8920), 1);
    sim.run_secs(3);
    sim.path.mtu = 1420;
    sim.path_mtu.no_answer(sim.now);
    sim.run_secs(8);
    assert_eq!(sim.sizes, [1420, 8920, 1420]);
}

#[test]
fn a_path_that_grows_is_found_out_after_ten_minutes() {
    for tells in [false, true] {
        let mut sim = Simulation::new(1420, 8920, Path { tells, ..path(1500) }, 2);
        sim.run_secs(120);
        sim.assert_converged();
        sim.path.mtu = 8920;
        sim.run_secs(400);
        assert!(sim.path_mtu.current() <= 1500);
        sim.run_secs(140);
        sim.assert_converged();
    }
}

#[test]
fn a_told_mtu_is_doubted_after_ten_minutes() {
    let mut sim = Simulation::new(1420, 8920, path(8920), 2);
    sim.run_secs(10);
    sim.path_mtu.too_big(1, sim.now);
    assert_eq!(sim.path_mtu.current(), 1280);
    sim.run_secs(590);
    assert_eq!(sim.path_mtu.current(), 1280);
    sim.run_secs(30);
    assert_eq!(sim.path_mtu.current(), 8920);
}

#[test]
fn an_outage_lowers_nothing() {
    let mut sim = Simulation::new(1420, 8920, path(8920), 1);
    sim.run_secs(10);
    (sim.path.answers, sim.path.is_alive) = (false, false);
    sim.run_secs(300);
    (sim.path.answers, sim.path.is_alive) = (true, true);
    sim.run_secs(600);
    assert_eq!(sim.sizes, [1420, 8920]);
}

#[test]
fn a_peer_that_no_longer_answers_gets_base() {
    let mut sim = Simulation::new(1420, 8920, path(8920), 1);
    sim.run_secs(10);
    sim.path.answers = false;
    sim.run_secs(60);
    assert_eq!(sim.sizes, [1420, 8920, 1420]);
    sim.path.answers = true;
    sim.run_secs(120);
    assert_eq!(sim.path_mtu.current(), 8920);
}

#[test]
fn loss_by_chance_lowers_nothing() {
    for seed in 0..32 {
        let mut sim = Simulation::new(1420, 8920, Path { loss: 7, ..path(8920) }, seed);
        sim.run_secs(3600);
        assert_eq!(sim.sizes, [1420, 8920], "seed {seed}");
    }
}

#[test]
fn an_idle_tunnel_sleeps() {
    let mut sim = Simulation::new(1420, 8920, path(1500), 1);
    sim.sends = false;
    sim.run_secs(3600);
    assert_eq!((sim.wakes, sim.probes.len()), (0, 0), "before the first data");
    for seconds in [3, 120] {
        sim.sends = true;
        sim.run_secs(seconds);
        sim.sends = false;
        sim.run_secs(12);
        (sim.wakes, sim.probes) = (0, vec![]);
        assert_eq!(sim.path_mtu.poll_timeout(), None);
        sim.run_secs(3600);
        assert_eq!((sim.wakes, sim.probes.len()), (0, 0));
    }
    let current = sim.path_mtu.current();
    (sim.sends, sim.next_data) = (true, sim.now);
    let start = sim.now;
    sim.run_secs(1);
    assert_eq!(sim.probes.first(), Some(&(start, current)), "checked as soon as data flows again");
}

#[test]
fn without_a_session_nothing_spins() {
    let mut path_mtu = PathMtu::new(1420, 8920);
    let now = Instant::from_boot(Duration::from_secs(9));
    path_mtu.data_sent(now);
    assert!(path_mtu.poll_timeout().is_some_and(|at| at <= now));
    path_mtu.handle_timeout(now);
    assert_eq!(path_mtu.poll_timeout(), None, "until the probe was taken");
    assert!(path_mtu.next_probe(now + Duration::from_secs(5), || 1).is_some());
}

#[test]
fn a_new_path_begins_at_base() {
    let mut sim = Simulation::new(1420, 8920, path(8920), 1);
    sim.run_secs(10);
    sim.path.round_trip = Duration::from_secs(2);
    sim.run_secs(6);
    assert_eq!(sim.replies.len(), 1);
    sim.path_mtu.path_changed(sim.now);
    sim.path.mtu = 1500;
    assert_eq!(sim.path_mtu.current(), 1420);
    sim.sizes = vec![1420];
    sim.run_secs(60);
    assert!(sim.sizes.iter().all(|size| *size <= 1500), "replies from the old path prove nothing");
    for _ in 0..300 {
        sim.path_mtu.path_changed(sim.now);
        sim.run_secs(1);
    }
}

#[test]
fn slow_replies_count() {
    let mut sim = Simulation::new(1420, 8920, path(8920), 1);
    sim.path.round_trip = Duration::from_millis(4500);
    sim.run_secs(120);
    assert_eq!(sim.path_mtu.current(), 8920);
    assert!(sim.sizes.iter().all(|size| *size >= 1420), "{:?}", sim.sizes);
}

#[test]
fn only_our_replies_are_taken() {
    for (source, destination) in [("10.0.0.1", "10.0.0.9"), ("fd00::1", "fd00::9")] {
        let now = Instant::from_boot(Duration::from_secs(9));
        let mut path_mtu = PathMtu::new(1420, 8920);
        path_mtu.data_sent(now);
        path_mtu.handle_timeout(now);
        let probe = path_mtu.next_probe(now, || 0x5555_0123_4567_89ab_cdef).unwrap();
        assert_eq!((probe.size, probe.identifier, probe.nonce), (1420, 0x5555, 0x0123_4567_89ab_cdef));
        let mut request = Vec::new();
        probe_packet(&probe, source.parse().unwrap(), destination.parse().unwrap(), &mut request);
        let right = reply(&request);
        let message = if source.contains(':') { 40 } else { 20 };
        for at in (message + 4..message + 16).chain([message]) {
            let mut wrong = right.clone();
            wrong[at] ^= 1;
            assert!(!path_mtu.handle_reply(&wrong, now), "octet {at}");
        }
        assert!(!path_mtu.handle_reply(&request, now));
        assert!(!path_mtu.handle_reply(&udp(source, destination, b"x"), now));
        if message == 20 {
            let mut fragment = right.clone();
            fragment[6] = 0x20;
            assert!(path_mtu.handle_reply(&fragment, now), "ours, but it proves nothing");
            assert!(path_mtu.poll_timeout().is_some_and(|at| at == now + PROBE_TIMER));
        }
        assert!(path_mtu.handle_reply(&right, now));
        assert!(path_mtu.poll_timeout().is_some_and(|at| at < now + PROBE_TIMER), "the next one is due");
        assert!(path_mtu.handle_reply(&right, now), "a duplicate is ours, too");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn converges_on_any_path(
        mtu in 1280u16..9000,
        base in 1280u16..1421,
        tells: bool,
        round_trip in 1u64..900,
        seed: u64,
    ) {
        let round_trip = Duration::from_millis(round_trip);
        let max = 8920;
        let mut sim = Simulation::new(base, max, Path { tells, round_trip, ..path(mtu.min(max)) }, seed);
        sim.run_secs(120);
        sim.assert_converged();
        prop_assert!(!sim.path_mtu.needs_fragments());
        sim.run_secs(300);
        sim.assert_converged();
        prop_assert!(sim.recent(240) <= 17, "steady: a check every quarter of a minute");
        let settled = sim.path_mtu.current();
        sim.run_secs(1200);
        prop_assert!(sim.path_mtu.current() >= settled);
        sim.assert_converged();
    }

    #[test]
    fn changes_at_any_time_are_followed(
        changes in prop::collection::vec((1280u16..8921, any::<bool>(), 1u64..100), 1..6),
        seed: u64,
    ) {
        let mut sim = Simulation::new(1420, 8920, path(8920), seed);
        for (mtu, tells, seconds) in changes {
            (sim.path.mtu, sim.path.tells) = (mtu, tells);
            sim.run_secs(seconds);
        }
        sim.run_secs(800);
        sim.assert_converged();
    }

    #[test]
    fn any_octets_are_no_reply(octets in prop::collection::vec(any::<u8>(), 0..80), first in any::<u8>()) {
        let now = Instant::from_boot(Duration::from_secs(9));
        let mut path_mtu = PathMtu::new(1420, 8920);
        path_mtu.data_sent(now);
        path_mtu.handle_timeout(now);
        let _ = path_mtu.next_probe(now, || 0);
        let mut octets = octets;
        for kind in [first, 0x45, 0x60] {
            if let Some(octet) = octets.first_mut() {
                *octet = kind;
            }
            let _ = (path_mtu.handle_reply(&octets, now), is_data(&octets));
        }
    }
}
