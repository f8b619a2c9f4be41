//! The batch that packets are sealed into: one buffer, datagrams back to back, so that a run of equal ones to one
//! destination goes out in a single segmented send.

use crate::{
    ecn::Ecn,
    endpoint::{Hop, Route},
    event::Fragmentation,
};

/// Most datagrams in a run: what Linux takes in one segmented send (`UDP_MAX_SEGMENTS` of kernels before 6.9).
pub const RUN_DATAGRAMS: usize = 64;
/// Most octets in a run. With Ethernet, IP and UDP headers it stays below 65,536, up to which network cards and the
/// loopback interface take a run whole.
pub const RUN_OCTETS: usize = 65_472;

/// Datagrams to one peer, all but the last of equal length and the last not longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run<'a> {
    /// Where they leave. If that is a director's, each begins with the header of its frame.
    pub hop: Hop,
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

/// A run as a place in the buffer.
#[derive(Clone, Copy, Debug)]
struct Place {
    route: Route,
    ecn: Ecn,
    fragmentation: Fragmentation,
    datagram_len: usize,
    start: usize,
    end: usize,
    datagrams: usize,
    /// The last datagram is shorter: none can follow.
    is_closed: bool,
}

/// Sealed datagrams in the order in which they must leave. Made once and reused: clearing keeps the memory.
#[derive(Debug, Default)]
pub struct Outgoing {
    /// Never shrinks: what is beyond `octets` is left over from earlier batches.
    buffer: Vec<u8>,
    octets: usize,
    runs: Vec<Place>,
    datagrams: usize,
}

impl Outgoing {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Forgets all datagrams.
    pub fn clear(&mut self) {
        self.octets = 0;
        self.datagrams = 0;
        self.runs.clear();
    }

    /// Number of datagrams.
    pub fn len(&self) -> usize {
        self.datagrams
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Octets of all datagrams.
    pub fn octets(&self) -> usize {
        self.octets
    }

    /// The runs, in order.
    pub fn runs(&self) -> impl ExactSizeIterator<Item = Run<'_>> {
        self.runs.iter().map(|place| Run {
            hop: place.route.hop,
            ecn: place.ecn,
            fragmentation: place.fragmentation,
            datagram_len: place.datagram_len,
            octets: self.buffer.get(place.start..place.end).unwrap_or_default(),
        })
    }

    /// Appends a datagram: what precedes messages on `route`, and one of `len` octets that `write` fills in; nothing if it
    /// fails. What the slot holds before is undefined.
    pub(crate) fn append<E>(
        &mut self,
        route: &Route,
        (ecn, fragmentation): (Ecn, Fragmentation),
        mut len: usize,
        write: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let header_len = route.header_len();
        len += header_len;
        let (start, end) = (self.octets, self.octets + len);
        if self.buffer.len() < end {
            self.buffer.resize(end.next_multiple_of(RUN_OCTETS + 1), 0);
        }
        let slot = self.buffer.get_mut(start..end).unwrap_or_default();
        match (&route.frame, slot.split_at_mut_checked(header_len)) {
            (Some(header), Some((place, message))) => {
                place.copy_from_slice(header);
                write(message)?;
            }
            _ => write(slot)?,
        }
        self.octets = end;
        self.datagrams += 1;
        if let Some(last) = self.runs.last_mut()
            && last.takes(route, (ecn, fragmentation), len)
        {
            last.end = end;
            last.datagrams += 1;
            last.is_closed = len < last.datagram_len;
            return Ok(());
        }
        let is_closed = false;
        self.runs.push(Place {
            route: *route,
            ecn,
            fragmentation,
            datagram_len: len,
            start,
            end,
            datagrams: 1,
            is_closed,
        });
        Ok(())
    }
}

