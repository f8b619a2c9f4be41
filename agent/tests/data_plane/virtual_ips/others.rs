//! Others at work in nftables beside the agent: their rules stay, and what they do to the agent's is undone.

use std::{io::ErrorKind, time::Duration};

use muster_proto::registration::{VirtualEndpoint, VirtualEndpoints, VirtualService, VirtualServicesChanged};
use tokio::time::sleep;

use super::world::*;

#[test]
fn what_others_do_to_the_table_is_undone_and_what_is_theirs_stays() {
    on_host(async |host| {
        let mut world = World::new();
        world.put("web", true, &[1, 2], |_| {}).await;
        let before = host.run(&format!("nft {TABLE}"));
        for line in [
            "nft flush ruleset",
            "nft delete table inet muster_muster0_services",
            "nft flush chain inet muster_muster0_services output",
            "nft flush map inet muster_muster0_services endpoints4",
        ] {
            host.run(line);
            host.run("nft add table ip other");
            host.run("nft add chain ip other input");
            sleep(Duration::from_millis(1500)).await;
            assert_eq!(host.run(&format!("nft {TABLE}")), before, "{line}");
            assert_eq!(answers(true, 30).len(), 2, "{line}");
        }
        // Changes go on from there.
        world.put("web", true, &[3], |_| {}).await;
        assert_eq!(answers(true, 10), [endpoint(true, 3)].into());
        let World { started, .. } = world;
        started.virtual_ips.stop().await;
        let left = host.run("nft list tables");
        assert!(left.contains("table ip other") && !left.contains("muster"), "{left}");
    });
}

/// Rules in the manner of Docker, through iptables-nft.
const DOCKER: &str = r#"
table ip nat {
    chain DOCKER { iifname "docker0" counter return; }
    chain PREROUTING { type nat hook prerouting priority -100; policy accept;
        fib daddr type local counter jump DOCKER; }
    chain OUTPUT { type nat hook output priority -100; policy accept;
        ip daddr != 127.0.0.0/8 fib daddr type local counter jump DOCKER; }
    chain POSTROUTING { type nat hook postrouting priority 100; policy accept;
        oifname != "docker0" ip saddr 172.17.0.0/16 counter masquerade; }
}
table ip filter {
    chain DOCKER-USER { counter return; }
    chain FORWARD { type filter hook forward priority 0; policy drop;
        counter jump DOCKER-USER;
        oifname "docker0" ct state related,established counter accept;
        iifname "docker0" oifname != "docker0" counter accept; }
}
"#;

/// Rules in the manner of firewalld.
const FIREWALLD: &str = r#"
table inet firewalld {
    chain nat_PREROUTING { type nat hook prerouting priority dstnat + 10; policy accept; }
    chain nat_POSTROUTING { type nat hook postrouting priority srcnat + 10; policy accept; }
    chain filter_INPUT { type filter hook input priority filter + 10; policy accept;
        ct state { established, related } accept
        ct status dnat accept
        iifname "lo" accept
        ct state invalid drop
        reject with icmpx admin-prohibited; }
    chain filter_OUTPUT { type filter hook output priority filter + 10; policy accept;
        ct state { established, related } accept
        oifname "lo" accept; }
}
"#;

/// Rules in the manner of ufw, with what a host has to allow that it wants to be reached.
const UFW: &str = r#"
table ip ufw-filter {
    chain ufw-before-input { iifname "lo" counter accept;
        ct state related,established counter accept;
        ct state invalid counter drop; }
    chain ufw-user-input { tcp dport 8080 counter accept; }
    chain INPUT { type filter hook input priority 0; policy drop;
        counter jump ufw-before-input;
        counter jump ufw-user-input; }
    chain OUTPUT { type filter hook output priority 0; policy drop;
        oifname "lo" counter accept;
        ct state new,related,established counter accept; }
}
"#;

/// Rules in the manner of kube-proxy, whose Services have other addresses.
const KUBE_PROXY: &str = r#"
table ip kube-proxy {
    map service-ips { type ipv4_addr . inet_proto . inet_service : verdict;
        elements = { 10.96.0.10 . tcp . 80 : goto service-web }; }
    map no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict; }
    set cluster-ips { type ipv4_addr; elements = { 10.96.0.10 }; }
    chain mark-for-masquerade { meta mark set meta mark or 0x4000; }
    chain service-web { numgen random mod 1 vmap { 0 : goto endpoint-web }; }
    chain endpoint-web { meta l4proto tcp dnat to 10.244.0.9:8080; }
    chain services { ip daddr . meta l4proto . th dport vmap @service-ips; }
    chain nat-prerouting { type nat hook prerouting priority dstnat; policy accept; jump services; }
    chain nat-output { type nat hook output priority -100; policy accept; jump services; }
    chain nat-postrouting { type nat hook postrouting priority srcnat; policy accept;
        meta mark & 0x4000 != 0x4000 return
        meta mark set meta mark ^ 0x4000
        masquerade fully-random; }
    chain filter-output { type filter hook output priority -110; policy accept;
        ct state new ip daddr . meta l4proto . th dport vmap @no-endpoint-services
        ip daddr @cluster-ips counter; }
}
"#;

