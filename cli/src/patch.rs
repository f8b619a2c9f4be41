//! How `apply`, `label` and `annotate` change an object, and which fields that touches. Pure.

use std::collections::BTreeMap;

use muster_common::labels::{self, Labels};
use muster_proto::admin::ObjectMeta;
use serde_json::{Map, Value};

use crate::{
    manifest::{Manifest, ManifestError},
    resource::Resource,
};

/// `current` with everything that `manifest` says, and the paths of the fields that this changes, none if the
/// object is as the manifest wants it. Labels and annotations are added to those that are there.
pub fn merge<R: Resource>(current: &R, manifest: &Manifest) -> Result<(R, Vec<String>), ManifestError> {
    let wanted: R = manifest.object()?;
    let (now, then) = (current.metadata().cloned().unwrap_or_default(), wanted.metadata().cloned());
    let then = then.unwrap_or_default();
    if R::KIND.names().namespaced && !then.namespace.is_empty() && then.namespace != now.namespace {
        let reason =
            format!("{} is in {:?}, which cannot be changed", current.qualified_name(), now.namespace);
        return Err(manifest.error("metadata.namespace", reason));
    }

    let mut object = current.clone();
    let mut mask = Vec::new();
    let meta = object.metadata_mut();
    if extend(&mut meta.labels, then.labels.clone()) {
        mask.push("metadata.labels".to_owned());
    }
    if extend(&mut meta.annotations, then.annotations.clone()) {
        mask.push("metadata.annotations".to_owned());
    }
    // The change depends on the revision in the manifest, else on the one just seen.
    if is_pinned(&then, &now) {
        meta.resource_version = then.resource_version;
    }

    let json = |object: &R| {
        serde_json::to_value(object).map_err(|e| manifest.error(R::KIND.names().kind, e.to_string()))
    };
    let mut changed = json(&object)?;
    // Objects are compared with their defaults filled in, as one may have been written with them.
    let (mut full_object, mut full_wanted) = (object, wanted);
    full_object.fill_defaults();
    full_wanted.fill_defaults();
    let (current, wanted) = (json(&full_object)?, json(&full_wanted)?);
    for path in manifest.written() {
        let pointer = format!("/{}", path.replace('.', "/"));
        let (now, then) = (current.pointer(&pointer), wanted.pointer(&pointer));
        // What the mapping leaves out has its default value.
        if now == then {
            continue;
        }
        if R::FIXED.contains(&path.as_str()) {
            match (now, then) {
                // Left to the registrar, which has chosen.
                (_, None) => continue,
                (Some(now), _) => {
                    let reason = format!(
                        "is {now} and cannot be changed; leave it out, or delete the {} first",
                        R::KIND.names().singular
                    );
                    return Err(manifest.error(&path, reason));
                }
                (None, _) => {}
            }
        }
        let (parent, key) = path.split_once('.').map_or(("", path.as_str()), |(section, key)| (section, key));
        let parent = match (parent, &mut changed) {
            ("", Value::Object(map)) => Some(map),
            (section, Value::Object(map)) => {
                map.entry(section).or_insert_with(|| Value::Object(Map::new())).as_object_mut()
            }
            _ => None,
        };
        if let Some(parent) = parent {
            match then {
                Some(value) => parent.insert(key.to_owned(), value.clone()),
                None => parent.remove(key),
            };
        }
        mask.push(snake_case(&path));
    }
    let object =
        serde_json::from_value(changed).map_err(|e| manifest.error(R::KIND.names().kind, e.to_string()))?;
    Ok((object, mask))
}

/// Whether a manifest with metadata `then` is about one revision of the object that has `now`. The revision of another
/// object, such as the one in Kubernetes that the manifest was copied from, says nothing.
pub fn is_pinned(then: &ObjectMeta, now: &ObjectMeta) -> bool {
    then.resource_version > 0 && (then.uid.is_empty() || then.uid == now.uid)
}

/// Adds `more` to `map`; true if that changes it.
fn extend(map: &mut Labels, more: Labels) -> bool {
    let changes = more.iter().any(|(key, value)| map.get(key) != Some(value));
    map.extend(more);
    changes
}

/// One change to labels or annotations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// `key=value`
    Set(String, String),
    /// `key-`
    Remove(String),
}

/// Reads `key=value` and `key-`. Values of annotations are free text.
pub fn parse_changes(words: &[String], annotations: bool) -> Result<Vec<Change>, String> {
    if words.is_empty() {
        return Err("say what to change: KEY=VALUE sets, KEY- removes".into());
    }
    let mut seen = BTreeMap::new();
    let mut changes = Vec::new();
    for word in words {
        let change = match word.split_once('=') {
            Some((key, value)) => Change::Set(key.to_owned(), value.to_owned()),
            None => match word.strip_suffix('-') {
                Some(key) => Change::Remove(key.to_owned()),
                None => return Err(format!("{word:?} is neither KEY=VALUE nor KEY-")),
            },
        };
        let (Change::Set(key, _) | Change::Remove(key)) = &change;
        labels::check_key(key).map_err(|e| e.to_string())?;
        if let (Change::Set(_, value), false) = (&change, annotations) {
            labels::check_value(value).map_err(|e| e.to_string())?;
        }
        if seen.insert(key.clone(), ()).is_some() {
            return Err(format!("{key:?} is changed twice"));
        }
        changes.push(change);
    }
    Ok(changes)
}

