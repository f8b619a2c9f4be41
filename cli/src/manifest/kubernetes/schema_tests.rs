//! That the fields known here are those of Kubernetes' own types, each with a value of the same kind, and no others.

use k8s_openapi::api::{
    core::v1::{Namespace, Probe, Service},
    discovery::v1::EndpointSlice,
};
use serde_json::Value;

use super::*;

/// What Kubernetes does not have: its objects are not of one network among several, and pods have the probes.
const EXTENSIONS: [&str; 4] = [
    "Service.metadata.network",
    "Service.spec.readinessProbe",
    "Namespace.metadata.network",
    "EndpointSlice.metadata.network",
];

/// A schema, with those that it refers to.
struct Schema {
    root: Value,
}

impl Schema {
    fn of<T: schemars::JsonSchema>() -> Self {
        Self { root: schemars::schema_for!(T).to_value() }
    }

    fn resolve<'a>(&'a self, mut schema: &'a Value) -> &'a Value {
        while let Some(reference) = schema.get("$ref").and_then(Value::as_str) {
            let pointer = reference.strip_prefix('#').unwrap_or_default();
            schema = self.root.pointer(pointer).unwrap_or(&Value::Null);
        }
        schema
    }

    /// Adds to `wrong` what differs between the fields of an object and those that are `known`.
    fn compare(&self, path: &str, schema: &Value, known: &[Field], wrong: &mut Vec<String>) {
        let schema = self.resolve(schema);
        let Some(Value::Object(properties)) = schema.get("properties") else {
            return wrong.push(format!("{path}: has no fields, but {schema}"));
        };
        for name in properties.keys().filter(|name| known.iter().all(|field| field.0 != name.as_str())) {
            wrong.push(format!("{path}.{name}: is not known here"));
        }
        for Field(name, _, shape) in known {
            let path = format!("{path}.{name}");
            match properties.get(*name) {
                Some(property) => self.compare_value(&path, property, shape, wrong),
                None if EXTENSIONS.contains(&path.as_str()) => {}
                None => wrong.push(format!("{path}: Kubernetes does not know it")),
            }
        }
    }

    fn compare_value(&self, path: &str, schema: &Value, shape: &Shape, wrong: &mut Vec<String>) {
        let schema = self.resolve(schema);
        let kind = match shape {
            Anything => return,
            Object(known) => return self.compare(path, schema, known, wrong),
            PortOrName if schema.get("x-kubernetes-int-or-string") == Some(&Value::Bool(true)) => return,
            List(shape) => {
                if let Some(items) = schema.get("items") {
                    return self.compare_value(&format!("{path}[]"), items, shape, wrong);
                }
                "array"
            }
            Labels | Annotations => "object",
            Bool => "boolean",
            Number(..) => "integer",
            _ => "string",
        };
        if schema.get("type").and_then(Value::as_str) != Some(kind) {
            wrong.push(format!("{path}: is not of type {kind}, but {schema}"));
        }
    }
}

#[test]
fn the_fields_are_those_of_kubernetes() {
    let mut wrong = Vec::new();
    let mut compare =
        |name: &str, schema: Schema, known| schema.compare(name, &schema.root, known, &mut wrong);
    compare("Service", Schema::of::<Service>(), SERVICE);
    compare("Namespace", Schema::of::<Namespace>(), NAMESPACE);
    compare("EndpointSlice", Schema::of::<EndpointSlice>(), ENDPOINT_SLICE);
    compare("Probe", Schema::of::<Probe>(), PROBE);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
