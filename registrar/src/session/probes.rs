//! Probes of endpoints: whose change with a change of the registry, and what agents say that they have found.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use muster_proto::{admin::ServiceSpec, registration::EndpointReadiness};
use tonic::Status;
use uuid::Uuid;

use super::{Hub, mailbox::SERVICES_MAX};
use crate::registry::{
    Change, CommitError, Index, Service, Slice,
    named::{self, Keyed as _},
    plan::{
        readiness::{self, Finding},
        register::DeviceError,
    },
};

/// The devices whose agents have to be told.
pub(super) fn concerned(index: &Index, change: &Change) -> BTreeSet<Uuid> {
    match change {
        Change::Service { old, new } => {
            let (before, now) = (old.as_deref().and_then(asked), new.as_deref().and_then(asked));
            // Those of a Service that is gone are told by its slices.
            let Some(service) = new.as_ref().filter(|_| before != now) else { return BTreeSet::new() };
            let state = index.network(&service.network);
            state.map(|state| state.agents_of(service.key())).unwrap_or_default()
        }
        Change::EndpointSlice { old, new } => {
            let Some(slice) = new.as_ref().or(old.as_ref()) else { return BTreeSet::new() };
            let Some(state) = index.network(&slice.network) else { return BTreeSet::new() };
            let service = slice.service_key().and_then(|key| state.services.services.by_key(&key));
            // Of one that is gone it is not known any more.
            if service.is_some_and(|service| service.readiness_probe().is_none()) {
                return BTreeSet::new();
            }
            let (before, now) = (selected(old.as_deref()), selected(new.as_deref()));
            let agent = |uid: &Uuid| state.devices.by_uid(*uid).map_or(*uid, |device| state.agent_of(device));
            before.symmetric_difference(&now).map(agent).collect()
        }
        _ => BTreeSet::new(),
    }
}

/// The devices in a slice that a Service has selected.
fn selected(slice: Option<&Slice>) -> BTreeSet<Uuid> {
    slice.and_then(|slice| slice.selected.as_deref()).unwrap_or_default().iter().copied().collect()
}

/// What probes of a Service's endpoints are made from, if it has any.
fn asked(service: &Service) -> Option<&ServiceSpec> {
    service.stored.spec.as_ref().filter(|spec| spec.readiness_probe.is_some())
}

/// What probes have found, as an agent tells it.
pub(super) fn findings(path: &str, told: &[EndpointReadiness]) -> Result<Vec<Finding>, Status> {
    if told.len() > SERVICES_MAX {
        return Err(Status::resource_exhausted(format!(
            "{path}: at most {SERVICES_MAX} endpoints are probed"
        )));
    }
    let read = |(i, found): (usize, &EndpointReadiness)| {
        let uid = Uuid::try_parse(&found.device_uid).map_err(|_| {
            Status::invalid_argument(format!("{path}.endpoints[{i}].device_uid: is not a device's uid"))
        })?;
        Ok((named::key(&found.namespace, &found.service), uid, found.ready))
    };
    told.iter().enumerate().map(read).collect()
}

/// What was to be written, and what has become of it.
pub(super) type Reported = (Vec<Finding>, Result<(), CommitError<DeviceError>>);

/// Writes, after a while, what the agent of `device` has found.
pub(super) async fn report(
    hub: Arc<Hub>,
    network: Arc<str>,
    device: Uuid,
    findings: Vec<Finding>,
    delay: Duration,
) -> Reported {
    if !delay.is_zero() {
        tokio::time::sleep(delay).await;
    }
    let mut result = Ok(false);
    while matches!(result, Ok(false)) {
        let plan = |index: &mut _, _| readiness::report(index, &network, device, &findings);
        result = hub.registry.commit(plan).await;
    }
    (findings, result.map(drop))
}
