//! The harness itself: switches carry, routers forward and translate, and nothing is left behind.

use std::time::Duration;

use muster_integration_tests::{
    Host, Lab, Result,
    nat::{Kind, Site},
    process::wait_for,
    router::{Nat, Router},
    scenario,
};

/// Two LANs behind a router each, joined by an "internet" switch: (inside a, router a, inside b).
fn two_sites(lab: &Lab, nat: Nat) -> Result<(Host, Router, Host)> {
    let internet = lab.switch("internet")?;
    let lan = lab.switch("lan")?;
    let (inside, gateway, server) = (lab.host("inside")?, lab.host("gateway")?, lab.host("server")?);
    lan.plug(&inside, &["192.168.1.2/24"])?;
    lan.plug(&gateway, &["192.168.1.1/24"])?;
    let outside = internet.plug(&gateway, &["198.51.100.1/24"])?;
    internet.plug(&server, &["198.51.100.9/24", "2001:db8::9/64"])?;
    inside.route("default via 192.168.1.1")?;
    let router = Router::new(gateway)?;
    router.nat(nat, &outside, Some("192.168.1.2"))?;
    Ok((inside, router, server))
}

/// The source port that the server sees when `inside` sends from port 5000 to the server's port `to`.
fn seen_port(inside: &Host, server: &Host, to: u16) -> Result<u16> {
    let listener = server.spawn("listener", {
        let mut command = server.command("python3");
        command.args(["-u", "-c", &format!(
            "import socket; s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.bind(('198.51.100.9',{to})); print('up'); print(s.recvfrom(99)[1][1])"
        )]);
        command
    })?;
    wait_for("the listener", Duration::from_secs(10), || {
        listener.log().contains("up").then_some(()).ok_or_else(|| listener.log())
    })?;
    let seen = wait_for("a datagram", Duration::from_secs(10), || {
        inside
            .sh(&format!(
                "python3 -c \"import socket; s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.bind(('',5000)); s.sendto(b'x',('198.51.100.9',{to}))\""
            ))
            .map_err(|e| e.to_string())?;
        let log = listener.log();
        log.lines().filter_map(|line| line.parse().ok()).next_back().ok_or(log)
    })?;
    drop(listener);
    std::fs::remove_file(server.directory().join("listener.log")).ok();
    Ok(seen)
}

#[test]
fn a_port_restricted_nat_keeps_the_port() {
    scenario("port-restricted NAT", |lab| {
        let (inside, _router, server) = two_sites(lab, Nat::PortRestricted)?;
        inside.sh("ping -c1 -W2 198.51.100.9")?;
        assert_eq!((seen_port(&inside, &server, 7001)?, seen_port(&inside, &server, 7002)?), (5000, 5000));
        Ok(())
    });
}

#[test]
fn a_symmetric_nat_takes_a_port_for_each_destination() {
    scenario("symmetric NAT", |lab| {
        let (inside, _router, server) = two_sites(lab, Nat::Symmetric)?;
        assert_ne!(seen_port(&inside, &server, 7001)?, seen_port(&inside, &server, 7002)?);
        Ok(())
    });
}

#[test]
fn a_nat_keeps_the_port_though_somebody_outside_knocked_first() {
    scenario("early probe", |lab| {
        let (inside, _router, server) = two_sites(lab, Nat::PortRestricted)?;
        // As a peer does that has been told of this side's address before this side has sent anything.
        server.sh(
            "python3 -c \"import socket; s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.bind(('198.51.100.9',7001)); s.sendto(b'x',('198.51.100.1',5000))\"",
        )?;
        assert_eq!((seen_port(&inside, &server, 7001)?, seen_port(&inside, &server, 7002)?), (5000, 5000));
        Ok(())
    });
}

/// What a host behind `site` receives on the port that it has sent from to 198.51.100.9:7001, of what comes from
/// another address, from another port, and from there, in this order.
fn let_in(site: &Site, server: &Host) -> Result<Vec<String>> {
    const INSIDE: &str = "
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(('', 5000))
s.settimeout(1)
while True:
    s.sendto(b'x', ('198.51.100.9', 7001))
    try:
        while True:
            print(s.recv(99).decode())
    except TimeoutError:
        pass
";
    const OUTSIDE: &str = "
import socket
def bound(address, port):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.bind((address, port))
    return s
stranger, other_port, known = bound('198.51.100.208', 7001), bound('198.51.100.9', 7002), bound('198.51.100.9', 7001)
print('up')
source = known.recvfrom(99)[1]
stranger.sendto(b'address', source)
other_port.sendto(b'port', source)
known.sendto(b'answer', source)
known.recvfrom(99)
";
    let python = |host: &Host, name: &str, script: &str| {
        let mut command = host.command("python3");
        command.args(["-u", "-c", script]);
        host.spawn(name, command)
    };
    let outside = python(server, &format!("outside-{}", site.kind.name()), OUTSIDE)?;
    wait_for("the listener", Duration::from_secs(10), || {
        outside.log().contains("up").then_some(()).ok_or_else(|| outside.log())
    })?;
    let inside = python(&site.host, "inside", INSIDE)?;
    wait_for("the answer", Duration::from_secs(10), || {
        let log = inside.log();
        let received: Vec<String> = log.lines().map(str::to_owned).collect();
        if received.iter().any(|line| line == "answer") { Ok(received) } else { Err(log) }
    })
}

