//! What `muster-agent status` prints.

use muster_proto::{
    admin::Endpoint,
    agent::{RegistrarStatus, SiteSubnetStatus},
};

use super::*;

#[test]
fn numbers_are_for_people() {
    assert_eq!([0, 1023, 1024, 1_600_000].map(octets), ["0 B", "1023 B", "1.0 KiB", "1.5 MiB"]);
    assert_eq!(octets(u64::MAX), "16777215.9 TiB");
    let at = |s| Timestamp::from_epoch(Duration::from_secs(s));
    assert_eq!([0, 119, 120, 7_200, 999_999].map(|s| ago(at(s), at(0))), ["0s", "119s", "2m", "2h", "11d"]);
}

fn bob() -> PeerStatus {
    let at = |seconds| pbjson_types::Timestamp { seconds, nanos: 0 };
    PeerStatus {
        device_uid: "d143".into(),
        name: "bob".into(),
        virtual_addresses: vec!["100.64.0.2".into(), "fd00:1::2".into()],
        public_key: vec![1; 32],
        path: "direct".into(),
        endpoint: Some(Endpoint { address: "2001:db8::1".into(), port: 7551 }),
        last_handshake: Some(at(7)),
        received_packets: 5,
        received_bytes: 2_048,
        sent_packets: 6,
        sent_bytes: 1_000,
        queued_packets: 4,
        drops: [("replayed".to_owned(), 2), ("wrong_source".to_owned(), 1)].into(),
        cipher: "aes-256-gcm".into(),
        path_mtu: 8_920,
        ..PeerStatus::default()
    }
}

#[test]
fn one_peer_is_told_of_at_length() {
    let now = Timestamp::from_epoch(Duration::from_secs(10));
    assert_eq!(
        details(&bob(), now),
        "Peer         bob (uid d143)\n\
         Address      100.64.0.2, fd00:1::2\n\
         Key          AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=\n\
         Path         direct via [2001:db8::1]:7551\n\
         Handshake    3s ago\n\
         Cipher       aes-256-gcm\n\
         MTU          8920\n\
         Received     5 datagrams, 2.0 KiB\n\
         Sent         6 datagrams, 1000 B\n\
         Waiting      4 packets\n\
         Dropped      replayed 2, wrong_source 1\n"
    );
    let fresh = PeerStatus { name: "carol".into(), path: "none".into(), ..PeerStatus::default() };
    let text = details(&fresh, now);
    assert!(text.contains("Path         none\n") && text.contains("never"), "{text}");
    assert!(!["Waiting", "Dropped", "Cipher", "MTU"].iter().any(|title| text.contains(title)), "{text}");
}

#[test]
fn a_peer_is_found_by_name_and_address() {
    let carol = PeerStatus { name: "carol".into(), ..PeerStatus::default() };
    let status = GetStatusResponse {
        domain: "net.example".into(),
        peers: vec![carol, bob()],
        ..GetStatusResponse::default()
    };
    for wanted in ["bob", "BOB", "bob.net.example", "bob.net.example.", "100.64.0.2", "fd00:1:0::2"] {
        assert_eq!(find(&status, wanted), Ok(&bob()), "{wanted}");
    }
    for wanted in ["bo", "bob.example", "100.64.0.3", ""] {
        assert_eq!(find(&status, wanted), Err(NoSuchPeer(wanted.into())), "{wanted}");
    }
}

#[test]
fn the_interface_tells_its_mtu_once_it_is_there() {
    let mut status = GetStatusResponse { mtu: 1_420, ..GetStatusResponse::default() };
    let now = Timestamp::from_epoch(Duration::ZERO);
    let text = table(&status, now);
    assert!(text.contains("\nMTU          1420\n"), "{text}");
    let json = serde_json::to_value(&status).unwrap();
    assert_eq!(json["mtu"], 1_420);
    assert_eq!(serde_json::to_value(bob()).unwrap()["pathMtu"], 8_920);
    status.mtu = 0;
    let text = table(&status, now);
    assert!(!text.contains("MTU"), "{text}");
}

