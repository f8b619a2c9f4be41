//! `mac1`, `mac2` and cookies (the paper, §5.3 and §5.4.4–5.4.7): strangers who do not know our public key get no
//! answer, and under load only those who can receive at their source address get through, each at a bounded rate.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use blake2::{
    Blake2s256, Blake2sMac,
    digest::{Digest as _, FixedOutput as _, KeyInit as _, Update as _, consts::U16},
};
use chacha20poly1305::{AeadInPlace as _, XChaCha20Poly1305};
use muster_common::time::Instant;
use rand::Rng;
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

use crate::{
    cipher::Cipher,
    key::PublicKey,
    limits::{
        COOKIE_LATENCY, COOKIE_LIFE, HANDSHAKE_RATE, SOURCE_BURST, SOURCE_RATE, SOURCES, UNDER_LOAD_FOR,
    },
    message::{COOKIE_REPLY_LEN, CookieReply, MAC_LEN},
    rate::TokenBucket,
};

type Mac = [u8; MAC_LEN];

/// Keyed BLAKE2s with 16 octets of output: `MAC` of the paper.
pub(crate) fn mac(key: &[u8], parts: &[&[u8]]) -> Mac {
    // Fails only for keys longer than 32 octets; ours have 16 or 32.
    let Ok(mut state) = Blake2sMac::<U16>::new_from_slice(key) else { return [0; MAC_LEN] };
    for part in parts {
        state.update(part);
    }
    state.finalize_fixed().into()
}

fn hash(label: &[u8], key: &PublicKey) -> [u8; 32] {
    Blake2s256::new().chain_update(label).chain_update(key.as_bytes()).finalize().into()
}

/// The keys that depend on the receiver's public key only.
#[derive(Clone)]
pub(crate) struct ReceiverKeys {
    mac1: [u8; 32],
    /// That of handshakes for AES-256-GCM.
    mac1_aes: [u8; 32],
    cookie: [u8; 32],
}

impl ReceiverKeys {
    pub(crate) fn new(receiver: &PublicKey) -> Self {
        let mac1 = |cipher: Cipher| hash(cipher.mac1_label(), receiver);
        Self {
            mac1: mac1(Cipher::ChaCha20Poly1305),
            mac1_aes: mac1(Cipher::Aes256Gcm),
            cookie: hash(b"cookie--", receiver),
        }
    }

    fn mac1(&self, cipher: Cipher) -> &[u8; 32] {
        match cipher {
            Cipher::ChaCha20Poly1305 => &self.mac1,
            Cipher::Aes256Gcm => &self.mac1_aes,
        }
    }

    /// Whether the message, which ends in `mac1` and `mac2`, was made by someone who knows the receiver's key, for a
    /// session with `cipher`.
    fn verify_mac1(&self, message: &[u8], cipher: Cipher) -> bool {
        let Some((body, macs)) = split_macs(message) else { return false };
        mac(self.mac1(cipher), &[body]).ct_eq(&macs[..MAC_LEN]).into()
    }
}

/// The message without its macs, and the two macs.
fn split_macs(message: &[u8]) -> Option<(&[u8], &[u8])> {
    message.len().checked_sub(2 * MAC_LEN).map(|at| message.split_at(at))
}

/// What one side remembers to put macs on messages to one peer.
pub(crate) struct CookieJar {
    keys: ReceiverKeys,
    cookie: Option<(Mac, Instant)>,
    last_mac1: Option<Mac>,
}

impl CookieJar {
    pub(crate) fn new(receiver: &PublicKey) -> Self {
        Self { keys: ReceiverKeys::new(receiver), cookie: None, last_mac1: None }
    }

    /// Fills `mac1`, and `mac2` if there is a cookie, in a handshake for `cipher`.
    pub(crate) fn put_macs(&mut self, message: &mut [u8], cipher: Cipher, now: Instant) {
        let Some(at) = message.len().checked_sub(2 * MAC_LEN) else { return };
        let (body, macs) = message.split_at_mut(at);
        let (mac1, mac2) = macs.split_at_mut(MAC_LEN);
        let m1 = mac(self.keys.mac1(cipher), &[body]);
        mac1.copy_from_slice(&m1);
        self.last_mac1 = Some(m1);
        if let Some((cookie, received)) = &self.cookie
            && now - *received < COOKIE_LIFE - COOKIE_LATENCY
        {
            mac2.copy_from_slice(&mac(cookie, &[body, mac1]));
        } else {
            mac2.fill(0);
        }
    }

    /// Takes the cookie out of a reply to the last message; `false` if it is no such reply.
    pub(crate) fn receive(&mut self, reply: CookieReply<'_>, now: Instant) -> bool {
        let Some(last_mac1) = self.last_mac1 else { return false };
        let (sealed, tag) = reply.sealed();
        let mut cookie = Mac::default();
        cookie.copy_from_slice(sealed);
        let cipher = XChaCha20Poly1305::new(&self.keys.cookie.into());
        if cipher
            .decrypt_in_place_detached(reply.nonce().into(), &last_mac1, &mut cookie, tag.into())
            .is_err()
        {
            return false;
        }
        self.cookie = Some((cookie, now));
        // Only one reply to one message.
        self.last_mac1 = None;
        true
    }
}

