//! The load: datagrams of one length, as many as the processor can send, by runs (`UDP_SEGMENT`) or one by one.

use std::net::{SocketAddr, UdpSocket};

use clap::{Args, ValueEnum};
use muster_agent::udp::{Run, UdpSockets};
use muster_common::frame::{DataHeader, Handle};
use muster_integration_tests::device::Error;
use muster_tunnel::{Ecn, Fragmentation, RUN_DATAGRAMS, RUN_OCTETS};

use crate::coturn;

/// Messages that one system call sends.
const MESSAGES: usize = 64;
/// Runs that one system call sends: more would not fit into the relay's socket at once.
const RUNS: usize = 4;

/// What comes before the payload.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// The 16 octets of a frame
    Frame,
    /// The 4 octets of TURN's ChannelData (RFC 8656 §12.4), after a channel was made
    Channel,
}

/// What is sent, and how.
#[derive(Args)]
pub(crate) struct Load {
    kind: Kind,
    relay: SocketAddr,
    /// Behind the relay
    peer: SocketAddr,
    payload: usize,
    #[arg(long)]
    segments: bool,
    /// To send from; 0 for any
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// Of the attachment that sends, in every frame
    #[arg(long, default_value_t = 1)]
    session: u32,
    /// Of the device that receives
    #[arg(long, default_value_t = 2)]
    handle: u64,
}

/// Sends until it is ended.
pub(crate) fn run(load: &Load) -> Result<(), Error> {
    let &Load { kind, relay, peer, payload, segments, port, session, handle } = load;
    let mut sockets = UdpSockets::bind(port)?;
    if !segments {
        sockets.forgo_offloads();
    }
    let header = match kind {
        Kind::Frame => DataHeader { session, handle: Handle(handle) }.octets().to_vec(),
        Kind::Channel => {
            let channel = coturn::channel(&sockets, relay, peer)?;
            [channel.to_be_bytes(), u16::try_from(payload)?.to_be_bytes()].concat()
        }
    };
    println!("ready");
    flood(&sockets, relay, &[header, vec![0x5a; payload]].concat(), segments)
}

fn flood(sockets: &UdpSockets, relay: SocketAddr, datagram: &[u8], segments: bool) -> Result<(), Error> {
    let (datagrams, runs) = if segments {
        (RUN_DATAGRAMS.min(RUN_OCTETS / datagram.len().max(1)).max(1), RUNS)
    } else {
        (1, MESSAGES)
    };
    let octets = datagram.repeat(datagrams);
    let run = Run {
        destination: relay,
        ecn: Ecn::NotEct,
        fragmentation: Fragmentation::Known,
        datagram_len: datagram.len(),
        octets: &octets,
    };
    loop {
        let sent = sockets.send_runs(std::iter::repeat_n(run, runs));
        if sent.failed > 0 {
            return Err(format!("cannot send to {relay}: {sent:?}").into());
        }
    }
}

/// Holds `address`, so that what comes there is no error, and reads nothing: the kernel drops it when the socket's small
/// buffer is full.
pub(crate) fn hold(address: SocketAddr) -> Result<(), Error> {
    let socket = UdpSocket::bind(address)?;
    rustix::net::sockopt::set_socket_recv_buffer_size(&socket, 1)?;
    println!("ready");
    loop {
        std::thread::park();
    }
}
