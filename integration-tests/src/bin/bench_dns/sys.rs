//! Many datagrams a system call, for the client and for the bare echo: recvmmsg(2) and sendmmsg(2).
#![expect(unsafe_code, reason = "recvmmsg(2) and sendmmsg(2) have no safe wrapper")]

use std::{io, net::UdpSocket, os::fd::AsRawFd, ptr};

/// Datagrams that one call takes.
pub(crate) const BATCH: usize = 64;
/// Room for each.
const ROOM: usize = 1500;

/// Buffers for a batch of datagrams.
pub(crate) struct Batch {
    octets: Vec<[u8; ROOM]>,
    names: Vec<libc::sockaddr_in>,
    lengths: [usize; BATCH],
    count: usize,
}

impl Batch {
    pub(crate) fn new() -> Self {
        // SAFETY: `sockaddr_in` is plain data, for which all zeroes is a valid value.
        let name: libc::sockaddr_in = unsafe { std::mem::zeroed() };
        Self { octets: vec![[0; ROOM]; BATCH], names: vec![name; BATCH], lengths: [0; BATCH], count: 0 }
    }

    /// Forgets what is in it.
    pub(crate) fn clear(&mut self) {
        self.count = 0;
    }

    /// Datagrams in it.
    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// Adds a datagram, if there is room.
    pub(crate) fn push(&mut self, datagram: &[u8]) {
        if let (Some(octets), Some(length)) =
            (self.octets.get_mut(self.count), self.lengths.get_mut(self.count))
            && let Some(room) = octets.get_mut(..datagram.len())
        {
            room.copy_from_slice(datagram);
            *length = datagram.len();
            self.count += 1;
        }
    }

    /// Reads what is there, at least one datagram; an error of kind `WouldBlock` after the socket's timeout.
    pub(crate) fn receive(&mut self, socket: &UdpSocket) -> io::Result<()> {
        let mut vectors = self.vectors(|_| ROOM);
        let mut headers = self.headers(&mut vectors, true);
        // SAFETY: every header points to a vector and a name that live until after the call.
        let received = unsafe {
            let (fd, flags) = (socket.as_raw_fd(), libc::MSG_WAITFORONE);
            libc::recvmmsg(fd, headers.as_mut_ptr(), BATCH as u32, flags as _, ptr::null_mut())
        };
        self.count = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
        for (length, header) in self.lengths.iter_mut().zip(&headers) {
            *length = header.msg_len as usize;
        }
        Ok(())
    }

    /// Sends all datagrams; with `back`, to where they came from.
    pub(crate) fn send(&mut self, socket: &UdpSocket, back: bool) -> io::Result<()> {
        let lengths = self.lengths;
        let mut vectors = self.vectors(|i| lengths.get(i).copied().unwrap_or(0));
        let mut headers = self.headers(&mut vectors, back);
        let mut sent = 0;
        while sent < self.count {
            let Some(rest) = headers.get_mut(sent..self.count) else { break };
            // SAFETY: every header points to a vector and a name that live until after the call.
            let result =
                unsafe { libc::sendmmsg(socket.as_raw_fd(), rest.as_mut_ptr(), rest.len() as u32, 0) };
            sent += usize::try_from(result).map_err(|_| io::Error::last_os_error())?;
        }
        Ok(())
    }

    fn vectors(&mut self, length: impl Fn(usize) -> usize) -> Vec<libc::iovec> {
        let all = self.octets.iter_mut().enumerate();
        all.map(|(i, octets)| libc::iovec { iov_base: octets.as_mut_ptr().cast(), iov_len: length(i) })
            .collect()
    }

    fn headers(&mut self, vectors: &mut [libc::iovec], names: bool) -> Vec<libc::mmsghdr> {
        let all = vectors.iter_mut().zip(&mut self.names);
        all.map(|(vector, name)| {
            // SAFETY: `mmsghdr` is plain data, for which all zeroes is a valid value.
            let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
            header.msg_hdr.msg_iov = vector;
            header.msg_hdr.msg_iovlen = 1;
            if names {
                header.msg_hdr.msg_name = ptr::from_mut(name).cast();
                header.msg_hdr.msg_namelen = size_of::<libc::sockaddr_in>() as u32;
            }
            header
        })
        .collect()
    }
}
