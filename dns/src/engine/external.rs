//! The external zone (specification 12): Services by the addresses that they are reached at from outside.

use std::net::IpAddr;

use hickory_proto::{ProtoError, rr::RecordType};

use super::{
    Engine,
    lookup::{Content, Place, Question, name_server_addresses},
    services::{Part, ports_content},
};
use crate::{
    directory::{Directory, ExternalAddress, Service, ServiceKind},
    records,
};

impl<D: Directory> Engine<D> {
    /// The content of `labels`, right to left, under the external domain.
    pub(super) fn external(
        &self,
        question: &Question<'_>,
        place: &Place,
        labels: &[&str],
    ) -> Result<Content, ProtoError> {
        let (namespace, name, below) = match labels {
            [] => return self.apex(question, place, &[]),
            ["dns"] => return Ok(Content::NoData),
            ["dns", "ns1"] => {
                let addresses = name_server_addresses(&place.zone);
                return Ok(Content::addresses(question, place.ttl(), &addresses));
            }
            [namespace] if self.serves(&place.zone, namespace) => return Ok(Content::NoData),
            [_] => return Ok(Content::NoName),
            [namespace, name, below @ ..] => (namespace, name, below),
        };
        let Some(part) = Part::read(below) else { return Ok(Content::NoName) };
        let Some(service) = self.served(&place.zone, question.viewer, namespace, name) else {
            return Ok(Content::NoName);
        };
        let (addresses, host) = external_addresses(&service);
        let base = records::external_name(&service, &place.origin)?;
        let ttl = place.ttl();
        match part {
            _ if self.shows_endpoints(&service) => self.endpoints(question, ttl, &base, &service, part),
            Part::Host(_) => Ok(Content::NoName),
            _ if !addresses.is_empty() => {
                Ok(ports_content(question, ttl, &service.ports, part, &addresses, &base))
            }
            _ => {
                let Some(host) = host else { return Ok(Content::NoName) };
                if !part.matches_any(&service.ports) {
                    return Ok(Content::NoName);
                }
                if question.record_type != RecordType::SRV {
                    return self.alias(question, ttl, host, true);
                }
                let Some(target) = records::absolute(host) else { return Ok(Content::NoData) };
                // The host name is one candidate a port; its addresses are for whoever asks for it.
                Ok(ports_content(question, ttl, &service.ports, part, &[], &target))
            }
        }
    }

    /// Whether the external zone has a Service by its endpoints.
    pub(super) fn shows_endpoints(&self, service: &Service) -> bool {
        self.options.external_headless && service.kind == ServiceKind::Headless && service.external.is_empty()
    }
}

/// The addresses of a Service from outside and, where it has none, its first host name.
pub(super) fn external_addresses(service: &Service) -> (Vec<IpAddr>, Option<&str>) {
    let (mut addresses, mut host) = (Vec::new(), None);
    for external in &service.external {
        match external {
            ExternalAddress::Ip(address) if !addresses.contains(address) => addresses.push(*address),
            ExternalAddress::Ip(_) => {}
            ExternalAddress::Host(name) => host = host.or(Some(name.as_str())),
        }
    }
    let host = host.filter(|_| addresses.is_empty());
    (addresses, host)
}
