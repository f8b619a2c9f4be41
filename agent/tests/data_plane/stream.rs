//! Traffic whose every octet is checked: TCP in both directions at once, and numbered UDP datagrams.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::Duration,
};

use crate::namespace::Namespace;

/// How long an octet may take before the test fails.
const PATIENCE: Duration = Duration::from_secs(30);

/// A stream's octets: this again and again. No buffer's or segment's length divides that of this one, a prime.
fn pattern() -> Vec<u8> {
    let mut state = 0x2545_f491_u32;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    (0..1_048_573).map(next).collect()
}

/// TCP in both directions at once, between programs at `a` and `b`, where `b` listens at `address`. Both send until
/// `enough` says so of the octets sent; both check what they get.
pub(crate) fn both_ways(
    a: &Namespace,
    b: &Namespace,
    address: SocketAddr,
    enough: &(impl Fn(u64) -> bool + Sync),
) {
    let listener = b.enter(async || TcpListener::bind(address).expect("bind"));
    let stream = a.enter(async || TcpStream::connect(address).expect("connect"));
    let (other, _) = listener.accept().expect("accept");
    exchange([&stream, &other], [&stream, &other], enough);
}

/// TCP to a server that sends back what it gets, which is checked.
pub(crate) fn echoed(from: &Namespace, server: SocketAddr, enough: &(impl Fn(u64) -> bool + Sync)) {
    let stream = from.enter(async || TcpStream::connect(server).expect("connect"));
    exchange([&stream], [&stream], enough);
}

fn exchange<const N: usize>(
    writers: [&TcpStream; N],
    readers: [&TcpStream; N],
    enough: &(impl Fn(u64) -> bool + Sync),
) {
    let pattern = pattern();
    let pattern = pattern.as_slice();
    std::thread::scope(|scope| {
        let sending = writers.map(|stream| scope.spawn(|| send(stream, pattern, enough)));
        let received = readers.map(|stream| scope.spawn(|| check(stream, pattern)));
        let sent: u64 = sending.into_iter().map(|sender| sender.join().expect("sent")).sum();
        let received: u64 = received.into_iter().map(|reader| reader.join().expect("received")).sum();
        assert_eq!(received, sent, "octets");
    });
}

fn send(mut stream: &TcpStream, pattern: &[u8], enough: &impl Fn(u64) -> bool) -> u64 {
    stream.set_write_timeout(Some(PATIENCE)).expect("timeout");
    let mut sent = 0;
    while !enough(sent) {
        stream.write_all(pattern).expect("written");
        sent += pattern.len() as u64;
    }
    stream.shutdown(Shutdown::Write).expect("shut down");
    sent
}

fn check(mut stream: &TcpStream, pattern: &[u8]) -> u64 {
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    let (mut buffer, mut received) = (vec![0; 1 << 18], 0);
    loop {
        let len = stream.read(&mut buffer).expect("read");
        if len == 0 {
            return received;
        }
        let mut octets = &buffer[..len];
        while !octets.is_empty() {
            let expected = &pattern[(received % pattern.len() as u64) as usize..];
            let (head, tail) = octets.split_at(octets.len().min(expected.len()));
            assert!(head == &expected[..head.len()], "other octets arrived at or after {received}");
            received += head.len() as u64;
            octets = tail;
        }
    }
}

/// Sends `number` datagrams of 64 octets, each with its number and what follows from it, as fast as it goes. Returns
/// how many came to `to`, after checking that none was changed or overtaken.
pub(crate) fn small_datagrams(from: &Namespace, to: &Namespace, address: SocketAddr, number: u32) -> u32 {
    let datagram = |n: u32| -> [u8; 64] {
        std::array::from_fn(|at| (n >> (8 * (at % 4))) as u8 ^ ((at / 4) as u8).wrapping_mul(37))
    };
    let receiver = to.enter(async || UdpSocket::bind(address).expect("bind"));
    receiver.set_read_timeout(Some(Duration::from_secs(1))).expect("timeout");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            from.enter(async || {
                let socket = UdpSocket::bind((if address.is_ipv4() { "0.0.0.0" } else { "::" }, 0));
                let socket = socket.expect("bind");
                socket.connect(address).expect("connect");
                for n in 0..number {
                    // The device's queue may be full for a moment.
                    let _ = socket.send(&datagram(n));
                }
            });
        });
        let (mut buffer, mut count, mut expected) = ([0; 100], 0, 0);
        while let Ok(len) = receiver.recv(&mut buffer) {
            let n = u32::from_le_bytes(*buffer.first_chunk().expect("long enough"));
            assert!(buffer[..len] == datagram(n), "datagram {n} was changed");
            assert!(n >= expected, "datagram {n} was overtaken by {}", expected - 1);
            expected = n + 1;
            count += 1;
        }
        count
    })
}

/// A counter of the namespace's IPv4 stack, as in `/proc/net/snmp`.
pub(crate) fn stack_counter(namespace: &Namespace, protocol: &str, name: &str) -> u64 {
    let text = namespace.run("cat /proc/net/snmp");
    let mut lines = text.lines().filter(|line| line.split(':').next() == Some(protocol));
    let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
    let at = names.split_whitespace().position(|word| word == name).expect("counted");
    values.split_whitespace().nth(at).expect("as many").parse().expect("a number")
}
