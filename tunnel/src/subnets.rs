//! Which peer carries which subnet: the longest prefix that has an address in it. Asked only for addresses that are not
//! a peer's own.

use std::net::IpAddr;

use ipnet::IpNet;
use rustc_hash::FxHashMap;

use crate::shared::PeerId;

/// All subnets of one family and length.
#[derive(Debug)]
struct Level {
    is_ipv4: bool,
    prefix_len: u8,
    /// By network address.
    peers: FxHashMap<IpAddr, PeerId>,
}

/// A table of prefixes. A look into it costs one hash for each length that there is, whatever the number of subnets.
#[derive(Debug, Default)]
pub(crate) struct Subnets {
    /// Longest first.
    levels: Vec<Level>,
}

impl Subnets {
    /// The peer that carries `address`.
    pub(crate) fn find(&self, address: IpAddr) -> Option<PeerId> {
        let levels = self.levels.iter().filter(|level| level.is_ipv4 == address.is_ipv4());
        levels.filter_map(|level| level.peers.get(&network(address, level.prefix_len)?)).next().copied()
    }

    /// The peer that carries exactly `subnet`.
    pub(crate) fn get(&self, subnet: &IpNet) -> Option<PeerId> {
        let level = self.levels.iter().find(|level| is_of(level, subnet))?;
        level.peers.get(&subnet.network()).copied()
    }

    /// Gives `subnet` to a peer; returns the one that had it.
    pub(crate) fn insert(&mut self, subnet: &IpNet, peer: PeerId) -> Option<PeerId> {
        let (is_ipv4, prefix_len) = (subnet.addr().is_ipv4(), subnet.prefix_len());
        let at = self.levels.partition_point(|level| {
            level.prefix_len > prefix_len || { level.prefix_len == prefix_len && !level.is_ipv4 && is_ipv4 }
        });
        if !self.levels.get(at).is_some_and(|level| is_of(level, subnet)) {
            self.levels.insert(at, Level { is_ipv4, prefix_len, peers: FxHashMap::default() });
        }
        self.levels.get_mut(at)?.peers.insert(subnet.network(), peer)
    }

    /// Takes `subnet` away from whoever has it.
    pub(crate) fn remove(&mut self, subnet: &IpNet) {
        if let Some(at) = self.levels.iter().position(|level| is_of(level, subnet))
            && let Some(level) = self.levels.get_mut(at)
        {
            level.peers.remove(&subnet.network());
            if level.peers.is_empty() {
                self.levels.remove(at);
            }
        }
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        assert!(self.levels.iter().all(|level| !level.peers.is_empty()));
        self.levels.iter().map(|level| level.peers.len()).sum()
    }
}

fn is_of(level: &Level, subnet: &IpNet) -> bool {
    level.is_ipv4 == subnet.addr().is_ipv4() && level.prefix_len == subnet.prefix_len()
}

fn network(address: IpAddr, prefix_len: u8) -> Option<IpAddr> {
    IpNet::new(address, prefix_len).ok().map(|subnet| subnet.network())
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;

    /// Addresses that share long prefixes, so that subnets nest.
    fn address() -> impl Strategy<Value = IpAddr> {
        let octet = || prop::sample::select(vec![0u8, 1, 2, 127, 128, 255]);
        (any::<bool>(), octet(), octet(), octet()).prop_map(|(is_ipv4, b, c, d)| {
            if is_ipv4 {
                Ipv4Addr::new(10, b, c, d).into()
            } else {
                let (high, low) = (u16::from(b) << 8 | u16::from(c), u16::from(d));
                Ipv6Addr::new(0xfd00, high, 0, 0, 0, 0, low, low).into()
            }
        })
    }

    fn subnet() -> impl Strategy<Value = IpNet> {
        (address(), any::<u8>()).prop_map(|(address, bits)| {
            let longest = if address.is_ipv4() { 32 } else { 128 };
            IpNet::new(address, bits % (longest + 1)).unwrap().trunc()
        })
    }

    proptest! {
        #[test]
        fn it_finds_what_a_plain_list_finds(
            steps in prop::collection::vec((subnet(), prop::option::weighted(0.7, 0u32..5)), 0..60),
            asked in prop::collection::vec(address(), 0..60),
        ) {
            let (mut table, mut list) = (Subnets::default(), Vec::<(IpNet, PeerId)>::new());
            for (subnet, peer) in steps {
                let had = list.iter().position(|(s, _)| *s == subnet).map(|at| list.remove(at).1);
                prop_assert_eq!(table.get(&subnet), had);
                match peer {
                    Some(peer) => {
                        prop_assert_eq!(table.insert(&subnet, peer), had);
                        list.push((subnet, peer));
                    }
                    None => table.remove(&subnet),
                }
                prop_assert_eq!(table.len(), list.len());
            }
            for address in asked {
                let longest = list.iter().filter(|(s, _)| s.contains(&address)).max_by_key(|(s, _)| s.prefix_len());
                prop_assert_eq!(table.find(address), longest.map(|(_, peer)| *peer), "{}", address);
            }
        }
    }
}
