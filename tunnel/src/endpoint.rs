//! Where a peer is reached: at an address, or through a director; and the ways to directors.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr},
};

pub use muster_common::frame::Handle;
use muster_common::frame::{self, DataHeader};

/// The shell's number for a director. Small: they are places in a table.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DirectorId(pub u16);

/// Where a peer is reached, or a datagram came from.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Endpoint {
    /// At an address.
    Direct(SocketAddr),
    /// Through a director.
    Relay {
        /// Which.
        director: DirectorId,
        /// The peer, to the director.
        handle: Handle,
    },
}

/// Where a datagram leaves: a relayed one goes to its director, with the header of its frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hop {
    /// From the socket to an address.
    Udp(SocketAddr),
    /// Through the stream to a director.
    Stream(DirectorId),
}

/// The way to a director.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DirectorLink {
    /// What the frames of this device's attachment begin with.
    pub session: u32,
    /// Where they go.
    pub hop: Hop,
    /// The director is about to stop: it is used only where nothing else is.
    pub is_draining: bool,
}

impl Hop {
    /// The address, unless it is a stream.
    pub fn udp(&self) -> Option<SocketAddr> {
        match self {
            Self::Udp(address) => Some(*address),
            Self::Stream(_) => None,
        }
    }
}

impl Endpoint {
    /// The address, unless it is a relay.
    pub fn direct(&self) -> Option<SocketAddr> {
        match self {
            Self::Direct(address) => Some(*address),
            Self::Relay { .. } => None,
        }
    }

    /// Whether it is a relay.
    pub fn is_relay(&self) -> bool {
        matches!(self, Self::Relay { .. })
    }

    /// Whether datagrams may leave over IPv6 somewhere on the way.
    pub(crate) fn may_be_ipv6(&self) -> bool {
        !matches!(self, Self::Direct(SocketAddr::V4(_)))
    }

    /// What limits on sources go by: the address, or for a relay one made up of director and handle.
    pub(crate) fn as_source(&self) -> SocketAddr {
        match *self {
            Self::Direct(address) => address,
            Self::Relay { director: DirectorId(director), handle: Handle(handle) } => {
                // Limits count IPv6 sources by /64, so what tells them apart is in the first half.
                let [a, b, c, d] = [48, 32, 16, 0].map(|shift| (handle >> shift) as u16);
                let first = 0xfe00 | (a & 0xff);
                SocketAddr::new(IpAddr::V6(Ipv6Addr::new(first, b, c, d, director, a, 0, 0)), 0)
            }
        }
    }
}

impl From<SocketAddr> for Endpoint {
    fn from(address: SocketAddr) -> Self {
        Self::Direct(address)
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Direct(address) => address.fmt(f),
            Self::Relay { director, handle } => {
                write!(f, "{:016x} through director {}", handle.0, director.0)
            }
        }
    }
}

/// How a datagram leaves, and what precedes it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Route {
    pub(crate) hop: Hop,
    pub(crate) frame: Option<[u8; frame::HEADER]>,
}

impl Route {
    /// Octets before the message.
    pub(crate) fn header_len(&self) -> usize {
        self.frame.map_or(0, |header| header.len())
    }
}

/// The ways to all directors, by number.
#[derive(Debug, Default)]
pub(crate) struct Links(Vec<Option<DirectorLink>>);

impl Links {
    /// Tells whether anything changed.
    pub(crate) fn set(&mut self, director: DirectorId, link: Option<DirectorLink>) -> bool {
        let index = usize::from(director.0);
        if self.0.len() <= index {
            self.0.resize(index + 1, None);
        }
        self.0.get_mut(index).is_some_and(|place| std::mem::replace(place, link) != link)
    }

    pub(crate) fn get(&self, director: DirectorId) -> Option<DirectorLink> {
        self.0.get(usize::from(director.0)).copied().flatten()
    }

    /// How a datagram to `endpoint` leaves; `None` while its director is not reached.
    #[inline]
    pub(crate) fn route(&self, endpoint: &Endpoint) -> Option<Route> {
        match *endpoint {
            Endpoint::Direct(address) => Some(Route { hop: Hop::Udp(address), frame: None }),
            Endpoint::Relay { director, handle } => {
                let DirectorLink { session, hop, .. } = self.get(director)?;
                Some(Route { hop, frame: Some(DataHeader { session, handle }.octets()) })
            }
        }
    }

    /// Whether datagrams can be sent to `endpoint`.
    pub(crate) fn reach(&self, endpoint: &Endpoint) -> bool {
        match endpoint {
            Endpoint::Direct(_) => true,
            Endpoint::Relay { director, .. } => self.get(*director).is_some(),
        }
    }

    /// Whether `endpoint` is a relay whose director is reached and will stay.
    pub(crate) fn is_steady(&self, endpoint: &Endpoint) -> bool {
        match endpoint {
            Endpoint::Direct(_) => false,
            Endpoint::Relay { director, .. } => self.get(*director).is_some_and(|link| !link.is_draining),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_of_relays_follow_their_links() {
        let mut links = Links::default();
        let at: SocketAddr = "192.0.2.1:7501".parse().unwrap();
        let relay = Endpoint::Relay { director: DirectorId(2), handle: Handle(7) };
        assert_eq!(links.route(&at.into()), Some(Route { hop: Hop::Udp(at), frame: None }));
        assert_eq!((links.route(&relay), links.reach(&relay)), (None, false));
        let link = DirectorLink { session: 9, hop: Hop::Udp(at), is_draining: false };
        assert!(links.set(DirectorId(2), Some(link)) && !links.set(DirectorId(2), Some(link)));
        let frame = [5, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 7];
        assert_eq!(links.route(&relay), Some(Route { hop: Hop::Udp(at), frame: Some(frame) }));
        assert!(links.is_steady(&relay));
        links.set(DirectorId(2), Some(DirectorLink { is_draining: true, ..link }));
        assert!(links.reach(&relay) && !links.is_steady(&relay));
        links.set(DirectorId(2), None);
        assert!(!links.reach(&relay));
    }

    #[test]
    fn relays_are_sources_of_their_own() {
        let relay =
            |director, handle| Endpoint::Relay { director: DirectorId(director), handle: Handle(handle) };
        let sources =
            [relay(0, 1), relay(0, 2), relay(0, 1 << 50), relay(1, u64::MAX)].map(|r| match r.as_source() {
                SocketAddr::V6(at) => at.ip().octets()[..8].to_vec(),
                SocketAddr::V4(_) => vec![],
            });
        assert!((0..4).all(|n| (0..n).all(|m| sources[n] != sources[m])));
    }
}