/// What to do with an initiation whose `mac1` is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Process it.
    Pass,
    /// Send a cookie instead.
    DemandCookie,
    /// Its source has had its share.
    RateLimited,
}

/// The side that guards: measures load, makes and checks cookies.
pub(crate) struct Guard {
    keys: ReceiverKeys,
    accepts_aes: bool,
    handshakes: TokenBucket,
    under_load_until: Instant,
    secret: Zeroizing<[u8; 32]>,
    secret_until: Instant,
    sources: BTreeMap<IpAddr, TokenBucket>,
    swept: Instant,
}

impl Guard {
    /// Guards `own`; `rate` is the number of handshakes a second beyond which cookies are demanded, and `accepts_aes`
    /// says whether those for AES-256-GCM are taken.
    pub(crate) fn new(own: &PublicKey, rate: u32, accepts_aes: bool, now: Instant) -> Self {
        let rate = if rate == 0 { HANDSHAKE_RATE } else { rate };
        Self {
            keys: ReceiverKeys::new(own),
            accepts_aes,
            handshakes: TokenBucket::new(rate, rate, now),
            under_load_until: Instant::default(),
            secret: Zeroizing::default(),
            secret_until: Instant::default(),
            sources: BTreeMap::new(),
            swept: now,
        }
    }

    /// What the session is to be sealed with for which `message` was made by someone who knows our key; nothing if it
    /// was not, or if we do not take it.
    pub(crate) fn verify_mac1(&self, message: &[u8]) -> Option<Cipher> {
        let aes = self.accepts_aes.then_some(Cipher::Aes256Gcm);
        let mut taken = [Some(Cipher::ChaCha20Poly1305), aes].into_iter().flatten();
        taken.find(|cipher| self.keys.verify_mac1(message, *cipher))
    }

    /// Counts an initiation with valid `mac1` and decides on it.
    pub(crate) fn admit(
        &mut self,
        message: &[u8],
        source: SocketAddr,
        rng: &mut impl Rng,
        now: Instant,
    ) -> Verdict {
        if !self.handshakes.take(now) {
            self.under_load_until = now + UNDER_LOAD_FOR;
        }
        if now >= self.under_load_until {
            return Verdict::Pass;
        }
        let cookie = self.cookie(source, rng, now);
        let valid = split_macs(message).is_some_and(|(body, macs)| {
            let (mac1, mac2) = macs.split_at(MAC_LEN);
            mac(&cookie, &[body, mac1]).ct_eq(mac2).into()
        });
        if !valid {
            Verdict::DemandCookie
        } else if self.take_from_source(source.ip(), now) {
            Verdict::Pass
        } else {
            Verdict::RateLimited
        }
    }

    /// The reply that carries the cookie for `source` to the sender `index` of `message`.
    pub(crate) fn reply(
        &mut self,
        message: &[u8],
        index: u32,
        source: SocketAddr,
        rng: &mut impl Rng,
        now: Instant,
    ) -> Option<[u8; COOKIE_REPLY_LEN]> {
        let mut cookie = self.cookie(source, rng, now);
        let mut nonce = [0; 24];
        rng.fill_bytes(&mut nonce);
        let mac1 = split_macs(message)?.1.get(..MAC_LEN)?;
        let cipher = XChaCha20Poly1305::new(&self.keys.cookie.into());
        let tag = cipher.encrypt_in_place_detached(&nonce.into(), mac1, &mut cookie).ok()?;
        Some(CookieReply::build(index, &nonce, &cookie, &tag))
    }

    fn cookie(&mut self, source: SocketAddr, rng: &mut impl Rng, now: Instant) -> Mac {
        if now >= self.secret_until {
            rng.fill_bytes(&mut *self.secret);
            self.secret_until = now + COOKIE_LIFE;
        }
        let port = source.port().to_be_bytes();
        match source.ip() {
            IpAddr::V4(ip) => mac(&*self.secret, &[&ip.octets(), &port]),
            IpAddr::V6(ip) => mac(&*self.secret, &[&ip.octets(), &port]),
        }
    }

