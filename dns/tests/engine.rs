//! What the engine answers, rule by rule, and that no octets whatsoever upset it.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{DNSClass, Name, RData, Record, RecordType},
};
use muster_dns::{
    directory::Viewer,
    engine::{Engine, Outcome, QueryContext},
    fixed::FixedDirectory,
    message::Transport,
};
use proptest::prelude::*;
use support::{directory, member, query};

/// The engine's response to `message`, parsed by hickory-proto.
fn ask_with(directory: FixedDirectory, viewer: Viewer, transport: Transport, message: &Message) -> Message {
    let mut out = Vec::new();
    let context = QueryContext { viewer, transport, source: None };
    Engine::new(directory).answer(&message.to_vec().unwrap(), &context, &mut out);
    Message::from_vec(&out).unwrap()
}

fn ask(name: &str, record_type: RecordType) -> Message {
    ask_with(directory(), member("net", "d1"), Transport::Tls, &query(name, record_type))
}

/// A record as in a zone file, without TTL and class.
fn show(record: &Record) -> String {
    format!("{} {} {}", record.name, record.record_type(), record.data)
}

fn section(records: &[Record]) -> Vec<String> {
    records.iter().map(show).collect()
}

fn sorted(records: &[Record]) -> Vec<String> {
    let mut shown = section(records);
    shown.sort();
    shown
}

#[test]
fn one_query_tells_all_addresses_of_a_device() {
    let response = ask("web.net.example.", RecordType::A);
    assert_eq!(response.metadata.response_code, ResponseCode::NoError);
    assert!(response.metadata.authoritative && response.metadata.recursion_desired);
    assert!(!response.metadata.recursion_available);
    assert_eq!(section(&response.answers), ["web.net.example. A 100.64.1.7"]);
    assert_eq!(
        sorted(&response.additionals),
        [
            "director.web.net.example. A 203.0.113.20",
            "director.web.net.example. AAAA 2001:db8::20",
            "private.web.net.example. A 192.168.1.7",
            "private.web.net.example. AAAA 2001:db8:1::7",
        ]
    );
    assert!(response.authorities.is_empty());
    assert!(response.answers.iter().chain(&response.additionals).all(|r| r.ttl == 5));

    let response = ask("web.net.example.", RecordType::AAAA);
    assert_eq!(section(&response.answers), ["web.net.example. AAAA fd00:1:2::7"]);
    assert_eq!(response.additionals.len(), 4);
}

#[test]
fn the_parts_are_answered_by_name() {
    for (name, record_type, expected) in [
        ("private.web.net.example.", RecordType::A, vec!["private.web.net.example. A 192.168.1.7"]),
        ("private.web.net.example.", RecordType::AAAA, vec!["private.web.net.example. AAAA 2001:db8:1::7"]),
        ("director.web.net.example.", RecordType::A, vec!["director.web.net.example. A 203.0.113.20"]),
        ("net.example.", RecordType::A, vec!["net.example. A 203.0.113.10"]),
        ("ns.dns.net.example.", RecordType::A, vec!["ns.dns.net.example. A 203.0.113.53"]),
        ("7.1.64.100.in-addr.arpa.", RecordType::PTR, vec!["7.1.64.100.in-addr.arpa. PTR web.net.example."]),
    ] {
        let response = ask(name, record_type);
        assert_eq!(section(&response.answers), expected, "{name}");
        assert!(response.metadata.authoritative && response.additionals.is_empty(), "{name}");
    }
    let reverse = format!("7.{}2.0.0.0.1.0.0.0.0.0.d.f.ip6.arpa.", "0.".repeat(19));
    assert_eq!(section(&ask(&reverse, RecordType::PTR).answers), [format!("{reverse} PTR web.net.example.")]);
}

#[test]
fn svcb_points_at_the_director() {
    let response = ask("web.net.example.", RecordType::SVCB);
    let RData::SVCB(svcb) = &response.answers[0].data else { panic!("{response}") };
    assert_eq!((response.answers.len(), svcb.svc_priority), (1, 1));
    assert_eq!(svcb.target_name.to_ascii(), "director.web.net.example.");
    assert_eq!(format!("{:?}", svcb.svc_params), "[(Port, Port(3478))]");
    assert_eq!(response.additionals.len(), 2);
    assert_denied(&ask("db.net.example.", RecordType::SVCB), ResponseCode::NoError, "net.example.");
}

