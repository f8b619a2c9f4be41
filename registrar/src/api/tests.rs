//! The services, called without a transport: who may call, what strangers can do, and the whole way of a device.

use std::{net::SocketAddr, sync::Arc};

use futures_util::StreamExt as _;
use muster_common::{
    identity::{Party, SpiffeId},
    time::Timestamp,
    tls::certificate_identity,
};
use muster_proto::{
    admin::{
        self as proto, CreateDeviceRequest, CreateTokenRequest, DeleteDeviceRequest, DeleteNetworkRequest,
        EventType, GetDeviceRequest, GetTokenRequest, ListDevicesRequest, ListNetworksRequest, ListOptions,
        ListTokensRequest, UpdateDeviceRequest, UpdateNetworkRequest, WatchDevicesRequest,
        device_service_server::DeviceService as _, network_service_server::NetworkService as _,
        token_service_server::TokenService as _,
    },
    enrollment::{EnrollRequest, EnrollResponse, enrollment_service_server::EnrollmentService as _},
    registration::{
        DeregisterRequest, LookupRequest, Peer, RegisterRequest, RenewRequest, lookup_request::By,
        registration_service_server::RegistrationService as _,
    },
};
use prost::Message as _;
use rcgen::{CertificateParams, KeyPair, SanType};
use tonic::{Code, Response};

use super::*;
use crate::{
    ca::Ca,
    layout,
    registry::{
        keys,
        tests::{World, device, mask, meta, network},
        view::Advertised,
    },
    store::{Store, Txn},
};

mod ciphers;
mod directors;
mod invitations;
mod registrars;
mod services;
mod sites;

const TRUST_DOMAIN: &str = "muster.test";

struct Fixture {
    api: Arc<Api>,
    _directory: tempfile::TempDir,
}

/// A registrar with the network `n`.
async fn fixture() -> Fixture {
    fixture_of(World::with_network(1, "10.0.0.0/16")).await
}

async fn fixture_of(world: World) -> Fixture {
    fixture_on(Arc::new(world.store)).await
}

async fn fixture_on(store: Arc<dyn Store>) -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    Ca::create(directory.path(), TRUST_DOMAIN, Timestamp::now()).unwrap();
    let ca = Arc::new(SharedCa::open(directory.path()).unwrap());
    let registry = Registry::load(store).await.unwrap();
    let advertised = Advertised { registrars: vec!["registrar.test:7500".into()], dns_servers: Vec::new() };
    let hub = Hub::new(&registry, advertised, ca.roots());
    let api = Api::new(registry, hub, ca, Settings::new(TRUST_DOMAIN));
    Fixture { api, _directory: directory }
}

fn call<T>(message: T, source: &str, identity: Option<SpiffeId>) -> Request<T> {
    let mut request = Request::new(message);
    let address = SocketAddr::new(source.parse().unwrap(), 1);
    request.extensions_mut().insert(Caller { address, identity });
    request
}

fn stranger<T>(message: T) -> Request<T> {
    call(message, "192.0.2.1", None)
}

fn as_party<T>(message: T, party: &str) -> Request<T> {
    let identity = format!("spiffe://{TRUST_DOMAIN}/{party}").parse().unwrap();
    call(message, "192.0.2.1", Some(identity))
}

fn operator<T>(message: T) -> Request<T> {
    as_party(message, "operator/admin")
}

fn by_device<T>(message: T, uid: &str) -> Request<T> {
    as_party(message, &format!("network/n/device/{uid}"))
}

fn request_for(key: &KeyPair) -> Vec<u8> {
    CertificateParams::default().serialize_request(key).unwrap().der().to_vec()
}

fn registration(key: u8) -> RegisterRequest {
    RegisterRequest {
        public_key: vec![key; 32],
        private_endpoints: vec![proto::Endpoint { address: "192.0.2.10".into(), port: 51820 }],
        agent_version: "1".into(),
        ..RegisterRequest::default()
    }
}

