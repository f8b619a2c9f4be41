//! The operator's command against a real registrar: kubectl's grammar, manifests, watches, and whatever an operator
//! gets wrong.

mod access;

use std::{fs, path::Path, time::Duration};

use muster_integration_tests::{
    Host, Lab, LabError, Output, Result,
    muster::{Agent, Registrar, binary},
    process::wait_for,
    scenario,
};

const ADDRESS: &str = "198.51.100.10";
const PATIENCE: Duration = Duration::from_secs(30);

/// A registrar that serves.
fn registrar(lab: &Lab) -> Result<(Registrar, Host)> {
    let switch = lab.switch("lan")?;
    let hq = lab.host("hq")?;
    switch.plug(&hq, &["198.51.100.10/24"])?;
    hq.route("default via 198.51.100.1")?;
    let mut registrar = Registrar::init(&hq, "net.example", ADDRESS, "")?;
    registrar.serve()?;
    Ok((registrar, hq))
}

fn wrong(expected: &str, seen: impl std::fmt::Debug) -> LabError {
    LabError::Command { command: expected.into(), reason: format!("{seen:#?}") }
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

/// Runs `muster`, which must succeed, and checks everything that it prints to standard output.
fn prints(registrar: &Registrar, arguments: &[&str], expected: &str) -> Result {
    let seen = registrar.muster(arguments)?;
    if seen == expected { Ok(()) } else { Err(wrong(&format!("{arguments:?} to print {expected:?}"), seen)) }
}

fn write(path: &Path, contents: &str) -> Result<String> {
    fs::write(path, contents)
        .map_err(|source| LabError::File { path: path.display().to_string(), source })?;
    Ok(path.display().to_string())
}

fn device(name: &str, more: &str) -> String {
    format!("apiVersion: muster/v1\nkind: Device\nmetadata: {{name: {name}{more}}}\n")
}

/// What a Python program that has parsed standard output as JSON into `v` prints.
fn json(host: &Host, text: &str, program: &str) -> Result<String> {
    let file = host.directory().join("output.json");
    let file = write(&file, text)?;
    host.sh(&format!("python3 -c 'import json\nv = json.load(open(\"{file}\"))\n{program}'"))
}

#[test]
fn apply_creates_changes_and_leaves_alone() {
    scenario("apply", |lab| {
        let (registrar, hq) = registrar(lab)?;
        let file = lab.directory().join("devices.yaml");
        let documents = format!(
            "{}---\n{}spec: {{virtualIpv4: 100.64.0.9}}\n",
            device("web", ", labels: {role: web, tier: a}"),
            device("db", ", namespace: prod")
        );
        let path = write(&file, &documents)?;
        let apply = ["apply", "-f", &path];
        prints(&registrar, &apply, "device/web created\ndevice/db created\n")?;
        prints(&registrar, &apply, "device/web unchanged\ndevice/db unchanged\n")?;
        // What a manifest leaves out stays: here the label that somebody else has set.
        registrar.muster(&["label", "device", "web", "owner=ops"])?;
        write(&file, &documents.replace("tier: a", "tier: b"))?;
        prints(&registrar, &apply, "device/web configured\ndevice/db unchanged\n")?;
        let labels = registrar.muster(&["get", "device", "web", "--show-labels", "--no-headers"])?;
        assert!(labels.contains("owner=ops,role=web,tier=b"), "{labels}");

        // What is printed can be applied, and changes nothing.
        let printed = write(&file, &registrar.muster(&["get", "devices", "-A", "-o", "yaml"])?)?;
        prints(&registrar, &["apply", "-f", &printed], "device/db unchanged\ndevice/web unchanged\n")?;
        // An object as it was once is refused once somebody else has changed it, and that change is kept.
        let stale = write(&file, &registrar.muster(&["get", "device", "web", "-o", "yaml"])?)?;
        registrar.muster(&["label", "device", "web", "owner=other", "--overwrite"])?;
        fails(
            &registrar.try_muster(&["apply", "-f", &stale])?,
            1,
            &["devices.yaml", "device \"web\"", "revision", "changed since it was read"],
        )?;
        let found = registrar.muster(&["get", "devices", "-l", "owner=other", "-o", "name"])?;
        assert_eq!(found, "device/web\n");

        // A network, by JSON and standard input; then changed.
        let network = r#"{"apiVersion":"muster/v1","kind":"Network","metadata":{"name":"lab"},
            "spec":{"domain":"lab.example","devicePoolV4":"10.9.0.0/16","recordTtl":"30s"}}"#;
        let command = |text: &str| -> Result<String> {
            hq.sh(&format!(
                "{} --credential {} apply -f - <<'EOF'\n{text}\nEOF",
                binary("muster")?.display(),
                registrar.credential().display()
            ))
        };
        assert_eq!(command(network)?, "network/lab created\n");
        assert_eq!(command(network)?, "network/lab unchanged\n");
        assert_eq!(command(&network.replace("30s", "60s"))?, "network/lab configured\n");
        let described = registrar.muster(&["describe", "network", "lab"])?;
        assert!(described.contains("Record TTL:          60s"), "{described}");

        // Deleted by the same files that made them.
        let path = write(&file, &documents)?;
        let deleted = registrar.muster(&["delete", "-f", &path])?;
        assert_eq!(deleted, "device \"db\" deleted\ndevice \"web\" deleted\n");
        prints(&registrar, &["delete", "-f", &path, "--ignore-not-found"], "")
    });
}

