//! What probes have found of the endpoints that this host has, until the registrar has heard of it.

use muster_proto::registration::{EndpointHealth, EndpointReadiness};

/// See the module.
#[derive(Clone, Debug, Default)]
pub(super) struct Health {
    found: Vec<EndpointReadiness>,
    is_told: bool,
}

impl Health {
    /// Probes have found this; all of it.
    pub(super) fn found(&mut self, found: Vec<EndpointReadiness>) {
        if found != self.found {
            self.found = found;
            self.is_told = false;
        }
    }

    /// There is a new session, at a registrar that may know nothing yet.
    pub(super) fn session_opened(&mut self) {
        self.is_told = false;
    }

    /// What to tell the registrar.
    pub(super) fn report(&mut self) -> Option<EndpointHealth> {
        let is_new = !std::mem::replace(&mut self.is_told, true);
        (is_new && !self.found.is_empty()).then(|| EndpointHealth { endpoints: self.found.clone() })
    }
}
