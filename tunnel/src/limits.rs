//! Every constant of the protocol (the paper, §6.1) and every bound that this crate puts on memory and work.

use std::time::Duration;

/// Messages after which a session is renewed.
pub const REKEY_AFTER_MESSAGES: u64 = 1 << 60;
/// Messages after which a session must not be used any more.
pub const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);
/// The same two with AES-256-GCM. What an attacker learns from ciphertext alone grows with the square of the blocks that
/// one key has sealed: at 2^27 packets of 9,000 octets, 2^36 blocks, the advantage is still below 2^-56, about what TLS
/// 1.3 allows (RFC 8446 §5.5). At 100 Gbit/s in packets of 1,420 octets a session is renewed every 7 s.
pub const AES_REKEY_AFTER_MESSAGES: u64 = 1 << 26;
/// See [`AES_REKEY_AFTER_MESSAGES`].
pub const AES_REJECT_AFTER_MESSAGES: u64 = 1 << 27;
/// Age at which the initiator of a session renews it when it sends.
pub const REKEY_AFTER_TIME: Duration = Duration::from_secs(120);
/// Age at which a session must not be used any more.
pub const REJECT_AFTER_TIME: Duration = Duration::from_secs(180);
/// How long a handshake is tried before the peer is given up.
pub const REKEY_ATTEMPT_TIME: Duration = Duration::from_secs(90);
/// Time between two initiations to one peer; up to [`REKEY_JITTER`] is added.
pub const REKEY_TIMEOUT: Duration = Duration::from_secs(5);
/// Upper bound of what is added to [`REKEY_TIMEOUT`], so that two peers do not stay in step.
pub const REKEY_JITTER: Duration = Duration::from_millis(333);
/// A side that received data and has sent nothing for this long sends an empty message.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Age at which keys are wiped when no new session came.
pub const ZERO_KEYS_AFTER: Duration = Duration::from_secs(3 * 180);
/// Life of the secret that cookies are made from, and of a cookie at the initiator.
pub const COOKIE_LIFE: Duration = Duration::from_secs(120);
/// How much earlier than that the initiator stops using a cookie, for what is under way.
pub const COOKIE_LATENCY: Duration = Duration::from_secs(5);

/// Within this time of each other, handshakes started by both sides count as started at once.
pub const SIMULTANEOUS: Duration = Duration::from_secs(1);
/// A peer with which no data was exchanged for this long is reported as idle.
pub const IDLE_AFTER: Duration = Duration::from_secs(300);

/// Octets that a sealed message is longer than the padded packet in it: header 16, tag 16.
pub const OVERHEAD: usize = 32;
/// Where in a datagram the opened packet begins.
pub const PACKET_OFFSET: usize = 16;
/// Packets are padded to a multiple of this many octets (the paper, §5.4.6).
pub const PADDING: usize = 16;
/// Longest inner packet, in octets, such that IPv4 and UDP headers and [`OVERHEAD`] still fit into 65,535.
pub const MAX_PACKET: usize = 65_535 - 28 - OVERHEAD;

/// What the outer IP, UDP and message headers, and the tag, add to a packet.
pub const OVERHEAD_V4: u16 = 20 + 8 + OVERHEAD as u16;
/// The same over IPv6.
pub const OVERHEAD_V6: u16 = 40 + 8 + OVERHEAD as u16;
/// MTU that a path is assumed to have until it is probed: Ethernet's 1,500 less [`OVERHEAD_V6`].
pub const ASSUMED_MTU: u16 = 1420;
/// The same for a path through a director, whose frames take 16 octets, and which may use IPv6.
pub const RELAY_ASSUMED_MTU: u16 = 1404;
/// "Too big" errors a second for packets to one peer, and as many at once.
pub const TOO_BIG_RATE: u32 = 8;

/// Packets that wait for a session with one peer; beyond it the oldest is dropped.
pub const PEER_QUEUE: usize = 128;
/// Candidate endpoints that are kept for one peer; the rest is ignored.
pub const MAX_CANDIDATES: usize = 16;
/// Shortest time between two initiations that are accepted from one peer.
pub const INITIATION_INTERVAL: Duration = Duration::from_millis(20);

/// Virtual addresses that are being looked up at one time.
pub const ADDRESS_LOOKUPS: usize = 1024;
/// Packets that wait for the lookup of one address; beyond it the oldest is dropped.
pub const LOOKUP_QUEUE: usize = 16;
/// Octets that all packets waiting for lookups may take.
pub const LOOKUP_QUEUE_OCTETS: usize = 4 << 20;
/// A lookup that is not answered for this long is forgotten; the next packet asks again.
pub const LOOKUP_TIMEOUT: Duration = Duration::from_secs(10);
/// How long "no such device" and "unknown key" are remembered.
pub const NEGATIVE_LIFE: Duration = Duration::from_secs(5);
/// How many of each are remembered.
pub const NEGATIVES: usize = 4096;
/// Initiations from unknown keys that wait for a lookup.
pub const KEY_LOOKUPS: usize = 64;
/// Key lookups a second, and as many at once.
pub const KEY_LOOKUP_RATE: u32 = 32;

/// Initiations a second, and as many at once, above which the core is under load and demands cookies. A setting:
/// see `Config::handshake_rate`.
pub const HANDSHAKE_RATE: u32 = 200;
/// How long the core stays under load after the rate was last exceeded.
pub const UNDER_LOAD_FOR: Duration = Duration::from_secs(1);
/// Under load: initiations a second that one source (IPv4 address or IPv6 /64) gets through with a valid cookie.
pub const SOURCE_RATE: u32 = 20;
/// Under load: how many of those may come at once.
pub const SOURCE_BURST: u32 = 5;
/// Under load: sources that are tracked; when as many are active, new ones are refused.
pub const SOURCES: usize = 8192;

/// Timestamps of removed peers that are kept so that their old initiations cannot be replayed.
pub const REMEMBERED_TIMESTAMPS: usize = 1024;
/// Datagrams that wait in `poll_transmit`; beyond it new ones are dropped.
pub const TRANSMIT_QUEUE: usize = 4096;
/// Packets that wait in `poll_packet`; beyond it new ones are dropped.
pub const PACKET_QUEUE: usize = 64;
/// Events that wait in `poll_event`; beyond it new ones are dropped.
pub const EVENT_QUEUE: usize = 4096;
