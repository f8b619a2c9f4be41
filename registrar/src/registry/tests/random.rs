//! Random sequences of everything that devices and operators do, over two registrars of which each may be far behind,
//! and restarts, against a model that is as simple as can be: never two owners of a name, a key or an address, and
//! never an address again before its quarantine is over.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use muster_proto::storage::StoredAddress;
use proptest::prelude::*;

use super::*;
use crate::registry::{Director, keys::Key};

const QUARANTINE: u64 = 24 * 3600;
const DEVICE_POOL: &str = "10.0.0.0/29";
const SERVICE_POOL: &str = "10.0.1.0/29";

#[derive(Clone, Debug)]
enum Step {
    Enroll { registrar: usize, name: usize },
    Register { registrar: usize, name: usize, key: u8 },
    Deregister { registrar: usize, name: usize },
    Delete { registrar: usize, name: usize },
    Create { name: usize, address: u8 },
    Revoke { registrar: usize, name: usize, revoked: bool },
    Sweep { registrar: usize },
    Restart { registrar: usize },
    CatchUp { registrar: usize },
    Wait { hours: u64 },
    CreateService { registrar: usize, name: usize, address: u8 },
    SetServiceType { registrar: usize, name: usize, external: bool },
    DeleteService { registrar: usize, name: usize },
    EnrollDirector { registrar: usize, name: usize },
    RegisterDirector { registrar: usize, name: usize, number: u8 },
    DrainDirector { registrar: usize, name: usize, revoked: bool, drained: bool },
    DeleteDirector { registrar: usize, name: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let (registrar, name) = (0..2_usize, 0..6_usize);
    prop_oneof![
        4 => (registrar.clone(), name.clone()).prop_map(|(registrar, name)| Step::Enroll { registrar, name }),
        6 => (registrar.clone(), name.clone(), 1..5_u8)
            .prop_map(|(registrar, name, key)| Step::Register { registrar, name, key }),
        2 => (registrar.clone(), name.clone()).prop_map(|(registrar, name)| Step::Deregister { registrar, name }),
        2 => (registrar.clone(), name.clone()).prop_map(|(registrar, name)| Step::Delete { registrar, name }),
        1 => (name.clone(), 0..9_u8).prop_map(|(name, address)| Step::Create { name, address }),
        1 => (registrar.clone(), name, any::<bool>())
            .prop_map(|(registrar, name, revoked)| Step::Revoke { registrar, name, revoked }),
        1 => registrar.clone().prop_map(|registrar| Step::Sweep { registrar }),
        1 => registrar.clone().prop_map(|registrar| Step::Restart { registrar }),
        2 => registrar.clone().prop_map(|registrar| Step::CatchUp { registrar }),
        3 => (registrar.clone(), 0..4_usize, 0..9_u8)
            .prop_map(|(registrar, name, address)| Step::CreateService { registrar, name, address }),
        2 => (registrar.clone(), 0..4_usize, any::<bool>())
            .prop_map(|(registrar, name, external)| Step::SetServiceType { registrar, name, external }),
        2 => (registrar.clone(), 0..4_usize).prop_map(|(registrar, name)| Step::DeleteService { registrar, name }),
        3 => (registrar.clone(), 0..3_usize).prop_map(|(registrar, name)| Step::EnrollDirector { registrar, name }),
        3 => (registrar.clone(), 0..3_usize, 1..4_u8)
            .prop_map(|(registrar, name, number)| Step::RegisterDirector { registrar, name, number }),
        1 => (registrar.clone(), 0..3_usize, any::<bool>(), any::<bool>()).prop_map(
            |(registrar, name, revoked, drained)| Step::DrainDirector { registrar, name, revoked, drained }
        ),
        2 => (registrar.clone(), 0..3_usize).prop_map(|(registrar, name)| Step::DeleteDirector { registrar, name }),
        2 => (1..30_u64).prop_map(|hours| Step::Wait { hours }),
    ]
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Known {
    name: String,
    key: Option<u8>,
    aes: bool,
    addresses: Vec<IpAddr>,
    revoked: bool,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct KnownDirector {
    name: String,
    /// Last octet of its address.
    number: Option<u8>,
    revoked: bool,
    drained: bool,
}

/// What must be true, as the replies tell it.
#[derive(Default)]
struct Model {
    devices: BTreeMap<Uuid, Known>,
    /// ClusterIPs of Services by name.
    services: BTreeMap<String, Vec<IpAddr>>,
    released: BTreeMap<IpAddr, Timestamp>,
    directors: BTreeMap<Uuid, KnownDirector>,
}

impl Model {
    fn by_name(&self, name: &str) -> Option<Uuid> {
        self.devices.iter().find(|(_, known)| known.name == name).map(|(uid, _)| *uid)
    }

    fn director(&self, name: &str) -> Option<Uuid> {
        self.directors.iter().find(|(_, known)| known.name == name).map(|(uid, _)| *uid)
    }

    fn remove(&mut self, uid: Uuid, now: Timestamp) {
        let known = self.devices.remove(&uid).unwrap();
        self.released.extend(known.addresses.into_iter().map(|address| (address, now)));
    }

    /// A Service is as it was acknowledged: its new addresses are free ones, and those that it has lost rest.
    fn service(&mut self, name: &str, service: &proto::Service, now: Timestamp) {
        let texts = &service.spec.as_ref().unwrap().cluster_ips;
        let addresses: Vec<IpAddr> = texts.iter().map(|text| text.parse().unwrap()).collect();
        let old = self.services.insert(name.to_owned(), addresses.clone()).unwrap_or_default();
        for address in addresses.iter().filter(|address| !old.contains(address)) {
            if let Some(at) = self.released.remove(address) {
                assert!(at + Duration::from_secs(QUARANTINE) <= now, "{address} is in quarantine");
            }
        }
        let lost = old.into_iter().filter(|address| !addresses.contains(address));
        self.released.extend(lost.map(|address| (address, now)));
    }

    /// Whether no ClusterIP is left.
    fn is_full(&self, now: Timestamp) -> bool {
        let pool: ipnet::IpNet = SERVICE_POOL.parse().unwrap();
        self.services.values().flatten().count() + self.resting(pool, now) >= 6
    }

    /// How many addresses of a pool are in quarantine.
    fn resting(&self, pool: ipnet::IpNet, now: Timestamp) -> usize {
        let until = |at: Timestamp| at + Duration::from_secs(QUARANTINE);
        self.released.iter().filter(|(address, at)| pool.contains(*address) && until(**at) > now).count()
    }

    /// `uid` has got `addresses`: they are those that it had, or free ones.
    fn got(&mut self, uid: Uuid, addresses: Vec<IpAddr>, now: Timestamp) {
        let known = self.devices.get_mut(&uid).unwrap();
        if !known.addresses.is_empty() {
            assert_eq!(known.addresses, addresses, "the same device keeps its addresses");
            return;
        }
        for address in &addresses {
            if let Some(at) = self.released.remove(address) {
                assert!(at + Duration::from_secs(QUARANTINE) <= now, "{address} is in quarantine");
            }
        }
        known.addresses = addresses;
    }
}

fn run(steps: &[Step]) {
    let mut world = World::new(2);
    let mut wanted = network("n", "n.example", DEVICE_POOL);
    wanted.spec.as_mut().unwrap().service_pool_v4 = SERVICE_POOL.into();
    world.create_network(&wanted).unwrap();
    world.catch_up(1);
    let spec = proto::TokenSpec {
        reusable: true,
        expires_at: Some(pbjson_types::Timestamp { seconds: 2_000_000_000, nanos: 0 }),
        ..Default::default()
    };
    let token = world.create_token("t", spec.clone());
    let director_spec = proto::TokenSpec { party: "director".into(), ..spec.clone() };
    let director_token = world.create_token("directors", director_spec);
    world.catch_up(1);
    let mut model = Model::default();
    let names = ["a", "b", "c", "d", "e", "f"];
    for (number, step) in steps.iter().enumerate() {
        let now = world.now;
        match *step {
            Step::Enroll { registrar, name } => {
                let known = model.by_name(names[name]);
                // A new key each time, so that nothing is a repetition.
                match world.enroll(registrar, &token, names[name], &key_hash(&number.to_string())) {
                    Ok(enrolled) => {
                        assert!(known.is_none_or(|uid| uid == enrolled.uid), "two devices of one name");
                        let entry = model.devices.entry(enrolled.uid).or_default();
                        entry.name = names[name].to_owned();
                    }
                    Err(_) => assert!(known.is_some(), "refused a free name"),
                }
            }
            Step::Register { registrar, name, key } => {
                let Some(uid) = model.by_name(names[name]) else { continue };
                let owner =
                    model.devices.iter().find(|(_, known)| known.key == Some(key)).map(|(uid, _)| *uid);
                match world.register(registrar, uid, key) {
                    Ok(()) => {
                        assert!(owner.is_none_or(|owner| owner == uid), "two owners of one key");
                        assert!(!model.devices[&uid].revoked, "a revoked device has registered");
                        let known = model.devices.get_mut(&uid).unwrap();
                        (known.key, known.aes) = (Some(key), has_aes(key));
                        // As the store has it, whatever this registrar has seen.
                        let stored = world.load();
                        model.got(uid, stored.device("n", uid).unwrap().addresses().collect(), now);
                    }
                    Err(DeviceError::KeyTaken) => assert!(owner.is_some_and(|owner| owner != uid)),
                    Err(DeviceError::Revoked) => assert!(model.devices[&uid].revoked),
                    Err(error @ (DeviceError::Gone | DeviceError::Superseded)) => panic!("{error}"),
                    Err(DeviceError::Allocation(_)) => {
                        let used = model.devices.values().flat_map(|known| &known.addresses).count();
                        let pool: ipnet::IpNet = DEVICE_POOL.parse().unwrap();
                        let quarantined = model.resting(pool, now);
                        assert!(used + quarantined >= 6);
                    }
                }
            }
            Step::Deregister { registrar, name } => {
                let Some(uid) = model.by_name(names[name]) else { continue };
                if world
                    .commit(registrar, |index, _| plan::register::deregister(index, "n", uid, now))
                    .is_ok()
                {
                    model.remove(uid, now);
                }
            }
            Step::Delete { registrar, name } => match world.delete_device(registrar, names[name]) {
                Ok(()) => model.remove(model.by_name(names[name]).unwrap(), now),
                Err(_) => assert!(model.by_name(names[name]).is_none()),
            },
            Step::Create { name, address } => {
                let text = if address == 0 { String::new() } else { format!("10.0.0.{}", address - 1) };
                if let Ok(uid) = world.create_device(names[name], &text) {
                    assert!(model.by_name(names[name]).is_none(), "two devices of one name");
                    let known = Known { name: names[name].to_owned(), ..Known::default() };
                    assert_eq!(model.devices.insert(uid, known), None);
                    let addresses = world.device(0, uid).unwrap().addresses().collect();
                    model.got(uid, addresses, now);
                }
            }
            Step::Revoke { registrar, name, revoked } => {
                if let Ok(uid) = world.revoke(registrar, names[name], revoked) {
                    model.devices.get_mut(&uid).unwrap().revoked = revoked;
                }
            }
            Step::Sweep { registrar } => {
                if let Some(txn) = plan::sweep::addresses(&world.indexes[registrar], now) {
                    world.store.apply_txn(&txn).unwrap();
                }
            }
            Step::Restart { registrar } => world.restart(registrar),
            Step::CatchUp { registrar } => world.catch_up(registrar),
            Step::CreateService { registrar, name, address } => {
                let mut wanted = service(names[name]);
                if address != 0 {
                    wanted.spec.as_mut().unwrap().cluster_ip = format!("10.0.1.{}", address - 1);
                }
                match world.create_service(registrar, &wanted) {
                    Ok(created) => {
                        assert!(!model.services.contains_key(names[name]), "two Services of one name");
                        model.service(names[name], &created, now);
                    }
                    Err(AdminError::Exists { .. }) => assert!(model.services.contains_key(names[name])),
                    Err(AdminError::Address { .. }) => assert!(address != 0 || model.is_full(now)),
                    Err(error) => panic!("{error}"),
                }
            }
            Step::SetServiceType { registrar, name, external } => {
                let mut wanted = service(names[name]);
                if external {
                    let spec = wanted.spec.as_mut().unwrap();
                    spec.r#type = "ExternalName".to_owned();
                    spec.external_name = "a.example".to_owned();
                }
                match world.update_service(registrar, &wanted, &["spec.type", "spec.external_name"]) {
                    Ok(updated) => model.service(names[name], &updated, now),
                    Err(AdminError::NotFound { .. }) => assert!(!model.services.contains_key(names[name])),
                    Err(AdminError::Address { .. }) => assert!(model.is_full(now)),
                    Err(error) => panic!("{error}"),
                }
            }
            Step::DeleteService { registrar, name } => match world.delete_service(registrar, names[name]) {
                Ok(()) => {
                    let addresses = model.services.remove(names[name]).unwrap();
                    model.released.extend(addresses.into_iter().map(|address| (address, now)));
                }
                Err(_) => assert!(!model.services.contains_key(names[name])),
            },
            Step::EnrollDirector { registrar, name } => {
                let known = model.director(names[name]);
                let key = key_hash(&number.to_string());
                match world.enroll(registrar, &director_token, names[name], &key) {
                    Ok(enrolled) => {
                        assert_eq!(known, None, "two directors of one name");
                        let director = KnownDirector { name: names[name].to_owned(), ..Default::default() };
                        model.directors.insert(enrolled.uid, director);
                    }
                    Err(_) => assert!(known.is_some(), "refused a free name"),
                }
            }
            Step::RegisterDirector { registrar, name, number } => {
                let Some(uid) = model.director(names[name]) else { continue };
                let known = model.directors.get_mut(&uid).unwrap();
                match world.register_director(registrar, uid, number) {
                    Ok(()) => {
                        assert!(!known.revoked, "a revoked director has registered");
                        known.number = Some(number);
                    }
                    Err(error) => assert!(known.revoked, "{error}"),
                }
            }
            Step::DrainDirector { registrar, name, revoked, drained } => {
                let spec = proto::DirectorSpec { revoked, drained };
                match world.update_director(registrar, names[name], spec) {
                    Ok(uid) => {
                        let known = model.directors.get_mut(&uid).unwrap();
                        (known.revoked, known.drained) = (revoked, drained);
                    }
                    Err(_) => assert!(model.director(names[name]).is_none()),
                }
            }
            Step::DeleteDirector { registrar, name } => match world.delete_director(registrar, names[name]) {
                Ok(()) => drop(model.directors.remove(&model.director(names[name]).unwrap())),
                Err(_) => assert!(model.director(names[name]).is_none()),
            },
            Step::Wait { hours } => world.now = world.now + Duration::from_secs(hours * 3600),
        }
        check(&world, &model);
    }
}

/// The store says the same as the model, and nothing has two owners.
fn check(world: &World, model: &Model) {
    let mut stored = BTreeMap::new();
    let (mut directors, mut director_names) = (BTreeMap::new(), BTreeMap::new());
    let (mut services, mut service_addresses) = (BTreeMap::new(), Vec::new());
    let (mut names, mut keys_seen, mut owned) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    for kv in world.store.range_sync(&KeyRange::all(), None, usize::MAX).unwrap().kvs {
        match keys::parse(&kv.key).unwrap() {
            Key::Device { uid, .. } => {
                let network = "n".into();
                let device = Device::decode(&kv.value, &network, uid, 1, &mut |text| text.into()).unwrap();
                let known = Known {
                    name: device.name.to_string(),
                    key: device.key.map(|key| key[0]),
                    aes: device.aes_256_gcm,
                    addresses: device.addresses().collect(),
                    revoked: device.revoked,
                };
                stored.insert(uid, known);
            }
            Key::DeviceName { name, .. } => {
                let claim = Claim::decode(&*kv.value).unwrap();
                names.insert(name.to_owned(), claim.owner_uid.parse::<Uuid>().unwrap());
            }
            Key::DeviceKey { key, .. } => {
                let claim = Claim::decode(&*kv.value).unwrap();
                keys_seen.insert(key[0], claim.owner_uid.parse::<Uuid>().unwrap());
            }
            Key::Director { uid, .. } => {
                let director = Director::decode(&kv.value, &"n".into(), uid, 1).unwrap();
                let known = KnownDirector {
                    name: director.name.to_string(),
                    number: director.endpoints.first().map(|endpoint| match endpoint.ip() {
                        IpAddr::V4(v4) => v4.octets()[3],
                        IpAddr::V6(_) => 0,
                    }),
                    revoked: director.is_revoked(),
                    drained: director.is_drained(),
                };
                directors.insert(uid, known);
            }
            Key::DirectorName { name, .. } => {
                let claim = Claim::decode(&*kv.value).unwrap();
                director_names.insert(name.to_owned(), claim.owner_uid.parse::<Uuid>().unwrap());
            }
            Key::Service { name, .. } => {
                let service = crate::registry::Service::decode(&kv.value, &"n".into(), 1).unwrap();
                let uid: Uuid = service.uid().parse().unwrap();
                let addresses = service.cluster_ips().to_vec();
                service_addresses.extend(addresses.iter().map(|address| (*address, uid)));
                services.insert(name.to_owned(), addresses);
            }
            Key::Address { address, .. } => {
                let record = StoredAddress::decode(&*kv.value).unwrap();
                if record.released_at.is_none() {
                    owned.insert(address, record.owner_uid.parse::<Uuid>().unwrap());
                }
            }
            _ => {}
        }
    }
    assert_eq!(stored, model.devices);
    assert_eq!(services, model.services);
    assert_eq!(directors, model.directors);
    let claimed: BTreeMap<_, _> = directors.iter().map(|(uid, known)| (known.name.clone(), *uid)).collect();
    assert_eq!((claimed.len(), &claimed), (directors.len(), &director_names));
    let claimed: BTreeMap<_, _> = stored.iter().map(|(uid, known)| (known.name.clone(), *uid)).collect();
    assert_eq!((claimed.len(), &claimed), (stored.len(), &names));
    let with_key: BTreeMap<_, _> =
        stored.iter().filter_map(|(uid, known)| Some((known.key?, *uid))).collect();
    assert_eq!(with_key, keys_seen);
    let addresses: Vec<_> = stored
        .iter()
        .flat_map(|(uid, known)| known.addresses.iter().map(|address| (*address, *uid)))
        .chain(service_addresses)
        .collect();
    assert_eq!(addresses.iter().collect::<BTreeSet<_>>().len(), addresses.len());
    assert_eq!(addresses.into_iter().collect::<BTreeMap<_, _>>(), owned);
    // A fresh index and one that has followed agree.
    let (fresh, mut followed) = (world.load(), World::new(0).load());
    let changes = world.store.changes_sync(&KeyRange::all(), 2).unwrap();
    for batch in &changes.batches {
        followed.apply(batch, world.now);
    }
    assert!(followed.changes_to(&fresh).is_empty());
    assert!(followed.services_changed_to(&fresh).is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn nothing_ever_has_two_owners(steps in proptest::collection::vec(step(), 1..60)) {
        run(&steps);
    }
}
