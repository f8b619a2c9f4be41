//! Objects as they are printed, in the shape in which manifests are read.

use serde_json::{Value, json};

use crate::resource::{MUSTER, Resource};

/// An object as it is printed: `apiVersion`, `kind`, and the proto3 JSON mapping of the rest.
pub fn value<R: Resource>(object: &R) -> Value {
    let mut value = serde_json::to_value(object).unwrap_or_else(|_| json!({}));
    normalize_times(&mut value);
    R::present(&mut value);
    if let Value::Object(map) = &mut value {
        map.insert("apiVersion".into(), R::KIND.names().api_version.into());
        map.insert("kind".into(), R::KIND.names().kind.into());
    }
    value
}

/// Writes UTC as `Z`, as the mapping wants it and Kubernetes has it, where the serialiser writes `+00:00`.
fn normalize_times(value: &mut Value) {
    match value {
        Value::Object(map) => {
            // Annotations are free text.
            map.iter_mut().filter(|(key, _)| *key != "annotations").for_each(|(_, v)| normalize_times(v));
        }
        Value::Array(items) => items.iter_mut().for_each(normalize_times),
        Value::String(text) => {
            if let Some(time) = text.strip_suffix("+00:00").map(|time| format!("{time}Z"))
                && time.parse::<jiff::Timestamp>().is_ok()
            {
                *text = time;
            }
        }
        _ => {}
    }
}

/// Several objects as one.
pub fn list(items: Vec<Value>) -> Value {
    let own = |item: &Value| item.get("apiVersion").is_some_and(|version| version == MUSTER);
    // A list of nothing but Kubernetes' kinds is one that Kubernetes' tools take, too.
    let version = if items.is_empty() || items.iter().any(own) { MUSTER } else { "v1" };
    json!({ "apiVersion": version, "kind": "List", "items": items })
}
