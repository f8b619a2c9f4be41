//! The device's network interface as the host sees it: link, addresses and routes of the TUN device, programmed
//! through rtnetlink. Whatever Muster sets carries [`PROTOCOL`], so that it is found again after a crash.

use std::{
    collections::BTreeSet,
    fmt, io,
    net::{IpAddr, Ipv4Addr},
};

use ipnet::IpNet;

use netlink::{Link, Netlink, Route};
use rtnetlink::packet_route::link::InfoKind;

pub(crate) mod netlink;
mod watch;

/// The route protocol number (`ip route show proto 139`) and address protocol number of everything that Muster sets.
/// From the range that nobody has registered; see `/etc/iproute2/rt_protos`.
pub const PROTOCOL: u8 = 139;

/// Where the agent's resolver listens unless configured otherwise: link-local, so that it collides with no network,
/// and the same on every host, as with Kubernetes' node-local DNS cache.
pub const RESOLVER_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 20, 10);

/// The MTU that fits into every ordinary path: Ethernet's 1500 less [`MTU_OVERHEAD`].
pub const MTU_DEFAULT: u32 = 1420;

/// The MTU that fits into Ethernet's largest usual frames, of 9000.
pub const MTU_JUMBO: u32 = 8920;

/// Metric of routes to networks that are not the device's own pools: a host that is in such a network itself, and so has
/// a route to it with a lower metric, goes on to use that.
const SUBNET_METRIC: u32 = 30_000;

/// What the tunnel adds to a packet: IPv6 (40), UDP (8) and WireGuard (32) headers.
pub const MTU_OVERHEAD: u32 = 80;

/// Smallest MTU that IPv6 works over (RFC 8200 section 5).
pub const MTU_MIN: u32 = 1280;

/// What an interface should look like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InterfaceConfig {
    /// Octets in the largest packet; at least [`MTU_MIN`].
    pub mtu: u32,
    /// The device's virtual addresses; at most one of a family is of use.
    pub addresses: Vec<IpAddr>,
    /// What is routed into the interface: the network's pools.
    pub routes: Vec<IpNet>,
    /// Where the resolver listens, if it needs an address of its own.
    pub resolver_address: Option<IpAddr>,
}

/// Something that the operator should know of, though the interface works.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Warning {
    /// The host already has a route to a part of a pool, or to more than it.
    PoolOverlap {
        /// The pool.
        pool: IpNet,
        /// The destination of the host's route.
        route: IpNet,
        /// The interface that the host's route leads to.
        interface: Option<String>,
    },
    /// The device has an IPv6 address, but the host has IPv6 switched off.
    Ipv6Disabled,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PoolOverlap { pool, route, interface } => {
                write!(f, "this host already routes {route}")?;
                if let Some(interface) = interface {
                    write!(f, " (to {interface})")?;
                }
                write!(
                    f,
                    ", which overlaps with the network's pool {pool}: addresses in both reach only one of the two; \
                     remove the route, or give the network another pool"
                )
            }
            Self::Ipv6Disabled => f.write_str(
                "IPv6 is switched off on this host, so the device's IPv6 address is not set; \
                 switch it on with `sysctl net.ipv6.conf.all.disable_ipv6=0`",
            ),
        }
    }
}

/// Why an interface could not be programmed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action}: {source}{}", remedy(source))]
pub struct InterfaceError {
    action: String,
    source: io::Error,
}

fn remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM) => "; run the agent as root or with CAP_NET_ADMIN",
        Some(libc::ENODEV) => "; something has removed the interface: restart the agent",
        _ => "",
    }
}

pub(crate) fn failed(action: impl Into<String>) -> impl FnOnce(io::Error) -> InterfaceError {
    let action = action.into();
    move |source| InterfaceError { action, source }
}

/// What [`sweep`] has removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Number of routes.
    pub routes: usize,
    /// Number of addresses.
    pub addresses: usize,
}

/// Removes routes and addresses with [`PROTOCOL`] that no running agent holds. To be called before the interface is
/// created. Those of a TUN device that some process holds belong to another agent on this host, and stay.
pub async fn sweep() -> Result<Swept, InterfaceError> {
    let mut netlink = Netlink::open().map_err(failed("open a netlink socket"))?;
    let links = netlink.links().await.map_err(failed("list the host's interfaces"))?;
    let stale = |link: Option<u32>| !links.iter().any(|l| Some(l.index) == link && held_by_a_process(l));
    let mut swept = Swept::default();
    for route in netlink.routes().await.map_err(failed("list the host's routes"))? {
        if route.protocol == PROTOCOL && stale(route.link) {
            let action = format!("remove the stale route to {}", route.destination);
            netlink.remove_route(route).await.map_err(failed(action))?;
            swept.routes += 1;
        }
    }
    for address in netlink.addresses().await.map_err(failed("list the host's addresses"))? {
        if address.protocol == Some(PROTOCOL) && stale(Some(address.link)) {
            let action = format!("remove the stale address {}", address.address);
            netlink.remove_address(address).await.map_err(failed(action))?;
            swept.addresses += 1;
        }
    }
    Ok(swept)
}

