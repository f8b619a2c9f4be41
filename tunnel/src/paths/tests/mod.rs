//! The rules one by one; two peers against each other are in [`two`].

use super::*;
use crate::endpoint::{DirectorId, DirectorLink, Handle, Hop};

mod two;

const PEER: Handle = Handle(7);

fn at(n: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, n], 51_820))
}

fn direct(n: u8) -> Endpoint {
    at(n).into()
}

fn relay(director: u16) -> Endpoint {
    Endpoint::Relay { director: DirectorId(director), handle: PEER }
}

fn link(is_draining: bool) -> DirectorLink {
    DirectorLink { session: 1, hop: Hop::Udp(at(250)), is_draining }
}

fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

/// One side, whose probes go to a list.
struct Side {
    paths: Paths,
    links: Links,
    now: Instant,
    nonces: u64,
    probes: Vec<(Endpoint, u64)>,
}

impl Side {
    /// Knows two addresses and two relays, of which it reaches both.
    fn new(follows: bool) -> Self {
        let now = Instant::from_boot(Duration::from_secs(500));
        let mut side =
            Self { paths: Paths::new(follows, now), links: Links::default(), now, nonces: 0, probes: vec![] };
        side.set_link(0, Some(false));
        side.set_link(1, Some(false));
        side.paths.set(&[at(1), at(2)], &[relay(0), relay(1)], &side.links, now);
        side
    }

    /// Reached through the first relay, and a session is made.
    fn relayed(follows: bool) -> Self {
        let mut side = Self::new(follows);
        assert!(side.heard(relay(0), Heard::Handshake));
        side.paths.session_made(side.now);
        side.collect();
        side
    }

    /// The first address is proven.
    fn proven(follows: bool) -> Self {
        let mut side = Self::relayed(follows);
        side.pass(ms(5));
        assert!(side.answer(direct(1)));
        side.pass(ms(3_000));
        side.answer(direct(1));
        side.probes.clear();
        assert_eq!(side.why(), (direct(1), Why::Probe));
        side
    }

    fn set_link(&mut self, director: u16, link_: Option<bool>) -> bool {
        self.links.set(DirectorId(director), link_.map(link));
        let moved = self.paths.director_changed(DirectorId(director), &self.links, self.now);
        self.collect();
        moved
    }

    fn collect(&mut self) {
        let nonces = &mut self.nonces;
        while let Some(probe) = self.paths.next_probe(&self.links, self.now, || {
            *nonces += 1;
            *nonces
        }) {
            self.probes.push(probe);
        }
    }

    fn heard(&mut self, from: Endpoint, what: Heard) -> bool {
        let moved = self.paths.heard(from, what, &self.links, self.now);
        self.collect();
        moved
    }

    /// The last probe of an endpoint is answered.
    fn answer(&mut self, from: Endpoint) -> bool {
        let index = self.probes.iter().rposition(|(to, _)| *to == from).expect("it was not probed");
        let (_, nonce) = self.probes.remove(index);
        let moved = self.heard(from, Heard::Probe) | self.paths.answered(nonce, from, self.now);
        self.collect();
        moved
    }

    fn send(&mut self) -> bool {
        let moved = self.paths.is_stale(self.now) && self.paths.leave_stale(&self.links, self.now);
        self.paths.sent_data(self.now);
        self.collect();
        moved
    }

    fn pass(&mut self, time: Duration) -> bool {
        let end = self.now + time;
        let mut moved = false;
        let mut turns = 0;
        while let Some(due) = self.paths.poll_timeout().filter(|due| *due <= end) {
            assert!(due >= self.now || turns < 10, "due in the past");
            turns += 1;
            assert!(turns < 1_000, "spins");
            self.now = self.now.max(due);
            moved |= self.paths.handle_timeout(&self.links, self.now);
            self.collect();
        }
        self.now = end;
        moved
    }

    fn why(&self) -> (Endpoint, Why) {
        let snapshot = self.paths.snapshot().unwrap();
        (snapshot.endpoint, snapshot.why)
    }

    fn destinations(&self, tries: usize, is_up: bool) -> Vec<Endpoint> {
        let mut all = self.paths.destinations(tries, is_up, false, &self.links, self.now);
        all.sort();
        all
    }

    fn probed(&mut self) -> Vec<Endpoint> {
        let mut probed: Vec<_> = std::mem::take(&mut self.probes).into_iter().map(|(to, _)| to).collect();
        probed.sort();
        probed
    }
}

