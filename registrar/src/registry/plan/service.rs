//! What operators do with Services: also how they get their ClusterIPs, and give them back.

use std::{net::IpAddr, sync::Arc};

use muster_common::time::Timestamp;
use muster_proto::admin;
use uuid::Uuid;

use super::{
    AdminError, Held, Outcome, Plan, check_version, find, immutable, masked, namespace_of, new_meta,
    release_address, remove_service, remove_slice, set_meta, short, take_address, when_namespace, when_open,
};
use crate::{
    allocation::{NetworkPools, PoolKind},
    registry::{
        field::FieldError,
        index::Index,
        keys::{self, Owner},
        service::{self, EXTERNAL_NAME, NONE, Service},
    },
    store::{Condition, MAX_TXN_OPS, Revision, Txn},
};

const KIND: &str = "service";
const STATUS: &str = "status.load_balancer";
const MUTABLE: [&str; 16] = [
    "metadata.labels",
    "metadata.annotations",
    "spec.type",
    "spec.selector",
    "spec.ports",
    "spec.ip_families",
    "spec.ip_family_policy",
    "spec.external_name",
    "spec.external_ips",
    "spec.session_affinity",
    "spec.session_affinity_config",
    "spec.publish_not_ready_addresses",
    "spec.internal_traffic_policy",
    "spec.external_traffic_policy",
    "spec.traffic_distribution",
    "spec.readiness_probe",
];

/// When and for which attempt something is planned.
#[derive(Clone, Copy, Debug)]
pub struct Attempt {
    /// How often this request has been planned before: leads to other addresses after a collision.
    pub number: u32,
    /// The time.
    pub now: Timestamp,
}

/// Plans the creation of a Service. The reply is what it is going to be.
///
/// # Errors
/// See [`AdminError`].
pub fn create(
    index: &mut Index,
    request: &admin::Service,
    uid: Uuid,
    attempt: Attempt,
) -> Result<Outcome<admin::Service>, AdminError> {
    let meta = new_meta(request.metadata.clone().unwrap_or_default(), uid, attempt.now);
    let mut wanted = admin::Service { metadata: Some(meta), status: None, ..request.clone() };
    service::check(&mut wanted)?;
    service::check_has_ports(&wanted)?;
    let meta = wanted.metadata.clone().unwrap_or_default();
    let state = find(index, &meta.network)?;
    if let Some(found) = state.services.services.get(&meta.namespace, &meta.name) {
        if found.uid() == meta.uid {
            return Ok(Outcome::Done(found.to_proto()));
        }
        return Err(AdminError::Exists { kind: KIND, name: meta.name });
    }
    let network = state.network.name.clone();
    // Fields come first: what is wrong with them is wrong in a namespace that is yet to be created, too.
    let reservations = assign(index, &mut wanted, &network, uid, &[], attempt)?;
    let txn = match when_addable(index, Txn::new(), &network, &meta.namespace) {
        Ok(txn) => txn,
        Err(error) => {
            reservations.iter().for_each(|held| index.cancel(held));
            return Err(error);
        }
    };
    let new = match Service::check(wanted, &network, 0) {
        Ok(new) => new,
        Err(error) => return Err(give_up(index, &reservations, error)),
    };
    let key = keys::service(&network, &meta.namespace, &meta.name);
    let txn = txn.when(Condition::Absent(key.clone())).put(key, new.encode());
    let txn = take_all(index, txn, &network, uid, &reservations)?;
    Ok(Outcome::Write(Plan { txn, reservations, reply: new.to_proto() }))
}

/// The conditions under which something may be added to a namespace.
fn when_addable(index: &Index, txn: Txn, network: &str, namespace: &str) -> Result<Txn, AdminError> {
    if index.lock_revision(network).is_some() {
        return Err(AdminError::Locked(network.to_owned()));
    }
    when_namespace(when_open(txn, network), find(index, network)?, namespace)
}

fn give_up(index: &mut Index, reservations: &[Held], error: FieldError) -> AdminError {
    reservations.iter().for_each(|held| index.cancel(held));
    error.into()
}

fn take_all(
    index: &Index,
    txn: Txn,
    network: &str,
    uid: Uuid,
    reservations: &[Held],
) -> Result<Txn, AdminError> {
    let state = find(index, network)?;
    let addresses = reservations.iter().map(|held| held.reservation.address());
    Ok(addresses.fold(txn, |txn, address| take_address(state, txn, Owner::Service, uid, address)))
}

