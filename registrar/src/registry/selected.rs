//! EndpointSlices of the devices that Services select. They are made from what the registry holds and never stored, so
//! that they are right at every revision, at every registrar alike, and a change of labels writes nothing else.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use muster_common::{labels::Selector, time::Timestamp};
use muster_proto::{admin, registration::EndpointProbe};
use uuid::Uuid;

use super::{
    change::{Applied, Change},
    device::Device,
    field::FieldError,
    named::{self, Keyed as _},
    service::{self, EXTERNAL_NAME, Service},
    services::Effects,
    slice::{SERVICE_LABEL, Slice},
    state::NetworkState,
};
use crate::store::Revision;

/// How the names of these slices end, and those of no others.
pub const SUFFIX: &str = ".selected";
/// The label that says who looks after a slice, as in Kubernetes.
const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
/// The annotation of a Service with a selector of the other form: sets, and labels that a device must not have.
pub const SELECTOR_ANNOTATION: &str = "muster/selector";
/// Where the label of a device begins that gives a named port its number: `port.muster/http=8080`.
pub const PORT_LABEL: &str = "port.muster/";
/// The most endpoints in a slice, as in Kubernetes.
const ENDPOINTS_MAX: usize = 100;

/// What selects the devices of a Service; `None` if its endpoints are made by hand, or it has none.
///
/// # Errors
/// If the annotation is no selector.
pub fn selector(service: &admin::Service) -> Result<Option<Selector>, FieldError> {
    let annotation = service.metadata.as_ref().and_then(|meta| meta.annotations.get(SELECTOR_ANNOTATION));
    let sets: Option<Selector> = annotation
        .map(|text| text.parse())
        .transpose()
        .map_err(|error| FieldError::new(format!("metadata.annotations[{SELECTOR_ANNOTATION}]"), error))?;
    let Some(spec) = service.spec.as_ref().filter(|spec| spec.r#type != EXTERNAL_NAME) else {
        return Ok(None);
    };
    let labels = Selector::all_of(&spec.selector);
    let selector = sets.into_iter().fold(labels, Selector::and);
    Ok((!selector.is_empty()).then_some(selector))
}

impl NetworkState {
    /// A Service has come, gone or changed: it may select others, or have them otherwise.
    pub(super) fn select_anew(&mut self, key: &str, applied: &mut Applied, now: Timestamp) {
        let service = self.services.services.by_key(key);
        // Its annotation was checked before.
        let selector = service.and_then(|service| selector(&service.stored).ok().flatten());
        let (namespace, _) = named::parts(key);
        self.selection.set_selector(key, namespace, selector, &self.devices);
        self.fill(key, None, applied, now);
    }

    /// A device has come, gone or changed.
    pub(super) fn select_device(
        &mut self,
        old: Option<&Device>,
        new: Option<&Device>,
        applied: &mut Applied,
        now: Timestamp,
    ) {
        let Some(uid) = new.or(old).map(|device| device.uid) else { return };
        if old.map(shown) == new.map(shown) {
            return;
        }
        for service in self.selection.device_changed(old, new) {
            self.fill(&service, Some(uid), applied, now);
        }
        self.select_hosts([old, new].into_iter().flatten(), applied, now);
    }

    /// A device has come to a registrar, or is away.
    pub(super) fn select_presence(&mut self, device: Uuid, applied: &mut Applied, now: Timestamp) {
        self.select_ready(device, applied, now);
        if let Some(device) = self.devices.by_uid(device).cloned() {
            self.select_hosts([&*device].into_iter(), applied, now);
        }
    }

    /// A device that stays selected has become ready for a Service, or is so no longer.
    pub(super) fn select_ready(&mut self, device: Uuid, applied: &mut Applied, now: Timestamp) {
        for service in self.selection.services_of(device) {
            self.fill(&service, Some(device), applied, now);
        }
    }

