//! Which inner packets the path to a peer takes: Datagram Packetization Layer Path MTU Discovery (RFC 8899), without
//! I/O. A probe is an inner echo request: every WireGuard peer's host answers it with a reply of the same size.

use std::time::Duration;

use muster_common::time::Instant;

mod echo;

use echo::EchoReply;
pub(crate) use echo::may_be_echo_reply;
pub use echo::{Probe, is_data, probe_packet};

/// How long a probe's answer is waited for before the probe counts as lost. The RFC's least; an answer that comes later
/// still counts, so a slow path is only found out more slowly.
pub const PROBE_TIMER: Duration = Duration::from_secs(1);
/// Lost probes of one size after which that size does not pass. A size that has passed before must be lost twice as
/// often, and the smallest probe be answered in between, so that loss by chance lowers nothing.
pub const MAX_PROBES: u8 = 3;
/// How long after the search a larger size is tried again.
pub const PMTU_RAISE_TIMER: Duration = Duration::from_secs(600);
/// How often it is checked, while data flows, that the current size still passes.
pub const CONFIRMATION_TIMER: Duration = Duration::from_secs(15);
/// Least inner MTU: what every IPv6 link takes (RFC 8200 §5).
pub const MIN_PLPMTU: u16 = 1280;
/// Size of the probe that finds out whether the peer answers at all. Every path takes it.
pub const SMALLEST_PROBE: u16 = 512;
/// Least time between two probes.
pub const PROBE_INTERVAL: Duration = Duration::from_millis(500);
/// Data flows for this long after the last packet of it was sent. There are no probes and no timeouts otherwise.
pub const DATA_FLOWS_FOR: Duration = Duration::from_secs(10);
/// The search ends when the largest size that passes and the smallest that does not are this close.
pub const PRECISION: u16 = 8;

/// Sizes that paths often have: links of 1,400, 1,420, 1,440, 1,480, 1,492, 1,500, 2,000, 4,000, 4,352 and 9,000 octets
/// less the outer IPv6, UDP and message headers (80), and 1,500 less those with IPv4 (60).
const COMMON: [u16; 11] = [1320, 1340, 1360, 1400, 1412, 1420, 1440, 1920, 3920, 4272, 8920];
/// Probes that are remembered, so that late replies are recognised.
const RECENT: usize = 8;

#[derive(Clone, Copy, Debug)]
struct Sent {
    probe: Probe,
    /// Whether a reply says something: it is the first one, and the path is still the same.
    counts: bool,
}

#[derive(Clone, Copy, Debug)]
enum Task {
    /// Nothing is asked until `next_at`; the peer did not answer, or the search is complete.
    Wait { is_silent: bool },
    /// Does `size` pass?
    Ask { size: u16, lost: u8 },
    /// Does anything? The size that is in use was lost; if the smallest is answered, it is not for lack of a path.
    AskSmallest { suspect: u16, suspect_lost: u8, lost: u8, since: Instant },
}

/// Path MTU of one peer. All sizes are octets of inner packets.
///
/// The shell calls the hooks [`Self::data_sent`] and [`Self::data_received`], hands packets that come from the peer to
/// [`Self::handle_reply`], and wakes it at [`Self::poll_timeout`]. After that, and when a session came up, it asks for
/// [`Self::next_probe`]; without a session it does not.
#[derive(Clone, Debug)]
pub struct PathMtu {
    base: u16,
    max: u16,
    /// Largest size known to pass; 0 if none is.
    passes: u16,
    /// Smallest size known not to pass; `max + 1` if none is.
    fails: u16,
    /// `fails` is exact: the path told its MTU.
    is_told: bool,
    task: Task,
    next_at: Instant,
    raise_at: Option<Instant>,
    /// How long a peer that does not answer is left alone.
    backoff: Duration,
    is_ready: bool,
    /// When the probe that is under way counts as lost.
    lost_at: Option<Instant>,
    probe_sent: Option<Instant>,
    sequence: u16,
    recent: [Option<Sent>; RECENT],
    data_sent: Option<Instant>,
    data_received: Option<Instant>,
}

impl PathMtu {
    /// For an interface whose MTU is `max`, on a path that is assumed to take `base`: normally the smaller of 1,420 and
    /// the interface's MTU, and at least 1,280.
    pub fn new(base: u16, max: u16) -> Self {
        let base = base.max(MIN_PLPMTU);
        let max = max.clamp(base, u16::MAX - 1);
        Self {
            base,
            max,
            passes: 0,
            fails: max + 1,
            is_told: false,
            task: Task::Ask { size: base, lost: 0 },
            next_at: Instant::default(),
            raise_at: None,
            backoff: CONFIRMATION_TIMER,
            is_ready: false,
            lost_at: None,
            probe_sent: None,
            sequence: 0,
            recent: [None; RECENT],
            data_sent: None,
            data_received: None,
        }
    }

