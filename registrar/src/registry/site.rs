//! Hosts without an agent, and subnets of a site: what a device offers to carry, what operators let it carry, and what
//! follows from both. A host is reached while its agent names it and may: nothing else is stored of that.

use std::net::IpAddr;

use ipnet::IpNet;
use muster_common::name::Label;
use muster_proto::{admin, storage};
use prost::Message as _;
use uuid::Uuid;

use super::{
    device::uid_of,
    field::{self, FieldError},
};
use crate::store::Revision;

/// The most hosts that a device speaks for.
pub const HOSTS_MAX: usize = 256;
/// The most subnets that a device carries.
pub const SUBNETS_MAX: usize = 64;

/// What a device has to do with hosts without an agent. Few devices have any of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Site {
    /// Whether an operator lets it speak for hosts.
    pub may_proxy: bool,
    /// Subnets that an operator lets it carry, in order.
    pub approved: Box<[IpNet]>,
    /// The hosts that it wants to speak for, by name.
    pub hosts: Box<[Host]>,
    /// The subnets that it offers to carry, in order.
    pub offered: Box<[IpNet]>,
    /// For a host without an agent: uid of the device that has registered it last.
    pub proxied_by: Option<Uuid>,
}

/// A host without an agent, as the device says that speaks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// Its name, a DNS label in lower case.
    pub name: Box<str>,
    /// Where it is reached from the device.
    pub lan_address: IpAddr,
}

impl Host {
    pub(crate) fn to_proto(&self) -> admin::ProxiedHost {
        admin::ProxiedHost { name: self.name.to_string(), lan_address: self.lan_address.to_string() }
    }
}

/// The device that carries a subnet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Carrier {
    /// Its uid.
    pub device: Uuid,
    /// Uid of the running registrar that has its session; `None` once that has been away for too long.
    pub registrar: Option<Uuid>,
    /// Revision of the last change.
    pub revision: Revision,
}

impl Site {
    /// `None` if there is nothing in it.
    pub(crate) fn known(self) -> Option<Box<Self>> {
        (self != Self::default()).then(|| Box::new(self))
    }

    /// The host called `name`.
    pub fn host(&self, name: &str) -> Option<&Host> {
        self.hosts.iter().find(|host| *host.name == *name)
    }

    /// The subnets that it offers, and that an operator lets it carry.
    pub fn may_carry(&self) -> impl Iterator<Item = IpNet> + '_ {
        self.offered.iter().copied().filter(|subnet| self.approved.contains(subnet))
    }
}

impl Carrier {
    pub(crate) fn read(stored: &storage::Carrier, revision: Revision) -> Result<Self, FieldError> {
        let registrar = uid_of("registrar_uid", &stored.registrar_uid, "registrar")?;
        Ok(Self { device: field::parse("device_uid", &stored.device_uid)?, registrar, revision })
    }

    /// As it is stored.
    pub fn encode(&self) -> Vec<u8> {
        let registrar_uid = self.registrar.map(|uid| uid.to_string()).unwrap_or_default();
        storage::Carrier { device_uid: self.device.to_string(), registrar_uid }.encode_to_vec()
    }
}

/// Reads the hosts that a device wants to speak for, into the order of their names.
///
/// # Errors
/// The field that cannot be used.
pub(crate) fn hosts(path: &str, told: &[admin::ProxiedHost]) -> Result<Box<[Host]>, FieldError> {
    check_length(path, told.len(), HOSTS_MAX)?;
    let mut hosts: Vec<Host> = Vec::with_capacity(told.len());
    for (i, host) in told.iter().enumerate() {
        let path = format!("{path}[{i}]");
        let name: Label = field::parse(&format!("{path}.name"), &host.name)?;
        let name = name.for_device().map_err(|error| FieldError::new(format!("{path}.name"), error))?;
        let address = format!("{path}.lan_address");
        let lan_address = field::address::<IpAddr>(&address, &host.lan_address, "IP")?
            .ok_or_else(|| FieldError::new(&*address, "is empty"))?
            .to_canonical();
        if lan_address.is_unspecified() || lan_address.is_loopback() || lan_address.is_multicast() {
            let reason = format!("{lan_address} is not the address of a host on a LAN");
            return Err(FieldError::new(address, reason));
        }
        hosts.push(Host { name: name.as_str().into(), lan_address });
    }
    hosts.sort_by(|a, b| a.name.cmp(&b.name));
    if let Some(twice) = hosts.windows(2).find(|pair| pair[0].name == pair[1].name) {
        return Err(FieldError::new(path, format!("has {:?} twice", twice[0].name)));
    }
    Ok(hosts.into())
}

