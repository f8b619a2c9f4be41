//! Attaching over TLS.

use std::time::Duration;

use muster_director::relay::Limits;
use muster_proto::director::{AttachRequest, AttachResponse, Attached, attach_response::Message};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use crate::{
    agent::Agent,
    site::{Client, Site, ca, uid, until},
};

/// A device's side of its attachment.
pub(crate) struct Held {
    pub(crate) attached: Attached,
    pub(crate) requests: mpsc::Sender<AttachRequest>,
    pub(crate) responses: Streaming<AttachResponse>,
}

impl Held {
    pub(crate) fn agent(&self, site: &Site, device: u8) -> Agent {
        let key = self.attached.key.as_slice().try_into().unwrap();
        Agent::new(site.udp, uid(device), self.attached.session, key)
    }

    async fn next(&mut self) -> Result<Option<AttachResponse>, Status> {
        tokio::time::timeout(Duration::from_secs(10), self.responses.message()).await.unwrap()
    }
}

pub(crate) async fn attach(client: &mut Client) -> Result<Held, Status> {
    let (requests, receiver) = mpsc::channel(1);
    requests.send(AttachRequest { agent_version: "1".into() }).await.unwrap();
    let mut responses = client.attach(ReceiverStream::new(receiver)).await?.into_inner();
    match responses.message().await?.and_then(|response| response.message) {
        Some(Message::Attached(attached)) => Ok(Held { attached, requests, responses }),
        other => panic!("{other:?}"),
    }
}