    /// Something has become of a device that speaks for hosts without an agent: they are reached as long as it is.
    fn select_hosts<'a>(
        &mut self,
        agents: impl Iterator<Item = &'a Device>,
        applied: &mut Applied,
        now: Timestamp,
    ) {
        let sites = agents.filter_map(|device| device.site.as_deref());
        let hosts: BTreeSet<&str> = sites.flat_map(|site| &site.hosts).map(|host| &*host.name).collect();
        let hosts: Vec<Uuid> =
            hosts.into_iter().filter_map(|name| Some(self.devices.by_name(name)?.uid)).collect();
        hosts.into_iter().for_each(|host| self.select_ready(host, applied, now));
    }

    /// Makes the slices of a Service agree with what it selects; `changed` is the only device that has changed, if that is
    /// known.
    fn fill(&mut self, key: &str, changed: Option<Uuid>, applied: &mut Applied, now: Timestamp) {
        let (namespace, name) = named::parts(key);
        let mut stale: BTreeSet<Box<str>> = self
            .services
            .slices_of(namespace, name)
            .filter(|slice| slice.selected.is_some())
            .map(|slice| slice.key().into())
            .collect();
        let mut made = Vec::new();
        let service = self.services.services.by_key(key);
        if let Some((service, devices)) = service.zip(self.selection.devices(key)) {
            for part in self.parts(service, devices) {
                let name = part.name(service);
                let key = named::key(namespace, &name);
                stale.remove(&key);
                let old = self.services.slices.by_key(&key);
                let is_same = |old: &Arc<Slice>| {
                    let untouched =
                        changed.is_some_and(|changed| part.devices.binary_search(&changed).is_err());
                    untouched && old.selected.as_deref() == Some(&*part.devices)
                };
                if old.is_some_and(is_same) {
                    continue;
                }
                // All that is in it was checked before.
                let Ok(new) = self.slice(service, name, part, applied.revision) else { continue };
                if old.is_none_or(|old| !old.is_like(&new)) {
                    made.push(Arc::new(new));
                }
            }
        }
        if made.is_empty() && stale.is_empty() {
            return;
        }
        let mut effects = Effects::default();
        let changes = self.services.select(key, made, &stale, &mut effects);
        applied.changes.extend(changes.into_iter().map(|(old, new)| Change::EndpointSlice { old, new }));
        applied.note(self, effects, now);
    }

    /// Whether nobody has had a session with a device for a while, or with the one that speaks for it.
    pub fn is_away(&self, device: &Device) -> bool {
        let agent = self.agent_of(device);
        self.presence.get(&agent).is_some_and(|presence| presence.registrar.is_none())
    }

    /// Whether the Service's probe has found a device ready, or there is none.
    fn is_found_ready(&self, service: &Service, device: &Device) -> bool {
        service.readiness_probe().is_none()
            || self.readiness.get(&device.uid).is_some_and(|ready| ready.services.contains(service.key()))
    }

    /// Whether a Service asks for probes of a device.
    pub(super) fn is_probed(&self, service: &str, device: &Device) -> bool {
        let found = self.services.services.by_key(service);
        found.is_some_and(|service| service.readiness_probe().is_some())
            && self.selection.devices(service).is_some_and(|devices| devices.contains(&device.uid))
    }

    /// What the agent of `device` has to probe: its own device, and the hosts that it speaks for.
    pub fn probes(&self, device: &Device) -> Vec<EndpointProbe> {
        let own = device.addresses().map(|address| (device, address));
        let hosts = self.proxied(device).map(|(host, found)| (&**found, host.lan_address));
        let mut probes = Vec::new();
        let mut done = BTreeSet::new();
        for (endpoint, address) in own.chain(hosts) {
            for key in self.selection.services_of(endpoint.uid) {
                let Some(service) = self.services.services.by_key(&key) else { continue };
                // By the first of its addresses that is of a family of the Service's.
                let is_proxied = endpoint.uid != device.uid;
                let is_right = is_proxied || families(service).contains(&address.is_ipv4());
                let probe = service.readiness_probe().filter(|_| is_right);
                if let Some(probe) = probe.and_then(|probe| numbered(probe, service, endpoint))
                    && done.insert((key, endpoint.uid))
                {
                    probes.push(EndpointProbe {
                        namespace: service.namespace.to_string(),
                        service: service.name.to_string(),
                        device_uid: endpoint.uid.to_string(),
                        address: address.to_string(),
                        probe: Some(probe),
                    });
                }
            }
        }
        probes
    }

    /// The devices that a Service selects, with those that speak for hosts without an agent in the place of the hosts.
    pub fn agents_of(&self, service: &str) -> BTreeSet<Uuid> {
        let devices = self.selection.devices(service).into_iter().flatten();
        devices.filter_map(|uid| Some(self.agent_of(self.devices.by_uid(*uid)?))).collect()
    }

    /// Uid of the device whose session tells whether `device` is there.
    pub fn agent_of(&self, device: &Device) -> Uuid {
        device.proxied_by().unwrap_or(device.uid)
    }

    /// Whether a device is an endpoint of Services, or speaks for one.
    pub fn is_endpoint(&self, device: &Device) -> bool {
        let hosts = device.site.iter().flat_map(|site| &site.hosts);
        let mut hosts = hosts.filter_map(|host| self.devices.by_name(&host.name));
        self.selection.selects(device.uid) || hosts.any(|host| self.selection.selects(host.uid))
    }

    /// The devices of a Service that can be reached, by what is to stand in one slice.
    fn parts(&self, service: &Service, devices: &BTreeSet<Uuid>) -> Vec<Part> {
        let mut groups: BTreeMap<(bool, Vec<u16>), Vec<Uuid>> = BTreeMap::new();
        let families = families(service);
        let ports = Ports::of(service);
        let devices = devices.iter().filter_map(|uid| self.devices.by_uid(*uid));
        for device in devices.filter(|device| self.is_reachable(device)) {
            let numbers = ports.numbers(device);
            for is_v4 in &families {
                if device.addresses().any(|address| address.is_ipv4() == *is_v4) {
                    groups.entry((*is_v4, numbers.clone())).or_default().push(device.uid);
                }
            }
        }
        let mut parts = Vec::new();
        for ((is_v4, ports), devices) in groups {
            split(&devices, 0, &mut |depth, devices| {
                parts.push(Part { is_v4, ports: ports.clone(), depth, devices: devices.into() });
            });
        }
        parts
    }

    fn slice(
        &self,
        service: &Service,
        name: String,
        part: Part,
        revision: Revision,
    ) -> Result<Slice, FieldError> {
        let spec = service.stored.spec.as_ref();
        let meta = service.stored.metadata.as_ref();
        let numbers = part.ports.iter();
        let ports =
            spec.into_iter().flat_map(|spec| &spec.ports).zip(numbers).filter(|(_, number)| **number != 0);
        let ports = ports.map(|(port, number)| admin::EndpointPort {
            name: port.name.clone(),
            protocol: port.protocol.clone(),
            port: u32::from(*number),
            app_protocol: port.app_protocol.clone(),
        });
        let devices = part.devices.iter().filter_map(|uid| self.devices.by_uid(*uid));
        let keeps_all = spec.is_some_and(|spec| spec.publish_not_ready_addresses);
        let endpoints = devices.map(|device| {
            let serves = keeps_all || self.is_found_ready(service, device);
            // One that is away may well answer those who know the way to it: better than nothing.
            endpoint(device, part.is_v4, keeps_all || serves && !self.is_away(device), serves)
        });
        let labels = [(SERVICE_LABEL, service.name.as_str()), (MANAGED_BY, "muster")];
        let stored = admin::EndpointSlice {
            metadata: Some(admin::ObjectMeta {
                uid: part.uid(service).to_string(),
                name,
                namespace: service.namespace.to_string(),
                network: service.network.to_string(),
                labels: labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
                creation_timestamp: meta.and_then(|meta| meta.creation_timestamp),
                ..Default::default()
            }),
            address_type: if part.is_v4 { "IPv4" } else { "IPv6" }.to_owned(),
            endpoints: endpoints.collect(),
            ports: ports.collect(),
        };
        let mut slice = Slice::check(stored, &service.network, revision)?;
        slice.selected = Some(part.devices);
        Ok(slice)
    }
}

