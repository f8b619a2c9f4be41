//! What operators do with devices.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use muster_common::{name::Label, time::Timestamp};
use muster_proto::admin;
use uuid::Uuid;

use super::{
    AdminError, Held, Outcome, Plan, change_device, check_version, claim, enroll::new_device, find,
    immutable, masked, remove_device, short, take_address, when_open,
};
use crate::{
    registry::{
        device::{DEFAULT_NAMESPACE, Device},
        field::{self, FieldError},
        index::{Index, NetworkState, pool_kind},
        keys::{self, Owner},
        site,
    },
    store::{Condition, Revision, Txn},
};

const KIND: &str = "device";
const MUTABLE: [&str; 5] =
    ["metadata.labels", "metadata.annotations", "spec.revoked", "spec.may_proxy", "spec.subnets"];
/// Subnets that devices of a network may carry, in all: agents take no more routes.
const SUBNETS_MAX: usize = 4000;

/// Plans the creation of a device that has yet to join: keeps its name, and the addresses that are chosen.
///
/// # Errors
/// See [`AdminError`].
pub fn create(
    index: &mut Index,
    request: &admin::Device,
    uid: Uuid,
    now: Timestamp,
) -> Result<Outcome<Uuid>, AdminError> {
    let meta = request.metadata.clone().unwrap_or_default();
    let spec = request.spec.clone().unwrap_or_default();
    field::metadata(&meta)?;
    let name: Label = field::parse("metadata.name", &meta.name)?;
    let name = name.for_device().map_err(|error| FieldError::new("metadata.name", error))?;
    let namespace = match &*meta.namespace {
        "" => DEFAULT_NAMESPACE.to_owned(),
        text => field::parse::<Label>("metadata.namespace", text)?.to_string(),
    };
    let state = find(index, &meta.network)?;
    match state.devices.by_name(name.as_str()) {
        Some(device) if device.uid == uid => return Ok(Outcome::Done(uid)),
        Some(_) => return Err(AdminError::Exists { kind: KIND, name: name.to_string() }),
        None => {}
    }
    let network = state.network.name.clone();
    if index.lock_revision(&network).is_some() {
        return Err(AdminError::Locked(network.to_string()));
    }
    let mut device = new_device(state, uid, name.as_str(), &namespace, now);
    device.set_meta(meta.labels, meta.annotations);
    device.revoked = spec.revoked;
    device.change_site(|site| site.may_proxy = spec.may_proxy);
    approve(state, &mut device, &spec.subnets)?;
    device.ipv4 = field::address("spec.virtual_ipv4", &spec.virtual_ipv4, "IPv4")?;
    device.ipv6 = field::address("spec.virtual_ipv6", &spec.virtual_ipv6, "IPv6")?;
    (device.chosen_ipv4, device.chosen_ipv6) = (device.ipv4.is_some(), device.ipv6.is_some());

    let reservations = choose(index, &device, now)?;
    let state = find(index, &network)?;
    let (key, name_key) = (keys::device(&network, uid), keys::device_name(&network, name.as_str()));
    let mut txn = when_open(Txn::new(), &network)
        .when(Condition::Absent(key.clone()))
        .when(Condition::Absent(name_key.clone()))
        .put(key, device.encode())
        .put(name_key, claim(uid));
    for address in device.addresses() {
        txn = take_address(state, txn, Owner::Device, uid, address);
    }
    Ok(Outcome::Write(Plan { txn, reservations, reply: uid }))
}

/// Reserves the addresses that the operator has chosen.
fn choose(index: &mut Index, device: &Device, now: Timestamp) -> Result<Vec<Held>, AdminError> {
    let mut reservations: Vec<Held> = Vec::new();
    for address in device.addresses() {
        let path = if address.is_ipv4() { "spec.virtual_ipv4" } else { "spec.virtual_ipv6" };
        let state = index.network_mut(&device.network);
        let pool = state.and_then(|state| state.pool(pool_kind(Owner::Device, address)));
        let chosen = match pool {
            Some(pool) => pool.choose(address, now).map_err(|error| AdminError::Address { path, error }),
            None => Err(no_pool(path, address).into()),
        };
        match chosen {
            Ok(reservation) => {
                reservations.push(Held { network: device.network.clone(), owner: Owner::Device, reservation })
            }
            Err(error) => {
                reservations.iter().for_each(|held| index.cancel(held));
                return Err(error);
            }
        }
    }
    Ok(reservations)
}

fn no_pool(path: &str, address: IpAddr) -> FieldError {
    let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
    FieldError::new(path, format!("the network has no {family} device pool; leave the field empty"))
}

