//! DNS over UDP: a socket and a thread for each processor core, which reads what is there by one system call, and
//! answers it by another, from the addresses the queries came to.

use std::{
    io,
    net::SocketAddr,
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use futures_util::future::BoxFuture;
use hickory_proto::op::ResponseCode;
use muster_common::{net::BindError, time::Instant};
use socket2::{Protocol, Socket, Type};
use tokio::{runtime::Handle, sync::Semaphore};

use super::{
    Handler, Handling, Source,
    limit::{Limiter, Rate, Verdict},
    metrics::{Listener, Metrics, Reason, Tally},
    prepare,
    sys::{self, Batch, Peer},
    transfer::reject,
};
use crate::{
    engine::Outcome,
    message::{self, Parsed, Transport},
};

/// Room for queries that wait, per socket.
const RECEIVE_ROOM: i32 = 4 << 20;
/// Pause after an error of the socket that is not about one datagram.
const ERROR_PAUSE: Duration = Duration::from_millis(50);
/// How often, and how long apart, a response that took time is tried when there is no room to send.
const RETRIES: u32 = 5;
const RETRY_PAUSE: Duration = Duration::from_millis(5);

/// Bounds of one UDP listener.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct UdpLimits {
    /// Responses per source prefix; `None` for no limit.
    pub rate: Option<Rate>,
    /// Queries at a time whose answer takes time; what exceeds it is dropped.
    pub pending: usize,
}

impl Default for UdpLimits {
    fn default() -> Self {
        Self { rate: Some(Rate::default()), pending: 4096 }
    }
}

/// Sockets that share an address, among which the kernel distributes the clients.
#[derive(Debug)]
pub struct UdpSockets {
    sockets: Vec<Socket>,
    address: SocketAddr,
}

impl UdpSockets {
    /// Binds `count` sockets, at least one, to `address`; if that has port 0, all to the same port. With `early`, the
    /// address need not be on the host yet (`IP_FREEBIND`).
    pub fn bind(address: SocketAddr, early: bool, count: usize) -> Result<Self, BindError> {
        Self::try_bind(address, early, count).map_err(|e| BindError::new("DNS over UDP", address, e))
    }

    fn try_bind(address: SocketAddr, early: bool, count: usize) -> io::Result<Self> {
        // The first takes the address for itself, so that whoever has it already is noticed, also if they would
        // share it. Only then may others join, which the kernel grants to processes of the same user alone.
        let first = prepare(address, Type::DGRAM, Protocol::UDP, early)?;
        first.bind(&address.into())?;
        let bound = first.local_addr()?.as_socket().ok_or(io::ErrorKind::AddrNotAvailable)?;
        if count > 1 {
            first.set_reuse_port(true)?;
        }
        let mut sockets = vec![first];
        while sockets.len() < count {
            let socket = prepare(bound, Type::DGRAM, Protocol::UDP, early)?;
            socket.set_reuse_port(true)?;
            socket.bind(&bound.into())?;
            sockets.push(socket);
        }
        for socket in &sockets {
            socket.set_nonblocking(false)?;
            sys::receive_room(socket.as_fd(), RECEIVE_ROOM)?;
            if bound.ip().is_unspecified() {
                sys::want_destinations(socket.as_fd(), bound.is_ipv6())?;
            }
        }
        Ok(Self { sockets, address: bound })
    }

    /// The address of all of them.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }
}

/// A running listener. When it is dropped, it stops, and its threads have ended.
#[derive(Debug)]
pub struct Udp {
    stop: Arc<AtomicBool>,
    sockets: Vec<Arc<Socket>>,
    threads: Vec<JoinHandle<()>>,
}

