//! What two Muster crates or more share: identity, names, labels, configuration, TLS, time, telemetry.
#![forbid(unsafe_code)]

pub mod time;
