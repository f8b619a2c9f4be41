//! The UDP sockets that carry sealed datagrams: one for IPv4 and one for IPv6, on the same port.
//!
//! Datagrams leave with "don't fragment" set, and the kernel learns the path's MTU from what routers answer; only a
//! datagram that is larger than the path is known to take is fragmented, by this host (`IP_PMTUDISC_WANT`). So nothing in between fragments, and nothing vanishes for good in a path that is
//! narrower than the tunnel's own MTU.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::{AsFd, BorrowedFd},
};

use muster_common::net::BindError;
use rustix::net::sockopt;
use socket2::{Domain, Protocol, Socket, Type};

use crate::datapath::batch::Batch;

mod send;

pub(crate) use send::Sent;

/// What a socket may hold in each direction, in octets: about 20 ms at 1 Gbit/s.
const BUFFER: usize = 4 << 20;
/// Ports tried when any will do, until one is free in both families.
const ATTEMPTS: usize = 16;
const PURPOSE: &str = "the tunnel";

/// Both sockets, non-blocking.
#[derive(Debug)]
pub struct UdpSockets {
    v4: UdpSocket,
    /// Absent where the host has no IPv6.
    v6: Option<UdpSocket>,
    port: u16,
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

    fn bind_once(port: u16) -> Result<Self, (BindError, io::ErrorKind)> {
        let fail = |address, source: io::Error| {
            let kind = source.kind();
            (BindError::new(PURPOSE, address, source), kind)
        };
        let address = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
        let v4 = open(address).map_err(|e| fail(address, e))?;
        let port = v4.local_addr().map_err(|e| fail(address, e))?.port();
        let address = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        let v6 = match open(address) {
            Ok(socket) => Some(socket),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)) => None,
            Err(e) => return Err(fail(address, e)),
        };
        Ok(Self { v4, v6, port })
    }

    /// The port that both are bound to.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The socket of a family, if the host has it: to wait until it is readable.
    pub(crate) fn fd(&self, family: Family) -> Option<BorrowedFd<'_>> {
        self.socket(family).map(AsFd::as_fd)
    }

    /// Replaces the contents of `batch` by datagrams that wait, with their sources.
    pub(crate) fn recv_batch(&self, family: Family, batch: &mut Batch<SocketAddr>) -> io::Result<()> {
        batch.fill(|slot| self.recv(family, slot))
    }

    fn recv(&self, family: Family, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        self.socket(family).ok_or(io::ErrorKind::WouldBlock)?.recv_from(buffer)
    }

    fn socket(&self, family: Family) -> Option<&UdpSocket> {
        match family {
            Family::V4 => Some(&self.v4),
            Family::V6 => self.v6.as_ref(),
        }
    }
}

/// One of the two sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

impl Family {
    fn of(address: SocketAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

fn open(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_nonblocking(true)?;
    // The plain option is capped by net.core.rmem_max; forcing it needs CAP_NET_ADMIN, which the agent has, but tests may not.
    if sockopt::set_socket_recv_buffer_size_force(&socket, BUFFER).is_err() {
        socket.set_recv_buffer_size(BUFFER)?;
    }
    socket.set_send_buffer_size(BUFFER)?;
    if address.is_ipv4() {
        sockopt::set_ip_mtu_discover(&socket, sockopt::Ipv4PathMtuDiscovery::WANT)?;
    } else {
        sockopt::set_ipv6_mtu_discover(&socket, sockopt::Ipv6PathMtuDiscovery::WANT)?;
    }
    socket.bind(&address.into())?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_families_share_the_port_and_a_taken_one_is_an_error() {
        let first = UdpSockets::bind(0).expect("any port");
        assert_ne!(first.port(), 0);
        for socket in [first.socket(Family::V4), first.socket(Family::V6)].into_iter().flatten() {
            assert_eq!(socket.local_addr().expect("bound").port(), first.port());
        }
        let error = UdpSockets::bind(first.port()).expect_err("taken").to_string();
        assert!(error.contains("another program has this port"), "{error}");
    }

    #[test]
    fn datagrams_arrive_with_their_source() {
        let (a, b) = (UdpSockets::bind(0).expect("bind"), UdpSockets::bind(0).expect("bind"));
        a.v4.send_to(b"hello", (Ipv4Addr::LOCALHOST, b.port())).expect("send");
        let mut buffer = [0; 16];
        let (length, from) = b.recv(Family::V4, &mut buffer).expect("loopback delivers at once");
        assert_eq!(&buffer[..length], b"hello");
        assert_eq!(from, (Ipv4Addr::LOCALHOST, a.port()).into());
        assert_eq!(b.recv(Family::V4, &mut buffer).expect_err("empty").kind(), io::ErrorKind::WouldBlock);
    }
}
