//! One connection to one registrar, from Register to the end of the session.

use std::{collections::VecDeque, time::Duration};

use muster_common::{
    grpc,
    time::{Instant, Timestamp, until},
};
use muster_enrollment::{certificate_request, new_tls_key};
use muster_proto::director::{
    DevicesChanged, RenewRequest, RenewResponse, Report, SessionHello, SessionRequest, SessionResponse,
    director_service_client::DirectorServiceClient, session_request, session_response,
};
use rand::RngExt;
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, transport::Channel};
use uuid::Uuid;
use zeroize::Zeroizing;

use super::{Client, Relaying};

/// How long a registrar may take to connect and answer Register, and any other call.
const CALL_TIMEOUT: Duration = Duration::from_secs(20);
/// How often a report is due.
const REPORT: Duration = Duration::from_secs(10);
/// Devices that come and go within this time are told of together.
const BATCH: Duration = Duration::from_millis(200);
/// The most devices in one message.
const DEVICES_MAX: usize = 8_192;
/// Messages that may wait to be sent.
const OUTGOING: usize = 64;
/// Longest time within which a draining registrar is left.
const DRAIN_MAX: Duration = Duration::from_secs(600);

/// Why there is no connection any more.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// The registrar asked for it, since it is shutting down.
    Moved,
    /// It does not answer.
    Unavailable(String),
    /// It does not want this director.
    Refused(String),
}

/// A session's way out.
struct Outgoing(mpsc::Sender<SessionRequest>);

impl Outgoing {
    async fn send(&self, message: session_request::Message) -> Result<(), Failure> {
        let request = SessionRequest { message: Some(message) };
        match timeout(CALL_TIMEOUT, self.0.send(request)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Failure::Unavailable("the session has ended".into())),
            Err(_) => Err(Failure::Unavailable("the registrar does not read".into())),
        }
    }
}

impl<R: Relaying> Client<R> {
    /// Connects to `registrar`, and stays as long as that goes. Returns why it went no further.
    pub(super) async fn connect(&mut self, registrar: &str) -> Failure {
        match self.serve(registrar).await {
            Ok(never) => match never {},
            Err(failure) => failure,
        }
    }

    async fn serve(&mut self, registrar: &str) -> Result<std::convert::Infallible, Failure> {
        let request = (self.announce)();
        let tls = std::sync::Arc::clone(&self.tls);
        let registering = async {
            let channel =
                grpc::connect(registrar, tls).await.map_err(|e| Failure::Unavailable(e.to_string()))?;
            let mut client = DirectorServiceClient::new(channel.clone());
            let response = client.register(request).await.map_err(|status| failure(&status))?;
            Ok((channel, response.into_inner()))
        };
        let (channel, response) = answer(timeout(CALL_TIMEOUT, registering).await)?;
        if let Some(config) = &response.config {
            self.apply(config);
        }

        let mut changes = self.relaying.changes();
        changes.mark_unchanged();
        let mut told = self.relaying.devices();
        let (sender, messages) = mpsc::channel(OUTGOING);
        let outgoing = Outgoing(sender);
        let mut hello = hellos(&told);
        // The first must be on its way before the registrar answers.
        if let Some(first) = hello.pop_front() {
            outgoing.send(session_request::Message::Hello(first)).await?;
        }
        let mut client = DirectorServiceClient::new(channel.clone());
        let opening =
            async { client.session(ReceiverStream::new(messages)).await.map_err(|status| failure(&status)) };
        let mut stream = answer(timeout(CALL_TIMEOUT, opening).await)?.into_inner();
        // A device may have been let in again meanwhile. Whoever attaches and may not is named as soon as it is told.
        self.relaying.forgive();
        self.metrics.connected.set(1);
        tracing::info!(registrar, devices = told.len(), "connected");
        for message in hello {
            outgoing.send(session_request::Message::Hello(message)).await?;
        }

        let mut draining = self.draining.clone();
        draining.mark_unchanged();
        let mut report = interval(REPORT);
        report.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut renewals = JoinSet::new();
        let (mut tell_at, mut leave_at): (Option<Instant>, Option<Instant>) = (None, None);
        loop {
            tokio::select! {
                message = stream.message() => {
                    if let Some(within) = self.take(incoming(message)?) {
                        let moment = within.mul_f64(self.rng.random_range(0.0..=1.0));
                        leave_at = leave_at.or(Some(Instant::now() + moment));
                    }
                }
                changed = changes.changed(), if tell_at.is_none() => match changed {
                    Ok(()) => tell_at = Some(Instant::now() + BATCH),
                    Err(_) => return Err(Failure::Unavailable("the director is stopping".into())),
                },
                () = until(tell_at) => {
                    tell_at = None;
                    let now = self.relaying.devices();
                    for changed in differences(&told, &now) {
                        outgoing.send(session_request::Message::DevicesChanged(changed)).await?;
                    }
                    told = now;
                }
                _ = report.tick() => {
                    outgoing.send(session_request::Message::Report(self.report())).await?;
                    if renewals.is_empty() && Timestamp::now() >= self.renewal {
                        tracing::info!("renewing the certificate");
                        renewals.spawn(renew(channel.clone()));
                    }
                }
                Ok(()) = draining.changed() => {
                    outgoing.send(session_request::Message::Report(self.report())).await?;
                }
                Some(renewed) = renewals.join_next() => {
                    self.renewed(renewed.unwrap_or_else(|error| Err(error.to_string())));
                }
                () = until(leave_at) => return Err(Failure::Moved),
            }
        }
    }

