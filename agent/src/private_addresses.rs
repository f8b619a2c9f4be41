//! The host's own addresses on its LANs, at which peers nearby may reach this device, best first.
//! Addresses of containers, of other tunnels, and of Muster itself are left out: they would lead nowhere or in circles.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use futures_util::StreamExt;
use ipnet::IpNet;
use rtnetlink::{MulticastGroup, packet_route::link::InfoKind};
use tokio::sync::watch;

use crate::interface::{
    InterfaceError, MTU_DEFAULT, MTU_JUMBO, MTU_MIN, MTU_OVERHEAD, failed,
    netlink::{Address, Link, Netlink},
};

/// Most addresses that a device offers.
pub const MAX: usize = 16;
/// How long the host must have been quiet before a change is looked at: interfaces come up in several steps. Meanwhile
/// nobody may reach a host that roams.
const QUIET: Duration = Duration::from_millis(50);
/// A host that is never quiet is looked at this often, in units of `QUIET`.
const QUIET_PERIODS_MAX: usize = 20;

/// Beginnings of the names of interfaces that container engines and hypervisors make for their own networks.
const CONTAINER_INTERFACES: [&str; 24] = [
    "docker",
    "podman",
    "cni",
    "flannel",
    "cali",
    "cilium",
    "lxc",
    "lxd",
    "incus",
    "virbr",
    "vnet",
    "vmnet",
    "vboxnet",
    "weave",
    "kube-",
    "nodelocaldns",
    "nerdctl",
    "crio",
    "ovs-",
    "genev_sys",
    "antrea",
    "tunl",
    "br-int",
    "br-tun",
];

/// What is never offered, beside what no host could use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exclusions {
    /// Name of the agent's own interface.
    pub interface: String,
    /// The network's pools.
    pub pools: Vec<IpNet>,
}

/// What the host is connected by.
struct Underlay {
    links: Vec<Link>,
    addresses: Vec<Address>,
    /// The interfaces that default routes lead to.
    uplinks: BTreeSet<u32>,
}

/// The addresses to offer now.
pub async fn list(exclusions: &Exclusions) -> Result<Vec<IpAddr>, InterfaceError> {
    Ok(choose(&underlay().await?, exclusions))
}

/// The inner MTU that fits into the narrowest of the interfaces through which this device and others may reach each
/// other, in octets: 1,420 for ordinary Ethernet, 8,920 at most, and 1,280 even where that does not fit.
pub async fn inner_mtu(exclusions: &Exclusions) -> Result<u32, InterfaceError> {
    Ok(choose_mtu(&underlay().await?, exclusions))
}

async fn underlay() -> Result<Underlay, InterfaceError> {
    let mut netlink = Netlink::open().map_err(failed("open a netlink socket"))?;
    let links = netlink.links().await.map_err(failed("list the host's interfaces"))?;
    let addresses = netlink.addresses().await.map_err(failed("list the host's addresses"))?;
    let mut uplinks = BTreeSet::new();
    // Of networks kept for documentation (RFC 5737, RFC 3849), so only a default route leads there. Nothing is sent.
    let outside: [IpAddr; 2] =
        [Ipv4Addr::new(198, 51, 100, 1).into(), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into()];
    for address in outside {
        uplinks.extend(netlink.route_to(address).await.map_err(failed("look up the default route"))?);
    }
    Ok(Underlay { links, addresses, uplinks })
}

/// The addresses to offer, now and after each change of the host's interfaces. Ends when the receiver is dropped.
pub async fn watch(exclusions: Exclusions) -> Result<watch::Receiver<Vec<IpAddr>>, InterfaceError> {
    let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
    let (connection, _, mut messages) =
        rtnetlink::new_multicast_connection(&groups).map_err(failed("listen for changes of interfaces"))?;
    let connection = tokio::spawn(connection);
    let (sender, receiver) = watch::channel(list(&exclusions).await?);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = sender.closed() => break,
                message = messages.next() => if message.is_none() { break },
            }
            for _ in 0..QUIET_PERIODS_MAX {
                tokio::time::sleep(QUIET).await;
                let mut changed = false;
                while messages.try_recv().is_ok() {
                    changed = true;
                }
                if !changed {
                    break;
                }
            }
            match list(&exclusions).await {
                Ok(addresses) => {
                    sender.send_if_modified(|old| {
                        let changed = *old != addresses;
                        *old = addresses;
                        changed
                    });
                }
                Err(error) => tracing::warn!(%error, "private addresses are as they were"),
            }
        }
        connection.abort();
    });
    Ok(receiver)
}

/// The addresses that may be offered, with their interfaces.
fn candidates<'a>(
    underlay: &'a Underlay,
    exclusions: &'a Exclusions,
) -> impl Iterator<Item = (&'a Link, IpAddr)> {
    let Underlay { links, addresses, .. } = underlay;
    addresses
        .iter()
        .filter(|a| a.global && a.lasting && usable(a.address))
        .filter(|a| !exclusions.pools.iter().any(|pool| pool.contains(&a.address)))
        .filter_map(|a| {
            let link = links.iter().find(|l| l.index == a.link)?;
            let offered = link.name != exclusions.interface && leads_to_a_lan(link, links);
            offered.then_some((link, a.address))
        })
}

