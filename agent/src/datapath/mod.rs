//! The data plane of a device: moves packets between the TUN device and the UDP sockets through the WireGuard core
//! (`muster_tunnel`), on threads of its own. The control side steers it with [`Command`]s and hears [`Event`]s.
//! Both channels are bounded, and the data plane never waits for the control side.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
    num::NonZeroUsize,
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use bytes::Bytes;
use ipnet::IpNet;
use muster_common::{frame, time::Instant};
use muster_tunnel::{DirectorId, Endpoint};
use rustix::{
    event::EventfdFlags,
    time::{TimerfdClockId, TimerfdFlags},
};
use tokio::sync::{mpsc, oneshot};
use zeroize::Zeroizing;

use self::{
    lane::Lane,
    shared::{Core, Shared, Threads},
    worker::Worker,
};
use crate::{
    directors::flow::{Attachment, FlowEvent},
    tun::Tun,
    udp::UdpSockets,
};

mod counters;
mod lane;
mod linger;
mod local;
mod shared;
mod sources;
mod steering;
mod streams;
mod traffic;
mod translate;
mod tun_port;
mod worker;

pub use streams::FrameSender;

/// A WireGuard public key (Curve25519, 32 octets).
pub type PublicKey = [u8; 32];

/// Commands that may wait for the data plane before [`Handle::send`] does.
const COMMAND_QUEUE: usize = 256;
/// Batches of frames from directors' streams that may wait for the data plane before [`Handle::frames`] does.
const FRAME_QUEUE: usize = 64;
/// Events that may wait for the control side. Beyond it they stay in the core, which drops what exceeds its own bound.
const EVENT_QUEUE: usize = 1024;

/// Threads that are started at most unless somebody asks for more.
const THREADS_MAX: usize = 8;

/// What a data plane is made of.
pub struct DatapathConfig {
    /// For each thread, of which there is one at least: a queue of the device that the host's packets come from and go
    /// to, and sockets that carry sealed datagrams, all on one port. More than [`Datapath::threads`] help nobody.
    pub queues: Vec<(Tun, UdpSockets)>,
    /// This device's WireGuard private key.
    pub private_key: Zeroizing<[u8; 32]>,
    /// Seed of everything random in the core (ephemeral keys, session indices, jitter): 32 octets from the system's
    /// generator, new at every start; a secret.
    pub seed: Zeroizing<[u8; 32]>,
    /// MTU of the TUN device, in octets.
    pub mtu: u32,
    /// Whether peers may send in AES-256-GCM, as those do that know of it.
    pub accepts_aes: bool,
    /// This device's virtual addresses. Packets from other sources, such as forwarded ones, do not leave: peers would
    /// refuse them.
    pub local_addresses: Vec<IpAddr>,
    /// The pools that are routed into the TUN device. A peer's endpoint inside one would send the tunnel through
    /// itself, so such endpoints are ignored.
    pub pools: Vec<IpNet>,
}

/// Everything the data plane needs to know of one peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerConfig {
    /// The peer's WireGuard public key.
    pub public_key: PublicKey,
    /// The addresses that the peer may send from and is sent to.
    pub virtual_addresses: Vec<IpAddr>,
    /// Networks behind the peer, for which it forwards.
    pub subnets: Vec<IpNet>,
    /// Where the peer may be reached, best first; may be empty if the peer will call.
    pub endpoints: Vec<SocketAddr>,
    /// Directors that the peer is attached to, and what it is called there, best first; none for a peer that is no
    /// agent.
    pub relays: Vec<(DirectorId, frame::Handle)>,
    /// Interval of WireGuard's persistent keepalives; `None` for none.
    pub keepalive: Option<Duration>,
    /// What sessions that this device begins are sealed with.
    pub cipher: Cipher,
}

/// What the packets of a session are sealed with. Handshakes are WireGuard's in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cipher {
    /// WireGuard's own, which every peer has.
    #[default]
    ChaCha20Poly1305,
    /// Between agents whose CPUs have instructions for it.
    Aes256Gcm,
}

impl Cipher {
    /// The word that status output uses, as in the names of TLS cipher suites.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ChaCha20Poly1305 => "chacha20-poly1305",
            Self::Aes256Gcm => "aes-256-gcm",
        }
    }
}

