//! The Services of one network that have virtual IPs, as agents are told of them, and in which order they have changed: each
//! stands once, at its last change, so that whoever comes back is sent what is new since, however often it has changed.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    ops::Bound,
    sync::Arc,
};

use muster_common::digest;
use muster_dns::directory::ExternalAddress;
use muster_proto::{
    admin,
    registration::{VirtualEndpoint, VirtualEndpoints, VirtualPort, VirtualService, VirtualServicesChanged},
};

use super::{
    change::Change,
    index::Index,
    named::{self, Keyed as _},
    service::{PREFER_SAME_NODE, Service},
    services::Services,
    state::NetworkState,
};
use crate::store::Revision;

/// Removed objects that are remembered; whoever has missed more begins anew.
const REMOVED_MAX: usize = 4096;
/// A message is sent once it has so many bytes.
const MESSAGE_BYTES: usize = 128 * 1024;

/// A Service, or an EndpointSlice, by its key.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Object {
    Service(Box<str>),
    Endpoints(Box<str>),
}

/// A place in the order of changes.
type Place = (Revision, u64);

/// The order in which Services and EndpointSlices have changed.
#[derive(Clone, Debug, Default)]
pub(super) struct VirtualServices {
    /// Tells this order from that of an index that was loaded at another time.
    epoch: u64,
    /// Removals up to this place may be missing.
    pruned: Place,
    next: u64,
    order: BTreeMap<Place, Object>,
    /// Where each object stands, and its digest; `None` for one that is removed.
    objects: HashMap<Object, (Place, Option<u64>)>,
    removed: BTreeSet<Place>,
    digest: u64,
}

/// How far somebody has been told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor {
    epoch: u64,
    place: Place,
}

/// Where somebody stands who has been told nothing.
const START: Place = (0, 0);

impl VirtualServices {
    /// Notes what an object is now; says whether that is new.
    fn set(&mut self, object: Object, digest: Option<u64>, revision: Revision) -> bool {
        let old = self.objects.get(&object).copied();
        if old.and_then(|(_, digest)| digest) == digest {
            return false;
        }
        if let Some((place, digest)) = old {
            self.order.remove(&place);
            self.removed.remove(&place);
            self.digest = self.digest.wrapping_sub(digest.unwrap_or(0));
        }
        let place = (revision, self.next);
        self.next += 1;
        self.digest = self.digest.wrapping_add(digest.unwrap_or(0));
        if digest.is_none() {
            self.removed.insert(place);
        }
        self.order.insert(place, object.clone());
        self.objects.insert(object, (place, digest));
        while self.removed.len() > REMOVED_MAX
            && let Some(place) = self.removed.pop_first()
        {
            self.pruned = self.pruned.max(place);
            if let Some(object) = self.order.remove(&place) {
                self.objects.remove(&object);
            }
        }
        true
    }
}

impl NetworkState {
    /// Notes everything that there is, of an index that has just been loaded.
    pub(super) fn note_virtual_services(&mut self, revision: Revision) {
        self.virtual_services = VirtualServices { pruned: (revision, 0), ..VirtualServices::default() };
        let keys: Vec<Box<str>> = self.services.services.iter().map(|service| service.key().into()).collect();
        for key in keys {
            self.note_virtual_service(&key, revision);
        }
    }

    fn note_virtual_service(&mut self, key: &str, revision: Revision) -> bool {
        let digest = digest(self.services.virtual_service(key));
        let mut told = self.virtual_services.set(Object::Service(key.into()), digest, revision);
        if told {
            let (namespace, name) = named::parts(key);
            let slices: Vec<Box<str>> =
                self.services.slices_of(namespace, name).map(|slice| slice.key().into()).collect();
            for slice in slices {
                told |= self.note_virtual_endpoints(&slice, revision);
            }
        }
        told
    }

    fn note_virtual_endpoints(&mut self, key: &str, revision: Revision) -> bool {
        let digest = digest(self.services.virtual_endpoints(key));
        self.virtual_services.set(Object::Endpoints(key.into()), digest, revision)
    }

    /// Where somebody stands who has been told everything up to `revision`, whose digest was `digest`.
    pub fn virtual_services_from(&self, revision: Revision, digest: u64) -> Cursor {
        let now = &self.virtual_services;
        let last = now.order.last_key_value().map_or(now.pruned, |(place, _)| *place);
        let place = match revision {
            0 => START,
            _ if digest == now.digest => last,
            _ => (revision, u64::MAX),
        };
        Cursor { epoch: now.epoch, place }
    }

    /// What somebody who stands at `cursor` has to be told next, all of it from the beginning if that is not known any
    /// more; and whether there is more after that. `revision` is what the index shows.
    pub fn virtual_services_after(
        &self,
        cursor: &mut Cursor,
        revision: Revision,
    ) -> (VirtualServicesChanged, bool) {
        let now = &self.virtual_services;
        if cursor.epoch != now.epoch || cursor.place < now.pruned {
            *cursor = Cursor { epoch: now.epoch, place: START };
        }
        let is_snapshot = cursor.place == START;
        let mut message = VirtualServicesChanged { is_snapshot, ..VirtualServicesChanged::default() };
        let mut bytes = 0;
        let rest = (Bound::Excluded(cursor.place), Bound::Unbounded);
        for (place, object) in now.order.range(rest) {
            if bytes >= MESSAGE_BYTES {
                return (message, true);
            }
            cursor.place = *place;
            bytes += match object {
                Object::Service(key) => match self.services.virtual_service(key) {
                    Some(service) => push(&mut message.services, service),
                    None => push_name(&mut message.removed_services, key),
                },
                Object::Endpoints(key) => match self.services.virtual_endpoints(key) {
                    Some(endpoints) => push(&mut message.endpoints, endpoints),
                    None => push_name(&mut message.removed_endpoints, key),
                },
            };
        }
        cursor.place = cursor.place.max(now.pruned);
        (message.revision, message.digest) = (revision, now.digest);
        (message, false)
    }

