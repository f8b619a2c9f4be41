//! Two networks to ask about: `net` (net.example) with devices, and `other` (other.example).
#![allow(dead_code, reason = "each test file uses its part")]

use std::sync::Arc;

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query},
    rr::{Name, RecordType},
};
use muster_common::name::Label;
use muster_dns::{
    directory::{Device, Viewer, Zone},
    fixed::FixedDirectory,
};

pub(crate) fn label(text: &str) -> Label {
    text.parse().unwrap()
}

pub(crate) fn member(network: &str, uid: &str) -> Viewer {
    Viewer::Member { network: label(network), uid: label(uid) }
}

fn zone(network: &str, domain: &str, pools: &[&str]) -> Zone {
    Zone {
        domain: domain.parse().unwrap(),
        network: label(network),
        ttl: 5,
        serial: 1_790_000_000,
        public_addresses: vec!["203.0.113.10".parse().unwrap()],
        name_server_addresses: vec!["203.0.113.53".parse().unwrap(), "2001:db8::53".parse().unwrap()],
        pools: pools.iter().map(|pool| pool.parse().unwrap()).collect(),
        external_domain: None,
        external_serial: 1,
    }
}

fn device(name: &str, addresses: &[&str], private: &[&str], director: &[&str]) -> Device {
    Device {
        name: label(name),
        virtual_addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
        private_addresses: private.iter().map(|a| a.parse().unwrap()).collect(),
        director: director.iter().map(|a| a.parse().unwrap()).collect(),
    }
}

pub(crate) fn directory() -> FixedDirectory {
    let net = zone("net", "net.example", &["100.64.0.0/11", "fd00:1:2::/48"]);
    let other = zone("other", "other.example", &["10.1.0.0/28"]);
    let web = device(
        "web",
        &["100.64.1.7", "fd00:1:2::7"],
        &["192.168.1.7", "2001:db8:1::7"],
        &["203.0.113.20:3478", "[2001:db8::20]:3478"],
    );
    let db = device("db", &["100.64.1.8"], &[], &[]);
    let vault = device("vault", &["100.64.1.9"], &["192.168.1.9"], &["203.0.113.20:3478"]);
    let crowded: Vec<String> = (1..=60).map(|i| format!("192.168.9.{i}")).collect();
    let crowded: Vec<&str> = crowded.iter().map(String::as_str).collect();
    let crowd = device("crowd", &["100.64.1.10"], &crowded, &["203.0.113.20:3478"]);
    FixedDirectory {
        zones: vec![
            (Arc::new(net), vec![web, db, vault, crowd]),
            (Arc::new(other), vec![device("web", &["10.1.0.2"], &[], &[])]),
        ],
        hidden: vec![(label("d1"), label("vault"))],
        ..FixedDirectory::default()
    }
}

/// A query with EDNS and RD, as stub resolvers send it.
pub(crate) fn query(name: &str, record_type: RecordType) -> Message {
    let mut message = Message::new(4242, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    // Labels that begin with a dash are no host names, but DNS carries them.
    let name = Name::from_ascii(name).unwrap_or_else(|_| {
        Name::from_labels(name.trim_end_matches('.').split('.').map(str::as_bytes)).unwrap()
    });
    message.add_query(Query::query(name, record_type));
    let mut edns = Edns::new();
    edns.set_max_payload(4096);
    message.set_edns(edns);
    message
}
