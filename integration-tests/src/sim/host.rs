//! A host: the agent's real control core and the real tunnel, in a played shell that does what the agent's run loop
//! does, with a disk that survives restarts and a TUN device that remembers what came out of it.

mod run_loop;

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use ipnet::IpNet;
use muster_agent::control::{Control, Failure, LookupResult, Settings, Start, Validity};
use muster_common::time::{Instant, Timestamp};
use muster_proto::registration::{DeviceConfig, Peer};
use muster_tunnel::{Config, Dropped, Ecn, Outgoing, PrivateKey, Received, Sent, Tunnel};
use rand::RngExt as _;
use uuid::Uuid;

use super::{
    Checked, Violation,
    links::Node,
    must,
    registrar::BACKDATE,
    requests::{Enroll, Refusal},
    trace::digest,
    world::{Answer, Call, Down, Event, Purpose, Up, World},
};

/// How long the revocation of a token takes to be known everywhere: longer than a registrar hears nothing of its store.
const TOKEN_NEWS: Duration = Duration::from_secs(30);
/// Between looks at the certificate.
const CERTIFICATE_INTERVAL: Duration = Duration::from_secs(3600);

/// A host, with or without an agent.
pub(super) struct Host {
    /// Where its tunnel is reached.
    pub(super) address: SocketAddr,
    pub(super) disk: Option<Disk>,
    pub(super) running: Option<Box<Running>>,
    /// Changes whenever what is under way becomes void.
    pub(super) life: u64,
    /// When the host was booted.
    booted: Duration,
    /// How far its clock is ahead.
    skew: Duration,
    /// A token and key with which to try to join again.
    pub(super) joining: Option<Joining>,
    pub(super) is_leaving: bool,
}

/// What is on disk.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    pub(super) uid: Uuid,
    pub(super) validity: Validity,
    private_key: [u8; 32],
    registrar: String,
    config: Option<DeviceConfig>,
    peers: Vec<Peer>,
    revision: u64,
}

/// A join under way, or one that has failed.
#[derive(Clone, Debug)]
pub(super) struct Joining {
    pub(super) enroll: Enroll,
    /// Number of the token, if an operator has made it.
    pub(super) token: Option<usize>,
    pub(super) private_key: [u8; 32],
    pub(super) registrar: usize,
}

/// A running agent.
pub(super) struct Running {
    pub(super) control: Control,
    pub(super) tunnel: Tunnel,
    /// Whether it takes AES-256-GCM.
    pub(super) aes: bool,
    pub(super) settings: Option<Settings>,
    pub(super) connection: Option<u64>,
    attempt: u64,
    registrar: usize,
    out: Outgoing,
    wake: Option<Duration>,
    /// Turns at this moment, and calls since this one.
    turns: (Duration, u32),
    calls: (Duration, u32),
    away_calls: (Duration, u32),
}

/// Whether a host has AES in this life: most do, and some have it switched on or off by the next one.
const fn has_aes(h: usize, life: u64) -> bool {
    !(h as u64 + life / 4).is_multiple_of(3)
}

impl Host {
    pub(super) fn new(number: usize, skew: Duration) -> Self {
        Self {
            address: SocketAddr::from(([10, 0, number as u8, 2], 7551)),
            disk: None,
            running: None,
            life: 0,
            booted: Duration::ZERO,
            skew,
            joining: None,
            is_leaving: false,
        }
    }

    /// The virtual addresses that its interface has.
    pub(super) fn addresses(&self) -> Vec<IpAddr> {
        let settings = self.running.as_ref().and_then(|running| running.settings.as_ref());
        settings.map(Settings::virtual_addresses).unwrap_or_default()
    }

    /// Whether it holds the device as a peer.
    pub(super) fn holds(&self, uid: Uuid) -> bool {
        let uid = uid.to_string();
        self.running.as_ref().is_some_and(|r| r.control.peers().any(|peer| peer.message.device_uid == uid))
    }
}

