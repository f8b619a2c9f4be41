//! Whether an address is one of this host's own, asked of the kernel: whoever asks from another host, over the
//! virtual network or the LAN, is not served.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use muster_common::time::Instant;

/// For how long an address that was found to be ours is not looked at again.
const REMEMBERED: Duration = Duration::from_secs(10);
/// Addresses that are remembered; hosts with more ask the kernel more often.
const REMEMBERED_MAX: usize = 64;

/// The host's addresses that have asked of late.
#[derive(Debug, Default)]
pub(super) struct LocalAddresses(Mutex<HashMap<IpAddr, Instant>>);

impl LocalAddresses {
    /// Whether `source` is an address of this host.
    pub(super) fn contains(&self, source: SocketAddr, now: Instant) -> bool {
        if source.ip().is_loopback() {
            return true;
        }
        let known = |at: &Instant| now - *at < REMEMBERED;
        if self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&source.ip()).is_some_and(known) {
            return true;
        }
        let local = is_local(source);
        if local {
            let mut remembered = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if remembered.len() >= REMEMBERED_MAX {
                remembered.clear();
            }
            remembered.insert(source.ip(), now);
        }
        local
    }
}

/// To an address of its own, the kernel sends from that address. (Trying to bind it would say the same, but not
/// where `net.ipv4.ip_nonlocal_bind` is set.)
fn is_local(mut address: SocketAddr) -> bool {
    let any: IpAddr = match address {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    // Nothing is sent: connecting a datagram socket only looks up the route. Any port but 0 will do.
    address.set_port(9);
    let source = UdpSocket::bind((any, 0)).and_then(|socket| {
        socket.connect(address)?;
        socket.local_addr()
    });
    source.is_ok_and(|source| source.ip() == address.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_own_addresses_are_known_as_such() {
        let local = LocalAddresses::default();
        let contains = |text: &str| local.contains(text.parse().unwrap(), Instant::default());
        assert!(contains("127.0.0.1:1") && contains("127.9.9.9:1") && contains("[::1]:1"));
        assert!(!contains("192.0.2.1:1") && !contains("[2001:db8::1]:1") && !contains("0.0.0.0:1"));
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        if socket.connect("192.0.2.1:9").is_ok() {
            let own = socket.local_addr().unwrap();
            assert!(contains(&own.to_string()) && contains(&own.to_string()));
        }
    }
}