/// What the control side asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Adds a peer, or updates the one with this key. Answers `LookupAddress` and `LookupKey`.
    AddPeer(PeerConfig),
    /// Replaces addresses, endpoints and keepalive of a live peer; its session goes on. A key that is not held is ignored.
    UpdatePeer(PeerConfig),
    /// Forgets a peer and its keys at once.
    RemovePeer(PublicKey),
    /// Answers `LookupAddress`: no device has this address. Waiting packets get ICMP unreachable.
    NoSuchDevice(IpAddr),
    /// Answers `LookupKey`: no device has this key, or none that may talk to this one.
    UnknownKey(PublicKey),
    /// Replaces this device's virtual addresses.
    SetLocalAddresses(Vec<IpAddr>),
    /// Replaces what this device forwards for: packets from and to these pass as its own do.
    SetCarried {
        /// Virtual addresses of hosts without an agent.
        addresses: Vec<IpAddr>,
        /// Networks.
        subnets: Vec<IpNet>,
    },
    /// Opens a flow to a director, or renews it; `None` closes it, and its stream.
    SetDirector {
        /// Which director.
        id: DirectorId,
        /// What it has given.
        attachment: Option<Attachment>,
    },
    /// Opens or replaces the way to a director where UDP does not pass; `None` closes it.
    SetStream {
        /// Which director; it has a flow.
        id: DirectorId,
        /// Takes batches of frames. What comes the other way is handed to [`Handle::frames`].
        stream: Option<FrameSender>,
    },
}

/// What the control side hears.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A packet waits for a device that is not held as a peer. Sent once; to be answered with `AddPeer` or `NoSuchDevice`.
    LookupAddress(IpAddr),
    /// A handshake came from a key that is not held as a peer. To be answered with `AddPeer` or `UnknownKey`.
    LookupKey(PublicKey),
    /// A peer has its first session, or one again after `PeerDown`.
    PeerUp {
        /// Its key.
        public_key: PublicKey,
        /// Where it is reached.
        endpoint: Endpoint,
    },
    /// A peer no longer answers.
    PeerDown(PublicKey),
    /// Nothing has passed between this device and the peer for a while: it may be removed.
    PeerIdle(PublicKey),
    /// A peer is reached elsewhere than before.
    EndpointChanged {
        /// Its key.
        public_key: PublicKey,
        /// Where it is reached now.
        endpoint: Endpoint,
    },
    /// What has become of a flow to a director.
    Director(FlowEvent),
    /// The data plane has ended by itself, and why: the TUN device is gone. Always the last event.
    Failed(String),
}

/// Counters of the data plane at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// All peers that are held, by public key.
    pub peers: BTreeMap<PublicKey, PeerSnapshot>,
    /// Threads that move packets.
    pub threads: usize,
    /// What was read from the TUN device. A super-packet counts as the packets that it is cut into.
    pub tun_received: Counter,
    /// What was written to the TUN device. A super-packet counts as the packets that it is joined of.
    pub tun_sent: Counter,
    /// What was received from UDP.
    pub udp_received: Counter,
    /// What was sent over UDP.
    pub udp_sent: Counter,
    /// Frames that came from directors, over UDP or in streams, with their headers; batches of them as calls.
    pub relay_received: Counter,
    /// Frames that went to directors.
    pub relay_sent: Counter,
    /// What the kernel does for the data plane at present.
    pub offloads: Offloads,
    /// Packets and datagrams dropped, by reason (`snake_case`, fit for a metric's label).
    pub drops: BTreeMap<&'static str, u64>,
}

/// Packets, octets and system calls since the data plane started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counter {
    /// Packets or datagrams.
    pub packets: u64,
    /// Octets.
    pub bytes: u64,
    /// System calls that they took: fewer than packets where super-packets and batches work.
    pub calls: u64,
}

