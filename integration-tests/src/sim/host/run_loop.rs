//! The run loop of an agent: does what its cores ask for.

use std::{net::SocketAddr, time::Duration};

use ipnet::IpNet;
use muster_agent::{
    control::{Action, Persist},
    datapath,
};
use rand::RngExt as _;

use crate::sim::{
    Checked, Violation,
    links::Node,
    model::packet_id,
    must,
    trace::digest,
    world::{Event, Purpose, Up, World},
};

/// Turns of the run loop without time passing, beyond which an agent counts as spinning.
const MAX_TURNS: u32 = 500;
/// Calls to registrars in a minute, beyond which an agent counts as spinning.
const MAX_CALLS: u32 = 300;
/// The same while no registrar can be reached.
const MAX_CALLS_AWAY: u32 = 60;

impl World {
    /// Does everything that the cores ask for, until they ask for nothing more, and arranges for the next timeout.
    pub(in crate::sim) fn drive(&mut self, h: usize) -> Checked {
        let (at, now) = (self.now, self.host_now(h));
        loop {
            let Some(running) = &mut self.hosts[h].running else { return Ok(()) };
            running.turns = if running.turns.0 == at { (at, running.turns.1 + 1) } else { (at, 0) };
            must(running.turns.1 < MAX_TURNS, || {
                let due = (running.control.poll_timeout(), running.tunnel.poll_timeout());
                format!("h{h} spins at {now:?}, with timeouts at {due:?}")
            })?;
            let mut is_busy = false;
            while let Some(event) = running.tunnel.poll_event() {
                is_busy = true;
                running.control.handle_datapath(&translate(event), now);
            }
            while let Some(action) = self.hosts[h].running.as_mut().and_then(|r| r.control.poll_action()) {
                is_busy = true;
                self.act(h, action)?;
            }
            self.transmit(h);
            self.receive_own(h);
            if !is_busy {
                break;
            }
        }
        let life = self.hosts[h].life;
        let Some(running) = &mut self.hosts[h].running else { return Ok(()) };
        let due = [running.control.poll_timeout(), running.tunnel.poll_timeout().map(|(due, _)| due)];
        let Some(due) = due.into_iter().flatten().min() else { return Ok(()) };
        let wake = at + due.saturating_duration_since(now);
        if running.wake.is_none_or(|scheduled| scheduled > wake || scheduled < at) {
            running.wake = Some(wake);
            self.after(wake - at, Event::Wake { host: h, life });
        }
        Ok(())
    }

    pub(super) fn transmit(&mut self, h: usize) {
        while let Some(transmit) = self.hosts[h].running.as_mut().and_then(|r| r.tunnel.poll_transmit()) {
            if let Some(destination) = transmit.hop.udp() {
                self.send_datagram(h, destination, transmit.payload);
            }
        }
    }

    /// Packets that the tunnel itself makes: errors about packets that cannot be delivered.
    fn receive_own(&mut self, h: usize) {
        while let Some(packet) = self.hosts[h].running.as_mut().and_then(|r| r.tunnel.poll_packet()) {
            let header = if packet.first().is_some_and(|octet| octet >> 4 == 4) { 28 } else { 48 };
            if let Some(id) = packet.get(header..).and_then(packet_id) {
                self.note(format_args!("h{h} learns that packet {id} cannot be delivered"));
                self.counts.unreachable += 1;
                self.model.unreachable.insert(id);
            }
        }
    }

