//! Data planes of several threads.

use std::num::NonZeroUsize;

use muster_agent::datapath::{Command, Event};

use crate::{
    device::{Device, virtual_addresses},
    namespace::{connect, have_root},
    stream::both_ways,
};

const THREADS: usize = 4;

#[test]
fn share_the_flows_of_one_peer_and_keep_each_in_order() {
    if !have_root() {
        return;
    }
    let threads = NonZeroUsize::new(THREADS).expect("some");
    let (a, b) = (Device::with_threads(1, threads), Device::with_threads(2, threads));
    connect(&a.namespace, &b.namespace);
    a.send(Command::AddPeer(b.as_peer(vec![b.endpoint(2)])));
    b.send(Command::AddPeer(a.as_peer(vec![])));
    a.namespace.run("ping -n -c 1 -W 5 100.64.0.2");
    assert_eq!((a.snapshot().threads, b.snapshot().threads), (THREADS, THREADS));

    // Every octet is checked; out of order, TCP would tell by what it sends again.
    std::thread::scope(|scope| {
        for port in 5000..5008 {
            let (a, b) = (&a.namespace, &b.namespace);
            let address = (virtual_addresses(2)[usize::from(port % 2)], port).into();
            scope.spawn(move || both_ways(a, b, address, &|sent| sent >= 8 << 20));
        }
    });
    for device in [&a, &b] {
        let snapshot = device.snapshot();
        assert_eq!(snapshot.drops["replayed"] + snapshot.drops["not_authentic"], 0, "{:?}", snapshot.drops);
        assert!(snapshot.tun_received.bytes > 64 << 20 && snapshot.tun_sent.bytes > 64 << 20, "{snapshot:?}");
    }
    // One thread has the datagrams of the only peer; others have flows as well.
    for device in [&a, &b] {
        let sleeps = device.sleeps();
        assert_eq!(sleeps.len(), THREADS);
        assert!(sleeps.iter().filter(|number| **number > 50).count() >= 3, "{sleeps:?}");
    }
}

#[test]
fn end_all_when_one_cannot_go_on() {
    if !have_root() {
        return;
    }
    let threads = NonZeroUsize::new(THREADS).expect("some");
    let mut device = Device::with_threads(1, threads);
    device.namespace.ip("link delete muster0");
    let Event::Failed(reason) = device.event() else { panic!("expected a failure") };
    assert!(reason.contains("TUN device"), "{reason}");
}
