//! The connection against a registrar that does what the test says.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use muster_common::{
    census::Bounds,
    grpc::{self, Caller},
    tls::certificate_identity,
};
use muster_proto::director::{
    DevicesRefused, Drain, RegisterResponse, RenewRequest, Report, RootsChanged, SessionRequest,
    SessionResponse,
    director_service_server::{DirectorService, DirectorServiceServer},
    session_request, session_response,
};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, IsCa,
    KeyUsagePurpose, SanType,
};
use rustls::pki_types::CertificateDer;
use tokio::{net::TcpListener, sync::mpsc, task::JoinHandle};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::*;

const DIRECTOR: &str = "spiffe://muster.test/network/net/director/d1";
/// Longer than anything here takes on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Clone)]
struct Authority(Arc<CertifiedIssuer<'static, rcgen::KeyPair>>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Self(Arc::new(CertifiedIssuer::self_signed(params, rcgen::KeyPair::generate().unwrap()).unwrap()))
    }

    fn params(id: &str, from: i64, to: i64) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
        let now = time::OffsetDateTime::now_utc();
        params.not_before = now + time::Duration::days(from);
        params.not_after = now + time::Duration::days(to);
        params
    }

    /// The identity of a director whose certificate is valid from `from` to `to` days from now.
    fn identity(&self, registrars: &[SocketAddr], from: i64, to: i64) -> Identity {
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = Self::params(DIRECTOR, from, to).signed_by(&key, &*self.0).unwrap();
        let registrars: Vec<_> = registrars.iter().map(SocketAddr::to_string).collect();
        Identity {
            network: "net".into(),
            director_uid: "d1".into(),
            name: "relay".into(),
            registrar: registrars[0].clone(),
            registrars,
            certificate_chain: pem(&[certificate.der().to_vec(), self.root()]),
            tls_key: key.serialize_pem(),
            roots: pem(&[self.root()]),
        }
    }

    fn root(&self) -> Vec<u8> {
        self.0.der().to_vec()
    }

    fn registrar(&self) -> Arc<Credentials> {
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate =
            Self::params("spiffe://muster.test/registrar/r1", -1, 1).signed_by(&key, &*self.0).unwrap();
        let chain = pem(&[certificate.der().to_vec(), self.root()]);
        let pair = KeyPair::from_pem("test", format!("{chain}{}", key.serialize_pem()).as_bytes()).unwrap();
        Credentials::new(&pair, &[CertificateDer::from(self.root())]).unwrap()
    }
}

/// A registrar, and what it is asked.
struct Fake {
    authority: Authority,
    refuses: bool,
    registered: mpsc::Sender<RegisterRequest>,
    messages: mpsc::Sender<session_request::Message>,
    /// What each session says, one after another.
    sessions: Mutex<VecDeque<mpsc::Receiver<Result<SessionResponse, Status>>>>,
}

/// The test's ends of a [`Fake`].
struct Seen {
    address: SocketAddr,
    registered: mpsc::Receiver<RegisterRequest>,
    messages: mpsc::Receiver<session_request::Message>,
    say: Vec<mpsc::Sender<Result<SessionResponse, Status>>>,
    server: JoinHandle<()>,
}

impl Fake {
    async fn start(authority: &Authority, refuses: bool, sessions: usize) -> Seen {
        let (registered_tx, registered) = mpsc::channel(64);
        let (messages_tx, messages) = mpsc::channel(64);
        let (say, hear): (Vec<_>, VecDeque<_>) = (0..sessions).map(|_| mpsc::channel(8)).unzip();
        let fake = Self {
            authority: authority.clone(),
            refuses,
            registered: registered_tx,
            messages: messages_tx,
            sessions: Mutex::new(hear),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let tls = Arc::new(authority.registrar().server_config(ALPN_H2).unwrap());
        let bounds = Bounds { parties: 9, per_device: 9, strangers: 9, strangers_per_source: 9 };
        let incoming = grpc::incoming(listener, tls, bounds, grpc::AcceptMetrics::default());
        let server = tokio::spawn(async move {
            let service = DirectorServiceServer::new(fake);
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(incoming)
                .await
                .unwrap();
        });
        Seen { address, registered, messages, say, server }
    }
}

#[tonic::async_trait]
impl DirectorService for Fake {
    async fn register(
        &self,
        request: Request<RegisterRequest>,
    ) -> Result<Response<RegisterResponse>, Status> {
        let caller: &Caller = request.extensions().get().unwrap();
        assert_eq!(caller.identity.as_ref().unwrap().to_string(), DIRECTOR);
        self.registered.send(request.into_inner()).await.unwrap();
        if self.refuses {
            return Err(Status::permission_denied("the director has been revoked"));
        }
        Ok(Response::new(RegisterResponse { config: None }))
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<RenewResponse>, Status> {
        let der = request.into_inner().certificate_request;
        let mut asked = CertificateSigningRequestParams::from_der(&der.into()).unwrap();
        asked.params = Authority::params(DIRECTOR, -1, 30);
        let certificate = asked.signed_by(&*self.authority.0).unwrap();
        Ok(Response::new(RenewResponse {
            certificate_chain: vec![certificate.der().to_vec(), self.authority.root()],
            roots: Vec::new(),
        }))
    }

    type SessionStream = ReceiverStream<Result<SessionResponse, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let Some(hear) = self.sessions.lock().unwrap().pop_front() else {
            return Err(Status::unavailable("no more sessions"));
        };
        let (mut stream, messages) = (request.into_inner(), self.messages.clone());
        tokio::spawn(async move {
            while let Ok(Some(message)) = stream.message().await {
                if messages.send(message.message.unwrap()).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(hear)))
    }
}

impl Seen {
    async fn say(&self, message: session_response::Message) {
        let response = SessionResponse { message: Some(message) };
        self.say[0].send(Ok(response)).await.unwrap();
    }

