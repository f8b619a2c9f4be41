//! One session as a stream of responses: reads what the agent sends, and makes the messages that its mailbox asks for
//! from the registry as it is at that moment. It runs within the call, without a task of its own.

use std::{collections::BTreeSet, net::SocketAddr, pin::Pin, sync::Arc, time::Duration};

use futures_util::{FutureExt as _, Stream, StreamExt as _, future::BoxFuture, stream};
use muster_common::{name::Label, time::Instant};
use muster_proto::registration::{
    Bookmark, Drain, EndpointProbe, EndpointProbes, Introduction, PeerChanged, PeerRemoved, RootsChanged,
    ServiceChanged, SessionHello, SessionRequest, SessionResponse, WatchVirtualServices, session_request,
    session_response::Message,
};
use rustls::pki_types::CertificateDer;
use tokio::sync::watch;
use tonic::Status;
use uuid::Uuid;

use super::{
    Draining, Hub, Registered, TooMany,
    mailbox::{Away, End, HELD_MAX, Item, SERVICES_MAX},
    probes::{self, Reported},
};
use crate::{
    registry::{
        CommitError,
        device::{ENDPOINTS_MAX, Outside},
        field::{self, FieldError},
        named,
        plan::{
            readiness::Finding,
            register::{self, DeviceError},
        },
        virtual_services::Cursor,
    },
    store::Revision,
};

/// How long an agent may take to say hello.
pub(super) const HELLO: Duration = Duration::from_secs(10);
/// The most revisions that are looked through for changes of held Services.
const HISTORY_MAX: usize = 1024;
/// Between writes of one session's endpoints; what changes meanwhile is written once.
const WRITE_INTERVAL: Duration = Duration::from_millis(250);
/// Before a write is tried again, at least; see [`retry`].
const WRITE_RETRY: Duration = Duration::from_secs(1);

/// Runs a session of `device` until it ends: dropping the stream closes it.
pub fn run<S>(
    hub: Arc<Hub>,
    network: Arc<str>,
    device: Uuid,
    inbound: S,
) -> impl Stream<Item = Result<SessionResponse, Status>> + Send + 'static + use<S>
where
    S: Stream<Item = Result<SessionRequest, Status>> + Send + Unpin + 'static,
{
    let roots = hub.roots.clone();
    let running = Running {
        hub,
        network,
        device,
        inbound,
        roots,
        registered: None,
        virtual_services: None,
        probes: Vec::new(),
        findings: Vec::new(),
        reporting: None,
        writing: None,
        ways: None,
        ended: false,
    };
    stream::unfold(running, |mut running| async move {
        if running.ended {
            return None;
        }
        let response = running.next().await?;
        running.ended = response.is_err();
        Some((response, running))
    })
}

type Written = (Ways, Result<(), CommitError<DeviceError>>);

/// How the device is reached, as it has told.
#[derive(Clone, Debug)]
struct Ways {
    endpoints: Box<[SocketAddr]>,
    /// `None` leaves what is known.
    outside: Option<Outside>,
}

struct Running<S> {
    hub: Arc<Hub>,
    network: Arc<str>,
    device: Uuid,
    inbound: S,
    roots: watch::Receiver<Vec<CertificateDer<'static>>>,
    /// Once the agent has said hello.
    registered: Option<Registered>,
    /// How far the device has been told of the Services that have virtual IPs, if it asks for them.
    virtual_services: Option<Cursor>,
    /// What the agent was told to probe.
    probes: Vec<EndpointProbe>,
    /// What probes have found, until it is written.
    findings: Vec<Finding>,
    reporting: Option<BoxFuture<'static, Reported>>,
    /// Ways that are being written.
    writing: Option<BoxFuture<'static, Written>>,
    /// Ways that are to be written next, and how long to wait before.
    ways: Option<(Ways, Duration)>,
    ended: bool,
}

