//! The socket that nf_tables is spoken to through, and one beside it that hears what others do to a table.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, netlink, recvfrom, sendto,
    socket_with, sockopt,
};

use super::{
    attribute::{Message, messages},
    message::{Batch, is_about},
};

/// Room for answers, one for each message that fails.
const RECEIVE_BUFFER: usize = 4 << 20;
/// Room for what is told of changes. The kernel tells of this socket's own, too, each element of them; nothing of this is
/// taken before it is needed, and all of it is read at once.
const CHANGES_BUFFER: usize = 256 << 20;
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

/// A socket to nfnetlink.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    /// Hears of changes to all tables; it does not block.
    changes: OwnedFd,
    buffer: Vec<u8>,
    /// By which the kernel tells what this socket has done.
    port: u32,
    /// Of the last transaction.
    sequence: u32,
    /// The table of which others are heard.
    table: String,
    /// Whether they have done something to it, or may have.
    disturbed: bool,
}

impl Socket {
    /// A socket that hears what others do to the table called `table`.
    ///
    /// # Errors
    /// If the kernel has none.
    pub fn new(table: &str) -> Result<Self, NftablesError> {
        let open = || -> rustix::io::Result<_> {
            let fd = open(SocketFlags::CLOEXEC, 0, RECEIVE_BUFFER)?;
            sockopt::set_socket_timeout(&fd, sockopt::Timeout::Recv, Some(PATIENCE))?;
            let port = netlink::SocketAddrNetlink::try_from(rustix::net::getsockname(&fd)?)?.pid();
            let group = 1 << (libc::NFNLGRP_NFTABLES - 1);
            Ok((fd, open(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, group, CHANGES_BUFFER)?, port))
        };
        let (fd, changes, port) = open().map_err(|error| NftablesError::Socket(error.into()))?;
        let (buffer, table) = (vec![0; ANSWER], table.to_owned());
        Ok(Self { fd, changes, buffer, port, sequence: 0, table, disturbed: false })
    }

    /// What can be read from when [`Self::is_disturbed`] may have something to say.
    pub fn changes(&self) -> BorrowedFd<'_> {
        self.changes.as_fd()
    }

    /// Whether others have done something to the table since this was last asked.
    ///
    /// # Errors
    /// If the socket fails.
    pub fn is_disturbed(&mut self) -> io::Result<bool> {
        loop {
            let length = match recvfrom(&self.changes, &mut self.buffer[..], RecvFlags::TRUNC) {
                Ok((_, length, _)) => length,
                Err(rustix::io::Errno::AGAIN) => return Ok(std::mem::take(&mut self.disturbed)),
                // More has come than there was room for: what is lost may have been about the table.
                Err(rustix::io::Errno::NOBUFS) => {
                    self.disturbed = true;
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let mut others = messages(self.buffer.get(..length).unwrap_or_default())
                .filter(|message| message.port != self.port);
            self.disturbed |= others.any(|message| is_about(&message, &self.table));
        }
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
        self.send(bytes)?;
        let (mut failure, mut is_over, sequence) = (None, false, self.sequence);
        while !is_over {
            self.receive(|message| {
                if i32::from(message.kind) != libc::NLMSG_ERROR || is_over {
                    return;
                }
                let code = error(message);
                if code != 0 {
                    failure.get_or_insert_with(|| io::Error::from_raw_os_error(code));
                }
                is_over = message.sequence == sequence || is_of_all(message);
            })?;
        }
        failure.map_or(Ok(()), Err)
    }

    /// Hands every message of the answer to `request`, which asks for a list, to `each`.
    ///
    /// # Errors
    /// If the kernel refuses, or the list is cut short.
    pub fn list(&mut self, request: &[u8], mut each: impl FnMut(&Message<'_>)) -> io::Result<()> {
        self.send(request)?;
        let mut outcome = None;
        while outcome.is_none() {
            self.receive(|message| match i32::from(message.kind) {
                _ if outcome.is_some() => {}
                libc::NLMSG_DONE => outcome = Some(Ok(())),
                // Others are late answers to a transaction before.
                libc::NLMSG_ERROR if message.sequence == 0 => {
                    let code = error(message);
                    outcome = Some(if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(code)) });
                }
                libc::NLMSG_ERROR => {}
                _ => each(message),
            })?;
        }
        outcome.unwrap_or(Ok(()))
    }

    /// Asks for something that is not part of a transaction, and waits until it is done.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn request(&mut self, request: &[u8]) -> io::Result<()> {
        self.list(request, |_| {})
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        sendto(&self.fd, bytes, SendFlags::empty(), &netlink::SocketAddrNetlink::new(0, 0))?;
        Ok(())
    }

    /// Hands the messages of one datagram to `each`.
    fn receive(&mut self, mut each: impl FnMut(&Message<'_>)) -> io::Result<()> {
        let (_, length, _) = recvfrom(&self.fd, &mut self.buffer[..], RecvFlags::TRUNC)?;
        messages(self.buffer.get(..length).unwrap_or_default()).for_each(|message| each(&message));
        Ok(())
    }
}

/// A socket to nfnetlink that hears of `groups`.
fn open(flags: SocketFlags, groups: u32, room: usize) -> rustix::io::Result<OwnedFd> {
    let fd = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(netlink::NETFILTER))?;
    bind(&fd, &netlink::SocketAddrNetlink::new(0, groups))?;
    // Without privileges over the host it stays as it is, and only small changes go through.
    let _ = sockopt::set_socket_recv_buffer_size_force(&fd, room);
    Ok(fd)
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
