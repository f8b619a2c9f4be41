//! Who may do what, over real mutual TLS against the real registrar: strangers, devices, directors, operators, and
//! those who pretend to be one of them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod directors;
mod load;
mod site;

use muster_common::{identity::Party, time::Instant, tls::KeyPair};
use muster_integration_tests::device::{Device, register_request};
use muster_proto::{
    admin::{
        self, CreateNetworkRequest, ListDevicesRequest, NetworkSpec, ObjectMeta,
        device_service_client::DeviceServiceClient, network_service_client::NetworkServiceClient,
    },
    registration::{
        EndpointsChanged, LookupRequest, RenewRequest, lookup_request::By,
        registration_service_client::RegistrationServiceClient, session_request, session_response::Message,
    },
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair as Key};
use rustls::pki_types::PrivateKeyDer;
use site::{SECOND, Session, Site, by_name, enroll, list, uri};
use tonic::{Code, Status, transport::Channel};

fn csr(key: &Key) -> Vec<u8> {
    CertificateParams::default().serialize_request(key).unwrap().der().to_vec()
}

#[tokio::test]
async fn each_party_reaches_its_own_calls_alone() {
    let site = Site::new();
    let mut devices = site.devices(&["a"]).await;
    let (device, mut registration) = devices.remove(0);
    let stranger = site.stranger().await;
    let denied = async |channel: Channel| {
        let status = DeviceServiceClient::new(channel).list_devices(list()).await.unwrap_err();
        (status.code(), status.message().to_owned())
    };
    assert_eq!(denied(stranger.clone()).await.0, Code::Unauthenticated);
    let status = RegistrationServiceClient::new(stranger).register(register_request(9, 9)).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);

    let as_device = site.connect_as_device(&device).await;
    let (code, message) = denied(as_device).await;
    assert_eq!(code, Code::PermissionDenied);
    assert!(message.contains("operators"), "{message}");
    let mut operator = RegistrationServiceClient::new(site.operator().await);
    let status = operator.register(register_request(9, 9)).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "an operator is no device");
    let mut list = DeviceServiceClient::new(site.operator().await);
    let found =
        list.list_devices(ListDevicesRequest { network: "default".into(), ..Default::default() }).await;
    assert_eq!(found.unwrap().into_inner().devices.len(), 1);
    registration.lookup(by_name("a")).await.unwrap();
}

