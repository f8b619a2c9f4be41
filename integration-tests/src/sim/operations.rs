//! What may happen at random: to hosts, registrars and the network, by operators and by an adversary.

mod paths;

use std::{net::IpAddr, net::SocketAddr, time::Duration};

use muster_common::tls::SpkiHash;
use muster_registrar::token::JoinToken;
use muster_tunnel::PrivateKey;
use rand::RngExt as _;
use uuid::Uuid;

use super::{
    Checked, Scenario,
    connections::Purpose,
    host::Joining,
    internet::Place,
    links::Node,
    requests::{Enroll, Request},
    world::{Datagram, Event, Token, World},
};

impl World {
    /// Does one thing.
    pub(super) fn operate(&mut self) -> Checked {
        let h = self.rng.random_range(0..self.hosts.len());
        let r = self.rng.random_range(0..self.registrars.len());
        match self.rng.random_range(0..100) {
            0..10 => (0..self.hosts.len()).for_each(|h| self.join_again(h)),
            // With one token, that may be good for one alone.
            10..12 => {
                let n = self.rng.random_range(0..self.tokens.len());
                (0..self.hosts.len()).for_each(|h| self.join(h, Some(n)));
            }
            12..18 => self.restart(h)?,
            18..21 => self.leave(h),
            21..24 => self.create_token(false)?,
            24..26 => self.revoke_token(r)?,
            26..30 => self.administer_device(r)?,
            30..35 => self.shake_registrar(r)?,
            35..44 => self.shake_links(h, r),
            44..49 => self.relocate(h)?,
            49..52 => self.resolve(h, r),
            52..60 => self.attack()?,
            60..62 => self.compact()?,
            62..75 => self.talk(h),
            75..78 => (0..self.hosts.len()).try_for_each(|h| self.start_agent(h))?,
            _ => self.burst(h)?,
        }
        Ok(())
    }

    /// An operator makes a token.
    pub(super) fn create_token(&mut self, good: bool) -> Checked {
        let secret = JoinToken::generate(&mut self.rng);
        let reusable = good || self.rng.random_bool(0.5);
        let ttl = if good { Duration::from_secs(300 * 86_400) } else { self.span(1_000, 3_600_000) };
        let (now, uid) = (self.civil(), self.uid());
        let expires =
            muster_common::time::Timestamp::from_epoch(Duration::from_secs((now + ttl).unix_seconds() + 1));
        let token = Token { secret: secret.clone(), reusable, expires, joined: [].into() };
        self.tokens.push(token);
        let r = self.rng.random_range(0..self.registrars.len());
        self.administer(r, Request::CreateToken { secret, reusable, expires, uid, now })
    }

    fn revoke_token(&mut self, r: usize) -> Checked {
        // The first one stays good.
        if self.tokens.len() < 2 || !self.registrars[r].is_up {
            return Ok(());
        }
        let n = self.rng.random_range(1..self.tokens.len());
        let now = self.civil();
        let name = self.tokens[n].secret.id().to_string();
        self.administer(r, Request::RevokeToken { name, now })
    }

    /// A host without a device joins; one that is refused may be set up anew before.
    fn join_again(&mut self, h: usize) {
        let refused = self.hosts[h].running.as_ref().is_some_and(|running| running.control.is_refused());
        if refused && self.rng.random_bool(0.5) {
            self.wipe(h);
        }
        self.join(h, None);
    }

    /// A host joins: with a good token, an old one, or one that nobody has made.
    pub(super) fn join(&mut self, h: usize, good: Option<usize>) {
        if self.hosts[h].disk.is_some() {
            return;
        }
        let again = self.hosts[h].joining.clone().filter(|_| good.is_none() && self.rng.random_bool(0.7));
        let joining = again.unwrap_or_else(|| {
            let n = match self.rng.random_range(0..10) {
                0 => None,
                1..5 => Some(self.rng.random_range(0..self.tokens.len())),
                _ => Some(0),
            };
            let n = good.or(n);
            let token = match n {
                Some(n) => self.tokens[n].secret.clone(),
                None => JoinToken::generate(&mut self.rng),
            };
            let named = if good.is_none() && self.rng.random_bool(0.15) {
                self.rng.random_range(0..self.hosts.len())
            } else {
                h
            };
            let name =
                if good.is_some() { format!("h{named}-{}", self.number()) } else { format!("h{named}") };
            let (key, private_key): ([u8; 32], [u8; 32]) = (self.rng.random(), self.rng.random());
            let enroll = Enroll {
                token,
                key: SpkiHash::of_spki(&key),
                name,
                uid: Uuid::nil(),
                lifetime: Duration::ZERO,
                now: self.civil(),
                claim: None,
            };
            Joining {
                enroll,
                token: n,
                private_key: *PrivateKey::from_bytes(private_key).as_bytes(),
                registrar: 0,
            }
        });
        let registrar = self.rng.random_range(0..self.registrars.len());
        let joining = Joining { registrar, ..joining };
        self.note(format_args!(
            "h{h} joins at r{registrar} as {} with token {:?}",
            joining.enroll.name, joining.token
        ));
        self.hosts[h].joining = Some(joining.clone());
        self.call(h, registrar, Purpose::Enroll(Box::new(joining)));
    }

