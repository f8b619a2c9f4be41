//! Manifests: YAML or JSON files, several documents each, with resources in the shape that Kubernetes users
//! know. Every error names file, document and field. Pure but for [`load`].

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

use muster_proto::admin::ObjectMeta;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::resource::{Kind, MUSTER as API_VERSION, Resource};

/// Longest manifest file that is read, in octets.
const SIZE_MAX: u64 = 64 << 20;

/// Why manifests were refused.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    File {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// There is nothing in it.
    #[error("there are no manifests in {0}; files must end in .yaml, .yml or .json")]
    Empty(String),
    /// Neither YAML nor JSON.
    #[error("cannot read {place} as {format}: {reason}")]
    Syntax {
        /// File and document.
        place: String,
        /// YAML or JSON.
        format: &'static str,
        /// What is wrong, and on which line.
        reason: String,
    },
    /// A field is missing, unknown, or of the wrong type.
    #[error("{place}: {field}: {reason}")]
    Field {
        /// File and document.
        place: String,
        /// Path of the field, such as `spec.domain`.
        field: String,
        /// What is wrong.
        reason: String,
    },
}

/// One resource as a file has it: checked, and still knowing which fields were written.
#[derive(Clone, Debug, PartialEq)]
pub struct Manifest {
    /// File and document, for messages.
    pub place: String,
    /// Kind of the resource.
    pub kind: Kind,
    /// `metadata` and `spec`, as written.
    fields: Map<String, Value>,
}

impl Manifest {
    /// The resource. Only `metadata` and `spec` are taken over; `status` is the registrar's to write.
    pub fn object<R: Resource>(&self) -> Result<R, ManifestError> {
        serde_json::from_value(Value::Object(self.fields.clone())).map_err(|e| ManifestError::Field {
            place: self.place.clone(),
            field: R::KIND.names().kind.to_owned(),
            reason: e.to_string(),
        })
    }

    /// The fields that are written in `section` (`metadata` or `spec`), in the spelling of JSON.
    pub fn written(&self, section: &str) -> Vec<String> {
        let fields = self.fields.get(section).and_then(Value::as_object);
        fields.into_iter().flat_map(|map| map.keys().map(|key| camel_case(key))).collect()
    }

    /// A manifest of `kind`, from a document's metadata and spec.
    fn check(place: String, path: &str, document: &Map<String, Value>) -> Result<Self, ManifestError> {
        let at = |field: &str, reason: String| ManifestError::Field {
            place: place.clone(),
            field: format!("{path}{field}"),
            reason,
        };
        let text = |key: &str| document.get(key).and_then(Value::as_str).unwrap_or_default();
        if text("apiVersion") != API_VERSION {
            let given = document.get("apiVersion").map_or("missing".into(), |v| format!("{v} is not known"));
            return Err(at("apiVersion", format!("{given}; write apiVersion: {API_VERSION}")));
        }
        let known = Kind::ALL.map(|kind| kind.names().kind);
        let kind = Kind::ALL.into_iter().find(|kind| kind.names().kind == text("kind")).ok_or_else(|| {
            let given = document.get("kind").map_or("missing".into(), |v| format!("{v} is not known"));
            at("kind", format!("{given}; there are {}", known.join(", ")))
        })?;
        for key in document.keys() {
            if !["apiVersion", "kind", "metadata", "spec", "status"].contains(&key.as_str()) {
                return Err(at(key, "unknown field; there are apiVersion, kind, metadata, spec".into()));
            }
        }
        let mut fields = Map::new();
        let check_metadata = |value: &Value| ObjectMeta::deserialize(value).map(drop);
        let check_spec = |value: &Value| crate::with_resource!(kind, R => R::check_spec(value));
        for (section, check) in [
            ("metadata", &check_metadata as &dyn Fn(&Value) -> _),
            ("spec", &check_spec as &dyn Fn(&Value) -> _),
        ] {
            let value = document.get(section).cloned().unwrap_or_else(|| json!({}));
            if !value.is_object() {
                return Err(at(section, "must have fields in it".into()));
            }
            if let Err(error) = check(&value) {
                let (field, error) = blame(&value, check).unwrap_or((String::new(), error));
                return Err(at(&format!("{section}{field}"), explain(&error.to_string())));
            }
            fields.insert(section.to_owned(), value);
        }
        let named = fields.get("metadata").and_then(|m| m.get("name")).is_some_and(|n| n != "");
        if !named && kind != Kind::Token {
            return Err(at("metadata.name", "missing".into()));
        }
        Ok(Self { place, kind, fields })
    }
}

