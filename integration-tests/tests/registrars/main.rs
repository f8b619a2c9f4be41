//! Registrars of one deployment, on an etcd that lets only them in: how they come and go, share the agents, do
//! without their store, and replace the root.
#![allow(clippy::expect_used, reason = "a test fails by panicking")]

mod away;
mod balance;
mod coming;
mod rotation;
mod site;
