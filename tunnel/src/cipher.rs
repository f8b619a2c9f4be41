//! What transport data is sealed with: WireGuard's ChaCha20-Poly1305, or between two devices of Muster AES-256-GCM.
//!
//! A handshake is of one kind from its first octet: the prologue that both sides hash and the label of `mac1` differ, so
//! that neither kind can complete as the other, and a device that does not take the second is silent to it as it is to
//! any stranger. Nothing is negotiated on the wire, and no other octet differs.

use std::sync::Arc;

use aws_lc_rs::aead::{AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use blake2::{
    Blake2sMac,
    digest::{FixedOutput as _, KeyInit as _, Update as _, consts::U32},
};
use zeroize::Zeroizing;

use crate::{
    key::KEY_LEN,
    limits::{
        AES_REJECT_AFTER_MESSAGES, AES_REKEY_AFTER_MESSAGES, REJECT_AFTER_MESSAGES, REKEY_AFTER_MESSAGES,
    },
    message::{DATA_HEADER_LEN, DataHeader, TAG_LEN},
    stats::Dropped,
};

/// What the transport data of a session is sealed with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cipher {
    /// WireGuard's own (the paper, §5.4.6), which every peer has.
    #[default]
    ChaCha20Poly1305,
    /// AES-256-GCM (NIST SP 800-38D) with the same framing, counters and nonces. Where processors have instructions
    /// for it, it takes a third of the time.
    Aes256Gcm,
}

impl Cipher {
    /// Mixed into the handshake before anything else.
    pub(crate) fn prologue(self) -> &'static [u8] {
        match self {
            Self::ChaCha20Poly1305 => b"WireGuard v1 zx2c4 Jason@zx2c4.com",
            Self::Aes256Gcm => b"Muster v1 WireGuard with transport data in AES-256-GCM",
        }
    }

    /// Hashed into the key of `mac1`.
    pub(crate) fn mac1_label(self) -> &'static [u8] {
        match self {
            Self::ChaCha20Poly1305 => b"mac1----",
            Self::Aes256Gcm => b"mac1 Muster AES-256-GCM",
        }
    }

    /// The transport key that comes of one of the two which Noise ends in. The prologue is hashed into what the
    /// handshake's messages are authenticated with, but not into these, so that they do not depend on the kind. One more
    /// keyed hash makes sure that no key is ever used with both ciphers, whatever becomes of the randomness.
    pub(crate) fn transport_key(self, noise: Zeroizing<[u8; KEY_LEN]>) -> Zeroizing<[u8; KEY_LEN]> {
        match self {
            Self::ChaCha20Poly1305 => noise,
            Self::Aes256Gcm => {
                let mut state = Blake2sMac::<U32>::new((&*noise).into());
                state.update(self.prologue());
                Zeroizing::new(state.finalize_fixed().into())
            }
        }
    }

    pub(crate) fn algorithm(self) -> &'static Algorithm {
        match self {
            Self::ChaCha20Poly1305 => &CHACHA20_POLY1305,
            Self::Aes256Gcm => &AES_256_GCM,
        }
    }

    /// Messages after which a session is renewed.
    pub(crate) fn rekey_after(self) -> u64 {
        match self {
            Self::ChaCha20Poly1305 => REKEY_AFTER_MESSAGES,
            Self::Aes256Gcm => AES_REKEY_AFTER_MESSAGES,
        }
    }

    /// Messages after which a session must not be used any more.
    pub(crate) fn reject_after(self) -> u64 {
        match self {
            Self::ChaCha20Poly1305 => REJECT_AFTER_MESSAGES,
            Self::Aes256Gcm => AES_REJECT_AFTER_MESSAGES,
        }
    }
}

/// The key of one direction of a session. It is shared with those who seal or open apart from the tunnel, and wiped when
/// the last of them is done.
#[derive(Clone)]
pub(crate) struct TransportKey(Arc<LessSafeKey>);

fn nonce(counter: u64) -> Nonce {
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

impl TransportKey {
    /// `None` if the cipher refuses the key, which it does not for 32 octets.
    pub(crate) fn new(cipher: Cipher, octets: &[u8; KEY_LEN]) -> Option<Self> {
        let key = UnboundKey::new(cipher.algorithm(), octets).ok()?;
        Some(Self(Arc::new(LessSafeKey::new(key))))
    }

    /// Seals a message into `slot`, which is [`OVERHEAD`](crate::OVERHEAD) longer than the padded packet that `write`
    /// puts into it. The header's counter must never have been used with this key.
    #[inline]
    pub(crate) fn seal(
        &self,
        header: DataHeader,
        slot: &mut [u8],
        write: impl FnOnce(&mut [u8]),
    ) -> Result<(), Dropped> {
        let (start, rest) = slot.split_first_chunk_mut::<DATA_HEADER_LEN>().ok_or(Dropped::SealFailed)?;
        let (packet, tag) = rest.split_last_chunk_mut::<TAG_LEN>().ok_or(Dropped::SealFailed)?;
        *start = header.build();
        write(packet);
        let sealed = self.0.seal_in_place_separate_tag(nonce(header.counter), Aad::empty(), packet);
        tag.copy_from_slice(sealed.map_err(|_| Dropped::SealFailed)?.as_ref());
        Ok(())
    }

    /// Opens a message in place, and tells whether it is authentic.
    #[inline]
    pub(crate) fn open(&self, counter: u64, datagram: &mut [u8]) -> bool {
        datagram
            .get_mut(DATA_HEADER_LEN..)
            .is_some_and(|sealed| self.0.open_in_place(nonce(counter), Aad::empty(), sealed).is_ok())
    }

    /// Whether this is the very same key, of the same session.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}
