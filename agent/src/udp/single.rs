//! Receiving and sending datagram by datagram: what the data plane does as yet.

use std::{
    io::{self, IoSlice},
    net::SocketAddr,
};

use rustix::net::{MMsgHdr, SendAncillaryBuffer, SendFlags, SocketAddrAny, sendmmsg};

use super::{Family, Sent, UdpSockets};
use crate::datapath::batch::Batch;

/// Most datagrams in one system call.
const MESSAGES: usize = 64;

impl UdpSockets {
    /// Replaces the contents of `batch` by datagrams that wait, with their sources.
    pub(crate) fn recv_batch(&self, family: Family, batch: &mut Batch<SocketAddr>) -> io::Result<()> {
        batch.fill(|slot| self.recv(family, slot))
    }

    fn recv(&self, family: Family, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        self.socket(family).ok_or(io::ErrorKind::WouldBlock)?.inner.recv_from(buffer)
    }

    /// Sends `datagrams` in their order. One that cannot be sent is dropped and counted, and the rest goes on.
    pub(crate) fn send_batch<'a>(&self, datagrams: impl Iterator<Item = (SocketAddr, &'a [u8])>) -> Sent {
        let mut sent = Sent::default();
        let mut datagrams = datagrams.peekable();
        while let Some((first, _)) = datagrams.peek() {
            let family = Family::of(*first);
            let mut run = Vec::with_capacity(MESSAGES.min(datagrams.size_hint().0));
            while let Some(datagram) =
                datagrams.next_if(|(to, _)| run.len() < MESSAGES && Family::of(*to) == family)
            {
                run.push(datagram);
            }
            self.send_run(family, &run, &mut sent);
        }
        sent
    }

    /// Sends datagrams of one family.
    fn send_run(&self, family: Family, mut run: &[(SocketAddr, &[u8])], sent: &mut Sent) {
        let Some(socket) = self.fd(family) else {
            sent.failed += run.len() as u64;
            return;
        };
        let addresses: Vec<_> = run.iter().map(|(to, _)| SocketAddrAny::from(*to)).collect();
        let slices: Vec<_> = run.iter().map(|(_, datagram)| [IoSlice::new(datagram)]).collect();
        let mut control: Vec<_> = run.iter().map(|_| SendAncillaryBuffer::default()).collect();
        let mut messages: Vec<_> = addresses
            .iter()
            .zip(&slices)
            .zip(&mut control)
            .map(|((to, slice), control)| MMsgHdr::new_with_addr(to, slice, control))
            .collect();
        let mut messages = messages.as_mut_slice();
        while !run.is_empty() {
            let done = match sendmmsg(socket, messages, SendFlags::DONTWAIT) {
                // Fewer than asked for means that the next one failed; the next call says how.
                Ok(count) => {
                    for (_, datagram) in &run[..count] {
                        sent.datagrams += 1;
                        sent.bytes += datagram.len() as u64;
                    }
                    count
                }
                Err(rustix::io::Errno::INTR) => 0,
                Err(e) => {
                    match io::Error::from(e).kind() {
                        io::ErrorKind::WouldBlock => sent.full += 1,
                        _ => sent.failed += 1,
                    }
                    1
                }
            };
            run = &run[done..];
            messages = &mut messages[done..];
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    #[test]
    fn datagrams_arrive_with_their_source() {
        let (a, b) = (UdpSockets::bind(0).expect("bind"), UdpSockets::bind(0).expect("bind"));
        a.v4.inner.send_to(b"hello", (Ipv4Addr::LOCALHOST, b.port())).expect("send");
        let mut buffer = [0; 16];
        let (length, from) = b.recv(Family::V4, &mut buffer).expect("loopback delivers at once");
        assert_eq!(&buffer[..length], b"hello");
        assert_eq!(from, (Ipv4Addr::LOCALHOST, a.port()).into());
        assert_eq!(b.recv(Family::V4, &mut buffer).expect_err("empty").kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn a_batch_keeps_its_order_and_survives_a_bad_destination() {
        let (a, b) = (UdpSockets::bind(0).expect("bind"), UdpSockets::bind(0).expect("bind"));
        let v4 = SocketAddr::from((Ipv4Addr::LOCALHOST, b.port()));
        // Port 0 cannot be sent to.
        let bad = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let payloads: Vec<_> = (0..150u8).map(|i| vec![i; 1 + usize::from(i)]).collect();
        let batch = payloads.iter().enumerate().flat_map(|(i, p)| {
            let broken = (i % 50 == 7).then_some((bad, &b"lost"[..]));
            broken.into_iter().chain([(v4, p.as_slice())])
        });
        let sent = a.send_batch(batch);
        let bytes = payloads.iter().map(|p| p.len() as u64).sum();
        assert_eq!(sent, Sent { datagrams: 150, bytes, failed: 3, ..Sent::default() });
        let mut buffer = [0; 256];
        for payload in &payloads {
            let (length, from) = b.recv(Family::V4, &mut buffer).expect("arrived");
            assert_eq!((&buffer[..length], from.port()), (payload.as_slice(), a.port()));
        }
    }

    #[test]
    fn both_families_in_one_batch() {
        let (a, b) = (UdpSockets::bind(0).expect("bind"), UdpSockets::bind(0).expect("bind"));
        if b.fd(Family::V6).is_none() {
            return;
        }
        let v4 = SocketAddr::from((Ipv4Addr::LOCALHOST, b.port()));
        let v6 = SocketAddr::from((Ipv6Addr::LOCALHOST, b.port()));
        let batch: [(_, &[u8]); 3] = [(v4, b"one"), (v6, b"two"), (v4, b"three")];
        assert_eq!(a.send_batch(batch.into_iter()).datagrams, 3);
        let mut buffer = [0; 16];
        for (family, payload) in [(Family::V4, &b"one"[..]), (Family::V4, b"three"), (Family::V6, b"two")] {
            let (length, _) = b.recv(family, &mut buffer).expect("arrived");
            assert_eq!(&buffer[..length], payload);
        }
    }
}
