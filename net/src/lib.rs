//! The UDP sockets that carry sealed datagrams: one for IPv4 and one for IPv6 on the same port, or for several threads
//! as many pairs on that port.
//!
//! Datagrams leave with "don't fragment" set, so that nothing in between fragments them, unless they may be; for those
//! larger than their path see [`Discovery`]. Over IPv4, Linux leaves it out in runs (`UDP_SEGMENT`) whatever one asks for.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    num::NonZeroUsize,
    os::fd::{AsFd, BorrowedFd},
    sync::atomic::{AtomicBool, Ordering},
};

use muster_common::net::BindError;
use rustix::net::sockopt::{self, Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery};
use socket2::{Domain, Protocol, Socket, Type};

mod abi;
mod receive;
mod send;
mod sys;

pub use receive::{Message, ReceiveBuffer};
pub use send::{Run, Sent, TooBig};

/// What a socket may hold in each direction, in octets: about 6 ms at 10 Gbit/s. Each of many has as much, since all
/// that one peer sends comes to the same one; what is not used takes no memory.
const BUFFER: usize = 7 << 20;
/// Ports tried when any will do, until one is free in both families.
const ATTEMPTS: usize = 16;
const PURPOSE: &str = "the tunnel";

/// Both sockets, non-blocking.
///
/// They can be looked at from any thread, but only one should send at a time: how its datagrams may be fragmented is set
/// for the socket, not for each datagram.
#[derive(Debug)]
pub struct UdpSockets {
    /// Absent only where no address of the family is asked for.
    v4: Option<FamilySocket>,
    /// Absent also where the host has no IPv6.
    v6: Option<FamilySocket>,
    port: u16,
    forgoes_offloads: bool,
}

#[derive(Debug)]
struct FamilySocket {
    inner: std::net::UdpSocket,
    /// `UDP_SEGMENT` works, as far as is known.
    segments: AtomicBool,
    /// `UDP_GRO` is on.
    coalesces: AtomicBool,
}

/// What the kernel does for the sockets. Each is true only if it holds for both families.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Runs of datagrams are handed over whole (`UDP_SEGMENT`).
    pub segments: bool,
    /// Runs of datagrams come whole (`UDP_GRO`).
    pub coalesces: bool,
}

/// What is done about datagrams larger than a path takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discovery {
    /// The kernel learns each path's MTU from what routers answer, and fragments what is larger itself.
    Want,
    /// The kernel learns, and refuses what is larger.
    Do,
    /// The kernel does not heed what it learns and refuses only what the interface does not take: for probing.
    Probe,
    /// Routers may fragment. Over IPv6, where none does, this is as [`Self::Want`].
    Never,
}

impl UdpSockets {
    /// Binds to `port` on all addresses of both families; 0 takes any port that is free.
    pub fn bind(port: u16) -> Result<Self, BindError> {
        let mut attempts = if port == 0 { ATTEMPTS } else { 1 };
        loop {
            attempts -= 1;
            match Self::bind_once(port) {
                Err((error, io::ErrorKind::AddrInUse)) if attempts == 0 => return Err(error),
                Err((_, io::ErrorKind::AddrInUse)) => {}
                Err((error, _)) => return Err(error),
                Ok(sockets) => return Ok(sockets),
            }
        }
    }

    /// Binds `count` pairs to one port. A hash of addresses and ports decides which gets a datagram, so that all from
    /// one address and port come to the same, in their order, for as long as none is dropped. All must be read from, and
    /// any can send to anyone.
    pub fn bind_many(port: u16, count: NonZeroUsize) -> Result<Vec<Self>, BindError> {
        // The first does not share, so that a port that is taken is an error, also if another agent has taken it.
        Self::bind(port)?.shared_by(count)
    }