/// Which field of `value` makes `check` fail, and how.
fn blame(
    value: &Value,
    check: &dyn Fn(&Value) -> Result<(), serde_json::Error>,
) -> Option<(String, serde_json::Error)> {
    value.as_object()?.iter().find_map(|(key, field)| {
        let alone = Value::Object(Map::from_iter([(key.clone(), field.clone())]));
        Some((format!(".{key}"), check(&alone).err()?))
    })
}

/// Words an error of serde's for people: known fields once each, in the spelling of JSON.
fn explain(error: &str) -> String {
    let Some(rest) = error.strip_prefix("unknown field ") else { return error.to_owned() };
    let mut names = rest.split('`').skip(1).step_by(2);
    let unknown = names.next().unwrap_or_default();
    let known: Vec<_> = names.filter(|name| !name.contains('_')).collect();
    format!("unknown field {unknown:?}; there are {}", known.join(", "))
}

/// Reads all manifests of `text`, which `name` names in messages.
pub fn parse(name: &str, text: &str) -> Result<Vec<Manifest>, ManifestError> {
    let documents = documents(name, text)?;
    let several = documents.len() > 1;
    let mut manifests = Vec::new();
    for (i, mut document) in documents.into_iter().enumerate() {
        let place = if several { format!("{name}, document {}", i + 1) } else { name.to_owned() };
        remove_nulls(&mut document);
        let field = |field: &str, reason: &str| ManifestError::Field {
            place: place.clone(),
            field: field.into(),
            reason: reason.into(),
        };
        match &document {
            Value::Null => {}
            Value::Object(map) if map.get("kind").and_then(Value::as_str) == Some("List") => {
                let items = map.get("items").and_then(Value::as_array);
                let items = items.ok_or_else(|| field("items", "must be a list of resources"))?;
                for (i, item) in items.iter().enumerate() {
                    let path = format!("items[{i}]");
                    let item = item.as_object().ok_or_else(|| field(&path, "must be a resource"))?;
                    manifests.push(Manifest::check(place.clone(), &format!("{path}."), item)?);
                }
            }
            Value::Object(map) => manifests.push(Manifest::check(place.clone(), "", map)?),
            _ => {
                return Err(field(
                    "(document)",
                    "must be a resource, with apiVersion, kind, metadata and spec",
                ));
            }
        }
    }
    Ok(manifests)
}

/// The documents of `text`: JSON if it begins like JSON, else YAML.
fn documents(name: &str, text: &str) -> Result<Vec<Value>, ManifestError> {
    let syntax = |i: usize, format, reason: String| ManifestError::Syntax {
        place: if i > 0 { format!("{name}, document {}", i + 1) } else { name.to_owned() },
        format,
        reason,
    };
    if text.trim_start().starts_with('{') {
        let stream = serde_json::Deserializer::from_str(text).into_iter();
        stream.enumerate().map(|(i, d)| d.map_err(|e| syntax(i, "JSON", e.to_string()))).collect()
    } else {
        let stream = serde_yaml_ng::Deserializer::from_str(text);
        stream
            .enumerate()
            .map(|(i, d)| Value::deserialize(d).map_err(|e| syntax(i, "YAML", e.to_string())))
            .collect()
    }
}

