//! Tests of the registry's core against the memory store, and a world to run them in.

mod admin;
mod devices;
mod directors;
mod namespaces;
mod random;
mod readiness;
mod selected;
mod services;
mod shell;
mod sites;
mod virtual_services;

use std::time::Duration;

use muster_common::{time::Timestamp, tls::SpkiHash};
use muster_proto::{admin as proto, storage::Claim};
use prost::Message as _;
use uuid::Uuid;

use super::{
    Device, Index,
    device::Outside,
    keys,
    plan::{
        self, AdminError, Outcome,
        director::DirectorError,
        enroll::{EnrollError, Enrolled, Enrollment},
        register::{DeviceError, Registration},
    },
    token::Joiner,
};
use crate::{
    store::{KeyRange, TxnOutcome, memory::MemoryStore},
    token::JoinToken,
};

/// A store with registrars on it, each of which sees changes only when it is told to catch up or runs into them.
pub(crate) struct World {
    pub(crate) store: MemoryStore,
    pub(crate) indexes: Vec<Index>,
    pub(crate) now: Timestamp,
    next_uid: u128,
}

impl World {
    pub(crate) fn new(registrars: usize) -> Self {
        let store = MemoryStore::new();
        let now = Timestamp::from_epoch(Duration::from_secs(1_800_000_000));
        let mut world = Self { store, indexes: Vec::new(), now, next_uid: 1 };
        world.indexes = (0..registrars).map(|_| world.load()).collect();
        world
    }

    /// With a network `n` of few addresses.
    pub(crate) fn with_network(registrars: usize, pool_v4: &str) -> Self {
        let mut world = Self::new(registrars);
        world.create_network(&network("n", "n.example", pool_v4)).unwrap();
        (0..registrars).for_each(|registrar| world.catch_up(registrar));
        world
    }

    /// With a network `n` that has pools for Services.
    pub(crate) fn with_services(registrars: usize) -> Self {
        let mut world = Self::new(registrars);
        world.create_network(&service_network()).unwrap();
        (0..registrars).for_each(|registrar| world.catch_up(registrar));
        world
    }

    pub(crate) fn create_namespace(&mut self, name: &str) -> Result<proto::Namespace, AdminError> {
        let namespace = proto::Namespace { metadata: Some(meta("n", name)), status: None };
        let (uid, now) = (self.uid(), self.now);
        self.commit(0, |index, _| plan::namespace::create(index, &namespace, uid, now))
    }

    pub(crate) fn create_service(
        &mut self,
        registrar: usize,
        service: &proto::Service,
    ) -> Result<proto::Service, AdminError> {
        let (uid, now) = (self.uid(), self.now);
        self.commit(registrar, |index, number| {
            plan::service::create(index, service, uid, plan::service::Attempt { number, now })
        })
    }

    pub(crate) fn update_service(
        &mut self,
        registrar: usize,
        service: &proto::Service,
        paths: &[&str],
    ) -> Result<proto::Service, AdminError> {
        let (mask, now) = (mask(paths), self.now);
        self.commit(registrar, |index, number| {
            plan::service::update(index, service, Some(&mask), plan::service::Attempt { number, now })
        })
    }

    pub(crate) fn delete_service(&mut self, registrar: usize, name: &str) -> Result<(), AdminError> {
        let now = self.now;
        let mut version = 0;
        while let Some(revision) =
            self.commit(registrar, |index, _| plan::service::delete(index, "n", "", name, version, now))?
        {
            version = revision;
        }
        Ok(())
    }

    pub(crate) fn create_slice(
        &mut self,
        slice: &proto::EndpointSlice,
    ) -> Result<proto::EndpointSlice, AdminError> {
        let (uid, now) = (self.uid(), self.now);
        self.commit(0, |index, _| plan::slice::create(index, slice, uid, now))
    }

    pub(crate) fn load(&self) -> Index {
        let mut index = Index::new();
        let revision = self.store.range_sync(&KeyRange::all(), None, 1).unwrap().revision;
        for range in keys::loaded() {
            let page = self.store.range_sync(&range, Some(revision), usize::MAX).unwrap();
            assert!(index.load(&page.kvs, self.now).is_empty());
        }
        index.loaded(revision);
        index
    }

    pub(crate) fn restart(&mut self, registrar: usize) {
        self.indexes[registrar] = self.load();
    }

    pub(crate) fn catch_up(&mut self, registrar: usize) {
        let index = &mut self.indexes[registrar];
        let changes = self.store.changes_sync(&KeyRange::all(), index.revision() + 1).unwrap();
        for batch in &changes.batches {
            assert!(index.apply(batch, self.now).bad.is_empty());
        }
    }

    pub(crate) fn uid(&mut self) -> Uuid {
        self.next_uid += 1;
        Uuid::from_u128(self.next_uid)
    }