    /// Binds `count` pairs as [`Self::bind_many`] does, but to the very `addresses`, at most one of each family: what
    /// is sent has that source address, where a host has several. Both families are meant by `[::]` alone.
    ///
    /// # Errors
    /// An address that cannot be bound, or is the second of its family.
    pub fn bind_at(addresses: &[SocketAddr], count: NonZeroUsize) -> Result<Vec<Self>, BindError> {
        if let [SocketAddr::V6(any)] = addresses
            && any.ip().is_unspecified()
        {
            return Self::bind_many(any.port(), count);
        }
        let mut first = Self { v4: None, v6: None, port: 0, forgoes_offloads: false };
        for &address in addresses {
            let place = match Family::of(address) {
                Family::V4 => &mut first.v4,
                Family::V6 => &mut first.v6,
            };
            let opened = match place {
                None => FamilySocket::open(address, Port::Own),
                Some(_) => Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "it is the second address of its family; name one IPv4 and one IPv6 address at most",
                )),
            };
            let port_of = |socket: &FamilySocket| Ok(socket.inner.local_addr()?.port());
            let (socket, port) = opened
                .and_then(|socket| port_of(&socket).map(|port| (socket, port)))
                .map_err(|e| BindError::new(PURPOSE, address, e))?;
            *place = Some(socket);
            if first.port == 0 {
                first.port = port;
            }
        }
        first.shared_by(count)
    }

    /// As many pairs at the addresses of this one.
    fn shared_by(self, count: NonZeroUsize) -> Result<Vec<Self>, BindError> {
        let port = self.port;
        if count == NonZeroUsize::MIN {
            return Ok(vec![self]);
        }
        for (family, socket) in self.families() {
            // From now on, the port is still refused to whoever does not ask to share it, and to all other users. A
            // program of the same effective user that asked with SO_REUSEPORT would get a part of the datagrams.
            sockopt::set_socket_reuseport(&socket.inner, true)
                .map_err(|e| BindError::new(PURPOSE, family.any(port), e.into()))?;
        }
        let another = |family: Family| {
            let Some(socket) = self.socket(family) else { return Ok(None) };
            let fail = |address| move |e| BindError::new(PURPOSE, address, e);
            let address = socket.inner.local_addr().map_err(fail(family.any(port)))?;
            FamilySocket::open(address, Port::Shared).map(Some).map_err(fail(address))
        };
        let others: Vec<Self> = (1..count.get())
            .map(|_| {
                let (v4, v6) = (another(Family::V4)?, another(Family::V6)?);
                Ok(Self { v4, v6, port, forgoes_offloads: false })
            })
            .collect::<Result<_, BindError>>()?;
        Ok(std::iter::once(self).chain(others).collect())
    }

    fn bind_once(port: u16) -> Result<Self, (BindError, io::ErrorKind)> {
        let fail = |address, source: io::Error| {
            let kind = source.kind();
            (BindError::new(PURPOSE, address, source), kind)
        };
        let address = Family::V4.any(port);
        let v4 = FamilySocket::open(address, Port::Own).map_err(|e| fail(address, e))?;
        let port = v4.inner.local_addr().map_err(|e| fail(address, e))?.port();
        let address = Family::V6.any(port);
        let v6 = match FamilySocket::open(address, Port::Own) {
            Ok(socket) => Some(socket),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)) => None,
            Err(e) => return Err(fail(address, e)),
        };
        Ok(Self { v4: Some(v4), v6, port, forgoes_offloads: false })
    }

    /// The port that both are bound to; the first one's where [`Self::bind_at`] was asked for different ones.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The socket of a family, if the host has it: to wait until it is readable.
    pub fn fd(&self, family: Family) -> Option<BorrowedFd<'_>> {
        self.socket(family).map(FamilySocket::as_fd)
    }

    /// Lets the kernel hand over runs of datagrams as one message, which [`Self::recv_into`] can tell apart. Without
    /// it, or where the kernel cannot, each datagram is a message.
    pub fn coalesce(&self) {
        if self.forgoes_offloads {
            return;
        }
        for socket in self.all() {
            match sys::set_udp_option(socket.as_fd(), libc::UDP_GRO, 1) {
                Ok(()) => socket.coalesces.store(true, Ordering::Relaxed),
                Err(error) => tracing::info!(%error, "UDP datagrams come one by one: no UDP_GRO"),
            }
        }
    }

    /// Has datagrams leave and come one by one, whatever the kernel could do. To be called before [`Self::coalesce`].
    pub fn forgo_offloads(&mut self) {
        self.forgoes_offloads = true;
        for socket in self.all() {
            socket.segments.store(false, Ordering::Relaxed);
        }
    }

    /// What the kernel does for the sockets at present.
    pub fn offloads(&self) -> Offloads {
        Offloads {
            segments: self.all().all(|socket| socket.segments.load(Ordering::Relaxed)),
            coalesces: self.all().all(|socket| socket.coalesces.load(Ordering::Relaxed)),
        }
    }

    /// Sets what becomes of datagrams larger than a path takes. At first it is [`Discovery::Want`].
    pub fn set_path_mtu_discovery(&self, discovery: Discovery) -> io::Result<()> {
        self.families().try_for_each(|(family, socket)| socket.set_path_mtu_discovery(family, discovery))
    }

    /// MTU of the path to `destination` as far as the kernel knows it, with IP and UDP headers, in octets.
    pub fn path_mtu(&self, destination: SocketAddr) -> io::Result<usize> {
        let socket = Socket::new(Domain::for_address(destination), Type::DGRAM, Some(Protocol::UDP))?;
        socket.connect(&destination.into())?;
        let mtu = match Family::of(destination) {
            Family::V4 => sockopt::ip_mtu(&socket)?,
            Family::V6 => sockopt::ipv6_mtu(&socket)?,
        };
        Ok(mtu as usize)
    }

    fn all(&self) -> impl Iterator<Item = &FamilySocket> {
        self.v4.iter().chain(&self.v6)
    }

    fn families(&self) -> impl Iterator<Item = (Family, &FamilySocket)> {
        [Family::V4, Family::V6]
            .into_iter()
            .filter_map(|family| self.socket(family).map(|socket| (family, socket)))
    }

    fn sends_segments(&self, destination: SocketAddr) -> bool {
        self.socket(Family::of(destination)).is_some_and(|socket| socket.segments.load(Ordering::Relaxed))
    }

    fn stop_segmenting(&self, destination: SocketAddr, reason: &io::Error) {
        let family = Family::of(destination);
        if self.socket(family).is_some_and(|socket| socket.segments.swap(false, Ordering::Relaxed)) {
            tracing::info!(?family, %reason, "UDP datagrams leave one by one: segments are refused");
        }
    }

    fn socket(&self, family: Family) -> Option<&FamilySocket> {
        match family {
            Family::V4 => self.v4.as_ref(),
            Family::V6 => self.v6.as_ref(),
        }
    }
}

