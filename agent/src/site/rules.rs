//! The nftables rules: translation one to one, masquerading, and a filter that lets through what is carried and nothing
//! else. Text in, text out.

use std::{
    fmt::{Display, Write},
    net::IpAddr,
};

use ipnet::IpNet;

use super::{Carried, forwarding::Plan};
use crate::nftables::table_name;

/// A table, as nft reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rules(String);

/// Removes the table, if it is there.
pub(super) fn removal(interface: &str) -> String {
    let table = table_name(interface);
    format!("table inet {table}\ndelete table inet {table}\n")
}

impl Rules {
    pub(super) fn new(interface: &str, carried: &Carried, masquerade: bool, plan: &Plan) -> Self {
        let mut text = removal(interface);
        let _ = write_table(&mut text, interface, carried, masquerade, plan);
        Self(text)
    }

    pub(super) fn text(&self) -> &str {
        &self.0
    }
}

/// One family's part of what is carried.
struct Family {
    /// As nft calls it.
    ip: &'static str,
    hosts: Vec<(IpAddr, IpAddr)>,
    /// Addresses of hosts on the LAN, and subnets; disjoint.
    inside: Vec<IpNet>,
    network: Vec<IpNet>,
    subnets: Vec<IpNet>,
}

impl Family {
    fn new(ip: &'static str, carried: &Carried) -> Self {
        let is_ipv4 = ip == "ip";
        let of = |nets: &[IpNet]| -> Vec<IpNet> {
            nets.iter().copied().filter(|net| net.addr().is_ipv4() == is_ipv4).collect()
        };
        let hosts: Vec<_> =
            carried.hosts.iter().copied().filter(|(_, lan)| lan.is_ipv4() == is_ipv4).collect();
        let subnets = of(&carried.subnets);
        let alone = hosts.iter().map(|(_, lan)| IpNet::from(*lan));
        let inside = IpNet::aggregate(&subnets.iter().copied().chain(alone).collect());
        Self {
            ip,
            inside,
            network: IpNet::aggregate(&of(&carried.network)),
            subnets: IpNet::aggregate(&subnets),
            hosts,
        }
    }

    /// What sends packets for virtual addresses to the hosts on the LAN.
    fn dnat(&self) -> String {
        let Self { ip, hosts, .. } = self;
        let map = list(hosts.iter().map(|(virtual_address, lan)| format!("{virtual_address} : {lan}")));
        format!("dnat {ip} to {ip} daddr map {map}")
    }
}

fn write_table(
    text: &mut String,
    interface: &str,
    carried: &Carried,
    masquerade: bool,
    plan: &Plan,
) -> std::fmt::Result {
    let families = ["ip", "ip6"].map(|ip| Family::new(ip, carried));
    let own = format!("\"{interface}\"");
    let translated = || families.iter().filter(|family| !family.hosts.is_empty());
    writeln!(text, "table inet {} {{", table_name(interface))?;

    writeln!(text, " chain prerouting {{\n  type nat hook prerouting priority dstnat;")?;
    for family in translated() {
        writeln!(text, "  iifname {own} {}", family.dnat())?;
    }
    // What this host itself sends to them.
    writeln!(text, " }}\n chain output {{\n  type nat hook output priority -100;")?;
    for family in translated() {
        writeln!(text, "  {}", family.dnat())?;
    }
    writeln!(text, " }}\n chain postrouting {{\n  type nat hook postrouting priority srcnat;")?;
    for Family { ip, hosts, .. } in translated() {
        let map = list(hosts.iter().map(|(virtual_address, lan)| format!("{lan} : {virtual_address}")));
        writeln!(text, "  oifname {own} snat {ip} to {ip} saddr map {map}")?;
    }
    for Family { ip, inside, network, .. } in &families {
        if masquerade && !inside.is_empty() && !network.is_empty() {
            let (from, to) = (list(network), list(inside));
            writeln!(text, "  oifname != {own} {ip} saddr {from} {ip} daddr {to} masquerade")?;
        }
    }

    writeln!(text, " }}\n chain forward {{\n  type filter hook forward priority filter;")?;
    writeln!(text, "  iifname {own} goto from_network")?;
    if !plan.opened.is_empty() {
        let opened = list(plan.opened.iter().map(|name| format!("\"{name}\"")));
        writeln!(text, "  iifname {opened} goto from_site")?;
    }
    if plan.opens_all_ipv6 {
        writeln!(text, "  meta nfproto ipv6 goto from_site")?;
    }

    // A tunnel's packets are smaller than a LAN's: TCP is told so.
    let clamp = "tcp flags syn tcp option maxseg size set rt mtu";
    writeln!(text, " }}\n chain from_network {{\n  {clamp}")?;
    for passes in ["ct state established,related", "ct status dnat"] {
        writeln!(text, "  oifname != {own} {passes} accept")?;
    }
    for Family { ip, subnets, .. } in &families {
        if !subnets.is_empty() {
            writeln!(text, "  oifname != {own} {ip} daddr {} accept", list(subnets))?;
        }
    }
    writeln!(text, "  reject with icmpx type admin-prohibited")?;

    writeln!(text, " }}\n chain from_site {{\n  {clamp}\n  ct state established,related accept")?;
    for Family { ip, inside, .. } in &families {
        if !inside.is_empty() {
            writeln!(text, "  oifname {own} {ip} saddr {} accept", list(inside))?;
        }
    }
    writeln!(text, "  drop\n }}\n}}")
}

fn list(items: impl IntoIterator<Item = impl Display>) -> String {
    let items: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    format!("{{ {} }}", items.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn carried() -> Carried {
        Carried {
            hosts: vec![
                ("100.64.0.9".parse().unwrap(), "192.168.7.9".parse().unwrap()),
                ("fd00:1::9".parse().unwrap(), "fd07::9".parse().unwrap()),
            ],
            subnets: vec!["192.168.7.0/24".parse().unwrap()],
            network: vec!["100.64.0.0/11".parse().unwrap(), "fd00:1::/48".parse().unwrap()],
        }
    }

    #[test]
    fn rules_are_as_expected() {
        let plan = Plan { opened: vec!["eth0".into()], ..Plan::default() };
        let rules = Rules::new("muster0", &carried(), true, &plan);
        for line in [
            "table inet muster_muster0 {",
            "iifname \"muster0\" dnat ip to ip daddr map { 100.64.0.9 : 192.168.7.9 }",
            "iifname \"muster0\" dnat ip6 to ip6 daddr map { fd00:1::9 : fd07::9 }",
            "oifname \"muster0\" snat ip to ip saddr map { 192.168.7.9 : 100.64.0.9 }",
            "oifname != \"muster0\" ip saddr { 100.64.0.0/11 } ip daddr { 192.168.7.0/24 } masquerade",
            "oifname != \"muster0\" ip6 saddr { fd00:1::/48 } ip6 daddr { fd07::9/128 } masquerade",
            "iifname { \"eth0\" } goto from_site",
            "oifname != \"muster0\" ip daddr { 192.168.7.0/24 } accept",
            "oifname \"muster0\" ip6 saddr { fd07::9/128 } accept",
        ] {
            assert!(rules.text().contains(line), "{line}:\n{}", rules.text());
        }
        assert!(!rules.text().contains("nfproto"));
        let plain = Rules::new("muster0", &carried(), false, &Plan { opens_all_ipv6: true, ..plan });
        assert!(!plain.text().contains("masquerade") && plain.text().contains("nfproto ipv6 goto from_site"));
    }
}
