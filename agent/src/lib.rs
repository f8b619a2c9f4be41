//! The Muster agent: one per host. It joins the network, brings up peers on demand and serves names on the host.

pub mod datapath;
pub mod tun;
pub mod udp;
