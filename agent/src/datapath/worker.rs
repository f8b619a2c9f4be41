//! One thread of the data plane: waits for packets and datagrams, and takes a bounded share of each in turn, so that none
//! starves another. The first thread does the control side's requests and the core's timer, too. All sleep until there is
//! something to do; there are no periodic wake-ups.

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use bytes::{Bytes, BytesMut};
use muster_common::time::Instant;
use muster_tunnel::{DirectorId, Outgoing};
use tokio::sync::mpsc;

use super::{
    Command, Request,
    lane::Lane,
    linger::Linger,
    shared::{Core, Fatal, Shared, Threads},
    sources::{Ready, Source, Sources},
    streams::Streams,
    traffic::Incoming,
    translate,
    tun_port::TunPort,
};
use crate::udp::{Family, ReceiveBuffer};

/// Requests that are taken before the others' turn.
const REQUESTS: usize = 64;
/// Batches of frames from directors' streams that are taken before the others' turn.
const BATCHES: usize = 8;

/// Batches of frames, each with the director whose stream has brought it.
type FrameReceiver = mpsc::Receiver<(DirectorId, Bytes)>;

pub(super) struct Worker {
    pub(super) shared: Arc<Shared>,
    pub(super) lane: Arc<Lane>,
    threads: Arc<Threads>,
    index: usize,
    /// The first thread's alone.
    requests: Option<mpsc::Receiver<Request>>,
    /// The first thread's alone.
    frames: Option<FrameReceiver>,
    linger: Linger,
    pub(super) tun: TunPort,
    pub(super) received: ReceiveBuffer,
    pub(super) incoming: Vec<Incoming>,
    pub(super) outgoing: Outgoing,
}

impl Worker {
    /// Thread number `index`; the one with requests, and frames of directors' streams, has the timer, too.
    pub(super) fn new(
        shared: Arc<Shared>,
        lane: Arc<Lane>,
        threads: Arc<Threads>,
        index: usize,
        first: Option<(mpsc::Receiver<Request>, FrameReceiver)>,
    ) -> Self {
        let (requests, frames) = first.unzip();
        Self {
            tun: TunPort::new(shared.lanes.clone()),
            shared,
            lane,
            threads,
            index,
            requests,
            frames,
            linger: Linger::default(),
            received: ReceiveBuffer::new(),
            incoming: Vec::new(),
            outgoing: Outgoing::new(),
        }
    }

    /// Works until it is told to stop, or until a thread cannot go on: then all stop.
    pub(super) fn run(mut self) {
        while !self.threads.is_stopped() {
            if let Err(fatal) = self.turn() {
                self.shared.fail(&fatal);
                self.threads.stop();
            }
        }
    }

    /// Waits, and gives each source that is ready one turn.
    fn turn(&mut self) -> Result<(), Fatal> {
        let ready = match self.wait() {
            Err(rustix::io::Errno::INTR) => return Ok(()),
            ready => ready.map_err(|e| Fatal { action: "wait for packets", source: e.into() })?,
        };
        if ready.has(Source::Wake) {
            self.requests()?;
            self.frames()?;
        }
        if ready.has(Source::Timer) {
            self.timer()?;
        }
        if ready.has(Source::Tun) {
            self.packets_from_tun()?;
        }
        for (source, family) in [(Source::UdpV4, Family::V4), (Source::UdpV6, Family::V6)] {
            if ready.has(source) {
                self.datagrams_from(family)?;
            }
        }
        Ok(())
    }

    /// Waits until there is something to do: awake for a moment if that is worthwhile, and then asleep.
    fn wait(&mut self) -> rustix::io::Result<Ready> {
        let Self { shared, lane, threads, index, requests, linger, .. } = self;
        let Some(wake) = threads.wake_of(*index) else { return Ok(Ready::default()) };
        let timer = requests.as_ref().map(|_| shared.timer.as_fd());
        let udp = [Family::V4, Family::V6].map(|family| lane.sockets.fd(family));
        let mut sources = Sources::new(wake.as_fd(), [timer, Some(lane.tun.as_fd()), udp[0], udp[1]]);
        let limit = linger.limit();
        if !limit.is_zero() {
            let start = Instant::now();
            loop {
                let ready = sources.look()?;
                let waited = Instant::now() - start;
                if !ready.is_empty() {
                    // Neither a timer nor a request says anything of packets.
                    if [Source::Tun, Source::UdpV4, Source::UdpV6].into_iter().any(|source| ready.has(source))
                    {
                        linger.learn(waited, true);
                    }
                    return Ok(ready);
                }
                if waited >= limit {
                    linger.learn(waited, false);
                    break;
                }
                // Whoever else wants this processor goes first.
                std::thread::yield_now();
            }
        }
        sources.sleep()
    }

