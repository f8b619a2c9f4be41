//! Sessions of directors as streams, without a transport.

use std::pin::Pin;

use muster_common::time::Timestamp;
use muster_proto::{
    admin,
    director::{DevicesChanged, Report},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use super::*;
use crate::registry::{
    Index, Registry, plan,
    tests::{World, device, mask, meta},
    view::Advertised,
};

struct Fixture {
    registry: Arc<Registry>,
    hub: Arc<Hub>,
    roots: watch::Sender<Vec<CertificateDer<'static>>>,
    world: World,
    devices: Vec<Uuid>,
    directors: Vec<Uuid>,
}

/// A registrar with devices `a`, `b`, `c` and directors `d1`, `d2` of the network `n`.
async fn fixture() -> Fixture {
    let mut world = World::with_network(1, "10.0.0.0/16");
    let (token, directors) = (world.reusable_token(), world.director_token());
    let devices = ["a", "b", "c"].iter().map(|name| world.join(&token, name)).collect();
    let directors = vec![world.director(&directors, "d1", 1), world.director(&directors, "d2", 2)];
    let registry = Registry::load(Arc::new(world.store.clone())).await.unwrap();
    let roots = watch::Sender::new(vec![CertificateDer::from(vec![1])]);
    let advertised = Advertised { registrars: vec!["r:1".into()], dns_servers: Vec::new() };
    let hub = Hub::new(&registry, advertised, roots.subscribe());
    Fixture { registry, hub, roots, world, devices, directors }
}

fn octets(devices: &[Uuid]) -> Vec<Vec<u8>> {
    devices.iter().map(|uid| uid.as_bytes().to_vec()).collect()
}

struct Open {
    sender: mpsc::Sender<Result<SessionRequest, Status>>,
    stream: Pin<Box<dyn Stream<Item = Result<SessionResponse, Status>> + Send>>,
}

impl Open {
    fn send(&self, message: session_request::Message) {
        self.sender.try_send(Ok(SessionRequest { message: Some(message) })).unwrap();
    }

    fn hello(&self, devices: &[Uuid], more_follow: bool) {
        let hello = SessionHello { device_uids: octets(devices), more_follow };
        self.send(session_request::Message::Hello(hello));
    }

    async fn poll(&mut self) -> Option<Result<Message, Status>> {
        let next = tokio::time::timeout(Duration::from_secs(20), self.stream.next()).await;
        let next = next.expect("nothing came within 20 seconds");
        next.map(|response| response.map(|response| response.message.unwrap()))
    }

    async fn next(&mut self) -> Message {
        self.poll().await.expect("the session has ended").unwrap()
    }

    async fn refused(&mut self) -> Vec<Uuid> {
        match self.next().await {
            Message::DevicesRefused(refused) => {
                refused.device_uids.iter().map(|uid| Uuid::from_slice(uid).unwrap()).collect()
            }
            other => panic!("expected refused devices, not {other:?}"),
        }
    }

    async fn end(&mut self) -> Status {
        loop {
            match self.poll().await.expect("the session ended without a status") {
                Ok(_) => {}
                Err(status) => {
                    assert!(self.poll().await.is_none());
                    return status;
                }
            }
        }
    }

    /// Nothing else waits to be sent.
    async fn is_quiet(&mut self) -> bool {
        tokio::time::timeout(Duration::from_millis(50), self.stream.next()).await.is_err()
    }
}

impl Fixture {
    fn open(&self, director: Uuid) -> Open {
        let (sender, receiver) = mpsc::channel(64);
        let stream = run_director(self.hub.clone(), "n".into(), director, ReceiverStream::new(receiver));
        Open { sender, stream: Box::pin(stream) }
    }

    /// Says hello, and reads the configuration.
    async fn opened(&self, director: Uuid, devices: &[Uuid]) -> Open {
        let mut session = self.open(director);
        session.hello(devices, false);
        let Message::Config(config) = session.next().await else { panic!("expected a configuration") };
        assert_eq!((config.director_uid, config.network), (director.to_string(), "n".to_owned()));
        assert_eq!((config.registrars, config.drained), (vec!["r:1".to_owned()], false));
        session
    }

    async fn revoke(&self, name: &str, revoked: bool) {
        let mut wanted = device(name, "");
        wanted.spec.as_mut().unwrap().revoked = revoked;
        let mask = mask(&["spec.revoked"]);
        let write = |index: &mut Index, _| plan::device::update(index, &wanted, Some(&mask));
        self.registry.commit(write).await.unwrap();
    }

    async fn set(&self, name: &str, spec: admin::DirectorSpec) {
        let wanted = admin::Director { metadata: Some(meta("n", name)), spec: Some(spec), status: None };
        let write = |index: &mut Index, _| plan::director::update(index, &wanted, None);
        self.registry.commit(write).await.unwrap();
    }
}

#[tokio::test]
async fn whoever_is_revoked_or_deleted_is_refused_at_once_and_everywhere() {
    let registrar = fixture().await;
    let (mut one, mut two) = (
        registrar.opened(registrar.directors[0], &registrar.devices).await,
        registrar.opened(registrar.directors[1], &[]).await,
    );
    assert!(one.is_quiet().await && two.is_quiet().await);
    registrar.revoke("a", true).await;
    assert_eq!(one.refused().await, [registrar.devices[0]]);
    assert_eq!(two.refused().await, [registrar.devices[0]]);
    let now = Timestamp::now();
    registrar.registry.commit(|index, _| plan::device::delete(index, "n", "b", 0, now)).await.unwrap();
    assert_eq!(one.refused().await, [registrar.devices[1]]);
    assert_eq!(two.refused().await, [registrar.devices[1]]);
    // Whoever comes afterwards is told when it says whom it has.
    registrar.revoke("c", true).await;
    let mut again = registrar.open(registrar.directors[0]);
    again.hello(&registrar.devices[..1], true);
    again.hello(&registrar.devices[1..], false);
    let mut refused = Vec::new();
    while refused.len() < 3 {
        match again.next().await {
            Message::DevicesRefused(some) => refused.extend(some.device_uids),
            Message::Config(_) => {}
            other => panic!("unexpected: {other:?}"),
        }
    }
    let refused: BTreeSet<Uuid> = refused.iter().map(|uid| Uuid::from_slice(uid).unwrap()).collect();
    assert_eq!(refused, registrar.devices.iter().copied().collect());
}

#[tokio::test]
async fn directors_begin_again_when_a_device_is_not_revoked_any_more() {
    let registrar = fixture().await;
    let mut session = registrar.opened(registrar.directors[0], &[]).await;
    registrar.revoke("a", true).await;
    assert_eq!(session.refused().await, [registrar.devices[0]]);
    registrar.revoke("a", false).await;
    assert_eq!(session.end().await.code(), Code::Aborted);
    let mut again = registrar.opened(registrar.directors[0], &registrar.devices).await;
    assert!(again.is_quiet().await);
}

#[tokio::test]
async fn a_device_that_attaches_is_looked_up() {
    let registrar = fixture().await;
    let mut session = registrar.opened(registrar.directors[0], &[]).await;
    registrar.revoke("b", true).await;
    assert_eq!(session.refused().await, [registrar.devices[1]]);
    let attach = |attached: &[Uuid]| {
        session_request::Message::DevicesChanged(DevicesChanged {
            attached: octets(attached),
            detached: Vec::new(),
        })
    };
    let stranger = Uuid::from_u128(0xdead);
    session.send(attach(&registrar.devices));
    assert_eq!(session.refused().await, [registrar.devices[1]]);
    session.send(attach(&[stranger]));
    assert_eq!(session.refused().await, [stranger]);
    assert!(session.is_quiet().await);
}

#[tokio::test]
async fn a_device_that_another_registrar_has_just_let_in_is_not_refused() {
    let mut registrar = fixture().await;
    let mut session = registrar.opened(registrar.directors[0], &[]).await;
    let token =
        registrar.world.create_token("late", admin::TokenSpec { reusable: true, ..Default::default() });
    let fresh = registrar.world.join(&token, "fresh");
    session.send(session_request::Message::DevicesChanged(DevicesChanged {
        attached: octets(&[fresh]),
        detached: Vec::new(),
    }));
    assert!(session.is_quiet().await);
    assert!(registrar.registry.read().device("n", fresh).is_some());
}

#[tokio::test]
async fn a_director_tells_how_many_are_attached_and_that_it_drains() {
    let registrar = fixture().await;
    let uid = registrar.directors[0];
    assert_eq!(registrar.hub.attached(uid), None);
    let mut session = registrar.opened(uid, &registrar.devices).await;
    assert_eq!(registrar.hub.attached(uid), Some(3));
    for draining in [true, false] {
        let report = Report { attached: 7, draining, ..Default::default() };
        session.send(session_request::Message::Report(report));
        // What is written comes back as nothing: the director knows it.
        assert!(session.is_quiet().await);
        assert_eq!(registrar.registry.read().director("n", uid).unwrap().is_draining(), draining);
    }
    assert_eq!(registrar.hub.attached(uid), Some(7));
    drop(session);
    assert_eq!(registrar.hub.attached(uid), None);
}

#[tokio::test]
async fn operators_drain_and_revoke_a_director() {
    let registrar = fixture().await;
    let mut session = registrar.opened(registrar.directors[0], &[]).await;
    registrar.set("d1", admin::DirectorSpec { drained: true, revoked: false }).await;
    let Message::Config(config) = session.next().await else { panic!("expected a configuration") };
    assert!(config.drained);
    registrar.roots.send(vec![CertificateDer::from(vec![2])]).unwrap();
    assert!(matches!(session.next().await, Message::RootsChanged(changed) if changed.roots == [vec![2]]));
    registrar.set("d1", admin::DirectorSpec { drained: true, revoked: true }).await;
    assert_eq!(session.end().await.code(), Code::PermissionDenied);
    let mut refused = registrar.open(registrar.directors[0]);
    refused.hello(&[], false);
    assert_eq!(refused.end().await.code(), Code::PermissionDenied);
    // Deleted while its session is open.
    let mut other = registrar.opened(registrar.directors[1], &[]).await;
    registrar.registry.commit(|index, _| plan::director::delete(index, "n", "d2", 0)).await.unwrap();
    assert_eq!(other.end().await.code(), Code::PermissionDenied);
}

#[tokio::test]
async fn a_director_has_one_session_and_says_hello_once() {
    let registrar = fixture().await;
    let uid = registrar.directors[0];
    let mut first = registrar.opened(uid, &[]).await;
    let mut second = registrar.opened(uid, &[]).await;
    assert_eq!(first.end().await.code(), Code::Aborted);
    drop(first);
    assert_eq!(registrar.hub.attached(uid), Some(0), "the second one stays");
    second.hello(&[], false);
    assert_eq!(second.end().await.code(), Code::InvalidArgument);

    let mut rude = registrar.open(uid);
    rude.send(session_request::Message::Report(Report::default()));
    assert_eq!(rude.end().await.code(), Code::InvalidArgument);
    let mut wrong = registrar.opened(uid, &[]).await;
    wrong.send(session_request::Message::DevicesChanged(DevicesChanged {
        attached: vec![vec![1, 2, 3]],
        detached: Vec::new(),
    }));
    assert_eq!(wrong.end().await.code(), Code::InvalidArgument);
    let mut many = registrar.open(uid);
    many.hello(&vec![Uuid::nil(); DEVICES_MAX + 1], false);
    assert_eq!(many.end().await.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn directors_are_sent_elsewhere_when_the_registrar_stops() {
    let registrar = fixture().await;
    let mut session = registrar.opened(registrar.directors[0], &[]).await;
    assert!(!registrar.hub.is_empty());
    registrar.hub.drain(Duration::from_secs(3));
    assert!(matches!(session.next().await, Message::Drain(_)));
    let mut late = registrar.open(registrar.directors[1]);
    late.hello(&[], false);
    assert_eq!(late.end().await.code(), Code::Unavailable);
    registrar.hub.shutdown();
    assert_eq!(session.end().await.code(), Code::Unavailable);
    drop((session, late));
    assert!(registrar.hub.is_empty());
}

#[test]
fn what_waits_is_bounded_and_comes_in_pieces() {
    let mut mailbox = Mailbox { config: true, ..Mailbox::default() };
    let count = u128::try_from(DEVICES_MAX).unwrap() + 1;
    mailbox.refuse((0..count).map(Uuid::from_u128));
    assert!(matches!(mailbox.pop(), Some(Item::Refused(some)) if some.len() == DEVICES_MAX));
    assert_eq!(mailbox.pop(), Some(Item::Refused(vec![Uuid::from_u128(count - 1)])));
    assert_eq!((mailbox.pop(), mailbox.pop()), (Some(Item::Config), None));
    for device in 0..=u128::try_from(WAITING_MAX).unwrap() {
        mailbox.refuse([Uuid::from_u128(device)]);
    }
    assert_eq!(mailbox.pop(), Some(Item::End(End::Behind)));
}
