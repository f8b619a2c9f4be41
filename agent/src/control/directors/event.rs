//! What becomes of attachments to directors.

use std::time::Duration;

use muster_tunnel::DirectorId;

use crate::{control::Failure, directors::flow::Attachment};

/// What becomes of attachments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DirectorEvent {
    /// The director has taken this device.
    Attached {
        /// Which director.
        id: DirectorId,
        /// Of [`Action::Attach`].
        attempt: u64,
        /// What it has given.
        attachment: Attachment,
        /// From the call to its answer, over TCP.
        round_trip: Duration,
    },
    /// The director is shutting down.
    Draining {
        /// Which director.
        id: DirectorId,
        /// Of [`Action::Attach`].
        attempt: u64,
    },
    /// There is no attachment, or no longer one.
    Closed {
        /// Which director.
        id: DirectorId,
        /// Of [`Action::Attach`].
        attempt: u64,
        /// Why.
        failure: Failure,
    },
    /// Frames cannot go over TCP, or no longer.
    StreamClosed {
        /// Which director.
        id: DirectorId,
        /// Of the [`Action::Attach`] before.
        attempt: u64,
        /// Why.
        reason: String,
    },
}