    /// What the shell does, in one thread.
    pub(crate) fn commit<R, E>(
        &mut self,
        registrar: usize,
        mut plan: impl FnMut(&mut Index, u32) -> Result<Outcome<R>, E>,
    ) -> Result<R, E> {
        let mut fresh = false;
        for attempt in 0..100 {
            let plan = match plan(&mut self.indexes[registrar], attempt) {
                Ok(Outcome::Write(plan)) => plan,
                Ok(Outcome::Done(reply)) if fresh => return Ok(reply),
                Err(refusal) if fresh => return Err(refusal),
                Ok(Outcome::Done(_)) | Err(_) => {
                    self.catch_up(registrar);
                    fresh = true;
                    continue;
                }
            };
            let outcome = self.store.apply_txn(&plan.txn).unwrap();
            let committed = matches!(outcome, TxnOutcome::Committed(_));
            // What is committed takes the place of its reservations when the index catches up.
            if !committed {
                plan.reservations.iter().for_each(|held| self.indexes[registrar].cancel(held));
            }
            self.catch_up(registrar);
            if committed {
                return Ok(plan.reply);
            }
        }
        panic!("no plan was ever accepted");
    }

    pub(crate) fn create_network(&mut self, network: &proto::Network) -> Result<String, AdminError> {
        let (uid, now) = (self.uid(), self.now);
        self.commit(0, |index, _| plan::network::create(index, network, uid, [1, 2, 3, 4, 5], now))
    }

    pub(crate) fn create_token(&mut self, name: &str, spec: proto::TokenSpec) -> JoinToken {
        let secret = JoinToken::with_id(name.parse().unwrap(), &mut rand::rng());
        let token = proto::Token { metadata: Some(meta("n", "")), spec: Some(spec), status: None };
        let (uid, now) = (self.uid(), self.now);
        self.commit(0, |index, _| plan::token::create(index, &token, &secret, uid, now)).unwrap();
        secret
    }

    pub(crate) fn reusable_token(&mut self) -> JoinToken {
        self.create_token("reusable", proto::TokenSpec { reusable: true, ..Default::default() })
    }

    pub(crate) fn enroll(
        &mut self,
        registrar: usize,
        token: &JoinToken,
        name: &str,
        key: &SpkiHash,
    ) -> Result<Enrolled, EnrollError> {
        let (uid, now, mut claim) = (self.uid(), self.now, None::<Claim>);
        loop {
            let enrolled = self.commit(registrar, |index, _| {
                let claim = claim.as_ref();
                let certificate_expiry = now + Duration::from_secs(1000);
                plan::enroll::plan(
                    index,
                    &Enrollment { token, key, name, uid, certificate_expiry, now, claim },
                )
            });
            match enrolled {
                Err(EnrollError::NameTaken { joiner, network, name }) if claim.is_none() => {
                    let key = match joiner {
                        Joiner::Device => keys::device_name(&network, &name),
                        Joiner::Director => keys::director_name(&network, &name),
                    };
                    let range = KeyRange::key(key);
                    let kvs = self.store.range_sync(&range, None, 1).unwrap().kvs;
                    claim =
                        Some(kvs.first().map(|kv| Claim::decode(&*kv.value).unwrap()).unwrap_or_default());
                }
                other => return other,
            }
        }
    }

    /// Enrolls with a key of its own.
    pub(crate) fn join(&mut self, token: &JoinToken, name: &str) -> Uuid {
        self.enroll(0, token, name, &key_hash(name)).unwrap().uid
    }

    pub(crate) fn register(&mut self, registrar: usize, uid: Uuid, key: u8) -> Result<(), DeviceError> {
        let endpoints = [([192, 0, 2, 1], 1000 + u16::from(key)).into()];
        let now = self.now;
        self.commit(registrar, |index, attempt| {
            let registration = Registration {
                before: None,
                key: [key; 32],
                endpoints: &endpoints,
                outside: None,
                hosts: &[],
                subnets: &[],
                aes_256_gcm: has_aes(key),
                agent_version: "1",
                attempt,
                now,
            };
            plan::register::register(index, "n", uid, &registration)
        })
    }

    /// A token with which any number of directors join.
    pub(crate) fn director_token(&mut self) -> JoinToken {
        let spec = proto::TokenSpec { reusable: true, party: "director".into(), ..Default::default() };
        self.create_token("directors", spec)
    }

    /// A director that has registered at `192.0.2.<number>`.
    pub(crate) fn director(&mut self, token: &JoinToken, name: &str, number: u8) -> Uuid {
        let uid = self.join(token, name);
        self.register_director(0, uid, number).unwrap();
        uid
    }

    pub(crate) fn register_director(
        &mut self,
        registrar: usize,
        uid: Uuid,
        number: u8,
    ) -> Result<(), DirectorError> {
        let endpoints = [([192, 0, 2, number], 7501).into()];
        self.commit(registrar, |index, _| {
            let registration = plan::director::Registration {
                region: "eu",
                endpoints: &endpoints,
                tcp_ports: &[443],
                version: "1",
            };
            plan::director::register(index, "n", uid, &registration)
        })
    }

