//! What the kernel and the data plane save each other: super-packets at the TUN device, runs of datagrams at the sockets.

use std::{
    io::{self, IoSlice, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    num::NonZeroUsize,
    os::fd::AsFd,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use muster_agent::{
    tun::{Offloads, SUPER_PACKET_MAX, Tun, VIRTIO_HEADER},
    udp::{Discovery, Family, ReceiveBuffer, Run, TooBig, UdpSockets},
};
use muster_tunnel::{Fragmentation, ecn::Ecn, offload::VirtioHeader};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::namespace::{Namespace, connect, have_root};

const MTU: usize = 1_420;
const ALL: Offloads = Offloads { checksum: true, tso: true, uso: true };

/// A namespace with an offloading TUN device, 10.1.1.`number` and fd01::`number`.
fn host(number: u8) -> (Namespace, Tun) {
    let (namespace, queues) = host_with_queues(number, 1);
    (namespace, queues.into_iter().next().expect("one was asked for"))
}

/// Like [`host`], with so many queues.
fn host_with_queues(number: u8, count: usize) -> (Namespace, Vec<Tun>) {
    let namespace = Namespace::new();
    let count = NonZeroUsize::new(count).expect("not zero");
    let queues = namespace.enter(async || Tun::create_queues("muster0", count).expect("create"));
    namespace.ip(&format!("addr add 10.1.1.{number}/24 dev muster0"));
    namespace.ip(&format!("addr add fd01::{number}/64 dev muster0 nodad"));
    namespace.ip(&format!("link set muster0 mtu {MTU} up"));
    (namespace, queues)
}

/// Calls a closure at its end, also if that is a panic.
struct AtEnd<F: Fn()>(F);

impl<F: Fn()> Drop for AtEnd<F> {
    fn drop(&mut self) {
        self.0();
    }
}

/// Passes what each of two TUN devices yields on to the other, in two pieces, until `stop`. `look` sees it with the
/// number of its source; `None` when that one has no more.
fn shovel(tuns: [&Tun; 2], stop: &AtomicBool, mut look: impl FnMut(usize, Option<&[u8]>)) {
    let mut buffer = vec![0; SUPER_PACKET_MAX];
    let pause = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
    while !stop.load(Ordering::Acquire) {
        let mut fds = tuns.map(|tun| PollFd::from_borrowed_fd(tun.as_fd(), PollFlags::IN));
        poll(&mut fds, Some(&pause)).expect("poll");
        for (number, [from, to]) in [tuns, [tuns[1], tuns[0]]].into_iter().enumerate() {
            loop {
                let packet = match from.recv_super(&mut buffer) {
                    Ok(len) => &buffer[..len],
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => break look(number, None),
                    Err(e) => panic!("{e}"),
                };
                look(number, Some(packet));
                let (head, tail) = packet.split_at(packet.len().min(VIRTIO_HEADER + 30));
                to.send_super(&[IoSlice::new(head), IoSlice::new(tail)]).expect("write");
            }
        }
    }
}

/// Sends `octets` from one namespace to a TCP server at `address` in the other, which must receive them.
fn transfer(from: &Namespace, to: &Namespace, address: SocketAddr, octets: &[u8]) {
    let listener = to.enter(async || TcpListener::bind(address).expect("bind"));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            from.enter(async || {
                let mut stream = TcpStream::connect(address).expect("connect");
                stream.write_all(octets).expect("written");
            });
        });
        let (mut stream, _) = listener.accept().expect("accept");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("timeout");
        let mut received = Vec::with_capacity(octets.len());
        stream.read_to_end(&mut received).expect("read");
        assert!(received == octets, "{} octets of {} arrived, or others", received.len(), octets.len());
    });
}

/// Octets that differ from place to place.
fn octets(len: u32) -> Vec<u8> {
    (0..len).map(|n| (n ^ (n >> 8) ^ (n >> 16)) as u8).collect()
}