impl World {
    /// Time since boot at a host.
    fn host_now(&self, h: usize) -> Instant {
        Instant::from_boot(Duration::from_secs(10) + self.now.saturating_sub(self.hosts[h].booted))
    }

    /// Civil time at a host.
    fn host_civil(&self, h: usize) -> Timestamp {
        self.civil() + self.hosts[h].skew
    }

    // Life

    /// Starts the agent of a host that has joined.
    pub(super) fn start_agent(&mut self, h: usize) -> Checked {
        if self.hosts[h].running.is_some() {
            return Ok(());
        }
        let Some(disk) = self.hosts[h].disk.clone() else { return Ok(()) };
        let aes = has_aes(h, self.hosts[h].life + 1);
        self.note(format_args!("h{h} starts, {} peers on disk, AES: {aes}", disk.peers.len()));
        let (now, civil) = (self.host_now(h), self.host_civil(h));
        let host = &mut self.hosts[h];
        host.life += 1;
        let life = host.life;
        let private_key = PrivateKey::from_bytes(disk.private_key);
        let start = Start {
            device_uid: disk.uid.to_string(),
            public_key: *private_key.public_key().as_bytes(),
            agent_version: "sim".into(),
            accepts_aes: aes,
            offer: Default::default(),
            registrar: disk.registrar,
            config: disk.config,
            peers: disk.peers,
            revision: disk.revision,
            private_endpoints: vec![host.address],
        };
        let config =
            Config { private_key, seed: self.rng.random(), mtu: 1420, handshake_rate: 0, accepts_aes: aes };
        let mut control = Control::new(start, self.rng.random(), now);
        control.handle_certificate(disk.validity, civil, now);
        host.running = Some(Box::new(Running {
            control,
            aes,
            tunnel: Tunnel::new(config, now, civil),
            settings: None,
            connection: None,
            attempt: 0,
            registrar: 0,
            out: Outgoing::new(),
            wake: None,
            turns: (Duration::ZERO, 0),
            calls: (Duration::ZERO, 0),
            away_calls: (Duration::ZERO, 0),
        }));
        self.after(CERTIFICATE_INTERVAL, Event::Certificate { host: h, life });
        self.drive(h)
    }

    /// Kills the agent; its disk stays.
    pub(super) fn stop_agent(&mut self, h: usize) {
        let Some(running) = self.hosts[h].running.take() else { return };
        self.note(format_args!("h{h} stops"));
        self.hosts[h].life += 1;
        self.hosts[h].is_leaving = false;
        if let Some(connection) = running.connection {
            self.hang_up(connection);
        }
    }

    /// The host's clock since boot begins anew.
    pub(super) fn reboot(&mut self, h: usize) {
        self.stop_agent(h);
        self.hosts[h].booted = self.now;
    }

    /// Forgets everything of the device.
    pub(super) fn wipe(&mut self, h: usize) {
        self.stop_agent(h);
        self.note(format_args!("h{h} is wiped"));
        self.hosts[h].disk = None;
        self.hosts[h].joining = None;
    }

    /// The host is reached elsewhere.
    pub(super) fn move_host(&mut self, h: usize, address: SocketAddr) -> Checked {
        self.note(format_args!("h{h} moves to {address}"));
        self.hosts[h].address = address;
        let now = self.host_now(h);
        if let Some(running) = &mut self.hosts[h].running {
            running.control.handle_private_endpoints(vec![address], now);
        }
        self.drive(h)
    }

    fn hang_up(&mut self, connection: u64) {
        let Some(c) = self.connections.get(&connection) else { return };
        if c.doomed {
            return;
        }
        if self.links.is_open(Node::Host(c.host), Node::Registrar(c.registrar)) {
            self.send_up(connection, Up::Hangup);
        } else {
            self.doom(connection);
        }
    }

    // Inputs

