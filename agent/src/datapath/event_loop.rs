//! The data plane's thread: waits for packets, datagrams, requests and the core's timer, and takes a bounded share of
//! each in turn, so that none starves another. It sleeps until one of them is ready; there are no periodic wake-ups.
//!
//! Everything is done a batch at a time: receive, hand to the core with one reading of the clock, send what comes of it.

use std::{
    io,
    net::IpAddr,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use ipnet::IpNet;
use muster_common::time::{Instant, Timestamp};
use muster_tunnel::{Outgoing, Transmit, Tunnel};
use rustix::{
    event::{EventfdFlags, epoll},
    time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec},
};
use tokio::sync::mpsc;

use super::{
    Command, DatapathConfig, Event, Request, Snapshot, StartError,
    counters::Counters,
    linger::{LINGER, Linger},
    translate,
    tun_port::TunPort,
};
use crate::udp::{Family, ReceiveBuffer, UdpSockets};

/// Requests that are taken before the others' turn.
const REQUESTS: usize = 64;

/// What epoll reports as ready, as the data of its events.
mod source {
    pub(super) const WAKE: u64 = 0;
    pub(super) const TIMER: u64 = 1;
    pub(super) const TUN: u64 = 2;
    pub(super) const UDP_V4: u64 = 3;
    pub(super) const UDP_V6: u64 = 4;
    pub(super) const COUNT: usize = 5;
}

pub(super) struct EventLoop {
    pub(super) tunnel: Tunnel,
    pub(super) local_addresses: Vec<IpAddr>,
    pools: Vec<IpNet>,
    pub(super) tun: TunPort,
    pub(super) sockets: UdpSockets,
    requests: mpsc::Receiver<Request>,
    events: mpsc::Sender<Event>,
    /// Room for [`Event::Failed`], whatever else waits.
    last_word: mpsc::OwnedPermit<Event>,
    stop: Arc<AtomicBool>,
    epoll: OwnedFd,
    wake: Arc<OwnedFd>,
    timer: OwnedFd,
    /// When the timer will fire, if it is set.
    armed: Option<Instant>,
    linger: Linger,
    pub(super) counters: Counters,
    pub(super) received: ReceiveBuffer,
    pub(super) outgoing: Outgoing,
    pub(super) transmits: Vec<Transmit>,
}

/// Why the data plane cannot go on.
pub(super) struct Fatal {
    pub(super) action: &'static str,
    pub(super) source: io::Error,
}

impl EventLoop {
    /// Opens what the loop waits on. Returns the eventfd that wakes it, too.
    pub(super) fn new(
        config: DatapathConfig,
        requests: mpsc::Receiver<Request>,
        events: mpsc::Sender<Event>,
        stop: Arc<AtomicBool>,
    ) -> Result<(Self, Arc<OwnedFd>), StartError> {
        fn failed(action: &'static str) -> impl Fn(rustix::io::Errno) -> StartError {
            move |e| StartError { action, source: e.into() }
        }
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(failed("create an epoll instance"))?;
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(failed("create an eventfd"))?;
        // The boot clock goes on during suspend: sessions that have expired meanwhile are noticed on waking up.
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Boottime, flags)
            .map_err(failed("create a timer"))?;

        let watch = |fd: &dyn AsFd, source| {
            let data = epoll::EventData::new_u64(source);
            epoll::add(&epoll, fd, data, epoll::EventFlags::IN).map_err(failed("wait for packets"))
        };
        watch(&wake, source::WAKE)?;
        watch(&timer, source::TIMER)?;
        watch(&config.tun, source::TUN)?;
        for (family, source) in [(Family::V4, source::UDP_V4), (Family::V6, source::UDP_V6)] {
            if let Some(fd) = config.sockets.fd(family) {
                watch(&fd, source)?;
            }
        }

