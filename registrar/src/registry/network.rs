//! A network as the index holds it, and what makes a network's specification valid.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use muster_common::name::{Domain, Label};
use muster_proto::admin;
use prost::Message as _;

use super::field::{self, FieldError};
use crate::{
    allocation::{NetworkPools, PoolError},
    store::Revision,
};

/// The most public addresses, and the most directors, of a network.
const LIST_MAX: usize = 16;
const TTL_DEFAULT: Duration = Duration::from_secs(5);
const TTL_MAX: Duration = Duration::from_secs(3600);
const QUARANTINE_DEFAULT: Duration = Duration::from_secs(24 * 3600);
const QUARANTINE_MAX: Duration = Duration::from_secs(365 * 24 * 3600);

/// A virtual network. A value is never changed: a change makes a new one.
#[derive(Clone, Debug, PartialEq)]
pub struct Network {
    /// Its name.
    pub name: Arc<str>,
    /// Its name, as a label.
    pub label: Label,
    /// Its domain.
    pub domain: Domain,
    /// Domain of the zone of external addresses.
    pub external_domain: Option<Domain>,
    /// What the apex of the domain answers.
    pub public_addresses: Vec<IpAddr>,
    /// Where virtual addresses and ClusterIPs come from.
    pub pools: NetworkPools,
    /// The directors, best first.
    pub directors: Vec<SocketAddr>,
    /// Time to live of records.
    pub record_ttl: Duration,
    /// For how long a released address has no new owner.
    pub quarantine: Duration,
    /// The message, as it is stored.
    pub stored: admin::Network,
    /// Revision of its last change.
    pub revision: Revision,
}

impl Network {
    /// Its uid.
    pub fn uid(&self) -> &str {
        self.stored.metadata.as_ref().map_or("", |meta| &meta.uid)
    }

    /// As the admin API shows it.
    pub fn to_proto(&self, devices: u64) -> admin::Network {
        let mut network = self.stored.clone();
        if let Some(meta) = &mut network.metadata {
            meta.resource_version = self.revision;
        }
        network.status = Some(admin::NetworkStatus { devices });
        network
    }

    /// As it is stored.
    pub fn encode(&self) -> Vec<u8> {
        self.stored.encode_to_vec()
    }

    /// Reads a stored network.
    ///
    /// # Errors
    /// The field that cannot be used.
    pub fn decode(value: &[u8], revision: Revision) -> Result<Self, FieldError> {
        let stored = admin::Network::decode(value).map_err(|error| FieldError::new("network", error))?;
        Self::check(stored, revision)
    }

    /// Checks a network as an operator sends it, or as it was stored.
    ///
    /// # Errors
    /// The first field that cannot be used.
    pub fn check(mut stored: admin::Network, revision: Revision) -> Result<Self, FieldError> {
        let meta = stored.metadata.get_or_insert_default();
        meta.resource_version = 0;
        field::metadata(meta)?;
        let label: Label = field::parse("metadata.name", &meta.name)?;
        meta.name = label.as_str().to_owned();
        let name = Arc::from(label.as_str());
        stored.status = None;
        let spec = stored.spec.get_or_insert_default();
        let domain: Domain = field::parse("spec.domain", &spec.domain)?;
        spec.domain = domain.as_str().to_owned();
        let external_domain = external_domain(spec, &domain)?;
        let (public_addresses, directors) = (public_addresses(spec)?, directors(spec)?);
        let pools =
            NetworkPools::parse(spec).map_err(|error| FieldError::new(pool_path(spec, &error), error))?;
        let record_ttl = field::duration("spec.record_ttl", spec.record_ttl.as_ref(), TTL_DEFAULT, TTL_MAX)?;
        let quarantine = field::duration(
            "spec.address_quarantine",
            spec.address_quarantine.as_ref(),
            QUARANTINE_DEFAULT,
            QUARANTINE_MAX,
        )?;
        Ok(Self {
            name,
            label,
            domain,
            external_domain,
            public_addresses,
            pools,
            directors,
            record_ttl,
            quarantine,
            stored,
            revision,
        })
    }
}

fn external_domain(spec: &mut admin::NetworkSpec, domain: &Domain) -> Result<Option<Domain>, FieldError> {
    if spec.external_domain.is_empty() {
        return Ok(None);
    }
    let path = "spec.external_domain";
    let external: Domain = field::parse(path, &spec.external_domain)?;
    if external == *domain {
        let reason = "is the network's own domain, which never has external addresses; choose another";
        return Err(FieldError::new(path, reason));
    }
    spec.external_domain = external.as_str().to_owned();
    Ok(Some(external))
}

