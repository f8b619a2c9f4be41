//! Labels and label selectors, with Kubernetes' syntax and meaning: equality (`a=b`, `a!=b`) and sets
//! (`a in (b,c)`, `a notin (b)`, `a`, `!a`), joined by commas.

use std::{collections::BTreeMap, fmt, str::FromStr};

/// Labels of an object.
pub type Labels = BTreeMap<String, String>;

/// Why labels or a selector were refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LabelError {
    /// Not a label key.
    #[error(
        "{0:?} is not a valid label key: use an optional DNS prefix and '/', then 1 to 63 letters, digits, '-', '_' and '.', with a letter or digit at both ends"
    )]
    Key(String),
    /// Not a label value.
    #[error(
        "{0:?} is not a valid label value: use at most 63 letters, digits, '-', '_' and '.', with a letter or digit at both ends"
    )]
    Value(String),
    /// Not a selector.
    #[error("cannot read label selector at {0:?}: write for example role=web,tier in (a,b),!old")]
    Selector(String),
}

fn is_name(text: &str) -> bool {
    let ends = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = text.as_bytes();
    bytes.len() <= 63
        && ends(bytes.first())
        && ends(bytes.last())
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(b))
}

/// Checks a label key: `[prefix/]name`.
pub fn check_key(key: &str) -> Result<(), LabelError> {
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    let prefix_ok =
        prefix.is_none_or(|p| p.len() <= 253 && p.split('.').all(|l| is_name(l) && !l.contains('_')));
    if prefix_ok && is_name(name) { Ok(()) } else { Err(LabelError::Key(short(key))) }
}

/// Checks a label value; it may be empty.
pub fn check_value(value: &str) -> Result<(), LabelError> {
    if value.is_empty() || is_name(value) { Ok(()) } else { Err(LabelError::Value(short(value))) }
}

/// Checks all keys and values.
pub fn check(labels: &Labels) -> Result<(), LabelError> {
    labels.iter().try_for_each(|(key, value)| check_key(key).and_then(|()| check_value(value)))
}

fn short(text: &str) -> String {
    text.chars().take(80).collect()
}

/// A conjunction of requirements; the empty one selects everything.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Selector(Vec<Requirement>);

#[derive(Clone, PartialEq, Eq, Debug)]
enum Requirement {
    In(String, Vec<String>),
    /// Also met by objects without the key, as in Kubernetes.
    NotIn(String, Vec<String>),
    Exists(String),
    Absent(String),
}

impl Selector {
    /// Whether every requirement holds for `labels`.
    pub fn matches(&self, labels: &Labels) -> bool {
        self.0.iter().all(|requirement| match requirement {
            Requirement::In(key, values) => labels.get(key).is_some_and(|v| values.contains(v)),
            Requirement::NotIn(key, values) => labels.get(key).is_none_or(|v| !values.contains(v)),
            Requirement::Exists(key) => labels.contains_key(key),
            Requirement::Absent(key) => !labels.contains_key(key),
        })
    }

    /// Selects what has all of `labels`.
    pub fn all_of(labels: &Labels) -> Self {
        let has = |(key, value): (&String, &String)| Requirement::In(key.clone(), vec![value.clone()]);
        Self(labels.iter().map(has).collect())
    }

    /// Selects what both select.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.0.extend(other.0);
        self
    }

    /// A key, and values of which everything that is selected has one under it; `None` if no requirement says so.
    pub fn one_of(&self) -> Option<(&str, &[String])> {
        self.0.iter().find_map(|requirement| match requirement {
            Requirement::In(key, values) => Some((&**key, &**values)),
            Requirement::NotIn(..) | Requirement::Exists(_) | Requirement::Absent(_) => None,
        })
    }

    /// Whether the selector selects everything.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromStr for Selector {
    type Err = LabelError;

    fn from_str(text: &str) -> Result<Self, LabelError> {
        let mut requirements = Vec::new();
        for part in split_outside_brackets(text) {
            let part = part.trim();
            if part.is_empty() && text.trim().is_empty() {
                continue;
            }
            requirements.push(Requirement::from_str(part)?);
        }
        Ok(Self(requirements))
    }
}

fn split_outside_brackets(text: &str) -> impl Iterator<Item = &str> {
    let mut depth = 0_u32;
    text.split(move |c| {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        c == ',' && depth == 0
    })
}

impl FromStr for Requirement {
    type Err = LabelError;

    fn from_str(text: &str) -> Result<Self, LabelError> {
        let key = |key: &str| check_key(key.trim()).map(|()| key.trim().to_owned());
        let value = |value: &str| check_value(value.trim()).map(|()| value.trim().to_owned());
        if let Some(absent) = text.strip_prefix('!') {
            return Ok(Self::Absent(key(absent)?));
        }
        if let Some((left, right)) = text.split_once("!=") {
            return Ok(Self::NotIn(key(left)?, vec![value(right)?]));
        }
        if let Some((left, right)) = text.split_once("==").or_else(|| text.split_once('=')) {
            return Ok(Self::In(key(left)?, vec![value(right)?]));
        }
        if let Some((left, right)) = text.split_once('(') {
            let list = right.trim_end().strip_suffix(')').ok_or_else(|| LabelError::Selector(short(text)))?;
            let values = list.split(',').map(value).collect::<Result<Vec<_>, _>>()?;
            let mut words = left.split_whitespace();
            return match (words.next(), words.next(), words.next()) {
                (Some(k), Some("in"), None) => Ok(Self::In(key(k)?, values)),
                (Some(k), Some("notin"), None) => Ok(Self::NotIn(key(k)?, values)),
                _ => Err(LabelError::Selector(short(text))),
            };
        }
        if text.is_empty() {
            return Err(LabelError::Selector(short(text)));
        }
        Ok(Self::Exists(key(text)?))
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, requirement) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            match requirement {
                Requirement::In(key, values) => write!(f, "{key} in ({})", values.join(","))?,
                Requirement::NotIn(key, values) => write!(f, "{key} notin ({})", values.join(","))?,
                Requirement::Exists(key) => f.write_str(key)?,
                Requirement::Absent(key) => write!(f, "!{key}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn selectors_select() {
        let web = labels(&[("role", "web"), ("tier", "a")]);
        for (selector, expected) in [
            ("", true),
            ("role=web", true),
            ("role==web,tier!=b", true),
            ("role=db", false),
            ("tier in (a, b)", true),
            ("tier notin (a,b)", false),
            ("zone notin (x)", true),
            ("role,!old", true),
            ("!role", false),
            ("zone", false),
        ] {
            assert_eq!(selector.parse::<Selector>().unwrap().matches(&web), expected, "{selector}");
        }
    }

    #[test]
    fn bad_selectors_are_refused() {
        for text in [",", "a=b,", "=b", "a in b", "a in (b", "a within (b)", "a b", "-a", "a=b c"] {
            assert!(text.parse::<Selector>().is_err(), "{text}");
        }
    }

    #[test]
    fn labels_are_checked() {
        assert!(check(&labels(&[("example.com/role", "web_1.x"), ("a", "")])).is_ok());
        assert!(check(&labels(&[("a/b/c", "")])).is_err());
        assert!(check(&labels(&[("a", "-")])).is_err());
    }

    proptest! {
        #[test]
        fn any_text_parses_or_fails_and_prints_back(text in "[a-c!=(), in]{0,24}") {
            if let Ok(selector) = text.parse::<Selector>() {
                prop_assert_eq!(selector.to_string().parse::<Selector>().unwrap(), selector);
            }
        }
    }
}
