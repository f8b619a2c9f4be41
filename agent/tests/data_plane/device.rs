//! A device with a data plane in a namespace of its own.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    num::NonZeroUsize,
    time::Duration,
};

use muster_agent::{
    datapath::{Cipher, Command, Datapath, DatapathConfig, Event, Handle, PeerConfig, PublicKey, Snapshot},
    interface::{Interface, InterfaceConfig},
    tun::Tun,
    udp::UdpSockets,
};
use tokio::sync::mpsc::Receiver;
use x25519_dalek::StaticSecret;
use zeroize::Zeroizing;

use crate::namespace::Namespace;

/// Device number `n` has the virtual addresses 100.64.0.n and fd00:1::n.
pub(crate) struct Device {
    pub(crate) namespace: Namespace,
    pub(crate) public_key: PublicKey,
    pub(crate) port: u16,
    pub(crate) handle: Handle,
    number: u8,
    events: Receiver<Event>,
    datapath: Option<Datapath>,
    runtime: tokio::runtime::Runtime,
}

pub(crate) fn virtual_addresses(number: u8) -> Vec<IpAddr> {
    vec![
        format!("100.64.0.{number}").parse().expect("an address"),
        format!("fd00:1::{number}").parse().expect("an address"),
    ]
}

pub(crate) fn public_key(private_key: [u8; 32]) -> PublicKey {
    x25519_dalek::PublicKey::from(&StaticSecret::from(private_key)).to_bytes()
}

impl Device {
    pub(crate) fn new(number: u8) -> Self {
        Self::with_mtu(number, 1420)
    }

    /// Whose TUN device has this MTU.
    pub(crate) fn with_mtu(number: u8, mtu: u32) -> Self {
        Self::with(number, mtu, NonZeroUsize::MIN)
    }

    /// Whose data plane has so many threads.
    pub(crate) fn with_threads(number: u8, threads: NonZeroUsize) -> Self {
        Self::with(number, 1420, threads)
    }

    fn with(number: u8, mtu: u32, threads: NonZeroUsize) -> Self {
        let namespace = Namespace::new();
        let private_key = [number; 32];
        let pools = ["100.64.0.0/11", "fd00:1::/48"].map(|r| r.parse().expect("a prefix")).to_vec();
        let (datapath, events, port) = namespace.enter(async || {
            let tuns = Tun::create_queues("muster0", threads).expect("create");
            let config = InterfaceConfig {
                mtu,
                addresses: virtual_addresses(number),
                routes: pools.clone(),
                resolver_address: None,
            };
            Interface::program("muster0", &config).await.expect("program");
            let sockets = UdpSockets::bind_many(0, threads).expect("bind");
            let port = sockets[0].port();
            let (datapath, events) = Datapath::start(DatapathConfig {
                queues: tuns.into_iter().zip(sockets).collect(),
                private_key: Zeroizing::new(private_key),
                seed: Zeroizing::new([number; 32]),
                mtu,
                accepts_aes: true,
                local_addresses: virtual_addresses(number),
                pools: pools.clone(),
            })
            .expect("start");
            (datapath, events, port)
        });
        Self {
            namespace,
            public_key: public_key(private_key),
            port,
            handle: datapath.handle(),
            number,
            events,
            datapath: Some(datapath),
            runtime: tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime"),
        }
    }

    /// This device as a peer that is reached at `endpoints`.
    pub(crate) fn as_peer(&self, endpoints: Vec<SocketAddr>) -> PeerConfig {
        PeerConfig {
            public_key: self.public_key,
            virtual_addresses: virtual_addresses(self.number),
            subnets: vec![],
            endpoints,
            relays: vec![],
            keepalive: None,
            cipher: Cipher::default(),
        }
    }

    /// Where this device is reached by the other end of the cable; `host` is its number there.
    pub(crate) fn endpoint(&self, host: u8) -> SocketAddr {
        format!("10.9.0.{host}:{}", self.port).parse().expect("an address")
    }

    pub(crate) fn send(&self, command: Command) {
        self.runtime.block_on(self.handle.send(command)).expect("running");
    }

    /// Begins a handshake with every peer that has a session, not sooner than the protocol allows.
    pub(crate) fn roam(&self) {
        self.runtime.block_on(self.handle.roam()).expect("running");
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        self.runtime.block_on(self.handle.snapshot()).expect("running")
    }

    /// The next event; panics if none comes.
    pub(crate) fn event(&mut self) -> Event {
        let event = self
            .runtime
            .block_on(async { tokio::time::timeout(Duration::from_secs(10), self.events.recv()).await });
        event.expect("an event within ten seconds").expect("running")
    }

    /// All events that wait.
    pub(crate) fn waiting_events(&mut self) -> Vec<Event> {
        std::iter::from_fn(|| self.events.try_recv().ok()).collect()
    }

    /// How often each thread of the data plane has gone to sleep so far.
    pub(crate) fn sleeps(&self) -> Vec<u64> {
        self.namespace.enter(async || {
            let here = fs::read_link("/proc/thread-self/ns/net").expect("proc");
            let tasks = fs::read_dir("/proc/self/task").expect("proc").flatten().map(|task| task.path());
            let mut tasks: Vec<_> = tasks
                .filter(|task| {
                    fs::read_to_string(task.join("comm")).is_ok_and(|name| name.starts_with("datapath-"))
                        && fs::read_link(task.join("ns/net")).is_ok_and(|namespace| namespace == here)
                })
                .collect();
            tasks.sort();
            let sleeps = tasks.iter().map(|task| {
                let status = fs::read_to_string(task.join("status")).expect("status");
                let count = status.lines().find_map(|l| l.strip_prefix("voluntary_ctxt_switches:"));
                count.expect("counted").trim().parse().expect("a number")
            });
            sleeps.collect()
        })
    }

    /// Stops the data plane; the namespace stays.
    pub(crate) fn stop(&mut self) {
        self.datapath = None;
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.stop();
    }
}
