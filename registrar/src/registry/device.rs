//! A device as the index holds it: typed and compact, since there may be a million of them.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;
use muster_common::{labels::Labels, name::Label, time::Timestamp};
use muster_proto::{
    admin::{self, TransportCipher},
    registration,
};
use prost::Message as _;
use uuid::Uuid;

use super::{
    field::{self, FieldError},
    site::{self, Host, Site},
};
use crate::store::Revision;

/// The most private endpoints of a device.
pub const ENDPOINTS_MAX: usize = 16;
/// The most reflexive endpoints of a device.
pub const REFLEXIVE_MAX: usize = 4;
/// The longest agent version, in bytes.
pub const VERSION_MAX: usize = 64;
/// The namespace of devices for which none is named.
pub const DEFAULT_NAMESPACE: &str = "default";

/// The label of a device that says in which zone it is, as Kubernetes' nodes have it.
pub const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// A WireGuard public key.
pub type PublicKey = [u8; 32];

/// A registered host. A value is never changed: a change makes a new one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Assigned by the registrar, never reused.
    pub uid: Uuid,
    /// Name of its network.
    pub network: Arc<str>,
    /// Its name, unique within the network.
    pub name: Box<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Labels and annotations; `None` if there are none.
    pub meta: Option<Box<Meta>>,
    /// Virtual IPv4 address, once allocated.
    pub ipv4: Option<Ipv4Addr>,
    /// Virtual IPv6 address, once allocated.
    pub ipv6: Option<Ipv6Addr>,
    /// Whether an operator chose the IPv4 address.
    pub chosen_ipv4: bool,
    /// Whether an operator chose the IPv6 address.
    pub chosen_ipv6: bool,
    /// Whether it is refused, and unknown to others.
    pub revoked: bool,
    /// WireGuard public key, once registered.
    pub key: Option<PublicKey>,
    /// Private addresses with port, best first.
    pub endpoints: Box<[SocketAddr]>,
    /// How it is reached from outside; `None` while nothing is known.
    pub outside: Option<Box<Outside>>,
    /// What it has to do with hosts without an agent; `None` if nothing.
    pub site: Option<Box<Site>>,
    /// Whether it can receive packets in AES-256-GCM, too.
    pub aes_256_gcm: bool,
    /// Version of its agent.
    pub agent_version: Arc<str>,
    /// When it came into being.
    pub created: Timestamp,
    /// When its certificate expires; `None` before it has joined.
    pub certificate_expiry: Option<Timestamp>,
    /// Revision of its last change.
    pub revision: Revision,
}

/// How a device is reached from outside its own networks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outside {
    /// As directors see it, and what its gateway maps to it, best first.
    pub reflexive: Box<[SocketAddr]>,
    /// Uid of the director that it is reached through, as it says itself. There need not be such a director any more.
    pub home: Option<Uuid>,
    /// The same of the one to use when that is gone.
    pub second: Option<Uuid>,
}

impl Outside {
    /// As a device tells it.
    ///
    /// # Errors
    /// The field that cannot be used.
    pub(crate) fn check(path: &str, told: &registration::Reachability) -> Result<Self, FieldError> {
        let endpoints = format!("{path}.reflexive_endpoints");
        Ok(Self {
            reflexive: field::endpoints(&endpoints, &told.reflexive_endpoints, REFLEXIVE_MAX)?,
            home: uid_of(&format!("{path}.home_director_uid"), &told.home_director_uid, "director")?,
            second: uid_of(&format!("{path}.second_director_uid"), &told.second_director_uid, "director")?,
        })
    }

    /// `None` if there is nothing in it.
    pub(crate) fn known(self) -> Option<Box<Self>> {
        (self != Self::default()).then(|| Box::new(self))
    }
}

/// Reads the uid of a `kind`; empty for none.
pub(super) fn uid_of(path: &str, text: &str, kind: &str) -> Result<Option<Uuid>, FieldError> {
    if text.is_empty() {
        return Ok(None);
    }
    Uuid::try_parse(text).map(Some).map_err(|_| FieldError::new(path, format!("is not a {kind}'s uid")))
}

/// What few devices have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// Labels.
    pub labels: Labels,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
}