async fn code(client: &mut Client) -> Code {
    attach(client).await.err().unwrap().code()
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_attach_and_frames_pass() {
    let site = Site::new(Limits::default()).await;
    let mut changes = site.running.attached();
    let (mut one, mut two) = (site.device(1).await, site.device(2).await);
    let (first, second) = (attach(&mut one).await.unwrap(), attach(&mut two).await.unwrap());
    assert_eq!(first.attached.endpoints[0].port, u32::from(site.udp.port()));
    assert_eq!(first.attached.handle, 0x0101_0101_0101_0101);
    assert_eq!(first.attached.hello_interval.unwrap().seconds, 15);
    assert!(changes.has_changed().unwrap() && *changes.borrow_and_update() == 2);
    assert_eq!(site.running.devices(), [uid(1), uid(2)]);
    let (mut a, mut b) = (first.agent(&site, 1), second.agent(&site, 2));
    assert!(a.hello(0).0 && b.hello(0).0);
    a.send(&a.frames(&b, &[1_000; 10]), 1_016);
    assert_eq!(b.take(10 * 1_016), a.arrived(&b, &[1_000; 10]));
    assert!(site.metrics.encode().contains("muster_director_bound 2\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn only_devices_of_the_network() {
    let site = Site::new(Limits::default()).await;
    let uid = uid(1);
    for party in [
        format!("network/other/device/{uid}"),
        format!("network/net/director/{uid}"),
        format!("registrar/{uid}"),
        "operator/admin".into(),
        "network/net/device/no-uid".into(),
    ] {
        let mut client = site.client(&site.ca, &party).await.unwrap();
        assert_eq!(code(&mut client).await, Code::PermissionDenied, "{party}");
    }
    // A certificate of somebody else's CA ends in the handshake.
    let foreign = site.client(&ca(), &format!("network/net/device/{uid}")).await;
    if let Ok(mut client) = foreign {
        assert!(attach(&mut client).await.is_err());
    }
    assert!(site.running.devices().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_device_is_told_at_once_and_cannot_come_back() {
    let site = Site::new(Limits::default()).await;
    let (mut one, mut two) = (site.device(1).await, site.device(2).await);
    let (mut held, other) = (attach(&mut one).await.unwrap(), attach(&mut two).await.unwrap());
    site.running.refuse(&[uid(1)]);
    let status = tokio::time::timeout(Duration::from_secs(1), held.next()).await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    assert_eq!(code(&mut one).await, Code::PermissionDenied);
    assert_eq!(site.running.devices(), [uid(2)]);
    assert_eq!(site.counter("attach_refused_total{reason=\"refused\"}"), 1);
    drop(other);
}

#[tokio::test(flavor = "multi_thread")]
async fn draining_is_told_and_nobody_comes_any_more() {
    let site = Site::new(Limits::default()).await;
    let (mut one, mut two) = (site.device(1).await, site.device(2).await);
    let mut held = attach(&mut one).await.unwrap();
    site.running.drain(Duration::from_secs(30));
    let message = held.next().await.unwrap().unwrap().message;
    let Some(Message::Drain(drain)) = message else { panic!("{message:?}") };
    assert_eq!(drain.within.unwrap().seconds, 30);
    assert_eq!(code(&mut two).await, Code::Unavailable);
    assert!(site.running.counters().is_draining);
    let mut a = held.agent(&site, 1);
    assert!(a.hello(0).0, "who is there is served");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_director_takes_so_many() {
    let site = Site::new(Limits { devices: 1, ..Limits::default() }).await;
    let (mut one, mut two) = (site.device(1).await, site.device(2).await);
    let held = attach(&mut one).await.unwrap();
    assert_eq!(code(&mut two).await, Code::ResourceExhausted);
    drop(held);
    assert_eq!(site.counter("attach_refused_total{reason=\"full\"}"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_leaves_by_ending_its_stream() {
    let site = Site::new(Limits::default()).await;
    let (mut one, mut two) = (site.device(1).await, site.device(2).await);
    let mut politely = attach(&mut one).await.unwrap();
    let suddenly = attach(&mut two).await.unwrap();
    drop(politely.requests);
    let ended = tokio::time::timeout(Duration::from_secs(10), politely.responses.message()).await.unwrap();
    assert!(ended.unwrap().is_none());
    drop((suddenly, two));
    // Ten seconds later they are forgotten.
    let mut changes = site.running.attached();
    let gone = async {
        while !site.running.devices().is_empty() {
            changes.changed().await.unwrap()
        }
    };
    tokio::time::timeout(Duration::from_secs(20), gone).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn attaching_anew_loses_nothing() {
    let site = Site::new(Limits::default()).await;
    let (mut one, mut two) = (site.device(1).await, site.device(2).await);
    let (mut old, second) = (attach(&mut one).await.unwrap(), attach(&mut two).await.unwrap());
    let (mut a, mut b) = (old.agent(&site, 1), second.agent(&site, 2));
    assert!(a.hello(0).0 && b.hello(0).0);
    let mut again = site.device(1).await;
    let new = attach(&mut again).await.unwrap();
    b.send(&b.frames(&a, &[100]), 116);
    assert_eq!(a.next().unwrap(), b.arrived(&a, &[100]), "by the old one until the new one is reached");
    let mut renewed = new.agent(&site, 1);
    assert!(renewed.hello(0).0);
    b.send(&b.frames(&renewed, &[100]), 116);
    assert_eq!(renewed.next().unwrap(), b.arrived(&renewed, &[100]));
    a.send(&a.frames(&b, &[100]), 116);
    assert_eq!(b.next().unwrap(), a.arrived(&b, &[100]), "what is under way still passes");
    // The old one is ended from here if the device does not end it.
    let ended = tokio::time::timeout(Duration::from_secs(20), old.responses.message()).await.unwrap();
    assert_eq!(ended.unwrap_err().code(), Code::Aborted);
    assert_eq!(site.running.devices(), [uid(1), uid(2)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_connects_and_says_nothing_holds_nothing() {
    let site = Site::new(Limits::default()).await;
    let mut one = site.device(1).await;
    let (requests, receiver) = mpsc::channel::<AttachRequest>(1);
    let waiting = tokio::spawn(async move { one.attach(ReceiverStream::new(receiver)).await.map(drop) });
    let status = tokio::time::timeout(Duration::from_secs(20), waiting).await.unwrap().unwrap().unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    drop(requests);
    until("nobody is attached", || site.running.devices().is_empty()).await;
}
