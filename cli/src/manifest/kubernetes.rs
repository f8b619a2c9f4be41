//! What Kubernetes' `v1 Service`, `v1 Namespace` and `discovery.k8s.io/v1 EndpointSlice` consist of, and which of it is
//! taken over. Every field that they have is known; those without a meaning here are checked and left out.

use std::net::IpAddr;

use muster_common::{labels, name::Label};
use serde_json::{Map, Value};

use super::check;
use crate::resource::Kind;

#[cfg(test)]
mod schema_tests;

/// Path of a field, and what is wrong with it.
pub(super) type Wrong = (String, String);

/// What becomes of a field.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    Kept,
    /// Belongs to the cluster that the object was printed by.
    Dropped,
    /// Would make Kubernetes do something that does not happen here; worth a warning.
    Ignored,
}
use Use::{Dropped, Ignored, Kept};

struct Field(&'static str, Use, Shape);

/// What a value must be. An empty text is as good as none.
enum Shape {
    Text,
    /// RFC 1123 label in lower case.
    Label,
    /// Labels joined by dots.
    Subdomain,
    /// Name of a port (RFC 6335, 5.1).
    PortName,
    /// Port number, or name of a port.
    PortOrName,
    /// From the first number to the second.
    Number(u64, u64),
    Bool,
    OneOf(&'static [&'static str]),
    Ip,
    /// Address, or None.
    ClusterIp,
    Revision,
    Labels,
    Annotations,
    List(&'static Shape),
    Object(&'static [Field]),
    Anything,
}
use Shape::{
    Annotations, Anything, Bool, ClusterIp, Ip, Labels, List, Number, Object, OneOf, PortName, PortOrName,
    Revision, Subdomain, Text,
};

const PORT: Shape = Number(1, 65_535);
const PROTOCOL: Shape = OneOf(&["TCP", "UDP", "SCTP"]);
const ANY_NUMBER: Shape = Number(0, i64::MAX as u64);

/// Of a probe; thresholds have the same range.
const SECONDS: Shape = Number(0, 86_400);

/// The annotation in which kubectl keeps the manifest itself.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

const OWNER: &[Field] = &[
    Field("apiVersion", Kept, Text),
    Field("kind", Kept, Text),
    Field("name", Kept, Text),
    Field("uid", Kept, Text),
    Field("controller", Kept, Bool),
    Field("blockOwnerDeletion", Kept, Bool),
];

macro_rules! metadata {
    ($name:expr) => {
        Object(&[
            Field("name", Kept, $name),
            Field("namespace", Kept, Shape::Label),
            Field("network", Kept, Shape::Label),
            Field("labels", Kept, Labels),
            Field("annotations", Kept, Annotations),
            Field("uid", Kept, Text),
            Field("resourceVersion", Kept, Revision),
            Field("generateName", Dropped, Text),
            Field("selfLink", Dropped, Text),
            Field("generation", Dropped, ANY_NUMBER),
            Field("creationTimestamp", Dropped, Text),
            Field("deletionTimestamp", Dropped, Text),
            Field("deletionGracePeriodSeconds", Dropped, ANY_NUMBER),
            Field("managedFields", Dropped, List(&Anything)),
            Field("ownerReferences", Ignored, List(&Object(OWNER))),
            Field("finalizers", Ignored, List(&Text)),
        ])
    };
}

const SERVICE: &[Field] = &[
    Field("apiVersion", Dropped, Text),
    Field("kind", Dropped, Text),
    Field("metadata", Kept, metadata!(Shape::Label)),
    Field("spec", Kept, Object(SERVICE_SPEC)),
    Field("status", Dropped, Object(SERVICE_STATUS)),
];

const SERVICE_SPEC: &[Field] = &[
    Field("type", Kept, OneOf(&["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"])),
    Field("selector", Kept, Labels),
    Field("ports", Kept, List(&Object(SERVICE_PORT))),
    Field("clusterIP", Kept, ClusterIp),
    Field("clusterIPs", Kept, List(&ClusterIp)),
    Field("ipFamilies", Kept, List(&OneOf(&["IPv4", "IPv6"]))),
    Field("ipFamilyPolicy", Kept, OneOf(&["SingleStack", "PreferDualStack", "RequireDualStack"])),
    Field("externalName", Kept, Text),
    Field("externalIPs", Kept, List(&Ip)),
    Field("sessionAffinity", Kept, OneOf(&["None", "ClientIP"])),
    Field(
        "sessionAffinityConfig",
        Kept,
        Object(&[Field("clientIP", Kept, Object(&[Field("timeoutSeconds", Kept, Number(1, 86_400))]))]),
    ),
    Field("publishNotReadyAddresses", Kept, Bool),
    Field("internalTrafficPolicy", Kept, OneOf(&["Cluster", "Local"])),
    Field("externalTrafficPolicy", Kept, OneOf(&["Cluster", "Local"])),
    Field("allocateLoadBalancerNodePorts", Ignored, Bool),
    Field("healthCheckNodePort", Ignored, Number(0, 65_535)),
    Field("loadBalancerClass", Ignored, Text),
    Field("loadBalancerIP", Ignored, Text),
    Field("loadBalancerSourceRanges", Ignored, List(&Text)),
    Field("readinessProbe", Kept, Object(PROBE)),
    Field("trafficDistribution", Kept, OneOf(&["PreferSameZone", "PreferSameNode", "PreferClose"])),
];

/// As `v1 Probe`: a Service's is an extension, since there are no pods to have one.
const PROBE: &[Field] = &[
    Field("exec", Kept, Object(&[Field("command", Kept, List(&Text))])),
    Field(
        "httpGet",
        Kept,
        Object(&[
            Field("path", Kept, Text),
            Field("port", Kept, PortOrName),
            Field("scheme", Kept, OneOf(&["HTTP", "HTTPS"])),
            Field("host", Ignored, Text),
            Field("protocol", Ignored, Text),
            Field(
                "httpHeaders",
                Kept,
                List(&Object(&[Field("name", Kept, Text), Field("value", Kept, Text)])),
            ),
        ]),
    ),
    Field("tcpSocket", Kept, Object(&[Field("port", Kept, PortOrName), Field("host", Ignored, Text)])),
    Field(
        "grpc",
        Kept,
        Object(&[
            Field("port", Kept, PORT),
            Field("service", Kept, Text),
            Field("mode", Dropped, OneOf(&["Plaintext"])),
        ]),
    ),
    Field("initialDelaySeconds", Kept, SECONDS),
    Field("timeoutSeconds", Kept, SECONDS),
    Field("periodSeconds", Kept, SECONDS),
    Field("successThreshold", Kept, SECONDS),
    Field("failureThreshold", Kept, SECONDS),
    Field("terminationGracePeriodSeconds", Ignored, ANY_NUMBER),
];

const SERVICE_PORT: &[Field] = &[
    Field("name", Kept, Shape::Label),
    Field("protocol", Kept, PROTOCOL),
    Field("appProtocol", Kept, Text),
    Field("port", Kept, PORT),
    Field("targetPort", Kept, PortOrName),
    Field("nodePort", Ignored, Number(0, 65_535)),
];

const SERVICE_STATUS: &[Field] = &[
    Field(
        "loadBalancer",
        Dropped,
        Object(&[Field(
            "ingress",
            Dropped,
            List(&Object(&[
                Field("ip", Dropped, Text),
                Field("hostname", Dropped, Text),
                Field("ipMode", Dropped, Text),
                Field("ports", Dropped, List(&Anything)),
            ])),
        )]),
    ),
    Field("conditions", Dropped, List(&Anything)),
];

const NAMESPACE: &[Field] = &[
    Field("apiVersion", Dropped, Text),
    Field("kind", Dropped, Text),
    Field("metadata", Kept, metadata!(Shape::Label)),
    Field("spec", Dropped, Object(&[Field("finalizers", Dropped, List(&Text))])),
    Field(
        "status",
        Dropped,
        Object(&[Field("phase", Dropped, Text), Field("conditions", Dropped, List(&Anything))]),
    ),
];

const ENDPOINT_SLICE: &[Field] = &[
    Field("apiVersion", Dropped, Text),
    Field("kind", Dropped, Text),
    Field("metadata", Kept, metadata!(Subdomain)),
    Field("addressType", Kept, OneOf(&["IPv4", "IPv6"])),
    Field("endpoints", Kept, List(&Object(ENDPOINT))),
    Field(
        "ports",
        Kept,
        List(&Object(&[
            Field("name", Kept, PortName),
            Field("protocol", Kept, PROTOCOL),
            Field("port", Kept, PORT),
            Field("appProtocol", Kept, Text),
        ])),
    ),
];

const ENDPOINT: &[Field] = &[
    Field("addresses", Kept, List(&Ip)),
    Field(
        "conditions",
        Kept,
        Object(&[Field("ready", Kept, Bool), Field("serving", Kept, Bool), Field("terminating", Kept, Bool)]),
    ),
    Field("hostname", Kept, Shape::Label),
    Field(
        "targetRef",
        Kept,
        Object(&[
            Field("kind", Kept, Text),
            Field("namespace", Kept, Text),
            Field("name", Kept, Text),
            Field("uid", Kept, Text),
            Field("apiVersion", Dropped, Text),
            Field("resourceVersion", Dropped, Text),
            Field("fieldPath", Dropped, Text),
        ]),
    ),
    Field("nodeName", Kept, Text),
    Field("zone", Kept, Text),
    Field("deprecatedTopology", Dropped, Labels),
    Field(
        "hints",
        Ignored,
        Object(&[
            Field("forZones", Kept, List(&Object(&[Field("name", Kept, Text)]))),
            Field("forNodes", Kept, List(&Object(&[Field("name", Kept, Text)]))),
        ]),
    ),
];

/// What is taken over from a manifest of `kind`; what is left out and would have meant something goes to `ignored`.
pub(super) fn fields(
    kind: Kind,
    document: &Map<String, Value>,
    ignored: &mut Vec<String>,
) -> Result<Map<String, Value>, Wrong> {
    let known = match kind {
        Kind::Service => SERVICE,
        Kind::EndpointSlice => ENDPOINT_SLICE,
        _ => NAMESPACE,
    };
    let mut fields = object("", known, document, ignored)?;
    let metadata = fields.entry("metadata").or_insert_with(|| Value::Object(Map::new()));
    if metadata.get("name").is_none_or(|name| name == "") {
        let given = document.get("metadata").and_then(|m| m.get("generateName")).is_some();
        let reason = if given { "missing; names are not generated here: write one" } else { "missing" };
        return Err(("metadata.name".into(), reason.into()));
    }
    if kind == Kind::Namespace && metadata.get("namespace").is_some_and(|namespace| namespace != "") {
        return Err(("metadata.namespace".into(), "a Namespace is in no namespace; leave it out".into()));
    }
    let json = Value::Object(fields.clone());
    let parsed = |e: serde_json::Error| (kind.names().kind.to_owned(), e.to_string());
    match kind {
        Kind::Service => check::service(&serde_json::from_value(json).map_err(parsed)?)?,
        Kind::EndpointSlice => check::endpoint_slice(&serde_json::from_value(json).map_err(parsed)?)?,
        _ => {}
    }
    Ok(fields)
}

/// The fields of an object that are kept.
fn object(
    path: &str,
    known: &[Field],
    map: &Map<String, Value>,
    ignored: &mut Vec<String>,
) -> Result<Map<String, Value>, Wrong> {
    let mut kept = Map::new();
    for (key, value) in map {
        let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        let Some(Field(_, usage, shape)) = known.iter().find(|field| field.0 == key) else {
            let names = known.iter().filter(|f| f.1 == Kept).map(|f| f.0).collect::<Vec<_>>().join(", ");
            let short: String = key.chars().take(80).collect();
            return Err((path, format!("unknown field {short:?}; there are {names}")));
        };
        let checked = shape.check(&path, value, ignored)?;
        match usage {
            Kept => drop(kept.insert(key.clone(), checked)),
            Ignored if !is_nothing(value) => ignored.push(path),
            Ignored | Dropped => {}
        }
    }
    Ok(kept)
}

/// Whether a value says as little as no value.
fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(b) => !b,
        Value::Number(n) => n.as_u64() == Some(0),
        Value::String(s) => s.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
    }
}

