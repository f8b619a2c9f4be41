//! What two Muster crates or more share: identity, names, labels, configuration, files, TLS, gRPC connections,
//! who may have them, frames to directors, digests, time and telemetry.
#![forbid(unsafe_code)]

pub mod census;
pub mod config;
pub mod credential;
pub mod datagram;
pub mod digest;
pub mod file;
pub mod frame;
pub mod grpc;
pub mod identity;
pub mod labels;
pub mod name;
pub mod net;
pub mod proxy;
pub mod telemetry;
pub mod time;
pub mod tls;