/// One of the two sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// The one for IPv4.
    V4,
    /// The one for IPv6, which carries no IPv4.
    V6,
}

impl Family {
    fn of(address: SocketAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// All of the host's addresses of this family.
    fn any(self, port: u16) -> SocketAddr {
        match self {
            Self::V4 => (Ipv4Addr::UNSPECIFIED, port).into(),
            Self::V6 => (Ipv6Addr::UNSPECIFIED, port).into(),
        }
    }
}

/// Who else may be bound to the port of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Port {
    /// Nobody.
    Own,
    /// Sockets that share it.
    Shared,
}

impl FamilySocket {
    fn open(address: SocketAddr, port: Port) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.set_nonblocking(true)?;
        // The plain options are capped by net.core.rmem_max and wmem_max; forcing them needs CAP_NET_ADMIN, which the
        // agent has, but tests may not.
        if sockopt::set_socket_recv_buffer_size_force(&socket, BUFFER).is_err() {
            socket.set_recv_buffer_size(BUFFER)?;
        }
        if sockopt::set_socket_send_buffer_size_force(&socket, BUFFER).is_err() {
            socket.set_send_buffer_size(BUFFER)?;
        }
        if address.is_ipv4() {
            sockopt::set_ip_recvtos(&socket, true)?;
        } else {
            sockopt::set_ipv6_recvtclass(&socket, true)?;
        }
        // A kernel that does not know the option would send a run as one large datagram. 0 is what it is anyway.
        let segments = sys::set_udp_option(socket.as_fd(), libc::UDP_SEGMENT, 0);
        if let Err(error) = &segments {
            tracing::info!(%error, "UDP datagrams leave one by one: no UDP_SEGMENT");
        }
        if port == Port::Shared {
            sockopt::set_socket_reuseport(&socket, true)?;
        }
        socket.bind(&address.into())?;
        let this = Self { inner: socket.into(), segments: segments.is_ok().into(), coalesces: false.into() };
        this.set_path_mtu_discovery(Family::of(address), Discovery::Want)?;
        Ok(this)
    }

    fn set_path_mtu_discovery(&self, family: Family, discovery: Discovery) -> io::Result<()> {
        match family {
            Family::V4 => sockopt::set_ip_mtu_discover(
                &self.inner,
                match discovery {
                    Discovery::Want => Ipv4PathMtuDiscovery::WANT,
                    Discovery::Do => Ipv4PathMtuDiscovery::DO,
                    Discovery::Probe => Ipv4PathMtuDiscovery::PROBE,
                    Discovery::Never => Ipv4PathMtuDiscovery::DONT,
                },
            )?,
            Family::V6 => sockopt::set_ipv6_mtu_discover(
                &self.inner,
                match discovery {
                    Discovery::Want => Ipv6PathMtuDiscovery::WANT,
                    Discovery::Do => Ipv6PathMtuDiscovery::DO,
                    Discovery::Probe => Ipv6PathMtuDiscovery::PROBE,
                    Discovery::Never => Ipv6PathMtuDiscovery::DONT,
                },
            )?,
        }
        Ok(())
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

#[cfg(test)]
mod tests;
