//! Section 12: external addresses.

use hickory_proto::{
    op::ResponseCode,
    rr::RecordType::{A, AAAA, CNAME, NS, PTR, SOA, SRV, TXT},
};

use crate::network::{Asking, denied, shown};

const LB: &str = "lb.default.ext.example.";

/// 12: addresses and ports, never in the domain.
#[test]
fn services_by_external_address() {
    let net = Asking::with(|_| {});
    assert_eq!(net.answers(LB, A), [format!("{LB} A 198.51.100.5")]);
    assert_eq!(net.answers(LB, AAAA), [format!("{LB} AAAA 2001:db8:5::5")]);
    for owner in [LB.to_owned(), format!("_http._tcp.{LB}")] {
        let response = net.ask(&owner, SRV);
        assert_eq!(shown(&response.answers), [format!("{owner} SRV 0 50 80 {LB}")]);
        assert_eq!(response.additionals.len(), 2);
        assert!(response.answers.iter().all(|r| r.ttl == 5));
    }
    net.nodata(LB, TXT);
    net.nxdomain(&format!("_dns._tcp.{LB}"), SRV);
    net.nxdomain(&format!("x.{LB}"), A);
    assert_eq!(net.answers("lb.default.svc.net.example.", A), ["lb.default.svc.net.example. A 100.96.0.20"]);
}

/// 12: a host name gives CNAME, and is SRV's target.
#[test]
fn services_by_host_name() {
    let net = Asking::with(|_| {});
    let host = "lbhost.default.ext.example.";
    let alias = format!("{host} CNAME LB.example.org.");
    for kind in [CNAME, A, AAAA] {
        assert_eq!(net.answers(host, kind), std::slice::from_ref(&alias));
    }
    assert_eq!(net.begin(host, A).unwrap_err().name.to_ascii(), "LB.example.org.");
    assert_eq!(net.answers(host, SRV), [format!("{host} SRV 0 100 80 LB.example.org.")]);
}

/// 12: the zone's own names.
#[test]
fn apex() {
    let net = Asking::with(|_| {});
    assert_eq!(
        net.answers("ext.example.", SOA),
        ["ext.example. SOA ns1.dns.ext.example. hostmaster.dns.ext.example. 77 7200 1800 86400 5"]
    );
    let response = net.ask("ext.example.", NS);
    assert_eq!(shown(&response.answers), ["ext.example. NS ns1.dns.ext.example."]);
    assert_eq!(response.additionals.len(), 2);
    net.nodata("ext.example.", A);
    net.nodata("dns.ext.example.", A);
    assert_eq!(net.answers("ns1.dns.ext.example.", A), ["ns1.dns.ext.example. A 203.0.113.53"]);
    net.nodata("default.ext.example.", A);
    net.nxdomain("nowhere.ext.example.", A);
    net.nxdomain("web.default.ext.example.", A);
    let response = net.ask("web.default.ext.example.", A);
    denied(&response, ResponseCode::NXDomain);
    assert_eq!(response.authorities[0].name.to_ascii(), "ext.example.");
}

/// 12: with the headless option, endpoints of headless Services that have no external address.
#[test]
fn headless() {
    Asking::with(|_| {}).nxdomain("db.prod.ext.example.", A);
    let net = Asking::with(|options| options.external_headless = true);
    assert_eq!(net.answers("db.prod.ext.example.", A).len(), 2);
    assert_eq!(net.answers("db-0.db.prod.ext.example.", A), ["db-0.db.prod.ext.example. A 100.64.1.8"]);
    assert!(
        net.answers("_pg._tcp.db.prod.ext.example.", SRV)[0].ends_with(" 33 15432 db-0.db.prod.ext.example.")
    );
    net.nxdomain("web.default.ext.example.", A);
}

/// 12: reverse names of external addresses.
#[test]
fn reverse() {
    let net = Asking::with(|options| options.reverse_zones = vec!["198.51.100.0/24".parse().unwrap()]);
    assert_eq!(
        net.answers("5.100.51.198.in-addr.arpa.", PTR),
        [format!("5.100.51.198.in-addr.arpa. PTR {LB}")]
    );
}
