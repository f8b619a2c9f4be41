//! Tests of reading and printing manifests.

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
    assert_eq!(manifests[0].written(), ["spec.virtualIpv4"]);
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
        "f.yaml, document 2: spec.virtualIp: unknown field \"virtualIp\"; there are virtualIpv4, virtualIpv6, revoked, mayProxy, subnets"
    );
    assert_eq!(
        error(&DEVICE.replace("{role: web}", "{role: 1}")),
        "f.yaml: metadata.labels: invalid type: integer `1`, expected a string"
    );
    assert_eq!(
        error(&format!(
            "{DEVICE}---\n{}",
            DEVICE.replace("virtual_ipv4: 100.64.0.10", "subnets: [10.1.0.5/24]")
        )),
        "f.yaml, document 2: spec.subnets: 10.1.0.5/24 has bits set beyond its length; write 10.1.0.0/24"
    );
    assert_eq!(error(&DEVICE.replace("name: web", "uid: x")), "f.yaml: metadata.name: missing");
    assert_eq!(
        error(&DEVICE.replace("muster/v1", "v1")),
        "f.yaml: apiVersion: \"v1\" is not known; write apiVersion: muster/v1"
    );
    assert_eq!(
        error(&DEVICE.replace("Device", "Pod")),
        "f.yaml: kind: \"Pod\" is not known; there are Network, Device, Director, Registrar, Token, Namespace, Service, EndpointSlice"
    );
    assert_eq!(
        error("apiVersion: muster/v1\nkind: List\nitems: [{apiVersion: muster/v1}]"),
        "f.yaml: items[0].kind: missing; there are Network, Device, Director, Registrar, Token, Namespace, Service, EndpointSlice"
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