#[test]
fn the_apex_has_soa_and_ns_with_glue() {
    let response = ask("net.example.", RecordType::SOA);
    let soa = "net.example. SOA ns.dns.net.example. hostmaster.net.example. 1790000000 7200 1800 86400 5";
    assert_eq!(section(&response.answers), [soa]);
    let response = ask("net.example.", RecordType::NS);
    assert_eq!(section(&response.answers), ["net.example. NS ns.dns.net.example."]);
    assert_eq!(
        section(&response.additionals),
        ["ns.dns.net.example. A 203.0.113.53", "ns.dns.net.example. AAAA 2001:db8::53"]
    );
    let response = ask("64.100.in-addr.arpa.", RecordType::NS);
    assert_eq!(section(&response.answers), ["64.100.in-addr.arpa. NS ns.dns.net.example."]);
    let version = ask("dns-version.net.example.", RecordType::TXT);
    assert_eq!(section(&version.answers), ["dns-version.net.example. TXT 1.1.0"]);
    assert_eq!(version.answers[0].ttl, 28_800);
}

fn assert_denied(response: &Message, code: ResponseCode, apex: &str) {
    let context = format!("{response}");
    assert_eq!(response.metadata.response_code, code, "{context}");
    assert!(response.metadata.authoritative && response.answers.is_empty(), "{context}");
    assert!(response.additionals.is_empty(), "{context}");
    assert_eq!(response.authorities.len(), 1, "{context}");
    assert_eq!(response.authorities[0].record_type(), RecordType::SOA, "{context}");
    assert_eq!(response.authorities[0].name.to_ascii(), apex, "{context}");
}

#[test]
fn what_is_missing_is_nodata_or_nxdomain() {
    use RecordType::{A, AAAA, ANY, HTTPS, MX, NS, PTR, SOA, SRV, TXT};
    for (name, record_type) in [
        ("net.example.", AAAA),
        ("net.example.", TXT),
        ("net.example.", ANY),
        ("svc.net.example.", A),
        ("pod.net.example.", TXT),
        ("db.net.example.", AAAA),
        ("web.net.example.", TXT),
        ("web.net.example.", MX),
        ("web.net.example.", NS),
        ("web.net.example.", SOA),
        ("web.net.example.", SRV),
        ("web.net.example.", HTTPS),
        ("web.net.example.", PTR),
        ("web.net.example.", ANY),
        ("private.db.net.example.", A),
        ("director.db.net.example.", AAAA),
        ("private.web.net.example.", TXT),
        ("ns.dns.net.example.", TXT),
    ] {
        let response = ask(name, record_type);
        assert_denied(&response, ResponseCode::NoError, "net.example.");
        assert_eq!(response.authorities[0].ttl, 5);
    }
    for (name, record_type) in [
        ("nobody.net.example.", A),
        ("nobody.net.example.", ANY),
        ("private.nobody.net.example.", A),
        ("x.web.net.example.", A),
        ("x.private.web.net.example.", A),
        ("private.svc.net.example.", A),
        ("director.dns.net.example.", A),
        ("dns.net.example.", A),
        ("ns.net.example.", A),
        ("private.net.example.", A),
        ("dns-version.net.example.", A),
        ("x.dns-version.net.example.", TXT),
        ("default.svc.net.example.", A),
        ("*.net.example.", A),
        ("we\\.b.net.example.", A),
        ("vault.net.example.", A),
        ("private.vault.net.example.", A),
    ] {
        assert_denied(&ask(name, record_type), ResponseCode::NXDomain, "net.example.");
    }
    for (name, apex) in [
        ("99.1.64.100.in-addr.arpa.", "64.100.in-addr.arpa."),
        ("9.1.64.100.in-addr.arpa.", "64.100.in-addr.arpa."),
        ("1.64.100.in-addr.arpa.", "64.100.in-addr.arpa."),
        ("x.7.1.64.100.in-addr.arpa.", "64.100.in-addr.arpa."),
        ("007.1.64.100.in-addr.arpa.", "64.100.in-addr.arpa."),
        ("7.1.95.100.in-addr.arpa.", "95.100.in-addr.arpa."),
        ("0.2.0.0.0.1.0.0.0.0.0.d.f.ip6.arpa.", "2.0.0.0.1.0.0.0.0.0.d.f.ip6.arpa."),
    ] {
        assert_denied(&ask(name, PTR), ResponseCode::NXDomain, apex);
    }
    assert_denied(&ask("7.1.64.100.in-addr.arpa.", A), ResponseCode::NXDomain, "64.100.in-addr.arpa.");
    assert_denied(&ask("64.100.in-addr.arpa.", A), ResponseCode::NoError, "64.100.in-addr.arpa.");
}

