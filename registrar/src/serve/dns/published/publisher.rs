//! The writer of the table: takes up what has been noted, in pieces, and between them goes on with networks of which
//! not everything is encoded yet.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use arc_swap::ArcSwap;
use muster_common::{name::Domain, time::Instant};
use muster_dns::{
    directory::{Directory, Endpoint, Service, ServiceKind},
    engine::{Engine, protocol_label},
    fast::{DEVICE_TYPES, Encoded, Snapshot, Table, ZoneAnswers, encode, encode_types},
    options::Fallthrough,
    wire,
};
use uuid::Uuid;

use super::{Dirty, Gauges, Notes};
use crate::{
    registry::{Registry, change::ServiceName, named},
    zone::Zones,
};

/// How much is encoded before the table is published, so that a change never waits for a long row of others.
const PIECE: usize = 256;

/// A network in the table.
struct Network {
    number: u32,
    domain: Domain,
    external_domain: Option<Domain>,
    /// Whether all of it is encoded.
    complete: bool,
}

/// A network of which not everything is encoded yet.
struct Build {
    network: Arc<str>,
    /// The last device that is.
    after: Box<str>,
    /// What is encoded before the devices.
    first: VecDeque<Dirty>,
}

pub(super) struct Publisher {
    registry: Arc<Registry>,
    engine: Arc<Engine<Zones>>,
    notes: Arc<Notes>,
    current: Arc<ArcSwap<Snapshot>>,
    pub(super) gauges: Gauges,
    table: Table,
    networks: BTreeMap<Arc<str>, Network>,
    /// The number of the next network.
    next: u32,
    /// Services as they are encoded.
    services: BTreeMap<ServiceName, Arc<Service>>,
    builds: VecDeque<Build>,
}

impl Publisher {
    /// Everything is still to be encoded.
    pub(super) fn new(
        registry: Arc<Registry>,
        engine: Arc<Engine<Zones>>,
        notes: Arc<Notes>,
        current: Arc<ArcSwap<Snapshot>>,
    ) -> Self {
        let mut table = Table::new();
        // Each network is let in when all of it is there.
        table.set_loaded(true);
        let names: Vec<Arc<str>> =
            registry.read().networks().map(|state| state.network.name.clone()).collect();
        let mut publisher = Self {
            registry,
            engine,
            notes,
            current,
            gauges: Gauges::default(),
            table,
            networks: BTreeMap::new(),
            next: 0,
            services: BTreeMap::new(),
            builds: VecDeque::new(),
        };
        names.iter().for_each(|name| publisher.network(name));
        publisher
    }

    /// Takes up what has been noted, or goes on with what is not complete; with `wait`, waits for the former when
    /// there is nothing else to do. Whether to go on.
    pub(super) fn run(&mut self, wait: bool) -> bool {
        let Some((dirty, since)) = self.notes.take(wait && self.builds.is_empty()) else { return false };
        if dirty.is_empty() {
            let idle = self.builds.is_empty();
            self.build();
            return wait || !idle;
        }
        let mut touched = BTreeSet::new();
        let mut dirty = dirty.into_iter().peekable();
        while dirty.peek().is_some() {
            for item in dirty.by_ref().take(PIECE) {
                touched.insert(self.take_up(&item));
            }
            // The new serial is told with the first of the changes: it is of the whole row.
            touched.iter().for_each(|network| self.set_zone(network));
            self.publish();
        }
        if let Some(since) = since {
            self.gauges.duration.observe((Instant::now() - since).as_secs_f64());
        }
        true
    }

    fn publish(&self) {
        self.current.store(self.table.publish());
        let (octets, names) = self.table.names_size();
        self.gauges.names.set(names.try_into().unwrap_or(i64::MAX));
        self.gauges.octets.set(octets.try_into().unwrap_or(i64::MAX));
    }

