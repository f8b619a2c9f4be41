//! The sessions of directors: who is online, and which devices a director must not relay for. The registrar keeps no
//! list of who is attached where: a director is told of every device of its network that is revoked or deleted, and
//! asks of each device that attaches.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::{FutureExt as _, Stream, StreamExt as _, future::BoxFuture, stream};
use muster_proto::director::{
    DevicesRefused, Drain, RootsChanged, SessionHello, SessionRequest, SessionResponse, session_request,
    session_response::Message,
};
use rustls::pki_types::CertificateDer;
use tokio::sync::{Notify, watch};
use tonic::Status;
use uuid::Uuid;

use super::{
    Draining, Hub, lock,
    stream::{HELLO, pending_unless},
};
use crate::{
    registry::{
        CommitError, Director,
        director::is_ordered_differently,
        plan::{
            director::{self, DirectorError},
            register::{self, DeviceError},
        },
    },
    store::StoreError,
};

/// The most devices in one message.
pub const DEVICES_MAX: usize = 8192;
/// The most devices that wait to be refused, or to be looked up in the store, for one session.
const WAITING_MAX: usize = 1 << 18;
/// Before the store is asked again.
const RETRY: Duration = Duration::from_secs(1);

/// Why a session ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The director was deleted.
    Gone,
    /// The director was revoked.
    Revoked,
    /// It has opened another one.
    Replaced,
    /// A device that it refuses is welcome again. Directors forget whom they refuse when a session begins.
    Forgiven,
    /// It does not read what it is told.
    Behind,
    /// The registrar stops.
    Shutdown,
}

/// What waits to be sent to one director.
#[derive(Debug, Default)]
struct Mailbox {
    end: Option<End>,
    config: bool,
    roots: bool,
    drain: Option<Duration>,
    refused: BTreeSet<Uuid>,
}

#[derive(Debug, PartialEq, Eq)]
enum Item {
    End(End),
    Refused(Vec<Uuid>),
    Config,
    Roots,
    Drain(Duration),
}

impl Mailbox {
    /// Ends the session; the first reason counts.
    fn end(&mut self, reason: End) {
        *self = Self { end: Some(*self.end.get_or_insert(reason)), ..Self::default() };
    }

    fn refuse(&mut self, devices: impl IntoIterator<Item = Uuid>) {
        if self.end.is_some() {
            return;
        }
        self.refused.extend(devices);
        if self.refused.len() > WAITING_MAX {
            self.end(End::Behind);
        }
    }

    /// What to send next; what is most urgent first.
    fn pop(&mut self) -> Option<Item> {
        if let Some(reason) = self.end {
            return Some(Item::End(reason));
        }
        if !self.refused.is_empty() {
            let refused: Vec<Uuid> = self.refused.iter().take(DEVICES_MAX).copied().collect();
            self.refused.retain(|uid| refused.last().is_some_and(|last| uid > last));
            return Some(Item::Refused(refused));
        }
        if std::mem::take(&mut self.config) {
            return Some(Item::Config);
        }
        if std::mem::take(&mut self.roots) {
            return Some(Item::Roots);
        }
        self.drain.take().map(Item::Drain)
    }
}

/// One open session.
#[derive(Debug)]
struct Session {
    id: u64,
    network: Arc<str>,
    director: Uuid,
    mailbox: Mutex<Mailbox>,
    ready: Notify,
    /// Devices attached, as the director last told.
    attached: AtomicU64,
}

impl Session {
    fn post(&self, change: impl FnOnce(&mut Mailbox)) {
        change(&mut lock(&self.mailbox));
        self.ready.notify_one();
    }
}

/// All open sessions of directors.
#[derive(Debug, Default)]
pub(super) struct Open {
    sessions: BTreeMap<u64, Arc<Session>>,
    by_director: BTreeMap<Uuid, u64>,
}

impl Open {
    pub(super) fn is_empty(&self) -> bool {
        self.sessions.is_empty()
    }

    pub(super) fn drain(&self, within: Duration) {
        self.sessions.values().for_each(|session| session.post(|mailbox| mailbox.drain = Some(within)));
    }

    pub(super) fn shutdown(&self) {
        self.sessions.values().for_each(|session| session.post(|mailbox| mailbox.end(End::Shutdown)));
    }

    /// Tells all directors of a network that they must not relay for a device.
    pub(super) fn refuse(&self, network: &str, device: Uuid) {
        for session in self.sessions.values().filter(|session| *session.network == *network) {
            session.post(|mailbox| mailbox.refuse([device]));
        }
    }

