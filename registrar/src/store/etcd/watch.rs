//! Watching etcd: across lost connections and changes of leader, each revision exactly once.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use rand::RngExt;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status, Streaming};

use super::connection::Connection;
use super::failure::Kind;
use super::members::Client;
use super::{key_value, proto};
use crate::store::{Event, Revision, StoreError, WatchBatch, WatchStream};

/// After this much silence etcd is asked whether it is there, and again each time.
const QUIET: Duration = Duration::from_secs(1);
/// How often it may fail to say so: three times, or a moment in which it catches up would be taken for the end.
const UNANSWERED: u32 = 3;
/// Between attempts to reconnect: doubling from the first to the last, less up to half.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

/// The number of the watch in answers to the question whether etcd is there.
const THERE: i64 = -1;

struct Watch {
    connection: Arc<Connection>,
    key: Bytes,
    end: Bytes,
    /// The length of the prefix that the store's keys have in etcd.
    prefix: usize,
    /// The next revision to tell about.
    next: Revision,
    ready: VecDeque<WatchBatch>,
    open: Option<Open>,
    backoff: Duration,
}

/// A watch that etcd has confirmed.
struct Open {
    responses: Streaming<proto::WatchResponse>,
    /// The watch ends when this does.
    requests: mpsc::Sender<proto::WatchRequest>,
    member: usize,
    /// How often etcd has been asked in vain whether it is there.
    unanswered: u32,
}

impl Open {
    /// What comes next, `None` if that is only that etcd is there; or else why the watch has ended.
    async fn next(&mut self) -> Result<Option<proto::WatchResponse>, String> {
        match tokio::time::timeout(QUIET, self.responses.message()).await {
            Ok(Ok(Some(response))) => {
                self.unanswered = 0;
                // Not everything before the revision that this tells of has been told by older versions of etcd.
                Ok(Some(response).filter(|response| response.watch_id != THERE || response.canceled))
            }
            Ok(Ok(None)) => Err("etcd ended the watch".into()),
            Ok(Err(status)) => Err(muster_common::grpc::chain(&status)),
            Err(_) if self.unanswered >= UNANSWERED => {
                Err(format!("etcd has been silent for {} s", (QUIET * (UNANSWERED + 1)).as_secs()))
            }
            Err(_) => {
                self.unanswered += 1;
                let ask = proto::watch_request::RequestUnion::ProgressRequest(proto::WatchProgressRequest {});
                // If the queue is full, the last one has not left yet.
                let _ = self.requests.try_send(proto::WatchRequest { request_union: Some(ask) });
                Ok(None)
            }
        }
    }
}

/// Starts a watch on the keys from `key` to `end` in etcd.
pub(super) async fn stream(
    connection: Arc<Connection>,
    key: Bytes,
    end: Bytes,
    prefix: usize,
    from: Revision,
) -> Result<WatchStream, StoreError> {
    let ready = VecDeque::new();
    let mut watch = Watch { connection, key, end, prefix, next: from, ready, open: None, backoff: BACKOFF.0 };
    watch.open = Some(watch.open().await?);
    Ok(Box::pin(stream::unfold(Some(watch), |watch| async {
        let mut watch = watch?;
        match watch.next().await {
            Ok(batch) => Some((Ok(batch), Some(watch))),
            Err(error) => Some((Err(error), None)),
        }
    })))
}

impl Watch {
    async fn next(&mut self) -> Result<WatchBatch, StoreError> {
        loop {
            if let Some(batch) = self.ready.pop_front() {
                return Ok(batch);
            }
            let Some(open) = &mut self.open else {
                self.reopen().await;
                continue;
            };
            let member = open.member;
            let reason = match open.next().await {
                Ok(response) => {
                    if open.unanswered == 0 {
                        self.connection.heard(member);
                    }
                    match response.map_or(Ok(None), |response| self.take(response))? {
                        None => {
                            self.backoff = BACKOFF.0;
                            continue;
                        }
                        Some(reason) => reason,
                    }
                }
                Err(reason) => reason,
            };
            tracing::warn!(%reason, next = self.next, "lost the watch on etcd, reconnecting");
            self.connection.leave(member);
            self.open = None;
        }
    }

    /// Tries once, after a pause.
    async fn reopen(&mut self) {
        let pause = self.backoff.mul_f64(rand::rng().random_range(0.5..=1.0));
        self.backoff = (self.backoff * 2).min(BACKOFF.1);
        tokio::time::sleep(pause).await;
        match self.open().await {
            Ok(open) => {
                tracing::info!(next = self.next, "watching etcd again");
                self.open = Some(open);
            }
            Err(error) => tracing::warn!(%error, "cannot watch etcd; trying again"),
        }
    }

    async fn open(&self) -> Result<Open, StoreError> {
        let create = proto::WatchCreateRequest {
            key: self.key.clone(),
            range_end: self.end.clone(),
            // Revision by revision, etcd says that the one before `next` is compacted exactly if changes from
            // `next` on can be missing: a deletion at a compacted revision itself is forgotten in silence.
            start_revision: self.next.saturating_sub(1).max(1).cast_signed(),
            progress_notify: true,
        };
        self.connection.call(Kind::Read(None), move |client| Box::pin(open(client, create.clone()))).await
    }

    /// Sorts out a response; returns why the watch has to be opened again, if it has to.
    fn take(&mut self, response: proto::WatchResponse) -> Result<Option<String>, StoreError> {
        if response.canceled {
            return match response.compact_revision {
                0 => Ok(Some(format!("etcd canceled the watch: {}", response.cancel_reason))),
                compacted => Err(StoreError::Compacted { oldest: compacted.cast_unsigned() + 1 }),
            };
        }
        let progress = response.events.is_empty() && !response.created;
        for event in response.events {
            let deleted = event.r#type() == proto::event::EventType::Delete;
            let Some(kv) = event.kv else { continue };
            let kv = key_value(&kv, self.prefix);
            let revision = kv.mod_revision;
            if revision < self.next {
                continue;
            }
            let event = if deleted { Event::Delete { key: kv.key } } else { Event::Put(kv) };
            match self.ready.back_mut() {
                Some(last) if last.revision == revision => last.events.push(event),
                _ => self.ready.push_back(WatchBatch { revision, events: vec![event] }),
            }
        }
        if let Some(last) = self.ready.back() {
            self.next = last.revision + 1;
        }
        // Sent only to watches that have been told everything so far.
        let told = response.header.map_or(0, |header| header.revision.cast_unsigned());
        if progress && told >= self.next {
            self.next = told + 1;
            self.ready.push_back(WatchBatch { revision: told, events: Vec::new() });
        }
        Ok(None)
    }
}

/// Starts a watch at one member, and waits until it has confirmed that.
async fn open(client: Client, create: proto::WatchCreateRequest) -> Result<Response<Open>, Status> {
    let (requests, queue) = mpsc::channel(2);
    let create = proto::watch_request::RequestUnion::CreateRequest(create);
    requests
        .try_send(proto::WatchRequest { request_union: Some(create) })
        .map_err(|_| Status::internal("the request could not be queued"))?;
    let mut responses = client.watch().watch(ReceiverStream::new(queue)).await?.into_inner();
    match responses.message().await? {
        Some(response) if response.created && !response.canceled => {
            Ok(Response::new(Open { responses, requests, member: client.member, unanswered: 0 }))
        }
        // Said also of a token that etcd does not know any more.
        Some(response) => Err(Status::unauthenticated(response.cancel_reason)),
        None => Err(Status::unavailable("etcd ended the watch at once")),
    }
}
