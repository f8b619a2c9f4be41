//! What must hold: after each operation, and, once everything has healed and had its time, of everybody.

mod paths;

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use muster_agent::datapath;
use muster_common::time::Instant;
use muster_registrar::registry::Index;
use muster_tunnel::{Cipher, IDLE_AFTER, PublicKey};
use rand::RngExt as _;
use uuid::Uuid;

use super::{Checked, Violation, links::MAX_DELAY, must, registrar::load, requests::NETWORK, world::World};

/// How long a deletion or revocation may take from the registrar's index to an agent that has a session there: a
/// lookup that was answered just before, the report of the peer, and the news that it is gone.
const NEWS: Duration = Duration::from_secs(4 * MAX_DELAY.as_secs() + 1);

impl World {
    /// What must hold at any time.
    pub(super) fn check(&self) -> Checked {
        for (uid, revision) in &self.model.gone {
            for h in 0..self.hosts.len() {
                let Some(connected) = self.session_of(h, *revision) else { continue };
                must(connected < NEWS || !self.hosts[h].holds(*uid), || {
                    format!("h{h} holds {uid}, which is gone, {connected:?} after its registrar knew")
                })?;
            }
        }
        for (h, host) in self.hosts.iter().enumerate() {
            let Some(running) = &host.running else { continue };
            let held = running.control.peers().count();
            // Whoever is held is, or was, a device; and control and tunnel agree.
            must(held <= self.model.devices.len() + self.model.gone.len(), || {
                format!("h{h} holds {held} peers")
            })?;
            let refused = running.control.is_refused();
            must(!refused || held == 0, || format!("h{h} is refused, and holds {held} peers"))?;
            let in_tunnel = running.tunnel.peers(Instant::default()).count();
            must(held == in_tunnel, || format!("h{h} holds {held} peers, its tunnel {in_tunnel}"))?;
            let mut ciphers = running.tunnel.peers(Instant::default()).filter_map(|peer| peer.cipher);
            must(running.aes || ciphers.all(|cipher| cipher == Cipher::ChaCha20Poly1305), || {
                format!("h{h} has a session in AES-256-GCM, which it does not take")
            })?;
            let (wanted, in_flight) = running.control.lookups();
            must(in_flight <= wanted && wanted <= 256, || format!("h{h} has {wanted} lookups"))?;
        }
        self.check_directors()
    }

    /// For how long a host that is awake has had a sound session at a registrar that knows of `revision`.
    fn session_of(&self, h: usize, revision: u64) -> Option<Duration> {
        let host = self.hosts.get(h).filter(|host| host.asleep.is_none())?;
        let running = host.running.as_ref().filter(|running| running.control.is_connected())?;
        let id = running.connection?;
        let connection = self.connections.get(&id).filter(|connection| !connection.doomed)?;
        let registrar = &self.registrars[connection.registrar];
        let since = registrar.sessions.get(&id)?.since?;
        let (_, reached) = registrar.progress.range(revision..).next()?;
        Some(self.now.saturating_sub(since.max(*reached).max(host.woken)))
    }

    /// Lets everything heal, and checks that it does.
    pub(super) fn settle(&mut self) -> Checked {
        self.note(format_args!("everything heals"));
        self.quiet = true;
        self.links.heal();
        for r in 0..self.registrars.len() {
            self.registrars[r].stalled = Duration::ZERO;
            if self.registrars[r].draining {
                self.stop_registrar(r);
            }
            self.start_registrar(r)?;
        }
        self.heal_paths()?;
        for h in 0..self.hosts.len() {
            self.start_agent(h)?;
        }
        self.advance(Duration::from_secs(300))?;
        self.check()?;
        self.check_registrars()?;
        let members = self.check_members()?;
        self.check_eventually(&members)?;
        self.check_ciphers(false)?;
        self.check_idle()?;
        self.check_first_packets(&members)?;
        self.check_ciphers(true)?;
        self.check_nobody()?;
        self.check_join()?;
        self.quiet = false;
        Ok(())
    }

