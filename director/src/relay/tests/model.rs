//! The relay against a naive one, which looks at each frame by itself and at all sessions for each.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use proptest::prelude::*;

use super::*;

const DEVICES: u8 = 3;
const ADDRESSES: [&str; 5] = [A, "192.0.2.1:1001", B, C, "[2001:db8::2]:2001"];

/// What happens. Sessions are named by the number of their attachment, addresses by their place in the list.
#[derive(Clone, Debug)]
enum Event {
    Attach {
        device: u8,
        from: usize,
    },
    Detach {
        session: usize,
    },
    Refuse {
        device: u8,
    },
    Stream {
        session: usize,
        is_open: bool,
    },
    /// With the proof for this address, or none.
    Hello {
        session: usize,
        from: usize,
        is_proven: bool,
        counter: u64,
    },
    Pass {
        seconds: u64,
    },
    /// Frames of one length: each of a session, or none, to a device.
    Send {
        from: usize,
        frames: Vec<(Option<usize>, u8)>,
        last: usize,
    },
    SendByStream {
        session: usize,
        to: u8,
    },
}

fn event() -> impl Strategy<Value = Event> {
    let (device, session, address) = (1..=DEVICES, 0_usize..12, 0..ADDRESSES.len());
    // Mostly of one session, so that there are runs.
    let frame = (prop_oneof![1 => Just(None), 20 => (0_usize..3).prop_map(Some)], 0..=DEVICES + 1);
    prop_oneof![
        4 => (device.clone(), address.clone()).prop_map(|(device, from)| Event::Attach { device, from }),
        1 => session.clone().prop_map(|session| Event::Detach { session }),
        1 => device.clone().prop_map(|device| Event::Refuse { device }),
        2 => (session.clone(), any::<bool>()).prop_map(|(session, is_open)| Event::Stream { session, is_open }),
        10 => (session.clone(), address.clone(), any::<bool>(), 1_u64..40).prop_map(
            |(session, from, is_proven, counter)| Event::Hello { session, from, is_proven, counter }
        ),
        3 => (0_u64..40).prop_map(|seconds| Event::Pass { seconds }),
        10 => (address, prop::collection::vec(frame, 1..10), 0_usize..64, session.clone()).prop_map(
            |(from, mut frames, last, base)| {
                for (session, _) in &mut frames {
                    *session = session.map(|session| if session == 0 { base + 1 } else { base });
                }
                Event::Send { from, frames, last }
            }
        ),
        2 => (session, device).prop_map(|(session, to)| Event::SendByStream { session, to }),
    ]
}

#[derive(Clone, Debug)]
struct Naive {
    device: u8,
    attached_from: IpAddr,
    counter: u64,
    endpoint: Option<SocketAddr>,
    heard: Instant,
    has_stream: bool,
    expires: Option<Instant>,
}

/// Sessions by the number of their attachment.
#[derive(Default, Debug)]
struct Model {
    sessions: BTreeMap<usize, Naive>,
    refused: BTreeSet<u8>,
}

impl Model {
    fn reached(&self, device: u8) -> Option<usize> {
        let is_reached = |s: &Naive| s.device == device && (s.endpoint.is_some() || s.has_stream);
        self.sessions.iter().filter(|(_, s)| is_reached(s)).map(|(number, _)| *number).max()
    }

    fn of_device(&self, device: u8) -> Vec<usize> {
        self.sessions.iter().filter(|(_, s)| s.device == device).map(|(number, _)| *number).collect()
    }

    fn attach(&mut self, number: usize, device: u8, from: IpAddr) -> bool {
        if self.refused.contains(&device) {
            return false;
        }
        let known = self.of_device(device);
        if known.len() == 4 {
            let in_use = self.reached(device);
            let oldest = known.into_iter().find(|number| Some(*number) != in_use).unwrap();
            self.sessions.remove(&oldest);
        }
        let naive = Naive {
            device,
            attached_from: from,
            counter: 0,
            endpoint: None,
            heard: Instant::default(),
            has_stream: false,
            expires: None,
        };
        self.sessions.insert(number, naive);
        true
    }

    /// A session is reached: older ones are not needed if it is the newest that is.
    fn reach(&mut self, number: usize, now: Instant) {
        let device = self.sessions[&number].device;
        if self.reached(device) == Some(number) {
            for (_, older) in self.sessions.range_mut(..number).filter(|(_, s)| s.device == device) {
                older.expires = Some(older.expires.unwrap_or(now + GRACE).min(now + GRACE));
            }
        }
    }

