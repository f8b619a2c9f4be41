//! Tests of what the registry's networks look like as zones.

use muster_common::time::Timestamp;
use muster_dns::directory::{ExternalAddress, ServiceKind};
use muster_proto::admin as proto;

use super::*;
use crate::registry::{
    device::Outside,
    plan,
    tests::{World, network, service, service_network, slice},
    view::Advertised,
};

async fn zones() -> (Zones, Arc<Registry>, World, Vec<Label>) {
    let mut world = World::with_network(1, "10.0.0.0/24");
    let mut other = network("o", "sub.n.example", "10.1.0.0/24");
    let spec = other.spec.as_mut().unwrap();
    spec.public_addresses = vec!["192.0.2.80".into()];
    spec.directors = vec![proto::DirectorAddress {
        name: "d".into(),
        address: "192.0.2.9".into(),
        port: 9,
        ..Default::default()
    }];
    world.create_network(&other).unwrap();
    let token = world.reusable_token();
    let mut uids = Vec::new();
    for (name, key) in [("a", 1), ("b", 2), ("c", 3)] {
        let uid = world.join(&token, name);
        world.register(0, uid, key).unwrap();
        uids.push(uid.to_string().parse().unwrap());
    }
    world.join(&token, "pending");
    world.revoke(0, "c", true).unwrap();
    let registry = Registry::load(Arc::new(world.store.clone())).await.unwrap();
    let readiness = Readiness::default();
    readiness.set(true);
    let zones = Zones::new(registry.clone(), readiness, vec!["192.0.2.53".parse().unwrap()]);
    (zones, registry, world, uids)
}

fn member(network: &str, uid: &Label) -> Viewer {
    Viewer::Member { network: network.parse().unwrap(), uid: uid.clone() }
}

#[tokio::test]
async fn the_longest_domain_wins() {
    let (zones, ..) = zones().await;
    let domain = |name: &str| zones.zone(name).map(|zone| zone.domain.to_string());
    assert_eq!(domain("n.example").as_deref(), Some("n.example"));
    assert_eq!(domain("a.b.n.example").as_deref(), Some("n.example"));
    assert_eq!(domain("a.sub.n.example").as_deref(), Some("sub.n.example"));
    assert_eq!((domain("example"), domain("xn.example"), domain("")), (None, None, None));
    let zone = zones.zone("sub.n.example").unwrap();
    assert_eq!(zone.public_addresses, ["192.0.2.80".parse::<IpAddr>().unwrap()]);
    assert_eq!((zone.ttl, zone.name_server_addresses.len(), zone.pools.len()), (5, 1, 1));
    assert!(zones.is_loaded());
}

#[tokio::test]
async fn members_see_their_own_network_and_strangers_nothing() {
    let (zones, _, _, uids) = zones().await;
    let zone = zones.zone("n.example").unwrap();
    let names = ["a", "b", "c", "pending", "nobody"];
    let seen = |viewer: &Viewer| names.map(|name| zones.device(&zone, viewer, name).is_some());
    assert_eq!(seen(&member("n", &uids[0])), [true, true, false, false, false]);
    assert_eq!(seen(&Viewer::Open), [true, true, false, false, false]);
    for nobody in [
        Viewer::Stranger,
        member("n", &uids[2]),
        member("o", &uids[0]),
        member("n", &"00000000-0000-0000-0000-000000000001".parse().unwrap()),
        member("n", &"junk".parse().unwrap()),
    ] {
        assert_eq!(seen(&nobody), [false; 5], "{nobody:?}");
    }
    let device = zones.device(&zone, &member("n", &uids[0]), "b").unwrap();
    assert_eq!(device.private_addresses, ["192.0.2.1".parse::<IpAddr>().unwrap()]);
    let address = device.virtual_addresses[0];
    let name = |viewer: &Viewer| zones.device_at(&zone, viewer, address).map(|label| label.to_string());
    assert_eq!(name(&member("n", &uids[0])).as_deref(), Some("b"));
    assert_eq!(name(&member("n", &uids[2])), None);
    let prefix = |text: &str| text.parse::<IpNet>().unwrap();
    let reverse = |viewer: &Viewer, text: &str| {
        zones.reverse_zone(viewer, prefix(text)).map(|zone| zone.network.to_string())
    };
    assert_eq!(reverse(&member("n", &uids[0]), "10.0.0.7/32").as_deref(), Some("n"));
    assert_eq!(reverse(&member("n", &uids[0]), "10.1.0.7/32"), None);
    assert_eq!(reverse(&Viewer::Open, "10.1.0.7/32").as_deref(), Some("o"));
    assert_eq!(reverse(&Viewer::Open, "10.0.0.0/8"), None);
}

