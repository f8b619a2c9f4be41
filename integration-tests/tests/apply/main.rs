//! Kubernetes' own manifests of Namespaces, Services and EndpointSlices through the operator's command, against a real
//! registrar: what they become, and that bad ones change nothing.
#![allow(clippy::unwrap_used, reason = "a scenario's helpers fail by saying so")]

mod bad;

use std::{fs, path::Path};

use muster_integration_tests::{
    Host, Lab, LabError, Output, Result,
    muster::{Registrar, binary},
    scenario,
};
use serde_json::Value;

/// A namespace with everything that Services can be, in YAML.
const SHOP: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {team: a}}
---
apiVersion: v1
kind: Service
metadata: {name: auto, namespace: shop}
spec:
  ports:
  - {name: http, port: 80, targetPort: 8080}
  - {name: dns, port: 53, protocol: UDP, targetPort: dns-udp}
---
apiVersion: v1
kind: Service
metadata: {name: given, namespace: shop}
spec: {clusterIP: 100.96.0.77, ports: [{port: 443}]}
---
apiVersion: v1
kind: Service
metadata: {name: dual, namespace: shop}
spec: {ipFamilyPolicy: RequireDualStack, ipFamilies: [IPv6, IPv4], ports: [{port: 80}]}
---
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Service
  metadata: {name: db, namespace: shop}
  spec: {clusterIP: None, publishNotReadyAddresses: true, ports: [{name: pg, port: 5432}]}
- apiVersion: v1
  kind: Service
  metadata: {name: docs, namespace: shop}
  spec: {type: ExternalName, externalName: docs.example.org}
"#;

/// Its EndpointSlices, in JSON, as kubectl prints a list of one kind.
const SLICES: &str = r#"{"apiVersion": "v1", "kind": "EndpointSliceList", "items": [
  {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
   "metadata": {"name": "db-4", "namespace": "shop", "labels": {"kubernetes.io/service-name": "db"}},
   "ports": [{"name": "pg", "port": 15432, "protocol": "TCP"}],
   "endpoints": [{"addresses": ["10.9.0.1"], "hostname": "primary", "conditions": {"ready": true}},
                 {"addresses": ["10.9.0.2"], "conditions": {"ready": false, "serving": true, "terminating": true}}]},
  {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv6",
   "metadata": {"name": "db-6", "namespace": "shop", "labels": {"kubernetes.io/service-name": "db"}},
   "endpoints": [{"addresses": ["2001:db8::1"]}]}]}"#;

fn registrar(lab: &Lab) -> Result<(Registrar, Host)> {
    let switch = lab.switch("lan")?;
    let hq = lab.host("hq")?;
    switch.plug(&hq, &["198.51.100.10/24"])?;
    hq.route("default via 198.51.100.1")?;
    let mut registrar = Registrar::init(&hq, "net.example", "198.51.100.10", "")?;
    registrar.serve()?;
    Ok((registrar, hq))
}

fn wrong(expected: &str, seen: impl std::fmt::Debug) -> LabError {
    LabError::Command { command: expected.into(), reason: format!("{seen:#?}") }
}

/// Writes a file, and returns its path.
fn write(lab: &Lab, name: &str, contents: &str) -> Result<String> {
    let path = lab.directory().join(name);
    let failed = |source| LabError::File { path: path.display().to_string(), source };
    fs::create_dir_all(path.parent().unwrap_or(Path::new("/"))).map_err(failed)?;
    fs::write(&path, contents).map_err(failed)?;
    Ok(path.display().to_string())
}

/// Runs `muster`, which must succeed, and checks the lines that it prints to standard output.
fn prints(registrar: &Registrar, arguments: &[&str], lines: &[&str]) -> Result {
    let seen = registrar.muster(arguments)?;
    if seen.lines().eq(lines.iter().copied()) {
        Ok(())
    } else {
        Err(wrong(&format!("{arguments:?} {lines:?}"), seen))
    }
}

/// Checks exit code and standard error.
fn fails(output: &Output, code: i32, says: &[&str]) -> Result {
    for part in says {
        if output.status.code() != Some(code) || !output.stderr.contains(part) {
            return Err(wrong(&format!("a failure with exit code {code} that says {part:?}"), output));
        }
    }
    Ok(())
}

/// Everything that there is.
fn everything(registrar: &Registrar) -> Result<String> {
    registrar.muster(&["get", "networks,namespaces,devices,services,endpointslices", "-A", "-o", "json"])
}

fn object(registrar: &Registrar, kind: &str, name: &str) -> Result<Value> {
    let text = registrar.muster(&["get", kind, name, "-n", "shop", "-o", "json"])?;
    serde_json::from_str(&text).map_err(|error| wrong("JSON", (error, text)))
}

