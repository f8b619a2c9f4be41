//! The DNS engine that registrar and agent both serve with: [`engine`] turns a query into an answer from a
//! [`directory`], without I/O; [`server`] carries queries to a [`server::Handler`] over UDP, TCP and TLS.
#![forbid(unsafe_code)]

pub mod directory;
pub mod engine;
pub mod fixed;
pub mod message;
mod records;
pub mod reverse;
pub mod server;
