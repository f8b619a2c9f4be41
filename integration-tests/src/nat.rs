//! How hosts of a test are connected: the kinds of NAT and firewall there are in practice, between which of them two
//! hosts can reach each other without a relay, and sites of each kind in a lab.

use crate::{
    Host, Lab, Result, Switch,
    router::{Nat, Router},
};

/// How a host is connected to the internet.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Kind {
    /// With a public IPv4 address of its own.
    Open,
    /// Behind a NAT that lets in whatever comes to a port that is mapped.
    FullCone,
    /// Behind a NAT that lets in what comes from addresses that have been sent to.
    AddressRestricted,
    /// Behind a NAT that lets in answers only.
    PortRestricted,
    /// Behind a NAT with a port for every destination.
    Symmetric,
    /// Behind two NATs in a row, both port-restricted, as where the provider has one, too.
    NatBehindNat,
    /// Behind a NAT whose firewall drops UDP.
    UdpBlocked,
    /// With a public IPv6 address, and no IPv4.
    Ipv6Only,
    /// With public addresses of both families.
    DualStack,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Open,
        Self::FullCone,
        Self::AddressRestricted,
        Self::PortRestricted,
        Self::Symmetric,
        Self::NatBehindNat,
        Self::UdpBlocked,
        Self::Ipv6Only,
        Self::DualStack,
    ];

    /// A name for hosts of this kind.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::FullCone => "cone",
            Self::AddressRestricted => "address",
            Self::PortRestricted => "port",
            Self::Symmetric => "symmetric",
            Self::NatBehindNat => "double",
            Self::UdpBlocked => "blocked",
            Self::Ipv6Only => "six",
            Self::DualStack => "dual",
        }
    }

    /// Whether hosts of this kind have IPv4.
    pub const fn has_ipv4(self) -> bool {
        !matches!(self, Self::Ipv6Only)
    }

    /// Whether hosts of this kind have IPv6.
    pub const fn has_ipv6(self) -> bool {
        matches!(self, Self::Ipv6Only | Self::DualStack)
    }

    /// What its router does, for those that are behind one.
    pub const fn nat(self) -> Nat {
        match self {
            Self::Open | Self::Ipv6Only | Self::DualStack => Nat::None,
            Self::FullCone => Nat::FullCone,
            Self::AddressRestricted => Nat::AddressRestricted,
            Self::PortRestricted | Self::NatBehindNat | Self::UdpBlocked => Nat::PortRestricted,
            Self::Symmetric => Nat::Symmetric,
        }
    }
}

/// Whether two hosts at different sites can reach each other directly, once a third has told them of each other's
/// addresses (RFC 5128, 3.2 to 3.4). Of two NATs, one has to send to the other's port before it is known; that works
/// unless the sender takes a new port for it that the other does not let in.
pub fn direct_possible(a: Kind, b: Kind) -> bool {
    let common_family = a.has_ipv4() && b.has_ipv4() || a.has_ipv6() && b.has_ipv6();
    let is_strict = |kind: Kind| matches!(kind.nat(), Nat::PortRestricted | Nat::Symmetric);
    let ports_unknown =
        a.nat() == Nat::Symmetric && is_strict(b) || b.nat() == Nat::Symmetric && is_strict(a);
    let is_blocked = a == Kind::UdpBlocked || b == Kind::UdpBlocked;
    common_family && !ports_unknown && !is_blocked
}

/// One host, and what is between it and the internet of a lab.
pub struct Site {
    /// The host.
    pub host: Host,
    /// How it is connected.
    pub kind: Kind,
    /// Its routers, the one at the internet first; none for hosts with public addresses.
    pub routers: Vec<Router>,
    /// Where the host is plugged in.
    lan: Option<Switch>,
    number: u8,
}

/// The interface of a site's router towards the internet: its second.
const OUTSIDE: &str = "eth1";

