//! Section 13: messages. What concerns every query alike is tested in the engine's own tests.

use hickory_proto::{
    op::{Edns, Message, OpCode, Query, ResponseCode},
    rr::{
        DNSClass, Name,
        RecordType::{A, ANY, SRV},
        rdata::opt::EdnsOption,
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

/// 13: OPT only if the query had one, with DO copied and unknown options dropped; version above 0 is BADVERS.
#[test]
fn edns() {
    let mut net = Asking::with(|_| {});
    for transport in [Transport::Udp, Transport::Tcp, Transport::Tls] {
        net.context.transport = transport;
        let mut message = query("web.default.svc.net.example.", A);
        message.edns = None;
        let response = net.message(&message);
        assert!(response.edns.is_none() && response.answers.len() == 1, "{response}");
        for dnssec_ok in [true, false] {
            let mut edns = Edns::new();
            edns.set_max_payload(1232);
            edns.set_dnssec_ok(dnssec_ok);
            edns.options_mut().insert(EdnsOption::Unknown(65_001, vec![1, 2, 3]));
            message.edns = Some(edns);
            for name in ["web.default.svc.net.example.", "nothing.default.svc.net.example.", "example.org."] {
                message.queries[0].set_name(Name::from_ascii(name).unwrap());
                let edns = net.message(&message).edns.unwrap();
                assert_eq!((edns.version(), edns.flags().dnssec_ok), (0, dnssec_ok), "{name}");
                assert!(edns.options().as_ref().is_empty(), "{name}");
            }
        }
        message.queries[0].set_name(Name::from_ascii("web.default.svc.net.example.").unwrap());
        message.edns.as_mut().unwrap().set_version(1);
        let response = net.message(&message);
        // BADVERS and BADSIG are one number (RFC 6895, 2.3).
        assert_eq!(u16::from(response.metadata.response_code), u16::from(ResponseCode::BADVERS));
        assert_eq!((response.edns.unwrap().version(), response.answers.len()), (0, 0));
    }
}

/// 13: what is no query for one name gets the code that the RFCs have for it.
#[test]
fn other_messages() {
    let net = Asking::with(|_| {});
    let code = |change: &dyn Fn(&mut Message)| {
        let mut message = query("web.default.svc.net.example.", A);
        change(&mut message);
        let response = net.message(&message);
        assert!(response.answers.is_empty(), "{response}");
        assert_eq!((response.metadata.id, response.metadata.op_code), (4242, message.metadata.op_code));
        response.metadata.response_code
    };
    for op_code in [OpCode::Status, OpCode::Notify, OpCode::Update] {
        assert_eq!(code(&|message| message.metadata.op_code = op_code), ResponseCode::NotImp);
    }
    for class in [DNSClass::CH, DNSClass::HS, DNSClass::NONE, DNSClass::ANY] {
        let other = |message: &mut Message| {
            message.queries[0].set_query_class(class);
        };
        assert_eq!(code(&other), ResponseCode::Refused, "{class}");
    }
    assert_eq!(code(&|message| message.queries.clear()), ResponseCode::FormErr);
    let second = Query::query(Name::from_ascii("db.prod.svc.net.example.").unwrap(), A);
    assert_eq!(code(&|message| message.queries.push(second.clone())), ResponseCode::FormErr);
}
