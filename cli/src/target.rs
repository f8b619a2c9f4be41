//! What a command is about, as kubectl users write it: `devices`, `device web db`, `device/web token/x`,
//! `devices,tokens`. Pure.

use crate::resource::{Kind, known_types};

/// Objects of one kind: the named ones, or, with no names, all that the rest of the command selects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The kind.
    pub kind: Kind,
    /// Names, as written.
    pub names: Vec<String>,
}

/// Reads the words of a command, such as `["device", "web", "db"]`.
pub fn parse(words: &[String]) -> Result<Vec<Target>, String> {
    let Some((first, rest)) = words.split_first() else {
        return Err(format!("say which resource type: {}", known_types()));
    };
    if words.iter().any(|word| word.contains('/')) {
        return pairs(words);
    }
    let kinds = first.split(',').map(str::parse).collect::<Result<Vec<Kind>, _>>()?;
    if kinds.len() > 1 && !rest.is_empty() {
        return Err("names need one resource type; for several, write TYPE/NAME".into());
    }
    if let Some(empty) = rest.iter().find(|name| name.is_empty()) {
        return Err(format!("{empty:?} is not a name"));
    }
    Ok(kinds.into_iter().map(|kind| Target { kind, names: rest.to_vec() }).collect())
}

/// Words of the form `KIND/NAME`, neighbours of one kind together.
fn pairs(words: &[String]) -> Result<Vec<Target>, String> {
    let mut targets: Vec<Target> = Vec::new();
    for word in words {
        let (kind, name) =
            word.split_once('/')
                .filter(|(_, name)| !name.is_empty() && !name.contains('/'))
                .ok_or_else(|| format!("{word:?} is not TYPE/NAME, and the two forms cannot be mixed"))?;
        let kind = kind.parse()?;
        match targets.last_mut() {
            Some(last) if last.kind == kind => last.names.push(name.to_owned()),
            _ => targets.push(Target { kind, names: vec![name.to_owned()] }),
        }
    }
    Ok(targets)
}

/// Splits the words of `label` and `annotate` into what is changed and the changes: the first `k=v` or `k-` ends
/// the names.
pub fn split_changes(words: &[String]) -> (&[String], &[String]) {
    let first = words.iter().skip(1).position(|word| word.contains('=') || word.ends_with('-'));
    words.split_at(first.map_or(words.len(), |position| position + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    fn target(kind: Kind, names: &[&str]) -> Target {
        Target { kind, names: names.iter().map(|n| (*n).to_owned()).collect() }
    }

    #[test]
    fn every_form_is_read() {
        assert_eq!(parse(&words("devices")), Ok(vec![target(Kind::Device, &[])]));
        assert_eq!(parse(&words("dev web db")), Ok(vec![target(Kind::Device, &["web", "db"])]));
        assert_eq!(
            parse(&words("device/web dev/db token/x")),
            Ok(vec![target(Kind::Device, &["web", "db"]), target(Kind::Token, &["x"])])
        );
        assert_eq!(
            parse(&words("devices,tokens")),
            Ok(vec![target(Kind::Device, &[]), target(Kind::Token, &[])])
        );
    }

    #[test]
    fn the_rest_is_refused() {
        for text in
            ["pods", "devices,tokens web", "device/web db", "device/", "device/a/b", "device ", ",", ""]
        {
            assert!(parse(&words(text)).is_err(), "{text:?}");
        }
        assert!(parse(&[]).is_err());
    }

    #[test]
    fn changes_begin_where_names_end() {
        let all = words("devices web db role=web old-");
        let (targets, changes) = split_changes(&all);
        assert_eq!((targets, changes), (&all[..3], &all[3..]));
        assert_eq!(split_changes(&all[..3]).1, &[] as &[String]);
    }
}