    /// Has all directors of a network forget whom they refuse: a device has been revoked by mistake.
    pub(super) fn forgive(&self, network: &str) {
        for session in self.sessions.values().filter(|session| *session.network == *network) {
            session.post(|mailbox| mailbox.end(End::Forgiven));
        }
    }

    /// Tells a director of a change to itself.
    /// Directors are to be told where registrars are.
    pub(super) fn tell_all(&self) {
        for session in self.sessions.values() {
            session.post(|mailbox| mailbox.config = true);
        }
    }

    pub(super) fn changed(&self, old: Option<&Director>, new: Option<&Director>) {
        let Some(uid) = new.or(old).map(|director| director.uid) else { return };
        let Some(session) = self.by_director.get(&uid).and_then(|id| self.sessions.get(id)) else { return };
        session.post(|mailbox| match (old, new) {
            (_, None) => mailbox.end(End::Gone),
            (_, Some(new)) if new.is_revoked() => mailbox.end(End::Revoked),
            (Some(old), Some(new)) if !is_ordered_differently(old, new) => {}
            (_, Some(_)) => mailbox.config = true,
        });
    }
}

/// A session that is closed when this is dropped.
#[derive(Debug)]
struct Registered {
    hub: Arc<Hub>,
    session: Arc<Session>,
}

impl Drop for Registered {
    fn drop(&mut self) {
        let mut open = lock(&self.hub.directors);
        open.sessions.remove(&self.session.id);
        if open.by_director.get(&self.session.director) == Some(&self.session.id) {
            open.by_director.remove(&self.session.director);
        }
        drop(open);
        self.hub.director_sessions.dec();
    }
}

impl Hub {
    /// How many devices are attached to a director, if a session of the director is open here.
    pub fn attached(&self, director: Uuid) -> Option<u64> {
        let open = lock(&self.directors);
        let session = open.by_director.get(&director).and_then(|id| open.sessions.get(id))?;
        Some(session.attached.load(Ordering::Relaxed))
    }

    /// Opens a session; an older one of the same director is ended.
    fn open_director(self: &Arc<Self>, network: Arc<str>, director: Uuid) -> Result<Registered, Draining> {
        let session = Arc::new(Session {
            id: self.next_id.fetch_add(1, Ordering::Relaxed),
            network,
            director,
            mailbox: Mutex::default(),
            ready: Notify::new(),
            attached: AtomicU64::new(0),
        });
        let mut open = lock(&self.directors);
        // Under the lock, so that a drain reaches every session that it does not refuse.
        if self.draining.is_cancelled() {
            return Err(Draining);
        }
        let older = open.by_director.insert(director, session.id);
        if let Some(older) = older.and_then(|id| open.sessions.get(&id)) {
            older.post(|mailbox| mailbox.end(End::Replaced));
        }
        open.sessions.insert(session.id, session.clone());
        drop(open);
        self.director_sessions.inc();
        Ok(Registered { hub: self.clone(), session })
    }
}

