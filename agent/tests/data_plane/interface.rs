//! The interface as iproute2 sees it after each thing that is asked of it.

use std::net::IpAddr;

use muster_agent::{
    interface::{Interface, InterfaceConfig, RESOLVER_ADDRESS, Swept, Warning, sweep},
    tun::Tun,
};

use crate::namespace::{Namespace, have_root};

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn config() -> InterfaceConfig {
    InterfaceConfig {
        mtu: 1400,
        addresses: vec![ip("100.64.1.2"), ip("fd00:1::2")],
        routes: ["100.64.0.0/11", "100.96.0.0/12", "fd00:1::/48"]
            .map(|r| r.parse().expect("a prefix"))
            .to_vec(),
        resolver_address: Some(RESOLVER_ADDRESS.into()),
    }
}

#[test]
fn link_addresses_and_routes_are_programmed_changed_and_removed() {
    if !have_root() {
        return;
    }
    let namespace = Namespace::new();
    namespace.enter(async || {
        let _tun = Tun::create("muster0").expect("create");
        let (mut interface, warnings) = Interface::program("muster0", &config()).await.expect("program");
        assert_eq!(warnings, []);
        let link = namespace.ip("-d link show muster0");
        assert!(
            link.contains("UP") && link.contains("mtu 1400") && link.contains("addrgenmode none"),
            "{link}"
        );
        let addresses = namespace.ip("addr show muster0");
        for expected in [
            "inet 100.64.1.2/32 scope global",
            "inet6 fd00:1::2/128 scope global",
            "inet 169.254.20.10/32 scope host",
        ] {
            assert!(addresses.contains(expected), "{expected} is missing from {addresses}");
        }
        assert!(!addresses.contains("fe80") && !addresses.contains("tentative"), "{addresses}");
        let routes = namespace.ip("route show proto 139") + &namespace.ip("-6 route show proto 139");
        for expected in [
            "100.64.0.0/11 dev muster0 scope link src 100.64.1.2",
            "100.96.0.0/12 dev muster0 scope link src 100.64.1.2",
            "fd00:1::/48 dev muster0 src fd00:1::2",
        ] {
            assert!(routes.contains(expected), "{expected} is missing from {routes}");
        }
        std::net::UdpSocket::bind((RESOLVER_ADDRESS, 53)).expect("the resolver can listen");

        let before = (namespace.ip("addr show muster0"), namespace.ip("route show"));
        assert_eq!(interface.update(&config()).await.expect("the same again"), []);
        assert_eq!((namespace.ip("addr show muster0"), namespace.ip("route show")), before);

        let mut other = config();
        other.addresses[0] = ip("100.64.1.3");
        other.routes.remove(1);
        other.mtu = 1300;
        interface.update(&other).await.expect("change");
        let addresses = namespace.ip("addr show muster0");
        assert!(addresses.contains("100.64.1.3/32") && !addresses.contains("100.64.1.2"), "{addresses}");
        assert!(addresses.contains("mtu 1300"), "{addresses}");
        let routes = namespace.ip("route show");
        assert!(
            routes.contains("100.64.0.0/11 dev muster0") && routes.contains("src 100.64.1.3"),
            "{routes}"
        );
        assert!(!routes.contains("100.96.0.0/12"), "{routes}");

        interface.remove().await.expect("remove");
        assert_eq!(namespace.ip("route show") + &namespace.ip("-6 route show proto 139"), "");
        assert!(!namespace.ip("addr show muster0").contains("inet"));
    });
}

#[test]
fn the_sweep_takes_what_a_crash_has_left_and_nothing_else() {
    if !have_root() {
        return;
    }
    let namespace = Namespace::new();
    namespace.enter(async || {
        for line in [
            "link add left0 type veth peer name left1",
            "link set left0 up",
            "route add unreachable 100.120.0.0/16 proto 139",
        ] {
            namespace.ip(line);
        }
        // What a TUN device would take with it stays with any other device.
        Interface::program("left0", &config()).await.expect("program");
        namespace.ip("addr add 10.5.5.5/24 dev left0");
        namespace.ip("route add 10.77.0.0/16 dev left0 proto static");
        // Another network's agent, which is alive.
        let _tun = Tun::create("other0").expect("create");
        let mut other = config();
        other.routes = vec!["100.112.0.0/16".parse().expect("a prefix")];
        other.addresses = vec![ip("100.112.1.2")];
        other.resolver_address = None;
        Interface::program("other0", &other).await.expect("program");

        assert_eq!(sweep().await.expect("sweep"), Swept { routes: 4, addresses: 3 });
        let routes = namespace.ip("route show") + &namespace.ip("-6 route show");
        for gone in ["100.64.0.0/11", "100.96.0.0/12", "100.120.0.0/16", "fd00:1::/48"] {
            assert!(!routes.contains(gone), "{gone} is still in {routes}");
        }
        for kept in ["100.112.0.0/16 dev other0", "10.77.0.0/16", "10.5.5.0/24"] {
            assert!(routes.contains(kept), "{kept} is missing from {routes}");
        }
        let addresses = namespace.ip("addr show left0");
        assert!(addresses.contains("10.5.5.5") && !addresses.contains("169.254.20.10"), "{addresses}");
        assert_eq!(sweep().await.expect("again"), Swept::default());
    });
}

