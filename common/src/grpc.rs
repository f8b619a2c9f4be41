//! gRPC over Muster's TLS: accepted connections that know who is calling, and channels to registrars.

mod accept;

use std::{io, pin::Pin, sync::Arc, time::Duration};

use rustls::{ClientConfig, pki_types::ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};

use crate::proxy;
pub use accept::{AcceptMetrics, Caller, Connection, incoming};

/// How often an idle connection is checked, and how long the check may take.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(20), Duration::from_secs(20));

/// The header of an answer that the registrar's store has not confirmed: for how many seconds it has not.
pub const STALE_HEADER: &str = "muster-stale-seconds";

/// How a connection is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// How long it may take until the TLS handshake is done.
    pub within: Duration,
    /// Octets that the other side may send ahead in each stream, and twice that in all of a connection's.
    pub window: u32,
}

impl Default for Options {
    /// For calls, and streams of small messages.
    fn default() -> Self {
        Self { within: Duration::from_secs(10), window: 2 << 20 }
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

/// Connects to `address` (`HOST:PORT`) with `config` (see [`crate::tls`]), through the proxy that `HTTPS_PROXY` names,
/// if it does. The channel reconnects by itself.
pub async fn connect(address: &str, config: Arc<ClientConfig>) -> Result<Channel, ChannelError> {
    connect_with(address, config, Options::default()).await
}

/// As [`connect`], in another way than the usual.
pub async fn connect_with(
    address: &str,
    config: Arc<ClientConfig>,
    options: Options,
) -> Result<Channel, ChannelError> {
    let (endpoint, connector) = prepare(address, config, options)?;
    endpoint
        .connect_with_connector(connector)
        .await
        .map_err(|error| ChannelError::Connect { address: address.to_owned(), reason: chain(&error) })
}

/// As [`connect`], but the connection is made when the first call needs it.
pub fn connect_lazy(address: &str, config: Arc<ClientConfig>) -> Result<Channel, ChannelError> {
    let (endpoint, connector) = prepare(address, config, Options::default())?;
    Ok(endpoint.connect_with_connector_lazy(connector))
}

impl ChannelError {
    /// What to do about a registrar that cannot be reached, on a line of its own. Other failures say that themselves.
    pub fn remedy(&self) -> &'static str {
        match self {
            // What TLS and proxies find wrong comes with its remedy.
            Self::Connect { reason, .. }
                if !["certificate", "CA hash", "proxy", "HTTPS_PROXY"]
                    .iter()
                    .any(|word| reason.contains(word)) =>
            {
                "\nremedy: check --registrar, that muster-registrar runs there, and that no firewall is between"
            }
            _ => "",
        }
    }
}

/// What a status says, without tonic's own wrapping.
pub fn words(status: &Status) -> String {
    match std::error::Error::source(status) {
        // The connection broke: the cause says more than the message.
        Some(cause) => format!("the connection broke: {}", chain(cause)),
        None if status.message().is_empty() => status.code().to_string(),
        None => status.message().to_owned(),
    }
}

/// Whether a server has decided, so that asking the same again is of no use.
pub const fn is_definite(code: Code) -> bool {
    matches!(
        code,
        Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::ResourceExhausted
            | Code::FailedPrecondition
            | Code::OutOfRange
            | Code::Unimplemented
            | Code::Unauthenticated
    )
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
    options: Options,
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
        .initial_stream_window_size(options.window)
        .initial_connection_window_size(options.window.saturating_mul(2))
        .http2_keep_alive_interval(KEEPALIVE.0)
        .keep_alive_timeout(KEEPALIVE.1)
        .keep_alive_while_idle(true);
    let target = address.to_owned();
    let tls = TlsConnector::from(config);
    let connector = tower::service_fn(move |_: http::Uri| -> Dialling {
        let (target, tls) = (target.clone(), tls.clone());
        Box::pin(async move { dial(&target, &tls, options.within).await })
    });
    Ok((endpoint, connector))
}

async fn dial(target: &str, tls: &TlsConnector, within: Duration) -> io::Result<Dialled> {
    let deadline = tokio::time::Instant::now() + within;
    let stream = proxy::connect(target, within).await?;
    // Servers are known by their identity; the name only has to be there, and is not sent.
    let name = ServerName::IpAddress(stream.peer_addr()?.ip().into());
    match tokio::time::timeout_at(deadline, tls.connect(name, stream)).await {
        Ok(Ok(stream)) => Ok(hyper_util::rt::TokioIo::new(stream)),
        Ok(Err(error)) => Err(io::Error::other(crate::tls::explain(&error))),
        Err(_) => {
            let reason = format!("no TLS handshake within {} s", within.as_secs());
            Err(io::Error::new(io::ErrorKind::TimedOut, reason))
        }
    }
}