fn assert_refused(response: &Message) {
    assert_eq!(response.metadata.response_code, ResponseCode::Refused, "{response}");
    assert!(!response.metadata.authoritative, "{response}");
    assert!(
        response.answers.is_empty() && response.authorities.is_empty() && response.additionals.is_empty()
    );
}

#[test]
fn names_outside_the_zones_are_refused() {
    for name in [
        ".",
        "example.",
        "example.org.",
        "webnet.example.",
        "1.0.0.127.in-addr.arpa.",
        "100.in-addr.arpa.",
        "arpa.",
    ] {
        assert_refused(&ask(name, RecordType::A));
        assert_refused(&ask(name, RecordType::PTR));
    }
    assert_refused(&ask("net.example.", RecordType::AXFR));
}

#[test]
fn strangers_see_the_apex_and_nothing_else() {
    let ask = |name: &str, record_type| {
        ask_with(directory(), Viewer::Stranger, Transport::Udp, &query(name, record_type))
    };
    for record_type in [RecordType::A, RecordType::SOA, RecordType::NS] {
        assert_eq!(ask("net.example.", record_type).answers.len(), 1, "{record_type}");
    }
    assert_denied(&ask("net.example.", RecordType::AAAA), ResponseCode::NoError, "net.example.");
    for name in [
        "web.net.example.",
        "nobody.net.example.",
        "private.web.net.example.",
        "dns-version.net.example.",
        "svc.net.example.",
        "7.1.64.100.in-addr.arpa.",
        "64.100.in-addr.arpa.",
    ] {
        assert_refused(&ask(name, RecordType::A));
        assert_refused(&ask(name, RecordType::PTR));
    }
}

#[test]
fn members_see_their_own_network_as_policy_lets_them() {
    let ask = |viewer, name: &str, record_type| {
        ask_with(directory(), viewer, Transport::Tls, &query(name, record_type))
    };
    // d1 must not know of vault; d2 may.
    assert_eq!(ask(member("net", "d2"), "vault.net.example.", RecordType::A).answers.len(), 1);
    assert_eq!(ask(member("net", "d2"), "9.1.64.100.in-addr.arpa.", RecordType::PTR).answers.len(), 1);
    // What is hidden looks exactly like what is not there.
    let mut hidden = ask(member("net", "d1"), "vault.net.example.", RecordType::A);
    let mut absent = ask(member("net", "d1"), "vaulx.net.example.", RecordType::A);
    hidden.queries.clear();
    absent.queries.clear();
    assert_eq!(hidden, absent);

    let stranger_to_net = member("other", "d1");
    assert_refused(&ask(stranger_to_net.clone(), "web.net.example.", RecordType::A));
    assert_refused(&ask(stranger_to_net.clone(), "nobody.net.example.", RecordType::A));
    assert_refused(&ask(stranger_to_net.clone(), "7.1.64.100.in-addr.arpa.", RecordType::PTR));
    let own = ask(stranger_to_net, "web.other.example.", RecordType::A);
    assert_eq!(section(&own.answers), ["web.other.example. A 10.1.0.2"]);
    for domain in ["net", "other"] {
        let name = format!("web.{domain}.example.");
        assert_eq!(ask(Viewer::Open, &name, RecordType::A).answers.len(), 1);
    }
    assert_eq!(ask(Viewer::Open, "2.0.1.10.in-addr.arpa.", RecordType::PTR).answers.len(), 1);
}

#[test]
fn until_all_is_loaded_nothing_is_denied() {
    let loading = || FixedDirectory { loading: true, ..directory() };
    let ask =
        |name: &str| ask_with(loading(), member("net", "d1"), Transport::Tls, &query(name, RecordType::A));
    assert_eq!(ask("web.net.example.").answers.len(), 1);
    assert_denied(&ask("nobody.net.example."), ResponseCode::ServFail, "net.example.");
    assert_eq!(ask("example.org.").metadata.response_code, ResponseCode::ServFail);
}