    /// Encodes one thing anew; its network.
    fn take_up(&mut self, dirty: &Dirty) -> Arc<str> {
        match dirty {
            Dirty::Network(network) => {
                self.network(network);
                network.clone()
            }
            Dirty::Member { network, uid } => {
                self.member(network, *uid);
                network.clone()
            }
            Dirty::Service(name) => {
                self.service(name, false);
                name.network.clone()
            }
            Dirty::Namespace { network, name } => {
                self.name(network, &format!("{name}.svc"), Kind::Other);
                network.clone()
            }
            Dirty::Device { network, name } => {
                self.name(network, name, Kind::Device);
                network.clone()
            }
        }
    }

    /// Begins with a network from the start, or forgets it if it is gone. Networks above its domains are begun again,
    /// too: what these hide of theirs changes.
    fn network(&mut self, name: &Arc<str>) {
        let mut domains: Vec<Domain> = Vec::new();
        if let Some(state) = self.registry.read().network(name) {
            domains.push(state.network.domain.clone());
            domains.extend(state.network.external_domain.clone());
        }
        if let Some(network) = self.networks.get(name) {
            domains.push(network.domain.clone());
            domains.extend(network.external_domain.clone());
        }
        let is_above =
            |network: &Network| domains.iter().any(|d| network.domain.relative(d.as_str()).is_some());
        let above = self.networks.iter().filter(|(other, network)| *other != name && is_above(network));
        let above: Vec<Arc<str>> = above.map(|(name, _)| name.clone()).collect();
        self.begin(name);
        above.iter().for_each(|name| self.begin(name));
    }

    fn begin(&mut self, name: &Arc<str>) {
        self.builds.retain(|build| build.network != *name);
        if let Some(network) = self.networks.get_mut(name) {
            network.complete = false;
            self.table.remove_zone(network.number);
        }
        let index = self.registry.read();
        let Some(state) = index.network(name) else {
            // It was empty: the names of what was in it were noted.
            self.networks.remove(name);
            return;
        };
        let next = self.next;
        let network = self.networks.entry(name.clone()).or_insert_with(|| {
            let domain = state.network.domain.clone();
            Network { number: next, domain, external_domain: None, complete: false }
        });
        network.external_domain.clone_from(&state.network.external_domain);
        if network.number == next {
            self.next += 1;
        }
        let services = state.services().map(|service| {
            let key = named::key(service.namespace.as_str(), service.name.as_str());
            Dirty::Service(ServiceName { network: name.clone(), key })
        });
        let namespaces = state.namespaces().map(|namespace| {
            let (network, name) = (name.clone(), namespace.into());
            Dirty::Namespace { network, name }
        });
        let first = services.chain(namespaces).collect();
        self.builds.push_back(Build { network: name.clone(), after: Box::default(), first });
    }

    /// Encodes a piece of the first network that is not complete, and lets the network in with the last one.
    fn build(&mut self) {
        let Some(mut build) = self.builds.pop_front() else { return };
        let network = build.network.clone();
        if !build.first.is_empty() {
            let piece = build.first.len().min(PIECE);
            for dirty in build.first.drain(..piece) {
                match &dirty {
                    Dirty::Service(name) => self.service(name, true),
                    other => drop(self.take_up(other)),
                }
            }
            return self.builds.push_front(build);
        }
        let piece = self.devices_after(&network, &build.after);
        if let Some((last, _)) = piece.last() {
            build.after = last.clone();
            for (name, uid) in &piece {
                self.name(&network, name, Kind::Device);
                self.member(&network, *uid);
            }
            return self.builds.push_front(build);
        }
        self.name(&network, "svc", Kind::Other);
        if let Some(network) = self.networks.get_mut(&network) {
            network.complete = true;
        }
        self.set_zone(&network);
        self.publish();
        tracing::debug!(network = &*network, "DNS answers of the network are encoded");
    }

    fn devices_after(&self, network: &str, after: &str) -> Vec<(Box<str>, Uuid)> {
        let index = self.registry.read();
        let devices = index.network(network).into_iter().flat_map(|state| state.devices.after(after));
        devices.take(PIECE).map(|device| (device.name.clone(), device.uid)).collect()
    }