    /// Largest packet that is to be sent to the peer. Padding must not make it longer. At least 1,280.
    pub fn current(&self) -> u16 {
        let assumed = if self.fails > self.base { self.base } else { MIN_PLPMTU };
        self.passes.max(assumed)
    }

    /// Whether not even 1,280 octets pass in one datagram, so that outer datagrams must be allowed to be fragmented.
    pub fn needs_fragments(&self) -> bool {
        self.fails <= MIN_PLPMTU
    }

    // What happens on the path

    /// A packet for which [`is_data`] holds was sent. Once a batch is enough. Not for probes and other devices' replies:
    /// two peers would keep each other awake.
    pub fn data_sent(&mut self, now: Instant) {
        self.data_sent = Some(now);
    }

    /// An authentic message came from the peer. Once a batch is enough.
    pub fn data_received(&mut self, now: Instant) {
        self.data_received = Some(now);
    }

    /// Data was sent and nothing has come since, for as long as WireGuard waits for it: checks the current size.
    pub fn no_answer(&mut self, now: Instant) {
        if matches!(self.task, Task::Wait { is_silent: false }) && !self.needs_fragments() {
            self.next_at = self.next_at.min(now);
        }
    }

    /// The peer's endpoint, or this side's way to it, changed: nothing is known of the path any more.
    pub fn path_changed(&mut self, now: Instant) {
        (self.passes, self.fails, self.is_told) = (0, self.max + 1, false);
        self.backoff = CONFIRMATION_TIMER;
        self.raise_at = None;
        for sent in self.recent.iter_mut().flatten() {
            sent.counts = false;
        }
        self.ask(self.base, now);
    }

    /// The peer is reached by another path, which is assumed to take `base`.
    pub fn path_changed_to(&mut self, base: u16, now: Instant) {
        self.base = base.clamp(MIN_PLPMTU, self.max);
        self.path_changed(now);
    }

    /// The kernel (`EMSGSIZE`) or a router said that the path takes inner packets of `mtu` octets at most. It is
    /// believed, and found out again after [`PMTU_RAISE_TIMER`].
    pub fn too_big(&mut self, mtu: u16, now: Instant) {
        let mtu = mtu.max(SMALLEST_PROBE);
        let is_news = mtu < self.fails - 1;
        if is_news {
            if mtu < self.current() {
                self.passes = mtu;
            }
            (self.fails, self.is_told) = (mtu + 1, true);
        }
        let is_answer = matches!(self.task, Task::Ask { size, .. } if size > mtu);
        if is_news || is_answer {
            self.raise_at = None;
            self.proceed(now);
        }
    }

    /// Whether `packet`, which came from the peer, is the reply to a probe, and so not for the TUN device.
    pub fn handle_reply(&mut self, packet: &[u8], now: Instant) -> bool {
        let Some(reply) = EchoReply::parse(packet) else { return false };
        let Some(sent) = self.recent.iter_mut().flatten().find(|sent| reply.answers(&sent.probe)) else {
            return false;
        };
        let size = sent.probe.size;
        if !sent.counts {
            return true;
        }
        if reply.whole_len == Some(size.into()) {
            sent.counts = false;
            self.passed(size, now);
        } else if matches!(self.task, Task::Ask { size: asked, .. } if asked == size && size > self.current())
        {
            // The first of the fragments in which a host answers whose interface has a smaller MTU. There is no need
            // to ask again.
            self.failed(size, now);
        }
        true
    }

    // Time

