//! The run loop of an agent: does what its cores ask for.

use std::time::Duration;

use ipnet::IpNet;
use muster_agent::{
    control::{Action, Persist},
    datapath,
    directors::flow::FlowEvent,
};
use muster_tunnel::{DirectorId, Hop};

use crate::sim::{
    Checked, Violation,
    connections::{Purpose, Up},
    directors::channels::What,
    links::Node,
    model::packet_id,
    must,
    world::{Event, World},
};

/// Turns of the run loop without time passing, beyond which an agent counts as spinning.
const MAX_TURNS: u32 = 500;
/// Calls to registrars in a minute, beyond which an agent counts as spinning.
const MAX_CALLS: u32 = 300;
/// Datagrams that an agent sends in a second though no program sends anything: rounds of probes at the most.
const MAX_CHATTER: u32 = 400;
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
                let of_flows = running.flows.poll_timeout();
                let due = (running.control.poll_timeout(), running.tunnel.poll_timeout(), of_flows);
                format!("h{h} spins at {now:?}, with timeouts at {due:?}")
            })?;
            let mut is_busy = false;
            while let Some(event) = running.flows.poll_event() {
                is_busy = true;
                match event {
                    FlowEvent::Link(id, link) => {
                        running.tunnel.set_director(id, link, now);
                        running.links.remove(&id);
                        running.links.extend(link.map(|link| (id, link)));
                    }
                    FlowEvent::NoSuchDevice(id, handle) => {
                        running.relayed.remove(&(id, handle));
                        running.tunnel.unreachable_through(id, handle, now);
                    }
                    _ => {}
                }
                running.control.handle_datapath(&datapath::Event::Director(event), now);
            }
            while let Some(event) = running.tunnel.poll_event() {
                is_busy = true;
                running.control.handle_datapath(&translate(event), now);
            }
            while let Some(action) = self.hosts[h].running.as_mut().and_then(|r| r.control.poll_action()) {
                is_busy = true;
                self.act(h, action)?;
            }
            self.transmit(h)?;
            self.receive_own(h);
            if !is_busy {
                break;
            }
        }
        let life = self.hosts[h].life;
        let Some(running) = &mut self.hosts[h].running else { return Ok(()) };
        let of_tunnel = running.tunnel.poll_timeout().map(|(due, _)| due);
        let due = [running.control.poll_timeout(), of_tunnel, running.flows.poll_timeout()];
        let Some(due) = due.into_iter().flatten().min() else { return Ok(()) };
        let wake = at + due.saturating_duration_since(now);
        if running.wake.is_none_or(|scheduled| scheduled > wake || scheduled < at) {
            running.wake = Some(wake);
            self.after(wake - at, Event::Wake { host: h, life });
        }
        Ok(())
    }

    /// Sends what the cores have to send of their own accord; nobody goes on and on.
    pub(super) fn transmit(&mut self, h: usize) -> Checked {
        let at = self.now;
        loop {
            let Some(running) = &mut self.hosts[h].running else { return Ok(()) };
            let next = match running.tunnel.poll_transmit() {
                Some(transmit) => Some((transmit.hop, transmit.payload)),
                None => running.flows.poll_transmit().map(|(to, hello)| (Hop::Udp(to), hello.to_vec())),
            };
            let Some((hop, octets)) = next else { return Ok(()) };
            let (since, sent) = running.chatter;
            let is_same = at - since < Duration::from_secs(1);
            running.chatter = if is_same { (since, sent + 1) } else { (at, 1) };
            let sent = running.chatter.1;
            must(sent < MAX_CHATTER, || format!("h{h} sends {sent} datagrams a second of its own accord"))?;
            self.send(h, hop, octets)?;
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
            Action::Attach { id, attempt, target } => {
                self.open_channel(h, What::Attachment, id, attempt, &target);
            }
            Action::Detach(id) => {
                self.close_channel(h, What::Attachment, id, None);
                self.close_stream(h, id);
            }
            Action::OpenStream { id, attempt, target } => {
                self.close_stream(h, id);
                self.open_channel(h, What::Stream, id, attempt, &target);
            }
            Action::CloseStream(id) => self.close_stream(h, id),
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
                    datapath::Command::SetDirector { id, attachment: Some(attachment) } => {
                        running.flows.attach(id, attachment, now);
                    }
                    datapath::Command::SetDirector { id, attachment: None } => running.flows.detach(id),
                    datapath::Command::SetLocalAddresses(_)
                    | datapath::Command::SetCarried { .. }
                    | datapath::Command::SetStream { .. } => {}
                }
            }
            Action::Persist(what) => {
                let (epoch, revision, peers) = running.control.held_peers();
                let config = running.control.config().cloned();
                let Some(disk) = &mut self.hosts[h].disk else { return Ok(()) };
                match what {
                    Persist::Config => disk.config = config,
                    Persist::Peers => (disk.epoch, disk.revision, disk.peers) = (epoch, revision, peers),
                }
            }
            Action::ReplaceRoots(_)
            | Action::ForgetName(_)
            | Action::ForgetServices(_)
            | Action::Probe(_)
            | Action::VirtualServices(_) => {}
        }
        Ok(())
    }

    fn close_stream(&mut self, h: usize, id: DirectorId) {
        self.close_channel(h, What::Stream, id, None);
        let now = self.host_now(h);
        if let Some(running) = &mut self.hosts[h].running {
            running.flows.stream(id, false, now);
        }
    }

    /// Counts what goes to registrars and directors: however bad things are, nobody spins.
    fn count_call(&mut self, h: usize, action: &Action) -> Checked {
        let is_call = matches!(
            action,
            Action::Register { .. }
                | Action::OpenSession { .. }
                | Action::Lookup { .. }
                | Action::Renew
                | Action::Attach { .. }
                | Action::OpenStream { .. }
        );
        if !is_call {
            return Ok(());
        }
        let to_director = matches!(action, Action::Attach { .. } | Action::OpenStream { .. });
        let at = self.now;
        let away = !to_director
            && !(0..self.registrars.len())
                .any(|r| self.registrars[r].is_up && self.links.is_open(Node::Host(h), Node::Registrar(r)));
        let Some(running) = &mut self.hosts[h].running else { return Ok(()) };
        let minute = Duration::from_secs(60);
        let count = |(since, n): (Duration, u32)| if at - since < minute { (since, n + 1) } else { (at, 1) };
        running.calls = count(running.calls);
        if !to_director {
            running.away_calls = if away { count(running.away_calls) } else { (at, 0) };
        }
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
        relays: peer.relays,
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
