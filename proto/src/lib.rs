//! Muster's gRPC API, generated from the `.proto` files beside this crate: one module per package. Messages
//! serialise to and from the proto3 JSON mapping.
#![forbid(unsafe_code)]

macro_rules! package {
    ($(#[$doc:meta])* $area:ident, $package:literal) => {
        $(#[$doc])*
        pub mod $area {
            $(#[$doc])*
            #[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, clippy::unwrap_used)]
            pub mod v1 {
                tonic::include_proto!($package);
                include!(concat!(env!("OUT_DIR"), "/", $package, ".serde.rs"));
            }
        }
    };
}

mod codec;

/// Every package of the API, as the paths in the `.proto` files expect it.
pub mod muster {
    package!(/** What operators administer. */ admin, "muster.admin.v1");
    package!(/** The agent's local API. */ agent, "muster.agent.v1");
    package!(/** What directors ask of the registrar, and agents of directors. */ director, "muster.director.v1");
    package!(/** Join. */ enrollment, "muster.enrollment.v1");
    package!(/** What agents ask of the registrar. */ registration, "muster.registration.v1");
    package!(/** What the registrar stores. */ storage, "muster.storage.v1");
}

pub use muster::{admin::v1 as admin, agent::v1 as agent, director::v1 as director};
pub use muster::{enrollment::v1 as enrollment, registration::v1 as registration, storage::v1 as storage};

/// The encoded file descriptor set of all packages, for server reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
