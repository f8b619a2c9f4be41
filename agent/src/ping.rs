//! ICMP echo to a virtual address (RFC 792, RFC 4443 section 4): what `muster-agent ping` measures round trips with.
//! Goes through the host's own stack and the TUN device, as every program's packets do.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use muster_common::time::Instant;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::UdpSocket;

/// Octets after the ICMP header; the same number as `ping` sends.
const PAYLOAD: usize = 56;
const HEADER: usize = 8;

/// Why no echo request could be sent.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} to ping {target}: {source}{}", remedy(source))]
pub struct PingError {
    action: &'static str,
    target: IpAddr,
    source: io::Error,
}

fn remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => "; run the agent as root or with CAP_NET_RAW",
        Some(libc::ENETUNREACH) => "; the network's pool is not routed: is the agent's interface up?",
        _ => "",
    }
}

/// What came of one echo request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The target answered after this time.
    Reply(Duration),
    /// Nothing came in time.
    Timeout,
    /// Somebody, mostly the agent itself, says that the target cannot be reached.
    Unreachable,
}

/// Sends echo requests to one address.
#[derive(Debug)]
pub struct Pinger {
    /// An ICMP socket in truth: to send, to receive and to wait are the same system calls.
    socket: UdpSocket,
    target: IpAddr,
    /// Tells this pinger's replies from others', as raw sockets see all of them.
    identifier: u16,
    raw: bool,
}