    async fn message(&mut self) -> session_request::Message {
        within(self.messages.recv()).await.unwrap()
    }

    /// The next message that is no report without news.
    async fn news(&mut self) -> session_request::Message {
        loop {
            let message = self.message().await;
            if !matches!(message, session_request::Message::Report(Report { draining: false, .. })) {
                return message;
            }
        }
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("this should not have taken so long")
}

/// What relays, as far as the registrar is concerned.
struct Devices {
    attached: Mutex<Vec<Uuid>>,
    changes: watch::Sender<u64>,
    refused: mpsc::Sender<Vec<Uuid>>,
    /// How often all were forgiven.
    forgiven: AtomicU32,
}

impl Devices {
    fn set(&self, attached: &[u128]) {
        *self.attached.lock().unwrap() = attached.iter().map(|n| Uuid::from_u128(*n)).collect();
        self.changes.send_modify(|n| *n += 1);
    }
}

impl Relaying for Devices {
    fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }
    fn devices(&self) -> Vec<Uuid> {
        self.attached.lock().unwrap().clone()
    }
    fn relayed(&self) -> (u64, u64) {
        (7, 700)
    }
    fn refuse(&self, devices: &[Uuid]) {
        self.refused.try_send(devices.to_vec()).unwrap();
    }
    fn forgive(&self) {
        self.forgiven.fetch_add(1, Ordering::Relaxed);
    }
}

/// A client at work.
struct Running {
    devices: Arc<Devices>,
    refused: mpsc::Receiver<Vec<Uuid>>,
    state: State,
    draining: watch::Sender<bool>,
    metrics: Metrics,
    task: JoinHandle<()>,
    _directory: tempfile::TempDir,
}

fn run(identity: Identity, attached: &[u128]) -> Running {
    let directory = tempfile::tempdir().unwrap();
    let state = State::new(directory.path());
    state.set_identity(&identity).unwrap();
    let (refused_tx, refused) = mpsc::channel(8);
    let devices = Arc::new(Devices {
        attached: Mutex::default(),
        changes: watch::channel(0).0,
        refused: refused_tx,
        forgiven: AtomicU32::new(0),
    });
    devices.set(attached);
    let (draining, drained) = watch::channel(false);
    let metrics = Metrics::default();
    let (credentials, tls) = credentials(&identity).unwrap();
    let announce = || RegisterRequest { region: "here".into(), ..RegisterRequest::default() };
    let client = Client::new(
        Arc::clone(&devices),
        state.clone(),
        identity,
        credentials,
        tls,
        announce,
        drained,
        metrics.clone(),
        1,
    );
    let task = tokio::spawn(client.unwrap().run());
    Running { devices, refused, state, draining, metrics, task, _directory: directory }
}

fn octets(devices: &[u128]) -> Vec<Vec<u8>> {
    devices.iter().map(|n| n.to_be_bytes().to_vec()).collect()
}

#[tokio::test]
async fn the_registrar_hears_who_is_attached_and_says_who_is_refused() {
    let authority = Authority::new();
    let mut registrar = Fake::start(&authority, false, 1).await;
    let mut running = run(authority.identity(&[registrar.address], -1, 30), &[1, 2]);
    assert_eq!(within(registrar.registered.recv()).await.unwrap().region, "here");
    match registrar.message().await {
        session_request::Message::Hello(hello) => {
            assert_eq!((hello.device_uids, hello.more_follow), (octets(&[1, 2]), false));
        }
        other => panic!("{other:?}"),
    }
    match registrar.message().await {
        session_request::Message::Report(report) => {
            assert_eq!(report, Report { attached: 2, frames: 7, octets: 700, draining: false });
        }
        other => panic!("{other:?}"),
    }
    running.devices.set(&[2, 3]);
    match registrar.news().await {
        session_request::Message::DevicesChanged(changed) => assert_eq!(changed.detached, octets(&[1])),
        other => panic!("{other:?}"),
    }
    match registrar.news().await {
        session_request::Message::DevicesChanged(changed) => assert_eq!(changed.attached, octets(&[3])),
        other => panic!("{other:?}"),
    }
    // What is no uid is passed over.
    let device_uids = [octets(&[3]), vec![vec![1, 2]]].concat();
    registrar.say(session_response::Message::DevicesRefused(DevicesRefused { device_uids })).await;
    assert_eq!(within(running.refused.recv()).await.unwrap(), [Uuid::from_u128(3)]);
    assert_eq!(running.devices.forgiven.load(Ordering::Relaxed), 1, "at the beginning of the session");
    assert_eq!(running.metrics.connected.get(), 1);

    running.draining.send(true).unwrap();
    assert!(matches!(
        registrar.news().await,
        session_request::Message::Report(Report { draining: true, .. })
    ));
    running.task.abort();
    registrar.server.abort();
}

#[tokio::test]
async fn what_the_registrar_decides_is_kept() {
    let authority = Authority::new();
    let mut registrar = Fake::start(&authority, false, 1).await;
    let running = run(authority.identity(&[registrar.address], -1, 30), &[]);
    registrar.message().await;
    let registrars = vec![registrar.address.to_string(), "127.0.0.1:1".to_owned()];
    let config = DirectorConfig { registrars: registrars.clone(), ..DirectorConfig::default() };
    registrar.say(session_response::Message::Config(config)).await;
    // Roots that cannot be used change nothing.
    registrar.say(session_response::Message::RootsChanged(RootsChanged { roots: vec![vec![1]] })).await;
    let next = Authority::new();
    let roots = vec![authority.root(), next.root()];
    registrar.say(session_response::Message::RootsChanged(RootsChanged { roots: roots.clone() })).await;
    within(async {
        while running.state.identity().unwrap().roots != pem(&roots) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    let identity = running.state.identity().unwrap();
    assert_eq!((identity.registrars.clone(), identity.name.as_str()), (registrars, "relay"));
    running.task.abort();
    registrar.server.abort();
}

#[tokio::test]
async fn a_certificate_is_renewed_in_good_time() {
    let authority = Authority::new();
    let mut registrar = Fake::start(&authority, false, 1).await;
    let identity = authority.identity(&[registrar.address], -20, 1);
    let running = run(identity.clone(), &[]);
    let before = running.metrics.expiry.get();
    registrar.message().await;
    within(async {
        while running.metrics.expiry.get() == before {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    let renewed = running.state.identity().unwrap();
    assert_ne!(renewed.tls_key, identity.tls_key);
    let pair = renewed.key_pair().unwrap();
    assert_eq!(certificate_identity(&pair.chain[0]).unwrap().to_string(), DIRECTOR);
    let days = (running.metrics.expiry.get() - before) / 86_400;
    assert_eq!(days, 29);
    running.task.abort();
    registrar.server.abort();
}

#[tokio::test]
async fn registrars_that_are_away_refuse_or_shut_down_are_left() {
    let authority = Authority::new();
    let away = {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap()
    };
    let mut refusing = Fake::start(&authority, true, 0).await;
    let mut serving = Fake::start(&authority, false, 2).await;
    let identity = authority.identity(&[away, refusing.address, serving.address], -1, 30);
    let running = run(identity, &[5]);
    assert!(matches!(serving.message().await, session_request::Message::Hello(_)));
    serving.say(session_response::Message::Drain(Drain { within: None })).await;
    // The others are of no use, so it comes back to this one, and says who is attached again.
    assert!(within(refusing.registered.recv()).await.is_some());
    match serving.news().await {
        session_request::Message::Hello(hello) => assert_eq!(hello.device_uids, octets(&[5])),
        other => panic!("{other:?}"),
    }
    running.task.abort();
    refusing.server.abort();
    serving.server.abort();
}