/// Completes families and ClusterIPs of a checked Service, and reserves those that it does not own yet.
fn assign(
    index: &mut Index,
    wanted: &mut admin::Service,
    network: &Arc<str>,
    uid: Uuid,
    owned: &[IpAddr],
    attempt: Attempt,
) -> Result<Vec<Held>, AdminError> {
    let spec = wanted.spec.get_or_insert_default();
    if spec.r#type == EXTERNAL_NAME {
        return Ok(Vec::new());
    }
    let headless = spec.cluster_ip == NONE || spec.cluster_ips.iter().any(|text| text == NONE);
    let families = families(&find(index, network)?.network.pools, spec, headless)?;
    let chosen = service::chosen(spec)?;
    let dual = families.len() > 1;
    spec.ip_families = families.iter().map(|is_v4| family(*is_v4).to_owned()).collect();
    if spec.ip_family_policy.is_empty() {
        spec.ip_family_policy = if dual { "RequireDualStack" } else { "SingleStack" }.to_owned();
    }
    if headless {
        (spec.cluster_ip, spec.cluster_ips) = (NONE.to_owned(), vec![NONE.to_owned()]);
        return Ok(Vec::new());
    }
    let owner = uid.to_string();
    let (mut addresses, mut reservations): (Vec<IpAddr>, Vec<Held>) = (Vec::new(), Vec::new());
    for (i, is_v4) in families.into_iter().enumerate() {
        let path = if i == 0 { "spec.clusterIP" } else { "spec.clusterIPs" };
        let chosen = chosen.iter().copied().find(|address| address.is_ipv4() == is_v4);
        if let Some(address) = chosen.filter(|address| owned.contains(address)) {
            addresses.push(address);
            continue;
        }
        let pool = index.network_mut(network).and_then(|state| state.pool(pool(is_v4)));
        let reserved = match (pool, chosen) {
            (Some(pool), Some(address)) => pool.choose(address, attempt.now),
            (Some(pool), None) => pool.reserve(&owner, attempt.number, attempt.now),
            (None, _) => return Err(give_up(index, &reservations, no_pool(path, is_v4))),
        };
        match reserved {
            Ok(reservation) => {
                addresses.push(reservation.address());
                reservations.push(Held { network: network.clone(), owner: Owner::Service, reservation });
            }
            Err(error) => {
                reservations.iter().for_each(|held| index.cancel(held));
                return Err(AdminError::Address { path, error });
            }
        }
    }
    spec.cluster_ips = addresses.iter().map(IpAddr::to_string).collect();
    spec.cluster_ip = spec.cluster_ips.first().cloned().unwrap_or_default();
    Ok(reservations)
}

/// The families of a Service, in order: `true` for IPv4.
fn families(
    pools: &NetworkPools,
    spec: &admin::ServiceSpec,
    headless: bool,
) -> Result<Vec<bool>, FieldError> {
    let device_pool = |is_v4| if is_v4 { PoolKind::DeviceV4 } else { PoolKind::DeviceV6 };
    // A headless Service has no address of its own; its endpoints do.
    let has = |is_v4| pools.get(pool(is_v4)).is_some() || headless && pools.get(device_pool(is_v4)).is_some();
    let chosen = service::chosen(spec)?;
    if let Some(address) = chosen.iter().find(|address| !has(address.is_ipv4())) {
        return Err(no_pool("spec.clusterIP", address.is_ipv4()));
    }
    let mut families = service::families(spec)?;
    families.extend(chosen.iter().skip(families.len()).map(IpAddr::is_ipv4));
    if families.is_empty() {
        let first = [true, false].into_iter().find(|is_v4| has(*is_v4));
        let none = || {
            let reason = "the network has no service pool; give it one, or write None for a headless Service";
            FieldError::new("spec.clusterIP", reason)
        };
        families.push(first.ok_or_else(none)?);
    }
    if let Some(missing) = families.iter().find(|is_v4| !has(**is_v4)) {
        return Err(no_pool("spec.ipFamilies", *missing));
    }
    if let ([first], "PreferDualStack" | "RequireDualStack") = (&*families, &*spec.ip_family_policy) {
        let second = !first;
        if has(second) {
            families.push(second);
        } else if spec.ip_family_policy == "RequireDualStack" {
            return Err(no_pool("spec.ipFamilyPolicy", second));
        }
    }
    Ok(families)
}

fn family(is_v4: bool) -> &'static str {
    if is_v4 { "IPv4" } else { "IPv6" }
}

fn pool(is_v4: bool) -> PoolKind {
    if is_v4 { PoolKind::ServiceV4 } else { PoolKind::ServiceV6 }
}

fn no_pool(path: &str, is_v4: bool) -> FieldError {
    let reason = format!(
        "the network has no {} service pool; give it one (spec.{}), or use the other family",
        family(is_v4),
        pool(is_v4)
    );
    FieldError::new(path, reason)
}

