//! One device: its peers by key, by session index and by virtual address, and the interface to the shell.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::{IpAddr, SocketAddr},
};

use ipnet::IpNet;
use muster_common::time::{Instant, Timestamp};
use rand::{SeedableRng as _, rngs::StdRng};
use rustc_hash::FxHashMap;

use crate::{
    config::{Config, PeerConfig},
    cookie::Guard,
    endpoint::{DirectorId, DirectorLink, Endpoint, Handle, Links},
    event::{Event, Reason, Sent, Transmit},
    icmp,
    key::PublicKey,
    limits::{MAX_PACKET, REMEMBERED_TIMESTAMPS},
    lookup::{AddressLookups, AddressVerdict, KeyLookups, Recent},
    message::Initiation,
    noise::Identity,
    offload::{SuperPacket, VirtioHeader},
    outgoing::Outgoing,
    packet::{Header, is_to_one_device},
    path_mtu::MIN_PLPMTU,
    peer::Peer,
    sealing::Sealing,
    shared::{PeerId, Shared},
    stats::{Dropped, Drops, PeerSnapshot},
    subnets::Subnets,
    tai64n::{LabelClock, Tai64n},
};

mod receive;

type Deadlines = BTreeSet<(Instant, PeerId)>;

/// A WireGuard device without I/O.
///
/// After any call of a `handle_*`, `begin_*` or `finish_*` function or of one that changes peers, drain
/// [`Self::poll_transmit`] (before sending the next batch that packets were sealed into, or packets to one peer may
/// overtake each other), [`Self::poll_packet`] and [`Self::poll_event`], and arrange for [`Self::handle_timeout`] at
/// [`Self::poll_timeout`]. `now` must not go backwards from call to call.
///
/// # Several threads
///
/// What costs time, the ciphers, needs no tunnel. So a shell with several threads shares one behind a lock, which each
/// takes once or twice for a batch of packets, and reads the clock after it has the lock:
///
/// - Out: with the lock, [`Self::begin_send`] for each packet; without it, [`Sealing::seal`], and the batch is sent.
/// - In: with the lock, [`Self::begin_receive`] for each datagram, which deals with handshakes at once; without it,
///   [`Opening::open`](crate::Opening::open); with the lock again, [`Self::finish_receive`] for each.
/// - Before it gives the lock back, it drains [`Self::poll_transmit`] and sends what comes: among it are packets that have
///   waited for a session, and once the lock is free another thread may seal and send later ones of the same flow.
///
/// Counters are given out when sending begins, and checked for good when receiving is finished. Between these the
/// receiver's window, 8,128 messages, is all that threads may be apart: batches are to be small against it.
pub struct Tunnel {
    shared: Shared,
    guard: Guard,
    peers: Vec<Option<Box<Peer>>>,
    free: Vec<PeerId>,
    by_key: BTreeMap<PublicKey, PeerId>,
    by_address: FxHashMap<IpAddr, PeerId>,
    /// For addresses that are in none of these.
    subnets: Subnets,
    /// When peers want to be woken; an entry may be earlier than its peer's need, never later.
    deadlines: Deadlines,
    addresses: AddressLookups,
    keys: KeyLookups,
    timestamps: Recent<PublicKey, Tai64n>,
}

impl Tunnel {
    /// A tunnel without peers, at `now` on the boot clock and `civil` on the wall's.
    pub fn new(config: Config, now: Instant, civil: Timestamp) -> Self {
        let identity = Identity::new(config.private_key);
        Self {
            guard: Guard::new(&identity.public, config.handshake_rate, config.accepts_aes, now),
            shared: Shared {
                identity,
                accepts_aes: config.accepts_aes,
                rng: StdRng::from_seed(config.seed),
                labels: LabelClock::new(now, civil),
                mtu: config.mtu.clamp(MIN_PLPMTU.into(), MAX_PACKET) as u16,
                links: Links::default(),
                indices: FxHashMap::default(),
                transmits: VecDeque::new(),
                packets: VecDeque::new(),
                events: VecDeque::new(),
                drops: Drops::default(),
            },
            peers: Vec::new(),
            free: Vec::new(),
            by_key: BTreeMap::new(),
            by_address: FxHashMap::default(),
            subnets: Subnets::default(),
            deadlines: BTreeSet::new(),
            addresses: AddressLookups::new(),
            keys: KeyLookups::new(now),
            timestamps: Recent::new(REMEMBERED_TIMESTAMPS),
        }
    }

