//! Connections that the kernel remembers and that lead to an endpoint that is gone: UDP has no end of its own, so that a
//! client that goes on sending would go on being translated to nowhere.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use super::table::{Frontend, Protocol, Target};
use crate::nftables::attribute::{self, Message, find, nested};

/// `linux/netfilter/nfnetlink_conntrack.h`.
const GET: i32 = libc::NFNL_SUBSYS_CTNETLINK << 8 | 1;
const DELETE: i32 = libc::NFNL_SUBSYS_CTNETLINK << 8 | 2;
const ORIGINAL: u16 = 1;
const REPLY: u16 = 2;
const ID: u16 = 12;

/// Asks for all connections of a family.
pub(super) fn list(is_ipv4: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    let start = attribute::begin(&mut bytes, GET, libc::NLM_F_REQUEST | libc::NLM_F_DUMP, family(is_ipv4), 0);
    attribute::end_message(&mut bytes, start);
    bytes
}

/// What has the kernel forget the connection that `message` tells of, if that was made to one of `frontends` and leads to
/// none of what it is translated to now.
pub(super) fn forget(
    message: &Message<'_>,
    frontends: &BTreeMap<Frontend, Option<Target>>,
) -> Option<Vec<u8>> {
    let attributes = message.body.get(4..)?;
    let (original, reply) = (find(attributes, ORIGINAL)?, find(attributes, REPLY)?);
    let (_, destination, protocol) = tuple(original)?;
    let (source, _, _) = tuple(reply)?;
    let target = frontends.get(&Frontend { address: destination, protocol })?;
    let is_right = match target {
        Some(Target::Endpoints { endpoints, .. }) => endpoints.contains(&source),
        // What was never translated is nobody's.
        _ => source == destination,
    };
    if is_right {
        return None;
    }
    let mut bytes = Vec::new();
    let flags = libc::NLM_F_REQUEST | libc::NLM_F_ACK;
    let start = attribute::begin(&mut bytes, DELETE, flags, family(destination.is_ipv4()), 0);
    nested(&mut bytes, ORIGINAL, |bytes| bytes.extend(original));
    if let Some(id) = find(attributes, ID) {
        attribute::attribute(&mut bytes, ID, id);
    }
    attribute::end_message(&mut bytes, start);
    Some(bytes)
}

fn family(is_ipv4: bool) -> u8 {
    (if is_ipv4 { libc::AF_INET } else { libc::AF_INET6 }) as u8
}

/// Source, destination and protocol of one direction of a connection.
fn tuple(bytes: &[u8]) -> Option<(SocketAddr, SocketAddr, Protocol)> {
    let (ip, transport) = (find(bytes, 1)?, find(bytes, 2)?);
    let address = |ipv4: u16, ipv6: u16| -> Option<IpAddr> {
        match find(ip, ipv4) {
            Some(octets) => Some(IpAddr::from(*octets.first_chunk::<4>()?)),
            None => Some(IpAddr::from(*find(ip, ipv6)?.first_chunk::<16>()?)),
        }
    };
    let port = |kind: u16| Some(u16::from_be_bytes(*find(transport, kind)?.first_chunk()?));
    let protocol = match find(transport, 1)?.first()? {
        6 => Protocol::Tcp,
        17 => Protocol::Udp,
        132 => Protocol::Sctp,
        _ => return None,
    };
    let source = SocketAddr::new(address(1, 3)?, port(2)?);
    let destination = SocketAddr::new(address(2, 4)?, port(3)?);
    Some((source, destination, protocol))
}
