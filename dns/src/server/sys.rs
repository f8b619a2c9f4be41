//! The system calls that no safe library offers: recvmmsg(2) and sendmmsg(2), many datagrams at a time, each
//! answered from the address it came to.
#![expect(unsafe_code, reason = "recvmmsg(2) and sendmmsg(2) have no safe wrapper")]

use std::{
    io,
    mem::size_of,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsRawFd, BorrowedFd},
    ptr,
};

/// Datagrams that one system call receives or sends.
pub(super) const BATCH: usize = 64;
/// What of a datagram is looked at: no query is longer.
const QUERY_ROOM: usize = 4096;
/// Room for a socket address of either family.
const NAME_ROOM: usize = size_of::<libc::sockaddr_in6>();
/// Room for the one control message that is asked for.
const CONTROL_ROOM: usize = 64;
/// Octets of a control message before its data.
const CONTROL_HEADER: usize = size_of::<libc::cmsghdr>();
/// How long to wait for room to send, in milliseconds; what then does not fit is dropped.
const SEND_WAIT: i32 = 100;

/// Where a datagram came from, and where to, as the kernel tells it and takes it back.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub(super) struct Peer {
    control: [u8; CONTROL_ROOM],
    name: [u8; NAME_ROOM],
    name_length: u8,
    control_length: u8,
}

/// What the kernel writes one datagram into.
#[derive(Clone)]
struct Slot {
    peer: Peer,
    octets: [u8; QUERY_ROOM],
    length: usize,
}

/// Buffers for so many queries and their responses.
pub(super) struct Batch {
    slots: Vec<Slot>,
    responses: Vec<Vec<u8>>,
    vectors: Vec<libc::iovec>,
    headers: Vec<libc::mmsghdr>,
    received: usize,
    /// Whether the kernel tells where a datagram came to.
    destinations: bool,
}

impl Batch {
    /// `destinations` says whether [`want_destinations`] has been called on the socket.
    pub(super) fn new(destinations: bool) -> Self {
        let peer =
            Peer { control: [0; CONTROL_ROOM], name: [0; NAME_ROOM], name_length: 0, control_length: 0 };
        Self {
            slots: vec![Slot { peer, octets: [0; QUERY_ROOM], length: 0 }; BATCH],
            responses: vec![Vec::new(); BATCH],
            vectors: Vec::with_capacity(BATCH),
            headers: Vec::with_capacity(BATCH),
            received: 0,
            destinations,
        }
    }