    fn report(&self) -> Report {
        let (frames, octets) = self.relaying.relayed();
        let attached = self.relaying.devices().len();
        Report {
            attached: u64::try_from(attached).unwrap_or(u64::MAX),
            frames,
            octets,
            draining: *self.draining.borrow(),
        }
    }

    /// Takes a message of the registrar's. Returns within which time it wants to be left, if so.
    fn take(&mut self, message: SessionResponse) -> Option<Duration> {
        match message.message? {
            session_response::Message::Config(config) => self.apply(&config),
            session_response::Message::DevicesRefused(refused) => {
                let devices: Vec<Uuid> =
                    refused.device_uids.iter().filter_map(|uid| Uuid::from_slice(uid).ok()).collect();
                tracing::info!(devices = devices.len(), "the registrar refuses devices");
                self.relaying.refuse(&devices);
            }
            session_response::Message::RootsChanged(changed) => self.replace_roots(&changed.roots),
            session_response::Message::Drain(drain) => {
                let within = drain.within.map_or(Duration::ZERO, |within| {
                    Duration::from_secs(u64::try_from(within.seconds).unwrap_or(0))
                        + Duration::from_nanos(u64::try_from(within.nanos).unwrap_or(0))
                });
                return Some(within.min(DRAIN_MAX));
            }
        }
        None
    }
}

/// The next message of the stream.
fn incoming(message: Result<Option<SessionResponse>, Status>) -> Result<SessionResponse, Failure> {
    match message {
        Ok(Some(message)) => Ok(message),
        Ok(None) => Err(Failure::Unavailable("the registrar has ended the session".into())),
        Err(status) => Err(failure(&status)),
    }
}

/// The result of a call, unless its time is over.
fn answer<T>(outcome: Result<Result<T, Failure>, tokio::time::error::Elapsed>) -> Result<T, Failure> {
    outcome.unwrap_or_else(|_| {
        Err(Failure::Unavailable(format!("no answer within {} s", CALL_TIMEOUT.as_secs())))
    })
}

fn failure(status: &Status) -> Failure {
    match status.code() {
        Code::PermissionDenied | Code::Unauthenticated | Code::NotFound => {
            Failure::Refused(status.message().to_owned())
        }
        _ => Failure::Unavailable(grpc::words(status)),
    }
}

