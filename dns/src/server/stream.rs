//! DNS over TCP (RFC 7766) and over TLS (RFC 7858): many queries on a connection, answered as they come or out
//! of order, one write for everything that is ready. Of each zone transfer (RFC 5936), a message goes with a write.

use std::{
    cell::RefCell,
    collections::VecDeque,
    future::poll_fn,
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use hickory_proto::op::ResponseCode;
use muster_common::{
    census::{Bounds, Census, Place},
    time::{Instant, Timestamp},
    tls::{self, ResumingServer},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;

use super::{
    Handler, Handling, Source, canonical,
    metrics::{Connected, Listener, Metrics, Reason, Tally},
    transfer::{Sending, reject},
};
use crate::{engine::Outcome, message::Transport};

/// Largest query that a connection may bring; real ones have some hundred octets.
const QUERY_MAX: usize = 4096;
/// Octets that are read at a time.
const READ_ROOM: usize = 1 << 16;
/// Responses are written once so many octets are ready, although more queries wait.
const WRITE_BATCH: usize = 1 << 16;
/// Room for responses that a connection gets first, and may keep while it waits.
const BATCH_KEPT: usize = 1 << 12;
/// Pause after an error of accept, such as having no file descriptors left.
const ERROR_PAUSE: Duration = Duration::from_millis(50);

thread_local! {
    /// What is read is handled before anything else happens on the thread, so that one buffer is enough, and
    /// connections that wait have none.
    static READ: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_ROOM].into_boxed_slice());
}

/// Bounds of one TCP or TLS listener.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StreamLimits {
    /// Connections at a time without a client certificate, and as many again with one; more are closed at once.
    pub connections: usize,
    /// Connections at a time of one client: without a certificate of an address, with one of a device.
    pub connections_per_client: usize,
    /// Queries of one connection whose answer takes time, zone transfers among them; until one is ready, no more
    /// are read.
    pub pipelined: usize,
    /// Zone transfers at a time on all connections; more are answered SERVFAIL, so that their clients try again.
    pub transfers: usize,
    /// How long a connection may go without a whole query, and how long a client may take to read what it is sent.
    pub idle: Duration,
    /// How long a TLS handshake may take.
    pub handshake: Duration,
    /// After this time a connection is closed, so that its client proves anew who it is; also within a zone transfer.
    pub age: Duration,
    /// Likewise for TLS connections without a client certificate.
    pub stranger_age: Duration,
}

impl Default for StreamLimits {
    fn default() -> Self {
        Self {
            connections: 10_000,
            connections_per_client: 256,
            pipelined: 256,
            transfers: 16,
            idle: Duration::from_secs(30),
            handshake: Duration::from_secs(5),
            age: Duration::from_secs(3600),
            stranger_age: Duration::from_secs(30),
        }
    }
}

/// Serves `handler` over TCP on `listener` until dropped, which also closes all its connections.
pub async fn serve_tcp<H: Handler>(
    listener: TcpListener,
    handler: Arc<H>,
    limits: StreamLimits,
    metrics: &Metrics,
) -> io::Result<()> {
    accept(listener, None, handler, limits, metrics).await
}

/// Serves `handler` over TLS on `listener`. `server` decides which clients get in; one that has a certificate is
/// known to the handler by its identity.
pub async fn serve_tls<H: Handler>(
    listener: TcpListener,
    server: ResumingServer,
    handler: Arc<H>,
    limits: StreamLimits,
    metrics: &Metrics,
) -> io::Result<()> {
    accept(listener, Some(Arc::new(server)), handler, limits, metrics).await
}

/// A connection's place and its part in the metrics, given back on drop, and what it shares with all others.
struct Slot {
    place: Place,
    metrics: Listener,
    /// Places of zone transfers.
    transfers: Arc<Semaphore>,
    _connected: Connected,
}

