//! Sessions as streams, without a transport.

use std::{net::SocketAddr, pin::Pin, sync::Arc, time::Duration};

use futures_util::{Stream, StreamExt as _};
use muster_common::time::{Instant, Timestamp};
use muster_proto::{
    admin::{self, Endpoint, TransportCipher},
    registration::{
        EndpointsChanged, HeldPeers, HeldServices, Reachability, ServiceChanged, SessionHello,
        SessionRequest, SessionResponse, session_request, session_response::Message,
    },
};
use rustls::pki_types::CertificateDer;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};
use uuid::Uuid;

mod virtual_services;

use super::{Hub, run};
use crate::{
    registry::{
        Index, Registry,
        plan::{self, register::Registration, registrar::Own},
        tests::{World, device, mask, meta, service, slice},
        view::Advertised,
    },
    store::memory::MemoryStore,
};

struct Fixture {
    registry: Arc<Registry>,
    hub: Arc<Hub>,
    roots: watch::Sender<Vec<CertificateDer<'static>>>,
}

/// A registrar with devices `a`, `b`, … of the network `n`.
async fn fixture(devices: usize) -> (Fixture, Vec<Uuid>) {
    let mut world = World::with_network(1, "10.0.0.0/16");
    let token = world.reusable_token();
    let mut uids = Vec::new();
    for n in 0..devices {
        let uid = world.join(&token, &name(n));
        world.register(0, uid, u8::try_from(n).unwrap() + 1).unwrap();
        uids.push(uid);
    }
    (registrar(world.store).await, uids)
}

async fn registrar(store: MemoryStore) -> Fixture {
    let registry = Registry::load(Arc::new(store)).await.unwrap();
    let roots = watch::Sender::new(vec![CertificateDer::from(vec![1])]);
    let hub = Hub::new(&registry, Advertised::default(), roots.subscribe());
    Fixture { registry, hub, roots }
}

fn name(n: usize) -> String {
    char::from(b'a' + u8::try_from(n).unwrap()).to_string()
}

impl Fixture {
    fn open(&self, uid: Uuid, revision: u64, held: &[Uuid]) -> Session {
        let (sender, receiver) = mpsc::channel(64);
        let stream = run(self.hub.clone(), "n".into(), uid, ReceiverStream::new(receiver));
        let session = Session { sender, stream: Box::pin(stream) };
        session.send(session_request::Message::Hello(SessionHello {
            revision,
            held_peer_uids: held.iter().map(Uuid::to_string).collect(),
            held_services: Vec::new(),
            watch_virtual_services: None,
        }));
        session
    }

    /// Opens a session that holds Services, and reads the names of those that it is told have changed.
    async fn reopened(&self, uid: Uuid, revision: u64, services: &[&str]) -> (Session, Vec<String>) {
        let (sender, receiver) = mpsc::channel(64);
        let stream = run(self.hub.clone(), "n".into(), uid, ReceiverStream::new(receiver));
        let mut session = Session { sender, stream: Box::pin(stream) };
        session.send(session_request::Message::Hello(SessionHello {
            revision,
            held_peer_uids: Vec::new(),
            held_services: services.iter().map(|name| (*name).to_owned()).collect(),
            watch_virtual_services: None,
        }));
        assert!(matches!(session.next().await, Message::Config(_)));
        let mut changed = Vec::new();
        loop {
            match session.next().await {
                Message::ServiceChanged(service) => changed.push(service_name(&service)),
                Message::Bookmark(_) => return (session, changed),
                other => panic!("unexpected: {other:?}"),
            }
        }
    }

    async fn create_service(&self, namespace: &str, name: &str) {
        let mut wanted = service(name);
        wanted.metadata.as_mut().unwrap().namespace = namespace.into();
        wanted.spec.as_mut().unwrap().cluster_ip = "None".into();
        let (uid, now) = (
            Uuid::from_u128(name.bytes().fold(1 << 64, |sum, byte| sum * 31 + u128::from(byte))),
            Timestamp::now(),
        );
        let plan = |index: &mut crate::registry::Index, number| {
            plan::service::create(index, &wanted, uid, plan::service::Attempt { number, now })
        };
        self.registry.commit(plan).await.unwrap();
    }

    async fn create_slice(&self, name: &str, of: &str, address: &str) {
        let (wanted, now) = (slice(name, of, &[address]), Timestamp::now());
        let uid = Uuid::from_u128(name.bytes().fold(1 << 64, |sum, byte| sum * 31 + u128::from(byte)));
        self.registry.commit(|index, _| plan::slice::create(index, &wanted, uid, now)).await.unwrap();
    }

