//! A Service as the index holds it, and what makes one valid. Paths in errors are those of Kubernetes' manifests.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
};

use muster_common::{labels, name::Label};
use muster_dns::directory::{self, ExternalAddress, Port, Protocol, ServiceKind};
use muster_proto::admin;
use prost::Message as _;

use super::{
    field::{self, FieldError},
    named::{self, Keyed},
    readiness, selected,
    slice::Slice,
};
use crate::store::Revision;

/// The type of a Service that is another name.
pub const EXTERNAL_NAME: &str = "ExternalName";
/// The ClusterIP of a headless Service.
pub const NONE: &str = "None";
const LOAD_BALANCER: &str = "LoadBalancer";
/// Which endpoints come before others.
const DISTRIBUTIONS: [&str; 3] = ["PreferSameZone", PREFER_SAME_NODE, "PreferClose"];
/// Those on the host that a connection comes from.
pub const PREFER_SAME_NODE: &str = "PreferSameNode";
const TYPES: [&str; 4] = ["ClusterIP", "NodePort", LOAD_BALANCER, EXTERNAL_NAME];

/// The longest Service as a message, in bytes.
const SIZE_MAX: usize = 64 * 1024;
const PORTS_MAX: usize = 128;
const EXTERNAL_MAX: usize = 64;
const AFFINITY_DEFAULT: u32 = 10_800;
const AFFINITY_MAX: u32 = 86_400;
/// The longest name of an endpoint's port (RFC 6335).
const PORT_NAME_MAX: usize = 15;

/// A Service. A value is never changed: a change makes a new one.
#[derive(Clone, Debug, PartialEq)]
pub struct Service {
    /// Name of its network.
    pub network: Arc<str>,
    /// Its namespace.
    pub namespace: Label,
    /// Its name.
    pub name: Label,
    /// What its own name answers.
    pub kind: ServiceKind,
    /// Its ports.
    pub ports: Vec<Port>,
    /// Its external addresses.
    pub external: Vec<ExternalAddress>,
    /// The message, as it is stored.
    pub stored: admin::Service,
    /// Revision of its last change.
    pub revision: Revision,
    key: Box<str>,
}

impl Keyed for Service {
    fn key(&self) -> &str {
        &self.key
    }
}

impl Service {
    /// The probe that says whether an endpoint is ready, if it has one.
    pub fn readiness_probe(&self) -> Option<&admin::Probe> {
        self.stored.spec.as_ref()?.readiness_probe.as_ref()
    }

    /// Its uid.
    pub fn uid(&self) -> &str {
        self.stored.metadata.as_ref().map_or("", |meta| &meta.uid)
    }

    /// Its ClusterIPs.
    pub fn cluster_ips(&self) -> &[IpAddr] {
        match &self.kind {
            ServiceKind::ClusterIp(addresses) => addresses,
            ServiceKind::Headless | ServiceKind::ExternalName(_) => &[],
        }
    }

    /// As the admin API shows it.
    pub fn to_proto(&self) -> admin::Service {
        let mut service = self.stored.clone();
        service.metadata.get_or_insert_default().resource_version = self.revision;
        service
    }

    /// As it is stored.
    pub fn encode(&self) -> Vec<u8> {
        self.stored.encode_to_vec()
    }

    /// What DNS answers from: the Service with its `slices`, in the order of their names.
    pub fn view<'a>(&self, slices: impl Iterator<Item = &'a Arc<Slice>>) -> directory::Service {
        directory::Service {
            name: self.name.clone(),
            namespace: self.namespace.clone(),
            kind: self.kind.clone(),
            ports: self.ports.clone(),
            endpoints: slices.flat_map(|slice| slice.ready.iter().cloned()).collect(),
            external: self.external.clone(),
        }
    }

    /// Reads a stored Service.
    ///
    /// # Errors
    /// The field that cannot be used.
    pub fn decode(value: &[u8], network: &Arc<str>, revision: Revision) -> Result<Self, FieldError> {
        let stored = admin::Service::decode(value).map_err(|error| FieldError::new("service", error))?;
        Self::check(stored, network, revision)
    }

    /// Checks a Service that has its ClusterIPs, and brings it into the form in which it is stored.
    ///
    /// # Errors
    /// The first field that cannot be used.
    pub fn check(
        mut stored: admin::Service,
        network: &Arc<str>,
        revision: Revision,
    ) -> Result<Self, FieldError> {
        let Checked { namespace, name, ports, external } = check(&mut stored)?;
        let meta = stored.metadata.get_or_insert_default();
        meta.network = network.to_string();
        meta.resource_version = 0;
        let spec = stored.spec.get_or_insert_default();
        let kind = if spec.r#type == EXTERNAL_NAME {
            ServiceKind::ExternalName(spec.external_name.clone())
        } else if spec.cluster_ip == NONE {
            ServiceKind::Headless
        } else {
            let addresses = chosen(spec)?;
            if addresses.is_empty() {
                return Err(FieldError::new("spec.clusterIP", "is empty"));
            }
            ServiceKind::ClusterIp(addresses)
        };
        let key = named::key(namespace.as_str(), name.as_str());
        Ok(Self { network: network.clone(), namespace, name, kind, ports, external, stored, revision, key })
    }
}