        let last_word = events.clone().try_reserve_owned().map_err(|_| StartError {
            action: "reserve room for an event",
            source: io::ErrorKind::OutOfMemory.into(),
        })?;
        let wake = Arc::new(wake);
        config.sockets.coalesce();
        let event_loop = Self {
            tunnel: translate::tunnel(&config),
            local_addresses: config.local_addresses,
            pools: config.pools,
            tun: TunPort::new(config.tun),
            sockets: config.sockets,
            requests,
            last_word,
            events,
            stop,
            epoll,
            wake: wake.clone(),
            timer,
            armed: None,
            linger: Linger::default(),
            counters: Counters::default(),
            received: ReceiveBuffer::new(),
            outgoing: Outgoing::new(),
            transmits: Vec::new(),
        };
        Ok((event_loop, wake))
    }

    pub(super) fn run(mut self) {
        while !self.stop.load(Ordering::Acquire) {
            if let Err(Fatal { action, source }) = self.turn() {
                tracing::error!(error = %source, "the data plane has stopped: cannot {action}");
                self.last_word.send(Event::Failed(format!("cannot {action}: {source}")));
                return;
            }
        }
    }

    /// Waits, and gives each source that is ready one turn.
    fn turn(&mut self) -> Result<(), Fatal> {
        let mut ready =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) };
                source::COUNT];
        let count = match self.wait(&mut ready) {
            Ok(count) => count,
            Err(rustix::io::Errno::INTR) => 0,
            Err(e) => return Err(Fatal { action: "wait for packets", source: e.into() }),
        };
        let now = Instant::now();
        self.tunnel.set_civil_time(now, Timestamp::now());
        for event in ready.iter().take(count) {
            match event.data.u64() {
                source::WAKE => self.requests(now),
                source::TIMER => {
                    drain(&self.timer);
                    self.armed = None;
                }
                source::TUN => self.packets_from_tun(now)?,
                source::UDP_V4 => self.datagrams_from(Family::V4, now),
                source::UDP_V6 => self.datagrams_from(Family::V6, now),
                _ => {}
            }
        }
        if self.tunnel.poll_timeout().is_some_and(|(due, _)| due <= now) {
            self.tunnel.handle_timeout(now);
        }
        self.flush(now);
        self.arm(now)
    }

    /// Waits until there is something to do: awake for a moment if that is worthwhile, and then asleep.
    fn wait(&mut self, ready: &mut [epoll::Event; source::COUNT]) -> rustix::io::Result<usize> {
        if self.linger.is_worthwhile() {
            let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
            let start = Instant::now();
            loop {
                let count = epoll::wait(&self.epoll, &mut *ready, Some(&at_once))?;
                let is_over = count == 0 && Instant::now() - start >= LINGER;
                if count > 0 || is_over {
                    self.linger.learn(count > 0);
                }
                if count > 0 {
                    return Ok(count);
                }
                if is_over {
                    break;
                }
                // Whoever else wants this processor goes first.
                std::thread::yield_now();
            }
        }
        epoll::wait(&self.epoll, ready, None)
    }

    fn requests(&mut self, now: Instant) {
        drain(&self.wake);
        for _ in 0..REQUESTS {
            match self.requests.try_recv() {
                Ok(Request::Command(command)) => self.command(command, now),
                Ok(Request::SetPools(pools)) => self.pools = pools,
                Ok(Request::Roam) => self.roam(now),
                Ok(Request::Snapshot(answer)) => {
                    let _ = answer.send(self.snapshot(now));
                }
                Err(_) => return,
            }
        }
        // There may be more, after the others' turn.
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
    }

    fn command(&mut self, command: Command, now: Instant) {
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
            Command::SetLocalAddresses(addresses) => self.local_addresses = addresses,
        }
    }

    fn roam(&mut self, now: Instant) {
        self.tunnel.paths_changed(now);
        let live: Vec<_> =
            self.tunnel.peers(now).filter(|peer| peer.has_session).map(|peer| peer.public_key).collect();
        for key in live {
            self.tunnel.connect(&key, now);
        }
    }

    fn snapshot(&self, now: Instant) -> Snapshot {
        let mut snapshot = self.counters.snapshot();
        snapshot.offloads = translate::offloads(self.tun.offloads(), self.sockets.offloads());
        snapshot.drops.extend(translate::named(&self.tunnel.drops()));
        snapshot.peers = self.tunnel.peers(now).map(translate::peer_snapshot).collect();
        snapshot
    }

    /// Passes on what the core has to say beside its answers.
    fn flush(&mut self, now: Instant) {
        while let Some(packet) = self.tunnel.poll_packet() {
            self.tun.send_packet(&packet, &mut self.counters);
        }
        self.send(now);
        // What finds no room stays with the core, which bounds it, until the next turn.
        while self.events.capacity() > 0
            && let Some(event) = self.tunnel.poll_event()
        {
            let _ = self.events.try_send(translate::event(event));
        }
    }

    /// Sets the timer for the core's next timeout. Timeouts that only move away, as they do with every packet, leave
    /// it as it is: it fires once for nothing, and is set anew then.
    fn arm(&mut self, now: Instant) -> Result<(), Fatal> {
        let Some((due, reason)) = self.tunnel.poll_timeout() else { return Ok(()) };
        if self.armed.is_some_and(|armed| armed <= due) {
            return Ok(());
        }
        tracing::trace!(?reason, after = ?(due - now), "timer set");
        let due_after_boot = due.since_boot();
        // All zeroes would switch the timer off; the past makes it fire at once.
        let value = Timespec {
            tv_sec: i64::try_from(due_after_boot.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(due_after_boot.subsec_nanos().max(1)),
        };
        let never = Timespec { tv_sec: 0, tv_nsec: 0 };
        let spec = Itimerspec { it_interval: never, it_value: value };
        rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &spec)
            .map_err(|e| Fatal { action: "set a timer", source: e.into() })?;
        self.armed = Some(due);
        Ok(())
    }
}

/// Reads the counter of an eventfd or timerfd, which makes it not ready any more.
fn drain(fd: &OwnedFd) {
    let _ = rustix::io::read(fd, &mut [0u8; 8]);
}
