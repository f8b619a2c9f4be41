//! Each way in which manifests of Kubernetes' kinds are wrong, and that nothing makes reading them panic.

use proptest::prelude::*;

use super::*;

const SERVICE: &str = "apiVersion: v1
kind: Service
metadata: {name: a}
spec:
  ports:
  - {name: http, port: 80, targetPort: 8080}
  - {name: dns, port: 53, protocol: UDP}
";
const SLICE: &str = "apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: a-1, labels: {kubernetes.io/service-name: a}}
addressType: IPv4
endpoints: [{addresses: [100.64.0.1], conditions: {ready: null}}]
ports: [{name: http, port: 80}]
";

#[test]
fn each_mistake_names_field_and_remedy() {
    assert!(parse("f", SERVICE).is_ok() && parse("f", SLICE).is_ok());
    for (text, from, to, message) in [
        (
            SERVICE,
            "port: 53",
            "port: 65536",
            "f: spec.ports[1].port: must be a number from 1 to 65535, and is 65536",
        ),
        (SERVICE, "port: 53", "port: 0", "spec.ports[1].port: must be a number from 1 to 65535, and is 0"),
        (
            SERVICE,
            "port: 53",
            "port: '53'",
            "spec.ports[1].port: must be a number from 1 to 65535, and is a text; take the quotes",
        ),
        (SERVICE, "port: 53", "port: 53.5", "spec.ports[1].port: must be a number"),
        (SERVICE, "port: 53, ", "", "spec.ports[1].port: missing"),
        (
            SERVICE,
            "port: 53, protocol: UDP",
            "port: 80",
            "spec.ports[1].port: 80/TCP is that of spec.ports[0]",
        ),
        (SERVICE, "name: dns", "name: http", "spec.ports[1].name: \"http\" is the name of spec.ports[0]"),
        (SERVICE, "name: dns, ", "", "spec.ports[1].name: missing; each of several"),
        (SERVICE, "UDP", "DCCP", "spec.ports[1].protocol: \"DCCP\" is not known; there are TCP, UDP, SCTP"),
        (SERVICE, "8080", "a_b", "spec.ports[0].targetPort: \"a_b\" is neither a port nor a name"),
        (SERVICE, "8080", "70000", "spec.ports[0].targetPort: must be a number from 1 to 65535"),
        (SERVICE, "8080", "[1]", "spec.ports[0].targetPort: must be a text, and is a list"),
        (SERVICE, "name: a}", "name: A}", "metadata.name: \"A\" is not a name; use at most 63"),
        (SERVICE, "name: a}", "generateName: a-}", "metadata.name: missing; names are not generated"),
        (
            SERVICE,
            "name: a}",
            "name: a, labels: {b: 1}}",
            "metadata.labels[\"b\"]: must be a text, and is a number; put it in quotes: \"1\"",
        ),
        (SERVICE, "name: a}", "name: a, labels: {b: ' '}}", "metadata.labels[\"b\"]:"),
        (SERVICE, "name: a}", "name: a, nam: b}", "metadata.nam: unknown field \"nam\"; there are name"),
        (SERVICE, "ports:", "selectors: {}\n  ports:", "spec.selectors: unknown field"),
        (
            SERVICE,
            "ports:",
            "type: Cluster\n  ports:",
            "spec.type: \"Cluster\" is not known; there are ClusterIP",
        ),
        (
            SERVICE,
            "ports:",
            "clusterIP: 1.2.3\n  ports:",
            "spec.clusterIP: \"1.2.3\" is not an IP address; write one of",
        ),
        (
            SERVICE,
            "ports:",
            "clusterIP: 1.2.3.4\n  clusterIPs: [1.2.3.5]\n  ports:",
            "spec.clusterIPs[0]: 1.2.3.5 is not spec.clusterIP",
        ),
        (SERVICE, "ports:", "clusterIPs: [1.2.3.4, 1.2.3.5]\n  ports:", "spec.clusterIPs: there can be one"),
        (SERVICE, "ports:", "type: ExternalName\n  ports:", "spec.externalName: missing"),
        (
            SERVICE,
            "ports:",
            "type: LoadBalancer\n  clusterIP: None\n  ports:",
            "spec.clusterIP: a Service of type LoadBalancer",
        ),
        (SERVICE, "ports:", "ipFamilies: [IPv4, IPv4]\n  ports:", "spec.ipFamilies: there can be"),
        (
            SERVICE,
            "ports:",
            "publishNotReadyAddresses: 'yes'\n  ports:",
            "spec.publishNotReadyAddresses: must be true or false",
        ),
        (
            SERVICE,
            "ports:",
            "sessionAffinityConfig: {clientIP: {timeoutSeconds: 86401}}\n  ports:",
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds: must be a number from 1 to 86400",
        ),
        (SERVICE, "ports:", "externalIPs: [x]\n  ports:", "spec.externalIPs[0]: \"x\" is not an IP"),
        (SERVICE, "v1", "v2", "apiVersion: \"v2\" is not known; write apiVersion: v1"),
        (SERVICE, "Service", "Endpoints", "write an EndpointSlice instead"),
        (SERVICE, "Service", "Namespace", "spec.ports: unknown field"),
        (SLICE, "IPv4", "FQDN", "addressType: \"FQDN\" is not known; there are IPv4, IPv6"),
        (SLICE, "IPv4", "IPv6", "endpoints[0].addresses[0]: \"100.64.0.1\" is not of addressType IPv6"),
        (SLICE, "[100.64.0.1]", "[]", "endpoints[0].addresses: an endpoint has 1 to 100"),
        (SLICE, "port: 80", "port: null", "ports[0].port: missing"),
        (SLICE, "ready: null", "ready: 1", "endpoints[0].conditions.ready: must be true or false"),
        (SLICE, "addressType", "spec", "spec: unknown field"),
    ] {
        let error = parse("f", &text.replacen(from, to, 1)).unwrap_err().to_string();
        assert!(error.contains(message), "{from} -> {to}: {error}");
    }
}