    /// Tells the table what the network's zone says, if the network is complete.
    fn set_zone(&mut self, name: &str) {
        let Some(network) = self.networks.get(name).filter(|network| network.complete) else { return };
        let Some(zone) = self.engine.directory().zone(network.domain.as_str()) else { return };
        let options = self.engine.options();
        let zone = ZoneAnswers {
            domain: zone.domain.clone(),
            external_domain: zone.external_domain.clone(),
            ttl: zone.ttl,
            serial: zone.serial,
            plain: options.fallthrough == Fallthrough::Never && !options.complete,
            devices: true,
            services: true,
        };
        self.table.set_zone(network.number, &zone);
    }

    fn member(&mut self, network: &str, uid: Uuid) {
        let Some(number) = self.networks.get(network).map(|network| network.number) else { return };
        let index = self.registry.read();
        let device = index.network(network).and_then(|state| state.devices.by_uid(uid));
        if device.is_some_and(|device| !device.revoked) {
            drop(index);
            self.table.set_member(uid.into_bytes(), number);
        } else {
            drop(index);
            self.table.remove_member(uid.into_bytes());
        }
    }

    /// Encodes `left` under the network's domain, or takes it out if it is not there.
    fn name(&mut self, network: &str, left: &str, kind: Kind) {
        let Some(Network { number, domain, .. }) = self.networks.get(network) else { return };
        let name = format!("{left}.{domain}");
        let Some(wire) = wire::encode_name(&name) else { return };
        // The domain of another network may be, or be above, this very name.
        let zone = self.engine.directory().zone(&name);
        if zone.is_some_and(|zone| zone.domain != *domain) {
            return;
        }
        let encoded = match kind {
            Kind::Device => encode_types(&self.engine, &name, &DEVICE_TYPES),
            Kind::Other => encode(&self.engine, &name),
            // What it answers depends on another name.
            Kind::Alias => encode(&self.engine, &name).map(|_| Encoded::unusual()),
        };
        match encoded {
            Some(encoded) => self.table.set(&wire, *number, &encoded),
            None => drop(self.table.remove(&wire)),
        }
    }

    /// Encodes the names of a Service: of its endpoints only those that have changed, unless `all`.
    fn service(&mut self, name: &ServiceName, all: bool) {
        let (namespace, label) = named::parts(&name.key);
        let new = {
            let index = self.registry.read();
            index.network(&name.network).and_then(|state| state.service(namespace, label).cloned())
        };
        let old = match &new {
            Some(new) => self.services.insert(name.clone(), new.clone()),
            None => self.services.remove(name),
        };
        let kind = |service: &Service| std::mem::discriminant(&service.kind);
        let all = all || old.as_deref().map(kind) != new.as_deref().map(kind);
        let (before, after) = (self.endpoints(old.as_deref()), self.endpoints(new.as_deref()));
        let mut below: BTreeSet<String> = BTreeSet::new();
        for label in before.keys().chain(after.keys()) {
            if all || before.get(label) != after.get(label) {
                below.insert(format!("{label}."));
            }
        }
        for service in [&old, &new].into_iter().flatten() {
            let offered = service.endpoints.iter().flat_map(|endpoint| endpoint.ports.iter());
            let named = service.ports.iter().chain(offered).filter(|port| !port.name.is_empty());
            below.extend(named.map(|port| format!("_{}._{}.", port.name, protocol_label(port.protocol))));
        }
        below.insert(String::new());
        let alias = new.as_ref().is_some_and(|new| matches!(new.kind, ServiceKind::ExternalName(_)));
        let kind = if alias { Kind::Alias } else { Kind::Other };
        for below in below {
            self.name(&name.network, &format!("{below}{label}.{namespace}.svc"), kind);
        }
    }

    /// What the names of a Service's endpoints are made from, by label.
    fn endpoints<'a>(&self, service: Option<&'a Service>) -> BTreeMap<String, Vec<&'a Endpoint>> {
        let mut groups = BTreeMap::<String, Vec<_>>::new();
        for endpoint in service.into_iter().flat_map(|service| &service.endpoints) {
            groups.entry(self.engine.endpoint_label(endpoint)).or_default().push(endpoint);
        }
        groups
    }
}

/// What is known of a name before it is encoded.
#[derive(Clone, Copy)]
enum Kind {
    Device,
    Alias,
    Other,
}
