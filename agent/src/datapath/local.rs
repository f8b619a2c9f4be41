//! The addresses whose packets this device sends and takes: its own, and those of hosts and subnets that it carries.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use rustc_hash::FxHashSet;

#[derive(Debug, Default)]
pub(super) struct LocalAddresses {
    /// One or two, as a rule, and what nearly every packet is from and to.
    own: Vec<IpAddr>,
    carried: FxHashSet<IpAddr>,
    subnets: Vec<IpNet>,
}

impl LocalAddresses {
    pub(super) fn new(own: Vec<IpAddr>) -> Self {
        Self { own, ..Self::default() }
    }

    pub(super) fn set_own(&mut self, own: Vec<IpAddr>) {
        self.own = own;
    }

    pub(super) fn carry(&mut self, addresses: Vec<IpAddr>, subnets: Vec<IpNet>) {
        self.carried = addresses.into_iter().collect();
        self.subnets = subnets;
    }

    pub(super) fn contains(&self, address: &IpAddr) -> bool {
        self.own.contains(address)
            || self.carried.contains(address)
            || self.subnets.iter().any(|subnet| subnet.contains(address))
    }

    /// Whether a packet that a peer has sent, whose header is valid, is for one of them.
    pub(super) fn is_destination(&self, packet: &[u8]) -> bool {
        let v4 = || packet.get(16..)?.first_chunk::<4>().map(|octets| Ipv4Addr::from(*octets).into());
        let v6 = || packet.get(24..)?.first_chunk::<16>().map(|octets| Ipv6Addr::from(*octets).into());
        let destination = match packet.first().map(|first| first >> 4) {
            Some(4) => v4(),
            Some(6) => v6(),
            _ => None,
        };
        destination.is_some_and(|destination| self.contains(&destination))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_and_carried_addresses_are_told_from_others() {
        let mut local = LocalAddresses::new(vec!["100.64.0.1".parse().unwrap(), "fd00::1".parse().unwrap()]);
        local.carry(vec!["100.64.0.9".parse().unwrap()], vec!["192.168.7.0/24".parse().unwrap()]);
        let packet = |to: IpAddr| match to {
            IpAddr::V4(to) => [&[0x45; 16][..], &to.octets()].concat(),
            IpAddr::V6(to) => [&[0x60; 24][..], &to.octets()].concat(),
        };
        for (address, is_local) in [
            ("100.64.0.1", true),
            ("fd00::1", true),
            ("100.64.0.9", true),
            ("192.168.7.200", true),
            ("192.168.8.1", false),
            ("100.64.0.2", false),
            ("fd00::2", false),
        ] {
            let address: IpAddr = address.parse().unwrap();
            assert_eq!(local.contains(&address), is_local, "{address}");
            assert_eq!(local.is_destination(&packet(address)), is_local, "{address}");
        }
        for bad in [&[][..], &[0x45; 19], &[0x60; 39], &[0x00; 60]] {
            assert!(!local.is_destination(bad));
        }
        local.set_own(vec![]);
        local.carry(vec![], vec![]);
        assert!(
            !local.contains(&"100.64.0.1".parse().unwrap())
                && !local.contains(&"100.64.0.9".parse().unwrap())
        );
    }
}
