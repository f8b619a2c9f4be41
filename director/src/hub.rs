//! Where the shells of a director meet: the relay behind its lock, and the streams of those attached to it.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::Duration,
};

use bytes::Bytes;
use muster_common::time::Instant;
use muster_proto::director::{AttachResponse, Drain, attach_response};
use tokio::sync::{mpsc, oneshot, watch};
use tonic::Status;
use uuid::Uuid;

use crate::{
    metrics::Metrics,
    relay::{AttachError, Attached, Dropped, Drops, Relay, Snapshot},
};

/// Batches of frames that wait for a stream to take them; more are dropped, as UDP's would be.
const BATCHES: usize = 64;
/// Messages that wait for an attachment's stream: what it was told first, that the director drains, that it has ended.
const MESSAGES: usize = 4;
/// Nothing in a relay is due sooner after it came about.
const TICK: Duration = Duration::from_secs(2);

pub(crate) type AttachSender = mpsc::Sender<Result<AttachResponse, Status>>;

/// The relay and its streams.
#[derive(Debug)]
pub(crate) struct Hub {
    relay: RwLock<Relay>,
    attachments: Mutex<HashMap<u32, AttachSender>>,
    streams: RwLock<HashMap<u32, Stream>>,
    /// Counts how often devices have come or gone.
    changes: watch::Sender<u64>,
    pub(crate) metrics: Metrics,
}

/// Takes frames to one device.
#[derive(Debug)]
struct Stream {
    frames: mpsc::Sender<Bytes>,
    /// Dropped with the stream, which tells the task that reads the other way.
    _alive: oneshot::Sender<()>,
}

/// A session, and both ends of what its device is told.
pub(crate) struct Admitted {
    pub(crate) attached: Attached,
    pub(crate) sender: AttachSender,
    pub(crate) messages: mpsc::Receiver<Result<AttachResponse, Status>>,
}

/// The ends of a stream that was opened.
pub(crate) struct Opened {
    /// Frames to the device.
    pub(crate) frames: mpsc::Receiver<Bytes>,
    /// For notices to it.
    pub(crate) notices: mpsc::WeakSender<Bytes>,
    /// Fails when the stream is to end.
    pub(crate) over: oneshot::Receiver<()>,
}

impl Hub {
    pub(crate) fn new(relay: Relay, metrics: Metrics) -> Self {
        Self {
            relay: RwLock::new(relay),
            attachments: Mutex::default(),
            streams: RwLock::default(),
            changes: watch::Sender::new(0),
            metrics,
        }
    }

