//! One director, as far as this device has to do with it.

use std::{net::SocketAddr, time::Duration};

use muster_common::time::Instant;

use super::{DirectorTarget, RETRY, Way, distance::Distance};
use crate::control::backoff::Backoff;

#[derive(Debug)]
pub(super) struct Director {
    pub(super) target: DirectorTarget,
    pub(super) state: State,
    pub(super) attempt: u64,
    pub(super) backoff: Backoff,
    pub(super) way: Option<Way>,
    /// Where frames go, if over UDP.
    pub(super) udp: Option<SocketAddr>,
    pub(super) stream: Stream,
    pub(super) reflexive: Option<SocketAddr>,
    pub(super) distance: Distance,
    /// Measurements in a row by which it is so much nearer than the home that it should be it.
    pub(super) streak: u8,
    pub(super) is_draining: bool,
    pub(super) leave_at: Option<Instant>,
    pub(super) last_error: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Idle,
    Waiting { until: Instant },
    Attaching { deadline: Instant },
    Attached,
}

/// The TCP path of a director.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stream {
    Closed,
    Open,
    /// UDP is back.
    Closing {
        at: Instant,
    },
    Waiting {
        until: Instant,
    },
}

impl Director {
    pub(super) fn new(target: DirectorTarget) -> Self {
        Self {
            target,
            state: State::Idle,
            attempt: 0,
            backoff: Backoff::new(RETRY.0, RETRY.1),
            way: None,
            udp: None,
            stream: Stream::Closed,
            reflexive: None,
            distance: Distance::default(),
            streak: 0,
            is_draining: false,
            leave_at: None,
            last_error: String::new(),
        }
    }

    /// Frames reach it.
    pub(super) fn is_usable(&self) -> bool {
        self.way.is_some()
    }

    /// Devices are to leave it if they can.
    pub(super) fn is_leaving(&self) -> bool {
        self.is_draining || self.target.is_drained
    }

    /// How far away it counts as.
    pub(super) fn distance(&self) -> Duration {
        self.distance.by(self.way)
    }
}
