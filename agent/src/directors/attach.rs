//! Attachments to directors, as the control core wants them: each a task that holds a stream open, its outcome a
//! [`DirectorEvent`].

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use futures_util::stream::{FuturesUnordered, StreamExt};
use muster_common::{
    frame, grpc,
    identity::Party,
    time::Instant,
    tls::{ALPN_H2, Credentials},
};
use muster_proto::director::{
    AttachRequest, AttachResponse, Attached, attach_response::Message,
    relay_service_client::RelayServiceClient,
};
use muster_tunnel::DirectorId;
use rustls::ClientConfig;
use tokio::{
    sync::mpsc,
    task::{AbortHandle, JoinSet},
};
use tonic::{Code, Status, Streaming, transport::Channel};
use zeroize::Zeroizing;

use super::{flow::Attachment, stream};
use crate::{
    control::{DirectorEvent, DirectorTarget, Failure},
    datapath::Handle,
};

/// How long one address of a director may take to accept a connection, TLS handshake and proxy included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(8);
/// The next address is tried when one has not answered after this, and then both may: a port may be blocked.
const HEAD_START: Duration = Duration::from_millis(750);
/// What a director may send ahead: a round trip of a tenth of a second filled at 600 Mbit/s.
const WINDOW: u32 = 8 << 20;
/// How long a director may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Events that may wait for the run loop.
const EVENTS: usize = 64;
/// Unless the director says otherwise.
const HELLO_INTERVAL: Duration = Duration::from_secs(15);
/// UDP endpoints that a director may name.
const MAX_ENDPOINTS: usize = 4;

/// The attachments there are, and those in the making.
#[derive(Debug)]
pub struct Attachments {
    own: Own,
    events: mpsc::Sender<DirectorEvent>,
    received: mpsc::Receiver<DirectorEvent>,
    running: BTreeMap<DirectorId, AbortHandle>,
    /// The attempt that there is an attachment of, and its session.
    sessions: BTreeMap<DirectorId, (u64, u32)>,
    streams: BTreeMap<DirectorId, AbortHandle>,
    tasks: JoinSet<()>,
}

/// Who attaches.
#[derive(Clone, Debug)]
struct Own {
    credentials: Arc<Credentials>,
    network: String,
    handle: Option<frame::Handle>,
    version: &'static str,
}

impl Attachments {
    /// None yet. `credentials` are those of the device `uid` of `network`.
    pub fn new(credentials: Arc<Credentials>, network: &str, uid: &str, version: &'static str) -> Self {
        let (events, received) = mpsc::channel(EVENTS);
        let handle = uid.parse().ok().map(|uid: uuid::Uuid| frame::Handle::of_device(uid.as_bytes()));
        let own = Own { credentials, network: network.to_owned(), handle, version };
        Self {
            own,
            events,
            received,
            running: BTreeMap::new(),
            sessions: BTreeMap::new(),
            streams: BTreeMap::new(),
            tasks: JoinSet::new(),
        }
    }

    /// The next event. Safe to be dropped before it is ready.
    pub async fn next(&mut self) -> DirectorEvent {
        loop {
            tokio::select! {
                // It cannot end: we hold a sender.
                Some(event) = self.received.recv() => {
                    if let DirectorEvent::Attached { id, attempt, attachment, .. } = &event {
                        self.sessions.insert(*id, (*attempt, attachment.session));
                    }
                    return event;
                }
                // Reaps what has finished.
                Some(_) = self.tasks.join_next() => {}
            }
        }
    }

    /// Attaches to `target`. An older attachment is held until this one is there, so that nothing gets lost meanwhile.
    pub fn attach(&mut self, id: DirectorId, attempt: u64, target: DirectorTarget) {
        let (own, events) = (self.own.clone(), self.events.clone());
        let before = Guard(self.running.remove(&id));
        let task = self.tasks.spawn(async move {
            let failure = hold(&own, id, attempt, &target, before, &events).await;
            let _ = events.send(DirectorEvent::Closed { id, attempt, failure }).await;
        });
        self.running.insert(id, task);
    }

    /// Gives up the attachment, if there is one.
    pub fn detach(&mut self, id: DirectorId) {
        drop(Guard(self.running.remove(&id)));
        self.sessions.remove(&id);
        self.close_stream(id);
    }