    /// Waits for a datagram, and takes those that are there.
    pub(super) fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        self.received = 0;
        self.vectors.clear();
        self.headers.clear();
        for slot in &mut self.slots {
            let octets = slot.octets.as_mut_ptr().cast();
            self.vectors.push(libc::iovec { iov_base: octets, iov_len: QUERY_ROOM });
        }
        let control_length = if self.destinations { CONTROL_ROOM } else { 0 };
        for (slot, vector) in self.slots.iter_mut().zip(&mut self.vectors) {
            let (name, control) = (slot.peer.name.as_mut_ptr(), slot.peer.control.as_mut_ptr());
            self.headers.push(header(name.cast(), NAME_ROOM, vector, control.cast(), control_length));
        }
        // SAFETY: each header points to a vector, a name and control room of the lengths it says, in slots that
        // are borrowed mutably here and do not move.
        let received = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                BATCH as libc::c_uint,
                libc::MSG_WAITFORONE as _,
                ptr::null_mut(),
            )
        };
        self.received = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
        for (slot, header) in self.slots.iter_mut().zip(&self.headers).take(self.received) {
            slot.length = (header.msg_len as usize).min(QUERY_ROOM);
            slot.peer.name_length = (header.msg_hdr.msg_namelen as usize).min(NAME_ROOM) as u8;
            slot.peer.control_length = header.msg_hdr.msg_controllen.min(CONTROL_ROOM as _) as u8;
            slot.peer.answerable();
        }
        Ok(self.received)
    }

    /// The datagrams received.
    pub(super) fn queries(&self) -> impl Iterator<Item = &[u8]> {
        self.slots.iter().take(self.received).filter_map(|slot| slot.octets.get(..slot.length))
    }

    /// A datagram received, where it came from, and room for its response: if that is left empty, nothing is sent.
    pub(super) fn query(&mut self, index: usize) -> Option<(&Peer, &[u8], &mut Vec<u8>)> {
        let slot = self.slots.get_mut(index).filter(|_| index < self.received)?;
        Some((&slot.peer, slot.octets.get(..slot.length)?, self.responses.get_mut(index)?))
    }

    /// Sends all responses. One that cannot be sent does not keep back the others; tells how many those are.
    pub(super) fn send(&mut self, socket: BorrowedFd<'_>) -> usize {
        self.vectors.clear();
        self.headers.clear();
        for response in self.responses.iter_mut().take(self.received) {
            self.vectors
                .push(libc::iovec { iov_base: response.as_mut_ptr().cast(), iov_len: response.len() });
        }
        for (slot, vector) in self.slots.iter_mut().zip(&mut self.vectors) {
            if vector.iov_len > 0 {
                let peer = &mut slot.peer;
                let (name, control) = (peer.name.as_mut_ptr(), peer.control.as_mut_ptr());
                let lengths = (usize::from(peer.name_length), usize::from(peer.control_length));
                self.headers.push(header(name.cast(), lengths.0, vector, control.cast(), lengths.1));
            }
        }
        // SAFETY: each header points to a name, control message and vector of the lengths it says, in slots and
        // responses that are borrowed mutably until the end of this function.
        let failed = unsafe { send_all(socket, &mut self.headers) };
        self.received = 0;
        failed
    }
}

impl Peer {
    /// The peer's address, IPv4 as IPv4; `None` if it has none, as when the socket is shut down.
    pub(super) fn address(&self) -> Option<SocketAddr> {
        let family = libc::sa_family_t::from_ne_bytes(*self.name.first_chunk()?);
        let port = u16::from_be_bytes(*self.name.get(2..)?.first_chunk()?);
        let ip = match (i32::from(family), usize::from(self.name_length)) {
            (libc::AF_INET, length) if length >= size_of::<libc::sockaddr_in>() => {
                IpAddr::V4(Ipv4Addr::from(*self.name.get(4..)?.first_chunk::<4>()?))
            }
            (libc::AF_INET6, NAME_ROOM) => {
                Ipv6Addr::from(*self.name.get(8..)?.first_chunk::<16>()?).to_canonical()
            }
            _ => return None,
        };
        Some(SocketAddr::new(ip, port))
    }

    /// Makes the control message received one that sends from the address the datagram came to, over whichever
    /// interface leads to the peer. From a multicast or broadcast address nothing can be sent.
    fn answerable(&mut self) {
        if self.control_length == 0 {
            return;
        }
        let kind = |at: usize| Some(i32::from_ne_bytes(*self.control.get(at..)?.first_chunk()?));
        let kind = (kind(CONTROL_HEADER - 8), kind(CONTROL_HEADER - 4));
        let Some(data) = self.control.get_mut(CONTROL_HEADER..) else { return };
        let interface = match kind {
            // struct in_pktinfo: interface, then the local address to answer from.
            (Some(libc::IPPROTO_IP), Some(libc::IP_PKTINFO)) => data.get_mut(..4),
            // struct in6_pktinfo: the address, then the interface.
            (Some(libc::IPPROTO_IPV6), Some(libc::IPV6_PKTINFO)) => {
                let Some(ip) = data.first_chunk::<16>() else { return };
                match Ipv6Addr::from(*ip).to_canonical() {
                    ip if ip.is_multicast() || ip == IpAddr::V4(Ipv4Addr::BROADCAST) => None,
                    _ => data.get_mut(16..20),
                }
            }
            _ => None,
        };
        match interface {
            Some(interface) => interface.fill(0),
            None => self.control_length = 0,
        }
    }
}

