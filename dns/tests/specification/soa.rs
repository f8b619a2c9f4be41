//! Section 10: SOA and negative caching.

use std::sync::Arc;

use hickory_proto::rr::{
    RData,
    RecordType::{A, SOA},
};

use crate::network::{Asking, directory, shown};

/// 10: the fields, with the owner as spelled.
#[test]
fn fields() {
    let net = Asking::with(|_| {});
    let response = net.ask("nothing.default.svc.Net.EXAMPLE.", A);
    let soa = "Net.EXAMPLE. SOA ns.dns.Net.EXAMPLE. hostmaster.Net.EXAMPLE. 1790000000 7200 1800 86400 5";
    assert_eq!(shown(&response.authorities), [soa]);
    assert_eq!(response.authorities[0].ttl, 5);
    assert_eq!(net.ask("net.example.", SOA).answers[0].ttl, 5);
}

/// 10: TTL is the record TTL, at most 300; minimum is the record TTL.
#[test]
fn ttl() {
    let mut directory = directory();
    for (zone, _) in &mut directory.zones {
        let mut changed = (**zone).clone();
        changed.ttl = 3600;
        *zone = Arc::new(changed);
    }
    let net = Asking::of(directory, |_| {});
    let response = net.ask("nothing.default.svc.net.example.", A);
    let RData::SOA(soa) = &response.authorities[0].data else { panic!("{response}") };
    assert_eq!((response.authorities[0].ttl, soa.minimum), (300, 3600));
    assert_eq!(net.ask("web.default.svc.net.example.", A).answers[0].ttl, 3600);
}
