//! Join tokens: `muster.<id>.<secret>`. The store has the SHA-256 of the secret and nothing else of it; whether a
//! token lets somebody in is decided here, without I/O or clock.

use std::{fmt, str::FromStr, time::Duration};

use aws_lc_rs::{constant_time, digest};
use muster_common::{name::Label, time::Timestamp, tls::SpkiHash};
use muster_proto::storage::StoredToken;
use rand::CryptoRng;
use zeroize::Zeroizing;

/// Lifetime of a token whose maker names none.
pub const DEFAULT_TTL: Duration = Duration::from_secs(24 * 60 * 60);

/// RFC 4648's base32 alphabet, in lower case.
pub(crate) const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
/// Characters of an id that nobody chose: 50 bits.
pub(crate) const ID_LENGTH: usize = 10;
/// Characters of a secret: 160 bits.
const SECRET_LENGTH: usize = 32;

/// A token as it is shown, once, to the operator, and given to `muster-agent join`.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    id: Label,
    secret: Zeroizing<String>,
}

/// Why a text is not a join token. The text itself, which may hold a secret, is not repeated.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "this is not a join token: {0}; expected muster.ID.SECRET, exactly as `muster create token` or \
     `muster-registrar init` printed it"
)]
pub struct TokenSyntaxError(&'static str);

/// Why a token lets nobody in.
#[derive(Debug, Clone, Copy, thiserror::Error, PartialEq, Eq)]
pub enum TokenError {
    /// There is no such token, or its secret is another one: strangers do not learn which.
    #[error("the token is not known here; check it, and ask the operator for a new one: muster create token")]
    Unknown,
    /// Its time is over.
    #[error("the token expired at {at}; ask the operator for a new one: muster create token")]
    Expired {
        /// When.
        at: Timestamp,
    },
    /// It is a one-off token, and was used with another key.
    #[error(
        "the token has been used already, and is good for one device; ask the operator for a new one: \
         muster create token"
    )]
    Used,
    /// An operator has revoked it.
    #[error("the token has been revoked; ask the operator for a new one: muster create token")]
    Revoked,
}

/// What a token that is in order entitles to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Admission {
    /// To join as a new device.
    New,
    /// To the certificate of this device again: the same token was used with the same key before, and the
    /// response must have been lost.
    Again {
        /// Uid of the device.
        device_uid: String,
    },
}

impl JoinToken {
    /// A new token with a random id.
    pub fn generate(rng: &mut impl CryptoRng) -> Self {
        // The alphabet has no dash, so that this is a label whatever comes.
        let id = loop {
            if let Ok(id) = random_text(rng, ID_LENGTH).parse() {
                break id;
            }
        };
        Self::with_id(id, rng)
    }

    /// A new token with an id that its maker chose, which is also its name.
    pub fn with_id(id: Label, rng: &mut impl CryptoRng) -> Self {
        Self { id, secret: Zeroizing::new(random_text(rng, SECRET_LENGTH)) }
    }

    /// The token's id: the name of its `Token` object.
    pub fn id(&self) -> &Label {
        &self.id
    }

    /// What the store keeps in place of the secret.
    pub fn secret_hash(&self) -> [u8; 32] {
        sha256(self.secret.as_bytes())
    }
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "muster.{}.{}", self.id, *self.secret)
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinToken(muster.{}.…)", self.id)
    }
}

impl FromStr for JoinToken {
    type Err = TokenSyntaxError;

    fn from_str(text: &str) -> Result<Self, TokenSyntaxError> {
        let mut parts = text.trim().split('.');
        if parts.next() != Some("muster") {
            return Err(TokenSyntaxError("it does not begin with \"muster.\""));
        }
        let (Some(id), Some(secret), None) = (parts.next(), parts.next(), parts.next()) else {
            return Err(TokenSyntaxError("it does not have three parts with dots between"));
        };
        let id = id.parse().map_err(|_| TokenSyntaxError("its id has other characters than it may have"))?;
        if secret.len() != SECRET_LENGTH {
            return Err(TokenSyntaxError("its secret is too short or too long; a part may be missing"));
        }
        if !secret.bytes().all(|byte| ALPHABET.contains(&byte)) {
            return Err(TokenSyntaxError("its secret has other characters than it may have"));
        }
        Ok(Self { id, secret: Zeroizing::new(secret.to_owned()) })
    }
}

/// Decides on `token`, presented by the holder of the key with SPKI hash `key`. `stored` is what the store has
/// under the token's id.
///
/// # Errors
/// See [`TokenError`]. Who does not know the secret gets [`TokenError::Unknown`] whatever is wrong.
pub fn check(
    stored: Option<&StoredToken>,
    token: &JoinToken,
    now: Timestamp,
    key: &SpkiHash,
) -> Result<Admission, TokenError> {
    let stored = stored.ok_or(TokenError::Unknown)?;
    constant_time::verify_slices_are_equal(&token.secret_hash(), &stored.secret_hash)
        .map_err(|_| TokenError::Unknown)?;
    let spec = stored.token.as_ref().and_then(|token| token.spec.as_ref()).ok_or(TokenError::Unknown)?;
    if spec.revoked {
        return Err(TokenError::Revoked);
    }
    if let Some(at) = spec.expires_at.as_ref().map(timestamp)
        && at <= now
    {
        return Err(TokenError::Expired { at });
    }
    if spec.reusable || stored.used_by_device_uid.is_empty() {
        return Ok(Admission::New);
    }
    // The hash of a public key is no secret.
    if stored.used_by_key_hash == key.as_bytes() {
        return Ok(Admission::Again { device_uid: stored.used_by_device_uid.clone() });
    }
    Err(TokenError::Used)
}