impl Fixture {
    async fn token(&self, reusable: bool) -> (proto::Token, String) {
        let spec = proto::TokenSpec { reusable, ..Default::default() };
        let token = proto::Token { metadata: Some(meta("n", "")), spec: Some(spec), status: None };
        let tokens = admin_tokens::Tokens(self.api.clone());
        let created = tokens.create_token(operator(CreateTokenRequest { token: Some(token) })).await.unwrap();
        let created = created.into_inner();
        assert!(created.join_command.contains("--registrar registrar.test:7500 --token muster."));
        assert!(created.join_command.contains("--ca-hash sha256:"));
        (created.token.unwrap(), created.secret)
    }

    async fn enroll(&self, token: &str, name: &str, key: &KeyPair) -> Result<EnrollResponse, Status> {
        let request = EnrollRequest {
            token: token.into(),
            certificate_request: request_for(key),
            name: name.into(),
            party: String::new(),
        };
        let enrolled = enrollment::Enrollment(self.api.clone()).enroll(stranger(request)).await;
        enrolled.map(Response::into_inner)
    }

    /// Enrolls and registers; returns the uid.
    async fn join(&self, token: &str, name: &str, key: u8) -> String {
        let enrolled = self.enroll(token, name, &KeyPair::generate().unwrap()).await.unwrap();
        let registered =
            self.registration().register(by_device(registration(key), &enrolled.device_uid)).await;
        assert_eq!(registered.unwrap().into_inner().config.unwrap().name, name);
        enrolled.device_uid
    }

    fn registration(&self) -> registration::Registration {
        registration::Registration(self.api.clone())
    }

    fn devices(&self) -> admin_devices::Devices {
        admin_devices::Devices(self.api.clone())
    }

    fn networks(&self) -> admin_networks::Networks {
        admin_networks::Networks(self.api.clone())
    }

    async fn look_up(&self, uid: &str, by: By) -> Result<Peer, Status> {
        let request = by_device(LookupRequest { by: Some(by) }, uid);
        self.registration().lookup(request).await.map(|response| response.into_inner().peer.unwrap())
    }

    async fn revoke(&self, name: &str) {
        let mut wanted = device(name, "");
        wanted.spec.as_mut().unwrap().revoked = true;
        let request =
            UpdateDeviceRequest { device: Some(wanted), update_mask: Some(mask(&["spec.revoked"])) };
        self.devices().update_device(operator(request)).await.unwrap();
    }

    async fn create(&self, name: &str, labels: &[(&str, &str)]) {
        let mut device = device(name, "");
        let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        device.metadata.as_mut().unwrap().labels = labels.collect();
        self.devices().create_device(operator(CreateDeviceRequest { device: Some(device) })).await.unwrap();
    }
}

#[tokio::test]
async fn everybody_may_do_their_own_and_nothing_else() {
    let registrar = fixture().await;
    let (uid, list) =
        (random_uid().to_string(), ListDevicesRequest { network: "n".into(), ..Default::default() });
    let elsewhere: SpiffeId = "spiffe://other.test/operator/admin".parse().unwrap();
    for (request, code) in [
        (stranger(list.clone()), Code::Unauthenticated),
        (by_device(list.clone(), &uid), Code::PermissionDenied),
        (as_party(list.clone(), "registrar/r"), Code::PermissionDenied),
        (as_party(list.clone(), &format!("network/n/director/{uid}")), Code::PermissionDenied),
        (call(list.clone(), "192.0.2.1", Some(elsewhere)), Code::PermissionDenied),
        (Request::new(list.clone()), Code::Internal),
    ] {
        assert_eq!(registrar.devices().list_devices(request).await.unwrap_err().code(), code);
    }
    assert!(registrar.devices().list_devices(operator(list)).await.is_ok());
    for request in [
        stranger(registration(1)),
        operator(registration(1)),
        as_party(registration(1), "network/n/director/d"),
        as_party(registration(1), "network/n/device/not-a-uid"),
        by_device(registration(1), &uid),
    ] {
        let code = registrar.registration().register(request).await.unwrap_err().code();
        assert!(matches!(code, Code::Unauthenticated | Code::PermissionDenied), "{code:?}");
    }
    let tokens = admin_tokens::Tokens(registrar.api.clone());
    let list = ListTokensRequest { network: "n".into(), options: None };
    assert_eq!(tokens.list_tokens(by_device(list, &uid)).await.unwrap_err().code(), Code::PermissionDenied);
    let list = ListNetworksRequest::default();
    let denied = registrar.networks().list_networks(by_device(list, &uid)).await.unwrap_err();
    assert_eq!(denied.code(), Code::PermissionDenied);
}

