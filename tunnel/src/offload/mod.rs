//! Super-packets of the TUN device: many TCP segments or UDP datagrams of one flow under one header, so that the
//! kernel's stack is walked once for all. [`SuperPacket`] splits what the device hands out, [`Coalescer`] joins what
//! goes in. Joined and split again, packets are what they were, octet for octet.
//!
//! The one exception is the identification of IPv4 packets that must not be fragmented and all carry the same: by
//! RFC 6864 §4.1 it means nothing there, and the format of super-packets has no way to say "the same".

mod candidate;
mod checksum;
mod coalesce;
mod split;
mod virtio;

pub use checksum::Sum;
pub use coalesce::{Coalescer, Item, MAX_PACKETS};
pub use split::{OffloadError, SuperPacket};
pub use virtio::VirtioHeader;

const TCP: u8 = 6;
const UDP: u8 = 17;

const V4_HEADER_LEN: usize = 20;
const V6_HEADER_LEN: usize = 40;
const TCP_HEADER_LEN: usize = 20;
const UDP_HEADER_LEN: usize = 8;

/// Where the checksum is in a TCP header (RFC 9293 §3.1) and in a UDP header (RFC 768).
const TCP_CHECKSUM: usize = 16;
const UDP_CHECKSUM: usize = 6;

const TCP_FLAGS: usize = 13;
const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const PSH: u8 = 0x08;
const ACK: u8 = 0x10;
const URG: u8 = 0x20;
/// RFC 3168 §6.1.2: the sender has reduced its congestion window, told once.
const CWR: u8 = 0x80;

#[cfg(test)]
mod tests;