    /// This device's public key.
    pub fn public_key(&self) -> PublicKey {
        self.shared.identity.public
    }

    /// Tells that civil time is `civil` at `now`. Peers compare the labels of our handshakes, which come from it, so it
    /// is only ever set forward.
    pub fn set_civil_time(&mut self, now: Instant, civil: Timestamp) {
        self.shared.labels.set(now, civil);
    }

    /// Tells that a datagram of `datagram_len` octets, the header of its frame included, to `destination` was refused for its size, and what the kernel
    /// knows of the path: the MTU with IP and UDP headers, in octets.
    pub fn path_too_big(
        &mut self,
        destination: SocketAddr,
        outer_mtu: usize,
        datagram_len: usize,
        now: Instant,
    ) {
        for id in 0..self.peers.len() as PeerId {
            self.with_peer(id, |peer, shared| {
                peer.path_too_big(destination, outer_mtu, datagram_len, shared, now);
            });
        }
    }

    /// Tells that this host reaches others in another way than before: nothing is known of the paths any more.
    pub fn paths_changed(&mut self, now: Instant) {
        for id in 0..self.peers.len() as PeerId {
            self.with_peer(id, |peer, shared| peer.host_moved(shared, now));
        }
    }

    /// Tells how a director is reached from now on; `None`: it is not. Peers that were reached through it fall back to what
    /// they have.
    pub fn set_director(&mut self, director: DirectorId, link: Option<DirectorLink>, now: Instant) {
        let before = self.shared.links.get(director);
        if before == link {
            return;
        }
        self.shared.links.set(director, link);
        let is_new = before.is_none();
        for id in 0..self.peers.len() as PeerId {
            self.with_peer(id, |peer, shared| peer.director_changed(director, is_new, shared, now));
        }
    }

    /// Tells that a director does not have this device.
    pub fn unreachable_through(&mut self, director: DirectorId, handle: Handle, now: Instant) {
        let relay = Endpoint::Relay { director, handle };
        for id in 0..self.peers.len() as PeerId {
            self.with_peer(id, |peer, shared| peer.unreachable_through(relay, shared, now));
        }
    }

    // Peers

    /// Adds a peer, or updates the one with this key. Packets and initiations that waited for it go on. A virtual
    /// address or a subnet that another peer had is this peer's from now on, and a peer that thereby has no address left
    /// is removed, so that a device that changed its key is simply added with the new one. This device's own key is ignored.
    pub fn add_peer(&mut self, mut config: PeerConfig, now: Instant) {
        let key = config.public_key;
        if key == self.public_key() {
            return;
        }
        config.virtual_addresses.sort_unstable();
        config.virtual_addresses.dedup();
        config.subnets = config.subnets.iter().map(IpNet::trunc).collect();
        config.subnets.sort_unstable();
        config.subnets.dedup();
        let (addresses, subnets) = (config.virtual_addresses.clone(), config.subnets.clone());
        let id = match self.by_key.get(&key) {
            Some(id) => *id,
            None => self.insert(config.clone(), now),
        };
        let mut moved = self.route(id, &addresses);
        moved.extend(self.route_subnets(id, &subnets));
        let Some(peer) = self.peers.get_mut(id as usize).and_then(Option::as_mut) else { return };
        peer.update(config, &mut self.shared, now);
        for packet in moved {
            peer.enqueue(packet, &mut self.shared);
        }
        for address in &addresses {
            for packet in self.addresses.found(address) {
                peer.enqueue(packet, &mut self.shared);
            }
        }
        for packet in subnets.iter().flat_map(|subnet| self.addresses.found_in(subnet)) {
            peer.enqueue(packet, &mut self.shared);
        }
        if let Some(waiting) = self.keys.found(&key, now) {
            // It was admitted when it came; why it may not be answered is counted with the peer.
            let _ = self.answer_initiation(Initiation(&waiting.message), waiting.source, now);
        }
        self.with_peer(id, |peer, shared| peer.send_queued(shared, now));
    }