    fn timer(&self) -> Result<(), Fatal> {
        drain(&self.shared.timer);
        self.shared.with_core(&self.lane, |core, now| {
            core.armed = None;
            core.flows.handle_timeout(now);
            core.tunnel.handle_timeout(now);
        })
    }

    fn requests(&mut self) -> Result<(), Fatal> {
        if let Some(wake) = self.threads.wake_of(self.index) {
            drain(wake);
        }
        let (shared, Some(requests)) = (&self.shared, &mut self.requests) else { return Ok(()) };
        let mut is_over = false;
        shared.with_core(&self.lane, |core, now| {
            for _ in 0..REQUESTS {
                match requests.try_recv() {
                    Ok(Request::Snapshot(answer)) => {
                        let _ = answer.send(shared.snapshot(core, now));
                    }
                    Ok(request) => core.request(request, &shared.streams, now),
                    Err(_) => {
                        is_over = true;
                        break;
                    }
                }
            }
        })?;
        if !is_over {
            // There may be more, after the others' turn.
            self.threads.wake(self.index);
        }
        Ok(())
    }

    /// Takes frames that directors' streams have brought.
    fn frames(&mut self) -> Result<(), Fatal> {
        for _ in 0..BATCHES {
            let Some((id, batch)) = self.frames.as_mut().and_then(|frames| frames.try_recv().ok()) else {
                return Ok(());
            };
            // Nobody else has it, as a rule: then it is opened where it lies.
            let mut octets = batch.try_into_mut().unwrap_or_else(|batch| BytesMut::from(batch.as_ref()));
            self.frames_from(id, &mut octets)?;
        }
        // There may be more, after the others' turn.
        self.threads.wake(self.index);
        Ok(())
    }
}

impl Core {
    fn request(&mut self, request: Request, streams: &Streams, now: Instant) {
        match request {
            Request::Command(command) => self.command(command, streams, now),
            Request::SetPools(pools) => self.pools = pools,
            Request::Roam => self.roam(now),
            Request::Snapshot(_) => {}
        }
    }

    fn command(&mut self, command: Command, streams: &Streams, now: Instant) {
        match command {
            Command::AddPeer(peer) => self.tunnel.add_peer(translate::peer(peer, &self.pools), now),
            Command::UpdatePeer(peer) => {
                self.tunnel.update_peer(translate::peer(peer, &self.pools), now);
            }
            Command::RemovePeer(key) => {
                self.tunnel.remove_peer(&translate::key(key));
            }
            Command::NoSuchDevice(address) => self.tunnel.no_such_device(address, now),
            Command::UnknownKey(key) => self.tunnel.unknown_key(translate::key(key), now),
            Command::SetLocalAddresses(addresses) => self.local_addresses.set_own(addresses),
            Command::SetCarried { addresses, subnets } => self.local_addresses.carry(addresses, subnets),
            Command::SetDirector { id, attachment: Some(attachment) } => {
                let attachment = translate::attachment(attachment, &self.pools);
                self.flows.attach(id, attachment, now);
            }
            Command::SetDirector { id, attachment: None } => {
                streams.set(id, None);
                self.flows.detach(id);
            }
            Command::SetStream { id, stream } => {
                let is_open = stream.is_some();
                streams.set(id, stream);
                self.flows.stream(id, is_open, now);
            }
        }
    }

    fn roam(&mut self, now: Instant) {
        self.flows.host_moved(now);
        self.tunnel.paths_changed(now);
        let live: Vec<_> =
            self.tunnel.peers(now).filter(|peer| peer.has_session).map(|peer| peer.public_key).collect();
        for key in live {
            self.tunnel.connect(&key, now);
        }
    }
}

/// Reads the counter of an eventfd or timerfd, which makes it not ready any more.
fn drain(fd: &OwnedFd) {
    let _ = rustix::io::read(fd, &mut [0u8; 8]);
}
