//! Invitations of further registrars: `ID.SECRET`. The store has what they hand over sealed, and the hash of a proof,
//! and neither yields the secret. Whether somebody gets it is decided here, without I/O or clock.

pub mod bundle;

use std::{fmt, str::FromStr};

use aws_lc_rs::constant_time;
use muster_common::{name::Label, time::Timestamp};
use muster_proto::storage::StoredInvitation;
use rand::CryptoRng;
use zeroize::Zeroizing;

use crate::{
    seal::{self, SealError},
    token::{ALPHABET, ID_LENGTH, random_text, sha256, timestamp},
};

/// Characters of a secret: 260 bits.
const SECRET_LENGTH: usize = 52;
/// Octets of a proof, and of a nonce.
pub const PROOF: usize = 32;

/// An invitation's token as it is shown, once, and given to `muster-registrar join`.
#[derive(Clone, PartialEq, Eq)]
pub struct InvitationToken {
    id: Label,
    secret: Zeroizing<String>,
}

/// Why a text is not an invitation's token. The text itself, which may hold a secret, is not repeated.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "this is not the token of an invitation: {0}; expected ID.SECRET, exactly as `muster-registrar invite` printed it"
)]
pub struct InvitationSyntaxError(&'static str);

/// Why an invitation is refused.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum InvitationError {
    /// There is none, its time is over, or the secret is another one: strangers do not learn which.
    #[error(
        "the invitation is not known here, or its time is over; make another on a registrar's host: \
         muster-registrar invite"
    )]
    Unknown,
    /// Another host has fetched it.
    #[error(
        "another host has used the invitation, and it is good for one; make another on a registrar's host \
         (muster-registrar invite), and if you do not know that other host, give etcd new credentials on all registrars, \
         and then replace the CA's root: it has both"
    )]
    Used,
}

/// What an invitation that is in order entitles to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fetch {
    /// To be bound to the caller's nonce, and fetched.
    First,
    /// To be fetched again: the answer must have been lost.
    Again,
}

impl InvitationToken {
    /// A new token.
    pub fn generate(rng: &mut impl CryptoRng) -> Self {
        // The alphabet has no dash, so that this is a label whatever comes.
        let id = loop {
            if let Ok(id) = random_text(rng, ID_LENGTH).parse() {
                break id;
            }
        };
        Self { id, secret: Zeroizing::new(random_text(rng, SECRET_LENGTH)) }
    }

    /// Under which the store has the invitation.
    pub fn id(&self) -> &Label {
        &self.id
    }

    /// What shows the registrar that the caller knows the secret.
    ///
    /// # Errors
    /// As [`seal::derive`].
    pub fn proof(&self) -> Result<Zeroizing<[u8; PROOF]>, SealError> {
        self.derive("muster invitation proof v1")
    }

    /// The key that the bundle is sealed with.
    fn bundle_key(&self) -> Result<Zeroizing<[u8; 32]>, SealError> {
        self.derive("muster invitation bundle v1")
    }

    fn derive(&self, purpose: &str) -> Result<Zeroizing<[u8; 32]>, SealError> {
        seal::derive(self.secret.as_bytes(), purpose, &[self.id.as_str().as_bytes()])
    }
}

impl fmt::Display for InvitationToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.id, *self.secret)
    }
}

impl fmt::Debug for InvitationToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "InvitationToken({}.…)", self.id)
    }
}

impl FromStr for InvitationToken {
    type Err = InvitationSyntaxError;

    fn from_str(text: &str) -> Result<Self, InvitationSyntaxError> {
        let text = text.trim();
        if text.starts_with("muster.") {
            return Err(InvitationSyntaxError("it is one for a device or a director"));
        }
        let (id, secret) = text
            .split_once('.')
            .ok_or(InvitationSyntaxError("it does not have two parts with a dot between"))?;
        let id =
            id.parse().map_err(|_| InvitationSyntaxError("its id has other characters than it may have"))?;
        if secret.len() != SECRET_LENGTH {
            return Err(InvitationSyntaxError("its secret is too short or too long; a part may be missing"));
        }
        if !secret.bytes().all(|byte| ALPHABET.contains(&byte)) {
            return Err(InvitationSyntaxError("its secret has other characters than it may have"));
        }
        Ok(Self { id, secret: Zeroizing::new(secret.to_owned()) })
    }
}

/// What the store keeps in place of a proof or a nonce.
pub fn hash(octets: &[u8]) -> [u8; 32] {
    sha256(octets)
}