fn header(
    name: *mut libc::c_void,
    name_length: usize,
    vector: *mut libc::iovec,
    control: *mut libc::c_void,
    control_length: usize,
) -> libc::mmsghdr {
    // SAFETY: `mmsghdr` is plain data, for which all zeroes is a valid value.
    let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
    header.msg_hdr.msg_name = name;
    header.msg_hdr.msg_namelen = name_length as libc::socklen_t;
    header.msg_hdr.msg_iov = vector;
    header.msg_hdr.msg_iovlen = 1;
    if control_length > 0 {
        header.msg_hdr.msg_control = control;
        header.msg_hdr.msg_controllen = control_length as _;
    }
    header
}

/// Sends `headers`; tells how many could not be.
///
/// # Safety
/// All that the headers point to lives and is not written to during the call.
unsafe fn send_all(socket: BorrowedFd<'_>, mut headers: &mut [libc::mmsghdr]) -> usize {
    let mut failed = 0;
    while !headers.is_empty() {
        // SAFETY: the caller's promise; the length is the slice's, at most `BATCH`.
        let sent = unsafe {
            let count = headers.len() as libc::c_uint;
            libc::sendmmsg(socket.as_raw_fd(), headers.as_mut_ptr(), count, libc::MSG_DONTWAIT as _)
        };
        let done = match usize::try_from(sent) {
            // An error is that of the first message. Nothing sent is not to be expected, and no reason to spin.
            Ok(sent) => sent.max(1),
            Err(_) => match io::Error::last_os_error().kind() {
                io::ErrorKind::Interrupted => 0,
                io::ErrorKind::WouldBlock if writable(socket) => 0,
                io::ErrorKind::WouldBlock => return failed + headers.len(),
                _ => {
                    failed += 1;
                    1
                }
            },
        };
        headers = headers.get_mut(done..).unwrap_or_default();
    }
    failed
}

/// Waits until there is room to send, but not for long.
fn writable(socket: BorrowedFd<'_>) -> bool {
    let mut poll = libc::pollfd { fd: socket.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: `poll` is one `pollfd`, and lives.
    unsafe { libc::poll(&raw mut poll, 1, SEND_WAIT) > 0 }
}

/// Sends one response without waiting.
pub(super) fn send(socket: BorrowedFd<'_>, peer: &Peer, response: &[u8]) -> io::Result<()> {
    let mut vector = libc::iovec { iov_base: response.as_ptr().cast_mut().cast(), iov_len: response.len() };
    let (name, control) = (peer.name.as_ptr().cast_mut().cast(), peer.control.as_ptr().cast_mut().cast());
    let lengths = (usize::from(peer.name_length), usize::from(peer.control_length));
    let header = header(name, lengths.0, &raw mut vector, control, lengths.1);
    // SAFETY: the header points to a name, a control message and a vector of the lengths it says; sendmsg(2) only
    // reads them.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const header.msg_hdr, libc::MSG_DONTWAIT) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Has the kernel tell with each datagram to which address it came. On a socket for both families, that of an IPv4
/// datagram comes and goes as a mapped IPv6 address.
pub(super) fn want_destinations(socket: BorrowedFd<'_>, v6: bool) -> io::Result<()> {
    let (level, option) = match v6 {
        true => (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
        false => (libc::IPPROTO_IP, libc::IP_PKTINFO),
    };
    set(socket, level, option, 1)
}

/// Makes room for `octets` of datagrams that wait; for as many as the system allows if we may not exceed that.
pub(super) fn receive_room(socket: BorrowedFd<'_>, octets: i32) -> io::Result<()> {
    set(socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, octets)
        .or_else(|_| set(socket, libc::SOL_SOCKET, libc::SO_RCVBUF, octets))
}

fn set(socket: BorrowedFd<'_>, level: i32, option: i32, value: i32) -> io::Result<()> {
    // SAFETY: these options take one `int`, which `value` is.
    let result = unsafe {
        let value = (&raw const value).cast();
        libc::setsockopt(socket.as_raw_fd(), level, option, value, size_of::<i32>() as libc::socklen_t)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
