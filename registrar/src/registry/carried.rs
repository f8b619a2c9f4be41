//! Who carries what in a network: which device speaks for a host without an agent, which one carries a subnet, and what
//! the device itself is told of both. Pure functions of the index.

use std::{net::IpAddr, sync::Arc};

use ipnet::IpNet;
use muster_proto::registration::ProxiedDevice;
use uuid::Uuid;

use super::{
    device::Device,
    site::{Host, Site},
    state::NetworkState,
};

impl NetworkState {
    /// The device that speaks for a host without an agent, and where that reaches it; `None` for hosts that have their
    /// own agent, and for those that nobody speaks for any more.
    pub fn proxy_of(&self, device: &Device) -> Option<(&Arc<Device>, IpAddr)> {
        let agent = self.devices.by_uid(device.proxied_by()?)?;
        let site = agent.site.as_ref().filter(|site| site.may_proxy && agent.is_reachable())?;
        Some((agent, site.host(&device.name)?.lan_address))
    }

    /// Whether `device` can be reached, by an agent of its own or through the one that speaks for it.
    pub fn is_reachable(&self, device: &Device) -> bool {
        device.is_reachable() || (!device.revoked && self.proxy_of(device).is_some())
    }

    /// The hosts without an agent that `agent` speaks for: those that it names, that it may, and that are its.
    pub fn proxied<'a>(&'a self, agent: &'a Device) -> impl Iterator<Item = (&'a Host, &'a Arc<Device>)> {
        let site = agent.site.as_deref().filter(|site| site.may_proxy);
        site.into_iter().flat_map(|site| &site.hosts).filter_map(|host| {
            let device = self.devices.by_name(&host.name)?;
            (device.proxied_by() == Some(agent.uid) && !device.revoked).then_some((host, device))
        })
    }

    /// What has become of the hosts that `agent` wants to speak for.
    pub fn proxied_devices(&self, agent: &Device) -> Vec<ProxiedDevice> {
        let Some(site) = &agent.site else { return Vec::new() };
        let text = |address: Option<IpAddr>| address.map(|address| address.to_string()).unwrap_or_default();
        let told = |host: &Host| {
            let asked = ProxiedDevice {
                name: host.name.to_string(),
                lan_address: host.lan_address.to_string(),
                ..ProxiedDevice::default()
            };
            match self.claim(agent, site, host) {
                Ok(device) => ProxiedDevice {
                    device_uid: device.uid.to_string(),
                    virtual_ipv4: text(device.ipv4.map(IpAddr::from)),
                    virtual_ipv6: text(device.ipv6.map(IpAddr::from)),
                    ..asked
                },
                Err(refusal) => ProxiedDevice { refused: refusal.to_string(), ..asked },
            }
        };
        site.hosts.iter().map(told).collect()
    }

    /// The device that `agent` has for a host, or why it has none.
    fn claim<'a>(&'a self, agent: &Device, site: &Site, host: &Host) -> Result<&'a Arc<Device>, Refusal> {
        if !site.may_proxy {
            return Err(Refusal::NotApproved { agent: agent.name.clone() });
        }
        let Some(device) = self.devices.by_name(&host.name) else { return Err(Refusal::Pending) };
        match self.may_take(agent, device) {
            Take::Has if device.revoked => Err(Refusal::Revoked { name: host.name.clone() }),
            Take::Has => Ok(device),
            Take::May => Err(Refusal::Pending),
            Take::Not(refusal) => Err(refusal),
        }
    }

    /// Whether `agent`, which may speak for hosts, has `device` or can have it.
    pub(super) fn may_take(&self, agent: &Device, device: &Device) -> Take {
        let Some(by) = device.proxied_by() else { return Take::Not(Refusal::NameTaken) };
        if device.namespace != agent.namespace {
            return Take::Not(Refusal::Namespace { namespace: device.namespace.clone() });
        }
        if by == agent.uid {
            return Take::Has;
        }
        match self.proxy_of(device) {
            Some((other, _)) => {
                let (other, name) = (other.name.clone(), device.name.clone());
                Take::Not(Refusal::Other { other, name })
            }
            None => Take::May,
        }
    }

    /// The subnets that `device` carries at present.
    pub fn active_subnets(&self, device: &Device) -> Vec<IpNet> {
        if !device.is_reachable() {
            return Vec::new();
        }
        let carries = |subnet: &IpNet| self.carriers.get(subnet).is_some_and(|c| c.device == device.uid);
        device.may_carry().filter(carries).collect()
    }

    /// The device that carries the subnet that `address` is in: the smallest one.
    pub fn carrier_of(&self, address: IpAddr) -> Option<&Arc<Device>> {
        let holds = self.carriers.iter().filter(|(subnet, _)| subnet.contains(&address));
        let (subnet, carrier) = holds.max_by_key(|(subnet, _)| subnet.prefix_len())?;
        let device = self.devices.by_uid(carrier.device)?;
        (device.is_reachable() && device.may_carry().any(|other| other == *subnet)).then_some(device)
    }

    /// The subnets that others than `device` carry.
    pub fn site_routes(&self, device: Uuid) -> impl Iterator<Item = &IpNet> {
        self.carriers.iter().filter(move |(_, carrier)| carrier.device != device).map(|(subnet, _)| subnet)
    }
}

/// Whether a device can have another one as a host that it speaks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Take {
    /// It has it.
    Has,
    /// Nobody else speaks for it.
    May,
    /// It cannot.
    Not(Refusal),
}

/// Why an agent does not speak for a host that it names, as it is told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No operator has allowed it.
    #[error(
        "no operator lets this device speak for other hosts; to allow it: muster approve device {agent} --hosts"
    )]
    NotApproved {
        /// The agent's device.
        agent: Box<str>,
    },
    /// It has no addresses yet.
    #[error(
        "it has no virtual address yet; if that lasts, the network's pool may be used up: see the registrar's log, then \
         restart the agent"
    )]
    Pending,
    /// Another device, which has an agent, has the name.
    #[error("another device of the network has this name already; choose another one in [site]")]
    NameTaken,
    /// A host of another namespace has the name.
    #[error("a host in namespace {namespace:?} has this name already; choose another one in [site]")]
    Namespace {
        /// The namespace.
        namespace: Arc<str>,
    },
    /// Another agent speaks for it.
    #[error("{other} speaks for {name} already; take it out of [site] there first")]
    Other {
        /// The other agent's device.
        other: Box<str>,
        /// The host.
        name: Box<str>,
    },
    /// An operator has revoked it.
    #[error("an operator has revoked {name}")]
    Revoked {
        /// The host.
        name: Box<str>,
    },
}
