//! Accepted connections: who is at the other end, how many there may be, and how long each may last. A stranger's
//! ends after the time that an enrolment needs, a party's with the certificate that it was opened with.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge},
    registry::Registry,
};
use rustls::{ServerConfig, pki_types::CertificateDer};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::Sleep,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

use crate::{
    census::{Bounds, Census, Place},
    identity::SpiffeId,
    time::Timestamp,
    tls::{certificate_identity, certificate_validity},
};

/// How long a client may take over its TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a stranger's connection may last, and how long a party may take to begin after its handshake.
const STRANGER_AGE: Duration = Duration::from_secs(30);

/// Who is at the other end; tonic hands it to services as a request extension.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Where the connection comes from.
    pub address: SocketAddr,
    /// From the verified client certificate; `None` for a stranger.
    pub identity: Option<SpiffeId>,
}

/// What [`incoming`] counts.
#[derive(Clone, Debug, Default)]
pub struct AcceptMetrics {
    parties: Gauge,
    strangers: Gauge,
    refused: Counter,
    failed: Counter,
}

impl AcceptMetrics {
    /// Registers them.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "grpc_connections",
            "gRPC connections of devices, operators and others with a certificate",
            self.parties.clone(),
        );
        registry.register(
            "grpc_stranger_connections",
            "gRPC connections without a certificate, handshakes included",
            self.strangers.clone(),
        );
        registry.register(
            "grpc_connections_refused",
            "gRPC connections closed because there were too many of their kind",
            self.refused.clone(),
        );
        registry.register("grpc_handshakes_failed", "TLS handshakes that failed", self.failed.clone());
    }
}

/// An accepted connection, for tonic's `serve_with_incoming_shutdown`.
#[derive(Debug)]
pub struct Connection {
    stream: TlsStream<TcpStream>,
    caller: Caller,
    /// When it ends, whatever happens.
    end: Pin<Box<Sleep>>,
    /// How long it may last once a party has begun.
    then: Option<Duration>,
    _place: Counted,
}

/// A place, and the metrics that follow it.
#[derive(Debug)]
struct Counted {
    place: Option<Place>,
    census: Census,
    metrics: AcceptMetrics,
}

impl Counted {
    fn new(place: Place, census: &Census, metrics: &AcceptMetrics) -> Self {
        let counted = Self { place: Some(place), census: census.clone(), metrics: metrics.clone() };
        counted.update();
        counted
    }

    fn update(&self) {
        let (parties, strangers) = self.census.counts();
        self.metrics.parties.set(parties.try_into().unwrap_or(i64::MAX));
        self.metrics.strangers.set(strangers.try_into().unwrap_or(i64::MAX));
    }

    fn identify(&mut self, identity: &SpiffeId) -> io::Result<()> {
        if let Some(place) = &mut self.place
            && let Err(refused) = place.identify(identity)
        {
            self.metrics.refused.inc();
            return Err(io::Error::other(refused));
        }
        self.update();
        Ok(())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.place = None;
        self.update();
    }
}

/// Accepts connections from `listener`, as many as `bounds` allow; more are closed at once. A handshake that fails or
/// takes longer than ten seconds costs nothing but its place.
pub fn incoming(
    listener: TcpListener,
    config: Arc<ServerConfig>,
    bounds: Bounds,
    metrics: AcceptMetrics,
) -> ReceiverStream<io::Result<Connection>> {
    let (sender, receiver) = mpsc::channel(64);
    tokio::spawn(async move {
        let acceptor = TlsAcceptor::from(config);
        let census = Census::new(bounds);
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = sender.closed() => return,
            };
            let (stream, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of file descriptors, most often: waiting lets some close.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let place = match census.admit(address.ip()) {
                Ok(place) => Counted::new(place, &census, &metrics),
                Err(refused) => {
                    metrics.refused.inc();
                    tracing::debug!(%address, reason = %refused, "connection closed");
                    continue;
                }
            };
            let (acceptor, sender) = (acceptor.clone(), sender.clone());
            tokio::spawn(async move {
                let failed = place.metrics.failed.clone();
                match handshake(&acceptor, stream, address, place).await {
                    Ok(connection) => drop(sender.send(Ok(connection)).await),
                    Err(error) => {
                        failed.inc();
                        tracing::debug!(%address, %error, "TLS handshake failed");
                    }
                }
            });
        }
    });
    ReceiverStream::new(receiver)
}

async fn handshake(
    acceptor: &TlsAcceptor,
    stream: TcpStream,
    address: SocketAddr,
    mut place: Counted,
) -> io::Result<Connection> {
    stream.set_nodelay(true)?;
    let stream = tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await??;
    let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let (identity, then) = match certificate {
        None => (None, None),
        Some(certificate) => {
            let identity = certificate_identity(certificate).map_err(io::Error::other)?;
            place.identify(&identity)?;
            (Some(identity), Some(time_left(certificate)?))
        }
    };
    let end = Box::pin(tokio::time::sleep(then.map_or(STRANGER_AGE, |left| left.min(STRANGER_AGE))));
    Ok(Connection { stream, caller: Caller { address, identity }, end, then, _place: place })
}

/// How long `certificate` is still valid.
fn time_left(certificate: &CertificateDer<'_>) -> io::Result<Duration> {
    let (_, to) = certificate_validity(certificate).map_err(io::Error::other)?;
    Ok(to.saturating_duration_since(Timestamp::now()))
}

impl Connection {
    /// Fails once the connection has come to its end. Asked on all ways, so that a client that does not read, or does
    /// not write, cannot stay.
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.end.as_mut().poll(cx) {
            Poll::Pending => Ok(()),
            Poll::Ready(()) => Err(io::Error::new(io::ErrorKind::TimedOut, "the connection's time is over")),
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(cx)?;
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        if buf.filled().len() > before
            && let Some(left) = self.then.take()
        {
            self.end = Box::pin(tokio::time::sleep(left));
            self.check(cx)?;
        }
        polled
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
