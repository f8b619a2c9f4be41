//! Registrars as operators and devices see them, and what goes on while their store is away.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use muster_common::time::Instant;
use muster_proto::{
    admin::{self as proto, registrar_service_server::RegistrarService as _},
    registration::LookupRequest,
};

use super::*;
use crate::{
    balance::Identity,
    registry::keys,
    store::{
        Announcement, KeyRange, RangeResult, Revision, Store, StoreError, Txn, TxnOutcome, WatchStream,
        memory::MemoryStore,
    },
};

/// A store that can be away.
struct Away {
    inner: MemoryStore,
    is_away: AtomicBool,
}

impl Away {
    fn check(&self) -> Result<(), StoreError> {
        match self.is_away.load(Ordering::Relaxed) {
            true => Err(StoreError::Unavailable("it is away".into())),
            false => Ok(()),
        }
    }
}

#[async_trait]
impl Store for Away {
    async fn range(
        &self,
        range: KeyRange,
        at: Option<Revision>,
        n: usize,
    ) -> Result<RangeResult, StoreError> {
        self.check()?;
        self.inner.range(range, at, n).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        self.check()?;
        self.inner.txn(txn).await
    }

    async fn watch(&self, range: KeyRange, from: Revision) -> Result<WatchStream, StoreError> {
        self.inner.watch(range, from).await
    }

    async fn compact(&self, up_to: Revision) -> Result<(), StoreError> {
        self.inner.compact(up_to).await
    }

    async fn revision(&self) -> Result<Revision, StoreError> {
        self.check()?;
        self.inner.revision().await
    }

    async fn announce(&self, key: Bytes) -> Result<Announcement, StoreError> {
        self.inner.announce(key).await
    }
}

#[tokio::test]
async fn devices_that_are_known_connect_while_the_store_is_away() {
    let world = World::with_network(1, "10.0.0.0/16");
    let store = Arc::new(Away { inner: world.store, is_away: AtomicBool::new(false) });
    let fixture = fixture_on(store.clone()).await;
    let (_, token) = fixture.token(true).await;
    let (web, other) = (fixture.join(&token, "web", 1).await, fixture.join(&token, "other", 2).await);
    store.is_away.store(true, Ordering::Relaxed);

    // As before, and with what cannot be kept now.
    let moved = RegisterRequest {
        private_endpoints: vec![proto::Endpoint { address: "192.0.2.77".into(), port: 1 }],
        ..registration(1)
    };
    for request in [registration(1), moved] {
        let answer = fixture.registration().register(by_device(request, &web)).await.unwrap().into_inner();
        assert!(answer.unsaved);
        assert_eq!(answer.config.unwrap().name, "web");
    }
    // Another key is another matter.
    let error = fixture.registration().register(by_device(registration(9), &web)).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert!(error.message().contains("store") && error.message().contains("away"), "{error}");
    // Nobody joins.
    let error = fixture.enroll(&token, "new", &KeyPair::generate().unwrap()).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    // Lookups go on.
    let by = Some(muster_proto::registration::lookup_request::By::Name("other".into()));
    let found = fixture.registration().lookup(by_device(LookupRequest { by }, &web)).await.unwrap();
    assert_eq!(found.into_inner().peer.unwrap().device_uid, other);

    // And that all of it is old is noticed, once it is.
    let freshness = fixture.api.registry.freshness();
    assert!(!freshness.is_stale());
    freshness.look(Instant::now() + Duration::from_secs(6));
    assert!(freshness.is_stale());
    store.is_away.store(false, Ordering::Relaxed);
    let waiting = async {
        while freshness.is_stale() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), waiting).await.unwrap();
    let answer = fixture.registration().register(by_device(registration(1), &web)).await.unwrap();
    assert!(!answer.into_inner().unsaved);
}

fn identity(number: u128, address: &str) -> Identity {
    Identity {
        uid: Uuid::from_u128(number << 112),
        run: Uuid::from_u128(number),
        host: "Rack1".into(),
        advertised: Advertised {
            registrars: vec![format!("{address}:7500")],
            dns_servers: vec![format!("{address}:853")],
        },
    }
}

#[tokio::test]
async fn devices_are_told_of_all_registrars_and_operators_see_which_run() {
    let fixture = fixture().await;
    let registry = &fixture.api.registry;
    let (_, token) = fixture.token(true).await;
    let web = fixture.join(&token, "web", 1).await;
    let told = async || {
        let answer = fixture.registration().register(by_device(registration(1), &web)).await.unwrap();
        answer.into_inner().config.unwrap().registrars
    };
    assert_eq!(told().await, ["registrar.test:7500"]);

    let (one, two) = (identity(1, "192.0.2.1"), identity(2, "192.0.2.2"));
    for own in [&one, &two] {
        own.tell(registry, 7).await.unwrap();
    }
    let running = registry.store().announce(keys::registrar(two.run)).await.unwrap();
    registry.refresh().await.unwrap();
    assert_eq!(told().await, ["registrar.test:7500", "192.0.2.1:7500", "192.0.2.2:7500"]);
    // What is as it was is not written again.
    let before = registry.store().revision().await.unwrap();
    two.tell(registry, 7).await.unwrap();
    assert_eq!(registry.store().revision().await.unwrap(), before);

    let registrars = admin_registrars::Registrars(fixture.api.clone());
    let listed = registrars.list_registrars(operator(Default::default())).await.unwrap().into_inner();
    let seen = |registrar: &proto::Registrar| {
        let (meta, status) = (registrar.metadata.clone().unwrap(), registrar.status.clone().unwrap());
        assert!(meta.resource_version > 0 && status.run_uid.is_empty());
        (meta.name, status.addresses.join(" "), status.running, status.sessions)
    };
    assert_eq!(
        listed.registrars.iter().map(seen).collect::<Vec<_>>(),
        [
            ("rack1-0001".to_owned(), "192.0.2.1:7500".to_owned(), false, 0),
            ("rack1-0002".to_owned(), "192.0.2.2:7500".to_owned(), true, 7),
        ]
    );
    let delete = |name: &str| {
        let request = proto::DeleteRegistrarRequest { name: name.into(), resource_version: 0 };
        registrars.delete_registrar(operator(request))
    };
    let error = delete("rack1-0002").await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
    assert!(error.message().contains("stop it first"), "{error}");
    assert_eq!(delete("rack1-0003").await.unwrap_err().code(), Code::NotFound);
    delete("rack1-0001").await.unwrap();
    assert_eq!(told().await, ["registrar.test:7500", "192.0.2.2:7500"]);
    running.end().await;
    registry.refresh().await.unwrap();
    delete(&two.uid.to_string()).await.unwrap();
    assert_eq!(told().await, ["registrar.test:7500"]);
    let device = by_device(proto::ListRegistrarsRequest::default(), &web);
    assert_eq!(registrars.list_registrars(device).await.unwrap_err().code(), Code::PermissionDenied);
}
