//! How a party joins a network, and what it keeps of that on disk: the same for devices and for directors but for what
//! [`Party`] tells apart.
#![forbid(unsafe_code)]

mod identity;
mod join;
mod keys;
mod store;

pub use identity::{Certified, Identity, Journal, pem};
pub use join::{Join, JoinError, join};
pub use keys::{KeyError, certificate_request, new_tls_key};
pub use muster_common::file::Lock;
pub use store::{StateError, Store};

use muster_common::{
    file::Format,
    identity::Party as Certificate,
    name::{Label, NameError},
};
use muster_proto::enrollment::EnrollResponse;

/// A kind of party, with what is its own.
pub trait Party: 'static {
    /// What it is called.
    const WORDS: &'static Words;
    /// How its files begin.
    const FORMAT: Format;
    /// How its files go on.
    const ENCODING: Encoding;
    /// Who a party of this kind is.
    type Identity: Identity;

    /// The name, if it is one for this kind.
    ///
    /// # Errors
    /// It is not.
    fn check_name(name: Label) -> Result<Label, NameError>;

    /// Keys beside the one for TLS, as the journal keeps them; empty if there are none.
    ///
    /// # Errors
    /// The system has no random numbers.
    fn new_further_keys() -> Result<String, KeyError>;

    /// Who the party is after the registrar's answer. It need not be checked.
    fn identity(registrar: &str, journal: &Journal, answer: EnrollResponse) -> Self::Identity;

    /// Network and uid, if a certificate for `party` is one for this kind.
    fn of_certificate(party: &Certificate) -> Option<(&str, &str)>;

    /// What to do on a host where one called `name` has joined already, with its identity in `path`.
    fn joined_already(name: &str, path: &std::path::Path) -> String;
}

/// What a kind of party is called, in messages and towards the registrar.
#[derive(Debug)]
pub struct Words {
    /// The kind: `device`, `director`.
    pub kind: &'static str,
    /// The other kind.
    pub other: &'static str,
    /// The program, without `muster-`.
    pub program: &'static str,
    /// Who has joined on a host: `this host`, `this host's director`.
    pub who: &'static str,
    /// The command that makes a token for it.
    pub create_token: &'static str,
}

/// How documents are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// JSON.
    Json,
    /// TOML.
    Toml,
}

#[cfg(test)]
mod tests;