#[tokio::test]
async fn only_what_the_ca_has_issued_to_the_party_itself_is_let_in() {
    let site = Site::new();
    let (device, _) = site.devices(&["a"]).await.remove(0);
    let uid = &device.enrolled.device_uid;
    let id = format!("spiffe://net.example/network/default/device/{uid}");
    let refused = async |pair: &KeyPair| {
        // TLS 1.3 has the client end its handshake first: the refusal shows there or with the first call.
        let Ok(channel) = site.connect_as(pair).await else { return };
        let status = DeviceServiceClient::new(channel).list_devices(list()).await.unwrap_err();
        assert!(!matches!(status.code(), Code::Unauthenticated | Code::PermissionDenied), "{status}");
    };
    let now = time::OffsetDateTime::now_utc();
    let admin = "spiffe://net.example/operator/admin";

    // Another CA; one that names itself like ours; a device's certificate that acts as a CA.
    let other = Site::new();
    refused(&other.credential().key_pair().unwrap()).await;
    let (ca_key, key) = (Key::generate().unwrap(), Key::generate().unwrap());
    for issuing in [uri(admin), uri(&id)] {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.subject_alt_names = vec![issuing];
        let issuer =
            rcgen::CertifiedIssuer::self_signed(params, Key::from_pem(&ca_key.serialize_pem()).unwrap());
        let issuer = issuer.unwrap();
        let mut leaf = CertificateParams::default();
        leaf.subject_alt_names = vec![uri(admin)];
        let leaf = leaf.signed_by(&key, &issuer).unwrap();
        let chain = [vec![leaf.der().clone(), issuer.der().clone()], site.roots()].concat();
        refused(&KeyPair { chain, key: PrivateKeyDer::try_from(key.serialize_der()).unwrap() }).await;
    }
    // Expired, not yet valid, for servers alone, of another deployment, without or with two identities.
    refused(&site.forge(|p| {
        p.subject_alt_names = vec![uri(admin)];
        p.not_before = now - time::Duration::days(3);
        p.not_after = now - time::Duration::days(1);
    }))
    .await;
    refused(&site.forge(|p| {
        p.subject_alt_names = vec![uri(admin)];
        p.not_before = now + time::Duration::days(1);
    }))
    .await;
    refused(&site.forge(|p| {
        p.subject_alt_names = vec![uri(admin)];
        p.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    }))
    .await;
    for names in [
        vec![uri("spiffe://other.example/operator/admin")],
        vec![uri("spiffe://net.example/operator/admin/more")],
        vec![uri("https://net.example/operator/admin")],
        vec![uri(admin), uri(&id)],
    ] {
        // Credentials read their own identity, and so this one has to go without them.
        let pair = site.forge(|p| p.subject_alt_names = names);
        if pair.identity().is_ok() {
            refused(&pair).await;
        } else {
            assert!(site.raw(&pair).await.is_err());
        }
    }
    // What the CA has signed for a device that the registry does not know is nobody's.
    let unknown = format!("spiffe://net.example/network/default/device/{}", uuid::Uuid::from_u128(7));
    for id in [unknown, format!("spiffe://net.example/network/elsewhere/device/{uid}")] {
        let channel = site.connect_as(&site.forge(|p| p.subject_alt_names = vec![uri(&id)])).await.unwrap();
        let status = RegistrationServiceClient::new(channel).lookup(by_name("a")).await.unwrap_err();
        assert_eq!(status.code(), Code::PermissionDenied);
        assert!(status.message().contains("join again"), "{status}");
    }
    // A device's certificate does not make a registrar.
    let pair = device_pair(&site).await;
    assert!(matches!(pair.identity().unwrap().party, Party::Device { .. }));
    let error = site.connect_to_impostor(&pair).await.unwrap_err().to_string();
    assert!(error.contains("not a party"), "{error}");
}

/// The certificate and key of a device that has just joined.
async fn device_pair(site: &Site) -> KeyPair {
    let key = Key::generate().unwrap();
    let join = site.token("default", false).await;
    let device = Device::join_with(&join, "impostor", &key, csr(&key)).await.unwrap();
    KeyPair {
        chain: device.enrolled.certificate_chain.iter().map(|der| der.clone().into()).collect(),
        key: PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
    }
}

#[tokio::test]
async fn joining_needs_a_good_request_a_free_name_and_a_token_once() {
    let site = Site::new();
    let join = site.token("default", true).await;
    let token = join.option("token").unwrap();
    let key = Key::generate().unwrap();
    let mut with_name = CertificateParams::default();
    with_name.subject_alt_names = vec![uri("spiffe://net.example/operator/admin")];
    let with_name = with_name.serialize_request(&key).unwrap().der().to_vec();
    let mut broken = csr(&key);
    let last = broken.len() - 4;
    broken[last] ^= 1;
    for (request, name, says) in [
        (with_name, "x", "identity"),
        (broken, "x", "signature"),
        (csr(&key), "svc", "reserved"),
        (csr(&key), "a.b", "name"),
        (csr(&key), &"x".repeat(64), "name"),
        (csr(&key), &"x".repeat(100_000), "longer"),
    ] {
        let status = enroll(&site, token, request, name).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().contains(says), "{says}: {status}");
    }
    // The response was lost: the same again, and no second device.
    let first = enroll(&site, token, csr(&key), "web").await.unwrap();
    assert_eq!(enroll(&site, token, csr(&key), "web").await.unwrap(), first);
    let other = Key::generate().unwrap();
    let status = enroll(&site, token, csr(&other), "WEB").await.unwrap_err();
    assert_eq!(status.code(), Code::AlreadyExists, "{status}");

    // One token, twenty at once.
    let join = site.token("default", false).await;
    let mut racers = tokio::task::JoinSet::new();
    for n in 0..20 {
        let join = join.clone();
        racers.spawn(async move { Device::join(&join, &format!("racer{n}")).await.is_ok() });
    }
    let won = racers.join_all().await.into_iter().filter(|won| *won).count();
    assert_eq!(won, 1);
    let devices = DeviceServiceClient::new(site.operator().await).list_devices(list()).await.unwrap();
    assert_eq!(devices.into_inner().devices.len(), 2);
    let log = site.log();
    assert!(!log.contains(&token[30..]), "a secret in the log");
}