#[tokio::test]
async fn a_device_joins_registers_renews_and_leaves() {
    let registrar = fixture().await;
    let (token, secret) = registrar.token(false).await;
    let key = KeyPair::generate().unwrap();
    let enrolled = registrar.enroll(&secret, "Web", &key).await.unwrap();
    assert_eq!((&*enrolled.name, &*enrolled.namespace, &*enrolled.domain), ("web", "default", "n.example"));
    let identity = certificate_identity(&enrolled.certificate_chain[0].to_vec().into()).unwrap();
    let party = Party::Device { network: "n".parse().unwrap(), uid: enrolled.device_uid.parse().unwrap() };
    assert_eq!(identity, SpiffeId::new(TRUST_DOMAIN, party));
    assert_eq!(enrolled.roots.len(), 1);
    // The response was lost: the same again.
    assert_eq!(registrar.enroll(&secret, "web", &key).await.unwrap().device_uid, enrolled.device_uid);
    let other = KeyPair::generate().unwrap();
    assert_eq!(registrar.enroll(&secret, "db", &other).await.unwrap_err().code(), Code::Unauthenticated);
    let name = token.metadata.unwrap().name;
    let get = operator(GetTokenRequest { network: "n".into(), name });
    let token = admin_tokens::Tokens(registrar.api.clone()).get_token(get).await.unwrap().into_inner();
    let status = token.token.unwrap().status.unwrap();
    assert_eq!((&*status.phase, status.uses), ("Used", 1));

    let uid = &enrolled.device_uid;
    let register = || registrar.registration();
    let format = layout::format(TRUST_DOMAIN.into());
    let txn = Txn::new().put(keys::format(), format.encode_to_vec());
    registrar.api.registry.store().txn(txn).await.unwrap();
    let first = register().register(by_device(registration(1), uid)).await.unwrap().into_inner();
    assert_eq!(first.store_epoch, format.epoch);
    let again = register().register(by_device(registration(1), uid)).await.unwrap().into_inner();
    assert_eq!(first, again);
    assert!(first.config.unwrap().virtual_ipv4.starts_with("10.0."));
    let renew = RenewRequest { certificate_request: request_for(&other) };
    let renewed = register().renew(by_device(renew, uid)).await.unwrap().into_inner();
    let identity = certificate_identity(&renewed.certificate_chain[0].to_vec().into()).unwrap();
    assert_eq!(identity.to_string(), format!("spiffe://{TRUST_DOMAIN}/network/n/device/{uid}"));

    register().deregister(by_device(DeregisterRequest {}, uid)).await.unwrap();
    let refused = register().register(by_device(registration(1), uid)).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(refused.message().contains("join again"));
    let get = operator(GetDeviceRequest { network: "n".into(), name: "web".into() });
    assert_eq!(registrar.devices().get_device(get).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn bad_requests_to_join_are_refused_each_with_its_reason() {
    let registrar = fixture().await;
    let (_, secret) = registrar.token(true).await;
    let key = KeyPair::generate().unwrap();
    let mut with_identity = CertificateParams::default();
    let san = SanType::URI(format!("spiffe://{TRUST_DOMAIN}/operator/admin").try_into().unwrap());
    with_identity.subject_alt_names = vec![san];
    let with_identity = with_identity.serialize_request(&key).unwrap().der().to_vec();
    for (token, name, csr, code, says) in [
        (&*secret, "svc", request_for(&key), Code::InvalidArgument, "reserved"),
        (&secret, "a b", request_for(&key), Code::InvalidArgument, "letters"),
        (&secret, &"a".repeat(300), request_for(&key), Code::InvalidArgument, "longer"),
        (&secret, "a", with_identity, Code::InvalidArgument, "identity"),
        (&secret, "a", b"junk".to_vec(), Code::InvalidArgument, "PKCS#10"),
        (&secret, "a", vec![0; 100_000], Code::InvalidArgument, "100000"),
        ("nonsense", "a", request_for(&key), Code::InvalidArgument, "muster."),
        (&secret[..secret.len() - 1], "a", request_for(&key), Code::InvalidArgument, "too short"),
    ] {
        let request = EnrollRequest {
            token: token.into(),
            certificate_request: csr,
            name: name.into(),
            party: String::new(),
        };
        let service = enrollment::Enrollment(registrar.api.clone());
        let status = service.enroll(stranger(request)).await.unwrap_err();
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(says), "{status}");
        assert!(!status.message().contains(&secret[20..]), "a secret in a message");
    }
    registrar.enroll(&secret, "taken", &key).await.unwrap();
    let status = registrar.enroll(&secret, "taken", &KeyPair::generate().unwrap()).await.unwrap_err();
    assert_eq!(status.code(), Code::AlreadyExists);
    assert!(status.message().contains("--name"), "{status}");
}

#[tokio::test]
async fn who_is_not_what_the_token_is_for_is_refused_and_the_token_stays() {
    let registrar = fixture().await;
    let (_, secret) = registrar.token(false).await;
    let key = KeyPair::generate().unwrap();
    let enroll = async |party: &str| {
        let request = EnrollRequest {
            token: secret.clone(),
            certificate_request: request_for(&key),
            name: "a".into(),
            party: party.into(),
        };
        enrollment::Enrollment(registrar.api.clone()).enroll(stranger(request)).await
    };
    for (party, code, says) in [
        ("director", Code::FailedPrecondition, "--director"),
        ("registrar", Code::InvalidArgument, "neither"),
    ] {
        let status = enroll(party).await.unwrap_err();
        assert_eq!(status.code(), code);
        assert!(status.message().contains(says), "{status}");
    }
    assert!(!enroll("device").await.unwrap().into_inner().device_uid.is_empty());
}

#[tokio::test]
async fn guessing_tokens_is_stopped() {
    let registrar = fixture().await;
    let (_, secret) = registrar.token(true).await;
    let guess = "muster.guess.aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    let key = KeyPair::generate().unwrap();
    let mut codes = Vec::new();
    for _ in 0..40 {
        codes.push(registrar.enroll(guess, "a", &key).await.unwrap_err().code());
    }
    let refused = codes.iter().filter(|code| **code == Code::Unauthenticated).count();
    assert!((20..=22).contains(&refused), "{refused}");
    assert_eq!(codes.last(), Some(&Code::ResourceExhausted));
    // Others are not held up.
    let request = EnrollRequest {
        token: secret,
        certificate_request: request_for(&key),
        name: "a".into(),
        party: String::new(),
    };
    let service = enrollment::Enrollment(registrar.api.clone());
    service.enroll(call(request, "192.0.2.99", None)).await.unwrap();
}

#[tokio::test]
async fn no_way_to_a_peer_leads_through_the_network_itself() {
    let registrar = fixture().await;
    let (_, secret) = registrar.token(true).await;
    let (a, b) = (registrar.join(&secret, "a", 1).await, registrar.join(&secret, "b", 2).await);
    let mut request = registration(2);
    request.private_endpoints.insert(0, proto::Endpoint { address: "10.0.9.9".into(), port: 7 });
    registrar.registration().register(by_device(request, &b)).await.unwrap();
    let peer = registrar.look_up(&a, By::Name("b".into())).await.unwrap();
    assert_eq!(peer.private_endpoints, registration(2).private_endpoints);
}

#[tokio::test]
async fn many_guesses_at_once_are_no_more_than_one_after_another() {
    let registrar = Arc::new(fixture().await);
    let key = Arc::new(KeyPair::generate().unwrap());
    let guesses = (0..200).map(|_| {
        let (registrar, key) = (registrar.clone(), key.clone());
        async move {
            let guess = "muster.guess.aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
            registrar.enroll(guess, "a", &key).await.unwrap_err().code()
        }
    });
    let codes = futures_util::future::join_all(guesses).await;
    let looked_at = codes.iter().filter(|code| **code == Code::Unauthenticated).count();
    assert!((20..=22).contains(&looked_at), "{looked_at}");
}

#[tokio::test]
async fn a_device_cannot_write_without_end() {
    let registrar = fixture().await;
    let (_, secret) = registrar.token(true).await;
    let (a, b) = (registrar.join(&secret, "a", 1).await, registrar.join(&secret, "b", 2).await);
    let mut refused = None;
    for n in 0..20_000_u32 {
        let mut request = registration(1);
        request.private_endpoints[0].port = 1 + n % 60_000;
        if let Err(status) = registrar.registration().register(by_device(request, &a)).await {
            refused = Some((n, status.code()));
            break;
        }
    }
    let (n, code) = refused.expect("never refused");
    assert_eq!(code, Code::ResourceExhausted);
    assert!(n >= 4000, "{n}");
    // It can still look up, and others can write.
    registrar.look_up(&a, By::Name("b".into())).await.unwrap();
    registrar.registration().register(by_device(registration(2), &b)).await.unwrap();
}

#[tokio::test]
async fn bad_registrations_are_refused() {
    let registrar = fixture().await;
    let (_, secret) = registrar.token(true).await;
    let uid = registrar.join(&secret, "a", 1).await;
    let endpoint = |address: &str, port| proto::Endpoint { address: address.into(), port };
    type Break = Box<dyn Fn(&mut RegisterRequest)>;
    let cases: Vec<(&str, Break)> = vec![
        ("public_key", Box::new(|r| r.public_key = vec![1; 31])),
        ("public_key", Box::new(|r| r.public_key = vec![0; 32])),
        ("private_endpoints:", Box::new(move |r| r.private_endpoints = vec![endpoint("192.0.2.1", 1); 17])),
        (
            "private_endpoints[0].port",
            Box::new(move |r| r.private_endpoints = vec![endpoint("192.0.2.1", 0)]),
        ),
        ("private_endpoints[0].address", Box::new(move |r| r.private_endpoints = vec![endpoint("x", 1)])),
        (
            "private_endpoints[0].address",
            Box::new(move |r| r.private_endpoints = vec![endpoint("127.0.0.1", 1)]),
        ),
        (
            "private_endpoints[0].address",
            Box::new(move |r| r.private_endpoints = vec![endpoint("::ffff:127.0.0.1", 1)]),
        ),
        (
            "private_endpoints[0].address",
            Box::new(move |r| r.private_endpoints = vec![endpoint("255.255.255.255", 1)]),
        ),
        ("agent_version", Box::new(|r| r.agent_version = "v".repeat(65))),
    ];
    for (path, make_bad) in cases {
        let mut request = registration(1);
        make_bad(&mut request);
        let status = registrar.registration().register(by_device(request, &uid)).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().starts_with(path), "{status}");
    }
}