    /// Goes on after `older`, an index that this one takes the place of.
    pub(super) fn continue_virtual_services(&mut self, older: &Self) {
        self.virtual_services.epoch = older.virtual_services.epoch + 1;
    }
}

impl Index {
    /// Notes what has come of a change; returns the network if its agents have to be told.
    pub(super) fn note_virtual_change(&mut self, change: &Change, revision: Revision) -> Option<Arc<str>> {
        let (network, told) = match change {
            Change::Service { old, new } => {
                let service = new.as_ref().or(old.as_ref())?;
                let state = self.network_mut(&service.network)?;
                (&service.network, state.note_virtual_service(service.key(), revision))
            }
            Change::EndpointSlice { old, new } => {
                let slice = new.as_ref().or(old.as_ref())?;
                let state = self.network_mut(&slice.network)?;
                (&slice.network, state.note_virtual_endpoints(slice.key(), revision))
            }
            _ => return None,
        };
        told.then(|| network.clone())
    }
}

fn digest(message: Option<impl prost::Message>) -> Option<u64> {
    message.map(|message| digest::of_message(&message.encode_to_vec()))
}

fn push<M: prost::Message>(list: &mut Vec<M>, message: M) -> usize {
    let length = message.encoded_len();
    list.push(message);
    length
}

fn push_name(list: &mut Vec<String>, key: &str) -> usize {
    list.push(named::shown(key));
    key.len()
}

impl Services {
    /// A Service as agents are told of it, if it has virtual IPs.
    fn virtual_service(&self, key: &str) -> Option<VirtualService> {
        let service = self.services.by_key(key).filter(|service| has_virtual_ips(service))?;
        let spec = service.stored.spec.as_ref()?;
        let affinity = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
        Some(VirtualService {
            namespace: service.namespace.to_string(),
            name: service.name.to_string(),
            addresses: virtual_addresses(service),
            ports: spec.ports.iter().map(service_port).collect(),
            affinity_seconds: affinity.map_or(0, |client| client.timeout_seconds),
            is_local: spec.internal_traffic_policy == "Local",
            prefers_zone: matches!(&*spec.traffic_distribution, "PreferSameZone" | "PreferClose"),
            prefers_host: spec.traffic_distribution == PREFER_SAME_NODE,
        })
    }

    /// An EndpointSlice as agents are told of it, if its Service has virtual IPs.
    fn virtual_endpoints(&self, key: &str) -> Option<VirtualEndpoints> {
        let slice = self.slices.by_key(key)?;
        self.services.by_key(&slice.service_key()?).filter(|service| has_virtual_ips(service))?;
        let port = |port: &admin::EndpointPort| VirtualPort {
            name: port.name.clone(),
            protocol: port.protocol.clone(),
            port: port.port,
        };
        Some(VirtualEndpoints {
            namespace: slice.namespace.to_string(),
            name: slice.name.to_string(),
            service: slice.service.as_ref()?.to_string(),
            endpoints: slice.stored.endpoints.iter().flat_map(endpoints).collect(),
            ports: slice.stored.ports.iter().map(port).collect(),
        })
    }
}

fn has_virtual_ips(service: &Service) -> bool {
    !service.ports.is_empty() && virtual_ips(service).next().is_some()
}

/// ClusterIPs and external addresses, as they are written down.
fn virtual_ips(service: &Service) -> impl Iterator<Item = IpAddr> + '_ {
    let external = service.external.iter().filter_map(|address| match address {
        ExternalAddress::Ip(address) => Some(*address),
        ExternalAddress::Host(_) => None,
    });
    service.cluster_ips().iter().copied().chain(external)
}

fn virtual_addresses(service: &Service) -> Vec<String> {
    let addresses: BTreeSet<IpAddr> = virtual_ips(service).collect();
    addresses.iter().map(IpAddr::to_string).collect()
}

fn service_port(port: &admin::ServicePort) -> VirtualPort {
    VirtualPort { name: port.name.clone(), protocol: port.protocol.clone(), port: port.port }
}

fn endpoints(endpoint: &admin::SliceEndpoint) -> impl Iterator<Item = VirtualEndpoint> + '_ {
    let conditions = endpoint.conditions.unwrap_or_default();
    // What is not known counts as ready, and as serving what is ready.
    let is_ready = conditions.ready.unwrap_or(true);
    let is_serving = conditions.serving.unwrap_or(is_ready);
    endpoint.addresses.iter().map(move |address| VirtualEndpoint {
        address: address.clone(),
        zone: endpoint.zone.clone(),
        is_ready,
        is_serving,
    })
}
