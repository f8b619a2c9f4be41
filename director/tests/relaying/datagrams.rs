//! Frames as datagrams.

use std::net::IpAddr;

use muster_common::frame;
use muster_director::relay::Limits;

use crate::{
    agent::Agent,
    site::{Site, uid},
};

/// A device that has attached from this address and not said hello.
fn attach(site: &Site, device: u8, from: &str, over_v6: bool) -> Agent {
    let attached = site.running.attach(uid(device), from.parse::<IpAddr>().unwrap()).unwrap();
    let director = if over_v6 { site.udp6 } else { site.udp };
    Agent::new(director, uid(device), attached.session, &attached.key)
}

fn bound(site: &Site, device: u8, over_v6: bool) -> Agent {
    let mut agent = attach(site, device, if over_v6 { "::1" } else { "127.0.0.1" }, over_v6);
    assert!(agent.hello(0).0);
    agent
}

#[tokio::test(flavor = "multi_thread")]
async fn runs_pass_whole_in_both_families() {
    let site = Site::new(Limits::default()).await;
    let (mut a, mut b) = (bound(&site, 1, false), bound(&site, 2, true));
    let received = "calls_total{transport=\"udp\",direction=\"received\"}";
    let before = site.counter(received);
    let mut lens = vec![1_200; 40];
    lens.push(99);
    a.send(&a.frames(&b, &lens), 1_216);
    let messages = b.receive(std::time::Duration::from_secs(10));
    assert_eq!(messages.len(), 1, "a run is one message");
    assert_eq!((messages[0].0.datagram_len, messages[0].0.ecn), (1_216, 2));
    assert_eq!(messages[0].1, a.arrived(&b, &lens));
    assert_eq!(site.counter(received) - before, 1, "and one call");
    assert_eq!(site.counter("frames_total{transport=\"udp\",direction=\"sent\"}"), 41);
    b.send(&b.frames(&a, &[32]), 48);
    assert_eq!(a.next().unwrap(), b.arrived(&a, &[32]));
    let counters = site.running.counters();
    assert_eq!((counters.attached, counters.frames), (2, 42));
}

#[tokio::test(flavor = "multi_thread")]
async fn many_runs_come_in_order() {
    let site = Site::new(Limits::default()).await;
    let (a, mut b, mut c) = (bound(&site, 1, false), bound(&site, 2, false), bound(&site, 3, true));
    for _ in 0..50 {
        let frames =
            [a.frames(&b, &[1_000; 20]), a.frames(&c, &[1_000; 10]), a.frames(&b, &[1_000; 5])].concat();
        a.send(&frames, 1_016);
        assert!(b.take(25 * 1_016) == [a.arrived(&b, &[1_000; 20]), a.arrived(&b, &[1_000; 5])].concat());
        assert!(c.take(10 * 1_016) == a.arrived(&c, &[1_000; 10]));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_sends_for_another() {
    let site = Site::new(Limits::default()).await;
    let (a, mut b) = (bound(&site, 1, false), bound(&site, 2, false));
    // One who has seen a frame of the session, at another port of the same host.
    let mut other = Agent::new(site.udp, uid(1), a.session, &[0; 32]);
    other.send(&a.frames(&b, &[100]), 116);
    assert_eq!(other.next().unwrap(), frame::unbound(a.session));
    // Nor does a hello without the key move it.
    other.send(&frame::hello(&frame::Key::new(&[0; 32]), a.session, 99, 0), frame::HELLO);
    assert!(other.gets_nothing() && b.gets_nothing());
    assert_eq!(site.counter("drops_total{reason=\"not_bound\"}"), 1);
    assert_eq!(site.counter("drops_total{reason=\"not_authentic\"}"), 1);
    // Strangers.
    other.session ^= 1;
    other.send(&other.frames(&b, &[100]), 116);
    assert_eq!(other.next().unwrap(), frame::unbound(other.session));
    other.send(&[4; 200], 200);
    assert!(other.gets_nothing() && b.gets_nothing());
    a.send(&a.frames(&b, &[100]), 116);
    assert_eq!(b.next().unwrap(), a.arrived(&b, &[100]));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_did_not_attach_proves_that_it_receives() {
    let site = Site::new(Limits::default()).await;
    let (mut a, b) = (attach(&site, 1, "192.0.2.1", false), bound(&site, 2, false));
    let (is_bound, proof) = a.hello(0);
    assert!(!is_bound);
    b.send(&b.frames(&a, &[100]), 116);
    assert!(a.gets_nothing());
    assert!(a.hello(proof).0);
    b.send(&b.frames(&a, &[100]), 116);
    assert_eq!(a.next().unwrap(), b.arrived(&a, &[100]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_strangers_is_hardly_answered_and_keeps_nobody_back() {
    let site = Site::new(Limits { unbound_per_second: 5, ..Limits::default() }).await;
    let (a, mut b) = (bound(&site, 1, false), bound(&site, 2, false));
    let mut stranger = Agent::new(site.udp, uid(9), 77, &[0; 32]);
    for _ in 0..200 {
        stranger.send(&stranger.frames(&b, &[100; 10]), 116);
    }
    a.send(&a.frames(&b, &[100]), 116);
    assert_eq!(b.next().unwrap(), a.arrived(&b, &[100]));
    let mut notices = 0;
    while !stranger.gets_nothing() {
        notices += 1;
    }
    assert!((1..=5).contains(&notices), "{notices}");
    assert_eq!(site.counter("drops_total{reason=\"unknown_session\"}"), 2_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_refused_is_cut_off() {
    let site = Site::new(Limits::default()).await;
    let (a, mut b) = (bound(&site, 1, false), bound(&site, 2, false));
    site.running.refuse(&[uid(1)]);
    a.send(&a.frames(&b, &[100]), 116);
    assert!(b.gets_nothing());
    assert!(site.running.attach(uid(1), [127, 0, 0, 1].into()).is_err());
    assert_eq!(site.running.devices(), [uid(2)]);
}
