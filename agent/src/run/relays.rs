//! What comes from directors, and what the agent says of them.

use std::{collections::BTreeSet, sync::Arc};

use muster_common::time::Instant;

use super::Agent;
use crate::{
    control::DirectorEvent,
    datapath::{Event, Path, PublicKey, Snapshot},
};

/// Which peers are reached through directors, to tell when that changes.
#[derive(Debug, Default)]
pub(super) struct Paths {
    relayed: BTreeSet<PublicKey>,
}

impl Paths {
    /// What the path of a peer has become, if it has become of another kind.
    pub(super) fn handle(&mut self, event: &Event) -> Option<Path> {
        let (public_key, is_relay, is_new) = match event {
            Event::PeerUp { public_key, endpoint } => (*public_key, endpoint.is_relay(), true),
            Event::EndpointChanged { public_key, endpoint } => (*public_key, endpoint.is_relay(), false),
            Event::PeerDown(key) | Event::PeerIdle(key) => {
                self.relayed.remove(key);
                return None;
            }
            _ => return None,
        };
        let is_changed = match is_relay {
            true => self.relayed.insert(public_key),
            false => self.relayed.remove(&public_key),
        };
        let path = if is_relay { Path::Relay } else { Path::Direct };
        (is_changed && !is_new).then_some(path)
    }

    /// Forgets peers that are not held any more.
    pub(super) fn prune(&mut self, snapshot: &Snapshot) {
        self.relayed.retain(|key| snapshot.peers.contains_key(key));
    }
}

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

#[cfg(test)]
mod tests {
    use muster_common::frame::Handle;
    use muster_tunnel::{DirectorId, Endpoint};

    use super::*;

    #[test]
    fn promotions_and_demotions_are_told_apart_from_other_changes() {
        let direct: Endpoint = std::net::SocketAddr::from(([192, 0, 2, 1], 7551)).into();
        let relay = |n| Endpoint::Relay { director: DirectorId(n), handle: Handle(7) };
        let up = |endpoint| Event::PeerUp { public_key: [1; 32], endpoint };
        let moved = |endpoint| Event::EndpointChanged { public_key: [1; 32], endpoint };
        let mut paths = Paths::default();
        let mut told = |event| paths.handle(&event);
        assert_eq!(told(up(relay(1))), None);
        assert_eq!(told(moved(relay(2))), None, "another director");
        assert_eq!(told(moved(direct)), Some(Path::Direct));
        assert_eq!(told(moved(direct)), None);
        assert_eq!(told(moved(relay(1))), Some(Path::Relay));
        assert_eq!(told(Event::PeerDown([1; 32])), None);
        assert_eq!(told(up(direct)), None, "another session");
        assert_eq!(told(up(relay(1))), None);
        paths.prune(&Snapshot::default());
        assert!(paths.relayed.is_empty());
    }
}
