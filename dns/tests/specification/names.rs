//! Section 1: names.

use hickory_proto::rr::RecordType::{A, SRV, TXT};

use crate::network::Asking;

/// 1: each depth of labels means what the table says; more labels do not exist.
#[test]
fn labels_left_of_the_domain_say_what_is_meant() {
    let net = Asking::with(|_| {});
    assert_eq!(net.answers("dns-version.net.example.", TXT), ["dns-version.net.example. TXT 1.1.0"]);
    assert_eq!(net.answers("ns.dns.net.example.", A), ["ns.dns.net.example. A 203.0.113.53"]);
    for container in
        ["svc.net.example.", "pod.net.example.", "default.svc.net.example.", "empty.svc.net.example."]
    {
        net.nodata(container, A);
    }
    assert_eq!(
        net.answers("web.default.svc.net.example.", A),
        ["web.default.svc.net.example. A 100.96.0.10"]
    );
    net.nxdomain("x._http._tcp.web.default.svc.net.example.", SRV);
    net.nxdomain("web.default.svx.net.example.", A);
}

/// 1: underscores may be missing, an empty port or protocol matches every one, names compare without case.
#[test]
fn port_names_are_read_leniently() {
    let net = Asking::with(|_| {});
    for left in ["_http._tcp", "http.tcp", "_http.tcp", "_._tcp", "_http._", "_._", "_HTTP._TCP"] {
        let owner = format!("{left}.web.Default.svc.net.example.");
        let expected = format!("{owner} SRV 0 50 80 web.default.svc.net.example.");
        assert_eq!(net.answers(&owner, SRV), [expected], "{left}");
    }
    net.nxdomain("_http._udp.web.default.svc.net.example.", SRV);
    net.nxdomain("_https._tcp.web.default.svc.net.example.", SRV);
}

/// 1: there are no wildcards.
#[test]
fn an_asterisk_is_an_ordinary_label() {
    let net = Asking::with(|_| {});
    for name in
        ["*.default.svc.net.example.", "web.*.svc.net.example.", "*._tcp.web.default.svc.net.example."]
    {
        net.nxdomain(name, A);
        net.nxdomain(name, SRV);
    }
}

/// 1: devices straight under the domain stay beside Services.
#[test]
fn devices_are_beside_services() {
    let net = Asking::with(|_| {});
    assert_eq!(net.answers("web.net.example.", A), ["web.net.example. A 100.64.1.7"]);
}
