//! The timers of one peer (the paper, §6.2–6.5), as facts about when something happened and rules for what is due.

use std::time::Duration;

use muster_common::time::Instant;

use crate::{
    event::Reason,
    limits::{IDLE_AFTER, KEEPALIVE_TIMEOUT, REKEY_TIMEOUT, ZERO_KEYS_AFTER},
};

/// When what is due. The handshake's own retries are kept with the attempt.
#[derive(Debug)]
pub(crate) struct Timers {
    /// Data was received at a time when nothing had been sent since: answer with an empty message by then.
    keepalive: Option<Instant>,
    /// Data was sent and nothing has come since: start a new handshake then.
    no_answer: Option<Instant>,
    persistent_interval: Option<Duration>,
    persistent: Option<Instant>,
    wipe_keys: Option<Instant>,
    /// When data was last exchanged, or the peer was added.
    pub(crate) last_data: Instant,
    idle_reported: bool,
}

impl Timers {
    pub(crate) fn new(persistent_interval: Option<Duration>, now: Instant) -> Self {
        let mut timers = Self {
            keepalive: None,
            no_answer: None,
            persistent_interval: None,
            persistent: None,
            wipe_keys: None,
            last_data: now,
            idle_reported: false,
        };
        timers.set_persistent(persistent_interval, now);
        timers
    }

    /// Changes the persistent keepalive. A new one is due at once, which brings the session up.
    pub(crate) fn set_persistent(&mut self, interval: Option<Duration>, now: Instant) {
        let interval = interval.filter(|i| !i.is_zero());
        if self.persistent_interval != interval {
            self.persistent_interval = interval;
            self.persistent = interval.map(|_| now);
        }
    }

    /// An authentic message of any kind was sent.
    pub(crate) fn sent(&mut self, now: Instant) {
        self.keepalive = None;
        self.passed(now);
    }

    /// A packet was sent. `jitter`, which spreads new handshakes, is asked for only if an answer is now waited for.
    pub(crate) fn sent_data(&mut self, now: Instant, jitter: impl FnOnce() -> Duration) {
        self.data(now);
        self.no_answer.get_or_insert_with(|| now + KEEPALIVE_TIMEOUT + REKEY_TIMEOUT + jitter());
    }

    /// An authentic message of any kind was received.
    pub(crate) fn received(&mut self, now: Instant) {
        self.no_answer = None;
        self.passed(now);
    }

    /// A packet was received.
    pub(crate) fn received_data(&mut self, now: Instant) {
        self.data(now);
        self.keepalive.get_or_insert(now + KEEPALIVE_TIMEOUT);
    }

    /// Whether a packet that is received now makes nothing due earlier than it was: where an answer is due already, one
    /// came lately, so that the peer is not idle either.
    pub(crate) fn received_data_only_puts_off(&self) -> bool {
        self.keepalive.is_some()
    }

    /// A session was made.
    pub(crate) fn session_made(&mut self, now: Instant) {
        self.wipe_keys = Some(now + ZERO_KEYS_AFTER);
    }

    /// The peer was given up: nothing is expected from it.
    pub(crate) fn given_up(&mut self, now: Instant) {
        self.no_answer = None;
        self.keepalive = None;
        self.wipe_keys.get_or_insert(now + ZERO_KEYS_AFTER);
    }

    fn passed(&mut self, now: Instant) {
        self.persistent = self.persistent_interval.map(|interval| now + interval);
    }

    fn data(&mut self, now: Instant) {
        self.last_data = now;
        self.idle_reported = false;
    }

    /// What is due next, and when.
    pub(crate) fn next(&self) -> Option<(Instant, Reason)> {
        [
            self.no_answer.map(|at| (at, Reason::NoAnswer)),
            self.keepalive.map(|at| (at, Reason::Keepalive)),
            self.persistent.map(|at| (at, Reason::PersistentKeepalive)),
            self.wipe_keys.map(|at| (at, Reason::WipeKeys)),
            (!self.idle_reported).then_some((self.last_data + IDLE_AFTER, Reason::Idle)),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Takes one thing that is due at `now` and arranges for the next of its kind.
    pub(crate) fn take_due(&mut self, now: Instant) -> Option<Reason> {
        let (_, reason) = self.next().filter(|(at, _)| *at <= now)?;
        match reason {
            Reason::NoAnswer => self.no_answer = None,
            Reason::Keepalive => self.keepalive = None,
            Reason::PersistentKeepalive => self.passed(now),
            Reason::WipeKeys => self.wipe_keys = None,
            Reason::Idle => self.idle_reported = true,
            Reason::PathMtu | Reason::Path | Reason::Handshake | Reason::Lookup => {}
        }
        Some(reason)
    }
}
