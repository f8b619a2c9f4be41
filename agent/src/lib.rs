//! The Muster agent: one per host. It joins the network, brings up peers on demand and serves names on the host.

pub mod config;
pub mod control;
pub mod datapath;
pub mod interface;
pub mod ping;
pub mod private_addresses;
pub mod resolver;
pub mod state;
pub mod tun;
pub mod udp;
