//! A director as the registrar describes it, checked: where to attach.

use std::net::SocketAddr;

use muster_proto::admin::{DirectorAddress, Endpoint};

use crate::control::peer::socket_address;

/// UDP endpoints of one director that are used.
const MAX_ENDPOINTS: usize = 4;
/// TCP ports beside the endpoints' own that are used.
const MAX_PORTS: usize = 4;
/// Longest uid, name and region, in octets.
const MAX_NAME: usize = 253;

/// Where a director is attached to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectorTarget {
    /// As its certificate has it.
    pub uid: String,
    /// As operators know it.
    pub name: String,
    /// As its operator named it; may be empty.
    pub region: String,
    /// Addresses that gRPC is on, in the order in which they are to be tried. At least one.
    pub addresses: Vec<SocketAddr>,
    /// An operator wants devices to leave it.
    pub is_drained: bool,
}

impl DirectorTarget {
    /// `None` for a director that nobody can attach to, since it has not registered or has no usable address.
    pub(in crate::control) fn new(told: &DirectorAddress) -> Option<Self> {
        let lengths = [told.uid.len(), told.name.len(), told.region.len()];
        if told.uid.is_empty() || lengths.iter().any(|length| *length > MAX_NAME) {
            return None;
        }
        let first = Endpoint { address: told.address.clone(), port: told.port };
        let endpoints = std::iter::once(&first).chain(&told.other_endpoints);
        let endpoints: Vec<SocketAddr> = endpoints.filter_map(socket_address).take(MAX_ENDPOINTS).collect();
        let ports =
            told.tcp_ports.iter().filter_map(|port| u16::try_from(*port).ok().filter(|port| *port != 0));
        let mut addresses = endpoints.clone();
        for port in ports.take(MAX_PORTS) {
            addresses.extend(endpoints.iter().map(|endpoint| SocketAddr::new(endpoint.ip(), port)));
        }
        let mut seen = std::collections::BTreeSet::new();
        addresses.retain(|address| seen.insert(*address));
        (!addresses.is_empty()).then(|| Self {
            uid: told.uid.clone(),
            name: told.name.clone(),
            region: told.region.clone(),
            addresses,
            is_drained: told.draining,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_checked_and_their_ports_follow_their_addresses() {
        let told = DirectorAddress {
            name: "d".into(),
            address: "192.0.2.1".into(),
            port: 7501,
            uid: "u".into(),
            other_endpoints: vec![
                Endpoint { address: "2001:db8::1".into(), port: 7501 },
                Endpoint { address: "0.0.0.0".into(), port: 7501 },
            ],
            tcp_ports: vec![443, 7501, 70_000, 0],
            ..DirectorAddress::default()
        };
        let target = DirectorTarget::new(&told).unwrap();
        let expected = ["192.0.2.1:7501", "[2001:db8::1]:7501", "192.0.2.1:443", "[2001:db8::1]:443"];
        assert_eq!(target.addresses, expected.map(|address| address.parse().unwrap()));
        let bad = [
            DirectorAddress { uid: String::new(), ..told.clone() },
            DirectorAddress { uid: "u".repeat(254), ..told.clone() },
            DirectorAddress { port: 0, other_endpoints: vec![], ..told },
        ];
        assert!(bad.iter().all(|told| DirectorTarget::new(told).is_none()));
    }
}
