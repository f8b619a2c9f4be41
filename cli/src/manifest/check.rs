//! What can be seen to be wrong with Services and EndpointSlices without asking the registrar: fields that contradict
//! each other, and objects that do.

use std::{collections::BTreeMap, net::IpAddr};

use muster_proto::admin::{EndpointSlice, Service};

use super::{Manifest, ManifestError, kubernetes::Wrong};
use crate::resource::{Key, Kind};

/// Most endpoints in an EndpointSlice, and most addresses of an endpoint, in Kubernetes.
const ENDPOINTS_MAX: usize = 1_000;
const ADDRESSES_MAX: usize = 100;

/// Checks that the fields of a Service fit each other.
pub fn service(service: &Service) -> Result<(), Wrong> {
    let spec = service.spec.clone().unwrap_or_default();
    let wrong = |field: String, reason: String| Err((field, reason));
    let (mut names, mut numbers) = (BTreeMap::new(), BTreeMap::new());
    for (i, port) in spec.ports.iter().enumerate() {
        let at = |field: &str| format!("spec.ports[{i}].{field}");
        if port.port == 0 {
            return wrong(at("port"), "missing; write a number from 1 to 65535".into());
        }
        if port.name.is_empty() && spec.ports.len() > 1 {
            return wrong(at("name"), "missing; each of several ports needs a name".into());
        }
        if let Some(other) = names.insert(port.name.clone(), i) {
            return wrong(
                at("name"),
                format!("{:?} is the name of spec.ports[{other}], too; choose another", port.name),
            );
        }
        let protocol = if port.protocol.is_empty() { "TCP" } else { &port.protocol };
        if let Some(other) = numbers.insert((protocol.to_owned(), port.port), i) {
            let reason = format!("{}/{protocol} is that of spec.ports[{other}], too; remove one", port.port);
            return wrong(at("port"), reason);
        }
    }
    let headless = cluster_ips(service).iter().any(|ip| ip == "None");
    if spec.ports.is_empty() && !headless && spec.r#type != "ExternalName" {
        let reason = "missing; write at least one port, or clusterIP: None for a headless Service";
        return wrong("spec.ports".into(), reason.into());
    }
    if spec.r#type == "ExternalName" {
        if !is_host_name(&spec.external_name) {
            let reason = match spec.external_name.as_str() {
                "" => "missing; write the host name that the Service stands for".into(),
                name => format!("{name:?} is not a host name, such as db.example.com"),
            };
            return wrong("spec.externalName".into(), reason);
        }
        if let Some(ip) = cluster_ips(service).into_iter().find(|ip| ip != "None") {
            let reason = format!("a Service of type ExternalName has no ClusterIP; take {ip} out");
            return wrong("spec.clusterIP".into(), reason);
        }
    }
    let (first, all) = (&spec.cluster_ip, &spec.cluster_ips);
    if let Some(leading) = all.first().filter(|ip| !first.is_empty() && *ip != first) {
        return wrong(
            "spec.clusterIPs[0]".into(),
            format!("{leading} is not spec.clusterIP, which is {first}"),
        );
    }
    let families: Vec<_> =
        all.iter().filter_map(|ip| ip.parse::<IpAddr>().ok()).map(|ip| ip.is_ipv6()).collect();
    let several = all.len() > 1;
    if all.len() > 2 || (several && (families.len() < all.len() || families.first() == families.get(1))) {
        return wrong("spec.clusterIPs".into(), "there can be one address of IPv4 and one of IPv6".into());
    }
    let families = &spec.ip_families;
    if families.len() > 2 || (families.len() == 2 && families.first() == families.get(1)) {
        return wrong("spec.ipFamilies".into(), "there can be IPv4 and IPv6, each once".into());
    }
    if headless && ["NodePort", "LoadBalancer"].contains(&spec.r#type.as_str()) {
        let reason = format!("a Service of type {} has an address; take None out", spec.r#type);
        return wrong("spec.clusterIP".into(), reason);
    }
    Ok(())
}