    /// Carries frames of the attachment of `attempt` over TCP.
    pub fn open_stream(&mut self, id: DirectorId, attempt: u64, target: DirectorTarget, datapath: Handle) {
        let session = self.sessions.get(&id).filter(|(of, _)| *of == attempt).map(|(_, session)| *session);
        let (tls, events) = (self.own.tls(&target), self.events.clone());
        self.close_stream(id);
        let task = self.tasks.spawn(async move {
            let reason = match session {
                Some(session) => stream::carry(id, session, &target, tls, &datapath).await,
                None => "there is no attachment".to_owned(),
            };
            let _ = events.send(DirectorEvent::StreamClosed { id, attempt, reason }).await;
        });
        self.streams.insert(id, task);
    }

    /// Frames need not go over TCP any more. The data plane is to be told by the caller.
    pub fn close_stream(&mut self, id: DirectorId) {
        drop(Guard(self.streams.remove(&id)));
    }
}

/// Ends a task when it is dropped.
#[derive(Debug)]
struct Guard(Option<AbortHandle>);

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

impl Own {
    /// A director that the registrar has taken out of the configuration is refused although its certificate is valid,
    /// and so is one of another network.
    fn tls(&self, target: &DirectorTarget) -> Result<Arc<ClientConfig>, String> {
        let (network, uid) = (self.network.clone(), target.uid.clone());
        let accept = move |party: &Party| {
            matches!(party, Party::Director { network: of, uid: its }
                if of.as_str() == network && its.as_str() == uid)
        };
        self.credentials.client_config(accept, ALPN_H2).map(Arc::new).map_err(|error| error.to_string())
    }
}

/// Connects to the first of `addresses` that answers, each with a head start before the next (as RFC 8305 has it).
pub(super) async fn connect(addresses: &[SocketAddr], tls: &Arc<ClientConfig>) -> Result<Channel, String> {
    let options = grpc::Options { within: CONNECT_TIMEOUT, window: WINDOW };
    let dial = |address: &SocketAddr| {
        let (address, tls) = (address.to_string(), Arc::clone(tls));
        async move { grpc::connect_with(&address, tls, options).await.map_err(|error| error.to_string()) }
    };
    first_of(addresses.iter().map(dial)).await
}

/// The first success of `attempts`, each of which begins when the one before has failed, or its head start is over; or
/// what all have failed of.
async fn first_of<T>(
    attempts: impl Iterator<Item = impl Future<Output = Result<T, String>>>,
) -> Result<T, String> {
    let mut attempts = attempts.peekable();
    let mut running = FuturesUnordered::new();
    let mut failed = Vec::new();
    loop {
        match attempts.next() {
            Some(next) => running.push(next),
            None if running.is_empty() => return Err(failed.join("; ")),
            None => {}
        }
        let has_more = attempts.peek().is_some();
        tokio::select! {
            Some(result) = running.next() => match result {
                Ok(first) => return Ok(first),
                Err(reason) => failed.push(reason),
            },
            () = tokio::time::sleep(HEAD_START), if has_more => {}
        }
    }
}

/// Attaches, and holds the attachment until it ends; says why it has ended.
async fn hold(
    own: &Own,
    id: DirectorId,
    attempt: u64,
    target: &DirectorTarget,
    before: Guard,
    events: &mpsc::Sender<DirectorEvent>,
) -> Failure {
    let tls = match own.tls(target) {
        Ok(tls) => tls,
        Err(reason) => return Failure::Unavailable(reason),
    };
    let channel = match connect(&target.addresses, &tls).await {
        Ok(channel) => channel,
        Err(reason) => return Failure::Unavailable(reason),
    };
    let started = Instant::now();
    let opening = async {
        let (opener, requests) = mpsc::channel(1);
        let request = AttachRequest { agent_version: own.version.to_owned() };
        // Cannot fail: there is room.
        let _ = opener.try_send(request);
        let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
        let mut stream = RelayServiceClient::new(channel)
            .attach(requests)
            .await
            .map_err(|status| failure(&status))?
            .into_inner();
        match next(&mut stream).await? {
            // The stream stays open from this end for as long as `opener` is held.
            Message::Attached(attached) => Ok((opener, stream, attachment(own.handle, &attached)?)),
            Message::Drain(_) => Err(Failure::Unavailable("the director is shutting down".into())),
        }
    };
    let (_opener, mut stream, attachment) = match tokio::time::timeout(ANSWER_TIMEOUT, opening).await {
        Ok(Ok(opened)) => opened,
        Ok(Err(failure)) => return failure,
        Err(_) => return Failure::Unavailable(format!("no answer within {} s", ANSWER_TIMEOUT.as_secs())),
    };
    let round_trip = Instant::now() - started;
    let attached = DirectorEvent::Attached { id, attempt, attachment, round_trip };
    if events.send(attached).await.is_err() {
        return Failure::Unavailable("the agent is stopping".into());
    }
    drop(before);
    loop {
        match next(&mut stream).await {
            Ok(Message::Drain(_)) => {
                let _ = events.send(DirectorEvent::Draining { id, attempt }).await;
            }
            Ok(Message::Attached(_)) => {}
            Err(failure) => return failure,
        }
    }
}