impl Shape {
    /// `value` as the API takes it.
    fn check(&self, path: &str, value: &Value, ignored: &mut Vec<String>) -> Result<Value, Wrong> {
        let wrong = |reason: String| (path.to_owned(), reason);
        match self {
            Anything => Ok(value.clone()),
            Bool if value.is_boolean() => Ok(value.clone()),
            Bool => Err(wrong(format!("must be true or false, and is {}", kind_of(value)))),
            Number(least, most) => match value.as_u64() {
                Some(number) if (*least..=*most).contains(&number) => Ok(value.clone()),
                _ => Err(wrong(number_wanted(*least, *most, value))),
            },
            List(shape) => {
                let Value::Array(items) = value else {
                    return Err(wrong(format!("must be a list, and is {}", kind_of(value))));
                };
                let items = items.iter().enumerate();
                let items = items.map(|(i, item)| shape.check(&format!("{path}[{i}]"), item, ignored));
                items.collect::<Result<Vec<_>, _>>().map(Value::Array)
            }
            Object(known) => match value {
                Value::Object(map) => object(path, known, map, ignored).map(Value::Object),
                _ => Err(wrong(format!("must have fields in it, and is {}", kind_of(value)))),
            },
            Labels | Annotations => match value {
                Value::Object(map) => self.check_map(path, map).map(Value::Object),
                _ => Err(wrong(format!("must be a map of texts, and is {}", kind_of(value)))),
            },
            PortOrName if value.is_number() => match value.as_u64() {
                Some(port @ 1..=65_535) => Ok(port.to_string().into()),
                _ => Err(wrong(number_wanted(1, 65_535, value))),
            },
            _ => match value.as_str() {
                Some("") => Ok(value.clone()),
                Some(text) => self.check_text(text).map(|()| value.clone()).map_err(wrong),
                None => Err(wrong(format!("must be a text, and is {}{}", kind_of(value), quotes(value)))),
            },
        }
        // A revision that is not ours to understand is as good as none.
        .map(|value| match (self, value.as_str()) {
            (Revision, Some(text)) if text.parse::<u64>().is_err() => "0".into(),
            _ => value,
        })
    }

