//! The layout of the store: which key holds what. Every key of the registrar's is made and read here, and only
//! here.
//!
//! | key | value |
//! |---|---|
//! | `meta/format` | `storage.Format` |
//! | `meta/restoring` | `storage.Restoring`; while it is there, the store is not whole |
//! | `meta/migrated` | `storage.Migrated`; while it is there, another store is served in this one's place |
//! | `meta/networks` | `storage.Claim`; every change to a network's domain or pools also changes it, so that two such changes cannot pass each other |
//! | `networks/<network>` | `admin.Network` |
//! | `network-locks/<network>` | `storage.Claim`; while it is there, no device can be added to the network |
//! | `devices/<network>/<uid>` | `admin.Device` |
//! | `device-names/<network>/<name>` | `storage.Claim`: keeps names unique |
//! | `device-keys/<network>/<hex>` | `storage.Claim`: keeps WireGuard keys unique |
//! | `addresses/<network>/<device or service>/<4 or 6><hex>` | `storage.StoredAddress` |
//! | `directors/<network>/<uid>` | `admin.Director` |
//! | `director-names/<network>/<name>` | `storage.Claim`: keeps names unique |
//! | `tokens/<network>/<name>` | `storage.StoredToken` |
//! | `namespaces/<network>/<name>` | `admin.Namespace` |
//! | `services/<network>/<namespace>/<name>` | `admin.Service` |
//! | `endpoint-slices/<network>/<namespace>/<name>` | `admin.EndpointSlice` |
//! | `carriers/<network>/<4 or 6><hex>-<length>` | `storage.Carrier`: the device that carries a subnet |
//! | `registrars/<uid>` | nothing: there as long as the registrar runs; another uid each time |
//! | `registrar-records/<uid>` | `admin.Registrar`; the uid is that of its certificate |
//! | `pulse` | nothing: written by a registrar that wants to be told of a revision of its own |
//! | `roots/<number>` | `storage.StoredRoot` |
//! | `successions/<hex>` | `storage.StoredSuccession`, by the hash of the root that is replaced |
//! | `invitations/<id>` | `storage.StoredInvitation` |

use std::{
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use bytes::Bytes;
use ipnet::IpNet;
use uuid::Uuid;

use crate::store::KeyRange;

/// What an address belongs to.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Owner {
    /// A device's virtual address.
    Device,
    /// A Service's ClusterIP.
    Service,
}

impl Owner {
    fn as_str(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Service => "service",
        }
    }
}

