//! Between the words of the control side and those of the core.

use std::net::SocketAddr;

use ipnet::IpNet;
use muster_common::time::{Instant, Timestamp};
use muster_tunnel::{Config, Drops, Endpoint, PrivateKey, Tunnel};

use super::{Cipher, DatapathConfig, Event, Offloads, Path, PeerConfig, PeerSnapshot, PublicKey};
use crate::{directors::flow::Attachment, tun, udp};

pub(super) fn tunnel(config: &DatapathConfig) -> Tunnel {
    let config = Config {
        private_key: PrivateKey::from_bytes(*config.private_key),
        seed: *config.seed,
        mtu: config.mtu as usize,
        handshake_rate: 0,
        accepts_aes: config.accepts_aes,
    };
    Tunnel::new(config, Instant::now(), Timestamp::now())
}

pub(super) fn key(key: PublicKey) -> muster_tunnel::PublicKey {
    muster_tunnel::PublicKey::from_bytes(key)
}

/// Leaves out endpoints in `pools`: the way to them would lead through the tunnel itself.
pub(super) fn peer(peer: PeerConfig, pools: &[IpNet]) -> muster_tunnel::PeerConfig {
    let PeerConfig { public_key, virtual_addresses, subnets, mut endpoints, relays, keepalive, cipher } =
        peer;
    endpoints.retain(|endpoint| is_outside(*endpoint, pools) && !virtual_addresses.contains(&endpoint.ip()));
    muster_tunnel::PeerConfig {
        virtual_addresses,
        subnets,
        endpoints,
        relays,
        persistent_keepalive: keepalive,
        cipher: match cipher {
            Cipher::ChaCha20Poly1305 => muster_tunnel::Cipher::ChaCha20Poly1305,
            Cipher::Aes256Gcm => muster_tunnel::Cipher::Aes256Gcm,
        },
        ..muster_tunnel::PeerConfig::new(key(public_key))
    }
}

/// Leaves out endpoints in `pools`, as [`peer`] does.
pub(super) fn attachment(mut attachment: Attachment, pools: &[IpNet]) -> Attachment {
    attachment.endpoints.retain(|endpoint| is_outside(*endpoint, pools));
    attachment
}

fn is_outside(endpoint: SocketAddr, pools: &[IpNet]) -> bool {
    let address = endpoint.ip();
    !address.is_unspecified() && endpoint.port() != 0 && !pools.iter().any(|pool| pool.contains(&address))
}

pub(super) fn event(event: muster_tunnel::Event) -> Event {
    use muster_tunnel::Event as Core;
    match event {
        Core::LookupAddress(address) => Event::LookupAddress(address),
        Core::LookupKey(key) => Event::LookupKey(*key.as_bytes()),
        Core::PeerUp { public_key, endpoint } => {
            Event::PeerUp { public_key: *public_key.as_bytes(), endpoint }
        }
        Core::PeerDown(key) => Event::PeerDown(*key.as_bytes()),
        Core::PeerIdle(key) => Event::PeerIdle(*key.as_bytes()),
        Core::EndpointChanged { public_key, endpoint } => {
            Event::EndpointChanged { public_key: *public_key.as_bytes(), endpoint }
        }
    }
}

/// The core's drops as metrics and status call them, also those that have not happened.
pub(super) fn named(drops: &Drops) -> impl Iterator<Item = (&'static str, u64)> {
    drops.iter().map(|(reason, number)| (reason.as_str(), number))
}

pub(super) fn offloads(tun: tun::Offloads, udp: udp::Offloads) -> Offloads {
    Offloads {
        tun_checksum: tun.checksum,
        tun_tso: tun.tso,
        tun_uso: tun.uso,
        udp_segment: udp.segments,
        udp_gro: udp.coalesces,
    }
}

pub(super) fn peer_snapshot(peer: muster_tunnel::PeerSnapshot) -> (PublicKey, PeerSnapshot) {
    let endpoint = peer.path.as_ref().map(|path| path.endpoint);
    let snapshot = PeerSnapshot {
        virtual_addresses: peer.virtual_addresses,
        endpoint: endpoint.and_then(|endpoint| endpoint.direct()),
        director: endpoint.and_then(|endpoint| match endpoint {
            Endpoint::Direct(_) => None,
            Endpoint::Relay { director, .. } => Some(director),
        }),
        last_handshake: peer.last_handshake,
        received_packets: peer.received_packets,
        received_bytes: peer.received_bytes,
        sent_packets: peer.sent_packets,
        sent_bytes: peer.sent_bytes,
        path_mtu: peer.path_mtu,
        queued: peer.queued,
        drops: named(&peer.drops).filter(|(_, number)| *number > 0).collect(),
        path: match endpoint {
            Some(endpoint) if peer.has_session && endpoint.is_relay() => Path::Relay,
            _ if peer.has_session => Path::Direct,
            _ => Path::None,
        },
        round_trip: peer.path.as_ref().and_then(|path| path.round_trip),
        path_since: peer.path.as_ref().map(|path| path.since),
        path_reason: peer.path.as_ref().map(|path| path.why.as_str()),
        cipher: peer.cipher.map(|cipher| match cipher {
            muster_tunnel::Cipher::ChaCha20Poly1305 => Cipher::ChaCha20Poly1305,
            muster_tunnel::Cipher::Aes256Gcm => Cipher::Aes256Gcm,
        }),
    };
    (*peer.public_key.as_bytes(), snapshot)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_offload_keeps_its_name() {
        let tun =
            |bits: u8| tun::Offloads { checksum: bits & 1 != 0, tso: bits & 2 != 0, uso: bits & 4 != 0 };
        let udp = |bits: u8| udp::Offloads { segments: bits & 8 != 0, coalesces: bits & 16 != 0 };
        let names = ["tun_checksum", "tun_tso", "tun_uso", "udp_segment", "udp_gro"];
        for (number, name) in names.into_iter().enumerate() {
            let named = offloads(tun(1 << number), udp(1 << number)).named();
            assert_eq!(named, names.map(|other| (other, other == name)));
        }
    }

    #[test]
    fn endpoints_that_lead_back_into_the_tunnel_are_left_out() {
        let pools = ["100.64.0.0/11".parse().expect("a prefix"), "fd00:1::/48".parse().expect("a prefix")];
        let config = PeerConfig {
            public_key: [1; 32],
            virtual_addresses: vec!["10.0.0.1".parse().expect("an address")],
            subnets: vec![],
            endpoints: [
                "192.0.2.1:51820",
                "100.64.0.9:51820",
                "[fd00:1::5]:51820",
                "[2001:db8::1]:51820",
                "0.0.0.0:51820",
                "192.0.2.1:0",
                "10.0.0.1:51820",
            ]
            .map(|e| e.parse().expect("an endpoint"))
            .to_vec(),
            relays: vec![],
            keepalive: None,
            cipher: Cipher::default(),
        };
        let endpoints: Vec<_> = peer(config, &pools).endpoints.iter().map(ToString::to_string).collect();
        assert_eq!(endpoints, ["192.0.2.1:51820", "[2001:db8::1]:51820"]);
    }
}
