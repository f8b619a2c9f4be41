//! Frames to and from a director over TCP, where UDP is blocked: batches of them are the messages of a gRPC stream.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use muster_common::grpc;
use muster_proto::director::{RelayRequest, relay_service_client::RelayServiceClient};
use muster_tunnel::DirectorId;
use rustls::ClientConfig;
use tokio::sync::mpsc;
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};

use super::attach::connect;
use crate::{
    control::DirectorTarget,
    datapath::{Command, FrameSender, Handle},
};

/// Batches that may wait to be sent; what is more is lost, as a full socket's datagrams are.
const OUTGOING: usize = 64;
/// How long a director may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Carries frames of attachment `session` until the stream ends; says why it has ended.
pub(super) async fn carry(
    id: DirectorId,
    session: u32,
    target: &DirectorTarget,
    tls: Result<Arc<ClientConfig>, String>,
    datapath: &Handle,
) -> String {
    let (batches, outgoing) = mpsc::channel::<Bytes>(OUTGOING);
    let first = RelayRequest { session, frames: Bytes::new() };
    let more = ReceiverStream::new(outgoing).map(|frames| RelayRequest { session: 0, frames });
    let opening = async {
        let channel = connect(&target.addresses, &tls?).await?;
        let mut client = RelayServiceClient::new(channel);
        let call = client.relay(tokio_stream::once(first).chain(more));
        match tokio::time::timeout(ANSWER_TIMEOUT, Box::pin(call)).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(grpc::words(&status)),
            Err(_) => Err(format!("no answer within {} s", ANSWER_TIMEOUT.as_secs())),
        }
    };
    let mut incoming = match opening.await {
        Ok(incoming) => incoming,
        Err(reason) => return reason,
    };
    let stopped = || "the data plane has stopped".to_owned();
    let stream = Some(FrameSender(batches));
    if datapath.send(Command::SetStream { id, stream }).await.is_err() {
        return stopped();
    }
    let reason = loop {
        match incoming.message().await {
            Ok(Some(response)) => {
                if datapath.frames(id, response.frames).await.is_err() {
                    break stopped();
                }
            }
            Ok(None) => break "the director has ended the stream".to_owned(),
            Err(status) => break grpc::words(&status),
        }
    };
    let _ = datapath.send(Command::SetStream { id, stream: None }).await;
    reason
}
