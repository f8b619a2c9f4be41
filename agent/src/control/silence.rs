//! Whether the registrar still answers. A connection to one that hangs, or whose host is gone, only looks alive until its
//! keepalives fail; a lookup without an answer tells sooner, and traffic waits for that one.

use std::time::Duration;

use muster_common::time::Instant;

/// At least so long a lookup may go unanswered while nothing else comes from the registrar.
const LEAST: Duration = Duration::from_secs(1);
/// At most so long: the lookup itself is given up a moment later.
const MOST: Duration = Duration::from_millis(4750);
/// So many times longer than the last answer took the next one may take: a slow registrar is not left for being slow.
const SLOWER: u32 = 4;

#[derive(Clone, Copy, Debug)]
pub(super) struct Silence {
    patience: Duration,
    heard_at: Instant,
}

impl Silence {
    pub(super) const fn new(now: Instant) -> Self {
        Self { patience: LEAST, heard_at: now }
    }

    /// Something came from the registrar.
    pub(super) const fn heard(&mut self, now: Instant) {
        self.heard_at = now;
    }

    /// An answer came to a lookup that was sent at `sent_at`.
    pub(super) fn answered(&mut self, sent_at: Instant, now: Instant) {
        self.patience = ((now - sent_at) * SLOWER).clamp(LEAST, MOST);
        self.heard(now);
    }

    /// The registrar was left for its silence. The next one gets more time: if that does not answer either, it may be the
    /// network, or too much work for both.
    pub(super) fn left(&mut self) {
        self.patience = (self.patience * 2).min(MOST);
    }

    /// When the registrar counts as silent, given when the oldest lookup under way was sent.
    pub(super) fn due(&self, oldest: Instant) -> Instant {
        oldest.max(self.heard_at) + self.patience
    }
}
