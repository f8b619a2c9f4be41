//! The registrar of a Muster network: CA, registry, address allocation, policy, DNS and API. The pure parts
//! (`registry::{index, plan}`, `allocation`, `token`, `invitation`, `seal`, `csr`, `policy`) know no I/O; the others are
//! shells around them.
#![forbid(unsafe_code)]

pub mod allocation;
pub mod api;
pub mod balance;
pub mod ca;
pub mod carriers;
pub mod config;
pub mod csr;
pub mod init;
pub mod invitation;
pub mod invite;
pub mod join;
pub mod layout;
pub mod leave;
pub mod own_certificate;
pub mod policy;
pub mod presence;
pub mod registry;
pub mod seal;
pub mod serve;
pub mod session;
pub mod store;
pub mod token;
pub mod transfer;
pub mod zone;