    /// Replaces the settings of a live peer, whose session goes on; `false` if there is none with this key.
    pub fn update_peer(&mut self, config: PeerConfig, now: Instant) -> bool {
        let is_held = self.by_key.contains_key(&config.public_key);
        if is_held {
            self.add_peer(config, now);
        }
        is_held
    }

    /// Forgets a peer and its keys; `false` if there is none with this key.
    pub fn remove_peer(&mut self, key: &PublicKey) -> bool {
        let Some(id) = self.by_key.remove(key) else { return false };
        let Some(mut peer) = self.peers.get_mut(id as usize).and_then(Option::take) else { return false };
        peer.shut_down(&mut self.shared);
        if let Some(timestamp) = peer.last_timestamp {
            self.timestamps.put(*key, timestamp);
        }
        for address in &peer.addresses {
            if self.by_address.get(address) == Some(&id) {
                self.by_address.remove(address);
            }
        }
        for subnet in &peer.subnets {
            if self.subnets.get(subnet) == Some(id) {
                self.subnets.remove(subnet);
            }
        }
        if let Some(at) = peer.scheduled {
            self.deadlines.remove(&(at, id));
        }
        self.free.push(id);
        true
    }

    /// Starts a handshake with a peer unless there is one under way, without waiting for a packet.
    pub fn connect(&mut self, key: &PublicKey, now: Instant) {
        if let Some(id) = self.by_key.get(key) {
            self.with_peer(*id, |peer, shared| peer.start_handshake(shared, now));
        }
    }

    /// Answers [`Event::LookupAddress`]: no device has the address. What waited for it, and what comes for it in the
    /// next seconds, is answered with ICMP.
    pub fn no_such_device(&mut self, address: IpAddr, now: Instant) {
        for packet in self.addresses.no_such_device(address, now) {
            self.unreachable(&packet);
        }
    }

    /// Answers [`Event::LookupKey`]: no device has the key, or none that may talk to this one.
    pub fn unknown_key(&mut self, key: PublicKey, now: Instant) {
        self.keys.unknown(key, now);
    }

    /// The peer with this key as it is now.
    pub fn peer(&self, key: &PublicKey, now: Instant) -> Option<PeerSnapshot> {
        let id = self.by_key.get(key)?;
        self.peers.get(*id as usize)?.as_ref().map(|peer| peer.snapshot(now))
    }

    /// All peers as they are now, by key.
    pub fn peers(&self, now: Instant) -> impl Iterator<Item = PeerSnapshot> {
        self.by_key.values().filter_map(move |id| Some(self.peers.get(*id as usize)?.as_ref()?.snapshot(now)))
    }

    /// The peer that has this virtual address, or carries it.
    pub fn peer_at(&self, address: &IpAddr) -> Option<PublicKey> {
        let id = self.id_at(address)?;
        self.peers.get(id as usize)?.as_ref().map(|peer| peer.public_key)
    }

    /// Everything dropped since the start, peers that are gone included.
    pub fn drops(&self) -> Drops {
        self.shared.drops
    }

    // Packets from the TUN device

    /// Takes a packet and seals it into `out`, or lets it wait.
    pub fn handle_packet(
        &mut self,
        packet: &[u8],
        now: Instant,
        out: &mut Outgoing,
    ) -> Result<Sent, Dropped> {
        match SuperPacket::parse(VirtioHeader::default(), packet) {
            Ok(packet) => self.handle_super_packet(&packet, now, out),
            Err(_) => {
                self.shared.drops.count(Dropped::InvalidPacket);
                Err(Dropped::InvalidPacket)
            }
        }
    }

    /// Takes a packet of one or more segments, and seals these into `out`, or lets them wait.
    pub fn handle_super_packet(
        &mut self,
        packet: &SuperPacket<'_>,
        now: Instant,
        out: &mut Outgoing,
    ) -> Result<Sent, Dropped> {
        let Some(sealing) = self.begin_send(packet, now)? else { return Ok(Sent::Queued) };
        sealing.seal(packet, out).inspect_err(|reason| self.shared.drops.count(*reason))?;
        Ok(Sent::Sealed)
    }

