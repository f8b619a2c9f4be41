//! The fast path beside the engine: whatever the former answers, the latter answers with the same octets.
//! `PROPTEST_CASES` makes it run longer, and `PROPTEST_RNG_SEED` with other cases.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::sync::Arc;

use muster_common::name::Label;
use muster_dns::{
    directory::{Device, Endpoint, ExternalAddress, Port, Protocol, Service, ServiceKind, Viewer},
    engine::{Engine, Outcome, QueryContext},
    fast::{Asker, DEVICE_TYPES, Snapshot, Table, ZoneAnswers, encode, encode_types},
    fixed::FixedDirectory,
    message::Transport,
    wire,
};
use proptest::{
    prelude::*,
    test_runner::{Config, RngSeed, TestRunner},
};
use support::{directory, label};

const DOMAINS: [&str; 6] =
    ["net.example", "other.example", "sub.net.example", "x.net.example", "x.example", "example"];
const NAMES: [&str; 12] =
    ["web", "db", "a", "vault", "hostmaster", "x-1", "net", "example", "svc", "dns", "sub", "private"];

/// Uids of members in the table, by network.
const MEMBERS: [([u8; 16], &str); 2] = [([1; 16], "net"), ([2; 16], "other")];

/// The same cases at each run, unless others are asked for.
fn runner() -> TestRunner {
    let config = Config::default();
    let rng_seed = match config.rng_seed {
        RngSeed::Random => RngSeed::Fixed(7),
        chosen @ RngSeed::Fixed(_) => chosen,
    };
    TestRunner::new(Config { rng_seed, failure_persistence: None, ..config })
}

fn devices() -> impl Strategy<Value = Vec<Device>> {
    let v4 = any::<[u8; 4]>().prop_map(std::net::IpAddr::from);
    let v6 = any::<[u8; 16]>().prop_map(std::net::IpAddr::from);
    let either = prop_oneof![v4.clone(), v6.clone()];
    // More than one of a family, which no registrar gives a device, so that rotation is compared too.
    let addresses = (proptest::collection::vec(v4, 0..4), proptest::collection::vec(v6, 0..4))
        .prop_map(|(v4, v6)| v4.into_iter().chain(v6).collect::<Vec<_>>());
    let private = proptest::collection::vec(either.clone(), 0..4);
    let director = proptest::collection::vec((either, 1..4u16).prop_map(std::net::SocketAddr::from), 0..3);
    let device =
        (0..8usize, addresses, private, director).prop_map(|(name, addresses, private, director)| Device {
            name: label(NAMES[name]),
            virtual_addresses: addresses,
            private_addresses: private,
            director,
        });
    proptest::collection::vec(device, 0..6).prop_map(|mut devices: Vec<Device>| {
        devices.sort_by(|a, b| a.name.cmp(&b.name));
        devices.dedup_by(|a, b| a.name == b.name);
        devices
    })
}

const ENDPOINTS: [&str; 3] = ["10.0.0.1", "10.0.0.2", "fd00::1"];
const HOSTS: [&str; 6] = ["10-0-0-1", "10-0-0-2", "fd00--1", "h1", "h2", "web"];
const TARGETS: [&str; 4] = ["web.a.svc.net.example", "db.a.svc.net.example", "elsewhere.test", "10.9.9.9"];

fn services() -> impl Strategy<Value = Vec<(Label, Arc<Service>)>> {
    let port = (0..3usize, 0..3usize, 1..4u16).prop_map(|(name, protocol, number)| Port {
        name: ["", "http", "dns"][name].to_owned(),
        protocol: [Protocol::Tcp, Protocol::Udp, Protocol::Sctp][protocol],
        number,
    });
    let ports = proptest::collection::vec(port, 0..3);
    let address = (0..ENDPOINTS.len()).prop_map(|at| ENDPOINTS[at].parse::<std::net::IpAddr>().unwrap());
    let host = proptest::option::of((3..5usize).prop_map(|at| label(HOSTS[at])));
    let endpoint = (host, address.clone(), ports.clone()).prop_map(|(hostname, address, ports)| Endpoint {
        hostname,
        device: None,
        address,
        ports: ports.into(),
    });
    let kind = prop_oneof![
        proptest::collection::vec(address.clone(), 0..3).prop_map(ServiceKind::ClusterIp),
        Just(ServiceKind::Headless),
        (0..TARGETS.len()).prop_map(|at| ServiceKind::ExternalName(TARGETS[at].to_owned())),
    ];
    let external =
        prop_oneof![address.prop_map(ExternalAddress::Ip), Just(ExternalAddress::Host("lb.test".to_owned()))];
    let service = (
        (0..2usize, 0..2usize),
        kind,
        ports,
        proptest::collection::vec(endpoint, 0..4),
        proptest::collection::vec(external, 0..2),
    )
        .prop_map(|((name, namespace), kind, ports, endpoints, external)| {
            let (name, namespace) = (label(NAMES[name]), label(["a", "web"][namespace]));
            (label("net"), Arc::new(Service { name, namespace, kind, ports, endpoints, external }))
        });
    proptest::collection::vec(service, 0..4).prop_map(|mut services| {
        let key = |(_, service): &(Label, Arc<Service>)| (service.namespace.clone(), service.name.clone());
        services.sort_by_key(key);
        services.dedup_by_key(|service| key(service));
        services
    })
}