    /// All registrars show what the store holds, and that is what the model knows.
    fn check_registrars(&self) -> Checked {
        let fresh = load(&self.store, self.civil())?;
        let shown = |index: &Index| -> Vec<_> {
            let state = index.network(NETWORK);
            state.into_iter().flat_map(|s| s.devices.after("")).map(|device| device.to_proto(false)).collect()
        };
        for (r, registrar) in self.registrars.iter().enumerate() {
            must(registrar.index.revision() == fresh.revision(), || format!("r{r} lags behind in peace"))?;
            must(shown(&registrar.index) == shown(&fresh), || {
                format!("r{r} shows other devices than the store")
            })?;
        }
        let known: BTreeMap<String, (Vec<IpAddr>, bool)> =
            self.model.devices.values().map(|k| (k.name.clone(), (k.addresses.clone(), k.revoked))).collect();
        let state = fresh.network(NETWORK);
        let found: BTreeMap<String, (Vec<IpAddr>, bool)> = state
            .into_iter()
            .flat_map(|s| s.devices.after(""))
            .map(|device| (device.name.to_string(), (device.addresses().collect(), device.revoked)))
            .collect();
        must(known == found, || format!("the model knows {known:?}, the index {found:?}"))
    }

    /// Whoever may be connected is, and nobody else; returns the hosts that are, with their addresses.
    fn check_members(&self) -> Checked<Vec<(usize, Vec<IpAddr>)>> {
        let mut members = Vec::new();
        for (h, host) in self.hosts.iter().enumerate() {
            let (Some(running), Some(disk)) = (&host.running, &host.disk) else { continue };
            let status = running.control.registrar();
            let addresses = host.addresses();
            if disk.validity.not_after <= self.civil() {
                // It was away for too long; but while it is connected, it renews.
                let renews = !status.connected;
                must(renews, || format!("h{h} is connected, and has not renewed its certificate"))?;
                continue;
            }
            let is_member = self.model.is_member(disk.uid);
            if !is_member {
                must(!status.connected, || format!("h{h} is connected, though its device is gone"))?;
                must(running.control.peers().count() == 0, || format!("h{h} is refused, and holds peers"))?;
                continue;
            }
            let known = self.model.devices.get(&disk.uid).map(|k| k.addresses.clone()).unwrap_or_default();
            if known.is_empty() {
                let exhausted = status.last_error.contains("exhausted");
                must(exhausted, || format!("h{h} has no address, and no reason: {}", status.last_error))?;
                continue;
            }
            must(status.connected, || format!("h{h} is not connected: {}", status.last_error))?;
            must(addresses == known, || format!("h{h} has {addresses:?}, and should have {known:?}"))?;
            members.push((h, addresses));
        }
        Ok(members)
    }

    fn pairs(&mut self, members: &[(usize, Vec<IpAddr>)], most: usize) -> Vec<(usize, IpAddr)> {
        let mut pairs = Vec::new();
        for (from, _) in members {
            for (_, addresses) in members.iter().filter(|(to, _)| to != from) {
                let n = self.rng.random_range(0..addresses.len());
                pairs.push((*from, addresses[n]));
            }
        }
        while pairs.len() > most {
            let n = self.rng.random_range(0..pairs.len());
            pairs.swap_remove(n);
        }
        pairs
    }

    /// Whatever state the peers were left in: who goes on trying gets through.
    fn check_eventually(&mut self, members: &[(usize, Vec<IpAddr>)]) -> Checked {
        let pairs = self.pairs(members, 16);
        let mut sent: Vec<Vec<u64>> = vec![Vec::new(); pairs.len()];
        for _ in 0..24 {
            for ((from, to), sent) in pairs.iter().zip(&mut sent) {
                if !sent.iter().any(|id| self.model.was_delivered(*id)) {
                    sent.extend(self.send_packet(*from, *to)?);
                }
            }
            self.advance(Duration::from_secs(5))?;
        }
        for ((from, to), sent) in pairs.iter().zip(&sent) {
            let delivered = sent.iter().any(|id| self.model.was_delivered(*id));
            must(delivered, || format!("h{from} does not reach {to}: none of packets {sent:?} arrived"))?;
        }
        self.send_all(&pairs, "with sessions up")?;
        self.check_paths(&pairs)
    }

    /// Sends a packet for each pair; all arrive.
    fn send_all(&mut self, pairs: &[(usize, IpAddr)], when: &str) -> Checked {
        let mut sent = Vec::new();
        for (from, to) in pairs {
            let id = self.send_packet(*from, *to)?;
            sent.push(id.ok_or_else(|| Violation(format!("h{from} does not route {to}")))?);
            let pause = self.span(0, 50);
            self.advance(pause)?;
        }
        self.advance(Duration::from_secs(20))?;
        for (id, (from, to)) in sent.iter().zip(pairs) {
            let delivered = self.model.was_delivered(*id);
            must(delivered, || format!("packet {id} from h{from} to {to} did not arrive, {when}"))?;
        }
        Ok(())
    }