#[tokio::test]
async fn what_is_hidden_looks_like_what_is_not_there() {
    let site = Site::new();
    let mut devices = site.devices(&["a", "b", "gone"]).await;
    site.revoke("gone").await;
    let network = admin::Network {
        metadata: Some(ObjectMeta { name: "other".into(), ..ObjectMeta::default() }),
        spec: Some(NetworkSpec {
            domain: "other.example".into(),
            device_pool_v4: "10.9.0.0/16".into(),
            service_pool_v4: "10.10.0.0/16".into(),
            ..NetworkSpec::default()
        }),
        status: None,
    };
    NetworkServiceClient::new(site.operator().await)
        .create_network(CreateNetworkRequest { network: Some(network) })
        .await
        .unwrap();
    let foreign = Device::join(&site.token("other", false).await, "foreign").await.unwrap();
    let config = foreign.connect().await.unwrap().register(register_request(77, 77)).await.unwrap();
    let foreign_address = config.into_inner().config.unwrap().virtual_ipv4;

    let client = &mut devices[0].1;
    let key = |number| register_request(number, 0).public_key;
    let peer = client.lookup(by_name("b")).await.unwrap().into_inner().peer.unwrap();
    for by in [
        By::Name("b.net.example".into()),
        By::PublicKey(key(2)),
        By::VirtualAddress(peer.virtual_addresses[0].clone()),
    ] {
        let found = client.lookup(LookupRequest { by: Some(by) }).await.unwrap().into_inner().peer.unwrap();
        assert_eq!(found.device_uid, peer.device_uid);
    }
    let mut told = Vec::new();
    for by in [
        By::Name("nobody".into()),
        By::Name("gone".into()),
        By::Name("foreign".into()),
        By::Name("foreign.other.example".into()),
        By::PublicKey(key(3)),
        By::PublicKey(key(77)),
        By::PublicKey(key(99)),
        By::VirtualAddress(foreign_address),
        By::VirtualAddress("100.64.9.9".into()),
    ] {
        let status = client.lookup(LookupRequest { by: Some(by) }).await.unwrap_err();
        let mut metadata = status.metadata().clone();
        metadata.remove("date");
        told.push(format!("{:?} {:?} {metadata:?} {:?}", status.code(), status.message(), status.details()));
    }
    told.dedup();
    assert_eq!(told.len(), 1, "{told:#?}");
    assert!(told[0].starts_with("NotFound"), "{told:?}");
}

