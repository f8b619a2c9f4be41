//! From a name to its place in a zone and what it holds there: the forward zone with apex and devices. Services,
//! `pod` names, external and reverse zones have modules of their own.

use std::{net::IpAddr, sync::Arc};

use hickory_proto::{
    ProtoError,
    rr::{Name, Record, RecordType},
};
use muster_common::name::RESERVED;

use super::{CHAIN_MAX, Engine};
use crate::{
    directory::{Device, Directory, ServiceKind, Viewer, Zone},
    message::{self, Request},
    records,
    reverse::ReverseName,
};

/// What is looked for.
#[derive(Clone, Copy)]
pub(super) struct Question<'a> {
    pub(super) name: &'a Name,
    pub(super) record_type: RecordType,
    pub(super) viewer: &'a Viewer,
    /// How many more CNAMEs are followed.
    pub(super) steps: u8,
}

impl<'a> Question<'a> {
    pub(super) fn new(request: &Request, name: &'a Name, viewer: &'a Viewer) -> Self {
        Self { name, record_type: request.record_type(), viewer, steps: CHAIN_MAX }
    }
}

#[expect(
    clippy::large_enum_variant,
    reason = "it lives for one query, which nearly always finds the large one"
)]
/// Where a name was found to be.
pub(super) enum Found {
    /// In no zone that the viewer may know of.
    Outside,
    /// In a zone that the viewer sees only the apex of.
    Refused,
    /// In a zone, with this content.
    In(Place, Content),
}

/// What a name holds for the type asked for.
pub(super) enum Content {
    Records {
        answers: Vec<Record>,
        additionals: Vec<Record>,
    },
    /// CNAMEs that lead to a name outside the zones. `alone`: they are worth telling even if nobody can be
    /// asked for that name.
    Elsewhere {
        chain: Vec<Record>,
        target: Name,
        alone: bool,
    },
    NoData,
    NoName,
}

impl Content {
    /// `answers` or, if there are none, NODATA.
    pub(super) fn of(answers: Vec<Record>, additionals: Vec<Record>) -> Self {
        if answers.is_empty() { Self::NoData } else { Self::Records { answers, additionals } }
    }

    /// Those of `addresses` that belong to the type asked for.
    pub(super) fn addresses(question: &Question<'_>, ttl: u32, addresses: &[IpAddr]) -> Self {
        let records = typed(addresses, question.record_type);
        Self::of(records.map(|a| records::address(question.name, ttl, a)).collect(), Vec::new())
    }
}

/// A zone, forward, external or reverse, that a name was found to be in.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) zone: Arc<Zone>,
    /// Owner of the zone's SOA, as spelled in the question.
    pub(super) apex: Name,
    /// The network's domain or, in the external zone, its external domain: what server and mailbox are under.
    pub(super) origin: Name,
    /// Whether this is the external zone.
    pub(super) external: bool,
}

impl Place {
    /// The zone's SOA.
    pub(super) fn soa(&self) -> Result<Record, ProtoError> {
        if self.external {
            records::external_soa(&self.apex, &self.origin, &self.zone)
        } else {
            records::soa(&self.apex, &self.origin, &self.zone)
        }
    }

    /// Time to live of the zone's records.
    pub(super) fn ttl(&self) -> u32 {
        if self.external { records::EXTERNAL_TTL } else { self.zone.ttl }
    }
}

impl<D: Directory> Engine<D> {
    /// Finds a name.
    pub(super) fn look(&self, question: &Question<'_>) -> Result<Found, ProtoError> {
        let text = message::plain_name(question.name);
        if let Some(reverse) = ReverseName::parse(&text) {
            return self.look_reverse(question, reverse);
        }
        let Some(zone) = self.directory.zone(&text) else { return Ok(Found::Outside) };
        let Some((left, external)) = within(&zone, &text) else { return Ok(Found::Outside) };
        let labels: Vec<&str> = if left.is_empty() { Vec::new() } else { left.rsplit('.').collect() };
        let depth = question.name.iter().count().saturating_sub(labels.len());
        let origin = question.name.trim_to(depth);
        // Everything that NS tells is told to all: a resolver that follows the delegation asks for it.
        let public = match labels[..] {
            [] => true,
            ["dns", server] => server == if external { "ns1" } else { "ns" },
            _ => false,
        };
        if !public && !sees(question.viewer, &zone) {
            return Ok(Found::Refused);
        }
        let place = Place { zone, apex: origin.clone(), origin, external };
        let content = if external {
            self.external(question, &place, &labels)?
        } else {
            self.forward(question, &place, &labels)?
        };
        Ok(Found::In(place, content))
    }

    /// The content of `labels`, right to left, under the domain.
    fn forward(
        &self,
        question: &Question<'_>,
        place: &Place,
        labels: &[&str],
    ) -> Result<Content, ProtoError> {
        let zone = &*place.zone;
        let addresses = |of: &[IpAddr]| Content::addresses(question, zone.ttl, of);
        Ok(match labels {
            [] => self.apex(question, place, &zone.public_addresses)?,
            ["dns", "ns"] if self.fronting(place)?.is_empty() => addresses(&name_server_addresses(zone)),
            ["dns", "ns"] => Content::NoData,
            ["dns-version"] if question.record_type == RecordType::TXT => {
                Content::of(vec![records::schema_version(question.name)], Vec::new())
            }
            ["svc", labels @ ..] => self.service_name(question, place, labels)?,
            ["pod", labels @ ..] => self.pod_name(question, place, labels),
            [reserved, ..] if RESERVED.contains(reserved) => Content::NoName,
            [label] => match self.directory.device(zone, question.viewer, label) {
                Some(device) => device_content(question, zone, &device)?,
                None => Content::NoName,
            },
            [label, part @ ("private" | "director")] => {
                match self.directory.device(zone, question.viewer, label) {
                    Some(device) if *part == "private" => addresses(&device.private_addresses),
                    Some(device) => addresses(&director_addresses(&device)),
                    None => Content::NoName,
                }
            }
            _ => Content::NoName,
        })
    }