#[test]
fn an_overlap_with_the_hosts_own_routes_is_a_warning_and_leaves_them_alone() {
    if !have_root() {
        return;
    }
    let namespace = Namespace::new();
    namespace.enter(async || {
        for line in [
            "link add wan0 type veth peer name wan1",
            "link set wan1 up",
            "link set wan0 up",
            "addr add 100.65.0.9/16 dev wan0",
            "route add default dev wan0",
            "route add 100.96.0.0/12 dev wan0",
        ] {
            namespace.ip(line);
        }
        let _tun = Tun::create("muster0").expect("create");
        let (_, warnings) = Interface::program("muster0", &config()).await.expect("program");
        let overlap = |pool: &str, route: &str| Warning::PoolOverlap {
            pool: pool.parse().expect("a prefix"),
            route: route.parse().expect("a prefix"),
            interface: Some("wan0".into()),
        };
        assert_eq!(
            warnings,
            [overlap("100.64.0.0/11", "100.65.0.0/16"), overlap("100.96.0.0/12", "100.96.0.0/12")]
        );
        let routes = namespace.ip("route show");
        assert!(routes.contains("100.96.0.0/12 dev wan0"), "{routes}");
        assert!(routes.contains("100.64.0.0/11 dev muster0"), "{routes}");
    });
}

#[test]
fn a_host_without_ipv6_gets_ipv4_and_a_warning() {
    if !have_root() {
        return;
    }
    let namespace = Namespace::new();
    namespace.run("sysctl -q net.ipv6.conf.all.disable_ipv6=1");
    namespace.run("sysctl -q net.ipv6.conf.default.disable_ipv6=1");
    namespace.enter(async || {
        let _tun = Tun::create("muster0").expect("create");
        let (_, warnings) = Interface::program("muster0", &config()).await.expect("program");
        assert_eq!(warnings, [Warning::Ipv6Disabled]);
        assert!(namespace.ip("addr show muster0").contains("100.64.1.2/32"));
    });
}

#[test]
fn an_interface_that_somebody_takes_down_and_up_is_programmed_anew() {
    if !have_root() {
        return;
    }
    let namespace = Namespace::new();
    namespace.enter(async || {
        let tun = Tun::create("muster0").expect("create");
        let (mut interface, _) = Interface::program("muster0", &config()).await.expect("program");
        let mut came_up = interface.watch().expect("watch");
        let state = || {
            let routes = namespace.ip("route show proto 139") + &namespace.ip("-6 route show proto 139");
            routes + &namespace.ip("-br addr show muster0")
        };
        let before = state();
        namespace.ip("link set muster0 down");
        assert_ne!(state(), before);
        namespace.ip("link set muster0 up");
        let soon = std::time::Duration::from_secs(5);
        tokio::time::timeout(soon, came_up.changed()).await.expect("in time").expect("watched");
        interface.update(&config()).await.expect("again");
        assert_eq!(state(), before);
        assert!(!came_up.has_changed().expect("watched"), "programming it is no reason to program it");
        drop(tun);
        tokio::time::timeout(soon, came_up.changed()).await.expect("in time").expect_err("gone");
    });
}

#[test]
fn what_somebody_removes_is_noticed_but_not_what_going_down_removes() {
    if !have_root() {
        return;
    }
    let namespace = Namespace::new();
    namespace.enter(async || {
        let _tun = Tun::create("muster0").expect("create");
        let (mut interface, _) = Interface::program("muster0", &config()).await.expect("program");
        let mut changed = interface.watch().expect("watch");
        let state = || {
            let routes = namespace.ip("route show proto 139") + &namespace.ip("-6 route show proto 139");
            routes + &namespace.ip("-br addr show muster0")
        };
        let before = state();
        let soon = std::time::Duration::from_secs(5);
        for removal in [
            "addr del 100.64.1.2/32 dev muster0",
            "addr del fd00:1::2/128 dev muster0",
            "addr del 169.254.20.10/32 dev muster0",
            "route del 100.96.0.0/12",
            "-6 route del fd00:1::/48",
        ] {
            namespace.ip(removal);
            tokio::time::timeout(soon, changed.changed()).await.expect(removal).expect("watched");
            interface.update(&config()).await.expect("again");
            let after = state();
            let sorted = |text: &str| {
                let mut words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
                words.sort();
                words
            };
            assert_eq!(sorted(&after), sorted(&before), "{removal}");
        }
        namespace.ip("link set muster0 down");
        let pause = std::time::Duration::from_millis(900);
        tokio::time::timeout(pause, changed.changed()).await.expect_err("it stays down");
    });
}

#[test]
fn an_interface_that_is_not_there_is_named() {
    if !have_root() {
        return;
    }
    let namespace = Namespace::new();
    namespace.enter(async || {
        let error =
            Interface::program("muster0", &config()).await.err().expect("no such interface").to_string();
        assert!(error.contains("find interface muster0"), "{error}");
    });
}
