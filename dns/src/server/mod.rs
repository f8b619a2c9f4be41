//! Thin shells that carry queries to a [`Handler`] and its responses back: [`udp`], and [`stream`] for TCP and
//! TLS. Registrar and agent serve with the same ones.

pub mod limit;
pub mod metrics;
pub mod stream;
mod sys;
mod transfer;
pub mod udp;

use std::{
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use futures_util::future::BoxFuture;
use muster_common::{identity::SpiffeId, net::BindError};
use socket2::{Domain, Protocol, Socket, Type};
pub use transfer::{Messages, transfer};
use udp::UdpSockets;

use crate::{
    directory::{Directory, Viewer},
    engine::{Engine, Outcome, QueryContext},
    message::Transport,
};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 1024;

/// Where a query came from.
#[derive(Clone, Debug)]
pub struct Source {
    /// The client's address; IPv4 as IPv4, also on sockets that serve both families.
    pub address: SocketAddr,
    /// How the query came.
    pub transport: Transport,
    /// Who the client is, by its certificate: only over TLS, and only if it has one.
    pub identity: Option<Arc<SpiffeId>>,
}

/// What a handler makes of a query.
pub enum Handling {
    /// The response, if there is any, has been written.
    Done(Outcome),
    /// The response takes time. It is what the future returns; nothing is sent if that is empty.
    Later(BoxFuture<'static, (Outcome, Vec<u8>)>),
    /// The response is several messages, in this order; other responses may go between them. Streams alone send it:
    /// over UDP it is REFUSED.
    Several(Box<dyn Messages>),
}

/// Answers queries. Called where sockets are read, on several threads at a time, so it must not block.
pub trait Handler: Send + Sync + 'static {
    /// Says which queries come next, all together, so that what they need can be fetched. There may be none.
    fn expect<'a>(&self, queries: impl Iterator<Item = &'a [u8]>)
    where
        Self: Sized,
    {
        let _ = queries;
    }

    /// Answers `query`, writing the response over `out`, or says that it takes time.
    fn handle(&self, query: &[u8], source: &Source, out: &mut Vec<u8>) -> Handling;
}

/// Serves an [`Engine`]; `viewer` tells who may see what.
pub struct Authoritative<D, V> {
    engine: Engine<D>,
    viewer: V,
}

impl<D, V> Authoritative<D, V>
where
    D: Directory + 'static,
    V: Fn(&Source) -> Viewer + Send + Sync + 'static,
{
    /// `viewer` is asked at every query, so that what it takes back holds from the next query on.
    pub fn new(engine: Engine<D>, viewer: V) -> Self {
        Self { engine, viewer }
    }
}

impl<D, V> Handler for Authoritative<D, V>
where
    D: Directory + 'static,
    V: Fn(&Source) -> Viewer + Send + Sync + 'static,
{
    fn handle(&self, query: &[u8], source: &Source, out: &mut Vec<u8>) -> Handling {
        let context = QueryContext {
            viewer: (self.viewer)(source),
            transport: source.transport,
            source: Some(source.address.ip()),
        };
        transfer(&self.engine, query, &context)
            .unwrap_or_else(|| Handling::Done(self.engine.answer(query, &context, out)))
    }
}

/// Binds `address` for UDP, once for each processor core. With `early`, the address need not be on the host yet
/// (`IP_FREEBIND`).
pub fn bind_udp(address: SocketAddr, early: bool) -> Result<UdpSockets, BindError> {
    UdpSockets::bind(address, early, std::thread::available_parallelism().map_or(1, usize::from))
}

/// Binds `address` for TCP, in the clear or for TLS. With `early`, the address need not be on the host yet.
pub fn bind_tcp(address: SocketAddr, early: bool) -> Result<tokio::net::TcpListener, BindError> {
    let bind = || {
        let socket = prepare(address, Type::STREAM, Protocol::TCP, early)?;
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        tokio::net::TcpListener::from_std(socket.into())
    };
    bind().map_err(|e| BindError::new("DNS over TCP", address, e))
}

fn prepare(address: SocketAddr, kind: Type, protocol: Protocol, early: bool) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
    socket.set_nonblocking(true)?;
    match address.ip() {
        // [::] serves both families, whatever the system's default is.
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => socket.set_only_v6(false)?,
        IpAddr::V6(_) => socket.set_only_v6(true)?,
        IpAddr::V4(_) => {}
    }
    match address {
        SocketAddr::V4(_) if early => socket.set_freebind_v4(true)?,
        SocketAddr::V6(_) if early => socket.set_freebind_v6(true)?,
        _ => {}
    }
    Ok(socket)
}

/// `address`, an IPv4 address written as IPv6 turned back.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