    pub(super) fn on_wake(&mut self, h: usize, life: u64) -> Checked {
        let (at, now) = (self.now, self.host_now(h));
        if self.hosts[h].life != life {
            return Ok(());
        }
        let Some(running) = self.hosts[h].running.as_mut().filter(|r| r.wake == Some(at)) else {
            return Ok(());
        };
        running.wake = None;
        if running.control.poll_timeout().is_some_and(|due| due <= now) {
            running.control.handle_timeout(now);
        }
        if running.tunnel.poll_timeout().is_some_and(|(due, _)| due <= now) {
            running.tunnel.handle_timeout(now);
        }
        self.drive(h)
    }

    pub(super) fn on_certificate(&mut self, h: usize, life: u64) -> Checked {
        let (now, civil) = (self.host_now(h), self.host_civil(h));
        let host = &mut self.hosts[h];
        if host.life != life {
            return Ok(());
        }
        if let (Some(running), Some(disk)) = (&mut host.running, &host.disk) {
            running.control.handle_certificate(disk.validity, civil, now);
        }
        self.after(CERTIFICATE_INTERVAL, Event::Certificate { host: h, life });
        self.drive(h)
    }

    pub(super) fn on_datagram(&mut self, from: SocketAddr, to: SocketAddr, mut octets: Vec<u8>) -> Checked {
        let Some(h) = self.hosts.iter().position(|host| host.address == to) else { return Ok(()) };
        let now = self.host_now(h);
        let addresses = self.hosts[h].addresses();
        let host = &mut self.hosts[h];
        let (Some(running), Some(disk)) = (&mut host.running, &host.disk) else { return Ok(()) };
        let uid = disk.uid;
        let received = running.tunnel.handle_datagram(from, Ecn::NotEct, &mut octets, now);
        let line = format!("h{h} < {from} {}", outcome(&received));
        if let Ok(Received::Packet { packet, .. }) = &received
            && let Some(reply) = echo_reply(packet)
        {
            self.note(format_args!("{line}, a probe of the path"));
            self.seal(h, &reply, |world, sent| world.note(format_args!("h{h} answers it: {sent:?}")));
            return self.drive(h);
        }
        let delivered = match received {
            Ok(Received::Packet { from, packet }) => {
                Some(self.model.deliver(uid, &addresses, from.as_bytes(), packet)?)
            }
            _ => None,
        };
        self.note(format_args!("{line} {delivered:?}"));
        self.counts.delivered += u64::from(delivered.is_some());
        self.drive(h)
    }

    /// A program on the host sends a packet to a virtual address. Returns its number if the host routes it into the
    /// tunnel.
    pub(super) fn send_packet(&mut self, h: usize, destination: IpAddr) -> Checked<Option<u64>> {
        let source = self.hosts[h].addresses().into_iter().find(|a| a.is_ipv4() == destination.is_ipv4());
        let host = &mut self.hosts[h];
        let (Some(running), Some(disk), Some(source)) = (&host.running, &host.disk, source) else {
            return Ok(None);
        };
        let routes: &[IpNet] = running.settings.as_ref().map_or(&[], |settings| &settings.routes);
        if source == destination || !routes.iter().any(|route| route.contains(&destination)) {
            return Ok(None);
        }
        let (id, packet) = self.model.packet(disk.uid, source, destination);
        self.counts.packets += 1;
        self.seal(h, &packet, |world, sent| {
            world.note(format_args!("h{h} sends packet {id} to {destination}: {sent:?}"));
        });
        self.drive(h)?;
        Ok(Some(id))
    }

