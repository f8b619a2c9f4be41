//! The TUN device: created, used, busy, gone; and with several queues.

use std::{
    collections::BTreeMap,
    io::{self, IoSlice},
    net::UdpSocket,
    num::NonZeroUsize,
    time::Duration,
};

use muster_agent::tun::{Offloads, Tun, TunError};

use crate::namespace::{Namespace, have_root};

/// Octets of the header before each packet.
const HEADER: usize = 10;
/// UDP port of the peer, with which no other program in the namespace exchanges packets.
const PEER: u16 = 6000;

/// Reads packets until one satisfies `wanted`; the kernel sends some of its own. Returns the header, too.
async fn read_until(tun: &Tun, wanted: impl Fn(&[u8]) -> bool) -> (Vec<u8>, Vec<u8>) {
    let mut buffer = [0; 2048];
    for _ in 0..500 {
        match tun.recv_super(&mut buffer) {
            Ok(length) if wanted(&buffer[HEADER..length]) => {
                let (header, packet) = buffer[..length].split_at(HEADER);
                return (header.to_vec(), packet.to_vec());
            }
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                tokio::time::sleep(Duration::from_millis(2)).await
            }
            Err(e) => panic!("{e}"),
        }
    }
    panic!("no such packet within a second");
}

#[test]
fn packets_are_read_and_written_whole() {
    if !have_root() {
        return;
    }
    let namespace = Namespace::new();
    namespace.enter(async || {
        let tun = Tun::create("muster0").expect("create");
        namespace.ip("addr add 10.1.1.1/24 dev muster0");
        namespace.ip("link set muster0 up");

        let socket = UdpSocket::bind("10.1.1.1:5000").expect("bind");
        socket.send_to(b"to the peer", "10.1.1.2:6000").expect("send");
        let (header, mut packet) = read_until(&tun, |p| p[0] >> 4 == 4 && p[9] == 17).await;
        assert_eq!(packet.len(), 20 + 8 + 11);
        assert_eq!(&packet[28..], b"to the peer");

        // The same packet, sent back: swapping addresses and ports changes no checksum, also none that is yet to be
        // completed.
        for (a, b) in [(12, 16), (13, 17), (14, 18), (15, 19), (20, 22), (21, 23)] {
            packet.swap(a, b);
        }
        tun.send_super(&[IoSlice::new(&header), IoSlice::new(&packet)]).expect("write");
        socket.set_read_timeout(Some(Duration::from_secs(2))).expect("timeout");
        let mut buffer = [0; 64];
        let (length, from) = socket.recv_from(&mut buffer).expect("delivered");
        assert_eq!((&buffer[..length], from.to_string().as_str()), (&b"to the peer"[..], "10.1.1.2:6000"));

        let error = tun
            .send_super(&[IoSlice::new(&[0; HEADER]), IoSlice::new(&[0xff; 40])])
            .expect_err("neither IPv4 nor IPv6");
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    });
}

#[test]
fn a_name_that_is_taken_is_refused_and_free_again_after_drop() {
    if !have_root() {
        return;
    }
    let namespace = Namespace::new();
    namespace.enter(async || {
        let first = Tun::create("muster0").expect("create");
        let error = Tun::create("muster0").expect_err("taken");
        assert!(matches!(error, TunError::Busy { .. }), "{error}");
        assert!(matches!(Tun::create("lo").expect_err("taken"), TunError::Busy { .. }));
        drop(first);
        assert!(!namespace.ip("link").contains("muster0"), "the interface outlives its process");
        Tun::create("muster0").expect("free again");
    });
}

fn create_queues(count: usize) -> Vec<Tun> {
    Tun::create_queues("muster0", NonZeroUsize::new(count).expect("not zero")).expect("create")
}

/// A namespace with a device of this many queues, 10.1.1.1 and fd01::1.
fn host(count: usize) -> (Namespace, Vec<Tun>) {
    let namespace = Namespace::new();
    let queues = namespace.enter(async || create_queues(count));
    namespace.ip("addr add 10.1.1.1/24 dev muster0");
    namespace.ip("addr add fd01::1/64 dev muster0 nodad");
    namespace.ip("link set muster0 up");
    (namespace, queues)
}

/// A packet to the peer with its header.
struct ToPeer {
    source_port: u16,
    header: Vec<u8>,
    packet: Vec<u8>,
}

/// Everything for the peer that waits in a queue. What a local socket has sent waits when the call returns.
fn waiting(tun: &Tun) -> Vec<ToPeer> {
    let (mut buffer, mut found) = ([0; 2048], Vec::new());
    loop {
        let length = match tun.recv_super(&mut buffer) {
            Ok(length) => length,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return found,
            Err(e) => panic!("{e}"),
        };
        let (header, packet) = buffer[..length].split_at(HEADER);
        let (protocol, ports) = if packet[0] >> 4 == 4 { (9, 20) } else { (6, 40) };
        let port =
            |at: usize| packet.get(at..at + 2).map(|octets| u16::from_be_bytes([octets[0], octets[1]]));
        if let (17, Some(source_port), Some(PEER)) = (packet[protocol], port(ports), port(ports + 2)) {
            found.push(ToPeer { source_port, header: header.to_vec(), packet: packet.to_vec() });
        }
    }
}

/// By source port, the numbers of the queues in which its packets waited.
fn queues_of_flows(queues: &[Tun]) -> BTreeMap<u16, Vec<usize>> {
    let mut flows = BTreeMap::<_, Vec<_>>::new();
    for (number, tun) in queues.iter().enumerate() {
        for packet in waiting(tun) {
            flows.entry(packet.source_port).or_default().push(number);
        }
    }
    flows
}

