//! Registrars of one deployment, on an etcd that lets only them in: how they come and go, and how they replace the root.
#![allow(
    clippy::expect_used,
    clippy::print_stderr,
    reason = "a test fails by panicking, and says why it is skipped"
)]

mod coming;
mod rotation;
mod site;
