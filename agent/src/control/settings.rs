//! The registrar's decisions for this device, checked.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use muster_common::name::{Domain, NameError};
use muster_proto::registration::DeviceConfig;

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
    /// What is routed into the interface.
    pub routes: Vec<IpNet>,
    /// `HOST:PORT` of the registrars, for gRPC.
    pub registrars: Vec<String>,
    /// `HOST:PORT` of the registrars, for DNS over TLS.
    pub dns_servers: Vec<String>,
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
    /// Checks `config`, which must be for `device_uid`.
    pub fn new(config: &DeviceConfig, device_uid: &str) -> Result<Self, SettingsError> {
        if config.device_uid != device_uid {
            return Err(SettingsError::Device(config.device_uid.chars().take(80).collect()));
        }
        let lists = [config.routes.len(), config.registrars.len(), config.dns_servers.len()];
        if lists.iter().any(|length| *length > MAX_LIST) {
            return Err(SettingsError::TooLong);
        }
        let settings = Self {
            name: config.name.clone(),
            namespace: config.namespace.clone(),
            network: config.network.clone(),
            domain: config.domain.parse()?,
            virtual_ipv4: address(&config.virtual_ipv4)?,
            virtual_ipv6: address(&config.virtual_ipv6)?,
            routes: config.routes.iter().map(|r| route(r)).collect::<Result<_, _>>()?,
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
}

fn address<A: std::str::FromStr>(text: &str) -> Result<Option<A>, SettingsError> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| SettingsError::Address(text.chars().take(80).collect()))
}

/// A route must not be wide enough to take the host off its own networks.
fn route(text: &str) -> Result<IpNet, SettingsError> {
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
        let settings = Settings::new(&good, "d").unwrap();
        assert_eq!(settings.routes, ["100.64.0.0/11".parse().unwrap()]);
        let bad = [
            DeviceConfig { device_uid: "e".into(), ..good.clone() },
            DeviceConfig { domain: "-".into(), ..good.clone() },
            DeviceConfig { virtual_ipv4: "::1".into(), ..good.clone() },
            DeviceConfig { virtual_ipv4: String::new(), ..good.clone() },
            DeviceConfig { routes: vec!["0.0.0.0/0".into()], ..good.clone() },
            DeviceConfig { routes: vec!["100.64.0.0/11".into(); 65], ..good.clone() },
        ];
        for config in bad {
            assert!(Settings::new(&config, "d").is_err(), "{config:?}");
        }
    }
}
