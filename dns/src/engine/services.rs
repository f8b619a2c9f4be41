//! Names under `svc` (specification 1, 2, 4, 9): namespaces, Services, their ports and endpoints.

use std::{net::IpAddr, sync::Arc};

use hickory_proto::{
    ProtoError,
    rr::{Name, Record, RecordType},
};

use super::{
    Engine,
    lookup::{Content, Place, Question},
};
use crate::{
    directory::{Directory, Port, Protocol, Service, ServiceKind, Viewer, Zone},
    records,
};

/// Which part of a Service a name means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part<'a> {
    /// The Service itself.
    Whole,
    /// Its endpoints with this label.
    Host(&'a str),
    /// Its ports with this name and protocol; what is empty matches every one.
    Port { name: &'a str, protocol: &'a str },
}

impl<'a> Part<'a> {
    /// Reads the labels, right to left, below a Service.
    pub(super) fn read(below: &[&'a str]) -> Option<Self> {
        match below {
            [] => Some(Self::Whole),
            [host] => Some(Self::Host(host)),
            [protocol, name] => Some(Self::Port {
                name: name.strip_prefix('_').unwrap_or(name),
                protocol: protocol.strip_prefix('_').unwrap_or(protocol),
            }),
            _ => None,
        }
    }

    /// Whether `port` is meant.
    pub(super) fn matches(self, port: &Port) -> bool {
        match self {
            Self::Whole | Self::Host(_) => true,
            Self::Port { name, protocol } => {
                (name.is_empty() || name == port.name)
                    && (protocol.is_empty() || protocol == protocol_label(port.protocol))
            }
        }
    }

    /// Whether something with these ports is meant.
    pub(super) fn matches_any(self, ports: &[Port]) -> bool {
        match self {
            Self::Port { name, protocol } if ports.is_empty() => name.is_empty() && protocol.is_empty(),
            Self::Port { .. } => ports.iter().any(|port| self.matches(port)),
            _ => true,
        }
    }
}

/// The protocol as in a name, without the underscore.
pub fn protocol_label(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    }
}

impl<D: Directory> Engine<D> {
    /// Whether `namespace` exists, and is exposed.
    pub(super) fn serves(&self, zone: &Zone, namespace: &str) -> bool {
        self.options.namespaces.as_ref().is_none_or(|exposed| exposed.contains(namespace))
            && self.directory.namespace(zone, namespace)
    }

    /// The Service called `name` in `namespace`, if it is served.
    pub(super) fn served(
        &self,
        zone: &Zone,
        viewer: &Viewer,
        namespace: &str,
        name: &str,
    ) -> Option<Arc<Service>> {
        if self.serves(zone, namespace) {
            self.directory.service(zone, viewer, namespace, name)
        } else {
            None
        }
    }

    /// Whether a Service does not exist because nothing stands behind its cluster IP (specification 4).
    pub(super) fn hides(&self, service: &Service) -> bool {
        self.options.ignore_empty_services
            && matches!(service.kind, ServiceKind::ClusterIp(_))
            && service.endpoints.is_empty()
    }

    /// The content of `labels`, right to left, under `svc`.
    pub(super) fn service_name(
        &self,
        question: &Question<'_>,
        place: &Place,
        labels: &[&str],
    ) -> Result<Content, ProtoError> {
        let (namespace, name, below) = match labels {
            [] => return Ok(Content::NoData),
            [namespace] if self.serves(&place.zone, namespace) => return Ok(Content::NoData),
            [_] => return Ok(Content::NoName),
            [namespace, name, below @ ..] => (namespace, name, below),
        };
        let Some(part) = Part::read(below) else { return Ok(Content::NoName) };
        let Some(service) = self.served(&place.zone, question.viewer, namespace, name) else {
            return Ok(Content::NoName);
        };
        let base = records::service_name(&service, &place.origin)?;
        match (&service.kind, part) {
            (ServiceKind::ExternalName(target), Part::Whole) => {
                self.alias(question, place.ttl(), target, false)
            }
            (ServiceKind::ExternalName(_), _) => Ok(Content::NoName),
            (ServiceKind::Headless, _) | (_, Part::Host(_)) => {
                self.endpoints(question, place.ttl(), &base, &service, part)
            }
            _ if self.hides(&service) => Ok(Content::NoName),
            (ServiceKind::ClusterIp(addresses), _) => {
                Ok(ports_content(question, place.ttl(), &service.ports, part, addresses, &base))
            }
        }
    }
}

/// What the Service's `addresses` and those of its `ports` that `part` means answer; SRV points at `target`.
pub(super) fn ports_content(
    question: &Question<'_>,
    ttl: u32,
    ports: &[Port],
    part: Part<'_>,
    addresses: &[IpAddr],
    target: &Name,
) -> Content {
    if !part.matches_any(ports) {
        return Content::NoName;
    }
    if question.record_type != RecordType::SRV {
        return Content::addresses(question, ttl, addresses);
    }
    let meant: Vec<&Port> = ports.iter().filter(|port| part.matches(port)).collect();
    let weight = records::weight(meant.len().saturating_mul(addresses.len().max(1)));
    let mut answers: Vec<Record> = Vec::with_capacity(meant.len());
    for port in meant {
        let record = records::service(question.name, ttl, weight, port.number, target.clone());
        if !answers.contains(&record) {
            answers.push(record);
        }
    }
    let glue = addresses.iter().map(|address| records::address(target, ttl, *address));
    Content::of(answers, glue.collect())
}
