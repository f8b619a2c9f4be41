//! Hosts without an agent, and subnets, behind a device: what is carried is reached in both directions, nothing else is,
//! and nothing of it is left behind.

use std::{net::IpAddr, path::Path, process::Stdio, time::Duration};

use ipnet::IpNet;
use muster_agent::{
    datapath::{Command, PeerConfig},
    site::{Carried, Site},
};

use crate::{
    device::Device,
    namespace::{Namespace, connect, have_root},
};

/// A device, and another one with a LAN behind it: 192.168.7.1 at the device, and a host that is 192.168.7.9 and
/// 192.168.7.10, with IPv6 addresses alike, and without any route.
struct Lab {
    caller: Device,
    carrier: Device,
    host: Namespace,
    state: tempfile::TempDir,
}

fn nets(nets: &[&str]) -> Vec<IpNet> {
    nets.iter().map(|net| net.parse().expect("a prefix")).collect()
}

fn hosts() -> Vec<(IpAddr, IpAddr)> {
    let pair = |(v, lan): (&str, &str)| (v.parse().expect("address"), lan.parse().expect("address"));
    [("100.64.0.9", "192.168.7.9"), ("fd00:1::9", "fd07::9")].map(pair).to_vec()
}

impl Lab {
    fn new() -> Self {
        let (caller, carrier, host) = (Device::new(1), Device::new(2), Namespace::new());
        connect(&caller.namespace, &carrier.namespace);
        host.ip(&format!("link add eth0 type veth peer name lan0 netns {}", carrier.namespace.name()));
        for (namespace, link, numbers) in [(&carrier.namespace, "lan0", &[1][..]), (&host, "eth0", &[9, 10])]
        {
            for number in numbers {
                namespace.ip(&format!("addr add 192.168.7.{number}/24 dev {link}"));
                namespace.ip(&format!("addr add fd07::{number}/64 dev {link} nodad"));
            }
            namespace.ip(&format!("link set {link} up"));
        }
        host.ip("addr add 192.168.8.1/32 dev eth0");
        carrier.namespace.ip("route add 192.168.8.0/24 dev lan0");
        let lab = Self { caller, carrier, host, state: tempfile::tempdir().expect("directory") };
        lab.caller.send(Command::AddPeer(lab.peer(&["192.168.0.0/16"])));
        lab.carrier.send(Command::AddPeer(lab.caller.as_peer(vec![])));
        lab.caller.namespace.ip("route add 192.168.0.0/16 dev muster0 src 100.64.0.1");
        lab.caller.namespace.run("ping -n -c 1 -W 5 100.64.0.2");
        lab
    }

    /// The carrier as the caller knows it.
    fn peer(&self, subnets: &[&str]) -> PeerConfig {
        let mut peer = self.carrier.as_peer(vec![self.carrier.endpoint(2)]);
        peer.virtual_addresses.extend(hosts().into_iter().map(|(virtual_address, _)| virtual_address));
        PeerConfig { subnets: nets(subnets), ..peer }
    }

    fn carry(&self, hosts: Vec<(IpAddr, IpAddr)>, subnets: &[&str], masquerade: bool) -> Site {
        let addresses = hosts.iter().map(|(virtual_address, _)| *virtual_address).collect();
        let carried =
            Carried { hosts, subnets: nets(subnets), network: nets(&["100.64.0.0/11", "fd00:1::/48"]) };
        let subnets = carried.subnets.clone();
        let site = self.carrier.namespace.enter(async || {
            let mut site = Site::sweep("muster0", masquerade, self.state.path()).await;
            site.check().await.expect("nft");
            site.update(&carried).await.expect("forwards");
            site.update(&carried).await.expect("and goes on to");
            site
        });
        self.carrier.send(Command::SetCarried { addresses, subnets });
        site
    }

    fn reaches(from: &Namespace, options: &str) -> bool {
        let ping = from.command(&format!("ping -n -c 2 -i 0.2 -W 1 {options}")).output();
        ping.expect("ping").status.success()
    }

    fn caller_reaches(&self, address: &str) -> bool {
        Self::reaches(&self.caller.namespace, address)
    }

    /// All that the site has changed on the carrier's host.
    fn traces(&self) -> String {
        let settings = "cat /proc/sys/net/ipv4/conf/*/forwarding /proc/sys/net/ipv6/conf/*/forwarding \
            /proc/sys/net/ipv6/conf/*/force_forwarding /proc/sys/net/ipv6/conf/*/accept_ra 2>/dev/null";
        let mut shell = self.carrier.namespace.command("sh");
        let output =
            shell.args(["-c", &format!("nft list tables; {settings} | sort | uniq -c; true")]).output();
        String::from_utf8_lossy(&output.expect("sh").stdout).into_owned()
    }
}

