//! Which endpoints each virtual IP and port is translated to on this host. A Service that changes changes its own alone,
//! and an endpoint keeps its place among the others for as long as it is there.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use muster_proto::registration::{VirtualEndpoint, VirtualPort, VirtualService};

use super::known::{Key, Known};
use crate::control::Settings;

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    fn read(text: &str) -> Option<Self> {
        match text {
            "TCP" => Some(Self::Tcp),
            "UDP" => Some(Self::Udp),
            "SCTP" => Some(Self::Sctp),
            _ => None,
        }
    }

    /// Its number in IP.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
}

/// What connections are made to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Frontend {
    /// A virtual IP, with the port of a Service.
    pub address: SocketAddr,
    /// The protocol of the port.
    pub protocol: Protocol,
}

/// What becomes of connections to a [`Frontend`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// They are translated to one of these; never empty.
    Endpoints {
        /// Where to.
        endpoints: Vec<SocketAddr>,
        /// For how long a client stays with the endpoint that it had last.
        affinity: Option<Duration>,
    },
    /// There is no endpoint: they are refused.
    Refuse,
    /// There is no endpoint on this host, and others are not to be used: they get no answer.
    Drop,
}

/// What bears on the choice of endpoints on this host, and on how they are reached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// The addresses of this host's device.
    pub own: BTreeSet<IpAddr>,
    /// Virtual addresses of the hosts that it speaks for, and where those are reached from here.
    pub hosts: BTreeMap<IpAddr, IpAddr>,
    /// The zone that the host is in; empty if none.
    pub zone: String,
}

impl Place {
    /// Of a host with these settings.
    pub fn new(settings: &Settings) -> Self {
        let hosts = settings.proxied.iter().filter_map(|host| Some((host.translated()?, host.lan_address)));
        Self {
            own: settings.virtual_addresses().into_iter().collect(),
            hosts: hosts.collect(),
            zone: settings.zone.clone(),
        }
    }

    /// Whether an endpoint is on this host, or on one that it speaks for.
    fn is_here(&self, address: &IpAddr) -> bool {
        self.own.contains(address) || self.hosts.contains_key(address)
    }

    /// Where an endpoint is reached: connections are translated once, and so straight to there.
    fn translated(&self, endpoint: SocketAddr) -> SocketAddr {
        self.hosts.get(&endpoint.ip()).map_or(endpoint, |host| SocketAddr::new(*host, endpoint.port()))
    }
}

/// What was done to one frontend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Which one.
    pub frontend: Frontend,
    /// As it was.
    pub old: Option<Target>,
    /// As it is.
    pub new: Option<Target>,
}

/// All frontends, with the Service that each belongs to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    targets: BTreeMap<Frontend, Target>,
    /// Endpoints of all targets.
    endpoints: usize,
    /// The Services that claim a frontend, the first of which has it.
    claims: BTreeMap<Frontend, BTreeSet<Key>>,
    frontends_of: BTreeMap<Key, BTreeSet<Frontend>>,
}

impl Table {
    /// All frontends.
    pub fn iter(&self) -> impl Iterator<Item = (&Frontend, &Target)> {
        self.targets.iter()
    }

    /// How many frontends there are.
    pub fn len(&self) -> usize {
        self.targets.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.targets.is_empty()
    }

    /// How many endpoints all frontends have together.
    pub fn endpoints(&self) -> usize {
        self.endpoints
    }

    /// The Services that have frontends.
    pub fn services(&self) -> impl Iterator<Item = &Key> {
        self.frontends_of.keys()
    }

    /// What becomes of connections to `frontend`.
    pub fn get(&self, frontend: &Frontend) -> Option<&Target> {
        self.targets.get(frontend)
    }

    /// Makes the frontends of `services` agree with what is known of them; returns what has changed.
    pub fn update(&mut self, known: &Known, place: &Place, services: &BTreeSet<Key>) -> Vec<Change> {
        let mut touched = BTreeSet::new();
        for key in services {
            let new: BTreeSet<Frontend> =
                known.service(key).into_iter().flat_map(frontends).map(|(frontend, _)| frontend).collect();
            let old = self.frontends_of.remove(key).unwrap_or_default();
            for gone in old.difference(&new) {
                if let Some(claims) = self.claims.get_mut(gone) {
                    claims.remove(key);
                }
            }
            for frontend in &new {
                self.claims.entry(*frontend).or_default().insert(key.clone());
            }
            touched.extend(old.iter().chain(&new).copied());
            if !new.is_empty() {
                self.frontends_of.insert(key.clone(), new);
            }
        }
        let mut changes = Vec::new();
        for frontend in touched {
            let claims = self.claims.get(&frontend).filter(|claims| !claims.is_empty());
            let first = claims.and_then(BTreeSet::first).cloned();
            if first.is_none() {
                self.claims.remove(&frontend);
            }
            let old = self.targets.get(&frontend).cloned();
            let new = first.and_then(|key| target(known, place, &key, frontend, old.as_ref()));
            if old == new {
                continue;
            }
            self.endpoints = self.endpoints + endpoints(new.as_ref()).len() - endpoints(old.as_ref()).len();
            match &new {
                Some(new) => drop(self.targets.insert(frontend, new.clone())),
                None => drop(self.targets.remove(&frontend)),
            }
            changes.push(Change { frontend, old, new });
        }
        changes
    }
}