    /// The content of a zone's apex.
    pub(super) fn apex(
        &self,
        question: &Question<'_>,
        place: &Place,
        addresses: &[IpAddr],
    ) -> Result<Content, ProtoError> {
        Ok(match question.record_type {
            RecordType::SOA => Content::of(vec![place.soa()?], Vec::new()),
            RecordType::NS => {
                let (servers, glue) = self.name_servers(place)?;
                Content::of(servers, glue)
            }
            _ => Content::addresses(question, place.ttl(), addresses),
        })
    }

    /// The zone's NS records and the addresses of their targets (specification 11).
    pub(super) fn name_servers(&self, place: &Place) -> Result<(Vec<Record>, Vec<Record>), ProtoError> {
        let mut servers = if place.external { Vec::new() } else { self.fronting(place)? };
        if servers.is_empty() {
            let labels = [if place.external { "ns1" } else { "ns" }, "dns"];
            let name = records::below(&labels, &place.origin)?;
            servers.push((name, name_server_addresses(&place.zone)));
        }
        let ttl = place.ttl();
        let (mut records, mut glue) = (Vec::with_capacity(servers.len()), Vec::new());
        for (name, addresses) in servers {
            glue.extend(addresses.into_iter().map(|address| records::address(&name, ttl, address)));
            records.push(records::name_server(&place.apex, ttl, name));
        }
        Ok((records, glue))
    }

    /// The Services that have an address of the server as an endpoint, by their names and addresses.
    fn fronting(&self, place: &Place) -> Result<Vec<(Name, Vec<IpAddr>)>, ProtoError> {
        let mut servers: Vec<(Name, Vec<IpAddr>)> = Vec::new();
        if !self.options.endpoints {
            return Ok(servers);
        }
        for address in name_server_addresses(&place.zone) {
            for service in self.directory.services_at(&place.zone, &Viewer::Open, address) {
                if !self.serves(&place.zone, service.namespace.as_str()) {
                    continue;
                }
                let Some(endpoint) = service.endpoints.iter().find(|e| e.address == address) else {
                    continue;
                };
                let base = records::service_name(&service, &place.origin)?;
                let (name, addresses) = match &service.kind {
                    ServiceKind::ClusterIp(addresses) => (base, addresses.clone()),
                    ServiceKind::Headless => {
                        (records::below(&[&self.endpoint_label(endpoint)], &base)?, vec![address])
                    }
                    ServiceKind::ExternalName(_) => continue,
                };
                match servers.iter_mut().find(|(known, _)| *known == name) {
                    Some((_, known)) => {
                        known.extend(addresses);
                        known.sort();
                        known.dedup();
                    }
                    None => servers.push((name, addresses)),
                }
            }
        }
        Ok(servers)
    }
}

/// What stands left of the zone's domain or external domain in `name`, whichever is closer to it, and whether it
/// is the latter.
pub(super) fn within<'a>(zone: &Zone, name: &'a str) -> Option<(&'a str, bool)> {
    let inside = zone.domain.relative(name).map(|left| (left, false));
    let external = zone.external_domain.as_ref().and_then(|domain| domain.relative(name));
    let external = external.map(|left| (left, true));
    inside.into_iter().chain(external).min_by_key(|(left, _)| left.len())
}

/// The server's addresses, without loopback, which nobody else reaches.
pub(super) fn name_server_addresses(zone: &Zone) -> Vec<IpAddr> {
    zone.name_server_addresses.iter().copied().filter(|address| !address.is_loopback()).collect()
}

/// A device's own name: the virtual address in Answer; in Additional what else is needed to reach the device.
fn device_content(question: &Question<'_>, zone: &Zone, device: &Device) -> Result<Content, ProtoError> {
    let name = question.name;
    let private = records::below(&["private"], name)?;
    let director = records::below(&["director"], name)?;
    let director_records =
        director_addresses(device).into_iter().map(|a| records::address(&director, zone.ttl, a));
    Ok(match question.record_type {
        RecordType::SVCB => Content::of(
            records::director_service(name, zone.ttl, &director, &device.director),
            director_records.collect(),
        ),
        wanted => {
            let answers: Vec<Record> = typed(&device.virtual_addresses, wanted)
                .map(|a| records::address(name, zone.ttl, a))
                .collect();
            let privates = device.private_addresses.iter().map(|a| records::address(&private, zone.ttl, *a));
            Content::of(answers, privates.chain(director_records).collect())
        }
    })
}

/// Each address of the device's director once.
fn director_addresses(device: &Device) -> Vec<IpAddr> {
    let mut addresses = Vec::with_capacity(device.director.len());
    for address in device.director.iter().map(|director| director.ip()) {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    addresses
}

/// Those of `addresses` that belong into records of type `wanted`.
pub(super) fn typed(addresses: &[IpAddr], wanted: RecordType) -> impl Iterator<Item = IpAddr> {
    addresses.iter().copied().filter(move |address| match wanted {
        RecordType::A => address.is_ipv4(),
        RecordType::AAAA => address.is_ipv6(),
        _ => false,
    })
}

/// Whether `viewer` sees more of `zone` than its apex.
pub(super) fn sees(viewer: &Viewer, zone: &Zone) -> bool {
    match viewer {
        Viewer::Stranger => false,
        Viewer::Open => true,
        Viewer::Member { network, .. } => *network == zone.network,
    }
}
