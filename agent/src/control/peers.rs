//! The peers held: by uid, key and virtual address, bounded, with what the registrar has yet to be told of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;
use muster_proto::registration::{HeldPeers, Peer};
use muster_tunnel::{DirectorId, Handle};

use super::{MAX_PEERS, peer::PeerInfo};
use crate::datapath::{Command, PublicKey};

#[derive(Debug)]
struct Held {
    info: PeerInfo,
    used: u64,
}

/// Why a peer is put in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    /// A lookup found it: the data plane waits to hear of it, even if it is held.
    Lookup,
    /// It was introduced, or is known from disk.
    Introduced,
    /// It has changed.
    Changed,
}

#[derive(Debug, Default)]
pub(super) struct Peers {
    held: BTreeMap<String, Held>,
    keys: BTreeMap<PublicKey, String>,
    addresses: BTreeMap<IpAddr, String>,
    subnets: BTreeMap<IpNet, String>,
    order: BTreeMap<u64, String>,
    clock: u64,
    added: BTreeSet<String>,
    removed: BTreeSet<String>,
    /// Peers that the registrar removed, with the number of removals by then, for as long as an older lookup is
    /// under way and could bring one of them back.
    tombstones: BTreeMap<String, u64>,
    removals: u64,
}

impl Peers {
    /// What is told of any peer from now on counts as newer than what is held.
    pub(super) fn forget_revisions(&mut self) {
        for held in self.held.values_mut() {
            held.info.message.revision = 0;
        }
    }

    /// Holds `info`, or what is newer; adds to `commands` what the data plane must do. True if anything changed.
    pub(super) fn put(&mut self, info: PeerInfo, reason: Reason, commands: &mut Vec<Command>) -> bool {
        let uid = info.message.device_uid.clone();
        let old = self.held.get(&uid).map(|held| held.info.clone());
        if let Some(old) = &old
            && old.message.revision > info.message.revision
        {
            // What is held is newer, but the data plane may wait for an answer all the same.
            if reason == Reason::Lookup {
                commands.push(Command::AddPeer(old.config.clone()));
            }
            return false;
        }
        self.touch(&uid);
        if old.as_ref() == Some(&info) {
            if reason != Reason::Changed {
                commands.push(Command::AddPeer(info.config));
            }
            return false;
        }
        if let Some(old) = &old {
            self.unindex(old);
            if old.config.public_key != info.config.public_key {
                commands.push(Command::RemovePeer(old.config.public_key));
            }
        }
        // An address, a subnet or a key has one owner; the registrar's newest word counts.
        let addresses = info.config.virtual_addresses.iter().filter_map(|a| self.addresses.get(a));
        let subnets = info.config.subnets.iter().filter_map(|s| self.subnets.get(s));
        let others: BTreeSet<String> = addresses.chain(subnets).cloned().collect();
        for other in others {
            self.lose(&other, &info, commands);
        }
        if let Some(other) = self.keys.get(&info.config.public_key).cloned() {
            self.remove(&other, commands);
        }
        while old.is_none() && self.held.len() >= MAX_PEERS {
            let Some((_, longest_unused)) = self.order.first_key_value() else { break };
            let longest_unused = longest_unused.clone();
            self.remove(&longest_unused, commands);
        }
        let is_update = old.as_ref().is_some_and(|o| o.config.public_key == info.config.public_key);
        commands.push(if is_update && reason == Reason::Changed {
            Command::UpdatePeer(info.config.clone())
        } else {
            Command::AddPeer(info.config.clone())
        });
        self.keys.insert(info.config.public_key, uid.clone());
        for address in &info.config.virtual_addresses {
            self.addresses.insert(*address, uid.clone());
        }
        for subnet in &info.config.subnets {
            self.subnets.insert(*subnet, uid.clone());
        }
        self.clock += 1;
        if let Some(old) = self.held.insert(uid.clone(), Held { info, used: self.clock }) {
            self.order.remove(&old.used);
        } else {
            self.removed.remove(&uid);
            self.added.insert(uid.clone());
        }
        self.order.insert(self.clock, uid);
        true
    }

