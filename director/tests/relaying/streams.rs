//! Frames over TCP.

use std::time::Duration;

use bytes::Bytes;
use muster_common::frame::{self, DataHeader, Handle, frames, push_frame};
use muster_director::relay::Limits;
use muster_proto::director::{RelayRequest, RelayResponse};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use crate::{
    agent::Agent,
    attach::{Held, attach},
    site::{Client, Site, uid, until},
};

/// A device's side of its stream of frames.
struct Relayed {
    requests: mpsc::Sender<RelayRequest>,
    responses: Streaming<RelayResponse>,
    /// Come, and not yet asked for.
    waiting: std::collections::VecDeque<Vec<u8>>,
}

impl Relayed {
    async fn open(client: &mut Client, session: u32) -> Result<Self, Status> {
        let (requests, receiver) = mpsc::channel(4);
        requests.send(RelayRequest { session, frames: Bytes::new() }).await.unwrap();
        let responses = client.relay(ReceiverStream::new(receiver)).await?.into_inner();
        Ok(Self { requests, responses, waiting: Default::default() })
    }

    /// Sends a run, cut into frames of so many octets.
    async fn send(&self, run: &[u8], frame_len: usize) {
        let mut batch = Vec::new();
        for frame in run.chunks(frame_len) {
            assert!(push_frame(&mut batch, frame));
        }
        self.requests.send(RelayRequest { session: 0, frames: batch.into() }).await.unwrap();
    }

    async fn next(&mut self) -> Result<Option<Vec<u8>>, Status> {
        while self.waiting.is_empty() {
            let message = tokio::time::timeout(Duration::from_secs(10), self.responses.message());
            let Some(response) = message.await.unwrap()? else { return Ok(None) };
            self.waiting.extend(frames(&response.frames).map(<[u8]>::to_vec));
        }
        Ok(self.waiting.pop_front())
    }

    async fn take(&mut self, octets: usize) -> Vec<u8> {
        let mut taken = Vec::new();
        while taken.len() < octets {
            taken.extend(self.next().await.unwrap().unwrap());
        }
        taken
    }
}

/// A device with a stream, and one with UDP.
async fn two(site: &Site) -> ((Client, Held, Agent, Relayed), (Client, Held, Agent)) {
    let (mut one, mut two) = (site.device(1).await, site.device(2).await);
    let (first, second) = (attach(&mut one).await.unwrap(), attach(&mut two).await.unwrap());
    let (a, mut b) = (first.agent(site, 1), second.agent(site, 2));
    assert!(b.hello(0).0);
    let stream = Relayed::open(&mut one, a.session).await.unwrap();
    ((one, first, a, stream), (two, second, b))
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_pass_both_ways() {
    let site = Site::new(Limits::default()).await;
    let ((_one, _held, a, mut stream), (_two, _other, mut b)) = two(&site).await;
    for _ in 0..20 {
        stream.send(&a.frames(&b, &[1_000; 30]), 1_016).await;
        let messages = b.receive(Duration::from_secs(10));
        assert_eq!(messages.len(), 1, "frames of equal length leave as one run");
        assert_eq!(messages[0].1, a.arrived(&b, &[1_000; 30]));
        b.send(&b.frames(&a, &[1_000; 40]), 1_016);
        assert!(stream.take(40 * 1_016).await == b.arrived(&a, &[1_000; 40]));
    }
    assert_eq!(site.counter("frames_total{transport=\"tcp\",direction=\"received\"}"), 600);
    assert_eq!(site.counter("frames_total{transport=\"tcp\",direction=\"sent\"}"), 800);
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_pass_from_stream_to_stream() {
    let site = Site::new(Limits::default()).await;
    let ((_one, _held, a, mut stream), (mut two, _other, b)) = two(&site).await;
    let mut back = Relayed::open(&mut two, b.session).await.unwrap();
    stream.send(&a.frames(&b, &[1_300; 45]), 1_316).await;
    assert!(back.take(45 * 1_316).await == a.arrived(&b, &[1_300; 45]));
    back.send(&b.frames(&a, &[40]), 56).await;
    assert_eq!(stream.next().await.unwrap().unwrap(), b.arrived(&a, &[40]));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_told_comes_by_the_stream() {
    let site = Site::new(Limits::default()).await;
    let ((_one, _held, a, mut stream), _) = two(&site).await;
    let header = DataHeader { session: a.session, handle: Handle(99) };
    stream.send(&[header.octets().as_slice(), &[4; 100]].concat(), 116).await;
    assert_eq!(stream.next().await.unwrap().unwrap(), frame::unreachable(header));
}

#[tokio::test(flavor = "multi_thread")]
async fn udp_takes_over_when_it_works_again() {
    let site = Site::new(Limits::default()).await;
    let ((_one, _held, mut a, stream), (_two, _other, mut b)) = two(&site).await;
    let (is_bound, proof) = a.hello(0);
    assert!(!is_bound, "it has to be seen to arrive");
    assert!(a.hello(proof).0);
    b.send(&b.frames(&a, &[100]), 116);
    assert_eq!(a.next().unwrap(), b.arrived(&a, &[100]));
    stream.send(&a.frames(&b, &[100]), 116).await;
    assert_eq!(b.next().unwrap(), a.arrived(&b, &[100]), "what is still in the stream passes");
    drop(stream);
    until("the stream is gone", || site.metrics.encode().contains("muster_director_streams 0\n")).await;
    b.send(&b.frames(&a, &[100]), 116);
    assert_eq!(a.next().unwrap(), b.arrived(&a, &[100]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_of_another_device_is_no_way_in() {
    let site = Site::new(Limits::default()).await;
    let ((_one, _held, a, stream), (mut two, _other, mut b)) = two(&site).await;
    let status = Relayed::open(&mut two, a.session).await.err().unwrap();
    assert_eq!(status.code(), Code::NotFound);
    // Nor can the own stream carry frames of another session.
    stream.send(&b.frames(&a, &[100]), 116).await;
    until("it is dropped", || site.counter("drops_total{reason=\"malformed\"}") == 1).await;
    stream.send(&a.frames(&b, &[100]), 116).await;
    assert_eq!(b.next().unwrap(), a.arrived(&b, &[100]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_devices_stream_ends_at_once() {
    let site = Site::new(Limits::default()).await;
    let ((mut one, _held, a, mut stream), (_two, _other, mut b)) = two(&site).await;
    site.running.refuse(&[uid(1)]);
    let ended = tokio::time::timeout(Duration::from_secs(1), stream.next()).await.unwrap();
    assert!(matches!(ended, Ok(None) | Err(_)));
    assert!(b.gets_nothing());
    assert_eq!(Relayed::open(&mut one, a.session).await.err().unwrap().code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_does_not_read_costs_so_much_and_no_more() {
    let site = Site::new(Limits { octets_per_second: 0, ..Limits::default() }).await;
    let ((_one, _held, a, mut stream), (_two, _other, b)) = two(&site).await;
    // 40 MiB in frames; what flow control and 64 batches take is less.
    for n in 0..1_000 {
        b.send(&b.frames(&a, &[1_000; 40]), 1_016);
        if n % 10 == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    until("the rest is dropped", || site.counter("drops_total{reason=\"full\"}") > 0).await;
    // Others are served, and it is, once it reads.
    let sent = site.counter("frames_total{transport=\"tcp\",direction=\"sent\"}");
    assert!(stream.take(sent as usize * 1_016).await.len() == sent as usize * 1_016);
    b.send(&b.frames(&a, &[77]), 93);
    assert_eq!(stream.next().await.unwrap().unwrap(), b.arrived(&a, &[77]));
}