    /// Changes a director as an operator does.
    pub(crate) fn update_director(
        &mut self,
        registrar: usize,
        name: &str,
        spec: proto::DirectorSpec,
    ) -> Result<Uuid, AdminError> {
        let wanted = proto::Director { metadata: Some(meta("n", name)), spec: Some(spec), status: None };
        let mask = mask(&["spec.revoked", "spec.drained"]);
        self.commit(registrar, |index, _| plan::director::update(index, &wanted, Some(&mask)))
    }

    pub(crate) fn delete_director(&mut self, registrar: usize, name: &str) -> Result<(), AdminError> {
        self.commit(registrar, |index, _| plan::director::delete(index, "n", name, 0))
    }

    /// A device tells how it is reached from outside.
    pub(crate) fn set_outside(&mut self, uid: Uuid, outside: &Outside) -> Result<(), DeviceError> {
        let endpoints = [([192, 0, 2, 1], 1001).into()];
        self.commit(0, |index, _| plan::register::endpoints(index, "n", uid, &endpoints, Some(outside)))
    }

    pub(crate) fn device(&self, registrar: usize, uid: Uuid) -> Option<&Device> {
        self.indexes[registrar].device("n", uid).map(|device| &**device)
    }

    pub(crate) fn create_device(&mut self, name: &str, v4: &str) -> Result<Uuid, AdminError> {
        let device = device(name, v4);
        let (uid, now) = (self.uid(), self.now);
        self.commit(0, |index, _| plan::device::create(index, &device, uid, now))
    }

    pub(crate) fn delete_device(&mut self, registrar: usize, name: &str) -> Result<(), AdminError> {
        let now = self.now;
        self.commit(registrar, |index, _| plan::device::delete(index, "n", name, 0, now))
    }

    pub(crate) fn revoke(&mut self, registrar: usize, name: &str, revoked: bool) -> Result<Uuid, AdminError> {
        let mut wanted = device(name, "");
        wanted.spec.as_mut().unwrap().revoked = revoked;
        let mask = mask(&["spec.revoked"]);
        self.commit(registrar, |index, _| plan::device::update(index, &wanted, Some(&mask)))
    }
}

pub(crate) fn meta(network: &str, name: &str) -> proto::ObjectMeta {
    proto::ObjectMeta { network: network.into(), name: name.into(), ..Default::default() }
}

pub(crate) fn network(name: &str, domain: &str, pool_v4: &str) -> proto::Network {
    proto::Network {
        metadata: Some(proto::ObjectMeta { name: name.into(), ..Default::default() }),
        spec: Some(proto::NetworkSpec {
            domain: domain.into(),
            device_pool_v4: pool_v4.into(),
            ..Default::default()
        }),
        status: None,
    }
}

pub(crate) fn service_network() -> proto::Network {
    let mut network = network("n", "n.example", "10.0.0.0/24");
    let spec = network.spec.as_mut().unwrap();
    spec.service_pool_v4 = "10.1.0.0/27".into();
    spec.service_pool_v6 = "fd00:1::/120".into();
    network
}

/// A Service of type ClusterIP with the port `http`, 80.
pub(crate) fn service(name: &str) -> proto::Service {
    let port = proto::ServicePort { name: "http".into(), port: 80, ..Default::default() };
    proto::Service {
        metadata: Some(meta("n", name)),
        spec: Some(proto::ServiceSpec { ports: vec![port], ..Default::default() }),
        status: None,
    }
}

/// A slice of `service` with the port `http`, 8080, and IPv4 addresses.
pub(crate) fn slice(name: &str, service: &str, addresses: &[&str]) -> proto::EndpointSlice {
    let mut meta = meta("n", name);
    meta.labels.insert("kubernetes.io/service-name".into(), service.into());
    let endpoint = |address: &&str| proto::SliceEndpoint {
        addresses: vec![(*address).to_owned()],
        ..Default::default()
    };
    proto::EndpointSlice {
        metadata: Some(meta),
        address_type: "IPv4".into(),
        endpoints: addresses.iter().map(endpoint).collect(),
        ports: vec![proto::EndpointPort { name: "http".into(), port: 8080, ..Default::default() }],
    }
}

pub(crate) fn device(name: &str, v4: &str) -> proto::Device {
    proto::Device {
        metadata: Some(meta("n", name)),
        spec: Some(proto::DeviceSpec { virtual_ipv4: v4.into(), ..Default::default() }),
        status: None,
    }
}

/// Whether the device that registers with this key has AES.
pub(crate) const fn has_aes(key: u8) -> bool {
    key.is_multiple_of(2)
}

pub(crate) fn key_hash(text: &str) -> SpkiHash {
    SpkiHash::of_spki(text.as_bytes())
}

pub(crate) fn mask(paths: &[&str]) -> pbjson_types::FieldMask {
    pbjson_types::FieldMask { paths: paths.iter().map(|path| (*path).to_owned()).collect() }
}