#[tokio::test]
async fn lookups_find_peers_and_tell_nothing_of_what_is_hidden() {
    let registrar = fixture().await;
    let (_, secret) = registrar.token(true).await;
    let (a, b) = (registrar.join(&secret, "a", 1).await, registrar.join(&secret, "b", 2).await);
    registrar.join(&secret, "c", 3).await;
    registrar.create("pending", &[]).await;
    let peer = registrar.look_up(&a, By::Name("b".into())).await.unwrap();
    assert_eq!((&peer.device_uid, &*peer.public_key), (&b, &[2; 32][..]));
    let address = peer.virtual_addresses[0].clone();
    for by in [
        By::Name("B.N.example.".into()),
        By::Name("b.n.example".into()),
        By::VirtualAddress(address),
        By::PublicKey(vec![2; 32]),
    ] {
        assert_eq!(registrar.look_up(&a, by).await.unwrap().device_uid, b);
    }
    registrar.revoke("c").await;
    let mut told = Vec::new();
    for by in [
        By::Name("c".into()),
        By::Name("pending".into()),
        By::Name("nobody".into()),
        By::Name("n.example".into()),
        By::Name("x.b.n.example".into()),
        By::PublicKey(vec![3; 32]),
        By::PublicKey(vec![9; 32]),
        By::VirtualAddress("10.0.255.1".into()),
        By::VirtualAddress("fd00::1".into()),
    ] {
        let status = registrar.look_up(&a, by).await.unwrap_err();
        told.push((status.code(), status.message().to_owned(), status.details().to_vec()));
    }
    told.dedup();
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!(told[0].0, Code::NotFound);
    for by in [By::Name("x".repeat(300)), By::VirtualAddress("b".into()), By::PublicKey(vec![1])] {
        assert_eq!(registrar.look_up(&a, by).await.unwrap_err().code(), Code::InvalidArgument);
    }
    // A device of another network is a stranger here.
    let request =
        as_party(LookupRequest { by: Some(By::Name("b".into())) }, &format!("network/other/device/{a}"));
    assert_eq!(registrar.registration().lookup(request).await.unwrap_err().code(), Code::PermissionDenied);
}