fn held_by_a_process(link: &Link) -> bool {
    link.kind == Some(InfoKind::Tun) && link.carrier
}

/// A programmed interface. It vanishes with its TUN device; dropping this changes nothing.
pub struct Interface {
    netlink: Netlink,
    name: String,
    index: u32,
}

impl Interface {
    /// Finds the interface `name`, programs it as `config` says and brings it up.
    pub async fn program(
        name: &str,
        config: &InterfaceConfig,
    ) -> Result<(Self, Vec<Warning>), InterfaceError> {
        let mut netlink = Netlink::open().map_err(failed("open a netlink socket"))?;
        let link = netlink.link_named(name).await.map_err(failed(format!("find interface {name}")))?;
        match netlink.no_generated_addresses(link.index).await {
            // No IPv6 at all in this kernel, or not on this interface.
            Err(e) if ipv6_disabled(&e) => {}
            result => result.map_err(failed(format!("keep link-local addresses off interface {name}")))?,
        }
        let mut interface = Self { netlink, name: name.to_owned(), index: link.index };
        let warnings = interface.update(config).await?;
        Ok((interface, warnings))
    }

    /// Makes the interface what `config` says, and touches only what differs: what it no longer lists is removed.
    pub async fn update(&mut self, config: &InterfaceConfig) -> Result<Vec<Warning>, InterfaceError> {
        let Self { netlink, name, index } = self;
        let index = *index;
        let mtu = config.mtu.max(MTU_MIN);
        netlink
            .set_mtu(index, mtu)
            .await
            .map_err(failed(format!("set the MTU of interface {name} to {mtu}")))?;
        let segments = segments_max(mtu);
        if let Err(error) = netlink.set_segments_max(index, segments).await {
            // Everything works without, but a super-packet then takes a large send and a small one.
            tracing::debug!(%error, name, segments, "cannot bound super-packets");
        }
        netlink.set_up(index).await.map_err(failed(format!("bring interface {name} up")))?;

        let mut warnings = self.update_addresses(config).await?;
        let ipv6 = !warnings.contains(&Warning::Ipv6Disabled);
        let wanted: BTreeSet<IpNet> = config
            .routes
            .iter()
            .map(IpNet::trunc)
            .filter(|route| ipv6 || route.network().is_ipv4())
            .collect();
        let overlaps = self.update_routes(&wanted, &config.addresses).await?;
        warnings.extend(overlaps);
        Ok(warnings)
    }

    /// Takes addresses and routes off the interface.
    pub async fn remove(mut self) -> Result<(), InterfaceError> {
        self.update_routes(&BTreeSet::new(), &[]).await?;
        let nothing =
            InterfaceConfig { mtu: MTU_MIN, addresses: vec![], routes: vec![], resolver_address: None };
        self.update_addresses(&nothing).await?;
        Ok(())
    }

    /// Name of the interface.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The kernel's number for the interface.
    pub fn index(&self) -> u32 {
        self.index
    }

    async fn update_addresses(&mut self, config: &InterfaceConfig) -> Result<Vec<Warning>, InterfaceError> {
        let Self { netlink, name, index } = self;
        let all = netlink.addresses().await.map_err(failed("list the host's addresses"))?;
        let wanted = |a: &IpAddr| config.addresses.contains(a) || config.resolver_address.as_ref() == Some(a);
        for old in all.into_iter().filter(|a| a.link == *index && !wanted(&a.address)) {
            let action = format!("remove address {} from interface {name}", old.address);
            netlink.remove_address(old).await.map_err(failed(action))?;
        }
        let mut warnings = Vec::new();
        let virtual_addresses = config.addresses.iter().map(|a| (*a, false));
        for (address, host_only) in virtual_addresses.chain(config.resolver_address.map(|a| (a, true))) {
            match netlink.add_address(*index, address, PROTOCOL, host_only).await {
                Err(e) if address.is_ipv6() && ipv6_disabled(&e) => warnings.push(Warning::Ipv6Disabled),
                result => result.map_err(failed(format!("set address {address} on interface {name}")))?,
            }
        }
        Ok(warnings)
    }

    async fn update_routes(
        &mut self,
        wanted: &BTreeSet<IpNet>,
        sources: &[IpAddr],
    ) -> Result<Vec<Warning>, InterfaceError> {
        let Self { netlink, name, index } = self;
        let routes = netlink.routes().await.map_err(failed("list the host's routes"))?;
        let links = netlink.links().await.map_err(failed("list the host's interfaces"))?;
        let warnings = overlaps(wanted, &routes, &links, *index);

        let source =
            |route: &IpNet| sources.iter().copied().find(|s| s.is_ipv4() == route.network().is_ipv4());
        let mut missing = wanted.clone();
        for old in routes.into_iter().filter(|r| r.protocol == PROTOCOL && r.link == Some(*index)) {
            let destination = old.destination;
            if wanted.contains(&destination) && old.source == source(&destination) {
                missing.remove(&destination);
            } else {
                let action = format!("remove the route to {destination} from interface {name}");
                netlink.remove_route(old).await.map_err(failed(action))?;
            }
        }
        for route in missing {
            let metric = if sources.iter().any(|s| route.contains(s)) { 0 } else { SUBNET_METRIC };
            match netlink.add_route(*index, route, source(&route), metric, PROTOCOL).await {
                // The host's own route to exactly this pool is left alone, and is among the warnings.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                result => result.map_err(failed(format!("route {route} to interface {name}")))?,
            }
        }
        Ok(warnings)
    }
}

