//! The director: relays sealed messages between the devices of one network, for as long as they have no direct path.
#![forbid(unsafe_code)]

pub mod relay;
