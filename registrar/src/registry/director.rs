//! A director as the index holds it, and all directors of a network.

use std::{collections::BTreeMap, net::SocketAddr, ops::Bound, sync::Arc};

use muster_common::{labels::Labels, name::Label, time::Timestamp};
use muster_proto::{
    admin::{self, DirectorAddress},
    director,
};
use prost::Message as _;
use uuid::Uuid;

use super::{
    field::{self, FieldError},
    view::Advertised,
};
use crate::store::Revision;

/// The most addresses, and the most further TCP ports, of a director.
pub const ADDRESSES_MAX: usize = 4;
/// The longest region and version, in bytes.
pub const TEXT_MAX: usize = 64;
/// The most directors that a device is told of.
pub const TOLD_MAX: usize = 16;

const PENDING: &str = "Pending";
const READY: &str = "Ready";
const DRAINING: &str = "Draining";
const REVOKED: &str = "Revoked";

/// A director of a network. A value is never changed: a change makes a new one.
#[derive(Clone, Debug, PartialEq)]
pub struct Director {
    /// Assigned by the registrar, never reused.
    pub uid: Uuid,
    /// Name of its network.
    pub network: Arc<str>,
    /// Its name, unique among the network's directors.
    pub name: Box<str>,
    /// Where it is reached, best first; empty before it has registered.
    pub endpoints: Box<[SocketAddr]>,
    /// Whether it says of itself that devices should leave it. As `status.phase`, `Draining`, in the store.
    pub leaving: bool,
    /// The message, as it is stored.
    pub stored: admin::Director,
    /// Revision of its last change.
    pub revision: Revision,
}

impl Director {
    /// Whether it is refused, and no device is told of it.
    pub fn is_revoked(&self) -> bool {
        self.stored.spec.as_ref().is_some_and(|spec| spec.revoked)
    }

    /// Whether an operator wants devices to leave it.
    pub fn is_drained(&self) -> bool {
        self.stored.spec.as_ref().is_some_and(|spec| spec.drained)
    }

    /// Whether devices should leave it.
    pub fn is_draining(&self) -> bool {
        self.is_drained() || self.leaving
    }

    /// Whether devices are told of it: it has registered and is not revoked.
    pub fn is_told(&self) -> bool {
        !self.endpoints.is_empty() && !self.is_revoked()
    }

    /// Its labels.
    pub fn labels(&self) -> &Labels {
        static NONE: Labels = Labels::new();
        self.stored.metadata.as_ref().map_or(&NONE, |meta| &meta.labels)
    }

    /// Where devices are told that it is reached.
    pub fn address(&self) -> Option<DirectorAddress> {
        let (first, rest) = self.endpoints.split_first()?;
        let status = self.stored.status.as_ref();
        Some(DirectorAddress {
            name: self.name.to_string(),
            address: first.ip().to_string(),
            port: first.port().into(),
            uid: self.uid.to_string(),
            region: status.map(|status| status.region.clone()).unwrap_or_default(),
            other_endpoints: rest.iter().map(field::to_endpoint).collect(),
            tcp_ports: status.map(|status| status.tcp_ports.clone()).unwrap_or_default(),
            draining: self.is_draining(),
        })
    }

    /// What the registrar has decided for it.
    pub fn config(&self, advertised: &Advertised) -> director::DirectorConfig {
        director::DirectorConfig {
            director_uid: self.uid.to_string(),
            name: self.name.to_string(),
            network: self.network.to_string(),
            registrars: advertised.registrars.clone(),
            drained: self.is_drained(),
        }
    }

    /// As the admin API shows it; a session with that many devices attached to the director may be open.
    pub fn to_proto(&self, attached: Option<u64>) -> admin::Director {
        let mut director = self.stored.clone();
        director.metadata.get_or_insert_default().resource_version = self.revision;
        let status = director.status.get_or_insert_default();
        status.online = attached.is_some();
        status.attached = attached.unwrap_or_default();
        status.phase = match () {
            () if self.is_revoked() => REVOKED,
            () if self.endpoints.is_empty() => PENDING,
            () if self.is_draining() => DRAINING,
            () => READY,
        }
        .to_owned();
        director
    }

    /// As it is stored.
    pub fn encode(&self) -> Vec<u8> {
        self.stored.encode_to_vec()
    }

