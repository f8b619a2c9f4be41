//! Private addresses of a host whose only NIC is a veth, and of one that changes.

use std::time::Duration;

use muster_agent::private_addresses::{Exclusions, list, watch};

use crate::namespace::{Namespace, connect, have_root};

fn exclusions() -> Exclusions {
    Exclusions { interface: "muster0".into(), pools: vec!["100.64.0.0/11".parse().expect("a prefix")] }
}

fn text(addresses: &[std::net::IpAddr]) -> Vec<String> {
    addresses.iter().map(ToString::to_string).collect()
}

#[test]
fn the_lan_is_offered_and_container_networks_are_not() {
    if !have_root() {
        return;
    }
    let (host, neighbour) = (Namespace::new(), Namespace::new());
    connect(&host, &neighbour);
    for line in [
        "link add docker0 type bridge",
        "addr add 172.17.0.1/16 dev docker0",
        "link add veth1 type veth peer name veth2",
        "link set veth1 master docker0 up",
        "link set veth2 up",
        "link set docker0 up",
        "tuntap add vpn0 mode tun",
        "addr add 10.44.0.1/24 dev vpn0",
        "link set vpn0 up",
        "link add eth7 type veth peer name veth7",
        "link set veth7 up",
        "addr add 10.7.0.1/24 dev eth7",
        "addr add 100.64.9.9/24 dev eth0",
        "link set eth7 up",
        "route add default via 10.7.0.2",
    ] {
        host.ip(line);
    }
    let offered = host.enter(async || list(&exclusions()).await.expect("list"));
    assert_eq!(text(&offered), ["10.7.0.1", "10.9.0.1", "fd09::1"]);
}

#[test]
fn changes_are_reported_once_the_host_is_quiet() {
    if !have_root() {
        return;
    }
    let (host, neighbour) = (Namespace::new(), Namespace::new());
    connect(&host, &neighbour);
    host.enter(async || {
        let mut addresses = watch(exclusions()).await.expect("watch");
        assert_eq!(text(&addresses.borrow_and_update()), ["10.9.0.1", "fd09::1"]);
        host.ip("addr add 10.9.0.77/24 dev eth0");
        host.ip("addr del 10.9.0.1/24 dev eth0");
        host.ip("addr add 10.9.0.77/24 dev eth0");
        tokio::time::timeout(Duration::from_secs(5), addresses.changed())
            .await
            .expect("in time")
            .expect("alive");
        assert_eq!(text(&addresses.borrow_and_update()), ["10.9.0.77", "fd09::1"]);

        // A change that alters nothing of what is offered is not one.
        host.ip("link add veth1 type veth peer name veth2");
        host.ip("link set eth0 down");
        tokio::time::timeout(Duration::from_secs(5), addresses.changed())
            .await
            .expect("in time")
            .expect("alive");
        assert_eq!(text(&addresses.borrow_and_update()), Vec::<String>::new());
    });
}
