//! Section 6: names of devices by address.

use hickory_proto::rr::RecordType::{A, AAAA, SRV, TXT};
use muster_dns::options::PodMode;

use crate::{network::Asking, support::member};

fn net(mode: PodMode) -> Asking {
    Asking::with(|options| options.pods = mode)
}

/// 6: disabled is the default.
#[test]
fn disabled() {
    let net = Asking::with(|_| {});
    net.nodata("pod.net.example.", A);
    net.nxdomain("default.pod.net.example.", A);
    net.nxdomain("100-64-1-7.default.pod.net.example.", A);
}

/// 6: insecure: the address spelled, in a namespace that exists.
#[test]
fn insecure() {
    let net = net(PodMode::Insecure);
    net.nodata("pod.net.example.", A);
    net.nodata("default.pod.net.example.", A);
    net.nxdomain("nowhere.pod.net.example.", A);
    for (label, kind, address) in
        [("192-0-2-1", A, "192.0.2.1"), ("2001-db8--1", AAAA, "2001:db8::1"), ("1--2-3", AAAA, "1::2:3")]
    {
        let name = format!("{label}.default.pod.net.example.");
        assert_eq!(net.answers(&name, kind), [format!("{name} {kind} {address}")]);
        net.nodata(&name, TXT);
        net.nodata(&name, SRV);
        net.nxdomain(&format!("x.{name}"), kind);
    }
    net.nodata("192-0-2-1.default.pod.net.example.", AAAA);
    for label in ["web", "192-0-2-256", "192-0-2", "1--2--3"] {
        net.nxdomain(&format!("{label}.default.pod.net.example."), A);
    }
    net.nxdomain("192-0-2-1.nowhere.pod.net.example.", A);
}

/// 6: verified: a live device of that namespace with that address; compared as an address.
#[test]
fn verified() {
    let net = net(PodMode::Verified);
    net.nodata("pod.net.example.", A);
    net.nodata("prod.pod.net.example.", A);
    let name = "100-64-1-7.default.pod.net.example.";
    assert_eq!(net.answers(name, A), [format!("{name} A 100.64.1.7")]);
    net.nodata(name, AAAA);
    net.nxdomain("100-64-1-7.prod.pod.net.example.", A);
    net.nxdomain("100-64-1-99.default.pod.net.example.", A);
    let long = "fd00-1-2-0-0-0-0-7.default.pod.net.example.";
    assert_eq!(net.answers(long, AAAA), [format!("{long} AAAA fd00:1:2::7")]);
}

/// Policy: a device that is hidden from the client is not verified for it.
#[test]
fn hidden_devices_are_not_verified() {
    let mut directory = crate::network::directory();
    let network = crate::support::label("net");
    let address = "100.64.1.9".parse().unwrap();
    directory.device_namespaces.push((network, address, crate::support::label("prod")));
    let net = Asking::of(directory, |options| options.pods = PodMode::Verified);
    let name = "100-64-1-9.prod.pod.net.example.";
    assert_eq!(net.answers(name, A).len(), 1);
    net.viewer(member("net", "d1")).nxdomain(name, A);
}