fn public_addresses(spec: &admin::NetworkSpec) -> Result<Vec<IpAddr>, FieldError> {
    let path = "spec.public_addresses";
    if spec.public_addresses.len() > LIST_MAX {
        return Err(FieldError::new(path, format!("at most {LIST_MAX} are allowed")));
    }
    let parse = |(i, text): (usize, &String)| {
        let path = format!("{path}[{i}]");
        field::address(&path, text, "IP")?.ok_or_else(|| FieldError::new(path, "is empty"))
    };
    spec.public_addresses.iter().enumerate().map(parse).collect()
}

fn directors(spec: &admin::NetworkSpec) -> Result<Vec<SocketAddr>, FieldError> {
    let path = "spec.directors";
    if spec.directors.len() > LIST_MAX {
        return Err(FieldError::new(path, format!("at most {LIST_MAX} are allowed")));
    }
    let parse = |(i, director): (usize, &admin::DirectorAddress)| {
        let path = format!("{path}[{i}]");
        field::parse::<Label>(&format!("{path}.name"), &director.name)?;
        field::director(&path, director)
    };
    spec.directors.iter().enumerate().map(parse).collect()
}

/// Path of the field that is to blame for `error`.
fn pool_path(spec: &admin::NetworkSpec, error: &PoolError) -> String {
    let fields = [
        ("device_pool_v4", &spec.device_pool_v4),
        ("device_pool_v6", &spec.device_pool_v6),
        ("service_pool_v4", &spec.service_pool_v4),
        ("service_pool_v6", &spec.service_pool_v6),
    ];
    match error {
        PoolError::Syntax { kind, .. } | PoolError::Family { kind, .. } => format!("spec.{kind}"),
        PoolError::HostBits { net }
        | PoolError::TooSmall { net }
        | PoolError::TooLarge { net }
        | PoolError::Special { net } => {
            let field = fields.iter().find(|(_, text)| text.parse() == Ok(*net));
            format!("spec.{}", field.map_or("device_pool_v4", |(name, _)| name))
        }
        PoolError::Overlap(_, last) => format!("spec.{}", last.1),
        PoolError::NoDevicePool => "spec.device_pool_v4".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn valid() -> admin::Network {
        let mut spec = admin::NetworkSpec { domain: "net.example".into(), ..Default::default() };
        NetworkPools::with_global_id([1, 2, 3, 4, 5]).write(&mut spec);
        admin::Network {
            metadata: Some(admin::ObjectMeta { name: "n".into(), ..Default::default() }),
            spec: Some(spec),
            status: None,
        }
    }

    #[test]
    fn bad_fields_are_named() {
        type Break = fn(&mut admin::NetworkSpec);
        let cases: [(&str, Break); 12] = [
            ("spec.domain", |s| s.domain = "example".into()),
            ("spec.external_domain", |s| s.external_domain = "example".into()),
            ("spec.external_domain", |s| s.external_domain = "NET.example.".into()),
            ("spec.device_pool_v4", |s| s.device_pool_v4 = "100.64.0.1/11".into()),
            ("spec.device_pool_v4", |s| s.device_pool_v4 = "fd00::/48".into()),
            ("spec.service_pool_v4", |s| s.service_pool_v4 = "100.64.0.0/16".into()),
            ("spec.device_pool_v6", |s| s.device_pool_v6 = "::/0".into()),
            ("spec.public_addresses[0]", |s| s.public_addresses = vec!["x".into()]),
            ("spec.directors[0].port", |s| {
                s.directors = vec![admin::DirectorAddress {
                    name: "d".into(),
                    address: "192.0.2.1".into(),
                    port: 70_000,
                    ..Default::default()
                }];
            }),
            ("spec.record_ttl", |s| {
                s.record_ttl = Some(pbjson_types::Duration { seconds: 3601, nanos: 0 });
            }),
            ("spec.address_quarantine", |s| {
                s.address_quarantine = Some(pbjson_types::Duration { seconds: -1, nanos: 0 });
            }),
            ("spec.device_pool_v4", |s| {
                s.device_pool_v4.clear();
                s.device_pool_v6.clear();
            }),
        ];
        assert!(Network::check(valid(), 0).is_ok());
        for (path, make_bad) in cases {
            let mut network = valid();
            make_bad(network.spec.as_mut().unwrap());
            assert_eq!(Network::check(network, 0).unwrap_err().path, path);
        }
    }
}
