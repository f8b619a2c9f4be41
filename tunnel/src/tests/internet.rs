//! What is between the nodes beside wires: NATs, and directors that relay.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use muster_common::{
    frame::{DataHeader, HEADER, Handle},
    time::Instant,
};

use crate::{DirectorId, DirectorLink, Endpoint, Hop};

/// How a node is connected (RFC 4787: mapping and filtering).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Nat {
    Open,
    /// One port for all, and everyone may send to it.
    FullCone,
    /// One port for all; answers come from addresses that were sent to.
    AddressRestricted,
    /// One port for all; answers come from ports that were sent to.
    PortRestricted,
    /// A port for each destination.
    Symmetric,
    /// UDP passes to directors alone, which stands for a stream to them.
    Blocked,
}

/// How long a NAT lets answers in.
const OPEN_FOR: Duration = Duration::from_secs(60);

struct Site {
    nat: Nat,
    inside: SocketAddr,
    outside: IpAddr,
    next_port: u16,
    ports: BTreeMap<Option<SocketAddr>, u16>,
    /// When something was last sent from a port to a destination.
    sent: BTreeMap<(u16, SocketAddr), Instant>,
}

impl Site {
    fn port(&mut self, to: SocketAddr) -> u16 {
        let key = (self.nat == Nat::Symmetric).then_some(to);
        let next_port = &mut self.next_port;
        *self.ports.entry(key).or_insert_with(|| {
            *next_port += 1;
            *next_port
        })
    }
}

#[derive(Default)]
pub(super) struct Internet {
    sites: Vec<Site>,
    /// Directors that are up.
    pub(super) directors: [bool; 2],
}

pub(super) fn handle(n: usize) -> Handle {
    Handle(n as u64 + 1)
}

fn director_at(director: usize) -> SocketAddr {
    SocketAddr::from(([198, 51, 100, director as u8], 7_501))
}

/// A node's link to a director.
pub(super) fn link(n: usize, director: usize) -> DirectorLink {
    let session = (director as u32 + 1) << 16 | n as u32;
    DirectorLink { session, hop: Hop::Udp(director_at(director)), is_draining: false }
}

impl Internet {
    pub(super) fn new(nodes: &[(SocketAddr, Nat)]) -> Self {
        let site = |(n, (inside, nat)): (usize, &(SocketAddr, Nat))| Site {
            nat: *nat,
            inside: *inside,
            outside: IpAddr::from([203, 0, 113, n as u8 + 1]),
            next_port: 40_000,
            ports: BTreeMap::new(),
            sent: BTreeMap::new(),
        };
        Self { sites: nodes.iter().enumerate().map(site).collect(), directors: [true; 2] }
    }

    /// Where the registrar says that a node is: its own address, and the one that a director sees.
    pub(super) fn told(&mut self, n: usize) -> Vec<SocketAddr> {
        let site = &mut self.sites[n];
        match site.nat {
            Nat::Open | Nat::Blocked => vec![site.inside],
            _ => {
                let port = site.port(director_at(0));
                vec![site.inside, SocketAddr::new(site.outside, port)]
            }
        }
    }

    /// A NAT forgets everything, and uses other ports.
    pub(super) fn rebind(&mut self, n: usize) {
        self.sites[n].ports.clear();
        self.sites[n].sent.clear();
        self.sites[n].next_port += 100;
    }

    /// A datagram leaves from a node; where it seems to come from.
    pub(super) fn leave(&mut self, from: SocketAddr, to: SocketAddr, now: Instant) -> Option<SocketAddr> {
        let Some(site) = self.sites.iter_mut().find(|site| site.inside == from) else { return Some(from) };
        match site.nat {
            Nat::Open => Some(from),
            Nat::Blocked => None,
            _ => {
                let port = site.port(to);
                site.sent.insert((port, to), now);
                Some(SocketAddr::new(site.outside, port))
            }
        }
    }

    /// A datagram arrives; the address of the node that gets it.
    pub(super) fn arrive(&self, from: SocketAddr, to: SocketAddr, now: Instant) -> Option<SocketAddr> {
        if self.sites.is_empty() || (0..2).any(|director| director_at(director) == from) {
            return Some(to);
        }
        let site = self.sites.iter().find(|site| site.inside == to || site.outside == to.ip())?;
        let is_let_in = match site.nat {
            Nat::Open => site.inside == to,
            Nat::Blocked => false,
            _ if site.inside == to => false,
            nat => {
                site.ports.iter().any(|(_, port)| *port == to.port()) && {
                    let lately = |at: &Instant| now - *at < OPEN_FOR;
                    nat == Nat::FullCone
                        || site.sent.iter().any(|((port, sent_to), at)| {
                            let is_answer = *sent_to == from
                                || (nat == Nat::AddressRestricted && sent_to.ip() == from.ip());
                            *port == to.port() && is_answer && lately(at)
                        })
                }
            }
        };
        is_let_in.then_some(site.inside)
    }

    /// What becomes of a frame to a director: it goes to a node, with another header; `None` if it is no frame.
    pub(super) fn forward(
        &self,
        to: SocketAddr,
        frame: &[u8],
    ) -> Option<Option<(SocketAddr, SocketAddr, Vec<u8>)>> {
        let director = (0..2).find(|director| director_at(*director) == to)?;
        let header = DataHeader::parse(frame).expect("a director got something else than a frame");
        let from = (header.session & 0xffff) as usize;
        assert_eq!(header.session, link(from, director).session);
        let to = header.handle.0 as usize - 1;
        let header = DataHeader { session: link(to, director).session, handle: handle(from) };
        let relayed = [&header.octets()[..], &frame[HEADER..]].concat();
        Some(self.directors[director].then_some((director_at(director), self.sites[to].inside, relayed)))
    }
}

/// Where a datagram came from, and where the message in it begins.
pub(super) fn unframe(from: SocketAddr, datagram: &[u8]) -> (Endpoint, usize) {
    match (DataHeader::parse(datagram), (0..2).find(|director| director_at(*director) == from)) {
        (Some(header), Some(director)) => {
            (Endpoint::Relay { director: DirectorId(director as u16), handle: header.handle }, HEADER)
        }
        _ => (from.into(), 0),
    }
}