/// Plans a change of a Service. Its ClusterIPs stay, but for those of a family that it gains or loses.
///
/// # Errors
/// See [`AdminError`].
pub fn update(
    index: &mut Index,
    request: &admin::Service,
    mask: Option<&pbjson_types::FieldMask>,
    attempt: Attempt,
) -> Result<Outcome<admin::Service>, AdminError> {
    let meta = request.metadata.clone().unwrap_or_default();
    let old = get(index, &meta.network, &meta.namespace, &meta.name)?.clone();
    let named = mask.is_some_and(|mask| !mask.paths.is_empty());
    let mut allowed = MUTABLE.to_vec();
    if named {
        allowed.push(STATUS);
    }
    let paths = masked(mask, &allowed)?;
    immutable("metadata.uid", &meta.uid, old.uid())?;
    check_version(KIND, old.name.as_str(), meta.resource_version, old.revision)?;
    let mut wanted = changed(&old, request, &paths, named)?;
    service::check(&mut wanted)?;
    service::check_has_ports(&wanted)?;
    let uid = Uuid::try_parse(old.uid()).unwrap_or_default();
    let owned = old.cluster_ips();
    let reservations = assign(index, &mut wanted, &old.network, uid, owned, attempt)?;
    let new = match Service::check(wanted, &old.network, old.revision) {
        Ok(new) => new,
        Err(error) => return Err(give_up(index, &reservations, error)),
    };
    if new == old {
        return Ok(Outcome::Done(old.to_proto()));
    }
    let (network, namespace) = (&old.network, old.namespace.as_str());
    let key = keys::service(network, namespace, old.name.as_str());
    let mut txn = Txn::new().when(Condition::ModRevision(key.clone(), old.revision)).put(key, new.encode());
    if !reservations.is_empty() {
        txn = match when_addable(index, txn, network, namespace) {
            Ok(txn) => take_all(index, txn, network, uid, &reservations)?,
            Err(error) => {
                reservations.iter().for_each(|held| index.cancel(held));
                return Err(error);
            }
        };
    }
    for address in owned.iter().filter(|address| !new.cluster_ips().contains(address)) {
        txn = release_address(txn, network, Owner::Service, old.uid(), *address, attempt.now);
    }
    Ok(Outcome::Write(Plan { txn, reservations, reply: new.to_proto() }))
}

/// `old` with the fields of `request` that `paths` name; `named` if the request names them itself, and so means what
/// it leaves empty.
fn changed(
    old: &Service,
    request: &admin::Service,
    paths: &[&str],
    named: bool,
) -> Result<admin::Service, AdminError> {
    let meta = request.metadata.clone().unwrap_or_default();
    let wanted = request.spec.clone().unwrap_or_default();
    let mut new = old.stored.clone();
    let spec = new.spec.get_or_insert_default();
    let found = spec.clone();
    for path in paths {
        match *path {
            "spec.type" => spec.r#type.clone_from(&wanted.r#type),
            "spec.selector" => spec.selector.clone_from(&wanted.selector),
            "spec.ports" => spec.ports.clone_from(&wanted.ports),
            "spec.ip_families" if named || !wanted.ip_families.is_empty() => {
                spec.ip_families.clone_from(&wanted.ip_families);
            }
            "spec.ip_family_policy" if named || !wanted.ip_family_policy.is_empty() => {
                spec.ip_family_policy.clone_from(&wanted.ip_family_policy);
            }
            "spec.external_name" => spec.external_name.clone_from(&wanted.external_name),
            "spec.external_ips" => spec.external_ips.clone_from(&wanted.external_ips),
            "spec.session_affinity" => spec.session_affinity.clone_from(&wanted.session_affinity),
            "spec.session_affinity_config" => {
                spec.session_affinity_config.clone_from(&wanted.session_affinity_config);
            }
            "spec.publish_not_ready_addresses" => {
                spec.publish_not_ready_addresses = wanted.publish_not_ready_addresses;
            }
            "spec.internal_traffic_policy" => {
                spec.internal_traffic_policy.clone_from(&wanted.internal_traffic_policy);
            }
            "spec.external_traffic_policy" => {
                spec.external_traffic_policy.clone_from(&wanted.external_traffic_policy);
            }
            "spec.traffic_distribution" => {
                spec.traffic_distribution.clone_from(&wanted.traffic_distribution);
            }
            "spec.readiness_probe" => spec.readiness_probe.clone_from(&wanted.readiness_probe),
            STATUS => {
                let status = request.status.as_ref().and_then(|status| status.load_balancer.clone());
                new.status.get_or_insert_default().load_balancer = status;
            }
            path => set_meta(new.metadata.get_or_insert_default(), &meta, path),
        }
    }
    // What the old type alone has goes with it, unless the request says something else.
    if spec.r#type == EXTERNAL_NAME {
        spec.cluster_ip = differing(&wanted.cluster_ip, &found.cluster_ip);
        spec.cluster_ips =
            if wanted.cluster_ips == found.cluster_ips { Vec::new() } else { wanted.cluster_ips };
        if spec.ip_families == found.ip_families {
            spec.ip_families.clear();
        }
        if spec.ip_family_policy == found.ip_family_policy {
            spec.ip_family_policy.clear();
        }
        if spec.internal_traffic_policy == found.internal_traffic_policy {
            spec.internal_traffic_policy.clear();
        }
    } else if found.r#type == EXTERNAL_NAME {
        spec.external_name = differing(&spec.external_name, &found.external_name);
        (spec.cluster_ip, spec.cluster_ips) = (wanted.cluster_ip, wanted.cluster_ips);
    } else {
        keep_addresses(spec, &found, &wanted)?;
    }
    if spec.r#type != "LoadBalancer" && found.r#type == "LoadBalancer" {
        new.status = None;
    }
    Ok(new)
}

