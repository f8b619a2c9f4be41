//! Who is connected to a listener, and who may still be let in: strangers, who have shown no certificate, never use
//! up the places of those who have, no source those of other sources, and no device those of other devices.

use std::{
    collections::{HashMap, hash_map::Entry},
    hash::{BuildHasher, RandomState},
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::identity::{Party, SpiffeId};

/// Places that every source has as long as any are left.
const SOURCE_LEAST: usize = 8;
/// Of the places that are left, one source gets at most this part.
const SOURCE_PART: usize = 4;

/// How many connections there may be at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Of parties, who have shown a certificate.
    pub parties: usize,
    /// Of one device or director.
    pub per_device: usize,
    /// Of strangers, and of those whose handshake is under way.
    pub strangers: usize,
    /// Of strangers from one source, which is an IPv4 address or an IPv6 /64. The fewer places are left, the fewer
    /// one source gets of them, so that a few sources cannot take all.
    pub strangers_per_source: usize,
}

/// Why a connection is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// All places of parties are taken.
    #[error("too many connections of devices and operators")]
    Parties,
    /// The device has too many.
    #[error("too many connections of one device")]
    Device,
    /// All places of strangers are taken.
    #[error("too many connections without a certificate")]
    Strangers,
    /// The source has too many.
    #[error("too many connections without a certificate from one address")]
    Source,
}

/// All connections of one listener.
#[derive(Clone, Debug)]
pub struct Census(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    bounds: Bounds,
    hasher: RandomState,
    counts: Mutex<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    parties: usize,
    strangers: usize,
    sources: HashMap<IpAddr, usize>,
    /// By a keyed hash of the identity, which is shorter.
    devices: HashMap<u64, usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Stranger(IpAddr),
    Device(u64),
    Party,
}

/// A connection's place, given back when it is dropped.
#[derive(Debug)]
pub struct Place {
    shared: Arc<Shared>,
    kind: Kind,
}

impl Census {
    /// Nobody is connected.
    pub fn new(bounds: Bounds) -> Self {
        let (hasher, counts) = (RandomState::new(), Mutex::default());
        Self(Arc::new(Shared { bounds, hasher, counts }))
    }

    /// A place for a connection from `source`, which is a stranger at first.
    ///
    /// # Errors
    /// [`Refused::Strangers`] and [`Refused::Source`].
    pub fn admit(&self, source: IpAddr) -> Result<Place, Refused> {
        let (source, bounds) = (network_of(source), &self.0.bounds);
        let mut counts = self.0.lock();
        let left = bounds.strangers.saturating_sub(counts.strangers);
        if left == 0 {
            return Err(Refused::Strangers);
        }
        let may = (left / SOURCE_PART).max(SOURCE_LEAST).min(bounds.strangers_per_source);
        take(&mut counts.sources, source, may).ok_or(Refused::Source)?;
        counts.strangers += 1;
        Ok(Place { shared: self.0.clone(), kind: Kind::Stranger(source) })
    }

