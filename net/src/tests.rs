//! Runs of datagrams from socket to socket over the loopback interface.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr},
};

use muster_common::datagram::{Ecn, Fragmentation};
use rustix::process::Uid;

use super::*;

/// 64 KiB of octets that differ from place to place.
fn octets() -> Vec<u8> {
    (0..65_536u32).map(|n| (n ^ (n >> 8)) as u8).collect()
}

fn sockets() -> UdpSockets {
    let sockets = UdpSockets::bind(0).unwrap();
    sockets.coalesce();
    sockets
}

/// The loopback addresses of both sockets, as far as the host has them.
fn addresses(sockets: &UdpSockets) -> Vec<(Family, SocketAddr)> {
    let both = [(Family::V4, Ipv4Addr::LOCALHOST.into()), (Family::V6, Ipv6Addr::LOCALHOST.into())];
    let here = both.into_iter().filter(|(family, _)| sockets.fd(*family).is_some());
    here.map(|(family, ip)| (family, SocketAddr::new(ip, sockets.port()))).collect()
}

fn run(destination: SocketAddr, ecn: Ecn, datagram_len: usize, octets: &[u8]) -> Run<'_> {
    Run { destination, ecn, fragmentation: Fragmentation::Known, datagram_len, octets }
}

/// Everything that waits: each message's source, ECN field, length of datagrams, and octets.
fn receive(sockets: &UdpSockets, family: Family) -> Vec<(SocketAddr, u8, usize, Vec<u8>)> {
    let mut buffer = ReceiveBuffer::new();
    let mut messages = Vec::new();
    while sockets.recv_into(family, &mut buffer).unwrap() > 0 {
        messages.extend(buffer.messages().map(|message| {
            (message.source, message.ecn, message.datagram_len, buffer.octets()[message.range].to_vec())
        }));
        assert_eq!(buffer.lost(), 0);
    }
    messages
}

/// Every datagram that waits.
fn datagrams(sockets: &UdpSockets, family: Family) -> Vec<Vec<u8>> {
    let messages = receive(sockets, family);
    let cut = |(_, _, len, octets): &(_, _, usize, Vec<u8>)| {
        octets.chunks(*len).map(<[u8]>::to_vec).collect::<Vec<_>>()
    };
    messages.iter().flat_map(cut).collect()
}

#[test]
fn a_run_arrives_whole_with_the_length_of_its_datagrams() {
    let (a, b) = (sockets(), sockets());
    assert_eq!(a.offloads(), Offloads { segments: true, coalesces: true });
    let octets = octets();
    for (family, to) in addresses(&b) {
        let from = SocketAddr::new(to.ip(), a.port());
        // Beyond 65,473 octets, headers and all no longer fit a super-packet of the device, and the kernel cuts it up.
        let cases =
            [(1_000, 10_000), (1_000, 2_001), (1_452, 65_340), (32_736, 65_472), (100, 100), (64, 4_096)];
        for (len, total) in cases {
            let sent = a.send_runs([run(to, Ecn::NotEct, len, &octets[..total])].into_iter());
            let count = total.div_ceil(len) as u64;
            let expected = Sent { datagrams: count, bytes: total as u64, calls: 1, ..Sent::default() };
            assert_eq!(sent, expected, "{len} {total}");
            let arrived = receive(&b, family);
            let about: Vec<_> = arrived.iter().map(|(from, ecn, len, _)| (*from, *ecn, *len)).collect();
            assert_eq!(about, [(from, 0, len)], "{len} {total}");
            assert!(arrived[0].3 == octets[..total], "{len} {total}");
        }
    }
    assert!(a.offloads().segments);
}

#[test]
fn without_coalescing_each_datagram_comes_by_itself() {
    let (a, b) = (sockets(), UdpSockets::bind(0).unwrap());
    assert!(!b.offloads().coalesces);
    let octets = octets();
    for (family, to) in addresses(&b) {
        a.send_runs([run(to, Ecn::Ect0, 1_000, &octets[..5_500])].into_iter());
        let expected: Vec<_> = octets[..5_500].chunks(1_000).map(<[u8]>::to_vec).collect();
        let messages = receive(&b, family);
        assert!(messages.iter().all(|(_, ecn, len, octets)| *ecn == 2 && *len == octets.len()));
        assert!(messages.into_iter().map(|(.., octets)| octets).collect::<Vec<_>>() == expected);
    }
}