#[tokio::test]
async fn lists_have_pages_selectors_and_namespaces() {
    let registrar = fixture().await;
    for n in 0..25 {
        registrar.create(&format!("d{n:02}"), &[("role", if n % 2 == 0 { "web" } else { "db" })]).await;
    }
    let (mut token, mut names) = (String::new(), Vec::new());
    loop {
        let options = ListOptions { page_size: 5, page_token: token, label_selector: "role in (web)".into() };
        let request =
            ListDevicesRequest { network: "n".into(), namespace: "default".into(), options: Some(options) };
        let page = registrar.devices().list_devices(operator(request)).await.unwrap().into_inner();
        assert!(page.devices.len() <= 5 && page.resource_version > 0);
        names.extend(page.devices.into_iter().map(|device| device.metadata.unwrap().name));
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(names, (0..25).step_by(2).map(|n| format!("d{n:02}")).collect::<Vec<_>>());
    let request = |network: &str, namespace: &str| {
        operator(ListDevicesRequest { network: network.into(), namespace: namespace.into(), options: None })
    };
    let other = registrar.devices().list_devices(request("n", "prod")).await.unwrap().into_inner();
    assert!(other.devices.is_empty());
    let error = registrar.devices().list_devices(request("nowhere", "")).await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound);
}

