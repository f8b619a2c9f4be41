//! Registrars of one deployment, on an etcd that lets only them in: how they come and go, share the agents, do
//! without their store, and replace the root.
#![allow(
    clippy::expect_used,
    clippy::print_stderr,
    reason = "a test fails by panicking, and says why it is skipped"
)]

mod away;
mod balance;
mod coming;
mod rotation;
mod site;