#[test]
fn offloads_are_forgone() {
    let (mut a, mut b) = (UdpSockets::bind(0).unwrap(), UdpSockets::bind(0).unwrap());
    for sockets in [&mut a, &mut b] {
        sockets.forgo_offloads();
        sockets.coalesce();
        assert_eq!(sockets.offloads(), Offloads::default());
    }
    let octets = octets();
    for (family, to) in addresses(&b) {
        let sent = a.send_runs([run(to, Ecn::NotEct, 1_000, &octets[..5_500])].into_iter());
        assert_eq!(sent.datagrams, 6);
        let lens: Vec<_> = receive(&b, family).iter().map(|(.., octets)| octets.len()).collect();
        assert_eq!(lens, [1_000, 1_000, 1_000, 1_000, 1_000, 500]);
    }
}

#[test]
fn ecn_arrives() {
    let (a, b) = (sockets(), sockets());
    let octets = octets();
    for (family, to) in addresses(&b) {
        let fields = [Ecn::Ect0, Ecn::NotEct, Ecn::Ce, Ecn::Ect1];
        for len in [500, 300] {
            let sent = a.send_runs(fields.iter().map(|ecn| run(to, *ecn, len, &octets[..500])));
            assert_eq!(sent.failed, 0);
            let arrived: Vec<_> = receive(&b, family).iter().map(|(_, ecn, ..)| *ecn).collect();
            assert_eq!(arrived, [2, 0, 3, 1]);
        }
    }
}

/// 150 runs of many sizes, with some to nowhere in between.
fn assorted<'a>(to: SocketAddr, octets: &'a [u8]) -> impl Iterator<Item = Run<'a>> {
    // Port 0 cannot be sent to.
    let nowhere = SocketAddr::new(to.ip(), 0);
    (0..150usize).flat_map(move |n| {
        let broken = (n % 50 == 7).then(|| run(nowhere, Ecn::NotEct, 10, &octets[..30]));
        let (len, total) = (1 + n * 7, 1 + n * 31 % 5_000);
        broken.into_iter().chain([run(
            to,
            Ecn::NotEct,
            len.min(total).max(total / 64 + 1),
            &octets[n..n + total],
        )])
    })
}

/// The datagrams of [`assorted`] that can arrive.
fn expected(to: SocketAddr, octets: &[u8]) -> Vec<Vec<u8>> {
    let good = assorted(to, octets).filter(|run| run.destination == to);
    good.flat_map(|run| run.datagrams().map(<[u8]>::to_vec).collect::<Vec<_>>()).collect()
}

#[test]
fn order_and_contents_are_kept_around_a_bad_destination() {
    let (a, b) = (sockets(), sockets());
    let octets = octets();
    for (family, to) in addresses(&b) {
        let expected = expected(to, &octets);
        let sent = a.send_runs(assorted(to, &octets));
        let bytes = expected.iter().map(|datagram| datagram.len() as u64).sum();
        // Three calls of 64 runs at most, each cut in two by every bad destination.
        let datagrams_sent = expected.len() as u64;
        let all = Sent { datagrams: datagrams_sent, bytes, calls: 6, failed: 9, ..Sent::default() };
        assert_eq!(sent, all);
        assert!(datagrams(&b, family) == expected);
        assert!(a.offloads().segments, "a bad destination says nothing about segments");
    }
}

#[test]
fn one_by_one_is_the_same_octet_for_octet() {
    let (a, b) = (sockets(), sockets());
    for socket in a.all() {
        socket.segments.store(false, Ordering::Relaxed);
    }
    let octets = octets();
    for (family, to) in addresses(&b) {
        let expected = expected(to, &octets);
        let sent = a.send_runs(assorted(to, &octets));
        assert_eq!((sent.datagrams, sent.failed), (expected.len() as u64, 9));
        assert!(datagrams(&b, family) == expected);
    }
}