    /// Opens a session, and reads all that comes in answer to the hello.
    async fn opened(&self, uid: Uuid, held: &[Uuid]) -> (Session, u64) {
        let mut session = self.open(uid, 0, held);
        assert!(matches!(session.next().await, Message::Config(_)));
        for _ in held {
            assert!(matches!(session.next().await, Message::PeerChanged(_)));
        }
        let Message::Bookmark(bookmark) = session.next().await else { panic!("expected a bookmark") };
        (session, bookmark.revision)
    }

    async fn set_endpoints(&self, uid: Uuid, port: u16) {
        let endpoints: [SocketAddr; 1] = [([192, 0, 2, 77], port).into()];
        let write = |index: &mut crate::registry::Index, _| {
            plan::register::endpoints(index, "n", uid, &endpoints, None)
        };
        self.registry.commit(write).await.unwrap();
    }

    async fn revoke(&self, name: &str) {
        let mut wanted = device(name, "");
        wanted.spec.as_mut().unwrap().revoked = true;
        let mask = mask(&["spec.revoked"]);
        self.registry.commit(|index, _| plan::device::update(index, &wanted, Some(&mask))).await.unwrap();
    }

    async fn delete(&self, name: &str) {
        let now = Timestamp::now();
        self.registry.commit(|index, _| plan::device::delete(index, "n", name, 0, now)).await.unwrap();
    }
}

struct Session {
    sender: mpsc::Sender<Result<SessionRequest, Status>>,
    stream: Pin<Box<dyn Stream<Item = Result<SessionResponse, Status>> + Send>>,
}

impl Session {
    fn send(&self, message: session_request::Message) {
        self.sender.try_send(Ok(SessionRequest { message: Some(message) })).unwrap();
    }

    async fn poll(&mut self) -> Option<Result<Message, Status>> {
        let next = tokio::time::timeout(Duration::from_secs(20), self.stream.next()).await;
        let next = next.expect("nothing came within 20 seconds");
        next.map(|response| response.map(|response| response.message.unwrap()))
    }

    async fn next(&mut self) -> Message {
        self.poll().await.expect("the session has ended").unwrap()
    }

    async fn end(&mut self) -> Status {
        let status = self.poll().await.expect("the session ended without a status").unwrap_err();
        assert!(self.poll().await.is_none());
        status
    }

    /// Nothing else waits to be sent.
    async fn is_quiet(&mut self) -> bool {
        tokio::time::timeout(Duration::from_millis(50), self.stream.next()).await.is_err()
    }
}

fn service_name(changed: &ServiceChanged) -> String {
    format!("{}/{}", changed.namespace, changed.name)
}

fn held_services(added: &[&str], removed: &[&str]) -> session_request::Message {
    let texts = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    session_request::Message::HeldServices(HeldServices { added: texts(added), removed: texts(removed) })
}

fn port(message: &Message) -> u32 {
    match message {
        Message::PeerChanged(changed) => changed.peer.as_ref().unwrap().private_endpoints[0].port,
        other => panic!("expected PeerChanged, not {other:?}"),
    }
}

#[tokio::test]
async fn holders_learn_of_changes_and_revocation() {
    let (registrar, uids) = fixture(3).await;
    let (mut a, _) = registrar.opened(uids[0], &[uids[1]]).await;
    let (mut b, _) = registrar.opened(uids[1], &[]).await;
    let (mut c, _) = registrar.opened(uids[2], &[]).await;
    assert!(registrar.hub.is_online(uids[0]) && registrar.hub.len() == 3);

    registrar.set_endpoints(uids[1], 7).await;
    assert_eq!(port(&a.next().await), 7);
    let Message::Bookmark(bookmark) = a.next().await else { panic!("expected a bookmark") };
    assert_eq!(bookmark.revision, registrar.registry.read().revision());

    registrar.revoke("b").await;
    let Message::PeerRemoved(removed) = a.next().await else { panic!("expected PeerRemoved") };
    assert_eq!(removed.device_uid, uids[1].to_string());
    assert!(matches!(a.next().await, Message::Bookmark(_)));
    let status = b.end().await;
    assert_eq!(status.code(), Code::PermissionDenied);
    assert!(status.message().contains("revoked"));
    assert!(a.is_quiet().await && c.is_quiet().await, "only holders are told");

    registrar.delete("c").await;
    assert_eq!(c.end().await.code(), Code::PermissionDenied);
    drop((a, b, c));
    assert!(registrar.hub.is_empty());
    assert!(super::lock(&registrar.hub.open).holders.is_empty());
}