#[test]
fn bad_manifests_are_told_by_file_document_and_field() {
    scenario("bad manifests", |lab| {
        let (registrar, _) = registrar(lab)?;
        let file = lab.directory().join("bad.yaml");
        let good = device("good", "");
        for (text, says) in [
            (device("x", "").replace("Device", "Pod"), &["bad.yaml: kind: \"Pod\"", "Device"][..]),
            (device("x", "").replace("muster/v1", "v1"), &["bad.yaml: apiVersion", "muster/v1"]),
            (
                format!("{good}---\n{}spec: {{colour: red}}\n", device("x", "")),
                &["bad.yaml, document 2: spec.colour: unknown field", "virtualIpv4"],
            ),
            (format!("{good}---\n{}", device("x", ", nmae: y")), &["document 2: metadata.nmae"]),
            (format!("{good}---\n{}extra: 1\n", device("x", "")), &["document 2: extra: unknown field"]),
            (format!("{good}---\n{}", device("[", "")), &["bad.yaml", "document 2", "YAML", "line"]),
            (
                format!("{good}---\n{}spec: {{revoked: maybe}}\n", device("x", "")),
                &["document 2: spec.revoked", "boolean"],
            ),
            (format!("{good}---\n- 1\n"), &["document 2", "must be a resource"]),
            ("{\"apiVersion\": 1,".into(), &["bad.yaml", "JSON"]),
            (String::new(), &["no manifests", "bad.yaml"]),
        ] {
            let path = write(&file, &text)?;
            for verb in ["apply", "create", "delete"] {
                let output = registrar.try_muster(&[verb, "-f", &path])?;
                fails(&output, 1, says)?;
                // All of it is read before any of it is acted upon, and that is said.
                fails(&output, 1, &["nothing has been changed"])?;
            }
        }
        assert_eq!(registrar.muster(&["get", "devices", "-A", "-o", "name"])?, "");

        // What only the registrar can refuse is told as well; then the others are not made, or deleted again.
        let path = write(&file, &format!("{good}---\n{}---\n{}", device("svc", ""), device("also", "")))?;
        let output = registrar.try_muster(&["apply", "-f", &path])?;
        fails(&output, 1, &["bad.yaml, document 2", "\"svc\"", "reserved"])?;
        fails(&output, 1, &["device/good deleted again", "nothing has been changed"])?;
        assert_eq!(registrar.muster(&["get", "devices", "-A", "-o", "name"])?, "");
        write(&file, &good)?;
        prints(&registrar, &["apply", "-f", &path], "device/good created\n")?;
        // A field that cannot change.
        let path = write(&file, &format!("{good}spec: {{virtualIpv4: 100.64.0.7}}\n"))?;
        fails(&registrar.try_muster(&["apply", "-f", &path])?, 1, &["virtual_ipv4", "cannot be changed"])?;
        fails(&registrar.try_muster(&["apply", "-f", "/nowhere.yaml"])?, 1, &["/nowhere.yaml"])
    });
}