#[tokio::test]
async fn revoked_and_deleted_devices_are_out_within_a_second() {
    let site = Site::new();
    let mut devices = site.devices(&["a", "revoked", "deleted"]).await;
    let uids: Vec<String> = devices.iter().map(|(device, _)| device.enrolled.device_uid.clone()).collect();
    let mut holder = Session::open(&mut devices[0].1, 0, &[&uids[1], &uids[2]]).await.unwrap();
    holder.bookmark().await;
    let renewal = RenewRequest { certificate_request: csr(&Key::generate().unwrap()) };
    for n in 1..3 {
        let client = &mut devices[n].1;
        let mut session = Session::open(client, 0, &[]).await.unwrap();
        session.bookmark().await;
        if n == 1 {
            site.revoke("revoked").await
        } else {
            site.delete("deleted").await
        }
        let done = Instant::now();
        assert_eq!(session.end().await.code(), Code::PermissionDenied);
        let removed = holder
            .until(|message| match message {
                Message::PeerRemoved(removed) => Some(removed.device_uid.clone()),
                _ => None,
            })
            .await;
        assert_eq!(removed, uids[n]);
        assert!(Instant::now() - done < SECOND);
        let statuses: Vec<Status> = vec![
            client.lookup(by_name("a")).await.unwrap_err(),
            client.register(register_request(9, 9)).await.unwrap_err(),
            client.renew(renewal.clone()).await.unwrap_err(),
            match Session::open(client, 0, &[]).await {
                Ok(mut session) => session.end().await,
                Err(status) => status,
            },
        ];
        for status in statuses {
            assert_eq!(status.code(), Code::PermissionDenied, "{status}");
        }
        // Nor does a new connection help.
        let mut again = devices[n].0.connect().await.unwrap();
        assert_eq!(again.lookup(by_name("a")).await.unwrap_err().code(), Code::PermissionDenied);
    }
}

#[tokio::test]
async fn sessions_introduce_follow_resume_and_drain() {
    let mut site = Site::with("");
    let mut devices = site.devices(&["a", "b"]).await;
    let uid = |devices: &[(Device, _)], n: usize| devices[n].0.enrolled.device_uid.clone();
    let (a, b) = (uid(&devices, 0), uid(&devices, 1));
    let mut of_b = Session::open(&mut devices[1].1, 0, &[]).await.unwrap();
    of_b.bookmark().await;
    let asked = Instant::now();
    devices[0].1.lookup(by_name("b")).await.unwrap();
    let introduced = of_b
        .until(|message| match message {
            Message::Introduction(introduction) => introduction.peer.clone(),
            _ => None,
        })
        .await;
    assert_eq!(introduced.device_uid, a);
    let mut of_a = Session::open(&mut devices[0].1, 0, &[&b]).await.unwrap();
    let seen = of_a.bookmark().await;

    let moved = async |of_b: &Session, address| {
        let private_endpoints = register_request(2, address).private_endpoints;
        let changed = EndpointsChanged { private_endpoints, ..EndpointsChanged::default() };
        of_b.send(session_request::Message::EndpointsChanged(changed)).await;
    };
    let changed = |message: &Message| match message {
        Message::PeerChanged(changed) => {
            changed.peer.clone().map(|peer| peer.private_endpoints[0].address.clone())
        }
        _ => None,
    };
    moved(&of_b, 500).await;
    assert_eq!(of_a.until(changed).await, "10.0.1.244");
    assert!(Instant::now() - asked < 10 * SECOND);
    // Away for a while, and then told what it has missed, and no more.
    drop(of_a);
    moved(&of_b, 501).await;
    let mut again = Session::open(&mut devices[0].1, seen, &[&b]).await.unwrap();
    // The move may be written before or after.
    while again.until(changed).await != "10.0.1.245" {}
    let seen = again.bookmark().await;
    drop(again);
    let mut again = Session::open(&mut devices[0].1, seen, &[&b]).await.unwrap();
    loop {
        match again.next().await.unwrap().unwrap() {
            Message::PeerChanged(peer) => panic!("told again of {peer:?}"),
            Message::Bookmark(_) => break,
            _ => {}
        }
    }
    site.process.as_ref().unwrap().signal(rustix::process::Signal::TERM).unwrap();
    again.until(|message| matches!(message, Message::Drain(_)).then_some(())).await;
    assert_eq!(again.end().await.code(), Code::Unavailable);
    assert!(site.process.as_mut().unwrap().wait(30 * SECOND).unwrap().success());
}
