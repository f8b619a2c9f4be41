//! What transport data is sealed with: WireGuard's ChaCha20-Poly1305, or between two devices of Muster AES-256-GCM.
//!
//! A handshake is of one kind from its first octet: the prologue that both sides hash and the label of `mac1` differ, so
//! that neither kind can complete as the other, and a device that does not take the second is silent to it as it is to
//! any stranger. Nothing is negotiated on the wire, and no other octet differs.

use aws_lc_rs::aead::{AES_256_GCM, Algorithm, CHACHA20_POLY1305};
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
