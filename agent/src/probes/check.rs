//! One check of an endpoint: over TCP, HTTP, gRPC, or by a command.

use std::{io, net::IpAddr, process::Stdio};

use muster_proto::admin::{ExecAction, GrpcAction, Probe};
use tokio::{net::TcpStream, process::Command};
use tonic::transport::Endpoint;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::http;

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
    /// The path cannot be part of a URL.
    #[error("cannot make the request: {0}")]
    Url(#[from] url::ParseError),
    /// It redirects without end.
    #[error("it redirects more than {0} times")]
    Redirects(usize),
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
        Probe { http_get: Some(get), .. } => http::get(get, address).await,
        Probe { grpc: Some(action), .. } => grpc(action, address).await,
        Probe { exec: Some(_), .. } if !may_exec => Err(CheckError::ExecNotAllowed),
        Probe { exec: Some(action), .. } => exec(action).await,
        _ => Err(CheckError::Unknown),
    }
}

/// The registrar has put numbers in the place of names.
pub(super) fn port(text: &str) -> Result<u16, CheckError> {
    text.parse().map_err(|_| CheckError::Unknown)
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
