//! What etcd's refusals and silence mean: above all, whether a request may have been carried out nevertheless.

use std::error::Error;

use tonic::{Code, Status};

use crate::store::{Revision, StoreError};

/// What is asked of etcd, which decides what a failure means.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    /// Changes nothing, or can be made twice; about this revision, if any.
    Read(Option<Revision>),
    /// Must not be repeated unless it is certain that it was not done.
    Write,
}

/// Why a member did not do what it was asked.
#[derive(Debug)]
pub(super) enum Failure {
    /// It cannot be reached or is busy, and has certainly done nothing.
    Away(String),
    /// It is cut off from the others, or they choose a leader; it has certainly done nothing.
    Leaderless,
    /// It may have done it.
    Unknown(String),
    /// The user may not do that.
    Denied(String),
    /// No member would do it.
    Refused(StoreError),
}

/// What a failed call means.
pub(super) fn failure(kind: Kind, status: &Status) -> Failure {
    let message = status.message();
    let told = || muster_common::grpc::chain(status);
    match status.code() {
        Code::OutOfRange if message.contains("compacted") => {
            let Kind::Read(at) = kind else { return Failure::Refused(StoreError::Invalid(message.into())) };
            // etcd does not say what is kept.
            Failure::Refused(StoreError::Compacted { oldest: at.unwrap_or(0) + 1 })
        }
        Code::ResourceExhausted if message.contains("space exceeded") => {
            Failure::Refused(StoreError::Full { place: "etcd".into(), reason: message.into() })
        }
        Code::ResourceExhausted if message.contains("too many requests") => Failure::Away(message.into()),
        // A lease is renewed by the leader.
        Code::FailedPrecondition if message.contains("not leader") => unanswered(kind, told()),
        Code::OutOfRange
        | Code::InvalidArgument
        | Code::FailedPrecondition
        | Code::NotFound
        | Code::Unimplemented => Failure::Refused(StoreError::Invalid(format!("etcd refused it: {message}"))),
        Code::PermissionDenied | Code::Unauthenticated => Failure::Denied(message.into()),
        _ if message.contains("no leader") || message.contains("proposal dropped") => Failure::Leaderless,
        Code::Unavailable if never_sent(status) || message.contains("not supported for learner") => {
            Failure::Away(told())
        }
        _ => unanswered(kind, told()),
    }
}

/// What it means that there is no answer.
fn unanswered(kind: Kind, reason: String) -> Failure {
    match kind {
        Kind::Read(_) => Failure::Away(reason),
        Kind::Write => Failure::Unknown(reason),
    }
}

/// Whether etcd wants to know, anew, who is asking: it has no tokens of before a restart, for one. It says so before
/// it does anything.
pub(super) fn wants_authentication(status: &Status) -> bool {
    let message = status.message();
    status.code() == Code::Unauthenticated
        || message.contains("user name is empty")
        || message.contains("revision in header is old")
        || message.contains("revision of auth store is old")
}

/// Whether there was no connection to send the request on.
fn never_sent(status: &Status) -> bool {
    let mut source = status.source();
    while let Some(error) = source {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        source = error.source();
    }
    false
}