/// A field that is null is a field that is not written.
fn remove_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, v| !v.is_null());
            map.values_mut().for_each(remove_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(remove_nulls),
        _ => {}
    }
}

/// Reads the manifests of files, of the files in directories, and (`-`) of standard input.
pub fn load(paths: &[PathBuf]) -> Result<Vec<Manifest>, ManifestError> {
    let mut manifests = Vec::new();
    for path in paths {
        let failed = |source| ManifestError::File { path: path.clone(), source };
        let before = manifests.len();
        if path == Path::new("-") {
            manifests.extend(parse("standard input", &read(io::stdin().lock()).map_err(failed)?)?);
        } else if path.is_dir() {
            for file in manifest_files(path).map_err(failed)? {
                manifests.extend(load_file(&file)?);
            }
        } else {
            manifests.extend(load_file(path)?);
        }
        if manifests.len() == before {
            return Err(ManifestError::Empty(path.display().to_string()));
        }
    }
    Ok(manifests)
}

fn load_file(path: &Path) -> Result<Vec<Manifest>, ManifestError> {
    let failed = |source| ManifestError::File { path: path.to_owned(), source };
    let text = fs::File::open(path).and_then(read).map_err(failed)?;
    parse(&path.display().to_string(), &text)
}

fn read(input: impl Read) -> io::Result<String> {
    let mut text = String::new();
    let length = input.take(SIZE_MAX + 1).read_to_string(&mut text)?;
    if length as u64 > SIZE_MAX { Err(io::Error::other("it is larger than 64 MiB")) } else { Ok(text) }
}

fn manifest_files(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
        if ["yaml", "yml", "json"].contains(&extension) && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

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
    json!({ "apiVersion": API_VERSION, "kind": "List", "items": items })
}