    /// Hands a packet to a host's tunnel, tells what became of it, and sends what came of it.
    fn seal(&mut self, h: usize, packet: &[u8], tell: impl FnOnce(&mut Self, Result<Sent, Dropped>)) {
        let now = self.host_now(h);
        let Some(running) = &mut self.hosts[h].running else { return };
        running.out.clear();
        let sent = running.tunnel.handle_packet(packet, now, &mut running.out);
        let mut sealed: Vec<(SocketAddr, Vec<u8>)> = Vec::new();
        for run in running.out.runs() {
            let destination = run.hop.udp();
            sealed.extend(run.datagrams().filter_map(|datagram| Some((destination?, datagram.to_vec()))));
        }
        tell(self, sent);
        // What the core has to send goes first.
        self.transmit(h);
        for (to, octets) in sealed {
            self.send_datagram(h, to, octets);
        }
    }

    /// A call of a host is answered, or not.
    pub(super) fn on_answer(&mut self, id: u64, answer: Answer) -> Checked {
        let Some(call) = self.calls.remove(&id) else { return Ok(()) };
        let h = call.host;
        if self.hosts[h].life != call.life {
            return Ok(());
        }
        self.take_answer(&call, answer)?;
        self.drive(h)
    }

    fn take_answer(&mut self, call: &Call, answer: Answer) -> Checked {
        let (h, now, civil) = (call.host, self.host_now(call.host), self.host_civil(call.host));
        match &call.purpose {
            Purpose::Enroll(joining) => return self.joined(h, joining, answer),
            Purpose::Leave => {
                if matches!(answer, Answer::Left) {
                    self.wipe(h);
                }
                self.hosts[h].is_leaving = false;
                return Ok(());
            }
            _ => {}
        }
        let host = &mut self.hosts[h];
        let (Some(running), Some(disk)) = (&mut host.running, &mut host.disk) else { return Ok(()) };
        match (&call.purpose, answer) {
            (Purpose::Register { attempt, .. }, Answer::Registered(response)) => {
                self.counts.registered += 1;
                running.control.handle_registered(*attempt, Ok(*response), now);
            }
            (Purpose::Register { attempt, .. }, answer) => {
                running.control.handle_registered(*attempt, Err(failure(answer)), now);
            }
            (Purpose::Lookup { attempt, id, .. }, answer) if *attempt == running.attempt => {
                self.counts.lookups += 1;
                let result = match answer {
                    Answer::LookedUp(result) => result,
                    Answer::Refused(_) => LookupResult::NotFound,
                    _ => LookupResult::Unavailable,
                };
                self.trace.line(self.now, format_args!("h{h} lookup {id}: {}", found(&result)));
                running.control.handle_looked_up(*id, result, now);
            }
            (Purpose::Renew { .. }, Answer::Renewed(validity)) => {
                self.counts.renewed += 1;
                disk.validity = validity;
                running.control.handle_certificate(validity, civil, now);
            }
            (Purpose::Renew { attempt }, _) if *attempt == running.attempt => {
                running.control.handle_renewal_failed(now);
            }
            (Purpose::Resolve(_), Answer::Resolved(addresses)) => {
                running.control.handle_resolved(&addresses, now);
            }
            _ => {}
        }
        Ok(())
    }

    fn joined(&mut self, h: usize, joining: &Joining, answer: Answer) -> Checked {
        match answer {
            Answer::Enrolled { uid, validity } => {
                self.note(format_args!("h{h} has joined as {uid}"));
                self.counts.joined += 1;
                let name = &joining.enroll.name;
                let owner = self.model.by_name(name);
                must(owner.is_none_or(|owner| owner == uid), || {
                    format!("{uid} joined as {name}, {owner:?}'s")
                })?;
                let Some(token) = joining.token.and_then(|n| self.tokens.get_mut(n)) else {
                    return Err(Violation(format!("{uid} joined with a token that nobody has made")));
                };
                // Unless the answer is a repetition, the token must have been good when the request was taken.
                let is_new = token.joined.insert(uid);
                let asked = validity.not_before + BACKDATE;
                let revoked = self.model.revoked_tokens.get(token.secret.id().as_str());
                let good = token.expires > asked && revoked.is_none_or(|at| asked <= *at + TOKEN_NEWS);
                must(!is_new || good, || {
                    format!("{uid} joined at {asked} with {token:?}, revoked: {revoked:?}")
                })?;
                let once = token.reusable || token.joined.len() == 1;
                must(once, || format!("a one-off token let in {:?}", token.joined))?;
                self.hosts[h].disk = Some(Disk {
                    uid,
                    validity,
                    private_key: joining.private_key,
                    registrar: format!("r{}:7500", joining.registrar),
                    config: None,
                    peers: Vec::new(),
                    revision: 0,
                });
                self.hosts[h].joining = None;
                self.start_agent(h)
            }
            Answer::NotEnrolled(refusal) => {
                self.note(format_args!("h{h} may not join: {refusal:?}"));
                // A lost answer is asked for again; a refusal is final.
                if !matches!(refusal, Refusal::Unavailable(_)) {
                    self.hosts[h].joining = None;
                }
                Ok(())
            }
            _ => {
                self.note(format_args!("h{h} cannot join just now"));
                Ok(())
            }
        }
    }

