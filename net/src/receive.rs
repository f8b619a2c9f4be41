//! Receiving many messages with one system call into a buffer that is made once. A message is one datagram, or with
//! `UDP_GRO` up to 64 KiB of datagrams from one source, back to back and all but the last of equal length.

use std::{io, net::SocketAddr, ops::Range};

use super::{Family, UdpSockets, abi, sys};

/// Octets of the largest message.
const SLOT: usize = 65_536;
/// From one slot to the next. At a distance of a power of two, the beginnings of all slots would compete for the same
/// few lines of the processor's caches.
const STRIDE: usize = SLOT + 1_664;
/// Messages asked for at a time, at least and at most.
const MESSAGES_MIN: usize = 8;
const MESSAGES_MAX: usize = sys::MESSAGES;
/// Octets that a system call should bring at most, so that they are still in the processor's cache when they are
/// opened. Full messages come eight at a time, lone datagrams 64.
const OCTETS: usize = MESSAGES_MIN * SLOT;

/// The two bits of a TOS or traffic class octet that are the ECN field (RFC 3168).
const ECN_MASK: u8 = 0b11;

/// A received message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Who sent it.
    pub source: SocketAddr,
    /// The ECN field of its IP header: 0 to 3.
    pub ecn: u8,
    /// Octets of each datagram but the last, which is not longer. At least 1.
    pub datagram_len: usize,
    /// Where it is in the buffer's octets.
    pub range: Range<usize>,
}

impl Message {
    /// How many datagrams it is.
    pub fn count(&self) -> usize {
        self.range.len().div_ceil(self.datagram_len.max(1))
    }

    /// Where its datagrams are in the buffer's octets, in the order in which they were sent. None for an empty one.
    pub fn datagrams(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let end = self.range.end;
        let len = self.datagram_len.max(1);
        self.range.clone().step_by(len).map(move |start| start..end.min(start.saturating_add(len)))
    }
}

/// Room for received messages, to be used again and again.
pub struct ReceiveBuffer {
    slot: usize,
    stride: usize,
    octets: Vec<u8>,
    inbound: Vec<sys::Inbound>,
    messages: Vec<Message>,
    /// How many messages the next call asks for.
    wanted: usize,
    lost: u64,
}

impl Default for ReceiveBuffer {
    fn default() -> Self {
        Self::new()
    }
}

impl ReceiveBuffer {
    /// Takes 4 MiB of addresses, of which the kernel gives memory for what messages have touched.
    pub fn new() -> Self {
        Self::with_slots(SLOT, STRIDE)
    }

    fn with_slots(slot: usize, stride: usize) -> Self {
        Self {
            slot,
            stride,
            octets: vec![0; MESSAGES_MAX * stride],
            inbound: vec![sys::Inbound::EMPTY; MESSAGES_MAX],
            messages: Vec::with_capacity(MESSAGES_MAX),
            wanted: MESSAGES_MIN,
            lost: 0,
        }
    }

    /// What the last [`UdpSockets::recv_into`] brought, in the order in which it came.
    pub fn messages(&self) -> impl ExactSizeIterator<Item = Message> {
        self.messages.iter().cloned()
    }

    /// The octets that [`Message::range`] refers to.
    pub fn octets(&self) -> &[u8] {
        &self.octets
    }

    /// The octets that [`Message::range`] refers to, to open datagrams in place.
    pub fn octets_mut(&mut self) -> &mut [u8] {
        &mut self.octets
    }

    /// The messages, and the octets that they refer to.
    pub fn parts_mut(&mut self) -> (&[Message], &mut [u8]) {
        (&self.messages, &mut self.octets)
    }

    /// Messages that the last [`UdpSockets::recv_into`] has lost, because they did not fit or have no source.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Takes over what was received into the first `count` slots.
    fn take(&mut self, count: usize) {
        let mut octets = 0;
        for (number, inbound) in self.inbound.iter().take(count).enumerate() {
            octets += inbound.len;
            let Some(source) = inbound.address.read().filter(|_| !inbound.is_truncated) else {
                self.lost += 1;
                continue;
            };
            let start = number * self.stride;
            let range = start..start + inbound.len.min(self.slot);
            let (mut ecn, mut datagram_len) = (0, range.len());
            for (level, kind, data) in inbound.control.iter() {
                let Some(number) = abi::number(data) else { continue };
                match (level, kind) {
                    (libc::SOL_UDP, libc::UDP_GRO) if number > 0 => {
                        datagram_len = datagram_len.min(number as usize);
                    }
                    (libc::IPPROTO_IP, libc::IP_TOS) | (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                        ecn = number as u8 & ECN_MASK;
                    }
                    _ => {}
                }
            }
            self.messages.push(Message { source, ecn, datagram_len: datagram_len.max(1), range });
        }
        // Fewer at once if they are large, and more, step by step, if they are small. To ask for many where few come takes
        // time, too: that ends as slowly.
        let fitting = OCTETS.checked_div(octets / count.max(1)).unwrap_or(MESSAGES_MAX);
        let next = if count < self.wanted { self.wanted - self.wanted / 8 } else { self.wanted * 2 };
        self.wanted = fitting.min(next).clamp(MESSAGES_MIN, MESSAGES_MAX);
    }
}

