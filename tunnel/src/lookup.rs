//! Peers on demand: packets whose address, and initiations whose key, is no peer's yet. They wait, bounded, for the
//! answer to one lookup; a negative answer is remembered for a few seconds.

use std::{
    collections::{BTreeMap, VecDeque},
    net::IpAddr,
};

use ipnet::IpNet;
use muster_common::time::Instant;

use crate::{
    endpoint::Endpoint,
    key::PublicKey,
    limits::{
        ADDRESS_LOOKUPS, KEY_LOOKUP_RATE, KEY_LOOKUPS, LOOKUP_QUEUE, LOOKUP_QUEUE_OCTETS, LOOKUP_TIMEOUT,
        NEGATIVE_LIFE, NEGATIVES,
    },
    message::INITIATION_LEN,
    rate::TokenBucket,
    stats::Dropped,
};

/// A map with room for so many entries; a new one pushes out the one that was put in longest ago.
pub(crate) struct Recent<K, V> {
    room: usize,
    entries: BTreeMap<K, (u64, V)>,
    order: BTreeMap<u64, K>,
    puts: u64,
}

impl<K: Copy + Ord, V> Recent<K, V> {
    pub(crate) fn new(room: usize) -> Self {
        Self { room, entries: BTreeMap::new(), order: BTreeMap::new(), puts: 0 }
    }

    pub(crate) fn get(&self, key: &K) -> Option<&V> {
        self.entries.get(key).map(|(_, value)| value)
    }

    pub(crate) fn put(&mut self, key: K, value: V) {
        self.remove(&key);
        if self.entries.len() >= self.room
            && let Some((_, oldest)) = self.order.pop_first()
        {
            self.entries.remove(&oldest);
        }
        self.puts += 1;
        self.order.insert(self.puts, key);
        self.entries.insert(key, (self.puts, value));
    }

    pub(crate) fn remove(&mut self, key: &K) -> Option<V> {
        let (put, value) = self.entries.remove(key)?;
        self.order.remove(&put);
        Some(value)
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.entries.len()
    }
}

/// What to do with a packet to an unknown address.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum AddressVerdict {
    /// It waits, and a lookup is to be asked for.
    Ask,
    /// It waits; the lookup is under way.
    Wait,
    /// It was lately said that there is no such device.
    NoSuchDevice,
    /// There is no room.
    Full,
}

struct AddressLookup {
    asked: Instant,
    packets: VecDeque<Vec<u8>>,
}

/// Packets to unknown addresses.
pub(crate) struct AddressLookups {
    pending: BTreeMap<IpAddr, AddressLookup>,
    /// In the order asked, with entries that are no longer pending among them.
    asked: VecDeque<(Instant, IpAddr)>,
    octets: usize,
    negative: Recent<IpAddr, Instant>,
}

impl AddressLookups {
    pub(crate) fn new() -> Self {
        Self { pending: BTreeMap::new(), asked: VecDeque::new(), octets: 0, negative: Recent::new(NEGATIVES) }
    }

    /// Decides on a packet and keeps it if it shall wait. The number is that of older packets dropped for it.
    pub(crate) fn packet(&mut self, to: IpAddr, packet: &[u8], now: Instant) -> (AddressVerdict, usize) {
        if self.negative.get(&to).is_some_and(|until| now < *until) {
            return (AddressVerdict::NoSuchDevice, 0);
        }
        if self.octets + packet.len() > LOOKUP_QUEUE_OCTETS {
            return (AddressVerdict::Full, 0);
        }
        if let Some(lookup) = self.pending.get_mut(&to) {
            let dropped =
                if lookup.packets.len() >= LOOKUP_QUEUE { lookup.packets.pop_front() } else { None };
            self.octets += packet.len();
            self.octets -= dropped.as_ref().map_or(0, Vec::len);
            lookup.packets.push_back(packet.to_vec());
            return (AddressVerdict::Wait, usize::from(dropped.is_some()));
        }
        if self.pending.len() >= ADDRESS_LOOKUPS {
            return (AddressVerdict::Full, 0);
        }
        self.octets += packet.len();
        self.pending.insert(to, AddressLookup { asked: now, packets: [packet.to_vec()].into() });
        self.asked.push_back((now, to));
        (AddressVerdict::Ask, 0)
    }

