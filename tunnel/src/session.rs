//! One session: its transport keys, counters and age (the paper, §5.4.6 and §6.2).

use muster_common::time::Instant;

use crate::{
    cipher::{Cipher, TransportKey},
    limits::{KEEPALIVE_TIMEOUT, REJECT_AFTER_TIME, REKEY_AFTER_TIME, REKEY_TIMEOUT},
    message::DataHeader,
    noise::TransportKeys,
    replay::ReplayWindow,
    stats::Dropped,
};

/// Keys for both directions, and what was used of them.
pub(crate) struct Session {
    pub(crate) cipher: Cipher,
    pub(crate) local_index: u32,
    pub(crate) remote_index: u32,
    pub(crate) sending: TransportKey,
    pub(crate) receiving: TransportKey,
    /// Counter of the next message to send.
    send_counter: u64,
    replay: ReplayWindow,
    pub(crate) created: Instant,
    pub(crate) is_initiator: bool,
    /// Made while we had an initiation of our own under way: both sides started at once.
    pub(crate) is_contested: bool,
}

impl Session {
    /// `None` if the cipher refuses the keys, which it does not for 32 octets.
    pub(crate) fn new(
        keys: &TransportKeys,
        cipher: Cipher,
        local_index: u32,
        remote_index: u32,
        is_initiator: bool,
        now: Instant,
    ) -> Option<Self> {
        Some(Self {
            cipher,
            local_index,
            remote_index,
            sending: TransportKey::new(cipher, &keys.sending)?,
            receiving: TransportKey::new(cipher, &keys.receiving)?,
            send_counter: 0,
            replay: ReplayWindow::default(),
            created: now,
            is_initiator,
            is_contested: false,
        })
    }

    /// Whether it may still be used.
    pub(crate) fn is_alive(&self, now: Instant) -> bool {
        now - self.created < REJECT_AFTER_TIME
    }

    /// Whether it may still be sent with.
    pub(crate) fn can_send(&self, now: Instant) -> bool {
        self.is_alive(now) && self.send_counter < self.cipher.reject_after()
    }

    /// Takes the counters of the next `messages`, and tells the first; none if they are not all left, or it is too old.
    pub(crate) fn reserve(&mut self, messages: usize, now: Instant) -> Option<u64> {
        let first = self.send_counter;
        let next = first.checked_add(messages as u64).filter(|next| *next <= self.cipher.reject_after())?;
        if !self.is_alive(now) {
            return None;
        }
        self.send_counter = next;
        Some(first)
    }

    /// Whether it should be renewed now that something was sent.
    pub(crate) fn wants_renewal_after_sending(&self, now: Instant) -> bool {
        self.send_counter > self.cipher.rekey_after()
            || (self.is_initiator && now - self.created >= REKEY_AFTER_TIME)
    }

    /// Whether it should be renewed now that something was received: its initiator would otherwise have no chance
    /// to renew it in time by sending alone.
    pub(crate) fn wants_renewal_after_receiving(&self, now: Instant) -> bool {
        self.is_initiator && now - self.created >= REJECT_AFTER_TIME - KEEPALIVE_TIMEOUT - REKEY_TIMEOUT
    }

    /// Seals a message into `slot`: see [`TransportKey::seal`].
    pub(crate) fn seal(
        &mut self,
        slot: &mut [u8],
        now: Instant,
        write: impl FnOnce(&mut [u8]),
    ) -> Result<(), Dropped> {
        let counter = self.reserve(1, now).ok_or(Dropped::SessionExpired)?;
        self.sending.seal(DataHeader { receiver: self.remote_index, counter }, slot, write)
    }

    /// Whether a message with `counter` is worth opening: the cheap half.
    pub(crate) fn check(&self, counter: u64, now: Instant) -> Result<(), Dropped> {
        if !self.is_alive(now) || counter >= self.cipher.reject_after() {
            return Err(Dropped::SessionExpired);
        }
        if self.replay.is_fresh(counter) { Ok(()) } else { Err(Dropped::Replayed) }
    }

    /// Notes that an authentic message with `counter` was received; fails if one was before.
    pub(crate) fn accept(&mut self, counter: u64) -> Result<(), Dropped> {
        if self.replay.accept(counter) { Ok(()) } else { Err(Dropped::Replayed) }
    }

    /// A session with made-up keys.
    #[cfg(test)]
    pub(crate) fn for_test(local_index: u32) -> Self {
        let key = || zeroize::Zeroizing::new([7; 32]);
        let keys = TransportKeys { sending: key(), receiving: key() };
        Self::new(&keys, Cipher::default(), local_index, 0, true, Instant::default()).unwrap()
    }