/// Offloads in use. Those that the kernel turns out to refuse are given up while packets flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums of TCP and UDP are left to this device on the way out, and need no checking on the way in.
    pub tun_checksum: bool,
    /// The host hands over TCP as super-packets and takes it so.
    pub tun_tso: bool,
    /// The host hands over segmented UDP as super-packets and takes it so. Linux has it since 6.2.
    pub tun_uso: bool,
    /// Runs of datagrams are sent whole (`UDP_SEGMENT`).
    pub udp_segment: bool,
    /// Runs of datagrams are received whole (`UDP_GRO`).
    pub udp_gro: bool,
}

impl Offloads {
    /// What both have.
    const fn and(self, other: Self) -> Self {
        Self {
            tun_checksum: self.tun_checksum && other.tun_checksum,
            tun_tso: self.tun_tso && other.tun_tso,
            tun_uso: self.tun_uso && other.tun_uso,
            udp_segment: self.udp_segment && other.udp_segment,
            udp_gro: self.udp_gro && other.udp_gro,
        }
    }

    /// Each by the name that status output and metrics use.
    pub const fn named(self) -> [(&'static str, bool); 5] {
        [
            ("tun_checksum", self.tun_checksum),
            ("tun_tso", self.tun_tso),
            ("tun_uso", self.tun_uso),
            ("udp_segment", self.udp_segment),
            ("udp_gro", self.udp_gro),
        ]
    }
}

/// One peer at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerSnapshot {
    /// Its virtual addresses.
    pub virtual_addresses: Vec<IpAddr>,
    /// The address at which it is reached, unless it is reached through a director.
    pub endpoint: Option<SocketAddr>,
    /// The director through which it is reached.
    pub director: Option<DirectorId>,
    /// When the last handshake was completed.
    pub last_handshake: Option<Instant>,
    /// Authentic datagrams received from the peer.
    pub received_packets: u64,
    /// Octets received from the peer, as WireGuard counts them: sealed.
    pub received_bytes: u64,
    /// Datagrams sent to the peer, handshakes included.
    pub sent_packets: u64,
    /// Octets sent to the peer, sealed.
    pub sent_bytes: u64,
    /// The largest packet that is sent to the peer in one piece, in octets.
    pub path_mtu: u16,
    /// Packets that wait for a session.
    pub queued: usize,
    /// What was dropped of what came from or went to the peer, by reason; only what has happened.
    pub drops: BTreeMap<&'static str, u64>,
    /// The path in use.
    pub path: Path,
    /// How long it takes to the peer and back on that path, if it was measured.
    pub round_trip: Option<Duration>,
    /// Since when the path is in use.
    pub path_since: Option<Instant>,
    /// Why it is, in `snake_case`.
    pub path_reason: Option<&'static str>,
    /// What the session in use is sealed with; `None` while there is none.
    pub cipher: Option<Cipher>,
}

/// How a peer is reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Path {
    /// Not at all.
    #[default]
    None,
    /// Straight from this host to the peer's.
    Direct,
    /// Through a director.
    Relay,
}

impl Path {
    /// The word that status output and metrics use: `none`, `direct` or `relay`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Direct => "direct",
            Self::Relay => "relay",
        }
    }
}

/// Why a data plane could not be started.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} for the data plane: {source}")]
pub struct StartError {
    action: &'static str,
    source: io::Error,
}

/// The data plane has stopped; commands have no effect any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the data plane has stopped")]
pub struct Stopped;

enum Request {
    Command(Command),
    SetPools(Vec<IpNet>),
    Roam,
    Snapshot(oneshot::Sender<Snapshot>),
}

/// A running data plane. Dropping it stops the threads, waits for their end, and closes TUN device and sockets.
pub struct Datapath {
    handle: Handle,
    running: Vec<JoinHandle<()>>,
}

impl Datapath {
    /// Threads to start unless somebody knows better: half the processors, since the kernel's share of the work, and
    /// whoever sends and receives, need the others; one at least, and 8 at most.
    pub fn threads() -> NonZeroUsize {
        let processors = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        NonZeroUsize::new((processors / 2).clamp(1, THREADS_MAX)).unwrap_or(NonZeroUsize::MIN)
    }

