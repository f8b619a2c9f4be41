//! What devices ask for themselves: Register, new endpoints, Renew, Deregister.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;
use muster_common::time::Timestamp;
use uuid::Uuid;

use super::{Held, Outcome, Plan, change_device, claim, remove_device, take_address};
use crate::{
    allocation::{AllocationError, PoolKind},
    registry::{
        device::{Device, Outside, PublicKey},
        index::Index,
        keys::{self, Owner},
        site::Host,
        state::NetworkState,
        view::is_registered_differently,
    },
    store::Condition,
};

/// What a device tells when it registers.
#[derive(Debug)]
pub struct Registration<'a> {
    /// WireGuard public key.
    pub key: PublicKey,
    /// Private addresses with port, best first.
    pub endpoints: &'a [SocketAddr],
    /// How it is reached from outside; `None` leaves what is known.
    pub outside: Option<&'a Outside>,
    /// The hosts without an agent that it wants to speak for.
    pub hosts: &'a [Host],
    /// The subnets that it offers to carry.
    pub subnets: &'a [IpNet],
    /// Whether it can receive packets in AES-256-GCM, too.
    pub aes_256_gcm: bool,
    /// Version of its agent.
    pub agent_version: &'a str,
    /// The device as it was when this request was planned for the first time; `None` then.
    pub before: Option<&'a Device>,
    /// How often this request has been planned before: leads to other addresses after a collision.
    pub attempt: u32,
    /// The time.
    pub now: Timestamp,
}

/// Why a device's request was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// There is no such device any more.
    #[error(
        "this device is no longer registered: it was deleted or has left; join again with a new token: muster-agent join"
    )]
    Gone,
    /// An operator has revoked the device.
    #[error("this device has been revoked; ask the operator of the network")]
    Revoked,
    /// Another device has the key.
    #[error(
        "another device of the network has this public key already; make a new key (muster-agent leave, then join)"
    )]
    KeyTaken,
    /// The device has registered as something else while this request was under way.
    #[error("this device has registered anew meanwhile; try again")]
    Superseded,
    /// No address is left.
    #[error(transparent)]
    Allocation(#[from] AllocationError),
}

/// The device that a certificate names, unless it is gone or revoked.
///
/// # Errors
/// [`DeviceError::Gone`] and [`DeviceError::Revoked`].
pub fn find<'a>(index: &'a Index, network: &str, uid: Uuid) -> Result<&'a Arc<Device>, DeviceError> {
    match index.device(network, uid) {
        None => Err(DeviceError::Gone),
        Some(device) if device.revoked => Err(DeviceError::Revoked),
        Some(device) => Ok(device),
    }
}

/// Plans Register. A registration that changes nothing writes nothing. One that was overtaken by another one of the device is
/// refused: it may be of an earlier life of its agent, whose last words still arrive.
///
/// # Errors
/// See [`DeviceError`].
pub fn register(
    index: &mut Index,
    network: &str,
    uid: Uuid,
    request: &Registration<'_>,
) -> Result<Outcome<()>, DeviceError> {
    let old = find(index, network, uid)?.clone();
    let Some(state) = index.network_mut(network) else { return Err(DeviceError::Gone) };
    let mut new = Device { key: Some(request.key), aes_256_gcm: request.aes_256_gcm, ..(*old).clone() };
    if *old.endpoints != *request.endpoints {
        new.endpoints = request.endpoints.into();
    }
    if let Some(outside) = request.outside {
        new.outside = outside.clone().known();
    }
    let offer = old.site.as_deref().map_or((&[][..], &[][..]), |site| (&site.hosts, &site.offered));
    if offer != (request.hosts, request.subnets) {
        new.change_site(|site| {
            (site.hosts, site.offered) = (request.hosts.into(), request.subnets.into());
        });
    }
    if *old.agent_version != *request.agent_version {
        new.agent_version = request.agent_version.into();
    }
    if state.devices.by_key(&request.key).is_some_and(|owner| owner.uid != uid) {
        return Err(DeviceError::KeyTaken);
    }
    // Of two requests of one device the one that is written last may be the older one.
    let is_late = request.before.is_some_and(|before| is_registered_differently(before, &old));
    if is_late && is_registered_differently(&old, &new) {
        return Err(DeviceError::Superseded);
    }
    let reservations = reserve(state, &mut new, &BOTH, request.attempt, request.now)?;
    if new == *old {
        return Ok(Outcome::Done(()));
    }
    let mut txn = change_device(&old, &new);
    for held in &reservations {
        txn = take_address(state, txn, Owner::Device, uid, held.reservation.address());
    }
    if old.key != new.key {
        let key = keys::device_key(network, &request.key);
        txn = txn.when(Condition::Absent(key.clone())).put(key, claim(uid));
        if let Some(key) = &old.key {
            txn = txn.delete(keys::device_key(network, key));
        }
    }
    Ok(Outcome::Write(Plan { txn, reservations, reply: () }))
}

