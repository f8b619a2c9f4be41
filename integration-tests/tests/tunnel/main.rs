//! Traffic through the tunnel of two real agents: it arrives octet by octet, in order, and with its ECN marks, whatever
//! kernel, link and wire do with packets.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "threads that send and receive in tests"
)]

mod datagrams;
mod ecn;
mod order;
mod site;
mod stream;
mod transfer;
mod wire;