    fn hello(
        &mut self,
        number: usize,
        from: SocketAddr,
        is_proven: bool,
        counter: u64,
        now: Instant,
    ) -> Option<bool> {
        let session = self.sessions.get_mut(&number)?;
        if counter <= session.counter {
            return None;
        }
        let is_bound_host = session.endpoint.is_some_and(|endpoint| endpoint.ip() == from.ip());
        let is_attached_host = session.attached_from == from.ip() && !session.has_stream;
        if !(is_proven || is_bound_host || is_attached_host) {
            return Some(false);
        }
        (session.counter, session.endpoint, session.heard) = (counter, Some(from), now);
        self.reach(number, now);
        Some(true)
    }

    fn pass(&mut self, now: Instant) {
        self.sessions.retain(|_, session| session.expires.is_none_or(|at| at > now));
        for session in self.sessions.values_mut().filter(|session| now - session.heard >= SILENCE) {
            session.endpoint = None;
        }
    }

    /// Which session a frame goes to, and how.
    fn route(&self, sender: usize, to: u8) -> Result<usize, Dropped> {
        if self.sessions[&sender].device == to {
            return Err(Dropped::ToItself);
        }
        self.reached(to).ok_or(Dropped::Unreachable)
    }

    fn forward(&self, from: SocketAddr, sender: Option<usize>, to: u8) -> Result<usize, Dropped> {
        let Some((number, sender)) = sender.and_then(|n| Some((n, self.sessions.get(&n)?))) else {
            return Err(Dropped::UnknownSession);
        };
        if sender.endpoint != Some(from) {
            return Err(Dropped::NotBound);
        }
        self.route(number, to)
    }
}

/// A relay, its model, and what the agents know.
struct Both {
    bench: Bench,
    model: Model,
    agents: Vec<Agent>,
}

impl Both {
    fn to(&self, number: usize) -> To {
        let stream = To::Stream(self.agents[number].session);
        self.model.sessions[&number].endpoint.map_or(stream, To::Udp)
    }

    fn happens(&mut self, event: Event) {
        let now = self.bench.now;
        match event {
            Event::Attach { device, from } => {
                let from: SocketAddr = ADDRESSES[from].parse().unwrap();
                let attached = self.bench.try_attach(device, &from.ip().to_string());
                if attached.as_ref().err() == Some(&AttachError::TooOften) {
                    return;
                }
                assert_eq!(self.model.attach(self.agents.len(), device, from.ip()), attached.is_ok());
                self.agents.extend(attached);
            }
            Event::Detach { session } => {
                let Some(agent) = self.agents.get(session) else { return };
                self.bench.relay.detach(agent.session, now);
                if let Some(naive) = self.model.sessions.get_mut(&session) {
                    naive.expires = Some(naive.expires.unwrap_or(now + GRACE).min(now + GRACE));
                }
            }
            Event::Refuse { device } => {
                self.bench.relay.refuse(uid(device), now);
                self.model.refused.insert(device);
                self.model.sessions.retain(|_, session| session.device != device);
            }
            Event::Stream { session, is_open } => {
                let Some(agent) = self.agents.get(session) else { return };
                let done = self.bench.relay.set_stream(agent.session, agent.uid, is_open, now);
                let naive = self.model.sessions.get_mut(&session);
                assert_eq!(done, naive.is_some());
                if let Some(naive) = naive {
                    naive.has_stream = is_open;
                    if is_open {
                        naive.endpoint = None;
                    }
                    if naive.has_stream || naive.endpoint.is_some() {
                        self.model.reach(session, now);
                    }
                }
            }
            Event::Hello { session, from, is_proven, counter } => {
                let Some(agent) = self.agents.get(session) else { return };
                let from = ADDRESSES[from].parse().unwrap();
                let proof = frame::proof(&self.bench.relay.secret, agent.session, from);
                let octets =
                    frame::hello(&agent.key, agent.session, counter, if is_proven { proof } else { 0 });
                let answer = self.bench.relay.handle_hello(from, &octets, now);
                let is_bound = answer.map(|octets| match frame::parse(&octets) {
                    Some(Frame::Welcome(welcome)) => welcome.flags().is_bound,
                    other => panic!("{other:?}"),
                });
                assert_eq!(is_bound, self.model.hello(session, from, is_proven, counter, now));
            }
            Event::Pass { seconds } => {
                self.bench.pass(seconds);
                self.model.pass(self.bench.now);
            }
            Event::Send { from, frames, last } => self.send(from, &frames, last),
            Event::SendByStream { session, to } => {
                let Some(agent) = self.agents.get(session) else { return };
                let mut octets = up(agent.session, handle(to), 40);
                let verdict = self.bench.relay.forward_frame(agent.session, &mut octets, now);
                let is_open = self.model.sessions.get(&session).is_some_and(|session| session.has_stream);
                let expected =
                    if is_open { self.model.route(session, to) } else { Err(Dropped::UnknownSession) };
                match (verdict, expected) {
                    (Verdict::Forward(way), Ok(receiver)) => {
                        assert_eq!(way, self.to(receiver));
                        assert_eq!(octets, up(self.agents[receiver].session, agent.handle, 40));
                    }
                    (Verdict::Drop(reason, _), Err(expected)) => assert_eq!(reason, expected),
                    other => panic!("{other:?}"),
                }
            }
        }
    }