#[test]
fn owners_are_spelled_as_asked() {
    let response = ask("WeB.nEt.EXAMPLE.", RecordType::A);
    assert_eq!(section(&response.answers), ["WeB.nEt.EXAMPLE. A 100.64.1.7"]);
    assert!(response.queries[0].name.eq_case(&Name::from_ascii("WeB.nEt.EXAMPLE.").unwrap()));
    let denied = ask("nobody.nEt.EXAMPLE.", RecordType::A);
    assert_eq!(denied.authorities[0].name.to_ascii(), "nEt.EXAMPLE.");
}

#[test]
fn messages_that_are_no_plain_question_are_turned_away() {
    let turned_away = |change: fn(&mut Message)| {
        let mut message = query("web.net.example.", RecordType::A);
        change(&mut message);
        let response = ask_with(directory(), member("net", "d1"), Transport::Udp, &message);
        assert!(response.answers.is_empty());
        assert_eq!(response.metadata.id, 4242);
        response.metadata.response_code
    };
    assert_eq!(turned_away(|m| m.metadata.op_code = OpCode::Notify), ResponseCode::NotImp);
    assert_eq!(turned_away(|m| m.metadata.op_code = OpCode::Update), ResponseCode::NotImp);
    assert_eq!(turned_away(|m| m.queries.clear()), ResponseCode::FormErr);
    let twice = |m: &mut Message| {
        m.add_query(Query::query(Name::root(), RecordType::A));
    };
    assert_eq!(turned_away(twice), ResponseCode::FormErr);
    let chaos = |m: &mut Message| {
        m.queries[0].set_query_class(DNSClass::CH);
    };
    assert_eq!(turned_away(chaos), ResponseCode::Refused);
    let version = |m: &mut Message| {
        m.edns.as_mut().unwrap().set_version(1);
    };
    // BADVERS and BADSIG are one number (RFC 6895, 2.3).
    assert_eq!(u16::from(turned_away(version)), u16::from(ResponseCode::BADVERS));
}

