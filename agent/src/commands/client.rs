//! A connection to the running agent, over its Unix socket.

use std::{io, path::Path, sync::Mutex, sync::PoisonError};

use muster_common::grpc;
use muster_proto::agent::agent_service_client::AgentServiceClient;
use tokio::net::UnixStream;
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};

/// Why the agent cannot be asked.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClientError {
    /// Nobody listens.
    #[error(
        "the agent is not running: nobody answers at {0}\nremedy: start it with `systemctl start muster-agent` or `muster-agent run`, or name its configuration with --config"
    )]
    NotRunning(String),
    /// Not for everybody.
    #[error("cannot open the agent's socket {0}: permission denied\nremedy: run this command as root")]
    Permission(String),
    /// Anything else.
    #[error("cannot connect to the agent at {path}: {reason}")]
    Other { path: String, reason: String },
}

/// Connects to the agent that listens at `path`.
pub(super) async fn connect(path: &Path) -> Result<AgentServiceClient<Channel>, ClientError> {
    let shown = path.display().to_string();
    let stream = UnixStream::connect(path).await.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ClientError::NotRunning(shown.clone()),
        io::ErrorKind::PermissionDenied => ClientError::Permission(shown.clone()),
        _ => ClientError::Other { path: shown.clone(), reason: error.to_string() },
    })?;
    let stream = Mutex::new(Some(stream));
    let connector = tower::service_fn(move |_: tonic::codegen::http::Uri| {
        let stream = stream.lock().unwrap_or_else(PoisonError::into_inner).take();
        // One connection is all that a command needs.
        std::future::ready(
            stream
                .map(hyper_util::rt::TokioIo::new)
                .ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected)),
        )
    });
    let channel = Endpoint::from_static("http://agent").connect_with_connector(connector).await;
    let channel = channel.map_err(|e| ClientError::Other { path: shown, reason: grpc::chain(&e) })?;
    Ok(AgentServiceClient::new(channel))
}

/// The agent's refusal as an error of this command.
pub(super) fn refused(status: &Status) -> anyhow::Error {
    let message = status.message();
    anyhow::anyhow!("{}", if message.is_empty() { grpc::chain(status) } else { message.to_owned() })
}
