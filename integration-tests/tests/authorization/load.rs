//! Those who send too much: each gets a clear answer, and the registrar's memory stays as it is.

use muster_integration_tests::device::{Device, register_request};
use muster_proto::{
    admin::{self, CreateDeviceRequest, ObjectMeta, device_service_client::DeviceServiceClient},
    enrollment::{EnrollRequest, enrollment_service_client::EnrollmentServiceClient},
    registration::{HeldPeers, RegisterRequest, session_request},
};
use tonic::Code;
use uuid::Uuid;

use crate::site::{Session, Site, by_name};

#[tokio::test]
async fn oversized_messages_are_refused() {
    let site = Site::new();
    let (_, mut client) = site.devices(&["a"]).await.remove(0);
    let before = site.resident_kib();
    let huge = RegisterRequest { public_key: vec![1; 8 << 20], ..register_request(1, 1) };
    let status = client.register(huge).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{status}");
    let enroll = EnrollRequest { certificate_request: vec![1; 8 << 20], ..EnrollRequest::default() };
    let mut stranger = EnrollmentServiceClient::new(site.stranger().await);
    assert_eq!(stranger.enroll(enroll).await.unwrap_err().code(), Code::OutOfRange);
    client.lookup(by_name("a")).await.unwrap();

    let labels = (0..10_000).map(|n| (format!("k{n}"), "v".to_owned())).collect();
    let metadata =
        |name: String, labels| ObjectMeta { network: "default".into(), name, labels, ..Default::default() };
    for metadata in [metadata("x".into(), labels), metadata("x".repeat(200_000), Default::default())] {
        let device = admin::Device { metadata: Some(metadata), ..admin::Device::default() };
        let status = DeviceServiceClient::new(site.operator().await)
            .create_device(CreateDeviceRequest { device: Some(device) })
            .await
            .unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().len() < 1000, "{status}");
    }
    assert!(site.resident_kib() < before + 32 * 1024);
}

#[tokio::test]
async fn sessions_hold_so_many_peers_and_no_more() {
    let site = Site::new();
    let (_, mut client) = site.devices(&["a"]).await.remove(0);
    let mut session = Session::open(&mut client, 0, &[]).await.unwrap();
    session.bookmark().await;
    let before = site.resident_kib();
    // None of these is there. As long as the session does not read that, they count among those it holds.
    for chunk in 0..25_u128 {
        let added_uids = (0..4000).map(|n| Uuid::from_u128(chunk << 32 | n).simple().to_string()).collect();
        session
            .send(session_request::Message::HeldPeers(HeldPeers { added_uids, removed_uids: vec![] }))
            .await;
    }
    client.lookup(by_name("a")).await.unwrap();
    let most = site.resident_kib();
    let read = session.told;
    let status = loop {
        match session.next().await {
            Ok(_) if session.told - read == 100_000 => break None,
            Ok(message) => drop(message.expect("ended without a status")),
            Err(status) => break Some(status),
        }
    };
    // Either it was told of each, or that they are too many.
    assert!(status.is_none_or(|status| status.code() == Code::ResourceExhausted));
    let most = most.max(site.resident_kib());
    assert!(most < before + 64 * 1024, "{} KiB", most - before);
    client.lookup(by_name("a")).await.unwrap();
}

#[tokio::test]
async fn floods_of_lookups_and_strangers_do_not_swell_the_registrar() {
    let site =
        Site::with("[limits]\nstrangers = 64\nstrangers_per_address = 32\nconnections_per_device = 4\n");
    let mut devices = site.devices(&["a", "b"]).await;
    let before = site.resident_kib();
    // Strangers that only connect, and strangers that end their handshake and stay.
    let mut silent = Vec::new();
    for _ in 0..200 {
        silent.push(tokio::net::TcpStream::connect(site.address()).await.unwrap());
    }
    let mut lookups = tokio::task::JoinSet::new();
    for n in 0..64 {
        let mut client = devices[0].1.clone();
        lookups.spawn(async move {
            for _ in 0..100 {
                let name = if n % 2 == 0 { "b" } else { "nobody" };
                let code =
                    client.lookup(by_name(name)).await.map_or_else(|status| status.code(), |_| Code::Ok);
                assert!(matches!(code, Code::Ok | Code::NotFound), "{code:?}");
            }
        });
    }
    lookups.join_all().await;
    // One source has all places of strangers that it may have. Devices that are connected go on.
    devices[1].1.lookup(by_name("a")).await.unwrap();
    assert!(site.resident_kib() < before + 64 * 1024);
    drop(silent);
    // No device has more connections than its own.
    let mut held = Vec::new();
    let mut refused = 0;
    for _ in 0..8 {
        match devices[0].0.connect().await {
            Ok(mut client) => match client.lookup(by_name("b")).await {
                Ok(_) => held.push(client),
                Err(_) => refused += 1,
            },
            Err(_) => refused += 1,
        }
    }
    assert!(held.len() <= 3 && refused >= 5, "{} {refused}", held.len());
    let join = site.token("default", false).await;
    assert!(Device::join(&join, "c").await.is_ok(), "strangers are let in again");
}