#[tokio::test]
async fn the_serial_moves_when_a_record_does() {
    let (zones, registry, _, uids) = zones().await;
    let before = zones.zone("n.example").unwrap();
    assert!(Arc::ptr_eq(&before, &zones.zone("n.example").unwrap()), "made once");
    let uid = uids[0].as_str().parse().unwrap();
    let expiry = muster_common::time::Timestamp::now();
    registry.commit(|index, _| plan::register::renew(index, "n", uid, expiry)).await.unwrap();
    assert_eq!(zones.zone("n.example").unwrap().serial, before.serial, "no record has changed");
    // The clock of the test's world is ahead, so that the time of a change shows in the index alone.
    let mut index = registry.read().clone();
    let mut device = (**index.device("n", uid).unwrap()).clone();
    device.endpoints = Box::default();
    let kv = crate::store::KeyValue {
        key: crate::registry::keys::device("n", uid),
        value: device.encode().into(),
        create_revision: 1,
        mod_revision: 1000,
    };
    let batch = crate::store::WatchBatch { revision: 1000, events: vec![crate::store::Event::Put(kv)] };
    let later = muster_common::time::Timestamp::from_epoch(std::time::Duration::from_secs(4_000_000_000));
    index.apply(&batch, later);
    assert_eq!(index.network("n").unwrap().serial, 4_000_000_000);
    let earlier = muster_common::time::Timestamp::from_epoch(std::time::Duration::from_secs(1));
    device.endpoints = Box::new([([192, 0, 2, 9], 9).into()]);
    let kv = crate::store::KeyValue {
        key: crate::registry::keys::device("n", uid),
        value: device.encode().into(),
        create_revision: 1,
        mod_revision: 1001,
    };
    let batch = crate::store::WatchBatch { revision: 1001, events: vec![crate::store::Event::Put(kv)] };
    index.apply(&batch, earlier);
    assert_eq!(index.network("n").unwrap().serial, 4_000_000_000, "it never goes back");
}

#[tokio::test]
async fn name_servers_are_all_registrars() {
    let (zones, registry, ..) = zones().await;
    let own: IpAddr = "192.0.2.53".parse().unwrap();
    let told = |dns: &[&str]| Advertised {
        dns_servers: dns.iter().map(|server| (*server).to_owned()).collect(),
        ..Advertised::default()
    };
    let mut uid = 0;
    let mut tell = async |advertised: &Advertised| {
        uid += 1;
        let own = plan::registrar::Own {
            uid: Uuid::from_u128(uid),
            run: Uuid::from_u128(100 + uid),
            host: "r",
            advertised,
            version: "1",
            sessions: 0,
        };
        let plan = |index: &mut Index, _| plan::registrar::tell(index, &own, Timestamp::now());
        registry.commit(plan).await.unwrap();
    };
    let servers = || zones.zone("n.example").unwrap().name_server_addresses.clone();
    assert_eq!(servers(), [own]);
    // Itself, names that nobody has resolved, and another one, all within one second.
    tell(&told(&["192.0.2.53:853"])).await;
    tell(&told(&["dns.example:853"])).await;
    assert_eq!(servers(), [own]);
    tell(&told(&["[2001:db8::53]:853", "192.0.2.54:853"])).await;
    assert_eq!(servers(), [own, "192.0.2.54".parse().unwrap(), "2001:db8::53".parse().unwrap()]);
    let gone = Uuid::from_u128(3).to_string();
    registry.commit(|index, _| plan::registrar::delete(index, &gone, 0)).await.unwrap();
    assert_eq!(servers(), [own], "it is not told any more");

    let mut index = registry.read().clone();
    let gone =
        crate::store::Event::Delete { key: crate::registry::keys::registrar_record(Uuid::from_u128(1)) };
    let later = Timestamp::from_epoch(std::time::Duration::from_secs(4_000_000_000));
    index.apply(&crate::store::WatchBatch { revision: 1000, events: vec![gone] }, later);
    let state = index.network("n").unwrap();
    assert_eq!([state.serial, state.external_serial], [4_000_000_000; 2]);
}