/// Decides what to offer. Addresses of interfaces that default routes lead to come first.
fn choose(underlay: &Underlay, exclusions: &Exclusions) -> Vec<IpAddr> {
    let rank = |link: &Link, address: &IpAddr| {
        let is_uplink = underlay.uplinks.contains(&link.index);
        (!is_uplink, link.kind.is_some(), address.is_ipv6(), link.index)
    };
    let mut chosen: Vec<_> =
        candidates(underlay, exclusions).map(|(link, address)| (rank(link, &address), address)).collect();
    chosen.sort();
    let mut seen = BTreeSet::new();
    chosen.into_iter().map(|(_, address)| address).filter(|a| seen.insert(*a)).take(MAX).collect()
}

/// Decides on the inner MTU; that of ordinary Ethernet if there is no interface yet.
fn choose_mtu(underlay: &Underlay, exclusions: &Exclusions) -> u32 {
    let uplinks = underlay.links.iter().filter(|link| {
        underlay.uplinks.contains(&link.index) && !link.loopback && link.name != exclusions.interface
    });
    let mtus = candidates(underlay, exclusions).map(|(link, _)| link).chain(uplinks).map(|link| link.mtu);
    mtus.min().map_or(MTU_DEFAULT, |mtu| mtu.saturating_sub(MTU_OVERHEAD).clamp(MTU_MIN, MTU_JUMBO))
}

fn usable(address: IpAddr) -> bool {
    if address.is_unspecified() || address.is_loopback() || address.is_multicast() {
        return false;
    }
    match address {
        IpAddr::V4(a) => !a.is_link_local() && !a.is_broadcast(),
        IpAddr::V6(a) => !a.is_unicast_link_local() && a.to_ipv4_mapped().is_none(),
    }
}

/// Whether other hosts may be on the other side. Being a veth says nothing: a host that is a container has its LAN
/// there. A bridge is a LAN if one of its ports is hardware, or a bond or VLAN of such, and a container network otherwise.
/// Addresses of ports do not work: the bridge or bond takes their packets.
fn leads_to_a_lan(link: &Link, links: &[Link]) -> bool {
    if link.loopback || !link.up || !link.carrier || is_container_network(&link.name) {
        return false;
    }
    let controller = links.iter().find(|l| link.controller == Some(l.index)).and_then(|l| l.kind.as_ref());
    if matches!(controller, Some(InfoKind::Bridge | InfoKind::Bond | InfoKind::Team)) {
        return false;
    }
    match &link.kind {
        None => true,
        Some(InfoKind::Bridge) => links.iter().any(|port| {
            port.controller == Some(link.index)
                && !port.loopback
                && matches!(port.kind, None | Some(InfoKind::Bond | InfoKind::Vlan | InfoKind::Team))
        }),
        Some(kind) => matches!(
            kind,
            InfoKind::Veth
                | InfoKind::Vlan
                | InfoKind::Bond
                | InfoKind::Team
                | InfoKind::MacVlan
                | InfoKind::MacVtap
                | InfoKind::IpVlan
                | InfoKind::Ipoib
                | InfoKind::Hsr
                | InfoKind::MacSec
                | InfoKind::Dsa
                | InfoKind::VirtWifi
                | InfoKind::Wwan
                | InfoKind::RmNet
                | InfoKind::Netdevsim
        ),
    }
}