    fn take_from_source(&mut self, source: IpAddr, now: Instant) -> bool {
        let source = match source {
            IpAddr::V6(ip) => IpAddr::V6((ip.to_bits() & !u128::from(u64::MAX)).into()),
            v4 @ IpAddr::V4(_) => v4,
        };
        if self.sources.len() >= SOURCES && now - self.swept >= UNDER_LOAD_FOR {
            self.sources.retain(|_, bucket| !bucket.is_full(now));
            self.swept = now;
        }
        if self.sources.len() >= SOURCES && !self.sources.contains_key(&source) {
            return false;
        }
        self.sources
            .entry(source)
            .or_insert_with(|| TokenBucket::new(SOURCE_RATE, SOURCE_BURST, now))
            .take(now)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rand::{SeedableRng as _, rngs::StdRng};

    use super::*;
    use crate::message::Message;

    const PLAIN: Cipher = Cipher::ChaCha20Poly1305;

    fn at(seconds: u64) -> Instant {
        Instant::from_boot(Duration::from_secs(1_000 + seconds))
    }

    #[test]
    fn mac1_as_python_hashlib_computes_it() {
        let key = PublicKey::from_bytes(std::array::from_fn(|i| i as u8));
        let keys = ReceiverKeys::new(&key);
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
        assert_eq!(hex(&keys.mac1), "4fb2527ac956001553dc1ad9b55171b7d9daa3de1cdbcd71451830170c7e6cac");
        assert_eq!(hex(&mac(&keys.mac1, &[&[0; 116]])), "4f7c082c2cb05f95395d48389019ca53");
        assert_eq!(hex(&keys.mac1_aes), "02b2916139c9a652f6c19cb08a0cee1e6d5808a68f14be222a20926598b610ec");
        assert_eq!(hex(&mac(&keys.mac1_aes, &[&[0; 116]])), "9e51371bbab94c92955b4a8dcac5ef36");
    }

    #[test]
    fn each_kind_of_handshake_has_its_own_mac1() {
        let own = PublicKey::from_bytes([5; 32]);
        let [plain, both] = [false, true].map(|accepts_aes| Guard::new(&own, 1, accepts_aes, at(0)));
        let mut message = [7; 148];
        for (cipher, at_plain) in [(PLAIN, Some(PLAIN)), (Cipher::Aes256Gcm, None)] {
            CookieJar::new(&own).put_macs(&mut message, cipher, at(0));
            assert_eq!((plain.verify_mac1(&message), both.verify_mac1(&message)), (at_plain, Some(cipher)));
        }
        CookieJar::new(&PublicKey::from_bytes([6; 32])).put_macs(&mut message, PLAIN, at(0));
        assert_eq!(both.verify_mac1(&message), None, "meant for another");
    }

    #[test]
    fn cookies_open_the_door_for_their_source_only_and_expire() {
        let own = PublicKey::from_bytes([5; 32]);
        let mut rng = StdRng::seed_from_u64(1);
        let mut guard = Guard::new(&own, 1, false, at(0));
        let mut jar = CookieJar::new(&own);
        let source = "192.0.2.1:1000".parse().unwrap();
        let elsewhere = "192.0.2.1:1001".parse().unwrap();
        let mut message = [1; 148];
        jar.put_macs(&mut message, PLAIN, at(0));
        assert_eq!(guard.verify_mac1(&message), Some(PLAIN));
        assert_eq!(guard.admit(&message, source, &mut rng, at(0)), Verdict::Pass);
        assert_eq!(guard.admit(&message, source, &mut rng, at(0)), Verdict::DemandCookie);
        let reply = guard.reply(&message, 7, source, &mut rng, at(0)).unwrap();
        let Some(Message::CookieReply(reply)) = Message::parse(&reply) else { panic!() };
        let mut other = CookieJar::new(&own);
        assert!(!other.receive(reply, at(0)), "never sent anything");
        assert!(jar.receive(reply, at(0)));
        assert!(!jar.receive(reply, at(0)), "only once");
        jar.put_macs(&mut message, PLAIN, at(0));
        assert_eq!(guard.admit(&message, elsewhere, &mut rng, at(0)), Verdict::DemandCookie);
        for _ in 0..SOURCE_BURST {
            assert_eq!(guard.admit(&message, source, &mut rng, at(0)), Verdict::Pass);
        }
        assert_eq!(guard.admit(&message, source, &mut rng, at(0)), Verdict::RateLimited);
        // A new secret makes old cookies worthless, and the jar stops using them in time.
        assert_eq!(guard.admit(&message, source, &mut rng, at(121)), Verdict::Pass, "calm again");
        assert_eq!(guard.admit(&message, source, &mut rng, at(121)), Verdict::DemandCookie);
        let mut late = [1; 148];
        jar.put_macs(&mut late, PLAIN, at(116));
        assert_eq!(late[132..], [0; 16]);
    }

    #[test]
    fn sources_are_bounded() {
        let mut guard = Guard::new(&PublicKey::from_bytes([5; 32]), 1, false, at(0));
        for n in 0..SOURCES as u32 {
            assert!(guard.take_from_source(IpAddr::V4(n.into()), at(0)));
        }
        assert!(!guard.take_from_source("255.0.0.1".parse().unwrap(), at(0)));
        assert!(guard.take_from_source("0.0.0.1".parse().unwrap(), at(0)), "a known source goes on");
        assert!(guard.take_from_source("255.0.0.1".parse().unwrap(), at(2)), "old ones were swept");
        assert!(guard.sources.len() <= SOURCES);
        let v6: Vec<IpAddr> = (0..9u128).map(|n| IpAddr::V6((0x2001_0db8_u128 << 96 | n).into())).collect();
        assert_eq!(v6.iter().filter(|ip| guard.take_from_source(**ip, at(2))).count(), SOURCE_BURST as usize);
    }
}
