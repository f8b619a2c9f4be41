//! A director's data path with real sockets, and devices that attach over real TLS, all on loopback.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::large_futures,
    reason = "a test fails by panicking"
)]

mod agent;
mod attach;
mod datagrams;
mod site;
mod streams;
