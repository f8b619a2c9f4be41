//! The Services whose names are cached, which the registrar is told so that it says when one changes.

use std::collections::BTreeMap;

use muster_dns::wire::{encode_name, split_label};
use tokio::sync::watch;

use super::key::is_below;

/// Services that are held at most. Names of others are cached like any name, and expire by their TTL.
pub(super) const HELD_MAX: usize = 4096;

/// A Service.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct HeldService {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// The Services whose names are cached, each with the number of answers.
#[derive(Debug)]
pub(super) struct Held {
    /// `svc.<domain>` on the wire.
    zone: Box<[u8]>,
    services: BTreeMap<HeldService, u32>,
    changes: watch::Sender<u64>,
}

impl Held {
    /// For the Services of the network `domain`; of none, if that is empty.
    pub(super) fn new(domain: &str) -> Self {
        let zone = if domain.is_empty() { None } else { encode_name(&format!("svc.{domain}")) };
        Self {
            zone: zone.unwrap_or_default().into(),
            services: BTreeMap::new(),
            changes: watch::Sender::new(0),
        }
    }

    /// An answer at `name` (on the wire) has been cached. Tells whether it counts.
    pub(super) fn add(&mut self, name: &[u8]) -> bool {
        let Some(service) = self.service(name) else { return false };
        let full = self.services.len() >= HELD_MAX;
        match self.services.get_mut(&service) {
            Some(count) => *count += 1,
            None if full => return false,
            None => {
                self.services.insert(service, 1);
                self.changes.send_modify(|number| *number += 1);
            }
        }
        true
    }

    /// An answer at `name` that counted is gone.
    pub(super) fn remove(&mut self, name: &[u8]) {
        let Some(service) = self.service(name) else { return };
        if let Some(count) = self.services.get_mut(&service) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.services.remove(&service);
                self.changes.send_modify(|number| *number += 1);
            }
        }
    }

    pub(super) fn services(&self) -> Vec<HeldService> {
        self.services.keys().cloned().collect()
    }

    /// Changes whenever [`Self::services`] does.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// The Service whose name, or a name below, `name` is.
    fn service(&self, name: &[u8]) -> Option<HeldService> {
        if self.zone.is_empty() || !is_below(name, &self.zone) {
            return None;
        }
        let (mut rest, mut last) = (name, [None, None]);
        while rest.len() > self.zone.len() {
            let (label, below) = split_label(rest)?;
            last = [last[1], Some(label)];
            rest = below;
        }
        let text = |label: &[u8]| {
            let label = std::str::from_utf8(label).ok().filter(|label| !label.contains('.'))?;
            Some(label.to_owned())
        };
        let [Some(service), Some(namespace)] = last else { return None };
        Some(HeldService { namespace: text(namespace)?, name: text(service)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire(name: &str) -> Vec<u8> {
        encode_name(name).unwrap()
    }

    #[test]
    fn services_are_held_while_a_name_of_theirs_is() {
        let mut held = Held::new("net.example");
        let mut changes = held.changes();
        for name in ["my-cs.shop.svc.net.example", "_http._tcp.my-cs.shop.svc.net.example"] {
            assert!(held.add(&wire(name)));
        }
        for name in ["shop.svc.net.example", "svc.net.example", "web.net.example", "a.b.svc.other.example"] {
            assert!(!held.add(&wire(name)), "{name}");
        }
        let service = HeldService { namespace: "shop".into(), name: "my-cs".into() };
        assert_eq!(held.services(), [service]);
        assert_eq!(*changes.borrow_and_update(), 1);
        held.remove(&wire("my-cs.shop.svc.net.example"));
        assert!(!changes.has_changed().unwrap());
        held.remove(&wire("_http._tcp.my-cs.shop.svc.net.example"));
        assert!(changes.has_changed().unwrap() && held.services().is_empty());
    }

    #[test]
    fn they_are_bounded() {
        let mut held = Held::new("net.example");
        for i in 0..HELD_MAX {
            assert!(held.add(&wire(&format!("s{i}.default.svc.net.example"))));
        }
        assert!(!held.add(&wire("one-more.default.svc.net.example")));
        assert!(held.add(&wire("x.s7.default.svc.net.example")));
        assert_eq!(held.services().len(), HELD_MAX);
    }
}
