//! Section 5: ExternalName.

use hickory_proto::{
    op::ResponseCode,
    rr::{
        RData, Record,
        RecordType::{A, AAAA, CNAME, MX, SRV, TXT},
        rdata::A as Address,
    },
};

use crate::{
    network::{Asking, name, reply, shown},
    support::query,
};

const OUT: &str = "out.default.svc.net.example.";

/// 5: CNAME alone for CNAME; nothing for other types; nothing below.
#[test]
fn what_is_not_an_address() {
    let net = Asking::with(|_| {});
    assert_eq!(net.answers(OUT, CNAME), [format!("{OUT} CNAME WWW.example.org.")]);
    for kind in [SRV, TXT, MX] {
        net.nodata(OUT, kind);
    }
    net.nxdomain(&format!("x.{OUT}"), A);
    net.nxdomain(&format!("_http._tcp.{OUT}"), SRV);
}

/// 5: a target inside the domain is followed here.
#[test]
fn inside() {
    let net = Asking::with(|_| {});
    let (inner, web) = ("inner.default.svc.net.example.", "web.default.svc.net.example.");
    assert_eq!(net.answers(inner, A), [format!("{inner} CNAME {web}"), format!("{web} A 100.96.0.10")]);
    assert_eq!(net.answers(inner, AAAA).len(), 2);
    let device = net.ask("device.default.svc.net.example.", A);
    assert_eq!(device.answers.len(), 2);
    for without in ["gone", "self", "round", "foreign"] {
        net.nodata(&format!("{without}.default.svc.net.example."), A);
    }
    net.nodata("device.default.svc.net.example.", SRV);
}

/// 5: chains stop after ten steps.
#[test]
fn ten_steps() {
    let net = Asking::with(|_| {});
    assert_eq!(net.answers("hop10.default.svc.net.example.", A).len(), 11);
    net.nodata("hop11.default.svc.net.example.", A);
}

/// 5: an external name that is an address does not exist.
#[test]
fn addresses_are_no_names() {
    let net = Asking::with(|_| {});
    for kind in [A, AAAA, CNAME, TXT] {
        net.nxdomain("address.default.svc.net.example.", kind);
        net.nxdomain("six.default.svc.net.example.", kind);
    }
}

/// 5: a target elsewhere is asked for; its records come with their TTLs, spelled as the CNAME has it, and TC is passed on.
#[test]
fn elsewhere() {
    let net = Asking::with(|_| {});
    // Nobody to ask.
    net.nodata(OUT, A);
    let upstream = net.begin(OUT, A).unwrap_err();
    assert_eq!((upstream.name.to_ascii(), upstream.record_type), ("WWW.example.org.".to_owned(), A));
    assert!(!upstream.whole);
    let data = RData::A(Address([192, 0, 2, 80].into()));
    let mut found =
        reply(ResponseCode::NoError, vec![Record::from_rdata(name("www.example.org."), 1234, data)]);
    found.metadata.truncation = true;
    let response = net.resume(upstream, Some(&found)).unwrap();
    assert_eq!(
        shown(&response.answers),
        [format!("{OUT} CNAME WWW.example.org."), "WWW.example.org. A 192.0.2.80".to_owned(),]
    );
    assert_eq!((response.answers[0].ttl, response.answers[1].ttl), (5, 1234));
    assert!(response.metadata.truncation && response.metadata.authoritative);
    assert!(!response.metadata.recursion_available);
    assert_eq!((response.metadata.id, &response.queries), (4242, &query(OUT, A).queries));

    // NOERROR even if the target does not exist or its lookup fails.
    let absent = reply(ResponseCode::NXDomain, Vec::new());
    for failed in [Some(&absent), None] {
        let response = net.resume(net.begin(OUT, A).unwrap_err(), failed).unwrap();
        assert_eq!(response.metadata.response_code, ResponseCode::NoError);
        assert_eq!(shown(&response.answers), [format!("{OUT} CNAME WWW.example.org.")]);
    }
    // Through another name inside.
    let away = net.begin("away.default.svc.net.example.", AAAA).unwrap_err();
    assert_eq!(away.name.to_ascii(), "WWW.example.org.");
    assert_eq!(net.resume(away, None).unwrap().answers.len(), 2);
}