#[test]
fn every_kind_of_nat_lets_in_what_it_should() {
    scenario("filtering of NATs", |lab| {
        let internet = lab.switch("internet")?;
        let server = lab.host("server")?;
        internet.plug(&server, &["198.51.100.9/24", "198.51.100.208/24"])?;
        let everything = ["address", "port", "answer"].as_slice();
        for (number, (kind, expected)) in (1..).zip([
            (Kind::Open, everything),
            (Kind::FullCone, everything),
            (Kind::AddressRestricted, &["port", "answer"]),
            (Kind::PortRestricted, &["answer"]),
            (Kind::Symmetric, &["answer"]),
            (Kind::NatBehindNat, &["answer"]),
            (Kind::DualStack, everything),
        ]) {
            let site = Site::new(lab, &internet, kind.name(), kind, number)?;
            assert_eq!(let_in(&site, &server)?, expected, "{kind:?}");
        }
        let blocked = Site::new(lab, &internet, "blocked", Kind::UdpBlocked, 100)?;
        blocked.host.sh("ping -c1 -W2 198.51.100.9")?;
        blocked.host.sh(
            "python3 -c \"import socket; s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.bind(('',5000)); s.sendto(b'x',('198.51.100.9',7009))\"",
        )?;
        for router in &blocked.routers {
            let rules = router.host().sh("nft list table inet noudp")?;
            assert!(rules.contains("counter packets 1 "), "{rules}");
        }
        let six = Site::new(lab, &internet, "six", Kind::Ipv6Only, 101)?;
        let addresses = six.host.sh("ip -br addr show dev eth0")?;
        assert!(addresses.contains("2001:db8::101/64") && !addresses.contains("198.51"), "{addresses}");
        Ok(())
    });
}

#[test]
fn a_nat_that_is_rebound_takes_another_port_for_all_destinations() {
    scenario("rebinding", |lab| {
        let (inside, router, server) = two_sites(lab, Nat::PortRestricted)?;
        let mut ports = vec![5000];
        assert_eq!(seen_port(&inside, &server, 7001)?, 5000);
        for _ in 0..2 {
            router.rebind(Nat::PortRestricted, "eth1")?;
            let port = seen_port(&inside, &server, 7001)?;
            assert_eq!(seen_port(&inside, &server, 7002)?, port);
            assert!(!ports.contains(&port), "{port} {ports:?}");
            ports.push(port);
        }
        assert!(router.rebind(Nat::FullCone, "eth1").is_err());
        Ok(())
    });
}

#[test]
fn cables_can_be_cut_and_mended() {
    scenario("cut cable", |lab| {
        let (inside, router, server) = two_sites(lab, Nat::None)?;
        server.route("192.168.1.0/24 via 198.51.100.1")?;
        inside.sh("ping -c1 -W2 198.51.100.9")?;
        router.cut(true)?;
        assert!(!inside.try_sh("ping -c1 -W1 198.51.100.9")?.status.success());
        router.cut(false)?;
        inside.sh("ping -c1 -W2 198.51.100.9").map(drop)
    });
}

#[test]
fn a_lab_leaves_nothing_behind() {
    let mut left = None;
    scenario("clean-up", |lab| {
        let host = lab.host("h")?;
        let mut sleeper = host.command("sleep");
        sleeper.arg("1000");
        let process = host.spawn("sleep", sleeper)?;
        left = Some((host.namespace().to_owned(), process.id()));
        std::mem::forget(process);
        Ok(())
    });
    let Some((namespace, pid)) = left else { return };
    assert!(!std::path::Path::new("/run/netns").join(&namespace).exists());
    let gone = wait_for("the process to be gone", Duration::from_secs(5), || {
        let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // A zombie of ours is as dead as a process that is gone.
        if state.is_empty() || state.contains(") Z ") { Ok(()) } else { Err(state) }
    });
    assert!(gone.is_ok(), "{gone:?}");
}