fn watch_request(selector: &str, resource_version: u64) -> Request<WatchDevicesRequest> {
    operator(WatchDevicesRequest {
        network: "n".into(),
        namespace: String::new(),
        label_selector: selector.into(),
        resource_version,
    })
}

#[tokio::test]
async fn a_watch_misses_nothing_and_goes_on_from_any_revision() {
    let registrar = Arc::new(fixture().await);
    for n in 0..300 {
        registrar.create(&format!("a{n:03}"), &[]).await;
    }
    let mut watch = registrar.devices().watch_devices(watch_request("", 0)).await.unwrap().into_inner();
    let first = watch.next().await.unwrap().unwrap();
    assert_eq!(first.r#type, i32::from(EventType::Added));
    // Changes come in the middle of the snapshot, before and behind the place where it is.
    let changing = registrar.clone();
    let change = tokio::spawn(async move {
        for n in 0..100 {
            changing.create(&format!("b{n:03}"), &[]).await;
            let name = format!("a{:03}", n * 3);
            let request = DeleteDeviceRequest { network: "n".into(), name, resource_version: 0 };
            changing.devices().delete_device(operator(request)).await.unwrap();
        }
        changing.create("last", &[]).await;
    });
    let mut seen = std::collections::BTreeMap::new();
    let mut handle = |event: proto::WatchDevicesResponse| {
        let kind = event.r#type();
        let Some(device) = event.device else { return (event.resource_version, false) };
        let name = device.metadata.unwrap().name;
        let last = name == "last";
        match kind {
            EventType::Added => assert_eq!(seen.insert(name, event.resource_version), None, "added twice"),
            EventType::Modified => assert!(seen.insert(name, event.resource_version).is_some()),
            EventType::Deleted => drop(seen.remove(&name)),
            other => panic!("{other:?}"),
        }
        (event.resource_version, last)
    };
    let mut revision = handle(first).0;
    // It breaks off after a while, and goes on from the last revision that it told after its snapshot.
    let mut bookmarked = false;
    while let Some(event) = watch.next().await {
        let event = event.unwrap();
        bookmarked |= event.r#type() == EventType::Bookmark;
        revision = handle(event).0;
        if bookmarked && revision % 40 == 0 {
            break;
        }
    }
    drop(watch);
    let mut watch =
        registrar.devices().watch_devices(watch_request("", revision)).await.unwrap().into_inner();
    while !handle(watch.next().await.unwrap().unwrap()).1 {}
    change.await.unwrap();
    let index = registrar.api.registry.read();
    let there: Vec<_> =
        index.network("n").unwrap().devices.after("").map(|d| (d.name.to_string(), d.revision)).collect();
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), there);
}

