//! Section 3: endpoint labels.

use hickory_proto::rr::RecordType::{A, AAAA};

use crate::network::Asking;

/// 3: hostname first, else the address; several endpoints may share a label.
#[test]
fn hostname_or_address() {
    let net = Asking::with(|_| {});
    let db = "db.prod.svc.net.example.";
    assert_eq!(net.answers(&format!("db-0.{db}"), A), [format!("db-0.{db} A 100.64.1.8")]);
    assert_eq!(net.answers(&format!("db-0.{db}"), AAAA), [format!("db-0.{db} AAAA fd00:1:2::8")]);
    assert_eq!(net.answers(&format!("100-64-1-9.{db}"), A).len(), 1);
    net.nxdomain(&format!("vault.{db}"), A);
    net.nxdomain(&format!("100-64-1-8.{db}"), A);
    assert_eq!(net.answers("e.crew.prod.svc.net.example.", A).len(), 2);
}

/// 3: an address that would end in a dash gets a 0.
#[test]
fn no_label_ends_in_a_dash() {
    let name = "2001-db8--0.quiet.prod.svc.net.example.";
    assert_eq!(Asking::with(|_| {}).answers(name, AAAA), [format!("{name} AAAA 2001:db8::")]);
}

/// 3: with the option, an endpoint without a hostname is called like its device.
#[test]
fn device_names() {
    let net = Asking::with(|options| options.endpoint_device_names = true);
    let db = "db.prod.svc.net.example.";
    assert_eq!(net.answers(&format!("vault.{db}"), A), [format!("vault.{db} A 100.64.1.9")]);
    net.nxdomain(&format!("100-64-1-9.{db}"), A);
    assert_eq!(net.answers("www.web.default.svc.net.example.", AAAA).len(), 1);
}
