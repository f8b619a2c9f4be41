//! DNS over UDP: datagrams are read in batches, and answered from the address they came to.

use std::{
    io::{self, IoSliceMut},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use muster_common::time::Instant;
use quinn_udp::{RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use tokio::{io::Interest, net::UdpSocket, sync::Semaphore};

use super::{
    Handler, Handling, Source, canonical,
    limit::{Limiter, Rate, Verdict},
    metrics::{Listener, Metrics},
};
use crate::{
    engine::Outcome,
    message::{self, Parsed, Transport},
};

/// Datagrams, or trains of datagrams, read by one system call.
const BATCH: usize = 8;
/// Room for each: the kernel may hand over a train of datagrams as one.
const BUFFER: usize = 1 << 16;
/// Pause after an error of the socket that is not about one datagram.
const ERROR_PAUSE: Duration = Duration::from_millis(50);

/// Bounds of one UDP listener.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct UdpLimits {
    /// Responses per source prefix; `None` for no limit.
    pub rate: Option<Rate>,
    /// Queries at a time whose answer takes time; what exceeds it is dropped.
    pub pending: usize,
}

impl Default for UdpLimits {
    fn default() -> Self {
        Self { rate: Some(Rate::default()), pending: 4096 }
    }
}

struct Socket {
    socket: UdpSocket,
    state: UdpSocketState,
    metrics: Listener,
}

/// Serves `handler` on `socket` until dropped. An error means that the socket cannot be used at all.
pub async fn serve<H: Handler>(
    socket: UdpSocket,
    handler: Arc<H>,
    limits: UdpLimits,
    metrics: &Metrics,
) -> io::Result<()> {
    let metrics = metrics.listener(Transport::Udp, socket.local_addr()?);
    let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
    let socket = Arc::new(Socket { socket, state, metrics });
    let pending = Arc::new(Semaphore::new(limits.pending));
    let mut limiter = limits.rate.map(Limiter::new);
    let mut storage = vec![0; BATCH * BUFFER];
    let mut out = Vec::with_capacity(usize::from(message::UDP_CEILING));
    loop {
        let mut metas = [RecvMeta::default(); BATCH];
        let received = {
            let mut chunks = storage.chunks_exact_mut(BUFFER).map(IoSliceMut::new);
            let mut buffers: [IoSliceMut<'_>; BATCH] =
                std::array::from_fn(|_| chunks.next().unwrap_or_else(|| IoSliceMut::new(&mut [])));
            let read = || socket.state.recv(UdpSockRef::from(&socket.socket), &mut buffers, &mut metas);
            socket.socket.async_io(Interest::READABLE, read).await
        };
        let received = match received {
            Ok(received) => received,
            Err(error) => {
                tracing::debug!(%error, "cannot read DNS queries");
                tokio::time::sleep(ERROR_PAUSE).await;
                continue;
            }
        };
        let now = Instant::now();
        for (meta, buffer) in metas.iter().take(received).zip(storage.chunks_exact(BUFFER)) {
            let train = buffer.get(..meta.len).unwrap_or_default();
            for query in train.chunks(meta.stride.max(1)) {
                let source =
                    Source { address: canonical(meta.addr), transport: Transport::Udp, identity: None };
                let verdict = match &mut limiter {
                    Some(limiter) => limiter.check(source.address.ip(), now),
                    None => Verdict::Answer,
                };
                let reply = Reply { socket: &socket, meta, source, query: query.len(), started: now };
                match verdict {
                    Verdict::Drop => socket.metrics.dropped("rate"),
                    Verdict::Slip => {
                        socket.metrics.dropped("rate");
                        slip(query, &mut out);
                        socket.send(meta, &out).await;
                    }
                    Verdict::Answer => match handler.handle(query, &reply.source, &mut out) {
                        Handling::Done(outcome) => reply.send(outcome, &out).await,
                        Handling::Later(answer) => reply.send_later(answer, &pending),
                    },
                }
            }
        }
        // Everything was ready: give other tasks of this thread their turn.
        tokio::task::coop::consume_budget().await;
    }
}

/// An empty response with TC, which sends the client to TCP.
fn slip(query: &[u8], out: &mut Vec<u8>) {
    out.clear();
    if let Parsed::Request(request) = message::parse(query) {
        let mut response = request.response(hickory_proto::op::ResponseCode::NoError);
        response.metadata.truncation = true;
        if response.encode(message::UDP_MINIMUM, out).is_err() {
            out.clear();
        }
    }
}

struct Reply<'a> {
    socket: &'a Arc<Socket>,
    meta: &'a RecvMeta,
    source: Source,
    query: usize,
    started: Instant,
}

impl Reply<'_> {
    async fn send(self, outcome: Outcome, response: &[u8]) {
        let took = Instant::now() - self.started;
        self.socket.metrics.handled(&self.source, outcome, self.query, response.len(), took);
        self.socket.send(self.meta, response).await;
    }

    fn send_later(
        self,
        answer: futures_util::future::BoxFuture<'static, (Outcome, Vec<u8>)>,
        pending: &Arc<Semaphore>,
    ) {
        let Ok(slot) = Arc::clone(pending).try_acquire_owned() else {
            return self.socket.metrics.dropped("busy");
        };
        let (socket, meta, source) = (Arc::clone(self.socket), *self.meta, self.source);
        let (query, started) = (self.query, self.started);
        tokio::spawn(async move {
            let (outcome, response) = answer.await;
            Reply { socket: &socket, meta: &meta, source, query, started }.send(outcome, &response).await;
            drop(slot);
        });
    }
}

impl Socket {
    async fn send(&self, meta: &RecvMeta, response: &[u8]) {
        if response.is_empty() {
            return;
        }
        // From a multicast or broadcast address nothing can be sent.
        let src_ip = meta.dst_ip.filter(|ip| !ip.is_multicast() && *ip != IpAddr::from([255; 4]));
        let transmit =
            Transmit { destination: meta.addr, ecn: None, contents: response, segment_size: None, src_ip };
        let write = || self.state.try_send(UdpSockRef::from(&self.socket), &transmit);
        if let Err(error) = self.socket.async_io(Interest::WRITABLE, write).await {
            tracing::debug!(%error, "cannot send a DNS response");
        }
    }
}