    #[cfg(test)]
    pub(crate) fn set_send_counter(&mut self, counter: u64) {
        self.send_counter = counter;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use zeroize::Zeroizing;

    use super::*;

    const BOTH: [Cipher; 2] = [Cipher::ChaCha20Poly1305, Cipher::Aes256Gcm];

    fn pair(now: Instant) -> (Session, Session) {
        pair_with(Cipher::default(), now)
    }

    fn pair_with(cipher: Cipher, now: Instant) -> (Session, Session) {
        let keys = |sending, receiving| TransportKeys {
            sending: Zeroizing::new([sending; 32]),
            receiving: Zeroizing::new([receiving; 32]),
        };
        (
            Session::new(&keys(1, 2), cipher, 10, 20, true, now).unwrap(),
            Session::new(&keys(2, 1), cipher, 20, 10, false, now).unwrap(),
        )
    }

    /// Appends a message with an "x", padded.
    fn seal(session: &mut Session, now: Instant, out: &mut Vec<u8>) -> Result<(), Dropped> {
        let mut slot = [0; 48];
        session.seal(&mut slot, now, |packet| packet[0] = b'x')?;
        out.extend(slot);
        Ok(())
    }

    /// Opens a message as if it had `counter`.
    fn open<'a>(
        session: &mut Session,
        counter: u64,
        message: &'a mut [u8],
        now: Instant,
    ) -> Result<&'a mut [u8], Dropped> {
        session.check(counter, now)?;
        if !session.receiving.open(counter, message) {
            return Err(Dropped::NotAuthentic);
        }
        session.accept(counter)?;
        Ok(&mut message[16..32])
    }

    /// The counters at which a session is renewed and at which it ends, without sending 2^60 messages.
    #[test]
    fn counters_run_out() {
        let now = Instant::default();
        for cipher in BOTH {
            let (mut a, mut b) = pair_with(cipher, now);
            let (rekey, reject) = (cipher.rekey_after(), cipher.reject_after());
            let mut out = Vec::new();
            a.set_send_counter(rekey);
            assert!(!a.wants_renewal_after_sending(now));
            seal(&mut a, now, &mut out).unwrap();
            assert!(a.wants_renewal_after_sending(now));
            a.set_send_counter(reject - 1);
            out.clear();
            seal(&mut a, now, &mut out).unwrap();
            assert_eq!(seal(&mut a, now, &mut out), Err(Dropped::SessionExpired));
            assert_eq!(out.len(), 48, "nothing is left behind by the refusal");
            assert_eq!(open(&mut b, reject - 1, &mut out.clone(), now).unwrap()[0], b'x');
            assert_eq!(open(&mut b, reject, &mut out, now).unwrap_err(), Dropped::SessionExpired);
        }
    }

    #[test]
    fn counters_of_many_messages_are_taken_whole_or_not_at_all() {
        let now = Instant::default();
        for cipher in BOTH {
            let (mut a, _) = pair_with(cipher, now);
            assert_eq!(
                (a.reserve(3, now), a.reserve(1, now), a.reserve(2, now)),
                (Some(0), Some(3), Some(4))
            );
            let reject = cipher.reject_after();
            a.set_send_counter(reject - 3);
            assert_eq!((a.reserve(4, now), a.reserve(usize::MAX, now)), (None, None));
            assert_eq!((a.reserve(3, now), a.reserve(1, now)), (Some(reject - 3), None));
            a.set_send_counter(0);
            assert_eq!(a.reserve(1, now + REJECT_AFTER_TIME), None, "too old");
        }
    }

    #[test]
    fn ciphers_do_not_open_each_other() {
        let now = Instant::default();
        let [(mut a, _), (_, mut b)] = BOTH.map(|cipher| pair_with(cipher, now));
        let mut out = Vec::new();
        seal(&mut a, now, &mut out).unwrap();
        assert_eq!(open(&mut b, 0, &mut out, now).unwrap_err(), Dropped::NotAuthentic);
    }

    #[test]
    fn ages_run_out() {
        let now = Instant::default();
        let at = |seconds| now + Duration::from_secs(seconds);
        let (mut a, mut b) = pair(now);
        assert!(!a.wants_renewal_after_sending(at(119)) && a.wants_renewal_after_sending(at(120)));
        assert!(!b.wants_renewal_after_sending(at(120)), "only the initiator renews by age");
        assert!(!a.wants_renewal_after_receiving(at(164)) && a.wants_renewal_after_receiving(at(165)));
        let mut out = Vec::new();
        seal(&mut a, at(179), &mut out).unwrap();
        assert_eq!(seal(&mut a, at(180), &mut Vec::new()), Err(Dropped::SessionExpired));
        assert_eq!(open(&mut b, 0, &mut out.clone(), at(180)).unwrap_err(), Dropped::SessionExpired);
        assert!(open(&mut b, 0, &mut out.clone(), at(179)).is_ok());
        assert_eq!(open(&mut b, 0, &mut out, at(179)).unwrap_err(), Dropped::Replayed);
    }

    #[test]
    fn forgeries_do_not_move_the_window() {
        let now = Instant::default();
        let (mut a, mut b) = pair(now);
        let mut out = Vec::new();
        seal(&mut a, now, &mut out).unwrap();
        let mut forged = out.clone();
        forged[20] ^= 1;
        assert_eq!(open(&mut b, 1 << 40, &mut forged, now).unwrap_err(), Dropped::NotAuthentic);
        assert!(open(&mut b, 0, &mut out, now).is_ok());
    }
}
