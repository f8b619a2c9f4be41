//! A host: the agent's real control core and the real tunnel, in a played shell that does what the agent's run loop
//! does, with a disk that survives restarts and a TUN device that remembers what came out of it.

mod answers;
mod datagrams;
mod run_loop;

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use muster_agent::{
    control::{Control, Settings, Start, Validity},
    directors::flow::Flows,
};
use muster_common::time::{Instant, Timestamp};
use muster_proto::registration::{DeviceConfig, Peer};
use muster_tunnel::{Config, DirectorId, DirectorLink, Handle, Outgoing, PrivateKey, Tunnel};
use rand::RngExt as _;
use uuid::Uuid;

use super::{
    Checked,
    connections::Up,
    directors::channels::What,
    internet::Place,
    links::Node,
    requests::Enroll,
    world::{Event, World},
};

/// How long the revocation of a token takes to be known everywhere: longer than a registrar hears nothing of its store.
const TOKEN_NEWS: Duration = Duration::from_secs(30);
/// Between looks at the certificate.
const CERTIFICATE_INTERVAL: Duration = Duration::from_secs(3600);

/// A host, with or without an agent.
pub(super) struct Host {
    /// Where it is, and where its tunnel is reached there.
    pub(super) place: Place,
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
    /// Until when it is suspended: nothing runs, nothing arrives, and its clocks go on.
    pub(super) asleep: Option<Duration>,
    /// When it went on after it had been suspended.
    pub(super) woken: Duration,
    /// What its kernel holds for it meanwhile.
    pub(super) held_back: Vec<Event>,
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
    epoch: u64,
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
    pub(super) flows: Flows,
    /// Its attachments and streams, the newest last.
    pub(super) channels: BTreeMap<(What, DirectorId), Vec<u64>>,
    /// The attempt that there is an attachment of, and its session.
    pub(super) sessions: BTreeMap<DirectorId, (u64, u32)>,
    /// How directors are reached, as the tunnel knows it.
    pub(super) links: BTreeMap<DirectorId, DirectorLink>,
    /// Addresses from which something authentic came, and when last.
    pub(super) heard: BTreeMap<SocketAddr, Duration>,
    /// Peers that were heard through a director, and when last.
    pub(super) relayed: BTreeMap<(DirectorId, Handle), Duration>,
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
    /// What it has sent of its own accord since this moment.
    chatter: (Duration, u32),
}

/// Whether a host has AES in this life: most do, and some have it switched on or off by the next one.
const fn has_aes(h: usize, life: u64) -> bool {
    !(h as u64 + life / 4).is_multiple_of(3)
}

