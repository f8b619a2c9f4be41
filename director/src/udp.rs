//! Frames as datagrams: a thread for each pair of sockets. What one receive brings is judged with the relay read once,
//! and leaves from where it lies.

use std::{
    io,
    num::NonZeroUsize,
    ops::ControlFlow,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use muster_common::{
    datagram::{Ecn, Fragmentation},
    frame::{WELCOME, push_frame},
    time::Instant,
};
use muster_net::{Family, ReceiveBuffer, Run, Sent, UdpSockets};
use rustix::event::{EventfdFlags, epoll, eventfd};

use crate::{
    hub::{Batch, Hub},
    relay::{Arrival, Dropped, Drops, Forward, To, Verdicts},
};

/// Receives in a row from one socket, until the other has its turn.
const ROUNDS: usize = 4;
/// Hellos answered with the relay held for writing, which keeps all threads from reading it: some tenths of a
/// millisecond.
const HELLOS: usize = 64;

mod source {
    pub(super) const WAKE: u64 = 0;
    pub(super) const UDP_V4: u64 = 1;
    pub(super) const UDP_V6: u64 = 2;
    pub(super) const COUNT: usize = 3;
}

/// Stops all threads when it is dropped.
#[derive(Debug)]
pub(crate) struct Threads {
    stop: Arc<Stop>,
    handles: Vec<std::thread::JoinHandle<()>>,
}

#[derive(Debug)]
struct Stop {
    is_stopped: AtomicBool,
    wake: OwnedFd,
}

impl Threads {
    /// One for each of `sockets`. A thread that cannot go on says why to `failed`.
    pub(crate) fn start(
        hub: &Arc<Hub>,
        sockets: &[Arc<UdpSockets>],
        unbound_per_second: u32,
        failed: &tokio::sync::mpsc::Sender<io::Error>,
    ) -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let stop = Arc::new(Stop { is_stopped: AtomicBool::new(false), wake });
        let mut threads = Self { stop, handles: Vec::new() };
        for (index, sockets) in sockets.iter().enumerate() {
            sockets.coalesce();
            let mut worker = Worker::new(hub, sockets, &threads.stop, unbound_per_second)?;
            let failed = failed.clone();
            let thread = std::thread::Builder::new().name(format!("relay-{index}"));
            threads.handles.push(thread.spawn(move || {
                if let Err(error) = worker.run() {
                    let _ = failed.try_send(error);
                }
            })?);
        }
        Ok(threads)
    }

    fn stop(&self) {
        self.stop.is_stopped.store(true, Ordering::Release);
        // Not read by anyone, so that it stays ready for all.
        let _ = rustix::io::write(&self.stop.wake, &1_u64.to_ne_bytes());
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.stop();
        for thread in self.handles.drain(..) {
            let _ = thread.join();
        }
    }
}

/// How many threads help on this host: one for each processor core.
pub fn cores() -> NonZeroUsize {
    std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)
}

struct Worker {
    hub: Arc<Hub>,
    sockets: Arc<UdpSockets>,
    stop: Arc<Stop>,
    epoll: OwnedFd,
    received: ReceiveBuffer,
    verdicts: Verdicts,
    /// Frames to streams: those to one are collected over a batch.
    batches: Vec<(u32, Batch)>,
    welcomes: Vec<(std::net::SocketAddr, [u8; WELCOME])>,
}

