//! The registrar's decisions for this device, checked.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;
use muster_common::name::{Domain, NameError};
use muster_proto::admin::ProxiedHost;
use muster_proto::registration::{DeviceConfig, ProxiedDevice};

/// Routes that a configuration may have: pools, and the subnets behind all other devices.
const MAX_ROUTES: usize = 4096;
/// Items that a list in a configuration may have.
const MAX_LIST: usize = 64;

/// What the host is programmed with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The device's name, a DNS label.
    pub name: String,
    /// The device's namespace.
    pub namespace: String,
    /// Name of the network.
    pub network: String,
    /// The network's domain.
    pub domain: Domain,
    /// Virtual IPv4 address.
    pub virtual_ipv4: Option<Ipv4Addr>,
    /// Virtual IPv6 address.
    pub virtual_ipv6: Option<Ipv6Addr>,
    /// The network's pools.
    pub pools: Vec<IpNet>,
    /// What is routed into the interface: pools, and subnets that other devices carry.
    pub routes: Vec<IpNet>,
    /// Subnets that other devices carry, and that are not routed, with the reason.
    pub left_out: Vec<(IpNet, String)>,
    /// The hosts without an agent that this device offers to speak for, as far as the registrar has heard of them.
    pub proxied: Vec<Proxied>,
    /// Subnets that this device offers and may carry.
    pub subnets: Vec<IpNet>,
    /// Those of them that it carries now.
    pub active_subnets: Vec<IpNet>,
    /// The zone that the device is in; empty if none.
    pub zone: String,
    /// `HOST:PORT` of the registrars, for gRPC.
    pub registrars: Vec<String>,
    /// `HOST:PORT` of the registrars, for DNS over TLS.
    pub dns_servers: Vec<String>,
}

/// What this host offers to the network beside itself. What the registrar says counts only within it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Offer {
    /// Hosts without an agent: their names, and where they are reached.
    pub hosts: Vec<(String, IpAddr)>,
    /// Subnets of its site.
    pub subnets: Vec<IpNet>,
}

impl Offer {
    /// As the registrar is told of them.
    pub(super) fn hosts(&self) -> Vec<ProxiedHost> {
        let host = |(name, address): &(String, IpAddr)| ProxiedHost {
            name: name.clone(),
            lan_address: address.to_string(),
        };
        self.hosts.iter().map(host).collect()
    }
}

/// A host without an agent, as a device of the network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proxied {
    /// Its name in the network.
    pub name: String,
    /// Where it is reached from this host.
    pub lan_address: IpAddr,
    /// Its virtual addresses, IPv4 first; none while it is refused.
    pub virtual_addresses: Vec<IpAddr>,
    /// Why it is not reachable; empty if it is.
    pub refused: String,
}

impl Proxied {
    fn new(device: &ProxiedDevice, offer: &Offer) -> Option<Self> {
        let lan_address = device.lan_address.parse().ok()?;
        if !offer.hosts.iter().any(|(_, offered)| *offered == lan_address) {
            return None;
        }
        let addresses = [&device.virtual_ipv4, &device.virtual_ipv6];
        let virtual_addresses = match device.refused.as_str() {
            "" => addresses.into_iter().filter_map(|address| address.parse().ok()).collect(),
            _ => Vec::new(),
        };
        let name = device.name.clone();
        Some(Self { name, lan_address, virtual_addresses, refused: device.refused.clone() })
    }

    /// The virtual address of the family in which the host is reached; the other is translated into nothing.
    pub fn translated(&self) -> Option<IpAddr> {
        let is_ipv4 = self.lan_address.is_ipv4();
        self.virtual_addresses.iter().copied().find(|address| address.is_ipv4() == is_ipv4)
    }
}

/// Why a configuration cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    /// It is for another device.
    #[error("it is for device {0}")]
    Device(String),
    /// The domain is none.
    #[error(transparent)]
    Domain(#[from] NameError),
    /// Not an address.
    #[error("{0:?} is not a virtual address")]
    Address(String),
    /// Neither family has an address.
    #[error("it has no virtual address")]
    NoAddress,
    /// Not a CIDR block, or one that would take all traffic.
    #[error("{0:?} is not a route of a virtual network")]
    Route(String),
    /// A list is longer than anything sensible.
    #[error("it is too long")]
    TooLong,
}

