//! The handshake, `Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s`, through `snow` (the paper, §5.4). Ephemeral keys come from
//! the core's own generator, and X25519 refuses results that are all zero, as other WireGuard implementations do.

use snow::{
    Builder, HandshakeState,
    params::{CipherChoice, DHChoice, HashChoice, NoiseParams},
    resolvers::{CryptoResolver, DefaultResolver},
    types::{Cipher, Dh, Hash, Random},
};
use x25519_dalek::StaticSecret;
use zeroize::Zeroizing;

use crate::{
    cipher,
    key::{KEY_LEN, PresharedKey, PrivateKey, PublicKey},
    message::{NOISE_INITIATION_LEN, NOISE_RESPONSE_LEN},
    tai64n::Tai64n,
};

const PATTERN: &str = "Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";
/// Place of the preshared key in the pattern.
const PSK: usize = 2;

/// The handshake failed: the message is not authentic, or a key in it is degenerate. Nothing more is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a handshake message is not authentic")]
pub(crate) struct HandshakeError;

impl From<snow::Error> for HandshakeError {
    fn from(_: snow::Error) -> Self {
        Self
    }
}

/// 32 octets for one ephemeral key, drawn by the core.
pub(crate) type EphemeralSeed = Zeroizing<[u8; KEY_LEN]>;

/// This device: its key pair.
pub(crate) struct Identity {
    private: PrivateKey,
    pub(crate) public: PublicKey,
}

/// The keys of a session, seen from one side.
pub(crate) struct TransportKeys {
    pub(crate) sending: Zeroizing<[u8; KEY_LEN]>,
    pub(crate) receiving: Zeroizing<[u8; KEY_LEN]>,
}

/// An initiation that was sent and waits for its response.
pub(crate) struct SentInitiation {
    state: HandshakeState,
    cipher: cipher::Cipher,
}

/// An initiation that was received and is authentic.
pub(crate) struct ReceivedInitiation {
    state: HandshakeState,
    pub(crate) cipher: cipher::Cipher,
    pub(crate) remote: PublicKey,
    pub(crate) timestamp: Tai64n,
}

impl Identity {
    pub(crate) fn new(private: PrivateKey) -> Self {
        Self { public: private.public_key(), private }
    }

    fn builder(&self, ephemeral: EphemeralSeed) -> Result<Builder<'_>, HandshakeError> {
        let pattern: NoiseParams = PATTERN.parse()?;
        Ok(Builder::with_resolver(pattern, Box::new(Resolver { ephemeral, public: self.public })))
    }

    /// Starts a handshake with `remote`.
    pub(crate) fn initiate(
        &self,
        remote: &PublicKey,
        psk: &PresharedKey,
        timestamp: Tai64n,
        cipher: cipher::Cipher,
        ephemeral: EphemeralSeed,
    ) -> Result<(SentInitiation, [u8; NOISE_INITIATION_LEN]), HandshakeError> {
        let mut state = self
            .builder(ephemeral)?
            .local_private_key(self.private.as_bytes())?
            .remote_public_key(remote.as_bytes())?
            .prologue(cipher.prologue())?
            .psk(PSK as u8, psk.as_bytes())?
            .build_initiator()?;
        let mut noise = [0; NOISE_INITIATION_LEN];
        let len = state.write_message(&timestamp.0, &mut noise)?;
        if len != noise.len() {
            return Err(HandshakeError);
        }
        Ok((SentInitiation { state, cipher }, noise))
    }

    /// Reads an initiation: who sent it, and when it was made. Costs two X25519 operations.
    pub(crate) fn receive(
        &self,
        noise: &[u8],
        cipher: cipher::Cipher,
        ephemeral: EphemeralSeed,
    ) -> Result<ReceivedInitiation, HandshakeError> {
        let mut state = self
            .builder(ephemeral)?
            .local_private_key(self.private.as_bytes())?
            .prologue(cipher.prologue())?
            .build_responder()?;
        let mut timestamp = [0; 12];
        let len = state.read_message(noise, &mut timestamp)?;
        let remote = state.get_remote_static().and_then(|key| PublicKey::try_from(key).ok());
        match remote {
            Some(remote) if len == timestamp.len() => {
                Ok(ReceivedInitiation { state, cipher, remote, timestamp: Tai64n(timestamp) })
            }
            _ => Err(HandshakeError),
        }
    }
}

