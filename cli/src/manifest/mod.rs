//! Manifests: YAML or JSON files, several documents each, with resources in the shape that Kubernetes users
//! know; those of Kubernetes' own kinds are Kubernetes' own. Every error names file, document and field. Pure but for
//! [`load`].

mod check;
mod document;
mod kubernetes;
mod print;

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

use muster_proto::admin::ObjectMeta;
use serde::Deserialize;
use serde_json::{Map, Value, json};

pub use check::{Member, duplicates, service as check_service};
pub use kubernetes::is_port_name;
pub use print::{list, value};

use crate::resource::{Kind, Resource};

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
    /// Where the resource is in its document: empty, or `items[0].`
    path: String,
    /// What is taken over, as written.
    fields: Map<String, Value>,
    /// Paths of fields that mean something to Kubernetes and nothing here.
    ignored: Vec<String>,
}

impl Manifest {
    /// The resource. `status` is the registrar's to write, and not taken over.
    pub fn object<R: Resource>(&self) -> Result<R, ManifestError> {
        serde_json::from_value(Value::Object(self.fields.clone()))
            .map_err(|e| self.error(R::KIND.names().kind, e.to_string()))
    }

    /// The paths of the fields outside `metadata` that are written, in the spelling of JSON: `spec.ports`.
    pub fn written(&self) -> Vec<String> {
        let mut paths = Vec::new();
        for (section, value) in self.fields.iter().filter(|(section, _)| *section != "metadata") {
            match value.as_object() {
                Some(map) => paths.extend(map.keys().map(|key| format!("{section}.{}", camel_case(key)))),
                None => paths.push(section.clone()),
            }
        }
        paths
    }

    /// The Service that an EndpointSlice is of.
    pub fn service_name(&self) -> Option<String> {
        let labels = self.fields.get("metadata")?.get("labels")?;
        Some(labels.get("kubernetes.io/service-name")?.as_str()?.to_owned())
    }

    /// File and document, and where in it the resource is, if it is an item of a list.
    pub fn position(&self) -> String {
        match self.path.trim_end_matches('.') {
            "" => self.place.clone(),
            path => format!("{}, {path}", self.place),
        }
    }

    /// An error in `field` of this manifest.
    pub fn error(&self, field: &str, reason: String) -> ManifestError {
        ManifestError::Field { place: self.place.clone(), field: format!("{}{field}", self.path), reason }
    }

    /// A manifest from one resource of a document.
    fn check(place: String, path: &str, document: &Map<String, Value>) -> Result<Self, ManifestError> {
        let at = |field: &str, reason: String| ManifestError::Field {
            place: place.clone(),
            field: format!("{path}{field}"),
            reason,
        };
        let text = |key: &str| document.get(key).and_then(Value::as_str).unwrap_or_default();
        let known = Kind::ALL.map(|kind| kind.names().kind);
        let kind = Kind::ALL.into_iter().find(|kind| kind.names().kind == text("kind")).ok_or_else(|| {
            let given = document.get("kind").map_or("missing".into(), |v| format!("{v} is not known"));
            let remedy = if text("kind") == "Endpoints" { "; write an EndpointSlice instead" } else { "" };
            at("kind", format!("{given}; there are {}{remedy}", known.join(", ")))
        })?;
        let version = kind.names().api_version;
        if text("apiVersion") != version {
            let given = document.get("apiVersion").map_or("missing".into(), |v| format!("{v} is not known"));
            return Err(at("apiVersion", format!("{given}; write apiVersion: {version}")));
        }
        let mut ignored = Vec::new();
        let fields = match kind {
            Kind::Network | Kind::Device | Kind::Director | Kind::Registrar | Kind::Token => {
                own_fields(kind, document, &at)?
            }
            Kind::Namespace | Kind::Service | Kind::EndpointSlice => {
                kubernetes::fields(kind, document, &mut ignored)
                    .map_err(|(field, reason)| at(&field, reason))?
            }
        };
        let named = fields.get("metadata").and_then(|m| m.get("name")).is_some_and(|n| n != "");
        if !named && kind != Kind::Token {
            return Err(at("metadata.name", "missing".into()));
        }
        let ignored = ignored.into_iter().map(|field| format!("{path}{field}")).collect();
        Ok(Self { place, kind, path: path.to_owned(), fields, ignored })
    }
}

/// `metadata` and `spec` of one of Muster's own kinds.
fn own_fields(
    kind: Kind,
    document: &Map<String, Value>,
    at: &dyn Fn(&str, String) -> ManifestError,
) -> Result<Map<String, Value>, ManifestError> {
    for key in document.keys() {
        if !["apiVersion", "kind", "metadata", "spec", "status"].contains(&key.as_str()) {
            return Err(at(key, "unknown field; there are apiVersion, kind, metadata, spec".into()));
        }
    }
    let mut fields = Map::new();
    let check_metadata = |value: &Value| ObjectMeta::deserialize(value).map(drop);
    let check_spec = |value: &Value| crate::with_resource!(kind, R => R::check_spec(value));
    for (section, check) in
        [("metadata", &check_metadata as &dyn Fn(&Value) -> _), ("spec", &check_spec as &dyn Fn(&Value) -> _)]
    {
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
    Ok(fields)
}

/// A line for each document that says something which means nothing here.
pub fn warnings(manifests: &[Manifest]) -> Vec<String> {
    let documents = manifests.chunk_by(|a, b| a.place == b.place);
    documents
        .filter_map(|document| {
            let ignored: Vec<_> = document.iter().flat_map(|m| m.ignored.iter().cloned()).collect();
            let place = &document.first()?.place;
            (!ignored.is_empty())
                .then(|| format!("{place}: left out, as it has no meaning here: {}", ignored.join(", ")))
        })
        .collect()
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
    let documents = document::documents(name, text)?;
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
            Value::Object(map) if list_of(map).is_some() => {
                let items = map.get("items").and_then(Value::as_array);
                let items = items.ok_or_else(|| field("items", "must be a list of resources"))?;
                let known = ["apiVersion", "kind", "metadata", "items"];
                if let Some(key) = map.keys().find(|key| !known.contains(&key.as_str())) {
                    return Err(field(key, "unknown field; there are apiVersion, kind, metadata, items"));
                }
                for (i, item) in items.iter().enumerate() {
                    let path = format!("items[{i}]");
                    let item = item.as_object().ok_or_else(|| field(&path, "must be a resource"))?;
                    let item = with_type(item, list_of(map).flatten());
                    manifests.push(Manifest::check(place.clone(), &format!("{path}."), &item)?);
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

/// Whether a document is a list: of anything (`List`), or of one kind (`ServiceList`).
fn list_of(document: &Map<String, Value>) -> Option<Option<Kind>> {
    match document.get("kind").and_then(Value::as_str)?.strip_suffix("List")? {
        "" => Some(None),
        name => Kind::ALL.into_iter().find(|kind| kind.names().kind == name).map(Some),
    }
}

/// `item` of a list; the items of a list of one kind need not say what they are.
fn with_type(item: &Map<String, Value>, kind: Option<Kind>) -> Map<String, Value> {
    let mut item = item.clone();
    if let Some(names) = kind.map(Kind::names) {
        item.entry("apiVersion").or_insert_with(|| names.api_version.into());
        item.entry("kind").or_insert_with(|| names.kind.into());
    }
    item
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
mod kubernetes_tests;
#[cfg(test)]
mod tests;
