//! What the registrar tells of Services that have virtual IPs: puts the parts together that belong together, and asks for
//! what is new after a reconnect.

use std::collections::HashSet;

use muster_proto::registration::{VirtualServicesChanged, WatchVirtualServices};

/// See the module.
#[derive(Clone, Debug, Default)]
pub(super) struct VirtualServices {
    /// Up to where everything is known; `None` if nobody wants to know.
    known: Option<WatchVirtualServices>,
    /// The parts that have come so far.
    parts: Option<VirtualServicesChanged>,
}

impl VirtualServices {
    pub(super) fn new(known: Option<WatchVirtualServices>) -> Self {
        Self { known, parts: None }
    }

    /// What to ask for in a new session.
    pub(super) fn hello(&mut self) -> Option<WatchVirtualServices> {
        self.parts = None;
        self.known
    }

    /// What is known is not right: everything has to be asked for.
    pub(super) fn forget(&mut self) {
        self.parts = None;
        self.known = self.known.map(|_| WatchVirtualServices::default());
    }

    /// Takes one part; returns all of them once they are there.
    pub(super) fn take(&mut self, part: VirtualServicesChanged) -> Option<VirtualServicesChanged> {
        self.known?;
        let whole = match self.parts.take() {
            Some(parts) if !part.is_snapshot => join(parts, part),
            _ => part,
        };
        if whole.revision == 0 {
            self.parts = Some(whole);
            return None;
        }
        self.known = Some(WatchVirtualServices { revision: whole.revision, digest: whole.digest });
        Some(whole)
    }
}

/// One message that says what `first` and then `second` say.
fn join(mut first: VirtualServicesChanged, mut second: VirtualServicesChanged) -> VirtualServicesChanged {
    let name = |namespace: &str, name: &str| format!("{namespace}/{name}");
    if !second.removed_services.is_empty() {
        let removed: HashSet<&String> = second.removed_services.iter().collect();
        first.services.retain(|service| !removed.contains(&name(&service.namespace, &service.name)));
    }
    if !second.removed_endpoints.is_empty() {
        let removed: HashSet<&String> = second.removed_endpoints.iter().collect();
        first.endpoints.retain(|slice| !removed.contains(&name(&slice.namespace, &slice.name)));
    }
    // What was removed and is there again counts as there: removals come first, and the last word on an object counts.
    first.services.append(&mut second.services);
    first.endpoints.append(&mut second.endpoints);
    first.removed_services.append(&mut second.removed_services);
    first.removed_endpoints.append(&mut second.removed_endpoints);
    (first.revision, first.digest) = (second.revision, second.digest);
    first
}

#[cfg(test)]
mod tests {
    use muster_proto::registration::{VirtualEndpoints, VirtualService};

    use super::*;

    fn service(name: &str, seconds: u32) -> VirtualService {
        VirtualService {
            namespace: "n".into(),
            name: name.into(),
            affinity_seconds: seconds,
            ..VirtualService::default()
        }
    }

    fn part(services: Vec<VirtualService>, removed: &[&str], revision: u64) -> VirtualServicesChanged {
        VirtualServicesChanged {
            services,
            removed_services: removed.iter().map(|name| (*name).to_owned()).collect(),
            revision,
            digest: revision * 10,
            ..VirtualServicesChanged::default()
        }
    }

    #[test]
    fn parts_become_one_and_the_last_word_counts() {
        let mut services = VirtualServices::new(Some(WatchVirtualServices::default()));
        let first = VirtualServicesChanged {
            is_snapshot: true,
            ..part(vec![service("a", 1), service("b", 1)], &[], 0)
        };
        assert_eq!(services.take(first), None);
        assert_eq!(services.take(part(vec![service("b", 2)], &["n/a"], 0)), None);
        let slice =
            VirtualEndpoints { namespace: "n".into(), name: "x".into(), ..VirtualEndpoints::default() };
        let last = VirtualServicesChanged { endpoints: vec![slice], ..part(vec![service("a", 3)], &[], 7) };
        let whole = services.take(last).unwrap();
        assert!(whole.is_snapshot);
        // What is later in the list counts, and comes after all removals.
        let seconds: Vec<(&str, u32)> =
            whole.services.iter().map(|service| (&*service.name, service.affinity_seconds)).collect();
        assert_eq!(seconds, [("b", 1), ("b", 2), ("a", 3)]);
        assert_eq!((whole.endpoints.len(), whole.revision, whole.digest), (1, 7, 70));
        assert_eq!(services.hello(), Some(WatchVirtualServices { revision: 7, digest: 70 }));
    }

    #[test]
    fn parts_of_a_session_that_ends_are_forgotten() {
        let mut services = VirtualServices::new(Some(WatchVirtualServices { revision: 5, digest: 50 }));
        assert_eq!(services.take(part(vec![service("a", 1)], &[], 0)), None);
        assert_eq!(services.hello(), Some(WatchVirtualServices { revision: 5, digest: 50 }));
        let whole = services.take(part(vec![service("b", 1)], &[], 6)).unwrap();
        assert_eq!(whole.services, [service("b", 1)]);
        // A snapshot begins anew, too.
        assert_eq!(services.take(part(vec![service("a", 1)], &[], 0)), None);
        let snapshot = VirtualServicesChanged { is_snapshot: true, ..part(vec![], &[], 8) };
        assert!(services.take(snapshot).unwrap().services.is_empty());
        services.forget();
        assert_eq!(services.hello(), Some(WatchVirtualServices::default()));
    }

    #[test]
    fn who_does_without_asks_for_nothing() {
        let mut services = VirtualServices::new(None);
        assert_eq!((services.hello(), services.take(part(vec![], &[], 3))), (None, None));
        services.forget();
        assert_eq!(services.hello(), None);
    }
}
