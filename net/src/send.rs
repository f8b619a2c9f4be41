//! Sending runs of datagrams: a run is one segmented message (`UDP_SEGMENT`), and up to 64 messages are one system call.
//! Where the kernel or a network card refuses segments, the same datagrams leave one by one.

use std::{io, net::SocketAddr};

use muster_common::datagram::{Ecn, Fragmentation};

use super::{
    Discovery, Family, UdpSockets,
    abi::{Address, Control},
    sys::{self, MESSAGES, Outbound},
};

/// Most destinations that one call reports as having too narrow a path. Others are reported by a later one.
const REPORTS: usize = 4;

/// Datagrams to one destination, all but the last of equal length and the last not longer. A run of up to 64 datagrams
/// and 65,472 octets leaves whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run<'a> {
    /// Where they go.
    pub destination: SocketAddr,
    /// What their IP headers say of congestion.
    pub ecn: Ecn,
    /// What may become of them on the way.
    pub fragmentation: Fragmentation,
    /// Octets of each but the last.
    pub datagram_len: usize,
    /// Their octets, back to back.
    pub octets: &'a [u8],
}

impl<'a> Run<'a> {
    /// The datagrams, in order.
    pub fn datagrams(&self) -> impl ExactSizeIterator<Item = &'a [u8]> + use<'a> {
        self.octets.chunks(self.datagram_len.max(1))
    }
}

/// What became of datagrams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Handed to the network.
    pub datagrams: u64,
    /// Octets of those, without their headers.
    pub bytes: u64,
    /// System calls that it took.
    pub calls: u64,
    /// Dropped because the socket's buffer was full.
    pub full: u64,
    /// Dropped because the host cannot send there, or not that much.
    pub failed: u64,
    pub(super) too_big: [Option<TooBig>; REPORTS],
}

/// A path that takes less than it was given. The datagrams may have left nevertheless, in fragments
/// (see [`Discovery`](super::Discovery)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooBig {
    /// Where the datagrams were to go.
    pub destination: SocketAddr,
    /// Octets of the largest of them.
    pub datagram_len: usize,
}

impl Sent {
    /// Paths that have turned out too narrow, each once.
    pub fn too_big(&self) -> impl Iterator<Item = TooBig> {
        self.too_big.into_iter().flatten()
    }

    fn report(&mut self, run: &Run<'_>) {
        if run.fragmentation == Fragmentation::Anyone {
            // Whoever had it sent so knows.
            return;
        }
        let report = TooBig { destination: run.destination, datagram_len: longest(run) };
        let same = |place: &&mut Option<TooBig>| {
            place.is_none_or(|reported| reported.destination == report.destination)
        };
        if let Some(place) = self.too_big.iter_mut().find(same)
            && place.is_none_or(|reported| reported.datagram_len < report.datagram_len)
        {
            *place = Some(report);
        }
    }
}

/// Runs of one family that leave with one system call, each with its message.
struct Batch<'a> {
    family: Family,
    fragmentation: Fragmentation,
    /// At most [`MESSAGES`].
    entries: Vec<Entry<'a>>,
}

type Entry<'a> = (Run<'a>, Outbound<'a>);

impl<'a> Batch<'a> {
    /// An empty one, with room for as many as are expected: mostly one or two.
    fn new(expected: usize) -> Self {
        Self {
            family: Family::V4,
            fragmentation: Fragmentation::Known,
            entries: Vec::with_capacity(expected.min(MESSAGES)),
        }
    }

    fn has_room_for(&self, run: &Run<'_>) -> bool {
        let same = || (self.family, self.fragmentation) == (Family::of(run.destination), run.fragmentation);
        self.entries.is_empty() || (self.entries.len() < MESSAGES && same())
    }

    fn push(&mut self, run: Run<'a>) {
        self.family = Family::of(run.destination);
        self.fragmentation = run.fragmentation;
        self.entries.push((run, message(&run)));
    }

    fn rest(&self, done: usize) -> impl Iterator<Item = &Entry<'a>> {
        self.entries.get(done..).unwrap_or_default().iter()
    }
}