#[test]
fn refused_segments_are_sent_one_by_one_from_then_on() {
    let (a, b) = (sockets(), sockets());
    sys::omit_checksums(a.fd(Family::V4).unwrap()).unwrap();
    let octets = octets();
    let to = SocketAddr::from((Ipv4Addr::LOCALHOST, b.port()));
    let expected = expected(to, &octets);
    let sent = a.send_runs(assorted(to, &octets));
    assert_eq!((sent.datagrams, sent.failed), (expected.len() as u64, 9));
    assert!(datagrams(&b, Family::V4) == expected);
    assert!(!a.sends_segments(to));
    assert_eq!(sent.too_big().count(), 0);
    if let [_, (family, to)] = addresses(&b)[..] {
        assert!(a.sends_segments(to), "the other family goes on");
        a.send_runs([run(to, Ecn::NotEct, 10, &octets[..30])].into_iter());
        assert_eq!(datagrams(&b, family).len(), 3);
    }
}

#[test]
fn both_families_take_turns() {
    let (a, b) = (sockets(), sockets());
    let octets = octets();
    let [(_, v4), (_, v6)] = addresses(&b)[..] else { return };
    let runs = (0..200usize)
        .map(|n| run(if n % 3 == 0 { v6 } else { v4 }, Ecn::NotEct, 10, &octets[n * 20..n * 20 + 20]));
    assert_eq!(a.send_runs(runs).datagrams, 400);
    for (family, is_mine) in [(Family::V4, [false, true, true]), (Family::V6, [true, false, false])] {
        let mine = (0..200usize).filter(|n| is_mine[n % 3]);
        let expected: Vec<_> =
            mine.flat_map(|n| octets[n * 20..n * 20 + 20].chunks(10).map(<[u8]>::to_vec)).collect();
        assert_eq!(datagrams(&b, family), expected);
    }
}

#[test]
fn path_mtu_discovery_can_be_changed_and_the_mtu_asked_for() {
    let a = sockets();
    for discovery in [Discovery::Do, Discovery::Probe, Discovery::Want] {
        a.set_path_mtu_discovery(discovery).unwrap();
    }
    for (_, to) in addresses(&a) {
        assert!(a.path_mtu(to).unwrap() >= 1_280);
    }
}

#[test]
fn both_families_share_the_port_and_a_taken_one_is_an_error() {
    let first = UdpSockets::bind(0).expect("any port");
    assert_ne!(first.port(), 0);
    for socket in [first.socket(Family::V4), first.socket(Family::V6)].into_iter().flatten() {
        assert_eq!(socket.inner.local_addr().expect("bound").port(), first.port());
    }
    let error = UdpSockets::bind(first.port()).expect_err("taken").to_string();
    assert!(error.contains("another program has this port"), "{error}");
}

fn many(count: usize) -> Vec<UdpSockets> {
    UdpSockets::bind_many(0, NonZeroUsize::new(count).unwrap()).unwrap()
}

#[test]
fn each_source_keeps_to_one_of_many_sockets_and_any_of_them_answers() {
    let all = many(4);
    for (family, to) in addresses(&all[0]) {
        let sources: Vec<_> =
            (0..64).map(|_| std::net::UdpSocket::bind(SocketAddr::new(to.ip(), 0)).unwrap()).collect();
        for round in 0..5 {
            for source in &sources {
                source.send_to(&[round], to).unwrap();
            }
        }
        let mut found = BTreeMap::<_, (usize, Vec<u8>)>::new();
        for (number, sockets) in all.iter().enumerate() {
            let messages = receive(sockets, family);
            // That 64 sources leave out one of four by chance happens once in 25 million times.
            assert!(!messages.is_empty(), "socket {number} has nothing");
            for (source, .., octets) in messages {
                let (first, rounds) = found.entry(source).or_insert((number, vec![]));
                assert_eq!(*first, number, "{source} has changed its socket");
                rounds.extend(octets);
            }
        }
        for source in &sources {
            let address = source.local_addr().unwrap();
            assert_eq!(found.remove(&address).unwrap().1, [0, 1, 2, 3, 4], "in order, none lost");
            for sockets in &all {
                let sent = sockets.send_runs([run(address, Ecn::NotEct, 6, b"answer")].into_iter());
                assert_eq!(sent.datagrams, 1);
                source.set_nonblocking(true).unwrap();
                assert_eq!(source.recv_from(&mut [0; 8]).unwrap(), (6, to));
            }
        }
        assert!(found.is_empty());
    }
}

