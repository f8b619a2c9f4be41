//! What the data plane's threads share: the core behind a lock, its timer, and the end of it all. The lock is held for
//! the bookkeeping of a batch, and for neither sealing nor opening nor the system calls that move packets.

use std::{
    collections::VecDeque,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use ipnet::IpNet;
use muster_common::time::{Instant, Timestamp};
use muster_tunnel::{Ecn, Fragmentation, Hop, Transmit, Tunnel};
use rustix::time::{Itimerspec, TimerfdTimerFlags, Timespec};
use tokio::sync::mpsc;

use super::{
    Event, Offloads, Snapshot, lane::Lane, local::LocalAddresses, streams::Streams, traffic, translate,
};
use crate::{
    directors::flow::{FlowEvent, Flows},
    udp::{Run, Sent, TooBig},
};

/// How often the core is told of the wall's clock, at most.
const CIVIL_TIME_EVERY: Duration = Duration::from_secs(1);
/// Events of flows that wait for the control side, at most. Flows repeat what matters.
const FLOW_EVENTS: usize = 64;

/// Everything that all threads use.
pub(super) struct Shared {
    core: Mutex<Core>,
    /// One for each thread.
    pub(super) lanes: Vec<Arc<Lane>>,
    pub(super) streams: Streams,
    /// Fires, in the first thread, when the core wants it.
    pub(super) timer: OwnedFd,
    /// Room for [`Event::Failed`], whatever else waits.
    last_word: Mutex<Option<mpsc::OwnedPermit<Event>>>,
}

/// The core, and what has to change along with it.
pub(super) struct Core {
    pub(super) tunnel: Tunnel,
    /// To directors.
    pub(super) flows: Flows,
    flow_events: VecDeque<FlowEvent>,
    pub(super) local_addresses: LocalAddresses,
    pub(super) pools: Vec<IpNet>,
    events: mpsc::Sender<Event>,
    /// The latest time that the core was told.
    now: Instant,
    /// When the core was told of the wall's clock.
    civil_time: Option<Instant>,
    /// When the timer will fire, if it is set.
    pub(super) armed: Option<Instant>,
}

/// Why the data plane cannot go on.
pub(super) struct Fatal {
    pub(super) action: &'static str,
    pub(super) source: io::Error,
}

/// Ends the threads, and wakes them.
#[derive(Debug)]
pub(super) struct Threads {
    stop: AtomicBool,
    /// An eventfd for each.
    wakes: Vec<OwnedFd>,
}

impl Shared {
    pub(super) fn new(
        core: Core,
        lanes: Vec<Arc<Lane>>,
        timer: OwnedFd,
        last_word: mpsc::OwnedPermit<Event>,
    ) -> Self {
        let core = Mutex::new(core);
        Self { core, lanes, streams: Streams::default(), timer, last_word: Mutex::new(Some(last_word)) }
    }

    /// Lets `act` use the core, and passes on what the core then has to say, through `lane`: while the lock is held, so
    /// that packets that have waited for a session leave before those that come after them.
    pub(super) fn with_core<T>(
        &self,
        lane: &Lane,
        act: impl FnOnce(&mut Core, Instant) -> T,
    ) -> Result<T, Fatal> {
        // A thread that panics ends the process, but in tests.
        let mut core = self.core.lock().unwrap_or_else(PoisonError::into_inner);
        // Read under the lock, so that the core's time does not go backwards.
        let now = Instant::now().max(core.now);
        core.now = now;
        if core.civil_time.is_none_or(|told| now - told >= CIVIL_TIME_EVERY) {
            core.civil_time = Some(now);
            core.tunnel.set_civil_time(now, Timestamp::now());
        }
        let result = act(&mut core, now);
        core.pass_on(lane, &self.streams, now);
        self.arm(&mut core, now)?;
        Ok(result)
    }

    /// Sets the timer for the core's next timeout. Timeouts that only move away, as they do with every packet, leave
    /// it as it is: it fires once for nothing, and is set anew then.
    fn arm(&self, core: &mut Core, now: Instant) -> Result<(), Fatal> {
        let of_tunnel = core.tunnel.poll_timeout();
        let of_flows = core.flows.poll_timeout();
        let Some(due) = of_tunnel.map(|(due, _)| due).into_iter().chain(of_flows).min() else {
            return Ok(());
        };
        if core.armed.is_some_and(|armed| armed <= due) {
            return Ok(());
        }
        tracing::trace!(reason = ?of_tunnel.map(|(_, reason)| reason), after = ?(due - now), "timer set");
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
        core.armed = Some(due);
        Ok(())
    }

    /// Everything that has been counted.
    pub(super) fn snapshot(&self, core: &Core, now: Instant) -> Snapshot {
        let mut snapshot = Snapshot { threads: self.lanes.len(), ..Snapshot::default() };
        for lane in &self.lanes {
            lane.counters.add_to(&mut snapshot);
        }
        let offloads = self.lanes.iter().map(|lane| lane.offloads());
        snapshot.offloads = offloads.reduce(Offloads::and).unwrap_or_default();
        for (name, number) in translate::named(&core.tunnel.drops()) {
            *snapshot.drops.entry(name).or_default() += number;
        }
        snapshot.peers = core.tunnel.peers(now).map(translate::peer_snapshot).collect();
        snapshot
    }

    /// Tells the control side why the data plane ends. Only the first reason is told.
    pub(super) fn fail(&self, Fatal { action, source }: &Fatal) {
        let last_word = self.last_word.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(last_word) = last_word {
            tracing::error!(error = %source, "the data plane has stopped: cannot {action}");
            last_word.send(Event::Failed(format!("cannot {action}: {source}")));
        }
    }
}

impl Core {
    pub(super) fn new(
        tunnel: Tunnel,
        local_addresses: Vec<IpAddr>,
        pools: Vec<IpNet>,
        events: mpsc::Sender<Event>,
    ) -> Self {
        let now = Instant::now();
        Self {
            tunnel,
            flows: Flows::new(),
            flow_events: VecDeque::new(),
            local_addresses: LocalAddresses::new(local_addresses),
            pools,
            events,
            now,
            civil_time: None,
            armed: None,
        }
    }

    /// Sends what the core has beside its answers: datagrams (handshakes, keepalives, probes, hellos to directors, and
    /// packets that have waited for a session), packets for the host (ICMP errors), and events.
    fn pass_on(&mut self, lane: &Lane, streams: &Streams, now: Instant) {
        self.follow_flows(now);
        let transmits: Vec<Transmit> = std::iter::from_fn(|| self.tunnel.poll_transmit()).collect();
        let hellos: Vec<_> = std::iter::from_fn(|| self.flows.poll_transmit()).collect();
        if !transmits.is_empty() || !hellos.is_empty() {
            let by_streams = transmits.iter().filter_map(|transmit| match transmit.hop {
                Hop::Stream(id) => Some((id, transmit.payload.as_slice())),
                Hop::Udp(_) => None,
            });
            streams.send(by_streams, &lane.counters);
            for frame in transmits.iter().filter(|transmit| traffic::is_frame(&transmit.payload)) {
                lane.counters.relay_sent.add(1, frame.payload.len());
            }
            let by_sockets = transmits.iter().filter_map(|transmit| {
                Some(single(transmit.hop.udp()?, transmit.fragmentation, &transmit.payload))
            });
            let hellos = hellos.iter().map(|(to, hello)| single(*to, Fragmentation::Known, hello));
            let sent = lane.sockets.send_runs(by_sockets.chain(hellos));
            lane.counters.sent(&sent);
            self.paths_too_narrow(lane, &sent, now);
        }
        while let Some(packet) = self.tunnel.poll_packet() {
            lane.send_packet(&packet);
        }
        // What finds no room stays with the core, which bounds it, until the next time.
        while self.events.capacity() > 0
            && let Some(event) = self.flow_events.pop_front()
        {
            let _ = self.events.try_send(Event::Director(event));
        }
        while self.events.capacity() > 0
            && let Some(event) = self.tunnel.poll_event()
        {
            let _ = self.events.try_send(translate::event(event));
        }
    }

    /// Tells the tunnel how directors are reached.
    fn follow_flows(&mut self, now: Instant) {
        while let Some(event) = self.flows.poll_event() {
            match event {
                FlowEvent::Link(id, link) => self.tunnel.set_director(id, link, now),
                FlowEvent::NoSuchDevice(id, handle) => self.tunnel.unreachable_through(id, handle, now),
                _ => {}
            }
            // The control core chooses among directors by which of them are linked.
            if self.flow_events.len() < FLOW_EVENTS {
                self.flow_events.push_back(event);
            }
        }
    }

    /// Tells the core of paths that have turned out too narrow.
    pub(super) fn paths_too_narrow(&mut self, lane: &Lane, sent: &Sent, now: Instant) {
        for TooBig { destination, datagram_len } in sent.too_big() {
            if let Ok(mtu) = lane.sockets.path_mtu(destination) {
                self.tunnel.path_too_big(destination, mtu, datagram_len, now);
            }
        }
    }
}

/// A datagram on its own.
fn single(destination: SocketAddr, fragmentation: Fragmentation, octets: &[u8]) -> Run<'_> {
    Run { destination, ecn: Ecn::NotEct, fragmentation, datagram_len: octets.len(), octets }
}

impl Threads {
    pub(super) fn new(wakes: Vec<OwnedFd>) -> Self {
        Self { stop: AtomicBool::new(false), wakes }
    }

    /// The eventfd of thread number `index`.
    pub(super) fn wake_of(&self, index: usize) -> Option<&OwnedFd> {
        self.wakes.get(index)
    }

    /// Wakes thread number `index`.
    pub(super) fn wake(&self, index: usize) {
        if let Some(wake) = self.wakes.get(index) {
            // Fails only if 2^64 - 2 wake-ups are pending, and then the thread is awake anyway.
            let _ = rustix::io::write(wake, &1u64.to_ne_bytes());
        }
    }

    /// Has all threads end, soon.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        for index in 0..self.wakes.len() {
            self.wake(index);
        }
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }
}