impl Settings {
    /// Checks `config`, which must be for `device_uid`, whose host offers `offer`.
    pub fn new(config: &DeviceConfig, device_uid: &str, offer: &Offer) -> Result<Self, SettingsError> {
        if config.device_uid != device_uid {
            return Err(SettingsError::Device(config.device_uid.chars().take(80).collect()));
        }
        let lists = [config.registrars.len(), config.dns_servers.len()];
        if lists.iter().any(|length| *length > MAX_LIST)
            || config.routes.len() + config.site_routes.len() > MAX_ROUTES
        {
            return Err(SettingsError::TooLong);
        }
        let offered = |subnets: &[String]| -> Vec<IpNet> {
            let subnets = subnets.iter().filter_map(|subnet| route(subnet).ok());
            subnets.filter(|subnet| offer.subnets.contains(subnet)).collect()
        };
        let mut proxied: Vec<Proxied> = Vec::new();
        for host in config.proxied_devices.iter().filter_map(|device| Proxied::new(device, offer)) {
            if !proxied.iter().any(|other| other.lan_address == host.lan_address) {
                proxied.push(host);
            }
        }
        let pools: Vec<IpNet> = config.routes.iter().map(|r| route(r)).collect::<Result<_, _>>()?;
        let site_routes = config.site_routes.iter().map(|r| route(r));
        let settings = Self {
            name: config.name.clone(),
            namespace: config.namespace.clone(),
            network: config.network.clone(),
            domain: config.domain.parse()?,
            virtual_ipv4: address(&config.virtual_ipv4)?,
            virtual_ipv6: address(&config.virtual_ipv6)?,
            routes: pools.iter().copied().map(Ok).chain(site_routes).collect::<Result<_, _>>()?,
            pools,
            left_out: Vec::new(),
            proxied,
            subnets: offered(&config.subnets),
            active_subnets: offered(&config.active_subnets),
            zone: config.zone.clone(),
            registrars: config.registrars.clone(),
            dns_servers: config.dns_servers.clone(),
        };
        if settings.virtual_addresses().is_empty() { Err(SettingsError::NoAddress) } else { Ok(settings) }
    }

    /// The device's virtual addresses, IPv4 first.
    pub fn virtual_addresses(&self) -> Vec<IpAddr> {
        let (v4, v6) = (self.virtual_ipv4.map(IpAddr::V4), self.virtual_ipv6.map(IpAddr::V6));
        v4.into_iter().chain(v6).collect()
    }

    /// The virtual addresses of the hosts that this device speaks for.
    pub fn proxied_addresses(&self) -> Vec<IpAddr> {
        self.proxied.iter().flat_map(|host| host.virtual_addresses.iter().copied()).collect()
    }

    /// Whether packets to `address` are for this host, or for what it forwards to.
    pub(super) fn is_own(&self, address: IpAddr) -> bool {
        self.virtual_addresses().contains(&address)
            || self.proxied.iter().any(|host| host.virtual_addresses.contains(&address))
            || self.active_subnets.iter().any(|subnet| subnet.contains(&address))
    }

    /// What is routed into the interface beside the pools.
    pub fn site_routes(&self) -> Vec<IpNet> {
        self.routes.iter().copied().filter(|route| !self.pools.contains(route)).collect()
    }

    /// Leaves out routes to subnets that this host is in itself or may carry, and those that would take away what it
    /// needs for the network to work at all: its registrars, its directors and its resolvers.
    pub(super) fn stay_off(&mut self, underlay: &Underlay<'_>) {
        let registrars = self.registrars.iter().chain(&self.dns_servers);
        let registrars = registrars.filter_map(|text| text.parse::<SocketAddr>().ok());
        let needed: Vec<(&str, IpAddr)> =
            (underlay.endpoints.iter().map(|own| ("this host has the address", own.ip())))
                .chain(registrars.map(|address| ("it has the registrar's address", address.ip())))
                .chain(underlay.directors.iter().map(|address| ("it has a director's address", *address)))
                .chain(
                    underlay
                        .resolvers
                        .iter()
                        .map(|address| ("it has the address of a resolver of this host's,", *address)),
                )
                .collect();
        let (pools, subnets, left_out) = (&self.pools, &self.subnets, &mut self.left_out);
        self.routes.retain(|route| {
            if pools.contains(route) {
                return true;
            }
            if subnets.contains(route) {
                return false;
            }
            let reason = needed.iter().find(|(_, address)| route.contains(address));
            left_out.extend(reason.map(|(what, address)| (*route, format!("{what} {address}"))));
            reason.is_none()
        });
    }
}

/// What the network itself runs over.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Underlay<'a> {
    /// The host's own addresses on its LANs.
    pub(super) endpoints: &'a [SocketAddr],
    /// Addresses of directors.
    pub(super) directors: &'a [IpAddr],
    /// Where names are resolved.
    pub(super) resolvers: &'a [IpAddr],
}

/// [`Settings::pools`] of a configuration that has not been checked.
pub fn pools(config: &DeviceConfig) -> Vec<IpNet> {
    config.routes.iter().filter_map(|text| route(text).ok()).collect()
}

fn address<A: std::str::FromStr>(text: &str) -> Result<Option<A>, SettingsError> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| SettingsError::Address(text.chars().take(80).collect()))
}