impl Host {
    pub(super) fn new(place: Place, skew: Duration) -> Self {
        Self {
            place,
            disk: None,
            running: None,
            life: 0,
            booted: Duration::ZERO,
            skew,
            joining: None,
            is_leaving: false,
            asleep: None,
            woken: Duration::ZERO,
            held_back: Vec::new(),
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
    pub(super) fn host_now(&self, h: usize) -> Instant {
        Instant::from_boot(Duration::from_secs(10) + self.now.saturating_sub(self.hosts[h].booted))
    }

    /// Civil time at a host.
    pub(super) fn host_civil(&self, h: usize) -> Timestamp {
        self.civil() + self.hosts[h].skew
    }

    // Life

    /// Starts the agent of a host that has joined.
    pub(super) fn start_agent(&mut self, h: usize) -> Checked {
        if self.hosts[h].running.is_some() || self.hosts[h].asleep.is_some() {
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
            epoch: disk.epoch,
            revision: disk.revision,
            private_endpoints: host.place.addresses.clone(),
            virtual_services: None,
        };
        let config =
            Config { private_key, seed: self.rng.random(), mtu: 1420, handshake_rate: 0, accepts_aes: aes };
        let mut control = Control::new(start, self.rng.random(), now);
        control.handle_certificate(disk.validity, civil, now);
        host.running = Some(Box::new(Running {
            control,
            aes,
            tunnel: Tunnel::new(config, now, civil),
            flows: Flows::new(),
            channels: BTreeMap::new(),
            sessions: BTreeMap::new(),
            links: BTreeMap::new(),
            heard: BTreeMap::new(),
            relayed: BTreeMap::new(),
            settings: None,
            connection: None,
            attempt: 0,
            registrar: 0,
            out: Outgoing::new(),
            wake: None,
            turns: (Duration::ZERO, 0),
            calls: (Duration::ZERO, 0),
            away_calls: (Duration::ZERO, 0),
            chatter: (Duration::ZERO, 0),
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
        running.channels.into_values().flatten().for_each(|channel| self.hang_up_channel(channel));
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

    /// The host is elsewhere.
    pub(super) fn move_host(&mut self, h: usize, place: Place) -> Checked {
        self.note(format_args!("h{h} moves to {place:?}"));
        let addresses = place.addresses.clone();
        self.hosts[h].place = place;
        let now = self.host_now(h);
        // Connections are of the address that is gone.
        self.doom_channels(|channel| channel.host == h);
        if self.hosts[h].asleep.is_some() {
            return Ok(());
        }
        if let Some(running) = &mut self.hosts[h].running {
            running.control.handle_private_endpoints(addresses, now);
            running.flows.host_moved(now);
            running.tunnel.paths_changed(now);
            let live: Vec<_> = running
                .tunnel
                .peers(now)
                .filter(|peer| peer.has_session)
                .map(|peer| peer.public_key)
                .collect();
            for key in live {
                running.tunnel.connect(&key, now);
            }
        }
        self.drive(h)
    }

    /// The host is suspended: its connections are lost if that lasts.
    pub(super) fn suspend(&mut self, h: usize, span: Duration) {
        if self.hosts[h].asleep.is_some() {
            return;
        }
        self.note(format_args!("h{h} is suspended for {span:?}"));
        self.hosts[h].asleep = Some(self.now + span);
        if span > Duration::from_secs(30) {
            self.doom_all(|connection| connection.host == h);
            self.doom_channels(|channel| channel.host == h);
        }
        self.after(span, Event::Resume { host: h });
    }

    /// The host goes on, if it is time.
    pub(super) fn resume(&mut self, h: usize) -> Checked {
        if self.hosts[h].asleep.is_none_or(|until| until > self.now) {
            return Ok(());
        }
        self.note(format_args!("h{h} goes on"));
        self.hosts[h].asleep = None;
        self.hosts[h].woken = self.now;
        for event in std::mem::take(&mut self.hosts[h].held_back) {
            self.after(Duration::ZERO, event);
        }
        let now = self.host_now(h);
        let addresses = self.hosts[h].place.addresses.clone();
        if let Some(running) = &mut self.hosts[h].running {
            running.wake = None;
            let has_moved = running.control.private_endpoints() != addresses;
            if has_moved {
                running.control.handle_private_endpoints(addresses, now);
                running.flows.host_moved(now);
                running.tunnel.paths_changed(now);
            }
        }
        self.run_timeouts(h);
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
        let at = self.now;
        if self.hosts[h].life != life {
            return Ok(());
        }
        if self.hosts[h].asleep.is_some() {
            return Ok(());
        }
        let Some(running) = self.hosts[h].running.as_mut().filter(|r| r.wake == Some(at)) else {
            return Ok(());
        };
        running.wake = None;
        self.run_timeouts(h);
        self.drive(h)
    }

    /// Has the cores do what is due.
    fn run_timeouts(&mut self, h: usize) {
        let now = self.host_now(h);
        let Some(running) = &mut self.hosts[h].running else { return };
        if running.control.poll_timeout().is_some_and(|due| due <= now) {
            running.control.handle_timeout(now);
        }
        if running.tunnel.poll_timeout().is_some_and(|(due, _)| due <= now) {
            running.tunnel.handle_timeout(now);
        }
        if running.flows.poll_timeout().is_some_and(|due| due <= now) {
            running.flows.handle_timeout(now);
        }
    }

    pub(super) fn on_certificate(&mut self, h: usize, life: u64) -> Checked {
        let (now, civil) = (self.host_now(h), self.host_civil(h));
        let host = &mut self.hosts[h];
        if host.life != life {
            return Ok(());
        }
        if let (Some(running), Some(disk), None) = (&mut host.running, &host.disk, host.asleep) {
            running.control.handle_certificate(disk.validity, civil, now);
        }
        self.after(CERTIFICATE_INTERVAL, Event::Certificate { host: h, life });
        self.drive(h)
    }
}