impl Site {
    /// Makes site `number`, at most 199, with a host called `name`, on `internet`, which is 198.51.100.0/24 and
    /// 2001:db8::/64. Its public address, if it has one, is 198.51.100.`number`.
    pub fn new(lab: &Lab, internet: &Switch, name: &str, kind: Kind, number: u8) -> Result<Self> {
        let host = lab.host(name)?;
        let (four, six) = (format!("198.51.100.{number}/24"), format!("2001:db8::{number}/64"));
        let mut site = Self { host, kind, routers: Vec::new(), lan: None, number };
        if kind.nat() == Nat::None {
            let addresses = [(kind.has_ipv4(), four.as_str()), (kind.has_ipv6(), six.as_str())];
            let addresses: Vec<&str> =
                addresses.into_iter().filter(|(has, _)| *has).map(|(_, a)| a).collect();
            internet.plug(&site.host, &addresses)?;
            // Nobody answers there; it marks the interface that leads to the internet.
            if kind.has_ipv4() {
                site.host.route("default via 198.51.100.254")?;
            }
            if kind.has_ipv6() {
                site.host.route("default via 2001:db8::fe")?;
            }
            return Ok(site);
        }
        let mut upstream = (None, four, "198.51.100.254".to_owned());
        if kind == Kind::NatBehindNat {
            let provider = lab.switch(&format!("{name}-provider"))?;
            let inside = format!("10.9.{number}.2");
            let gateway = format!("10.9.{number}.1");
            site.add_router(
                lab,
                &format!("{name}-outer"),
                internet,
                &upstream,
                &provider,
                &gateway,
                &inside,
            )?;
            upstream = (Some(provider), format!("{inside}/24"), gateway);
        }
        let lan = lab.switch(&format!("{name}-lan"))?;
        let (inside, gateway) = (format!("192.168.{number}.2"), format!("192.168.{number}.1"));
        let above = upstream.0.take();
        site.add_router(
            lab,
            &format!("{name}-router"),
            above.as_ref().unwrap_or(internet),
            &upstream,
            &lan,
            &gateway,
            &inside,
        )?;
        if kind == Kind::UdpBlocked {
            site.routers.iter().try_for_each(Router::block_udp)?;
        }
        lan.plug(&site.host, &[&format!("{inside}/24")])?;
        site.host.route(&format!("default via {gateway}"))?;
        site.lan = Some(lan);
        Ok(site)
    }

    /// A further host on the site's LAN, number 3 to 250 there. Only for kinds whose NAT takes several hosts.
    pub fn add_host(&self, lab: &Lab, name: &str, last_octet: u8) -> Result<Host> {
        let host = lab.host(name)?;
        self.plug(&host, last_octet)?;
        Ok(host)
    }

    /// Plugs a host into the site's LAN, as number 3 to 250 there. It must have no other default route.
    pub fn plug(&self, host: &Host, last_octet: u8) -> Result {
        if let Some(lan) = &self.lan {
            lan.plug(host, &[&format!("192.168.{}.{last_octet}/24", self.number)])?;
            host.route(&format!("default via 192.168.{}.1", self.number))?;
        }
        Ok(())
    }

    /// Has the NAT at the internet forget its mappings; later ones have other ports.
    pub fn rebind(&self) -> Result {
        self.routers.first().map_or(Ok(()), |router| router.rebind(self.kind.nat(), OUTSIDE))
    }

    #[expect(clippy::too_many_arguments, reason = "both sides of a router")]
    fn add_router(
        &mut self,
        lab: &Lab,
        name: &str,
        above: &Switch,
        (_, address, default): &(Option<Switch>, String, String),
        below: &Switch,
        gateway: &str,
        inside: &str,
    ) -> Result {
        let host = lab.host(name)?;
        below.plug(&host, &[&format!("{gateway}/24")])?;
        let outside = above.plug(&host, &[address])?;
        host.route(&format!("default via {default}"))?;
        let router = Router::new(host)?;
        router.nat(self.kind.nat(), &outside, Some(inside))?;
        self.routers.push(router);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of the other kinds each can reach directly.
    #[test]
    fn what_is_possible_is_symmetric_and_as_known() {
        let reached = Kind::ALL.map(|a| {
            (a.name(), Kind::ALL.iter().filter(|b| direct_possible(a, **b)).map(|b| b.name()).collect())
        });
        let four = ["open", "cone", "address", "port", "symmetric", "double", "dual"];
        let without_strict = ["open", "cone", "address", "dual"];
        let without_symmetric = ["open", "cone", "address", "port", "double", "dual"];
        let expected: [(&str, Vec<&str>); 9] = [
            ("open", four.into()),
            ("cone", four.into()),
            ("address", four.into()),
            ("port", without_symmetric.into()),
            ("symmetric", without_strict.into()),
            ("double", without_symmetric.into()),
            ("blocked", vec![]),
            ("six", vec!["six", "dual"]),
            ("dual", vec!["open", "cone", "address", "port", "symmetric", "double", "six", "dual"]),
        ];
        assert_eq!(reached, expected);
        for (a, b) in Kind::ALL.iter().flat_map(|a| Kind::ALL.map(|b| (*a, b))) {
            assert_eq!(direct_possible(a, b), direct_possible(b, a), "{a:?} {b:?}");
        }
    }
}