pub(crate) fn timestamp(time: &pbjson_types::Timestamp) -> Timestamp {
    let seconds = u64::try_from(time.seconds).unwrap_or(0);
    Timestamp::from_epoch(Duration::new(seconds, u32::try_from(time.nanos).unwrap_or(0).min(999_999_999)))
}

pub(crate) fn sha256(data: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest::digest(&digest::SHA256, data).as_ref());
    hash
}

/// `length` characters with five random bits each.
pub(crate) fn random_text(rng: &mut impl CryptoRng, length: usize) -> String {
    let mut bytes = Zeroizing::new(vec![0; length]);
    rng.fill_bytes(&mut bytes);
    bytes.iter().map(|byte| char::from(ALPHABET[usize::from(byte % 32)])).collect()
}

#[cfg(test)]
mod tests {
    use muster_proto::admin::{Token, TokenSpec};
    use proptest::prelude::*;
    use rand::{SeedableRng, rngs::StdRng};

    use super::*;

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_epoch(Duration::from_secs(seconds))
    }

    fn token(seed: u64) -> JoinToken {
        JoinToken::generate(&mut StdRng::seed_from_u64(seed))
    }

    fn stored(token: &JoinToken, reusable: bool) -> StoredToken {
        StoredToken {
            token: Some(Token {
                spec: Some(TokenSpec {
                    reusable,
                    expires_at: Some(pbjson_types::Timestamp { seconds: 1000, nanos: 0 }),
                    ..TokenSpec::default()
                }),
                ..Token::default()
            }),
            secret_hash: token.secret_hash().to_vec(),
            ..StoredToken::default()
        }
    }

    fn key(name: &str) -> SpkiHash {
        SpkiHash::of_spki(name.as_bytes())
    }

    #[test]
    fn tokens_print_as_they_parse_and_keep_their_secret() {
        let one = token(1);
        let text = one.to_string();
        assert_eq!(text.len(), "muster..".len() + 10 + 32);
        assert_eq!(text.parse::<JoinToken>().unwrap(), one);
        assert_eq!(format!(" {text}\n").parse::<JoinToken>().unwrap(), one);
        assert!(!format!("{one:?}").contains(&text[18..]));
        assert_ne!(token(2), one);
        let named = JoinToken::with_id("web-servers".parse().unwrap(), &mut StdRng::seed_from_u64(1));
        assert_eq!(named.to_string().parse::<JoinToken>().unwrap(), named);
    }

    #[test]
    fn other_texts_are_refused_without_being_repeated() {
        let good = token(1).to_string();
        let (upper, cut, longer) = (good.to_uppercase(), &good[..good.len() - 1], format!("{good}.x"));
        for text in ["", "muster", "muster..", "abc.def", "muster.a.b", &upper, cut, &longer] {
            let error = text.parse::<JoinToken>().unwrap_err().to_string();
            assert!(error.contains("muster create token"), "{error}");
            assert!(text.len() < 20 || !error.contains(&text[20..]), "{error}");
        }
    }

    #[test]
    fn good_tokens_admit() {
        for reusable in [false, true] {
            let token = token(1);
            let stored = stored(&token, reusable);
            assert_eq!(check(Some(&stored), &token, at(999), &key("k")), Ok(Admission::New));
        }
    }

    #[test]
    fn unknown_and_wrong_tokens_look_alike() {
        let (good, other) = (token(1), token(2));
        let mut bad = stored(&good, false);
        if let Some(spec) = bad.token.as_mut().and_then(|t| t.spec.as_mut()) {
            spec.revoked = true;
        }
        assert_eq!(check(None, &good, at(0), &key("k")), Err(TokenError::Unknown));
        assert_eq!(check(Some(&bad), &other, at(2000), &key("k")), Err(TokenError::Unknown));
        assert_eq!(check(Some(&StoredToken::default()), &good, at(0), &key("k")), Err(TokenError::Unknown));
    }

    #[test]
    fn expired_and_revoked_tokens_admit_nobody() {
        let token = token(1);
        let mut stored = stored(&token, true);
        assert_eq!(
            check(Some(&stored), &token, at(1000), &key("k")),
            Err(TokenError::Expired { at: at(1000) })
        );
        if let Some(spec) = stored.token.as_mut().and_then(|t| t.spec.as_mut()) {
            spec.revoked = true;
        }
        assert_eq!(check(Some(&stored), &token, at(0), &key("k")), Err(TokenError::Revoked));
    }

    #[test]
    fn a_one_off_token_is_good_for_one_key() {
        let token = token(1);
        let mut stored = stored(&token, false);
        stored.used_by_device_uid = "d1".into();
        stored.used_by_key_hash = key("k").as_bytes().to_vec();
        let again = Admission::Again { device_uid: "d1".into() };
        assert_eq!(check(Some(&stored), &token, at(0), &key("k")), Ok(again));
        assert_eq!(check(Some(&stored), &token, at(0), &key("other")), Err(TokenError::Used));
    }

    proptest! {
        #[test]
        fn any_text_parses_or_fails(text in "(muster)?[.a-z2-7é-]{0,60}") {
            if let Ok(token) = text.parse::<JoinToken>() {
                prop_assert_eq!(token.to_string(), text.to_lowercase());
            }
        }
    }
}