impl Drop for Udp {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for socket in &self.sockets {
            // Says that there is no connection, and wakes the thread that waits all the same.
            let _ = socket.shutdown(std::net::Shutdown::Read);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Serves `handler` on `sockets`, each with a thread of its own, until the returned guard is dropped. What takes
/// time is left to the tokio runtime that this is called in.
///
/// # Errors
/// There is no runtime, or the system refuses a thread.
pub fn spawn<H: Handler>(
    sockets: UdpSockets,
    handler: Arc<H>,
    limits: UdpLimits,
    metrics: &Metrics,
) -> io::Result<Udp> {
    let runtime = Handle::try_current().map_err(io::Error::other)?;
    let destinations = sockets.address.ip().is_unspecified();
    let limiter = limits.rate.map(|rate| Arc::new(Limiter::new(rate)));
    let pending = Arc::new(Semaphore::new(limits.pending));
    let mut udp = Udp { stop: Arc::default(), sockets: Vec::new(), threads: Vec::new() };
    let shared = metrics.listener(Transport::Udp, sockets.address);
    for (number, socket) in sockets.sockets.into_iter().enumerate() {
        let socket = Arc::new(socket);
        udp.sockets.push(Arc::clone(&socket));
        let worker = Worker {
            socket,
            handler: Arc::clone(&handler),
            limiter: limiter.clone(),
            metrics: metrics.sole_listener(Transport::Udp, sockets.address),
            later: Later { runtime: runtime.clone(), pending: Arc::clone(&pending), metrics: shared.clone() },
            stop: Arc::clone(&udp.stop),
        };
        let run = move || worker.run(Batch::new(destinations));
        udp.threads.push(std::thread::Builder::new().name(format!("dns-udp-{number}")).spawn(run)?);
    }
    Ok(udp)
}

/// As [`spawn`], until the future is dropped. It never ends by itself, except with an error.
pub async fn serve<H: Handler>(
    sockets: UdpSockets,
    handler: Arc<H>,
    limits: UdpLimits,
    metrics: &Metrics,
) -> io::Result<()> {
    let _running = spawn(sockets, handler, limits, metrics)?;
    std::future::pending().await
}

/// One thread's.
struct Worker<H> {
    socket: Arc<Socket>,
    handler: Arc<H>,
    limiter: Option<Arc<Limiter>>,
    metrics: Listener,
    later: Later,
    stop: Arc<AtomicBool>,
}

impl<H: Handler> Worker<H> {
    fn run(&self, mut batch: Batch) {
        let mut tally = Tally::default();
        loop {
            let received = match batch.receive(self.socket.as_fd()) {
                _ if self.stop.load(Ordering::Relaxed) => return,
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::debug!(%error, "cannot read DNS queries");
                    std::thread::sleep(ERROR_PAUSE);
                    continue;
                }
            };
            let started = Instant::now();
            if received > 1 {
                self.handler.expect(batch.queries());
            }
            for index in 0..received {
                if let Some((peer, query, out)) = batch.query(index) {
                    self.handle((index, peer), query, started, out, &mut tally);
                }
            }
            // Before they are sent: who has a response finds it counted.
            self.metrics.took(&mut tally, Instant::now() - started);
            let failed = batch.send(self.socket.as_fd());
            if failed > 0 {
                tracing::debug!(failed, "cannot send DNS responses");
            }
        }
    }

    fn handle(
        &self,
        (index, peer): (usize, &Peer),
        query: &[u8],
        started: Instant,
        out: &mut Vec<u8>,
        tally: &mut Tally,
    ) {
        out.clear();
        let Some(address) = peer.address() else { return };
        let source = Source { address, transport: Transport::Udp, identity: None };
        if let Some(limiter) = &self.limiter {
            let id = query.first_chunk().map_or(0, |id| u32::from(u16::from_be_bytes(*id)));
            match limiter.check(address.ip(), id << 8 ^ index as u32, started) {
                Verdict::Answer => {}
                Verdict::Drop => return self.metrics.dropped(Reason::Rate),
                Verdict::Slip => {
                    slip(query, out);
                    return self.metrics.dropped(Reason::Rate);
                }
            }
        }
        match self.handler.handle(query, &source, out) {
            Handling::Done(outcome) => {
                self.metrics.handled(address.is_ipv4(), outcome, query.len(), out.len(), tally);
            }
            Handling::Later(answer) => {
                out.clear();
                let socket = Arc::clone(&self.socket);
                self.later.spawn(socket, *peer, address.is_ipv4(), query.len(), started, answer);
            }
            Handling::Several(_) => {
                let outcome = reject(query, ResponseCode::Refused, out);
                self.metrics.handled(address.is_ipv4(), outcome, query.len(), out.len(), tally);
            }
        }
    }
}

/// An empty response with TC, which sends the client to TCP.
fn slip(query: &[u8], out: &mut Vec<u8>) {
    if let Parsed::Request(request) = message::parse(query) {
        let mut response = request.response(ResponseCode::NoError);
        response.metadata.truncation = true;
        if response.encode(message::UDP_MINIMUM, out).is_err() {
            out.clear();
        }
    }
}

/// What sends the answers that take time.
struct Later {
    runtime: Handle,
    pending: Arc<Semaphore>,
    metrics: Listener,
}

impl Later {
    fn spawn(
        &self,
        socket: Arc<Socket>,
        peer: Peer,
        v4: bool,
        query: usize,
        started: Instant,
        answer: BoxFuture<'static, (Outcome, Vec<u8>)>,
    ) {
        let Ok(slot) = Arc::clone(&self.pending).try_acquire_owned() else {
            return self.metrics.dropped(Reason::Busy);
        };
        let metrics = self.metrics.clone();
        self.runtime.spawn(async move {
            let (outcome, response) = answer.await;
            let mut tally = Tally::default();
            metrics.handled(v4, outcome, query, response.len(), &mut tally);
            metrics.took(&mut tally, Instant::now() - started);
            if !response.is_empty() {
                send(&socket, &peer, &response).await;
            }
            drop(slot);
        });
    }
}

async fn send(socket: &Socket, peer: &Peer, response: &[u8]) {
    for _ in 0..RETRIES {
        match sys::send(socket.as_fd(), peer, response) {
            Ok(()) => return,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => tokio::time::sleep(RETRY_PAUSE).await,
            Err(error) => return tracing::debug!(%error, "cannot send a DNS response"),
        }
    }
    tracing::debug!("no room to send a DNS response");
}