impl UdpSockets {
    /// Replaces the contents of `buffer` by messages that wait at the socket of `family`, and returns how many there
    /// are: 0 if none waits, the host has no such socket, or all were lost. One system call.
    pub fn recv_into(&self, family: Family, buffer: &mut ReceiveBuffer) -> io::Result<usize> {
        buffer.messages.clear();
        buffer.lost = 0;
        let Some(socket) = self.fd(family) else { return Ok(0) };
        let slots = buffer.octets.chunks_exact_mut(buffer.stride).filter_map(|s| s.get_mut(..buffer.slot));
        match sys::receive(socket, slots.take(buffer.wanted), &mut buffer.inbound) {
            Ok(count) => {
                buffer.take(count);
                Ok(buffer.messages.len())
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(e) => Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr, UdpSocket};

    use super::*;

    fn sockets() -> UdpSockets {
        UdpSockets::bind(0).unwrap()
    }

    fn contents(buffer: &ReceiveBuffer) -> Vec<Vec<u8>> {
        let datagrams = buffer.messages().flat_map(|message| message.datagrams().collect::<Vec<_>>());
        datagrams.map(|range| buffer.octets()[range].to_vec()).collect()
    }

    #[test]
    fn messages_come_in_order_with_their_sources() {
        let b = sockets();
        let families = [(Family::V4, Ipv4Addr::LOCALHOST.into()), (Family::V6, Ipv6Addr::LOCALHOST.into())];
        for (family, ip) in families {
            if b.fd(family).is_none() {
                continue;
            }
            let target = SocketAddr::new(ip, b.port());
            let senders = [(); 2].map(|()| UdpSocket::bind(SocketAddr::new(ip, 0)).unwrap());
            for (octet, sender) in (0..5).zip(senders.iter().cycle()) {
                sender.send_to(&[octet; 3], target).unwrap();
            }
            let mut buffer = ReceiveBuffer::new();
            assert_eq!(b.recv_into(family, &mut buffer).unwrap(), 5);
            assert_eq!(contents(&buffer), (0..5).map(|octet| vec![octet; 3]).collect::<Vec<_>>());
            let expected = senders.iter().map(|s| s.local_addr().unwrap()).cycle().take(5);
            assert!(buffer.messages().map(|message| message.source).eq(expected));
            assert!(buffer.messages().all(|message| message.ecn == 0 && message.datagram_len == 3));
            assert_eq!(b.recv_into(family, &mut buffer).unwrap(), 0, "nothing is left");
            assert_eq!((buffer.messages().len(), buffer.lost()), (0, 0));
        }
    }

    #[test]
    fn what_does_not_fit_is_lost_and_the_rest_is_not() {
        let (a, b) = (UdpSocket::bind("127.0.0.1:0").unwrap(), sockets());
        for len in [100, 101, 60_000, 0, 7] {
            a.send_to(&vec![1; len], (Ipv4Addr::LOCALHOST, b.port())).unwrap();
        }
        let mut buffer = ReceiveBuffer::with_slots(100, 128);
        assert_eq!(b.recv_into(Family::V4, &mut buffer).unwrap(), 3);
        assert_eq!(buffer.lost(), 2);
        let lens: Vec<_> = buffer.messages().map(|message| message.range.len()).collect();
        assert_eq!(lens, [100, 0, 7]);
        assert_eq!(contents(&buffer), [vec![1; 100], vec![1; 7]]);
    }

    #[test]
    fn asks_for_many_small_messages_and_few_large_ones() {
        let (a, b) = (UdpSocket::bind("127.0.0.1:0").unwrap(), sockets());
        let mut buffer = ReceiveBuffer::new();
        let mut counts = |len: usize, number: usize| -> Vec<usize> {
            for _ in 0..number {
                a.send_to(&vec![1; len], (Ipv4Addr::LOCALHOST, b.port())).unwrap();
            }
            std::iter::from_fn(|| Some(b.recv_into(Family::V4, &mut buffer).unwrap()))
                .take_while(|count| *count > 0)
                .collect()
        };
        assert_eq!(counts(1_400, 200), [8, 16, 32, 64, 64, 16]);
        let large = counts(65_000, 80);
        assert!(large[1..].iter().all(|count| *count <= 8) && large.iter().sum::<usize>() == 80, "{large:?}");
    }

    #[test]
    fn a_message_is_cut_into_its_datagrams() {
        let message = |range: Range<usize>, datagram_len| Message {
            source: "192.0.2.1:1".parse().unwrap(),
            ecn: 0,
            datagram_len,
            range,
        };
        let cut = |range, datagram_len| {
            let message = message(range, datagram_len);
            let datagrams: Vec<_> = message.datagrams().collect();
            assert_eq!(message.count(), datagrams.len());
            datagrams
        };
        assert_eq!(cut(10..35, 10), [10..20, 20..30, 30..35]);
        assert_eq!(cut(10..30, 10), [10..20, 20..30]);
        assert!(cut(10..15, 10).into_iter().eq(std::iter::once(10..15)));
        assert!(cut(10..10, 1).is_empty());
    }
}