impl<S: Stream<Item = Result<SessionRequest, Status>> + Send + Unpin> Running<S> {
    /// The next response; `None` when the agent has gone.
    async fn next(&mut self) -> Option<Result<SessionResponse, Status>> {
        if self.registered.is_none() {
            match self.greet().await {
                Ok(registered) => self.registered = Some(registered),
                Err(status) => return Some(Err(status)),
            }
        }
        loop {
            let session = self.registered.as_ref()?.session.clone();
            if let Some(item) = session.pop() {
                match self.message(item) {
                    Some(response) => return Some(response.map(|m| SessionResponse { message: Some(m) })),
                    None => continue,
                }
            }
            if self.writing.is_none()
                && let Some((ways, delay)) = self.ways.take()
            {
                self.writing = Some(self.write(ways, delay));
            }
            if self.reporting.is_none() && !self.findings.is_empty() {
                let findings = std::mem::take(&mut self.findings);
                self.reporting = Some(self.report(findings, Duration::ZERO));
            }
            let (writing, reporting) = (self.writing.as_mut(), self.reporting.as_mut());
            tokio::select! {
                received = self.inbound.next() => match received {
                    Some(Ok(request)) => {
                        if let Err(status) = self.receive(request) {
                            return Some(Err(status));
                        }
                    }
                    Some(Err(_)) | None => return None,
                },
                () = session.ready.notified() => {}
                changed = self.roots.changed() => match changed {
                    Ok(()) => session.post(super::mailbox::Mailbox::roots),
                    // The registrar stops.
                    Err(_) => return Some(Err(ended(End::Shutdown))),
                },
                reported = pending_unless(reporting) => {
                    self.reporting = None;
                    if let Err(status) = self.reported(reported) {
                        return Some(Err(status));
                    }
                }
                written = pending_unless(writing) => {
                    self.writing = None;
                    if let Err(status) = self.written(written) {
                        return Some(Err(status));
                    }
                }
            }
        }
    }

    /// Waits for the hello, and prepares what has to be sent in answer to it.
    async fn greet(&mut self) -> Result<Registered, Status> {
        let first = tokio::time::timeout(HELLO, self.inbound.next()).await;
        let first =
            first.map_err(|_| Status::deadline_exceeded("the agent did not say hello within 10 seconds"))?;
        let hello = match first {
            Some(Ok(SessionRequest { message: Some(session_request::Message::Hello(hello)) })) => hello,
            Some(Ok(_)) => {
                return Err(Status::invalid_argument("the first message of a session must be a hello"));
            }
            Some(Err(status)) => return Err(status),
            None => return Err(Status::cancelled("the agent ended the session before it began")),
        };
        let SessionHello { mut revision, held_peer_uids, held_services, watch_virtual_services } = hello;
        let mut watch = watch_virtual_services;
        let held = uids("hello.held_peer_uids", &held_peer_uids)?;
        let services = services("hello.held_services", &held_services)?;
        // The agent may come from a registrar that was faster. Of a store that never had the revision, all is new.
        if self.hub.registry.reached(revision).await.is_err() {
            revision = 0;
        }
        if let Some(watch) = &mut watch
            && self.hub.registry.reached(watch.revision).await.is_err()
        {
            watch.revision = 0;
        }
        // First in the hub, then in the index: what changes in between is sent twice, and never missed.
        let registered = self.hub.open(self.network.clone(), self.device).map_err(|Draining| draining())?;
        self.hub.hold(&registered.session, &held).map_err(|TooMany| too_many())?;
        self.hub.hold_services(&registered.session, &services).map_err(|TooMany| too_many_services())?;
        // Read first, so that what is found missing of a Service is not said to have been told.
        let now = self.hub.registry.published();
        let changed = self.services_changed_since(revision, services);
        {
            let index = self.hub.registry.read();
            register::find(&index, &self.network, self.device).map_err(|e| refused(&e))?;
            let state = index.network(&self.network);
            let from = |watch: WatchVirtualServices| {
                Some(state?.virtual_services_from(watch.revision, watch.digest))
            };
            self.virtual_services = watch.and_then(from);
            let is_new = |uid: &Uuid| {
                let state =
                    state.filter(|state| state.network.revision.max(state.directors.revision) <= revision);
                state.and_then(|state| state.devices.by_uid(*uid)).is_none_or(|peer| peer.revision > revision)
                    || index.peer(&self.network, self.device, *uid).is_none()
            };
            let new: Vec<Uuid> = held.into_iter().filter(is_new).collect();
            registered.session.post(|mailbox| {
                mailbox.config();
                mailbox.probes();
                if self.virtual_services.is_some() {
                    mailbox.watch_virtual_services();
                }
                new.into_iter().for_each(|peer| mailbox.peer(peer));
                changed.iter().for_each(|service| mailbox.service(service));
                mailbox.bookmark(now);
            });
        }
        Ok(registered)
    }

    /// Those of `held` that may be answered for differently than at `revision`: all of them, unless the changes since
    /// are still known.
    fn services_changed_since(&self, revision: Revision, held: Vec<Arc<str>>) -> Vec<Arc<str>> {
        if held.is_empty() || revision == 0 {
            return held;
        }
        let Ok(since) = self.hub.registry.changes_after(revision, HISTORY_MAX) else { return held };
        if since.len() == HISTORY_MAX {
            return held;
        }
        let changed = since.iter().flat_map(|applied| &applied.services);
        let changed: BTreeSet<&str> =
            changed.filter(|name| name.network == self.network).map(|name| &*name.key).collect();
        held.into_iter().filter(|service| changed.contains(&**service)).collect()
    }