    fn send(&mut self, from: usize, frames: &[(Option<usize>, u8)], last: usize) {
        let address = ADDRESSES[from].parse().unwrap();
        let (mut run, mut expected, mut drops) = (Vec::new(), Vec::new(), Drops::default());
        for (n, (session, to)) in frames.iter().enumerate() {
            let len = if n + 1 == frames.len() { last } else { 64 };
            let sender = session.and_then(|number| self.agents.get(number));
            let octets = up(sender.map_or(0, |sender| sender.session), handle(*to), len);
            run.push(octets);
            if len < 32 {
                drops.add(Dropped::Malformed, 1);
                continue;
            }
            match self.model.forward(address, sender.and(*session), *to) {
                Ok(receiver) => {
                    let octets = up(self.agents[receiver].session, sender.unwrap().handle, len);
                    expected.push((self.to(receiver), octets));
                }
                Err(reason) => drops.add(reason, 1),
            }
        }
        assert_eq!(self.bench.forward_len(ADDRESSES[from], HEADER + 64, &run), expected);
        assert_eq!(self.bench.verdicts.drops, drops);
    }

    /// What is told of them agrees, and nothing is kept of what is over.
    fn check(&self) {
        let (relay, sessions) = (&self.bench.relay, &self.model.sessions);
        let devices: BTreeSet<_> = sessions.values().map(|session| uid(session.device)).collect();
        assert_eq!(relay.devices(), devices.iter().copied().collect::<Vec<_>>());
        let expected = Snapshot {
            devices: devices.len(),
            sessions: sessions.len(),
            bound: sessions.values().filter(|session| session.endpoint.is_some()).count(),
            streams: sessions.values().filter(|session| session.has_stream).count(),
            refused: self.model.refused.len(),
            is_draining: false,
        };
        assert_eq!(relay.snapshot(), expected);
        let due = relay.sessions.values().filter(|session| session.due.is_some()).count();
        assert_eq!(relay.due.len(), due);
        let has_deadline = relay.sessions.values().filter(|session| session.deadline().is_some()).count();
        assert!(due >= has_deadline, "nothing is forgotten");
    }
}

fn handle(device: u8) -> Handle {
    Handle::of_device(uid(device).as_bytes())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn agrees_with_a_naive_relay(events in prop::collection::vec(event(), 1..120)) {
        let limits = Limits { octets_per_second: 0, ..Limits::default() };
        let mut both = Both { bench: Bench::new(limits), model: Model::default(), agents: Vec::new() };
        for event in events {
            both.happens(event);
            both.check();
        }
    }

    #[test]
    fn no_octets_are_too_strange(
        octets in prop::collection::vec(prop_oneof![3 => Just(0_u8), 1 => any::<u8>()], 0..300),
        kind in 4_u8..10,
        datagram_len in 0_usize..310,
    ) {
        let mut bench = Bench::new(Limits::default());
        let a = bench.bound(1, A);
        let mut octets = octets;
        if let Some(place) = octets.first_mut() {
            *place = kind;
        }
        if octets.len() >= 8 {
            octets[4..8].copy_from_slice(&a.session.to_be_bytes());
        }
        prop_assert_eq!(bench.forward_len(A, datagram_len, &[octets.clone()]), []);
        prop_assert!(bench.verdicts.hellos.is_empty());
        let answered: usize = bench.verdicts.notices.iter().map(|(_, notice)| notice.len()).sum();
        prop_assert!(answered <= octets.len());
        prop_assert!(bench.relay.handle_hello(A.parse().unwrap(), &octets, bench.now).is_none());
        let _ = bench.relay.forward_frame(a.session, &mut octets, bench.now);
    }
}