#[tokio::test]
async fn holders_learn_which_ciphers_a_device_has_from_now_on() {
    let (registrar, uids) = fixture(2).await;
    let (mut a, _) = registrar.opened(uids[0], &[uids[1]]).await;
    let device = registrar.registry.read().device("n", uids[1]).unwrap().clone();
    let mut aes = device.aes_256_gcm;
    for _ in 0..2 {
        aes = !aes;
        let registration = Registration {
            before: None,
            key: device.key.unwrap(),
            endpoints: &device.endpoints,
            outside: None,
            hosts: &[],
            subnets: &[],
            aes_256_gcm: aes,
            agent_version: &device.agent_version,
            attempt: 0,
            now: Timestamp::now(),
        };
        let register = async || {
            let plan = |index: &mut Index, _| plan::register::register(index, "n", device.uid, &registration);
            registrar.registry.commit(plan).await.unwrap();
        };
        // What is open is of another life of the agent than what has registered: it has to register again.
        let (mut own, _) = registrar.opened(uids[1], &[]).await;
        register().await;
        assert_eq!(own.end().await.code(), Code::Aborted);
        // The second registration changes nothing.
        let (mut own, _) = registrar.opened(uids[1], &[]).await;
        register().await;
        assert!(own.is_quiet().await);
        let Message::PeerChanged(changed) = a.next().await else { panic!("expected PeerChanged") };
        let peer = changed.peer.unwrap();
        assert_eq!(peer.device_uid, device.uid.to_string());
        assert_eq!(peer.transport_ciphers().eq([TransportCipher::Aes256Gcm]), aes);
        assert!(matches!(a.next().await, Message::Bookmark(_)));
    }
    assert!(a.is_quiet().await);
}

/// Whom the next changes tell of, in any order, up to the next bookmark.
async fn told(session: &mut Session) -> Vec<String> {
    let mut told = Vec::new();
    loop {
        match session.next().await {
            Message::Config(config) => told.push(format!("config {}", config.site_routes.join(" "))),
            Message::PeerChanged(changed) => {
                let peer = changed.peer.unwrap();
                let (addresses, subnets) = (peer.virtual_addresses.len(), peer.subnets.len());
                told.push(format!("{} {addresses} {subnets}", peer.name));
            }
            Message::Bookmark(_) => return told,
            other => panic!("unexpected: {other:?}"),
        }
    }
}

#[tokio::test]
async fn holders_learn_what_a_peer_carries_and_all_which_subnets_there_are() {
    let mut world = World::with_network(1, "10.0.0.0/16");
    let token = world.reusable_token();
    let uids = ["a", "b", "g"].map(|name| world.join(&token, name));
    for (uid, key) in uids.into_iter().zip(1..) {
        world.register(0, uid, key).unwrap();
    }
    let registrar = registrar(world.store.clone()).await;
    let sites = registrar.hub.sites_changed();
    let (mut a, _) = registrar.opened(uids[0], &[uids[2]]).await;
    let (mut b, _) = registrar.opened(uids[1], &[]).await;
    assert!(!sites.has_changed().unwrap(), "neither has a site");

    world.offer(0, uids[2], &["tv"], &["192.168.7.0/24"]);
    registrar.registry.refresh().await.unwrap();
    assert_eq!(told(&mut a).await, ["g 1 0"]);
    world.approve("g", true, &["192.168.7.0/24"]).unwrap();
    registrar.registry.refresh().await.unwrap();
    assert_eq!(told(&mut a).await.last().unwrap(), "g 2 0");
    world.carry("192.168.7.0/24", uids[2]);
    registrar.registry.refresh().await.unwrap();
    assert_eq!(told(&mut a).await, ["config 192.168.7.0/24", "g 2 1"]);
    let Message::Config(config) = b.next().await else { panic!("expected the configuration") };
    assert_eq!(config.site_routes, ["192.168.7.0/24"]);

    let (mut g, _) = registrar.opened(uids[2], &[]).await;
    assert!(sites.has_changed().unwrap());
    world.delete_device(0, "tv").unwrap();
    registrar.registry.refresh().await.unwrap();
    assert_eq!(told(&mut a).await, ["g 1 1"]);
    let Message::Config(config) = g.next().await else { panic!("expected the configuration") };
    assert_eq!(config.active_subnets, ["192.168.7.0/24"]);
    assert!(config.proxied_devices[0].refused.contains("no virtual address yet"), "{config:?}");
    assert!(b.is_quiet().await, "it is none of its business");
}

