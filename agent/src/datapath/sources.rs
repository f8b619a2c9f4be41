//! What a thread of the data plane waits for, with poll(2): epoll(7) would be told of every datagram that the network has
//! taken from the thread's own socket and of all that comes while it works, which takes longer than to look at five.

use std::os::fd::BorrowedFd;

use rustix::{
    event::{PollFd, PollFlags, poll},
    time::Timespec,
};

/// A source of work, in the order of their turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// Requests of the control side, or the end.
    Wake,
    /// The core's timer.
    Timer,
    /// Packets of the host.
    Tun,
    /// Datagrams over IPv4.
    UdpV4,
    /// Datagrams over IPv6.
    UdpV6,
}

const COUNT: usize = 5;

/// The sources that a thread has, to be looked at.
pub(super) struct Sources<'a> {
    fds: [PollFd<'a>; COUNT],
}

/// Those that have work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Ready(u8);

impl<'a> Sources<'a> {
    /// The others are the thread's or nobody's; `wake` is always there.
    pub(super) fn new(
        wake: BorrowedFd<'a>,
        [timer, tun, udp_v4, udp_v6]: [Option<BorrowedFd<'a>>; COUNT - 1],
    ) -> Self {
        let fds = [Some(wake), timer, tun, udp_v4, udp_v6].map(|fd| match fd {
            Some(fd) => PollFd::from_borrowed_fd(fd, PollFlags::IN),
            // A place where nothing is waited for.
            None => PollFd::from_borrowed_fd(wake, PollFlags::empty()),
        });
        Self { fds }
    }

    /// Which have work now.
    pub(super) fn look(&mut self) -> rustix::io::Result<Ready> {
        self.poll(Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))
    }

    /// Sleeps until one has work.
    pub(super) fn sleep(&mut self) -> rustix::io::Result<Ready> {
        self.poll(None)
    }

    fn poll(&mut self, timeout: Option<&Timespec>) -> rustix::io::Result<Ready> {
        if poll(&mut self.fds, timeout)? == 0 {
            return Ok(Ready::default());
        }
        // Errors count as work: who takes it hears of them.
        let bits = self.fds.iter().rev().fold(0, |bits, fd| bits << 1 | u8::from(!fd.revents().is_empty()));
        Ok(Ready(bits))
    }
}

impl Ready {
    /// Whether none has.
    pub(super) fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether `source` has.
    pub(super) fn has(self, source: Source) -> bool {
        self.0 & 1 << source as u8 != 0
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write as _,
        os::{fd::AsFd as _, unix::net::UnixStream},
    };

    use super::*;

    #[test]
    fn tells_which_are_ready() {
        let pairs: [(UnixStream, UnixStream); 4] = std::array::from_fn(|_| UnixStream::pair().unwrap());
        let [wake, tun, v4, v6] = pairs.each_ref().map(|(near, _)| near.as_fd());
        let mut sources = Sources::new(wake, [None, Some(tun), Some(v4), Some(v6)]);
        assert!(sources.look().unwrap().is_empty());
        (&pairs[1].1).write_all(b"packet").unwrap();
        (&pairs[3].1).write_all(b"datagram").unwrap();
        let ready = sources.sleep().unwrap();
        let all = [Source::Wake, Source::Timer, Source::Tun, Source::UdpV4, Source::UdpV6];
        assert_eq!(all.map(|source| ready.has(source)), [false, false, true, false, true]);
        assert!(!ready.is_empty());
        (&pairs[0].1).write_all(b"wake").unwrap();
        let ready = sources.look().unwrap();
        assert_eq!(all.map(|source| ready.has(source)), [true, false, true, false, true]);
    }
}
