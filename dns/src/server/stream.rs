//! DNS over TCP (RFC 7766) and over TLS (RFC 7858): many queries on a connection, answered as they come or out
//! of order, one write for everything that is ready.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use muster_common::{
    census::{Bounds, Census, Place},
    time::{Instant, Timestamp},
    tls,
};
use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::TlsAcceptor;

use super::{
    Handler, Handling, Source, canonical,
    metrics::{Listener, Metrics},
};
use crate::{engine::Outcome, message::Transport};

/// Largest query that a connection may bring; real ones have some hundred octets.
const QUERY_MAX: usize = 4096;
/// Room for queries that have been read and not yet handled.
const READ_BUFFER: usize = 2 * (QUERY_MAX + 2);
/// Responses are written once so many octets are ready, although more queries wait.
const WRITE_BATCH: usize = 1 << 16;
/// Pause after an error of accept, such as having no file descriptors left.
const ERROR_PAUSE: Duration = Duration::from_millis(50);

/// Bounds of one TCP or TLS listener.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StreamLimits {
    /// Connections at a time without a client certificate, and as many again with one; more are closed at once.
    pub connections: usize,
    /// Connections at a time of one client: without a certificate of an address, with one of a device.
    pub connections_per_client: usize,
    /// Queries of one connection whose answer takes time; until one is ready, no more are read.
    pub pipelined: usize,
    /// How long a connection may go without a whole query, and how long a client may take to read what it is sent.
    pub idle: Duration,
    /// How long a TLS handshake may take.
    pub handshake: Duration,
    /// After this time a connection is closed, so that its client proves anew who it is.
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

/// Serves `handler` over TLS on `listener`. `config` decides which clients get in; one that has a certificate is
/// known to the handler by its identity.
pub async fn serve_tls<H: Handler>(
    listener: TcpListener,
    config: Arc<ServerConfig>,
    handler: Arc<H>,
    limits: StreamLimits,
    metrics: &Metrics,
) -> io::Result<()> {
    accept(listener, Some(TlsAcceptor::from(config)), handler, limits, metrics).await
}

/// A connection's place and its part in the metrics, given back on drop.
struct Slot {
    place: Place,
    metrics: Listener,
}

impl Slot {
    fn new(place: Place, metrics: &Listener) -> Self {
        metrics.connections.inc();
        Self { place, metrics: metrics.clone() }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.metrics.connections.dec();
    }
}

async fn accept<H: Handler>(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
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
            metrics.dropped("connections");
            continue;
        };
        let (tls, handler, slot) = (tls.clone(), Arc::clone(&handler), Slot::new(place, &metrics));
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
    tls: Option<TlsAcceptor>,
    handler: &H,
    mut limits: StreamLimits,
    mut slot: Slot,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let Some(tls) = tls else {
        let source = Source { address, transport: Transport::Tcp, identity: None };
        return Connection::new(stream, source, handler, &limits, &slot.metrics).run().await;
    };
    let stream = timeout(limits.handshake, tls.accept(stream)).await.map_err(io::Error::from)??;
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
    Connection::new(stream, source, handler, &limits, &slot.metrics).run().await
}

/// An answer that takes time: outcome, response, size of the query and when it came.
type Pending = BoxFuture<'static, (Outcome, Vec<u8>, usize, Instant)>;

struct Connection<'a, S, H> {
    stream: S,
    source: Source,
    handler: &'a H,
    limits: &'a StreamLimits,
    metrics: &'a Listener,
    /// When the connection was opened, or last brought a whole query.
    active: Instant,
    /// Octets read; those before `taken` have been handled.
    read: Vec<u8>,
    taken: usize,
    pending: FuturesUnordered<Pending>,
    response: Vec<u8>,
    /// Responses, each behind its length, ready to be written.
    batch: Vec<u8>,
}

impl<'a, S: AsyncRead + AsyncWrite + Unpin, H: Handler> Connection<'a, S, H> {
    fn new(
        stream: S,
        source: Source,
        handler: &'a H,
        limits: &'a StreamLimits,
        metrics: &'a Listener,
    ) -> Self {
        Self {
            stream,
            source,
            handler,
            limits,
            metrics,
            active: Instant::now(),
            read: Vec::with_capacity(512),
            taken: 0,
            pending: FuturesUnordered::new(),
            response: Vec::new(),
            batch: Vec::new(),
        }
    }

    async fn run(mut self) -> io::Result<()> {
        let opened = self.active;
        let mut open = true;
        loop {
            self.handle_queries()?;
            while let Some(Some(ready)) = self.pending.next().now_or_never() {
                self.finish(ready);
            }
            if !self.batch.is_empty() {
                self.write().await?;
                // Places in the pipeline or the batch have become free: more queries may wait.
                continue;
            }
            open = open && Instant::now() - opened < self.limits.age;
            if !open && self.pending.is_empty() {
                return self.stream.shutdown().await;
            }
            let readable = open && self.read.len() - self.taken < READ_BUFFER;
            let limit = (READ_BUFFER - (self.read.len() - self.taken).min(READ_BUFFER)) as u64;
            let idle = self.limits.idle.saturating_sub(Instant::now() - self.active);
            let (stream, read) = (&mut self.stream, &mut self.read);
            tokio::select! {
                octets = async { stream.take(limit).read_buf(read).await }, if readable => open = octets? > 0,
                Some(ready) = self.pending.next(), if !self.pending.is_empty() => self.finish(ready),
                () = tokio::time::sleep(idle), if open => open = false,
            }
        }
    }

    /// Hands over all queries that have been read, as far as there is room for what they cause.
    fn handle_queries(&mut self) -> io::Result<()> {
        while self.pending.len() < self.limits.pipelined && self.batch.len() < WRITE_BATCH {
            let Some((length, rest)) = self.read.get(self.taken..).and_then(<[u8]>::split_first_chunk) else {
                break;
            };
            let length = usize::from(u16::from_be_bytes(*length));
            if length > QUERY_MAX {
                return Err(io::Error::other(format!("a query of {length} octets")));
            }
            let Some(query) = rest.get(..length) else { break };
            let started = Instant::now();
            match self.handler.handle(query, &self.source, &mut self.response) {
                Handling::Done(outcome) => {
                    let took = Instant::now() - started;
                    self.metrics.handled(&self.source, outcome, length, self.response.len(), took);
                    append(&mut self.batch, &self.response);
                }
                Handling::Later(answer) => self.pending.push(
                    answer.map(move |(outcome, response)| (outcome, response, length, started)).boxed(),
                ),
            }
            self.taken += 2 + length;
            self.active = started;
        }
        self.read.drain(..self.taken.min(self.read.len()));
        self.taken = 0;
        Ok(())
    }

    fn finish(&mut self, (outcome, response, query, started): (Outcome, Vec<u8>, usize, Instant)) {
        let took = Instant::now() - started;
        self.metrics.handled(&self.source, outcome, query, response.len(), took);
        append(&mut self.batch, &response);
    }

    async fn write(&mut self) -> io::Result<()> {
        let write = async {
            self.stream.write_all(&self.batch).await?;
            self.stream.flush().await
        };
        timeout(self.limits.idle, write).await.map_err(io::Error::from)??;
        self.batch.clear();
        self.batch.shrink_to(WRITE_BATCH);
        Ok(())
    }
}

fn append(batch: &mut Vec<u8>, response: &[u8]) {
    let Ok(length) = u16::try_from(response.len()) else { return };
    if length > 0 {
        batch.extend_from_slice(&length.to_be_bytes());
        batch.extend_from_slice(response);
    }
}
