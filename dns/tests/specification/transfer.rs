//! Section 14: zone transfer.

use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{
        RData, Record,
        RecordType::{self, AXFR, IXFR, SOA},
        rdata,
    },
};
use muster_dns::message::Transport;

use crate::{
    network::{Asking, name, shown},
    support::{label, query},
};

fn listed() -> Asking {
    let mut net = Asking::with(|options| options.transfer_to = vec!["100.64.1.0/29".parse().unwrap()]);
    net.context.transport = Transport::Tcp;
    net
}

/// All messages of a transfer.
fn transfer(net: &Asking, message: &Message) -> Vec<Message> {
    let mut transfer = net.engine.transfer(&message.to_vec().unwrap(), &net.context).unwrap();
    let (mut messages, mut out) = (Vec::new(), Vec::new());
    while transfer.next_message(&mut out).is_some() {
        assert!(out.len() <= 65_535);
        messages.push(Message::from_vec(&out).unwrap());
    }
    messages
}

fn records(net: &Asking, message: &Message) -> Vec<String> {
    let messages = transfer(net, message);
    assert!(messages.iter().all(|m| m.metadata.id == 4242 && m.metadata.authoritative));
    shown(&messages.iter().flat_map(|m| m.answers.clone()).collect::<Vec<_>>())
}

fn ixfr(serial: u32) -> Message {
    let mut message = query("net.example.", IXFR);
    let soa = rdata::SOA::new(name("a."), name("b."), serial, 1, 1, 1, 1);
    message.authorities.push(Record::from_rdata(name("net.example."), 5, RData::SOA(soa)));
    message
}

/// 14: refused unless over a stream, to a listed peer, at the apex.
#[test]
fn who_and_how() {
    let mut net = listed();
    for kind in [AXFR, IXFR] {
        Asking::with(|_| {}).refused("net.example.", kind);
        net.refused("svc.net.example.", kind);
        net.refused("example.org.", kind);
    }
    assert!(net.engine.transfer(&query("net.example.", SOA).to_vec().unwrap(), &net.context).is_none());
    net.context.source = Some("100.64.1.8".parse().unwrap());
    net.refused("net.example.", AXFR);
    net.context.source = None;
    net.refused("net.example.", AXFR);
    let mut udp = listed();
    udp.context.transport = Transport::Udp;
    udp.refused("net.example.", AXFR);
    udp.refused("net.example.", IXFR);
}

/// 14: SOA, NS, glue, Services in their order and with their records, SOA.
#[test]
fn order_and_content() {
    let net = listed();
    let all = records(&net, &query("net.example.", AXFR));
    let soa = "net.example. SOA ns.dns.net.example. hostmaster.net.example. 1790000000 7200 1800 86400 5";
    assert_eq!(
        all[..4],
        [
            soa,
            "net.example. NS ns.dns.net.example.",
            "ns.dns.net.example. A 203.0.113.53",
            "ns.dns.net.example. AAAA 2001:db8::53",
        ]
    );
    assert_eq!(all.iter().filter(|record| record.contains(" SOA ")).count(), 2);
    assert_eq!(all.last().unwrap(), soa);
    let of = |name: &str| -> Vec<&str> {
        let ends = |record: &&String| {
            let owner = record.split(' ').next().unwrap();
            owner == name || owner.ends_with(&format!(".{name}"))
        };
        all.iter().filter(ends).map(String::as_str).collect()
    };
    let web = "web.default.svc.net.example.";
    assert_eq!(
        of(web),
        [
            format!("{web} A 100.96.0.10"),
            format!("{web} AAAA fd00:1:2:ff::10"),
            format!("{web} SRV 0 100 80 {web}"),
            format!("_http._tcp.{web} SRV 0 100 80 {web}"),
        ]
    );
    let bare = "bare.default.svc.net.example.";
    assert_eq!(of(bare), [format!("{bare} A 100.96.0.11"), format!("{bare} SRV 0 100 5678 {bare}")]);
    let db = "db.prod.svc.net.example.";
    // The weight is counted within the slice.
    assert_eq!(
        of(db),
        [
            format!("{db} A 100.64.1.8"),
            format!("db-0.{db} A 100.64.1.8"),
            format!("_pg._tcp.{db} SRV 0 50 15432 db-0.{db}"),
            format!("{db} A 100.64.1.9"),
            format!("100-64-1-9.{db} A 100.64.1.9"),
            format!("_pg._tcp.{db} SRV 0 50 15432 100-64-1-9.{db}"),
            format!("{db} AAAA fd00:1:2::8"),
            format!("db-0.{db} AAAA fd00:1:2::8"),
            format!("_pg._tcp.{db} SRV 0 100 15433 db-0.{db}"),
        ]
    );
    let out = "out.default.svc.net.example.";
    assert_eq!(of(out), [format!("{out} CNAME WWW.example.org.")]);
    for absent in ["dns-version", " PTR ", ".pod.", "www.web.default", "address.default"] {
        assert!(!all.iter().any(|record| record.contains(absent)), "{absent}");
    }
    assert!(!all.iter().any(|record| record.starts_with("web.net.example.")));
    // By namespace, and by name in it.
    let place = |name: &str| all.iter().position(|r| r.starts_with(name)).unwrap();
    assert!(place(bare) < place(web) && place(web) < place(db));
}