/// What a device with an agent has.
const BOTH: [PoolKind; 2] = [PoolKind::DeviceV4, PoolKind::DeviceV6];

/// Reserves the addresses of these `kinds` that `device` does not have yet.
pub(super) fn reserve(
    state: &mut NetworkState,
    device: &mut Device,
    kinds: &[PoolKind],
    attempt: u32,
    now: Timestamp,
) -> Result<Vec<Held>, AllocationError> {
    let mut reservations: Vec<Held> = Vec::new();
    let owner = device.uid.to_string();
    for kind in kinds {
        let missing = match kind {
            PoolKind::DeviceV4 => device.ipv4.is_none(),
            PoolKind::DeviceV6 => device.ipv6.is_none(),
            PoolKind::ServiceV4 | PoolKind::ServiceV6 => false,
        };
        let Some(pool) = state.pool(*kind).filter(|_| missing) else { continue };
        match pool.reserve(&owner, attempt, now) {
            Ok(reservation) => {
                match reservation.address() {
                    IpAddr::V4(v4) => device.ipv4 = Some(v4),
                    IpAddr::V6(v6) => device.ipv6 = Some(v6),
                }
                reservations.push(Held {
                    network: device.network.clone(),
                    owner: Owner::Device,
                    reservation,
                });
            }
            Err(error) => {
                reservations.iter().for_each(|held| state.cancel(held));
                return Err(error);
            }
        }
    }
    Ok(reservations)
}

/// Plans new endpoints, and new ways from outside; `None` leaves what is known of these.
///
/// # Errors
/// [`DeviceError::Gone`] and [`DeviceError::Revoked`].
pub fn endpoints(
    index: &Index,
    network: &str,
    uid: Uuid,
    endpoints: &[SocketAddr],
    outside: Option<&Outside>,
) -> Result<Outcome<()>, DeviceError> {
    let old = find(index, network, uid)?;
    let outside = outside.map_or_else(|| old.outside.clone(), |outside| outside.clone().known());
    if *old.endpoints == *endpoints && old.outside == outside {
        return Ok(Outcome::Done(()));
    }
    let new = Device { endpoints: endpoints.into(), outside, ..(**old).clone() };
    Ok(Outcome::Write(Plan::new(change_device(old, &new), ())))
}

/// Plans that a device has its next certificate, which expires at `expiry`.
///
/// # Errors
/// [`DeviceError::Gone`] and [`DeviceError::Revoked`].
pub fn renew(index: &Index, network: &str, uid: Uuid, expiry: Timestamp) -> Result<Outcome<()>, DeviceError> {
    let old = find(index, network, uid)?;
    if old.certificate_expiry == Some(expiry) {
        return Ok(Outcome::Done(()));
    }
    let new = Device { certificate_expiry: Some(expiry), ..(**old).clone() };
    Ok(Outcome::Write(Plan::new(change_device(old, &new), ())))
}

/// Plans Deregister.
///
/// # Errors
/// [`DeviceError::Gone`] and [`DeviceError::Revoked`].
pub fn deregister(
    index: &Index,
    network: &str,
    uid: Uuid,
    now: Timestamp,
) -> Result<Outcome<()>, DeviceError> {
    let device = find(index, network, uid)?;
    Ok(Outcome::Write(Plan::new(remove_device(device, now), ())))
}