    /// In peace, AES-256-GCM is chosen for exactly those pairs of which both have it, whatever either had before.
    /// Sessions that are `new`, begun in peace, too, have it.
    fn check_ciphers(&self, new: bool) -> Checked {
        let hosts =
            || self.hosts.iter().filter_map(|host| Some((host.disk.as_ref()?, host.running.as_ref()?)));
        let has: BTreeMap<String, bool> =
            hosts().map(|(disk, running)| (disk.uid.to_string(), running.aes)).collect();
        for (disk, running) in hosts() {
            for peer in running.control.peers() {
                let other = &peer.message.device_uid;
                let both = running.aes && has.get(other).copied().unwrap_or(false);
                let chosen = peer.config.cipher;
                must((chosen == datapath::Cipher::Aes256Gcm) == both, || {
                    format!("{} is to send {chosen:?} to {other}; both have AES: {both}", disk.uid)
                })?;
                let key = PublicKey::from_bytes(peer.config.public_key);
                let used = running.tunnel.peer(&key, Instant::default()).and_then(|peer| peer.cipher);
                must(!new || used.is_none_or(|used| (used == Cipher::Aes256Gcm) == both), || {
                    format!("{} and {other} use {used:?}; both have AES: {both}", disk.uid)
                })?;
            }
        }
        Ok(())
    }

    /// Peers that are not in use are forgotten by all.
    fn check_idle(&mut self) -> Checked {
        self.advance(IDLE_AFTER + Duration::from_secs(120))?;
        for (h, host) in self.hosts.iter().enumerate() {
            let Some(running) = &host.running else { continue };
            let held = running.control.peers().count();
            must(held == 0, || format!("h{h} holds {held} peers, and uses none"))?;
            must(running.control.lookups() == (0, 0), || format!("h{h} still looks up peers"))?;
        }
        Ok(())
    }

    /// The first packet to a peer that is not held arrives, too.
    fn check_first_packets(&mut self, members: &[(usize, Vec<IpAddr>)]) -> Checked {
        let pairs = self.pairs(members, 16);
        self.send_all(&pairs, "the first to its peer")
    }

    /// Packets to nobody are answered, alike whether nobody ever had the address, or somebody who is gone.
    fn check_nobody(&mut self) -> Checked {
        let nobody = (1..31).map(|n| IpAddr::from([100, 64, 0, n]));
        let free = nobody.filter(|address| !self.model.addresses.contains_key(address)).take(2);
        let revoked =
            self.model.devices.values().filter(|known| known.revoked).flat_map(|k| k.addresses.clone());
        let targets: Vec<IpAddr> = free.chain(revoked.take(3)).collect();
        let hosts: Vec<usize> =
            (0..self.hosts.len()).filter(|h| !self.hosts[*h].addresses().is_empty()).collect();
        let mut sent = Vec::new();
        for h in hosts {
            for target in &targets {
                sent.extend(self.send_packet(h, *target)?.map(|id| (h, *target, id)));
            }
        }
        self.advance(Duration::from_secs(15))?;
        for (h, target, id) in sent {
            must(!self.model.was_delivered(id), || {
                format!("packet {id} to {target} was delivered to nobody")
            })?;
            let answered = self.model.unreachable.contains(&id);
            must(answered, || format!("packet {id} of h{h} to {target} was neither delivered nor answered"))?;
        }
        Ok(())
    }

    /// A host without a device can join with the token that is good, by a name that nobody has.
    fn check_join(&mut self) -> Checked {
        let Some(h) = (0..self.hosts.len()).find(|h| self.hosts[*h].disk.is_none()) else { return Ok(()) };
        for _ in 0..5 {
            if self.hosts[h].disk.is_none() {
                self.join(h, Some(0));
            }
            self.advance(Duration::from_secs(30))?;
        }
        let uid = self.hosts[h].disk.as_ref().map(|disk| disk.uid);
        must(uid.is_some_and(|uid: Uuid| self.model.devices.contains_key(&uid)), || {
            format!("h{h} cannot join")
        })
    }
}