/// `virtual_ipv4` to `virtualIpv4`, as the proto3 JSON mapping spells it.
fn camel_case(snake: &str) -> String {
    let mut text = String::with_capacity(snake.len());
    let mut upper = false;
    for c in snake.chars() {
        if c == '_' {
            upper = true;
        } else {
            text.push(if upper { c.to_ascii_uppercase() } else { c });
            upper = false;
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use muster_proto::admin::{Device, Network, Token};

    use super::*;

    const DEVICE: &str = "apiVersion: muster/v1
kind: Device
metadata:
  name: web
  labels: {role: web}
spec:
  virtual_ipv4: 100.64.0.10
status:
  phase: Registered
";

    fn error(text: &str) -> String {
        parse("f.yaml", text).unwrap_err().to_string()
    }

    #[test]
    fn documents_and_lists_are_read_in_order() {
        let text = format!("{DEVICE}---\n---\napiVersion: muster/v1\nkind: List\nitems:\n- {}", {
            "apiVersion: muster/v1\n  kind: Token\n  spec: {reusable: true}\n"
        });
        let manifests = parse("f.yaml", &text).unwrap();
        assert_eq!(manifests.len(), 2);
        let device: Device = manifests[0].object().unwrap();
        assert_eq!(device.metadata.as_ref().unwrap().labels["role"], "web");
        assert_eq!(device.spec.as_ref().unwrap().virtual_ipv4, "100.64.0.10");
        assert_eq!(device.status, None);
        assert_eq!(manifests[0].written("spec"), ["virtualIpv4"]);
        let token: Token = manifests[1].object().unwrap();
        assert!(token.spec.unwrap().reusable);
        assert_eq!(manifests[1].place, "f.yaml, document 3");
    }

    #[test]
    fn json_is_read_too() {
        let text = r#"{"apiVersion":"muster/v1","kind":"Network","metadata":{"name":"lab"},
            "spec":{"domain":"lab.example","recordTtl":"30s","publicAddresses":null}}"#;
        let manifests = parse("f.json", &text.repeat(2)).unwrap();
        assert_eq!(manifests.len(), 2);
        let network: Network = manifests[1].object().unwrap();
        assert_eq!(network.spec.unwrap().record_ttl.unwrap().seconds, 30);
    }

    #[test]
    fn errors_name_file_document_and_field() {
        assert_eq!(
            error(&format!("{DEVICE}---\n{}", DEVICE.replace("virtual_ipv4", "virtualIp"))),
            "f.yaml, document 2: spec.virtualIp: unknown field \"virtualIp\"; there are virtualIpv4, virtualIpv6, revoked"
        );
        assert_eq!(
            error(&DEVICE.replace("{role: web}", "{role: 1}")),
            "f.yaml: metadata.labels: invalid type: integer `1`, expected a string"
        );
        assert_eq!(error(&DEVICE.replace("name: web", "uid: x")), "f.yaml: metadata.name: missing");
        assert_eq!(
            error(&DEVICE.replace("muster/v1", "v1")),
            "f.yaml: apiVersion: \"v1\" is not known; write apiVersion: muster/v1"
        );
        assert_eq!(
            error(&DEVICE.replace("Device", "Pod")),
            "f.yaml: kind: \"Pod\" is not known; there are Network, Device, Token, Namespace, Service, EndpointSlice"
        );
        assert_eq!(
            error("apiVersion: muster/v1\nkind: List\nitems: [{apiVersion: muster/v1}]"),
            "f.yaml: items[0].kind: missing; there are Network, Device, Token, Namespace, Service, EndpointSlice"
        );
        assert!(error(&format!("{DEVICE}more: 1\n")).starts_with("f.yaml: more: unknown field"));
        assert!(error("a: [\n").contains("cannot read f.yaml as YAML"));
        assert!(error("{\"a\"").contains("cannot read f.yaml as JSON"));
        assert!(error("- 1\n").contains("must be a resource"));
        assert!(error("apiVersion: muster/v1\nkind: List\n").contains("items: must be a list"));
        assert!(error("apiVersion: muster/v1\nkind: Device\nmetadata: x\n").contains("metadata: must have"));
    }

    #[test]
    fn what_is_printed_can_be_applied() {
        let device: Device = parse("f", DEVICE).unwrap()[0].object().unwrap();
        let printed = serde_yaml_ng::to_string(&list(vec![value(&device)])).unwrap();
        assert_eq!(parse("g", &printed).unwrap()[0].object::<Device>().unwrap(), device);
    }

    #[test]
    fn times_are_written_as_kubernetes_has_them() {
        let mut token = Token::default();
        let meta = token.metadata_mut();
        meta.creation_timestamp = Some(pbjson_types::Timestamp { seconds: 86_400, nanos: 0 });
        meta.annotations.insert("at".into(), "1970-01-02T00:00:00+00:00".into());
        let value = value(&token);
        assert_eq!(value["metadata"]["creationTimestamp"], "1970-01-02T00:00:00Z");
        assert_eq!(value["metadata"]["annotations"]["at"], "1970-01-02T00:00:00+00:00");
    }

    #[test]
    fn directories_are_read_in_order_of_names() {
        let dir = tempfile::tempdir().unwrap();
        for (file, name) in [("b.yaml", "b"), ("a.yml", "a"), ("ignored.txt", "c")] {
            fs::write(dir.path().join(file), DEVICE.replace("name: web", &format!("name: {name}"))).unwrap();
        }
        let manifests = load(&[dir.path().to_owned()]).unwrap();
        let names: Vec<_> =
            manifests.iter().map(|m| m.object::<Device>().unwrap().metadata.unwrap().name).collect();
        assert_eq!(names, ["a", "b"]);
        let missing = load(&[dir.path().join("none.yaml")]).unwrap_err().to_string();
        assert!(missing.contains("none.yaml"), "{missing}");
        let empty = tempfile::tempdir().unwrap();
        assert!(matches!(load(&[empty.path().to_owned()]), Err(ManifestError::Empty(_))));
    }
}