#[test]
fn objects_are_selected_labelled_and_deleted() {
    scenario("selection", |lab| {
        let (registrar, _) = registrar(lab)?;
        let create = |name: &str, namespace: &str, labels: &str| {
            registrar.muster(&["create", "device", name, "-n", namespace, "-l", labels])
        };
        create("web1", "default", "role=web,tier=a")?;
        create("web2", "default", "role=web,tier=b")?;
        create("db1", "default", "role=db")?;
        create("web3", "prod", "role=web")?;
        for (arguments, names) in [
            (&["-l", "role=web"][..], &["web1", "web2"][..]),
            (&["-l", "role==web", "-A"], &["web1", "web2", "web3"]),
            (&["-l", "role!=web"], &["db1"]),
            (&["-l", "role=web,tier=b"], &["web2"]),
            (&["-l", "tier in (a, c)"], &["web1"]),
            (&["-l", "tier notin (a)"], &["db1", "web2"]),
            (&["-l", "tier"], &["web1", "web2"]),
            (&["-l", "!tier", "-A"], &["db1", "web3"]),
            (&["-n", "prod"], &["web3"]),
            (&["-n", "prod", "-l", "tier"], &[]),
            (&["-A"], &["db1", "web1", "web2", "web3"]),
            (&[], &["db1", "web1", "web2"]),
        ] {
            let expected: String = names.iter().map(|name| format!("device/{name}\n")).collect();
            prints(&registrar, &[&["get", "devices", "-o", "name"], arguments].concat(), &expected)?;
        }
        fails(&registrar.try_muster(&["get", "devices", "-l", "a in b"])?, 2, &["a in b"])?;
        fails(
            &registrar.try_muster(&["get", "devices", "-n", "empty"])?,
            0,
            &["No resources found in empty namespace."],
        )?;
        fails(
            &registrar.try_muster(&["get", "device", "web3", "-n", "default"])?,
            1,
            &["not found", "prod"],
        )?;
        fails(
            &registrar.try_muster(&["get", "device", "nobody"])?,
            1,
            &["muster: devices \"nobody\" not found in network \"default\""],
        )?;
        // What exists is shown, whatever else does not.
        let some = registrar.try_muster(&["get", "device", "nobody", "web1"])?;
        fails(&some, 1, &["\"nobody\" not found"])?;
        assert!(some.stdout.contains("web1"), "{some:?}");

        prints(&registrar, &["label", "device", "web1", "zone=x"], "device/web1 labeled\n")?;
        prints(&registrar, &["label", "device", "web1", "zone=x"], "device/web1 not labeled\n")?;
        let conflict = registrar.try_muster(&["label", "device", "web1", "web2", "zone=y"])?;
        fails(&conflict, 1, &["device/web1", "already has a value (x)", "--overwrite"])?;
        assert_eq!(conflict.stdout, "device/web2 labeled\n");
        prints(&registrar, &["label", "device/web1", "zone=y", "--overwrite"], "device/web1 labeled\n")?;
        prints(&registrar, &["label", "device/web1", "zone-"], "device/web1 unlabeled\n")?;
        prints(
            &registrar,
            &["label", "devices", "-l", "role=web", "-A", "seen=1", "-o", "name"],
            "device/web1\ndevice/web2\ndevice/web3\n",
        )?;
        fails(&registrar.try_muster(&["label", "device", "web1", "bad key=1"])?, 2, &["bad key"])?;
        fails(&registrar.try_muster(&["label", "device", "web1", "key=bad value"])?, 2, &["bad value"])?;
        fails(&registrar.try_muster(&["label", "device", "nobody", "a=b"])?, 1, &["not found"])?;

        fails(&registrar.try_muster(&["delete", "devices"])?, 2, &["--all"])?;
        prints(
            &registrar,
            &["delete", "devices", "-l", "role=web"],
            "device \"web1\" deleted\ndevice \"web2\" deleted\n",
        )?;
        fails(&registrar.try_muster(&["delete", "devices", "-l", "role=web"])?, 0, &["No resources found"])?;
        let partly = registrar.try_muster(&["delete", "device", "nobody", "db1"])?;
        fails(&partly, 1, &["\"nobody\" not found"])?;
        assert_eq!(partly.stdout, "device \"db1\" deleted\n");
        prints(&registrar, &["delete", "devices", "--all", "-A", "-o", "name"], "device/web3\n")
    });
}

