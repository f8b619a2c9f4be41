//! gRPC over Muster's TLS: accepted connections that know who is calling, and channels to registrars.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use rustls::{ClientConfig, ServerConfig, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
};
use tokio_rustls::{TlsAcceptor, TlsConnector, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint, server::Connected};

use crate::{identity::SpiffeId, tls::certificate_identity};

/// How long a client may take over its TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a registrar may take to accept a connection, TLS handshake included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How often an idle connection is checked, and how long the check may take.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(20), Duration::from_secs(20));

/// Who is at the other end; tonic hands it to services as a request extension.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Where the connection comes from.
    pub address: SocketAddr,
    /// From the verified client certificate; `None` for a stranger.
    pub identity: Option<SpiffeId>,
}

/// An accepted connection, for tonic's `serve_with_incoming_shutdown`.
#[derive(Debug)]
pub struct Connection {
    stream: TlsStream<TcpStream>,
    caller: Caller,
    _slot: OwnedSemaphorePermit,
}

/// Accepts connections from `listener`. At most `limit` are open at a time, handshakes included; more wait in
/// the listen queue. A handshake that fails or takes longer than ten seconds costs nothing but its slot.
pub fn incoming(
    listener: TcpListener,
    config: Arc<ServerConfig>,
    limit: usize,
) -> ReceiverStream<io::Result<Connection>> {
    let (sender, receiver) = mpsc::channel(64);
    tokio::spawn(async move {
        let acceptor = TlsAcceptor::from(config);
        let slots = Arc::new(Semaphore::new(limit));
        loop {
            let slot = tokio::select! {
                slot = Arc::clone(&slots).acquire_owned() => slot,
                () = sender.closed() => return,
            };
            let Ok(slot) = slot else { return };
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = sender.closed() => return,
            };
            match accepted {
                Ok((stream, address)) => {
                    let (acceptor, sender) = (acceptor.clone(), sender.clone());
                    tokio::spawn(async move {
                        match handshake(&acceptor, stream, address, slot).await {
                            Ok(connection) => drop(sender.send(Ok(connection)).await),
                            Err(error) => tracing::debug!(%address, %error, "TLS handshake failed"),
                        }
                    });
                }
                Err(error) => {
                    // Out of file descriptors, most often: waiting lets some close.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    });
    ReceiverStream::new(receiver)
}

async fn handshake(
    acceptor: &TlsAcceptor,
    stream: TcpStream,
    address: SocketAddr,
    slot: OwnedSemaphorePermit,
) -> io::Result<Connection> {
    stream.set_nodelay(true)?;
    let stream = tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await??;
    let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let identity = certificate.map(certificate_identity).transpose().map_err(io::Error::other)?;
    Ok(Connection { stream, caller: Caller { address, identity }, _slot: slot })
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
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Why a registrar's address cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// Not `HOST:PORT`.
    #[error("{0:?} is not an address: write HOST:PORT, such as registrar.example:7500 or [2001:db8::1]:7500")]
    Address(String),
    /// The connection failed.
    #[error("cannot connect to {address}: {reason}")]
    Connect {
        /// As it was given.
        address: String,
        /// The whole chain of causes.
        reason: String,
    },
}

/// Connects to `address` (`HOST:PORT`) with `config` (see [`crate::tls`]). The channel reconnects by itself.
pub async fn connect(address: &str, config: Arc<ClientConfig>) -> Result<Channel, ChannelError> {
    let (endpoint, connector) = prepare(address, config)?;
    endpoint
        .connect_with_connector(connector)
        .await
        .map_err(|error| ChannelError::Connect { address: address.to_owned(), reason: chain(&error) })
}

/// As [`connect`], but the connection is made when the first call needs it.
pub fn connect_lazy(address: &str, config: Arc<ClientConfig>) -> Result<Channel, ChannelError> {
    let (endpoint, connector) = prepare(address, config)?;
    Ok(endpoint.connect_with_connector_lazy(connector))
}

/// An error with all its causes, each once: tonic's errors name little themselves.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

type Dialled = hyper_util::rt::TokioIo<tokio_rustls::client::TlsStream<TcpStream>>;
type Dialling = Pin<Box<dyn Future<Output = io::Result<Dialled>> + Send>>;

fn prepare(
    address: &str,
    config: Arc<ClientConfig>,
) -> Result<
    (
        Endpoint,
        impl tower::Service<http::Uri, Response = Dialled, Error = io::Error, Future = Dialling> + Send + use<>,
    ),
    ChannelError,
> {
    let bad = || ChannelError::Address(address.chars().take(300).collect());
    let (host, port) = address.rsplit_once(':').ok_or_else(bad)?;
    if host.is_empty() || port.parse::<u16>().is_err() {
        return Err(bad());
    }
    // Not https: as soon as anything in the build turns tonic's own TLS on, tonic refuses that scheme to a connector
    // which has made the TLS connection itself.
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|_| bad())?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE.0)
        .keep_alive_timeout(KEEPALIVE.1)
        .keep_alive_while_idle(true);
    let target = address.to_owned();
    let tls = TlsConnector::from(config);
    let connector = tower::service_fn(move |_: http::Uri| -> Dialling {
        let (target, tls) = (target.clone(), tls.clone());
        Box::pin(async move {
            let stream = TcpStream::connect(&target).await?;
            stream.set_nodelay(true)?;
            // Registrars are known by their identity; the name only has to be there.
            let name = ServerName::IpAddress(stream.peer_addr()?.ip().into());
            let stream =
                tls.connect(name, stream).await.map_err(|e| io::Error::other(crate::tls::explain(&e)))?;
            Ok(hyper_util::rt::TokioIo::new(stream))
        })
    });
    Ok((endpoint, connector))
}
