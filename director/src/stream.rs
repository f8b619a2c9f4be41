//! Frames over TCP, for devices that UDP is blocked for: batches of them are the messages of a gRPC stream.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::{Bytes, BytesMut};
use muster_common::{
    frame::{BATCH, push_frame},
    time::Instant,
};
use muster_net::UdpSockets;
use muster_proto::director::{RelayRequest, RelayResponse};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::Stream;
use tonic::{Status, Streaming};
use uuid::Uuid;

use crate::{
    hub::Hub,
    relay::{Dropped, Drops, Verdicts},
    udp,
};

/// Octets of the largest message: a batch, with what protobuf puts around it.
pub(crate) const MESSAGE: usize = BATCH + 64;
/// Messages to a device that are put into one, if they wait and fit.
const TOGETHER: usize = BATCH / 2;

/// Frames from a device.
pub(crate) struct Up {
    pub(crate) hub: Arc<Hub>,
    pub(crate) sockets: Arc<UdpSockets>,
    pub(crate) session: u32,
    pub(crate) device: Uuid,
    pub(crate) notices: mpsc::WeakSender<Bytes>,
}

impl Up {
    /// Passes frames on until the device ends the stream, or the director does.
    pub(crate) async fn run(
        self,
        first: Bytes,
        mut requests: Streaming<RelayRequest>,
        mut over: oneshot::Receiver<()>,
    ) {
        let mut frames = first;
        loop {
            if !frames.is_empty() {
                self.pass_on(frames);
            }
            let message = tokio::select! {
                message = requests.message() => message,
                _ = &mut over => break,
            };
            match message {
                Ok(Some(request)) => frames = request.frames,
                Ok(None) | Err(_) => break,
            }
        }
        self.hub.close_stream(self.session, self.device, &self.notices);
        tracing::debug!(device = %self.device, "the stream of frames has ended");
    }

    fn pass_on(&self, frames: Bytes) {
        if frames.len() > BATCH {
            let mut drops = Drops::default();
            drops.add(Dropped::Malformed, 1);
            return self.hub.metrics.dropped(&drops);
        }
        // It is our own, unless the next message has come with it.
        let mut batch = frames.try_into_mut().unwrap_or_else(|shared| BytesMut::from(&*shared));
        let mut verdicts = Verdicts::of_stream(0);
        let octets = batch.len() as u64;
        self.hub.read().forward_batch(self.session, &mut batch, Instant::now(), &mut verdicts);
        let passed: usize =
            verdicts.forwards.iter().map(|run| run.range.len().div_ceil(run.datagram_len)).sum();
        let dropped: u64 = verdicts.drops.iter().map(|(_, frames)| frames).sum();
        self.hub.metrics.tcp.received.count(passed as u64 + dropped, octets, 1);
        udp::send_runs(&self.hub, &self.sockets, &verdicts.forwards, &batch, &mut verdicts.drops);
        let mut batches = Vec::new();
        udp::collect(&verdicts.forwards, &batch, &mut batches);
        if !batches.is_empty() {
            self.hub.send_by_streams(batches.into_iter(), &mut verdicts.drops);
        }
        self.tell(&verdicts);
        self.hub.metrics.dropped(&verdicts.drops);
    }

    fn tell(&self, verdicts: &Verdicts) {
        let Some(sender) = self.notices.upgrade().filter(|_| !verdicts.told.is_empty()) else { return };
        let mut batch = Vec::new();
        for notice in &verdicts.told {
            push_frame(&mut batch, notice);
        }
        self.hub.metrics.notices.inc_by(verdicts.told.len() as u64);
        let _ = sender.try_send(batch.into());
    }
}

/// Frames to a device.
pub(crate) struct Down {
    frames: mpsc::Receiver<Bytes>,
    /// Taken already, and did not fit.
    next: Option<Bytes>,
}

impl Down {
    pub(crate) fn new(frames: mpsc::Receiver<Bytes>) -> Self {
        Self { frames, next: None }
    }

    /// Small batches that wait leave in one message, which costs less than each by itself.
    fn together(&mut self, first: Bytes) -> Bytes {
        let mut batch: Option<BytesMut> = None;
        while batch.as_ref().map_or(first.len(), BytesMut::len) < TOGETHER
            && let Ok(next) = self.frames.try_recv()
        {
            let batch = batch.get_or_insert_with(|| BytesMut::from(&*first));
            if batch.len() + next.len() > BATCH {
                self.next = Some(next);
                break;
            }
            batch.extend_from_slice(&next);
        }
        batch.map_or(first, BytesMut::freeze)
    }
}

impl Stream for Down {
    type Item = Result<RelayResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let first = match self.next.take() {
            Some(first) => Some(first),
            None => match self.frames.poll_recv(cx) {
                Poll::Ready(first) => first,
                Poll::Pending => return Poll::Pending,
            },
        };
        Poll::Ready(first.map(|first| Ok(RelayResponse { frames: self.together(first) })))
    }
}