#[test]
fn pages_are_put_together() {
    scenario("pages", |lab| {
        let (registrar, hq) = registrar(lab)?;
        // More than a page has.
        const DEVICES: usize = 620;
        let items: String = (0..DEVICES)
            .map(|i| {
                let last = if i == DEVICES - 1 { ", labels: {last: yes-it-is}" } else { "" };
                let document = device(&format!("d{i:04}"), last);
                format!("- {}\n", document.trim_end().replace('\n', "\n  "))
            })
            .collect();
        let list = format!("apiVersion: muster/v1\nkind: List\nitems:\n{items}");
        let path = write(&lab.directory().join("many.yaml"), &list)?;
        let created = registrar.muster(&["apply", "-f", &path])?;
        assert_eq!(created.lines().filter(|line| line.ends_with(" created")).count(), DEVICES);
        let names = registrar.muster(&["get", "devices", "-o", "name"])?;
        let expected: Vec<String> = (0..DEVICES).map(|i| format!("device/d{i:04}")).collect();
        assert_eq!(names.lines().collect::<Vec<_>>(), expected);
        let text = registrar.muster(&["get", "devices", "-o", "json"])?;
        assert_eq!(json(&hq, &text, "print(len(v[\"items\"]))")?.trim(), DEVICES.to_string());
        // A selector that skips whole pages.
        prints(&registrar, &["get", "devices", "-l", "last", "-o", "name"], "device/d0619\n")?;
        let deleted = registrar.muster(&["delete", "devices", "--all"])?;
        assert_eq!(deleted.lines().count(), DEVICES);
        prints(&registrar, &["get", "devices", "-o", "name"], "")
    });
}

#[test]
fn every_output_can_be_read() {
    scenario("outputs", |lab| {
        let (registrar, hq) = registrar(lab)?;
        registrar.muster(&["create", "device", "web", "-l", "role=web", "--virtual-ipv4", "100.64.0.9"])?;
        for (arguments, program, expected) in [
            (
                &["get", "device", "web"][..],
                "print(v[\"apiVersion\"], v[\"kind\"], v[\"metadata\"][\"name\"])",
                "muster/v1 Device web",
            ),
            (&["get", "devices"], "print(v[\"kind\"], v[\"items\"][0][\"kind\"])", "List Device"),
            (&["get", "networks"], "print(v[\"items\"][0][\"spec\"][\"domain\"])", "net.example"),
            (&["get", "tokens,networks"], "print(*[i[\"kind\"] for i in v[\"items\"]])", "Token Network"),
            (
                &["label", "device", "web", "a=b"],
                "print(v[\"metadata\"][\"labels\"])",
                "{'a': 'b', 'role': 'web'}",
            ),
            (&["revoke", "device", "web"], "print(v[\"status\"][\"phase\"])", "Revoked"),
            (&["version"], "print(v[\"registrar\"][\"health\"])", "SERVING"),
            (
                &["create", "token", "t", "--reusable"],
                "print(v[\"secret\"][:7], v[\"joinCommand\"][:18], v[\"status\"][\"phase\"])",
                "muster. muster-agent join  Active",
            ),
        ] {
            let text = registrar.muster(&[arguments, &["-o", "json"]].concat())?;
            hq.sh(&format!("python3 -m json.tool {} /dev/null", write(&lab.directory().join("j"), &text)?))?;
            let seen = json(&hq, &text, program)?;
            if seen.trim() != expected {
                return Err(wrong(&format!("{arguments:?} to have {expected}"), (seen, text)));
            }
        }
        // The secret is shown once.
        for output in ["json", "yaml", "wide"] {
            let seen = registrar.muster(&["get", "token", "t", "-o", output])?;
            assert!(!seen.contains("muster.") && !seen.contains("secret"), "{seen}");
        }
        for (kind, titles) in [
            (
                "devices",
                &[
                    "NAME",
                    "STATUS",
                    "VIRTUAL-IPV4",
                    "AGE",
                    "VIRTUAL-IPV6",
                    "PRIVATE",
                    "REFLEXIVE",
                    "HOME",
                    "VERSION",
                ][..],
            ),
            ("tokens", &["NAME", "STATUS", "REUSABLE", "USES", "EXPIRES", "AGE"]),
            ("networks", &["NAME", "DOMAIN", "DEVICES", "AGE", "PUBLIC-ADDRESSES"]),
        ] {
            let table = registrar.muster(&["get", kind, "-o", "wide"])?;
            let first: Vec<&str> = table.lines().next().unwrap_or_default().split_whitespace().collect();
            assert!(first.starts_with(titles), "{table}");
            let described = registrar.muster(&["describe", kind])?;
            assert!(described.starts_with("Name:") && described.contains("Created:"), "{described}");
        }
        let table = registrar.muster(&["get", "devices", "-A", "--no-headers"])?;
        assert!(table.starts_with("default   web   Revoked   100.64.0.9"), "{table}");
        Ok(())
    });
}

