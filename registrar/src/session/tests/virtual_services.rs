//! Services that have virtual IPs, as sessions that ask for them are told.

use muster_proto::registration::{VirtualServicesChanged, WatchVirtualServices};

use super::*;
use crate::registry::tests::service_network;

/// A registrar with the device `a`, of a network that has pools for Services.
async fn with_services() -> (Fixture, Uuid) {
    let mut world = World::new(1);
    world.create_network(&service_network()).unwrap();
    world.catch_up(0);
    let token = world.reusable_token();
    let uid = world.join(&token, "a");
    world.register(0, uid, 1).unwrap();
    (registrar(world.store).await, uid)
}

impl Fixture {
    async fn create_cluster_ip(&self, name: &str) {
        let (wanted, now) = (service(name), Timestamp::now());
        let uid = Uuid::from_u128(name.bytes().fold(1 << 65, |sum, byte| sum * 31 + u128::from(byte)));
        let plan = |index: &mut Index, number| {
            plan::service::create(index, &wanted, uid, plan::service::Attempt { number, now })
        };
        self.registry.commit(plan).await.unwrap();
    }

    /// Opens a session that asks for what has changed since `watch`.
    async fn watching(&self, uid: Uuid, watch: WatchVirtualServices) -> (Session, VirtualServicesChanged) {
        let (sender, receiver) = mpsc::channel(64);
        let stream = run(self.hub.clone(), "n".into(), uid, ReceiverStream::new(receiver));
        let mut session = Session { sender, stream: Box::pin(stream) };
        let watch_virtual_services = Some(watch);
        session.send(session_request::Message::Hello(SessionHello {
            watch_virtual_services,
            ..SessionHello::default()
        }));
        assert!(matches!(session.next().await, Message::Config(_)));
        let told = session.virtual_services().await;
        assert!(matches!(session.next().await, Message::Bookmark(_)));
        (session, told)
    }
}

impl Session {
    async fn virtual_services(&mut self) -> VirtualServicesChanged {
        match self.next().await {
            Message::VirtualServicesChanged(changed) => changed,
            other => panic!("expected VirtualServicesChanged, not {other:?}"),
        }
    }
}

fn names(told: &VirtualServicesChanged) -> Vec<&str> {
    told.services.iter().map(|service| &*service.name).collect()
}

#[tokio::test]
async fn a_session_that_asks_is_told_of_all_and_then_of_every_change() {
    let (fixture, a) = with_services().await;
    fixture.create_cluster_ip("web").await;
    let (mut session, told) = fixture.watching(a, WatchVirtualServices::default()).await;
    assert_eq!((told.is_snapshot, names(&told)), (true, vec!["web"]));
    fixture.create_cluster_ip("db").await;
    let told = session.virtual_services().await;
    assert_eq!((told.is_snapshot, names(&told)), (false, vec!["db"]));
    fixture.create_slice("x", "db", "192.0.2.1").await;
    let told = session.virtual_services().await;
    assert_eq!((told.endpoints.len(), told.services.len()), (1, 0));
    // It comes back, and nothing is new; or something is.
    let watch = WatchVirtualServices { revision: told.revision, digest: told.digest };
    let (_, told) = fixture.watching(a, watch).await;
    assert_eq!((told.is_snapshot, names(&told), told.digest), (false, vec![], watch.digest));
    fixture.create_cluster_ip("mail").await;
    let (_, told) = fixture.watching(a, watch).await;
    assert_eq!((told.is_snapshot, names(&told)), (false, vec!["mail"]));
    // A revision that the store has never had is nothing to go on from.
    let (_, told) = fixture.watching(a, WatchVirtualServices { revision: 1 << 40, digest: 1 }).await;
    assert_eq!((told.is_snapshot, told.services.len()), (true, 3));
}

#[tokio::test]
async fn a_session_that_does_not_ask_is_told_nothing() {
    let (fixture, a) = with_services().await;
    let (mut session, _) = fixture.opened(a, &[]).await;
    fixture.create_cluster_ip("web").await;
    fixture.hub.drain(Duration::from_secs(1));
    assert!(matches!(session.next().await, Message::Drain(_)));
}
