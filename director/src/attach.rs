//! What agents ask of a director: to be attached, and to have their frames taken by a stream where UDP is blocked.
//! The device is the one in the client certificate.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use muster_common::{grpc::Caller, identity::Party, name::Label};
use muster_net::UdpSockets;
use muster_proto::{
    admin::Endpoint,
    director::{
        AttachRequest, AttachResponse, Attached, RelayRequest, attach_response,
        relay_service_server::RelayService,
    },
};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};
use uuid::Uuid;

use crate::{
    hub::{Admitted, Hub},
    relay::AttachError,
    stream::{Down, Up},
};

/// How long a client may take over its first message.
const FIRST_MESSAGE: Duration = Duration::from_secs(10);

/// The service, for one network.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    pub(crate) hub: Arc<Hub>,
    /// From which frames of streams leave.
    pub(crate) sockets: Arc<UdpSockets>,
    pub(crate) network: Label,
    pub(crate) endpoints: Arc<[Endpoint]>,
    pub(crate) hello_interval: Duration,
}

impl Service {
    /// The device that calls, and from where.
    fn caller<T>(&self, request: &Request<T>) -> Result<(Uuid, std::net::IpAddr), Status> {
        let caller = request.extensions().get::<Caller>();
        let caller = caller.ok_or_else(|| Status::internal("the connection does not say who calls"))?;
        let Some(identity) = &caller.identity else {
            return Err(Status::unauthenticated("a director takes devices with a certificate alone"));
        };
        match &identity.party {
            Party::Device { network, uid } if *network == self.network => {
                let uid = uid.as_str().parse().map_err(|_| {
                    Status::permission_denied(format!("{uid} is not the uid of a device; join again"))
                })?;
                Ok((uid, caller.address.ip()))
            }
            party => Err(Status::permission_denied(format!(
                "this director serves devices of network {}, not {party}",
                self.network
            ))),
        }
    }
}

/// The first message of a stream, which must come soon.
async fn first<T>(stream: &mut Streaming<T>) -> Result<T, Status> {
    match tokio::time::timeout(FIRST_MESSAGE, stream.message()).await {
        Ok(Ok(Some(message))) => Ok(message),
        Ok(Ok(None)) => Err(Status::invalid_argument("the stream ended before its first message")),
        Ok(Err(status)) => Err(status),
        Err(_) => Err(Status::deadline_exceeded("no first message came")),
    }
}

fn refusal(error: AttachError) -> Status {
    let text = error.to_string();
    match error {
        AttachError::Refused => Status::permission_denied(text),
        AttachError::Full | AttachError::HandleTaken | AttachError::TooOften => {
            Status::resource_exhausted(text)
        }
        AttachError::Draining => Status::unavailable(text),
    }
}

#[tonic::async_trait]
impl RelayService for Service {
    type AttachStream = Attachment;
    type RelayStream = Down;

    async fn attach(
        &self,
        request: Request<Streaming<AttachRequest>>,
    ) -> Result<Response<Attachment>, Status> {
        let (device, from) = self.caller(&request)?;
        let mut requests = request.into_inner();
        let hello = first(&mut requests).await?;
        let Admitted { attached, sender, messages } = self.hub.attach(device, from).map_err(refusal)?;
        let session = attached.session;
        // From here on, dropping it detaches.
        let attachment = Attachment { hub: self.hub.clone(), session, messages };
        let told = Attached {
            session,
            key: attached.key.to_vec(),
            handle: attached.handle.0,
            endpoints: self.endpoints.to_vec(),
            hello_interval: Some(pbjson_types::Duration {
                seconds: i64::try_from(self.hello_interval.as_secs()).unwrap_or(i64::MAX),
                nanos: i32::try_from(self.hello_interval.subsec_nanos()).unwrap_or(0),
            }),
        };
        let message = AttachResponse { message: Some(attach_response::Message::Attached(told)) };
        let _ = sender.try_send(Ok(message));
        tracing::debug!(%device, %from, agent = %hello.agent_version, "attached");
        // The device detaches by ending its own side, too.
        let hub = self.hub.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = async { while let Ok(Some(_)) = requests.message().await {} } => {}
                () = sender.closed() => {}
            }
            hub.detach(session);
        });
        Ok(Response::new(attachment))
    }

    async fn relay(&self, request: Request<Streaming<RelayRequest>>) -> Result<Response<Down>, Status> {
        let (device, _) = self.caller(&request)?;
        let mut requests = request.into_inner();
        let opening = first(&mut requests).await?;
        let opened = self.hub.open_stream(opening.session, device).ok_or_else(|| {
            Status::not_found("the device has no such session here; attach first, or again")
        })?;
        tracing::debug!(%device, "frames go by a stream");
        let up = Up {
            hub: self.hub.clone(),
            sockets: self.sockets.clone(),
            session: opening.session,
            device,
            notices: opened.notices,
        };
        tokio::spawn(up.run(opening.frames, requests, opened.over));
        Ok(Response::new(Down::new(opened.frames)))
    }
}

/// What an attached device is told. It is attached for as long as this lives.
#[derive(Debug)]
pub(crate) struct Attachment {
    hub: Arc<Hub>,
    session: u32,
    messages: mpsc::Receiver<Result<AttachResponse, Status>>,
}

impl Stream for Attachment {
    type Item = Result<AttachResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.messages.poll_recv(cx)
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.hub.detach(self.session);
    }
}