impl ReceivedInitiation {
    /// Answers: the Noise part of the response and the keys of the session.
    pub(crate) fn respond(
        mut self,
        psk: &PresharedKey,
    ) -> Result<(TransportKeys, [u8; NOISE_RESPONSE_LEN]), HandshakeError> {
        self.state.set_psk(PSK, psk.as_bytes())?;
        let mut noise = [0; NOISE_RESPONSE_LEN];
        let len = self.state.write_message(&[], &mut noise)?;
        if len != noise.len() {
            return Err(HandshakeError);
        }
        Ok((split(&mut self.state, self.cipher), noise))
    }
}

impl SentInitiation {
    /// Reads the response. After a failure the initiation still waits for the right one.
    pub(crate) fn complete(&mut self, noise: &[u8]) -> Result<TransportKeys, HandshakeError> {
        self.state.read_message(noise, &mut [])?;
        Ok(split(&mut self.state, self.cipher))
    }
}

fn split(state: &mut HandshakeState, cipher: cipher::Cipher) -> TransportKeys {
    let (from_initiator, from_responder) = state.dangerously_get_raw_split();
    let [from_initiator, from_responder] =
        [from_initiator, from_responder].map(|key| cipher.transport_key(Zeroizing::new(key)));
    if state.is_initiator() {
        TransportKeys { sending: from_initiator, receiving: from_responder }
    } else {
        TransportKeys { sending: from_responder, receiving: from_initiator }
    }
}

/// Gives snow our randomness and our X25519, and its own ciphers and hashes.
struct Resolver {
    ephemeral: EphemeralSeed,
    public: PublicKey,
}

impl CryptoResolver for Resolver {
    fn resolve_rng(&self) -> Option<Box<dyn Random>> {
        Some(Box::new(OneKey(Some(self.ephemeral.clone()))))
    }

    fn resolve_dh(&self, choice: &DHChoice) -> Option<Box<dyn Dh>> {
        matches!(choice, DHChoice::Curve25519)
            .then(|| Box::new(X25519 { secret: StaticSecret::from([0; KEY_LEN]), public: self.public }) as _)
    }

    fn resolve_hash(&self, choice: &HashChoice) -> Option<Box<dyn Hash>> {
        DefaultResolver.resolve_hash(choice)
    }

    fn resolve_cipher(&self, choice: &CipherChoice) -> Option<Box<dyn Cipher>> {
        DefaultResolver.resolve_cipher(choice)
    }
}

/// Yields the ephemeral key once.
struct OneKey(Option<EphemeralSeed>);

impl Random for OneKey {
    fn try_fill_bytes(&mut self, dest: &mut [u8]) -> Result<(), snow::Error> {
        let seed = self.0.take().ok_or(snow::Error::Rng)?;
        if dest.len() != seed.len() {
            return Err(snow::Error::Rng);
        }
        dest.copy_from_slice(&*seed);
        Ok(())
    }
}

/// X25519 with a check of the result. `set` is called for the static key alone, whose public half is known already,
/// which saves a multiplication for every handshake.
struct X25519 {
    secret: StaticSecret,
    public: PublicKey,
}

