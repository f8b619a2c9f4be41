//! Directors: what they may, who is none, and how soon they hear whom they must not relay for.

use muster_common::{time::Instant, tls::KeyPair};
use muster_proto::{
    admin::{
        CreateTokenRequest, Director, DirectorSpec, GetDirectorRequest, ObjectMeta, Token, TokenSpec,
        UpdateDirectorRequest, device_service_client::DeviceServiceClient,
        director_service_client::DirectorServiceClient as AdminClient,
        token_service_client::TokenServiceClient,
    },
    director::{
        RegisterRequest, SessionHello, SessionRequest, SessionResponse,
        director_service_client::DirectorServiceClient, session_request, session_response::Message,
    },
    enrollment::{EnrollRequest, enrollment_service_client::EnrollmentServiceClient},
    registration::{self, registration_service_client::RegistrationServiceClient},
};
use rcgen::KeyPair as Key;
use rustls::pki_types::PrivateKeyDer;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming, transport::Channel};

use crate::{
    csr,
    site::{SECOND, Site, by_name, list, uri},
};

fn meta(name: &str) -> Option<ObjectMeta> {
    Some(ObjectMeta { network: "default".into(), name: name.into(), ..ObjectMeta::default() })
}

fn request() -> RegisterRequest {
    let endpoint = muster_proto::admin::Endpoint { address: "192.0.2.7".into(), port: 7501 };
    RegisterRequest { endpoints: vec![endpoint], ..RegisterRequest::default() }
}

/// Joins as a director, and connects; the uid comes with it.
async fn join(site: &Site, name: &str) -> (String, Channel) {
    let spec = TokenSpec { party: "director".into(), ..TokenSpec::default() };
    let token = Some(Token { metadata: meta(""), spec: Some(spec), status: None });
    let created = TokenServiceClient::new(site.operator().await)
        .create_token(CreateTokenRequest { token })
        .await
        .unwrap()
        .into_inner();
    assert!(created.join_command.starts_with("muster-director join "), "{}", created.join_command);
    let key = Key::generate().unwrap();
    let request = EnrollRequest {
        token: created.secret,
        certificate_request: csr(&key),
        name: name.to_owned(),
        party: "director".into(),
    };
    let enrolled = EnrollmentServiceClient::new(site.stranger().await).enroll(request).await.unwrap();
    let enrolled = enrolled.into_inner();
    let pair = KeyPair {
        chain: enrolled.certificate_chain.iter().map(|der| der.clone().into()).collect(),
        key: PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
    };
    (enrolled.director_uid, site.connect_as(&pair).await.unwrap())
}

struct Session {
    _sender: mpsc::Sender<SessionRequest>,
    stream: Streaming<SessionResponse>,
}

impl Session {
    async fn open(channel: &Channel, attached: &[&str]) -> Self {
        let (sender, receiver) = mpsc::channel(8);
        let uid = |text: &&str| text.parse::<uuid::Uuid>().unwrap().as_bytes().to_vec();
        let hello = SessionHello { device_uids: attached.iter().map(uid).collect(), more_follow: false };
        let message = Some(session_request::Message::Hello(hello));
        sender.send(SessionRequest { message }).await.unwrap();
        let mut client = DirectorServiceClient::new(channel.clone());
        let stream = client.session(ReceiverStream::new(receiver)).await.unwrap().into_inner();
        Self { _sender: sender, stream }
    }

    async fn next(&mut self) -> Result<Message, Status> {
        let next = tokio::time::timeout(std::time::Duration::from_secs(30), self.stream.message()).await;
        next.expect("nothing came").map(|response| response.unwrap().message.unwrap())
    }
}