    pub(super) fn on_down(&mut self, connection: u64, message: Down) -> Checked {
        let Some(c) = self.connections.get(&connection) else { return Ok(()) };
        let (h, attempt, life, doomed) = (c.host, c.attempt, c.life, c.doomed);
        let open = self.links.is_open(Node::Host(h), Node::Registrar(c.registrar));
        let is_loss =
            matches!(&message, Down::Closed(Failure::Unavailable(reason)) if reason == "connection lost");
        if !is_loss && (doomed || !open) {
            self.doom(connection);
            return Ok(());
        }
        let now = self.host_now(h);
        if self.hosts[h].life != life {
            return Ok(());
        }
        let Some(running) = self.hosts[h].running.as_mut().filter(|r| r.connection == Some(connection))
        else {
            return Ok(());
        };
        let line = match message {
            Down::Opened => {
                self.counts.sessions += 1;
                running.control.handle_session_opened(attempt, now);
                "session opened".to_owned()
            }
            Down::Message(message) => {
                let line = format!("{:x}", digest(format!("{message:?}").as_bytes()));
                running.control.handle_session_message(attempt, *message, now);
                line
            }
            Down::Closed(failure) => {
                let line = format!("session closed: {failure:?}");
                running.connection = None;
                running.control.handle_session_closed(attempt, failure, now);
                line
            }
        };
        self.note(format_args!("h{h} {line}"));
        self.drive(h)
    }
}

fn failure(answer: Answer) -> Failure {
    match answer {
        Answer::Refused(reason) => Failure::Refused(reason),
        Answer::Unavailable(reason) => Failure::Unavailable(reason),
        other => Failure::Unavailable(format!("{other:?}")),
    }
}

fn found(result: &LookupResult) -> String {
    match result {
        LookupResult::Found(peer) => format!("{} at {}", peer.name, peer.revision),
        other => format!("{other:?}"),
    }
}

/// What a host answers to an echo request, checksums aside; `None` to all else.
fn echo_reply(packet: &[u8]) -> Option<Vec<u8>> {
    let mut reply = packet.to_vec();
    let (addresses, kind) = match (packet.first()? >> 4, packet.get(9)?, packet.get(6)?) {
        (4, 1, _) if packet.get(20) == Some(&8) => (12..20, (20, 0)),
        (6, _, 58) if packet.get(40) == Some(&128) => (8..40, (40, 129)),
        _ => return None,
    };
    let half = addresses.len() / 2;
    reply.get_mut(addresses)?.rotate_left(half);
    *reply.get_mut(kind.0)? = kind.1;
    Some(reply)
}

fn outcome(received: &Result<Received<'_>, Dropped>) -> String {
    match received {
        Ok(Received::Packet { packet, .. }) => format!("{} octets", packet.len()),
        Ok(other) => format!("{other:?}"),
        Err(dropped) => dropped.as_str().to_owned(),
    }
}
