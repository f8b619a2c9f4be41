//! The whole way of a director, and what operators do with it.

use muster_proto::{
    admin::{
        DeleteDirectorRequest, Director, DirectorSpec, GetDirectorRequest, ListDirectorsRequest,
        UpdateDirectorRequest, WatchDirectorsRequest, director_service_server::DirectorService as _,
    },
    director::{self, RenewRequest as RenewDirectorRequest, director_service_server::DirectorService as _},
    registration::Reachability,
};

use super::*;

fn by_director<T>(message: T, uid: &str) -> Request<T> {
    as_party(message, &format!("network/n/director/{uid}"))
}

fn at(last: u8) -> director::RegisterRequest {
    director::RegisterRequest {
        region: "eu".into(),
        endpoints: vec![proto::Endpoint { address: format!("192.0.2.{last}"), port: 7501 }],
        tcp_ports: vec![443],
        capacity: 0,
        version: "1".into(),
    }
}

impl Fixture {
    async fn director_token(&self) -> String {
        let spec = proto::TokenSpec { reusable: true, party: "director".into(), ..Default::default() };
        let token = proto::Token { metadata: Some(meta("n", "")), spec: Some(spec), status: None };
        let tokens = admin_tokens::Tokens(self.api.clone());
        let created = tokens.create_token(operator(CreateTokenRequest { token: Some(token) })).await.unwrap();
        let created = created.into_inner();
        assert!(created.join_command.starts_with("muster-director join --registrar registrar.test:7500"));
        created.secret
    }

    fn own(&self) -> crate::api::directors::Directors {
        crate::api::directors::Directors(self.api.clone())
    }

    fn directors(&self) -> admin_directors::Directors {
        admin_directors::Directors(self.api.clone())
    }

    async fn join_director(&self, token: &str, name: &str, last: u8) -> String {
        let enrolled = self.enroll(token, name, &KeyPair::generate().unwrap()).await.unwrap();
        let registered = self.own().register(by_director(at(last), &enrolled.director_uid)).await.unwrap();
        let config = registered.into_inner().config.unwrap();
        assert_eq!((&*config.name, &config.director_uid), (name, &enrolled.director_uid));
        assert_eq!(config.registrars, ["registrar.test:7500"]);
        enrolled.director_uid
    }

    async fn change_director(&self, name: &str, spec: DirectorSpec) -> Director {
        let wanted = Director { metadata: Some(meta("n", name)), spec: Some(spec), status: None };
        let mask = Some(mask(&["spec.revoked", "spec.drained"]));
        let request = UpdateDirectorRequest { director: Some(wanted), update_mask: mask };
        let updated = self.directors().update_director(operator(request)).await.unwrap();
        updated.into_inner().director.unwrap()
    }

    async fn get_director(&self, name: &str) -> Result<Director, Status> {
        let request = GetDirectorRequest { network: "n".into(), name: name.into() };
        let found = self.directors().get_director(operator(request)).await?;
        Ok(found.into_inner().director.unwrap())
    }
}