fn ipv6_disabled(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EACCES | libc::EOPNOTSUPP | libc::EAFNOSUPPORT))
}

/// How many segments of a TCP stream leave the host's network stack at once: as many as fit, sealed, into one segmented
/// send, so that none is followed by another one for a small rest.
fn segments_max(mtu: u32) -> u32 {
    let sealed = mtu.saturating_add(muster_tunnel::OVERHEAD as u32);
    (muster_tunnel::RUN_OCTETS as u32 / sealed).clamp(1, muster_tunnel::RUN_DATAGRAMS as u32)
}

/// Where the host's own routes meet the pools. Default routes, split in two halves or not, are meant to be overridden
/// and do not count; neither do the routes of the interface `own`.
fn overlaps(pools: &BTreeSet<IpNet>, routes: &[Route], links: &[Link], own: u32) -> Vec<Warning> {
    let mut found = BTreeSet::new();
    for route in routes {
        if !route.unicast
            || route.local_table
            || route.destination.prefix_len() <= 1
            || route.link == Some(own)
        {
            continue;
        }
        for pool in pools {
            if pool.contains(&route.destination) || route.destination.contains(pool) {
                let interface = links.iter().find(|l| Some(l.index) == route.link).map(|l| l.name.clone());
                found.insert(Warning::PoolOverlap { pool: *pool, route: route.destination, interface });
            }
        }
    }
    found.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::{
        netlink::fixtures::{link, route},
        *,
    };

    #[test]
    fn super_packets_fit_a_send() {
        assert_eq!([1280, 1420, 8920, 65_535].map(segments_max), [49, 45, 7, 1]);
    }

    #[test]
    fn overlaps_are_found_in_both_directions_and_default_routes_do_not_count() {
        let pools: BTreeSet<IpNet> =
            ["100.64.0.0/11", "fd00:1::/48"].iter().map(|p| p.parse().expect("a prefix")).collect();
        let links = [link(2, "eth0", None), link(9, "muster0", Some(InfoKind::Tun))];
        let routes = [
            route("0.0.0.0/0", Some(2), 3),
            route("0.0.0.0/1", Some(2), 3),
            route("::/0", Some(2), 9),
            route("192.168.0.0/16", Some(2), 2),
            route("100.64.7.0/24", Some(2), 2),
            route("100.64.0.0/10", None, 4),
            route("fd00:1:0:5::/64", Some(2), 2),
            route("100.64.0.0/11", Some(9), PROTOCOL),
            Route { local_table: true, ..route("100.64.7.1/32", Some(2), 2) },
            Route { unicast: false, ..route("100.64.9.0/24", None, 4) },
        ];
        let found: Vec<_> = overlaps(&pools, &routes, &links, 9)
            .into_iter()
            .map(|w| match w {
                Warning::PoolOverlap { route, interface, .. } => (route.to_string(), interface),
                Warning::Ipv6Disabled => panic!("not asked for"),
            })
            .collect();
        let eth0 = Some("eth0".to_owned());
        assert_eq!(
            found,
            [
                ("100.64.0.0/10".into(), None),
                ("100.64.7.0/24".into(), eth0.clone()),
                ("fd00:1:0:5::/64".into(), eth0),
            ]
        );
    }

    #[test]
    fn another_muster_network_with_the_same_pool_is_an_overlap() {
        let pools = BTreeSet::from(["100.64.0.0/11".parse().expect("a prefix")]);
        let routes = [route("100.64.0.0/11", Some(7), PROTOCOL)];
        assert_eq!(overlaps(&pools, &routes, &[], 9).len(), 1);
    }

    #[test]
    fn errors_name_action_cause_and_remedy() {
        let error =
            failed("set the MTU of interface muster0 to 1420")(io::Error::from_raw_os_error(libc::EPERM));
        let text = error.to_string();
        assert!(text.contains("cannot set the MTU") && text.contains("CAP_NET_ADMIN"), "{text}");
    }

    #[test]
    fn only_a_held_tun_device_keeps_its_routes() {
        let tun = link(3, "muster1", Some(InfoKind::Tun));
        assert!(held_by_a_process(&tun));
        assert!(!held_by_a_process(&Link { carrier: false, ..tun }));
        assert!(!held_by_a_process(&link(4, "dummy0", Some(InfoKind::Dummy))));
    }
}