/// 14: only namespaces that are served.
#[test]
fn served_namespaces() {
    let mut net = Asking::with(|options| {
        options.transfer_to = vec!["100.64.1.7/32".parse().unwrap()];
        options.namespaces = Some([label("prod")].into());
    });
    net.context.transport = Transport::Tls;
    let all = records(&net, &query("net.example.", AXFR));
    assert!(all.iter().any(|r| r.contains(".prod.")) && !all.iter().any(|r| r.contains(".default.")));
}

/// 14: a large zone comes in several messages, with nothing lost.
#[test]
fn several_messages() {
    let mut directory = crate::network::directory();
    let template = directory.services.iter().find(|(_, s)| s.name.as_str() == "web").unwrap().clone();
    for i in 0..2000 {
        let mut service = (*template.1).clone();
        service.name = label(&format!("copy-{i}"));
        directory.services.push((template.0.clone(), service.into()));
    }
    let mut net = Asking::of(directory, |options| options.transfer_to = vec!["0.0.0.0/0".parse().unwrap()]);
    net.context.transport = Transport::Tcp;
    let message = query("net.example.", AXFR);
    let messages = transfer(&net, &message);
    assert!(messages.len() > 10);
    let all = records(&net, &message);
    assert_eq!(all.iter().filter(|record| record.starts_with("copy-")).count(), 3 * 2000);
    assert_eq!(all.iter().filter(|record| record.contains(" SOA ")).count(), 2);
    // Where only one message can be sent, it is not sent by half.
    assert_eq!(net.message(&message).metadata.response_code, ResponseCode::ServFail);
}

/// 14: IXFR: one SOA if the client is current, otherwise all; without a serial SERVFAIL.
#[test]
fn incremental() {
    let net = listed();
    assert_eq!(net.ask("net.example.", IXFR).metadata.response_code, ResponseCode::ServFail);
    for current in [1_790_000_000, 1_790_000_001] {
        let response = net.message(&ixfr(current));
        let types: Vec<RecordType> = response.answers.iter().map(Record::record_type).collect();
        assert_eq!(types, [SOA]);
    }
    let all = records(&net, &query("net.example.", AXFR));
    assert_eq!(records(&net, &ixfr(1_789_999_999)), all);
}

/// 12, 14: the external zone can be transferred likewise.
#[test]
fn external_zone() {
    let all = records(&listed(), &query("ext.example.", AXFR));
    assert_eq!(
        all[4..all.len() - 1],
        [
            "lb.default.ext.example. A 198.51.100.5",
            "lb.default.ext.example. AAAA 2001:db8:5::5",
            "lb.default.ext.example. SRV 0 100 80 lb.default.ext.example.",
            "_http._tcp.lb.default.ext.example. SRV 0 100 80 lb.default.ext.example.",
            "lbhost.default.ext.example. CNAME LB.example.org.",
        ]
    );
}
