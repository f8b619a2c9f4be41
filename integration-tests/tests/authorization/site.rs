//! A registrar on loopback, and those who connect to it.

use std::{net::TcpListener, path::PathBuf, process::Command, sync::Arc, time::Duration};

use muster_common::{
    census::Bounds,
    credential::OperatorCredential,
    grpc,
    identity::Party,
    tls::{ALPN_H2, Credentials, KeyPair, pinned_client_config},
};
use muster_integration_tests::{
    device::{Device, Error, register_request},
    muster::{JoinCommand, binary},
    process::{self, Process, wait_for},
};
use muster_proto::{
    admin::{
        self, CreateTokenRequest, DeleteDeviceRequest, ListDevicesRequest, ObjectMeta, TokenSpec,
        UpdateDeviceRequest, device_service_client::DeviceServiceClient,
        token_service_client::TokenServiceClient,
    },
    enrollment::{EnrollRequest, enrollment_service_client::EnrollmentServiceClient},
    registration::{
        LookupRequest, SessionHello, SessionRequest, SessionResponse, lookup_request::By,
        registration_service_client::RegistrationServiceClient, session_request, session_response::Message,
    },
};
use rcgen::{CertificateParams, Issuer, KeyPair as Key, SanType};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming, transport::Channel};

const PATIENCE: Duration = Duration::from_secs(30);
/// What is revoked or changed has to be known within this time.
pub(crate) const SECOND: Duration = Duration::from_secs(1);

/// A registrar in a directory of its own, on ports of loopback.
pub(crate) struct Site {
    directory: tempfile::TempDir,
    pub(crate) ports: [u16; 4],
    pub(crate) join: JoinCommand,
    pub(crate) process: Option<Process>,
}

impl Site {
    pub(crate) fn new() -> Self {
        Self::with("")
    }

    pub(crate) fn with(more: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let ports = free_ports();
        let [grpc, dns, dot, http] = ports;
        let text = format!(
            "data_dir = \"{}\"\n[listen]\ngrpc = \"127.0.0.1:{grpc}\"\ndns = \"127.0.0.1:{dns}\"\n\
             dot = \"127.0.0.1:{dot}\"\nhttp = \"127.0.0.1:{http}\"\n{more}",
            directory.path().join("data").display()
        );
        std::fs::write(directory.path().join("registrar.toml"), text).unwrap();
        let join = JoinCommand(Vec::new());
        let mut site = Self { directory, ports, join, process: None };
        let mut init = site.command("init");
        init.args(["--domain", "net.example", "--public-address", "127.0.0.1", "--credential"]);
        init.arg(site.path("operator.toml"));
        site.join = JoinCommand::find(&process::check(init).unwrap()).unwrap();
        let serve = site.command("serve");
        site.process = Some(Process::spawn("registrar", serve, site.path("log")).unwrap());
        wait_for("the registrar", PATIENCE, || {
            let mut ask = Command::new("curl");
            ask.args(["-sf", &format!("http://127.0.0.1:{http}/readyz")]);
            process::check(ask).map(drop).map_err(|error| error.to_string())
        })
        .unwrap();
        site
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn command(&self, what: &str) -> Command {
        let mut command = Command::new(binary("muster-registrar").unwrap());
        command.arg(what).arg("--config").arg(self.path("registrar.toml"));
        command
    }

    pub(crate) fn address(&self) -> String {
        format!("127.0.0.1:{}", self.ports[0])
    }

    pub(crate) fn credential(&self) -> OperatorCredential {
        OperatorCredential::load(&self.path("operator.toml")).unwrap()
    }

    pub(crate) fn roots(&self) -> Vec<CertificateDer<'static>> {
        self.credential().trusted().unwrap()
    }

    /// A connection as whoever `pair` says.
    pub(crate) async fn connect_as(&self, pair: &KeyPair) -> Result<Channel, Error> {
        let credentials = Credentials::new(pair, &self.roots())?;
        let config = credentials.client_config(|party| matches!(party, Party::Registrar { .. }), ALPN_H2)?;
        Ok(grpc::connect(&self.address(), Arc::new(config)).await?)
    }

    pub(crate) async fn connect_as_device(&self, device: &Device) -> Channel {
        let accept = |party: &Party| matches!(party, Party::Registrar { .. });
        let config = device.credentials.client_config(accept, ALPN_H2).unwrap();
        grpc::connect(&self.address(), Arc::new(config)).await.unwrap()
    }

