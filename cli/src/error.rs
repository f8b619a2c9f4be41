//! What can go wrong in a command, and the exit code that it ends with.

use std::{io, path::PathBuf};

use muster_common::{credential::CredentialError, grpc::ChannelError, time::Timestamp, tls::TlsError};

use crate::{client::CallError, manifest::ManifestError};

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command makes no sense.
    #[error("{0}")]
    Usage(String),
    /// The operator's credential cannot be used.
    #[error(transparent)]
    Credential(#[from] CredentialError),
    /// What is in the operator's credential cannot be used.
    #[error("cannot use the operator credential {}: {source}", path.display())]
    Tls {
        /// The credential file.
        path: PathBuf,
        /// What is wrong.
        source: TlsError,
    },
    /// The operator's certificate has expired.
    #[error(
        "the operator credential {} expired at {expiry}; make a new one on the registrar's host: muster-registrar credential --output {}",
        path.display(), path.display()
    )]
    Expired {
        /// The credential file.
        path: PathBuf,
        /// When it expired.
        expiry: Timestamp,
    },
    /// The registrar cannot be reached, or is not one that the credential is for.
    #[error("{0}; {remedy}", remedy = remedy(.0))]
    Connect(#[from] ChannelError),
    /// The registrar refused or did not answer.
    #[error(transparent)]
    Call(#[from] CallError),
    /// A manifest is wrong.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// A manifest is wrong, which was seen before any of them was acted upon.
    #[error("{0}; nothing has been changed")]
    Manifests(ManifestError),
    /// A label is in the way, or not a label.
    #[error("{0}")]
    Label(String),
    /// There is nothing to approve, or to take back.
    #[error("{0}")]
    Approval(String),
    /// A file could not be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Standard output cannot be written.
    #[error("cannot write to standard output: {0}")]
    Output(#[from] io::Error),
    /// An object cannot be printed in the format asked for.
    #[error("cannot print as {format}: {reason}")]
    Format {
        /// JSON or YAML.
        format: &'static str,
        /// What the serialiser said.
        reason: String,
    },
    /// Several objects failed; each has been told already.
    #[error("{0} of the objects failed")]
    Several(usize),
}

fn remedy(error: &ChannelError) -> &'static str {
    match error {
        ChannelError::Connect { reason, .. } if reason.contains("certificate") => {
            "the credential must be of the same deployment as the registrar (--credential, --registrar)"
        }
        ChannelError::Connect { .. } => {
            "check that the registrar runs (systemctl status muster-registrar) and that this host reaches it, or ask another with --registrar HOST:PORT"
        }
        ChannelError::Address(_) => "correct it in the credential file, or in --registrar",
    }
}

impl Error {
    /// 1 failed, 2 wrong usage.
    pub fn exit_code(&self) -> u8 {
        if matches!(self, Self::Usage(_)) { 2 } else { 1 }
    }
}

/// The result of a command.
pub type Result<T = (), E = Error> = std::result::Result<T, E>;
