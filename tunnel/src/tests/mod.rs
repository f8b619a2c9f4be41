//! Tunnels in one simulated network, with virtual time. Each scenario is in the file that its name suggests.

mod batches;
mod cipher;
mod handshake;
mod internet;
mod limits;
mod lookup;
mod network;
pub(crate) mod packets;
pub(crate) mod path_mtu;
mod paths;
mod relays;
mod session;
mod subnets;
