//! What operators do with networks. Deleting a network, or changing its pools, takes several transactions: the
//! network is locked first, so that nobody can add a device while one looks whether there are any.

use muster_common::time::Timestamp;
use muster_proto::admin;
use uuid::Uuid;

use super::{AdminError, Outcome, Plan, check_version, claim, find, immutable, masked, namespace, new_meta};
use crate::{
    allocation::{NetworkPools, PoolError, check_overlaps},
    registry::{
        field::FieldError,
        index::{Index, NetworkState},
        keys::{self, Owner},
        namespace::Namespace,
        network::Network,
    },
    store::{Condition, MAX_TXN_OPS, Revision, Txn},
};

const KIND: &str = "network";
const MUTABLE: [&str; 11] = [
    "metadata.labels",
    "metadata.annotations",
    "spec.public_addresses",
    "spec.device_pool_v4",
    "spec.device_pool_v6",
    "spec.service_pool_v4",
    "spec.service_pool_v6",
    "spec.directors",
    "spec.record_ttl",
    "spec.address_quarantine",
    "spec.external_domain",
];

/// Plans the creation of a network. One without any pools gets the defaults, with an IPv6 prefix made of `random`.
///
/// # Errors
/// See [`AdminError`].
pub fn create(
    index: &Index,
    request: &admin::Network,
    uid: Uuid,
    random: [u8; 5],
    now: Timestamp,
) -> Result<Outcome<String>, AdminError> {
    let mut request = request.clone();
    let spec = request.spec.get_or_insert_default();
    let pools = [&spec.device_pool_v4, &spec.device_pool_v6, &spec.service_pool_v4, &spec.service_pool_v6];
    if pools.iter().all(|pool| pool.is_empty()) {
        NetworkPools::with_global_id(random).write(spec);
    }
    let mut meta = new_meta(request.metadata.take().unwrap_or_default(), uid, now);
    (meta.namespace, meta.network) = (String::new(), String::new());
    request.metadata = Some(meta);
    let network = Network::check(request, 0)?;
    let name = network.name.to_string();
    if let Some(found) = index.network(&name) {
        if found.network.uid() == uid.to_string() {
            return Ok(Outcome::Done(name));
        }
        return Err(AdminError::Exists { kind: KIND, name });
    }
    check_domains(index, &network)?;
    check_apart(index, &network)?;
    let key = keys::network(&name);
    // Differs in one bit, and so belongs to nobody else either.
    let first = namespace::initial(Uuid::from_u128(uid.as_u128() ^ 1 << 127), now);
    let first = Namespace::check(first, &network.name, 0)?;
    let txn = guarded(index, Txn::new(), uid)
        .when(Condition::Absent(key.clone()))
        .put(key, network.encode())
        .put(keys::namespace(&name, first.name.as_str()), first.encode());
    Ok(Outcome::Write(Plan::new(txn, name)))
}

/// Checks that neither domain of `network` is that of another network.
fn check_domains(index: &Index, network: &Network) -> Result<(), FieldError> {
    let domains =
        [("spec.domain", Some(&network.domain)), ("spec.external_domain", network.external_domain.as_ref())];
    for (path, domain) in domains {
        let Some(domain) = domain else { continue };
        let owners =
            [index.network_by_domain(domain.as_str()), index.network_by_external_domain(domain.as_str())];
        let other = owners.into_iter().flatten().find(|found| found.network.name != network.name);
        if let Some(found) = other {
            let reason = format!("{domain} is a domain of network {:?}; choose another", found.network.name);
            return Err(FieldError::new(path, reason));
        }
    }
    Ok(())
}

/// Checks that the pools of `network` share no address with those of other networks.
fn check_apart(index: &Index, network: &Network) -> Result<(), AdminError> {
    let others = index.networks().map(|state| &*state.network).filter(|other| other.name != network.name);
    let all = others.chain([network]).map(|network| (&*network.name, &network.pools));
    check_overlaps(all).map_err(|error| {
        let path = match &error {
            PoolError::Overlap(one, other) => {
                let kind = if one.0 == *network.name { one.1 } else { other.1 };
                format!("spec.{kind}")
            }
            _ => "spec.device_pool_v4".to_owned(),
        };
        FieldError::new(path, error).into()
    })
}