impl Slot {
    fn new(place: Place, metrics: &Listener, transfers: &Arc<Semaphore>) -> Self {
        let (metrics, _connected) = (metrics.clone(), metrics.connected());
        Self { place, metrics, transfers: Arc::clone(transfers), _connected }
    }
}

async fn accept<H: Handler>(
    listener: TcpListener,
    tls: Option<Arc<ResumingServer>>,
    handler: Arc<H>,
    limits: StreamLimits,
    metrics: &Metrics,
) -> io::Result<()> {
    let transport = if tls.is_some() { Transport::Tls } else { Transport::Tcp };
    let metrics = metrics.listener(transport, listener.local_addr()?);
    let census = Census::new(Bounds {
        parties: limits.connections,
        per_device: limits.connections_per_client,
        strangers: limits.connections,
        strangers_per_source: limits.connections_per_client,
    });
    let transfers = Arc::new(Semaphore::new(limits.transfers.min(Semaphore::MAX_PERMITS)));
    let mut connections = JoinSet::new();
    loop {
        let (stream, address) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::debug!(%error, "cannot accept a DNS connection");
                    tokio::time::sleep(ERROR_PAUSE).await;
                    continue;
                }
            },
            Some(_) = connections.join_next() => continue,
        };
        let address = canonical(address);
        let Ok(place) = census.admit(address.ip()) else {
            metrics.dropped(Reason::Connections);
            continue;
        };
        let (tls, handler, slot) =
            (tls.clone(), Arc::clone(&handler), Slot::new(place, &metrics, &transfers));
        connections.spawn(async move {
            if let Err(error) = serve(stream, address, tls, &*handler, limits, slot).await {
                tracing::debug!(client = %address, %error, "DNS connection ended");
            }
        });
    }
}

async fn serve<H: Handler>(
    stream: TcpStream,
    address: SocketAddr,
    tls: Option<Arc<ResumingServer>>,
    handler: &H,
    mut limits: StreamLimits,
    mut slot: Slot,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let Some(tls) = tls else {
        let source = Source { address, transport: Transport::Tcp, identity: None };
        return Connection::new(stream, source, handler, &limits, &slot).run().await;
    };
    let accept = TlsAcceptor::from(tls.config()).accept(stream);
    let stream = timeout(limits.handshake, accept).await.map_err(io::Error::from)??;
    tls.check(stream.get_ref().1).map_err(io::Error::other)?;
    let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let identity = match certificate {
        None => {
            limits.age = limits.stranger_age;
            None
        }
        Some(certificate) => {
            let identity = tls::certificate_identity(certificate).map_err(io::Error::other)?;
            slot.place.identify(&identity).map_err(io::Error::other)?;
            let (_, to) = tls::certificate_validity(certificate).map_err(io::Error::other)?;
            limits.age = limits.age.min(to.saturating_duration_since(Timestamp::now()));
            Some(Arc::new(identity))
        }
    };
    let source = Source { address, transport: Transport::Tls, identity };
    Connection::new(stream, source, handler, &limits, &slot).run().await
}

/// An answer that takes time: outcome, response, size of the query and when it came.
type Pending = BoxFuture<'static, (Outcome, Vec<u8>, usize, Instant)>;

struct Connection<'a, S, H> {
    stream: S,
    source: Source,
    handler: &'a H,
    limits: &'a StreamLimits,
    metrics: &'a Listener,
    /// Places of zone transfers, of all connections.
    places: &'a Arc<Semaphore>,
    /// When the connection was last looked at.
    now: Instant,
    /// When it was opened, last brought a whole query, or took a message of a zone transfer.
    active: Instant,
    /// Octets read that are not a whole query yet, or queries that have to wait.
    rest: Vec<u8>,
    pending: FuturesUnordered<Pending>,
    /// Zone transfers on their way, that whose turn is next first.
    transfers: VecDeque<Sending>,
    response: Vec<u8>,
    /// Responses, each behind its length, ready to be written.
    batch: Vec<u8>,
    tally: Tally,
}

