//! The connection to one registrar, as the control core wants it: Register, the session stream, lookups and renewal,
//! each call in a task of its own, its outcome an [`Event`].

use std::{future::Future, sync::Arc, time::Duration};

use muster_common::grpc;
use muster_proto::registration::{
    DeregisterRequest, LookupRequest, RegisterRequest, RegisterResponse, SessionHello, SessionRequest,
    SessionResponse, lookup_request::By, registration_service_client::RegistrationServiceClient,
    session_request,
};
use rustls::ClientConfig;
use tokio::{sync::mpsc, task::JoinSet};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, transport::Channel};

use crate::{
    control::{Failure, LookupBy, LookupResult},
    renewal::{self, Renewed},
};

/// How long a registrar may take to connect and answer Register.
const REGISTER_TIMEOUT: Duration = Duration::from_secs(20);
/// How long it may take to answer any other call.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// Messages that may wait to be sent on a session; a registrar that is further behind is left.
const OUTGOING: usize = 64;
/// Events that may wait for the run loop.
const EVENTS: usize = 64;

/// What has come of a call.
#[derive(Debug)]
pub enum Event {
    /// Of Register.
    Registered {
        /// The attempt it belongs to.
        attempt: u64,
        /// The registrar's answer.
        result: Result<Box<RegisterResponse>, Failure>,
    },
    /// The session is open.
    Opened {
        /// The attempt it belongs to.
        attempt: u64,
    },
    /// A message on the session.
    Message {
        /// The attempt it belongs to.
        attempt: u64,
        /// The message.
        message: Box<SessionResponse>,
    },
    /// The session has ended.
    Closed {
        /// The attempt it belongs to.
        attempt: u64,
        /// Why.
        failure: Failure,
    },
    /// Of Lookup.
    LookedUp {
        /// The lookup.
        id: u64,
        /// What it found.
        result: LookupResult,
    },
    /// Of Renew.
    Renewed(Result<Box<Renewed>, String>),
}

/// A connection in the making, or made.
#[derive(Debug)]
pub struct Session {
    tls: Arc<ClientConfig>,
    events: mpsc::Sender<Internal>,
    received: mpsc::Receiver<Internal>,
    attempt: u64,
    channel: Option<Channel>,
    outgoing: Option<mpsc::Sender<SessionRequest>>,
    tasks: JoinSet<()>,
}

#[derive(Debug)]
enum Internal {
    Connected { attempt: u64, channel: Channel, response: Box<RegisterResponse> },
    Event(Event),
}

impl Session {
    /// No connection yet. `tls` must resolve the device's certificate anew for each connection.
    pub fn new(tls: Arc<ClientConfig>) -> Self {
        let (events, received) = mpsc::channel(EVENTS);
        Self { tls, events, received, attempt: 0, channel: None, outgoing: None, tasks: JoinSet::new() }
    }

    /// The next event. Safe to be dropped before it is ready.
    pub async fn next(&mut self) -> Event {
        loop {
            let received = tokio::select! {
                received = self.received.recv() => received,
                // Reaps what has finished.
                Some(_) = self.tasks.join_next() => continue,
            };
            match received {
                Some(Internal::Connected { attempt, channel, response }) if attempt == self.attempt => {
                    self.channel = Some(channel);
                    return Event::Registered { attempt, result: Ok(response) };
                }
                Some(Internal::Event(event)) => return event,
                // Of an attempt that has been given up. The channel cannot end: we hold a sender.
                Some(Internal::Connected { .. }) | None => {}
            }
        }
    }

    /// Connects to `registrar` and calls Register.
    pub fn register(&mut self, attempt: u64, registrar: String, request: RegisterRequest) {
        self.attempt = attempt;
        let tls = Arc::clone(&self.tls);
        let registering = async move {
            let unavailable = |e: grpc::ChannelError| Failure::Unavailable(e.to_string());
            let channel = grpc::connect(&registrar, tls).await.map_err(unavailable)?;
            let mut client = RegistrationServiceClient::new(channel.clone());
            let response = client.register(request).await.map_err(|status| failure(&registrar, &status))?;
            Ok((channel, response.into_inner()))
        };
        self.spawn(async move {
            let result = match tokio::time::timeout(REGISTER_TIMEOUT, registering).await {
                Ok(result) => result,
                Err(_) => {
                    Err(Failure::Unavailable(format!("no answer within {} s", REGISTER_TIMEOUT.as_secs())))
                }
            };
            match result {
                Ok((channel, response)) => {
                    Internal::Connected { attempt, channel, response: response.into() }
                }
                Err(failure) => Internal::Event(Event::Registered { attempt, result: Err(failure) }),
            }
        });
    }

    /// Opens the session stream on the connection of Register.
    pub fn open(&mut self, attempt: u64, hello: SessionHello) {
        let Some(channel) = self.channel.clone() else { return };
        let (outgoing, messages) = mpsc::channel(OUTGOING);
        let hello = SessionRequest { message: Some(session_request::Message::Hello(hello)) };
        // Cannot fail: there is room.
        let _ = outgoing.try_send(hello);
        self.outgoing = Some(outgoing);
        let events = self.events.clone();
        self.tasks.spawn(async move {
            let failure = run_session(attempt, channel, messages, &events).await;
            let _ = events.send(Internal::Event(Event::Closed { attempt, failure })).await;
        });
    }

    /// Sends `message` on the session. If the registrar does not take it, the session ends.
    pub fn send(&mut self, message: SessionRequest) {
        let Some(outgoing) = &self.outgoing else { return };
        if outgoing.try_send(message).is_err() {
            // Ends the stream; the registrar closes it, and the core opens another with everything in its hello.
            self.outgoing = None;
        }
    }

