//! The authoritative engine: a query in, a response out, from a [`Directory`]; no I/O, no clock, no state.
//! What it answers is the table of the design's DNS section; what it denies and how, the specification's.

use std::net::IpAddr;

use hickory_proto::{
    ProtoError,
    op::ResponseCode,
    rr::{Name, Record, RecordType},
};
use muster_common::name::RESERVED;

use crate::{
    directory::{Device, Directory, Viewer, Zone},
    message::{self, Parsed, Request, Response, Transport},
    records,
    reverse::{self, ReverseName},
};

/// A stranger's UDP response is at most so many times as large as its query, as on the wire, so that forged
/// source addresses gain nothing (the limit of RFC 9000, 8.1).
const AMPLIFICATION: usize = 3;
/// Octets that IPv4 and UDP put around a datagram, the least there is.
const DATAGRAM_OVERHEAD: usize = 28;

/// What the engine knows of a query beside its text.
#[derive(Clone, Debug)]
pub struct QueryContext {
    /// Who asks.
    pub viewer: Viewer,
    /// How the query came.
    pub transport: Transport,
}

/// What came of a query.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// There is no response to send.
    Silence,
    /// A response has been written.
    Response {
        /// Its code.
        code: ResponseCode,
        /// The type that was asked for, if that could be read.
        record_type: Option<RecordType>,
    },
}

/// The engine over a directory.
#[derive(Clone, Debug)]
pub struct Engine<D> {
    directory: D,
}

/// What a name holds for the type asked for.
enum Content {
    Records { answers: Vec<Record>, additionals: Vec<Record> },
    NoData,
    NoName,
}

impl Content {
    /// `answers` or, if there are none, NODATA.
    fn of(answers: Vec<Record>, additionals: Vec<Record>) -> Self {
        if answers.is_empty() { Self::NoData } else { Self::Records { answers, additionals } }
    }
}

/// A zone, forward or reverse, that a name was found to be in.
struct Place<'a> {
    zone: &'a Zone,
    /// Owner of the zone's SOA, as spelled in the question.
    apex: Name,
    /// The network's domain: for a forward zone the same as `apex`.
    origin: Name,
}

impl<D: Directory> Engine<D> {
    /// An engine that answers from `directory`.
    pub fn new(directory: D) -> Self {
        Self { directory }
    }

    /// Answers `query`, writing the response over `out`, which is left empty if there is none to send.
    pub fn answer(&self, query: &[u8], context: &QueryContext, out: &mut Vec<u8>) -> Outcome {
        out.clear();
        let (response, max_size) = match message::parse(query) {
            Parsed::Silence => return Outcome::Silence,
            Parsed::Rejected(response) => (response, message::UDP_MINIMUM),
            Parsed::Request(request) => {
                let response = self
                    .respond(&request, &context.viewer)
                    .unwrap_or_else(|_| request.response(ResponseCode::ServFail));
                (response, request.max_size(context.transport))
            }
        };
        let max_size = match (&context.viewer, context.transport) {
            (Viewer::Stranger, Transport::Udp) => max_size.min(stranger_limit(query.len())),
            _ => max_size,
        };
        let code = response.metadata.response_code;
        let record_type = response.question.as_ref().map(|question| question.query_type());
        match response.encode(max_size, out) {
            Ok(()) => Outcome::Response { code, record_type },
            Err(error) => {
                tracing::debug!(%error, "cannot encode a response");
                out.clear();
                Outcome::Silence
            }
        }
    }

    fn respond(&self, request: &Request, viewer: &Viewer) -> Result<Response, ProtoError> {
        let name = &request.question.name;
        let text = message::plain_name(name);
        // Zone transfer (RFC 5936) is not offered.
        if matches!(request.record_type(), RecordType::AXFR | RecordType::IXFR) {
            return Ok(request.response(ResponseCode::Refused));
        }
        if let Some(reverse) = ReverseName::parse(&text) {
            return self.respond_reverse(request, viewer, reverse);
        }
        let Some(zone) = self.directory.zone(&text) else { return Ok(self.outside(request)) };
        let Some(left) = zone.domain.relative(&text) else { return Ok(self.outside(request)) };
        let labels: Vec<&str> = if left.is_empty() { Vec::new() } else { left.rsplit('.').collect() };
        let depth = name.iter().count().saturating_sub(labels.len());
        let origin = name.trim_to(depth);
        let place = Place { zone: &zone, apex: origin.clone(), origin };
        // Everything that NS tells is told to all: a resolver that follows the delegation asks for it.
        let public = matches!(labels[..], [] | ["dns", "ns"]);
        if !public && !sees(viewer, &zone) {
            return Ok(request.response(ResponseCode::Refused));
        }
        let content = self.forward(request, viewer, &place, &labels)?;
        self.finish(request, &place, content)
    }

