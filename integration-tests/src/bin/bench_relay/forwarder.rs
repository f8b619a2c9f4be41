//! The bare forwarder: what a relay of frames costs that looks at nothing. It receives a batch, overwrites the first 16
//! octets of each datagram, and sends the batch on, with as few system calls as a director makes: one datagram a message,
//! or with `UDP_GRO` and `UDP_SEGMENT` whole runs.

use std::{io, net::SocketAddr};

use muster_agent::udp::{Family, ReceiveBuffer, Run, UdpSockets};
use muster_common::frame::{DataHeader, HEADER, Handle};
use muster_integration_tests::device::Error;
use muster_tunnel::{Ecn, Fragmentation};
use rustix::event::{PollFd, PollFlags, poll};

/// Forwards from `port` to `to`, until it is ended.
pub(crate) fn run(port: u16, to: SocketAddr, offloads: bool) -> Result<(), Error> {
    let mut sockets = UdpSockets::bind(port)?;
    if !offloads {
        sockets.forgo_offloads();
    }
    sockets.coalesce();
    let header = DataHeader { session: 7, handle: Handle(9) }.octets();
    let mut buffer = ReceiveBuffer::new();
    loop {
        wait(&sockets)?;
        sockets.recv_into(Family::V4, &mut buffer)?;
        let (messages, octets) = buffer.parts_mut();
        for range in messages.iter().flat_map(|message| message.datagrams()) {
            if let Some(place) = octets.get_mut(range).and_then(|datagram| datagram.get_mut(..HEADER)) {
                place.copy_from_slice(&header);
            }
        }
        let octets = &*octets;
        sockets.send_runs(messages.iter().map(|message| Run {
            destination: to,
            ecn: Ecn::from_bits(message.ecn),
            fragmentation: Fragmentation::Known,
            datagram_len: message.datagram_len,
            octets: octets.get(message.range.clone()).unwrap_or_default(),
        }));
    }
}

/// Waits until something has come.
fn wait(sockets: &UdpSockets) -> io::Result<()> {
    let Some(fd) = sockets.fd(Family::V4) else { return Ok(()) };
    match poll(&mut [PollFd::new(&fd, PollFlags::IN)], None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
