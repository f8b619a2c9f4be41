//! Section 16: falling through.

use hickory_proto::{
    op::ResponseCode,
    rr::{
        RData, Record,
        RecordType::{A, PTR, TXT},
        rdata::A as Address,
    },
};
use muster_dns::{directory::Viewer, fixed::FixedDirectory, options::Fallthrough};

use crate::network::{Asking, denied, directory, name, reply, shown};

const GONE: &str = "nothing.default.svc.net.example.";

/// 16: NXDOMAIN is handed on, and the reply is passed back; NODATA never is.
#[test]
fn for_all_zones() {
    let net = Asking::with(|options| options.fallthrough = Fallthrough::Always);
    let upstream = net.begin(GONE, A).unwrap_err();
    assert_eq!((upstream.name.to_ascii().as_str(), upstream.record_type, upstream.whole), (GONE, A, true));
    let record = Record::from_rdata(name(GONE), 60, RData::A(Address([192, 0, 2, 9].into())));
    let response = net.resume(upstream, Some(&reply(ResponseCode::NoError, vec![record]))).unwrap();
    assert_eq!(shown(&response.answers), [format!("{GONE} A 192.0.2.9")]);
    assert!(!response.metadata.authoritative && response.metadata.recursion_available);
    let upstream = net.begin(GONE, A).unwrap_err();
    let response = net.resume(upstream, None).unwrap();
    assert_eq!(response.metadata.response_code, ResponseCode::ServFail);
    denied(&net.begin("web.default.svc.net.example.", TXT).unwrap(), ResponseCode::NoError);
    // Nobody to ask.
    net.nxdomain(GONE, A);
    assert!(net.begin("99.1.64.100.in-addr.arpa.", PTR).is_err());
}

/// 13: owners are as in the question, however other servers spell them; what they do not share with it is kept.
#[test]
fn spelled_as_asked() {
    let net = Asking::with(|options| options.fallthrough = Fallthrough::Always);
    let upstream = net.begin("NoThing.default.svc.net.example.", A).unwrap_err();
    let address = || RData::A(Address([192, 0, 2, 9].into()));
    let records = ["nOTHING.DEFAULT.svc.net.Example.", "Other.default.SVC.net.example.", "Com.", "."]
        .map(|owner| Record::from_rdata(name(owner), 60, address()));
    let response = net.resume(upstream, Some(&reply(ResponseCode::NoError, records.to_vec()))).unwrap();
    let owners: Vec<String> = response.answers.iter().map(|record| record.name.to_ascii()).collect();
    for owner in ["NoThing.default.svc.net.example.", "Other.default.svc.net.example.", "Com.", "."] {
        assert!(owners.iter().any(|own| own == owner), "{owner}: {owners:?}");
    }
}

/// 16: only the zones that are listed.
#[test]
fn for_some_zones() {
    let net = Asking::with(|options| {
        options.fallthrough = Fallthrough::Zones(vec!["prod.svc.net.example".parse().unwrap()]);
    });
    denied(&net.begin(GONE, A).unwrap(), ResponseCode::NXDomain);
    assert!(net.begin("x.prod.svc.net.example.", A).is_err());
    denied(&Asking::with(|_| {}).begin(GONE, A).unwrap(), ResponseCode::NXDomain);
}

/// Nothing is asked for strangers, nor while names may only be unknown yet.
#[test]
fn not_for_everyone() {
    let loading = FixedDirectory { loading: true, ..directory() };
    let net = Asking::of(loading, |options| options.fallthrough = Fallthrough::Always);
    denied(&net.begin(GONE, A).unwrap(), ResponseCode::ServFail);
    let net = Asking::with(|options| options.fallthrough = Fallthrough::Always).viewer(Viewer::Stranger);
    assert_eq!(net.begin(GONE, A).unwrap().metadata.response_code, ResponseCode::Refused);
}