    /// The address became a peer's: its packets.
    pub(crate) fn found(&mut self, address: &IpAddr) -> VecDeque<Vec<u8>> {
        self.negative.remove(address);
        self.take(address)
    }

    /// The subnet became a peer's: the packets to addresses in it.
    pub(crate) fn found_in(&mut self, subnet: &IpNet) -> Vec<Vec<u8>> {
        let inside = self.pending.range(subnet.network()..=subnet.broadcast());
        let addresses: Vec<IpAddr> = inside.map(|(address, _)| *address).collect();
        addresses.iter().flat_map(|address| self.found(address)).collect()
    }

    /// No device has the address: its packets.
    pub(crate) fn no_such_device(&mut self, address: IpAddr, now: Instant) -> VecDeque<Vec<u8>> {
        self.negative.put(address, now + NEGATIVE_LIFE);
        self.take(&address)
    }

    fn take(&mut self, address: &IpAddr) -> VecDeque<Vec<u8>> {
        let packets = self.pending.remove(address).map(|lookup| lookup.packets).unwrap_or_default();
        self.octets -= packets.iter().map(Vec::len).sum::<usize>();
        self.skip_answered();
        packets
    }

    /// When the oldest lookup expires.
    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        self.asked.front().map(|(asked, _)| *asked + LOOKUP_TIMEOUT)
    }

    /// The packets of one lookup that got no answer in time.
    pub(crate) fn take_expired(&mut self, now: Instant) -> Option<VecDeque<Vec<u8>>> {
        let (asked, address) = *self.asked.front()?;
        (now >= asked + LOOKUP_TIMEOUT).then(|| self.take(&address))
    }

    /// Keeps the front of `asked` pending, and the whole of it bounded.
    fn skip_answered(&mut self) {
        let is_pending = |asked: Instant, ip: &IpAddr| self.pending.get(ip).is_some_and(|l| l.asked == asked);
        while self.asked.front().is_some_and(|(asked, ip)| !is_pending(*asked, ip)) {
            self.asked.pop_front();
        }
        if self.asked.len() > 2 * ADDRESS_LOOKUPS {
            self.asked.retain(|(asked, ip)| is_pending(*asked, ip));
        }
    }
}

/// An initiation that waits for its key to become a peer's.
pub(crate) struct WaitingInitiation {
    pub(crate) message: [u8; INITIATION_LEN],
    pub(crate) source: Endpoint,
    received: Instant,
    asked: Instant,
}

/// Initiations from unknown keys.
pub(crate) struct KeyLookups {
    waiting: Recent<PublicKey, WaitingInitiation>,
    negative: Recent<PublicKey, Instant>,
    lookups: TokenBucket,
}

