//! Section 15: search lists.

use hickory_proto::{
    op::ResponseCode,
    rr::{
        RData, Record,
        RecordType::{A, AAAA, SRV},
        rdata::A as Address,
    },
};
use muster_dns::options::Fallthrough;

use crate::network::{Asking, denied, name, reply, shown};

fn net() -> Asking {
    Asking::with(|options| {
        options.complete = true;
        options.host_search = vec!["corp.example.".to_owned(), "net.example".to_owned()];
    })
}

/// 15: the remainder of the first search entry is tried with each entry, until one exists.
#[test]
fn entries_of_the_network() {
    let net = net();
    // Found as asked: no CNAME.
    let web = "web.default.svc.net.example.";
    assert_eq!(net.answers(web, A), [format!("{web} A 100.96.0.10")]);
    // service.namespace
    let asked = "db.prod.default.svc.net.example.";
    let found = "db.prod.svc.net.example.";
    assert_eq!(
        net.answers(asked, A),
        [format!("{asked} CNAME {found}"), format!("{found} A 100.64.1.8"), format!("{found} A 100.64.1.9"),]
    );
    assert_eq!(net.answers(&format!("_pg._tcp.{asked}"), SRV).len(), 4);
    // A device, by the domain alone.
    let asked = "crowd.default.svc.net.example.";
    assert_eq!(net.answers(asked, A)[0], format!("{asked} CNAME crowd.net.example."));
    // NODATA is something other than NXDOMAIN.
    let response = net.ask(asked, AAAA);
    assert_eq!(shown(&response.answers), [format!("{asked} CNAME crowd.net.example.")]);
    assert_eq!(response.authorities.len(), 1);
}

/// 15: then the host's own list, then bare, through whoever can be asked.
#[test]
fn elsewhere() {
    let net = net();
    let asked = "www.example.org.default.svc.net.example.";
    let absent = reply(ResponseCode::NXDomain, Vec::new());
    let first = net.begin(asked, A).unwrap_err();
    assert_eq!((first.name.to_ascii().as_str(), first.whole), ("www.example.org.corp.example.", false));
    let bare = net.resume(first, Some(&absent)).unwrap_err();
    assert_eq!(bare.name.to_ascii(), "www.example.org.");
    let data = RData::A(Address([192, 0, 2, 80].into()));
    let found = reply(ResponseCode::NoError, vec![Record::from_rdata(name("www.example.org."), 60, data)]);
    let response = net.resume(bare, Some(&found)).unwrap();
    assert_eq!(
        shown(&response.answers),
        [format!("{asked} CNAME www.example.org."), "www.example.org. A 192.0.2.80".to_owned(),]
    );
    assert_eq!(response.metadata.response_code, ResponseCode::NoError);

    // If all fail, the first reply is returned unchanged.
    let first = net.begin(asked, A).unwrap_err();
    let bare = net.resume(first, None).unwrap_err();
    denied(&net.resume(bare, Some(&absent)).unwrap(), ResponseCode::NXDomain);
    net.nxdomain(asked, A);
    // For callers that ask once.
    let mut out = Vec::new();
    net.engine.finish(net.begin(asked, A).unwrap_err(), Some(&absent), &mut out);
    denied(&hickory_proto::op::Message::from_vec(&out).unwrap(), ResponseCode::NXDomain);
}

/// 15: only below the client's own namespace, only for devices that are known, only when it is on.
#[test]
fn for_whom() {
    let asked = "db.prod.default.svc.net.example.";
    Asking::with(|_| {}).nxdomain(asked, A);
    let mut net = net();
    net.nxdomain("web.default.prod.svc.net.example.", A);
    net.context.source = Some("100.64.1.99".parse().unwrap());
    net.nxdomain(asked, A);
    net.context.source = None;
    net.nxdomain(asked, A);
}

/// 15: access rules apply to the completed name.
#[test]
fn access() {
    let net = net().viewer(crate::support::member("net", "d1"));
    // d1 must not know of vault.
    net.nxdomain("vault.default.svc.net.example.", A);
    let net = net.viewer(crate::support::member("net", "d2"));
    assert_eq!(net.answers("vault.default.svc.net.example.", A).len(), 2);
}

/// 15, 16: what no entry completes falls through.
#[test]
fn with_fallthrough() {
    let net = Asking::with(|options| {
        options.complete = true;
        options.fallthrough = Fallthrough::Always;
    });
    let bare = net.begin("nothing.default.svc.net.example.", A).unwrap_err();
    assert_eq!((bare.name.to_ascii().as_str(), bare.whole), ("nothing.", false));
    assert!(net.resume(bare, None).unwrap_err().whole);
}
