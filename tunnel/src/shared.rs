//! What all peers of a tunnel share: identity, generator, clock of labels, session indices, and the queues to the
//! shell.

use std::{collections::VecDeque, time::Duration};

use rand::{Rng as _, RngExt as _, rngs::StdRng};
use rustc_hash::FxHashMap;
use zeroize::Zeroizing;

use crate::{
    endpoint::{Endpoint, Links},
    event::{Event, Fragmentation, Transmit},
    limits::{EVENT_QUEUE, PACKET_QUEUE, REKEY_JITTER, TRANSMIT_QUEUE},
    noise::{EphemeralSeed, Identity},
    sessions::Released,
    stats::{Dropped, Drops},
    tai64n::LabelClock,
};

/// Place of a peer in the tunnel's table.
pub(crate) type PeerId = u32;

pub(crate) struct Shared {
    pub(crate) identity: Identity,
    /// Whether sessions with AES-256-GCM are begun and taken.
    pub(crate) accepts_aes: bool,
    pub(crate) rng: StdRng,
    pub(crate) labels: LabelClock,
    /// MTU of the TUN device, in octets: what a path has to take at most.
    pub(crate) mtu: u16,
    /// The ways to directors.
    pub(crate) links: Links,
    /// Local session indices in use. They are random and ours, so nobody can make them collide.
    pub(crate) indices: FxHashMap<u32, PeerId>,
    pub(crate) transmits: VecDeque<Transmit>,
    pub(crate) packets: VecDeque<Vec<u8>>,
    pub(crate) events: VecDeque<Event>,
    pub(crate) drops: Drops,
}

impl Shared {
    /// A random index that is not in use, from now on `peer`'s.
    pub(crate) fn new_index(&mut self, peer: PeerId) -> u32 {
        loop {
            let index = self.rng.next_u32();
            if let std::collections::hash_map::Entry::Vacant(entry) = self.indices.entry(index) {
                entry.insert(peer);
                return index;
            }
        }
    }

    pub(crate) fn release(&mut self, indices: Released) {
        for index in indices {
            self.indices.remove(&index);
        }
    }

    pub(crate) fn ephemeral(&mut self) -> EphemeralSeed {
        let mut seed = Zeroizing::new([0; 32]);
        self.rng.fill_bytes(&mut *seed);
        seed
    }

    pub(crate) fn jitter(&mut self) -> Duration {
        Duration::from_millis(self.rng.random_range(0..=REKEY_JITTER.as_millis() as u64))
    }

    pub(crate) fn transmit(
        &mut self,
        endpoint: Endpoint,
        fragmentation: Fragmentation,
        mut payload: Vec<u8>,
    ) {
        let Some(route) = self.links.route(&endpoint) else { return self.drops.count(Dropped::NoDirector) };
        if let Some(header) = route.frame {
            payload.splice(..0, header);
        }
        if self.transmits.len() < TRANSMIT_QUEUE {
            self.transmits.push_back(Transmit { hop: route.hop, fragmentation, payload });
        } else {
            self.drops.count(Dropped::QueueFull);
        }
    }

    pub(crate) fn packet(&mut self, packet: Vec<u8>) {
        if self.packets.len() < PACKET_QUEUE {
            self.packets.push_back(packet);
        } else {
            self.drops.count(Dropped::QueueFull);
        }
    }

    pub(crate) fn event(&mut self, event: Event) {
        if self.events.len() < EVENT_QUEUE {
            self.events.push_back(event);
        } else {
            self.drops.count(Dropped::QueueFull);
        }
    }
}