    /// The message that `item` asks for; `None` if there is nothing to tell any more.
    fn message(&mut self, item: Item) -> Option<Result<Message, Status>> {
        let message = match item {
            Item::End(reason) => {
                self.hub.ended.inc();
                return Some(Err(ended(reason)));
            }
            Item::Config => {
                let index = self.hub.registry.read();
                let state = index.network(&self.network)?;
                let device = state.devices.by_uid(self.device)?;
                Message::Config(state.config(device, &self.hub.advertised()))
            }
            Item::Roots => {
                let roots = self.roots.borrow();
                Message::RootsChanged(RootsChanged {
                    roots: roots.iter().map(|root| root.to_vec()).collect(),
                })
            }
            Item::Drain(Away { within, to }) => {
                let seconds = within.as_secs().try_into().unwrap_or(i64::MAX);
                let within = Some(pbjson_types::Duration { seconds, nanos: 0 });
                Message::Drain(Drain { within, registrars: to.to_vec() })
            }
            Item::Introduction(uid) => {
                let peer = self.hub.registry.read().peer(&self.network, self.device, uid)?;
                self.hub.introductions.inc();
                Message::Introduction(Introduction { peer: Some(peer) })
            }
            Item::Peer(uid) => {
                let peer = self.hub.registry.read().peer(&self.network, self.device, uid);
                match peer {
                    Some(peer) => Message::PeerChanged(PeerChanged { peer: Some(peer) }),
                    None => {
                        // The agent forgets the peer, so that it is not held any more.
                        if let Some(registered) = &self.registered {
                            self.hub.release(&registered.session, &[uid]);
                        }
                        Message::PeerRemoved(PeerRemoved { device_uid: uid.to_string() })
                    }
                }
            }
            Item::Service(key) => {
                let (namespace, name) = named::parts(&key);
                let (namespace, name) = (namespace.to_owned(), name.to_owned());
                Message::ServiceChanged(ServiceChanged { namespace, name })
            }
            Item::VirtualServices => {
                let index = self.hub.registry.read();
                let (state, cursor) = (index.network(&self.network)?, self.virtual_services.as_mut()?);
                let (changed, is_more) = state.virtual_services_after(cursor, index.revision());
                drop(index);
                if is_more && let Some(registered) = &self.registered {
                    registered.session.post(|mailbox| {
                        mailbox.virtual_services();
                    });
                }
                Message::VirtualServicesChanged(changed)
            }
            Item::Probes => {
                let index = self.hub.registry.read();
                let state = index.network(&self.network)?;
                let probes = state.probes(state.devices.by_uid(self.device)?);
                if probes == self.probes {
                    return None;
                }
                self.probes.clone_from(&probes);
                Message::EndpointProbes(EndpointProbes { probes })
            }
            Item::Bookmark(revision) => Message::Bookmark(Bookmark { revision }),
        };
        Some(Ok(message))
    }

    fn receive(&mut self, request: SessionRequest) -> Result<(), Status> {
        let Some(registered) = &self.registered else { return Ok(()) };
        match request.message {
            Some(session_request::Message::EndpointsChanged(changed)) => {
                let path = "endpoints_changed.private_endpoints";
                let invalid = |error: FieldError| Status::invalid_argument(error.to_string());
                let endpoints = field::endpoints(path, &changed.private_endpoints, ENDPOINTS_MAX);
                let path = "endpoints_changed.reachability";
                let outside = changed.reachability.as_ref().map(|told| Outside::check(path, told));
                let (endpoints, mut outside) =
                    (endpoints.map_err(invalid)?, outside.transpose().map_err(invalid)?);
                let delay = if self.writing.is_some() { WRITE_INTERVAL } else { Duration::ZERO };
                // What was told before and is not written yet counts, too.
                if let Some((waiting, _)) = self.ways.take() {
                    outside = outside.or(waiting.outside);
                }
                self.ways = Some((Ways { endpoints, outside }, delay));
            }
            Some(session_request::Message::HeldPeers(held)) => {
                let removed = uids("held_peers.removed_uids", &held.removed_uids)?;
                let added = uids("held_peers.added_uids", &held.added_uids)?;
                self.hub.release(&registered.session, &removed);
                let new = self.hub.hold(&registered.session, &added).map_err(|TooMany| too_many())?;
                // They may have changed since the agent looked them up.
                registered.session.post(|mailbox| new.into_iter().for_each(|peer| mailbox.peer(peer)));
            }
            Some(session_request::Message::HeldServices(held)) => {
                let removed = services("held_services.removed", &held.removed)?;
                let added = services("held_services.added", &held.added)?;
                self.hub.release_services(&registered.session, &removed);
                let new = self.hub.hold_services(&registered.session, &added);
                let new = new.map_err(|TooMany| too_many_services())?;
                // They may have changed since the agent resolved them.
                registered.session.post(|mailbox| new.iter().for_each(|service| mailbox.service(service)));
            }
            Some(session_request::Message::Hello(_)) => {
                return Err(Status::invalid_argument("a session has one hello, its first message"));
            }
            Some(session_request::Message::Alive(_)) => {
                self.hub.is_alive(&registered.session, Instant::now())
            }
            Some(session_request::Message::EndpointHealth(health)) => {
                self.findings = probes::findings("endpoint_health", &health.endpoints)?;
            }
            // From a newer agent.
            None => {}
        }
        Ok(())
    }

