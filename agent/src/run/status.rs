//! The answer to `muster-agent status`, as far as the run loop knows it.

use muster_common::time::{Instant, Timestamp};
use muster_proto::agent::{DirectorStatus, GetStatusResponse, PeerStatus, RegistrarStatus, VirtualIpStatus};

use super::{Agent, VERSION};
use crate::{
    control::{DirectorView, PeerInfo},
    local_api::{endpoint, proto_duration, timestamp},
    netcheck::{Director, Surroundings},
    port_mapping, site,
    virtual_ips::View,
};

impl Agent {
    pub(super) fn status(&self) -> GetStatusResponse {
        let registrar = self.control.registrar();
        let since = Timestamp::now().saturating_sub(Instant::now() - registrar.since);
        let mut status = GetStatusResponse {
            version: VERSION.to_owned(),
            network: self.identity.network.clone(),
            domain: self.identity.domain.clone(),
            device_uid: self.identity.device_uid.clone(),
            name: self.identity.name.clone(),
            namespace: self.identity.namespace.clone(),
            interface: self.config.interface.name.clone(),
            mtu: self.host.mtu().unwrap_or_default(),
            public_key: self.control.public_key().to_vec(),
            private_endpoints: self.control.private_endpoints().iter().copied().map(endpoint).collect(),
            registrar: Some(RegistrarStatus {
                address: registrar.address,
                connected: registrar.connected,
                since: Some(timestamp(since)),
                last_error: registrar.last_error,
            }),
            certificate_expiry: Some(timestamp(self.validity.not_after)),
            ready: self.readiness.get(),
            ..GetStatusResponse::default()
        };
        if let Some(settings) = self.control.settings() {
            status.name.clone_from(&settings.name);
            status.namespace.clone_from(&settings.namespace);
            status.domain = settings.domain.to_string();
            status.virtual_ipv4 = settings.virtual_ipv4.map(|a| a.to_string()).unwrap_or_default();
            status.virtual_ipv6 = settings.virtual_ipv6.map(|a| a.to_string()).unwrap_or_default();
        }
        let peer = |info: &PeerInfo| PeerStatus {
            device_uid: info.message.device_uid.clone(),
            name: info.message.name.clone(),
            virtual_addresses: info.message.virtual_addresses.clone(),
            public_key: info.message.public_key.clone(),
            path: "none".to_owned(),
            ..PeerStatus::default()
        };
        status.directors = self.control.directors().iter().map(director).collect();
        status.reflexive_endpoints = self.control.reflexive_endpoints().into_iter().map(endpoint).collect();
        status.peers = self.control.peers().map(peer).collect();
        let (offer, settings) = (self.control.site_offer(), self.control.settings());
        status.proxied_hosts = site::status::hosts(offer, settings);
        status.site_subnets = site::status::subnets(offer, settings);
        status.left_out_routes = site::status::left_out(settings);
        self.host.site_error().clone_into(&mut status.site_error);
        status.virtual_ips = self.virtual_ips.as_ref().map(|ips| virtual_ips(ips.view()));
        status
    }
}

impl Agent {
    /// What `muster-agent netcheck` begins with.
    pub(super) fn surroundings(&self, port_mapping: Option<port_mapping::View>) -> Surroundings {
        let director = |view: &DirectorView<'_>| Director {
            status: director(view),
            addresses: view.target.addresses.clone(),
            udp: view.udp,
            reflexive: view.reflexive,
        };
        Surroundings {
            private: self.control.private_endpoints().to_vec(),
            reflexive: self.control.reflexive_endpoints(),
            directors: self.control.directors().iter().map(director).collect(),
            port_mapping,
        }
    }
}

fn virtual_ips(view: View) -> VirtualIpStatus {
    let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    let View { frontends, endpoints, error } = view;
    VirtualIpStatus { frontends: number(frontends), endpoints: number(endpoints), error }
}

fn director(view: &DirectorView<'_>) -> DirectorStatus {
    DirectorStatus {
        name: view.target.name.clone(),
        region: view.target.region.clone(),
        role: view.role.as_str().to_owned(),
        transport: view.way.map_or("none", |way| way.as_str()).to_owned(),
        round_trip: view.round_trip.map(proto_duration),
        reflexive: view.reflexive.map(endpoint),
        last_error: view.last_error.to_owned(),
    }
}
