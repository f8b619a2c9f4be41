//! Each refusal has one gRPC status. Clients act on the code, and people read the message.

use tonic::{Code, Status};

use crate::{
    allocation::AllocationError,
    ca::CaError,
    csr::CsrError,
    invitation::InvitationError,
    registry::{
        CommitError,
        field::FieldError,
        history::TooOld,
        plan::{AdminError, director::DirectorError, enroll::EnrollError, register::DeviceError},
    },
    store::StoreError,
    token::TokenSyntaxError,
};

/// An error with its status code.
pub(crate) trait Refusal: std::fmt::Display {
    fn code(&self) -> Code;

    fn status(&self) -> Status {
        Status::new(self.code(), self.to_string())
    }
}

impl Refusal for FieldError {
    fn code(&self) -> Code {
        Code::InvalidArgument
    }
}

impl Refusal for AllocationError {
    fn code(&self) -> Code {
        match self {
            Self::Exhausted { .. } => Code::ResourceExhausted,
            Self::Outside { .. } | Self::NotAssignable { .. } => Code::InvalidArgument,
            Self::InUse { .. } => Code::AlreadyExists,
            Self::Quarantined { .. } => Code::FailedPrecondition,
        }
    }
}

impl Refusal for AdminError {
    fn code(&self) -> Code {
        match self {
            Self::Field(_) => Code::InvalidArgument,
            Self::NotFound { .. } | Self::NoNamespace(_) => Code::NotFound,
            Self::Exists { .. } => Code::AlreadyExists,
            Self::Changed { .. } => Code::Aborted,
            Self::NotEmpty { .. }
            | Self::Terminating(_)
            | Self::Runs(_)
            | Self::NamespaceInUse { .. }
            | Self::DefaultNamespace
            | Self::Selected { .. } => Code::FailedPrecondition,
            Self::Locked(_) => Code::Unavailable,
            Self::Address { error, .. } => error.code(),
        }
    }
}

impl Refusal for DeviceError {
    fn code(&self) -> Code {
        match self {
            Self::Gone | Self::Revoked => Code::PermissionDenied,
            Self::KeyTaken => Code::AlreadyExists,
            Self::Superseded => Code::Aborted,
            Self::Allocation(error) => error.code(),
        }
    }
}

impl Refusal for DirectorError {
    fn code(&self) -> Code {
        match self {
            Self::Gone | Self::Revoked => Code::PermissionDenied,
            Self::Field(_) => Code::InvalidArgument,
        }
    }
}

impl Refusal for EnrollError {
    fn code(&self) -> Code {
        match self {
            Self::Token(_) => Code::Unauthenticated,
            Self::Name(_) => Code::InvalidArgument,
            Self::NameTaken { .. } | Self::Namespace { .. } => Code::AlreadyExists,
            Self::Revoked { .. } => Code::PermissionDenied,
            Self::Locked(_) => Code::Unavailable,
        }
    }
}

impl Refusal for InvitationError {
    fn code(&self) -> Code {
        Code::Unauthenticated
    }
}

impl Refusal for TokenSyntaxError {
    fn code(&self) -> Code {
        Code::InvalidArgument
    }
}

impl Refusal for CsrError {
    fn code(&self) -> Code {
        Code::InvalidArgument
    }
}

impl Refusal for CaError {
    fn code(&self) -> Code {
        Code::FailedPrecondition
    }
}

impl Refusal for TooOld {
    fn code(&self) -> Code {
        Code::OutOfRange
    }
}

impl Refusal for StoreError {
    fn code(&self) -> Code {
        match self {
            Self::Unavailable(_)
            | Self::Unknown(_)
            | Self::Closed
            | Self::ReadOnly { .. }
            | Self::Disk { .. } => Code::Unavailable,
            Self::Full { .. } => Code::ResourceExhausted,
            _ => Code::Internal,
        }
    }

    fn status(&self) -> Status {
        tracing::error!(error = %self, "the store failed");
        // Paths and the like are for the log alone.
        match self.code() {
            Code::Internal => Status::internal("the registrar's store failed; see the registrar's log"),
            code => Status::new(code, self.to_string()),
        }
    }
}

impl<E: Refusal> Refusal for CommitError<E> {
    fn code(&self) -> Code {
        match self {
            Self::Refused(error) => error.code(),
            Self::Store(error) => error.code(),
            Self::Contended => Code::Aborted,
            Self::Behind => Code::Unavailable,
        }
    }

    fn status(&self) -> Status {
        match self {
            Self::Store(error) => error.status(),
            other => Status::new(other.code(), other.to_string()),
        }
    }
}

/// For `map_err`.
pub(super) fn status(error: impl Refusal) -> Status {
    error.status()
}