/// Checks that the fields of an EndpointSlice fit each other.
pub(super) fn endpoint_slice(slice: &EndpointSlice) -> Result<(), Wrong> {
    let wrong = |field: String, reason: String| Err((field, reason));
    if slice.address_type.is_empty() {
        return wrong("addressType".into(), "missing; write IPv4 or IPv6".into());
    }
    if slice.endpoints.len() > ENDPOINTS_MAX {
        let reason = format!(
            "{} endpoints are too many; write several slices of {ENDPOINTS_MAX}",
            slice.endpoints.len()
        );
        return wrong("endpoints".into(), reason);
    }
    let ipv6 = slice.address_type == "IPv6";
    for (i, endpoint) in slice.endpoints.iter().enumerate() {
        if !(1..=ADDRESSES_MAX).contains(&endpoint.addresses.len()) {
            let reason = format!("an endpoint has 1 to {ADDRESSES_MAX} addresses");
            return wrong(format!("endpoints[{i}].addresses"), reason);
        }
        for (j, address) in endpoint.addresses.iter().enumerate() {
            if address.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv6() == ipv6) {
                continue;
            }
            let reason = format!(
                "{address:?} is not of addressType {}; addresses of the other family go into a slice of their own",
                slice.address_type
            );
            return wrong(format!("endpoints[{i}].addresses[{j}]"), reason);
        }
    }
    let mut names = BTreeMap::new();
    for (i, port) in slice.ports.iter().enumerate() {
        if port.port == 0 {
            return wrong(format!("ports[{i}].port"), "missing; write a number from 1 to 65535".into());
        }
        if let Some(other) = names.insert(&port.name, i) {
            let reason = format!("{:?} is the name of ports[{other}], too; choose another", port.name);
            return wrong(format!("ports[{i}].name"), reason);
        }
    }
    Ok(())
}

fn is_host_name(text: &str) -> bool {
    let text = text.strip_suffix('.').unwrap_or(text);
    let label = |label: &str| label.parse::<muster_common::name::Label>().is_ok();
    text.len() <= 253 && text.split('.').all(label)
}

/// The addresses that a Service asks for, or None.
pub(super) fn cluster_ips(service: &Service) -> Vec<String> {
    let spec = service.spec.clone().unwrap_or_default();
    let mut ips = spec.cluster_ips;
    if !ips.contains(&spec.cluster_ip) {
        ips.insert(0, spec.cluster_ip);
    }
    ips.retain(|ip| !ip.is_empty());
    ips
}

/// A manifest, and the object that it is about.
#[derive(Clone, Copy, Debug)]
pub struct Member<'a> {
    /// The manifest.
    pub manifest: &'a Manifest,
    /// With network and namespace filled in.
    pub key: &'a Key,
}

/// Checks that no two manifests are about the same object or ask for the same address.
pub fn duplicates<'a>(members: impl IntoIterator<Item = Member<'a>>) -> Result<(), ManifestError> {
    let (mut objects, mut addresses) = (BTreeMap::new(), BTreeMap::new());
    for Member { manifest, key } in members {
        // A token without a name is always a new one.
        if key.name.is_empty() {
            continue;
        }
        if let Some(first) = objects.insert((manifest.kind, key), manifest) {
            let reason =
                format!("{}/{} is in {} already; remove one", manifest.kind, key.name, first.position());
            return Err(manifest.error("metadata.name", reason));
        }
        if manifest.kind != Kind::Service {
            continue;
        }
        for ip in cluster_ips(&manifest.object()?).iter().filter_map(|ip| ip.parse::<IpAddr>().ok()) {
            if let Some((first, name)) = addresses.insert((&key.network, ip), (manifest, &key.name)) {
                let reason = format!(
                    "{ip} is that of service/{name} in {}, too; choose another, or leave it out",
                    first.position()
                );
                return Err(manifest.error("spec.clusterIP", reason));
            }
        }
    }
    Ok(())
}