/// A key, taken apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs, reason = "the parts are named as in the table above")]
pub enum Key<'a> {
    Format,
    Restoring,
    Migrated,
    Networks,
    Network(&'a str),
    NetworkLock(&'a str),
    Device { network: &'a str, uid: Uuid },
    DeviceName { network: &'a str, name: &'a str },
    DeviceKey { network: &'a str, key: [u8; 32] },
    Address { network: &'a str, owner: Owner, address: IpAddr },
    Director { network: &'a str, uid: Uuid },
    DirectorName { network: &'a str, name: &'a str },
    Token { network: &'a str, name: &'a str },
    Namespace { network: &'a str, name: &'a str },
    Service { network: &'a str, namespace: &'a str, name: &'a str },
    EndpointSlice { network: &'a str, namespace: &'a str, name: &'a str },
    Carrier { network: &'a str, subnet: IpNet },
    Presence { network: &'a str, uid: Uuid },
    Readiness { network: &'a str, uid: Uuid },
    Registrar(Uuid),
    RegistrarRecord(Uuid),
    Pulse,
    Root(u64),
    Succession([u8; 32]),
    Invitation(&'a str),
}

/// The ranges that the index is loaded from, in this order: what others refer to comes first. Claims only guard
/// transactions, and need not be loaded.
pub fn loaded() -> [KeyRange; 15] {
    [
        "meta/",
        "networks/",
        "network-locks/",
        "addresses/",
        "devices/",
        // Before Services, so that their endpoints are made once.
        "presence/",
        "readiness/",
        "directors/",
        "tokens/",
        "namespaces/",
        "services/",
        "endpoint-slices/",
        "carriers/",
        "registrars/",
        "registrar-records/",
    ]
    .map(KeyRange::prefix)
}

/// `meta/format`
pub fn format() -> Bytes {
    Bytes::from_static(b"meta/format")
}

/// `meta/restoring`
pub fn restoring() -> Bytes {
    Bytes::from_static(b"meta/restoring")
}

/// `meta/migrated`
pub fn migrated() -> Bytes {
    Bytes::from_static(b"meta/migrated")
}

/// All that a store says of itself.
pub fn meta() -> KeyRange {
    KeyRange::prefix("meta/")
}

/// `networks/<network>`
pub fn network(network: &str) -> Bytes {
    join("networks", &[network])
}

/// `meta/networks`
pub fn networks() -> Bytes {
    Bytes::from_static(b"meta/networks")
}

/// `network-locks/<network>`
pub fn network_lock(network: &str) -> Bytes {
    join("network-locks", &[network])
}

/// `devices/<network>/<uid>`
pub fn device(network: &str, uid: Uuid) -> Bytes {
    let mut buffer = Uuid::encode_buffer();
    join("devices", &[network, uid.hyphenated().encode_lower(&mut buffer)])
}

/// `device-names/<network>/<name>`
pub fn device_name(network: &str, name: &str) -> Bytes {
    join("device-names", &[network, name])
}

/// `device-keys/<network>/<hex>`
pub fn device_key(network: &str, key: &[u8; 32]) -> Bytes {
    join("device-keys", &[network, &hex(key)])
}

/// `addresses/<network>/<owner>/<4 or 6><hex>`: sorts as the addresses do, IPv4 first.
pub fn address(network: &str, owner: Owner, address: IpAddr) -> Bytes {
    join("addresses", &[network, owner.as_str(), &sortable(address)])
}

fn sortable(address: IpAddr) -> String {
    match address {
        IpAddr::V4(v4) => format!("4{}", hex(&v4.octets())),
        IpAddr::V6(v6) => format!("6{}", hex(&v6.octets())),
    }
}

/// All addresses of a network.
pub fn addresses(network: &str) -> KeyRange {
    KeyRange::prefix(join("addresses", &[network, ""]))
}

/// `directors/<network>/<uid>`
pub fn director(network: &str, uid: Uuid) -> Bytes {
    let mut buffer = Uuid::encode_buffer();
    join("directors", &[network, uid.hyphenated().encode_lower(&mut buffer)])
}

/// `director-names/<network>/<name>`
pub fn director_name(network: &str, name: &str) -> Bytes {
    join("director-names", &[network, name])
}

/// `tokens/<network>/<name>`
pub fn token(network: &str, name: &str) -> Bytes {
    join("tokens", &[network, name])
}

/// `namespaces/<network>/<name>`
pub fn namespace(network: &str, name: &str) -> Bytes {
    join("namespaces", &[network, name])
}

/// `services/<network>/<namespace>/<name>`
pub fn service(network: &str, namespace: &str, name: &str) -> Bytes {
    join("services", &[network, namespace, name])
}

/// `endpoint-slices/<network>/<namespace>/<name>`
pub fn endpoint_slice(network: &str, namespace: &str, name: &str) -> Bytes {
    join("endpoint-slices", &[network, namespace, name])
}

/// `readiness/<network>/<uid>`
pub fn readiness(network: &str, uid: Uuid) -> Bytes {
    join("readiness", &[network, &uid.to_string()])
}

/// `presence/<network>/<uid>`
pub fn presence(network: &str, uid: Uuid) -> Bytes {
    join("presence", &[network, &uid.to_string()])
}

/// `carriers/<network>/<4 or 6><hex>-<length>`
pub fn carrier(network: &str, subnet: &IpNet) -> Bytes {
    join("carriers", &[network, &format!("{}-{}", sortable(subnet.network()), subnet.prefix_len())])
}

/// `registrars/<uid>`
pub fn registrar(uid: Uuid) -> Bytes {
    let mut buffer = Uuid::encode_buffer();
    join("registrars", &[uid.hyphenated().encode_lower(&mut buffer)])
}

/// `registrar-records/<uid>`
pub fn registrar_record(uid: Uuid) -> Bytes {
    let mut buffer = Uuid::encode_buffer();
    join("registrar-records", &[uid.hyphenated().encode_lower(&mut buffer)])
}

/// All registrars that run.
pub fn registrars() -> KeyRange {
    KeyRange::prefix("registrars/")
}

/// Whether a key goes with a deployment into another store, and is neither of this store alone nor of a process. Who
/// carries a subnet and where a device's session is do go: it is with them as after a registrar's restart.
pub fn is_portable(key: &[u8]) -> bool {
    !matches!(
        parse(key),
        Some(
            Key::Format
                | Key::Restoring
                | Key::Migrated
                | Key::Pulse
                | Key::Registrar(_)
                | Key::Invitation(_)
        )
    )
}

/// `pulse`
pub fn pulse() -> Bytes {
    Bytes::from_static(b"pulse")
}

/// `roots/<number>`
pub fn root(number: u64) -> Bytes {
    join("roots", &[&number.to_string()])
}

/// `successions/<hex>`
pub fn succession(old_root: &[u8; 32]) -> Bytes {
    join("successions", &[&hex(old_root)])
}

/// All successions of roots.
pub fn successions() -> KeyRange {
    KeyRange::prefix("successions/")
}

/// `invitations/<id>`
pub fn invitation(id: &str) -> Bytes {
    join("invitations", &[id])
}

/// All invitations.
pub fn invitations() -> KeyRange {
    KeyRange::prefix("invitations/")
}

/// Takes a key apart; `None` if it is none of the registrar's.
pub fn parse(key: &[u8]) -> Option<Key<'_>> {
    let text = std::str::from_utf8(key).ok()?;
    let mut parts = text.split('/');
    let area = parts.next()?;
    let mut part = || parts.next().filter(|part| !part.is_empty());
    let parsed = match area {
        "meta" => match part()? {
            "format" => Key::Format,
            "restoring" => Key::Restoring,
            "migrated" => Key::Migrated,
            "networks" => Key::Networks,
            _ => return None,
        },
        "networks" => Key::Network(part()?),
        "network-locks" => Key::NetworkLock(part()?),
        "devices" => Key::Device { network: part()?, uid: Uuid::try_parse(part()?).ok()? },
        "device-names" => Key::DeviceName { network: part()?, name: part()? },
        "device-keys" => Key::DeviceKey { network: part()?, key: unhex(part()?)? },
        "addresses" => Key::Address {
            network: part()?,
            owner: match part()? {
                "device" => Owner::Device,
                "service" => Owner::Service,
                _ => return None,
            },
            address: parse_address(part()?)?,
        },
        "directors" => Key::Director { network: part()?, uid: Uuid::try_parse(part()?).ok()? },
        "director-names" => Key::DirectorName { network: part()?, name: part()? },
        "tokens" => Key::Token { network: part()?, name: part()? },
        "namespaces" => Key::Namespace { network: part()?, name: part()? },
        "services" => Key::Service { network: part()?, namespace: part()?, name: part()? },
        "endpoint-slices" => Key::EndpointSlice { network: part()?, namespace: part()?, name: part()? },
        "presence" => Key::Presence { network: part()?, uid: Uuid::try_parse(part()?).ok()? },
        "readiness" => Key::Readiness { network: part()?, uid: Uuid::try_parse(part()?).ok()? },
        "carriers" => Key::Carrier { network: part()?, subnet: parse_subnet(part()?)? },
        "registrars" => Key::Registrar(Uuid::try_parse(part()?).ok()?),
        "registrar-records" => Key::RegistrarRecord(Uuid::try_parse(part()?).ok()?),
        "pulse" => Key::Pulse,
        "roots" => Key::Root(part()?.parse().ok()?),
        "successions" => Key::Succession(unhex(part()?)?),
        "invitations" => Key::Invitation(part()?),
        _ => return None,
    };
    parts.next().is_none().then_some(parsed)
}

fn parse_address(text: &str) -> Option<IpAddr> {
    let digits = text.get(1..)?;
    match text.as_bytes().first()? {
        b'4' => Some(Ipv4Addr::from(unhex::<4>(digits)?).into()),
        b'6' => Some(Ipv6Addr::from(unhex::<16>(digits)?).into()),
        _ => None,
    }
}

fn parse_subnet(text: &str) -> Option<IpNet> {
    let (address, length) = text.split_once('-')?;
    let net = IpNet::new(parse_address(address)?, length.parse().ok()?).ok()?;
    (net == net.trunc()).then_some(net)
}

fn join(area: &str, parts: &[&str]) -> Bytes {
    let length = area.len() + parts.iter().map(|part| part.len() + 1).sum::<usize>();
    let mut key = Vec::with_capacity(length);
    key.extend_from_slice(area.as_bytes());
    for part in parts {
        key.push(b'/');
        key.extend_from_slice(part.as_bytes());
    }
    key.into()
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != N * 2 {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let value = |digit: u8| match digit {
            b'0'..=b'9' => Some(digit - b'0'),
            b'a'..=b'f' => Some(digit - b'a' + 10),
            _ => None,
        };
        *byte = value(*pair.first()?)? << 4 | value(*pair.last()?)?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn keys_are_read_as_they_were_made() {
        let uid = Uuid::from_u128(0x1234);
        let v6: IpAddr = "fd00::1".parse().unwrap();
        for (key, expected) in [
            (format(), Key::Format),
            (restoring(), Key::Restoring),
            (migrated(), Key::Migrated),
            (network("n"), Key::Network("n")),
            (networks(), Key::Networks),
            (network_lock("n"), Key::NetworkLock("n")),
            (device("n", uid), Key::Device { network: "n", uid }),
            (device_name("n", "a"), Key::DeviceName { network: "n", name: "a" }),
            (device_key("n", &[7; 32]), Key::DeviceKey { network: "n", key: [7; 32] }),
            (
                address("n", Owner::Device, v6),
                Key::Address { network: "n", owner: Owner::Device, address: v6 },
            ),
            (director("n", uid), Key::Director { network: "n", uid }),
            (director_name("n", "a"), Key::DirectorName { network: "n", name: "a" }),
            (token("n", "t"), Key::Token { network: "n", name: "t" }),
            (namespace("n", "s"), Key::Namespace { network: "n", name: "s" }),
            (service("n", "s", "web"), Key::Service { network: "n", namespace: "s", name: "web" }),
            (
                endpoint_slice("n", "s", "web.1"),
                Key::EndpointSlice { network: "n", namespace: "s", name: "web.1" },
            ),
            (
                carrier("n", &"192.168.7.0/24".parse().unwrap()),
                Key::Carrier { network: "n", subnet: "192.168.7.0/24".parse().unwrap() },
            ),
            (
                carrier("n", &"fd07::/64".parse().unwrap()),
                Key::Carrier { network: "n", subnet: "fd07::/64".parse().unwrap() },
            ),
            (presence("n", uid), Key::Presence { network: "n", uid }),
            (readiness("n", uid), Key::Readiness { network: "n", uid }),
            (registrar(uid), Key::Registrar(uid)),
            (registrar_record(uid), Key::RegistrarRecord(uid)),
            (pulse(), Key::Pulse),
            (root(2), Key::Root(2)),
            (succession(&[7; 32]), Key::Succession([7; 32])),
            (invitation("a"), Key::Invitation("a")),
        ] {
            assert_eq!(parse(&key), Some(expected));
        }
    }

    #[test]
    fn addresses_sort_by_family_and_value() {
        let key = |text: &str| address("n", Owner::Device, text.parse().unwrap());
        assert!(key("9.0.0.0") < key("10.0.0.0"));
        assert!(key("255.0.0.0") < key("::1"));
    }

    proptest! {
        #[test]
        fn no_key_makes_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..80), text in "(devices|directors|addresses|device-keys|tokens|services|endpoint-slices|namespaces|carriers|registrars|roots)(/[a-f0-9é-]{0,5}){0,4}") {
            let _ = parse(&bytes);
            let _ = parse(text.as_bytes());
        }
    }
}