impl Dh for X25519 {
    fn name(&self) -> &'static str {
        "25519"
    }

    fn pub_len(&self) -> usize {
        KEY_LEN
    }

    fn priv_len(&self) -> usize {
        KEY_LEN
    }

    fn set(&mut self, private: &[u8]) {
        if let Ok(private) = <[u8; KEY_LEN]>::try_from(private) {
            self.secret = StaticSecret::from(private);
        }
    }

    fn generate(&mut self, rng: &mut dyn Random) -> Result<(), snow::Error> {
        let mut seed = Zeroizing::new([0; KEY_LEN]);
        rng.try_fill_bytes(&mut *seed)?;
        self.secret = StaticSecret::from(*seed);
        self.public = PublicKey::from_bytes(x25519_dalek::PublicKey::from(&self.secret).to_bytes());
        Ok(())
    }

    fn pubkey(&self) -> &[u8] {
        self.public.as_bytes()
    }

    fn privkey(&self) -> &[u8] {
        self.secret.as_bytes()
    }

    fn dh(&self, public: &[u8], out: &mut [u8]) -> Result<(), snow::Error> {
        let public = public.first_chunk::<KEY_LEN>().ok_or(snow::Error::Dh)?;
        let shared = self.secret.diffie_hellman(&x25519_dalek::PublicKey::from(*public));
        if !shared.was_contributory() {
            return Err(snow::Error::Dh);
        }
        out.first_chunk_mut::<KEY_LEN>().ok_or(snow::Error::Dh)?.copy_from_slice(shared.as_bytes());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: cipher::Cipher = cipher::Cipher::ChaCha20Poly1305;

    fn identity(n: u8) -> Identity {
        Identity::new(PrivateKey::from_bytes([n; 32]))
    }

    fn seed(n: u8) -> EphemeralSeed {
        Zeroizing::new([n; 32])
    }

    #[test]
    fn both_sides_agree_and_the_preshared_key_counts() {
        let (alice, bob) = (identity(1), identity(2));
        let psk = PresharedKey::from_bytes([3; 32]);
        let label = Tai64n([4; 12]);
        let (mut sent, noise) = alice.initiate(&bob.public, &psk, label, PLAIN, seed(5)).unwrap();
        let received = bob.receive(&noise, PLAIN, seed(6)).unwrap();
        assert_eq!((received.remote, received.timestamp), (alice.public, label));
        let (bobs, response) = received.respond(&psk).unwrap();
        let (_, wrong) =
            bob.receive(&noise, PLAIN, seed(7)).unwrap().respond(&PresharedKey::default()).unwrap();
        assert!(sent.complete(&wrong).is_err());
        assert!(sent.complete(&[0; NOISE_RESPONSE_LEN]).is_err(), "an all-zero key is refused");
        let alices = sent.complete(&response).unwrap();
        assert_eq!((&*alices.sending, &*alices.receiving), (&*bobs.receiving, &*bobs.sending));
        assert_ne!(alices.sending, alices.receiving);
    }

    /// With the same keys and the same randomness, nothing of one kind of handshake serves in the other.
    #[test]
    fn the_kinds_have_nothing_in_common() {
        let (alice, bob) = (identity(1), identity(2));
        let psk = PresharedKey::from_bytes([3; 32]);
        let kinds = [PLAIN, cipher::Cipher::Aes256Gcm];
        let [(mut plain, plain_noise), (mut aes, aes_noise)] =
            kinds.map(|kind| alice.initiate(&bob.public, &psk, Tai64n([4; 12]), kind, seed(5)).unwrap());
        assert!(bob.receive(&plain_noise, kinds[1], seed(6)).is_err());
        assert!(bob.receive(&aes_noise, kinds[0], seed(6)).is_err());
        let respond = |noise: &[u8], kind| bob.receive(noise, kind, seed(6)).unwrap().respond(&psk).unwrap();
        let (plain_keys, plain_response) = respond(&plain_noise, kinds[0]);
        let (aes_keys, aes_response) = respond(&aes_noise, kinds[1]);
        assert!(plain.complete(&aes_response).is_err());
        assert!(aes.complete(&plain_response).is_err());
        assert_ne!(plain_keys.sending, aes_keys.sending);
        assert_ne!(plain_keys.receiving, aes_keys.receiving);
        assert_eq!(aes.complete(&aes_response).unwrap().sending, aes_keys.receiving);
    }

    #[test]
    fn changed_messages_are_refused() {
        let (alice, bob) = (identity(1), identity(2));
        let psk = PresharedKey::default();
        let (_, noise) = alice.initiate(&bob.public, &psk, Tai64n([4; 12]), PLAIN, seed(5)).unwrap();
        for at in [0, 31, 32, 79, 80, NOISE_INITIATION_LEN - 1] {
            let mut changed = noise;
            changed[at] ^= 1;
            assert!(bob.receive(&changed, PLAIN, seed(6)).is_err(), "octet {at}");
        }
        assert!(identity(3).receive(&noise, PLAIN, seed(6)).is_err(), "meant for another");
        let other = cipher::Cipher::Aes256Gcm;
        assert!(bob.receive(&noise, other, seed(6)).is_err(), "of the other kind");
    }
}
