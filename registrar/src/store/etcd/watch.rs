//! Watching etcd: across lost connections and changes of leader, each revision exactly once.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use rand::RngExt;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataValue;
use tonic::{Request, Status, Streaming};

use super::connection::Connection;
use super::{key_value, proto};
use crate::store::{Event, Revision, StoreError, WatchBatch, WatchStream};

/// How long to wait for a watch to be confirmed.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);
/// Between attempts to reconnect: doubling from the first to the last, less up to half.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

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
    _requests: mpsc::Sender<proto::WatchRequest>,
    member: usize,
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
            let reason = match open.responses.message().await {
                Ok(Some(response)) => match self.take(response)? {
                    None => {
                        self.backoff = BACKOFF.0;
                        continue;
                    }
                    Some(reason) => reason,
                },
                Ok(None) => "etcd ended the watch".into(),
                Err(status) => muster_common::grpc::chain(&status),
            };
            tracing::warn!(%reason, next = self.next, "lost the watch on etcd, reconnecting");
            self.connection.leave(open_member(&self.open));
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
            Err(error) => tracing::debug!(%error, "cannot watch etcd"),
        }
    }

    async fn open(&self) -> Result<Open, StoreError> {
        let (mut client, member) = self.connection.current();
        let attempt = async {
            let (requests, queue) = mpsc::channel(1);
            // Revision by revision, etcd says that the one before `next` is compacted exactly if changes from
            // `next` on can be missing: a deletion at a compacted revision itself is forgotten in silence.
            let start_revision = self.next.saturating_sub(1).max(1).cast_signed();
            let create = proto::WatchCreateRequest {
                key: self.key.clone(),
                range_end: self.end.clone(),
                start_revision,
                progress_notify: true,
            };
            let create = proto::watch_request::RequestUnion::CreateRequest(create);
            requests
                .send(proto::WatchRequest { request_union: Some(create) })
                .await
                .map_err(|_| Status::internal("the request could not be queued"))?;
            let mut request = Request::new(ReceiverStream::new(queue));
            // A member that is cut off from the others ends the watch instead of staying silent.
            request.metadata_mut().insert("hasleader", MetadataValue::from_static("true"));
            let mut responses = client.watch.watch(request).await?.into_inner();
            match responses.message().await? {
                Some(response) if response.created && !response.canceled => {
                    Ok(Open { responses, _requests: requests, member })
                }
                Some(response) => Err(Status::permission_denied(response.cancel_reason)),
                None => Err(Status::unavailable("etcd ended the watch at once")),
            }
        };
        let result = match tokio::time::timeout(OPEN_TIMEOUT, attempt).await {
            Ok(result) => result.map_err(|status| muster_common::grpc::chain(&status)),
            Err(_) => Err(format!("no answer within {} s", OPEN_TIMEOUT.as_secs())),
        };
        result.map_err(|reason| {
            self.connection.leave(member);
            StoreError::Unavailable(format!("cannot watch etcd: {reason}"))
        })
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

fn open_member(open: &Option<Open>) -> usize {
    open.as_ref().map_or(0, |open| open.member)
}
