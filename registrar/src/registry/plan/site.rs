//! Hosts without an agent become devices: those that an agent names, once an operator lets it speak for hosts.

use std::{convert::Infallible, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use muster_common::time::Timestamp;
use uuid::Uuid;

use super::{
    Held, Outcome, Plan, claim,
    enroll::new_device,
    register::{DeviceError, find, reserve},
    release_address, take_address, when_open, with_device,
};
use crate::{
    allocation::PoolKind,
    registry::{
        carried::Take,
        device::Device,
        index::Index,
        keys::{self, Owner},
        site::{Carrier, Site},
    },
    store::{Condition, Revision, Txn},
};

/// Plans that a subnet has another carrier, or with `None` none, unless it is not at `revision` any more (0: there is
/// none). The reply is whether it is written.
///
/// # Errors
/// None.
pub fn carry(
    index: &Index,
    network: &str,
    subnet: &IpNet,
    revision: Revision,
    carrier: Option<&Carrier>,
) -> Result<Outcome<bool>, Infallible> {
    let found =
        index.network(network).map(|state| state.carriers.get(subnet).map_or(0, |found| found.revision));
    if found != Some(revision) {
        return Ok(Outcome::Done(false));
    }
    let key = keys::carrier(network, subnet);
    let txn = Txn::new().when(Condition::ModRevision(key.clone(), revision));
    let txn = match carrier {
        // While there is a device, the network stays.
        Some(carrier) => when_open(txn, network)
            .when(Condition::Exists(keys::device(network, carrier.device)))
            .put(key, carrier.encode()),
        None => txn.delete(key),
    };
    Ok(Outcome::Write(Plan::new(txn, true)))
}

/// Hosts in one transaction: each is a device, its name and two addresses.
pub const BATCH: usize = 16;

/// Plans that hosts of the device `uid` become devices of its namespace, some of them in each transaction. The reply is
/// whether it was the last one. `uids` are for new devices: random, and the same each time that this is planned.
///
/// # Errors
/// [`DeviceError::Gone`] and [`DeviceError::Revoked`]; [`DeviceError::Allocation`] if a host finds no address.
pub fn settle(
    index: &mut Index,
    network: &str,
    uid: Uuid,
    uids: &[Uuid; BATCH],
    attempt: u32,
    now: Timestamp,
) -> Result<Outcome<bool>, DeviceError> {
    let agent = find(index, network, uid)?.clone();
    let Some(site) = agent.site.as_deref().filter(|site| site.may_proxy) else {
        return Ok(Outcome::Done(true));
    };
    if index.lock_revision(network).is_some() {
        return Ok(Outcome::Done(true));
    }
    let wanted: Vec<Wanted> = wanted(index, &agent, site).collect();
    if wanted.is_empty() {
        return Ok(Outcome::Done(true));
    }
    let mut is_last = wanted.len() <= BATCH;
    // It may have changed since: an operator may have taken back what allows this.
    let seen = Condition::ModRevision(keys::device(network, uid), agent.revision);
    let mut txn = when_open(Txn::new(), network).when(seen);
    let mut reservations: Vec<Held> = Vec::new();
    for (i, (wanted, uid)) in wanted.into_iter().zip(uids).enumerate() {
        match add(index, &mut txn, &agent, wanted, *uid, attempt, now) {
            Ok(held) => reservations.extend(held),
            Err(error) if i == 0 => return Err(error),
            // Those before it get what there is; then this one is the first, and the error is told.
            Err(_) => {
                is_last = false;
                break;
            }
        }
    }
    Ok(Outcome::Write(Plan { txn, reservations, reply: is_last }))
}

/// A host that its agent may have and has not, or not as it is reached.
struct Wanted {
    name: Box<str>,
    /// The pool that its address comes from: of the family in which the agent reaches it, since the agent translates one
    /// to one. An address of the other family would lead nowhere.
    kind: PoolKind,
    /// The device that it is already.
    old: Option<Arc<Device>>,
}

fn wanted(index: &Index, agent: &Device, site: &Site) -> impl Iterator<Item = Wanted> {
    let state = index.network(&agent.network);
    let hosts = state.into_iter().flat_map(|state| site.hosts.iter().map(move |host| (state, host)));
    hosts.filter_map(|(state, host)| {
        let old = state.devices.by_name(&host.name);
        let is_ipv4 = host.lan_address.is_ipv4();
        let kind = if is_ipv4 { PoolKind::DeviceV4 } else { PoolKind::DeviceV6 };
        let is_wanted = old.is_none_or(|device| match state.may_take(agent, device) {
            Take::May => true,
            Take::Has => {
                let has = |v4: bool| device.addresses().any(|address| address.is_ipv4() == v4);
                let can = state.network.pools.get(kind).is_some();
                has(!is_ipv4) || (can && !has(is_ipv4))
            }
            Take::Not(_) => false,
        });
        is_wanted.then(|| Wanted { name: host.name.clone(), kind, old: old.cloned() })
    })
}

/// Adds to `txn` that `agent` has a host.
fn add(
    index: &mut Index,
    txn: &mut Txn,
    agent: &Device,
    wanted: Wanted,
    uid: Uuid,
    attempt: u32,
    now: Timestamp,
) -> Result<Vec<Held>, DeviceError> {
    let Wanted { name, kind, old } = wanted;
    let Some(state) = index.network_mut(&agent.network) else { return Err(DeviceError::Gone) };
    let mut device = match &old {
        Some(old) => (**old).clone(),
        None => new_device(state, uid, &name, &agent.namespace, now),
    };
    device.change_site(|site| site.proxied_by = Some(agent.uid));
    let (uid, network) = (device.uid, device.network.clone());
    let given_back = match kind {
        PoolKind::DeviceV4 => device.ipv6.take().map(IpAddr::from),
        _ => device.ipv4.take().map(IpAddr::from),
    };
    let reservations = reserve(state, &mut device, &[kind], attempt, now)?;
    let mut with = std::mem::take(txn);
    with = match &old {
        Some(old) => with_device(with, old, &device),
        None => {
            let (key, name_key) = (keys::device(&network, uid), keys::device_name(&network, &name));
            with.when(Condition::Absent(key.clone()))
                .when(Condition::Absent(name_key.clone()))
                .put(key, device.encode())
                .put(name_key, claim(uid))
        }
    };
    for held in &reservations {
        with = take_address(state, with, Owner::Device, uid, held.reservation.address());
    }
    if let Some(address) = given_back {
        with = release_address(with, &network, Owner::Device, &uid.to_string(), address, now);
    }
    *txn = with;
    Ok(reservations)
}