/// All names that Services can have in a zone, exposed and in its external zone.
fn service_names(domain: &str, external: Option<&str>) -> Vec<String> {
    let mut below = vec![String::new()];
    below.extend(HOSTS.map(|host| format!("{host}.")));
    below.extend(["_http._tcp.", "_http._udp.", "_dns._udp.", "http.tcp."].map(str::to_owned));
    let zones = [Some(format!("svc.{domain}")), external.map(str::to_owned)];
    let mut names = vec![format!("svc.{domain}"), format!("pod.{domain}"), format!("dns-version.{domain}")];
    for zone in zones.into_iter().flatten() {
        for namespace in ["a", "web", "none"] {
            names.push(format!("{namespace}.{zone}"));
            for service in ["web", "db"] {
                names.extend(below.iter().map(|below| format!("{below}{service}.{namespace}.{zone}")));
            }
        }
    }
    names
}

/// `net` and `other` as elsewhere, and `sub` within `net`, with these devices.
fn with(
    devices: [Vec<Device>; 3],
    services: Vec<(Label, Arc<Service>)>,
    nested: bool,
    external: usize,
    loading: bool,
) -> FixedDirectory {
    let mut fixed = directory();
    fixed.loading = loading;
    fixed.hidden = vec![(label("d1"), label("vault")), (label("d1"), label("db"))];
    fixed.services = services;
    fixed.namespaces = ["a", "web"].map(|namespace| (label("net"), label(namespace))).to_vec();
    let external = ["x.example", "x.net.example"].get(external).map(|domain| domain.parse().unwrap());
    Arc::make_mut(&mut fixed.zones[0].0).external_domain = external;
    let mut sub = (*fixed.zones[0].0).clone();
    (sub.domain, sub.network, sub.ttl) = ("sub.net.example".parse().unwrap(), label("sub"), 3600);
    if nested {
        fixed.zones.push((Arc::new(sub), Vec::new()));
    }
    for ((_, held), devices) in fixed.zones.iter_mut().zip(devices) {
        *held = devices;
    }
    fixed
}

/// The table of `directory`, with everything that it has.
fn snapshot(engine: &Engine<FixedDirectory>, directory: &FixedDirectory) -> Arc<Snapshot> {
    let mut table = Table::new();
    table.set_loaded(!directory.loading);
    for (number, (zone, devices)) in (0..).zip(&directory.zones) {
        let answers = ZoneAnswers {
            domain: zone.domain.clone(),
            external_domain: zone.external_domain.clone(),
            ttl: zone.ttl,
            serial: zone.serial,
            plain: true,
            devices: true,
            services: true,
        };
        table.set_zone(number, &answers);
        for (uid, network) in MEMBERS {
            if zone.network.as_str() == network {
                table.set_member(uid, number);
            }
        }
        for device in devices {
            let name = format!("{}.{}", device.name, zone.domain);
            if let Some(mut encoded) = encode_types(engine, &name, &DEVICE_TYPES) {
                encoded.members = !directory.hidden.iter().any(|(_, hidden)| *hidden == device.name);
                table.set(&wire::encode_name(&name).unwrap(), number, &encoded);
            }
        }
    }
    let external = directory.zones[0].0.external_domain.as_ref().map(|domain| domain.as_str());
    for name in service_names("net.example", external) {
        if let Some(mut encoded) = encode(engine, &name) {
            encoded.members = !name.split('.').any(|part| part == "db");
            table.set(&wire::encode_name(&name).unwrap(), 0, &encoded);
        }
    }
    table.publish()
}

#[derive(Clone, Debug)]
struct Asked {
    query: Vec<u8>,
    asker: Asker,
    viewer: Viewer,
    transport: Transport,
}