    /// Takes a packet of one or more segments and does everything but to seal them, which is left to the [`Sealing`];
    /// `None` if they wait for a session or a lookup. From here on they count as sent, and their counters as used.
    pub fn begin_send(&mut self, packet: &SuperPacket<'_>, now: Instant) -> Result<Option<Sealing>, Dropped> {
        self.send(packet, now).inspect_err(|reason| {
            self.shared.drops.count(*reason);
            tracing::trace!(%reason, "packet dropped");
        })
    }

    fn send(&mut self, packet: &SuperPacket<'_>, now: Instant) -> Result<Option<Sealing>, Dropped> {
        let destination = packet.destination();
        if packet.segment_len(0) > MAX_PACKET {
            return Err(Dropped::TooBig);
        }
        if let Some(id) = self.id_at(&destination) {
            return self
                .with_peer(id, |peer, shared| peer.begin_send(packet, shared, now))
                .unwrap_or(Err(Dropped::NoRoute));
        }
        if !is_to_one_device(destination) {
            return Err(Dropped::NoRoute);
        }
        let mut result = Ok(None);
        for index in 0..packet.segments() {
            let segment = packet.segment(index);
            let (verdict, dropped) = self.addresses.packet(destination, &segment, now);
            self.shared.drops.add(Dropped::QueueFull, dropped);
            match verdict {
                AddressVerdict::Ask => self.shared.event(Event::LookupAddress(destination)),
                AddressVerdict::Wait => {}
                AddressVerdict::NoSuchDevice => {
                    if let Some(error) = icmp::unreachable(&segment) {
                        self.shared.packet(error);
                    }
                    return Err(Dropped::Unreachable);
                }
                AddressVerdict::Full => result = Err(Dropped::QueueFull),
            }
        }
        result
    }

    /// Drops a packet that has waited in vain, with an error to its sender.
    fn unreachable(&mut self, packet: &[u8]) {
        self.shared.drops.count(Dropped::Unreachable);
        if let Some(error) = icmp::unreachable(packet) {
            self.shared.packet(error);
        }
    }

    // Time, and what there is to do for the shell

    /// When [`Self::handle_timeout`] wants to be called next, and what for. It may turn out to be early.
    pub fn poll_timeout(&self) -> Option<(Instant, Reason)> {
        let peer = self.deadlines.first().map(|(at, id)| {
            let next = self.peers.get(*id as usize).and_then(|p| p.as_ref()?.next_timeout());
            (*at, next.map_or(Reason::Idle, |(_, reason)| reason))
        });
        let lookup = self.addresses.next_timeout().map(|at| (at, Reason::Lookup));
        peer.into_iter().chain(lookup).min()
    }

    /// Does everything that is due at `now`.
    pub fn handle_timeout(&mut self, now: Instant) {
        let mut due = Vec::new();
        while let Some((at, id)) = self.deadlines.first().copied().filter(|(at, _)| *at <= now) {
            self.deadlines.remove(&(at, id));
            due.push(id);
        }
        for id in due {
            self.with_peer(id, |peer, shared| {
                peer.scheduled = None;
                peer.handle_timeout(shared, now);
            });
        }
        while let Some(packets) = self.addresses.take_expired(now) {
            for packet in packets {
                self.unreachable(&packet);
            }
        }
    }