#[test]
fn the_first_initiation_goes_through_one_relay_and_others_everywhere() {
    let mut side = Side::new(false);
    let everything = [direct(1), direct(2), relay(0), relay(1)];
    assert_eq!(side.destinations(0, false), [relay(0)]);
    assert_eq!(side.destinations(1, false), everything);
    side.set_link(0, None);
    assert_eq!(side.destinations(0, false), [relay(1)]);
    assert_eq!(side.destinations(1, false), [direct(1), direct(2), relay(1)]);
    side.set_link(1, None);
    assert_eq!(side.destinations(0, false), [direct(1), direct(2)]);
    side.set_link(0, Some(true));
    assert_eq!(side.destinations(0, false), [relay(0)], "draining, but there is no other");
    side.set_link(1, Some(false));
    assert_eq!(side.destinations(0, false), [relay(1)]);
    let side = Side::proven(false);
    assert_eq!(side.destinations(0, true), [direct(1)], "renewals go along the current path");
    assert_eq!(side.destinations(0, false), [relay(0)]);
}

#[test]
fn a_round_probes_all_addresses_and_the_current_path() {
    let mut side = Side::relayed(false);
    assert_eq!(side.probed(), [direct(1), direct(2), relay(0)]);
    let mut times = vec![];
    let start = side.now;
    for _ in 0..300 {
        side.pass(ms(10));
        if !side.probes.is_empty() {
            times.push((side.now - start).as_millis());
            assert_eq!(side.probed(), [direct(1), direct(2), relay(0)]);
        }
    }
    assert_eq!(times, [50, 150, 350, 750, 1_550]);
    side.pass(Duration::from_secs(200));
    assert!(side.probes.is_empty(), "without data there are no more");
    side.send();
    side.heard(relay(0), Heard::Data);
    side.pass(ms(1));
    assert_eq!(side.probed(), [direct(1), direct(2), relay(0)]);
}

#[test]
fn an_address_is_used_as_soon_as_a_probe_is_answered_there_and_no_sooner() {
    let mut side = Side::relayed(false);
    side.pass(ms(20));
    for what in [Heard::Data, Heard::Probe, Heard::Handshake] {
        assert!(!side.heard(direct(1), what));
        assert!(!side.heard(direct(9), what), "nor an unknown one");
    }
    let stray = side.paths.answered(99, direct(1), side.now);
    assert!(!stray, "an answer to nothing");
    let (_, nonce) = side.probes[0];
    assert!(!side.paths.answered(nonce, direct(2), side.now), "an answer from elsewhere");
    assert!(side.answer(direct(1)));
    assert_eq!(side.why(), (direct(1), Why::Probe));
    assert_eq!(side.paths.snapshot().unwrap().round_trip, Some(ms(20)));
}

#[test]
fn the_fastest_address_wins_if_it_is_better_by_enough() {
    for (first, second, moves) in
        [(20, 10, true), (20, 17, false), (2, 1, true), (1, 0, true), (10, 30, false)]
    {
        let mut side = Side::relayed(false);
        side.pass(ms(first));
        assert!(side.answer(direct(1)));
        side.pass(ms(50 - first + second));
        assert_eq!(side.answer(direct(2)), moves, "{first} {second}");
    }
    // One that answers nothing in a round is left for one that does.
    let mut side = Side::proven(false);
    side.paths.session_made(side.now);
    side.collect();
    side.pass(ms(30));
    assert!(!side.answer(direct(2)));
    assert!(side.pass(ms(3_000)));
    assert_eq!(side.why(), (direct(2), Why::Probe));
}

#[test]
fn unknown_addresses_of_probes_are_learned_and_probed() {
    let mut side = Side::relayed(false);
    side.pass(ms(3_000));
    side.probes.clear();
    assert!(!side.heard(direct(50), Heard::Probe));
    assert_eq!(side.probed(), [direct(50)]);
    for n in 51..90 {
        side.heard(direct(n), Heard::Probe);
    }
    let learned = side.paths.candidates.iter().filter(|candidate| !candidate.is_told).count();
    assert_eq!(learned, LEARNED);
    assert!(side.answer(direct(89)));
    for n in 90..120 {
        side.heard(direct(n), Heard::Probe);
    }
    assert!(side.paths.candidates.get(&direct(89)).is_some(), "the proven one stays");
}

