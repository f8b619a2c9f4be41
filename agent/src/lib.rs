//! The Muster agent: one per host. It joins the network, brings up peers on demand and serves names on the host.

pub mod commands;
pub mod config;
pub mod control;
pub mod cpu;
pub mod datapath;
pub mod directors;
pub mod doctor;
pub mod env;
pub mod host;
pub mod host_dns;
pub mod interface;
pub mod join;
pub mod keys;
pub mod local_api;
pub mod metrics;
pub mod netcheck;
pub mod nftables;
pub mod ping;
pub mod port_mapping;
pub mod private_addresses;
pub mod probes;
pub mod renewal;
pub mod resolver;
pub mod run;
pub mod service_list;
pub mod session;
pub mod site;
pub mod state;
pub mod tun;
pub mod virtual_ips;
pub mod writer;

pub use muster_net as udp;
