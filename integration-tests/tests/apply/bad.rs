//! Bad manifests: what is said, and that nothing is half applied.

use muster_integration_tests::{Result, muster::Registrar, scenario};

use super::{everything, fails, prints, registrar, write, wrong};

const GOOD: &str = "apiVersion: v1\nkind: Namespace\nmetadata: {name: fresh}\n---\napiVersion: v1\nkind: Service\n\
                    metadata: {name: good}\nspec: {ports: [{port: 80}]}\n---\n";

fn service(metadata: &str, spec: &str) -> String {
    format!("apiVersion: v1\nkind: Service\nmetadata: {{{metadata}}}\nspec: {{{spec}}}\n")
}

fn slice(metadata: &str, more: &str) -> String {
    format!("apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{{metadata}}}\n{more}\n")
}

/// Applies and creates what must be refused with all of `says`, and changes nothing.
fn refused(registrar: &Registrar, path: &str, says: &[&str]) -> Result {
    let before = everything(registrar)?;
    for verb in ["apply", "create"] {
        let output = registrar.try_muster(&[verb, "-f", path])?;
        fails(&output, 1, says)?;
        fails(&output, 1, &["nothing has been changed"])?;
        let after = everything(registrar)?;
        if after != before {
            return Err(wrong("nothing to be changed", (output, before, after)));
        }
    }
    Ok(())
}

#[test]
fn bad_manifests_are_told_by_file_document_field_and_remedy_and_change_nothing() {
    scenario("bad manifests", |lab| {
        let (registrar, _) = registrar(lab)?;
        registrar.muster(&[
            "create",
            "service",
            "clusterip",
            "taken",
            "--tcp=80",
            "--clusterip=100.96.0.9",
        ])?;
        let ports = "ports: [{port: 80}]";
        let cases: [(String, &[&str]); 24] = [
            ("apiVersion: v1\nkind: Pod\nmetadata: {name: x}\n".into(), &["kind: \"Pod\"", "there are"]),
            (
                "apiVersion: v1\nkind: Endpoints\nmetadata: {name: x}\n".into(),
                &["kind", "EndpointSlice instead"],
            ),
            (service("name: x", ports).replace("v1", "v2"), &["apiVersion", "write apiVersion: v1"]),
            (service("name: x", "ports: [{prot: 80}]"), &["spec.ports[0].prot: unknown field", "there are"]),
            (service("name: x", "colour: red"), &["spec.colour: unknown field", "there are"]),
            (service("name: X_y", ports), &["metadata.name", "lower-case letters"]),
            (service("labels: {a: b}", ports), &["metadata.name: missing"]),
            (service("name: x", "ports: [{port: 65536}]"), &["spec.ports[0].port", "1 to", "65536"]),
            (service("name: x", "ports: [{port: 0}]"), &["spec.ports[0].port", "1 to"]),
            (service("name: x", "ports: [{name: a}]"), &["spec.ports[0].port: missing"]),
            (service("name: x", "ports: [{port: 1}, {port: 2}]"), &["spec.ports[0].name: missing"]),
            (service("name: x", "ports: []"), &["spec.ports: missing", "clusterIP: None"]),
            (service("name: x", "type: ExternalName"), &["spec.externalName: missing"]),
            (
                service("name: x", &format!("clusterIP: nowhere, {ports}")),
                &["spec.clusterIP", "leave it out"],
            ),
            (
                service("name: x", &format!("clusterIP: 100.96.0.9, {ports}")),
                &["spec.clusterIP", "in use", "choose another"],
            ),
            (
                service("name: x", &format!("clusterIP: 10.0.0.1, {ports}")),
                &["spec.clusterIP", "not in the address pool", "choose"],
            ),
            // In a namespace that is not there yet, all the same.
            (
                service("name: x, namespace: fresh", &format!("clusterIP: 10.0.0.1, {ports}")),
                &["spec.clusterIP", "not in the address pool"],
            ),
            (
                service("name: x, namespace: nowhere", ports),
                &["metadata.namespace", "does not exist", "muster create namespace nowhere"],
            ),
            (service("name: good", ports), &["metadata.name", "in ", "document 2 already", "remove one"]),
            (slice("name: x", "endpoints: []"), &["addressType: missing", "IPv4 or IPv6"]),
            (
                slice("name: x", "addressType: IPv6\nendpoints: [{addresses: [10.0.0.1]}]"),
                &["endpoints[0].addresses[0]", "a slice of their own"],
            ),
            (slice("name: x, namespace: nowhere", "addressType: IPv4"), &["metadata.namespace", "create"]),
            ("metadata: {name: [}\n".into(), &["YAML", "line"]),
            ("- 1\n".into(), &["must be a resource"]),
        ];
        for (text, says) in cases {
            let path = write(lab, "bad.yaml", &format!("{GOOD}{text}"))?;
            refused(&registrar, &path, says)?;
            refused(&registrar, &path, &["bad.yaml, document 3"])?;
        }
        // In a list, the item is named; an error in one file keeps the others from being applied.
        let list = |text: &str| {
            format!("apiVersion: v1\nkind: List\nitems:\n- {}", text.trim_end().replace('\n', "\n  "))
        };
        write(lab, "dir/a.yaml", GOOD.trim_end_matches("---\n"))?;
        write(lab, "dir/b.yaml", &list(&service("name: x", "ports: [{port: 0}]")))?;
        let dir = lab.directory().join("dir").display().to_string();
        refused(&registrar, &dir, &["b.yaml: items[0].spec.ports[0].port"])?;
        write(lab, "dir/b.yaml", &list(&service("name: x", &format!("clusterIP: 100.96.0.9, {ports}"))))?;
        refused(&registrar, &dir, &["b.yaml, items[0]: ", "spec.clusterIP", "in use"])?;
        // Two Services that ask for one address.
        let two = service("name: y", &format!("clusterIP: 100.96.0.5, {ports}"));
        let path = write(lab, "two.yaml", &format!("{two}---\n{}", two.replace("name: y", "name: z")))?;
        refused(&registrar, &path, &["two.yaml, document 2", "spec.clusterIP", "service/y", "document 1"])
    });
}