#[test]
fn tcp_crosses_in_super_packets_and_in_plain_ones_after_a_downgrade() {
    if !have_root() {
        return;
    }
    let ((a, tun_a), (b, tun_b)) = (host(1), host(2));
    let octets = octets(8 << 20);
    for (address, gso_type) in
        [("10.1.1.2:5000", VirtioHeader::GSO_TCPV4), ("[fd01::2]:5000", VirtioHeader::GSO_TCPV6)]
    {
        for tun in [&tun_a, &tun_b] {
            tun.set_offloads(Offloads { uso: false, ..ALL }).expect("the kernel has TSO");
        }
        let (mut passed, mut largest, mut largest_after) = (0, 0, 0);
        let mut super_packets = 0;
        // Packets that waited at the time of the downgrade may still be large.
        let (mut is_downgraded, mut is_drained) = (false, false);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _stop = AtEnd(|| stop.store(true, Ordering::Release));
                transfer(&a, &b, address.parse().expect("an address"), &octets);
            });
            shovel([&tun_a, &tun_b], &stop, |source, packet| match packet {
                Some(packet) if source == 0 => {
                    let header = VirtioHeader::parse(packet).expect("a header");
                    passed += packet.len();
                    if is_drained {
                        largest_after = largest_after.max(packet.len());
                        assert_eq!(header.gso_type, VirtioHeader::GSO_NONE);
                        assert_eq!(header.flags & VirtioHeader::NEEDS_CSUM, 0);
                    } else {
                        largest = largest.max(packet.len());
                        super_packets += usize::from(header.gso_type & !VirtioHeader::GSO_ECN == gso_type);
                    }
                    if passed > octets.len() / 2 && !is_downgraded {
                        tun_a.set_offloads(Offloads::default()).expect("downgraded");
                        assert_eq!(tun_a.offloads(), Offloads::default());
                        is_downgraded = true;
                    }
                }
                None if source == 0 => is_drained = is_downgraded,
                _ => {}
            });
        });
        assert!(super_packets > 10 && largest > 20_000, "{address}: {super_packets}, largest {largest}");
        assert!(is_drained, "the downgrade came too late");
        assert!((1..=VIRTIO_HEADER + MTU).contains(&largest_after), "{address}: {largest_after}");
    }
}

#[test]
fn runs_of_datagrams_cross_as_super_packets() {
    if !have_root() {
        return;
    }
    let ((a, tun_a), (b, tun_b)) = (host(1), host(2));
    if !tun_a.offloads().uso {
        eprintln!("skipped: this kernel has no USO for TUN devices");
        return;
    }
    assert_eq!(tun_a.offloads(), ALL);
    let sender = a.enter(async || UdpSockets::bind(0).expect("bind"));
    let receiver = b.enter(async || UdpSockets::bind(0).expect("bind"));
    receiver.coalesce();
    let octets = octets(30_300);
    for (family, ip) in [(Family::V4, "10.1.1.2"), (Family::V6, "fd01::2")] {
        let destination = SocketAddr::new(ip.parse().expect("an address"), receiver.port());
        let run = Run {
            destination,
            ecn: Ecn::Ce,
            fragmentation: Fragmentation::Known,
            datagram_len: 1_000,
            octets: &octets,
        };
        let (mut seen, stop) = (Vec::new(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _stop = AtEnd(|| stop.store(true, Ordering::Release));
                let sent = sender.send_runs(std::iter::once(run));
                assert_eq!((sent.datagrams, sent.bytes), (31, 30_300));
                let socket = receiver.fd(family).expect("has both families");
                let wait = Timespec { tv_sec: 5, tv_nsec: 0 };
                poll(&mut [PollFd::from_borrowed_fd(socket, PollFlags::IN)], Some(&wait)).expect("poll");
            });
            shovel([&tun_a, &tun_b], &stop, |source, packet| {
                let header = packet.and_then(VirtioHeader::parse);
                seen.extend(header.filter(|h| source == 0 && h.gso_type == VirtioHeader::GSO_UDP_L4));
            });
        });
        assert_eq!(seen.iter().map(|header| header.gso_size).collect::<Vec<_>>(), [1_000]);
        let mut buffer = ReceiveBuffer::new();
        assert_eq!(receiver.recv_into(family, &mut buffer).expect("received"), 1);
        let message = buffer.messages().next().expect("one");
        assert_eq!((message.ecn, message.datagram_len), (3, 1_000));
        assert_eq!(message.source.port(), sender.port());
        assert!(buffer.octets()[message.range] == octets);
    }
}