#[tokio::test]
async fn a_director_joins_registers_and_renews() {
    let registrar = fixture().await;
    let secret = registrar.director_token().await;
    let key = KeyPair::generate().unwrap();
    let enrolled = registrar.enroll(&secret, "D1", &key).await.unwrap();
    assert_eq!((&*enrolled.name, &*enrolled.network, &*enrolled.device_uid), ("d1", "n", ""));
    let uid = &enrolled.director_uid;
    let party = Party::Director { network: "n".parse().unwrap(), uid: uid.parse().unwrap() };
    let identity = certificate_identity(&enrolled.certificate_chain[0].to_vec().into()).unwrap();
    assert_eq!(identity, SpiffeId::new(TRUST_DOMAIN, party.clone()));
    assert_eq!(registrar.enroll(&secret, "d1", &key).await.unwrap().director_uid, *uid);
    let other = KeyPair::generate().unwrap();
    assert_eq!(registrar.enroll(&secret, "d1", &other).await.unwrap_err().code(), Code::AlreadyExists);
    assert_eq!(registrar.get_director("d1").await.unwrap().status.unwrap().phase, "Pending");

    registrar.own().register(by_director(at(1), uid)).await.unwrap();
    let status = registrar.get_director("D1").await.unwrap().status.unwrap();
    assert_eq!((&*status.phase, &*status.region, status.online), ("Ready", "eu", false));
    assert!(status.certificate_expiry.is_some());
    let renew = RenewDirectorRequest { certificate_request: request_for(&other) };
    let renewed = registrar.own().renew(by_director(renew, uid)).await.unwrap().into_inner();
    let identity = certificate_identity(&renewed.certificate_chain[0].to_vec().into()).unwrap();
    assert_eq!(identity, SpiffeId::new(TRUST_DOMAIN, party));

    let nowhere = director::RegisterRequest { endpoints: Vec::new(), ..at(1) };
    let refused = registrar.own().register(by_director(nowhere, uid)).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    let mut bad = at(1);
    bad.endpoints[0].address = "0.0.0.0".into();
    let refused = registrar.own().register(by_director(bad, uid)).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn only_directors_are_served_as_directors_and_nothing_else_is_theirs() {
    let registrar = fixture().await;
    let (_, devices) = registrar.token(true).await;
    let (device, secret) = (registrar.join(&devices, "a", 1).await, registrar.director_token().await);
    let uid = registrar.join_director(&secret, "d1", 1).await;
    for request in [
        stranger(at(1)),
        operator(at(1)),
        by_device(at(1), &uid),
        by_device(at(1), &device),
        by_director(at(1), &device),
        as_party(at(1), &format!("network/other/director/{uid}")),
        as_party(at(1), "network/n/director/not-a-uid"),
    ] {
        let code = registrar.own().register(request).await.unwrap_err().code();
        assert!(matches!(code, Code::Unauthenticated | Code::PermissionDenied), "{code:?}");
    }
    let get = || GetDirectorRequest { network: "n".into(), name: "d1".into() };
    for request in [stranger(get()), by_device(get(), &device), by_director(get(), &uid)] {
        let code = registrar.directors().get_director(request).await.unwrap_err().code();
        assert!(matches!(code, Code::Unauthenticated | Code::PermissionDenied), "{code:?}");
    }
    let lookup = by_director(LookupRequest { by: Some(By::Name("a".into())) }, &uid);
    assert_eq!(registrar.registration().lookup(lookup).await.unwrap_err().code(), Code::PermissionDenied);
}

#[tokio::test]
async fn operators_see_drain_revoke_and_delete_directors() {
    let registrar = fixture().await;
    let secret = registrar.director_token().await;
    let uid = registrar.join_director(&secret, "d1", 1).await;
    registrar.join_director(&secret, "d2", 2).await;
    let watch = WatchDirectorsRequest { network: "n".into(), ..Default::default() };
    let mut watch = registrar.directors().watch_directors(operator(watch)).await.unwrap().into_inner();
    let mut seen = async || {
        let event = watch.next().await.unwrap().unwrap();
        let director = event.director.clone().unwrap_or_default();
        let phase = director.status.map(|status| status.phase).unwrap_or_default();
        (event.r#type(), director.metadata.map(|meta| meta.name).unwrap_or_default(), phase)
    };
    assert_eq!(seen().await, (EventType::Added, "d1".into(), "Ready".into()));
    assert_eq!(seen().await, (EventType::Added, "d2".into(), "Ready".into()));
    assert_eq!(seen().await.0, EventType::Bookmark);

    let changed = registrar.change_director("d1", DirectorSpec { drained: true, revoked: false }).await;
    assert_eq!(changed.status.unwrap().phase, "Draining");
    assert_eq!(seen().await, (EventType::Modified, "d1".into(), "Draining".into()));
    let changed = registrar.change_director("d1", DirectorSpec { drained: false, revoked: true }).await;
    assert_eq!(changed.status.unwrap().phase, "Revoked");
    let refused = registrar.own().register(by_director(at(1), &uid)).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert_eq!(seen().await, (EventType::Modified, "d1".into(), "Revoked".into()));

    let list = ListDirectorsRequest { network: "n".into(), options: None };
    let list = registrar.directors().list_directors(operator(list)).await.unwrap().into_inner();
    assert_eq!((list.directors.len(), list.next_page_token.is_empty()), (2, true));
    let stale = DeleteDirectorRequest { network: "n".into(), name: "d1".into(), resource_version: 1 };
    let refused = registrar.directors().delete_director(operator(stale.clone())).await.unwrap_err();
    assert_eq!(refused.code(), Code::Aborted);
    let delete = DeleteDirectorRequest { resource_version: 0, ..stale };
    registrar.directors().delete_director(operator(delete)).await.unwrap();
    assert_eq!(seen().await, (EventType::Deleted, "d1".into(), "Revoked".into()));
    assert_eq!(registrar.get_director("d1").await.unwrap_err().code(), Code::NotFound);
    let other = Director { metadata: Some(meta("n", "d2")), ..Director::default() };
    let request =
        UpdateDirectorRequest { director: Some(other), update_mask: Some(mask(&["status.region"])) };
    let refused = registrar.directors().update_director(operator(request)).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn peers_are_told_where_a_device_is_attached() {
    let registrar = fixture().await;
    let (_, devices) = registrar.token(true).await;
    let a = registrar.join(&devices, "a", 1).await;
    let b = registrar.join(&devices, "b", 2).await;
    assert_eq!(registrar.look_up(&a, By::Name("b".into())).await.unwrap().home_director, None);
    let secret = registrar.director_token().await;
    let uid = registrar.join_director(&secret, "d1", 1).await;
    let reachability = Reachability {
        reflexive_endpoints: vec![proto::Endpoint { address: "198.51.100.7".into(), port: 7 }],
        home_director_uid: uid.clone(),
        second_director_uid: String::new(),
    };
    let request = RegisterRequest { reachability: Some(reachability.clone()), ..registration(2) };
    let config = registrar.registration().register(by_device(request, &b)).await.unwrap().into_inner();
    assert_eq!(config.config.unwrap().directors[0].uid, uid);
    let peer = registrar.look_up(&a, By::Name("b".into())).await.unwrap();
    assert_eq!(peer.home_director.unwrap().address.unwrap().uid, uid);
    assert_eq!(peer.reflexive_endpoints, reachability.reflexive_endpoints);
    let get = operator(GetDeviceRequest { network: "n".into(), name: "b".into() });
    let shown = registrar.devices().get_device(get).await.unwrap().into_inner().device.unwrap();
    let status = shown.status.unwrap();
    assert_eq!((&*status.home_director, &*status.second_director), ("d1", ""));
    for bad in [
        Reachability { home_director_uid: "d1".into(), ..Default::default() },
        Reachability { reflexive_endpoints: vec![Default::default()], ..Default::default() },
        Reachability {
            reflexive_endpoints: vec![reachability.reflexive_endpoints[0].clone(); 5],
            ..Default::default()
        },
    ] {
        let request = RegisterRequest { reachability: Some(bad), ..registration(2) };
        let refused = registrar.registration().register(by_device(request, &b)).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
    }
}