impl Worker {
    fn new(
        hub: &Arc<Hub>,
        sockets: &Arc<UdpSockets>,
        stop: &Arc<Stop>,
        unbound_per_second: u32,
    ) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let watch = |fd: &dyn AsFd, source| {
            epoll::add(&epoll, fd, epoll::EventData::new_u64(source), epoll::EventFlags::IN)
        };
        watch(&stop.wake, source::WAKE)?;
        for (family, source) in [(Family::V4, source::UDP_V4), (Family::V6, source::UDP_V6)] {
            if let Some(fd) = sockets.fd(family) {
                watch(&fd, source)?;
            }
        }
        Ok(Self {
            hub: hub.clone(),
            sockets: sockets.clone(),
            stop: stop.clone(),
            epoll,
            received: ReceiveBuffer::new(),
            verdicts: Verdicts::new(unbound_per_second),
            batches: Vec::new(),
            welcomes: Vec::with_capacity(HELLOS),
        })
    }

    fn run(&mut self) -> io::Result<()> {
        let nothing = epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) };
        let mut ready = [nothing; source::COUNT];
        while !self.stop.is_stopped.load(Ordering::Acquire) {
            let count = match epoll::wait(&self.epoll, &mut ready[..], None) {
                Ok(count) => count,
                Err(rustix::io::Errno::INTR) => 0,
                Err(error) => return Err(error.into()),
            };
            for event in ready.iter().take(count) {
                match event.data.u64() {
                    source::UDP_V4 => self.datagrams_from(Family::V4)?,
                    source::UDP_V6 => self.datagrams_from(Family::V6)?,
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn datagrams_from(&mut self, family: Family) -> io::Result<()> {
        for _ in 0..ROUNDS {
            if self.batch_from(family)?.is_break() {
                break;
            }
        }
        Ok(())
    }

    /// One receive, and all that comes of it.
    fn batch_from(&mut self, family: Family) -> io::Result<ControlFlow<()>> {
        let count = self.sockets.recv_into(family, &mut self.received)?;
        self.verdicts.clear();
        self.verdicts.drops.add(Dropped::Malformed, self.received.lost());
        if count > 0 {
            let now = Instant::now();
            self.judge(now);
            self.send();
            self.answer(now);
        }
        self.hub.metrics.dropped(&self.verdicts.drops);
        Ok(if count == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    }

    fn judge(&mut self, now: Instant) {
        let (messages, octets) = self.received.parts_mut();
        let (mut frames, mut total) = (0, 0);
        {
            let relay = self.hub.read();
            for message in messages {
                frames += message.count() as u64;
                total += message.range.len() as u64;
                let arrival = Arrival {
                    from: message.source,
                    ecn: Ecn::from_bits(message.ecn),
                    datagram_len: message.datagram_len,
                    range: message.range.clone(),
                };
                relay.forward(&arrival, octets, now, &mut self.verdicts);
            }
        }
        self.hub.metrics.udp.received.count(frames, total, 1);
    }

    fn send(&mut self) {
        let (verdicts, octets) = (&mut self.verdicts, self.received.octets());
        send_runs(&self.hub, &self.sockets, &verdicts.forwards, octets, &mut verdicts.drops);
        if verdicts.forwards.iter().any(|forward| matches!(forward.to, To::Stream(_))) {
            collect(&verdicts.forwards, octets, &mut self.batches);
            self.hub.send_by_streams(self.batches.drain(..), &mut verdicts.drops);
        }
        if !verdicts.notices.is_empty() {
            let notices = verdicts.notices.iter().map(|(to, octets)| alone(*to, octets));
            self.hub.metrics.notices.inc_by(verdicts.notices.len() as u64);
            self.sockets.send_runs(notices);
        }
    }

    fn answer(&mut self, now: Instant) {
        let octets = self.received.octets();
        for hellos in self.verdicts.hellos.chunks(HELLOS) {
            self.welcomes.clear();
            {
                let mut relay = self.hub.write();
                self.welcomes.extend(hellos.iter().filter_map(|hello| {
                    let octets = octets.get(hello.range.clone())?;
                    Some((hello.from, relay.handle_hello(hello.from, octets, now)?))
                }));
            }
            self.hub.metrics.hellos.inc_by(self.welcomes.len() as u64);
            self.sockets.send_runs(self.welcomes.iter().map(|(to, octets)| alone(*to, octets)));
        }
    }
}

/// Sends what leaves as datagrams.
pub(crate) fn send_runs(
    hub: &Hub,
    sockets: &UdpSockets,
    forwards: &[Forward],
    octets: &[u8],
    drops: &mut Drops,
) {
    let runs = forwards.iter().filter_map(|forward| {
        let To::Udp(destination) = forward.to else { return None };
        let octets = octets.get(forward.range.clone())?;
        let (ecn, datagram_len) = (forward.ecn, forward.datagram_len);
        Some(Run { destination, ecn, fragmentation: Fragmentation::Known, datagram_len, octets })
    });
    let Sent { datagrams, bytes, calls, full, failed, .. } = sockets.send_runs(runs);
    if calls > 0 {
        hub.metrics.udp.sent.count(datagrams, bytes, calls);
    }
    drops.add(Dropped::Full, full + failed);
}

/// Adds what leaves by streams to the batches of each, those that are full beginning another.
pub(crate) fn collect(forwards: &[Forward], octets: &[u8], batches: &mut Vec<(u32, Batch)>) {
    for forward in forwards {
        let (To::Stream(session), Some(octets)) = (forward.to, octets.get(forward.range.clone())) else {
            continue;
        };
        for frame in octets.chunks(forward.datagram_len.max(1)) {
            // From the end, so that the order is kept where a batch was full.
            let last = batches.iter_mut().rev().find(|(of, _)| *of == session);
            if let Some((_, batch)) = last
                && push_frame(&mut batch.octets, frame)
            {
                batch.frames += 1;
                continue;
            }
            let mut batch = Batch { octets: Vec::with_capacity(octets.len() + 128), frames: 1 };
            push_frame(&mut batch.octets, frame);
            batches.push((session, batch));
        }
    }
}

fn alone(destination: std::net::SocketAddr, octets: &[u8]) -> Run<'_> {
    let (ecn, fragmentation) = (Ecn::NotEct, Fragmentation::Known);
    Run { destination, ecn, fragmentation, datagram_len: octets.len(), octets }
}