    /// Starts the data plane on its own threads. The receiver yields [`Event`]s and ends when the data plane does.
    pub fn start(config: DatapathConfig) -> Result<(Self, mpsc::Receiver<Event>), StartError> {
        fn failed<E: Into<io::Error>>(action: &'static str) -> impl Fn(E) -> StartError {
            move |e| StartError { action, source: e.into() }
        }
        let (requests, requests_rx) = mpsc::channel(COMMAND_QUEUE);
        let (frames, frames_rx) = mpsc::channel(FRAME_QUEUE);
        let (events_tx, events) = mpsc::channel(EVENT_QUEUE + 1);
        let last_word = events_tx
            .clone()
            .try_reserve_owned()
            .map_err(|_| failed("reserve room for an event")(io::Error::from(io::ErrorKind::OutOfMemory)))?;
        // The boot clock goes on during suspend: sessions that have expired meanwhile are noticed on waking up.
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Boottime, flags)
            .map_err(failed("create a timer"))?;
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let wakes = config.queues.iter().map(|_| rustix::event::eventfd(0, flags));
        let wakes = wakes.collect::<Result<_, _>>().map_err(failed("create an eventfd"))?;
        let threads = Arc::new(Threads::new(wakes));

        let tunnel = translate::tunnel(&config);
        let core = Core::new(tunnel, config.local_addresses, config.pools, events_tx);
        let lanes = config.queues.into_iter().map(|(tun, sockets)| Arc::new(Lane::new(tun, sockets)));
        let shared = Arc::new(Shared::new(core, lanes.collect(), timer, last_word));
        let mut first = Some((requests_rx, frames_rx));
        let mut workers = Vec::new();
        for (index, lane) in shared.lanes.iter().enumerate() {
            let (shared, lane) = (Arc::clone(&shared), Arc::clone(lane));
            workers.push(Worker::new(shared, lane, Arc::clone(&threads), index, first.take()));
        }
        // From here on, dropping it ends the threads.
        let mut this = Self { handle: Handle { requests, frames, threads }, running: Vec::new() };
        for (index, worker) in workers.into_iter().enumerate() {
            let thread = std::thread::Builder::new().name(format!("datapath-{index}"));
            this.running.push(thread.spawn(move || worker.run()).map_err(failed("start a thread"))?);
        }
        Ok((this, events))
    }

    /// A handle to command the data plane with; any number may exist, and none keeps it running.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }
}

impl Drop for Datapath {
    fn drop(&mut self) {
        self.handle.threads.stop();
        for thread in self.running.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the data plane has panicked");
            }
        }
    }
}

/// Commands a running [`Datapath`].
#[derive(Clone, Debug)]
pub struct Handle {
    requests: mpsc::Sender<Request>,
    frames: mpsc::Sender<(DirectorId, Bytes)>,
    threads: Arc<Threads>,
}

impl Handle {
    /// Queues a command; commands take effect in the order they are sent in. Waits while the queue is full.
    pub async fn send(&self, command: Command) -> Result<(), Stopped> {
        self.request(Request::Command(command)).await
    }

    /// Replaces the pools of [`DatapathConfig::pools`]; peers that are told of from now on are held against them.
    pub async fn set_pools(&self, pools: Vec<IpNet>) -> Result<(), Stopped> {
        self.request(Request::SetPools(pools)).await
    }

    /// This host has another address: begins a handshake with every peer that has a session, so that they send there
    /// at once, and not only when this device has something to send.
    pub async fn roam(&self) -> Result<(), Stopped> {
        self.request(Request::Roam).await
    }

    /// Asks for the state of all peers and counters.
    pub async fn snapshot(&self) -> Result<Snapshot, Stopped> {
        let (answer, snapshot) = oneshot::channel();
        self.request(Request::Snapshot(answer)).await?;
        snapshot.await.map_err(|_| Stopped)
    }

    /// Hands over a batch of frames that a director's stream has brought (see [`frame::frames`]). Waits while the data
    /// plane has too many.
    pub async fn frames(&self, id: DirectorId, batch: Bytes) -> Result<(), Stopped> {
        self.frames.send((id, batch)).await.map_err(|_| Stopped)?;
        self.threads.wake(0);
        Ok(())
    }

    async fn request(&self, request: Request) -> Result<(), Stopped> {
        self.requests.send(request).await.map_err(|_| Stopped)?;
        self.threads.wake(0);
        Ok(())
    }
}