#[test]
fn a_host_without_an_agent_is_reached_by_its_virtual_address_and_nothing_else_is() {
    if !have_root() {
        return;
    }
    let lab = Lab::new();
    let before = lab.traces();
    assert!(!lab.caller_reaches("100.64.0.9"), "before it is carried");
    let mut site = lab.carry(hosts(), &[], true);
    assert!(lab.caller_reaches("100.64.0.9"));
    assert!(lab.caller_reaches("fd00:1::9"));
    let from_itself = Lab::reaches(&lab.carrier.namespace, "100.64.0.9");
    assert!(from_itself, "the carrier's own host reaches it, too");

    let mut server = lab.host.command("iperf3 -s").stdout(Stdio::null()).spawn().expect("iperf3");
    for _ in 0..100 {
        if lab.host.run("ss -Hltn sport = :5201").contains("5201") {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let ends = ["100.64.0.9 -n 20M", "100.64.0.9 -n 20M -R", "fd00:1::9 -n 20M"].map(|options| {
        lab.caller.namespace.command(&format!("iperf3 -c {options}")).output().expect("iperf3")
    });
    let _ = server.kill();
    let _ = server.wait();
    for output in ends {
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }

    // A caller that believes that it may have more.
    for other in ["192.168.7.9", "192.168.7.10", "192.168.7.1", "10.9.0.2"] {
        lab.caller.namespace.run(&format!("ip route replace {other}/32 dev muster0 src 100.64.0.1"));
        assert!(other.starts_with("10.") || !lab.caller_reaches(other), "{other}");
    }
    assert!(lab.carrier.snapshot().drops["foreign_destination"] > 0);

    // The host's side: its own calls come from its virtual address, and the carrier is nobody's router.
    lab.host.ip("route add 100.64.0.0/11 via 192.168.7.1");
    lab.host.ip("route add 10.9.0.0/24 via 192.168.7.1");
    lab.caller.namespace.ip("route del 10.9.0.2/32");
    assert!(Lab::reaches(&lab.host, "-I 192.168.7.9 100.64.0.1"));
    assert!(!Lab::reaches(&lab.host, "-I 192.168.7.10 100.64.0.1"));
    lab.caller.namespace.ip("route replace 192.168.7.10/32 via 10.9.0.2");
    assert!(!Lab::reaches(&lab.host, "-I 192.168.7.10 10.9.0.1"));

    lab.carrier.namespace.enter(async || site.remove().await);
    assert_eq!(lab.traces(), before);
    assert!(!lab.caller_reaches("100.64.0.9"));
}

#[test]
fn a_subnet_is_reached_as_it_is_and_what_is_outside_of_it_is_not() {
    if !have_root() {
        return;
    }
    let lab = Lab::new();
    let before = lab.traces();
    drop(lab.carry(vec![], &["192.168.7.0/24"], true));
    assert!(lab.caller_reaches("192.168.7.10"));
    assert!(lab.caller_reaches("192.168.7.1"), "the carrier's own address there");
    assert!(!lab.caller_reaches("192.168.8.1"));
    assert_ne!(lab.traces(), before);
    assert!(Path::new(lab.state.path()).join("forwarding").exists());

    // It was killed: another start takes everything back.
    lab.carrier.namespace.enter(async || Site::sweep("muster0", true, lab.state.path()).await);
    assert_eq!(lab.traces(), before);
    assert!(!Path::new(lab.state.path()).join("forwarding").exists());

    // Without translation hosts see who calls, and need a route.
    let mut site = lab.carry(vec![], &["192.168.7.0/24"], false);
    assert!(!lab.caller_reaches("192.168.7.10"));
    lab.host.ip("route add 100.64.0.0/11 via 192.168.7.1");
    assert!(lab.caller_reaches("192.168.7.10"));
    // From the subnet, too.
    assert!(Lab::reaches(&lab.host, "-I 192.168.7.10 100.64.0.1"));
    assert!(!Lab::reaches(&lab.host, "-I 192.168.8.1 100.64.0.1"));
    // Somebody flushes all rules, and the next look finds that out.
    lab.carrier.namespace.run("nft flush ruleset");
    let carried = Carried {
        subnets: nets(&["192.168.7.0/24"]),
        network: nets(&["100.64.0.0/11"]),
        ..Carried::default()
    };
    lab.carrier.namespace.enter(async || site.update(&carried).await.expect("forwards"));
    assert!(lab.traces().contains("muster_muster0"));
    lab.carrier.namespace.enter(async || site.update(&Carried::default()).await.expect("nothing"));
    assert_eq!(lab.traces(), before);
}
