//! One block of addresses: who may have which, and when again.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::Range,
    time::Duration,
};

use aws_lc_rs::digest;
use ipnet::IpNet;
use muster_common::time::Timestamp;
use rustc_hash::FxHashMap;

use super::{AllocationError, PoolError, network::check_block, set::OffsetSet};

/// The addresses of one block.
///
/// As in Kubernetes, the first `min(max(16, size / 16), 256)` addresses form a band for those that operators choose
/// ([`choose`](Self::choose)); [`reserve`](Self::reserve) takes from the rest, and from the band only when the rest
/// is full. Blocks of 16 addresses or fewer have no band.
///
/// An address is free, reserved, in use, or in quarantine. The last two mirror the store: whoever follows the store
/// calls [`confirm`](Self::confirm), [`release`](Self::release) and [`forget`](Self::forget), both at the start,
/// for what is there, and for every change. A reservation is this registrar's own, in memory alone; it keeps
/// registrations that run at the same time from choosing the same address, and ends with `confirm` or
/// [`cancel`](Self::cancel).
#[derive(Clone, Debug)]
pub struct Pool {
    net: IpNet,
    /// The block's first address, as a number.
    base: u128,
    /// Offsets that operators choose from.
    band: Range<u128>,
    /// Offsets that are handed out.
    dynamic: Range<u128>,
    quarantine: Duration,
    /// Every offset that is not free.
    taken: OffsetSet,
    used: u64,
    /// Reserved offsets, each with its reservation's ticket.
    reserved: FxHashMap<u128, u64>,
    next_ticket: u64,
    /// Offsets in quarantine with the time of their release, and the same in order of that time.
    released: FxHashMap<u128, Timestamp>,
    by_release: BTreeSet<(Timestamp, u128)>,
}

/// An address that is kept for its holder until [`Pool::confirm`] or [`Pool::cancel`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a reservation is held until it is confirmed or cancelled"]
pub struct Reservation {
    address: IpAddr,
    ticket: u64,
}

impl Reservation {
    /// The reserved address.
    pub fn address(self) -> IpAddr {
        self.address
    }
}

/// What can be said of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Can be reserved or chosen.
    Free,
    /// Kept for a registration that is under way.
    Reserved,
    /// Has an owner.
    InUse,
    /// Was released, and waits.
    Quarantined {
        /// When it becomes free.
        until: Timestamp,
    },
    /// In the block, but stands for the block itself.
    NotAssignable,
    /// Not in the block.
    Outside,
}

/// How many addresses are in which state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Counts {
    /// All that can be handed out.
    pub size: u128,
    /// Without owner, reservation and quarantine.
    pub free: u128,
    /// Kept for registrations that are under way.
    pub reserved: u64,
    /// With an owner.
    pub used: u64,
    /// In quarantine.
    pub quarantined: u64,
}

impl Pool {
    /// An empty pool of the addresses of `net`; those released stay unused for `quarantine`.
    ///
    /// # Errors
    /// If `net` cannot be a pool: see [`PoolError`].
    pub fn new(net: IpNet, quarantine: Duration) -> Result<Self, PoolError> {
        check_block(net)?;
        let size = 1_u128 << (net.max_prefix_len() - net.prefix_len());
        // The first address means the block itself (IPv4) or any of its routers (RFC 4291, 2.6.1); the last one of
        // an IPv4 block is its broadcast address.
        let end = if net.addr().is_ipv4() { size - 1 } else { size };
        let band = if size <= 16 { 0 } else { (size / 16).clamp(16, 256) };
        Ok(Self {
            net,
            base: number(net.network()),
            band: 1..1 + band,
            dynamic: 1 + band..end,
            quarantine,
            taken: OffsetSet::new(size),
            used: 0,
            reserved: FxHashMap::default(),
            next_ticket: 0,
            released: FxHashMap::default(),
            by_release: BTreeSet::new(),
        })
    }

    /// The block.
    pub fn net(&self) -> IpNet {
        self.net
    }

    /// Changes for how long released addresses stay unused, those that are in quarantine already included.
    pub fn set_quarantine(&mut self, quarantine: Duration) {
        self.quarantine = quarantine;
    }

    /// Reserves an address for `owner`, at the registrar's choice: the next free one from a point that depends on
    /// `owner` and `attempt` alone. So registrars that share a store rarely collide, and an owner tends to get the same
    /// address again. Count `attempt` up after a collision.
    ///
    /// # Errors
    /// [`AllocationError::Exhausted`].
    pub fn reserve(
        &mut self,
        owner: &str,
        attempt: u32,
        now: Timestamp,
    ) -> Result<Reservation, AllocationError> {
        self.end_quarantines(now);
        let start = spread(owner, attempt);
        let found = self.next_free(&self.dynamic, start).or_else(|| self.next_free(&self.band, start));
        match found {
            Some(offset) => Ok(self.hold(offset)),
            None => {
                let Counts { size, used, reserved, quarantined, .. } = self.counts(now);
                Err(AllocationError::Exhausted { net: self.net, size, used: used + reserved, quarantined })
            }
        }
    }

    /// Reserves `address`, which an operator has chosen; it need not be in the band.
    ///
    /// # Errors
    /// All but [`AllocationError::Exhausted`].
    pub fn choose(&mut self, address: IpAddr, now: Timestamp) -> Result<Reservation, AllocationError> {
        self.end_quarantines(now);
        match (self.status(address, now), self.offset(address)) {
            (Status::Free, Some(offset)) => Ok(self.hold(offset)),
            (Status::Free | Status::Outside, _) => Err(AllocationError::Outside { address, net: self.net }),
            (Status::NotAssignable, _) => Err(AllocationError::NotAssignable { address, net: self.net }),
            (Status::Reserved | Status::InUse, _) => Err(AllocationError::InUse { address }),
            (Status::Quarantined { until }, _) => Err(AllocationError::Quarantined { address, until }),
        }
    }