impl UdpSockets {
    /// Sends `runs` in their order. What cannot be sent is dropped and counted, and the rest goes on.
    pub fn send_runs<'a>(&self, runs: impl Iterator<Item = Run<'a>>) -> Sent {
        let mut sent = Sent::default();
        let mut batch = Batch::new(runs.size_hint().1.unwrap_or(MESSAGES));
        for run in runs {
            if is_segmented(&run) && !self.sends_segments(run.destination) {
                singly(&run).for_each(|run| self.add(run, &mut batch, &mut sent));
            } else {
                self.add(run, &mut batch, &mut sent);
            }
        }
        self.send(&batch, &mut sent);
        sent
    }

    fn add<'a>(&self, run: Run<'a>, batch: &mut Batch<'a>, sent: &mut Sent) {
        if !batch.has_room_for(&run) {
            self.send(batch, sent);
            batch.entries.clear();
        }
        batch.push(run);
    }

    fn send(&self, batch: &Batch<'_>, sent: &mut Sent) {
        if batch.fragmentation == Fragmentation::Known {
            return self.send_batch(batch, sent);
        }
        let discovery = match batch.fragmentation {
            Fragmentation::Never => Discovery::Probe,
            _ => Discovery::Never,
        };
        self.discover(batch.family, discovery);
        self.send_batch(batch, sent);
        self.discover(batch.family, Discovery::Want);
    }

    fn discover(&self, family: Family, discovery: Discovery) {
        if let Some(socket) = self.socket(family)
            && let Err(error) = socket.set_path_mtu_discovery(family, discovery)
        {
            tracing::debug!(?family, ?discovery, %error, "cannot set how datagrams are fragmented");
        }
    }

    fn send_batch(&self, batch: &Batch<'_>, sent: &mut Sent) {
        let Some(socket) = self.fd(batch.family) else {
            sent.failed += datagrams(batch.rest(0));
            return;
        };
        let mut done = 0;
        while let Some((run, _)) = batch.rest(done).next() {
            match sys::send(socket, batch.rest(done).map(|(_, message)| message)) {
                Ok(number) => {
                    let gone = || batch.rest(done).take(number);
                    sent.calls += 1;
                    sent.datagrams += datagrams(gone());
                    sent.bytes += gone().map(|(run, _)| run.octets.len() as u64).sum::<u64>();
                    done += number.max(1);
                    continue;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    sent.full += datagrams(batch.rest(done));
                    return;
                }
                Err(e) if is_segmented(run) && may_concern_segments(&e) => self.send_singly(run, &e, sent),
                Err(e) => {
                    sent.failed += run.datagrams().len() as u64;
                    if e.raw_os_error() == Some(libc::EMSGSIZE) {
                        sent.report(run);
                    }
                }
            }
            done += 1;
        }
    }

    /// Sends the datagrams of a run that was refused, and finds out whether that was for being segmented.
    fn send_singly(&self, run: &Run<'_>, refusal: &io::Error, sent: &mut Sent) {
        let before = sent.datagrams;
        let mut batch = Batch::new(run.datagrams().len());
        singly(run).for_each(|run| self.add(run, &mut batch, sent));
        self.send_batch(&batch, sent);
        // Segments longer than the path takes are refused with EMSGSIZE, and by kernels before 6.14 with EINVAL.
        let is_too_big = match refusal.raw_os_error() {
            Some(libc::EMSGSIZE) => true,
            Some(libc::EINVAL) => self.path_mtu(run.destination).is_ok_and(|mtu| mtu < packet_len(run)),
            _ => false,
        };
        if is_too_big {
            sent.report(run);
        } else if sent.datagrams > before {
            self.stop_segmenting(run.destination, refusal);
        }
    }
}

fn datagrams<'a, 'b: 'a>(entries: impl Iterator<Item = &'a Entry<'b>>) -> u64 {
    entries.map(|(run, _)| run.datagrams().len() as u64).sum()
}

/// Whether a segmented send may fail in this way where the same datagrams, one by one, would pass: a kernel, a network
/// card or an IPsec policy does not take segments (EIO, EINVAL, EOPNOTSUPP, ENOPROTOOPT), or the path not that much.
fn may_concern_segments(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EIO | libc::EINVAL | libc::EOPNOTSUPP | libc::ENOPROTOOPT | libc::EMSGSIZE)
    )
}

fn is_segmented(run: &Run<'_>) -> bool {
    run.octets.len() > run.datagram_len
}

/// A run of its own for each datagram.
fn singly<'a>(run: &Run<'a>) -> impl Iterator<Item = Run<'a>> + use<'a> {
    let run = *run;
    run.datagrams().map(move |octets| Run { datagram_len: octets.len(), octets, ..run })
}

/// Octets of the longest datagram.
fn longest(run: &Run<'_>) -> usize {
    run.datagram_len.min(run.octets.len())
}

/// Octets of the longest datagram with its headers.
fn packet_len(run: &Run<'_>) -> usize {
    longest(run) + if run.destination.is_ipv4() { 20 + 8 } else { 40 + 8 }
}

fn message<'a>(run: &Run<'a>) -> Outbound<'a> {
    let mut control = Control::EMPTY;
    if is_segmented(run) {
        let len = u16::try_from(run.datagram_len).unwrap_or(u16::MAX);
        control.push(libc::SOL_UDP, libc::UDP_SEGMENT, &len.to_ne_bytes());
    }
    let ecn = libc::c_int::from(run.ecn.bits());
    if ecn != 0 {
        let (level, kind) = match Family::of(run.destination) {
            Family::V4 => (libc::IPPROTO_IP, libc::IP_TOS),
            Family::V6 => (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
        };
        control.push(level, kind, &ecn.to_ne_bytes());
    }
    Outbound { address: Address::new(run.destination), control, octets: run.octets }
}