/// Decides on a caller that shows `proof` and has a nonce with `nonce_hash`. `stored` is what the store has under the
/// invitation's id.
///
/// # Errors
/// See [`InvitationError`]. Who does not know the secret gets [`InvitationError::Unknown`] whatever is wrong.
pub fn check(
    stored: Option<&StoredInvitation>,
    proof: &[u8],
    nonce_hash: &[u8; 32],
    now: Timestamp,
) -> Result<Fetch, InvitationError> {
    let stored = stored.ok_or(InvitationError::Unknown)?;
    constant_time::verify_slices_are_equal(&hash(proof), &stored.proof_hash)
        .map_err(|_| InvitationError::Unknown)?;
    if is_over(stored, now) {
        return Err(InvitationError::Unknown);
    }
    match &stored.nonce_hash[..] {
        [] => Ok(Fetch::First),
        bound => constant_time::verify_slices_are_equal(bound, nonce_hash)
            .map(|()| Fetch::Again)
            .map_err(|_| InvitationError::Used),
    }
}

/// Whether an invitation's time is over.
pub fn is_over(stored: &StoredInvitation, now: Timestamp) -> bool {
    stored.expires_at.as_ref().is_none_or(|at| timestamp(at) <= now)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;
    use rand::{SeedableRng, rngs::StdRng};

    use super::*;

    fn token(seed: u64) -> InvitationToken {
        InvitationToken::generate(&mut StdRng::seed_from_u64(seed))
    }

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_epoch(Duration::from_secs(seconds))
    }

    fn stored(token: &InvitationToken) -> StoredInvitation {
        StoredInvitation {
            proof_hash: hash(&token.proof().unwrap()[..]).to_vec(),
            expires_at: Some(pbjson_types::Timestamp { seconds: 1000, nanos: 0 }),
            ..StoredInvitation::default()
        }
    }

    #[test]
    fn tokens_are_read_as_they_are_shown_and_do_not_leak() {
        let token = token(1);
        assert_eq!(token.to_string().parse::<InvitationToken>().unwrap(), token);
        let shown = format!("{token:?}");
        assert!(!shown.contains(&*token.secret) && shown.contains(token.id().as_str()), "{shown}");
        let text = token.to_string();
        let upper = text.to_uppercase();
        for bad in ["", "a", ".", "muster.a.b", &text[..text.len() - 1], &upper, &format!("{text}.x")] {
            let error = bad.parse::<InvitationToken>().unwrap_err().to_string();
            assert!(error.contains("muster-registrar invite") && !error.contains(&*token.secret), "{error}");
        }
    }

    #[test]
    fn proof_and_key_say_nothing_of_each_other_and_belong_to_the_id() {
        let token = token(1);
        assert_ne!(token.proof().unwrap(), token.bundle_key().unwrap());
        let renamed = InvitationToken { id: "other".parse().unwrap(), secret: token.secret.clone() };
        assert_ne!(token.proof().unwrap(), renamed.proof().unwrap());
    }

    #[test]
    fn one_caller_gets_it_any_number_of_times_and_others_never() {
        let token = token(1);
        let proof = token.proof().unwrap();
        let mut invitation = stored(&token);
        let check =
            |stored: &StoredInvitation, nonce: u8| check(Some(stored), &proof[..], &[nonce; 32], at(999));
        assert_eq!(check(&invitation, 1), Ok(Fetch::First));
        invitation.nonce_hash = vec![1; 32];
        assert_eq!(check(&invitation, 1), Ok(Fetch::Again));
        assert_eq!(check(&invitation, 2), Err(InvitationError::Used));
    }

    #[test]
    fn strangers_do_not_learn_what_is_wrong() {
        let (known, other) = (token(1), token(2));
        let (proof, wrong) = (known.proof().unwrap(), other.proof().unwrap());
        let mut invitation = stored(&known);
        let unknown = Err(InvitationError::Unknown);
        assert_eq!(check(None, &proof[..], &[1; 32], at(0)), unknown);
        assert_eq!(check(Some(&invitation), &wrong[..], &[1; 32], at(0)), unknown);
        assert_eq!(check(Some(&invitation), &[], &[1; 32], at(0)), unknown);
        assert_eq!(check(Some(&invitation), &proof[..], &[1; 32], at(1000)), unknown);
        assert_eq!(check(Some(&StoredInvitation::default()), &proof[..], &[1; 32], at(0)), unknown);
        invitation.nonce_hash = vec![1; 32];
        assert_eq!(check(Some(&invitation), &wrong[..], &[1; 32], at(0)), unknown);
    }

    proptest! {
        #[test]
        fn any_text_parses_or_fails(text in "[.a-z2-7é-]{0,70}") {
            if let Ok(token) = text.parse::<InvitationToken>() {
                prop_assert_eq!(token.to_string(), text);
            }
        }
    }
}