/// A registrar with devices `a` and `b`, and the director `d1`.
async fn fixture_with_director() -> (Fixture, Vec<Uuid>, Uuid) {
    let mut world = World::with_network(1, "10.0.0.0/16");
    let (devices, directors) = (world.reusable_token(), world.director_token());
    let uids: Vec<Uuid> = ["a", "b"].iter().map(|name| world.join(&devices, name)).collect();
    for (uid, key) in uids.iter().zip(1..) {
        world.register(0, *uid, key).unwrap();
    }
    let director = world.director(&directors, "d1", 1);
    (registrar(world.store).await, uids, director)
}

fn reachability(home: &str) -> session_request::Message {
    session_request::Message::EndpointsChanged(EndpointsChanged {
        private_endpoints: vec![Endpoint { address: "192.0.2.1".into(), port: 1002 }],
        reachability: Some(Reachability {
            reflexive_endpoints: vec![Endpoint { address: "198.51.100.7".into(), port: 7 }],
            home_director_uid: home.into(),
            second_director_uid: String::new(),
        }),
    })
}

fn home(message: Message) -> Option<String> {
    let Message::PeerChanged(changed) = message else { panic!("expected PeerChanged, not {message:?}") };
    changed.peer.unwrap().home_director.map(|home| home.address.unwrap().name)
}

