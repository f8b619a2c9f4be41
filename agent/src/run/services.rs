//! How virtual IPs begin with the agent.

use std::sync::Arc;

use muster_common::telemetry;
use muster_proto::registration::{EndpointProbe, WatchVirtualServices};
use tokio::sync::watch;

use super::Agent;
use crate::{
    config::Config,
    state::State,
    virtual_ips::{Started, VirtualIps},
    writer::Writer,
};

type Services = (Option<VirtualIps>, Option<WatchVirtualServices>, Option<watch::Receiver<u64>>);

/// Starts what keeps virtual IPs, if this host is to have them and can. Without them everything else works.
pub(super) fn start(
    config: &Config,
    state: &State,
    writer: &Arc<Writer>,
    registries: &telemetry::Metrics,
) -> Services {
    let interface = &config.interface.name;
    if !config.services.virtual_ips {
        if let Err(error) = VirtualIps::sweep(interface) {
            tracing::debug!(%error, "no virtual IPs of an earlier start are removed");
        }
        return (None, None, None);
    }
    let stored = state.virtual_services();
    match VirtualIps::start(interface, stored.as_deref(), Arc::clone(writer), registries) {
        Ok(Started { virtual_ips, known, lost }) => (Some(virtual_ips), Some(known), Some(lost)),
        Err(error) => {
            tracing::error!(%error, "this host has no virtual IPs of Services");
            (None, None, None)
        }
    }
}

impl Agent {
    /// Probes the endpoints that the registrar names, as far as they are this host's.
    pub(super) fn probe(&mut self, probes: Vec<EndpointProbe>) {
        let Some(settings) = self.control.settings() else { return };
        let lan = settings.proxied.iter().map(|host| host.lan_address);
        let allowed = settings.virtual_addresses().into_iter().chain(lan).collect();
        self.probes.set(probes, &allowed);
    }
}
