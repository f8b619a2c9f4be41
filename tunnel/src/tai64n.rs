//! TAI64N labels (cr.yp.to/libtai/tai64.html): when an initiation was made, so that an old one cannot be replayed.
//! Our own come from the boot clock, set by civil time once, and never go back.

use muster_common::time::{Instant, Timestamp};

/// TAI64's zero, plus the ten seconds that TAI was ahead of UTC in 1970.
const EPOCH: u64 = (1 << 62) + 10;
/// Our labels are rounded down to this many nanoseconds (about 17 ms), so as not to reveal the exact clock.
const ROUNDING: u32 = 1 << 24;

/// A moment: seconds and nanoseconds, big endian, so that octet order is time order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Tai64n(pub(crate) [u8; 12]);

impl Tai64n {
    fn new(seconds: u64, nanoseconds: u32) -> Self {
        let mut label = [0; 12];
        label[..8].copy_from_slice(&EPOCH.saturating_add(seconds).to_be_bytes());
        label[8..].copy_from_slice(&nanoseconds.to_be_bytes());
        Self(label)
    }
}

/// Makes labels, each later than the one before.
pub(crate) struct LabelClock {
    at: Instant,
    civil: Timestamp,
    last: Option<(u64, u32)>,
}

impl LabelClock {
    /// A clock that shows `civil` at `at`.
    pub(crate) fn new(at: Instant, civil: Timestamp) -> Self {
        Self { at, civil, last: None }
    }

    /// Sets the clock forward; a civil time that is behind what it shows is ignored.
    pub(crate) fn set(&mut self, at: Instant, civil: Timestamp) {
        if civil > self.civil + (at - self.at) {
            (self.at, self.civil) = (at, civil);
        }
    }

    /// The label for `now`, or the least after the last one if that is later.
    pub(crate) fn label(&mut self, now: Instant) -> Tai64n {
        let civil = (self.civil + (now - self.at)).since_epoch();
        let nanos = civil.subsec_nanos();
        let mut label = (civil.as_secs(), nanos - nanos % ROUNDING);
        if let Some(last) = self.last
            && label <= last
        {
            label = if last.1 < 999_999_999 { (last.0, last.1 + 1) } else { (last.0.saturating_add(1), 0) };
        }
        self.last = Some(label);
        Tai64n::new(label.0, label.1)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn labels_only_grow() {
        let start = Instant::from_boot(Duration::from_secs(50));
        let mut clock = LabelClock::new(start, Timestamp::from_epoch(Duration::from_secs(1_000)));
        let a = clock.label(start);
        assert_eq!(a.0[..8], (0x4000_0000_0000_000a_u64 + 1_000).to_be_bytes());
        let b = clock.label(start);
        assert!(b > a);
        clock.set(start, Timestamp::from_epoch(Duration::from_secs(10)));
        let c = clock.label(start + Duration::from_secs(1));
        assert!(c > b);
        clock.set(start, Timestamp::from_epoch(Duration::from_secs(5_000)));
        let d = clock.label(start + Duration::from_secs(1));
        assert_eq!(d.0[..8], (0x4000_0000_0000_000a_u64 + 5_001).to_be_bytes());
    }
}
