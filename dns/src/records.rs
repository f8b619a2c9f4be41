//! Records, built from what the directory tells. Owner names keep the spelling of the question.

use std::net::{IpAddr, SocketAddr};

use hickory_proto::{
    ProtoError,
    rr::{
        Name, RData, Record,
        rdata::{
            A, AAAA, NS, PTR, SOA, SVCB, TXT,
            svcb::{SvcParamKey, SvcParamValue},
        },
    },
};

use crate::directory::Zone;

/// Version of the schema that `dns-version` tells, and how long it may be kept, in seconds.
const SCHEMA_VERSION: (&str, u32) = ("1.1.0", 28_800);
/// The longest time to live of an SOA in a negative answer, in seconds.
const SOA_TTL_MAX: u32 = 300;
/// Refresh, retry and expire of the SOA, in seconds.
const SOA_TIMES: (i32, i32, i32) = (7200, 1800, 86_400);

/// `labels`, left to right, in front of `origin`.
pub(crate) fn below(labels: &[&str], origin: &Name) -> Result<Name, ProtoError> {
    labels.iter().rev().try_fold(origin.clone(), |name, label| name.prepend_label(*label))
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

/// The NS record of `owner`, and the addresses of the name server.
pub(crate) fn name_server(
    owner: &Name,
    origin: &Name,
    zone: &Zone,
) -> Result<(Record, Vec<Record>), ProtoError> {
    let server = below(&["ns", "dns"], origin)?;
    let glue = zone.name_server_addresses.iter().map(|a| address(&server, zone.ttl, *a)).collect();
    Ok((Record::from_rdata(owner.clone(), zone.ttl, RData::NS(NS(server))), glue))
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
