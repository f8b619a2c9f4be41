//! What a device may see: other devices as peers, itself as configuration. All that is told to devices, by gRPC and
//! by DNS alike, comes through here, so that policy is asked each time.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;
use muster_common::frame::Handle;
use muster_proto::{admin::DirectorAddress, registration};
use uuid::Uuid;

use super::{
    device::{Device, PublicKey},
    director::{Director, TOLD_MAX},
    field,
    index::{Index, NetworkState},
    service::Service,
};
use crate::{policy, store::Revision};

/// Where this deployment is reached, as devices are told.
#[derive(Clone, Debug, Default)]
pub struct Advertised {
    /// `host:port` of the registrars, for gRPC.
    pub registrars: Vec<String>,
    /// `host:port` of the registrars, for DNS over TLS.
    pub dns_servers: Vec<String>,
}

/// How a peer is asked for.
#[derive(Clone, Copy, Debug)]
pub enum By<'a> {
    /// By virtual address.
    Address(IpAddr),
    /// By WireGuard key.
    Key(&'a PublicKey),
    /// By name, bare or under the domain, in any case.
    Name(&'a str),
}

impl NetworkState {
    /// Whether policy lets `viewer` see `target`, and there is anything to see. A device sees itself. A host without an
    /// agent is seen by those who see both it and the device that speaks for it.
    pub fn sees(&self, viewer: &Device, target: &Device) -> bool {
        let subject = |device| policy_subject(self, device);
        let allowed = viewer.uid == target.uid || policy::allows(&subject(viewer), &subject(target));
        allowed
            && match self.proxy_of(target) {
                Some((agent, _)) => self.sees(viewer, agent),
                None => target.is_reachable(),
            }
    }

    /// The peer that `viewer` asks for; `None` alike if there is none and if policy hides it. The peer of a host without
    /// an agent is the device that speaks for it, and that of an address in a site's subnet is the device that carries
    /// the subnet.
    pub fn look_up(&self, viewer: &Device, by: By<'_>) -> Option<&Arc<Device>> {
        let found = match by {
            By::Address(address) => self.devices.by_address(address).or_else(|| self.carrier_of(address)),
            By::Key(key) => self.devices.by_key(key),
            By::Name(name) => {
                let bare = self.network.domain.relative(name).unwrap_or(name);
                self.devices.by_name(&bare.to_ascii_lowercase())
            }
        };
        let found = found.filter(|target| self.sees(viewer, target))?;
        Some(self.proxy_of(found).map_or(found, |(agent, _)| agent))
    }

    /// The Services of a namespace that `viewer` may see, by name, those after `after`. Every device sees the Services
    /// of its own network.
    pub fn visible_services<'a>(
        &'a self,
        viewer: &Device,
        namespace: &str,
        after: &str,
    ) -> impl Iterator<Item = &'a Arc<Service>> + use<'a> {
        let sees = !viewer.revoked && viewer.network == self.network.name && self.has_namespace(namespace);
        let services = sees.then(|| self.services.services.within(namespace, after));
        services.into_iter().flatten()
    }

    /// `device` as the peers that see it are told of it, as of `revision`.
    pub fn peer(&self, device: &Device, revision: Revision) -> registration::Peer {
        let proxied = self.proxied(device).flat_map(|(_, host)| host.addresses());
        registration::Peer {
            device_uid: device.uid.to_string(),
            name: device.name.to_string(),
            public_key: device.key.map(|key| key.to_vec()).unwrap_or_default(),
            virtual_addresses: device.addresses().chain(proxied).map(|address| address.to_string()).collect(),
            // A way to a peer that leads through the network itself leads nowhere, round and round.
            private_endpoints: device
                .endpoints
                .iter()
                .filter(|endpoint| !self.network.pools.iter().any(|(_, net)| net.contains(&endpoint.ip())))
                .map(field::to_endpoint)
                .collect(),
            reflexive_endpoint: device.reflexive().first().map(field::to_endpoint),
            reflexive_endpoints: device.reflexive().iter().map(field::to_endpoint).collect(),
            home_director: match self.home(device) {
                Some(home) => attached(device, home),
                None => self
                    .static_directors()
                    .first()
                    .map(|address| registration::HomeDirector { address: Some(address.clone()), handle: 0 }),
            },
            second_director: self.second(device).and_then(|second| attached(device, second)),
            policy: Some(registration::PairPolicy { allowed: true }),
            revision,
            transport_ciphers: device.transport_ciphers(),
            subnets: texts(&self.active_subnets(device)),
        }
    }

    /// What the registrar has decided for `device`.
    pub fn config(&self, device: &Device, advertised: &Advertised) -> registration::DeviceConfig {
        let text = |address: Option<IpAddr>| address.map(|a| a.to_string()).unwrap_or_default();
        registration::DeviceConfig {
            device_uid: device.uid.to_string(),
            name: device.name.to_string(),
            namespace: device.namespace.to_string(),
            network: device.network.to_string(),
            domain: self.network.domain.to_string(),
            virtual_ipv4: text(device.ipv4.map(IpAddr::from)),
            virtual_ipv6: text(device.ipv6.map(IpAddr::from)),
            routes: self.network.pools.iter().map(|(_, net)| net.to_string()).collect(),
            directors: self.told_directors(),
            registrars: advertised.registrars.clone(),
            dns_servers: advertised.dns_servers.clone(),
            proxied_devices: self.proxied_devices(device),
            subnets: device.may_carry().map(|subnet| subnet.to_string()).collect(),
            active_subnets: texts(&self.active_subnets(device)),
            site_routes: self.site_routes(device.uid).map(IpNet::to_string).collect(),
            zone: device.zone().to_owned(),
        }
    }

    /// The director that `device` is reached through, if devices are told of it.
    fn home(&self, device: &Device) -> Option<&Director> {
        self.told_director(device.home()?)
    }

    /// The director that `device` is reached through when its home director is gone.
    fn second(&self, device: &Device) -> Option<&Director> {
        let second = self.told_director(device.second()?)?;
        (Some(second.uid) != device.home()).then_some(second)
    }

    fn told_director(&self, uid: Uuid) -> Option<&Director> {
        self.directors.by_uid(uid).map(|director| &**director).filter(|director| director.is_told())
    }

    /// Where DNS says that the director of `device` is: its home director, or while no director has registered, the
    /// first that the operator has named. A host without an agent is behind that of the device that speaks for it.
    pub fn director_addresses(&self, device: &Device) -> Vec<SocketAddr> {
        match self.home(self.proxy_of(device).map_or(device, |(agent, _)| agent)) {
            Some(home) => home.endpoints.to_vec(),
            None if self.directors.have_registered() => Vec::new(),
            None => self.network.directors.first().copied().into_iter().collect(),
        }
    }

    /// The directors that devices are told of: those that have registered, the ones to be left last; while there are
    /// none, those that the operator has named.
    fn told_directors(&self) -> Vec<DirectorAddress> {
        if !self.directors.have_registered() {
            return self.static_directors().to_vec();
        }
        let told = self.directors.iter().filter(|director| director.is_told());
        let (leave, stay): (Vec<_>, Vec<_>) = told.partition(|director| director.is_draining());
        stay.into_iter().chain(leave).filter_map(|director| director.address()).take(TOLD_MAX).collect()
    }

    /// The directors that the operator has named, unless others have registered.
    fn static_directors(&self) -> &[DirectorAddress] {
        match &self.network.stored.spec {
            Some(spec) if !self.directors.have_registered() => &spec.directors,
            _ => &[],
        }
    }
}