#[test]
fn what_kubernetes_has_is_applied_shown_changed_and_deleted() {
    scenario("apply", |lab| {
        let (registrar, hq) = registrar(lab)?;
        let shop = write(lab, "dir/1-shop.yaml", SHOP)?;
        let slices = write(lab, "dir/2-slices.json", SLICES)?;
        write(lab, "dir/README", "not a manifest")?;
        let dir = lab.directory().join("dir").display().to_string();
        let names = [
            "namespace/shop",
            "service/auto",
            "service/given",
            "service/dual",
            "service/db",
            "service/docs",
            "endpointslice/db-4",
            "endpointslice/db-6",
        ];
        let done = |what: &str| names.map(|name| format!("{name} {what}"));
        let all = |what: &str, arguments: &[&str]| {
            prints(&registrar, arguments, &done(what).each_ref().map(String::as_str))
        };
        let before = everything(&registrar)?;
        all("created (server dry run)", &["apply", "-f", &dir, "--dry-run"])?;
        assert_eq!(everything(&registrar)?, before);
        all("created", &["apply", "-f", &dir])?;
        all("unchanged", &["apply", "-f", &shop, "-f", &slices])?;

        let spec = |name| Ok::<_, LabError>(object(&registrar, "service", name)?["spec"].clone());
        let auto = spec("auto")?;
        assert!(auto["clusterIP"].as_str().unwrap().starts_with("100."), "{auto}");
        assert_eq!(auto["ports"][0]["targetPort"], 8080, "{auto}");
        assert_eq!(auto["ports"][1]["targetPort"], "dns-udp", "{auto}");
        assert_eq!(spec("given")?["clusterIPs"], serde_json::json!(["100.96.0.77"]));
        let dual = spec("dual")?["clusterIPs"].clone();
        assert!(dual[0].as_str().unwrap().contains(':') && dual[1].as_str().unwrap().contains('.'), "{dual}");
        assert_eq!(spec("db")?["publishNotReadyAddresses"], true);
        assert_eq!(spec("docs")?["externalName"], "docs.example.org");
        let slice = object(&registrar, "endpointslice", "db-4")?;
        assert_eq!(slice["endpoints"][0]["hostname"], "primary", "{slice}");
        assert_eq!(slice["endpoints"][1]["conditions"]["ready"], false, "{slice}");

        let table = registrar.muster(&["get", "svc", "-n", "shop"])?;
        for part in ["CLUSTER-IP", "100.96.0.77", "ExternalName", "docs.example.org", "80/TCP,53/UDP"] {
            assert!(table.contains(part), "{part}: {table}");
        }
        let described = registrar.muster(&["describe", "svc", "db", "-n", "shop"])?;
        for part in ["None", "pg 5432/TCP", "published"] {
            assert!(described.contains(part), "{part}: {described}");
        }
        // What is printed is applied, and changes nothing; from standard input, too.
        let printed = registrar.muster(&["get", "ns,svc,endpointslices", "-A", "-o", "yaml"])?;
        let printed = write(lab, "printed.yaml", &printed)?;
        let command =
            format!("{} --credential {}", binary("muster")?.display(), registrar.credential().display());
        let said = hq.sh(&format!("{command} apply -f - <{printed}"))?;
        assert_eq!(said.lines().filter(|line| line.ends_with(" unchanged")).count(), 9, "{said}");
        assert_eq!(said.lines().count(), 9, "{said}");

        // A change is made to what is written, and to that alone.
        let address = auto["clusterIP"].clone();
        write(lab, "dir/1-shop.yaml", &SHOP.replace("port: 80, targetPort: 8080", "port: 81"))?;
        let said = registrar.muster(&["apply", "-f", &shop])?;
        assert!(said.contains("service/auto configured\nservice/given unchanged\n"), "{said}");
        let auto = spec("auto")?;
        assert_eq!((&auto["ports"][0]["port"], &auto["clusterIP"]), (&Value::from(81), &address));

        registrar.muster(&["delete", "-f", &slices])?;
        prints(&registrar, &["get", "endpointslices", "-A", "-o", "name"], &[])?;
        registrar.muster(&["delete", "svc", "docs", "-n", "shop"])?;
        registrar.muster(&["delete", "namespace", "shop"])?;
        prints(&registrar, &["get", "svc", "-A", "-o", "name"], &[])?;
        fails(&registrar.try_muster(&["get", "svc", "auto", "-n", "shop"])?, 1, &["not found", "shop"])
    });
}

#[test]
fn a_service_goes_with_its_slices_however_many_and_many_are_applied() {
    scenario("many slices", |lab| {
        let (registrar, _) = registrar(lab)?;
        let mut text =
            "apiVersion: v1\nkind: Service\nmetadata: {name: big}\nspec: {clusterIP: None}\n".to_owned();
        for n in 0..300 {
            text += &format!(
                "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: big-{n}, labels: \
                 {{kubernetes.io/service-name: big}}}}\naddressType: IPv4\nendpoints: [{{addresses: [10.9.0.1]}}]\n"
            );
        }
        let file = write(lab, "big.yaml", &text)?;
        assert_eq!(registrar.muster(&["apply", "-f", &file])?.lines().count(), 301);
        prints(&registrar, &["delete", "svc", "big"], &["service \"big\" deleted"])?;
        prints(&registrar, &["get", "endpointslices", "-o", "name"], &[])
    });
}
