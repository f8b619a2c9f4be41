//! What agents have found out by probes of the endpoints that they host.

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;

use super::{
    Outcome, Plan,
    presence::BATCH,
    register::{DeviceError, find},
};
use crate::{
    registry::{index::Index, keys, readiness::Readiness},
    store::{Condition, Txn},
};

/// What a probe has found: the key of the Service, the device, and whether it is ready.
pub type Finding = (Box<str>, Uuid, bool);

/// Plans that what `agent` has found is written, of its own device and of the hosts that it speaks for; what it has not
/// found out stays as it was. The reply is whether that is all.
///
/// # Errors
/// [`DeviceError`] if the device of the agent may not say anything any more.
pub fn report(
    index: &Index,
    network: &str,
    agent: Uuid,
    findings: &[Finding],
) -> Result<Outcome<bool>, DeviceError> {
    find(index, network, agent)?;
    let Some(state) = index.network(network) else { return Err(DeviceError::Gone) };
    let mut by_device: BTreeMap<Uuid, BTreeMap<&str, bool>> = BTreeMap::new();
    for (service, device, ready) in findings {
        by_device.entry(*device).or_default().insert(service, *ready);
    }
    let (mut txn, mut is_all) = (Txn::new(), true);
    for (uid, found) in by_device {
        let Some(device) = state.devices.by_uid(uid).filter(|device| state.agent_of(device) == agent) else {
            continue;
        };
        let old = state.readiness.get(&uid).cloned().unwrap_or_default();
        // Of Services that do not ask any more, nothing is kept.
        let is_asked = |service: &str| state.is_probed(service, device);
        let kept = old.services.iter().filter(|service| !found.contains_key(&***service));
        let ready = found.iter().filter(|(_, ready)| **ready).map(|(service, _)| Box::from(*service));
        let new: BTreeSet<Box<str>> =
            kept.cloned().chain(ready).filter(|service| is_asked(service)).collect();
        if new == old.services {
            continue;
        }
        if txn.ops.len() >= BATCH {
            is_all = false;
            break;
        }
        let key = keys::readiness(network, uid);
        txn = txn
            .when(Condition::ModRevision(key.clone(), old.revision))
            .when(Condition::Exists(keys::device(network, uid)))
            .put(key, Readiness::encode(&new));
    }
    if txn.ops.is_empty() {
        return Ok(Outcome::Done(true));
    }
    Ok(Outcome::Write(Plan::new(txn, is_all)))
}
