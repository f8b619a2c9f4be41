//! The table of encoded answers: who gets what of it, what is left to the engine, and that snapshots stay as they are.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use hickory_proto::{
    op::{Message, ResponseCode},
    rr::RecordType,
};
use muster_dns::{
    engine::Engine,
    fast::{Asker, Encoded, Snapshot, Table, ZoneAnswers, encode},
    message::Transport,
    wire,
};
use support::{directory, query};

const UID: [u8; 16] = [7; 16];
const MEMBER: Asker = Asker::Member { uid: UID };

fn zone(domain: &str) -> ZoneAnswers {
    ZoneAnswers {
        domain: domain.parse().unwrap(),
        external_domain: None,
        ttl: 5,
        serial: 1,
        plain: true,
        devices: true,
        services: true,
    }
}

fn encoded(name: &str) -> Encoded {
    encode(&Engine::new(directory()), name).unwrap()
}

fn set(table: &mut Table, name: &str, network: u32, answers: &Encoded) {
    table.set(&wire::encode_name(name).unwrap(), network, answers);
}

fn table() -> Table {
    let mut table = Table::new();
    table.set_loaded(true);
    table.set_zone(1, &zone("net.example"));
    table.set_zone(2, &zone("other.example"));
    set(&mut table, "web.net.example", 1, &encoded("web.net.example"));
    set(&mut table, "web.other.example", 2, &encoded("web.other.example"));
    table.set_member(UID, 1);
    table
}

fn ask(snapshot: &Snapshot, asker: Asker, name: &str, record_type: RecordType) -> Option<Message> {
    let mut out = Vec::new();
    snapshot.answer(&query(name, record_type).to_vec().unwrap(), asker, Transport::Udp, &mut out)?;
    Some(Message::from_vec(&out).unwrap())
}

fn code(snapshot: &Snapshot, asker: Asker, name: &str) -> Option<ResponseCode> {
    ask(snapshot, asker, name, RecordType::A).map(|response| response.metadata.response_code)
}

#[test]
fn members_see_their_own_network() {
    let mut table = table();
    let snapshot = table.publish();
    assert_eq!(code(&snapshot, MEMBER, "web.net.example."), Some(ResponseCode::NoError));
    assert_eq!(code(&snapshot, MEMBER, "nothing.net.example."), Some(ResponseCode::NXDomain));
    assert_eq!(code(&snapshot, MEMBER, "web.other.example."), Some(ResponseCode::Refused));
    assert_eq!(code(&snapshot, Asker::Open, "web.other.example."), Some(ResponseCode::NoError));
    assert_eq!(code(&snapshot, Asker::Member { uid: [8; 16] }, "web.net.example."), None);
    assert!(table.remove_member(UID) && !table.remove_member(UID));
    assert_eq!(code(&table.publish(), MEMBER, "web.net.example."), None);
}

#[test]
fn what_policy_hides_from_some_is_the_engines_for_members() {
    let mut table = table();
    let mut restricted = encoded("web.net.example");
    restricted.members = false;
    set(&mut table, "web.net.example", 1, &restricted);
    let snapshot = table.publish();
    assert_eq!(code(&snapshot, MEMBER, "web.net.example."), None);
    assert_eq!(code(&snapshot, Asker::Open, "web.net.example."), Some(ResponseCode::NoError));
}

#[test]
fn anything_special_is_the_engines() {
    let snapshot = table().publish();
    for name in [
        "net.example.",
        "ns.dns.net.example.",
        "dns-version.net.example.",
        "hostmaster.net.example.",
        "private.web.net.example.",
        "10-0-0-1.a.pod.net.example.",
        "_http._tcp.web.a.svc.net.example.",
        "7.1.64.100.in-addr.arpa.",
        "elsewhere.test.",
    ] {
        assert_eq!(code(&snapshot, Asker::Open, name), None, "{name}");
    }
    for record_type in [RecordType::ANY, RecordType::AXFR, RecordType::ZERO] {
        assert!(ask(&snapshot, Asker::Open, "web.net.example.", record_type).is_none());
    }
    let mixed = ask(&snapshot, Asker::Open, "wEb.net.Example.", RecordType::A).unwrap();
    assert_eq!(mixed.answers[0].name.to_ascii(), "wEb.net.Example.");
    // Its target is spelled like the question.
    assert!(ask(&snapshot, Asker::Open, "wEb.net.Example.", RecordType::SVCB).is_none());
}

#[test]
fn names_are_denied_where_the_zone_says_so() {
    let mut table = table();
    let names = ["nothing.net.example.", "web.a.svc.net.example.", "h.web.a.svc.net.example."];
    let denied = |table: &Table| {
        let snapshot = table.publish();
        names.map(|name| code(&snapshot, Asker::Open, name) == Some(ResponseCode::NXDomain))
    };
    assert_eq!(denied(&table), [true; 3]);
    table.set_zone(1, &ZoneAnswers { services: false, ..zone("net.example") });
    assert_eq!(denied(&table), [true, false, false]);
    table.set_zone(1, &ZoneAnswers { devices: false, ..zone("net.example") });
    assert_eq!(denied(&table), [false, true, true]);
    table.set_zone(1, &ZoneAnswers { plain: false, ..zone("net.example") });
    assert_eq!(denied(&table), [false; 3]);
    table.set_zone(1, &zone("net.example"));
    table.set_loaded(false);
    assert_eq!(denied(&table), [false; 3]);
    assert_eq!(code(&table.publish(), Asker::Open, "web.net.example."), Some(ResponseCode::NoError));
}

#[test]
fn a_snapshot_does_not_change() {
    let mut table = table();
    let before = table.publish();
    assert!(table.remove(&wire::encode_name("web.net.example").unwrap()));
    table.set_zone(2, &zone("moved.example"));
    let between = table.publish();
    table.remove_zone(1);
    let after = table.publish();
    let codes = |name| [&before, &between, &after].map(|snapshot| code(snapshot, Asker::Open, name));
    let (found, missing) = (Some(ResponseCode::NoError), Some(ResponseCode::NXDomain));
    assert_eq!(codes("web.net.example."), [found, missing, None]);
    assert_eq!(codes("web.other.example."), [found, None, None]);
    assert_eq!(codes("web.moved.example."), [None, missing, missing]);
}

#[test]
fn too_large_for_the_client_is_the_engines() {
    let mut table = table();
    set(&mut table, "crowd.net.example", 1, &encoded("crowd.net.example"));
    let snapshot = table.publish();
    let mut message = query("crowd.net.example.", RecordType::A);
    message.edns = None;
    let message = message.to_vec().unwrap();
    let mut out = Vec::new();
    assert!(snapshot.answer(&message, Asker::Open, Transport::Udp, &mut out).is_none());
    assert!(snapshot.answer(&message, Asker::Open, Transport::Tcp, &mut out).is_some());
    assert!(out.len() > 512);
}

#[test]
fn what_does_not_exist_is_not_encoded() {
    assert!(encode(&Engine::new(directory()), "nothing.net.example").is_none());
    // It exists for TXT alone: every type is the engine's.
    let mut table = table();
    set(&mut table, "dns-version.net.example", 1, &encoded("dns-version.net.example"));
    let snapshot = table.publish();
    for record_type in [RecordType::TXT, RecordType::A, RecordType::MX] {
        assert!(ask(&snapshot, Asker::Open, "dns-version.net.example.", record_type).is_none());
    }
}
