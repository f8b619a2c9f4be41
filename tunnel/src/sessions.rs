//! The sessions of one peer: the current one, one that the peer has started but not yet confirmed, and two retired
//! ones that still receive what is under way.
//!
//! The paper (§6.3 and the kernel) keeps one retired session. A second one costs little and means that nothing is lost
//! when both sides renew at the same time.

use muster_common::time::Instant;

use crate::{cipher::Cipher, session::Session};

type Slot = Option<Box<Session>>;

/// All sessions of a peer.
#[derive(Default)]
pub(crate) struct Sessions {
    current: Slot,
    /// We answered the peer's initiation; it becomes current with the first message that comes through it.
    next: Slot,
    /// Newest first. Only received with.
    retired: [Slot; 2],
}

/// Local indices that are no longer in use and must be released.
pub(crate) type Released = Vec<u32>;

impl Sessions {
    pub(crate) fn current(&mut self) -> Option<&mut Session> {
        self.current.as_deref_mut()
    }

    pub(crate) fn next(&self) -> Option<&Session> {
        self.next.as_deref()
    }

    /// Any session by its local index, and whether it is the unconfirmed one.
    pub(crate) fn by_index(&mut self, index: u32) -> Option<(&mut Session, bool)> {
        let is_next = self.next.as_ref().is_some_and(|s| s.local_index == index);
        let [newer, older] = &mut self.retired;
        [&mut self.current, &mut self.next, newer, older]
            .into_iter()
            .filter_map(|slot| slot.as_deref_mut())
            .find(|session| session.local_index == index)
            .map(|session| (session, is_next))
    }

    /// A session that the peer started: waits for its confirmation.
    pub(crate) fn put_next(&mut self, session: Session) -> Released {
        self.next.replace(Box::new(session)).map(|old| old.local_index).into_iter().collect()
    }

    /// The session that the peer started, if any, is no longer one started at the same time as ours.
    pub(crate) fn end_contest(&mut self) {
        if let Some(next) = &mut self.next {
            next.is_contested = false;
        }
    }

    /// The peer has used the session that it started: it becomes current.
    pub(crate) fn confirm_next(&mut self) -> Released {
        let Some(next) = self.next.take() else { return Released::new() };
        let old = self.current.replace(next);
        self.retire(old)
    }

    /// A session that we started: becomes current. If the peer started one at the same time, `ours_wins` tells whether
    /// that one is only received with from now on, or may still be confirmed and then replaces ours.
    pub(crate) fn put_current(&mut self, session: Session, ours_wins: bool) -> Released {
        let old = self.current.replace(Box::new(session));
        let mut released = self.retire(old);
        if ours_wins || self.next.as_ref().is_some_and(|next| !next.is_contested) {
            let next = self.next.take();
            released.extend(self.retire(next));
        }
        released
    }

    fn retire(&mut self, session: Slot) -> Released {
        if session.is_none() {
            return Released::new();
        }
        let [newer, older] = &mut self.retired;
        let gone = std::mem::replace(older, std::mem::replace(newer, session));
        gone.map(|old| old.local_index).into_iter().collect()
    }

    /// Drops all, which wipes their keys, once nobody seals or opens with them any more.
    pub(crate) fn clear(&mut self) -> Released {
        let [newer, older] = &mut self.retired;
        [&mut self.current, &mut self.next, newer, older]
            .into_iter()
            .filter_map(|slot| slot.take())
            .map(|session| session.local_index)
            .collect()
    }

    /// What the current session is sealed with.
    pub(crate) fn cipher(&self) -> Option<Cipher> {
        self.current.as_ref().map(|session| session.cipher)
    }

    /// Whether the current session can be sent with.
    pub(crate) fn can_send(&self, now: Instant) -> bool {
        self.current.as_ref().is_some_and(|session| session.can_send(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(sessions: &mut Sessions) -> Vec<u32> {
        (0..10).filter(|index| sessions.by_index(*index).is_some()).collect()
    }

    /// Both sides renew at once: the old session and the loser of the two new ones still receive.
    #[test]
    fn two_are_retired() {
        let mut sessions = Sessions::default();
        assert_eq!(sessions.put_current(Session::for_test(1), true), Released::new());
        let mut next = Session::for_test(2);
        next.is_contested = true;
        assert_eq!(sessions.put_next(next), Released::new());
        assert_eq!(sessions.put_current(Session::for_test(3), true), Released::new());
        assert_eq!(held(&mut sessions), [1, 2, 3]);
        assert_eq!(sessions.current().map(|s| s.local_index), Some(3));
        assert!(sessions.next().is_none());
        assert_eq!(sessions.put_current(Session::for_test(4), true), [1], "the oldest goes");
        assert_eq!(sessions.put_next(Session::for_test(5)), Released::new());
        assert_eq!(sessions.put_next(Session::for_test(6)), [5], "replaced before it was used");
        assert_eq!(sessions.confirm_next(), [2]);
        assert_eq!(held(&mut sessions), [3, 4, 6]);
        let mut released = sessions.clear();
        released.sort();
        assert_eq!((released, held(&mut sessions)), (vec![3, 4, 6], vec![]));
    }
}
