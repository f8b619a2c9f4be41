//! Whose probes change with a change of the registry.

use std::collections::BTreeSet;

use uuid::Uuid;

use crate::registry::{Change, Index, Service, Slice, named::Keyed as _};

/// The devices whose agents have to be told.
pub(super) fn concerned(index: &Index, change: &Change) -> BTreeSet<Uuid> {
    match change {
        Change::Service { old, new } => {
            let asks = |service: &Service| {
                let probe = service.readiness_probe().cloned();
                probe.map(|probe| (probe, service.ports.clone(), service.stored.spec.clone()))
            };
            let (before, now) = (old.as_deref().and_then(asks), new.as_deref().and_then(asks));
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