    /// Peers are reached through directors as `relays` says, home first; adds to `commands` what the data plane must do.
    pub(super) fn relay(
        &mut self,
        relays: impl Fn(&Peer) -> Vec<(DirectorId, Handle)>,
        commands: &mut Vec<Command>,
    ) {
        for held in self.held.values_mut() {
            let relays = relays(&held.info.message);
            if held.info.config.relays != relays {
                held.info.config.relays = relays;
                commands.push(Command::UpdatePeer(held.info.config.clone()));
            }
        }
    }

    /// No peer is reached in any of these subnets from now on; adds to `commands` what the data plane must do.
    pub(super) fn avoid(&mut self, routes: &[IpNet], commands: &mut Vec<Command>) {
        for held in self.held.values_mut() {
            let before = held.info.config.endpoints.clone();
            held.info.avoid(routes);
            if held.info.config.endpoints != before {
                commands.push(Command::UpdatePeer(held.info.config.clone()));
            }
        }
    }

    /// `winner` has addresses or subnets of `uid` from now on. One without an address left goes; any other keeps its
    /// session.
    fn lose(&mut self, uid: &str, winner: &PeerInfo, commands: &mut Vec<Command>) {
        self.change(uid, |info| info.lose(winner), commands);
        if self.get(uid).is_some_and(|info| info.config.virtual_addresses.is_empty()) {
            self.remove(uid, commands);
        }
    }

    /// The registrar says that nobody carries `address`, which lies in a subnet of this peer's.
    pub(super) fn lose_subnets_at(&mut self, uid: &str, address: IpAddr, commands: &mut Vec<Command>) {
        self.change(uid, |info| info.lose_subnets_at(address), commands);
    }

    fn change(&mut self, uid: &str, act: impl FnOnce(&mut PeerInfo), commands: &mut Vec<Command>) {
        let Some(mut info) = self.get(uid).cloned() else { return };
        self.unindex(&info);
        act(&mut info);
        self.keys.insert(info.config.public_key, uid.to_owned());
        for address in &info.config.virtual_addresses {
            self.addresses.insert(*address, uid.to_owned());
        }
        for subnet in &info.config.subnets {
            self.subnets.insert(*subnet, uid.to_owned());
        }
        commands.push(Command::UpdatePeer(info.config.clone()));
        if let Some(held) = self.held.get_mut(uid) {
            held.info = info;
        }
    }

    /// Forgets `uid` at once. True if it was held.
    pub(super) fn remove(&mut self, uid: &str, commands: &mut Vec<Command>) -> bool {
        let Some(held) = self.held.remove(uid) else { return false };
        self.order.remove(&held.used);
        self.unindex(&held.info);
        self.added.remove(uid);
        self.removed.insert(uid.to_owned());
        commands.push(Command::RemovePeer(held.info.config.public_key));
        true
    }

    /// As [`Self::remove`], because the registrar says so: lookups under way do not bring it back.
    pub(super) fn remove_for_good(&mut self, uid: &str, commands: &mut Vec<Command>) -> bool {
        self.removals += 1;
        if self.tombstones.len() >= MAX_PEERS {
            self.tombstones.pop_first();
        }
        self.tombstones.insert(uid.to_owned(), self.removals);
        self.remove(uid, commands)
    }

    /// Whether `uid` was removed after `removals` removals, so that what is older is outdated.
    pub(super) fn removed_since(&self, uid: &str, removals: u64) -> bool {
        self.tombstones.get(uid).is_some_and(|at| *at > removals)
    }

    /// Forgets which peers were removed before the oldest lookup under way was sent.
    pub(super) fn prune(&mut self, oldest: Option<u64>) {
        match oldest {
            None => self.tombstones.clear(),
            Some(oldest) => self.tombstones.retain(|_, at| *at > oldest),
        }
    }

    /// The number of peers that the registrar has removed so far.
    pub(super) const fn removals(&self) -> u64 {
        self.removals
    }