    /// How many connections there are, of parties and of strangers.
    pub fn counts(&self) -> (usize, usize) {
        let counts = self.0.lock();
        (counts.parties, counts.strangers)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Counts {
    fn give_back(&mut self, kind: Kind) {
        match kind {
            Kind::Stranger(source) => {
                self.strangers -= 1;
                give_back(&mut self.sources, source);
            }
            Kind::Device(device) => {
                self.parties -= 1;
                give_back(&mut self.devices, device);
            }
            Kind::Party => self.parties -= 1,
        }
    }
}

impl Place {
    /// The client has shown its certificate: its place is among the parties from now on.
    ///
    /// # Errors
    /// [`Refused::Parties`] and [`Refused::Device`].
    pub fn identify(&mut self, identity: &SpiffeId) -> Result<(), Refused> {
        let bounds = &self.shared.bounds;
        let mut counts = self.shared.lock();
        if counts.parties >= bounds.parties {
            return Err(Refused::Parties);
        }
        let kind = match identity.party {
            Party::Device { .. } | Party::Director { .. } => {
                let device = self.shared.hasher.hash_one(identity);
                take(&mut counts.devices, device, bounds.per_device).ok_or(Refused::Device)?;
                Kind::Device(device)
            }
            // Few and trusted.
            Party::Operator { .. } | Party::Registrar { .. } => Kind::Party,
        };
        counts.parties += 1;
        counts.give_back(self.kind);
        self.kind = kind;
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shared.lock().give_back(self.kind);
    }
}

/// Counts one more of `key`, unless there are `most` already.
fn take<K: Eq + std::hash::Hash>(counts: &mut HashMap<K, usize>, key: K, most: usize) -> Option<()> {
    match counts.entry(key) {
        Entry::Occupied(mut entry) if *entry.get() < most => *entry.get_mut() += 1,
        Entry::Vacant(entry) if most > 0 => drop(entry.insert(1)),
        _ => return None,
    }
    Some(())
}

fn give_back<K: Eq + std::hash::Hash>(counts: &mut HashMap<K, usize>, key: K) {
    if let Entry::Occupied(mut entry) = counts.entry(key) {
        *entry.get_mut() -= 1;
        if *entry.get() == 0 {
            entry.remove();
        }
    }
}

/// What is one source: an IPv4 address, or an IPv6 /64, which one host has all of.
pub fn network_of(source: IpAddr) -> IpAddr {
    match source.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64).into(),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn census(bounds: Bounds) -> Census {
        Census::new(bounds)
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    const BOUNDS: Bounds = Bounds { parties: 3, per_device: 2, strangers: 100, strangers_per_source: 20 };

    #[test]
    fn strangers_have_places_of_their_own() {
        let census = census(Bounds { strangers: 2, ..BOUNDS });
        let identity = |uid: &str| format!("spiffe://t/network/n/device/{uid}").parse().unwrap();
        let mut device = census.admit(ip("192.0.2.1")).unwrap();
        device.identify(&identity("a")).unwrap();
        let strangers = [census.admit(ip("192.0.2.2")).unwrap(), census.admit(ip("192.0.2.3")).unwrap()];
        assert_eq!(census.counts(), (1, 2));
        assert_eq!(census.admit(ip("192.0.2.4")).unwrap_err(), Refused::Strangers);
        drop(strangers);
        // No device has more than its own, and none is left out by strangers.
        let mut again = [(); 2].map(|()| census.admit(ip("192.0.2.1")).unwrap());
        again[0].identify(&identity("a")).unwrap();
        assert_eq!(again[1].identify(&identity("a")), Err(Refused::Device));
        again[1].identify(&identity("b")).unwrap();
        let mut operator = census.admit(ip("192.0.2.1")).unwrap();
        let admin = "spiffe://t/operator/admin".parse().unwrap();
        assert_eq!(operator.identify(&admin), Err(Refused::Parties));
        assert_eq!(census.counts(), (3, 1));
        drop(device);
        operator.identify(&admin).unwrap();
        drop((again, operator));
        assert_eq!(census.counts(), (0, 0));
        let counts = census.0.lock();
        assert!(counts.sources.is_empty() && counts.devices.is_empty(), "nobody is remembered");
    }

    #[test]
    fn no_source_takes_the_places_of_others() {
        let census = census(BOUNDS);
        let fill =
            |source: IpAddr| std::iter::from_fn(|| census.admit(source).ok()).take(1000).collect::<Vec<_>>();
        assert_eq!(fill(ip("192.0.2.1")).len(), 20);
        let v6 = fill(ip("2001:db8::1"));
        assert_eq!(census.admit(ip("2001:db8::2")).unwrap_err(), Refused::Source, "of the same /64");
        assert!(census.admit(ip("2001:db8:0:1::2")).is_ok());
        drop(v6);
        // The fuller it is, the less is left for one more of them.
        let held: Vec<_> = (1..8).map(|n| fill(IpAddr::from([192, 0, 2, n]))).collect();
        assert!(held.is_sorted_by(|a, b| a.len() >= b.len()));
        assert_eq!(fill(ip("198.51.100.1")).len(), SOURCE_LEAST);
    }
}
