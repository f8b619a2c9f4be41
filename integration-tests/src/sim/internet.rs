//! What lies between hosts: LANs with NATs towards the internet, and the way of a datagram through them. Addresses of
//! LANs are unique at their site alone: two sites may use the same ones.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use super::nat::Nat;
use crate::nat::Kind;

/// How long mappings of the NATs that there are live (RFC 4787, REQ-5, wants more than all of these).
const TIMEOUTS: [u64; 3] = [30, 60, 120];
/// LANs with different addresses.
const SUBNETS: usize = 3;
/// The port of every host's tunnel.
const PORT: u16 = 7551;

/// A LAN, and what connects it.
#[derive(Debug)]
pub(super) struct Site {
    pub(super) kind: Kind,
    /// From the inside out.
    pub(super) nats: Vec<Nat>,
    /// Its firewall drops UDP, as those of its kind do for good.
    pub(super) is_blocked: bool,
    subnet: u8,
}

/// Where a host is plugged in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) kind: Kind,
    /// The LAN, unless it is at the internet itself.
    pub(super) site: Option<usize>,
    /// Addresses of its own, with the port of its tunnel.
    pub(super) addresses: Vec<SocketAddr>,
}

impl Place {
    /// At the internet, with an IPv4 address.
    pub(super) fn open(net: u8, host: u8) -> Self {
        let addresses = vec![SocketAddr::from(([10, 0, net, host], PORT))];
        Self { kind: Kind::Open, site: None, addresses }
    }

    /// At the internet, with addresses of the families that hosts of this kind have.
    pub(super) fn public(kind: Kind, net: u8, host: u8) -> Self {
        let mut place = Self::open(net, host);
        place.kind = kind;
        if !kind.has_ipv4() {
            place.addresses.clear();
        }
        if kind.has_ipv6() {
            let address = [0x2001, 0xdb8, 0, net.into(), 0, 0, 0, host.into()];
            place.addresses.push(SocketAddr::from((address, PORT)));
        }
        place
    }

    /// Its address of the family of `to`.
    pub(super) fn address_towards(&self, to: SocketAddr) -> Option<SocketAddr> {
        self.addresses.iter().copied().find(|address| address.is_ipv4() == to.is_ipv4())
    }
}

/// All LANs.
#[derive(Debug, Default)]
pub(super) struct Internet {
    pub(super) sites: Vec<Site>,
}

/// How far a datagram has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// It stays on the LAN of this site.
    Lan(usize),
    /// It is at the internet, and comes from there.
    Internet(SocketAddr),
}

impl Internet {
    /// Adds a LAN that is connected as hosts of `kind` are.
    pub(super) fn add_site(&mut self, kind: Kind, chance: usize) {
        let number = self.sites.len();
        let timeout = Duration::from_secs(TIMEOUTS[chance % TIMEOUTS.len()]);
        let mut outside = vec![IpAddr::from([203, 0, 113, number as u8 + 1])];
        if kind == Kind::NatBehindNat {
            outside.insert(0, IpAddr::from([172, 16, number as u8, 2]));
        }
        let nats = outside.into_iter().filter_map(|outside| Nat::of_kind(kind.nat(), outside, timeout));
        let (nats, is_blocked) = (nats.collect(), kind == Kind::UdpBlocked);
        self.sites.push(Site { kind, nats, is_blocked, subnet: (number % SUBNETS) as u8 });
    }

    /// A place at a LAN.
    pub(super) fn place(&self, site: usize, host: u8) -> Place {
        let address = SocketAddr::from(([192, 168, self.sites[site].subnet, host], PORT));
        Place { kind: self.sites[site].kind, site: Some(site), addresses: vec![address] }
    }

