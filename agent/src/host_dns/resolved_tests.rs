use std::{
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
};

use super::super::{HostDns, Mode, Paths, Settings};
use super::*;

/// A message bus of its own; gone with the guard.
struct Bus {
    daemon: Child,
    address: String,
    directory: tempfile::TempDir,
}

impl Bus {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let address = format!("unix:path={}/bus", directory.path().display());
        let daemon = Command::new("dbus-daemon")
            .args(["--session", "--nofork", "--nopidfile", "--nosyslog"])
            .arg(format!("--address={address}"))
            .stderr(Stdio::null())
            .spawn()
            .expect("this test needs dbus-daemon");
        let bus = Self { daemon, address, directory };
        let socket = bus.directory.path().join("bus");
        let there = (0..200).any(|_| {
            std::thread::sleep(Duration::from_millis(25));
            socket.exists()
        });
        assert!(there, "dbus-daemon does not start");
        bus
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

type Calls = Arc<Mutex<Vec<String>>>;

/// Writes down what it is told.
struct Fake(Calls);

impl Fake {
    fn note(&self, call: String) {
        self.0.lock().unwrap().push(call);
    }
}

#[zbus::interface(name = "org.freedesktop.resolve1.Manager")]
impl Fake {
    #[zbus(name = "SetLinkDNS")]
    fn set_link_dns(&self, index: i32, servers: Vec<(i32, Vec<u8>)>) {
        self.note(format!("SetLinkDNS {index} {servers:?}"));
    }

    #[zbus(name = "SetLinkDNSEx")]
    fn set_link_dns_ex(&self, index: i32, servers: Vec<(i32, Vec<u8>, u16, String)>) {
        self.note(format!("SetLinkDNSEx {index} {servers:?}"));
    }

    fn set_link_domains(&self, index: i32, domains: Vec<(String, bool)>) {
        self.note(format!("SetLinkDomains {index} {domains:?}"));
    }

    fn set_link_default_route(&self, index: i32, enable: bool) {
        self.note(format!("SetLinkDefaultRoute {index} {enable}"));
    }

    #[zbus(name = "SetLinkDNSOverTLS")]
    fn set_link_dns_over_tls(&self, index: i32, mode: String) {
        self.note(format!("SetLinkDNSOverTLS {index} {mode}"));
    }

    #[zbus(name = "SetLinkDNSSEC")]
    fn set_link_dnssec(&self, index: i32, mode: String) {
        self.note(format!("SetLinkDNSSEC {index} {mode}"));
    }

    fn revert_link(&self, index: i32) {
        self.note(format!("RevertLink {index}"));
    }
}

async fn fake(bus: &Bus, calls: &Calls) -> Connection {
    let fake = Fake(Arc::clone(calls));
    let builder = connection::Builder::address(bus.address.as_str()).name(SERVICE);
    builder.serve_at(PATH, fake).build().await.unwrap()
}

async fn until(calls: &Calls, count: usize) -> Vec<String> {
    for _ in 0..400 {
        let seen = calls.lock().unwrap().clone();
        if seen.len() >= count {
            return seen;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{:?}", calls.lock().unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn resolved_is_told_again_when_it_restarts_and_reverted_at_the_end() {
    let bus = Bus::start();
    let calls = Calls::default();
    let first = fake(&bus, &calls).await;
    let resolver = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let server = resolver.local_addr().unwrap();
    let answering = tokio::spawn(async move {
        let mut query = [0; 512];
        while let Ok((length, from)) = resolver.recv_from(&mut query).await {
            let _ = resolver.send_to(&query[..length], from).await;
        }
    });
    let directory = bus.directory.path();
    let stub = directory.join("resolve/stub-resolv.conf");
    std::fs::create_dir(directory.join("resolve")).unwrap();
    std::fs::write(&stub, "nameserver 127.0.0.53\n").unwrap();
    std::os::unix::fs::symlink(&stub, directory.join("resolv.conf")).unwrap();
    let settings = Settings {
        mode: Mode::Auto,
        server,
        interface: "lo".into(),
        domain: "net.example".into(),
        routes: vec!["100.64.0.0/15".parse().unwrap()],
        search: vec!["default.svc.net.example".into()],
        paths: Paths {
            resolv_conf: directory.join("resolv.conf"),
            backup: directory.join("state/backup"),
            resolved: directory.join("resolve"),
            bus: bus.address.clone(),
        },
    };
    let mut hook = HostDns::prepare(settings).await;
    assert_eq!(hook.resolv_conf(), directory.join("resolv.conf"));
    hook.start().await;
    let port = server.port();
    let told = [
        format!("SetLinkDNSEx 1 [(2, [127, 0, 0, 1], {port}, \"\")]"),
        "SetLinkDefaultRoute 1 false".into(),
        "SetLinkDNSOverTLS 1 no".into(),
        "SetLinkDNSSEC 1 no".into(),
        "SetLinkDomains 1 [(\"default.svc.net.example\", false), (\"net.example\", true), \
         (\"64.100.in-addr.arpa\", true), (\"65.100.in-addr.arpa\", true)]"
            .into(),
    ];
    assert_eq!(until(&calls, told.len()).await, told);
    drop(first);
    let _second = fake(&bus, &calls).await;
    assert_eq!(until(&calls, 2 * told.len()).await, [told.clone(), told.clone()].concat());
    hook.stop().await;
    assert_eq!(until(&calls, 2 * told.len() + 1).await.last().unwrap(), "RevertLink 1");
    // The file is resolved's own.
    assert_eq!(std::fs::read_to_string(&stub).unwrap(), "nameserver 127.0.0.53\n");
    answering.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn port_53_is_told_as_every_version_knows_it() {
    let bus = Bus::start();
    let calls = Calls::default();
    let resolved = Resolved::connect(&bus.address).await.unwrap();
    assert!(!resolved.is_running().await.unwrap());
    let link = Link { index: 7, server: "[fd00::1]:53".parse().unwrap(), domains: Vec::new() };
    let error = resolved.apply(&link).await.unwrap_err().to_string();
    assert!(error.contains("SetLinkDNS"), "{error}");
    let _fake = fake(&bus, &calls).await;
    assert!(resolved.is_running().await.unwrap());
    resolved.apply(&link).await.unwrap();
    let dns = "SetLinkDNS 7 [(10, [253, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1])]";
    assert_eq!(until(&calls, 5).await[0], dns);
}

#[tokio::test]
async fn without_a_bus_there_is_an_error_that_says_so() {
    let error = Resolved::connect("unix:path=/nowhere/bus").await.err().unwrap().to_string();
    assert!(error.contains("system bus"), "{error}");
}

#[test]
fn reverse_zones_cover_pools() {
    let zones = |pool: &str| reverse_zones(pool.parse().unwrap());
    assert_eq!(zones("10.1.2.0/24"), ["2.1.10.in-addr.arpa"]);
    assert_eq!(zones("10.0.0.0/8"), ["10.in-addr.arpa"]);
    assert_eq!(zones("100.64.0.0/10").len(), 64);
    assert_eq!(zones("100.64.0.0/10")[63], "127.100.in-addr.arpa");
    assert_eq!(zones("fd00:1:2::/48"), ["2.0.0.0.1.0.0.0.0.0.d.f.ip6.arpa"]);
    assert_eq!(zones("fd00::/7"), ["c.f.ip6.arpa", "d.f.ip6.arpa"]);
    let many: Vec<IpNet> = (0..9).map(|net| format!("{}.0.0.0/9", 2 * net + 1).parse().unwrap()).collect();
    assert_eq!(domains("net.example.", &many, &[]).len(), DOMAINS_MAX);
}
