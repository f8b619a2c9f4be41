//! SCTP through a virtual IP. Its packets are made here, as not every kernel that translates it can also speak it.

use std::{
    io::Read as _,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use socket2::{Domain, Protocol, Socket, Type};

use super::world::*;

const SCTP: i32 = 132;
const HEADER: usize = 12;

/// CRC32c (RFC 9260, appendix A).
fn checksum(packet: &[u8]) -> [u8; 4] {
    let crc = packet.iter().fold(u32::MAX, |crc, octet| {
        (0..8).fold(crc ^ u32::from(*octet), |crc, _| (crc >> 1) ^ (0x82F6_3B78 & (crc & 1).wrapping_neg()))
    });
    (!crc).to_le_bytes()
}

/// The first packet of an association: INIT (RFC 9260 §3.3.2).
fn init(from: u16, to: u16) -> Vec<u8> {
    let mut packet = [&from.to_be_bytes()[..], &to.to_be_bytes(), &[0; 8]].concat();
    let (tag, window, streams, number) = (7_u32, 65_536_u32, 1_u16, 1_u32);
    packet.extend([1, 0, 0, 20]);
    packet.extend(tag.to_be_bytes());
    packet.extend(window.to_be_bytes());
    packet.extend([streams.to_be_bytes(), streams.to_be_bytes()].concat());
    packet.extend(number.to_be_bytes());
    let sum = checksum(&packet);
    packet[8..HEADER].copy_from_slice(&sum);
    packet
}

fn raw(is_ipv4: bool) -> Socket {
    let domain = if is_ipv4 { Domain::IPV4 } else { Domain::IPV6 };
    let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(SCTP))).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    socket
}

/// What comes to an endpoint, as far as a client has sent it from this port.
fn received(server: &mut Socket, is_ipv4: bool, from: u16) -> std::io::Result<Vec<u8>> {
    loop {
        let mut octets = [0; 200];
        let length = server.read(&mut octets)?;
        let packet = octets[if is_ipv4 { 20 } else { 0 }..length].to_vec();
        if packet.starts_with(&from.to_be_bytes()) {
            return Ok(packet);
        }
    }
}

#[test]
fn associations_go_to_the_endpoint() {
    on_host(async |_| {
        let mut world = World::new();
        for is_ipv4 in [true, false] {
            world.put("web", is_ipv4, &[3], |_| {}).await;
            let to = |address: IpAddr| SocketAddr::new(address, 0).into();
            let (client, mut server) = (raw(is_ipv4), raw(is_ipv4));
            server.bind(&to(endpoint(is_ipv4, 3))).unwrap();
            client.connect(&to(vip(is_ipv4))).unwrap();
            let from = if is_ipv4 { 5004 } else { 5006 };
            client.send(&init(from, PORT)).unwrap();
            let found = received(&mut server, is_ipv4, from).unwrap();
            assert_eq!(found, init(from, TARGET), "port and checksum are those of the endpoint");
            // Without an endpoint, nothing comes.
            world.put("web", is_ipv4, &[], |_| {}).await;
            let _refused = client.send(&init(from + 1, PORT));
            assert!(received(&mut server, is_ipv4, from + 1).is_err());
        }
    });
}
