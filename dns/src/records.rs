//! Records, built from what the directory tells. Owner names keep the spelling of the question.

use std::net::{IpAddr, SocketAddr};

use hickory_proto::{
    ProtoError,
    rr::{
        Name, RData, Record,
        rdata::{
            A, AAAA, CNAME, NS, PTR, SOA, SRV, SVCB, TXT,
            svcb::{SvcParamKey, SvcParamValue},
        },
    },
};

use muster_common::name::Domain;

use crate::directory::{Service, Zone};

/// Version of the schema that `dns-version` tells, and how long it may be kept, in seconds.
const SCHEMA_VERSION: (&str, u32) = ("1.1.0", 28_800);
/// Time to live of records in an external zone, in seconds (specification 12).
pub(crate) const EXTERNAL_TTL: u32 = 5;
/// The longest time to live of an SOA in a negative answer, in seconds.
const SOA_TTL_MAX: u32 = 300;
/// Refresh, retry and expire of the SOA, in seconds.
const SOA_TIMES: (i32, i32, i32) = (7200, 1800, 86_400);

/// `labels`, left to right, in front of `origin`.
pub(crate) fn below(labels: &[&str], origin: &Name) -> Result<Name, ProtoError> {
    labels.iter().rev().try_fold(origin.clone(), |name, label| name.prepend_label(label.as_bytes()))
}

/// A or AAAA.
pub(crate) fn address(owner: &Name, ttl: u32, address: IpAddr) -> Record {
    let data = match address {
        IpAddr::V4(v4) => RData::A(A(v4)),
        IpAddr::V6(v6) => RData::AAAA(AAAA(v6)),
    };
    Record::from_rdata(owner.clone(), ttl, data)
}

/// The zone's SOA with owner `owner`; `origin` is the network's domain.
pub(crate) fn soa(owner: &Name, origin: &Name, zone: &Zone) -> Result<Record, ProtoError> {
    let (refresh, retry, expire) = SOA_TIMES;
    let data = SOA::new(
        below(&["ns", "dns"], origin)?,
        below(&["hostmaster"], origin)?,
        zone.serial,
        refresh,
        retry,
        expire,
        zone.ttl,
    );
    Ok(Record::from_rdata(owner.clone(), zone.ttl.min(SOA_TTL_MAX), RData::SOA(data)))
}

/// The SOA of an external zone with owner `owner`; `origin` is the external domain.
pub(crate) fn external_soa(owner: &Name, origin: &Name, zone: &Zone) -> Result<Record, ProtoError> {
    let (refresh, retry, expire) = SOA_TIMES;
    let data = SOA::new(
        below(&["ns1", "dns"], origin)?,
        below(&["hostmaster", "dns"], origin)?,
        zone.external_serial,
        refresh,
        retry,
        expire,
        EXTERNAL_TTL,
    );
    Ok(Record::from_rdata(owner.clone(), EXTERNAL_TTL, RData::SOA(data)))
}

/// NS.
pub(crate) fn name_server(owner: &Name, ttl: u32, server: Name) -> Record {
    Record::from_rdata(owner.clone(), ttl, RData::NS(NS(server)))
}

/// CNAME.
pub(crate) fn alias(owner: &Name, ttl: u32, target: Name) -> Record {
    Record::from_rdata(owner.clone(), ttl, RData::CNAME(CNAME(target)))
}

/// SRV (RFC 2782) of priority 0.
pub(crate) fn service(owner: &Name, ttl: u32, weight: u16, port: u16, target: Name) -> Record {
    Record::from_rdata(owner.clone(), ttl, RData::SRV(SRV::new(0, weight, port, target)))
}

/// The weight of each of `count` SRV records, which share 100 but have no less than 1.
pub(crate) fn weight(count: usize) -> u16 {
    let share = 100_usize.checked_div(count).unwrap_or(100).max(1);
    u16::try_from(share).unwrap_or(1)
}

/// A domain as a name.
pub(crate) fn domain(domain: &Domain) -> Result<Name, ProtoError> {
    Name::from_ascii(format!("{domain}."))
}

/// A text as an absolute name, whether or not it ends in a dot; `None` if it is no name.
pub(crate) fn absolute(text: &str) -> Option<Name> {
    let text = text.strip_suffix('.').unwrap_or(text);
    Name::from_ascii(format!("{text}.")).ok().filter(|name| !name.is_root())
}

/// A Service's name under `origin`.
pub(crate) fn service_name(service: &Service, origin: &Name) -> Result<Name, ProtoError> {
    below(&[service.name.as_str(), service.namespace.as_str(), "svc"], origin)
}

/// A Service's name in the external zone.
pub(crate) fn external_name(service: &Service, origin: &Name) -> Result<Name, ProtoError> {
    below(&[service.name.as_str(), service.namespace.as_str()], origin)
}

/// PTR.
pub(crate) fn pointer(owner: &Name, ttl: u32, target: Name) -> Record {
    Record::from_rdata(owner.clone(), ttl, RData::PTR(PTR(target)))
}

/// The schema version.
pub(crate) fn schema_version(owner: &Name) -> Record {
    let (version, ttl) = SCHEMA_VERSION;
    Record::from_rdata(owner.clone(), ttl, RData::TXT(TXT::new(vec![version.to_owned()])))
}

/// One SVCB record (RFC 9460) per port that `director` has, each pointing at `target`.
pub(crate) fn director_service(
    owner: &Name,
    ttl: u32,
    target: &Name,
    director: &[SocketAddr],
) -> Vec<Record> {
    let mut ports: Vec<u16> = Vec::with_capacity(1);
    for port in director.iter().map(SocketAddr::port) {
        if !ports.contains(&port) {
            ports.push(port);
        }
    }
    ports
        .into_iter()
        .map(|port| {
            let data = SVCB::new(1, target.clone(), vec![(SvcParamKey::Port, SvcParamValue::Port(port))]);
            Record::from_rdata(owner.clone(), ttl, RData::SVCB(data))
        })
        .collect()
}
