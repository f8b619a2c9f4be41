//! Section 9: namespaces.

use hickory_proto::rr::RecordType::{A, PTR, SRV};
use muster_dns::{directory::Viewer, options::PodMode};

use crate::{
    network::{Asking, directory},
    support::{label, member},
};

/// 9: with a list of exposed namespaces, others answer as if absent, in both directions.
#[test]
fn exposed_namespaces() {
    let net = Asking::with(|options| {
        options.namespaces = Some([label("prod")].into());
        options.pods = PodMode::Insecure;
    });
    net.nxdomain("default.svc.net.example.", A);
    net.nxdomain("web.default.svc.net.example.", A);
    net.nxdomain("_http._tcp.web.default.svc.net.example.", SRV);
    net.nxdomain("192-0-2-1.default.pod.net.example.", A);
    net.nxdomain("10.0.96.100.in-addr.arpa.", PTR);
    assert_eq!(net.answers("db.prod.svc.net.example.", A).len(), 2);
    net.nodata("prod.svc.net.example.", A);
}

/// 9: deleting a namespace takes its names away at once.
#[test]
fn deleted_namespaces() {
    let mut directory = directory();
    directory.namespaces.retain(|(_, name)| name.as_str() != "default");
    let net = Asking::of(directory, |_| {});
    net.nxdomain("default.svc.net.example.", A);
    net.nxdomain("web.default.svc.net.example.", A);
    net.nxdomain("10.0.96.100.in-addr.arpa.", PTR);
}

/// Policy: Services that are hidden from a client do not exist for it; strangers and other networks are refused.
#[test]
fn views() {
    let mut directory = directory();
    directory.hidden.push((label("d1"), label("web")));
    let net = Asking::of(directory, |_| {});
    let name = "web.default.svc.net.example.";
    assert_eq!(net.answers(name, A).len(), 1);
    let net = net.viewer(member("net", "d1"));
    net.nxdomain(name, A);
    net.nxdomain("10.0.96.100.in-addr.arpa.", PTR);
    let net = net.viewer(member("other", "d1"));
    net.refused(name, A);
    net.refused("lb.default.ext.example.", A);
    let net = net.viewer(Viewer::Stranger);
    net.refused(name, A);
    net.refused("svc.net.example.", A);
    net.refused("lb.default.ext.example.", A);
    assert_eq!(net.answers("ns1.dns.ext.example.", A).len(), 1);
}