    /// The store has an owner for `address`, whatever was known of it before. Reservations of it are void.
    /// Addresses outside the pool, as after a change of the network's pools, are passed over.
    pub fn confirm(&mut self, address: IpAddr) {
        let Some(offset) = self.offset(address) else { return };
        if !self.is_used(offset) {
            self.used += 1;
        }
        self.reserved.remove(&offset);
        self.end_quarantine(offset);
        self.taken.insert(offset);
    }

    /// Gives a reservation up. If the address has come into use since, or was reserved anew, nothing changes.
    pub fn cancel(&mut self, reservation: Reservation) {
        let Some(offset) = self.offset(reservation.address) else { return };
        if self.reserved.get(&offset) == Some(&reservation.ticket) {
            self.reserved.remove(&offset);
            if !self.released.contains_key(&offset) {
                self.taken.remove(offset);
            }
        }
    }

    /// The store says that `address` was released at `at`: its quarantine begins. A reservation of it stays.
    pub fn release(&mut self, address: IpAddr, at: Timestamp) {
        let Some(offset) = self.offset(address) else { return };
        if self.is_used(offset) {
            self.used -= 1;
        }
        self.end_quarantine(offset);
        self.released.insert(offset, at);
        self.by_release.insert((at, offset));
        self.taken.insert(offset);
    }

    /// The store no longer knows of `address`: it is free, unless reserved.
    pub fn forget(&mut self, address: IpAddr) {
        let Some(offset) = self.offset(address) else { return };
        if self.is_used(offset) {
            self.used -= 1;
        }
        self.end_quarantine(offset);
        if !self.reserved.contains_key(&offset) {
            self.taken.remove(offset);
        }
    }

    /// What is known of `address`.
    pub fn status(&self, address: IpAddr, now: Timestamp) -> Status {
        if !self.net.contains(&address) {
            return Status::Outside;
        }
        let Some(offset) = self.offset(address) else { return Status::NotAssignable };
        if self.reserved.contains_key(&offset) {
            return Status::Reserved;
        }
        match self.released.get(&offset) {
            Some(at) if *at + self.quarantine > now => Status::Quarantined { until: *at + self.quarantine },
            Some(_) => Status::Free,
            None if self.taken.contains(offset) => Status::InUse,
            None => Status::Free,
        }
    }

    /// How many addresses are in which state.
    pub fn counts(&self, now: Timestamp) -> Counts {
        let size = self.dynamic.end - self.band.start;
        let (used, reserved) = (self.used, self.reserved.len() as u64);
        // What nobody has needed since its quarantine ended is still in the tables.
        let over = self.by_release.iter().take_while(|(at, _)| *at + self.quarantine <= now).map(|(_, o)| o);
        let over = over.filter(|offset| !self.reserved.contains_key(offset)).count();
        // While the store catches up, an address can be both in quarantine and reserved.
        let both = self.reserved.keys().filter(|offset| self.released.contains_key(offset)).count();
        let quarantined = (self.released.len() - both - over) as u64;
        let free = size.saturating_sub(u128::from(used + reserved + quarantined));
        Counts { size, free, reserved, used, quarantined }
    }

    fn hold(&mut self, offset: u128) -> Reservation {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.reserved.insert(offset, ticket);
        self.taken.insert(offset);
        Reservation { address: self.address(offset), ticket }
    }

    /// The first free offset of `range` from a point on that `start` leads to, once around.
    fn next_free(&self, range: &Range<u128>, start: u128) -> Option<u128> {
        let length = range.end.checked_sub(range.start).filter(|length| *length > 0)?;
        let middle = range.start + start % length;
        self.taken.first_absent(middle..range.end).or_else(|| self.taken.first_absent(range.start..middle))
    }

    fn is_used(&self, offset: u128) -> bool {
        self.taken.contains(offset)
            && !self.reserved.contains_key(&offset)
            && !self.released.contains_key(&offset)
    }

    /// Frees what has been in quarantine for long enough; touches nothing else.
    fn end_quarantines(&mut self, now: Timestamp) {
        while let Some((at, offset)) = self.by_release.first().copied()
            && at + self.quarantine <= now
        {
            self.end_quarantine(offset);
            if !self.reserved.contains_key(&offset) {
                self.taken.remove(offset);
            }
        }
    }

    fn end_quarantine(&mut self, offset: u128) {
        if let Some(at) = self.released.remove(&offset) {
            self.by_release.remove(&(at, offset));
        }
    }

    /// Where in the block an address lies, if it can be handed out.
    fn offset(&self, address: IpAddr) -> Option<u128> {
        if !self.net.contains(&address) {
            return None;
        }
        let offset = number(address).checked_sub(self.base)?;
        (self.band.start..self.dynamic.end).contains(&offset).then_some(offset)
    }

    fn address(&self, offset: u128) -> IpAddr {
        let number = self.base + offset;
        match self.net {
            IpNet::V4(_) => Ipv4Addr::from(u32::try_from(number).unwrap_or(u32::MAX)).into(),
            IpNet::V6(_) => Ipv6Addr::from(number).into(),
        }
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u32::from(address).into(),
        IpAddr::V6(address) => address.into(),
    }
}

/// A number that depends on owner and attempt, and is as good as random otherwise.
fn spread(owner: &str, attempt: u32) -> u128 {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(&attempt.to_be_bytes());
    context.update(owner.as_bytes());
    let hash = context.finish();
    hash.as_ref().iter().take(16).fold(0, |number, byte| number << 8 | u128::from(*byte))
}

#[cfg(test)]
#[path = "pool_tests.rs"]
mod tests;