    pub(super) fn send_datagram(&mut self, h: usize, to: SocketAddr, octets: Vec<u8>) {
        let from = self.hosts[h].address;
        self.counts.datagrams += 1;
        self.note(format_args!("h{h} > {to} {} octets {:x}", octets.len(), digest(&octets)));
        if self.recorded.len() < 64 && self.rng.random_bool(0.2) {
            self.recorded.push((from, to, octets.clone()));
        }
        let open = self.hosts.iter().position(|host| host.address == to);
        let open = open.is_some_and(|peer| self.links.is_open(Node::Host(h), Node::Host(peer)));
        if !open || self.rng.random_bool(self.links.loss) {
            return;
        }
        if self.rng.random_bool(self.links.duplicates) {
            let delay = self.links.delay(&mut self.rng);
            self.after(delay, Event::Datagram { from, to, octets: octets.clone() });
        }
        let delay = self.links.delay(&mut self.rng);
        self.after(delay, Event::Datagram { from, to, octets });
    }

    fn act(&mut self, h: usize, action: Action) -> Checked {
        self.count_call(h, &action)?;
        let now = self.host_now(h);
        if !matches!(action, Action::Persist(_)) {
            self.note(format_args!("h{h} {}", describe(&action)));
        }
        let Some(running) = &mut self.hosts[h].running else { return Ok(()) };
        match action {
            Action::Register { attempt, registrar, request } => {
                let number =
                    registrar.strip_prefix('r').and_then(|r| r.strip_suffix(":7500")?.parse::<usize>().ok());
                let registrar = number
                    .ok_or_else(|| Violation(format!("h{h} goes to {registrar}, which nobody told it")))?;
                (running.attempt, running.registrar) = (attempt, registrar);
                self.call(h, registrar, Purpose::Register { attempt, message: request });
            }
            Action::OpenSession { attempt, hello } => {
                let registrar = running.registrar;
                let Some(uid) = self.hosts[h].disk.as_ref().map(|disk| disk.uid) else { return Ok(()) };
                let connection = self.connect(h, attempt, registrar, uid);
                if let Some(running) = &mut self.hosts[h].running {
                    running.connection = Some(connection);
                }
                self.send_up(connection, Up::Open(hello));
            }
            Action::Send(message) => {
                if let Some(connection) = running.connection {
                    self.send_up(connection, Up::Message(message));
                }
            }
            Action::Disconnect { attempt } => {
                let connection = running.connection.take();
                self.calls.retain(|_, call| {
                    let of = match call.purpose {
                        Purpose::Register { attempt, .. }
                        | Purpose::Lookup { attempt, .. }
                        | Purpose::Renew { attempt } => Some(attempt),
                        _ => None,
                    };
                    call.host != h || of != Some(attempt)
                });
                if let Some(connection) = connection {
                    self.hang_up(connection);
                }
            }
            Action::Lookup { id, by } => {
                let (registrar, attempt) = (running.registrar, running.attempt);
                self.call(h, registrar, Purpose::Lookup { attempt, id, by });
            }
            Action::Renew => {
                let (registrar, attempt) = (running.registrar, running.attempt);
                self.call(h, registrar, Purpose::Renew { attempt });
            }
            // There are no directors in the simulation.
            Action::Attach { .. }
            | Action::Detach(_)
            | Action::OpenStream { .. }
            | Action::CloseStream(_) => {}
            Action::Configure(settings) => running.settings = Some(*settings),
            Action::Datapath(command) => {
                let routes = running.settings.as_ref().map(|s| s.routes.clone()).unwrap_or_default();
                let tunnel = &mut running.tunnel;
                match command {
                    datapath::Command::AddPeer(peer) => tunnel.add_peer(peer_config(peer, &routes), now),
                    datapath::Command::UpdatePeer(peer) => {
                        tunnel.update_peer(peer_config(peer, &routes), now);
                    }
                    datapath::Command::RemovePeer(key) => {
                        tunnel.remove_peer(&muster_tunnel::PublicKey::from_bytes(key));
                    }
                    datapath::Command::NoSuchDevice(address) => tunnel.no_such_device(address, now),
                    datapath::Command::UnknownKey(key) => {
                        tunnel.unknown_key(muster_tunnel::PublicKey::from_bytes(key), now);
                    }
                    datapath::Command::SetLocalAddresses(_)
                    | datapath::Command::SetCarried { .. }
                    | datapath::Command::SetDirector { .. }
                    | datapath::Command::SetStream { .. } => {}
                }
            }
            Action::Persist(what) => {
                let (revision, peers) = running.control.held_peers();
                let config = running.control.config().cloned();
                let Some(disk) = &mut self.hosts[h].disk else { return Ok(()) };
                match what {
                    Persist::Config => disk.config = config,
                    Persist::Peers => (disk.revision, disk.peers) = (revision, peers),
                }
            }
            Action::ReplaceRoots(_) | Action::ForgetName(_) | Action::ForgetServices(_) => {}
        }
        Ok(())
    }