    /// The next datagram to send.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.shared.transmits.pop_front()
    }

    /// The next packet that the core itself has for the TUN device: ICMP errors.
    pub fn poll_packet(&mut self) -> Option<Vec<u8>> {
        self.shared.packets.pop_front()
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.shared.events.pop_front()
    }

    // Inside

    /// The peer that packets from and to `address` belong to.
    fn id_at(&self, address: &IpAddr) -> Option<PeerId> {
        self.by_address.get(address).copied().or_else(|| self.subnets.find(*address))
    }

    /// Runs `act` on a peer and keeps its deadline current.
    fn with_peer<T>(&mut self, id: PeerId, act: impl FnOnce(&mut Peer, &mut Shared) -> T) -> Option<T> {
        let peer = self.peers.get_mut(id as usize)?.as_mut()?;
        let result = act(peer, &mut self.shared);
        schedule(peer, id, &mut self.deadlines);
        Some(result)
    }

    fn insert(&mut self, config: PeerConfig, now: Instant) -> PeerId {
        let key = config.public_key;
        let id = self.free.pop().unwrap_or_else(|| {
            self.peers.push(None);
            (self.peers.len() - 1) as PeerId
        });
        let mut peer = Peer::new(id, config, &self.shared, now);
        peer.last_timestamp = self.timestamps.remove(&key);
        if let Some(slot) = self.peers.get_mut(id as usize) {
            *slot = Some(Box::new(peer));
        }
        self.by_key.insert(key, id);
        id
    }

    /// Gives `addresses`, and no others, to a peer. Returns the packets that waited at those who had them.
    fn route(&mut self, id: PeerId, addresses: &[IpAddr]) -> Vec<Vec<u8>> {
        let former =
            self.peers.get(id as usize).and_then(Option::as_ref).map_or(vec![], |p| p.addresses.clone());
        for address in former {
            if !addresses.contains(&address) && self.by_address.get(&address) == Some(&id) {
                self.by_address.remove(&address);
            }
        }
        let mut moved = Vec::new();
        for address in addresses {
            let Some(other) = self.by_address.insert(*address, id).filter(|other| *other != id) else {
                continue;
            };
            let Some(loser) = self.peers.get_mut(other as usize).and_then(Option::as_mut) else { continue };
            moved.extend(loser.take_queued(|p| Header::parse(p).is_some_and(|h| h.destination == *address)));
            loser.addresses.retain(|a| a != address);
            if loser.addresses.is_empty() {
                let key = loser.public_key;
                self.remove_peer(&key);
            }
        }
        moved
    }

    /// Gives `subnets`, and no others, to a peer; those who had them keep their sessions. Returns the packets that waited
    /// there.
    fn route_subnets(&mut self, id: PeerId, subnets: &[IpNet]) -> Vec<Vec<u8>> {
        let former =
            self.peers.get(id as usize).and_then(Option::as_ref).map_or(vec![], |p| p.subnets.clone());
        for subnet in former.iter().filter(|subnet| !subnets.contains(subnet)) {
            if self.subnets.get(subnet) == Some(id) {
                self.subnets.remove(subnet);
            }
        }
        let mut moved = Vec::new();
        for subnet in subnets {
            let Some(other) = self.subnets.insert(subnet, id).filter(|other| *other != id) else { continue };
            let Some(loser) = self.peers.get_mut(other as usize).and_then(Option::as_mut) else { continue };
            loser.subnets.retain(|s| s != subnet);
            let (by_address, table) = (&self.by_address, &self.subnets);
            moved.extend(loser.take_queued(|packet| {
                Header::parse(packet).is_some_and(|header| {
                    let to = header.destination;
                    subnet.contains(&to) && !by_address.contains_key(&to) && table.find(to) == Some(id)
                })
            }));
        }
        moved
    }

    /// Whether every peer is woken in time.
    #[cfg(test)]
    pub(crate) fn deadlines_hold(&self) -> bool {
        self.peers.iter().flatten().all(|peer| {
            peer.next_timeout().is_none_or(|(at, _)| peer.scheduled.is_some_and(|scheduled| scheduled <= at))
        })
    }

    #[cfg(test)]
    pub(crate) fn peer_mut(&mut self, key: &PublicKey) -> &mut Peer {
        let id = self.by_key[key];
        self.peers[id as usize].as_mut().unwrap()
    }

    /// Sizes of everything that could grow: indices, deadlines, routes, slots.
    #[cfg(test)]
    pub(crate) fn sizes(&self) -> [usize; 4] {
        [self.shared.indices.len(), self.deadlines.len(), self.by_address.len(), self.peers.len()]
    }
}

/// Brings a peer's deadline forward if something has become due earlier.
fn schedule(peer: &mut Peer, id: PeerId, deadlines: &mut Deadlines) {
    if let Some((at, _)) = peer.next_timeout()
        && peer.scheduled.is_none_or(|scheduled| at < scheduled)
    {
        if let Some(old) = peer.scheduled.replace(at) {
            deadlines.remove(&(old, id));
        }
        deadlines.insert((at, id));
    }
}