#[test]
fn every_queue_has_the_offloads_and_loses_them_when_one_does() {
    if !have_root() {
        return;
    }
    let (namespace, queues) = host_with_queues(1, 2);
    if queues[0].offloads() != ALL {
        eprintln!("skipped: this kernel has no USO for TUN devices");
        return;
    }
    let octets = octets(30_300);
    let (mut buffer, mut received) = (vec![0; SUPER_PACKET_MAX], ReceiveBuffer::new());
    let run = Run {
        destination: "10.1.1.2:6000".parse().expect("an address"),
        ecn: Ecn::NotEct,
        fragmentation: Fragmentation::Known,
        datagram_len: 1_000,
        octets: &octets,
    };
    // The next packet to the peer, if one waits in this queue. The kernel sends some of its own.
    let mut next = |tun: &Tun| loop {
        let Ok(len) = tun.recv_super(&mut buffer) else { return None };
        let packet = &buffer[VIRTIO_HEADER..len];
        if packet[0] >> 4 == 4 && packet[9] == 17 && packet[22..24] == 6000u16.to_be_bytes() {
            return Some(buffer[..len].to_vec());
        }
    };

    let mut flows = [0; 2];
    for _ in 0..40 {
        let sender = namespace.enter(async || UdpSockets::bind(0).expect("bind"));
        sender.coalesce();
        assert_eq!(sender.send_runs(std::iter::once(run)).calls, 1);
        for (tun, flows) in queues.iter().zip(&mut flows) {
            while let Some(mut packet) = next(tun) {
                let header = VirtioHeader::parse(&packet).expect("a header");
                assert_eq!((header.gso_type, header.gso_size), (VirtioHeader::GSO_UDP_L4, 1_000));
                assert_eq!(packet.len(), VIRTIO_HEADER + 20 + 8 + octets.len());
                // Back through the same queue with addresses and ports swapped, which changes no checksum.
                packet[VIRTIO_HEADER + 12..][..8].rotate_left(4);
                packet[VIRTIO_HEADER + 20..][..4].rotate_left(2);
                tun.send_super(&[IoSlice::new(&packet)]).expect("written");
                assert_eq!(sender.recv_into(Family::V4, &mut received).expect("received"), 1);
                let message = received.messages().next().expect("one");
                assert_eq!((message.source, message.datagram_len), (run.destination, 1_000));
                assert!(received.octets()[message.range] == octets);
                *flows += 1;
            }
        }
    }
    assert!(flows[0] > 0 && flows[1] > 0 && flows[0] + flows[1] == 40, "{flows:?}");

    queues[1].set_offloads(Offloads::default()).expect("downgraded");
    let mut packets = [0; 2];
    for _ in 0..40 {
        let sender = namespace.enter(async || UdpSockets::bind(0).expect("bind"));
        sender.send_runs(std::iter::once(run));
        for (tun, packets) in queues.iter().zip(&mut packets) {
            while let Some(packet) = next(tun) {
                assert_eq!(VirtioHeader::parse(&packet), Some(VirtioHeader::default()));
                *packets += 1;
            }
        }
    }
    assert!(packets[0] > 0 && packets[1] > 0 && packets[0] + packets[1] == 40 * 31, "{packets:?}");
}