    /// Reads a stored director.
    ///
    /// # Errors
    /// The field that cannot be used.
    pub fn decode(
        value: &[u8],
        network: &Arc<str>,
        uid: Uuid,
        revision: Revision,
    ) -> Result<Self, FieldError> {
        let stored = admin::Director::decode(value).map_err(|error| FieldError::new("director", error))?;
        Self::check(stored, network, uid, revision)
    }

    /// Checks a director as it is to be stored, or as it was.
    ///
    /// # Errors
    /// The first field that cannot be used.
    pub fn check(
        mut stored: admin::Director,
        network: &Arc<str>,
        uid: Uuid,
        revision: Revision,
    ) -> Result<Self, FieldError> {
        let meta = stored.metadata.get_or_insert_default();
        field::metadata(meta)?;
        let name: Label = field::parse("metadata.name", &meta.name)?;
        name.as_str().clone_into(&mut meta.name);
        meta.namespace.clear();
        meta.network = network.to_string();
        meta.uid = uid.to_string();
        meta.resource_version = 0;
        stored.spec.get_or_insert_default();
        let status = stored.status.get_or_insert_default();
        (status.online, status.attached) = (false, 0);
        let leaving = status.phase == DRAINING;
        status.phase = if leaving { DRAINING.to_owned() } else { String::new() };
        let endpoints = field::endpoints("status.endpoints", &status.endpoints, ADDRESSES_MAX)?;
        if status.tcp_ports.len() > ADDRESSES_MAX {
            let reason =
                format!("has {} entries; at most {ADDRESSES_MAX} are allowed", status.tcp_ports.len());
            return Err(FieldError::new("status.tcp_ports", reason));
        }
        for (i, number) in status.tcp_ports.iter().enumerate() {
            field::port(&format!("status.tcp_ports[{i}]"), *number)?;
        }
        for (path, text) in [("status.region", &status.region), ("status.version", &status.version)] {
            if text.len() > TEXT_MAX {
                return Err(FieldError::new(path, format!("is longer than {TEXT_MAX} bytes")));
            }
        }
        Ok(Self {
            uid,
            network: network.clone(),
            name: name.as_str().into(),
            endpoints,
            leaving,
            stored,
            revision,
        })
    }

    /// A director that has joined, and has yet to register.
    pub(super) fn new(network: &Arc<str>, uid: Uuid, name: &Label, now: Timestamp) -> Self {
        let meta = admin::ObjectMeta {
            name: name.to_string(),
            network: network.to_string(),
            uid: uid.to_string(),
            creation_timestamp: Some(field::to_timestamp(now)),
            ..admin::ObjectMeta::default()
        };
        let stored = admin::Director {
            metadata: Some(meta),
            spec: Some(admin::DirectorSpec::default()),
            status: Some(admin::DirectorStatus::default()),
        };
        Self {
            uid,
            network: network.clone(),
            name: name.as_str().into(),
            endpoints: Box::default(),
            leaving: false,
            stored,
            revision: 0,
        }
    }

    /// The same with `phase` saying whether it wants to be left.
    pub(super) fn set_leaving(&mut self, leaving: bool) {
        self.leaving = leaving;
        let phase = if leaving { DRAINING } else { "" };
        phase.clone_into(&mut self.stored.status.get_or_insert_default().phase);
    }
}

/// The directors of one network.
#[derive(Clone, Debug, Default)]
pub struct Directors {
    by_uid: BTreeMap<Uuid, Arc<Director>>,
    by_name: BTreeMap<Box<str>, Arc<Director>>,
    /// Revision of the last change that devices are told of. That of a deletion is the network's.
    pub revision: Revision,
}

impl Directors {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.by_uid.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.by_uid.is_empty()
    }

    /// The director with this uid.
    pub fn by_uid(&self, uid: Uuid) -> Option<&Arc<Director>> {
        self.by_uid.get(&uid)
    }

    /// The director with this name, in lower case.
    pub fn by_name(&self, name: &str) -> Option<&Arc<Director>> {
        self.by_name.get(name)
    }

    /// All of them, by name.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Director>> {
        self.by_name.values()
    }

    /// Those whose names come after `name`, by name.
    pub fn after<'a>(&'a self, name: &str) -> impl Iterator<Item = &'a Arc<Director>> + use<'a> {
        self.by_name.range::<str, _>((Bound::Excluded(name), Bound::Unbounded)).map(|(_, director)| director)
    }

    /// Whether devices are told of directors that have registered: as soon as there are any, even if all of them are
    /// revoked by now.
    pub fn have_registered(&self) -> bool {
        self.by_uid.values().any(|director| !director.endpoints.is_empty())
    }

    pub(super) fn insert(&mut self, director: &Arc<Director>) -> Option<Arc<Director>> {
        let old = self.remove(director.uid);
        self.by_uid.insert(director.uid, director.clone());
        self.by_name.insert(director.name.clone(), director.clone());
        if old.as_deref().is_none_or(|old| is_told_differently(old, director)) {
            self.revision = self.revision.max(director.revision);
        }
        old
    }

    pub(super) fn remove(&mut self, uid: Uuid) -> Option<Arc<Director>> {
        let old = self.by_uid.remove(&uid)?;
        // Another can have the name only in a store that was changed by hand: leave it there.
        if self.by_name.get(&old.name).is_some_and(|found| Arc::ptr_eq(found, &old)) {
            self.by_name.remove(&old.name);
        }
        Some(old)
    }
}

