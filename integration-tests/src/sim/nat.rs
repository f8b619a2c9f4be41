//! A NAT without sockets or clock: which outside address a datagram leaves by, and whom what comes back is for, in the
//! words of RFC 4787.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use crate::router;

/// Ports that are given where the inside one is not free.
const PORTS: std::ops::Range<u16> = 20_000..60_000;
/// How far the ports of a NAT that has been rebound are from those before.
const REBOUND: u16 = 1_000;

/// What an outside port depends on (RFC 4787, 4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mapping {
    /// On the inside address alone.
    EndpointIndependent,
    /// On the destination, too, port included.
    AddressAndPortDependent,
}

/// What is let in to a port that is mapped (RFC 4787, 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filtering {
    /// Everything.
    EndpointIndependent,
    /// What comes from an address that was sent to, by whichever port.
    AddressDependent,
    /// What comes from where was sent to.
    AddressAndPortDependent,
}

/// A NAT for UDP over IPv4.
#[derive(Clone, Debug)]
pub(super) struct Nat {
    pub(super) outside: IpAddr,
    mapping: Mapping,
    filtering: Filtering,
    /// How long a mapping lives after the last datagram that left by it.
    timeout: Duration,
    /// By inside address, and destination if it matters.
    ports: BTreeMap<(SocketAddr, Option<SocketAddr>), u16>,
    mapped: BTreeMap<u16, Mapped>,
    next_port: u16,
    /// Inside ports are kept where they are free.
    preserves: bool,
}

#[derive(Clone, Debug)]
struct Mapped {
    key: (SocketAddr, Option<SocketAddr>),
    used: Duration,
    /// Where was sent to, and when last.
    sent: BTreeMap<SocketAddr, Duration>,
}

impl Nat {
    pub(super) fn new(outside: IpAddr, mapping: Mapping, filtering: Filtering, timeout: Duration) -> Self {
        Self {
            outside,
            mapping,
            filtering,
            timeout,
            ports: BTreeMap::new(),
            mapped: BTreeMap::new(),
            next_port: PORTS.start,
            preserves: mapping == Mapping::EndpointIndependent,
        }
    }

    /// One that does what the lab's router of that kind does; `None` for no NAT.
    pub(super) fn of_kind(kind: router::Nat, outside: IpAddr, timeout: Duration) -> Option<Self> {
        let (mapping, filtering) = match kind {
            router::Nat::None => return None,
            router::Nat::FullCone => (Mapping::EndpointIndependent, Filtering::EndpointIndependent),
            router::Nat::AddressRestricted => (Mapping::EndpointIndependent, Filtering::AddressDependent),
            router::Nat::PortRestricted => (Mapping::EndpointIndependent, Filtering::AddressAndPortDependent),
            router::Nat::Symmetric => (Mapping::AddressAndPortDependent, Filtering::AddressAndPortDependent),
        };
        Some(Self::new(outside, mapping, filtering, timeout))
    }

    /// A datagram leaves from `inside` to `to`: where it comes from, as seen from outside.
    pub(super) fn outbound(&mut self, inside: SocketAddr, to: SocketAddr, now: Duration) -> SocketAddr {
        self.expire(now);
        let key = (inside, (self.mapping == Mapping::AddressAndPortDependent).then_some(to));
        let port = match self.ports.get(&key) {
            Some(port) => *port,
            None => self.free_port(inside.port()),
        };
        self.ports.insert(key, port);
        let mapped =
            self.mapped.entry(port).or_insert_with(|| Mapped { key, used: now, sent: BTreeMap::new() });
        mapped.used = now;
        mapped.sent.insert(to, now);
        SocketAddr::new(self.outside, port)
    }

    /// A datagram from `from` arrives at `outside`: whom it is for, if it is let in. That keeps nothing alive (REQ-6).
    pub(super) fn inbound(&self, outside: SocketAddr, from: SocketAddr, now: Duration) -> Option<SocketAddr> {
        let mapped = self.mapped.get(&outside.port()).filter(|_| outside.ip() == self.outside)?;
        let is_alive = |used: Duration| now.saturating_sub(used) < self.timeout;
        let mut sent = mapped.sent.iter().filter(|(_, at)| is_alive(**at)).map(|(to, _)| to);
        let is_let_in = match self.filtering {
            Filtering::EndpointIndependent => true,
            Filtering::AddressDependent => sent.any(|to| to.ip() == from.ip()),
            Filtering::AddressAndPortDependent => sent.any(|to| *to == from),
        };
        (is_let_in && is_alive(mapped.used)).then_some(mapped.key.0)
    }

    /// Forgets everything; later mappings have other ports.
    pub(super) fn rebind(&mut self) {
        self.ports.clear();
        self.mapped.clear();
        self.preserves = false;
        self.next_port += REBOUND;
        if !PORTS.contains(&self.next_port) {
            self.next_port = PORTS.start + self.next_port % REBOUND;
        }
    }

    /// Mappings there are.
    pub(super) fn len(&self) -> usize {
        self.mapped.len()
    }

    fn expire(&mut self, now: Duration) {
        let is_alive = |used: Duration| now.saturating_sub(used) < self.timeout;
        self.mapped.retain(|_, mapped| {
            mapped.sent.retain(|_, at| is_alive(*at));
            is_alive(mapped.used)
        });
        let mapped = &self.mapped;
        self.ports.retain(|_, port| mapped.contains_key(port));
    }

    fn free_port(&mut self, inside: u16) -> u16 {
        if self.preserves && !self.mapped.contains_key(&inside) {
            return inside;
        }
        loop {
            let port = self.next_port;
            self.next_port = if port + 1 < PORTS.end { port + 1 } else { PORTS.start };
            if !self.mapped.contains_key(&port) {
                return port;
            }
        }
    }
}

#[cfg(test)]
mod tests;