#[test]
fn a_peer_that_moves_is_followed_at_once_to_an_unknown_address() {
    for follows in [false, true] {
        let mut side = Side::proven(follows);
        assert!(side.heard(direct(77), Heard::Data));
        assert_eq!(side.why(), (direct(77), Why::Roamed));
        assert_eq!(side.probed(), [direct(77)]);
    }
}

#[test]
fn a_known_address_is_probed_and_followed_when_the_current_one_is_quiet() {
    for follows in [false, true] {
        let mut side = Side::proven(follows);
        assert!(!side.heard(direct(2), Heard::Data));
        assert_eq!(side.probed(), [direct(2)]);
        side.pass(ms(1_100));
        assert_eq!(side.heard(direct(2), Heard::Data), follows);
        if !follows {
            assert_eq!(side.probes.len(), 2);
            side.pass(ms(5));
            side.answer(direct(2));
            assert!(side.pass(ms(1_000)), "the current one does not answer");
            assert_eq!(side.why(), (direct(2), Why::Silence));
        }
    }
}

#[test]
fn a_peer_that_falls_back_to_a_relay_is_doubted() {
    let mut side = Side::proven(false);
    side.pass(ms(1_100));
    assert!(!side.heard(relay(1), Heard::Data));
    assert_eq!(side.probed(), [direct(1)]);
    side.heard(direct(1), Heard::Data);
    assert!(side.pass(ms(1_000)), "it is heard, but does not hear us");
    assert_eq!(side.why(), (relay(1), Why::Silence), "the relay that it was heard through");
    let mut side = Side::proven(false);
    side.pass(ms(1_100));
    side.heard(relay(1), Heard::Data);
    side.pass(ms(10));
    side.answer(direct(1));
    assert!(!side.pass(ms(2_000)));
    side.probes.clear();
    side.heard(relay(1), Heard::Data);
    assert!(side.probes.is_empty(), "not again so soon");
}

#[test]
fn of_two_that_change_relays_one_follows() {
    for follows in [false, true] {
        let mut side = Side::relayed(follows);
        assert_eq!(side.heard(relay(1), Heard::Data), follows);
        let mut side = Side::relayed(follows);
        assert!(side.heard(relay(1), Heard::Handshake), "handshakes are followed by both");
        let mut side = Side::relayed(follows);
        side.set_link(1, Some(true));
        assert!(!side.heard(relay(1), Heard::Data), "but not to a director that drains");
    }
}

#[test]
fn relays_are_left_when_their_director_goes_drains_or_has_no_such_device() {
    let mut side = Side::relayed(false);
    assert!(side.set_link(0, None));
    assert_eq!(side.why(), (relay(1), Why::DirectorLost));
    assert!(!side.set_link(1, None), "there is no other");
    assert!(side.set_link(0, Some(false)));
    assert_eq!(side.why().0, relay(0));

    let mut side = Side::relayed(false);
    assert!(side.set_link(0, Some(true)));
    assert_eq!(side.why(), (relay(1), Why::DirectorLost));
    assert!(!side.set_link(1, Some(true)), "both drain");

    let mut side = Side::relayed(false);
    assert!(!side.paths.unreachable(relay(1), &side.links, side.now));
    assert_eq!(side.destinations(0, false), [relay(0)]);
    assert!(!side.paths.unreachable(relay(0), &side.links, side.now), "neither has it");
    side.pass(LOST_FOR);
    assert_eq!(side.destinations(0, false), [relay(0)]);

    let mut side = Side::relayed(false);
    assert!(side.paths.unreachable(relay(0), &side.links, side.now));
    assert_eq!(side.why(), (relay(1), Why::DirectorLost));

    let mut side = Side::relayed(false);
    let (_, moved) = side.paths.set(&[at(1)], &[relay(1)], &side.links, side.now);
    assert!(moved);
    assert_eq!(side.why(), (relay(1), Why::DirectorLost));
}

