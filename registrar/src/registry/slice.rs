//! An EndpointSlice as the index holds it, and what makes one valid.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use muster_common::name::Label;
use muster_dns::directory::{Endpoint, Port};
use muster_proto::admin;
use prost::Message as _;
use uuid::Uuid;

use super::{
    field::{self, FieldError},
    named::{self, Keyed},
    service,
};
use crate::store::Revision;

/// The label that names the Service of a slice.
pub const SERVICE_LABEL: &str = "kubernetes.io/service-name";
/// The longest slice as a message, in bytes.
const SIZE_MAX: usize = 224 * 1024;
const ENDPOINTS_MAX: usize = 1000;
const ADDRESSES_MAX: usize = 100;
const PORTS_MAX: usize = 100;
/// The longest name of an object, in bytes (a DNS name).
const NAME_MAX: usize = 253;

/// Endpoints of a Service. A value is never changed: a change makes a new one.
#[derive(Clone, Debug, PartialEq)]
pub struct Slice {
    /// Name of its network.
    pub network: Arc<str>,
    /// Its namespace.
    pub namespace: Label,
    /// Its name: one DNS label or several.
    pub name: Box<str>,
    /// Name of its Service.
    pub service: Option<Label>,
    /// The addresses of its endpoints that are ready, or of which nothing is known, in order.
    pub ready: Vec<Endpoint>,
    /// The message, as it is stored.
    pub stored: admin::EndpointSlice,
    /// Uids of the devices in it, in order, if a Service has selected them; `None` if it was made by hand.
    pub selected: Option<Box<[Uuid]>>,
    /// Revision of its last change.
    pub revision: Revision,
    key: Box<str>,
}

impl Keyed for Slice {
    fn key(&self) -> &str {
        &self.key
    }
}

impl Slice {
    /// Its uid.
    pub fn uid(&self) -> &str {
        self.stored.metadata.as_ref().map_or("", |meta| &meta.uid)
    }

    /// Key of its Service, as [`named::key`] makes it.
    pub fn service_key(&self) -> Option<Box<str>> {
        self.service.as_ref().map(|service| named::key(self.namespace.as_str(), service.as_str()))
    }

    /// Whether all is the same but the revision.
    pub fn is_like(&self, other: &Self) -> bool {
        self.stored == other.stored && self.selected == other.selected
    }

    /// Whether it has not changed between two indexes. Those that are not stored have the revision of what changed them
    /// last, which an index that has just been loaded does not know.
    pub(crate) fn is_unchanged(&self, newer: &Self) -> bool {
        if self.selected.is_some() { self.is_like(newer) } else { self.revision == newer.revision }
    }

    /// As the admin API shows it.
    pub fn to_proto(&self) -> admin::EndpointSlice {
        let mut slice = self.stored.clone();
        slice.metadata.get_or_insert_default().resource_version = self.revision;
        slice
    }

    /// As it is stored.
    pub fn encode(&self) -> Vec<u8> {
        self.stored.encode_to_vec()
    }

    /// Reads a stored slice.
    ///
    /// # Errors
    /// The field that cannot be used.
    pub fn decode(value: &[u8], network: &Arc<str>, revision: Revision) -> Result<Self, FieldError> {
        let stored =
            admin::EndpointSlice::decode(value).map_err(|error| FieldError::new("endpoint slice", error))?;
        Self::check(stored, network, revision)
    }

    /// Checks a slice as an operator sends it, or as it was stored.
    ///
    /// # Errors
    /// The first field that cannot be used.
    pub fn check(
        mut stored: admin::EndpointSlice,
        network: &Arc<str>,
        revision: Revision,
    ) -> Result<Self, FieldError> {
        if stored.encoded_len() > SIZE_MAX {
            let reason = format!(
                "has {} bytes; at most {SIZE_MAX} are allowed: use several slices",
                stored.encoded_len()
            );
            return Err(FieldError::new("endpointSlice", reason));
        }
        let meta = stored.metadata.get_or_insert_default();
        field::metadata(meta)?;
        let namespace = service::namespace(meta)?;
        let name = name(&meta.name)?;
        meta.network = network.to_string();
        meta.namespace = namespace.to_string();
        meta.name = name.to_string();
        meta.resource_version = 0;
        let service = match meta.labels.get(SERVICE_LABEL) {
            None => None,
            Some(text) => Some(field::parse::<Label>(&format!("metadata.labels[{SERVICE_LABEL}]"), text)?),
        };
        let is_v4 = family(&stored.address_type)?;
        let ports = ports(&mut stored.ports)?;
        let ready = endpoints(&stored.endpoints, is_v4, &ports)?;
        let key = named::key(namespace.as_str(), &name);
        let network = network.clone();
        Ok(Self { network, namespace, name, service, ready, stored, selected: None, revision, key })
    }
}

