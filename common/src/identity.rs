//! Who a party is: the SPIFFE ID in the URI subject alternative name of its certificate (design §3).
//! Authorization looks at this ID and at nothing else.

use std::{fmt, str::FromStr};

use crate::name::Label;

/// The identity of a party, as `spiffe://<trust-domain>/<path>`.
///
/// Devices and directors belong to a network; operators and registrars to the whole deployment.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct SpiffeId {
    /// Names the deployment. Identities of another trust domain are strangers.
    pub trust_domain: String,
    /// Who it is within the deployment.
    pub party: Party,
}

/// The kinds of party, each with its path in the SPIFFE ID.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Party {
    /// `network/<network>/device/<uid>`
    Device {
        /// Name of the device's network.
        network: Label,
        /// Assigned by the registrar, never reused.
        uid: Label,
    },
    /// `network/<network>/director/<uid>`
    Director {
        /// Name of the director's network.
        network: Label,
        /// Assigned by the registrar, never reused.
        uid: Label,
    },
    /// `operator/<name>`
    Operator {
        /// The operator's name.
        name: Label,
    },
    /// `registrar/<uid>`
    Registrar {
        /// Tells registrars of one deployment apart.
        uid: Label,
    },
}

/// Why a text is not a SPIFFE ID of Muster's.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{0:?} is not a Muster identity: expected spiffe://<trust-domain>/network/<network>/device/<uid>, …/network/<network>/director/<uid>, …/operator/<name> or …/registrar/<uid>"
)]
pub struct IdentityError(String);

impl SpiffeId {
    /// The identity of `party` in `trust_domain`.
    pub fn new(trust_domain: impl Into<String>, party: Party) -> Self {
        Self { trust_domain: trust_domain.into(), party }
    }
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device { network, uid } => write!(f, "network/{network}/device/{uid}"),
            Self::Director { network, uid } => write!(f, "network/{network}/director/{uid}"),
            Self::Operator { name } => write!(f, "operator/{name}"),
            Self::Registrar { uid } => write!(f, "registrar/{uid}"),
        }
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/{}", self.trust_domain, self.party)
    }
}

impl FromStr for SpiffeId {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let parse = || {
            let mut parts = text.strip_prefix("spiffe://")?.split('/');
            let trust_domain = parts.next().filter(|d| is_trust_domain(d))?.to_owned();
            let mut label = || parts.next().map(Label::from_str)?.ok();
            let (kind, first) = (label()?, label()?);
            let party = match kind.as_str() {
                "operator" => Party::Operator { name: first },
                "registrar" => Party::Registrar { uid: first },
                "network" => match (label()?.as_str(), label()?) {
                    ("device", uid) => Party::Device { network: first, uid },
                    ("director", uid) => Party::Director { network: first, uid },
                    _ => return None,
                },
                _ => return None,
            };
            parts.next().is_none().then_some(Self { trust_domain, party })
        };
        parse().ok_or_else(|| IdentityError(text.chars().take(300).collect()))
    }
}

/// Lower-case letters, digits, dots, dashes and underscores, at most 255 (SPIFFE ID specification, 2.1).
fn is_trust_domain(text: &str) -> bool {
    (1..=255).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-._".contains(&b))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn identities_round_trip() {
        for text in [
            "spiffe://muster.example/network/net/device/d-1",
            "spiffe://muster.example/network/net/director/r1",
            "spiffe://muster.example/operator/admin",
            "spiffe://muster.example/registrar/0",
        ] {
            assert_eq!(text.parse::<SpiffeId>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn other_texts_are_refused() {
        for text in [
            "",
            "spiffe://",
            "spiffe://x",
            "spiffe:///operator/a",
            "spiffe://x/operator",
            "spiffe://x/operator/",
            "spiffe://x/operator/a/b",
            "spiffe://x/network/n/device",
            "spiffe://x/network/n/device/u/",
            "spiffe://X/operator/a",
            "https://x/operator/a",
            "spiffe://x/operator/a?b",
        ] {
            assert!(text.parse::<SpiffeId>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_parses_prints_as_it_was(text in "spiffe://[a-z.]{1,8}/(network/[a-z]{1,3}/)?[a-z]{1,9}/[a-z0-9/-]{1,9}") {
            if let Ok(id) = text.parse::<SpiffeId>() {
                prop_assert_eq!(id.to_string(), text);
            }
        }
    }
}
