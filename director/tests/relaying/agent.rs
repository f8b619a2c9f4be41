//! What an agent does with frames, as far as a director sees it: hellos, and runs of data.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use muster_common::{
    datagram::{Ecn, Fragmentation},
    frame::{self, DataHeader, Frame, HEADER, Handle, Key},
};
use muster_net::{Family, Message, ReceiveBuffer, Run, UdpSockets};
use uuid::Uuid;

/// How long something is waited for that comes.
const SOON: Duration = Duration::from_secs(10);

/// A device with sockets of its own.
pub(crate) struct Agent {
    pub(crate) sockets: UdpSockets,
    pub(crate) director: SocketAddr,
    pub(crate) session: u32,
    pub(crate) handle: Handle,
    key: Key,
    counter: u64,
    buffer: ReceiveBuffer,
}

impl Agent {
    pub(crate) fn new(director: SocketAddr, device: Uuid, session: u32, key: &[u8; 32]) -> Self {
        let sockets = UdpSockets::bind(0).unwrap();
        sockets.coalesce();
        let (handle, buffer) = (Handle::of_device(device.as_bytes()), ReceiveBuffer::new());
        Self { sockets, director, session, handle, key: Key::new(key), counter: 0, buffer }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        let any: IpAddr =
            if self.director.is_ipv4() { [127, 0, 0, 1].into() } else { "::1".parse().unwrap() };
        (any, self.sockets.port()).into()
    }

    pub(crate) fn send(&self, octets: &[u8], datagram_len: usize) {
        let run = Run {
            destination: self.director,
            ecn: Ecn::Ect0,
            fragmentation: Fragmentation::Known,
            datagram_len,
            octets,
        };
        let sent = self.sockets.send_runs(std::iter::once(run));
        assert_eq!((sent.full, sent.failed), (0, 0));
    }

    /// Sends a hello and waits for the welcome; whether the flow is bound, and the proof.
    pub(crate) fn hello(&mut self, proof: u64) -> (bool, u64) {
        self.counter += 1;
        self.send(&frame::hello(&self.key, self.session, self.counter, proof), frame::HELLO);
        let octets = self.next().unwrap();
        let Some(Frame::Welcome(welcome)) = frame::parse(&octets) else { panic!("{octets:?}") };
        assert!(welcome.is_authentic(&self.key) && welcome.counter() == self.counter);
        assert_eq!(welcome.from(), self.address());
        (welcome.flags().is_bound, welcome.proof())
    }

    /// Frames to another: as many as there are lengths, with messages of such lengths.
    pub(crate) fn frames(&self, to: &Self, lens: &[usize]) -> Vec<u8> {
        run(DataHeader { session: self.session, handle: to.handle }, lens)
    }

    /// The same frames as `to` gets them.
    pub(crate) fn arrived(&self, to: &Self, lens: &[usize]) -> Vec<u8> {
        run(DataHeader { session: to.session, handle: self.handle }, lens)
    }

    /// The messages that come next, which is within ten seconds, and their octets.
    pub(crate) fn receive(&mut self, within: Duration) -> Vec<(Message, Vec<u8>)> {
        let family = if self.director.is_ipv4() { Family::V4 } else { Family::V6 };
        let step = Duration::from_millis(1);
        for _ in 0..within.as_millis() {
            if self.sockets.recv_into(family, &mut self.buffer).unwrap() > 0 {
                let octets = self.buffer.octets();
                return self.buffer.messages().map(|m| (m.clone(), octets[m.range].to_vec())).collect();
            }
            std::thread::sleep(step);
        }
        Vec::new()
    }

    /// The octets of the one message that comes next.
    pub(crate) fn next(&mut self) -> Option<Vec<u8>> {
        let mut messages = self.receive(SOON);
        assert!(messages.len() <= 1);
        messages.pop().map(|(_, octets)| octets)
    }

    /// All octets that come until there are so many.
    pub(crate) fn take(&mut self, octets: usize) -> Vec<u8> {
        let mut taken = Vec::new();
        while taken.len() < octets {
            let messages = self.receive(SOON);
            assert!(!messages.is_empty(), "{} octets of {octets} came", taken.len());
            taken.extend(messages.into_iter().flat_map(|(_, octets)| octets));
        }
        taken
    }

    pub(crate) fn gets_nothing(&mut self) -> bool {
        self.receive(Duration::from_millis(100)).is_empty()
    }
}

fn run(header: DataHeader, lens: &[usize]) -> Vec<u8> {
    let mut octets = Vec::new();
    for (n, len) in lens.iter().enumerate() {
        octets.extend(header.octets());
        octets.extend((0..*len).map(|at| (n * 7 + at) as u8));
    }
    assert_eq!(octets.len(), lens.iter().sum::<usize>() + lens.len() * HEADER);
    octets
}