#[test]
fn a_super_packet_that_makes_no_sense_is_refused_and_the_next_one_passes() {
    if !have_root() {
        return;
    }
    let (namespace, tun) = host(1);
    let receiver = namespace.enter(async || UdpSockets::bind(0).expect("bind"));
    let senseless = VirtioHeader { gso_type: 77, ..VirtioHeader::default() };
    let mut packet = vec![
        0x45, 0, 0, 32, 0, 0, 0, 0, 64, 17, 0x64, 0xc9, 10, 1, 1, 2, 10, 1, 1, 1, 0x13, 0x88, 0, 0, 0, 12, 0,
        0, b'g', b'o', b'o', b'd',
    ];
    packet[22..24].copy_from_slice(&receiver.port().to_be_bytes());
    let write = |header: &VirtioHeader| {
        tun.send_super(&[
            IoSlice::new(&header.octets()),
            IoSlice::new(&packet[..5]),
            IoSlice::new(&packet[5..]),
        ])
    };
    assert_eq!(write(&senseless).expect_err("refused").kind(), io::ErrorKind::InvalidInput);
    write(&VirtioHeader::default()).expect("written");
    let mut buffer = ReceiveBuffer::new();
    assert_eq!(receiver.recv_into(Family::V4, &mut buffer).expect("received"), 1);
    let message = buffer.messages().next().expect("one");
    assert_eq!(message.source, "10.1.1.2:5000".parse().expect("an address"));
    assert_eq!(&buffer.octets()[message.range], b"good");
}

#[test]
fn a_path_too_narrow_for_segments_is_reported_and_segments_go_on() {
    if !have_root() {
        return;
    }
    let namespace = Namespace::new();
    namespace.ip("link set lo mtu 1300");
    namespace.enter(async || {
        let (a, b) = (UdpSockets::bind(0).expect("bind"), UdpSockets::bind(0).expect("bind"));
        b.coalesce();
        let octets = octets(5_000);
        let mut buffer = ReceiveBuffer::new();
        for (family, ip) in [(Family::V4, "127.0.0.1"), (Family::V6, "::1")] {
            let destination = SocketAddr::new(ip.parse().expect("an address"), b.port());
            assert_eq!(a.path_mtu(destination).expect("known"), 1_300);
            let run = |datagram_len| Run {
                destination,
                ecn: Ecn::NotEct,
                fragmentation: Fragmentation::Known,
                datagram_len,
                octets: &octets,
            };
            let report = TooBig { destination, datagram_len: 1_400 };

            a.set_path_mtu_discovery(Discovery::Want).expect("set");
            let sent = a.send_runs([run(1_400), run(1_200)].into_iter());
            assert_eq!((sent.datagrams, sent.failed), (4 + 5, 0), "fragmented by this host");
            assert_eq!(sent.too_big().collect::<Vec<_>>(), [report]);
            assert_eq!(b.recv_into(family, &mut buffer).expect("received"), 4 + 1);
            let whole: Vec<u8> =
                buffer.messages().flat_map(|message| buffer.octets()[message.range].to_vec()).collect();
            assert!(whole == [octets.as_slice(), &octets].concat());

            a.set_path_mtu_discovery(Discovery::Do).expect("set");
            let sent = a.send_runs([run(1_400), run(1_200)].into_iter());
            // The last one, of 800 octets, fits.
            assert_eq!((sent.datagrams, sent.failed), (1 + 5, 3));
            assert_eq!(sent.too_big().collect::<Vec<_>>(), [report]);
            assert_eq!(b.recv_into(family, &mut buffer).expect("received"), 1 + 1);
        }
        assert!(a.offloads().segments, "the path is narrow; segments are not refused");
    });
}

#[test]
fn a_full_send_buffer_drops_the_rest_and_counts_it() {
    if !have_root() {
        return;
    }
    let (a, b) = (Namespace::new(), Namespace::new());
    connect(&a, &b);
    // Datagrams to a neighbour that does not answer wait for it, and fill the socket's buffer.
    a.run("sysctl -qw net.ipv4.neigh.eth0.unres_qlen_bytes=100000000");
    a.enter(async || {
        let sockets = UdpSockets::bind(0).expect("bind");
        let octets = octets(60_000);
        let destination = "10.9.0.77:9".parse().expect("an address");
        let run = Run {
            destination,
            ecn: Ecn::NotEct,
            fragmentation: Fragmentation::Known,
            datagram_len: 1_000,
            octets: &octets,
        };
        let sent = sockets.send_runs(std::iter::repeat_n(run, 500));
        assert!(sent.full > 0 && sent.datagrams > 0, "{sent:?}");
        assert_eq!((sent.datagrams + sent.full, sent.failed), (30_000, 0));
        assert_eq!(sent.bytes, sent.datagrams * 1_000);
        assert!(sockets.offloads().segments);
    });
}