/// What EndpointSlices show of a device, and what decides whether they do.
fn shown(device: &Device) -> impl PartialEq + '_ {
    let reachable = (device.revoked, device.key.is_some(), &device.site);
    (&device.name, &device.namespace, device.labels(), device.ipv4, device.ipv6, reachable)
}

/// Devices of a Service that stand in one slice.
struct Part {
    is_v4: bool,
    /// Number of each of the Service's ports; 0 for one that they do not have.
    ports: Vec<u16>,
    /// How many bits their uids have in common.
    depth: u32,
    /// Their uids, in order.
    devices: Box<[Uuid]>,
}

impl Part {
    /// Tells the parts of a Service apart, and stays the same while devices come and go (FNV-1a).
    fn id(&self) -> u64 {
        let prefix =
            self.devices.first().map_or(0, |uid| uid.as_u128().checked_shr(128 - self.depth).unwrap_or(0));
        let ports = self.ports.iter().flat_map(|port| port.to_be_bytes());
        let rest = self.depth.to_be_bytes().into_iter().chain(prefix.to_be_bytes());
        let bytes = [u8::from(self.is_v4)].into_iter().chain(rest).chain(ports);
        bytes
            .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
    }

    fn name(&self, service: &Service) -> String {
        format!("{}-{:016x}{SUFFIX}", service.name, self.id())
    }