/// Makes `txn` exclude all others that change a network's domain or pools.
fn guarded(index: &Index, txn: Txn, uid: Uuid) -> Txn {
    txn.when(Condition::ModRevision(keys::networks(), index.networks_revision()))
        .put(keys::networks(), claim(uid))
}

/// Whether an update changes pools, and so needs the network locked and empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NeedsLock {
    /// The network has to be locked first.
    Yes,
    /// The update can be written at once.
    No,
}

/// Plans an update. [`NeedsLock::Yes`] asks to lock the network and to plan again.
///
/// # Errors
/// See [`AdminError`].
pub fn update(
    index: &Index,
    request: &admin::Network,
    mask: Option<&pbjson_types::FieldMask>,
    locked: Option<Revision>,
) -> Result<Outcome<NeedsLock>, AdminError> {
    let meta = request.metadata.clone().unwrap_or_default();
    let wanted = request.spec.clone().unwrap_or_default();
    let state = find(index, &meta.name.to_ascii_lowercase())?;
    let old = &state.network;
    let everything = mask.is_none_or(|mask| mask.paths.is_empty());
    let mut allowed = MUTABLE.to_vec();
    if mask.is_some_and(|mask| mask.paths.iter().any(|path| path == "spec.domain")) {
        allowed.push("spec.domain");
    }
    let paths = masked(mask, &allowed)?;
    if everything || paths.contains(&"spec.domain") {
        immutable("spec.domain", wanted.domain.trim_end_matches('.'), old.domain.as_str())?;
    }
    check_version(KIND, &old.name, meta.resource_version, old.revision)?;
    let mut stored = old.stored.clone();
    let new_meta = stored.metadata.get_or_insert_default();
    let spec = stored.spec.get_or_insert_default();
    for path in paths {
        let pool = |new: &mut String, wanted: &String| {
            if !everything || !wanted.is_empty() {
                new.clone_from(wanted);
            }
        };
        match path {
            "metadata.labels" => new_meta.labels.clone_from(&meta.labels),
            "metadata.annotations" => new_meta.annotations.clone_from(&meta.annotations),
            "spec.public_addresses" => spec.public_addresses.clone_from(&wanted.public_addresses),
            "spec.device_pool_v4" => pool(&mut spec.device_pool_v4, &wanted.device_pool_v4),
            "spec.device_pool_v6" => pool(&mut spec.device_pool_v6, &wanted.device_pool_v6),
            "spec.service_pool_v4" => pool(&mut spec.service_pool_v4, &wanted.service_pool_v4),
            "spec.service_pool_v6" => pool(&mut spec.service_pool_v6, &wanted.service_pool_v6),
            "spec.directors" => spec.directors.clone_from(&wanted.directors),
            "spec.record_ttl" => spec.record_ttl = wanted.record_ttl,
            "spec.address_quarantine" => spec.address_quarantine = wanted.address_quarantine,
            "spec.external_domain" => spec.external_domain.clone_from(&wanted.external_domain),
            _ => {}
        }
    }
    let new = Network::check(stored, old.revision)?;
    if new == **old {
        return Ok(Outcome::Done(NeedsLock::No));
    }
    let key = keys::network(&old.name);
    let mut txn = Txn::new().when(Condition::ModRevision(key.clone(), old.revision)).put(key, new.encode());
    let (moved, renamed) = (new.pools != old.pools, new.external_domain != old.external_domain);
    if renamed {
        check_domains(index, &new)?;
    }
    if renamed && !moved {
        txn = guarded(index, txn, Uuid::nil());
    }
    if moved {
        check_empty(state)?;
        check_service_pools(state, &new)?;
        check_apart(index, &new)?;
        let Some(lock) = locked else { return Ok(Outcome::Done(NeedsLock::Yes)) };
        txn = unlocking(guarded(index, txn, Uuid::nil()), &old.name, lock);
    }
    Ok(Outcome::Write(Plan::new(txn, NeedsLock::No)))
}

/// Plans to lock a network that has no devices: from then on none can be added.
///
/// # Errors
/// See [`AdminError`].
pub fn lock(index: &Index, name: &str, version: Revision, token: Uuid) -> Result<Outcome<()>, AdminError> {
    let state = find(index, name)?;
    let network = &state.network;
    check_version(KIND, name, version, network.revision)?;
    check_empty(state)?;
    let lock = keys::network_lock(&network.name);
    let txn = Txn::new()
        .when(Condition::ModRevision(keys::network(&network.name), network.revision))
        .when(Condition::ModRevision(lock.clone(), index.lock_revision(&network.name).unwrap_or(0)))
        .put(lock, claim(token));
    Ok(Outcome::Write(Plan::new(txn, ())))
}