async fn next(stream: &mut Streaming<AttachResponse>) -> Result<Message, Failure> {
    loop {
        match stream.message().await {
            Ok(Some(AttachResponse { message: Some(message) })) => return Ok(message),
            // Something newer than this agent.
            Ok(Some(AttachResponse { message: None })) => {}
            Ok(None) => return Err(Failure::Unavailable("the director has ended the attachment".into())),
            Err(status) => return Err(failure(&status)),
        }
    }
}

fn failure(status: &Status) -> Failure {
    match status.code() {
        Code::PermissionDenied | Code::Unauthenticated => Failure::Refused(grpc::words(status)),
        _ => Failure::Unavailable(grpc::words(status)),
    }
}

/// What a director has given, checked.
fn attachment(own: Option<frame::Handle>, attached: &Attached) -> Result<Attachment, Failure> {
    let bad = |what: &str| Failure::Unavailable(format!("the director's answer cannot be used: {what}"));
    if own.is_some_and(|own| own.0 != attached.handle) {
        return Err(bad("it takes this device for another one"));
    }
    let key: [u8; 32] = attached.key.as_slice().try_into().map_err(|_| bad("the key has not 32 octets"))?;
    let endpoints = attached.endpoints.iter().filter_map(|endpoint| {
        let port = u16::try_from(endpoint.port).ok().filter(|port| *port != 0)?;
        Some(SocketAddr::new(endpoint.address.parse().ok()?, port))
    });
    let interval = attached.hello_interval.as_ref().and_then(|interval| {
        Some(Duration::new(interval.seconds.try_into().ok()?, interval.nanos.try_into().ok()?))
    });
    Ok(Attachment {
        endpoints: endpoints.take(MAX_ENDPOINTS).collect(),
        session: attached.session,
        key: Zeroizing::new(key),
        hello_interval: interval.filter(|interval| !interval.is_zero()).unwrap_or(HELLO_INTERVAL),
    })
}

#[cfg(test)]
mod tests {
    use muster_proto::admin::Endpoint;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn addresses_that_do_not_answer_are_not_waited_for() {
        let attempt = |millis: u64, result: Result<u8, &'static str>| async move {
            tokio::time::sleep(Duration::from_millis(millis)).await;
            result.map_err(str::to_owned)
        };
        let mut start = tokio::time::Instant::now();
        let mut took = || std::mem::replace(&mut start, tokio::time::Instant::now()).elapsed().as_millis();
        // The first that answers, also if it began earlier than others.
        let blocked = [(60_000, Err("blocked")), (60_000, Err("blocked")), (100, Ok(3))];
        let first = first_of(blocked.into_iter().map(|(millis, result)| attempt(millis, result))).await;
        assert_eq!((first, took()), (Ok(3), 1600));
        let slow = [(800, Ok(1)), (100, Ok(2))];
        let first = first_of(slow.into_iter().map(|(millis, result)| attempt(millis, result))).await;
        assert_eq!((first, took()), (Ok(1), 800));
        // What is refused makes room at once, and nothing is left out of the reason.
        let refused = [(10, Err("one")), (10, Err("two")), (8000, Err("three"))];
        let first = first_of(refused.into_iter().map(|(millis, result)| attempt(millis, result))).await;
        assert_eq!((first, took()), (Err("one; two; three".into()), 8020));
        assert_eq!(
            first_of(std::iter::empty::<std::future::Ready<Result<u8, _>>>()).await,
            Err(String::new())
        );
    }

    #[test]
    fn what_a_director_gives_is_checked() {
        let good = Attached {
            session: 7,
            key: vec![1; 32],
            handle: 9,
            endpoints: vec![
                Endpoint { address: "192.0.2.1".into(), port: 7501 },
                Endpoint { address: "nowhere".into(), port: 7501 },
                Endpoint { address: "2001:db8::1".into(), port: 0 },
            ],
            hello_interval: None,
        };
        let taken = attachment(Some(frame::Handle(9)), &good).unwrap();
        assert_eq!((taken.session, *taken.key, taken.hello_interval), (7, [1; 32], HELLO_INTERVAL));
        assert_eq!(taken.endpoints, ["192.0.2.1:7501".parse().unwrap()]);
        assert!(attachment(None, &good).is_ok());
        assert!(attachment(Some(frame::Handle(8)), &good).is_err());
        assert!(attachment(None, &Attached { key: vec![1; 31], ..good }).is_err());
    }
}