#[test]
fn usage_errors_exit_with_2_and_help_with_0() {
    scenario("usage", |lab| {
        let (registrar, _) = registrar(lab)?;
        for (arguments, says) in [
            (&["get"][..], "required"),
            (&["dance"], "dance"),
            (
                &["get", "pods"],
                "there are networks (net), devices (dev), directors (dir), registrars (reg), tokens",
            ),
            (&["get", "devices", "-o", "xml"], "wide, json, yaml, name"),
            (&["get", "devices", "-n", "a", "-A"], "cannot be used"),
            (&["get", "devices,tokens", "x"], "TYPE/NAME"),
            (&["get", "devices,tokens", "-w"], "one resource type"),
            (&["get", "device", "x", "-l", "a=b"], "not both"),
            (&["revoke", "network", "default"], "cannot be revoked"),
            (&["create", "token", "--ttl", "soon"], "soon"),
            (&["create", "device", "x", "--virtual-ipv4", "::1"], "::1"),
        ] {
            fails(&registrar.try_muster(arguments)?, 2, &[says])?;
        }
        for help in [&["--help"][..], &["get", "--help"], &["help", "create", "token"], &["--version"]] {
            let output = registrar.try_muster(help)?;
            assert!(output.status.success() && output.stdout.contains("muster"), "{output:?}");
        }
        Ok(())
    });
}

#[test]
fn watches_show_events_and_go_on_after_a_restart() {
    scenario("watch", |lab| {
        let (mut registrar, hq) = registrar(lab)?;
        registrar.muster(&["create", "device", "before", "-l", "role=web"])?;
        let watch =
            hq.spawn("watch", registrar.muster_command(&["watch", "devices", "-l", "role=web", "-A"])?)?;
        let follow = hq.spawn("get-w", registrar.muster_command(&["get", "devices", "-w", "-o", "name"])?)?;
        let lines = |text: String, wanted: &[&[&str]]| -> Result<(), String> {
            let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
            let mut rows = rows.iter();
            for row in wanted {
                rows.find(|found| row.iter().all(|word| found.contains(word)))
                    .ok_or(format!("{row:?}: {text}"))?;
            }
            Ok(())
        };
        // The one begins with what is there, the other shows changes alone. It follows once a change is seen.
        wait_for("the list", PATIENCE, || lines(follow.log(), &[&["device/before"]]))?;
        wait_for("the first event", PATIENCE, || {
            let text = if watch.log().contains("probe=1") { "probe=2" } else { "probe=1" };
            registrar
                .muster(&["label", "device", "before", text, "--overwrite"])
                .map_err(|error| error.to_string())?;
            lines(watch.log(), &[&["EVENT", "NAMESPACE", "NAME", "STATUS"], &["MODIFIED", "before"]])
        })?;
        assert!(!watch.log().contains("ADDED"), "{}", watch.log());
        registrar.muster(&["create", "device", "web", "-n", "prod", "-l", "role=web"])?;
        registrar.muster(&["create", "device", "db", "-l", "role=db"])?;
        registrar.muster(&["revoke", "device", "web"])?;
        registrar.muster(&["delete", "device", "before"])?;
        // What no longer matches a selector has gone, as far as the watcher is concerned.
        registrar.muster(&["create", "device", "moves", "-l", "role=web"])?;
        registrar.muster(&["label", "device", "moves", "role=db", "--overwrite"])?;
        let first: &[&[&str]] = &[
            &["ADDED", "prod", "web", "Pending"],
            &["MODIFIED", "prod", "web", "Revoked"],
            &["DELETED", "default", "before"],
            &["ADDED", "default", "moves"],
            &["DELETED", "default", "moves"],
        ];
        wait_for("every event", PATIENCE, || lines(watch.log(), first))?;
        assert!(!watch.log().contains(" db "), "{}", watch.log());

        registrar.stop()?;
        wait_for("the watch to tell that it tries again", PATIENCE, || {
            let text = watch.log();
            if text.contains("trying again") { Ok(()) } else { Err(text) }
        })?;
        registrar.serve()?;
        registrar.muster(&["create", "device", "after", "-l", "role=web"])?;
        wait_for("an event after the restart", PATIENCE, || {
            lines(watch.log(), &[first, &[&["ADDED", "default", "after"]]].concat())?;
            lines(follow.log(), &[&["device/db"], &["device/moves"], &["device/after"]])
        })?;
        // Nothing was shown twice.
        assert_eq!(watch.log().matches("prod").count(), 2, "{}", watch.log());

        // Documents, one after another.
        let documents = hq.spawn(
            "watch-json",
            registrar.muster_command(&[
                "get",
                "device",
                "after",
                "-w",
                "-o",
                "json",
                "--output-watch-events",
            ])?,
        )?;
        wait_for("a JSON event", PATIENCE, || {
            let text = documents.log();
            if text.contains("\"type\": \"ADDED\"") && text.trim_end().ends_with('}') {
                Ok(())
            } else {
                Err(text)
            }
        })?;
        assert_eq!(
            json(&hq, &documents.log(), "print(v[\"object\"][\"metadata\"][\"name\"])")?.trim(),
            "after"
        );
        Ok(())
    });
}

