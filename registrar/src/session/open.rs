//! The sessions that are open, by device and by what they hold, and who has to be told what of a change.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use uuid::Uuid;

use super::{
    Session, lock,
    mailbox::{End, Mailbox},
};
use crate::registry::{
    Device,
    index::ServiceName,
    site::Carrier,
    view::{is_configured_differently, is_registered_differently, is_seen_differently},
};

#[derive(Debug, Default)]
pub(super) struct Open {
    pub(super) sessions: BTreeMap<u64, Arc<Session>>,
    pub(super) by_device: HashMap<Uuid, u64>,
    /// Which sessions hold a peer.
    pub(super) holders: HashMap<Uuid, Vec<u64>>,
    /// Which sessions hold the name of a Service, by network and the Service's key.
    pub(super) service_holders: HashMap<Arc<str>, HashMap<Arc<str>, Vec<u64>>>,
}

impl Open {
    /// The configuration of all devices of a network has changed, and so may have what they are told of others.
    pub(super) fn tell_all(&self, network: &str) {
        for session in self.sessions.values().filter(|session| *session.network == *network) {
            session.post(|mailbox| {
                mailbox.config();
                mailbox.all_peers();
            });
        }
    }

    /// All devices are to be told where registrars are.
    pub(super) fn tell_where_registrars_are(&self) {
        for session in self.sessions.values() {
            session.post(Mailbox::config);
        }
    }

    /// Ends a session. What it held is forgotten at once: a client that does not read cannot keep it.
    pub(super) fn end(&mut self, id: u64, reason: End) {
        let Some(session) = self.sessions.get(&id).cloned() else { return };
        let mut held = Default::default();
        session.post(|mailbox| held = mailbox.end(reason));
        let (peers, services) = held;
        for peer in peers {
            self.remove_holder(peer, id);
        }
        for service in services {
            self.remove_service_holder(&session.network, &service, id);
        }
    }

    pub(super) fn remove_service_holder(&mut self, network: &str, service: &str, id: u64) {
        let Some(services) = self.service_holders.get_mut(network) else { return };
        if let Some(holders) = services.get_mut(service) {
            holders.retain(|holder| *holder != id);
            if holders.is_empty() {
                services.remove(service);
            }
        }
        if services.is_empty() {
            self.service_holders.remove(network);
        }
    }

    pub(super) fn service_changed(&self, service: &ServiceName, revision: u64) {
        let holders = self.service_holders.get(&service.network).and_then(|held| held.get(&*service.key));
        for id in holders.into_iter().flatten() {
            if let Some(session) = self.sessions.get(id) {
                session.post(|mailbox| {
                    mailbox.service(&service.key);
                    mailbox.bookmark(revision);
                });
            }
        }
    }

    /// What these devices have to probe has changed.
    pub(super) fn probes_changed(&self, devices: impl Iterator<Item = Uuid>) {
        for session in devices.filter_map(|uid| self.sessions.get(self.by_device.get(&uid)?)) {
            session.post(Mailbox::probes);
        }
    }

    /// The Services of a network that have virtual IPs have changed.
    pub(super) fn virtual_services_changed(&self, network: &str) {
        for session in self.sessions.values().filter(|session| *session.network == *network) {
            if lock(&session.mailbox).virtual_services() {
                session.ready.notify_one();
            }
        }
    }

    pub(super) fn remove_holder(&mut self, peer: Uuid, id: u64) {
        if let Some(holders) = self.holders.get_mut(&peer) {
            holders.retain(|holder| *holder != id);
            if holders.is_empty() {
                self.holders.remove(&peer);
            }
        }
    }

    pub(super) fn device_changed(&mut self, old: Option<&Device>, new: Option<&Device>, revision: u64) {
        let Some(device) = new.or(old).map(|device| device.uid) else { return };
        if let Some(id) = self.by_device.get(&device).copied() {
            match new {
                None => self.end(id, End::Gone),
                Some(new) if new.revoked => self.end(id, End::Revoked),
                Some(new) if old.is_some_and(|old| is_registered_differently(old, new)) => {
                    self.end(id, End::Reregistered);
                }
                Some(_) => {}
            }
        }
        let own = self.by_device.get(&device).and_then(|id| self.sessions.get(id));
        if let Some(own) = own {
            own.post(|mailbox| match (old, new) {
                (_, None) => {}
                (Some(old), Some(new)) => {
                    if is_configured_differently(old, new) {
                        mailbox.config();
                    }
                    // Policy may show it others than before.
                    if old.namespace != new.namespace || old.labels() != new.labels() {
                        mailbox.all_peers();
                    }
                }
                (None, Some(_)) => mailbox.config(),
            });
        }
        let unseen = matches!((old, new), (Some(old), Some(new)) if !is_seen_differently(old, new));
        if unseen {
            return;
        }
        self.tell_holders(device, revision);
        // A host without an agent is told of as part of the device that speaks for it.
        let agents = [old, new].into_iter().flatten().filter_map(Device::proxied_by);
        for agent in agents.collect::<BTreeSet<_>>() {
            self.tell_holders(agent, revision);
            self.tell_config(agent);
        }
    }

    /// Tells the sessions that hold `peer` that it has changed.
    pub(super) fn tell_holders(&self, peer: Uuid, revision: u64) {
        for id in self.holders.get(&peer).into_iter().flatten() {
            if let Some(session) = self.sessions.get(id) {
                session.post(|mailbox| {
                    mailbox.peer(peer);
                    mailbox.bookmark(revision);
                });
            }
        }
    }

    pub(super) fn tell_config(&self, device: Uuid) {
        if let Some(session) = self.by_device.get(&device).and_then(|id| self.sessions.get(id)) {
            session.post(Mailbox::config);
        }
    }

    /// A subnet has come, gone, or is carried by another device.
    pub(super) fn carrier_changed(
        &self,
        network: &str,
        old: Option<Carrier>,
        new: Option<Carrier>,
        revision: u64,
    ) {
        let device = |carrier: Option<Carrier>| carrier.map(|carrier| carrier.device);
        let (old, new) = (device(old), device(new));
        if old == new {
            return;
        }
        for device in [old, new].into_iter().flatten() {
            self.tell_holders(device, revision);
            self.tell_config(device);
        }
        // All others have the same route whoever carries it.
        if old.is_none() || new.is_none() {
            for session in self.sessions.values().filter(|session| *session.network == *network) {
                session.post(Mailbox::config);
            }
        }
    }
}