#[test]
fn the_tables_of_others_are_no_hindrance_and_stay_as_they_are() {
    for is_first in [true, false] {
        on_host(async |host| {
            let load = || {
                let rules = [DOCKER, FIREWALLD, UFW, KUBE_PROXY].concat();
                let file = tempfile::NamedTempFile::new().unwrap();
                std::fs::write(file.path(), rules).unwrap();
                host.run(&format!("nft -f {}", file.path().display()));
            };
            let tables = ["ip nat", "ip filter", "inet firewalld", "ip ufw-filter", "ip kube-proxy"];
            // Without counters, which go on.
            let listed = || tables.map(|table| host.run(&format!("nft -s list table {table}")));
            if is_first {
                load();
            }
            let mut world = World::new();
            world.put("web", true, &[1, 2, 3], |_| {}).await;
            if !is_first {
                load();
            }
            let before = listed();
            assert_eq!(answers(true, 60).len(), 3);
            world.put("web", true, &[], |_| {}).await;
            assert_eq!(connect(true).unwrap_err().kind(), ErrorKind::ConnectionRefused);
            world.put("web", true, &[4], |_| {}).await;
            assert_eq!(answers(true, 10), [endpoint(true, 4)].into());
            world.started.virtual_ips.stop().await;
            assert_eq!(listed(), before);
        });
    }
}

#[test]
fn a_large_table_is_written_once_although_others_are_busy() {
    const SERVICES: u32 = 3000;
    on_host(async |host| {
        let mut world = World::new();
        world.put("web", true, &[1], |_| {}).await;
        let (service, slice) = (world.services["web"].clone(), world.endpoints["web"].clone());
        for n in 0..SERVICES {
            let name = format!("s{n}");
            let address = std::net::Ipv4Addr::from(0x6461_0000 + n).to_string();
            let service = VirtualService { name: name.clone(), addresses: vec![address], ..service.clone() };
            let endpoint = |n: u8| VirtualEndpoint {
                address: endpoint(true, n).to_string(),
                ..slice.endpoints[0].clone()
            };
            let slice = VirtualEndpoints {
                name: name.clone(),
                service: name.clone(),
                endpoints: (1..=7).map(endpoint).collect(),
                ..slice.clone()
            };
            world.services.insert(name.clone(), service);
            world.endpoints.insert(name, slice);
        }
        let (services, endpoints) = (world.services.values(), world.endpoints.values());
        let all = VirtualServicesChanged {
            is_snapshot: true,
            services: services.cloned().collect(),
            endpoints: endpoints.cloned().collect(),
            ..VirtualServicesChanged::default()
        };
        world.tell(all).await;
        // Without optimisation, this takes a while.
        let counts = || {
            let view = world.started.virtual_ips.view();
            (view.frontends, view.endpoints)
        };
        for _ in 0..100 {
            if counts() != (3, 3) {
                break;
            }
            sleep(Duration::from_millis(200)).await;
        }
        assert_eq!(counts(), (3 + 9000, 3 + 63_000));
        // A table that is made anew has another handle.
        let handle = || {
            let tables = host.run("nft -a list tables");
            tables.lines().find(|line| line.contains("muster_muster0_services")).unwrap().to_owned()
        };
        let before = handle();
        let elements: Vec<String> = (0..5000).map(|n| format!("10.{}.{}.1", n / 250, n % 250)).collect();
        let file = tempfile::NamedTempFile::new().unwrap();
        let set = format!(
            "table ip other {{ set s {{ type ipv4_addr; elements = {{ {} }}; }}; }}",
            elements.join(", ")
        );
        std::fs::write(file.path(), set).unwrap();
        for _ in 0..3 {
            host.run(&format!("nft -f {}", file.path().display()));
            host.run("nft delete table ip other");
        }
        sleep(Duration::from_millis(2500)).await;
        assert_eq!(handle(), before);
    });
}
