//! When the certificate is renewed: at two thirds of its life, with jitter, so that devices which joined together
//! do not renew together.

use std::time::Duration;

use muster_common::time::{Instant, Timestamp};
use rand::{RngExt, rngs::StdRng};

use super::{Validity, backoff::Backoff};

/// Renewal is due at this share of the life, plus or minus [`JITTER`].
const SHARE: f64 = 2.0 / 3.0;
/// Share of the life.
const JITTER: f64 = 0.05;
/// A renewal that gets no answer counts as failed after this.
const PATIENCE: Duration = Duration::from_secs(60);

/// Of what is left of the certificate's life, the longest part that passes before the next attempt: it must not end while
/// a registrar is there that would renew it.
const LEFT: u32 = 8;
/// Between a renewal and the next, however short-lived certificates are.
const SHORTEST: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(super) struct Renewal {
    validity: Option<Validity>,
    /// Share of the life at which this certificate is renewed.
    share: f64,
    /// When its life began.
    begin: Timestamp,
    earliest: Instant,
    due: Option<Instant>,
    expires: Instant,
    in_flight: Option<Instant>,
    backoff: Backoff,
}

impl Renewal {
    pub(super) fn new() -> Self {
        let backoff = Backoff::new(Duration::from_secs(60), Duration::from_secs(3600));
        Self {
            validity: None,
            share: SHARE,
            begin: Timestamp::default(),
            earliest: Instant::default(),
            due: None,
            expires: Instant::default(),
            in_flight: None,
            backoff,
        }
    }

    /// The certificate in use, and what time it is; to be called again from time to time, since clocks get set.
    pub(super) fn set(&mut self, validity: Validity, civil: Timestamp, now: Instant, rng: &mut StdRng) {
        self.expires = now + validity.not_after.saturating_duration_since(civil);
        if self.validity != Some(validity) {
            self.validity = Some(validity);
            self.share = SHARE + rng.random_range(-JITTER..=JITTER);
            self.backoff.reset();
            // One that has just been issued begins its life now, whatever it is back-dated to.
            let just_issued = self.in_flight.take().is_some();
            self.begin = if just_issued { civil } else { validity.not_before };
            self.earliest = if just_issued { now + SHORTEST } else { now };
        } else if self.in_flight.is_some() || self.backing_off(now) {
            return;
        }
        let life = validity.not_after.saturating_duration_since(self.begin);
        let at = self.begin + life.mul_f64(self.share);
        self.due = Some((now + at.saturating_duration_since(civil)).max(self.earliest));
    }

    fn backing_off(&self, now: Instant) -> bool {
        self.backoff.has_failed() && self.due.is_some_and(|due| due > now)
    }

    /// Whether to renew now; the caller then does.
    pub(super) fn start(&mut self, now: Instant, rng: &mut StdRng) -> bool {
        if self.in_flight.is_some_and(|deadline| deadline <= now) {
            self.failed(now, rng);
        }
        if self.in_flight.is_some() || self.due.is_none_or(|due| due > now) {
            return false;
        }
        self.in_flight = Some(now + PATIENCE);
        true
    }

    /// The renewal failed: again, later.
    pub(super) fn failed(&mut self, now: Instant, rng: &mut StdRng) {
        self.in_flight = None;
        let longest = ((self.expires - now) / LEFT).max(SHORTEST);
        self.due = Some(now + self.backoff.fail(rng).min(longest));
    }

    /// When to look again. A renewal that is due, or has got no answer, waits for a connection.
    pub(super) fn timeout(&self, connected: bool) -> Option<Instant> {
        self.in_flight.or(self.due).filter(|_| connected)
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn nothing_is_due_without_a_connection() {
        let mut rng = StdRng::seed_from_u64(1);
        let civil = |seconds| Timestamp::from_epoch(Duration::from_secs(seconds));
        let at = |seconds| Instant::from_boot(Duration::from_secs(seconds));
        let mut renewal = Renewal::new();
        renewal.set(Validity { not_before: civil(0), not_after: civil(300) }, civil(250), at(10), &mut rng);
        assert!(renewal.start(at(10), &mut rng));
        // The connection breaks, and the answer never comes.
        assert_eq!((renewal.timeout(true), renewal.timeout(false)), (Some(at(70)), None));
        // It counts as failed once there is a connection again.
        assert!(!renewal.start(at(100), &mut rng));
        assert!(renewal.timeout(true).is_some_and(|due| due > at(100)));
    }

    #[test]
    fn the_end_of_the_certificate_is_not_slept_through() {
        let mut rng = StdRng::seed_from_u64(2);
        let civil = |seconds| Timestamp::from_epoch(Duration::from_secs(seconds));
        let mut renewal = Renewal::new();
        let life = Duration::from_secs(86_400);
        let mut now = Instant::from_boot(Duration::from_secs(10));
        let end = now + life;
        renewal.set(Validity { not_before: civil(0), not_after: civil(86_400) }, civil(0), now, &mut rng);
        now += life.mul_f64(0.75);
        let mut attempts = 0;
        while now < end {
            assert!(renewal.start(now, &mut rng));
            renewal.failed(now, &mut rng);
            attempts += 1;
            let next = renewal.timeout(true).unwrap();
            assert!(next - now <= ((end - now) / LEFT).max(SHORTEST), "{:?} before the end", end - now);
            now = next;
        }
        assert!((60..120).contains(&attempts), "{attempts}");
    }
}
