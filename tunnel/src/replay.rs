//! The window against replayed transport messages: which of the latest 8,128 counters were seen (RFC 6479).

/// Words of the ring; one of them is always being filled, so the window is one word shorter.
const WORDS: usize = 128;
/// How far behind the highest counter one may be: 8,192 bits less a word.
pub(crate) const WINDOW: u64 = (WORDS as u64 - 1) * 64;

/// Counters seen, as bits in a ring.
pub(crate) struct ReplayWindow {
    /// Highest counter seen, plus one; 0 if none.
    next: u64,
    ring: [u64; WORDS],
}

impl Default for ReplayWindow {
    fn default() -> Self {
        Self { next: 0, ring: [0; WORDS] }
    }
}

const fn slot(counter: u64) -> (usize, u64) {
    ((counter / 64 % WORDS as u64) as usize, 1 << (counter % 64))
}

impl ReplayWindow {
    /// Whether `counter` is new and not too old. To be asked before a message is opened, which is the cheap half.
    pub(crate) fn is_fresh(&self, counter: u64) -> bool {
        if counter >= self.next {
            return true;
        }
        let (word, bit) = slot(counter);
        self.next - 1 - counter < WINDOW && self.ring[word] & bit == 0
    }

    /// Notes that `counter` was seen on an authentic message; `false` if it was not fresh.
    pub(crate) fn accept(&mut self, counter: u64) -> bool {
        if !self.is_fresh(counter) {
            return false;
        }
        if counter >= self.next {
            let newest = self.next.saturating_sub(1) / 64;
            let words = (counter / 64 - newest).min(WORDS as u64);
            for ahead in 1..=words {
                self.ring[((newest + ahead) % WORDS as u64) as usize] = 0;
            }
            self.next = counter.saturating_add(1);
        }
        let (word, bit) = slot(counter);
        self.ring[word] |= bit;
        true
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    /// The plain way: remember everything.
    #[derive(Default)]
    struct Model {
        seen: HashSet<u64>,
        highest: Option<u64>,
    }

    impl Model {
        fn accept(&mut self, counter: u64) -> bool {
            if self.highest.is_some_and(|h| counter <= h && h - counter >= WINDOW)
                || !self.seen.insert(counter)
            {
                return false;
            }
            self.highest = self.highest.max(Some(counter));
            true
        }
    }

    proptest! {
        #[test]
        fn agrees_with_a_set(
            start in prop_oneof![Just(0u64), Just(1 << 40), Just(u64::MAX - (1 << 20))],
            steps in prop::collection::vec(
                prop_oneof![4 => -70i64..70, 2 => -9_000i64..9_000, 1 => -20_000i64..20_000], 1..600),
        ) {
            let (mut window, mut model, mut at) = (ReplayWindow::default(), Model::default(), start);
            for step in steps {
                at = at.saturating_add_signed(step).min(u64::MAX - (1 << 13));
                let fresh = window.is_fresh(at);
                let accepted = window.accept(at);
                prop_assert_eq!(fresh, accepted);
                prop_assert_eq!(accepted, model.accept(at), "counter {}", at);
            }
        }
    }

    #[test]
    fn edges() {
        let mut window = ReplayWindow::default();
        assert!(window.accept(0) && !window.accept(0));
        assert!(window.accept(WINDOW));
        assert!(!window.accept(0));
        assert!(window.accept(1) && !window.accept(1));
        assert!(window.accept(WINDOW * 10) && !window.accept(WINDOW));
        assert!(window.accept(WINDOW * 9 + 1) && !window.accept(WINDOW * 9));
    }
}