/// What [`check`] finds.
#[derive(Debug)]
pub struct Checked {
    namespace: Label,
    name: Label,
    ports: Vec<Port>,
    external: Vec<ExternalAddress>,
}

/// Checks all of a Service but whether it has ClusterIPs, and sets what is left out to its default.
///
/// # Errors
/// The first field that cannot be used.
pub fn check(service: &mut admin::Service) -> Result<Checked, FieldError> {
    if service.encoded_len() > SIZE_MAX {
        let reason = format!("has {} bytes; at most {SIZE_MAX} are allowed", service.encoded_len());
        return Err(FieldError::new("service", reason));
    }
    let meta = service.metadata.get_or_insert_default();
    field::metadata(meta)?;
    let (namespace, name) = names(meta)?;
    (meta.namespace, meta.name) = (namespace.to_string(), name.to_string());
    let spec = service.spec.get_or_insert_default();
    default_to(&mut spec.r#type, TYPES[0]);
    one_of("spec.type", &spec.r#type, &TYPES)?;
    let external_name = spec.r#type == EXTERNAL_NAME;
    field::labels("spec.selector", &spec.selector)?;
    selected::selector(service)?;
    let spec = service.spec.get_or_insert_default();
    let ports = ports(&mut spec.ports)?;
    if external_name {
        check_external_name(spec)?;
    } else {
        if !spec.external_name.is_empty() {
            let reason = "is for Services of type ExternalName alone; leave it empty, or set spec.type";
            return Err(FieldError::new("spec.externalName", reason));
        }
        check_families(spec)?;
        default_to(&mut spec.internal_traffic_policy, "Cluster");
    }
    let mut external = external_ips(spec)?;
    affinity(spec)?;
    for (path, text) in [
        ("spec.internalTrafficPolicy", &spec.internal_traffic_policy),
        ("spec.externalTrafficPolicy", &spec.external_traffic_policy),
    ] {
        if !text.is_empty() {
            one_of(path, text, &["Cluster", "Local"])?;
        }
    }
    if let Some(probe) = &mut spec.readiness_probe {
        readiness::check(probe)?;
    }
    if !spec.traffic_distribution.is_empty() {
        one_of("spec.trafficDistribution", &spec.traffic_distribution, &DISTRIBUTIONS)?;
    }
    let type_is_load_balancer = spec.r#type == LOAD_BALANCER;
    let status = service.status.get_or_insert_default();
    let ingress = status.load_balancer.as_ref().map_or(&[][..], |status| &status.ingress);
    if !ingress.is_empty() && !type_is_load_balancer {
        let reason = "is for Services of type LoadBalancer alone; set spec.type, or leave it empty";
        return Err(FieldError::new("status.loadBalancer", reason));
    }
    external.extend(load_balancer(ingress)?);
    Ok(Checked { namespace, name, ports, external })
}

/// Checks that a Service has ports, unless its names can answer without: those that are stored may lack them.
///
/// # Errors
/// If it has none, and is neither headless nor of type `ExternalName`.
pub fn check_has_ports(service: &admin::Service) -> Result<(), FieldError> {
    let spec = service.spec.clone().unwrap_or_default();
    let headless = spec.cluster_ip == NONE || spec.cluster_ips.iter().any(|text| text == NONE);
    if !spec.ports.is_empty() || headless || spec.r#type == EXTERNAL_NAME {
        return Ok(());
    }
    let reason = "is empty; name at least one port, or write clusterIP: None for a headless Service";
    Err(FieldError::new("spec.ports", reason))
}

/// Namespace and name in `meta`; no namespace means `default`.
pub(super) fn names(meta: &admin::ObjectMeta) -> Result<(Label, Label), FieldError> {
    Ok((namespace(meta)?, field::parse("metadata.name", &meta.name)?))
}

/// The namespace in `meta`; none means `default`.
pub(super) fn namespace(meta: &admin::ObjectMeta) -> Result<Label, FieldError> {
    let text = if meta.namespace.is_empty() { super::device::DEFAULT_NAMESPACE } else { &meta.namespace };
    field::parse("metadata.namespace", text)
}

/// The ClusterIPs that `spec` has; none for a headless Service.
///
/// # Errors
/// If one is no address, there are two of a family, or `cluster_ip` is not the first.
pub fn chosen(spec: &admin::ServiceSpec) -> Result<Vec<IpAddr>, FieldError> {
    let texts: Vec<(String, &str)> = if spec.cluster_ips.is_empty() {
        let one = (!spec.cluster_ip.is_empty()).then(|| ("spec.clusterIP".to_owned(), &*spec.cluster_ip));
        one.into_iter().collect()
    } else {
        let all = spec.cluster_ips.iter().enumerate();
        all.map(|(i, text)| (format!("spec.clusterIPs[{i}]"), &**text)).collect()
    };
    if let ([(_, first), ..], false) = (&*texts, spec.cluster_ip.is_empty())
        && *first != spec.cluster_ip
    {
        let reason =
            format!("begins with {first:?}, and spec.clusterIP is {:?}", field::short(&spec.cluster_ip));
        return Err(FieldError::new("spec.clusterIPs", format!("{reason}; leave one of them out")));
    }
    if texts.iter().any(|(_, text)| *text == NONE) {
        if texts.len() > 1 {
            return Err(FieldError::new("spec.clusterIPs", "\"None\" stands alone; leave the others out"));
        }
        return Ok(Vec::new());
    }
    let mut addresses: Vec<IpAddr> = Vec::with_capacity(2);
    for (path, text) in texts {
        let address: IpAddr = field::address(&path, text, "IP")?
            .ok_or_else(|| FieldError::new(&*path, "is empty; leave the list out to have one chosen"))?;
        if addresses.iter().any(|other| other.is_ipv4() == address.is_ipv4()) || addresses.len() == 2 {
            let reason = "has two addresses of one family; at most one IPv4 and one IPv6 address are allowed";
            return Err(FieldError::new("spec.clusterIPs", reason));
        }
        addresses.push(address);
    }
    Ok(addresses)
}

/// The families that `spec` names, in order: `true` for IPv4.
///
/// # Errors
/// If one is unknown, or named twice.
pub fn families(spec: &admin::ServiceSpec) -> Result<Vec<bool>, FieldError> {
    let mut families = Vec::with_capacity(2);
    for (i, text) in spec.ip_families.iter().enumerate() {
        let path = format!("spec.ipFamilies[{i}]");
        one_of(&path, text, &["IPv4", "IPv6"])?;
        let is_v4 = text == "IPv4";
        if families.contains(&is_v4) {
            return Err(FieldError::new(path, format!("{text} is there twice; name each family once")));
        }
        families.push(is_v4);
    }
    Ok(families)
}

fn check_families(spec: &admin::ServiceSpec) -> Result<(), FieldError> {
    let (addresses, families) = (chosen(spec)?, families(spec)?);
    for (i, (address, is_v4)) in addresses.iter().zip(&families).enumerate() {
        if address.is_ipv4() != *is_v4 {
            let reason =
                format!("is not the family of {address}; name families in the order of the addresses");
            return Err(FieldError::new(format!("spec.ipFamilies[{i}]"), reason));
        }
    }
    let policy = &spec.ip_family_policy;
    if policy.is_empty() {
        return Ok(());
    }
    one_of("spec.ipFamilyPolicy", policy, &["SingleStack", "PreferDualStack", "RequireDualStack"])?;
    if policy == "SingleStack" && (addresses.len() > 1 || families.len() > 1) {
        let reason = "is SingleStack, and two families are named; set PreferDualStack or RequireDualStack";
        return Err(FieldError::new("spec.ipFamilyPolicy", reason));
    }
    Ok(())
}

fn check_external_name(spec: &mut admin::ServiceSpec) -> Result<(), FieldError> {
    if spec.external_name.is_empty() {
        let reason = "is empty; a Service of type ExternalName needs the name that it stands for";
        return Err(FieldError::new("spec.externalName", reason));
    }
    dns_name("spec.externalName", &spec.external_name)?;
    let reason = "is not for Services of type ExternalName; leave it out, or change spec.type";
    for (path, is_set) in [
        ("spec.clusterIP", !spec.cluster_ip.is_empty()),
        ("spec.clusterIPs", !spec.cluster_ips.is_empty()),
        ("spec.ipFamilies", !spec.ip_families.is_empty()),
        ("spec.ipFamilyPolicy", !spec.ip_family_policy.is_empty()),
    ] {
        if is_set {
            return Err(FieldError::new(path, reason));
        }
    }
    Ok(())
}

fn ports(ports: &mut [admin::ServicePort]) -> Result<Vec<Port>, FieldError> {
    if ports.len() > PORTS_MAX {
        let reason = format!("has {} entries; at most {PORTS_MAX} are allowed", ports.len());
        return Err(FieldError::new("spec.ports", reason));
    }
    let several = ports.len() > 1;
    let (mut names, mut numbers) = (BTreeSet::new(), BTreeSet::new());
    let mut found = Vec::with_capacity(ports.len());
    for (i, port) in ports.iter_mut().enumerate() {
        let path = |field: &str| format!("spec.ports[{i}].{field}");
        let name = port_name(&path("name"), &port.name)?;
        if several && name.is_empty() {
            return Err(FieldError::new(path("name"), "is empty; with several ports, each needs a name"));
        }
        let number = field::port(&path("port"), port.port)?;
        let protocol = protocol(&path("protocol"), &mut port.protocol)?;
        app_protocol(&path("appProtocol"), &port.app_protocol)?;
        if port.target_port.is_empty() {
            port.target_port = number.to_string();
        }
        port_or_name(&path("targetPort"), &port.target_port)?;
        if !names.insert(name.clone()) {
            return Err(FieldError::new(
                path("name"),
                format!("{name:?} is the name of another port too; choose another"),
            ));
        }
        if !numbers.insert((protocol, number)) {
            let reason =
                format!("{number} is there twice for {}; remove one, or change its number", port.protocol);
            return Err(FieldError::new(path("port"), reason));
        }
        port.name.clone_from(&name);
        found.push(Port { name, protocol, number });
    }
    Ok(found)
}

/// A port's name in lower case; it may be empty.
pub(super) fn port_name(path: &str, name: &str) -> Result<String, FieldError> {
    if name.is_empty() { Ok(String::new()) } else { Ok(field::parse::<Label>(path, name)?.to_string()) }
}

/// A port's protocol, set to TCP if it is empty.
pub(super) fn protocol(path: &str, text: &mut String) -> Result<Protocol, FieldError> {
    default_to(text, "TCP");
    match &**text {
        "TCP" => Ok(Protocol::Tcp),
        "UDP" => Ok(Protocol::Udp),
        "SCTP" => Ok(Protocol::Sctp),
        other => {
            let reason = format!("{:?} is not supported; use TCP, UDP or SCTP", field::short(other));
            Err(FieldError::new(path, reason))
        }
    }
}

pub(super) fn app_protocol(path: &str, text: &str) -> Result<(), FieldError> {
    if text.is_empty() {
        return Ok(());
    }
    labels::check_key(text).map_err(|_| {
        let reason = format!(
            "{:?} is not a protocol's name; write for example http or example.com/grpc",
            field::short(text)
        );
        FieldError::new(path, reason)
    })
}

pub(super) fn port_or_name(path: &str, text: &str) -> Result<(), FieldError> {
    let ok = match text.parse::<u16>() {
        Ok(number) => number != 0,
        Err(_) => {
            text.len() <= PORT_NAME_MAX
                && text.parse::<Label>().is_ok()
                && text.bytes().any(|byte| byte.is_ascii_alphabetic())
        }
    };
    if ok {
        return Ok(());
    }
    let reason = format!(
        "{:?} is neither a port, 1 to 65535, nor the name of one, at most {PORT_NAME_MAX} letters, digits and dashes",
        field::short(text)
    );
    Err(FieldError::new(path, reason))
}

fn external_ips(spec: &admin::ServiceSpec) -> Result<Vec<ExternalAddress>, FieldError> {
    if spec.external_ips.len() > EXTERNAL_MAX {
        let reason = format!("has {} entries; at most {EXTERNAL_MAX} are allowed", spec.external_ips.len());
        return Err(FieldError::new("spec.externalIPs", reason));
    }
    let parse = |(i, text): (usize, &String)| {
        host_address(&format!("spec.externalIPs[{i}]"), text).map(ExternalAddress::Ip)
    };
    spec.external_ips.iter().enumerate().map(parse).collect()
}

fn load_balancer(ingress: &[admin::LoadBalancerIngress]) -> Result<Vec<ExternalAddress>, FieldError> {
    let path = "status.loadBalancer.ingress";
    if ingress.len() > EXTERNAL_MAX {
        let reason = format!("has {} entries; at most {EXTERNAL_MAX} are allowed", ingress.len());
        return Err(FieldError::new(path, reason));
    }
    let mut found = Vec::with_capacity(ingress.len());
    for (i, entry) in ingress.iter().enumerate() {
        if entry.ip.is_empty() && entry.hostname.is_empty() {
            return Err(FieldError::new(format!("{path}[{i}]"), "is empty; set ip or hostname"));
        }
        if !entry.ip.is_empty() {
            found.push(ExternalAddress::Ip(host_address(&format!("{path}[{i}].ip"), &entry.ip)?));
        }
        if !entry.hostname.is_empty() {
            dns_name(&format!("{path}[{i}].hostname"), &entry.hostname)?;
            found.push(ExternalAddress::Host(entry.hostname.clone()));
        }
    }
    Ok(found)
}

/// An address that a host can have and others can reach.
pub(super) fn host_address(path: &str, text: &str) -> Result<IpAddr, FieldError> {
    let address: IpAddr =
        field::address(path, text, "IP")?.ok_or_else(|| FieldError::new(path, "is empty"))?;
    let special = match address.to_canonical() {
        IpAddr::V4(v4) => v4.octets()[0] == 0 || v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => is_link_local(v6),
    };
    let canonical = address.to_canonical();
    if special || canonical.is_loopback() || canonical.is_multicast() || canonical.is_unspecified() {
        let reason = "is an unspecified, loopback, link-local or multicast address, which no other host can reach; use another";
        return Err(FieldError::new(path, format!("{address} {reason}")));
    }
    Ok(address)
}

fn is_link_local(address: Ipv6Addr) -> bool {
    address.segments()[0] & 0xffc0 == 0xfe80
}

/// Checks a DNS name of any number of labels.
pub(super) fn dns_name(path: &str, text: &str) -> Result<(), FieldError> {
    let name = text.strip_suffix('.').unwrap_or(text);
    if name.len() <= 253 && name.split('.').all(|label| label.parse::<Label>().is_ok()) {
        return Ok(());
    }
    let reason = format!("{:?} is not a DNS name; write for example db.example.com", field::short(text));
    Err(FieldError::new(path, reason))
}

fn affinity(spec: &mut admin::ServiceSpec) -> Result<(), FieldError> {
    default_to(&mut spec.session_affinity, NONE);
    one_of("spec.sessionAffinity", &spec.session_affinity, &[NONE, "ClientIP"])?;
    let path = "spec.sessionAffinityConfig";
    if spec.session_affinity == NONE {
        if spec.session_affinity_config.as_ref().is_some_and(|config| config.client_ip.is_some()) {
            let reason = "is for session affinity ClientIP alone; set spec.sessionAffinity, or leave it out";
            return Err(FieldError::new(path, reason));
        }
        spec.session_affinity_config = None;
        return Ok(());
    }
    let client = spec.session_affinity_config.get_or_insert_default().client_ip.get_or_insert_default();
    if client.timeout_seconds == 0 {
        client.timeout_seconds = AFFINITY_DEFAULT;
    }
    if client.timeout_seconds > AFFINITY_MAX {
        let reason = format!("{} is out of range; use 1 to {AFFINITY_MAX}", client.timeout_seconds);
        return Err(FieldError::new(format!("{path}.clientIP.timeoutSeconds"), reason));
    }
    Ok(())
}

fn default_to(text: &mut String, default: &str) {
    if text.is_empty() {
        default.clone_into(text);
    }
}

pub(super) fn one_of(path: &str, text: &str, allowed: &[&str]) -> Result<(), FieldError> {
    if allowed.contains(&text) {
        return Ok(());
    }
    let reason = format!("{:?} is not known; use {}", field::short(text), allowed.join(", "));
    Err(FieldError::new(path, reason))
}