/// The director that DNS tells is the one that the device is attached to.
#[tokio::test]
async fn a_device_has_its_home_director() {
    let mut world = World::new(1);
    let mut spec = network("n", "n.example", "10.0.0.0/24");
    spec.spec.as_mut().unwrap().directors = vec![proto::DirectorAddress {
        name: "static".into(),
        address: "192.0.2.99".into(),
        port: 9,
        ..Default::default()
    }];
    world.create_network(&spec).unwrap();
    let (devices, directors) = (world.reusable_token(), world.director_token());
    let uid = world.join(&devices, "a");
    world.register(0, uid, 1).unwrap();
    let registry = Registry::load(Arc::new(world.store.clone())).await.unwrap();
    let zones = Zones::new(registry.clone(), Readiness::default(), Vec::new());
    let director = async || {
        registry.refresh().await.unwrap();
        let zone = zones.zone("n.example").unwrap();
        let device = zones.device(&zone, &Viewer::Open, "a").unwrap();
        device.director.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(director().await, ["192.0.2.99:9"]);
    let (one, two) = (world.director(&directors, "d1", 1), world.director(&directors, "d2", 2));
    assert!(director().await.is_empty(), "it is attached nowhere");
    for (home, address) in [(one, "192.0.2.1:7501"), (two, "192.0.2.2:7501")] {
        world.set_outside(uid, &Outside { home: Some(home), ..Outside::default() }).unwrap();
        assert_eq!(director().await, [address]);
    }
    world.register_director(0, two, 3).unwrap();
    assert_eq!(director().await, ["192.0.2.3:7501"]);
    world.delete_director(0, "d2").unwrap();
    assert!(director().await.is_empty());
}

#[tokio::test]
async fn the_serial_moves_when_a_director_does() {
    let mut world = World::with_network(1, "10.0.0.0/24");
    let (devices, directors) = (world.reusable_token(), world.director_token());
    let uid = world.join(&devices, "a");
    world.register(0, uid, 1).unwrap();
    let director = world.director(&directors, "d1", 1);
    let mut index = world.indexes[0].clone();
    let (mut seconds, mut revision) = (3_000_000_000, index.revision());
    let mut serial_after = |world: &mut World| {
        let changes = world.store.changes_sync(&crate::store::KeyRange::all(), revision + 1).unwrap();
        seconds += 1;
        for batch in &changes.batches {
            index.apply(
                batch,
                muster_common::time::Timestamp::from_epoch(std::time::Duration::from_secs(seconds)),
            );
        }
        revision = index.revision();
        (u64::from(index.network("n").unwrap().serial) == seconds, changes.batches.len())
    };
    world.set_outside(uid, &Outside { home: Some(director), ..Outside::default() }).unwrap();
    assert_eq!(serial_after(&mut world), (true, 1));
    world.register_director(0, director, 2).unwrap();
    assert_eq!(serial_after(&mut world), (true, 1));
    let expiry = world.now;
    world.commit(0, |index, _| plan::director::renew(index, "n", director, expiry)).unwrap();
    assert_eq!(serial_after(&mut world), (false, 1), "no record has changed");
    world.delete_director(0, "d1").unwrap();
    assert_eq!(serial_after(&mut world), (true, 1));
}

fn in_namespace(mut service: proto::Service, namespace: &str) -> proto::Service {
    service.metadata.as_mut().unwrap().namespace = namespace.into();
    service
}

fn with(name: &str, change: impl FnOnce(&mut proto::ServiceSpec)) -> proto::Service {
    let mut wanted = service(name);
    change(wanted.spec.as_mut().unwrap());
    wanted
}

/// A network `n` with the external domain `x.example`: `web` with a cluster IP, endpoint and external address, the
/// headless `db`, and `web` of `team`; devices `a` (of `team`), `b`, and `c`, which is revoked. A network `o` without
/// Services.
struct Net {
    zones: Zones,
    registry: Arc<Registry>,
    uids: Vec<Label>,
}

impl Net {
    async fn new(headless: bool) -> Self {
        let mut world = World::new(1);
        let mut spec = service_network();
        spec.spec.as_mut().unwrap().external_domain = "x.example".into();
        world.create_network(&spec).unwrap();
        world.create_network(&network("o", "o.example", "10.2.0.0/24")).unwrap();
        world.create_namespace("team").unwrap();
        let external = |s: &mut proto::ServiceSpec| s.external_ips = vec!["192.0.2.1".into()];
        world.create_service(0, &with("web", external)).unwrap();
        world.create_service(0, &with("db", |s| s.cluster_ip = "None".into())).unwrap();
        world.create_service(0, &in_namespace(service("web"), "team")).unwrap();
        world.create_slice(&slice("web-1", "web", &["10.0.0.9"])).unwrap();
        world.create_slice(&slice("db-1", "db", &["10.0.0.9", "10.0.0.8"])).unwrap();
        let mut uids = Vec::new();
        for (name, namespace, key) in [("a", "team", 1), ("b", "", 2), ("c", "team", 3)] {
            let spec = proto::TokenSpec { device_namespace: namespace.into(), ..Default::default() };
            let token = world.create_token(&format!("token-{name}"), spec);
            let uid = world.join(&token, name);
            world.register(0, uid, key).unwrap();
            uids.push(uid.to_string().parse().unwrap());
        }
        world.revoke(0, "c", true).unwrap();
        // It has an address, and has not joined.
        world.create_device("pending", "10.0.0.99").unwrap();
        let registry = Registry::load(Arc::new(world.store.clone())).await.unwrap();
        let readiness = Readiness::default();
        readiness.set(true);
        let zones = Zones::new(registry.clone(), readiness, Vec::new()).with_external_headless(headless);
        Self { zones, registry, uids }
    }

    fn zone(&self) -> Arc<Zone> {
        self.zones.zone("n.example").unwrap()
    }
    async fn commit<R>(
        &self,
        plan: impl FnMut(&mut registry::Index, u32) -> Result<plan::Outcome<R>, plan::AdminError>,
    ) -> R {
        self.registry.commit(plan).await.unwrap()
    }

    fn services(&self, viewer: &Viewer) -> Vec<String> {
        shown(&self.zones.services(&self.zone(), viewer))
    }

    fn at(&self, viewer: &Viewer, address: &str) -> Vec<String> {
        shown(&self.zones.services_at(&self.zone(), viewer, address.parse().unwrap()))
    }
}

fn shown(services: &[Arc<Service>]) -> Vec<String> {
    services.iter().map(|service| format!("{}.{}", service.name, service.namespace)).collect()
}

/// Everybody who sees nothing of the network `n` of [`Net`].
fn outsiders(net: &Net) -> [Viewer; 5] {
    [
        Viewer::Stranger,
        member("n", &net.uids[2]),
        member("o", &net.uids[0]),
        member("n", &"00000000-0000-0000-0000-00000000ffff".parse().unwrap()),
        member("n", &"junk".parse().unwrap()),
    ]
}

/// Specification 2, 12: what the records of a Service are made from.
#[tokio::test]
async fn services_have_what_the_registry_says() {
    let net = Net::new(false).await;
    let (zone, viewer) = (net.zone(), member("n", &net.uids[0]));
    let find = |namespace, name| net.zones.service(&zone, &viewer, namespace, name);
    let web = find("default", "web").unwrap();
    let ServiceKind::ClusterIp(addresses) = &web.kind else { panic!("{web:?}") };
    assert_eq!(addresses.len(), 1);
    assert!(zone.pools.iter().any(|pool| pool.contains(&addresses[0])));
    assert_eq!((web.ports.len(), web.ports[0].number, &*web.ports[0].name), (1, 80, "http"));
    assert_eq!((web.endpoints.len(), web.endpoints[0].ports[0].number), (1, 8080));
    assert_eq!(web.external, [ExternalAddress::Ip([192, 0, 2, 1].into())]);
    let db = find("default", "db").unwrap();
    let endpoints: Vec<String> = db.endpoints.iter().map(|found| found.address.to_string()).collect();
    assert_eq!((&db.kind, endpoints), (&ServiceKind::Headless, vec!["10.0.0.9".into(), "10.0.0.8".into()]));
    assert!(db.external.is_empty());
    let other = find("team", "web").unwrap();
    assert_ne!(other.kind, web.kind, "another address");
    assert!(other.endpoints.is_empty() && other.external.is_empty());
    for (namespace, name) in [("team", "db"), ("default", "none"), ("none", "web"), ("", "web"), ("a", "")] {
        assert!(find(namespace, name).is_none(), "{namespace} {name}");
    }
    // What has not changed is not made anew.
    assert!(Arc::ptr_eq(&web, &find("default", "web").unwrap()));
}

/// Members of a network and those who see every network see all its Services, and nobody else any.
#[tokio::test]
async fn services_are_seen_from_inside_alone() {
    let net = Net::new(false).await;
    let zone = net.zone();
    let all = ["db.default", "web.default", "web.team"];
    for viewer in [Viewer::Open, member("n", &net.uids[0]), member("n", &net.uids[1])] {
        assert_eq!(net.services(&viewer), all, "{viewer:?}");
        assert_eq!(net.at(&viewer, "10.0.0.9"), ["db.default", "web.default"]);
    }
    for viewer in outsiders(&net) {
        assert!(net.services(&viewer).is_empty() && net.at(&viewer, "10.0.0.9").is_empty(), "{viewer:?}");
        assert!(net.zones.service(&zone, &viewer, "default", "web").is_none(), "{viewer:?}");
    }
    let other = net.zones.zone("o.example").unwrap();
    assert!(net.zones.services(&other, &Viewer::Open).is_empty());
    assert!(net.zones.service(&other, &Viewer::Open, "default", "web").is_none());
}

/// Specification 7: by cluster IP, endpoint or external address, each Service once.
#[tokio::test]
async fn services_are_found_by_every_address() {
    let net = Net::new(false).await;
    let zone = net.zone();
    let by_cluster_ip = |namespace| {
        let service = net.zones.service(&zone, &Viewer::Open, namespace, "web").unwrap();
        let ServiceKind::ClusterIp(addresses) = &service.kind else { panic!("{service:?}") };
        net.at(&Viewer::Open, &addresses[0].to_string())
    };
    assert_eq!(by_cluster_ip("default"), ["web.default"]);
    assert_eq!(by_cluster_ip("team"), ["web.team"]);
    assert_eq!(net.at(&Viewer::Open, "192.0.2.1"), ["web.default"]);
    assert_eq!(net.at(&Viewer::Open, "10.0.0.8"), ["db.default"]);
    assert!(net.at(&Viewer::Open, "10.0.0.7").is_empty());
    // An address that two slices of a Service have is of one Service.
    let again = slice("db-2", "db", &["10.0.0.8", "10.0.0.7"]);
    let uid = Uuid::from_u128(900);
    let now = muster_common::time::Timestamp::now();
    net.commit(|index, _| plan::slice::create(index, &again, uid, now)).await;
    assert_eq!(net.at(&Viewer::Open, "10.0.0.8"), ["db.default"]);
    assert_eq!(net.at(&Viewer::Open, "10.0.0.7"), ["db.default"]);
    // A slice that goes leaves those addresses that others have.
    net.commit(|index, _| plan::slice::delete(index, "n", "", "db-1", 0)).await;
    assert_eq!(net.at(&Viewer::Open, "10.0.0.9"), ["web.default"]);
    assert_eq!(net.at(&Viewer::Open, "10.0.0.8"), ["db.default"]);
}

/// Specification 9: a namespace exists when its object does, and its names are gone as soon as it is deleted.
#[tokio::test]
async fn namespaces_take_their_names_along() {
    let net = Net::new(false).await;
    let zone = net.zone();
    let exist = || ["default", "team", "none", ""].map(|name| net.zones.namespace(&zone, name));
    assert_eq!(exist(), [true, true, false, false]);
    let mut empty = proto::Namespace { metadata: Some(Default::default()), status: None };
    let meta = empty.metadata.as_mut().unwrap();
    (meta.network, meta.name) = ("n".into(), "none".into());
    let (uid, now) = (Uuid::from_u128(900), muster_common::time::Timestamp::now());
    net.commit(|index, _| plan::namespace::create(index, &empty, uid, now)).await;
    assert_eq!(exist(), [true, true, true, false], "without content");
    // Devices must have left a namespace before it can go.
    for name in ["a", "c"] {
        net.commit(|index, _| plan::device::delete(index, "n", name, 0, now)).await;
    }
    net.commit(|index, _| plan::namespace::terminate(index, "n", "team", 0)).await;
    assert_eq!(exist(), [true, false, true, false]);
    assert!(net.zones.service(&zone, &Viewer::Open, "team", "web").is_none());
    assert_eq!(net.services(&Viewer::Open), ["db.default", "web.default"]);
    let other = net.zones.zone("o.example").unwrap();
    assert_eq!(["default", "none"].map(|name| net.zones.namespace(&other, name)), [true, false]);
}

/// Specification 6, 15: devices that are known, by any of their addresses.
#[tokio::test]
async fn namespaces_of_devices_are_those_of_live_ones() {
    let net = Net::new(false).await;
    let zone = net.zone();
    let address = |name: &str| {
        let index = net.registry.read();
        index.network("n").unwrap().devices.by_name(name).unwrap().addresses().next().unwrap()
    };
    let found = |name| net.zones.namespace_of(&zone, address(name)).map(|label| label.to_string());
    assert_eq!((found("a").as_deref(), found("b").as_deref()), (Some("team"), Some("default")));
    assert_eq!((found("c"), found("pending")), (None, None), "revoked, and not registered yet");
    assert_eq!(net.zones.namespace_of(&zone, [10, 0, 0, 200].into()), None);
    let other = net.zones.zone("o.example").unwrap();
    assert_eq!(net.zones.namespace_of(&other, address("a")), None);
}

/// Specification 15: a certificate tells who asks, whatever the address.
#[tokio::test]
async fn members_are_known_by_their_certificate() {
    let net = Net::new(false).await;
    let zone = net.zone();
    let found = |viewer: &Viewer| {
        net.zones.member(&zone, viewer).map(|(name, namespace)| format!("{name}.{namespace}"))
    };
    assert_eq!(found(&member("n", &net.uids[0])).as_deref(), Some("a.team"));
    assert_eq!(found(&member("n", &net.uids[1])).as_deref(), Some("b.default"));
    for nobody in outsiders(&net).iter().chain([&Viewer::Open]) {
        assert_eq!(found(nobody), None, "{nobody:?}");
    }
    let other = net.zones.zone("o.example").unwrap();
    assert_eq!(net.zones.member(&other, &member("n", &net.uids[0])), None);
}

/// Who sees which zones, in one order.
#[tokio::test]
async fn zones_are_those_that_a_viewer_is_in() {
    let net = Net::new(false).await;
    let seen = |viewer: &Viewer| -> Vec<String> {
        net.zones.zones(viewer).iter().map(|zone| zone.domain.to_string()).collect()
    };
    assert_eq!(seen(&Viewer::Open), ["n.example", "o.example"]);
    assert_eq!(seen(&member("n", &net.uids[0])), ["n.example"]);
    let pool = |address: &str| format!("{address}/32").parse::<IpNet>().unwrap();
    let reverse = |viewer: &Viewer| {
        let address = net.registry.read().network("n").unwrap().devices.by_name("b")?.addresses().next()?;
        net.zones.reverse_zone(viewer, pool(&address.to_string())).map(|zone| zone.domain.to_string())
    };
    for viewer in [Viewer::Open, member("n", &net.uids[0])] {
        assert_eq!(reverse(&viewer).as_deref(), Some("n.example"), "{viewer:?}");
        assert!(!net.zones.is_outsider(&viewer), "{viewer:?}");
    }
    // Those who were revoked learn neither pools nor, from their SOA, what zone is behind them.
    for viewer in outsiders(&net) {
        assert!(seen(&viewer).is_empty(), "{viewer:?}");
        assert_eq!(reverse(&viewer), None, "{viewer:?}");
        assert!(net.zones.is_outsider(&viewer), "{viewer:?}");
    }
}

/// Specification 12: names in the external domain are of the same zone, as long as the network has that domain.
#[tokio::test]
async fn external_domains_lead_to_their_network() {
    let net = Net::new(false).await;
    let domain = |name: &str| net.zones.zone(name).map(|zone| zone.domain.to_string());
    for name in ["x.example", "web.default.x.example", "n.example"] {
        assert_eq!(domain(name).as_deref(), Some("n.example"), "{name}");
    }
    assert_eq!((domain("xx.example"), domain("example")), (None, None));
    let before = net.zone();
    assert_eq!(before.external_domain.as_ref().unwrap().as_str(), "x.example");
    let change = async |external: &str| {
        let mut changed = service_network();
        changed.spec.as_mut().unwrap().external_domain = external.into();
        let mask = crate::registry::tests::mask(&["spec.external_domain"]);
        net.commit(|index, _| plan::network::update(index, &changed, Some(&mask), None)).await;
    };
    change("y.example").await;
    assert_eq!((domain("a.x.example"), domain("a.y.example").as_deref()), (None, Some("n.example")));
    assert_eq!(net.zone().external_domain.as_ref().unwrap().as_str(), "y.example");
    change("").await;
    assert_eq!((domain("a.y.example"), net.zone().external_domain.clone()), (None, None));
    // What the zone was is not looked into any more once the domain is of another network.
    let mut stale = (*net.zone()).clone();
    stale.domain = "old.example".parse().unwrap();
    assert!(net.zones.services(&stale, &Viewer::Open).is_empty());
    assert!(!net.zones.namespace(&stale, "default"));
    assert_eq!(net.zones.namespace_of(&stale, [10, 0, 0, 1].into()), None);
}

/// Specification 10, 12: what moves each serial, with and without headless Services in the external zone.
#[tokio::test]
async fn serials_move_with_what_their_zone_serves() {
    for headless in [false, true] {
        let net = Net::new(headless).await;
        let mut index = net.registry.read().clone();
        // Through the index alone, at times that the test chooses.
        let mut revision = index.revision();
        let mut serials = |at: u64, object: Object| {
            revision += 1;
            let now = muster_common::time::Timestamp::from_epoch(std::time::Duration::from_secs(at));
            assert!(index.apply(&object.batch(&index, revision), now).bad.is_empty());
            let zone = net.zones.zone_of(&index, index.network("n").unwrap());
            (zone.serial, zone.external_serial)
        };
        let zone = serials(4_000_000_000, Object::Nothing);
        let first = serials(4_000_000_001, Object::Port("web"));
        assert_eq!(first, (4_000_000_001, 4_000_000_001), "with external address");
        assert!(zone.0 < first.0 && zone.1 < first.1);
        let inside = serials(4_000_000_002, Object::Port("db"));
        assert_eq!(inside, (4_000_000_002, if headless { 4_000_000_002 } else { 4_000_000_001 }));
        assert_eq!(serials(4_000_000_003, Object::Nothing), inside);
        // A clock that goes back takes no serial along.
        assert_eq!(serials(1, Object::Port("web")), inside);
    }
}

/// A change of what is in [`Net`].
enum Object {
    /// A Service is written again as it is.
    Nothing,
    /// The port of a Service becomes another.
    Port(&'static str),
}

impl Object {
    fn batch(&self, index: &registry::Index, revision: Revision) -> crate::store::WatchBatch {
        let name = if let Self::Port(name) = self { name } else { "web" };
        let state = index.network("n").unwrap();
        let found = state
            .services
            .services
            .iter()
            .find(|found| found.name.as_str() == name && found.namespace.as_str() == "default");
        let mut stored = found.unwrap().stored.clone();
        if matches!(self, Self::Port(_)) {
            stored.spec.as_mut().unwrap().ports[0].port += 1;
        }
        let value = prost::Message::encode_to_vec(&stored);
        let kv = crate::store::KeyValue {
            key: crate::registry::keys::service("n", "default", name),
            value: value.into(),
            create_revision: 1,
            mod_revision: revision,
        };
        crate::store::WatchBatch { revision, events: vec![crate::store::Event::Put(kv)] }
    }
}

#[tokio::test]
async fn a_host_without_an_agent_is_found_as_long_as_a_device_speaks_for_it() {
    let mut world = World::with_network(1, "10.0.0.0/24");
    let (token, directors) = (world.reusable_token(), world.director_token());
    let uids = ["a", "g"].map(|name| world.join(&token, name));
    world.register(0, uids[0], 1).unwrap();
    world.register(0, uids[1], 2).unwrap();
    let director = world.director(&directors, "d", 7);
    world.set_outside(uids[1], &Outside { home: Some(director), ..Outside::default() }).unwrap();
    world.approve("g", true, &[]).unwrap();
    world.offer(0, uids[1], &["printer"], &[]);
    let registry = Registry::load(Arc::new(world.store.clone())).await.unwrap();
    let zones = Zones::new(registry.clone(), Readiness::default(), Vec::new());
    let zone = zones.zone("n.example").unwrap();
    let viewer = member("n", &uids[0].to_string().parse().unwrap());
    for viewer in [&viewer, &Viewer::Open] {
        let found = zones.device(&zone, viewer, "printer").unwrap();
        assert_eq!(found.private_addresses, ["192.168.7.1".parse::<IpAddr>().unwrap()]);
        assert_eq!(found.director, ["192.0.2.7:7501".parse().unwrap()]);
        let [address] = found.virtual_addresses[..] else { panic!("one address") };
        assert_eq!(zones.device_at(&zone, viewer, address).unwrap().as_str(), "printer");
        assert_eq!(zones.namespace_of(&zone, address).unwrap().as_str(), "default");
    }
    world.catch_up(0);
    world.offer(0, uids[1], &[], &[]);
    registry.refresh().await.unwrap();
    for viewer in [&viewer, &Viewer::Open] {
        assert!(zones.device(&zone, viewer, "printer").is_none());
    }
}
