//! Section 11: name servers.

use std::sync::Arc;

use hickory_proto::rr::RecordType::{A, AAAA, NS};

use crate::network::{Asking, directory, shown, sorted};

fn served_at(addresses: &[&str]) -> Asking {
    let mut directory = directory();
    for (zone, _) in &mut directory.zones {
        let mut changed = (**zone).clone();
        changed.name_server_addresses = addresses.iter().map(|a| a.parse().unwrap()).collect();
        *zone = Arc::new(changed);
    }
    Asking::of(directory, |_| {})
}

/// 11: ns.dns with the bound addresses, without loopback; NS nowhere else.
#[test]
fn without_a_service() {
    let net = served_at(&["127.0.0.1", "203.0.113.53", "::1", "2001:db8::53"]);
    let response = net.ask("net.example.", NS);
    assert_eq!(shown(&response.answers), ["net.example. NS ns.dns.net.example."]);
    assert_eq!(
        shown(&response.additionals),
        ["ns.dns.net.example. A 203.0.113.53", "ns.dns.net.example. AAAA 2001:db8::53"]
    );
    assert_eq!(net.answers("ns.dns.net.example.", A).len(), 1);
    assert_eq!(net.answers("ns.dns.net.example.", AAAA).len(), 1);
    net.nodata("svc.net.example.", NS);
    net.nodata("web.default.svc.net.example.", NS);
    net.nxdomain("nothing.default.svc.net.example.", NS);
}

/// 11: each Service that has the server as an endpoint is a name server.
#[test]
fn behind_services() {
    let net = served_at(&["100.64.1.7", "100.64.1.8"]);
    let response = net.ask("net.example.", NS);
    assert_eq!(
        sorted(&response.answers),
        ["net.example. NS db-0.db.prod.svc.net.example.", "net.example. NS web.default.svc.net.example.",]
    );
    assert_eq!(
        sorted(&response.additionals),
        [
            "db-0.db.prod.svc.net.example. A 100.64.1.8",
            "web.default.svc.net.example. A 100.96.0.10",
            "web.default.svc.net.example. AAAA fd00:1:2:ff::10",
        ]
    );
    net.nodata("ns.dns.net.example.", A);
}