#[test]
fn octets_that_are_no_query_get_silence_or_formerr() {
    let engine = Engine::new(directory());
    let context = QueryContext { viewer: Viewer::Stranger, transport: Transport::Udp, source: None };
    let mut out = vec![1];
    for silent in [&b""[..], b"x", &[0; 11]] {
        assert_eq!(engine.answer(silent, &context, &mut out), Outcome::Silence);
        assert!(out.is_empty());
    }
    let mut response = query("net.example.", RecordType::A);
    response.metadata.message_type = MessageType::Response;
    assert_eq!(engine.answer(&response.to_vec().unwrap(), &context, &mut out), Outcome::Silence);

    let mut cut = query("net.example.", RecordType::A).to_vec().unwrap();
    cut.truncate(20);
    let outcome = engine.answer(&cut, &context, &mut out);
    assert_eq!(outcome, Outcome::Response { code: ResponseCode::FormErr, record_type: None });
    assert_eq!(Message::from_vec(&out).unwrap().metadata.id, 4242);
    // A header that promises far more than there is.
    let liar = [0x10, 0x92, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
    let outcome = engine.answer(&liar, &context, &mut out);
    assert_eq!(outcome, Outcome::Response { code: ResponseCode::FormErr, record_type: None });
}

#[test]
fn edns_is_answered_in_kind() {
    let mut message = query("web.net.example.", RecordType::A);
    message.edns.as_mut().unwrap().set_dnssec_ok(true);
    let response = ask_with(directory(), member("net", "d1"), Transport::Tcp, &message);
    let edns = response.edns.unwrap();
    assert_eq!((edns.version(), edns.max_payload(), edns.flags().dnssec_ok), (0, 1232, true));
    assert_eq!(edns.options().as_ref().len(), 0);
    message.edns = None;
    let response = ask_with(directory(), member("net", "d1"), Transport::Tcp, &message);
    assert_eq!(response.edns, None);
}

#[test]
fn what_does_not_fit_is_dropped_from_the_end() {
    let size = |payload: Option<u16>, transport| {
        let mut message = query("crowd.net.example.", RecordType::A);
        message.edns = payload.map(|size| {
            let mut edns = Edns::new();
            edns.set_max_payload(size);
            edns
        });
        let mut out = Vec::new();
        let context = QueryContext { viewer: Viewer::Open, transport, source: None };
        Engine::new(directory()).answer(&message.to_vec().unwrap(), &context, &mut out);
        (out.len(), Message::from_vec(&out).unwrap())
    };
    for (payload, limit) in [(None, 512), (Some(100), 512), (Some(700), 700)] {
        let (octets, response) = size(payload, Transport::Udp);
        assert!(octets <= limit && octets > limit - 30, "{octets} {payload:?}");
        assert!(response.metadata.truncation && response.answers.len() == 1);
        assert!(response.additionals.len() < 61);
        assert_eq!(response.edns.is_some(), payload.is_some());
    }
    for (payload, transport) in [(Some(65535), Transport::Udp), (None, Transport::Tcp)] {
        let (octets, response) = size(payload, transport);
        assert!(octets <= 1232 && !response.metadata.truncation, "{octets}");
        assert_eq!(response.additionals.len(), 61);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Any octets, in any role: no panic, nothing larger than allowed, and what is sent can be read.
    #[test]
    fn any_octets_are_survived(
        octets in proptest::collection::vec(any::<u8>(), 0..600),
        plain in any::<bool>(),
        udp in any::<bool>(),
    ) {
        let mut octets = octets;
        if plain && octets.len() >= 12 {
            // Past the header's checks, so that the rest is read too.
            octets[2] &= 0x01;
            octets[4..6].copy_from_slice(&[0, 1]);
        }
        check(&octets, Viewer::Stranger, udp)?;
        check(&octets, member("net", "d1"), udp)?;
    }

    /// Real queries with some octets changed.
    #[test]
    fn damaged_queries_are_survived(
        name in name(), kind in any::<u16>(), udp in any::<bool>(),
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
    ) {
        let mut octets = query(&name, RecordType::from(kind)).to_vec().unwrap();
        for (place, octet) in damage {
            let place = place.index(octets.len());
            octets[place] = octet;
        }
        check(&octets, Viewer::Stranger, udp)?;
        check(&octets, Viewer::Open, udp)?;
    }

    /// Real queries get a response with their own id and question.
    #[test]
    fn queries_are_answered(name in name(), kind in any::<u16>(), id in any::<u16>()) {
        let mut message = query(&name, RecordType::from(kind));
        message.metadata.id = id;
        let response = ask_with(directory(), member("net", "d1"), Transport::Udp, &message);
        prop_assert_eq!(response.metadata.id, id);
        prop_assert!(response.queries[0].name.eq_case(&message.queries[0].name));
        prop_assert_eq!(response.queries[0].query_type, message.queries[0].query_type);
        prop_assert!(response.answers.iter().all(|r| r.name == message.queries[0].name));
    }
}

fn name() -> impl Strategy<Value = String> {
    let label = "web|db|vault|private|director|svc|dns|ns|[a-zA-Z0-9_-]{1,12}";
    let tail =
        prop_oneof![Just("net.example."), Just("Other.Example."), Just("64.100.in-addr.arpa."), Just("org.")];
    (proptest::collection::vec(label, 0..4), tail)
        .prop_map(|(labels, tail)| labels.iter().map(|l| format!("{l}.")).collect::<String>() + tail)
}

fn check(octets: &[u8], viewer: Viewer, udp: bool) -> Result<(), TestCaseError> {
    let stranger = viewer == Viewer::Stranger;
    let transport = if udp { Transport::Udp } else { Transport::Tcp };
    let context = QueryContext { viewer, transport, source: None };
    let mut out = Vec::new();
    let outcome = Engine::new(directory()).answer(octets, &context, &mut out);
    prop_assert_eq!(outcome == Outcome::Silence, out.is_empty());
    if out.is_empty() {
        return Ok(());
    }
    let response = Message::from_vec(&out).unwrap();
    prop_assert_eq!(response.metadata.id, u16::from_be_bytes([octets[0], octets[1]]));
    prop_assert_eq!(response.metadata.message_type, MessageType::Response);
    if udp {
        prop_assert!(out.len() <= 1232);
        if stranger {
            prop_assert!(out.len() + 28 <= 3 * (octets.len() + 28));
        }
    }
    Ok(())
}
