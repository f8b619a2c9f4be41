//! What has become of what this host offers, for `muster-agent status`.

use std::net::IpAddr;

use muster_proto::agent::{LeftOutRoute, ProxiedHostStatus, SiteSubnetStatus};

use crate::control::{Offer, Proxied, Settings};

/// The hosts without an agent that are offered.
pub fn hosts(offer: &Offer, settings: Option<&Settings>) -> Vec<ProxiedHostStatus> {
    let proxied = |address: &IpAddr| settings?.proxied.iter().find(|host| host.lan_address == *address);
    let host = |(name, address): &(String, IpAddr)| {
        let mut status =
            ProxiedHostStatus { name: name.clone(), lan_address: address.to_string(), ..Default::default() };
        let Some(Proxied { name, refused, .. }) = proxied(address) else { return status };
        status.name.clone_from(name);
        status.refused.clone_from(refused);
        match proxied(address).and_then(Proxied::translated) {
            Some(IpAddr::V4(v4)) => status.virtual_ipv4 = v4.to_string(),
            Some(IpAddr::V6(v6)) => status.virtual_ipv6 = v6.to_string(),
            None if refused.is_empty() => {
                let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
                status.refused = format!("the network has no {family} addresses");
            }
            None => {}
        }
        status
    };
    offer.hosts.iter().map(host).collect()
}

/// The subnets that are offered.
pub fn subnets(offer: &Offer, settings: Option<&Settings>) -> Vec<SiteSubnetStatus> {
    let state = |subnet: &ipnet::IpNet| match settings {
        Some(settings) if settings.active_subnets.contains(subnet) => "active",
        Some(settings) if settings.subnets.contains(subnet) => "standby",
        _ => "unapproved",
    };
    let status = |subnet: &ipnet::IpNet| SiteSubnetStatus {
        subnet: subnet.to_string(),
        state: state(subnet).to_owned(),
    };
    offer.subnets.iter().map(status).collect()
}

/// The subnets that are carried, and not routed into this host's interface.
pub fn left_out(settings: Option<&Settings>) -> Vec<LeftOutRoute> {
    let left_out = settings.into_iter().flat_map(|settings| &settings.left_out);
    left_out
        .map(|(subnet, reason)| LeftOutRoute { subnet: subnet.to_string(), reason: reason.clone() })
        .collect()
}
