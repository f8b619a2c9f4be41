//! The agent on a host that does not behave: state that is damaged, processes that are killed, interfaces and addresses
//! that change under it, a registrar that is away, moves or drains.
#![allow(clippy::print_stderr, reason = "scenarios tell the times that they have measured")]

mod host;
mod interface;
mod registrar;
mod site;
mod state;