#[test]
fn the_data_plane_takes_four_lines() {
    let counter = |packets, bytes, calls| Some(TrafficCounter { packets, bytes, calls });
    let named = |items: &[(&str, bool)]| items.iter().map(|(name, on)| ((*name).to_owned(), *on)).collect();
    let datapath = DatapathStatus {
        threads: 2,
        offloads: named(&[("tun_tso", true), ("tun_uso", false), ("udp_gro", true)]),
        tun_received: counter(64, 65_536, 5),
        udp_sent: counter(66, 69_632, 2),
        tun_sent: counter(0, 0, 0),
        udp_received: counter(3, 96, 3),
        drops: [("no_route".to_owned(), 12)].into(),
    };
    let status = GetStatusResponse { datapath: Some(datapath), ..GetStatusResponse::default() };
    let text = table(&status, Timestamp::from_epoch(Duration::ZERO));
    for line in [
        "Threads      2\nOffloads     tun_tso, udp_gro (not in use: tun_uso)\n",
        "From host    64 packets, 64.0 KiB, 12.8 a read; sent 66 datagrams, 68.0 KiB, 33.0 a call\n",
        "To host      0 packets, 0 B, 0.0 a write; received 3 datagrams, 96 B, 1.0 a call\n",
        "Dropped      no_route 12\n",
    ] {
        assert!(text.contains(line), "{line}{text}");
    }
    assert_eq!(offloads(&named(&[("a", false), ("b", false)])), "none (not in use: a, b)");
    assert_eq!(offloads(&named(&[("a", true), ("b", true)])), "a, b");
    let json = serde_json::to_value(&status).unwrap();
    assert_eq!(json["datapath"]["offloads"]["tun_uso"], false, "what is not in use is told, too");
    assert_eq!(json["datapath"]["drops"]["no_route"], "12");
}

#[test]
fn directors_and_paths_through_them_are_told() {
    let known = |name: &str, transport: &str, last_error: &str| DirectorStatus {
        name: name.into(),
        role: "home".into(),
        transport: transport.into(),
        round_trip: Some(pbjson_types::Duration { seconds: 0, nanos: 12_000_000 }),
        last_error: last_error.into(),
        ..DirectorStatus::default()
    };
    let peer = PeerStatus {
        name: "bob".into(),
        path: "relay".into(),
        director: "d1".into(),
        path_since: Some(pbjson_types::Timestamp { seconds: 7, nanos: 0 }),
        path_reason: "silence".into(),
        ..PeerStatus::default()
    };
    let now = Timestamp::from_epoch(Duration::from_secs(10));
    assert!(details(&peer, now).contains("relay via d1, for 3s (silence)"), "{}", details(&peer, now));
    let status = GetStatusResponse {
        directors: vec![known("d1", "udp", ""), known("d2", "none", ""), known("d3", "none", "gone")],
        reflexive_endpoints: vec![Endpoint { address: "192.0.2.1".into(), port: 7551 }],
        peers: vec![peer],
        ..GetStatusResponse::default()
    };
    let text = table(&status, now);
    for line in [
        "Reflexive    192.0.2.1:7551",
        "Director     d1 (home), 12.00 ms over udp",
        "Director     d2 (home), not attached",
        "Director     d3 (home), not reached: gone",
    ] {
        assert!(text.contains(line), "{text}");
    }
    assert!(text.contains("relay   d1"), "{text}");
}

#[test]
fn what_a_device_speaks_for_is_told() {
    let host = |refused: &str, virtual_ipv4: &str| ProxiedHostStatus {
        name: "printer".into(),
        lan_address: "192.168.7.9".into(),
        virtual_ipv4: virtual_ipv4.into(),
        refused: refused.into(),
        ..ProxiedHostStatus::default()
    };
    let status = GetStatusResponse {
        proxied_hosts: vec![host("", "100.64.3.3"), host("no", ""), host("", "")],
        site_subnets: vec![SiteSubnetStatus { subnet: "192.168.7.0/24".into(), state: "standby".into() }],
        site_error: "no nft".into(),
        left_out_routes: vec![LeftOutRoute { subnet: "10.0.0.0/8".into(), reason: "why".into() }],
        virtual_ips: Some(VirtualIpStatus { frontends: 3, endpoints: 7, error: String::new() }),
        ..GetStatusResponse::default()
    };
    let text = table(&status, Timestamp::from_epoch(Duration::from_secs(10)));
    for line in [
        "Speaks for   printer (192.168.7.9) at 100.64.3.3",
        "Virtual IPs  3, with 7 endpoints",
        "printer (192.168.7.9), refused: no",
        "printer (192.168.7.9), not known to the registrar yet",
        "Subnet       192.168.7.0/24, standby",
        "Site         nothing is forwarded: no nft",
    ] {
        assert!(text.contains(line), "{text}");
    }
}

#[test]
fn a_refused_device_says_so() {
    let status = GetStatusResponse {
        name: "alice".into(),
        registrar: Some(RegistrarStatus {
            address: "r:7500".into(),
            last_error: "the device has been revoked".into(),
            ..RegistrarStatus::default()
        }),
        peers: vec![PeerStatus {
            name: "bob".into(),
            path: "direct".into(),
            endpoint: Some(Endpoint { address: "192.0.2.1".into(), port: 7551 }),
            ..PeerStatus::default()
        }],
        ..GetStatusResponse::default()
    };
    let text = table(&status, Timestamp::from_epoch(Duration::from_secs(10)));
    assert!(text.contains("r:7500, not connected: the device has been revoked"), "{text}");
    assert!(text.contains("bob") && text.contains("192.0.2.1:7551") && text.contains("never"), "{text}");
    assert!(text.contains("Address      none yet"), "{text}");
}