    /// Calls Lookup.
    pub fn look_up(&mut self, id: u64, by: LookupBy) {
        let Some(channel) = self.channel.clone() else { return };
        let by = match by {
            LookupBy::Address(address) => By::VirtualAddress(address.to_string()),
            LookupBy::PublicKey(key) => By::PublicKey(key.to_vec()),
        };
        self.spawn(async move {
            let mut client = RegistrationServiceClient::new(channel);
            let call = client.lookup(LookupRequest { by: Some(by) });
            let result = match tokio::time::timeout(CALL_TIMEOUT, call).await {
                Ok(Ok(response)) => match response.into_inner().peer {
                    Some(peer) => LookupResult::Found(Box::new(peer)),
                    None => LookupResult::NotFound,
                },
                Ok(Err(status)) if matches!(status.code(), Code::NotFound | Code::PermissionDenied) => {
                    LookupResult::NotFound
                }
                Ok(Err(status)) => {
                    tracing::debug!(status = grpc::words(&status), "lookup failed");
                    LookupResult::Unavailable
                }
                Err(_) => LookupResult::Unavailable,
            };
            Internal::Event(Event::LookedUp { id, result })
        });
    }

    /// Calls Renew with a new key.
    pub fn renew(&mut self, device_uid: String) {
        let channel = self.channel.clone();
        self.spawn(async move {
            let renewing = async {
                let channel = channel.ok_or("there is no connection to a registrar")?;
                renewal::renew(channel, &device_uid).await.map(Box::new).map_err(|e| e.to_string())
            };
            let result = tokio::time::timeout(CALL_TIMEOUT * 4, renewing)
                .await
                .unwrap_or_else(|_| Err("no answer".to_owned()));
            Internal::Event(Event::Renewed(result))
        });
    }

    /// Closes connection and session of `attempt`.
    pub fn disconnect(&mut self, attempt: u64) {
        if attempt == self.attempt {
            self.tasks.abort_all();
            self.channel = None;
            self.outgoing = None;
        }
    }

    /// The connection, if there is one.
    pub fn channel(&self) -> Option<Channel> {
        self.channel.clone()
    }

    fn spawn(&mut self, task: impl Future<Output = Internal> + Send + 'static) {
        let events = self.events.clone();
        self.tasks.spawn(async move {
            let outcome = task.await;
            let _ = events.send(outcome).await;
        });
    }
}

/// Runs the stream until it ends, and says why.
async fn run_session(
    attempt: u64,
    channel: Channel,
    messages: mpsc::Receiver<SessionRequest>,
    events: &mpsc::Sender<Internal>,
) -> Failure {
    let mut client = RegistrationServiceClient::new(channel);
    let mut stream = match client.session(ReceiverStream::new(messages)).await {
        Ok(response) => response.into_inner(),
        Err(status) => return failure("the registrar", &status),
    };
    if events.send(Internal::Event(Event::Opened { attempt })).await.is_err() {
        return Failure::Unavailable("the agent is stopping".into());
    }
    loop {
        match stream.message().await {
            Ok(Some(message)) => {
                if events
                    .send(Internal::Event(Event::Message { attempt, message: Box::new(message) }))
                    .await
                    .is_err()
                {
                    return Failure::Unavailable("the agent is stopping".into());
                }
            }
            Ok(None) => return Failure::Unavailable("the registrar has closed the session".into()),
            Err(status) => return failure("the registrar", &status),
        }
    }
}

fn failure(registrar: &str, status: &Status) -> Failure {
    match status.code() {
        Code::PermissionDenied | Code::Unauthenticated | Code::NotFound => {
            Failure::Refused(status.message().to_owned())
        }
        _ => Failure::Unavailable(format!("{registrar}: {}", grpc::words(status))),
    }
}

/// Why the registrar has not released the device.
#[derive(Debug, thiserror::Error)]
pub enum DeregisterError {
    /// None could be asked.
    #[error("no registrar can be told: {0}")]
    Unavailable(String),
    /// It says no.
    #[error("the registrar refuses this device: {0}")]
    Refused(String),
}

/// Gives name and addresses back, over `channel` or through the first of `registrars` that answers.
pub async fn deregister(
    channel: Option<Channel>,
    registrars: &[String],
    tls: &Arc<ClientConfig>,
) -> Result<(), DeregisterError> {
    let mut last = "none is known".to_owned();
    let addresses = registrars.iter().map(Some);
    let candidates =
        channel.map(|channel| (Some(channel), None)).into_iter().chain(addresses.map(|a| (None, a)));
    for (channel, address) in candidates {
        let calling = async {
            let channel = match (channel, address) {
                (Some(channel), _) => channel,
                (None, Some(address)) => grpc::connect(address, Arc::clone(tls))
                    .await
                    .map_err(|e| DeregisterError::Unavailable(e.to_string()))?,
                (None, None) => return Err(DeregisterError::Unavailable("none is known".into())),
            };
            match RegistrationServiceClient::new(channel).deregister(DeregisterRequest {}).await {
                Ok(_) => Ok(()),
                // Deleted by the operator: there is nothing to give back.
                Err(status) if status.code() == Code::NotFound => Ok(()),
                Err(status) => match failure("the registrar", &status) {
                    Failure::Unavailable(reason) => Err(DeregisterError::Unavailable(reason)),
                    Failure::Refused(reason) => Err(DeregisterError::Refused(reason)),
                },
            }
        };
        match tokio::time::timeout(CALL_TIMEOUT, calling).await {
            Ok(Err(DeregisterError::Unavailable(reason))) => last = reason,
            Ok(decided) => return decided,
            Err(_) => last = format!("no answer within {} s", CALL_TIMEOUT.as_secs()),
        }
    }
    Err(DeregisterError::Unavailable(last))
}
