//! The director: relays sealed messages between the devices of one network, for as long as they have no direct path.
#![forbid(unsafe_code)]

mod attach;
pub mod commands;
pub mod config;
mod hub;
pub mod identity;
pub mod metrics;
pub mod registrar;
pub mod relay;
pub mod run;
pub mod running;
mod stream;
pub mod udp;
