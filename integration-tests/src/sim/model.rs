//! The reference model: plain maps of who has what, kept from the store's changes alone, and of every packet sent.
//! It knows nothing of indexes, plans or pools.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use muster_common::time::Timestamp;
use muster_proto::{
    admin,
    storage::{StoredAddress, StoredToken},
};
use muster_registrar::{
    registry::keys::{self, Key},
    store::{Event, Revision, WatchBatch},
};
use prost::Message as _;
use uuid::Uuid;

use super::{Checked, Violation, must, trace::digest};

/// What is known of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Known {
    pub(super) name: String,
    pub(super) addresses: Vec<IpAddr>,
    pub(super) key: Vec<u8>,
    pub(super) revoked: bool,
    pub(super) joined: bool,
}

/// A packet on its way.
#[derive(Clone, Debug)]
pub(super) struct Sent {
    pub(super) from: Uuid,
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    pub(super) digest: u64,
    pub(super) delivered: bool,
}

/// The reference model.
#[derive(Debug)]
pub(super) struct Model {
    quarantine: Duration,
    pub(super) devices: BTreeMap<Uuid, Known>,
    names: BTreeMap<String, Uuid>,
    keys: BTreeMap<Vec<u8>, Uuid>,
    pub(super) addresses: BTreeMap<IpAddr, Uuid>,
    pub(super) released: BTreeMap<IpAddr, Timestamp>,
    /// Devices that are deleted or revoked, and by which revision.
    pub(super) gone: BTreeMap<Uuid, Revision>,
    /// Tokens that an operator has revoked, and when.
    pub(super) revoked_tokens: BTreeMap<String, Timestamp>,
    /// Addresses that each device had first: it has them for good.
    first: BTreeMap<Uuid, Vec<IpAddr>>,
    packets: BTreeMap<u64, Sent>,
    next_packet: u64,
    /// Packets that were answered with "unreachable".
    pub(super) unreachable: BTreeSet<u64>,
}

impl Model {
    pub(super) fn new(quarantine: Duration) -> Self {
        Self {
            quarantine,
            devices: BTreeMap::new(),
            names: BTreeMap::new(),
            keys: BTreeMap::new(),
            addresses: BTreeMap::new(),
            released: BTreeMap::new(),
            gone: BTreeMap::new(),
            revoked_tokens: BTreeMap::new(),
            first: BTreeMap::new(),
            packets: BTreeMap::new(),
            next_packet: 1,
            unreachable: BTreeSet::new(),
        }
    }

    /// For how long a released address has no new owner.
    pub(super) fn quarantine(&self) -> Duration {
        self.quarantine
    }

    /// Whether the device is there, has joined, and is not revoked.
    pub(super) fn is_member(&self, uid: Uuid) -> bool {
        self.devices.get(&uid).is_some_and(|known| known.joined && !known.revoked)
    }

    /// The device with this name.
    pub(super) fn by_name(&self, name: &str) -> Option<Uuid> {
        self.names.get(name).copied()
    }

    /// Takes in one revision of the store, and checks it.
    pub(super) fn observe(&mut self, batch: &WatchBatch, now: Timestamp) -> Checked {
        let bad =
            |error: prost::DecodeError| Violation(format!("the store holds what does not decode: {error}"));
        let mut left: Vec<IpAddr> = Vec::new();
        // What is given up in a transaction can be taken in the same one only by nobody: both are checked.
        for event in &batch.events {
            match (keys::parse(event.key()), event) {
                (Some(Key::Device { uid, .. }), Event::Put(kv)) => {
                    let device = admin::Device::decode(&*kv.value).map_err(bad)?;
                    self.put(uid, &device, batch.revision, now)?;
                }
                (Some(Key::Token { name, .. }), Event::Put(kv)) => {
                    let token = StoredToken::decode(&*kv.value).map_err(bad)?.token.unwrap_or_default();
                    if token.spec.is_some_and(|spec| spec.revoked) {
                        self.revoked_tokens.entry(name.to_owned()).or_insert(now);
                    }
                }
                (Some(Key::Device { uid, .. }), Event::Delete { .. }) => {
                    let Some(known) = self.devices.remove(&uid) else { continue };
                    self.names.remove(&known.name);
                    self.keys.remove(&known.key);
                    for address in &known.addresses {
                        self.addresses.remove(address);
                    }
                    left.extend(known.addresses);
                    self.gone.entry(uid).or_insert(batch.revision);
                }
                _ => {}
            }
        }
        for event in &batch.events {
            let Some(Key::Address { address, .. }) = keys::parse(event.key()) else { continue };
            match event {
                Event::Put(kv) => {
                    let stored = StoredAddress::decode(&*kv.value).map_err(bad)?;
                    let Some(at) = stored.released_at else {
                        self.released.remove(&address);
                        let owner = self.addresses.get(&address).map(Uuid::to_string);
                        must(owner.as_ref() == Some(&stored.owner_uid), || {
                            format!("{address} is stored as {}'s, and is {owner:?}'s", stored.owner_uid)
                        })?;
                        continue;
                    };
                    let at = Timestamp::from_epoch(Duration::from_secs(at.seconds.try_into().unwrap_or(0)));
                    self.released.insert(address, at);
                }
                Event::Delete { .. } => {
                    let over = self.released.remove(&address).is_some_and(|at| at + self.quarantine <= now);
                    must(over, || format!("the quarantine of {address} was forgotten before its end"))?;
                }
            }
        }
        for address in left {
            must(self.released.contains_key(&address), || format!("{address} left without a quarantine"))?;
        }
        Ok(())
    }

