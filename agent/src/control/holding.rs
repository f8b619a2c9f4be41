//! Which peers are held, and what is looked up: what the data plane wants, what the registrar says.

use std::net::IpAddr;

use ipnet::IpNet;
use muster_common::time::Instant;
use muster_proto::registration::Peer;

use super::{
    Action, Control, LookupBy, is_routed,
    peer::{PeerError, PeerInfo},
    peers::Reason,
};
use crate::datapath::Command;

impl Control {
    /// Takes over what the registrar says of a peer by itself.
    pub(super) fn offer(&mut self, peer: Peer, reason: Reason, now: Instant) {
        let uid = peer.device_uid.clone();
        if uid == self.start.device_uid {
            return;
        }
        match PeerInfo::new(peer, self.start.accepts_aes) {
            Ok(info) => self.put(info, reason, now),
            Err(error) => {
                if !matches!(error, PeerError::NotAllowed(_)) {
                    tracing::warn!(%error, "cannot use a peer that the registrar described");
                }
                self.remove_for_good(&uid, now);
            }
        }
    }

    pub(super) fn put(&mut self, mut info: PeerInfo, reason: Reason, now: Instant) {
        info.config.relays = self.directors.relays(&info.message);
        if let Some(settings) = &self.settings {
            // Of the pools each address is looked up by itself.
            let is_in_pool =
                |s: &IpNet| settings.pools.iter().any(|pool| pool.contains(s) || s.contains(pool));
            info.config.subnets.retain(|subnet| !is_in_pool(subnet));
            info.avoid(&settings.site_routes());
        }
        let mut commands = Vec::new();
        let name = info.message.name.clone();
        if self.peers.put(info, reason, &mut commands) {
            self.persist_soon(now);
            if reason == Reason::Changed {
                self.actions.push_back(Action::ForgetName(name));
            }
        }
        self.tell_datapath(commands);
    }

    /// The registrar says that this peer is gone, or hidden.
    pub(super) fn remove_for_good(&mut self, uid: &str, now: Instant) {
        let mut commands = Vec::new();
        let name = self.peers.get(uid).map(|info| info.message.name.clone());
        if self.peers.remove_for_good(uid, &mut commands) {
            self.persist_soon(now);
            self.actions.extend(name.map(Action::ForgetName));
        }
        self.tell_datapath(commands);
    }

    pub(super) fn handle_wanted(&mut self, by: LookupBy, now: Instant) {
        let held = self.holder(by);
        if let Some(info) = held.and_then(|uid| self.peers.get(uid)) {
            let (uid, config) = (info.message.device_uid.clone(), info.config.clone());
            self.peers.touch(&uid);
            self.tell_datapath(vec![Command::AddPeer(config)]);
            return;
        }
        let possible = match by {
            LookupBy::Address(address) => self.is_peer_address(address),
            LookupBy::PublicKey(key) => key != self.start.public_key,
        };
        if possible && !self.is_refused() {
            self.want(by, true, now);
        } else {
            self.answer_negative(by);
        }
    }

    /// Uid of the peer held that a lookup by `by` would find.
    pub(super) fn holder(&self, by: LookupBy) -> Option<&str> {
        match by {
            LookupBy::Address(address) => self.peers.by_address(address),
            LookupBy::PublicKey(key) => self.peers.by_key(&key),
        }
    }

    pub(super) fn want(&mut self, by: LookupBy, awaited: bool, now: Instant) {
        if !self.lookups.want(by, awaited, now) && awaited {
            self.answer_negative(by);
        }
    }

    /// Whether another device may have `address`.
    pub(super) fn is_peer_address(&self, address: IpAddr) -> bool {
        self.settings
            .as_ref()
            .is_some_and(|settings| is_routed(&settings.routes, address) && !settings.is_own(address))
    }

    /// There is no such device; if it was held, it is hidden or gone by now.
    pub(super) fn not_found(&mut self, by: LookupBy, awaited: bool, now: Instant) {
        let held = self.holder(by);
        if let Some(uid) = held.map(str::to_owned) {
            match by {
                // An address of a network behind it says nothing of the peer itself.
                LookupBy::Address(address) if !self.peers.has_address(&uid, address) => {
                    let mut commands = Vec::new();
                    self.peers.lose_subnets_at(&uid, address, &mut commands);
                    self.tell_datapath(commands);
                    self.persist_soon(now);
                }
                _ => self.remove_for_good(&uid, now),
            }
        }
        if awaited {
            self.answer_negative(by);
        }
    }

    pub(super) fn answer_negative(&mut self, by: LookupBy) {
        self.actions.push_back(Action::Datapath(match by {
            LookupBy::Address(address) => Command::NoSuchDevice(address),
            LookupBy::PublicKey(key) => Command::UnknownKey(key),
        }));
    }

    pub(super) fn tell_datapath(&mut self, commands: Vec<Command>) {
        self.actions.extend(commands.into_iter().map(Action::Datapath));
    }
}

pub(super) fn is_it(info: &PeerInfo, by: LookupBy) -> bool {
    match by {
        LookupBy::Address(address) => {
            info.config.virtual_addresses.contains(&address)
                || info.config.subnets.iter().any(|subnet| subnet.contains(&address))
        }
        LookupBy::PublicKey(key) => info.config.public_key == key,
    }
}