// A million devices, five index tables: this is what the registrar's memory consists of.
const _: () = assert!(size_of::<Device>() <= 256);

static NO_LABELS: Labels = Labels::new();

impl Device {
    /// Its labels.
    pub fn labels(&self) -> &Labels {
        self.meta.as_ref().map_or(&NO_LABELS, |meta| &meta.labels)
    }

    /// The zone that it is in, by its label; empty if none.
    pub fn zone(&self) -> &str {
        self.labels().get(ZONE_LABEL).map_or("", |zone| &**zone)
    }

    /// Its virtual addresses.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.ipv4.map(IpAddr::from).into_iter().chain(self.ipv6.map(IpAddr::from))
    }

    /// As it is seen from outside, best first.
    pub fn reflexive(&self) -> &[SocketAddr] {
        self.outside.as_deref().map_or(&[], |outside| &outside.reflexive)
    }

    /// Uid of its home director.
    pub fn home(&self) -> Option<Uuid> {
        self.outside.as_deref()?.home
    }

    /// Uid of its second director.
    pub fn second(&self) -> Option<Uuid> {
        self.outside.as_deref()?.second
    }

    /// Sets labels and annotations.
    pub fn set_meta(&mut self, labels: Labels, annotations: BTreeMap<String, String>) {
        let empty = labels.is_empty() && annotations.is_empty();
        self.meta = (!empty).then(|| Box::new(Meta { labels, annotations }));
    }

    /// Changes what it has to do with hosts without an agent.
    pub(crate) fn change_site(&mut self, change: impl FnOnce(&mut Site)) {
        let mut site = self.site.take().map(|site| *site).unwrap_or_default();
        change(&mut site);
        self.site = site.known();
    }

    /// For a host without an agent: uid of the device that has registered it last.
    pub fn proxied_by(&self) -> Option<Uuid> {
        self.site.as_deref()?.proxied_by
    }

    /// The subnets that it offers, and that an operator lets it carry.
    pub fn may_carry(&self) -> impl Iterator<Item = IpNet> + '_ {
        self.site.iter().flat_map(|site| site.may_carry())
    }

    /// Whether others may know of the host that its agent runs on: that has registered and is not revoked.
    pub fn is_reachable(&self) -> bool {
        self.key.is_some() && !self.revoked
    }

    /// What it can receive packets in beside WireGuard's own cipher, as messages have it.
    pub fn transport_ciphers(&self) -> Vec<i32> {
        self.aes_256_gcm.then_some(TransportCipher::Aes256Gcm.into()).into_iter().collect()
    }

    /// As the admin API shows it, but with the uids of other objects in the place of their names.
    pub fn to_proto(&self, online: bool) -> admin::Device {
        let mut device = self.to_stored();
        if let Some(meta) = &mut device.metadata {
            meta.resource_version = self.revision;
        }
        if let Some(status) = &mut device.status {
            status.online = online;
            status.phase = match (self.revoked, self.key) {
                (true, _) => "Revoked",
                (false, Some(_)) => "Registered",
                (false, None) => "Pending",
            }
            .to_owned();
        }
        device
    }

    /// As it is stored.
    pub fn encode(&self) -> Vec<u8> {
        self.to_stored().encode_to_vec()
    }

    fn to_stored(&self) -> admin::Device {
        let text = |address: Option<String>| address.unwrap_or_default();
        let (ipv4, ipv6) = (text(self.ipv4.map(|a| a.to_string())), text(self.ipv6.map(|a| a.to_string())));
        let chosen = |is: bool, address: &str| if is { address.to_owned() } else { String::new() };
        let meta = self.meta.as_deref().cloned().unwrap_or_default();
        let site = self.site.as_deref().cloned().unwrap_or_default();
        let nets = |nets: &[IpNet]| nets.iter().map(ToString::to_string).collect();
        admin::Device {
            metadata: Some(admin::ObjectMeta {
                name: self.name.to_string(),
                namespace: self.namespace.to_string(),
                uid: self.uid.to_string(),
                network: self.network.to_string(),
                labels: meta.labels,
                annotations: meta.annotations,
                creation_timestamp: Some(field::to_timestamp(self.created)),
                resource_version: 0,
            }),
            spec: Some(admin::DeviceSpec {
                virtual_ipv4: chosen(self.chosen_ipv4, &ipv4),
                virtual_ipv6: chosen(self.chosen_ipv6, &ipv6),
                revoked: self.revoked,
                may_proxy: site.may_proxy,
                subnets: nets(&site.approved),
            }),
            status: Some(admin::DeviceStatus {
                phase: String::new(),
                virtual_ipv4: ipv4,
                virtual_ipv6: ipv6,
                private_endpoints: self.endpoints.iter().map(field::to_endpoint).collect(),
                reflexive_endpoint: self.reflexive().first().map(field::to_endpoint),
                public_key: self.key.map(|key| key.to_vec()).unwrap_or_default(),
                agent_version: self.agent_version.to_string(),
                online: false,
                certificate_expiry: self.certificate_expiry.map(field::to_timestamp),
                transport_ciphers: self.transport_ciphers(),
                reflexive_endpoints: self.reflexive().iter().map(field::to_endpoint).collect(),
                home_director: text(self.home().map(|uid| uid.to_string())),
                second_director: text(self.second().map(|uid| uid.to_string())),
                proxied_hosts: site.hosts.iter().map(Host::to_proto).collect(),
                offered_subnets: nets(&site.offered),
                active_subnets: Vec::new(),
                proxied_by: text(site.proxied_by.map(|uid| uid.to_string())),
                lan_address: String::new(),
            }),
        }
    }

    /// Reads a stored device. `intern` makes equal texts share their memory.
    ///
    /// # Errors
    /// The field that cannot be used.
    pub fn decode(
        value: &[u8],
        network: &Arc<str>,
        uid: Uuid,
        revision: Revision,
        intern: &mut dyn FnMut(&str) -> Arc<str>,
    ) -> Result<Self, FieldError> {
        let stored = admin::Device::decode(value).map_err(|error| FieldError::new("device", error))?;
        let meta = stored.metadata.unwrap_or_default();
        let (spec, status) = (stored.spec.unwrap_or_default(), stored.status.unwrap_or_default());
        let name: Label = field::parse("metadata.name", &meta.name)?;
        let key = match status.public_key.len() {
            0 => None,
            _ => Some(public_key("status.public_key", &status.public_key)?),
        };
        // Registrars have written the first one alone before.
        let reflexive = match &*status.reflexive_endpoints {
            [] => status.reflexive_endpoint.as_slice(),
            all => all,
        };
        let outside = Outside {
            reflexive: field::endpoints("status.reflexive_endpoints", reflexive, REFLEXIVE_MAX)?,
            home: uid_of("status.home_director", &status.home_director, "director")?,
            second: uid_of("status.second_director", &status.second_director, "director")?,
        };
        let site = Site {
            may_proxy: spec.may_proxy,
            approved: site::subnets("spec.subnets", &spec.subnets)?,
            hosts: site::hosts("status.proxied_hosts", &status.proxied_hosts)?,
            offered: site::subnets("status.offered_subnets", &status.offered_subnets)?,
            proxied_by: uid_of("status.proxied_by", &status.proxied_by, "device")?,
        };
        let mut device = Self {
            uid,
            network: network.clone(),
            name: name.as_str().into(),
            namespace: intern(&meta.namespace),
            meta: None,
            ipv4: field::address("status.virtual_ipv4", &status.virtual_ipv4, "IPv4")?,
            ipv6: field::address("status.virtual_ipv6", &status.virtual_ipv6, "IPv6")?,
            chosen_ipv4: !spec.virtual_ipv4.is_empty(),
            chosen_ipv6: !spec.virtual_ipv6.is_empty(),
            revoked: spec.revoked,
            key,
            endpoints: field::endpoints(
                "status.private_endpoints",
                &status.private_endpoints,
                ENDPOINTS_MAX,
            )?,
            outside: outside.known(),
            site: site.known(),
            aes_256_gcm: status.transport_ciphers().any(|cipher| cipher == TransportCipher::Aes256Gcm),
            agent_version: intern(&status.agent_version),
            created: meta.creation_timestamp.as_ref().map(field::timestamp).unwrap_or_default(),
            certificate_expiry: status.certificate_expiry.as_ref().map(field::timestamp),
            revision,
        };
        device.set_meta(meta.labels, meta.annotations);
        Ok(device)
    }
}