    fn put(&mut self, uid: Uuid, device: &admin::Device, revision: Revision, now: Timestamp) -> Checked {
        let meta = device.metadata.clone().unwrap_or_default();
        let status = device.status.clone().unwrap_or_default();
        let new = Known {
            name: meta.name,
            addresses: [&status.virtual_ipv4, &status.virtual_ipv6]
                .iter()
                .filter_map(|a| a.parse().ok())
                .collect(),
            key: status.public_key.to_vec(),
            revoked: device.spec.as_ref().is_some_and(|spec| spec.revoked),
            joined: status.certificate_expiry.is_some(),
        };
        let old = self.devices.get(&uid).cloned().unwrap_or_default();
        must(old.name.is_empty() || old.name == new.name, || format!("{uid} was renamed: {old:?} {new:?}"))?;
        let name_owner = self.names.insert(new.name.clone(), uid);
        must(name_owner.is_none_or(|owner| owner == uid), || format!("{:?} has two owners", new.name))?;
        if !old.key.is_empty() {
            self.keys.remove(&old.key);
        }
        if !new.key.is_empty() {
            let owner = self.keys.insert(new.key.clone(), uid);
            must(owner.is_none(), || format!("the key of {:?} has two owners", new.name))?;
        }
        for address in &old.addresses {
            must(new.addresses.contains(address), || format!("{uid} lost its address {address}"))?;
        }
        for address in &new.addresses {
            match self.addresses.insert(*address, uid) {
                Some(owner) => must(owner == uid, || format!("{address} has two owners: {owner} and {uid}"))?,
                None => {
                    let free = self.released.get(address).is_none_or(|at| *at + self.quarantine <= now);
                    must(free, || format!("{address} was given to {uid} within its quarantine"))?;
                }
            }
        }
        let first = self.first.entry(uid).or_default();
        for address in &new.addresses {
            if !first.contains(address) {
                let same_family = first.iter().any(|a| a.is_ipv4() == address.is_ipv4());
                must(!same_family, || format!("{uid} got {address}, but had {first:?}"))?;
                first.push(*address);
            }
        }
        if new.revoked {
            self.gone.entry(uid).or_insert(revision);
        } else {
            self.gone.remove(&uid);
        }
        self.devices.insert(uid, new);
        Ok(())
    }

    /// A new packet from device to address, of a length that depends on its number.
    pub(super) fn packet(&mut self, from: Uuid, source: IpAddr, destination: IpAddr) -> (u64, Vec<u8>) {
        let id = self.next_packet;
        self.next_packet += 1;
        let mut body = id.to_be_bytes().to_vec();
        body.extend((0..id * 37 % 1200).map(|n| (id.wrapping_mul(n + 1) >> 3) as u8));
        let packet = inner_packet(source, destination, &body);
        let sent = Sent { from, source, destination, digest: digest(&packet), delivered: false };
        self.packets.insert(id, sent);
        (id, packet)
    }

    /// A packet came out of the TUN device of `uid`, which has `addresses`; it must be one that was sent, by whom it
    /// claims, to this device, for the first time, and unaltered.
    pub(super) fn deliver(
        &mut self,
        uid: Uuid,
        addresses: &[IpAddr],
        from: &[u8],
        packet: &[u8],
    ) -> Checked<u64> {
        let id =
            packet_id(packet).ok_or_else(|| Violation(format!("delivered to {uid}: no packet of ours")))?;
        let sent = self.packets.get_mut(&id);
        let sent = sent.ok_or_else(|| Violation(format!("packet {id} was delivered, but never sent")))?;
        must(sent.digest == digest(packet), || format!("packet {id} was altered on its way"))?;
        must(!sent.delivered, || format!("packet {id} was delivered twice"))?;
        must(addresses.contains(&sent.destination), || {
            format!("packet {id} to {} was delivered to {uid}, which has {addresses:?}", sent.destination)
        })?;
        sent.delivered = true;
        // The key that it came under is, or was, its sender's.
        let sender = self.devices.get(&sent.from);
        must(sender.is_none_or(|known| known.key == from && known.addresses.contains(&sent.source)), || {
            format!("packet {id} of {} came under another key or address", sent.from)
        })?;
        Ok(id)
    }

    /// Whether a packet was delivered.
    pub(super) fn was_delivered(&self, id: u64) -> bool {
        self.packets.get(&id).is_some_and(|sent| sent.delivered)
    }
}

/// The packet's number; `None` if it is none of ours.
pub(super) fn packet_id(packet: &[u8]) -> Option<u64> {
    let header = if packet.first()? >> 4 == 4 { 20 } else { 40 };
    Some(u64::from_be_bytes(*packet.get(header..)?.first_chunk()?))
}

/// An IP packet with protocol 253 (RFC 3692), or between families that do not fit, none.
fn inner_packet(source: IpAddr, destination: IpAddr, body: &[u8]) -> Vec<u8> {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => v4(source, destination, body),
        (IpAddr::V6(source), IpAddr::V6(destination)) => v6(source, destination, body),
        _ => Vec::new(),
    }
}

fn v4(source: Ipv4Addr, destination: Ipv4Addr, body: &[u8]) -> Vec<u8> {
    let length = (20 + body.len()) as u16;
    let mut packet = vec![0x45, 0];
    packet.extend(length.to_be_bytes());
    packet.extend([0, 0, 0, 0, 64, 253, 0, 0]);
    packet.extend(source.octets());
    packet.extend(destination.octets());
    packet.extend(body);
    packet
}

fn v6(source: Ipv6Addr, destination: Ipv6Addr, body: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((body.len() as u16).to_be_bytes());
    packet.extend([253, 64]);
    packet.extend(source.octets());
    packet.extend(destination.octets());
    packet.extend(body);
    packet
}