/// Applies `changes` to `map`; true if that changes it. Values that are there are replaced if `overwrite` is set,
/// and are an error otherwise.
pub fn change(map: &mut Labels, changes: &[Change], overwrite: bool) -> Result<bool, String> {
    let before = map.clone();
    for change in changes {
        match change {
            Change::Set(key, value) => match map.get(key) {
                Some(old) if old != value && !overwrite => {
                    return Err(format!("{key:?} already has a value ({old}); --overwrite replaces it"));
                }
                _ => drop(map.insert(key.clone(), value.clone())),
            },
            Change::Remove(key) => drop(map.remove(key)),
        }
    }
    Ok(*map != before)
}

/// Labels or annotations of `meta`.
pub fn map_of(meta: &mut ObjectMeta, annotations: bool) -> &mut Labels {
    if annotations { &mut meta.annotations } else { &mut meta.labels }
}

/// `spec.clusterIPs` to `spec.cluster_ips`, as field masks spell it.
fn snake_case(camel: &str) -> String {
    let mut text = String::with_capacity(camel.len() + 4);
    let mut lower = false;
    for c in camel.chars() {
        if c.is_ascii_uppercase() && lower {
            text.push('_');
        }
        lower = c.is_ascii_lowercase();
        text.push(c.to_ascii_lowercase());
    }
    text
}

#[cfg(test)]
mod tests {
    use muster_proto::admin::{Device, Network};

    use super::*;
    use crate::manifest::parse;

    fn manifest(text: &str) -> Manifest {
        parse("f", &text.replacen('{', "---\n{apiVersion: muster/v1, ", 1)).unwrap().remove(0)
    }

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn what_is_written_is_set_and_the_rest_stays() {
        let current: Network = manifest(
            "{kind: Network, metadata: {name: lab, labels: {a: '1'}, annotations: {n: x}}, spec: {domain: lab.example, publicAddresses: ['192.0.2.1'], devicePoolV4: 100.64.0.0/11}}",
        )
        .object()
        .unwrap();
        let (same, mask) = merge(
            &current,
            &manifest(
                "{kind: Network, metadata: {name: lab, labels: {a: '1'}}, spec: {domain: lab.example}}",
            ),
        )
        .unwrap();
        assert_eq!((same, mask), (current.clone(), vec![]));
        let (changed, mask) = merge(
            &current,
            &manifest("{kind: Network, metadata: {name: lab, labels: {b: '2'}, annotations: {m: y}}, spec: {public_addresses: [], devicePoolV4: 10.0.0.0/8, recordTtl: 30s}}"),
        )
        .unwrap();
        assert_eq!(
            mask,
            [
                "metadata.labels",
                "metadata.annotations",
                "spec.device_pool_v4",
                "spec.public_addresses",
                "spec.record_ttl"
            ]
        );
        let spec = changed.spec.unwrap();
        assert_eq!((spec.domain.as_str(), spec.device_pool_v4.as_str()), ("lab.example", "10.0.0.0/8"));
        assert!(spec.public_addresses.is_empty());
        assert_eq!(changed.metadata.as_ref().unwrap().labels.len(), 2);
        assert_eq!(changed.metadata.unwrap().annotations.len(), 2);
    }

    #[test]
    fn defaults_can_be_written() {
        let current: Device =
            manifest("{kind: Device, metadata: {name: web, namespace: a}, spec: {revoked: true}}")
                .object()
                .unwrap();
        let wanted = manifest("{kind: Device, metadata: {name: web}, spec: {revoked: false}}");
        let (changed, mask) = merge(&current, &wanted).unwrap();
        assert_eq!(mask, ["spec.revoked"]);
        assert!(!changed.spec.unwrap().revoked);
        let moved = manifest("{kind: Device, metadata: {name: web, namespace: b}}");
        assert!(merge(&current, &moved).unwrap_err().to_string().contains("metadata.namespace"));
    }

    #[test]
    fn revisions_make_changes_conditional() {
        let mut current: Device = manifest("{kind: Device, metadata: {name: web}}").object().unwrap();
        current.metadata_mut().resource_version = 7;
        let version = |text| merge(&current, &manifest(text)).unwrap().0.metadata.unwrap().resource_version;
        assert_eq!(version("{kind: Device, metadata: {name: web}}"), 7);
        assert_eq!(version("{kind: Device, metadata: {name: web, resourceVersion: '5'}}"), 5);
    }

    #[test]
    fn labels_are_set_removed_and_kept() {
        let mut labels = Labels::from([("role".into(), "web".into()), ("old".into(), "x".into())]);
        let changes = parse_changes(&words("tier=a old- none-"), false).unwrap();
        assert_eq!(change(&mut labels, &changes, false), Ok(true));
        assert_eq!(labels, Labels::from([("role".into(), "web".into()), ("tier".into(), "a".into())]));
        let role = parse_changes(&words("role=db"), false).unwrap();
        assert!(change(&mut labels, &role, false).unwrap_err().contains("--overwrite"));
        assert_eq!(change(&mut labels, &role, true), Ok(true));
        assert_eq!(change(&mut labels, &role, false), Ok(false));
    }

    #[test]
    fn bad_changes_are_refused() {
        for text in ["role", "=x", "-", "a=b a-", "a=b c"] {
            assert!(parse_changes(&words(text), false).is_err(), "{text}");
        }
        assert!(parse_changes(&["a=b c".into()], true).is_ok());
        assert!(parse_changes(&[], false).is_err());
    }
}