/// Whether devices, and those that ask DNS, have to be told of a change to a director.
pub fn is_told_differently(old: &Director, new: &Director) -> bool {
    (old.is_told(), old.endpoints.is_empty(), old.address())
        != (new.is_told(), new.endpoints.is_empty(), new.address())
}

/// Whether the director itself has to be told of a change to it.
pub fn is_ordered_differently(old: &Director, new: &Director) -> bool {
    old.is_drained() != new.is_drained()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored() -> admin::Director {
        admin::Director {
            metadata: Some(admin::ObjectMeta { name: "d1".into(), ..Default::default() }),
            spec: None,
            status: Some(admin::DirectorStatus {
                region: "eu".into(),
                endpoints: vec![
                    admin::Endpoint { address: "192.0.2.1".into(), port: 7501 },
                    admin::Endpoint { address: "2001:db8::1".into(), port: 7501 },
                ],
                tcp_ports: vec![443],
                ..Default::default()
            }),
        }
    }

    fn check(stored: admin::Director) -> Result<Director, FieldError> {
        Director::check(stored, &"n".into(), Uuid::from_u128(7), 5)
    }

    #[test]
    fn what_is_stored_comes_back() {
        let mut director = check(stored()).unwrap();
        for leaving in [false, true] {
            director.set_leaving(leaving);
            let back = Director::decode(&director.encode(), &director.network, director.uid, 5).unwrap();
            assert_eq!(back, director);
            assert_eq!(back.is_draining(), leaving);
        }
    }

    #[test]
    fn its_phase_is_told_from_what_is_known() {
        let phase = |stored| check(stored).unwrap().to_proto(Some(3)).status.unwrap();
        let mut director = stored();
        let status = phase(director.clone());
        assert_eq!((&*status.phase, status.online, status.attached), ("Ready", true, 3));
        director.spec = Some(admin::DirectorSpec { drained: true, revoked: false });
        assert_eq!(phase(director.clone()).phase, "Draining");
        assert!(check(director.clone()).unwrap().address().unwrap().draining);
        director.spec = Some(admin::DirectorSpec { drained: true, revoked: true });
        assert_eq!(phase(director.clone()).phase, "Revoked");
        assert!(!check(director).unwrap().is_told());
        let mut fresh = stored();
        fresh.status.as_mut().unwrap().endpoints.clear();
        assert_eq!(phase(fresh.clone()).phase, "Pending");
        assert_eq!(check(fresh).unwrap().address(), None);
    }

    #[test]
    fn devices_are_told_all_its_addresses() {
        let address = check(stored()).unwrap().address().unwrap();
        assert_eq!((&*address.address, address.port, &*address.region), ("192.0.2.1", 7501, "eu"));
        assert_eq!(address.other_endpoints[0].address, "2001:db8::1");
        assert_eq!((address.tcp_ports, address.uid), (vec![443], Uuid::from_u128(7).to_string()));
    }

    #[test]
    fn bad_fields_are_named() {
        type Break = fn(&mut admin::DirectorStatus);
        let cases: [(&str, Break); 5] = [
            ("status.endpoints[0].address", |s| s.endpoints[0].address = "127.0.0.1".into()),
            ("status.endpoints", |s| s.endpoints = vec![s.endpoints[0].clone(); 5]),
            ("status.tcp_ports[0]", |s| s.tcp_ports = vec![65_536]),
            ("status.tcp_ports", |s| s.tcp_ports = vec![443; 5]),
            ("status.region", |s| s.region = "r".repeat(65)),
        ];
        for (path, make_bad) in cases {
            let mut director = stored();
            make_bad(director.status.as_mut().unwrap());
            assert_eq!(check(director).unwrap_err().path, path);
        }
    }
}
