//! Whether to look once more before going to sleep, and for how long. To wake a sleeping processor takes longer than to
//! seal a packet, so the data plane polls for a moment after it has run out of work, as long as experience says that
//! work comes: of any kind soon, or an answer to what was moved last.

use std::time::Duration;

/// How long to poll for any work. Packets of a flow 50 µs apart would keep a processor busy with polling for longer.
const SOON: Duration = Duration::from_micros(40);
/// How long to poll for an answer: it takes a peer on a fast network, asleep until now, this long.
const ANSWER: Duration = Duration::from_micros(150);
/// Polls in vain that are forgiven after as many that were not: twice as many must find work as do not.
const CREDIT_MAX: u8 = 8;
const COST: u8 = 2;
/// Without credit, one sleep in so many is preceded by polling, to find out whether times have changed.
const TRY_EVERY: u8 = 64;

/// Where packets are moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Way {
    /// From the host to the network: the answer comes from there.
    Out,
    /// From the network to the host: the answer is the host's.
    #[default]
    In,
}

/// What experience says.
#[derive(Debug, Default)]
pub(super) struct Linger {
    last: Way,
    soon: Experience,
    /// Of answers to what was moved out.
    after_out: Experience,
    /// Of answers to what was moved in.
    after_in: Experience,
}

/// Whether one kind of polling has paid.
#[derive(Debug, Default)]
struct Experience {
    credit: u8,
    sleeps: u8,
}

impl Linger {
    /// Tells that packets were moved.
    pub(super) fn has_moved(&mut self, way: Way) {
        self.last = way;
    }

    /// How long to poll before the sleep that is due; zero for not at all.
    pub(super) fn limit(&mut self) -> Duration {
        let soon = self.soon.is_worthwhile();
        match (self.answers().is_worthwhile(), soon) {
            (true, _) => ANSWER,
            (false, true) => SOON,
            (false, false) => Duration::ZERO,
        }
    }

    /// Tells what polling has found, and after how long: packets of the host, datagrams of the network, neither or both.
    pub(super) fn learn(&mut self, waited: Duration, packets: bool, datagrams: bool) {
        let is_soon = waited <= SOON;
        // What comes later has come while somebody else had the processor: then it is better to sleep, and be woken.
        let is_in_time = waited <= ANSWER;
        let is_answer = match self.last {
            Way::Out => is_in_time && datagrams,
            Way::In => is_in_time && packets,
        };
        if is_soon && (packets || datagrams) {
            self.soon.learn(true);
        } else if !is_soon {
            self.soon.learn(false);
        }
        if is_answer {
            self.answers().learn(true);
        } else if !is_soon {
            // More of the same is no answer.
            self.answers().learn(false);
        }
    }

    fn answers(&mut self) -> &mut Experience {
        match self.last {
            Way::Out => &mut self.after_out,
            Way::In => &mut self.after_in,
        }
    }
}

impl Experience {
    fn is_worthwhile(&mut self) -> bool {
        if self.credit > 0 {
            return true;
        }
        self.sleeps = (self.sleeps + 1) % TRY_EVERY;
        self.sleeps == 0
    }

    fn learn(&mut self, found: bool) {
        self.credit =
            if found { (self.credit + 1).min(CREDIT_MAX) } else { self.credit.saturating_sub(COST) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How long a thread polls, in µs a sleep on average, if after each move `way` datagrams come after so many µs, or
    /// packets.
    fn polls(linger: &mut Linger, way: Way, datagrams: Option<u64>, packets: Option<u64>) -> u64 {
        const SLEEPS: u64 = 6_400;
        let due = |after: Option<u64>| after.map(Duration::from_micros);
        let first = due(datagrams).into_iter().chain(due(packets)).min();
        let mut polled = Duration::ZERO;
        for _ in 0..SLEEPS {
            linger.has_moved(way);
            let limit = linger.limit();
            if limit.is_zero() {
                continue;
            }
            let found = first.filter(|first| *first <= limit);
            let waited = found.unwrap_or(limit + Duration::from_micros(1));
            polled += waited;
            linger.learn(
                waited,
                found.is_some() && due(packets) == found,
                found.is_some() && due(datagrams) == found,
            );
        }
        u64::try_from(polled.as_micros()).unwrap() / SLEEPS
    }

    #[test]
    fn waits_for_answers_that_come() {
        for way in [Way::Out, Way::In] {
            let mut linger = Linger::default();
            let answer = |after| if way == Way::Out { (Some(after), None) } else { (None, Some(after)) };
            let mut polls = |(datagrams, packets)| polls(&mut linger, way, datagrams, packets);
            assert!(polls(answer(100)) >= 98, "soon always");
            assert!(polls(answer(5_000)) <= 3, "in vain: seldom");
            assert!((9..=10).contains(&polls(answer(10))));
        }
    }

    #[test]
    fn does_not_spin_while_a_flow_has_a_packet_every_50_microseconds() {
        let mut linger = Linger::default();
        assert!(polls(&mut linger, Way::Out, None, Some(50)) <= 2);
        assert!(polls(&mut linger, Way::In, Some(50), None) <= 2);
        assert!(
            polls(&mut linger, Way::In, Some(20), None) >= 19,
            "a faster one finds a thread that is awake"
        );
    }

    #[test]
    fn answers_of_either_way_are_told_apart() {
        let mut linger = Linger::default();
        polls(&mut linger, Way::Out, Some(100), None);
        polls(&mut linger, Way::In, None, None);
        linger.has_moved(Way::Out);
        assert_eq!(linger.limit(), ANSWER, "a peer that answers is not to blame for a host that does not");
        polls(&mut linger, Way::Out, None, None);
        polls(&mut linger, Way::In, None, Some(100));
        linger.has_moved(Way::In);
        assert_eq!(linger.limit(), ANSWER);
    }

    #[test]
    fn does_not_poll_where_others_want_the_processor() {
        let mut linger = Linger::default();
        polls(&mut linger, Way::Out, Some(100), None);
        let mut polls = 0;
        for _ in 0..640 {
            linger.has_moved(Way::Out);
            if !linger.limit().is_zero() {
                polls += 1;
                linger.learn(Duration::from_millis(3), false, true);
            }
        }
        assert!(
            polls <= 4 + 2 * 640 / u64::from(TRY_EVERY),
            "{polls}: until credit is spent, and then one in 64 for each"
        );
    }

    #[test]
    fn half_the_time_is_too_little() {
        let mut linger = Linger::default();
        let mut polls = 0;
        for sleep in 0..6_400 {
            linger.has_moved(Way::Out);
            if !linger.limit().is_zero() {
                polls += 1;
                linger.learn(if sleep % 2 == 0 { SOON } else { ANSWER }, false, sleep % 2 == 0);
            }
        }
        assert!(polls < 800, "{polls}");
    }
}