fn name(text: &str) -> Result<Box<str>, FieldError> {
    if text.len() <= NAME_MAX && text.split('.').all(|label| label.parse::<Label>().is_ok()) {
        return Ok(text.to_ascii_lowercase().into());
    }
    let reason = format!(
        "{:?} is not a valid name: use DNS labels, joined by dots, and at most {NAME_MAX} characters",
        field::short(text)
    );
    Err(FieldError::new("metadata.name", reason))
}

fn family(text: &str) -> Result<bool, FieldError> {
    let path = "addressType";
    match text {
        "IPv4" => Ok(true),
        "IPv6" => Ok(false),
        "FQDN" => {
            let reason = "FQDN is not supported, since nothing is known of the addresses; use IPv4 or IPv6, or a \
                          Service of type ExternalName for another name";
            Err(FieldError::new(path, reason))
        }
        "" => Err(FieldError::new(path, "is empty; use IPv4 or IPv6")),
        other => service::one_of(path, other, &["IPv4", "IPv6"]).map(|()| true),
    }
}

fn ports(ports: &mut [admin::EndpointPort]) -> Result<Arc<[Port]>, FieldError> {
    if ports.len() > PORTS_MAX {
        let reason = format!("has {} entries; at most {PORTS_MAX} are allowed", ports.len());
        return Err(FieldError::new("ports", reason));
    }
    let mut names = BTreeSet::new();
    let mut found = Vec::with_capacity(ports.len());
    for (i, port) in ports.iter_mut().enumerate() {
        let path = |field: &str| format!("ports[{i}].{field}");
        let name = service::port_name(&path("name"), &port.name)?;
        let protocol = service::protocol(&path("protocol"), &mut port.protocol)?;
        let number = field::port(&path("port"), port.port)?;
        service::app_protocol(&path("appProtocol"), &port.app_protocol)?;
        if !names.insert(name.clone()) {
            let reason = format!("{name:?} is the name of another port too; choose another");
            return Err(FieldError::new(path("name"), reason));
        }
        port.name.clone_from(&name);
        found.push(Port { name, protocol, number });
    }
    Ok(found.into())
}

fn endpoints(
    endpoints: &[admin::SliceEndpoint],
    is_v4: bool,
    ports: &Arc<[Port]>,
) -> Result<Vec<Endpoint>, FieldError> {
    if endpoints.len() > ENDPOINTS_MAX {
        let reason = format!(
            "has {} entries; at most {ENDPOINTS_MAX} are allowed: use several slices",
            endpoints.len()
        );
        return Err(FieldError::new("endpoints", reason));
    }
    let mut found = Vec::with_capacity(endpoints.len());
    for (i, endpoint) in endpoints.iter().enumerate() {
        let path = format!("endpoints[{i}]");
        let addresses = addresses(&format!("{path}.addresses"), &endpoint.addresses, is_v4)?;
        let hostname = match &*endpoint.hostname {
            "" => None,
            text => Some(field::parse::<Label>(&format!("{path}.hostname"), text)?),
        };
        for (field, text) in [("nodeName", &endpoint.node_name), ("zone", &endpoint.zone)] {
            if text.len() > NAME_MAX {
                let reason = format!("is longer than {NAME_MAX} bytes");
                return Err(FieldError::new(format!("{path}.{field}"), reason));
            }
        }
        let target = endpoint.target_ref.as_ref().filter(|target| matches!(&*target.kind, "Device" | "Pod"));
        let device: Option<Label> = target.and_then(|target| target.name.parse().ok());
        if endpoint.conditions.as_ref().and_then(|conditions| conditions.ready) == Some(false) {
            continue;
        }
        found.extend(addresses.into_iter().map(|address| Endpoint {
            hostname: hostname.clone(),
            device: device.clone(),
            address,
            ports: ports.clone(),
        }));
    }
    Ok(found)
}

fn addresses(path: &str, texts: &[String], is_v4: bool) -> Result<Vec<IpAddr>, FieldError> {
    if texts.is_empty() || texts.len() > ADDRESSES_MAX {
        let reason = format!("has {} entries; 1 to {ADDRESSES_MAX} are allowed", texts.len());
        return Err(FieldError::new(path, reason));
    }
    let parse = |(i, text): (usize, &String)| {
        let path = format!("{path}[{i}]");
        let address = service::host_address(&path, text)?;
        if address.is_ipv4() == is_v4 {
            return Ok(address);
        }
        let family = if is_v4 { "IPv4" } else { "IPv6" };
        let reason =
            format!("{address} is not an {family} address, as addressType says; put it into another slice");
        Err(FieldError::new(path, reason))
    };
    texts.iter().enumerate().map(parse).collect()
}