#[test]
fn tokens_and_networks_have_their_life() {
    scenario("tokens and networks", |lab| {
        let (registrar, hq) = registrar(lab)?;
        let made = registrar.try_muster(&[
            "create",
            "token",
            "crew",
            "--reusable",
            "--ttl",
            "1h",
            "-n",
            "prod",
            "-l",
            "role=web,tier=a",
        ])?;
        // The command alone goes to standard output.
        assert!(
            made.stdout.starts_with("muster-agent join ") && made.stdout.lines().count() == 1,
            "{made:?}"
        );
        assert!(
            made.stderr.contains("token/crew created: lets any number of devices join until"),
            "{made:?}"
        );
        fails(&registrar.try_muster(&["create", "token", "crew"])?, 1, &["\"crew\" exists already"])?;
        let row = registrar.muster(&["get", "token", "crew", "-o", "wide", "--no-headers"])?;
        for part in ["Active", "true", "59m", "prod", "role=web,tier=a"] {
            // A second may have passed, or not yet.
            let part = if part == "59m" && row.contains("60m") { "60m" } else { part };
            assert!(row.contains(part), "{part}: {row}");
        }
        let agent = Agent::new(&hq, "")?;
        let join = muster_integration_tests::muster::JoinCommand::find(&made.stdout)?;
        agent.join(&join, "web")?;
        prints(
            &registrar,
            &["get", "devices", "-n", "prod", "-l", "role=web,tier=a", "-o", "name"],
            "device/web\n",
        )?;
        // Uses of reusable tokens are written now and then, many at once.
        wait_for("the use to be counted", PATIENCE, || {
            let row =
                registrar.muster(&["get", "token", "crew", "--no-headers"]).map_err(|e| e.to_string())?;
            let uses = row.split_whitespace().nth(3);
            if uses == Some("1") { Ok(()) } else { Err(row) }
        })?;
        prints(&registrar, &["revoke", "token/crew"], "token/crew revoked\n")?;
        let row = registrar.muster(&["get", "token", "crew", "--no-headers"])?;
        assert!(row.contains("Revoked"), "{row}");
        prints(&registrar, &["delete", "token", "crew"], "token \"crew\" deleted\n")?;
        fails(&registrar.try_muster(&["describe", "token", "crew"])?, 1, &["tokens \"crew\" not found"])?;

        fails(
            &registrar.try_muster(&["delete", "network", "default"])?,
            1,
            &["network \"default\" has 1 device", "delete"],
        )?;
        fails(
            &registrar.try_muster(&["create", "network", "lab", "--domain", "lab.example"])?,
            1,
            &["overlaps", "choose blocks"],
        )?;
        let pool = ["--device-pool-v4", "10.9.0.0/16"];
        let create = [&["create", "network", "lab", "--domain", "lab.example"], &pool[..]].concat();
        prints(&registrar, &create, "network/lab created\n")?;
        prints(&registrar, &["create", "device", "x", "--network", "lab"], "device/x created\n")?;
        prints(&registrar, &["get", "devices", "--network", "lab", "-o", "name"], "device/x\n")?;
        fails(
            &registrar.try_muster(&["get", "devices", "--network", "none"])?,
            1,
            &["network \"none\" does not exist", "muster get networks"],
        )?;
        prints(&registrar, &["label", "network", "lab", "use=test"], "network/lab labeled\n")?;
        prints(&registrar, &["get", "networks", "-l", "use=test", "-o", "name"], "network/lab\n")?;
        registrar.muster(&["delete", "device", "x", "--network", "lab"])?;
        prints(&registrar, &["delete", "network", "lab"], "network \"lab\" deleted\n")
    });
}
