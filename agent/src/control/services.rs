//! The Services whose names the resolver holds, as the registrar is told of them, and what it says has changed.
//! A Service stays with the registrar for a while after its names are forgotten: a registrar says of each one that is
//! new to it that it may have changed, so that names would otherwise be forgotten each time they are learnt.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use muster_common::{name::Label, time::Instant};
use muster_proto::registration::{HeldServices, ServiceChanged};

use super::MAX_SERVICES;
use crate::resolver::HeldService;

/// Between two messages about held Services; what changes meanwhile is told in one.
const INTERVAL: Duration = Duration::from_millis(100);
/// How long a Service is held after its names have been forgotten.
const LINGER: Duration = Duration::from_secs(300);
/// Services that change within this time of another are forgotten together.
const GATHER: Duration = Duration::from_millis(10);

#[derive(Debug, Default)]
pub(super) struct Services {
    /// Those that the resolver has names of.
    wanted: BTreeSet<HeldService>,
    /// Those that the registrar has been told of; with the time until which it is, if the resolver has none any more.
    told: BTreeMap<HeldService, Option<Instant>>,
    lingering: BTreeSet<(Instant, HeldService)>,
    /// Whether any of `wanted` is not in `told`.
    untold: bool,
    report_at: Instant,
    changed: BTreeSet<HeldService>,
    forget_at: Instant,
}

impl Services {
    /// The resolver has names of these Services now. Registrars know no others than those with valid names; one of
    /// another kind would cost the session.
    pub(super) fn hold(&mut self, services: Vec<HeldService>, now: Instant) {
        self.wanted = services.into_iter().filter(is_valid).take(MAX_SERVICES).collect();
        for (service, until) in &mut self.told {
            match (self.wanted.contains(service), *until) {
                (true, Some(at)) => {
                    self.lingering.remove(&(at, service.clone()));
                    *until = None;
                }
                (false, None) => {
                    *until = Some(now + LINGER);
                    self.lingering.insert((now + LINGER, service.clone()));
                }
                _ => {}
            }
        }
        self.untold = self.wanted.iter().any(|service| !self.told.contains_key(service));
    }

    /// All, for the first message of a session; after it there is nothing more to tell.
    pub(super) fn hello(&mut self, now: Instant) -> Vec<String> {
        self.report_at = now;
        let _ = self.report(now);
        self.told.keys().map(text).collect()
    }

    /// What the registrar has yet to be told.
    pub(super) fn report(&mut self, now: Instant) -> Option<HeldServices> {
        if self.report_due().is_none_or(|at| at > now) {
            return None;
        }
        let added: Vec<HeldService> =
            self.wanted.iter().filter(|service| !self.told.contains_key(*service)).cloned().collect();
        let mut removed = Vec::new();
        while let Some((until, service)) = self.lingering.pop_first() {
            // Those that are in use do not have to wait for room.
            if until > now && self.told.len() + added.len() <= MAX_SERVICES {
                self.lingering.insert((until, service));
                break;
            }
            self.told.remove(&service);
            removed.push(text(&service));
        }
        let report = HeldServices { added: added.iter().map(text).collect(), removed };
        self.told.extend(added.into_iter().map(|service| (service, None)));
        self.untold = false;
        self.report_at = now + INTERVAL;
        Some(report)
    }

    fn report_due(&self) -> Option<Instant> {
        let over = self.lingering.first().map(|(until, _)| *until);
        let due = if self.untold { Some(self.report_at) } else { over };
        due.map(|at| at.max(self.report_at))
    }

    /// The registrar says that a Service is answered for differently.
    pub(super) fn changed(&mut self, changed: ServiceChanged) {
        let service = HeldService { namespace: changed.namespace, name: changed.name };
        // Of one that it has not been told of it will say so again.
        if self.told.contains_key(&service) {
            self.changed.insert(service);
        }
    }

    /// The Services whose names are to be forgotten now.
    pub(super) fn forget(&mut self, now: Instant) -> Option<Vec<HeldService>> {
        if self.changed.is_empty() || self.forget_at > now {
            return None;
        }
        self.forget_at = now + GATHER;
        Some(std::mem::take(&mut self.changed).into_iter().collect())
    }

    /// When something is to be done; reports wait for a session.
    pub(super) fn timeout(&self, connected: bool) -> Option<Instant> {
        let forget = (!self.changed.is_empty()).then_some(self.forget_at);
        let report = self.report_due().filter(|_| connected);
        forget.into_iter().chain(report).min()
    }

    #[cfg(test)]
    pub(super) fn check(&self) {
        assert!(self.wanted.len() <= MAX_SERVICES && self.told.len() <= MAX_SERVICES);
        let lingering: BTreeSet<_> =
            self.told.iter().filter_map(|(service, until)| Some(((*until)?, service.clone()))).collect();
        assert_eq!(self.lingering, lingering);
        assert!(self.told.iter().all(|(service, until)| self.wanted.contains(service) == until.is_none()));
        assert_eq!(self.untold, self.wanted.iter().any(|service| !self.told.contains_key(service)));
        assert!(self.changed.len() <= 2 * MAX_SERVICES);
    }
}