#[test]
fn silence_leads_to_a_check_and_then_to_a_relay() {
    let mut side = Side::proven(false);
    side.send();
    assert!(!side.pass(ms(1_900)));
    assert!(side.probes.is_empty());
    assert!(!side.pass(ms(900)));
    assert_eq!(side.probed(), [direct(1); 3]);
    assert!(side.pass(ms(200)));
    assert_eq!(side.why(), (relay(0), Why::Silence));
    side.probes.clear();
    assert!(!side.pass(ms(60)));
    side.pass(ms(5));
    assert!(side.answer(direct(1)), "and back, if the path answers");

    let mut side = Side::proven(false);
    for _ in 0..50 {
        side.send();
        side.pass(ms(100));
        side.heard(direct(1), Heard::Data);
    }
    assert_eq!(side.why().0, direct(1));

    // A relay is checked, too; the one that has failed is not tried again soon.
    let mut side = Side::relayed(false);
    let mut seen = vec![];
    for _ in 0..200 {
        side.send();
        if side.pass(ms(100)) {
            seen.push(side.why());
        }
    }
    assert_eq!(seen, [(relay(1), Why::Silence)]);
}

#[test]
fn the_peers_distress_is_checked_at_once() {
    let mut side = Side::proven(false);
    side.paths.distress(side.now);
    assert!(side.pass(ms(900)));
    assert_eq!(side.why(), (relay(0), Why::Silence));
}

#[test]
fn a_stale_address_is_not_sent_to() {
    let mut side = Side::proven(false);
    side.pass(Duration::from_secs(600));
    assert!(side.probed().len() < 40, "no data, no probes");
    assert!(side.send());
    assert_eq!(side.why(), (relay(0), Why::Silence));
    assert_eq!(side.probes.len(), 3);
    side.pass(ms(3));
    assert!(side.answer(direct(1)));

    // The host was suspended.
    let mut side = Side::proven(false);
    side.now += Duration::from_secs(3_600);
    assert!(side.send());

    // There is no relay: nothing is lost by trying.
    let mut side = Side::proven(false);
    side.set_link(0, None);
    side.set_link(1, None);
    side.now += Duration::from_secs(3_600);
    assert!(!side.send());
    assert_eq!(side.probed(), [direct(1), direct(2)]);
}

#[test]
fn an_address_that_is_taken_for_want_of_a_director_is_no_fresher_for_that() {
    let mut side = Side::proven(false);
    side.paths.distress(side.now);
    side.collect();
    side.pass(ms(2_000));
    assert_eq!(side.why(), (relay(0), Why::Silence));
    side.now += Duration::from_secs(25);
    side.set_link(0, None);
    side.set_link(1, None);
    assert_eq!(side.why(), (direct(1), Why::DirectorLost));
    side.set_link(0, Some(false));
    assert_eq!(side.why(), (direct(1), Why::DirectorLost));
    side.now += Duration::from_secs(15);
    assert!(side.send(), "its proof is 42 s old");
    assert_eq!(side.why(), (relay(0), Why::Silence));
}

#[test]
fn a_stale_address_is_left_for_where_the_peer_is_heard() {
    for what in [Heard::Handshake, Heard::Data] {
        let mut side = Side::proven(false);
        side.now += Duration::from_secs(39);
        assert!(!side.heard(relay(1), what));
        assert_eq!(side.why(), (direct(1), Why::Probe), "the address is only doubted");
        side.now += Duration::from_secs(1);
        assert!(!side.heard(relay(1), Heard::Probe));
        side.probes.clear();
        assert!(side.heard(relay(1), what));
        assert_eq!(side.why(), (relay(1), Why::Roamed));
        assert_eq!(side.probed(), [direct(1), direct(2), relay(1)], "and asked, in a round");
    }
}

#[test]
fn an_address_in_use_is_kept_fresh() {
    let mut side = Side::proven(false);
    side.send();
    side.heard(direct(1), Heard::Data);
    let mut probes = 0;
    for _ in 0..290 {
        side.pass(Duration::from_secs(1));
        if !side.probes.is_empty() {
            probes += 1;
            side.answer(direct(1));
        }
    }
    assert_eq!(probes, 14);
    assert!(!side.send());
    side.heard(direct(1), Heard::Data);
    side.pass(Duration::from_secs(330));
    side.probes.clear();
    side.pass(Duration::from_secs(600));
    assert!(side.probes.is_empty(), "idle");
}

