//! What two Muster crates or more share: identity, names, labels, configuration, files, TLS, gRPC connections and
//! who may have them, time and telemetry.
#![forbid(unsafe_code)]

pub mod census;
pub mod config;
pub mod credential;
pub mod file;
pub mod grpc;
pub mod identity;
pub mod labels;
pub mod name;
pub mod net;
pub mod telemetry;
pub mod time;
pub mod tls;