    /// When [`Self::handle_timeout`] wants to be called; never while no data flows.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.lost_at.or_else(|| self.due())
    }

    /// Does what is due at `now`.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.lost_at.is_some_and(|at| at <= now) {
            self.lost_at = None;
            self.lost(now);
        }
        if self.due().is_some_and(|at| at <= now) {
            self.is_ready = true;
            if let Task::Wait { is_silent } = self.task {
                self.wake(is_silent, now);
            }
        }
    }

    /// The probe to send now, if one is due. `random` is asked for only then; it must be unpredictable to the peer.
    pub fn next_probe(&mut self, now: Instant, random: impl FnOnce() -> u128) -> Option<Probe> {
        if !std::mem::take(&mut self.is_ready) {
            return None;
        }
        let size = match self.task {
            Task::Wait { .. } => return None,
            Task::Ask { size, .. } => size,
            Task::AskSmallest { .. } => SMALLEST_PROBE,
        };
        let random = random();
        self.sequence = self.sequence.wrapping_add(1);
        let probe =
            Probe { size, identifier: (random >> 64) as u16, sequence: self.sequence, nonce: random as u64 };
        if let Some(slot) = self.recent.get_mut(usize::from(self.sequence) % RECENT) {
            *slot = Some(Sent { probe, counts: true });
        }
        self.probe_sent = Some(now);
        self.lost_at = Some(now + PROBE_TIMER);
        Some(probe)
    }

    /// When the next probe may be sent, if data flows then.
    fn due(&self) -> Option<Instant> {
        if self.lost_at.is_some() || self.is_ready {
            return None;
        }
        let at = self.probe_sent.map_or(self.next_at, |sent| self.next_at.max(sent + PROBE_INTERVAL));
        self.data_sent.filter(|sent| at <= *sent + DATA_FLOWS_FOR).map(|_| at)
    }

    // Search

    fn ask(&mut self, size: u16, now: Instant) {
        self.begin(Task::Ask { size, lost: 0 }, now);
    }

    /// Begins `task` at `at`. The reply to a probe that is under way still counts, its loss does not.
    fn begin(&mut self, task: Task, at: Instant) {
        self.task = task;
        self.next_at = at;
        self.lost_at = None;
        self.is_ready = false;
    }

    /// Asks the next question, or waits if there is none.
    fn proceed(&mut self, now: Instant) {
        if let Some(size) = self.question() {
            self.raise_at = None;
            return self.ask(size, now);
        }
        if self.fails <= self.max && self.raise_at.is_some_and(|at| at <= now) {
            self.raise_at = None;
            return self.ask(self.fails.max(MIN_PLPMTU), now);
        }
        let raise_at = *self.raise_at.get_or_insert(now + PMTU_RAISE_TIMER);
        let next_at = if self.needs_fragments() { raise_at } else { now + CONFIRMATION_TIMER };
        self.begin(Task::Wait { is_silent: false }, next_at);
    }

    /// The size that is to be probed next in view of what is known; `None` when the search is complete.
    fn question(&self) -> Option<u16> {
        let Self { base, max, passes, fails, .. } = *self;
        if passes < base && base < fails {
            return Some(base);
        }
        if self.needs_fragments() || passes >= max {
            return None;
        }
        if passes < MIN_PLPMTU {
            return Some(MIN_PLPMTU);
        }
        if fails > max {
            return Some(max);
        }
        if self.is_told {
            return Some(fails - 1).filter(|told| *told > passes);
        }
        if fails - passes <= PRECISION {
            return None;
        }
        // Upwards: a size that passes costs a round trip, one that does not costs all its probes.
        let common = COMMON.into_iter().find(|size| (passes + 1..fails).contains(size));
        Some(common.unwrap_or(passes + (fails - passes) / 2))
    }

    /// Something is to be asked again after a wait.
    fn wake(&mut self, is_silent: bool, now: Instant) {
        let current = self.current();
        self.task = if is_silent {
            Task::AskSmallest { suspect: current, suspect_lost: 0, lost: 0, since: now }
        } else {
            Task::Ask { size: current, lost: 0 }
        };
    }

    fn passed(&mut self, size: u16, now: Instant) {
        self.backoff = CONFIRMATION_TIMER;
        if size >= self.fails {
            (self.fails, self.is_told) = (self.max + 1, false);
        }
        self.passes = self.passes.max(size);
        match self.task {
            Task::Ask { size: asked, .. } if asked > size => {}
            Task::AskSmallest { suspect, suspect_lost, .. } if suspect > size => {
                let has_passed = self.passes >= suspect;
                if suspect_lost >= if has_passed { 2 * MAX_PROBES } else { MAX_PROBES } {
                    (self.passes, self.fails, self.is_told) = (size, suspect, false);
                    self.raise_at = None;
                    self.proceed(now);
                } else {
                    self.begin(Task::Ask { size: suspect, lost: suspect_lost }, now);
                }
            }
            Task::Wait { .. } | Task::Ask { .. } | Task::AskSmallest { .. } => self.proceed(now),
        }
    }

    /// A size larger than the current one does not pass.
    fn failed(&mut self, size: u16, now: Instant) {
        (self.fails, self.is_told) = (self.fails.min(size), self.is_told && size > self.fails);
        self.proceed(now);
    }

    fn lost(&mut self, now: Instant) {
        self.next_at = now;
        match &mut self.task {
            Task::Wait { .. } => {}
            Task::Ask { size, lost } => {
                *lost += 1;
                let (size, lost) = (*size, *lost);
                if lost < MAX_PROBES {
                    return;
                }
                if size <= self.current() {
                    self.task = Task::AskSmallest { suspect: size, suspect_lost: lost, lost: 0, since: now };
                } else {
                    self.failed(size, now);
                }
            }
            Task::AskSmallest { lost, since, .. } => {
                *lost += 1;
                if *lost < MAX_PROBES {
                    return;
                }
                // While messages come, the path is there, but its MTU can no longer be found out.
                if self.data_received.is_some_and(|at| at >= *since) {
                    self.passes = self.passes.min(self.base);
                }
                self.begin(Task::Wait { is_silent: true }, now + self.backoff);
                self.backoff = PMTU_RAISE_TIMER.min(self.backoff * 2);
            }
        }
    }
}