#[test]
fn lists_name_the_item() {
    let list = "apiVersion: v1\nkind: ServiceList\nitems: [{metadata: {name: a}, spec: {clusterIP: None}}, {metadata: {name: b}, spec: {x: 1}}]";
    let error = parse("f", list).unwrap_err().to_string();
    assert!(error.starts_with("f: items[1].spec.x: unknown field"), "{error}");
}

#[test]
fn the_same_object_or_address_twice_is_an_error() {
    let text = |name: &str, ip: &str| {
        SERVICE
            .replace("name: a}", &format!("name: {name}}}"))
            .replace("ports:", &format!("clusterIP: {ip}\n  ports:"))
    };
    let check = |text: String| {
        let manifests = parse("f", &text).unwrap();
        let keys: Vec<_> = manifests
            .iter()
            .map(|m| crate::resource::Key::of(&m.object::<muster_proto::admin::Service>().unwrap()))
            .collect();
        let members = manifests.iter().zip(&keys).map(|(manifest, key)| Member { manifest, key });
        duplicates(members).map_err(|e| e.to_string())
    };
    let two = |a: String, b: String| check(format!("{a}---\n{b}"));
    assert_eq!(two(text("a", "None"), text("b", "None")), Ok(()));
    assert_eq!(
        two(text("a", "None"), text("a", "None")),
        Err("f, document 2: metadata.name: service/a is in f, document 1 already; remove one".into())
    );
    assert_eq!(
        two(text("a", "1.2.3.4"), text("b", "1.2.3.4")),
        Err("f, document 2: spec.clusterIP: 1.2.3.4 is that of service/a in f, document 1, too; choose another, or leave it out".into())
    );
}

proptest! {
    #[test]
    fn no_text_makes_reading_panic(text in ".*") {
        let _ = parse("f", &text);
    }

    #[test]
    fn no_damage_makes_reading_panic(slice: bool, at: prop::sample::Index, length in 0usize..12, put in "[\\PC\n]{0,8}") {
        let text = if slice { SLICE } else { SERVICE };
        let start = at.index(text.len());
        let end = (start + length).min(text.len());
        let _ = parse("f", &[&text[..start], &put, &text[end..]].concat());
    }
}
