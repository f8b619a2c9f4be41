//! One check of an endpoint: over TCP, HTTP, gRPC, or by a command.

use std::{io, net::IpAddr, process::Stdio, sync::Arc};

use http_body_util::Empty;
use hyper::{Request, client::conn::http1};
use hyper_util::rt::TokioIo;
use muster_proto::admin::{ExecAction, GrpcAction, HttpGetAction, Probe};
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    process::Command,
};
use tokio_rustls::TlsConnector;
use tonic::transport::Endpoint;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

/// Why an endpoint is not ready.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// There is no connection.
    #[error("cannot connect: {0}")]
    Connect(#[from] io::Error),
    /// The answer is no HTTP.
    #[error("it does not speak HTTP: {0}")]
    Http(#[from] hyper::Error),
    /// The request cannot be made.
    #[error("cannot make the request: {0}")]
    Request(#[from] hyper::http::Error),
    /// There is no TLS.
    #[error("cannot set up TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// The answer has another status.
    #[error("it answers with status {0}")]
    Status(u16),
    /// There is no connection for gRPC.
    #[error("cannot connect: {0}")]
    Transport(#[from] tonic::transport::Error),
    /// The health service fails.
    #[error("its health service says: {0}")]
    Grpc(#[from] Box<tonic::Status>),
    /// The health service says something else than SERVING.
    #[error("its health is {0}")]
    Health(&'static str),
    /// The command fails.
    #[error("the command ends with {0}")]
    Exit(std::process::ExitStatus),
    /// Commands are not run here.
    #[error("this host runs no commands as probes; set services.exec_probes = true if it should")]
    ExecNotAllowed,
    /// What is to be done is not known here.
    #[error("this agent does not know the action; update it")]
    Unknown,
    /// It takes too long.
    #[error("no answer within {0} s")]
    Timeout(u32),
}

/// Checks an endpoint at `address` once; takes as long as that takes.
///
/// # Errors
/// If it is not ready.
pub async fn check(probe: &Probe, address: IpAddr, may_exec: bool) -> Result<(), CheckError> {
    match probe {
        Probe { tcp_socket: Some(socket), .. } => {
            TcpStream::connect((address, port(&socket.port)?)).await?;
            Ok(())
        }
        Probe { http_get: Some(get), .. } => http(get, address).await,
        Probe { grpc: Some(action), .. } => grpc(action, address).await,
        Probe { exec: Some(_), .. } if !may_exec => Err(CheckError::ExecNotAllowed),
        Probe { exec: Some(action), .. } => exec(action).await,
        _ => Err(CheckError::Unknown),
    }
}

/// The registrar has put numbers in the place of names.
fn port(text: &str) -> Result<u16, CheckError> {
    text.parse().map_err(|_| CheckError::Unknown)
}

async fn http(get: &HttpGetAction, address: IpAddr) -> Result<(), CheckError> {
    let port = port(&get.port)?;
    let stream = TcpStream::connect((address, port)).await?;
    let authority = match address {
        IpAddr::V4(v4) => format!("{v4}:{port}"),
        IpAddr::V6(v6) => format!("[{v6}]:{port}"),
    };
    if get.scheme == "HTTPS" {
        let name = ServerName::IpAddress(address.into());
        let stream = TlsConnector::from(any_certificate()?).connect(name, stream).await?;
        return ask(get, &authority, stream).await;
    }
    ask(get, &authority, stream).await
}

async fn ask<S>(get: &HttpGetAction, authority: &str, stream: S) -> Result<(), CheckError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let mut request =
        Request::get(&*get.path).header("user-agent", concat!("muster-probe/", env!("CARGO_PKG_VERSION")));
    let has_host = get.http_headers.iter().any(|header| header.name.eq_ignore_ascii_case("host"));
    if !has_host {
        request = request.header("host", authority);
    }
    for header in &get.http_headers {
        request = request.header(&*header.name, &*header.value);
    }
    let request = request.body(Empty::<&[u8]>::new())?;
    let mut answer = std::pin::pin!(sender.send_request(request));
    // The connection makes progress while it is polled. If it ends first, the answer is there, or never comes.
    let answer = tokio::select! {
        biased;
        answer = &mut answer => answer?,
        _ = connection => answer.await?,
    };
    let status = answer.status().as_u16();
    if (200..400).contains(&status) { Ok(()) } else { Err(CheckError::Status(status)) }
}

async fn grpc(action: &GrpcAction, address: IpAddr) -> Result<(), CheckError> {
    let port = u16::try_from(action.port).map_err(|_| CheckError::Unknown)?;
    let authority = std::net::SocketAddr::new(address, port);
    let channel = Endpoint::from_shared(format!("http://{authority}"))?.connect().await?;
    let request = HealthCheckRequest { service: action.service.clone() };
    let answer = HealthClient::new(channel).check(request).await.map_err(Box::new)?;
    match answer.into_inner().status() {
        ServingStatus::Serving => Ok(()),
        ServingStatus::NotServing => Err(CheckError::Health("NOT_SERVING")),
        ServingStatus::ServiceUnknown => Err(CheckError::Health("SERVICE_UNKNOWN")),
        ServingStatus::Unknown => Err(CheckError::Health("UNKNOWN")),
    }
}

async fn exec(action: &ExecAction) -> Result<(), CheckError> {
    let [program, arguments @ ..] = &*action.command else { return Err(CheckError::Unknown) };
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let status = command.kill_on_drop(true).status().await?;
    if status.success() { Ok(()) } else { Err(CheckError::Exit(status)) }
}

/// TLS to whoever is there: a probe asks whether something answers, and tells it nothing.
fn any_certificate() -> Result<Arc<ClientConfig>, rustls::Error> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = Arc::new(AnyCertificate(provider.clone()));
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    Ok(Arc::new(config.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth()))
}

#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