impl Pinger {
    /// Opens a socket; must be called within a tokio runtime. Raw sockets are preferred, as they hear of unreachable
    /// targets at once; where they are forbidden, the kernel's ping sockets (`net.ipv4.ping_group_range`) do.
    pub fn new(target: IpAddr) -> Result<Self, PingError> {
        let (domain, protocol) = match target {
            IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
            IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
        };
        let (socket, raw) = match Socket::new(domain, Type::RAW, Some(protocol)) {
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                (Socket::new(domain, Type::DGRAM, Some(protocol)), false)
            }
            other => (other, true),
        };
        let socket = socket
            .and_then(|socket| socket.set_nonblocking(true).map(|()| socket))
            .and_then(|socket| UdpSocket::from_std(socket.into()))
            .map_err(|source| PingError { action: "open an ICMP socket", target, source })?;
        Ok(Self { socket, target, identifier: rand::random(), raw })
    }

    /// Sends the echo request `sequence` and waits for what comes of it.
    pub async fn ping(&self, sequence: u16, timeout: Duration) -> Result<Outcome, PingError> {
        let request = request(self.target, self.identifier, sequence);
        let sent = Instant::now();
        match self.socket.send_to(&request, SocketAddr::new(self.target, 0)).await {
            Ok(_) => {}
            Err(e) if e.raw_os_error() == Some(libc::EHOSTUNREACH) => return Ok(Outcome::Unreachable),
            Err(source) => return Err(PingError { action: "send", target: self.target, source }),
        }
        match tokio::time::timeout(timeout, self.receive(sequence)).await {
            Err(_) => Ok(Outcome::Timeout),
            Ok(Err(source)) => Err(PingError { action: "receive", target: self.target, source }),
            Ok(Ok(Heard::Unreachable)) => Ok(Outcome::Unreachable),
            Ok(Ok(Heard::Reply)) => Ok(Outcome::Reply(Instant::now() - sent)),
        }
    }

    async fn receive(&self, sequence: u16) -> io::Result<Heard> {
        let mut buffer = [0; 2048];
        loop {
            let (length, from) = self.socket.recv_from(&mut buffer).await?;
            // The kernel numbers the requests of ping sockets itself, and hands over only their replies.
            let identifier = self.raw.then_some(self.identifier);
            let packet = buffer.get(..length).unwrap_or(&buffer);
            if let Some(heard) = parse(packet, from.ip(), self.target, identifier, sequence) {
                return Ok(heard);
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Heard {
    Reply,
    Unreachable,
}

/// An echo request; the kernel fills in the checksum of ICMPv6, which covers the addresses.
fn request(target: IpAddr, identifier: u16, sequence: u16) -> [u8; HEADER + PAYLOAD] {
    let mut packet = [0; HEADER + PAYLOAD];
    packet[0] = if target.is_ipv4() { ECHO_V4.request } else { ECHO_V6.request };
    packet[4..6].copy_from_slice(&identifier.to_be_bytes());
    packet[6..8].copy_from_slice(&sequence.to_be_bytes());
    for (octet, value) in packet[HEADER..].iter_mut().zip(0..) {
        *octet = value;
    }
    if target.is_ipv4() {
        let checksum = checksum(&packet);
        packet[2..4].copy_from_slice(&checksum.to_be_bytes());
    }
    packet
}

/// ICMP message types of one family.
struct Types {
    request: u8,
    reply: u8,
    unreachable: u8,
}
const ECHO_V4: Types = Types { request: 8, reply: 0, unreachable: 3 };
const ECHO_V6: Types = Types { request: 128, reply: 129, unreachable: 1 };

/// What a received packet says about the request `sequence` to `target`. Raw IPv4 sockets give the IP header, too.
fn parse(
    packet: &[u8],
    from: IpAddr,
    target: IpAddr,
    identifier: Option<u16>,
    sequence: u16,
) -> Option<Heard> {
    let types = if target.is_ipv4() { ECHO_V4 } else { ECHO_V6 };
    let message = if target.is_ipv4() && identifier.is_some() { ipv4_payload(packet)? } else { packet };
    let ours = |echo: &[u8]| {
        let field = |at: usize| echo.get(at..at + 2).map(|b| u16::from_be_bytes([b[0], b[1]]));
        identifier.is_none_or(|id| field(4) == Some(id)) && field(6) == Some(sequence)
    };
    let kind = *message.first()?;
    if kind == types.reply {
        return (from == target && ours(message)).then_some(Heard::Reply);
    }
    if kind == types.unreachable {
        // The start of the packet that could not be delivered.
        let lost = message.get(HEADER..)?;
        let (to, echo) = match target {
            IpAddr::V4(_) => {
                let to: [u8; 4] = lost.get(16..20)?.try_into().ok()?;
                (IpAddr::from(to), ipv4_payload(lost)?)
            }
            IpAddr::V6(_) => {
                let to: [u8; 16] = lost.get(24..40)?.try_into().ok()?;
                (IpAddr::from(to), lost.get(40..)?)
            }
        };
        return (to == target && echo.first() == Some(&types.request) && ours(echo))
            .then_some(Heard::Unreachable);
    }
    None
}

fn ipv4_payload(packet: &[u8]) -> Option<&[u8]> {
    let header = usize::from(packet.first()? & 0x0f) * 4;
    if header < 20 { None } else { packet.get(header..) }
}

/// The Internet checksum (RFC 1071) of a packet with an even number of octets.
fn checksum(packet: &[u8]) -> u16 {
    let sum: u32 = packet.chunks_exact(2).map(|b| u32::from(u16::from_be_bytes([b[0], b[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    !(folded as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    const V4: &str = "100.64.1.2";
    const V6: &str = "fd00::2";

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn ipv4(destination: [u8; 4], payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; 20];
        packet[0] = 0x45;
        packet[16..20].copy_from_slice(&destination);
        packet.extend_from_slice(payload);
        packet
    }

    fn reply_to(request: &[u8], kind: u8) -> Vec<u8> {
        let mut reply = request.to_vec();
        reply[0] = kind;
        reply
    }

    #[test]
    fn a_request_sums_to_zero() {
        let packet = request(ip(V4), 0xbeef, 7);
        assert_eq!(checksum(&packet), 0);
        assert_eq!((packet[0], &packet[4..8]), (8, &[0xbe, 0xef, 0, 7][..]));
        assert_eq!(request(ip(V6), 1, 2)[..4], [128, 0, 0, 0]);
    }

    #[test]
    fn only_the_reply_that_is_waited_for_counts() {
        let v4 = ipv4([10, 0, 0, 1], &reply_to(&request(ip(V4), 5, 7), 0));
        let heard = |packet: &[u8], from, id, seq| parse(packet, ip(from), ip(V4), Some(id), seq);
        assert_eq!(heard(&v4, V4, 5, 7), Some(Heard::Reply));
        assert_eq!(heard(&v4, V4, 6, 7), None, "another program's");
        assert_eq!(heard(&v4, V4, 5, 8), None, "an earlier one");
        assert_eq!(heard(&v4, "100.64.1.3", 5, 7), None, "another host's");
        assert_eq!(parse(&reply_to(&request(ip(V4), 5, 7), 0), ip(V4), ip(V4), None, 7), Some(Heard::Reply));
        let v6 = reply_to(&request(ip(V6), 5, 7), 129);
        assert_eq!(parse(&v6, ip(V6), ip(V6), Some(5), 7), Some(Heard::Reply));
    }

    #[test]
    fn unreachable_is_heard_from_anybody_if_it_quotes_our_request() {
        let lost = ipv4([100, 64, 1, 2], &request(ip(V4), 5, 7));
        let mut message = vec![3, 1, 0, 0, 0, 0, 0, 0];
        message.extend_from_slice(&lost);
        let packet = ipv4([10, 0, 0, 1], &message);
        assert_eq!(parse(&packet, ip("10.0.0.1"), ip(V4), Some(5), 7), Some(Heard::Unreachable));
        assert_eq!(parse(&packet, ip("10.0.0.1"), ip("100.64.1.3"), Some(5), 7), None);

        let mut message = vec![1, 3, 0, 0, 0, 0, 0, 0];
        message.extend_from_slice(&[0x60; 24]);
        message.extend_from_slice(&"fd00::2".parse::<std::net::Ipv6Addr>().expect("an address").octets());
        message.extend_from_slice(&request(ip(V6), 5, 7));
        assert_eq!(parse(&message, ip("fd00::1"), ip(V6), Some(5), 7), Some(Heard::Unreachable));
    }

    #[test]
    fn truncated_packets_say_nothing() {
        let mut message = vec![3, 1, 0, 0, 0, 0, 0, 0];
        message.extend_from_slice(&ipv4([100, 64, 1, 2], &request(ip(V4), 5, 7)));
        let whole = ipv4([10, 0, 0, 1], &message);
        for length in 0..20 + HEADER + 20 + HEADER {
            assert_eq!(parse(&whole[..length], ip(V4), ip(V4), Some(5), 7), None, "{length}");
        }
        assert_eq!(parse(&[], ip(V6), ip(V6), None, 7), None);
        assert_eq!(parse(&[0x40; 64], ip(V4), ip(V4), Some(5), 7), None, "impossible header length");
    }

    proptest::proptest! {
        #[test]
        fn no_packet_is_too_strange(
            packet in proptest::collection::vec(proptest::num::u8::ANY, 0..200),
            v4 in proptest::bool::ANY,
            raw in proptest::bool::ANY,
        ) {
            let target = ip(if v4 { V4 } else { V6 });
            parse(&packet, target, target, raw.then_some(5), 7);
        }
    }
}
