//! The socket that nf_tables is spoken to through, and that tells what others do.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, netlink, recvfrom, sendto,
    socket_with, sockopt,
};

use super::{
    attribute::{Message, messages},
    message::Batch,
};

/// Room for answers: one for each message that fails.
const RECEIVE_BUFFER: usize = 4 << 20;
/// For how long an answer is waited for.
const PATIENCE: Duration = Duration::from_secs(10);
/// The longest answer.
const ANSWER: usize = 64 * 1024;

/// Why nf_tables did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum NftablesError {
    /// There is no socket to it.
    #[error("cannot speak to nftables: {0}; the kernel needs nf_tables, and the agent CAP_NET_ADMIN")]
    Socket(#[source] io::Error),
    /// It refused.
    #[error("cannot {what} in nftables table {table:?}: {error}")]
    Refused {
        /// What was to be done.
        what: &'static str,
        /// In which table.
        table: String,
        /// Why not.
        #[source]
        error: io::Error,
    },
}

/// A socket to a subsystem of nfnetlink.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    buffer: Vec<u8>,
    /// Of the last transaction.
    sequence: u32,
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl Socket {
    /// A socket that answers.
    ///
    /// # Errors
    /// If the kernel has none.
    pub fn new() -> Result<Self, NftablesError> {
        Self::open(0, SocketFlags::CLOEXEC)
    }

    /// A socket that tells of every change to any table; it does not block.
    ///
    /// # Errors
    /// If the kernel has none.
    pub fn listening() -> Result<Self, NftablesError> {
        let group = 1 << (libc::NFNLGRP_NFTABLES - 1);
        Self::open(group, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
    }

    fn open(groups: u32, flags: SocketFlags) -> Result<Self, NftablesError> {
        let open = || -> rustix::io::Result<OwnedFd> {
            let fd = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(netlink::NETFILTER))?;
            bind(&fd, &netlink::SocketAddrNetlink::new(0, groups))?;
            // Without privileges over the host it stays as it is, and only small changes go through.
            let _ = sockopt::set_socket_recv_buffer_size_force(&fd, RECEIVE_BUFFER);
            sockopt::set_socket_timeout(&fd, sockopt::Timeout::Recv, Some(PATIENCE))?;
            Ok(fd)
        };
        let fd = open().map_err(|error| NftablesError::Socket(error.into()))?;
        Ok(Self { fd, buffer: vec![0; ANSWER], sequence: 0 })
    }

    /// Carries out a transaction: all of it, or nothing.
    ///
    /// # Errors
    /// If it is refused; `what` says what was to be done.
    pub fn commit(&mut self, what: &'static str, batch: Batch) -> Result<(), NftablesError> {
        let table = batch.table().to_owned();
        self.sequence = self.sequence.wrapping_add(1).max(1);
        let bytes = batch.finish(self.sequence);
        self.transact(&bytes).map_err(|error| NftablesError::Refused { what, table, error })
    }

    fn transact(&mut self, bytes: &[u8]) -> io::Result<()> {
        // A transaction is one datagram, however long.
        let _ = sockopt::set_socket_send_buffer_size_force(&self.fd, bytes.len() + 4096);
        let kernel = netlink::SocketAddrNetlink::new(0, 0);
        sendto(&self.fd, bytes, SendFlags::empty(), &kernel)?;
        let mut failure = None;
        loop {
            let (_, length, _) = recvfrom(&self.fd, &mut self.buffer[..], RecvFlags::TRUNC)?;
            let received = self.buffer.get(..length).unwrap_or_default();
            for message in messages(received).filter(|message| i32::from(message.kind) == libc::NLMSG_ERROR) {
                let code = error(&message);
                if code != 0 {
                    failure.get_or_insert_with(|| io::Error::from_raw_os_error(code));
                }
                if message.sequence == self.sequence || is_of_all(&message) {
                    return failure.map_or(Ok(()), Err);
                }
            }
        }
    }

    /// Hands every message of the answer to `request`, which asks for a list, to `each`.
    ///
    /// # Errors
    /// If the kernel refuses, or the list is cut short.
    pub fn list(&mut self, request: &[u8], mut each: impl FnMut(&Message<'_>)) -> io::Result<()> {
        sendto(&self.fd, request, SendFlags::empty(), &netlink::SocketAddrNetlink::new(0, 0))?;
        loop {
            let (_, length, _) = recvfrom(&self.fd, &mut self.buffer[..], RecvFlags::TRUNC)?;
            for message in messages(self.buffer.get(..length).unwrap_or_default()) {
                match i32::from(message.kind) {
                    libc::NLMSG_DONE => return Ok(()),
                    libc::NLMSG_ERROR => match error(&message) {
                        0 => return Ok(()),
                        // A late answer to a transaction before.
                        _ if message.sequence != 0 => {}
                        code => return Err(io::Error::from_raw_os_error(code)),
                    },
                    _ => each(&message),
                }
            }
        }
    }

    /// Asks for something that is not part of a transaction, and waits until it is done.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn request(&mut self, request: &[u8]) -> io::Result<()> {
        self.list(request, |_| {})
    }

    /// The number by which the kernel tells of what this socket has done.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn port(&self) -> io::Result<u32> {
        let address = rustix::net::getsockname(&self.fd)?;
        Ok(netlink::SocketAddrNetlink::try_from(address)?.pid())
    }

    /// Hands messages that have come to `each`.
    ///
    /// # Errors
    /// `WouldBlock` if there are none, and another kind if some have been lost.
    pub fn receive(&mut self, mut each: impl FnMut(&Message<'_>)) -> io::Result<()> {
        let (_, length, _) = recvfrom(&self.fd, &mut self.buffer[..], RecvFlags::TRUNC)?;
        messages(self.buffer.get(..length).unwrap_or_default()).for_each(|message| each(&message));
        Ok(())
    }
}

/// The number of the error that a message tells; 0 for none.
fn error(message: &Message<'_>) -> i32 {
    message.body.first_chunk().map_or(libc::EBADMSG, |code| -i32::from_ne_bytes(*code))
}

/// Whether an error is of the transaction as a whole: that is told as one of its beginning.
fn is_of_all(message: &Message<'_>) -> bool {
    let kind = message.body.get(8..10).and_then(|kind| kind.first_chunk());
    kind.is_none_or(|kind| i32::from(u16::from_ne_bytes(*kind)) == libc::NFNL_MSG_BATCH_BEGIN)
}