/// Asks for the next certificate, for a new key.
async fn renew(channel: Channel) -> Result<(Zeroizing<String>, RenewResponse), String> {
    let key = new_tls_key().map_err(|e| e.to_string())?;
    let request = RenewRequest { certificate_request: certificate_request(&key).map_err(|e| e.to_string())? };
    let mut client = DirectorServiceClient::new(channel);
    match timeout(CALL_TIMEOUT, client.renew(request)).await {
        Ok(Ok(response)) => Ok((key, response.into_inner())),
        Ok(Err(status)) => Err(grpc::words(&status)),
        Err(_) => Err(format!("no answer within {} s", CALL_TIMEOUT.as_secs())),
    }
}

/// All of `devices`, in as many messages as they need, which is one at least.
fn hellos(devices: &[Uuid]) -> VecDeque<SessionHello> {
    let mut messages: VecDeque<SessionHello> = devices
        .chunks(DEVICES_MAX)
        .map(|chunk| SessionHello { device_uids: octets(chunk), more_follow: true })
        .collect();
    match messages.back_mut() {
        Some(last) => last.more_follow = false,
        None => messages.push_back(SessionHello::default()),
    }
    messages
}

/// What has changed from `before` to `now`, both in ascending order, in as many messages as that needs.
fn differences(before: &[Uuid], now: &[Uuid]) -> Vec<DevicesChanged> {
    let missing = |from: &[Uuid], all: &[Uuid]| -> Vec<Uuid> {
        from.iter().filter(|device| all.binary_search(device).is_err()).copied().collect()
    };
    let detached = missing(before, now);
    let attached = missing(now, before);
    let detached = detached
        .chunks(DEVICES_MAX)
        .map(|chunk| DevicesChanged { attached: Vec::new(), detached: octets(chunk) });
    let attached = attached
        .chunks(DEVICES_MAX)
        .map(|chunk| DevicesChanged { attached: octets(chunk), detached: Vec::new() });
    detached.chain(attached).collect()
}

fn octets(devices: &[Uuid]) -> Vec<Vec<u8>> {
    devices.iter().map(|device| device.as_bytes().to_vec()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn devices(numbers: std::ops::Range<u128>) -> Vec<Uuid> {
        numbers.map(Uuid::from_u128).collect()
    }

    #[test]
    fn hellos_name_every_device_once() {
        assert_eq!(hellos(&[]), [SessionHello::default()]);
        for count in [1, DEVICES_MAX, DEVICES_MAX + 1, 3 * DEVICES_MAX] {
            let all = devices(0..u128::try_from(count).unwrap());
            let messages = hellos(&all);
            let named: Vec<_> = messages.iter().flat_map(|m| m.device_uids.clone()).collect();
            assert_eq!(named, octets(&all));
            let more: Vec<_> = messages.iter().map(|m| m.more_follow).collect();
            assert_eq!(more.iter().filter(|more| !**more).count(), 1);
            assert_eq!((more.last(), more.len()), (Some(&false), count.div_ceil(DEVICES_MAX)));
        }
    }

    #[test]
    fn differences_tell_of_what_has_changed_alone() {
        assert_eq!(differences(&devices(0..5), &devices(0..5)), []);
        let changed = differences(&devices(0..5), &devices(2..6));
        let detached: Vec<_> = changed.iter().flat_map(|c| c.detached.clone()).collect();
        let attached: Vec<_> = changed.iter().flat_map(|c| c.attached.clone()).collect();
        assert_eq!((detached, attached), (octets(&devices(0..2)), octets(&devices(5..6))));
        let many = differences(&[], &devices(0..20_000));
        assert_eq!(many.len(), 3);
        assert!(many.iter().all(|c| c.attached.len() <= DEVICES_MAX && c.detached.is_empty()));
    }

    #[test]
    fn refusals_are_told_from_outages() {
        assert_eq!(failure(&Status::permission_denied("revoked")), Failure::Refused("revoked".into()));
        assert_eq!(failure(&Status::unavailable("busy")), Failure::Unavailable("busy".into()));
        assert_eq!(incoming(Ok(None)).unwrap_err().clone_kind(), "unavailable");
    }

    impl Failure {
        fn clone_kind(&self) -> &'static str {
            match self {
                Self::Moved => "moved",
                Self::Unavailable(_) => "unavailable",
                Self::Refused(_) => "refused",
            }
        }
    }
}