#[test]
fn files_made_to_do_harm_are_refused() {
    scenario("harmful files", |lab| {
        let (registrar, _) = registrar(lab)?;
        // Each level has nine of the one before.
        let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
        for n in 1..12 {
            let of = vec![format!("*a{}", n - 1); 9].join(", ");
            bomb += &format!("a{n}: &a{n} [{of}]\n");
        }
        let path = write(lab, "bomb.yaml", &format!("{GOOD}{bomb}"))?;
        refused(&registrar, &path, &["bomb.yaml", "document 3", "YAML"])?;
        let path = write(lab, "deep.yaml", &format!("{GOOD}a: {}", "[".repeat(100_000)))?;
        refused(&registrar, &path, &["deep.yaml", "brackets"])?;
        let many = |what: &str| [what; 20_000].join(", ");
        let path = write(lab, "wide.yaml", &format!("{GOOD}a: &a [{}]\nb: [{}]\n", many("x"), many("*a")))?;
        refused(&registrar, &path, &["wide.yaml, document 3", "aliases"])?;
        let path = write(lab, "twice.yaml", &format!("{GOOD}{}kind: Service\n", service("name: x", "")))?;
        refused(&registrar, &path, &["twice.yaml, document 3", "\"kind\" is there twice", "remove one"])?;
        let path = write(lab, "deep.json", &format!("{{\"a\": {}", "[".repeat(100_000)))?;
        refused(&registrar, &path, &["deep.json", "JSON"])?;
        let path = write(lab, "huge.yaml", &"# nothing\n".repeat(7 << 20))?;
        refused(&registrar, &path, &["huge.yaml", "64 MiB"])?;
        let path = write(lab, "binary.yaml", "a: \0\u{1}")?;
        refused(&registrar, &path, &["binary.yaml"])
    });
}

#[test]
fn a_selector_that_matches_nothing_is_warned_of() {
    scenario("selectors", |lab| {
        let (registrar, _) = registrar(lab)?;
        let path =
            write(lab, "web.yaml", &service("name: web", "selector: {role: web}, ports: [{port: 80}]"))?;
        let output = registrar.try_muster(&["apply", "-f", &path])?;
        fails(
            &output,
            0,
            &["warning", "web.yaml: spec.selector: role=web", "label a device", "EndpointSlice"],
        )?;
        assert_eq!(output.stdout, "service/web created\n");
        registrar.muster(&["delete", "svc", "web"])?;
        registrar.muster(&["create", "device", "d", "-l", "role=web"])?;
        let output = registrar.try_muster(&["apply", "-f", &path])?;
        assert_eq!((output.stdout.as_str(), output.stderr.as_str()), ("service/web created\n", ""));
        Ok(())
    });
}

#[test]
fn a_failure_in_the_middle_undoes_what_was_done() {
    scenario("undone", |lab| {
        let (registrar, _) = registrar(lab)?;
        let one = service("name: one", "ports: [{port: 80}]");
        let path = write(lab, "one.yaml", &one)?;
        registrar.muster(&["apply", "-f", &path])?;
        // Without its age, which goes on.
        let described = || -> Result<String> {
            let text = registrar.muster(&["describe", "svc", "one"])?;
            Ok(text.lines().filter(|line| !line.starts_with("Created:")).collect::<Vec<_>>().join("\n"))
        };
        let before = described()?;
        // Only when it is created does the registrar see that a device's name is reserved.
        let text = format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: fresh}}\n---\n{}---\n{}---\n\
             apiVersion: muster/v1\nkind: Device\nmetadata: {{name: svc}}\n",
            one.replace("port: 80", "port: 81"),
            service("name: two, namespace: fresh", "ports: [{port: 80}]")
        );
        let path = write(lab, "all.yaml", &text)?;
        let output = registrar.try_muster(&["apply", "-f", &path])?;
        fails(
            &output,
            1,
            &[
                "all.yaml, document 4",
                "reserved",
                "namespace/fresh deleted again",
                "nothing has been changed",
            ],
        )?;
        prints(&registrar, &["get", "ns,svc", "-A", "-o", "name"], &["namespace/default", "service/one"])?;
        assert_eq!(described()?, before);
        Ok(())
    });
}
