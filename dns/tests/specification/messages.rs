//! Section 13: messages. What concerns every query alike is tested in the engine's own tests.

use hickory_proto::{
    op::{Edns, Message, ResponseCode},
    rr::{
        DNSClass,
        RecordType::{A, ANY, SRV},
    },
};
use muster_dns::message::Transport;

use crate::{
    network::{Asking, slice},
    support::query,
};

fn large() -> Asking {
    let mut directory = crate::network::directory();
    let addresses: Vec<String> = (0..3000).map(|i| format!("10.200.{}.{}", i / 250, i % 250)).collect();
    let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
    for (_, service) in &mut directory.services {
        if service.name.as_str() == "crew" {
            let mut changed = (**service).clone();
            let ports = changed.endpoints[0].ports.clone();
            changed.endpoints = slice(&ports, &addresses);
            *service = changed.into();
        }
    }
    Asking::of(directory, |_| {})
}

fn sized(net: &Asking, payload: Option<u16>, kind: hickory_proto::rr::RecordType) -> (usize, Message) {
    let mut message = query("crew.prod.svc.net.example.", kind);
    message.edns = payload.map(|size| {
        let mut edns = Edns::new();
        edns.set_max_payload(size);
        edns
    });
    let mut out = Vec::new();
    net.engine.answer(&message.to_vec().unwrap(), &net.context, &mut out);
    (out.len(), Message::from_vec(&out).unwrap())
}

/// 13: 512 octets without EDNS, the client's size up to 1232 with it, TC when anything was dropped; over TCP all
/// that fits 65,535 octets.
#[test]
fn sizes() {
    let mut net = large();
    net.context.transport = Transport::Udp;
    for kind in [A, SRV] {
        for (payload, limit) in [(None, 512), (Some(0), 512), (Some(900), 900), (Some(65_535), 1232)] {
            let (octets, response) = sized(&net, payload, kind);
            assert!(octets <= limit && response.metadata.truncation, "{octets} {limit}");
        }
    }
    net.context.transport = Transport::Tcp;
    let (octets, response) = sized(&net, None, A);
    assert_eq!((response.answers.len(), response.metadata.truncation), (3000, false));
    assert!(octets > 48_000);
    let (octets, response) = sized(&net, None, SRV);
    assert!(octets <= 65_535 && response.metadata.truncation);
}

/// 13: dropping glue alone sets TC too, and leaves Answer whole.
#[test]
fn glue_is_dropped_first() {
    let mut directory = crate::network::directory();
    for (_, service) in &mut directory.services {
        if service.name.as_str() == "crew" {
            let mut changed = (**service).clone();
            let ports = changed.endpoints[0].ports.clone();
            // Few targets with many addresses each.
            let more: Vec<String> = (0..60).map(|i| format!("{}=10.9.1.{i}", ["a", "b"][i % 2])).collect();
            changed.endpoints = slice(&ports, &more.iter().map(String::as_str).collect::<Vec<_>>());
            *service = changed.into();
        }
    }
    let mut net = Asking::of(directory, |_| {});
    net.context.transport = Transport::Udp;
    let (octets, cut) = sized(&net, None, SRV);
    assert!(octets <= 512 && cut.metadata.truncation);
    assert_eq!(cut.answers.len(), 2);
    assert!((1..60).contains(&cut.additionals.len()));
    net.context.transport = Transport::Tcp;
    let (_, whole) = sized(&net, None, SRV);
    assert_eq!((whole.answers.len(), whole.additionals.len(), whole.metadata.truncation), (2, 60, false));
}

/// 13: AA set, RD copied, RA not set; other classes and names outside are REFUSED; ANY is never a record set.
#[test]
fn flags_and_classes() {
    let net = Asking::with(|_| {});
    let mut message = query("web.default.svc.net.example.", A);
    for wanted in [true, false] {
        message.metadata.recursion_desired = wanted;
        let metadata = net.message(&message).metadata;
        assert!(metadata.authoritative && !metadata.recursion_available);
        assert_eq!(metadata.recursion_desired, wanted);
    }
    message.queries[0].set_query_class(DNSClass::CH);
    assert_eq!(net.message(&message).metadata.response_code, ResponseCode::Refused);
    net.refused("www.example.org.", A);
    net.nodata("web.default.svc.net.example.", ANY);
    net.nxdomain("nothing.default.svc.net.example.", ANY);
}