    fn restart(&mut self, h: usize) -> Checked {
        match self.rng.random_range(0..4) {
            0 => self.stop_agent(h),
            1 => self.reboot(h),
            _ => {
                self.stop_agent(h);
                return self.start_agent(h);
            }
        }
        if self.rng.random_bool(0.5) { self.start_agent(h) } else { Ok(()) }
    }

    fn leave(&mut self, h: usize) {
        if self.hosts[h].disk.is_none() || self.hosts[h].is_leaving {
            return;
        }
        if self.rng.random_bool(0.25) {
            // `leave --force`, or a reinstalled host: the registrar is not told.
            return self.wipe(h);
        }
        self.note(format_args!("h{h} leaves"));
        self.hosts[h].is_leaving = true;
        let r = self.rng.random_range(0..self.registrars.len());
        self.call(h, r, Purpose::Leave);
    }

    fn administer_device(&mut self, r: usize) -> Checked {
        let names: Vec<String> = self.model.devices.values().map(|known| known.name.clone()).collect();
        let now = self.civil();
        let n = self.rng.random_range(0..=names.len());
        let Some(name) = names.get(n).cloned() else {
            let (uid, number) = (self.uid(), self.number());
            let ipv4 = format!("100.64.0.{}", self.rng.random_range(0..34));
            return self
                .administer(r, Request::CreateDevice { name: format!("kept-{number}"), ipv4, uid, now });
        };
        let request = match self.rng.random_range(0..3) {
            0 => Request::RevokeDevice { name },
            1 => Request::DeleteDevice { name, now },
            _ => Request::LabelDevice { name, value: self.rng.random_range(0..5) },
        };
        self.administer(r, request)
    }

    fn shake_registrar(&mut self, r: usize) -> Checked {
        if !self.registrars[r].is_up {
            return self.start_registrar(r);
        }
        match self.rng.random_range(0..6) {
            0 => self.stop_registrar(r),
            1 => {
                let within = self.span(0, 20_000);
                self.drain_registrar(r, within);
                let life = self.registrars[r].life;
                // Or something keeps it from stopping, for a long time.
                if self.rng.random_bool(0.5) {
                    self.after(within + Duration::from_secs(5), Event::Stop { registrar: r, life });
                }
            }
            2 | 3 => {
                self.stop_registrar(r);
                return self.start_registrar(r);
            }
            _ => {
                let stall = self.span(0, 25_000);
                self.note(format_args!("r{r} hears nothing of the store for {stall:?}"));
                self.registrars[r].stalled = self.now + stall;
            }
        }
        Ok(())
    }

    fn shake_links(&mut self, h: usize, r: usize) {
        let other = self.rng.random_range(0..self.hosts.len());
        match self.rng.random_range(0..8) {
            0 | 1 => self.part(Node::Host(h), Node::Registrar(r)),
            2 => (0..self.registrars.len()).for_each(|r| self.part(Node::Host(h), Node::Registrar(r))),
            3 if h != other => self.part(Node::Host(h), Node::Host(other)),
            4 => {
                self.links.loss = [0.0, 0.02, 0.2, 0.6][self.rng.random_range(0..4)];
                self.links.duplicates = [0.0, 0.05, 0.3][self.rng.random_range(0..3)];
                self.links.broken = [0.0, 0.01, 0.1][self.rng.random_range(0..3)];
                let (loss, duplicates) = (self.links.loss, self.links.duplicates);
                self.note(format_args!("{loss} of datagrams are lost, {duplicates} arrive twice"));
            }
            5 => {
                self.links.join(Node::Host(h), Node::Registrar(r));
                self.links.join(Node::Host(h), Node::Host(other));
            }
            _ => {
                self.note(format_args!("the network heals"));
                self.links.heal();
            }
        }
    }

    pub(super) fn part(&mut self, a: Node, b: Node) {
        self.note(format_args!("{a:?} and {b:?} are parted"));
        self.links.part(a, b);
        if let (Node::Host(host), with @ (Node::Registrar(_) | Node::Director(_))) = (a, b) {
            if self.rng.random_bool(0.5) {
                self.doom_between(host, with);
            } else {
                self.after(Duration::from_secs(30), Event::KeepAlive { host, with });
            }
        }
    }