#[tokio::test]
async fn directors_reach_their_own_calls_alone() {
    let site = Site::new();
    let (device, _) = site.devices(&["a"]).await.remove(0);
    let (uid, channel) = join(&site, "d1").await;
    let config = DirectorServiceClient::new(channel.clone()).register(request()).await.unwrap().into_inner();
    assert_eq!(config.config.unwrap().director_uid, uid);

    let denied = DeviceServiceClient::new(channel.clone()).list_devices(list()).await.unwrap_err();
    assert_eq!(denied.code(), Code::PermissionDenied);
    let mut as_device = RegistrationServiceClient::new(channel.clone());
    assert_eq!(as_device.lookup(by_name("a")).await.unwrap_err().code(), Code::PermissionDenied);
    let renew = registration::RenewRequest { certificate_request: csr(&Key::generate().unwrap()) };
    assert_eq!(as_device.renew(renew).await.unwrap_err().code(), Code::PermissionDenied);
    let get = GetDirectorRequest { network: "default".into(), name: "d1".into() };
    let denied = AdminClient::new(channel).get_director(get.clone()).await.unwrap_err();
    assert_eq!(denied.code(), Code::PermissionDenied);
    AdminClient::new(site.operator().await).get_director(get).await.unwrap();

    // Nobody else is a director: no device, no operator, no stranger, and nobody the registry does not know.
    let id = |network: &str, uid: &str| format!("spiffe://net.example/network/{network}/director/{uid}");
    let unknown = id("default", &uuid::Uuid::from_u128(7).to_string());
    let mut others =
        vec![site.connect_as_device(&device).await, site.operator().await, site.stranger().await];
    for forged in [unknown, id("elsewhere", &uid), id("default", &device.enrolled.device_uid)] {
        let pair = site.forge(|params| params.subject_alt_names = vec![uri(&forged)]);
        others.push(site.connect_as(&pair).await.unwrap());
    }
    for other in others {
        let status = DirectorServiceClient::new(other).register(request()).await.unwrap_err();
        assert!(matches!(status.code(), Code::PermissionDenied | Code::Unauthenticated), "{status}");
    }
}

#[tokio::test]
async fn revocations_reach_directors_within_a_second() {
    let site = Site::new();
    let devices = site.devices(&["a", "b", "c"]).await;
    let uids: Vec<&str> = devices.iter().map(|(device, _)| &*device.enrolled.device_uid).collect();
    let (_, channel) = join(&site, "d1").await;
    DirectorServiceClient::new(channel.clone()).register(request()).await.unwrap();
    let mut session = Session::open(&channel, &uids).await;
    assert!(matches!(session.next().await, Ok(Message::Config(_))));
    for (name, uid) in [("a", uids[0]), ("b", uids[1])] {
        if name == "a" {
            site.revoke(name).await;
        } else {
            site.delete(name).await;
        }
        let done = Instant::now();
        let Ok(Message::DevicesRefused(refused)) = session.next().await else { panic!("expected a refusal") };
        assert!(Instant::now() - done < SECOND);
        assert_eq!(refused.device_uids, [uid.parse::<uuid::Uuid>().unwrap().as_bytes().to_vec()]);
    }
    // A director that was away hears of both.
    drop(session);
    let mut session = Session::open(&channel, &uids).await;
    let mut refused = 0;
    while refused < 2 {
        if let Message::DevicesRefused(some) = session.next().await.unwrap() {
            refused += some.device_uids.len();
        }
    }

    let spec = Some(DirectorSpec { revoked: true, drained: false });
    let wanted = Director { metadata: meta("d1"), spec, status: None };
    let update_mask = Some(pbjson_types::FieldMask { paths: vec!["spec.revoked".into()] });
    let revoke = UpdateDirectorRequest { director: Some(wanted), update_mask };
    AdminClient::new(site.operator().await).update_director(revoke).await.unwrap();
    let done = Instant::now();
    let status = loop {
        if let Err(status) = session.next().await {
            break status;
        }
    };
    assert!(Instant::now() - done < SECOND);
    assert_eq!(status.code(), Code::PermissionDenied);
    let status = DirectorServiceClient::new(channel).register(request()).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
}
