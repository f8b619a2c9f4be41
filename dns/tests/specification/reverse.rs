//! Section 7: reverse names.

use hickory_proto::{
    op::ResponseCode,
    rr::RecordType::{A, NS, PTR, SOA},
};

use crate::{
    network::{Asking, denied, shown},
    support::label,
};

fn sole(net: &Asking, name: &str) -> String {
    let answers = net.answers(name, PTR);
    assert_eq!(answers.len(), 1, "{answers:?}");
    answers[0].strip_prefix(&format!("{name} PTR ")).unwrap().to_owned()
}

/// 7.2: a cluster IP gives one PTR, an endpoint one per Service that has it; a device is named otherwise.
#[test]
fn whose_address_it_is() {
    let net = Asking::with(|_| {});
    assert_eq!(sole(&net, "10.0.96.100.in-addr.arpa."), "web.default.svc.net.example.");
    assert_eq!(sole(&net, "7.1.64.100.in-addr.arpa."), "100-64-1-7.web.default.svc.net.example.");
    assert_eq!(
        net.answers("9.1.64.100.in-addr.arpa.", PTR),
        [
            "9.1.64.100.in-addr.arpa. PTR 100-64-1-9.db.prod.svc.net.example.",
            "9.1.64.100.in-addr.arpa. PTR 100-64-1-9.twin.prod.svc.net.example.",
        ]
    );
    assert_eq!(sole(&net, "10.1.64.100.in-addr.arpa."), "crowd.net.example.");
}

/// 7.1, 7.3: zones beside those of the pools, cut at octets; targets are in the client's forward zone.
#[test]
fn configured_zones() {
    let net = Asking::with(|_| {});
    net.refused("1.0.9.10.in-addr.arpa.", PTR);
    let net = Asking::with(|options| options.reverse_zones = vec!["10.9.0.0/16".parse().unwrap()]);
    assert_eq!(sole(&net, "1.0.9.10.in-addr.arpa."), "a.crew.prod.svc.net.example.");
    let response = net.ask("9.0.9.10.in-addr.arpa.", PTR);
    denied(&response, ResponseCode::NXDomain);
    assert_eq!(response.authorities[0].name.to_ascii(), "9.10.in-addr.arpa.");
    assert_eq!(
        shown(&net.ask("9.10.in-addr.arpa.", SOA).answers),
        ["9.10.in-addr.arpa. SOA ns.dns.net.example. hostmaster.net.example. 1790000000 7200 1800 86400 5"]
    );
    assert_eq!(net.answers("9.10.in-addr.arpa.", NS).len(), 1);
    net.refused("1.0.8.10.in-addr.arpa.", PTR);
}

/// 7.4: what is in a namespace that is not served is left out.
#[test]
fn other_namespaces() {
    let net = Asking::with(|options| options.namespaces = Some([label("default")].into()));
    net.nxdomain("31.1.64.100.in-addr.arpa.", PTR);
    // Only the device is left.
    assert_eq!(sole(&net, "9.1.64.100.in-addr.arpa."), "vault.net.example.");
    assert_eq!(sole(&net, "10.0.96.100.in-addr.arpa."), "web.default.svc.net.example.");
}

/// 7.5: unknown or partial addresses; PTR of a forward name.
#[test]
fn what_is_denied() {
    let net = Asking::with(|_| {});
    net.nxdomain("200.0.96.100.in-addr.arpa.", PTR);
    net.nxdomain("0.96.100.in-addr.arpa.", PTR);
    net.nxdomain("10.0.96.100.in-addr.arpa.", A);
    net.nodata("web.default.svc.net.example.", PTR);
}