    /// A host gets another private address: a new one, one that another host had before, or another port.
    fn relocate(&mut self, h: usize) -> Checked {
        if self.scenario == Scenario::Paths {
            let place = self.new_place(h);
            return self.move_host(h, place);
        }
        let [net, host] = [self.rng.random_range(0..8), self.rng.random_range(2..5)];
        let place = Place::open(net, host);
        if self.hosts.iter().any(|other| other.place == place) {
            return Ok(());
        }
        self.move_host(h, place)
    }

    fn resolve(&mut self, h: usize, r: usize) {
        let names: Vec<String> = self.model.devices.values().map(|known| known.name.clone()).collect();
        let n = self.rng.random_range(0..=names.len());
        let name = names.get(n).map_or("nobody.net.example".into(), |name| format!("{name}.net.example"));
        if self.hosts[h].running.is_some() {
            self.call(h, r, Purpose::Resolve(name));
        }
    }

    /// Somebody replays what was recorded, as it was, damaged, or from elsewhere.
    fn attack(&mut self) -> Checked {
        for _ in 0..self.rng.random_range(1..6) {
            if self.recorded.is_empty() {
                return Ok(());
            }
            let n = self.rng.random_range(0..self.recorded.len());
            let mut sent = Datagram { origin: None, ..self.recorded.swap_remove(n) };
            match self.rng.random_range(0..4) {
                0 => sent.from = SocketAddr::from(([203, 0, 112, 9], 4444)),
                1 => {
                    let at = self.rng.random_range(0..sent.octets.len());
                    sent.octets[at] ^= 1 << self.rng.random_range(0..8);
                }
                2 => {
                    let other = self.rng.random_range(0..self.hosts.len());
                    sent.to = self.hosts[other].place.addresses[0];
                }
                _ => {}
            }
            let (from, to, len) = (sent.from, sent.to, sent.octets.len());
            self.note(format_args!("somebody sends {len} octets from {from} to {to}"));
            let at = self.span(0, 50);
            self.after(at, Event::Datagram(Box::new(sent)));
        }
        Ok(())
    }

    fn compact(&mut self) -> Checked {
        let revision = self.store.model().revision();
        self.note(format_args!("the store forgets its history up to {revision}"));
        self.store.compact_sync(revision).map_err(|e| super::Violation(e.to_string()))
    }

    /// Two hosts talk for a while.
    fn talk(&mut self, h: usize) {
        let other = self.rng.random_range(0..self.hosts.len());
        let left = self.rng.random_range(3..60);
        for (from, to) in [(h, other), (other, h)] {
            let addresses = self.hosts[to].addresses();
            if from != to && !addresses.is_empty() {
                let to = addresses[self.rng.random_range(0..addresses.len())];
                let at = self.span(0, 500);
                self.after(at, Event::Flow { from, to, left });
            }
        }
    }

    pub(super) fn on_flow(&mut self, from: usize, to: IpAddr, left: u32) -> Checked {
        if self.quiet {
            return Ok(());
        }
        self.send_packet(from, to)?;
        if left > 0 {
            let most = [200, 2_000, 12_000, 60_000][self.rng.random_range(0..4)];
            let gap = self.span(0, most);
            self.after(gap, Event::Flow { from, to, left: left - 1 });
        }
        Ok(())
    }

    /// Packets to an address: a device's, one that is gone, or nobody's.
    fn burst(&mut self, h: usize) -> Checked {
        let members: Vec<IpAddr> = self.hosts.iter().flat_map(super::host::Host::addresses).collect();
        let others: Vec<IpAddr> = self.model.addresses.keys().copied().collect();
        let released: Vec<IpAddr> = self.model.released.keys().copied().collect();
        let pick = |world: &mut Self, list: &[IpAddr]| {
            let n = world.rng.random_range(0..list.len().max(1));
            list.get(n).copied()
        };
        let target = match self.rng.random_range(0..10) {
            0 => Some(IpAddr::from([100, 64, 0, self.rng.random_range(0..64)])),
            1 => pick(self, &released),
            2 => pick(self, &others),
            _ => pick(self, &members),
        };
        let Some(target) = target else { return Ok(()) };
        let all = self.rng.random_bool(0.3);
        for _ in 0..self.rng.random_range(1..5) {
            let senders = if all { 0..self.hosts.len() } else { h..h + 1 };
            for h in senders {
                self.send_packet(h, target)?;
            }
            let pause = self.span(0, 300);
            self.advance(pause)?;
        }
        Ok(())
    }
}