    fn report(&self, findings: Vec<Finding>, delay: Duration) -> BoxFuture<'static, Reported> {
        probes::report(self.hub.clone(), self.network.clone(), self.device, findings, delay).boxed()
    }

    fn reported(&mut self, (findings, result): Reported) -> Result<(), Status> {
        match result {
            Ok(()) => Ok(()),
            Err(CommitError::Refused(error)) => Err(refused(&error)),
            Err(error) => {
                tracing::warn!(device = %self.device, %error, "cannot write what probes have found; trying again");
                if self.findings.is_empty() {
                    self.reporting = Some(self.report(findings, retry()));
                }
                Ok(())
            }
        }
    }

    fn write(&self, ways: Ways, delay: Duration) -> BoxFuture<'static, Written> {
        let (hub, network, device) = (self.hub.clone(), self.network.clone(), self.device);
        async move {
            if !delay.is_zero() {
                tokio::time::sleep(delay).await;
            }
            // Thousands of devices may wait for a store that is away: it is asked once for all of them, elsewhere.
            while hub.registry.freshness().is_stale() {
                tokio::time::sleep(retry()).await;
            }
            let result = hub
                .registry
                .commit(|index, _| {
                    register::endpoints(index, &network, device, &ways.endpoints, ways.outside.as_ref())
                })
                .await;
            (ways, result)
        }
        .boxed()
    }

    fn written(&mut self, (ways, result): Written) -> Result<(), Status> {
        match result {
            Ok(()) => Ok(()),
            Err(CommitError::Refused(error)) => Err(refused(&error)),
            Err(error) => {
                tracing::warn!(device = %self.device, %error, "cannot write a device's endpoints; trying again");
                let (next, delay) = self.ways.get_or_insert((ways.clone(), Duration::ZERO));
                next.outside = next.outside.take().or(ways.outside);
                *delay = retry();
                Ok(())
            }
        }
    }
}

/// How long to wait with a write that has failed: thousands of sessions, whose writes fail together, do not try again
/// together.
fn retry() -> Duration {
    WRITE_RETRY.mul_f64(rand::random_range(1.0..2.0))
}

/// What comes of `future`; nothing ever without one.
pub(super) async fn pending_unless<T>(future: Option<&mut Pin<Box<dyn Future<Output = T> + Send>>>) -> T {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

fn uids(path: &str, texts: &[String]) -> Result<Vec<Uuid>, Status> {
    if texts.len() > HELD_MAX {
        return Err(too_many());
    }
    let parse = |(i, text): (usize, &String)| {
        Uuid::try_parse(text)
            .map_err(|_| Status::invalid_argument(format!("{path}[{i}]: is not a device's uid")))
    };
    texts.iter().enumerate().map(parse).collect()
}

/// The keys of Services that are given as `namespace/name`.
fn services(path: &str, texts: &[String]) -> Result<Vec<Arc<str>>, Status> {
    if texts.len() > SERVICES_MAX {
        return Err(too_many_services());
    }
    let parse = |(i, text): (usize, &String)| {
        let parsed = text.split_once('/').and_then(|(namespace, name)| {
            Some((namespace.parse::<Label>().ok()?, name.parse::<Label>().ok()?))
        });
        let (namespace, name) = parsed.ok_or_else(|| {
            Status::invalid_argument(format!("{path}[{i}]: is not a Service's namespace/name"))
        })?;
        Ok(named::key(namespace.as_str(), name.as_str()).into())
    };
    texts.iter().enumerate().map(parse).collect()
}

fn ended(reason: End) -> Status {
    match reason {
        End::Gone => refused(&DeviceError::Gone),
        End::Revoked => refused(&DeviceError::Revoked),
        End::Replaced => Status::aborted("another session of this device has taken the place of this one"),
        End::Reregistered => Status::aborted("this device has registered anew; connect again"),
        End::Shutdown => draining(),
    }
}

fn refused(error: &DeviceError) -> Status {
    Status::permission_denied(error.to_string())
}

fn draining() -> Status {
    Status::unavailable("this registrar is shutting down; go to another one")
}

fn too_many() -> Status {
    Status::resource_exhausted(format!("a session holds at most {HELD_MAX} peers; forget those not in use"))
}

fn too_many_services() -> Status {
    Status::resource_exhausted(format!(
        "a session holds at most {SERVICES_MAX} Services; forget those not in use"
    ))
}