impl Place {
    fn takes(&self, route: &Route, marks: (Ecn, Fragmentation), len: usize) -> bool {
        !self.is_closed
            && len <= self.datagram_len
            && self.route == *route
            && (self.ecn, self.fragmentation) == marks
            && self.datagrams < RUN_DATAGRAMS
            && self.end - self.start + len <= RUN_OCTETS
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    fn to(port: u16) -> Route {
        Route { hop: Hop::Udp(SocketAddr::from(([192, 0, 2, 1], port))), frame: None }
    }

    fn port(hop: Hop) -> u16 {
        match hop {
            Hop::Udp(at) => at.port(),
            Hop::Stream(_) => 0,
        }
    }

    fn append(out: &mut Outgoing, port: u16, ecn: Ecn, len: usize, octet: u8) {
        out.append(&to(port), (ecn, Fragmentation::Known), len, |slot| {
            slot.fill(octet);
            Ok::<_, ()>(())
        })
        .unwrap();
    }

    fn runs(out: &Outgoing) -> Vec<(u16, usize, Vec<usize>)> {
        let lens = |run: Run<'_>| run.datagrams().map(<[u8]>::len).collect();
        out.runs().map(|run| (port(run.hop), run.datagram_len, lens(run))).collect()
    }

    #[test]
    fn equal_neighbours_are_one_run_which_a_shorter_one_ends() {
        let mut out = Outgoing::new();
        for (octet, len) in [100, 100, 60, 60, 80, 80].into_iter().enumerate() {
            append(&mut out, 1, Ecn::NotEct, len, octet as u8);
        }
        append(&mut out, 2, Ecn::NotEct, 80, 6);
        append(&mut out, 2, Ecn::Ect0, 80, 7);
        let expected = [
            (1, 100, vec![100, 100, 60]),
            (1, 60, vec![60]),
            (1, 80, vec![80, 80]),
            (2, 80, vec![80]),
            (2, 80, vec![80]),
        ];
        assert_eq!(runs(&out), expected);
        assert_eq!((out.len(), out.octets()), (8, 640));
        let first: Vec<u8> =
            out.runs().flat_map(|run| run.datagrams().map(|d| d[0]).collect::<Vec<_>>()).collect();
        assert_eq!(first, [0, 1, 2, 3, 4, 5, 6, 7]);
        out.clear();
        assert!(out.is_empty() && out.runs().len() == 0);
    }

    #[test]
    fn runs_are_bounded_as_the_kernel_wants() {
        let mut out = Outgoing::new();
        for _ in 0..130 {
            append(&mut out, 1, Ecn::NotEct, 10, 0);
        }
        assert_eq!(out.runs().map(|run| run.datagrams().len()).collect::<Vec<_>>(), [64, 64, 2]);
        out.clear();
        for _ in 0..50 {
            append(&mut out, 1, Ecn::NotEct, 1452, 0);
        }
        assert_eq!(out.runs().map(|run| run.datagrams().len()).collect::<Vec<_>>(), [45, 5]);
        assert!(out.runs().all(|run| run.octets.len() <= RUN_OCTETS));
    }

    #[test]
    fn frames_of_one_header_are_one_run() {
        let mut out = Outgoing::new();
        let framed = |octet| Route { frame: Some([octet; 16]), ..to(1) };
        let mut append = |route: Route, len| {
            out.append(&route, (Ecn::NotEct, Fragmentation::Known), len, |slot| {
                slot.fill(1);
                Ok::<_, ()>(())
            })
            .unwrap();
        };
        for (octet, len) in [(8, 100), (8, 100), (9, 100), (9, 40)] {
            append(framed(octet), len);
        }
        append(to(1), 56);
        assert_eq!(runs(&out), [(1, 116, vec![116, 116]), (1, 116, vec![116, 56]), (1, 56, vec![56])]);
        let second = out.runs().nth(1).unwrap();
        let heads: Vec<_> =
            second.datagrams().map(|datagram| (datagram[..16].to_vec(), datagram[16])).collect();
        assert_eq!(heads, [(vec![9; 16], 1), (vec![9; 16], 1)]);
        out.clear();
        for _ in 0..50 {
            out.append(&framed(3), (Ecn::NotEct, Fragmentation::Known), 1_436, |_| Ok::<_, ()>(())).unwrap();
        }
        assert!(out.runs().all(|run| run.octets.len() <= RUN_OCTETS));
    }

    #[test]
    fn a_failure_leaves_nothing_behind() {
        let mut out = Outgoing::new();
        append(&mut out, 1, Ecn::NotEct, 10, 1);
        assert_eq!(out.append(&to(1), (Ecn::NotEct, Fragmentation::Known), 10, |_| Err("no")), Err("no"));
        assert_eq!((runs(&out), out.len()), (vec![(1, 10, vec![10])], 1));
    }
}
