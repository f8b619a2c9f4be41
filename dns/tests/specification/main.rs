//! The specification of DNS service discovery, one module a numbered section of it.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod any;
mod completion;
mod endpoints;
mod external_name;
mod external_zone;
mod fallthrough;
mod labels;
mod messages;
mod metadata;
mod names;
mod namespaces;
mod negative;
mod network;
mod pods;
mod records;
mod reverse;
mod servers;
mod soa;
#[path = "../support/mod.rs"]
mod support;
mod transfer;