/// `wanted`, unless it is what was there before.
fn differing(wanted: &str, found: &str) -> String {
    if wanted == found { String::new() } else { wanted.to_owned() }
}

/// Keeps the ClusterIPs that there are, as far as their families stay.
fn keep_addresses(
    spec: &mut admin::ServiceSpec,
    found: &admin::ServiceSpec,
    wanted: &admin::ServiceSpec,
) -> Result<(), FieldError> {
    immutable("spec.clusterIP", &wanted.cluster_ip, &found.cluster_ip)?;
    let same = wanted.cluster_ips.iter().zip(&found.cluster_ips).all(|(wanted, found)| wanted == found);
    if !same || wanted.cluster_ips.len() > found.cluster_ips.len().max(1) && found.cluster_ip == NONE {
        let reason = format!(
            "cannot be changed: they are {}; delete the Service and create it anew",
            found.cluster_ips.join(", ")
        );
        return Err(FieldError::new("spec.clusterIPs", reason));
    }
    if let Some(added) = wanted.cluster_ips.get(found.cluster_ips.len()..) {
        spec.cluster_ips.extend_from_slice(added);
    }
    if let (Some(was), Some(is)) = (found.ip_families.first(), spec.ip_families.first())
        && was != is
    {
        let reason = format!("cannot be changed: the first is {was}; delete the Service and create it anew");
        return Err(FieldError::new("spec.ipFamilies[0]", reason));
    }
    if matches!(&*spec.ip_family_policy, "SingleStack" | "") {
        if spec.ip_family_policy == "SingleStack" && spec.ip_families == found.ip_families {
            spec.ip_families.truncate(1);
        }
        spec.cluster_ips.truncate(spec.ip_families.len().max(1));
    }
    Ok(())
}

/// Plans the next transaction of the deletion of a Service with its EndpointSlices. The Service goes last, so that a
/// deletion that is cut short can be asked for again. The reply is the revision of the Service to go on with; none
/// after the last transaction.
///
/// # Errors
/// See [`AdminError`].
pub fn delete(
    index: &Index,
    network: &str,
    namespace: &str,
    name: &str,
    version: Revision,
    now: Timestamp,
) -> Result<Outcome<Option<Revision>>, AdminError> {
    let service = get(index, network, namespace, name)?;
    check_version(KIND, service.name.as_str(), version, service.revision)?;
    let slices = || {
        let services = &index.network(network)?.services;
        let slices = services.slices_of(service.namespace.as_str(), service.name.as_str());
        Some(slices.filter(|slice| slice.selected.is_none()))
    };
    let last = remove_service(Txn::new(), service, now);
    let count = slices().map_or(0, Iterator::count);
    if count <= MAX_TXN_OPS - last.ops.len() {
        let txn = slices().into_iter().flatten().fold(last, |txn, slice| remove_slice(txn, slice));
        return Ok(Outcome::Write(Plan::new(txn, None)));
    }
    let key = keys::service(&service.network, service.namespace.as_str(), service.name.as_str());
    let txn = Txn::new().when(Condition::ModRevision(key, service.revision));
    let some = slices().into_iter().flatten().take(MAX_TXN_OPS - 1);
    let txn = some.fold(txn, |txn, slice| remove_slice(txn, slice));
    Ok(Outcome::Write(Plan::new(txn, Some(service.revision))))
}

/// Finds a Service; no namespace means `default`.
///
/// # Errors
/// [`AdminError::NotFound`].
pub fn get<'a>(
    index: &'a Index,
    network: &str,
    namespace: &str,
    name: &str,
) -> Result<&'a Service, AdminError> {
    let services = &find(index, network)?.services.services;
    let found = services.get(&namespace_of(namespace), &name.to_ascii_lowercase());
    found.map(|service| &**service).ok_or_else(|| AdminError::NotFound { kind: KIND, name: short(name) })
}