/// Reads a WireGuard public key.
///
/// # Errors
/// Unless it is 32 octets, not all zero.
pub(crate) fn public_key(path: &str, octets: &[u8]) -> Result<PublicKey, FieldError> {
    match PublicKey::try_from(octets) {
        Ok(key) if key != [0; 32] => Ok(key),
        Ok(_) => Err(FieldError::new(path, "is all zero: send the device's WireGuard public key")),
        Err(_) => {
            let reason = format!("has {} octets; a WireGuard public key has 32", octets.len());
            Err(FieldError::new(path, reason))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stored_comes_back() {
        let mut device = Device {
            uid: Uuid::from_u128(7),
            network: "n".into(),
            name: "web".into(),
            namespace: "default".into(),
            meta: None,
            ipv4: Some([100, 64, 1, 0].into()),
            ipv6: Some("fd00::7".parse().unwrap()),
            chosen_ipv4: true,
            chosen_ipv6: false,
            revoked: true,
            key: Some([3; 32]),
            endpoints: [("192.0.2.1".parse::<IpAddr>().unwrap(), 51820).into()].into(),
            outside: Some(Box::new(Outside {
                reflexive: ["[2001:db8::1]:7".parse().unwrap(), "192.0.2.7:7".parse().unwrap()].into(),
                home: Some(Uuid::from_u128(8)),
                second: None,
            })),
            site: Some(Box::new(Site {
                may_proxy: true,
                approved: ["10.0.0.0/8".parse().unwrap()].into(),
                hosts: [Host { name: "tv".into(), lan_address: [192, 168, 7, 8].into() }].into(),
                offered: ["192.168.7.0/24".parse().unwrap(), "fd07::/64".parse().unwrap()].into(),
                proxied_by: Some(Uuid::from_u128(9)),
            })),
            aes_256_gcm: true,
            agent_version: "0.1.0".into(),
            created: field::timestamp(&pbjson_types::Timestamp { seconds: 5, nanos: 0 }),
            certificate_expiry: Some(field::timestamp(&pbjson_types::Timestamp { seconds: 9, nanos: 0 })),
            revision: 12,
        };
        device.set_meta([("role".to_owned(), "web".to_owned())].into(), BTreeMap::new());
        let back = Device::decode(&device.encode(), &device.network, device.uid, 12, &mut |text| text.into());
        assert_eq!(back.unwrap(), device);
    }

    #[test]
    fn ciphers_that_are_not_known_count_for_nothing() {
        let decode = |transport_ciphers| {
            let stored = admin::Device {
                metadata: Some(admin::ObjectMeta { name: "a".into(), ..Default::default() }),
                status: Some(admin::DeviceStatus { transport_ciphers, ..Default::default() }),
                ..Default::default()
            };
            let value = stored.encode_to_vec();
            Device::decode(&value, &"n".into(), Uuid::nil(), 1, &mut |text| text.into()).unwrap()
        };
        assert_eq!(decode(vec![0, 7, 1, 1]).transport_ciphers(), [1]);
        // As stored by a registrar, or for an agent, that knows of none.
        for list in [vec![], vec![0, 7]] {
            let device = decode(list);
            assert!(!device.aes_256_gcm && device.transport_ciphers().is_empty());
        }
    }

    #[test]
    fn what_does_not_decode_is_named() {
        let mut intern = |text: &str| Arc::from(text);
        let mut decode = |value: &[u8]| Device::decode(value, &"n".into(), Uuid::nil(), 1, &mut intern);
        assert!(decode(b"\xff\xff").is_err());
        let stored = admin::Device {
            metadata: Some(admin::ObjectMeta { name: "a".into(), ..Default::default() }),
            status: Some(admin::DeviceStatus { virtual_ipv4: "fd00::1".into(), ..Default::default() }),
            ..Default::default()
        };
        let error = decode(&stored.encode_to_vec()).unwrap_err();
        assert_eq!(error.path, "status.virtual_ipv4");
    }
}