fn asked() -> impl Strategy<Value = Asked> {
    let labels = proptest::collection::vec(0..NAMES.len(), 0..4);
    let service = prop_oneof![Just(None), (any::<proptest::sample::Index>(), 0..2usize).prop_map(Some)];
    let domain = proptest::sample::select(DOMAINS.to_vec());
    let qtype = prop_oneof![
        4 => proptest::sample::select(vec![1u16, 28, 64]),
        1 => proptest::sample::select(vec![2u16, 5, 6, 12, 16, 33, 33, 65, 255, 252]),
        1 => any::<u16>(),
    ];
    let edns = proptest::option::of((any::<u16>(), any::<bool>(), any::<bool>()));
    let mutation = proptest::option::weighted(0.2, (any::<proptest::sample::Index>(), any::<u8>()));
    let who = 0..4usize;
    let transport = proptest::sample::select(vec![Transport::Udp, Transport::Tcp, Transport::Tls]);
    ((labels, service), domain, qtype, edns, mutation, who, transport, any::<(u16, u8, u32)>()).prop_map(
        |((labels, service), domain, qtype, edns, mutation, who, transport, (id, flags, capitals))| {
            let labels = labels.into_iter().map(|label| NAMES[label]);
            let mut name = labels.chain([domain]).collect::<Vec<_>>().join(".");
            if let Some((index, external)) = service {
                let names = service_names("net.example", DOMAINS.get(3 + external).copied());
                name = index.get(&names).clone();
            }
            let mut query = Vec::new();
            query.extend(id.to_be_bytes());
            query.extend([flags & 1, flags & 0x30, 0, 1, 0, 0, 0, 0, 0, u8::from(edns.is_some())]);
            let mut wire = wire::encode_name(&name).unwrap();
            // Half of the queries are spelled with capitals.
            for (bit, octet) in wire.iter_mut().enumerate().filter(|_| capitals & 1 == 1) {
                if capitals >> (bit % 32) & 1 == 1 {
                    octet.make_ascii_uppercase();
                }
            }
            query.extend(wire);
            query.extend(qtype.to_be_bytes());
            query.extend([0, 1]);
            if let Some((size, dnssec_ok, cookie)) = edns {
                query.extend([0, 0, 41]);
                query.extend(size.to_be_bytes());
                query.extend([0, 0, if dnssec_ok { 0x80 } else { 0 }, 0, 0]);
                query.extend(if cookie { [12].as_slice() } else { &[0] });
                query.extend(if cookie { b"\x00\x0a\x00\x08abcdefgh".as_slice() } else { &[] });
            }
            if let Some((at, value)) = mutation {
                let at = at.index(query.len());
                query[at] = value;
            }
            let member = |(uid, network): ([u8; 16], &str)| {
                (Asker::Member { uid }, Viewer::Member { network: label(network), uid: label("d1") })
            };
            let (asker, viewer) = match who {
                0 | 1 => (Asker::Open, Viewer::Open),
                2 => member(MEMBERS[0]),
                _ => member(MEMBERS[1]),
            };
            Asked { query, asker, viewer, transport }
        },
    )
}

/// What both answer; whether the fast path did.
fn compare(engine: &Engine<FixedDirectory>, snapshot: &Snapshot, asked: &Asked) -> bool {
    let (mut fast, mut slow) = (Vec::new(), Vec::new());
    let Some(outcome) = snapshot.answer(&asked.query, asked.asker, asked.transport, &mut fast) else {
        return false;
    };
    let context = QueryContext { viewer: asked.viewer.clone(), transport: asked.transport, source: None };
    assert_eq!(outcome, engine.answer(&asked.query, &context, &mut slow), "{asked:?}");
    assert_eq!(fast, slow, "{asked:?}");
    assert!(matches!(outcome, Outcome::Response { .. }));
    true
}

#[test]
fn both_paths_answer_alike() {
    let content = ([devices(), devices(), devices()], services());
    let zones = (content, any::<bool>(), 0..3usize, proptest::bool::weighted(0.1));
    let strategy = (zones, proptest::collection::vec(asked(), 1..60));
    let (mut total, mut fast) = (0u64, 0u64);
    let counts = std::cell::RefCell::new((&mut total, &mut fast));
    runner()
        .run(&strategy, |(((devices, services), nested, external, loading), queries)| {
            let directory = with(devices, services, nested, external, loading);
            let engine = Engine::new(directory.clone());
            let snapshot = snapshot(&engine, &directory);
            let mut counts = counts.borrow_mut();
            for asked in &queries {
                *counts.0 += 1;
                *counts.1 += u64::from(compare(&engine, &snapshot, asked));
            }
            Ok(())
        })
        .unwrap();
    // If it left nearly everything to the engine, nothing would have been compared.
    assert!(fast * 5 > total, "{fast} of {total}");
}