impl Index {
    /// The peer `uid` as `viewer` sees it; `None` alike if there is none and if policy hides it.
    pub fn peer(&self, network: &str, viewer: Uuid, uid: Uuid) -> Option<registration::Peer> {
        let state = self.network(network)?;
        let (viewer, target) = (state.devices.by_uid(viewer)?, state.devices.by_uid(uid)?);
        state.sees(viewer, target).then(|| state.peer(target, self.revision()))
    }
}

fn texts(nets: &[IpNet]) -> Vec<String> {
    nets.iter().map(IpNet::to_string).collect()
}

/// `device` as it is known to `director`, which it is attached to.
fn attached(device: &Device, director: &Director) -> Option<registration::HomeDirector> {
    let Handle(handle) = Handle::of_device(device.uid.as_bytes());
    Some(registration::HomeDirector { address: Some(director.address()?), handle })
}

/// A Service as devices are told of it.
pub fn visible_service(service: &Service) -> registration::VisibleService {
    registration::VisibleService {
        name: service.name.to_string(),
        cluster_ips: service.cluster_ips().iter().map(IpAddr::to_string).collect(),
        ports: service.stored.spec.as_ref().map(|spec| spec.ports.clone()).unwrap_or_default(),
    }
}

/// Whether those that hold a device have to be told of a change to it.
pub fn is_seen_differently(old: &Device, new: &Device) -> bool {
    fn seen(device: &Device) -> impl PartialEq + '_ {
        (
            (&device.name, device.key, device.ipv4, device.ipv6, device.revoked),
            (&device.endpoints, &device.outside, device.aes_256_gcm, &device.site),
            (&device.namespace, device.labels()),
        )
    }
    seen(old) != seen(new)
}

/// Whether the device itself has to be told of a change to it.
pub fn is_configured_differently(old: &Device, new: &Device) -> bool {
    fn configured(device: &Device) -> impl PartialEq + '_ {
        (&device.name, &device.namespace, device.ipv4, device.ipv6, &device.site, device.zone())
    }
    configured(old) != configured(new)
}

/// Whether the device has registered as something else than before. It does so before it opens a session: one that is
/// open meanwhile is of an earlier life of its agent, or what has just arrived is.
pub fn is_registered_differently(old: &Device, new: &Device) -> bool {
    fn registered(device: &Device) -> impl PartialEq + '_ {
        let offer = device.site.as_deref().map(|site| (&site.hosts, &site.offered));
        let offer = offer.filter(|(hosts, offered)| !hosts.is_empty() || !offered.is_empty());
        (device.key, device.aes_256_gcm, &device.agent_version, offer)
    }
    registered(old) != registered(new)
}

fn policy_subject<'a>(state: &'a NetworkState, device: &'a Device) -> policy::Subject<'a> {
    policy::Subject {
        network: &state.network.label,
        namespace: &device.namespace,
        labels: device.labels(),
        revoked: device.revoked,
    }
}