/// As the registrar wants it.
fn text(service: &HeldService) -> String {
    format!("{}/{}", service.namespace, service.name)
}

fn is_valid(service: &HeldService) -> bool {
    let label = |text: &str| text.parse::<Label>().is_ok_and(|label| label.as_str() == text);
    label(&service.namespace) && label(&service.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(milliseconds: u64) -> Instant {
        Instant::from_boot(Duration::from_millis(1_000_000 + milliseconds))
    }

    fn service(name: &str) -> HeldService {
        HeldService { namespace: "shop".into(), name: name.into() }
    }

    fn services(names: &[&str]) -> Vec<HeldService> {
        names.iter().map(|name| service(name)).collect()
    }

    fn change(name: &str) -> ServiceChanged {
        ServiceChanged { namespace: "shop".into(), name: name.into() }
    }

    fn report(held: &mut Services, now: Instant) -> Option<(Vec<String>, Vec<String>)> {
        let report = held.report(now).map(|report| (report.added, report.removed));
        held.check();
        report
    }

    #[test]
    fn changes_are_told_together_and_not_too_often() {
        let mut held = Services::default();
        held.hold(services(&["b", "a"]), at(0));
        assert_eq!(held.timeout(false), None);
        assert_eq!(report(&mut held, at(0)), Some((vec!["shop/a".into(), "shop/b".into()], vec![])));
        assert_eq!(report(&mut held, at(0)), None);
        held.hold(services(&["a", "b", "c"]), at(10));
        held.hold(services(&["a", "b", "c", "d"]), at(20));
        assert_eq!((report(&mut held, at(20)), held.timeout(true)), (None, Some(at(100))));
        assert_eq!(report(&mut held, at(100)), Some((vec!["shop/c".into(), "shop/d".into()], vec![])));
        assert_eq!(held.hello(at(101)), ["shop/a", "shop/b", "shop/c", "shop/d"]);
        assert_eq!(held.timeout(true), None);
    }

    #[test]
    fn what_is_forgotten_and_soon_learnt_again_is_held_all_the_time() {
        let mut held = Services::default();
        held.hold(services(&["a"]), at(0));
        assert!(report(&mut held, at(0)).is_some());
        // As when it has changed: forgotten, and asked for again.
        held.hold(vec![], at(1_000));
        assert_eq!(report(&mut held, at(2_000)), None);
        held.changed(change("a"));
        assert_eq!(held.forget(at(2_000)), Some(services(&["a"])), "still of interest");
        held.hold(services(&["a"]), at(3_000));
        assert_eq!((report(&mut held, at(400_000)), held.timeout(true)), (None, None));
        held.hold(vec![], at(500_000));
        assert_eq!(held.timeout(true), Some(at(800_000)));
        assert_eq!(report(&mut held, at(800_000)), Some((vec![], vec!["shop/a".into()])));
        held.changed(change("a"));
        assert_eq!(held.forget(at(900_000)), None);
    }

    #[test]
    fn the_registrar_is_told_of_no_more_than_it_takes() {
        let many = |range: std::ops::Range<usize>| range.map(|n| service(&format!("s{n}"))).collect();
        let mut held = Services::default();
        held.hold(many(0..MAX_SERVICES + 10), at(0));
        assert_eq!(report(&mut held, at(0)).unwrap().0.len(), MAX_SERVICES);
        // Others take the place of those that were forgotten first.
        held.hold(many(1..MAX_SERVICES), at(1_000));
        held.hold(many(2..MAX_SERVICES), at(2_000));
        held.hold(many(2..MAX_SERVICES + 1), at(3_000));
        let (added, removed) = report(&mut held, at(3_000)).unwrap();
        assert_eq!((added, removed), (vec![format!("shop/s{MAX_SERVICES}")], vec!["shop/s0".into()]));
        assert_eq!(held.hello(at(3_000)).len(), MAX_SERVICES);
        held.hold(many(MAX_SERVICES + 1..3 * MAX_SERVICES), at(4_000));
        let (added, removed) = report(&mut held, at(4_000)).unwrap();
        assert_eq!((added.len(), removed.len()), (MAX_SERVICES, MAX_SERVICES));
    }

    #[test]
    fn what_is_no_service_is_never_told() {
        let mut held = Services::default();
        held.hold(services(&["_http", "a_b", "", "-", "a/b", "A"]), at(0));
        held.hold(vec![HeldService { namespace: "x y".into(), name: "a".into() }], at(0));
        assert_eq!((report(&mut held, at(0)), held.hello(at(0))), (None, vec![]));
    }

    #[test]
    fn a_flood_of_changes_is_forgotten_at_once() {
        let mut held = Services::default();
        held.hold(services(&["a", "b", "c"]), at(0));
        held.hello(at(0));
        held.changed(change("a"));
        assert_eq!(held.forget(at(1)), Some(services(&["a"])));
        for name in ["c", "b", "c", "unknown"] {
            held.changed(change(name));
            assert_eq!(held.forget(at(2)), None);
        }
        // Although the session may be gone by then.
        assert_eq!(held.timeout(false), Some(at(11)));
        assert_eq!(held.forget(at(11)), Some(services(&["b", "c"])));
        assert_eq!(held.timeout(true), None);
    }
}
