//! The names that the resolver knows: when they resolve, when they are written to disk, when they are forgotten because
//! they have changed, and which of them a registrar is told of.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use muster_common::time::Instant;
use tokio::{
    sync::{oneshot, watch},
    time::sleep,
};

use super::Agent;
use crate::{
    resolver::{HeldService, Unsaved},
    writer::Write,
};

/// Names that have just been resolved are collected for so long before they are written.
const NAMES_DELAY: Duration = Duration::from_millis(500);
/// Names that are on disk already, and have only been asked for again, are written this late.
const NAMES_REFRESH_DELAY: Duration = Duration::from_secs(300);
/// Shortest and longest time between two looks at whether names resolve.
const NAMES_PROBE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// Changes of the Services that have cached names are collected for so long before the core hears of them.
const HELD_DELAY: Duration = Duration::from_millis(20);
/// Beyond so many Services, forgetting all of them is less work than looking for the names of each.
const FORGET_EACH_MAX: usize = 32;

impl Agent {
    /// The resolver has been started, with the names that were on disk. Changes of what this returns are to be followed
    /// by [`Self::plan_held`].
    pub(super) fn follow_held(&mut self) -> Option<watch::Receiver<u64>> {
        let changes = self.shared.resolver.load_full()?.held_changes();
        self.plan_held();
        Some(changes)
    }

    /// No subnet that another device carries may take away the resolvers that the host needs, the registrars among them.
    pub(super) fn look_at_resolvers(&mut self) {
        if let Some(resolver) = self.shared.resolver.load_full() {
            let stats = resolver.stats();
            let addresses = stats.upstream.iter().chain(&stats.registrars).map(SocketAddr::ip).collect();
            self.control.handle_resolvers(addresses, Instant::now());
        }
    }

    /// The Services that have cached names are others.
    pub(super) fn plan_held(&mut self) {
        self.held_at.get_or_insert(Instant::now() + HELD_DELAY);
    }

    pub(super) fn hold_services(&mut self) {
        self.held_at = None;
        if let Some(resolver) = self.shared.resolver.load_full() {
            self.control.handle_services_held(resolver.held_services(), Instant::now());
        }
    }

    /// These Services have changed.
    pub(super) fn forget_services(&mut self, services: &[HeldService]) {
        let Some(resolver) = self.shared.resolver.load_full() else { return };
        tracing::debug!(services = services.len(), "Services have changed");
        match self.control.settings() {
            Some(settings) if services.len() > FORGET_EACH_MAX => {
                resolver.invalidate(&format!("svc.{}", settings.domain));
            }
            _ => services.iter().for_each(|service| resolver.invalidate_service(service)),
        }
        self.names_at.get_or_insert(Instant::now() + NAMES_DELAY);
    }

    /// A device has changed.
    pub(super) fn forget_name(&mut self, name: &str) {
        if let Some(resolver) = self.shared.resolver.load_full() {
            resolver.invalidate(name);
            self.names_at.get_or_insert(Instant::now() + NAMES_DELAY);
        }
    }

    /// This device's own name resolves: so do all that a registrar knows.
    pub(super) fn names_do_resolve(&mut self) {
        self.names_resolve = true;
        self.names_at.get_or_insert(Instant::now() + NAMES_DELAY);
    }

    /// Finds out when this device's own name resolves: then all do.
    pub(super) fn probe_names(&mut self, name: &str) -> oneshot::Receiver<()> {
        let (done, resolves) = oneshot::channel();
        let (shared, name) = (Arc::clone(&self.shared), name.to_owned());
        self.tasks.spawn(async move {
            let mut pause = NAMES_PROBE.0;
            while let Some(resolver) = shared.resolver.load_full() {
                if resolver.resolve(&name).await.is_ok() {
                    let _ = done.send(());
                    return;
                }
                drop(resolver);
                sleep(pause).await;
                pause = (pause * 3 / 2).min(NAMES_PROBE.1);
            }
        });
        resolves
    }

    /// Sees to it that names which have been learnt are written.
    pub(super) fn plan_names(&mut self) {
        let Some(resolver) = self.shared.resolver.load_full() else { return };
        let delay = match resolver.unsaved() {
            Unsaved::Nothing => return,
            Unsaved::Refreshed => NAMES_REFRESH_DELAY,
            Unsaved::New => NAMES_DELAY,
        };
        let at = Instant::now() + delay;
        self.names_at = Some(self.names_at.map_or(at, |planned| planned.min(at)));
    }

    pub(super) fn save_names(&mut self) {
        self.names_at = None;
        if let Some(resolver) = self.shared.resolver.load_full() {
            self.writer.write(Write::Names(resolver.snapshot()));
        }
    }
}