    /// The content of `labels`, right to left, under the domain.
    fn forward(
        &self,
        request: &Request,
        viewer: &Viewer,
        place: &Place<'_>,
        labels: &[&str],
    ) -> Result<Content, ProtoError> {
        let (zone, name) = (place.zone, &request.question.name);
        let addresses = |of: &[IpAddr]| {
            let answers = typed(of, request.record_type()).map(|a| records::address(name, zone.ttl, a));
            Content::of(answers.collect(), Vec::new())
        };
        Ok(match labels {
            [] => self.apex(request, place, &zone.public_addresses)?,
            ["dns", "ns"] => addresses(&zone.name_server_addresses),
            ["dns-version"] if request.record_type() == RecordType::TXT => {
                Content::of(vec![records::schema_version(name)], Vec::new())
            }
            ["svc" | "pod"] => Content::NoData,
            [reserved, ..] if RESERVED.contains(reserved) => Content::NoName,
            [label] => match self.directory.device(zone, viewer, label) {
                Some(device) => device_content(request, zone, &device)?,
                None => Content::NoName,
            },
            [label, part @ ("private" | "director")] => match self.directory.device(zone, viewer, label) {
                Some(device) if *part == "private" => addresses(&device.private_addresses),
                Some(device) => addresses(&director_addresses(&device)),
                None => Content::NoName,
            },
            _ => Content::NoName,
        })
    }

    /// The content of a zone's apex.
    fn apex(
        &self,
        request: &Request,
        place: &Place<'_>,
        addresses: &[IpAddr],
    ) -> Result<Content, ProtoError> {
        let (zone, name) = (place.zone, &request.question.name);
        Ok(match request.record_type() {
            RecordType::SOA => Content::of(vec![records::soa(name, &place.origin, zone)?], Vec::new()),
            RecordType::NS => {
                let (server, glue) = records::name_server(name, &place.origin, zone)?;
                Content::of(vec![server], glue)
            }
            wanted => Content::of(
                typed(addresses, wanted).map(|a| records::address(name, zone.ttl, a)).collect(),
                Vec::new(),
            ),
        })
    }

    fn respond_reverse(
        &self,
        request: &Request,
        viewer: &Viewer,
        reverse: ReverseName,
    ) -> Result<Response, ProtoError> {
        let zone = match viewer {
            Viewer::Stranger => None,
            _ => self.directory.reverse_zone(viewer, reverse.prefix).filter(|zone| sees(viewer, zone)),
        };
        let Some(zone) = zone else { return Ok(self.outside(request)) };
        let Some(pool) = zone.pools.iter().find(|pool| pool.contains(&reverse.prefix)) else {
            return Ok(self.outside(request));
        };
        let name = &request.question.name;
        let depth = reverse::zone_labels(*pool);
        let origin = Name::from_ascii(format!("{}.", zone.domain))?;
        let place = Place { zone: &zone, apex: name.trim_to(usize::from(depth)), origin };
        let is_apex = name.iter().count() == usize::from(depth);
        let content = if reverse.is_address() && request.record_type() == RecordType::PTR {
            match self.directory.device_at(&zone, viewer, reverse.prefix.addr()) {
                Some(device) => {
                    let target = records::below(&[device.as_str()], &place.origin)?;
                    Content::of(vec![records::pointer(name, zone.ttl, target)], Vec::new())
                }
                None => Content::NoName,
            }
        } else if is_apex && !reverse.is_address() {
            self.apex(request, &place, &[])?
        } else {
            Content::NoName
        };
        self.finish(request, &place, content)
    }

    fn finish(&self, request: &Request, place: &Place<'_>, content: Content) -> Result<Response, ProtoError> {
        let code = match content {
            Content::NoName if !self.directory.is_loaded() => ResponseCode::ServFail,
            Content::NoName => ResponseCode::NXDomain,
            _ => ResponseCode::NoError,
        };
        let mut response = request.response(code);
        response.metadata.authoritative = true;
        match content {
            Content::Records { answers, additionals } => {
                response.answers = answers;
                response.additionals = additionals;
            }
            Content::NoData | Content::NoName => {
                response.authorities.push(records::soa(&place.apex, &place.origin, place.zone)?);
            }
        }
        Ok(response)
    }

    /// The response to a name in no zone that the viewer may know of.
    fn outside(&self, request: &Request) -> Response {
        let loaded = self.directory.is_loaded();
        request.response(if loaded { ResponseCode::Refused } else { ResponseCode::ServFail })
    }
}

/// A device's own name: the virtual address in Answer; in Additional what else is needed to reach the device.
fn device_content(request: &Request, zone: &Zone, device: &Device) -> Result<Content, ProtoError> {
    let name = &request.question.name;
    let private = records::below(&["private"], name)?;
    let director = records::below(&["director"], name)?;
    let director_records =
        director_addresses(device).into_iter().map(|a| records::address(&director, zone.ttl, a));
    Ok(match request.record_type() {
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
fn typed(addresses: &[IpAddr], wanted: RecordType) -> impl Iterator<Item = IpAddr> {
    addresses.iter().copied().filter(move |address| match wanted {
        RecordType::A => address.is_ipv4(),
        RecordType::AAAA => address.is_ipv6(),
        _ => false,
    })
}

/// Whether `viewer` sees more of `zone` than its apex.
fn sees(viewer: &Viewer, zone: &Zone) -> bool {
    match viewer {
        Viewer::Stranger => false,
        Viewer::Open => true,
        Viewer::Member { network, .. } => *network == zone.network,
    }
}

fn stranger_limit(query: usize) -> u16 {
    let limit = (query + DATAGRAM_OVERHEAD).saturating_mul(AMPLIFICATION).saturating_sub(DATAGRAM_OVERHEAD);
    u16::try_from(limit).unwrap_or(u16::MAX)
}