#[tokio::test]
async fn holders_learn_where_a_device_is_attached() {
    let (registrar, uids, director) = fixture_with_director().await;
    let (mut a, _) = registrar.opened(uids[0], &[uids[1]]).await;
    let (mut b, _) = registrar.opened(uids[1], &[]).await;
    b.send(reachability(&director.to_string()));
    assert!(b.is_quiet().await);
    assert_eq!(home(a.next().await).as_deref(), Some("d1"));
    assert!(matches!(a.next().await, Message::Bookmark(_)));
    // The same again is nothing new, nor is what does not speak of it.
    let revision = registrar.registry.read().revision();
    b.send(reachability(&director.to_string()));
    assert!(b.is_quiet().await);
    assert_eq!(registrar.registry.read().revision(), revision);
    b.send(session_request::Message::EndpointsChanged(EndpointsChanged::default()));
    assert!(b.is_quiet().await);
    assert_eq!(home(a.next().await).as_deref(), Some("d1"));
    assert!(matches!(a.next().await, Message::Bookmark(_)));
    b.send(reachability("d1"));
    assert_eq!(b.end().await.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn devices_learn_of_directors_and_what_becomes_of_them() {
    let (registrar, uids, director) = fixture_with_director().await;
    let (mut b, _) = registrar.opened(uids[1], &[]).await;
    b.send(reachability(&director.to_string()));
    assert!(b.is_quiet().await);
    let (mut a, revision) = registrar.opened(uids[0], &[uids[1]]).await;
    let set = async |revoked, drained| {
        let wanted = admin::Director {
            metadata: Some(meta("n", "d1")),
            spec: Some(admin::DirectorSpec { revoked, drained }),
            status: None,
        };
        let write = |index: &mut Index, _| plan::director::update(index, &wanted, None);
        registrar.registry.commit(write).await.unwrap();
    };
    let directors = |message: Message| {
        let Message::Config(config) = message else { panic!("expected a configuration, not {message:?}") };
        config.directors
    };
    set(false, true).await;
    assert!(directors(a.next().await)[0].draining);
    assert_eq!(home(a.next().await).as_deref(), Some("d1"));
    set(true, false).await;
    assert!(directors(a.next().await).is_empty());
    assert_eq!(home(a.next().await), None);
    assert!(a.is_quiet().await);
    // Of a new certificate nobody is told. A director that was, and comes back, finds whom it concerns.
    set(false, false).await;
    assert_eq!(directors(a.next().await).len(), 1);
    assert_eq!(home(a.next().await).as_deref(), Some("d1"));
    let renew = |index: &mut Index, _| plan::director::renew(index, "n", director, Timestamp::now());
    registrar.registry.commit(renew).await.unwrap();
    assert!(a.is_quiet().await);
    drop(a);
    // What has changed while a session was away is told at its beginning.
    let mut again = registrar.open(uids[0], revision, &[uids[1]]);
    assert_eq!(directors(again.next().await).len(), 1);
    assert_eq!(home(again.next().await).as_deref(), Some("d1"));
    assert!(matches!(again.next().await, Message::Bookmark(_)));
}

#[tokio::test]
async fn a_session_resumes_from_its_bookmark() {
    let (registrar, uids) = fixture(5).await;
    let held = [uids[1], uids[2], uids[3], uids[4]];
    let (session, revision) = registrar.opened(uids[0], &held).await;
    drop(session);
    registrar.set_endpoints(uids[2], 9).await;
    registrar.delete("d").await;
    registrar.revoke("e").await;

    let mut session = registrar.open(uids[0], revision, &held);
    assert!(matches!(session.next().await, Message::Config(_)));
    assert_eq!(port(&session.next().await), 9);
    for gone in [uids[3], uids[4]] {
        let Message::PeerRemoved(removed) = session.next().await else { panic!("expected PeerRemoved") };
        assert_eq!(removed.device_uid, gone.to_string());
    }
    let Message::Bookmark(bookmark) = session.next().await else { panic!("expected a bookmark") };
    assert_eq!(bookmark.revision, registrar.registry.read().revision());
    assert!(session.is_quiet().await);
}

#[tokio::test]
async fn unknown_peers_are_removed_and_peers_newly_held_are_sent() {
    let (registrar, uids) = fixture(2).await;
    let stranger = Uuid::from_u128(1 << 100);
    let mut session = registrar.open(uids[0], 0, &[stranger]);
    assert!(matches!(session.next().await, Message::Config(_)));
    assert!(matches!(session.next().await, Message::PeerRemoved(_)));
    assert!(matches!(session.next().await, Message::Bookmark(_)));
    let held = |added: &[Uuid], removed: &[Uuid]| {
        session_request::Message::HeldPeers(HeldPeers {
            added_uids: added.iter().map(Uuid::to_string).collect(),
            removed_uids: removed.iter().map(Uuid::to_string).collect(),
        })
    };
    session.send(held(&[uids[1]], &[]));
    assert_eq!(port(&session.next().await), 1002);
    session.send(held(&[], &[uids[1]]));
    assert!(session.is_quiet().await);
    registrar.set_endpoints(uids[1], 3).await;
    assert!(session.is_quiet().await, "it is not held any more");
}

#[tokio::test]
async fn a_newer_session_takes_the_place_of_an_older_one() {
    let (registrar, uids) = fixture(2).await;
    let (mut old, _) = registrar.opened(uids[0], &[uids[1]]).await;
    let (mut new, _) = registrar.opened(uids[0], &[uids[1]]).await;
    assert_eq!(old.end().await.code(), Code::Aborted);
    drop(old);
    assert!(registrar.hub.is_online(uids[0]));
    registrar.set_endpoints(uids[1], 8).await;
    assert_eq!(port(&new.next().await), 8);
}

#[tokio::test]
async fn introductions_show_the_peer() {
    let (registrar, uids) = fixture(3).await;
    let (mut b, _) = registrar.opened(uids[1], &[]).await;
    let now = Instant::now();
    registrar.hub.introduce(uids[1], uids[0], now);
    registrar.hub.introduce(uids[1], uids[0], now);
    // Nobody is told of a peer that is hidden by then.
    registrar.revoke("c").await;
    registrar.hub.introduce(uids[1], uids[2], now);
    let Message::Introduction(introduction) = b.next().await else { panic!("expected an introduction") };
    assert_eq!(introduction.peer.unwrap().device_uid, uids[0].to_string());
    assert!(b.is_quiet().await);
}

#[tokio::test]
async fn endpoints_are_written_and_coalesced() {
    let (registrar, uids) = fixture(1).await;
    let (mut session, before) = registrar.opened(uids[0], &[]).await;
    for port in 1..=40 {
        let endpoint = Endpoint { address: "192.0.2.5".into(), port };
        session.send(session_request::Message::EndpointsChanged(EndpointsChanged {
            private_endpoints: vec![endpoint],
            ..Default::default()
        }));
    }
    let mut revisions = registrar.registry.revisions();
    let is_last = |registrar: &Fixture| {
        registrar.registry.read().device("n", uids[0]).unwrap().endpoints[0].port() == 40
    };
    while !is_last(&registrar) {
        tokio::select! {
            message = session.poll() => panic!("unexpected {message:?}"),
            changed = revisions.changed() => changed.unwrap(),
        }
    }
    let written = registrar.registry.read().revision() - before;
    assert!(written <= 3, "40 changes came to {written} writes");
}

#[tokio::test]
async fn a_session_that_does_not_read_goes_on_and_holds_nobody_up() {
    let (registrar, uids) = fixture(2).await;
    let (mut slow, _) = registrar.opened(uids[0], &[uids[1]]).await;
    let (mut other, _) = registrar.opened(uids[1], &[]).await;
    let now = Instant::now();
    for n in 0..1000 {
        registrar.hub.introduce(uids[0], Uuid::from_u128(1000 + n), now);
        registrar.set_endpoints(uids[1], 1 + u16::try_from(n).unwrap()).await;
    }
    registrar.hub.introduce(uids[1], uids[0], now);
    assert!(matches!(other.next().await, Message::Introduction(_)));
    // However popular a device is, all that it missed is one message about each peer.
    assert_eq!(port(&slow.next().await), 1000);
    assert!(matches!(slow.next().await, Message::Bookmark(_)));
    assert!(slow.is_quiet().await);
}

#[tokio::test]
async fn configuration_and_roots_are_sent_again_when_they_change() {
    let (registrar, uids) = fixture(2).await;
    let (mut session, _) = registrar.opened(uids[0], &[uids[1]]).await;
    registrar.roots.send_replace(vec![CertificateDer::from(vec![1]), CertificateDer::from(vec![2])]);
    let Message::RootsChanged(roots) = session.next().await else { panic!("expected roots") };
    assert_eq!(roots.roots, [vec![1], vec![2]]);
    // Other directors are other ways to every peer.
    let mut network = registrar.registry.read().network("n").unwrap().network.stored.clone();
    network.spec.as_mut().unwrap().directors = vec![muster_proto::admin::DirectorAddress {
        name: "d".into(),
        address: "192.0.2.9".into(),
        port: 5,
        ..Default::default()
    }];
    let mask = mask(&["spec.directors"]);
    registrar
        .registry
        .commit(|index, _| plan::network::update(index, &network, Some(&mask), None))
        .await
        .unwrap();
    let Message::Config(config) = session.next().await else { panic!("expected a configuration") };
    assert_eq!(config.directors.len(), 1);
    let Message::PeerChanged(changed) = session.next().await else { panic!("expected PeerChanged") };
    assert_eq!(changed.peer.unwrap().home_director.unwrap().address.unwrap().port, 5);
}

#[tokio::test]
async fn a_registrar_that_stops_sends_its_agents_away() {
    let (registrar, uids) = fixture(2).await;
    let (mut session, _) = registrar.opened(uids[0], &[]).await;
    registrar.hub.drain(Duration::from_secs(7));
    let Message::Drain(drain) = session.next().await else { panic!("expected a drain") };
    assert_eq!(drain.within.unwrap().seconds, 7);
    let mut late = registrar.open(uids[1], 0, &[]);
    assert_eq!(late.end().await.code(), Code::Unavailable);
    registrar.hub.shutdown();
    assert_eq!(session.end().await.code(), Code::Unavailable);
}

#[tokio::test]
async fn some_agents_are_sent_to_other_registrars() {
    let (registrar, uids) = fixture(3).await;
    let mut sessions = Vec::new();
    for uid in &uids {
        sessions.push(registrar.opened(*uid, &[]).await.0);
    }
    let to = ["192.0.2.1:7500".to_owned()];
    registrar.hub.send_away(2, &to, Duration::from_secs(30));
    for session in &mut sessions[1..] {
        let Message::Drain(drain) = session.next().await else { panic!("expected a drain") };
        assert_eq!((drain.within.unwrap().seconds, &drain.registrars[..]), (30, &to[..]));
    }
    // The others stay, and nothing ends; all hear of a registrar that comes.
    let own = Own {
        uid: Uuid::from_u128(1),
        run: Uuid::from_u128(2),
        host: "r",
        advertised: &Advertised { registrars: to.to_vec(), dns_servers: Vec::new() },
        version: "1",
        sessions: 0,
    };
    let plan = |index: &mut Index, _| plan::registrar::tell(index, &own, Timestamp::now());
    registrar.registry.commit(plan).await.unwrap();
    for session in &mut sessions {
        let Message::Config(config) = session.next().await else { panic!("expected a configuration") };
        assert_eq!(config.registrars, to);
    }
    assert_eq!(registrar.hub.len(), 3);
}

#[tokio::test]
async fn bad_beginnings_are_refused() {
    let (registrar, uids) = fixture(1).await;
    let start = |message: session_request::Message| {
        let (sender, receiver) = mpsc::channel(4);
        let stream = run(registrar.hub.clone(), "n".into(), uids[0], ReceiverStream::new(receiver));
        let session = Session { sender, stream: Box::pin(stream) };
        session.send(message);
        session
    };
    let no_hello = session_request::Message::HeldPeers(HeldPeers::default());
    assert_eq!(start(no_hello).end().await.code(), Code::InvalidArgument);
    let no_uid = SessionHello { held_peer_uids: vec!["x".into()], ..SessionHello::default() };
    assert_eq!(start(session_request::Message::Hello(no_uid)).end().await.code(), Code::InvalidArgument);
    let mut gone = registrar.open(Uuid::from_u128(99 << 90), 0, &[]);
    assert_eq!(gone.end().await.code(), Code::PermissionDenied);
    assert!(registrar.hub.is_empty());
}

/// What the registrar tells a device that has a session, whatever happens in between: at the end the device knows
/// exactly what it would be told if it asked.
#[tokio::test]
async fn nothing_is_missed_while_everything_changes() {
    let (registrar, uids) = fixture(20).await;
    let held = uids[1..].to_vec();
    let writer = {
        let (registry, uids) = (registrar.registry.clone(), uids.clone());
        tokio::spawn(async move {
            for n in 0..200_usize {
                let uid = uids[1 + n % 19];
                let endpoints: [SocketAddr; 1] = [([192, 0, 2, 1], 5000 + u16::try_from(n).unwrap()).into()];
                let key = [u8::try_from(n % 250).unwrap() + 1; 32];
                let registration = Registration {
                    before: None,
                    key,
                    endpoints: &endpoints,
                    outside: None,
                    hosts: &[],
                    subnets: &[],
                    aes_256_gcm: n % 3 == 0,
                    agent_version: "2",
                    attempt: 0,
                    now: Timestamp::now(),
                };
                // Some keys are taken: not every write succeeds, and none needs to.
                let _ = registry
                    .commit(|index, _| plan::register::register(index, "n", uid, &registration))
                    .await;
                tokio::task::yield_now().await;
            }
        })
    };
    let mut known = std::collections::BTreeMap::new();
    let mut revision = 0;
    // Reconnects all the time, and goes on from where it was.
    while !writer.is_finished() || revision < registrar.registry.read().revision() {
        let mut session = registrar.open(uids[0], revision, &held);
        for _ in 0..30 {
            match tokio::time::timeout(Duration::from_millis(20), session.next()).await {
                Ok(Message::PeerChanged(changed)) => {
                    let peer = changed.peer.unwrap();
                    known.insert(
                        peer.device_uid.clone(),
                        (peer.public_key, peer.private_endpoints, peer.transport_ciphers),
                    );
                }
                Ok(Message::Bookmark(bookmark)) => revision = bookmark.revision,
                Ok(_) => {}
                Err(_) => break,
            }
        }
    }
    writer.await.unwrap();
    let index = registrar.registry.read();
    for uid in &held {
        let peer = index.peer("n", uids[0], *uid).unwrap();
        assert_eq!(
            known[&uid.to_string()],
            (peer.public_key, peer.private_endpoints, peer.transport_ciphers)
        );
    }
}

#[tokio::test]
async fn what_an_ended_session_held_is_forgotten_although_it_does_not_read() {
    let (registrar, uids) = fixture(3).await;
    let held: Vec<Uuid> = (0..1000).map(Uuid::from_u128).collect();
    // Opened, and then never read from.
    let mut sessions = Vec::new();
    for _ in 0..3 {
        let mut session = registrar.open(uids[0], 0, &held);
        assert!(matches!(session.next().await, Message::Config(_)));
        sessions.push(session);
    }
    assert_eq!(registrar.hub.len(), 3);
    let holders = || super::lock(&registrar.hub.open).holders.values().map(Vec::len).sum::<usize>();
    assert_eq!(holders(), 1000, "the last session's alone");
    registrar.revoke("a").await;
    assert_eq!(holders(), 0);
    assert_eq!(sessions[2].end().await.code(), Code::PermissionDenied);
    assert_eq!(sessions[0].end().await.code(), Code::Aborted);
}

#[tokio::test]
async fn holders_hear_of_services_that_are_answered_for_differently() {
    let (fixture, uids) = fixture(2).await;
    let (mut session, _) = fixture.reopened(uids[0], 0, &[]).await;
    session.send(held_services(&["default/Web", "team/db"], &[]));
    let mut next = async || match session.next().await {
        Message::ServiceChanged(changed) => service_name(&changed),
        other => panic!("expected ServiceChanged, not {other:?}"),
    };
    // They may have changed since they were resolved.
    assert_eq!((next().await, next().await), ("default/web".to_owned(), "team/db".to_owned()));
    fixture.create_service("", "other").await;
    fixture.create_service("", "web").await;
    assert_eq!(next().await, "default/web");
    assert!(matches!(session.next().await, Message::Bookmark(_)));
    fixture.create_slice("web-1", "web", "10.0.0.1").await;
    assert!(matches!(session.next().await, Message::ServiceChanged(_)));
    assert!(matches!(session.next().await, Message::Bookmark(_)));
    // What DNS does not show is not told.
    let mut labelled = service("web");
    labelled.metadata.as_mut().unwrap().labels.insert("a".into(), "b".into());
    let (paths, now) = (mask(&["metadata.labels"]), Timestamp::now());
    let attempt = plan::service::Attempt { number: 0, now };
    let update = |index: &mut crate::registry::Index, _| {
        plan::service::update(index, &labelled, Some(&paths), attempt)
    };
    fixture.registry.commit(update).await.unwrap();
    assert!(session.is_quiet().await);
    // A namespace takes its Services with it.
    let team = muster_proto::admin::Namespace { metadata: Some(meta("n", "team")), status: None };
    let uid = Uuid::from_u128(77);
    fixture.registry.commit(|index, _| plan::namespace::create(index, &team, uid, now)).await.unwrap();
    fixture.create_service("team", "db").await;
    assert!(matches!(session.next().await, Message::ServiceChanged(_)));
    assert!(matches!(session.next().await, Message::Bookmark(_)));
    fixture.registry.commit(|index, _| plan::namespace::terminate(index, "n", "team", 0)).await.unwrap();
    let Message::ServiceChanged(changed) = session.next().await else { panic!("expected a change") };
    assert_eq!(service_name(&changed), "team/db");
    assert!(matches!(session.next().await, Message::Bookmark(_)));
    // Once released, nothing more.
    session.send(held_services(&[], &["default/web", "team/db"]));
    assert!(session.is_quiet().await);
    fixture.create_slice("web-2", "web", "10.0.0.2").await;
    assert!(session.is_quiet().await);
    drop(session);
    assert!(super::lock(&fixture.hub.open).service_holders.is_empty());
}

#[tokio::test]
async fn a_session_that_returns_hears_what_it_missed() {
    let (fixture, uids) = fixture(1).await;
    let held = ["default/web", "default/db"];
    fixture.create_service("", "web").await;
    let revision = fixture.registry.published();
    let (session, changed) = fixture.reopened(uids[0], revision, &held).await;
    assert!(changed.is_empty());
    drop(session);
    fixture.create_service("", "db").await;
    assert_eq!(fixture.reopened(uids[0], revision, &held).await.1, ["default/db"]);
    // Of what is not known, all may have changed.
    assert_eq!(fixture.reopened(uids[0], 0, &held).await.1, ["default/web", "default/db"]);
    assert_eq!(fixture.reopened(uids[0], 1, &held).await.1, ["default/web", "default/db"]);
    let (mut session, _) = fixture.reopened(uids[0], 0, &held).await;
    fixture.create_slice("web-1", "web", "10.0.0.1").await;
    assert!(matches!(session.next().await, Message::ServiceChanged(_)));
}

#[tokio::test]
async fn names_that_are_held_are_checked_and_bounded() {
    let (fixture, uids) = fixture(1).await;
    for bad in ["web", "a/b/c", "/web", "default/", "a_b/c"] {
        let (mut session, _) = fixture.reopened(uids[0], 0, &[]).await;
        session.send(held_services(&[bad], &[]));
        assert_eq!(session.end().await.code(), Code::InvalidArgument, "{bad}");
    }
    let many: Vec<String> = (0..=super::SERVICES_MAX).map(|n| format!("default/s{n}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let (mut session, _) = fixture.reopened(uids[0], 0, &many[..4096]).await;
    session.send(held_services(&many[4096..], &[]));
    assert_eq!(session.end().await.code(), Code::ResourceExhausted);
    assert!(super::lock(&fixture.hub.open).service_holders.len() <= 1);
    drop(session);
    assert!(super::lock(&fixture.hub.open).service_holders.is_empty());
}
