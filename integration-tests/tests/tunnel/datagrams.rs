//! Flows of UDP datagrams, each with its number and with octets that belong to it, and what becomes of them.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use muster_agent::udp::{Run, UdpSockets};
use muster_integration_tests::{Result, expect, muster::Agent};
use muster_tunnel::{Fragmentation, ecn::Ecn};
use rustix::net::sockopt::set_socket_recv_buffer_size_force;

use crate::{
    site::{Family, Site, enter},
    stream::Octets,
};

/// Octets before those that the number determines.
const NUMBER: usize = 8;
/// Room for all that is on its way, of which the kernel also counts its own overhead.
const RECEIVE_BUFFER: usize = 8 << 20;
/// Datagrams on their way at most, of all flows: a TUN device queues 500.
const WINDOW: u64 = 240;
/// What has not come after so long is lost.
const LOST: Duration = Duration::from_secs(1);

/// How a flow is sent.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Sender {
    /// One datagram per system call, of lengths between these.
    Singly { shortest: usize, longest: usize },
    /// Runs of so many datagrams of this length, which the kernel is to cut (`UDP_SEGMENT`).
    Runs { datagrams: usize, len: usize },
}

impl Sender {
    fn len(self, number: u64) -> usize {
        match self {
            Self::Singly { shortest, longest } => {
                shortest + (number.wrapping_mul(0x9E37_79B9) >> 7) as usize % (longest - shortest + 1)
            }
            Self::Runs { len, .. } => len,
        }
    }
}

/// What the two ends of a flow tell each other.
#[derive(Default)]
struct Progress {
    received: AtomicU64,
    is_sent: AtomicBool,
}

/// What the receiver of a flow has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) received: u64,
    /// Came after one that was sent later.
    pub(crate) late: u64,
}

/// Sends `count` datagrams in each of `flows` at once, as fast as they are received. Every payload is compared.
pub(crate) fn exchange(
    site: &Site,
    (from, to): (&Agent, &Agent),
    family: Family,
    flows: usize,
    count: u64,
    sender: Sender,
) -> Result<Seen> {
    let address = site.address(to, family)?;
    let threads: Vec<_> = (0..flows)
        .map(|flow| {
            let (from, to) = (from.host().namespace().to_owned(), to.host().namespace().to_owned());
            let progress = Arc::<Progress>::default();
            let (seen, (bound, at)) = (Arc::clone(&progress), std::sync::mpsc::channel());
            let receiving = thread::spawn(move || {
                enter(&to);
                let socket = UdpSocket::bind((address, 0)).expect("bind");
                set_socket_recv_buffer_size_force(&socket, RECEIVE_BUFFER).expect("a large buffer");
                let _ = bound.send(socket.local_addr().expect("bound"));
                receive(&socket, flow as u64, count, sender, &progress)
            });
            let sending = thread::spawn(move || {
                enter(&from);
                let at = at.recv().expect("somebody listens");
                send(at, flow as u64, WINDOW / flows as u64, count, sender, &seen.received);
                seen.is_sent.store(true, Ordering::Release);
            });
            (receiving, sending)
        })
        .collect();
    let mut total = Seen::default();
    for (receiving, sending) in threads {
        let sent = sending.join();
        let seen = receiving.join().unwrap_or_else(|_| Err("the receiver panicked".into()));
        let what = format!("{flows} flows over {family:?}, {sender:?}");
        expect(sent.is_ok(), &what, "the sender panicked")?;
        match seen {
            Ok(seen) => {
                total.received += seen.received;
                total.late += seen.late;
            }
            Err(error) => expect(false, &what, &error)?,
        }
    }
    Ok(total)
}

fn payload(octets: &Octets, number: u64, sender: Sender) -> Vec<u8> {
    let mut payload = vec![0; sender.len(number)];
    let (head, tail) = payload.split_at_mut(NUMBER);
    head.copy_from_slice(&number.to_be_bytes());
    octets.fill(number, tail);
    payload
}

fn send(to: SocketAddr, flow: u64, window: u64, count: u64, sender: Sender, received: &AtomicU64) {
    let octets = Octets::new(flow);
    // What is lost makes the window no smaller.
    let mut lost = 0;
    let mut wait = |sent: u64| {
        let mut waited = Duration::ZERO;
        while sent.saturating_sub(received.load(Ordering::Acquire) + lost) >= window {
            if waited > LOST {
                lost = sent - received.load(Ordering::Acquire);
                break;
            }
            let pause = Duration::from_micros(100);
            thread::sleep(pause);
            waited += pause;
        }
    };
    match sender {
        Sender::Singly { .. } => {
            let any: SocketAddr = if to.is_ipv4() { ([0; 4], 0).into() } else { ([0u16; 8], 0).into() };
            let socket = UdpSocket::bind(any).expect("bind");
            socket.connect(to).expect("connect");
            for number in 0..count {
                wait(number);
                // A device whose queue is full says so; the datagram counts as lost.
                let _ = socket.send(&payload(&octets, number, sender));
            }
        }
        Sender::Runs { datagrams, len } => {
            let sockets = UdpSockets::bind(0).expect("bind");
            for first in (0..count).step_by(datagrams) {
                wait(first);
                let numbers = first..count.min(first + datagrams as u64);
                let run: Vec<u8> = numbers.flat_map(|number| payload(&octets, number, sender)).collect();
                let run = Run {
                    destination: to,
                    ecn: Ecn::NotEct,
                    fragmentation: Fragmentation::Known,
                    datagram_len: len,
                    octets: &run,
                };
                sockets.send_runs(std::iter::once(run));
            }
            assert!(sockets.offloads().segments, "this kernel takes runs");
        }
    }
}

fn receive(
    socket: &UdpSocket,
    flow: u64,
    count: u64,
    sender: Sender,
    progress: &Progress,
) -> Result<Seen, String> {
    let octets = Octets::new(flow);
    let (mut seen, mut next, mut buffer) = (Seen::default(), 0, vec![0; 65_536]);
    socket.set_read_timeout(Some(LOST)).map_err(|e| e.to_string())?;
    while seen.received < count {
        let is_sent = progress.is_sent.load(Ordering::Acquire);
        let len = match socket.recv(&mut buffer) {
            Ok(len) => len,
            Err(_) if is_sent => break,
            Err(_) => continue,
        };
        let datagram = &buffer[..len];
        let head = datagram.first_chunk().ok_or_else(|| format!("a datagram of {len} octets"))?;
        let number = u64::from_be_bytes(*head);
        if number >= count || datagram != payload(&octets, number, sender) {
            return Err(format!("datagram {number}, of {len} octets, is another"));
        }
        seen.received += 1;
        seen.late += u64::from(number < next);
        next = next.max(number + 1);
        progress.received.store(seen.received, Ordering::Release);
    }
    Ok(seen)
}
