//! The way of a datagram from one party to another: through NATs, with loss, duplicates and delay, unless they are
//! parted.

use std::{net::SocketAddr, time::Duration};

use rand::RngExt as _;

use super::{
    Checked,
    internet::Way,
    links::Node,
    trace::digest,
    world::{Datagram, Event, World},
};

/// Datagrams that somebody has recorded.
const RECORDED: usize = 64;

impl World {
    /// A host sends a datagram.
    pub(super) fn send_datagram(&mut self, h: usize, to: SocketAddr, octets: Vec<u8>) {
        self.counts.datagrams += 1;
        self.note(format_args!("h{h} > {to} {} octets {:x}", octets.len(), digest(&octets)));
        let now = self.now;
        let place = &self.hosts[h].place;
        let own = place.address_towards(to);
        match (self.internet.leave(place, to, now), own) {
            (Some(Way::Lan(site)), Some(own)) => self.carry(Node::Host(h), Some(site), own, to, octets),
            (Some(Way::Internet(from)), _) => self.carry(Node::Host(h), None, from, to, octets),
            _ => {}
        }
    }

    /// A datagram is on its way, on the LAN of a site or at the internet.
    pub(super) fn carry(
        &mut self,
        origin: Node,
        lan: Option<usize>,
        from: SocketAddr,
        to: SocketAddr,
        octets: Vec<u8>,
    ) {
        let datagram = Datagram { origin: Some(origin), lan, from, to, octets };
        if self.recorded.len() < RECORDED && self.rng.random_bool(0.2) {
            self.recorded.push(datagram.clone());
        }
        if self.rng.random_bool(self.links.loss) {
            return;
        }
        if self.rng.random_bool(self.links.duplicates) {
            self.arrive_later(datagram.clone());
        }
        self.arrive_later(datagram);
    }

    fn arrive_later(&mut self, datagram: Datagram) {
        let mut delay = self.links.delay(&mut self.rng);
        if datagram.lan.is_some() {
            delay = delay.min(Duration::from_millis(1));
        }
        self.after(delay, Event::Datagram(Box::new(datagram)));
    }

    /// A datagram arrives where it is for, if anybody is there.
    pub(super) fn arrive(&mut self, datagram: Datagram) -> Checked {
        let Datagram { origin, lan, from, to, octets } = datagram;
        let is_open = |world: &Self, node| origin.is_none_or(|origin| world.links.is_open(origin, node));
        if let Some(d) = self.directors.iter().position(|director| director.addresses.contains(&to)) {
            return if is_open(self, Node::Director(d)) {
                self.on_director_datagram(d, from, octets)
            } else {
                Ok(())
            };
        }
        let (site, inside) = match lan {
            Some(_) => (lan, to),
            None => match self.internet.arrive(from, to, self.now) {
                Some(found) => found,
                None => return Ok(()),
            },
        };
        let is_it = |place: &super::internet::Place| place.site == site && place.addresses.contains(&inside);
        let Some(h) = self.hosts.iter().position(|host| is_it(&host.place)) else { return Ok(()) };
        if self.hosts[h].asleep.is_some() || !is_open(self, Node::Host(h)) {
            return Ok(());
        }
        self.on_datagram(h, from, octets)
    }
}
