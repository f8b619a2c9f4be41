//! The TUN device: created, used, busy, gone.

use std::{
    io::{self, IoSlice},
    net::UdpSocket,
    time::Duration,
};

use muster_agent::tun::{Tun, TunError};

use crate::namespace::{Namespace, have_root};

/// Octets of the header before each packet.
const HEADER: usize = 10;

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
