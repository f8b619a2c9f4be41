//! Two peers against each other, over a network that changes.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

#[derive(Clone, Copy, Debug)]
enum Message {
    Handshake,
    Data,
    Request(u64),
    Answer(u64),
}

/// A network: some addresses are open, with delays; each side has links to directors, or has not.
#[derive(Clone, Debug)]
struct State {
    open: [Option<u8>; 3],
    links: [[bool; 2]; 2],
}

impl State {
    fn delay(&self, to: Endpoint) -> Option<Duration> {
        match to {
            Endpoint::Direct(at) => {
                let SocketAddr::V4(at) = at else { return None };
                let index = usize::from(at.ip().octets()[3]).checked_sub(1)?;
                self.open.get(index).copied().flatten().map(|delay| ms(delay.into()))
            }
            Endpoint::Relay { director, .. } => {
                let index = usize::from(director.0);
                (self.links[0][index] && self.links[1][index]).then_some(ms(40))
            }
        }
    }
}

struct Two {
    sides: [Side; 2],
    state: State,
    now: Instant,
    under_way: BTreeMap<(Instant, u64), (usize, Endpoint, Message)>,
    number: u64,
    moves: Vec<(Instant, usize, Endpoint)>,
}

impl Two {
    fn new(told: [[bool; 3]; 2], state: State) -> Self {
        let mut sides = [Side::new(false), Side::new(true)];
        for (side, told) in sides.iter_mut().zip(told) {
            let direct: Vec<_> = (0..3).filter(|n| told[*n]).map(|n| at(n as u8 + 1)).collect();
            side.paths.set(&direct, &[relay(0), relay(1)], &side.links, side.now);
        }
        let now = sides[0].now;
        let mut two =
            Self { sides, state: state.clone(), now, under_way: BTreeMap::new(), number: 0, moves: vec![] };
        two.change(state);
        two
    }

    fn change(&mut self, state: State) {
        self.state = state;
        for n in 0..2 {
            self.sides[n].now = self.now;
            for director in 0..2 {
                let link = self.state.links[n][usize::from(director)].then_some(false);
                let moved = self.sides[n].set_link(director, link);
                self.note(n, moved);
            }
        }
    }

    fn note(&mut self, n: usize, moved: bool) {
        if moved {
            self.moves.push((self.now, n, self.sides[n].paths.current().unwrap()));
        }
        for (to, nonce) in std::mem::take(&mut self.sides[n].probes) {
            self.post(n, to, Message::Request(nonce));
        }
    }

    fn post(&mut self, from: usize, to: Endpoint, message: Message) {
        // Both sides see a path under the same name.
        if let Some(delay) = self.state.delay(to).filter(|_| self.sides[from].links.reach(&to)) {
            self.number += 1;
            self.under_way.insert((self.now + delay, self.number), (1 - from, to, message));
        }
    }

    fn deliver(&mut self, n: usize, from: Endpoint, message: Message) {
        let side = &mut self.sides[n];
        side.now = self.now;
        let moved = match message {
            Message::Handshake => {
                let moved = side.heard(from, Heard::Handshake);
                side.paths.session_made(self.now);
                side.collect();
                moved
            }
            Message::Data => side.heard(from, Heard::Data),
            Message::Request(nonce) => {
                let moved = side.heard(from, Heard::Probe);
                side.paths.asked(from, self.now);
                side.collect();
                self.post(n, from, Message::Answer(nonce));
                moved
            }
            Message::Answer(nonce) => {
                side.heard(from, Heard::Probe) | {
                    let moved = side.paths.answered(nonce, from, side.now);
                    side.collect();
                    moved
                }
            }
        };
        self.note(n, moved);
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        let mut tick = self.now;
        while self.now < end {
            let arrival = self.under_way.keys().next().map(|(at, _)| *at);
            let timeouts = self.sides.iter().filter_map(|side| side.paths.poll_timeout());
            let next = timeouts.chain(arrival).chain([tick, end]).min().unwrap();
            self.now = self.now.max(next);
            while let Some(entry) = self.under_way.first_entry().filter(|entry| entry.key().0 <= self.now) {
                let (n, from, message) = entry.remove();
                self.deliver(n, from, message);
            }
            for n in 0..2 {
                self.sides[n].now = self.now;
                let moved = self.sides[n].pass(Duration::ZERO);
                self.note(n, moved);
                if tick <= self.now && self.sides[n].paths.current().is_some() {
                    let moved = self.sides[n].send();
                    self.note(n, moved);
                    let to = self.sides[n].paths.current().unwrap();
                    self.post(n, to, Message::Data);
                }
            }
            if tick <= self.now {
                tick = self.now + ms(100);
            }
        }
    }

    /// Both sides begin with a handshake through a relay or wherever it arrives.
    fn shake_hands(&mut self) {
        for to in [relay(0), relay(1), direct(1), direct(2), direct(3)] {
            if self.state.delay(to).is_some() {
                self.deliver(0, to, Message::Handshake);
                self.deliver(1, to, Message::Handshake);
                return;
            }
        }
    }
}

fn states() -> impl Strategy<Value = State> {
    let open = prop::array::uniform3(prop::option::weighted(0.4, 1u8..60));
    let links = prop::array::uniform2(prop::array::uniform2(prop::bool::weighted(0.7)));
    (open, links).prop_map(|(open, links)| State { open, links })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Whatever happens to the network, when it stays as it is both peers come to rest, on a path that works, and on an
    /// address if one of those that either knows does.
    #[test]
    fn two_peers_come_to_rest_on_the_best_path(
        told in prop::array::uniform2(prop::array::uniform3(any::<bool>())),
        states in prop::collection::vec((states(), 1u64..20_000), 1..8),
        last in states(),
    ) {
        let mut two = Two::new(told, states[0].0.clone());
        two.shake_hands();
        prop_assume!(two.sides[0].paths.current().is_some());
        for (state, time) in states {
            two.change(state);
            two.run(ms(time));
        }
        two.change(last.clone());
        two.run(Duration::from_secs(160));
        let rest = two.now;
        two.run(Duration::from_secs(200));
        let restless: Vec<_> = two.moves.iter().filter(|(at, ..)| *at > rest).collect();
        let relays = [relay(0), relay(1)].into_iter().filter(|relay| last.delay(*relay).is_some()).count();
        let addresses = (0..3).filter(|n| last.open[*n].is_some() && (told[0][*n] || told[1][*n])).count();
        if addresses + relays > 0 {
            prop_assert!(restless.is_empty(), "{:?}", restless);
        }
        for side in &two.sides {
            let current = side.paths.current().unwrap();
            if addresses > 0 {
                prop_assert!(!current.is_relay(), "{current:?}");
            }
            if addresses + relays > 0 {
                prop_assert!(last.delay(current).is_some(), "{current:?}");
            }
        }
    }
}