    fn check_text(&self, text: &str) -> Result<(), String> {
        let short: String = text.chars().take(80).collect();
        match self {
            Shape::Label if !is_label(text) => Err(format!("{short:?} is not a name; {LABEL_WANTED}")),
            Subdomain if text.len() > 253 || !text.split('.').all(is_label) => {
                Err(format!("{short:?} is not a name; {LABEL_WANTED}, several of them joined by dots"))
            }
            PortName if !is_port_name(text) => {
                Err(format!("{short:?} is not a name of a port; {PORT_NAME_WANTED}"))
            }
            PortOrName if !is_port_name(text) && text.parse::<u16>().ok().is_none_or(|port| port == 0) => {
                Err(format!("{short:?} is neither a port nor a name of one; {PORT_NAME_WANTED}"))
            }
            OneOf(known) if !known.contains(&text) => {
                Err(format!("{short:?} is not known; there are {}", known.join(", ")))
            }
            Ip if text.parse::<IpAddr>().is_err() => Err(format!("{short:?} is not an IP address")),
            ClusterIp if text != "None" && text.parse::<IpAddr>().is_err() => Err(format!(
                "{short:?} is not an IP address; write one of the network's service pool, None for a headless Service, or leave it out"
            )),
            _ => Ok(()),
        }
    }