/// A route must not be wide enough to take the host off its own networks.
pub(super) fn route(text: &str) -> Result<IpNet, SettingsError> {
    let error = || SettingsError::Route(text.chars().take(80).collect());
    let net: IpNet = text.parse().map_err(|_| error())?;
    let narrowest = match net {
        IpNet::V4(_) => 8,
        IpNet::V6(_) => 16,
    };
    if net.prefix_len() < narrowest { Err(error()) } else { Ok(net.trunc()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_checked() {
        let good = DeviceConfig {
            device_uid: "d".into(),
            domain: "net.example".into(),
            virtual_ipv4: "100.64.1.1".into(),
            routes: vec!["100.64.0.1/11".into()],
            ..DeviceConfig::default()
        };
        let settings = Settings::new(&good, "d", &Offer::default()).unwrap();
        assert_eq!(settings.routes, ["100.64.0.0/11".parse().unwrap()]);
        let bad = [
            DeviceConfig { device_uid: "e".into(), ..good.clone() },
            DeviceConfig { domain: "-".into(), ..good.clone() },
            DeviceConfig { virtual_ipv4: "::1".into(), ..good.clone() },
            DeviceConfig { virtual_ipv4: String::new(), ..good.clone() },
            DeviceConfig { routes: vec!["0.0.0.0/0".into()], ..good.clone() },
            DeviceConfig { routes: vec!["100.64.0.0/11".into(); 4097], ..good.clone() },
        ];
        for config in bad {
            assert!(Settings::new(&config, "d", &Offer::default()).is_err(), "{config:?}");
        }
    }

    #[test]
    fn only_what_the_host_offers_is_carried() {
        let config = DeviceConfig {
            device_uid: "d".into(),
            domain: "net.example".into(),
            virtual_ipv4: "100.64.1.1".into(),
            routes: vec!["100.64.0.0/11".into(), "100.96.0.0/12".into()],
            site_routes: vec!["192.168.7.0/24".into(), "192.168.9.0/24".into()],
            subnets: vec!["192.168.7.0/24".into(), "10.0.0.0/8".into()],
            active_subnets: vec!["10.0.0.0/8".into(), "192.168.7.0/24".into()],
            proxied_devices: [
                ("printer", "192.168.7.9", ""),
                ("safe", "192.168.7.1", ""),
                ("tv", "192.168.7.8", "no"),
            ]
            .map(|(name, lan_address, refused)| ProxiedDevice {
                name: name.into(),
                lan_address: lan_address.into(),
                virtual_ipv4: "100.64.3.3".into(),
                virtual_ipv6: "fd00::3".into(),
                refused: refused.into(),
                ..ProxiedDevice::default()
            })
            .into(),
            ..DeviceConfig::default()
        };
        let offer = Offer {
            hosts: vec![
                ("printer".into(), "192.168.7.9".parse().unwrap()),
                ("tv".into(), "192.168.7.8".parse().unwrap()),
            ],
            subnets: vec!["192.168.7.0/24".parse().unwrap()],
        };
        let mut settings = Settings::new(&config, "d", &offer).unwrap();
        assert_eq!(settings.active_subnets, ["192.168.7.0/24".parse().unwrap()]);
        let [printer, tv] = &settings.proxied[..] else { panic!("{:?}", settings.proxied) };
        assert_eq!(printer.translated(), Some("100.64.3.3".parse().unwrap()));
        assert_eq!((tv.name.as_str(), tv.refused.as_str(), tv.translated()), ("tv", "no", None));
        assert_eq!(settings.pools, pools(&config));
        assert!(
            settings.is_own("fd00::3".parse().unwrap()) && settings.is_own("192.168.7.77".parse().unwrap())
        );
        assert!(!settings.is_own("10.1.1.1".parse().unwrap()));
        settings.stay_off(&Underlay::default());
        let texts = |settings: &Settings| settings.routes.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(texts(&settings), ["100.64.0.0/11", "100.96.0.0/12", "192.168.9.0/24"]);
        let settings = |underlay: &Underlay<'_>, registrar: &str| {
            let mut config = config.clone();
            config.registrars = vec![registrar.into(), "registrar.example:7500".into()];
            let mut settings = Settings::new(&config, "d", &offer).unwrap();
            settings.stay_off(underlay);
            settings
        };
        let inside: IpAddr = "192.168.9.5".parse().unwrap();
        let elsewhere = Underlay {
            endpoints: &["10.0.0.5:7551".parse().unwrap()],
            directors: &["10.0.0.6".parse().unwrap()],
            resolvers: &["10.0.0.7".parse().unwrap()],
        };
        let routed = settings(&elsewhere, "10.0.0.8:7500");
        assert_eq!(routed.site_routes(), ["192.168.9.0/24".parse().unwrap()]);
        assert_eq!(routed.left_out, []);
        for (left_out, reason) in [
            (settings(&Underlay { endpoints: &[(inside, 7551).into()], ..elsewhere }, "r:1"), "this host"),
            (settings(&Underlay { directors: &[inside], ..elsewhere }, "r:1"), "director"),
            (settings(&Underlay { resolvers: &[inside], ..elsewhere }, "r:1"), "resolver"),
            (settings(&elsewhere, "192.168.9.5:7500"), "registrar"),
        ] {
            assert_eq!(texts(&left_out), ["100.64.0.0/11", "100.96.0.0/12"]);
            let [(route, why)] = &left_out.left_out[..] else { panic!("{:?}", left_out.left_out) };
            assert_eq!(route.to_string(), "192.168.9.0/24");
            assert!(why.contains(reason) && why.ends_with("192.168.9.5"), "{why}");
        }
    }
}
