//! Section 8: NXDOMAIN or NODATA.

use hickory_proto::{
    op::ResponseCode,
    rr::RecordType::{A, AAAA, ANY, HINFO, MX, NS, PTR, SOA, SRV, TXT},
};
use muster_dns::fixed::FixedDirectory;

use crate::network::{Asking, denied, directory};

/// 8: each line of the table.
#[test]
fn the_table() {
    let net = Asking::with(|_| {});
    for name in ["net.example.", "svc.net.example.", "pod.net.example.", "default.svc.net.example."] {
        for kind in [TXT, MX, SRV, ANY] {
            net.nodata(name, kind);
        }
    }
    for name in ["web.default.svc.net.example.", "db.prod.svc.net.example.", "db-0.db.prod.svc.net.example."]
    {
        for kind in [TXT, MX, NS, SOA, HINFO, ANY, PTR] {
            net.nodata(name, kind);
        }
    }
    for name in [
        "nothing.default.svc.net.example.",
        "nothing.web.default.svc.net.example.",
        "_x._tcp.web.default.svc.net.example.",
        "_http._sctp.web.default.svc.net.example.",
        "web.nowhere.svc.net.example.",
        "nowhere.svc.net.example.",
        "a.b.c.d.e.svc.net.example.",
        "web.default.other.net.example.",
    ] {
        for kind in [A, SRV, ANY] {
            net.nxdomain(name, kind);
        }
    }
    net.nodata("quiet.prod.svc.net.example.", SRV);
}

/// 8: an address query under a port name returns the addresses.
#[test]
fn addresses_under_a_port_name() {
    let net = Asking::with(|_| {});
    let name = "_http._tcp.web.default.svc.net.example.";
    assert_eq!(net.answers(name, A), [format!("{name} A 100.96.0.10")]);
    assert_eq!(net.answers("_pg._tcp.db.prod.svc.net.example.", AAAA).len(), 1);
}

/// 8: names that hold nothing but have names below.
#[test]
fn empty_non_terminals() {
    let net = Asking::with(|_| {});
    for (name, kind) in [
        ("dns.net.example.", A),
        ("dns-version.net.example.", A),
        ("_tcp.web.default.svc.net.example.", SRV),
        ("64.100.in-addr.arpa.", A),
        ("1.64.100.in-addr.arpa.", A),
    ] {
        let response = net.ask(name, kind);
        // A reverse zone's own apex does exist.
        let apex = name == "64.100.in-addr.arpa.";
        denied(&response, if apex { ResponseCode::NoError } else { ResponseCode::NXDomain });
    }
}

/// 8: not loaded yet: SERVFAIL with SOA, and known names are answered.
#[test]
fn while_loading() {
    let net = Asking::of(FixedDirectory { loading: true, ..directory() }, |_| {});
    denied(&net.ask("nothing.default.svc.net.example.", A), ResponseCode::ServFail);
    denied(&net.ask("nowhere.svc.net.example.", A), ResponseCode::ServFail);
    assert_eq!(net.answers("web.default.svc.net.example.", A).len(), 1);
}