/// The answer to a packet: addresses and ports swapped, which changes no checksum, also none that is to be completed.
fn answer(mut packet: Vec<u8>) -> Vec<u8> {
    let (addresses, len) = if packet[0] >> 4 == 4 { (12, 4) } else { (8, 16) };
    for (start, len) in [(addresses, len), (addresses + 2 * len, 2)] {
        packet[start..start + 2 * len].rotate_left(len);
    }
    packet
}

const PATHS: [(&str, &str); 2] = [("10.1.1.1:0", "10.1.1.2:6000"), ("[fd01::1]:0", "[fd01::2]:6000")];

#[test]
fn flows_spread_over_queues_and_each_stays_in_one_until_its_answers_come_through_another() {
    if !have_root() {
        return;
    }
    let (namespace, queues) = host(4);
    namespace.enter(async || {
        for (from, to) in PATHS {
            let sockets: Vec<_> = (0..64).map(|_| UdpSocket::bind(from).expect("bind")).collect();
            for socket in sockets.iter().cycle().take(64 * 5) {
                socket.send_to(b"to the peer", to).expect("send");
            }
            let flows = queues_of_flows(&queues);
            assert_eq!(flows.len(), 64, "every flow, and nothing else");
            for (port, numbers) in &flows {
                assert!(
                    numbers.len() == 5 && numbers.iter().all(|n| *n == numbers[0]),
                    "{port}: {numbers:?}"
                );
            }
            // That 64 flows leave out one of four queues by chance happens once in 25 million times.
            for number in 0..queues.len() {
                assert!(flows.values().any(|numbers| numbers[0] == number), "{flows:?}");
            }

            let [socket, other] = &sockets[..2] else { panic!("there are more") };
            let others_port = other.local_addr().expect("bound").port();
            socket.send_to(b"to the peer", to).expect("send");
            let packet = queues.iter().flat_map(waiting).next().expect("sent");
            let answer = answer(packet.packet);
            socket.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
            for through in [0, 1, 2, 3, 1] {
                let pieces = [IoSlice::new(&packet.header), IoSlice::new(&answer)];
                queues[through].send_super(&pieces).expect("write");
                let (length, sender) = socket.recv_from(&mut [0; 64]).expect("delivered");
                assert_eq!((length, sender.to_string().as_str()), (11, to));
                for socket in [socket, other].into_iter().cycle().take(6) {
                    socket.send_to(b"to the peer", to).expect("send");
                }
                let expected =
                    [(packet.source_port, vec![through; 3]), (others_port, vec![flows[&others_port][0]; 3])];
                assert_eq!(queues_of_flows(&queues), BTreeMap::from(expected), "written to {through}");
            }
        }
    });
}

#[test]
fn the_interface_goes_on_with_the_queues_that_are_left_and_vanishes_with_the_last() {
    if !have_root() {
        return;
    }
    let (namespace, mut queues) = host(3);
    namespace.enter(async || {
        let socket = UdpSocket::bind("10.1.1.1:0").expect("bind");
        let sockets: Vec<_> = (0..32).map(|_| UdpSocket::bind("10.1.1.1:0").expect("bind")).collect();
        socket.send_to(b"to the peer", "10.1.1.2:6000").expect("send");
        let packet = queues.iter().flat_map(waiting).next().expect("sent");
        let answer = answer(packet.packet);
        socket.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
        // The first, which the others were attached to, goes first.
        while !queues.is_empty() {
            assert!(namespace.ip("link").contains("muster0"));
            let writer = queues.last().expect("not empty");
            writer.send_super(&[IoSlice::new(&packet.header), IoSlice::new(&answer)]).expect("write");
            socket.recv_from(&mut [0; 64]).expect("delivered");
            for socket in &sockets {
                socket.send_to(b"to the peer", "10.1.1.2:6000").expect("send");
            }
            let arrived: usize = queues_of_flows(&queues).values().map(Vec::len).sum();
            assert_eq!(arrived, 32, "with {} queues", queues.len());
            queues.remove(0);
        }
        assert!(!namespace.ip("link").contains("muster0"), "the interface outlives its queues");
        assert_eq!(create_queues(2).len(), 2, "free again");
    });
}

#[test]
fn queues_belong_to_one_device() {
    if !have_root() {
        return;
    }
    let namespace = Namespace::new();
    namespace.enter(async || {
        let queues = create_queues(3);
        assert!(namespace.ip("-details link show muster0").contains("multi_queue numqueues 3"));
        assert!(queues.iter().all(|tun| tun.name() == "muster0"));
        // Nobody else joins in, whether with one queue or many.
        let more = Tun::create_queues("muster0", NonZeroUsize::MIN.saturating_add(1));
        assert!(matches!(more.expect_err("taken"), TunError::Busy { .. }));
        assert!(matches!(Tun::create("muster0").expect_err("taken"), TunError::Busy { .. }));

        let all = queues[0].offloads();
        assert!(all.checksum && all.tso, "{all:?}");
        assert!(queues.iter().all(|tun| tun.offloads() == all));
        queues[2].set_offloads(Offloads::default()).expect("nothing can always be had");
        assert!(queues.iter().all(|tun| tun.offloads() == Offloads::default()));
        let impossible = Offloads { checksum: false, tso: true, uso: false };
        assert_eq!(
            queues[1].set_offloads(impossible).expect_err("EINVAL").kind(),
            io::ErrorKind::InvalidInput
        );
        assert!(queues.iter().all(|tun| tun.offloads() == Offloads::default()));
        drop(queues);

        let only = create_queues(1);
        assert_eq!(only.len(), 1);
        assert!(!namespace.ip("-details link show muster0").contains("multi_queue"));
    });
}

#[test]
fn queues_are_used_from_many_threads() {
    const fn shared<T: Send + Sync>() {}
    const { shared::<Tun>() };
}