    /// The entries of labels or annotations.
    fn check_map(&self, path: &str, map: &Map<String, Value>) -> Result<Map<String, Value>, Wrong> {
        let mut kept = Map::new();
        for (key, value) in map {
            let wrong = |reason: String| (format!("{path}[{key:?}]"), reason);
            labels::check_key(key).map_err(|e| wrong(e.to_string()))?;
            let Some(text) = value.as_str() else {
                return Err(wrong(format!("must be a text, and is {}{}", kind_of(value), quotes(value))));
            };
            if let Labels = self {
                labels::check_value(text).map_err(|e| wrong(e.to_string()))?;
            }
            if key != LAST_APPLIED {
                kept.insert(key.clone(), value.clone());
            }
        }
        Ok(kept)
    }
}

const LABEL_WANTED: &str = "use at most 63 lower-case letters, digits and dashes, first and last no dash";
const PORT_NAME_WANTED: &str =
    "use at most 15 lower-case letters, digits and single dashes, at least one of them a letter";

fn is_label(text: &str) -> bool {
    text.parse::<Label>().is_ok_and(|label| label.as_str() == text)
}

/// Whether `text` can be the name of a port (RFC 6335, 5.1).
pub fn is_port_name(text: &str) -> bool {
    is_label(text)
        && text.len() <= 15
        && !text.contains("--")
        && text.contains(|c: char| c.is_ascii_lowercase())
}

fn number_wanted(least: u64, most: u64, value: &Value) -> String {
    let given = if value.is_number() { value.to_string() } else { kind_of(value).to_owned() };
    let remedy =
        if value.as_str().is_some_and(|s| s.parse::<u64>().is_ok()) { "; take the quotes away" } else { "" };
    format!("must be a number from {least} to {most}, and is {given}{remedy}")
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "empty",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "a map",
    }
}

/// What to do about a number or truth value that should be a text.
fn quotes(value: &Value) -> String {
    match value {
        Value::Bool(_) | Value::Number(_) => format!("; put it in quotes: \"{value}\""),
        _ => String::new(),
    }
}
