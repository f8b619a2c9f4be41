//! The registry: what there is, who has which name and address, and what changes.
//!
//! [`index`] and [`plan`] are the core: deterministic, without I/O, clock or lock. [`shell`] keeps an index in step
//! with a store and commits plans to it.

pub mod carried;
pub mod change;
pub mod device;
pub mod devices;
mod differences;
pub mod director;
pub mod field;
pub mod freshness;
pub mod history;
pub mod index;
pub mod keys;
pub mod metrics;
pub mod named;
pub mod namespace;
pub mod network;
pub mod plan;
pub mod presence;
pub mod readiness;
pub mod registrar;
pub mod selected;
mod selection;
pub mod service;
pub mod services;
pub mod shell;
pub mod site;
pub mod slice;
pub mod state;
mod tasks;
pub mod token;
pub mod view;
pub mod virtual_services;

pub use device::Device;
pub use director::Director;
pub use index::{Applied, Change, Index};
pub use namespace::Namespace;
pub use network::Network;
pub use registrar::Registrar;
pub use service::Service;
pub use shell::{CommitError, Registry};
pub use slice::Slice;
pub use token::Token;

#[cfg(test)]
pub(crate) mod tests;
