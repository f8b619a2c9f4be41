#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod attachments;
mod batches;
mod flood;
mod frames;
mod hellos;
mod model;

use std::{net::SocketAddr, time::Duration};

use muster_common::{
    datagram::Ecn,
    frame::{self, DataHeader, Frame, HEADER, Handle, Key},
    time::Instant,
};
use uuid::Uuid;

use super::*;

/// A relay, and the time.
struct Bench {
    relay: Relay,
    now: Instant,
    verdicts: Verdicts,
}

/// What a device knows of its attachment.
#[derive(Clone)]
struct Agent {
    session: u32,
    key: Key,
    handle: Handle,
    uid: Uuid,
    counter: u64,
}

/// A frame, or what came of it, with where it goes.
type Sent = (To, Vec<u8>);

impl Bench {
    fn new(limits: Limits) -> Self {
        Self {
            relay: Relay::new([7; 32], limits),
            now: Instant::from_boot(Duration::from_secs(1_000)),
            verdicts: Verdicts::new(limits.unbound_per_second),
        }
    }

    fn attach(&mut self, device: u8, from: &str) -> Agent {
        self.try_attach(device, from).unwrap()
    }

    fn try_attach(&mut self, device: u8, from: &str) -> Result<Agent, AttachError> {
        let attached = self.relay.attach(uid(device), from.parse().unwrap(), self.now)?;
        Ok(Agent {
            session: attached.session,
            key: Key::new(&attached.key),
            handle: attached.handle,
            uid: uid(device),
            counter: 0,
        })
    }

    /// Attached, and bound to that address.
    fn bound(&mut self, device: u8, from: &str) -> Agent {
        let from: SocketAddr = from.parse().unwrap();
        let mut agent = self.attach(device, &from.ip().to_string());
        assert!(self.hello(&mut agent, &from.to_string(), 0).unwrap().0);
        agent
    }

    /// Sends a hello; what the welcome says: whether the flow is bound, and the proof.
    fn hello(&mut self, agent: &mut Agent, from: &str, proof: u64) -> Option<(bool, u64)> {
        agent.counter += 1;
        let octets = frame::hello(&agent.key, agent.session, agent.counter, proof);
        let from = from.parse().unwrap();
        let answer = self.relay.handle_hello(from, &octets, self.now)?;
        let Some(Frame::Welcome(welcome)) = frame::parse(&answer) else { panic!("{answer:?}") };
        assert!(welcome.is_authentic(&agent.key) && welcome.session() == agent.session);
        assert_eq!((welcome.counter(), welcome.from()), (agent.counter, from));
        Some((welcome.flags().is_bound, welcome.proof()))
    }

    fn pass(&mut self, seconds: u64) {
        self.now += Duration::from_secs(seconds);
        while self.relay.poll_timeout().is_some_and(|at| at <= self.now) {
            self.relay.handle_timeout(self.now);
        }
    }

    /// Has a message of equal datagrams, but the last, forwarded, and returns the datagrams that leave.
    fn forward(&mut self, from: &str, datagrams: &[Vec<u8>]) -> Vec<Sent> {
        self.forward_len(from, datagrams.first().map_or(1, Vec::len), datagrams)
    }

    fn forward_len(&mut self, from: &str, datagram_len: usize, datagrams: &[Vec<u8>]) -> Vec<Sent> {
        let mut buffer = vec![0xee; 100];
        buffer.extend(datagrams.iter().flatten());
        let range = 100..buffer.len();
        buffer.extend([0xee; 100]);
        let arrival = Arrival { from: from.parse().unwrap(), ecn: Ecn::Ect0, datagram_len, range };
        self.verdicts.clear();
        self.relay.forward(&arrival, &mut buffer, self.now, &mut self.verdicts);
        let (before, after) = (&buffer[..100], &buffer[buffer.len() - 100..]);
        assert!(before.iter().chain(after).all(|octet| *octet == 0xee), "nothing else is touched");
        let sent = self.verdicts.forwards.iter().flat_map(|forward| {
            assert_eq!(forward.ecn, Ecn::Ect0);
            let octets = buffer[forward.range.clone()].chunks(forward.datagram_len);
            octets.map(|octets| (forward.to, octets.to_vec())).collect::<Vec<_>>()
        });
        sent.collect()
    }

    /// Whether a frame gets from one to the other by UDP, and where to.
    fn reaches(&mut self, from: (&Agent, &str), to: &Agent) -> Option<To> {
        let sent = self.forward(from.1, &[from.0.frame(to, 40)]);
        sent.first().map(|(to, _)| *to)
    }

    fn drops(&self) -> Vec<(Dropped, u64)> {
        self.verdicts.drops.iter().collect()
    }
}

impl Agent {
    /// To `to`, with a message of `len` octets.
    fn frame(&self, to: &Agent, len: usize) -> Vec<u8> {
        up(self.session, to.handle, len)
    }

    /// As `to` gets it.
    fn arrived(&self, to: &Agent, len: usize) -> Vec<u8> {
        up(to.session, self.handle, len)
    }
}

fn up(session: u32, handle: Handle, len: usize) -> Vec<u8> {
    let mut frame = DataHeader { session, handle }.octets().to_vec();
    frame.extend((0..len).map(|n| n as u8));
    assert_eq!(frame.len(), HEADER + len);
    frame
}

fn uid(device: u8) -> Uuid {
    Uuid::from_bytes([device; 16])
}

fn udp(address: &str) -> To {
    To::Udp(address.parse().unwrap())
}

const A: &str = "192.0.2.1:1000";
const B: &str = "[2001:db8::2]:2000";
const C: &str = "192.0.2.3:3000";
const STRANGER: &str = "198.51.100.9:9";
