//! Section 4: which endpoints count.

use hickory_proto::rr::RecordType::{A, AAAA, PTR, SRV};

use crate::network::Asking;

/// 4: a headless Service with nothing ready does not exist; one with a cluster IP answers.
#[test]
fn nothing_ready() {
    let net = Asking::with(|_| {});
    for kind in [A, AAAA, SRV] {
        net.nxdomain("none.prod.svc.net.example.", kind);
        net.nxdomain("_pg._tcp.none.prod.svc.net.example.", kind);
    }
    assert_eq!(net.answers("bare.default.svc.net.example.", A).len(), 1);
}

/// 4: ignore empty services: NXDOMAIN for those with a cluster IP, and no other.
#[test]
fn empty_services_can_be_ignored() {
    let net = Asking::with(|options| options.ignore_empty_services = true);
    net.nxdomain("bare.default.svc.net.example.", A);
    net.nxdomain("bare.default.svc.net.example.", SRV);
    net.nxdomain("_http._tcp.many.default.svc.net.example.", SRV);
    assert_eq!(net.answers("web.default.svc.net.example.", A).len(), 1);
    assert_eq!(net.answers("db.prod.svc.net.example.", A).len(), 2);
    assert_eq!(net.answers("inner.default.svc.net.example.", A).len(), 2);
}

/// 4: with endpoints switched off, every endpoint and headless name is NXDOMAIN.
#[test]
fn endpoints_can_be_switched_off() {
    let net = Asking::with(|options| options.endpoints = false);
    net.nxdomain("db.prod.svc.net.example.", A);
    net.nxdomain("db-0.db.prod.svc.net.example.", A);
    net.nxdomain("www.web.default.svc.net.example.", AAAA);
    // The device is left of what had this address.
    assert_eq!(
        net.answers("7.1.64.100.in-addr.arpa.", PTR),
        ["7.1.64.100.in-addr.arpa. PTR web.net.example."]
    );
    assert_eq!(net.answers("web.default.svc.net.example.", A).len(), 1);
}