#[test]
fn a_shared_port_is_refused_to_others() {
    let all = many(3);
    let port = all[0].port();
    assert_ne!(port, 0);
    assert!(all.iter().all(|sockets| sockets.port() == port));
    for (family, to) in addresses(&all[0]) {
        for sockets in &all {
            assert_eq!(sockets.socket(family).unwrap().inner.local_addr().unwrap(), family.any(port));
        }
        for address in [to, family.any(port)] {
            let error = std::net::UdpSocket::bind(address).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AddrInUse, "{address}");
        }
    }
    // Other agents, also those with many sockets.
    for count in [1, 3] {
        let error = UdpSockets::bind_many(port, NonZeroUsize::new(count).unwrap()).unwrap_err().to_string();
        assert!(error.contains("another program has this port"), "{error}");
    }
    // Only who asks for it shares, and is of the same user.
    let share = move || FamilySocket::open(Family::V4.any(port), Port::Shared);
    assert!(share().is_ok());
    if rustix::process::geteuid().is_root() {
        let another_user = move || {
            rustix::thread::set_thread_uid(Uid::from_raw(65_534)).unwrap();
            share().unwrap_err().kind()
        };
        assert_eq!(std::thread::spawn(another_user).join().unwrap(), io::ErrorKind::AddrInUse);
    }
}

#[test]
fn addresses_are_bound_as_they_are_named() {
    let three = NonZeroUsize::new(3).unwrap();
    let here = |octet| SocketAddr::from(([127, 0, 0, octet], 0));
    let all = UdpSockets::bind_at(&[here(7)], three).unwrap();
    let port = all[0].port();
    for sockets in &all {
        let address = sockets.socket(Family::V4).unwrap().inner.local_addr().unwrap();
        assert_eq!(address, SocketAddr::new(here(7).ip(), port));
        assert!(sockets.fd(Family::V6).is_none());
    }
    // Answers come from the address that was asked.
    let peer = sockets();
    let run = run((Ipv4Addr::LOCALHOST, peer.port()).into(), Ecn::NotEct, 1, &[1]);
    assert_eq!(all[2].send_runs(std::iter::once(run)).datagrams, 1);
    assert_eq!(receive(&peer, Family::V4)[0].0, SocketAddr::new(here(7).ip(), port));
    // Both families, and neither twice.
    let both = UdpSockets::bind_at(&["[::]:0".parse().unwrap()], three).unwrap();
    assert!(both.iter().all(|sockets| sockets.fd(Family::V4).is_some() && sockets.port() == both[0].port()));
    let error = UdpSockets::bind_at(&[here(7), here(8)], three).unwrap_err().to_string();
    assert!(error.contains("127.0.0.8:0") && error.contains("second address"), "{error}");
}

#[test]
fn one_of_many_is_as_without_and_each_has_its_own_offloads() {
    let [one] = &many(1)[..] else { panic!("one was asked for") };
    assert!(one.all().all(|socket| !sockopt::socket_reuseport(&socket.inner).unwrap()));

    let mut all = many(3);
    all[0].coalesce();
    all[1].forgo_offloads();
    all[1].coalesce();
    let offloads: Vec<_> = all.iter().map(UdpSockets::offloads).collect();
    let of = |segments, coalesces| Offloads { segments, coalesces };
    assert_eq!(offloads, [of(true, true), of(false, false), of(true, false)]);
}

#[test]
fn sockets_are_looked_at_from_other_threads() {
    const fn shared<T: Send + Sync>() {}
    const { shared::<UdpSockets>() };
}