/// What a connection waited for.
enum Event {
    /// Queries have come, or parts; `false` if none will any more.
    Read(bool),
    Ready((Outcome, Vec<u8>, usize, Instant)),
    Timer,
    /// For nothing: zone transfers go on.
    Transfer,
}

impl<'a, S: AsyncRead + AsyncWrite + Unpin, H: Handler> Connection<'a, S, H> {
    fn new(stream: S, source: Source, handler: &'a H, limits: &'a StreamLimits, slot: &'a Slot) -> Self {
        let now = Instant::now();
        Self {
            stream,
            source,
            handler,
            limits,
            metrics: &slot.metrics,
            places: &slot.transfers,
            now,
            active: now,
            rest: Vec::new(),
            pending: FuturesUnordered::new(),
            transfers: VecDeque::new(),
            response: Vec::new(),
            batch: Vec::new(),
            tally: Tally::default(),
        }
    }

    async fn run(mut self) -> io::Result<()> {
        let opened = self.active;
        let mut open = true;
        // Not set anew at every query: when it fires, it is seen how long nothing has come.
        let mut timer = pin!(sleep(self.limits.idle));
        loop {
            if !self.rest.is_empty() {
                let rest = std::mem::take(&mut self.rest);
                self.handle(&rest)?;
            }
            let mut freed = false;
            while !self.pending.is_empty()
                && let Some(Some(ready)) = self.pending.next().now_or_never()
            {
                self.finish(ready);
                freed = true;
            }
            freed |= self.advance()?;
            if !self.batch.is_empty() {
                self.write().await?;
                freed = true;
            }
            // Places in the pipeline or the batch have become free. While there are transfers, every turn frees some,
            // and must come to what is below as well.
            if freed && !self.rest.is_empty() && self.transfers.is_empty() {
                continue;
            }
            if self.now - opened >= self.limits.age {
                open = false;
                // Without its last SOA, the client knows that a transfer is not complete.
                self.transfers.clear();
            }
            if !open && self.pending.is_empty() && self.transfers.is_empty() {
                return self.stream.shutdown().await;
            }
            let readable = open && self.room();
            let event = poll_fn(|cx| {
                if readable && let Poll::Ready(read) = self.poll_read(cx) {
                    return Poll::Ready(read.map(Event::Read));
                }
                if let Poll::Ready(Some(ready)) = self.pending.poll_next_unpin(cx) {
                    return Poll::Ready(Ok(Event::Ready(ready)));
                }
                if open && timer.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(Ok(Event::Timer));
                }
                if !self.transfers.is_empty() {
                    return Poll::Ready(Ok(Event::Transfer));
                }
                self.batch.shrink_to(BATCH_KEPT);
                Poll::Pending
            });
            match event.await? {
                Event::Read(more) => open = more,
                Event::Ready(ready) => self.finish(ready),
                Event::Transfer => {}
                Event::Timer => {
                    self.now = Instant::now();
                    let left = self.limits.idle.saturating_sub(self.now - self.active);
                    open = !left.is_zero();
                    timer.set(sleep(left));
                }
            }
        }
    }

    /// Reads what is there, and hands over the queries in it. `false` if that was the last.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        READ.with_borrow_mut(|room| {
            let mut buffer = ReadBuf::new(room);
            buffer.put_slice(&self.rest);
            let mut more = true;
            while more && buffer.remaining() > 0 {
                let before = buffer.filled().len();
                match Pin::new(&mut self.stream).poll_read(cx, &mut buffer) {
                    Poll::Ready(Ok(())) => more = buffer.filled().len() > before,
                    // First what has come before it.
                    Poll::Ready(Err(_)) if before > self.rest.len() => more = false,
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    Poll::Pending if before > self.rest.len() => break,
                    Poll::Pending => return Poll::Pending,
                }
            }
            self.handle(buffer.filled())?;
            Poll::Ready(Ok(more))
        })
    }

    /// Hands over the queries in `octets`, as far as there is room for what they cause, and keeps the rest.
    fn handle(&mut self, octets: &[u8]) -> io::Result<()> {
        let started = Instant::now();
        let (mut octets, v4) = (octets, self.source.address.is_ipv4());
        self.now = started;
        while self.room() && self.batch.len() < WRITE_BATCH {
            let Some((length, rest)) = octets.split_first_chunk() else { break };
            let length = usize::from(u16::from_be_bytes(*length));
            if length > QUERY_MAX {
                return Err(io::Error::other(format!("a query of {length} octets")));
            }
            let Some((query, rest)) = rest.split_at_checked(length) else { break };
            match self.handler.handle(query, &self.source, &mut self.response) {
                Handling::Done(outcome) => {
                    self.metrics.handled(v4, outcome, length, self.response.len(), &mut self.tally);
                    append(&mut self.batch, &self.response);
                }
                Handling::Later(answer) => self.pending.push(
                    answer.map(move |(outcome, response)| (outcome, response, length, started)).boxed(),
                ),
                Handling::Several(messages) => match Arc::clone(self.places).try_acquire_owned() {
                    Ok(place) => {
                        let sending = Sending::new(messages, place, self.metrics, v4, length, started);
                        self.transfers.push_back(sending);
                    }
                    Err(_) => {
                        let outcome = reject(query, ResponseCode::ServFail, &mut self.response);
                        self.metrics.handled(v4, outcome, length, self.response.len(), &mut self.tally);
                        append(&mut self.batch, &self.response);
                    }
                },
            }
            octets = rest;
            self.active = started;
        }
        self.rest.clear();
        self.rest.extend_from_slice(octets);
        if !self.batch.is_empty() {
            self.metrics.took(&mut self.tally, Instant::now() - started);
        }
        Ok(())
    }

    /// Whether another query may take time.
    fn room(&self) -> bool {
        self.pending.len() + self.transfers.len() < self.limits.pipelined
    }

    /// Makes the next message of the transfer whose turn it is. Only once the one before has been written, so that
    /// a client that does not read has no more than one made for it. Whether a transfer has ended.
    fn advance(&mut self) -> io::Result<bool> {
        let mut ended = false;
        while let Some(mut sending) = self.transfers.pop_front() {
            self.now = Instant::now();
            if sending.next(&mut self.response) {
                if !append(&mut self.batch, &self.response) {
                    // Going on would pass for a whole zone.
                    return Err(io::Error::other("a message of a zone transfer could not be made"));
                }
                self.active = self.now;
                self.transfers.push_back(sending);
                break;
            }
            self.response = Vec::new();
            ended = true;
        }
        Ok(ended)
    }

    fn finish(&mut self, (outcome, response, query, started): (Outcome, Vec<u8>, usize, Instant)) {
        self.now = Instant::now();
        let v4 = self.source.address.is_ipv4();
        self.metrics.handled(v4, outcome, query, response.len(), &mut self.tally);
        self.metrics.took(&mut self.tally, self.now - started);
        append(&mut self.batch, &response);
    }

    async fn write(&mut self) -> io::Result<()> {
        let write = async {
            self.stream.write_all(&self.batch).await?;
            self.stream.flush().await
        };
        timeout(self.limits.idle, write).await.map_err(io::Error::from)??;
        self.batch.clear();
        Ok(())
    }
}

/// Adds `response` to `batch`; `false` if there is none, or it is longer than a message can be.
fn append(batch: &mut Vec<u8>, response: &[u8]) -> bool {
    let Ok(length @ 1..) = u16::try_from(response.len()) else { return false };
    if batch.capacity() == 0 {
        batch.reserve(BATCH_KEPT);
    }
    batch.extend_from_slice(&length.to_be_bytes());
    batch.extend_from_slice(response);
    true
}

#[cfg(test)]
mod tests;