#[test]
fn a_host_that_moves_asks_everywhere_through_a_relay_until_something_answers() {
    let mut side = Side::proven(false);
    side.set_link(0, None);
    side.set_link(1, None);
    assert!(!side.paths.host_moved(&side.links, side.now), "there is no relay");
    side.collect();
    assert_eq!(side.probed(), [direct(1), direct(2)]);
    assert!(!side.pass(ms(1_000)));
    assert_eq!(side.why().0, direct(1));
    assert!(side.set_link(1, Some(false)), "lost, and here is a relay");
    assert_eq!(side.why(), (relay(1), Why::Silence));

    let mut side = Side::proven(false);
    assert!(side.paths.host_moved(&side.links, side.now));
    side.collect();
    assert_eq!(side.why(), (relay(0), Why::HostMoved));
    assert_eq!(side.probes.len(), 3);
    side.pass(ms(5));
    assert!(side.answer(direct(1)), "it is as it was");
    // Nor does that relay answer.
    let mut side = Side::proven(false);
    assert!(side.paths.host_moved(&side.links, side.now));
    side.collect();
    assert!(side.pass(ms(1_000)));
    assert_eq!(side.why(), (relay(1), Why::HostMoved));
}

#[test]
fn a_check_lasts_as_long_as_some_round_trips() {
    let mut side = Side::proven(false);
    side.paths.begin_round(side.now);
    side.collect();
    side.pass(ms(20));
    side.answer(direct(1));
    side.paths.distress(side.now);
    side.collect();
    side.pass(ms(179));
    assert_eq!(side.why().0, direct(1));
    side.pass(ms(2));
    assert_eq!(side.why(), (relay(0), Why::Silence));
}

#[test]
fn both_hold_their_rounds_at_one_time() {
    let mut side = Side::relayed(false);
    side.pass(ms(5_000));
    side.probes.clear();
    side.paths.asked(relay(0), side.now);
    side.collect();
    assert!(side.probes.is_empty(), "there was one lately");
    side.pass(ms(5_000));
    side.paths.asked(relay(0), side.now);
    side.collect();
    assert_eq!(side.probed(), [direct(1), direct(2), relay(0)]);
}

#[test]
fn without_relays_the_last_source_is_the_endpoint_and_nothing_is_probed() {
    let now = Instant::from_boot(Duration::from_secs(500));
    let (mut paths, links) = (Paths::new(true, now), Links::default());
    paths.set(&[at(1), at(2), at(1), SocketAddr::from(([0, 0, 0, 0], 1))], &[], &links, now);
    let destinations =
        |paths: &Paths, tries, has_news| paths.destinations(tries, true, has_news, &links, now);
    assert_eq!(destinations(&paths, 0, false), [direct(1), direct(2)]);
    assert_eq!(destinations(&paths, 1, false), [direct(2), direct(1)]);
    assert!(paths.heard(direct(1), Heard::Handshake, &links, now));
    paths.session_made(now);
    assert_eq!(destinations(&paths, 0, false), [direct(1)]);
    assert_eq!(destinations(&paths, 0, true), [direct(1), direct(2)]);
    assert!(!paths.heard(direct(9), Heard::Probe, &links, now));
    assert!(paths.heard(direct(9), Heard::Keepalive, &links, now));
    assert!(paths.heard(direct(2), Heard::Data, &links, now));
    assert_eq!(destinations(&paths, 0, false), [direct(2)]);
    assert_eq!(destinations(&paths, 1, false), [direct(1), direct(2)], "the one at 9 was not told");
    assert!(!paths.is_stale(now + Duration::from_secs(3_600)));
    paths.sent_data(now);
    paths.distress(now);
    assert!(!paths.host_moved(&links, now));
    assert_eq!((paths.poll_timeout(), paths.next_probe(&links, now, || 1)), (None, None));
}

/// The registrar tells soon where a peer has gone to; the peer itself has nothing to send, since nothing reaches it.
#[test]
fn a_peer_that_has_moved_is_followed_as_soon_as_it_answers_elsewhere() {
    let relays = [relay(0), relay(1)];
    for (stays, to) in [(false, at(3)), (false, at(2)), (true, at(3))] {
        let mut side = Side::proven(false);
        side.pass(ms(1));
        side.paths.set(&[to], &relays, &side.links, side.now);
        side.collect();
        side.pass(ms(2));
        assert!(!side.answer(to.into()), "one answer moves nothing: the round may find a better one");
        if stays {
            side.heard(direct(1), Heard::Data);
        }
        assert_eq!(side.pass(ms(60)), !stays);
        let expected = if stays { direct(1) } else { to.into() };
        assert_eq!(side.why(), (expected, Why::Probe));
    }
}
