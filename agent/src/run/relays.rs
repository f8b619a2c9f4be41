//! What comes from directors, and what the agent says of them.

use std::sync::Arc;

use muster_common::time::Instant;

use super::Agent;
use crate::control::DirectorEvent;

impl Agent {
    pub(super) fn handle_director(&mut self, event: DirectorEvent) {
        match &event {
            DirectorEvent::Attached { id, .. } => tracing::debug!(director = self.director(*id), "attached"),
            DirectorEvent::Draining { id, .. } => {
                tracing::info!(director = self.director(*id), "the director is shutting down");
            }
            DirectorEvent::Closed { id, failure, .. } => {
                tracing::info!(director = self.director(*id), ?failure, "not attached to the director");
            }
            DirectorEvent::StreamClosed { id, reason, .. } => {
                tracing::info!(director = self.director(*id), reason, "no stream to the director");
            }
        }
        self.control.handle_director(event, Instant::now());
    }

    /// Lets the local API know what they are called.
    pub(super) fn name_directors(&self) {
        let views = self.control.directors();
        let names = views.iter().map(|view| (view.id, view.target.name.clone()));
        self.shared.directors.store(Arc::new(names.collect()));
    }

    fn director(&self, id: muster_tunnel::DirectorId) -> &str {
        let views = self.control.directors();
        views.iter().find(|view| view.id == id).map_or("", |view| view.target.name.as_str())
    }
}
