//! As much of STUN (RFC 8489) and TURN (RFC 8656) as it takes to get a channel through coturn: Allocate and ChannelBind,
//! without credentials.

use std::{io, net::SocketAddr};

use muster_agent::udp::{Family, ReceiveBuffer, Run, UdpSockets};
use muster_integration_tests::device::Error;
use muster_tunnel::{Ecn, Fragmentation};
use rustix::{
    event::{PollFd, PollFlags, poll},
    time::Timespec,
};

const COOKIE: u32 = 0x2112_a442;
const ALLOCATE: u16 = 0x0003;
const CHANNEL_BIND: u16 = 0x0009;
/// Added to a request's type for a response that says so.
const SUCCESS: u16 = 0x0100;
const CHANNEL_NUMBER: u16 = 0x000c;
const XOR_PEER_ADDRESS: u16 = 0x0012;
const REQUESTED_TRANSPORT: u16 = 0x0019;
const UDP: u8 = 17;
/// The first channel number there is.
const CHANNEL: u16 = 0x4000;
/// Times that a request is sent, a second apart.
const ATTEMPTS: u8 = 5;

/// Makes a channel to `peer` at the TURN server `relay`, and returns its number. Its allocation lasts ten minutes.
pub(crate) fn channel(sockets: &UdpSockets, relay: SocketAddr, peer: SocketAddr) -> Result<u16, Error> {
    ask(sockets, relay, ALLOCATE, &attribute(REQUESTED_TRANSPORT, &[UDP, 0, 0, 0]))?;
    let [high, low] = CHANNEL.to_be_bytes();
    let number = attribute(CHANNEL_NUMBER, &[high, low, 0, 0]);
    ask(sockets, relay, CHANNEL_BIND, &[number, attribute(XOR_PEER_ADDRESS, &xor(peer)?)].concat())?;
    Ok(CHANNEL)
}

/// Sends a request until there is a response; an error unless that says success.
fn ask(sockets: &UdpSockets, relay: SocketAddr, kind: u16, attributes: &[u8]) -> Result<(), Error> {
    let request = request(kind, attributes)?;
    let mut buffer = ReceiveBuffer::new();
    for _ in 0..ATTEMPTS {
        let run = Run {
            destination: relay,
            ecn: Ecn::NotEct,
            fragmentation: Fragmentation::Known,
            datagram_len: request.len(),
            octets: &request,
        };
        sockets.send_runs([run].into_iter());
        if !is_readable(sockets)? {
            continue;
        }
        sockets.recv_into(Family::V4, &mut buffer)?;
        for message in buffer.messages() {
            let response = buffer.octets().get(message.range).unwrap_or_default();
            let (Some(of), Some(id)) = (response.first_chunk(), response.get(4..20)) else { continue };
            if Some(id) != request.get(4..20) {
                continue;
            }
            let of = u16::from_be_bytes(*of);
            return if of == kind | SUCCESS {
                Ok(())
            } else {
                Err(format!("the TURN server answers request {kind:#06x} with {of:#06x}: {response:?}")
                    .into())
            };
        }
    }
    Err(format!("no answer from the TURN server at {relay}").into())
}

fn request(kind: u16, attributes: &[u8]) -> Result<Vec<u8>, Error> {
    let mut octets = Vec::new();
    octets.extend_from_slice(&kind.to_be_bytes());
    octets.extend_from_slice(&u16::try_from(attributes.len())?.to_be_bytes());
    octets.extend_from_slice(&COOKIE.to_be_bytes());
    // The transaction's number: one request is under way at a time.
    octets.extend_from_slice(&[kind.to_be_bytes(); 6].concat());
    octets.extend_from_slice(attributes);
    Ok(octets)
}

/// Values here are of whole words.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let len = u16::try_from(value.len()).unwrap_or(0);
    [&kind.to_be_bytes(), &len.to_be_bytes(), value].concat()
}

/// The value of XOR-PEER-ADDRESS (RFC 8489 §14.2).
fn xor(address: SocketAddr) -> Result<Vec<u8>, Error> {
    let SocketAddr::V4(address) = address else { return Err("the TURN client has no IPv6".into()) };
    let port = address.port() ^ (COOKIE >> 16) as u16;
    let ip = address.ip().to_bits() ^ COOKIE;
    Ok([[0, 1].as_slice(), &port.to_be_bytes(), &ip.to_be_bytes()].concat())
}

/// Waits until something has come, for a second at most.
fn is_readable(sockets: &UdpSockets) -> io::Result<bool> {
    let Some(fd) = sockets.fd(Family::V4) else { return Ok(false) };
    let second = Timespec { tv_sec: 1, tv_nsec: 0 };
    Ok(poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&second))? > 0)
}
