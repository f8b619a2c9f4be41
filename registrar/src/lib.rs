//! placeholder

pub mod allocation;
pub mod ca;
pub mod config;
pub mod csr;
pub mod policy;
pub mod registry;
pub mod store;
pub mod token;