impl KeyLookups {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            waiting: Recent::new(KEY_LOOKUPS),
            negative: Recent::new(NEGATIVES),
            lookups: TokenBucket::new(KEY_LOOKUP_RATE, KEY_LOOKUP_RATE, now),
        }
    }

    /// Keeps an authentic initiation in the place of an older one; `true` if a lookup is to be asked for.
    pub(crate) fn initiation(
        &mut self,
        key: PublicKey,
        message: &[u8; INITIATION_LEN],
        source: Endpoint,
        now: Instant,
    ) -> Result<bool, Dropped> {
        if self.negative.get(&key).is_some_and(|until| now < *until) {
            return Err(Dropped::UnknownKey);
        }
        let asked = self.waiting.get(&key).map(|w| w.asked).filter(|asked| now - *asked < LOOKUP_TIMEOUT);
        if asked.is_none() && !self.lookups.take(now) {
            return Err(Dropped::RateLimited);
        }
        let waiting =
            WaitingInitiation { message: *message, source, received: now, asked: asked.unwrap_or(now) };
        self.waiting.put(key, waiting);
        Ok(asked.is_none())
    }

    /// The key became a peer's: its initiation, unless its sender has given up on it.
    pub(crate) fn found(&mut self, key: &PublicKey, now: Instant) -> Option<WaitingInitiation> {
        self.negative.remove(key);
        self.waiting.remove(key).filter(|waiting| now - waiting.received < LOOKUP_TIMEOUT)
    }

    /// No peer has the key.
    pub(crate) fn unknown(&mut self, key: PublicKey, now: Instant) {
        self.waiting.remove(&key);
        self.negative.put(key, now + NEGATIVE_LIFE);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use std::net::SocketAddr;

    use super::*;

    #[test]
    fn recent_forgets_the_oldest() {
        let mut recent = Recent::new(2);
        recent.put(1, 'a');
        recent.put(2, 'b');
        recent.put(1, 'c');
        recent.put(3, 'd');
        assert_eq!((recent.get(&1), recent.get(&2), recent.get(&3)), (Some(&'c'), None, Some(&'d')));
        assert_eq!((recent.len(), recent.order.len()), (2, 2));
    }

    #[test]
    fn address_lookups_are_bounded() {
        let now = Instant::default();
        let mut lookups = AddressLookups::new();
        let ip = |n: u32| IpAddr::V4(n.into());
        for n in 0..ADDRESS_LOOKUPS as u32 {
            assert_eq!(lookups.packet(ip(n), &[0; 10], now).0, AddressVerdict::Ask);
        }
        assert_eq!(lookups.packet(ip(1 << 20), &[0; 10], now).0, AddressVerdict::Full);
        for n in 1..100 {
            let dropped = usize::from(n >= LOOKUP_QUEUE);
            assert_eq!(lookups.packet(ip(0), &[0; 10], now), (AddressVerdict::Wait, dropped));
        }
        assert_eq!(lookups.octets, 10 * (ADDRESS_LOOKUPS - 1 + LOOKUP_QUEUE));
        for n in 0..ADDRESS_LOOKUPS as u32 {
            lookups.packet(ip(n), &[0; 9_000], now);
        }
        assert!(lookups.octets <= LOOKUP_QUEUE_OCTETS);
        assert_eq!(lookups.found(&ip(1)).len(), 2);
        assert_eq!(lookups.next_timeout(), Some(now + LOOKUP_TIMEOUT));
        assert_eq!(lookups.take_expired(now + Duration::from_secs(1)), None);
        let mut expired = 0;
        while lookups.take_expired(now + LOOKUP_TIMEOUT).is_some() {
            expired += 1;
        }
        assert_eq!((expired, lookups.octets, lookups.next_timeout()), (ADDRESS_LOOKUPS - 1, 0, None));
        for n in 0..10_000 {
            lookups.packet(ip(n), &[0; 10], now);
            lookups.no_such_device(ip(n), now);
            assert_eq!(lookups.packet(ip(n), &[0; 10], now).0, AddressVerdict::NoSuchDevice);
        }
        assert_eq!((lookups.negative.len(), lookups.octets, lookups.asked.len()), (NEGATIVES, 0, 0));
        let later = now + NEGATIVE_LIFE;
        assert_eq!(lookups.packet(ip(9_999), &[0; 10], later).0, AddressVerdict::Ask, "forgotten again");
    }

    #[test]
    fn key_lookups_are_bounded() {
        let now = Instant::default();
        let mut lookups = KeyLookups::new(now);
        let key = |n: u8| PublicKey::from_bytes([n; 32]);
        let source = "192.0.2.1:1".parse::<SocketAddr>().unwrap().into();
        let mut ask = |n: u8, now| lookups.initiation(key(n), &[n; INITIATION_LEN], source, now);
        assert_eq!(ask(0, now), Ok(true));
        assert_eq!(ask(0, now), Ok(false), "asked already");
        let asked = (1..200).filter(|n| ask(*n, now) == Ok(true)).count();
        assert_eq!(asked, KEY_LOOKUP_RATE as usize - 1);
        let later = now + Duration::from_secs(100);
        assert!((0..32).all(|n| ask(n, later) == Ok(true)), "asks again");
        for second in 1..20 {
            for n in 0..32 {
                let _ = ask(second * 8 + n, later + Duration::from_secs(second.into()));
            }
        }
        assert!(lookups.waiting.len() <= KEY_LOOKUPS);
        let last = later + Duration::from_secs(19);
        assert!(lookups.found(&key(19 * 8), last).is_some());
        lookups.unknown(key(7), last);
        assert_eq!(lookups.initiation(key(7), &[7; INITIATION_LEN], source, last), Err(Dropped::UnknownKey));
    }
}
