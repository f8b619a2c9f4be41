use super::*;
use crate::nat::{Kind, direct_possible};

const TIMEOUT: Duration = Duration::from_secs(30);

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn nat(mapping: Mapping, filtering: Filtering) -> Nat {
    Nat::new("203.0.113.1".parse().unwrap(), mapping, filtering, TIMEOUT)
}

/// From where, of what was sent to, its address with another port, and a stranger, something is let in.
fn lets_in(filtering: Filtering) -> [bool; 3] {
    let mut nat = nat(Mapping::EndpointIndependent, filtering);
    let inside = at("192.168.1.2:7551");
    let outside = nat.outbound(inside, at("198.51.100.1:1"), secs(1));
    ["198.51.100.1:1", "198.51.100.1:2", "198.51.100.2:1"].map(|from| {
        let found = nat.inbound(outside, at(from), secs(2));
        assert!(found.is_none_or(|found| found == inside));
        found.is_some()
    })
}

#[test]
fn what_is_let_in_depends_on_the_filter() {
    assert_eq!(lets_in(Filtering::EndpointIndependent), [true, true, true]);
    assert_eq!(lets_in(Filtering::AddressDependent), [true, true, false]);
    assert_eq!(lets_in(Filtering::AddressAndPortDependent), [true, false, false]);
}

#[test]
fn mappings_are_per_inside_address_or_per_destination() {
    let (a, b) = (at("192.168.1.2:7551"), at("192.168.1.3:7551"));
    let (near, far) = (at("198.51.100.1:1"), at("198.51.100.2:1"));
    let mut cone = nat(Mapping::EndpointIndependent, Filtering::EndpointIndependent);
    let first = cone.outbound(a, near, secs(0));
    assert_eq!(first, at("203.0.113.1:7551"), "a free port is kept");
    assert_eq!(cone.outbound(a, far, secs(0)), first);
    let second = cone.outbound(b, near, secs(0));
    assert_ne!(second, first, "two hosts behind one NAT have two ports");
    let inside = |outside| cone.inbound(outside, near, secs(0));
    assert_eq!((inside(first), inside(second), inside(at("203.0.113.1:9"))), (Some(a), Some(b), None));
    assert_eq!(inside(at("203.0.113.2:7551")), None, "another NAT's address");
    let mut symmetric = nat(Mapping::AddressAndPortDependent, Filtering::AddressAndPortDependent);
    let first = symmetric.outbound(a, near, secs(0));
    let second = symmetric.outbound(a, far, secs(0));
    assert_ne!(first, second);
    assert_eq!(symmetric.outbound(a, near, secs(1)), first);
    assert_eq!(symmetric.inbound(first, far, secs(1)), None);
    assert_eq!(symmetric.inbound(second, far, secs(1)), Some(a));
}

#[test]
fn mappings_die_unless_something_leaves_by_them() {
    let inside = at("192.168.1.2:7551");
    let (near, far) = (at("198.51.100.1:1"), at("198.51.100.2:1"));
    let mut nat = nat(Mapping::EndpointIndependent, Filtering::AddressAndPortDependent);
    let outside = nat.outbound(inside, near, secs(0));
    nat.outbound(inside, far, secs(20));
    assert_eq!(nat.inbound(outside, near, secs(29)), Some(inside));
    assert_eq!(
        nat.inbound(outside, near, secs(31)),
        None,
        "the filter's entry is old, though the mapping lives"
    );
    assert_eq!(nat.inbound(outside, far, secs(49)), Some(inside));
    assert_eq!(nat.inbound(outside, far, secs(50)), None, "what came in has kept nothing alive");
    nat.outbound(inside, near, secs(100));
    assert_eq!(nat.len(), 1);
}

#[test]
fn what_was_mapped_is_forgotten_when_a_nat_is_rebound() {
    let (inside, to) = (at("192.168.1.2:7551"), at("198.51.100.1:1"));
    let mut nat = nat(Mapping::EndpointIndependent, Filtering::EndpointIndependent);
    let before = nat.outbound(inside, to, secs(0));
    nat.rebind();
    assert_eq!((nat.inbound(before, to, secs(0)), nat.len()), (None, 0));
    let after = nat.outbound(inside, to, secs(0));
    assert_ne!(before, after);
    for _ in 0..100 {
        nat.rebind();
        assert!(PORTS.contains(&nat.outbound(inside, to, secs(0)).port()));
    }
}

#[test]
fn there_is_always_a_port_while_mappings_die() {
    let mut nat = nat(Mapping::AddressAndPortDependent, Filtering::AddressAndPortDependent);
    for n in 0..60_u64 {
        for port in 1..=10 {
            nat.outbound(at("192.168.1.2:7551"), SocketAddr::from(([198, 51, 100, n as u8], port)), secs(n));
        }
        assert!(nat.len() <= 10 * 30);
    }
}

/// Two hosts that know each other's addresses as a third sees them, and send to where the other was heard from: it
/// works exactly where [`direct_possible`] says that it does.
#[test]
fn holes_can_be_punched_exactly_where_that_is_known_to_be_possible() {
    let behind: Vec<Kind> = Kind::ALL.into_iter().filter(|kind| kind.nat() != router::Nat::None).collect();
    let third = at("198.51.100.100:7501");
    for a in &behind {
        for b in behind.iter().filter(|b| **b != Kind::UdpBlocked) {
            if *a == Kind::UdpBlocked {
                continue;
            }
            let mut nats = [(1, a), (2, b)].map(|(n, kind)| {
                let outside = IpAddr::from([203, 0, 113, n]);
                Nat::of_kind(kind.nat(), outside, TIMEOUT).unwrap()
            });
            let inside = [1, 2].map(|n| SocketAddr::from(([192, 168, n, 2], 7551)));
            let mut known = [0, 1].map(|n: usize| vec![nats[1 - n].outbound(inside[1 - n], third, secs(0))]);
            let mut arrived = [false; 2];
            for _ in 0..4 {
                for n in [0, 1] {
                    for to in known[n].clone() {
                        let from = nats[n].outbound(inside[n], to, secs(1));
                        if nats[1 - n].inbound(to, from, secs(1)).is_some() {
                            arrived[1 - n] = true;
                            known[1 - n].push(from);
                        }
                    }
                }
            }
            assert_eq!(arrived, [direct_possible(*a, *b); 2], "{a:?} {b:?}");
        }
    }
}