    /// What becomes of a datagram that leaves a host: `None` if it gets nowhere.
    pub(super) fn leave(&mut self, from: &Place, to: SocketAddr, now: Duration) -> Option<Way> {
        let mut source = from.address_towards(to)?;
        let Some(number) = from.site else {
            return (!is_private(to.ip())).then_some(Way::Internet(source));
        };
        let site = &mut self.sites[number];
        if let IpAddr::V4(address) = to.ip()
            && address.octets()[..3] == [192, 168, site.subnet]
        {
            return Some(Way::Lan(number));
        }
        if site.is_blocked || is_private(to.ip()) {
            return None;
        }
        for nat in &mut site.nats {
            source = nat.outbound(source, to, now);
        }
        // What comes back from a NAT's own address is dropped there: they do no hairpinning.
        (site.nats.last().map(|nat| nat.outside) != Some(to.ip())).then_some(Way::Internet(source))
    }

    /// The site and inside address that a datagram at the internet is for, if it gets that far. Without a site, it is
    /// `to` itself.
    pub(super) fn arrive(
        &self,
        from: SocketAddr,
        to: SocketAddr,
        now: Duration,
    ) -> Option<(Option<usize>, SocketAddr)> {
        let is_it = |site: &Site| site.nats.last().is_some_and(|nat| nat.outside == to.ip());
        let Some(number) = self.sites.iter().position(is_it) else {
            return (!is_private(to.ip())).then_some((None, to));
        };
        let site = &self.sites[number];
        let mut inside = Some(to).filter(|_| !site.is_blocked);
        for nat in site.nats.iter().rev() {
            inside = nat.inbound(inside?, from, now);
        }
        Some((Some(number), inside?))
    }

    /// The address that connections of a host towards `to` come from.
    pub(super) fn outside(&self, place: &Place, to: SocketAddr) -> Option<IpAddr> {
        let own = place.address_towards(to)?.ip();
        let nat = place.site.and_then(|site| self.sites[site].nats.last());
        Some(nat.map_or(own, |nat| nat.outside))
    }
}

/// Leads nowhere at the internet.
fn is_private(address: IpAddr) -> bool {
    let IpAddr::V4(address) = address else { return false };
    matches!(address.octets(), [192, 168, ..] | [172, 16, ..])
}

/// Whether two hosts can reach each other without a director.
pub(super) fn direct_possible(a: &Place, b: &Place) -> bool {
    (a.site.is_some() && a.site == b.site) || crate::nat::direct_possible(a.kind, b.kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn datagrams_pass_both_nats_both_ways_and_stay_on_their_lan() {
        let mut internet = Internet::default();
        for kind in [Kind::NatBehindNat, Kind::UdpBlocked, Kind::FullCone] {
            internet.add_site(kind, 0);
        }
        let (now, far) = (Duration::ZERO, at("198.51.100.1:7501"));
        let place = internet.place(0, 9);
        let Some(Way::Internet(outside)) = internet.leave(&place, far, now) else { panic!("it got nowhere") };
        assert_eq!(outside.ip(), IpAddr::from([203, 0, 113, 1]));
        assert_eq!(internet.outside(&place, far), Some(outside.ip()));
        assert_eq!(internet.arrive(far, outside, now), Some((Some(0), place.addresses[0])));
        assert_eq!(internet.arrive(at("198.51.100.1:9"), outside, now), None);
        assert_eq!(internet.leave(&place, at("192.168.0.8:7551"), now), Some(Way::Lan(0)));
        assert_eq!(internet.leave(&place, at("192.168.1.8:7551"), now), None);
        assert_eq!(internet.leave(&place, outside, now), None, "no hairpinning");
        assert_eq!(internet.leave(&place, at("[2001:db8::1]:7501"), now), None);
        assert_eq!(internet.leave(&internet.place(1, 9), far, now), None);
        let public = Place::public(Kind::DualStack, 1, 2);
        assert_eq!(internet.leave(&public, far, now), Some(Way::Internet(at("10.0.1.2:7551"))));
        assert_eq!(internet.leave(&public, at("192.168.0.9:7551"), now), None);
        assert_eq!(internet.arrive(far, at("10.0.1.2:7551"), now), Some((None, at("10.0.1.2:7551"))));
        assert!(direct_possible(&internet.place(1, 2), &internet.place(1, 3)));
        assert!(!direct_possible(&internet.place(1, 2), &public));
    }
}