    fn uid(&self, service: &Service) -> Uuid {
        let (high, low) = Uuid::try_parse(service.uid()).unwrap_or_default().as_u64_pair();
        Uuid::from_u64_pair(high, low ^ self.id())
    }
}

/// Hands out `devices`, in order, in parts of at most [`ENDPOINTS_MAX`]: those whose uids begin alike stay together, so
/// that a device that comes or goes changes one part, and seldom two.
fn split(devices: &[Uuid], depth: u32, part: &mut impl FnMut(u32, &[Uuid])) {
    if devices.is_empty() {
        return;
    }
    if devices.len() <= ENDPOINTS_MAX || depth == 128 {
        return part(depth, devices);
    }
    let bit = 1_u128 << (127 - depth);
    let (zeros, ones) = devices.split_at(devices.partition_point(|uid| uid.as_u128() & bit == 0));
    split(zeros, depth + 1, part);
    split(ones, depth + 1, part);
}

/// What the ports of a Service are on the devices.
struct Ports<'a>(Vec<Result<u16, &'a str>>);

impl<'a> Ports<'a> {
    fn of(service: &'a Service) -> Self {
        let ports = service.stored.spec.iter().flat_map(|spec| &spec.ports);
        Self(ports.map(|port| port.target_port.parse().map_err(|_| &*port.target_port)).collect())
    }

    fn numbers(&self, device: &Device) -> Vec<u16> {
        let named = |name: &str| {
            let number = device.labels().get(&format!("{PORT_LABEL}{name}"))?;
            number.parse().ok()
        };
        self.0.iter().map(|port| port.or_else(|name| named(name).ok_or(())).unwrap_or(0)).collect()
    }
}

/// The families in which a Service has endpoints: `true` for IPv4.
fn families(service: &Service) -> Vec<bool> {
    let named =
        service.stored.spec.as_ref().and_then(|spec| service::families(spec).ok()).unwrap_or_default();
    if named.is_empty() { vec![true, false] } else { named }
}

/// `probe` with numbers in the place of the names of ports; `None` if the device does not have such a port.
fn numbered(probe: &admin::Probe, service: &Service, device: &Device) -> Option<admin::Probe> {
    let number = |port: &mut String| {
        if port.parse::<u16>().is_ok() {
            return Some(());
        }
        let ports = service.stored.spec.iter().flat_map(|spec| &spec.ports);
        let (_, number) =
            ports.zip(Ports::of(service).numbers(device)).find(|(found, _)| found.name == *port)?;
        *port = number.to_string();
        (number != 0).then_some(())
    };
    let mut probe = probe.clone();
    if let Some(get) = &mut probe.http_get {
        number(&mut get.port)?;
    }
    if let Some(socket) = &mut probe.tcp_socket {
        number(&mut socket.port)?;
    }
    Some(probe)
}

fn endpoint(device: &Device, is_v4: bool, is_ready: bool, serves: bool) -> admin::SliceEndpoint {
    let addresses = device.addresses().filter(|address| address.is_ipv4() == is_v4);
    admin::SliceEndpoint {
        addresses: addresses.map(|address: IpAddr| address.to_string()).collect(),
        conditions: Some(admin::EndpointConditions {
            ready: Some(is_ready),
            serving: Some(serves),
            terminating: Some(false),
        }),
        hostname: String::new(),
        target_ref: Some(admin::ObjectReference {
            kind: "Device".to_owned(),
            namespace: device.namespace.to_string(),
            name: device.name.to_string(),
            uid: device.uid.to_string(),
        }),
        node_name: device.name.to_string(),
        zone: device.zone().to_owned(),
    }
}