    /// For frames. Held for one batch at a time.
    pub(crate) fn read(&self) -> RwLockReadGuard<'_, Relay> {
        self.relay.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// For everything else.
    pub(crate) fn write(&self) -> RwLockWriteGuard<'_, Relay> {
        self.relay.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        self.read().snapshot()
    }

    pub(crate) fn devices(&self) -> Vec<Uuid> {
        self.read().devices()
    }

    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn changed(&self) {
        self.changes.send_modify(|count| *count += 1);
    }

    /// A session, and what its device is to be told by its stream.
    pub(crate) fn attach(&self, device: Uuid, from: std::net::IpAddr) -> Result<Admitted, AttachError> {
        let (sender, receiver) = mpsc::channel(MESSAGES);
        let (attached, ended) = {
            let mut relay = self.write();
            let attached =
                relay.attach(device, from, Instant::now()).inspect_err(|e| self.metrics.refused(*e))?;
            // Before anybody can end it.
            self.attachments().insert(attached.session, sender.clone());
            (attached, relay.take_ended())
        };
        self.close(&ended, || Status::aborted("the device has attached anew"));
        self.changed();
        Ok(Admitted { attached, sender, messages: receiver })
    }

    /// The attachment's stream has ended.
    pub(crate) fn detach(&self, session: u32) {
        self.attachments().remove(&session);
        self.write().detach(session, Instant::now());
    }

    /// Refuses devices from now on, and ends what they have here.
    pub(crate) fn refuse(&self, devices: &[Uuid]) {
        let now = Instant::now();
        let ended = {
            let mut relay = self.write();
            devices.iter().for_each(|device| relay.refuse(*device, now));
            relay.take_ended()
        };
        self.close(&ended, || Status::permission_denied(AttachError::Refused.to_string()));
        self.changed();
    }

    /// Forgets whom it refuses.
    pub(crate) fn forgive(&self) {
        self.write().forgive();
    }

    /// Nobody attaches any more, and who is attached is asked to leave within that time.
    pub(crate) fn drain(&self, within: Duration) {
        self.write().drain();
        let within = pbjson_types::Duration {
            seconds: i64::try_from(within.as_secs()).unwrap_or(i64::MAX),
            nanos: i32::try_from(within.subsec_nanos()).unwrap_or(0),
        };
        let drain = || AttachResponse {
            message: Some(attach_response::Message::Drain(Drain { within: Some(within) })),
        };
        // If there is no room, it has been told, or reads nothing.
        self.attachments().values().for_each(|sender| drop(sender.try_send(Ok(drain()))));
        self.changed();
    }

    /// Ends what is to end by itself, for as long as the director runs.
    pub(crate) async fn keep_time(&self) {
        loop {
            tokio::time::sleep(TICK).await;
            let now = Instant::now();
            if self.read().poll_timeout().is_none_or(|at| now < at) {
                continue;
            }
            let (before, after, ended) = {
                let mut relay = self.write();
                let before = relay.device_count();
                relay.handle_timeout(now);
                (before, relay.device_count(), relay.take_ended())
            };
            self.close(&ended, || Status::aborted("the device has attached anew, or is gone"));
            if before != after {
                self.changed();
            }
        }
    }

    fn attachments(&self) -> MutexGuard<'_, HashMap<u32, AttachSender>> {
        self.attachments.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the streams of sessions that are over.
    fn close(&self, sessions: &[u32], reason: impl Fn() -> Status) {
        if sessions.is_empty() {
            return;
        }
        let mut streams = self.streams.write().unwrap_or_else(PoisonError::into_inner);
        let mut attachments = self.attachments();
        for session in sessions {
            streams.remove(session);
            if let Some(sender) = attachments.remove(session) {
                let _ = sender.try_send(Err(reason()));
            }
        }
    }

    /// The stream for frames of `session`, in place of an earlier one; `None` if that is no session of `device`.
    pub(crate) fn open_stream(&self, session: u32, device: Uuid) -> Option<Opened> {
        let (frames, receiver) = mpsc::channel(BATCHES);
        let (alive, over) = oneshot::channel();
        let notices = frames.downgrade();
        // In this order, as in `close`: a session that ends meanwhile takes the stream with it.
        let mut streams = self.streams.write().unwrap_or_else(PoisonError::into_inner);
        if !self.write().set_stream(session, device, true, Instant::now()) {
            return None;
        }
        streams.insert(session, Stream { frames, _alive: alive });
        Some(Opened { frames: receiver, notices, over })
    }

    /// The stream whose notices went by `notices` has ended.
    pub(crate) fn close_stream(&self, session: u32, device: Uuid, notices: &mpsc::WeakSender<Bytes>) {
        let mut streams = self.streams.write().unwrap_or_else(PoisonError::into_inner);
        let is_this = |stream: &Stream| notices.upgrade().is_some_and(|own| own.same_channel(&stream.frames));
        if streams.get(&session).is_some_and(is_this) {
            streams.remove(&session);
            self.write().set_stream(session, device, false, Instant::now());
        }
    }

    /// Hands batches of frames to the streams of sessions, and says how many found no room there.
    pub(crate) fn send_by_streams(&self, batches: impl Iterator<Item = (u32, Batch)>, drops: &mut Drops) {
        let streams = self.streams.read().unwrap_or_else(PoisonError::into_inner);
        for (session, batch) in batches {
            let (frames, octets) = (batch.frames, batch.octets.len() as u64);
            let sent = streams
                .get(&session)
                .is_some_and(|stream| stream.frames.try_send(batch.octets.into()).is_ok());
            if sent {
                self.metrics.tcp.sent.count(frames, octets, 1);
            } else {
                drops.add(Dropped::Full, frames);
            }
        }
    }
}

/// Frames that leave by a stream in one message.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(crate) octets: Vec<u8>,
    pub(crate) frames: u64,
}