#[tokio::test]
async fn a_watch_follows_what_its_selector_selects() {
    let registrar = fixture().await;
    registrar.create("a", &[("role", "web")]).await;
    registrar.create("b", &[]).await;
    let mut watch =
        registrar.devices().watch_devices(watch_request("role=web", 0)).await.unwrap().into_inner();
    let mut next = async || {
        let event = watch.next().await.unwrap().unwrap();
        (event.r#type(), event.device.map(|device| device.metadata.unwrap().name).unwrap_or_default())
    };
    assert_eq!(next().await, (EventType::Added, "a".into()));
    assert_eq!(next().await, (EventType::Bookmark, String::new()));
    let label = async |name: &str, value: &str| {
        let mut wanted = device(name, "");
        wanted.metadata.as_mut().unwrap().labels = [("role".to_owned(), value.to_owned())].into();
        let request =
            UpdateDeviceRequest { device: Some(wanted), update_mask: Some(mask(&["metadata.labels"])) };
        registrar.devices().update_device(operator(request)).await.unwrap();
    };
    label("b", "web").await;
    label("a", "db").await;
    registrar.revoke("b").await;
    assert_eq!(next().await, (EventType::Added, "b".into()));
    assert_eq!(next().await, (EventType::Deleted, "a".into()));
    assert_eq!(next().await, (EventType::Modified, "b".into()));
    registrar.api.hub.shutdown();
    let error = watch.next().await.unwrap().unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    let error = registrar.devices().watch_devices(watch_request("a in", 0)).await.err().unwrap();
    assert_eq!(error.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn a_watch_that_has_fallen_behind_is_told_to_list_again() {
    let registrar = fixture().await;
    let first = registrar.api.registry.read().revision();
    assert!(first > 1, "the network was created before this registrar started");
    let error = registrar.devices().watch_devices(watch_request("", 1)).await.err().unwrap();
    assert_eq!(error.code(), Code::OutOfRange);
    assert!(error.message().contains("list again"), "{error}");
    assert!(registrar.devices().watch_devices(watch_request("", first)).await.is_ok());
}

#[tokio::test]
async fn networks_change_pools_and_go_only_when_empty() {
    let registrar = fixture().await;
    registrar.create("a", &[]).await;
    let update = async |pool: &str| {
        let request = UpdateNetworkRequest {
            network: Some(network("n", "", pool)),
            update_mask: Some(mask(&["spec.device_pool_v4"])),
        };
        registrar.networks().update_network(operator(request)).await
    };
    let delete = async || {
        let request = DeleteNetworkRequest { name: "n".into(), resource_version: 0 };
        registrar.networks().delete_network(operator(request)).await
    };
    assert_eq!(update("10.7.0.0/24").await.unwrap_err().code(), Code::FailedPrecondition);
    assert_eq!(delete().await.unwrap_err().code(), Code::FailedPrecondition);
    let request = DeleteDeviceRequest { network: "n".into(), name: "a".into(), resource_version: 0 };
    registrar.devices().delete_device(operator(request)).await.unwrap();
    let updated = update("10.7.0.0/24").await.unwrap().into_inner().network.unwrap();
    assert_eq!(updated.spec.unwrap().device_pool_v4, "10.7.0.0/24");
    assert_eq!(update("10.7.0.1/24").await.unwrap_err().code(), Code::InvalidArgument);
    registrar.create("b", &[]).await;
    let request = DeleteDeviceRequest { network: "n".into(), name: "b".into(), resource_version: 0 };
    registrar.devices().delete_device(operator(request)).await.unwrap();
    delete().await.unwrap();
    assert_eq!(delete().await.unwrap_err().code(), Code::NotFound);
}