    /// A TLS connection with a certificate that [`Credentials`] would not take, up to the first octet.
    pub(crate) async fn raw(&self, pair: &KeyPair) -> Result<(), Error> {
        let provider = muster_common::tls::provider();
        let mut roots = rustls::RootCertStore::empty();
        self.roots().into_iter().try_for_each(|root| roots.add(root))?;
        let mut config = pinned_client_config(self.join.option("ca-hash").unwrap().parse()?)?;
        let key = rustls::sign::CertifiedKey::from_der(pair.chain.clone(), pair.key.clone_key(), &provider)?;
        config.client_auth_cert_resolver = Arc::new(rustls::sign::SingleCertAndKey::from(key));
        let channel = grpc::connect(&self.address(), Arc::new(config)).await?;
        RegistrationServiceClient::new(channel).lookup(by_name("a")).await.map(drop).map_err(|status| {
            assert!(!matches!(status.code(), Code::PermissionDenied | Code::Unauthenticated), "{status}");
            status.into()
        })
    }

    /// Connects as the operator to a server that shows the certificate `pair`.
    pub(crate) async fn connect_to_impostor(&self, pair: &KeyPair) -> Result<Channel, Error> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let config = Credentials::new(pair, &self.roots())?.server_config(ALPN_H2)?;
        let bounds = Bounds { parties: 9, per_device: 9, strangers: 9, strangers_per_source: 9 };
        let _incoming = grpc::incoming(listener, Arc::new(config), bounds, grpc::AcceptMetrics::default());
        let own = Credentials::new(&self.credential().key_pair()?, &self.roots())?;
        let config = own.client_config(|party| matches!(party, Party::Registrar { .. }), ALPN_H2)?;
        Ok(grpc::connect(&address.to_string(), Arc::new(config)).await?)
    }

    pub(crate) async fn operator(&self) -> Channel {
        self.connect_as(&self.credential().key_pair().unwrap()).await.unwrap()
    }

    pub(crate) async fn stranger(&self) -> Channel {
        let pin = self.join.option("ca-hash").unwrap().parse().unwrap();
        let config = Arc::new(pinned_client_config(pin).unwrap());
        grpc::connect(&self.address(), config).await.unwrap()
    }

    /// A join command with a token of a network.
    pub(crate) async fn token(&self, network: &str, reusable: bool) -> JoinCommand {
        let token = admin::Token {
            metadata: Some(ObjectMeta { network: network.into(), ..ObjectMeta::default() }),
            spec: Some(TokenSpec { reusable, ..TokenSpec::default() }),
            status: None,
        };
        let created = TokenServiceClient::new(self.operator().await)
            .create_token(CreateTokenRequest { token: Some(token) })
            .await
            .unwrap();
        self.join.with("token", &created.into_inner().secret)
    }

    /// Devices that have joined and registered, each with its client.
    pub(crate) async fn devices(&self, names: &[&str]) -> Vec<(Device, RegistrationServiceClient<Channel>)> {
        let join = self.token("default", true).await;
        let mut devices = Vec::new();
        for (name, number) in names.iter().zip(1..) {
            let device = Device::join(&join, name).await.unwrap();
            let mut client = device.connect().await.unwrap();
            client.register(register_request(number, number.try_into().unwrap())).await.unwrap();
            devices.push((device, client));
        }
        devices
    }

    pub(crate) async fn revoke(&self, name: &str) {
        let device = admin::Device {
            metadata: Some(ObjectMeta {
                network: "default".into(),
                name: name.into(),
                ..ObjectMeta::default()
            }),
            spec: Some(admin::DeviceSpec { revoked: true, ..admin::DeviceSpec::default() }),
            status: None,
        };
        let update_mask = Some(pbjson_types::FieldMask { paths: vec!["spec.revoked".into()] });
        DeviceServiceClient::new(self.operator().await)
            .update_device(UpdateDeviceRequest { device: Some(device), update_mask })
            .await
            .unwrap();
    }

    pub(crate) async fn delete(&self, name: &str) {
        let request =
            DeleteDeviceRequest { network: "default".into(), name: name.into(), resource_version: 0 };
        DeviceServiceClient::new(self.operator().await).delete_device(request).await.unwrap();
    }

    /// A certificate that the deployment's own CA has signed, with whatever is wrong in it.
    pub(crate) fn forge(&self, change: impl FnOnce(&mut CertificateParams)) -> KeyPair {
        let read = |file: &str| std::fs::read_to_string(self.path("data").join(file)).unwrap();
        let issuer = Issuer::from_ca_cert_pem(&read("ca.crt"), Key::from_pem(&read("ca.key")).unwrap());
        let key = Key::generate().unwrap();
        let mut params = CertificateParams::default();
        change(&mut params);
        let certificate = params.signed_by(&key, &issuer.unwrap()).unwrap();
        KeyPair {
            chain: [vec![certificate.der().clone()], self.roots()].concat(),
            key: PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
        }
    }

    pub(crate) fn resident_kib(&self) -> u64 {
        let id = self.process.as_ref().unwrap().id();
        let text = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap();
        let line = text.lines().find(|line| line.starts_with("VmRSS")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    pub(crate) fn log(&self) -> String {
        self.process.as_ref().unwrap().log()
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        let log = self.log();
        assert!(!log.contains("panicked") || std::thread::panicking(), "{log}");
    }
}

fn free_ports() -> [u16; 4] {
    let held = [(); 4].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    held.map(|listener| listener.local_addr().unwrap().port())
}

pub(crate) fn uri(id: &str) -> SanType {
    SanType::URI(id.try_into().unwrap())
}

pub(crate) fn list() -> ListDevicesRequest {
    ListDevicesRequest { network: "default".into(), ..ListDevicesRequest::default() }
}

pub(crate) fn by_name(name: &str) -> LookupRequest {
    LookupRequest { by: Some(By::Name(name.into())) }
}

pub(crate) async fn enroll(site: &Site, token: &str, csr: Vec<u8>, name: &str) -> Result<String, Status> {
    let request = EnrollRequest {
        token: token.into(),
        certificate_request: csr,
        name: name.into(),
        party: String::new(),
    };
    let client = EnrollmentServiceClient::new(site.stranger().await);
    client.clone().enroll(request).await.map(|response| response.into_inner().device_uid)
}

/// An open session.
pub(crate) struct Session {
    sender: mpsc::Sender<SessionRequest>,
    stream: Streaming<SessionResponse>,
    /// How many messages have come.
    pub(crate) told: usize,
}

impl Session {
    pub(crate) async fn open(
        client: &mut RegistrationServiceClient<Channel>,
        revision: u64,
        held: &[&str],
    ) -> Result<Self, Status> {
        let (sender, receiver) = mpsc::channel(1024);
        let held_peer_uids = held.iter().map(|uid| (*uid).to_owned()).collect();
        let hello = session_request::Message::Hello(SessionHello {
            revision,
            held_peer_uids,
            ..SessionHello::default()
        });
        sender.send(SessionRequest { message: Some(hello) }).await.unwrap();
        let stream = ReceiverStream::new(receiver);
        Ok(Self { sender, stream: client.session(stream).await?.into_inner(), told: 0 })
    }

    pub(crate) async fn send(&self, message: session_request::Message) {
        let _ = self.sender.send(SessionRequest { message: Some(message) }).await;
    }

    pub(crate) async fn next(&mut self) -> Result<Option<Message>, Status> {
        let next = tokio::time::timeout(PATIENCE, self.stream.message()).await;
        self.told += 1;
        next.expect("nothing came").map(|response| response.map(|response| response.message.unwrap()))
    }

    /// Reads up to the first message that is wanted.
    pub(crate) async fn until<T>(&mut self, wanted: impl Fn(&Message) -> Option<T>) -> T {
        loop {
            let message = self.next().await.unwrap().expect("the session has ended");
            if let Some(found) = wanted(&message) {
                return found;
            }
        }
    }

    pub(crate) async fn bookmark(&mut self) -> u64 {
        self.until(|message| match message {
            Message::Bookmark(bookmark) => Some(bookmark.revision),
            _ => None,
        })
        .await
    }

    /// Reads to the end.
    pub(crate) async fn end(&mut self) -> Status {
        loop {
            match self.next().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("the session ended without a status"),
                Err(status) => return status,
            }
        }
    }
}
