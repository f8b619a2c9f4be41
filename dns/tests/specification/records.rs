//! Section 2: records.

use hickory_proto::rr::RecordType::{A, AAAA, SRV, TXT};

use crate::{
    network::{Asking, shown, sorted},
    support::query,
};

/// 2: A for each IPv4, AAAA for each IPv6 cluster IP; SRV per named port with the Service's number.
#[test]
fn services_with_a_cluster_ip() {
    let net = Asking::with(|_| {});
    let name = "web.default.svc.net.example.";
    assert_eq!(net.answers(name, A), [format!("{name} A 100.96.0.10")]);
    assert_eq!(net.answers(name, AAAA), [format!("{name} AAAA fd00:1:2:ff::10")]);
    let response = net.ask("_http._tcp.web.default.svc.net.example.", SRV);
    assert_eq!(shown(&response.answers), [format!("_http._tcp.{name} SRV 0 50 80 {name}")]);
    assert_eq!(
        sorted(&response.additionals),
        [format!("{name} A 100.96.0.10"), format!("{name} AAAA fd00:1:2:ff::10"),]
    );
    assert!(response.answers.iter().chain(&response.additionals).all(|r| r.ttl == 5));
    // Per port, named or not, at the Service's own name.
    let bare = "bare.default.svc.net.example.";
    assert_eq!(net.answers(bare, SRV), [format!("{bare} SRV 0 100 5678 {bare}")]);
    let many = "many.default.svc.net.example.";
    // The two ports called dns have one number: equal records appear once, weighed before that.
    assert_eq!(
        net.answers(many, SRV),
        [format!("{many} SRV 0 33 80 {many}"), format!("{many} SRV 0 33 53 {many}"),]
    );
    assert_eq!(
        net.answers(&format!("_dns._udp.{many}"), SRV),
        [format!("_dns._udp.{many} SRV 0 100 53 {many}")]
    );
}

/// 2: the endpoints of a Service with a cluster IP have names as those of a headless one.
#[test]
fn endpoints_behind_a_cluster_ip() {
    let net = Asking::with(|_| {});
    let name = "100-64-1-7.web.default.svc.net.example.";
    assert_eq!(net.answers(name, A), [format!("{name} A 100.64.1.7")]);
    net.nodata(name, AAAA);
    let name = "www.web.default.svc.net.example.";
    assert_eq!(net.answers(name, AAAA), [format!("{name} AAAA fd00:1:2::7")]);
}

/// 2: a headless Service answers with its endpoints and their ports.
#[test]
fn headless_services() {
    let net = Asking::with(|_| {});
    let db = "db.prod.svc.net.example.";
    assert_eq!(net.answers(db, A), [format!("{db} A 100.64.1.8"), format!("{db} A 100.64.1.9")]);
    assert_eq!(net.answers(db, AAAA), [format!("{db} AAAA fd00:1:2::8")]);
    for owner in [db.to_owned(), format!("_pg._tcp.{db}")] {
        let response = net.ask(&owner, SRV);
        assert_eq!(
            shown(&response.answers),
            [
                format!("{owner} SRV 0 33 15432 db-0.{db}"),
                format!("{owner} SRV 0 33 15432 100-64-1-9.{db}"),
                format!("{owner} SRV 0 33 15433 db-0.{db}"),
            ]
        );
        assert_eq!(
            sorted(&response.additionals),
            [
                format!("100-64-1-9.{db} A 100.64.1.9"),
                format!("db-0.{db} A 100.64.1.8"),
                format!("db-0.{db} AAAA fd00:1:2::8"),
            ]
        );
    }
    // Equal addresses appear once; an unnamed port has no SRV under a name.
    let twin = "twin.prod.svc.net.example.";
    assert_eq!(net.answers(twin, A), [format!("{twin} A 100.64.1.9")]);
    assert_eq!(net.answers(twin, SRV), [format!("{twin} SRV 0 50 9 100-64-1-9.{twin}")]);
    net.nxdomain(&format!("_pg._tcp.{twin}"), SRV);
}

/// 2: six endpoint addresses of which two share a label give five SRV of weight 16.
#[test]
fn weights_count_before_merging() {
    let net = Asking::with(|_| {});
    let crew = "_http._tcp.crew.prod.svc.net.example.";
    let expected =
        ["a", "b", "c", "d", "e"].map(|l| format!("{crew} SRV 0 16 80 {l}.crew.prod.svc.net.example."));
    let response = net.ask(crew, SRV);
    assert_eq!(shown(&response.answers), expected);
    assert_eq!(response.additionals.len(), 6);
}

/// 2: a Service or slice without ports has addresses and no SRV.
#[test]
fn services_without_ports() {
    let net = Asking::with(|_| {});
    for (name, count) in [("portless.default.svc.net.example.", 1), ("quiet.prod.svc.net.example.", 1)] {
        assert_eq!(net.answers(name, A).len(), count);
        net.nodata(name, SRV);
        net.nxdomain(&format!("_http._tcp.{name}"), SRV);
    }
}

/// 2: one TTL for every record except that of the schema's version.
#[test]
fn times_to_live() {
    let net = Asking::with(|_| {});
    let version = net.ask("dns-version.net.example.", TXT);
    assert_eq!(shown(&version.answers), ["dns-version.net.example. TXT 1.1.0"]);
    assert_eq!(version.answers[0].ttl, 28_800);
    for name in ["ns.dns.net.example.", "web.default.svc.net.example.", "db-0.db.prod.svc.net.example."] {
        assert_eq!(net.ask(name, A).answers[0].ttl, 5, "{name}");
    }
}

/// 2: each family answers on its own; one that is missing is NODATA, of Services and endpoints alike.
#[test]
fn a_missing_family_is_no_data() {
    let net = Asking::with(|_| {});
    for name in ["bare.default.svc.net.example.", "twin.prod.svc.net.example."] {
        assert_eq!(net.answers(name, A).len(), 1);
        net.nodata(name, AAAA);
    }
    net.nodata("2001-db8--0.quiet.prod.svc.net.example.", A);
    assert_eq!(net.answers("2001-db8--0.quiet.prod.svc.net.example.", AAAA).len(), 1);
}

/// 2: owner as asked; target in lower case with the zone part as asked.
#[test]
fn spelling() {
    let net = Asking::with(|_| {});
    assert_eq!(
        net.answers("_HTTP._Tcp.WEB.Default.SVC.Net.eXample.", SRV),
        ["_HTTP._Tcp.WEB.Default.SVC.Net.eXample. SRV 0 50 80 web.default.svc.Net.eXample."]
    );
}

/// 2, 13: addresses begin at the one that the query's id chooses; nothing else moves.
#[test]
fn addresses_are_rotated_by_the_query_id() {
    let net = Asking::with(|_| {});
    let ask = |id, name: &str| {
        let mut message = query(name, A);
        message.metadata.id = id;
        shown(&net.message(&message).answers)
    };
    let crew = "crew.prod.svc.net.example.";
    let all: Vec<String> = (1..=6).map(|i| format!("{crew} A 10.9.0.{i}")).collect();
    for id in [0_u16, 1, 5, 6, 65_535] {
        let mut expected = all.clone();
        expected.rotate_left(usize::from(id) % 6);
        assert_eq!(ask(id, crew), expected);
    }
    // A CNAME stays before what it leads to.
    assert!(ask(1, "inner.default.svc.net.example.")[0].contains(" CNAME "));
}
