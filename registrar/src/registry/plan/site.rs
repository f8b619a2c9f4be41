//! Hosts without an agent become devices: those that an agent names, once an operator lets it speak for hosts.

use std::{convert::Infallible, sync::Arc};

use ipnet::IpNet;
use muster_common::time::Timestamp;
use uuid::Uuid;

use super::{
    Held, Outcome, Plan, claim,
    enroll::new_device,
    register::{DeviceError, find, reserve},
    take_address, when_open, with_device,
};
use crate::{
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

/// A host that its agent may have and has not.
enum Wanted {
    New(Box<str>),
    /// A host that another agent spoke for.
    Old(Arc<Device>),
}

fn wanted(index: &Index, agent: &Device, site: &Site) -> impl Iterator<Item = Wanted> {
    let state = index.network(&agent.network);
    let hosts = state.into_iter().flat_map(|state| site.hosts.iter().map(move |host| (state, host)));
    hosts.filter_map(|(state, host)| match state.devices.by_name(&host.name) {
        None => Some(Wanted::New(host.name.clone())),
        Some(device) => (state.may_take(agent, device) == Take::May).then(|| Wanted::Old(device.clone())),
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
    let name = match wanted {
        Wanted::Old(old) => {
            let mut new = (*old).clone();
            new.change_site(|site| site.proxied_by = Some(agent.uid));
            *txn = with_device(std::mem::take(txn), &old, &new);
            return Ok(Vec::new());
        }
        Wanted::New(name) => name,
    };
    let Some(state) = index.network_mut(&agent.network) else { return Err(DeviceError::Gone) };
    let mut device = new_device(state, uid, &name, &agent.namespace, now);
    device.change_site(|site| site.proxied_by = Some(agent.uid));
    let reservations = reserve(state, &mut device, attempt, now)?;
    let (key, name_key) = (keys::device(&device.network, uid), keys::device_name(&device.network, &name));
    let with = std::mem::take(txn)
        .when(Condition::Absent(key.clone()))
        .when(Condition::Absent(name_key.clone()))
        .put(key, device.encode())
        .put(name_key, claim(uid));
    *txn = device.addresses().fold(with, |txn, ip| take_address(state, txn, Owner::Device, uid, ip));
    Ok(reservations)
}