    /// Counts what goes to registrars: however bad things are, nobody spins.
    fn count_call(&mut self, h: usize, action: &Action) -> Checked {
        let is_call = matches!(
            action,
            Action::Register { .. } | Action::OpenSession { .. } | Action::Lookup { .. } | Action::Renew
        );
        if !is_call {
            return Ok(());
        }
        let at = self.now;
        let away = !(0..self.registrars.len())
            .any(|r| self.registrars[r].is_up && self.links.is_open(Node::Host(h), Node::Registrar(r)));
        let Some(running) = &mut self.hosts[h].running else { return Ok(()) };
        let minute = Duration::from_secs(60);
        let count = |(since, n): (Duration, u32)| if at - since < minute { (since, n + 1) } else { (at, 1) };
        running.calls = count(running.calls);
        running.away_calls = if away { count(running.away_calls) } else { (at, 0) };
        must(running.calls.1 < MAX_CALLS, || format!("h{h} makes {} calls a minute", running.calls.1))?;
        must(running.away_calls.1 < MAX_CALLS_AWAY, || {
            format!("h{h} makes {} calls a minute while no registrar can be reached", running.away_calls.1)
        })
    }
}

fn describe(action: &Action) -> String {
    match action {
        Action::Register { attempt, registrar, .. } => format!("registers at {registrar}, attempt {attempt}"),
        Action::OpenSession { hello, .. } => {
            format!("opens a session from {} with {} peers", hello.revision, hello.held_peer_uids.len())
        }
        other => format!("{other:?}"),
    }
}

/// As the agent's data plane does it: endpoints within the network's own pools lead nowhere.
fn peer_config(peer: datapath::PeerConfig, routes: &[IpNet]) -> muster_tunnel::PeerConfig {
    let mut endpoints = peer.endpoints;
    endpoints.retain(|endpoint| !routes.iter().any(|route| route.contains(&endpoint.ip())));
    muster_tunnel::PeerConfig {
        virtual_addresses: peer.virtual_addresses,
        endpoints,
        persistent_keepalive: peer.keepalive,
        cipher: match peer.cipher {
            datapath::Cipher::ChaCha20Poly1305 => muster_tunnel::Cipher::ChaCha20Poly1305,
            datapath::Cipher::Aes256Gcm => muster_tunnel::Cipher::Aes256Gcm,
        },
        ..muster_tunnel::PeerConfig::new(muster_tunnel::PublicKey::from_bytes(peer.public_key))
    }
}

fn translate(event: muster_tunnel::Event) -> datapath::Event {
    use datapath::Event as To;
    use muster_tunnel::Event as From;
    match event {
        From::LookupAddress(address) => To::LookupAddress(address),
        From::LookupKey(key) => To::LookupKey(*key.as_bytes()),
        From::PeerUp { public_key, endpoint } => To::PeerUp { public_key: *public_key.as_bytes(), endpoint },
        From::PeerDown(key) => To::PeerDown(*key.as_bytes()),
        From::PeerIdle(key) => To::PeerIdle(*key.as_bytes()),
        From::EndpointChanged { public_key, endpoint } => {
            To::EndpointChanged { public_key: *public_key.as_bytes(), endpoint }
        }
    }
}