/// Runs a session of `director` until it ends: dropping the stream closes it.
pub fn run_director<S>(
    hub: Arc<Hub>,
    network: Arc<str>,
    director: Uuid,
    inbound: S,
) -> impl Stream<Item = Result<SessionResponse, Status>> + Send + 'static + use<S>
where
    S: Stream<Item = Result<SessionRequest, Status>> + Send + Unpin + 'static,
{
    let roots = hub.roots.clone();
    let running = Running {
        hub,
        network,
        director,
        inbound,
        roots,
        registered: None,
        more_follow: false,
        unknown: BTreeSet::new(),
        asking: None,
        leaving: None,
        writing: None,
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

/// The store has been caught up with, for these devices.
type Asked = (BTreeSet<Uuid>, Result<(), StoreError>);

struct Running<S> {
    hub: Arc<Hub>,
    network: Arc<str>,
    director: Uuid,
    inbound: S,
    roots: watch::Receiver<Vec<CertificateDer<'static>>>,
    /// Once the director has said hello.
    registered: Option<Registered>,
    /// Whether the hello goes on.
    more_follow: bool,
    /// Devices that are not in the index. Another registrar may have just let them in, so the store is asked first.
    unknown: BTreeSet<Uuid>,
    asking: Option<BoxFuture<'static, Asked>>,
    /// Whether devices should leave the director, as it has told and is not written yet.
    leaving: Option<bool>,
    writing: Option<BoxFuture<'static, Result<(), CommitError<DirectorError>>>>,
    ended: bool,
}

impl<S: Stream<Item = Result<SessionRequest, Status>> + Send + Unpin> Running<S> {
    /// The next response; `None` when the director has gone.
    async fn next(&mut self) -> Option<Result<SessionResponse, Status>> {
        if self.registered.is_none()
            && let Err(status) = self.greet().await
        {
            return Some(Err(status));
        }
        let session = self.registered.as_ref()?.session.clone();
        loop {
            let item = lock(&session.mailbox).pop();
            if let Some(item) = item {
                match self.message(item) {
                    Some(response) => return Some(response.map(|m| SessionResponse { message: Some(m) })),
                    None => continue,
                }
            }
            self.begin();
            tokio::select! {
                received = self.inbound.next() => match received {
                    Some(Ok(request)) => {
                        if let Err(status) = self.receive(&session, request) {
                            return Some(Err(status));
                        }
                    }
                    Some(Err(_)) | None => return None,
                },
                () = session.ready.notified() => {}
                changed = self.roots.changed() => match changed {
                    Ok(()) => session.post(|mailbox| mailbox.roots = true),
                    // The registrar stops.
                    Err(_) => return Some(Err(ended(End::Shutdown))),
                },
                asked = pending_unless(self.asking.as_mut()) => {
                    self.asking = None;
                    self.answered(&session, asked);
                }
                written = pending_unless(self.writing.as_mut()) => {
                    self.writing = None;
                    match written {
                        Ok(()) => {}
                        Err(CommitError::Refused(error)) => return Some(Err(refused(&error))),
                        // The next report says it again.
                        Err(error) => {
                            let director = self.director;
                            tracing::warn!(%director, %error, "cannot write that a director drains; trying again");
                        }
                    }
                }
            }
        }
    }

    /// Waits for the hello, and opens the session.
    async fn greet(&mut self) -> Result<(), Status> {
        let first = tokio::time::timeout(HELLO, self.inbound.next()).await;
        let first = first
            .map_err(|_| Status::deadline_exceeded("the director did not say hello within 10 seconds"))?;
        let hello = match first {
            Some(Ok(SessionRequest { message: Some(session_request::Message::Hello(hello)) })) => hello,
            Some(Ok(_)) => {
                return Err(Status::invalid_argument("the first message of a session must be a hello"));
            }
            Some(Err(status)) => return Err(status),
            None => return Err(Status::cancelled("the director ended the session before it began")),
        };
        // First in the hub, then in the index: what changes in between is told twice, and never missed.
        let registered = self
            .hub
            .open_director(self.network.clone(), self.director)
            .map_err(|Draining| ended(End::Shutdown))?;
        director::find(&self.hub.registry.read(), &self.network, self.director).map_err(|e| refused(&e))?;
        registered.session.post(|mailbox| mailbox.config = true);
        self.hello(&registered.session, hello)?;
        self.registered = Some(registered);
        Ok(())
    }

    fn hello(&mut self, session: &Session, hello: SessionHello) -> Result<(), Status> {
        let SessionHello { device_uids, more_follow } = hello;
        let attached = uids("hello.device_uids", &device_uids)?;
        session.attached.fetch_add(u64::try_from(attached.len()).unwrap_or(0), Ordering::Relaxed);
        self.more_follow = more_follow;
        self.judge(session, attached)
    }

    fn receive(&mut self, session: &Session, request: SessionRequest) -> Result<(), Status> {
        match request.message {
            Some(session_request::Message::Hello(hello)) if self.more_follow => self.hello(session, hello),
            Some(session_request::Message::Hello(_)) => {
                Err(Status::invalid_argument("a session has one hello, its first message"))
            }
            Some(session_request::Message::DevicesChanged(changed)) => {
                let attached = uids("devices_changed.attached", &changed.attached)?;
                self.judge(session, attached)
            }
            Some(session_request::Message::Report(report)) => {
                session.attached.store(report.attached, Ordering::Relaxed);
                let index = self.hub.registry.read();
                let known = index.director(&self.network, self.director).map(|director| director.leaving);
                self.leaving = (known != Some(report.draining)).then_some(report.draining);
                Ok(())
            }
            // From a newer director.
            None => Ok(()),
        }
    }

    /// Refuses those that are revoked, and notes those that are not known.
    fn judge(&mut self, session: &Session, devices: impl IntoIterator<Item = Uuid>) -> Result<(), Status> {
        let mut refused = Vec::new();
        {
            let index = self.hub.registry.read();
            for device in devices {
                match register::find(&index, &self.network, device) {
                    Ok(_) => {}
                    Err(DeviceError::Gone) => {
                        self.unknown.insert(device);
                    }
                    Err(_) => refused.push(device),
                }
            }
        }
        if !refused.is_empty() {
            session.post(|mailbox| mailbox.refuse(refused));
        }
        if self.unknown.len() > WAITING_MAX {
            return Err(Status::resource_exhausted("too many of the attached devices are not known"));
        }
        Ok(())
    }

    /// Begins with what waits, one of each at a time.
    fn begin(&mut self) {
        if self.asking.is_none() && !self.unknown.is_empty() {
            self.ask(Duration::ZERO);
        }
        if self.writing.is_none()
            && let Some(leaving) = self.leaving.take()
        {
            let (hub, network, uid) = (self.hub.clone(), self.network.clone(), self.director);
            let write = async move {
                hub.registry.commit(|index, _| director::leave(index, &network, uid, leaving)).await
            };
            self.writing = Some(write.boxed());
        }
    }

    fn ask(&mut self, delay: Duration) {
        let (hub, unknown) = (self.hub.clone(), std::mem::take(&mut self.unknown));
        let ask = async move {
            if !delay.is_zero() {
                tokio::time::sleep(delay).await;
            }
            let result = hub.registry.refresh().await;
            (unknown, result)
        };
        self.asking = Some(ask.boxed());
    }

    /// Refuses what is not in the store either. While the store is away, nobody is.
    fn answered(&mut self, session: &Session, (asked, result): Asked) {
        if let Err(error) = result {
            tracing::warn!(director = %self.director, %error, "cannot look up attached devices; trying again");
            self.unknown.extend(asked);
            return self.ask(RETRY);
        }
        let index = self.hub.registry.read();
        let unknown = |uid: &Uuid| register::find(&index, &self.network, *uid).is_err();
        let refused: Vec<Uuid> = asked.into_iter().filter(unknown).collect();
        drop(index);
        if !refused.is_empty() {
            session.post(|mailbox| mailbox.refuse(refused));
        }
    }

    /// The message that `item` asks for; `None` if there is nothing to tell any more.
    fn message(&self, item: Item) -> Option<Result<Message, Status>> {
        let message = match item {
            Item::End(reason) => {
                self.hub.ended.inc();
                return Some(Err(ended(reason)));
            }
            Item::Refused(devices) => Message::DevicesRefused(DevicesRefused {
                device_uids: devices.iter().map(|uid| uid.as_bytes().to_vec()).collect(),
            }),
            Item::Config => {
                let index = self.hub.registry.read();
                let director = index.director(&self.network, self.director)?;
                Message::Config(director.config(&self.hub.advertised()))
            }
            Item::Roots => {
                let roots = self.roots.borrow();
                Message::RootsChanged(RootsChanged {
                    roots: roots.iter().map(|root| root.to_vec()).collect(),
                })
            }
            Item::Drain(within) => {
                let seconds = within.as_secs().try_into().unwrap_or(i64::MAX);
                Message::Drain(Drain { within: Some(pbjson_types::Duration { seconds, nanos: 0 }) })
            }
        };
        Some(Ok(message))
    }
}

fn uids<O: AsRef<[u8]>>(path: &str, list: &[O]) -> Result<Vec<Uuid>, Status> {
    if list.len() > DEVICES_MAX {
        return Err(Status::invalid_argument(format!(
            "{path}: has {} entries; at most {DEVICES_MAX} are allowed",
            list.len()
        )));
    }
    let parse = |(i, octets): (usize, &O)| {
        Uuid::from_slice(octets.as_ref())
            .map_err(|_| Status::invalid_argument(format!("{path}[{i}]: is not a device's uid, 16 octets")))
    };
    list.iter().enumerate().map(parse).collect()
}

fn ended(reason: End) -> Status {
    match reason {
        End::Gone => refused(&DirectorError::Gone),
        End::Revoked => refused(&DirectorError::Revoked),
        End::Replaced => Status::aborted("another session of this director has taken the place of this one"),
        End::Forgiven => Status::aborted("a device is not revoked any more; forget who is, and begin again"),
        End::Behind => Status::resource_exhausted("the director does not read what it is told; begin again"),
        End::Shutdown => Status::unavailable("this registrar is shutting down; go to another one"),
    }
}

fn refused(error: &DirectorError) -> Status {
    Status::permission_denied(error.to_string())
}

#[cfg(test)]
mod tests;