/// The frontends of a Service, each with its port.
fn frontends(service: &VirtualService) -> impl Iterator<Item = (Frontend, &VirtualPort)> {
    let addresses = service.addresses.iter().filter_map(|text| text.parse::<IpAddr>().ok());
    addresses.flat_map(|address| {
        service.ports.iter().filter_map(move |port| {
            let protocol = Protocol::read(&port.protocol)?;
            let number = u16::try_from(port.port).ok()?;
            Some((Frontend { address: SocketAddr::new(address, number), protocol }, port))
        })
    })
}

fn target(
    known: &Known,
    place: &Place,
    key: &Key,
    frontend: Frontend,
    old: Option<&Target>,
) -> Option<Target> {
    let service = known.service(key)?;
    let (_, port) = frontends(service).find(|(found, _)| *found == frontend)?;
    let is_ipv4 = frontend.address.is_ipv4();
    let mut found: Vec<(SocketAddr, &VirtualEndpoint)> = Vec::new();
    for slice in known.endpoints(key) {
        let matches = |other: &&VirtualPort| other.name == port.name && other.protocol == port.protocol;
        let Some(number) = slice.ports.iter().find(matches).and_then(|port| u16::try_from(port.port).ok())
        else {
            continue;
        };
        let addresses = slice.endpoints.iter().filter_map(|endpoint| {
            let address: IpAddr = endpoint.address.parse().ok()?;
            (address.is_ipv4() == is_ipv4).then_some((SocketAddr::new(address, number), endpoint))
        });
        found.extend(addresses);
    }
    // Where nothing is ready, what still answers while it stops is better than nothing.
    if found.iter().any(|(_, endpoint)| endpoint.is_ready) {
        found.retain(|(_, endpoint)| endpoint.is_ready);
    } else {
        found.retain(|(_, endpoint)| endpoint.is_serving);
    }
    if found.is_empty() {
        return Some(Target::Refuse);
    }
    let is_here = |(address, _): &(SocketAddr, &VirtualEndpoint)| place.is_here(&address.ip());
    let is_near = |(_, endpoint): &(SocketAddr, &VirtualEndpoint)| endpoint.zone == place.zone;
    if service.is_local {
        found.retain(is_here);
        if found.is_empty() {
            return Some(Target::Drop);
        }
    } else if service.prefers_host && found.iter().any(is_here) {
        found.retain(is_here);
    } else if (service.prefers_zone || service.prefers_host)
        && !place.zone.is_empty()
        && found.iter().any(is_near)
    {
        found.retain(is_near);
    }
    let wanted: BTreeSet<SocketAddr> =
        found.into_iter().map(|(address, _)| place.translated(address)).collect();
    let affinity =
        (service.affinity_seconds != 0).then(|| Duration::from_secs(service.affinity_seconds.into()));
    Some(Target::Endpoints { endpoints: arrange(endpoints(old), wanted), affinity })
}

/// The endpoints of a target, by their places.
pub(super) fn endpoints(target: Option<&Target>) -> &[SocketAddr] {
    match target {
        Some(Target::Endpoints { endpoints, .. }) => endpoints,
        _ => &[],
    }
}

/// Puts endpoints into an order in which as many as can be stay where they were: the last ones take the places of those
/// that are gone.
fn arrange(before: &[SocketAddr], mut wanted: BTreeSet<SocketAddr>) -> Vec<SocketAddr> {
    let mut places: Vec<Option<SocketAddr>> = before.iter().map(|endpoint| wanted.take(endpoint)).collect();
    let mut new = wanted.into_iter();
    for place in &mut places {
        if place.is_none() {
            *place = new.next();
        }
    }
    places.extend(new.map(Some));
    let mut i = 0;
    while i < places.len() {
        if places[i].is_some() {
            i += 1;
        } else {
            // From behind, and past those that are empty themselves.
            let last = places.pop().flatten();
            if let (Some(last), Some(place)) = (last, places.get_mut(i)) {
                *place = Some(last);
            }
        }
    }
    places.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn endpoint(n: u8) -> SocketAddr {
        ([100, 64, 0, n], 80).into()
    }

    proptest! {
        /// All that are wanted are there once; those that stay have their place, unless there are fewer places.
        #[test]
        fn endpoints_keep_their_places(
            before in proptest::collection::btree_set(0..20_u8, 0..12),
            wanted in proptest::collection::btree_set(0..20_u8, 0..12),
        ) {
            let before: Vec<SocketAddr> = before.into_iter().rev().map(endpoint).collect();
            let wanted: BTreeSet<SocketAddr> = wanted.into_iter().map(endpoint).collect();
            let after = arrange(&before, wanted.clone());
            prop_assert_eq!(after.len(), wanted.len());
            prop_assert_eq!(after.iter().copied().collect::<BTreeSet<_>>(), wanted.clone());
            for (i, endpoint) in before.iter().enumerate().take(after.len()) {
                prop_assert!(!wanted.contains(endpoint) || after[i] == *endpoint);
            }
        }
    }
}