fn is_container_network(name: &str) -> bool {
    // Docker calls its further networks br- and twelve hexadecimal digits.
    let dockers = name
        .strip_prefix("br-")
        .is_some_and(|id| id.len() == 12 && id.bytes().all(|b| b.is_ascii_hexdigit()));
    dockers || CONTAINER_INTERFACES.iter().any(|prefix| name.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interface::netlink::fixtures::{address, link};

    fn chosen(links: &[Link], addresses: &[Address], uplinks: &[u32]) -> Vec<String> {
        let exclusions = Exclusions {
            interface: "muster0".into(),
            pools: vec!["100.64.0.0/11".parse().expect("a prefix"), "fd00:1::/48".parse().expect("a prefix")],
        };
        choose(&underlay(links, addresses, uplinks), &exclusions).iter().map(ToString::to_string).collect()
    }

    fn underlay(links: &[Link], addresses: &[Address], uplinks: &[u32]) -> Underlay {
        let uplinks = uplinks.iter().copied().collect();
        Underlay { links: links.to_vec(), addresses: addresses.to_vec(), uplinks }
    }

    #[test]
    fn the_inner_mtu_fits_into_the_narrowest_interface() {
        let links = [
            Link { mtu: 65_536, loopback: true, ..link(1, "lo", None) },
            Link { mtu: 9_000, ..link(2, "eth0", None) },
            Link { mtu: 1_492, ..link(3, "ppp0", Some(InfoKind::Other("ppp".into()))) },
            Link { mtu: 1_000, ..link(4, "docker0", Some(InfoKind::Bridge)) },
            Link { mtu: 1_100, ..link(5, "muster0", Some(InfoKind::Tun)) },
            Link { mtu: 20_000, ..link(6, "eth1", None) },
            Link { mtu: 1_280, ..link(7, "eth2", None) },
        ];
        let exclusions = Exclusions { interface: "muster0".into(), pools: vec![] };
        let mtu = |addressed: &[u32], uplinks: &[u32]| {
            let addresses: Vec<_> = addressed.iter().map(|i| address(*i, &format!("10.0.{i}.1"))).collect();
            choose_mtu(&underlay(&links, &addresses, uplinks), &exclusions)
        };
        assert_eq!(mtu(&[1, 2, 4, 5], &[2]), 8_920);
        assert_eq!(mtu(&[2, 3], &[3]), 1_412, "to the Internet");
        assert_eq!(mtu(&[2, 3], &[]), 8_920);
        assert_eq!(mtu(&[6], &[6]), 8_920, "no more");
        assert_eq!(mtu(&[2, 7], &[2]), 1_280, "no less");
        assert_eq!(mtu(&[1, 4, 5], &[1, 5]), 1_420, "no interface yet");
        assert_eq!(choose_mtu(&underlay(&[link(2, "eth0", None)], &[], &[2]), &exclusions), 1_420);
    }

    #[test]
    fn a_plain_host_offers_its_lan_addresses_uplink_first() {
        let links = [
            Link { loopback: true, ..link(1, "lo", None) },
            link(2, "eth0", None),
            link(3, "eth1", None),
            link(4, "muster0", Some(InfoKind::Tun)),
        ];
        let addresses = [
            address(1, "127.0.0.1"),
            address(1, "10.99.0.1"),
            address(2, "192.168.1.5"),
            address(2, "fe80::5"),
            address(3, "2001:db8:1::5"),
            address(3, "10.0.0.5"),
            address(4, "10.64.0.9"),
            address(2, "100.64.3.4"),
            address(2, "169.254.1.1"),
            address(2, "fd00:1::7"),
        ];
        assert_eq!(chosen(&links, &addresses, &[3]), ["10.0.0.5", "2001:db8:1::5", "192.168.1.5"]);
    }

    #[test]
    fn container_networks_are_left_out_and_a_lone_veth_is_not() {
        let links = [
            link(2, "eth0", Some(InfoKind::Veth)),
            link(3, "docker0", Some(InfoKind::Bridge)),
            link(4, "br-0123456789ab", Some(InfoKind::Bridge)),
            link(5, "cni0", Some(InfoKind::Bridge)),
            link(6, "lab", Some(InfoKind::Bridge)),
            Link { controller: Some(6), ..link(7, "veth7", Some(InfoKind::Veth)) },
            link(8, "wg0", Some(InfoKind::Wireguard)),
            link(9, "dummy0", Some(InfoKind::Dummy)),
            link(10, "cali1234", Some(InfoKind::Veth)),
        ];
        let addresses: Vec<_> = (2..=10).map(|i| address(i, &format!("10.0.{i}.1"))).collect();
        assert_eq!(chosen(&links, &addresses, &[]), ["10.0.2.1"]);
    }

    #[test]
    fn a_bridge_over_the_uplink_is_a_lan() {
        let links =
            [link(2, "br0", Some(InfoKind::Bridge)), Link { controller: Some(2), ..link(3, "enp1s0", None) }];
        assert_eq!(chosen(&links, &[address(2, "192.168.1.5")], &[2]), ["192.168.1.5"]);
    }

    #[test]
    fn what_is_down_or_passing_is_left_out() {
        let links = [
            link(2, "eth0", None),
            Link { carrier: false, ..link(3, "eth1", None) },
            Link { up: false, ..link(4, "eth2", None) },
        ];
        let addresses = [
            Address { lasting: false, ..address(2, "2001:db8::abcd") },
            Address { global: false, ..address(2, "10.0.0.9") },
            address(3, "10.0.3.1"),
            address(4, "10.0.4.1"),
        ];
        assert_eq!(chosen(&links, &addresses, &[]), Vec::<String>::new());
    }

    #[test]
    fn the_number_is_bounded_and_nothing_is_offered_twice() {
        let links = [link(2, "eth0", None), link(3, "eth1", None)];
        let mut addresses: Vec<_> = (0..40).map(|i| address(2, &format!("10.0.0.{i}"))).collect();
        addresses.push(address(3, "10.0.0.1"));
        let chosen = chosen(&links, &addresses, &[]);
        assert_eq!(chosen.len(), MAX);
        assert_eq!(chosen.iter().filter(|a| *a == "10.0.0.1").count(), 1);
    }
}