/// Reads subnets that a device offers, or is to carry, into their order.
///
/// # Errors
/// The field that cannot be used: not a CIDR block, with bits set beyond its length, or one that holds more than a site
/// does.
pub(crate) fn subnets(path: &str, texts: &[String]) -> Result<Box<[IpNet]>, FieldError> {
    check_length(path, texts.len(), SUBNETS_MAX)?;
    let read = |(i, text): (usize, &String)| {
        let path = format!("{path}[{i}]");
        let net: IpNet = field::parse(&path, text)?;
        if net != net.trunc() {
            let reason = format!("{net} has bits set beyond its length; write {}", net.trunc());
            return Err(FieldError::new(path, reason));
        }
        // As agents accept them.
        let shortest = if net.addr().is_ipv4() { 8 } else { 16 };
        if net.prefix_len() < shortest {
            let reason = format!("{net} is larger than any site; use /{shortest} or longer");
            return Err(FieldError::new(path, reason));
        }
        Ok(net)
    };
    let mut nets: Vec<IpNet> = texts.iter().enumerate().map(read).collect::<Result<_, _>>()?;
    nets.sort_unstable();
    nets.dedup();
    Ok(nets.into())
}

fn check_length(path: &str, length: usize, max: usize) -> Result<(), FieldError> {
    if length <= max {
        return Ok(());
    }
    Err(FieldError::new(path, format!("has {length} entries; at most {max} are allowed")))
}

/// Whether two subnets have an address in common.
pub(crate) fn overlap(one: &IpNet, other: &IpNet) -> bool {
    one.contains(other) || other.contains(one)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(name: &str, lan_address: &str) -> admin::ProxiedHost {
        admin::ProxiedHost { name: name.into(), lan_address: lan_address.into() }
    }

    #[test]
    fn hosts_are_read_into_the_order_of_their_names() {
        let read = hosts("h", &[told("tv", "192.168.7.8"), told("Printer", "::ffff:192.168.7.9")]).unwrap();
        let names: Vec<(&str, IpAddr)> = read.iter().map(|host| (&*host.name, host.lan_address)).collect();
        let expected = [("printer", "192.168.7.9"), ("tv", "192.168.7.8")];
        assert_eq!(names, expected.map(|(name, address)| (name, address.parse().unwrap())));
        for (bad, path) in [
            (vec![told("-", "192.168.7.8")], "h[0].name"),
            (vec![told("svc", "192.168.7.8")], "h[0].name"),
            (vec![told("tv", "")], "h[0].lan_address"),
            (vec![told("tv", "127.0.0.1")], "h[0].lan_address"),
            (vec![told("tv", "224.0.0.1")], "h[0].lan_address"),
            (vec![told("tv", "192.168.7.8"), told("TV", "192.168.7.9")], "h"),
            ((0..257).map(|n| told(&format!("h{n}"), "192.168.7.8")).collect(), "h"),
        ] {
            assert_eq!(hosts("h", &bad).unwrap_err().path, path, "{bad:?}");
        }
    }

    #[test]
    fn subnets_are_those_that_agents_accept() {
        let read =
            |texts: &[&str]| subnets("s", &texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>());
        let nets = read(&["192.168.7.0/24", "10.0.0.0/8", "10.0.0.0/8", "fd07::/64"]).unwrap();
        let texts: Vec<String> = nets.iter().map(ToString::to_string).collect();
        assert_eq!(texts, ["10.0.0.0/8", "192.168.7.0/24", "fd07::/64"]);
        for bad in ["192.168.7.1/24", "0.0.0.0/0", "10.0.0.0/7", "fd00::/8", "192.168.7.0", "a/8"] {
            assert_eq!(read(&[bad]).unwrap_err().path, "s[0]", "{bad}");
        }
        assert!(read(&["192.168.7.1/24"]).unwrap_err().reason.contains("write 192.168.7.0/24"));
    }
}
