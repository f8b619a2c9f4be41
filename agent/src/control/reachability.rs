//! How this device is reached from outside, as the registrar is told: at once where peers need it, and seldom where
//! only a NAT is restless.

use std::{net::SocketAddr, time::Duration};

use muster_common::time::Instant;
use muster_proto::registration::Reachability;

use super::{Control, peer::endpoint};

/// Reflexive endpoints that are told at most.
const MAX_REFLEXIVE: usize = 4;
/// Between changes of reflexive endpoints alone: each one is a write to the registrar's store.
const REFLEXIVE_INTERVAL: Duration = Duration::from_secs(30);

/// What the registrar has been told.
#[derive(Debug, Default)]
pub(super) struct Told {
    message: Reachability,
    mapped: Option<SocketAddr>,
    reflexive_at: Option<Instant>,
}

impl Told {
    /// The host is on another network: how that looks from outside is told as soon as it is known.
    pub(super) fn host_moved(&mut self) {
        self.reflexive_at = None;
    }
}

impl Control {
    /// The gateway maps this address to the tunnel, or none any more.
    pub fn handle_mapped(&mut self, mapped: Option<SocketAddr>, now: Instant) {
        self.mapped = mapped;
        self.settle(now);
    }

    /// This device as directors see it from outside, and what its gateway maps to it.
    pub fn reflexive_endpoints(&self) -> Vec<SocketAddr> {
        let seen = self.directors.reflexive().into_iter().filter(|seen| Some(*seen) != self.mapped);
        self.mapped.into_iter().chain(seen).take(MAX_REFLEXIVE).collect()
    }

    fn reachability(&self) -> Reachability {
        let (home, second) = self.directors.chosen();
        // Until there is a home, all of it is about to change.
        let reflexive_endpoints = match home {
            Some(_) => self.reflexive_endpoints().iter().map(endpoint).collect(),
            None => self.mapped.iter().map(endpoint).collect(),
        };
        let text = |uid: Option<&str>| uid.unwrap_or_default().to_owned();
        Reachability { reflexive_endpoints, home_director_uid: text(home), second_director_uid: text(second) }
    }

    /// When the registrar is to be told; `None` if it knows.
    pub(super) fn reachability_due(&self) -> Option<Instant> {
        let (now, told) = (self.reachability(), &self.told.message);
        let is_urgent = (&now.home_director_uid, &now.second_director_uid)
            != (&told.home_director_uid, &told.second_director_uid)
            // A gateway grants for hours, and what it maps is the best way in.
            || self.mapped != self.told.mapped;
        match self.told.reflexive_at {
            _ if is_urgent => Some(self.endpoints_at),
            _ if now == *told => None,
            Some(at) => Some(self.endpoints_at.max(at + REFLEXIVE_INTERVAL)),
            None => Some(self.endpoints_at),
        }
    }

    /// What the registrar is told now.
    pub(super) fn tell_reachability(&mut self, now: Instant) -> Reachability {
        let message = self.reachability();
        let is_other = message.reflexive_endpoints != self.told.message.reflexive_endpoints;
        if is_other && !message.reflexive_endpoints.is_empty() {
            self.told.reflexive_at = Some(now);
        }
        (self.told.message, self.told.mapped) = (message.clone(), self.mapped);
        message
    }
}
