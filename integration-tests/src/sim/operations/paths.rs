//! What may happen to paths at random: NATs that forget, hosts that move or are suspended, firewalls, and directors that
//! come and go.

use std::time::Duration;

use rand::RngExt as _;

use crate::{
    nat::Kind,
    sim::{Checked, internet::Place, links::Node, world::World},
};

/// Kinds of LANs.
const LANS: [Kind; 6] = [
    Kind::FullCone,
    Kind::AddressRestricted,
    Kind::PortRestricted,
    Kind::Symmetric,
    Kind::NatBehindNat,
    Kind::UdpBlocked,
];
/// Kinds of hosts at the internet.
const PUBLIC: [Kind; 3] = [Kind::Open, Kind::Ipv6Only, Kind::DualStack];

impl World {
    /// LANs and directors.
    pub(in crate::sim) fn set_up_paths(&mut self) -> Checked {
        for _ in 0..self.rng.random_range(3..=5) {
            let kind = LANS[self.rng.random_range(0..LANS.len())];
            let chance = self.rng.random_range(0..16);
            self.internet.add_site(kind, chance);
        }
        let directors = self.rng.random_range(1..=3);
        self.add_directors(directors)
    }

    /// Somewhere else for a host, where nobody is.
    pub(in crate::sim) fn new_place(&mut self, h: usize) -> Place {
        loop {
            let (net, host) = (self.rng.random_range(0..8), self.rng.random_range(2..=9));
            let place = if self.rng.random_bool(0.35) {
                Place::public(PUBLIC[self.rng.random_range(0..PUBLIC.len())], net, host)
            } else {
                let site = self.rng.random_range(0..self.internet.sites.len());
                self.internet.place(site, host)
            };
            let is_taken = self.hosts.iter().enumerate().any(|(other, at)| {
                other != h
                    && at.place.site == place.site
                    && at.place.addresses.iter().any(|address| place.addresses.contains(address))
            });
            if !is_taken {
                return place;
            }
        }
    }

    /// Does one thing.
    pub(in crate::sim) fn operate_paths(&mut self) -> Checked {
        let h = self.rng.random_range(0..self.hosts.len());
        let d = self.rng.random_range(0..self.directors.len());
        match self.rng.random_range(0..100) {
            0..22 => self.talk(h),
            22..30 => self.talk_at_once(h)?,
            30..48 => self.shake_director(d)?,
            48..57 => self.rebind_nat(h),
            57..67 => {
                let place = self.new_place(h);
                self.move_host(h, place)?;
            }
            67..72 => self.block_udp(),
            72..82 => self.shake_paths(h, d),
            82..88 => {
                let span = match self.rng.random_range(0..3) {
                    0 => self.span(500, 40_000),
                    1 => self.span(40_000, 300_000),
                    _ => self.span(300_000, 3_600_000),
                };
                self.suspend(h, span);
            }
            88..93 => {
                self.stop_agent(h);
                self.start_agent(h)?;
            }
            93..96 => {
                self.links.mute = [0.0, 0.3, 1.0][self.rng.random_range(0..3)];
                let share = self.links.mute;
                self.note(format_args!("{share} of introductions are lost"));
            }
            _ => (0..self.hosts.len()).try_for_each(|h| self.start_agent(h))?,
        }
        Ok(())
    }

    /// Two hosts send each other their first packets at the same moment.
    fn talk_at_once(&mut self, h: usize) -> Checked {
        let other = self.rng.random_range(0..self.hosts.len());
        for _ in 0..self.rng.random_range(1..=3) {
            for (from, to) in [(h, other), (other, h)] {
                let addresses = self.hosts[to].addresses();
                if from != to && !addresses.is_empty() {
                    let to = addresses[self.rng.random_range(0..addresses.len())];
                    self.send_packet(from, to)?;
                }
            }
            let pause = self.span(0, 100);
            self.advance(pause)?;
        }
        Ok(())
    }

    fn shake_director(&mut self, d: usize) -> Checked {
        if !self.directors[d].is_up {
            self.start_director(d);
            return Ok(());
        }
        match self.rng.random_range(0..8) {
            0 | 1 => self.stop_director(d),
            2 | 3 => {
                self.stop_director(d);
                self.start_director(d);
            }
            4 | 5 => self.drain_director(d)?,
            6 => self.replace_director(d)?,
            _ => {
                let drained = self.rng.random_bool(0.5);
                self.set_drained(d, drained)?;
            }
        }
        Ok(())
    }

    /// The NAT that a host is behind, or another one, forgets its mappings.
    fn rebind_nat(&mut self, h: usize) {
        let site = match self.hosts[h].place.site {
            Some(site) => site,
            None => self.rng.random_range(0..self.internet.sites.len()),
        };
        let nats = &mut self.internet.sites[site].nats;
        let which = self.rng.random_range(0..nats.len());
        nats[which].rebind();
        self.note(format_args!("NAT {which} of site {site} forgets its mappings"));
        // It forgets connections, too; those that are in use may break.
        if self.rng.random_bool(0.5) {
            let there: Vec<usize> =
                (0..self.hosts.len()).filter(|h| self.hosts[*h].place.site == Some(site)).collect();
            self.doom_channels(|channel| there.contains(&channel.host));
        }
    }

    /// A firewall drops UDP from now on, or lets it pass again.
    fn block_udp(&mut self) {
        let number = self.rng.random_range(0..self.internet.sites.len());
        let site = &mut self.internet.sites[number];
        site.is_blocked = !site.is_blocked || site.kind == Kind::UdpBlocked;
        let is_blocked = site.is_blocked;
        self.note(format_args!("UDP is blocked at site {number}: {is_blocked}"));
    }

    fn shake_paths(&mut self, h: usize, d: usize) {
        let other = self.rng.random_range(0..self.hosts.len());
        match self.rng.random_range(0..8) {
            0 | 1 => self.part(Node::Host(h), Node::Director(d)),
            2 => (0..self.directors.len()).for_each(|d| self.part(Node::Host(h), Node::Director(d))),
            3 if h != other => self.part(Node::Host(h), Node::Host(other)),
            4 => {
                for r in 0..self.registrars.len() {
                    self.part(Node::Director(d), Node::Registrar(r));
                }
            }
            5 => {
                // All registrars are away.
                for r in 0..self.registrars.len() {
                    (0..self.hosts.len()).for_each(|h| self.part(Node::Host(h), Node::Registrar(r)));
                    (0..self.directors.len()).for_each(|d| self.part(Node::Director(d), Node::Registrar(r)));
                }
            }
            6 => {
                self.links.join(Node::Host(h), Node::Director(d));
                self.links.join(Node::Host(h), Node::Host(other));
            }
            _ => {
                self.note(format_args!("the network heals"));
                self.links.heal();
            }
        }
    }

    /// Everything works again, and everybody is there.
    pub(in crate::sim) fn heal_paths(&mut self) -> Checked {
        for site in &mut self.internet.sites {
            site.is_blocked = site.kind == Kind::UdpBlocked;
        }
        for d in 0..self.directors.len() {
            if self.directors[d].is_draining {
                self.stop_director(d);
            }
            self.start_director(d);
            self.set_drained(d, false)?;
        }
        for h in 0..self.hosts.len() {
            if self.hosts[h].asleep.is_some() {
                self.hosts[h].asleep = Some(Duration::ZERO);
                self.resume(h)?;
            }
        }
        Ok(())
    }
}
