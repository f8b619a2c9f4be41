//! Names: DNS labels, device names and network domains, checked once at the edge and carried as types.
//! Stored in lower case, since DNS compares without case (RFC 4343).

use std::{borrow::Borrow, fmt, str::FromStr};

/// Device labels that have a meaning of their own under a network's domain (design §7).
pub const RESERVED: [&str; 7] = ["svc", "pod", "dns", "dns-version", "ns", "private", "director"];

/// Longest domain: leaves room for the longest name below it within DNS's 253 characters.
pub const DOMAIN_MAX: usize = 120;

/// Why a text is not a name.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NameError {
    /// Not a DNS label.
    #[error(
        "{0:?} is not a valid name: use 1 to 63 letters, digits and dashes, with a letter or digit at both ends"
    )]
    Label(String),
    /// A label with a meaning of its own.
    #[error("{0:?} is a reserved name: Muster's DNS uses it itself; choose another")]
    Reserved(String),
    /// Not a domain.
    #[error(
        "{0:?} is not a valid domain: use at least two DNS labels, such as net.example, and at most {DOMAIN_MAX} characters"
    )]
    Domain(String),
}

/// A DNS label of letters, digits and dashes (RFC 1123, 2.1), in lower case.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Label(Box<str>);

impl Label {
    /// The label's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Checks that the label may name a device.
    pub fn for_device(self) -> Result<Self, NameError> {
        if RESERVED.contains(&self.as_str()) { Err(NameError::Reserved(self.0.into())) } else { Ok(self) }
    }
}

impl FromStr for Label {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let bytes = text.as_bytes();
        let ends = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
        let valid = bytes.len() <= 63
            && ends(bytes.first())
            && ends(bytes.last())
            && bytes.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'-');
        if valid {
            Ok(Self(text.to_ascii_lowercase().into()))
        } else {
            Err(NameError::Label(text.chars().take(80).collect()))
        }
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl Borrow<str> for Label {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// The domain that defines a network: two labels or more, lower case, no trailing dot.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Domain(Box<str>);

impl Domain {
    /// The domain's text, without a trailing dot.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What stands left of this domain in `name` (with or without a trailing dot, any case): empty for the
    /// domain itself, `None` for a name outside it.
    pub fn relative<'a>(&self, name: &'a str) -> Option<&'a str> {
        let name = name.strip_suffix('.').unwrap_or(name);
        let split = name.len().checked_sub(self.0.len())?;
        if !name.get(split..)?.eq_ignore_ascii_case(&self.0) {
            return None;
        }
        let left = name.get(..split)?;
        if left.is_empty() { Some(left) } else { left.strip_suffix('.') }
    }
}

impl FromStr for Domain {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let name = text.strip_suffix('.').unwrap_or(text);
        let labels = name.split('.').map(Label::from_str).collect::<Result<Vec<_>, _>>();
        match labels {
            Ok(labels) if labels.len() >= 2 && name.len() <= DOMAIN_MAX => {
                Ok(Self(name.to_ascii_lowercase().into()))
            }
            _ => Err(NameError::Domain(text.chars().take(300).collect())),
        }
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_checked_and_folded() {
        assert_eq!("Web-1".parse::<Label>().unwrap().as_str(), "web-1");
        let long = "a".repeat(64);
        for bad in ["", "-a", "a-", "a_b", "a.b", "ä", " a", &long] {
            assert!(bad.parse::<Label>().is_err(), "{bad}");
        }
    }

    #[test]
    fn reserved_labels_cannot_name_devices() {
        for name in RESERVED {
            assert!(name.to_uppercase().parse::<Label>().unwrap().for_device().is_err());
        }
        assert!("web".parse::<Label>().unwrap().for_device().is_ok());
    }

    #[test]
    fn names_are_relative_to_their_domain() {
        let domain: Domain = "Net.Example.".parse().unwrap();
        assert_eq!(domain.as_str(), "net.example");
        assert_eq!(domain.relative("web.NET.example."), Some("web"));
        assert_eq!(domain.relative("private.web.net.example"), Some("private.web"));
        assert_eq!(domain.relative("net.example"), Some(""));
        assert_eq!(domain.relative("webnet.example"), None);
        assert_eq!(domain.relative("ä.example"), None);
        assert!("example".parse::<Domain>().is_err());
    }
}