    /// Forgets all.
    pub(super) fn clear(&mut self, commands: &mut Vec<Command>) {
        let uids: Vec<String> = self.held.keys().cloned().collect();
        for uid in uids {
            self.remove(&uid, commands);
        }
    }

    /// The peer has been used.
    pub(super) fn touch(&mut self, uid: &str) {
        if let Some(held) = self.held.get_mut(uid) {
            self.order.remove(&held.used);
            self.clock += 1;
            held.used = self.clock;
            self.order.insert(self.clock, uid.to_owned());
        }
    }

    /// Uid of the peer with this key.
    pub(super) fn by_key(&self, key: &PublicKey) -> Option<&str> {
        self.keys.get(key).map(String::as_str)
    }

    /// Uid of the peer with this virtual address, or else of the one that carries it.
    pub(super) fn by_address(&self, address: IpAddr) -> Option<&str> {
        let carries = || {
            let subnets = self.subnets.iter().filter(|(subnet, _)| subnet.contains(&address));
            subnets.max_by_key(|(subnet, _)| subnet.prefix_len()).map(|(_, uid)| uid)
        };
        self.addresses.get(&address).or_else(carries).map(String::as_str)
    }

    /// Whether `address` is one of the peer's own.
    pub(super) fn has_address(&self, uid: &str, address: IpAddr) -> bool {
        self.get(uid).is_some_and(|info| info.config.virtual_addresses.contains(&address))
    }

    /// What is known of `uid`.
    pub(super) fn get(&self, uid: &str) -> Option<&PeerInfo> {
        self.held.get(uid).map(|held| &held.info)
    }

    /// All uids, for the first message of a session; after it there is nothing more to tell.
    pub(super) fn hello(&mut self) -> Vec<String> {
        self.added.clear();
        self.removed.clear();
        self.held.keys().cloned().collect()
    }

    /// What has changed since the registrar was told last.
    pub(super) fn report(&mut self) -> Option<HeldPeers> {
        if self.added.is_empty() && self.removed.is_empty() {
            return None;
        }
        let added_uids = std::mem::take(&mut self.added).into_iter().collect();
        let removed_uids = std::mem::take(&mut self.removed).into_iter().collect();
        Some(HeldPeers { added_uids, removed_uids })
    }

    /// While no session is open there is nothing to tell: the next one begins with everything.
    pub(super) fn forget_report(&mut self) {
        self.added.clear();
        self.removed.clear();
    }

    /// All peers, by uid.
    pub(super) fn iter(&self) -> impl Iterator<Item = &PeerInfo> {
        self.held.values().map(|held| &held.info)
    }

    /// All peers as the registrar described them.
    pub(super) fn messages(&self) -> Vec<Peer> {
        self.iter().map(|info| info.message.clone()).collect()
    }

    /// How many are held.
    pub(super) fn len(&self) -> usize {
        self.held.len()
    }

    fn unindex(&mut self, info: &PeerInfo) {
        self.keys.remove(&info.config.public_key);
        for address in &info.config.virtual_addresses {
            self.addresses.remove(address);
        }
        for subnet in &info.config.subnets {
            self.subnets.remove(subnet);
        }
    }

    #[cfg(test)]
    pub(super) fn check(&self) {
        assert!(self.held.len() <= MAX_PEERS);
        assert_eq!(self.keys.len(), self.held.len());
        assert_eq!(self.order.len(), self.held.len());
        for (uid, held) in &self.held {
            assert_eq!(self.keys.get(&held.info.config.public_key), Some(uid));
            assert_eq!(self.order.get(&held.used), Some(uid));
            assert!(held.info.config.virtual_addresses.iter().all(|a| self.addresses.get(a) == Some(uid)));
            assert!(held.info.config.subnets.iter().all(|s| self.subnets.get(s) == Some(uid)));
        }
        assert!(self.addresses.values().all(|uid| self.held.contains_key(uid)));
        assert!(self.subnets.values().all(|uid| self.held.contains_key(uid)));
        assert!(self.added.len() + self.removed.len() <= 2 * MAX_PEERS + 64);
        assert!(self.tombstones.len() <= MAX_PEERS);
    }
}