/// The transaction that takes back a lock set at `revision`.
pub fn unlock(name: &str, revision: Revision) -> Txn {
    unlocking(Txn::new(), name, revision)
}

fn unlocking(txn: Txn, name: &str, revision: Revision) -> Txn {
    let lock = keys::network_lock(name);
    txn.when(Condition::ModRevision(lock.clone(), revision)).delete(lock)
}

/// Plans the next transaction of the deletion of a network that was locked at revision `lock`. The reply is whether
/// it was the last one.
///
/// # Errors
/// See [`AdminError`]; [`AdminError::NotEmpty`] if a device came before the lock.
pub fn delete(index: &Index, name: &str, lock: Revision) -> Result<Outcome<bool>, AdminError> {
    let Some(state) = index.network(name) else { return Ok(Outcome::Done(true)) };
    check_empty(state)?;
    let locked = Condition::ModRevision(keys::network_lock(name), lock);
    let services = &state.services;
    let slices = services.slices.iter().filter(|slice| slice.selected.is_none());
    let slices = slices.map(|slice| keys::endpoint_slice(name, slice.namespace.as_str(), &slice.name));
    // A Service goes after its addresses: without it, they would not be found.
    let services_keys = services.services.iter().flat_map(|service| {
        let addresses = service.cluster_ips().iter();
        let addresses = addresses.map(|address| keys::address(name, Owner::Service, *address));
        addresses.chain([keys::service(name, service.namespace.as_str(), service.name.as_str())])
    });
    let namespaces = services.namespaces.keys().map(|namespace| keys::namespace(name, namespace));
    let contents = slices.chain(services_keys).chain(namespaces);
    let addresses = state.released().map(|(owner, address, _)| keys::address(name, owner, address));
    let presence = state.presence.keys().map(|uid| keys::presence(name, *uid));
    let readiness = state.readiness.keys().map(|uid| keys::readiness(name, *uid));
    let carriers = state.carriers.keys().map(|subnet| keys::carrier(name, subnet));
    let tokens = state.tokens.keys().map(|token| keys::token(name, token));
    let directors = state
        .directors
        .iter()
        .flat_map(|director| [keys::director_name(name, &director.name), keys::director(name, director.uid)]);
    let rest: Vec<_> = contents
        .chain(addresses)
        .chain(carriers)
        .chain(presence)
        .chain(readiness)
        .chain(tokens)
        .chain(directors)
        .take(MAX_TXN_OPS - 8)
        .collect();
    if !rest.is_empty() {
        let txn = rest.into_iter().fold(Txn::new().when(locked), Txn::delete);
        return Ok(Outcome::Write(Plan::new(txn, false)));
    }
    let key = keys::network(name);
    let txn = Txn::new().when(Condition::ModRevision(key.clone(), state.network.revision)).delete(key);
    let txn = unlocking(guarded(index, txn, Uuid::nil()), name, lock);
    Ok(Outcome::Write(Plan::new(txn, true)))
}

/// Refuses to take pools away from Services.
fn check_service_pools(state: &NetworkState, new: &Network) -> Result<(), FieldError> {
    let old = &state.network.pools;
    for (path, same, v4) in [
        ("spec.service_pool_v4", new.pools.service_v4 == old.service_v4, true),
        ("spec.service_pool_v6", new.pools.service_v6 == old.service_v6, false),
    ] {
        let all = state.services.services.iter();
        let count = all.filter(|service| service.cluster_ips().iter().any(|ip| ip.is_ipv4() == v4)).count();
        if !same && count > 0 {
            let reason = format!(
                "{count} Services have addresses from the pool; delete them first: muster delete service NAME"
            );
            return Err(FieldError::new(path, reason));
        }
    }
    Ok(())
}

fn check_empty(state: &NetworkState) -> Result<(), AdminError> {
    match state.devices.len() {
        0 => Ok(()),
        devices => Err(AdminError::NotEmpty { name: state.network.name.to_string(), devices }),
    }
}