/// Plans a change of labels, annotations, or whether the device is revoked.
///
/// # Errors
/// See [`AdminError`].
pub fn update(
    index: &Index,
    request: &admin::Device,
    mask: Option<&pbjson_types::FieldMask>,
) -> Result<Outcome<Uuid>, AdminError> {
    let meta = request.metadata.clone().unwrap_or_default();
    let spec = request.spec.clone().unwrap_or_default();
    let old = get(index, &meta.network, &meta.name)?;
    let paths = masked(mask, &MUTABLE)?;
    field::metadata(&meta)?;
    if mask.is_none_or(|mask| mask.paths.is_empty()) {
        let text = |chosen: bool, address: Option<IpAddr>| match address {
            Some(address) if chosen => address.to_string(),
            _ => String::new(),
        };
        immutable("metadata.uid", &meta.uid, &old.uid.to_string())?;
        immutable("metadata.namespace", &meta.namespace, &old.namespace)?;
        immutable(
            "spec.virtual_ipv4",
            &spec.virtual_ipv4,
            &text(old.chosen_ipv4, old.ipv4.map(IpAddr::from)),
        )?;
        immutable(
            "spec.virtual_ipv6",
            &spec.virtual_ipv6,
            &text(old.chosen_ipv6, old.ipv6.map(IpAddr::from)),
        )?;
    }
    check_version(KIND, &meta.name, meta.resource_version, old.revision)?;
    let mut new = old.clone();
    let found = new.meta.take().unwrap_or_default();
    let (mut labels, mut annotations) = (found.labels, found.annotations);
    for path in paths {
        match path {
            "metadata.labels" => labels.clone_from(&meta.labels),
            "metadata.annotations" => annotations.clone_from(&meta.annotations),
            "spec.may_proxy" => new.change_site(|site| site.may_proxy = spec.may_proxy),
            "spec.subnets" => approve(find(index, &meta.network)?, &mut new, &spec.subnets)?,
            _ => new.revoked = spec.revoked,
        }
    }
    new.set_meta(labels, annotations);
    if new.proxied_by().is_some()
        && new.site.as_ref().is_some_and(|site| site.may_proxy || !site.approved.is_empty())
    {
        let reason = "this device has no agent, so it carries nothing; approve the device that speaks for it";
        return Err(FieldError::new("spec", reason).into());
    }
    if new == *old {
        return Ok(Outcome::Done(old.uid));
    }
    Ok(Outcome::Write(Plan::new(change_device(old, &new), old.uid)))
}

/// Lets `device` carry `subnets`, and no others.
fn approve(state: &NetworkState, device: &mut Device, subnets: &[String]) -> Result<(), FieldError> {
    const PATH: &str = "spec.subnets";
    let subnets = site::subnets(PATH, subnets)?;
    for subnet in &subnets {
        check_subnet(state, device, subnet).map_err(|reason| FieldError::new(PATH, reason))?;
    }
    device.change_site(|site| site.approved = subnets);
    Ok(())
}

/// Refuses a subnet that would take traffic from what it is not for.
fn check_subnet(state: &NetworkState, device: &Device, subnet: &IpNet) -> Result<(), String> {
    if device.site.as_ref().is_some_and(|site| site.approved.contains(subnet)) {
        return Ok(());
    }
    for (kind, pool) in state.network.pools.iter() {
        if site::overlap(subnet, &pool) {
            return Err(format!("{subnet} overlaps the network's own {kind} {pool}"));
        }
    }
    // Devices that have it behind the tunnel would not find the tunnel any more.
    let directors = state.directors.iter().flat_map(|director| director.endpoints.iter().map(SocketAddr::ip));
    let directors = directors.chain(state.network.directors.iter().map(SocketAddr::ip));
    let public = state.network.public_addresses.iter().copied();
    if let Some(inside) = public.chain(directors).find(|address| subnet.contains(address)) {
        return Err(format!(
            "{subnet} holds {inside}, where devices reach a registrar or director: they would lose it; approve smaller \
             subnets around it"
        ));
    }
    let mut all = 0;
    for other in state.sites().filter(|other| other.uid != device.uid) {
        for approved in other.site.iter().flat_map(|site| &site.approved) {
            if approved != subnet && site::overlap(approved, subnet) {
                return Err(format!(
                    "{subnet} overlaps {approved}, which {} may carry; approve the very same subnet for a standby, or \
                     others that do not overlap",
                    other.name
                ));
            }
            all += 1;
        }
    }
    if all >= SUBNETS_MAX {
        return Err(format!("the network has {all} subnets already; at most {SUBNETS_MAX} are allowed"));
    }
    Ok(())
}

/// Plans the deletion of a device: its name and key are free again, its addresses after their quarantine.
///
/// # Errors
/// See [`AdminError`].
pub fn delete(
    index: &Index,
    network: &str,
    name: &str,
    version: Revision,
    now: Timestamp,
) -> Result<Outcome<()>, AdminError> {
    let device = get(index, network, name)?;
    check_version(KIND, name, version, device.revision)?;
    Ok(Outcome::Write(Plan::new(remove_device(device, now), ())))
}

/// Finds a device by name.
///
/// # Errors
/// [`AdminError::NotFound`].
pub fn get<'a>(index: &'a Index, network: &str, name: &str) -> Result<&'a Device, AdminError> {
    let found = find(index, network)?.devices.by_name(&name.to_ascii_lowercase());
    found.map(|device| &**device).ok_or_else(|| AdminError::NotFound { kind: KIND, name: short(name) })
}
